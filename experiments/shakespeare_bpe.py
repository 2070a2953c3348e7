"""Shakespeare by BPE: the GPT that is written in NumPy with hand-derived gradients.

FIGURES
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
  expected=(Expected(data="tiny_shakespeare", heldout=True, loss_nats_per_token=5.0, band=0.1),),
)
