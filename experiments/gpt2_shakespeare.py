"""GPT-2 124M on Shakespeare: the run of llm.c's train_gpt2, from random weights.

Model: 124,439,808 parameters, all biases and a tied head; 1,024 positions, of which 64 are trained;
the vocabulary of 50,257 has 50,304 rows in memory.

Data: tiny Shakespeare in GPT-2's tokens as llm.c makes them, with an end-of-text token before each
paragraph. The first 32,768 tokens are held out, the other 305,260 are read in order, 4 × 64 at a
time.

Training: steps 0 to 40, so 41 updates of AdamW at a constant 1e-4, without warmup, decay or
clipping. The loss over the first held-out batch before any update, in the middle and at the end; 64
tokens are sampled at steps 20 and 40. `--set train.eval_every=10 --set train.eval_batches=5`
evaluates as train_gpt2 does.

Cost: 2 to 3 minutes on 2 CPU cores, evaluation included, and 6 GB of memory.

Expected on tiny Shakespeare, seed 0: the loss over the first 5 held-out batches falls from 11.00
before the first update to 7.09 at step 40; over all 32,767 predictions it is 7.01 after the last
update (one run; the band is set to 0.2). A uniform guess has ln 50,257 = 10.82. The gradient's norm
rises to 90 at step 29. This is correct: three ways of compiling it agree.

Differs from train_gpt2 in the initial weights: llm.c loads GPT-2's released ones, as `--init-from
gpt2` does here.

Run: `python -m jgpt.run --experiment gpt2_shakespeare`, seed 0. Needs the extra `bpe`.
"""

from jgpt.config import (
  DataConfig,
  Expected,
  Experiment,
  ModelConfig,
  OptimizerConfig,
  SampleConfig,
  TrainConfig,
)

EXPERIMENT = Experiment(
  model=ModelConfig(
    vocab_multiple=128,
    max_seq_len=1024,
    num_layers=12,
    num_heads=12,
    d_model=768,
    d_ff=3072,
    norm="layer",
    norm_embed=False,
    norm_final=True,
    activation="gelu_tanh",
    positions="learned",
    biases="all",
    tied_head=True,
    scale_embed=False,
    init_std=0.02,
    scale_residual_init=True,
  ),
  data=DataConfig(
    source="tiny_shakespeare",
    tokenizer="gpt2",
    mark_paragraphs=True,
    batching="sequential",
    seq_len=64,
    batch_size=4,
    heldout_fraction=0.0,
    heldout_tokens=32768,
  ),
  optimizer=OptimizerConfig(peak_lr=1e-4, schedule="constant", b1=0.9, b2=0.999, eps=1e-8),
  train=TrainConfig(steps=41, log_every=10, eval_every=21, eval_batches=1, sample_every=20),
  sample=SampleConfig(num=1, temperature=1.0, max_tokens=64),
  expected=(Expected(data="tiny_shakespeare", heldout=True, loss_nats_per_token=7.01, band=0.2),),
)
