"""GPT-2 124M on Shakespeare: the run of llm.c's train_gpt2, from random weights.

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
  train=TrainConfig(steps=41, log_every=1, eval_every=10, eval_batches=5, sample_every=20),
  sample=SampleConfig(num=1, temperature=1.0, max_tokens=64),
  expected=(Expected(data="tiny_shakespeare", heldout=True, loss_nats_per_token=6.5, band=0.2),),
)
