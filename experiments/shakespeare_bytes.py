"""Shakespeare by bytes: the byte-level GPT of a PyTorch tutorial, on data that is built in.

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
    num_layers=3,
    num_heads=4,
    d_model=64,
    d_ff=256,
    norm="layer",
    norm_embed=False,
    norm_final=True,
    activation="gelu_erf",
    positions="learned",
    biases="mlp",
    tied_head=True,
    scale_embed=True,
    dropout=0.1,
    dropout_places=("embedding", "attention", "activation", "mlp_out"),
    init_std=0.02,
    scale_residual_init=False,
  ),
  data=DataConfig(source="hamlet", tokenizer="bytes", batching="random", seq_len=64, batch_size=16, heldout_fraction=0.1),
  optimizer=OptimizerConfig(
    peak_lr=3e-4,
    schedule="cosine",
    warmup_steps=100,  # step / warmup: the first update changes nothing
    warmup_from_zero=True,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    decay_kinds=("embedding", "matrix"),  # gains and biases do not decay
    clip_norm=1.0,
  ),
  train=TrainConfig(steps=1000, log_every=200, eval_every=200, eval_batches=50),
  sample=SampleConfig(prompt="To be", num=1, temperature=0.8, top_k=20, max_tokens=100),
  expected=(Expected(data="hamlet", heldout=True, loss_nats_per_token=1.0, band=0.1),),
)
