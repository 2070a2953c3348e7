"""Names: the smallest model worth training (microgpt).

EXPECTED-TO-BE-MEASURED
"""

from jgpt.config import (
  DataConfig,
  Expected,
  Experiment,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  SampleConfig,
  TrainConfig,
)

EXPERIMENT = Experiment(
  model=ModelConfig(
    vocab_size=None,  # the tokenizer's: 26 letters and BOS
    max_seq_len=16,
    num_layers=1,
    num_heads=4,
    d_model=16,
    d_ff=64,
    init_std=0.08,
  ),
  data=DataConfig(source="names", seq_len=16, batch_size=1, heldout_fraction=0.05),
  optimizer=OptimizerConfig(peak_lr=0.01, b1=0.85, b2=0.99, eps=1e-8),
  train=TrainConfig(steps=1000, seed=0, log_every=100),
  sample=SampleConfig(num=20, temperature=0.5),
  mesh=MeshConfig(data=1),  # a batch of one cannot be divided
  expected=(Expected(data="names.txt", loss_nats_per_token=2.32, band=0.1),),
)
