"""GPT-2 124M on Shakespeare: the run of llm.c's train_gpt2, from random weights.

124,439,808 parameters, all biases and a tied head; 1,024 positions, of which 64 are trained; the vocabulary of 50,257 is
50,304 in memory. GPT-2's tokens of tiny Shakespeare as llm.c makes them, an end-of-text token before each paragraph: the
first 32,768 are held out, the other 305,260 are read in order, 4 × 64 at a time. Steps 0 to 40: 41 updates of AdamW at a
constant 1e-4, no warmup, no decay, no clipping. Every 10 steps the loss over the first 5 held-out batches; 64 tokens at
steps 20 and 40.

On 2 CPU cores 2 to 3 minutes, evaluation included. Expected on tiny Shakespeare, seed 0: from 11.00 before the first update
to 7.09 at step 40 over the first 5 held-out batches, and 7.01 over all 32,767 predictions after the last (one run; the band
is put at 0.2). Guessing uniformly is ln 50,257 = 10.82.

Differs from the text in where it begins: llm.c loads GPT-2's released weights, here `--init-from gpt2`. The norm of
the gradient jumps to 90 at step 29; that is the gradient, not a fault: three ways of compiling it agree. Seed 0; reproduce
with `python -m jgpt.run --experiment gpt2_shakespeare`. Needs the extra `bpe`, and 6 GB of memory.
"""

from jgpt.config import DataConfig, Expected, Experiment, ModelConfig, OptimizerConfig, SampleConfig, TrainConfig

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
  optimizer=OptimizerConfig(peak_lr=1e-4, schedule="constant", b1=0.9, b2=0.999, eps=1e-8),  # no warmup, decay or clipping
  train=TrainConfig(steps=41, log_every=10, eval_every=10, eval_batches=5, sample_every=20),
  sample=SampleConfig(num=1, temperature=1.0, max_tokens=64),
  expected=(Expected(data="tiny_shakespeare", heldout=True, loss_nats_per_token=7.01, band=0.2),),
)
