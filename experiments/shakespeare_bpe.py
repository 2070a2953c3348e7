"""Shakespeare by BPE: the GPT that is written in NumPy with hand-derived gradients.

Model: 1,044,736 parameters: 4 layers of width 128 with fixed sinusoidal positions and a tied head,
context 64.

Data: byte-level BPE of 2,000 ids, trained on the first 90% of tiny Shakespeare (1,003,854
characters, 348,539 tokens).

Training: three epochs of 171 batches of 32 windows that do not overlap. AdamW at 3e-4 with decay
0.01 on every parameter; warmup over 100 steps as step / warmup (the first update changes nothing),
then cosine to 0; clipped to 1. After each epoch the loss over the first 7 held-out batches, and
50 tokens sampled from "ROMEO:"; at the end the loss over the whole held-out part.

Cost: 4 minutes on 2 CPU cores that are shared with other work.

Expected on tiny Shakespeare, seeds 0 and 1: a held-out loss of 5.69 nats per token (the seeds
differ by 0.006; the band is set to 0.05), and a training loss of 5.62. A uniform guess has ln 2000
= 7.60; a model that knows only the frequencies of tokens has about 6.05.

Differs from the text in the standard deviation of the initial weights, which the text does not
give. Here it is 0.08. At GPT-2's 0.02 the sinusoids, with a root mean square of 0.7, outweigh the
embeddings, and the model learns little more than the frequencies of tokens (6.05). Two figures
cannot be reproduced: three epochs do not reach a loss near 2.0, and a byte-level BPE gives 171
steps per epoch, not 485.

Run: `python -m jgpt.run --experiment shakespeare_bpe`, seed 0. Needs the extra `bpe`.
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
    max_seq_len=64,
    num_layers=4,
    num_heads=4,
    d_model=128,
    d_ff=512,
    norm="layer",
    norm_embed=False,
    norm_final=True,
    activation="gelu_tanh",
    positions="sinusoidal",
    biases="none",
    tied_head=True,
    scale_embed=False,
    init_std=0.08,
    scale_residual_init=False,
  ),
  data=DataConfig(
    source="tiny_shakespeare",
    tokenizer="bpe",
    bpe_vocab_size=2000,
    batching="epochs",
    seq_len=64,
    batch_size=32,
    heldout_fraction=0.1,
  ),
  optimizer=OptimizerConfig(
    peak_lr=3e-4,
    schedule="cosine",
    warmup_steps=100,  # step / warmup: the first update changes nothing
    warmup_from_zero=True,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.01,
    decay_kinds=("embedding", "matrix", "gain", "bias"),
    clip_norm=1.0,
  ),
  train=TrainConfig(epochs=3, log_every=50),  # evaluates and samples after each epoch
  sample=SampleConfig(prompt="ROMEO:", num=1, temperature=0.8, max_tokens=50),
  expected=(Expected(data="tiny_shakespeare", heldout=True, loss_nats_per_token=5.69, band=0.05),),
)
