"""Shakespeare by characters on a laptop: nanoGPT's preset for a CPU.

FIGURES
"""

import dataclasses

from jgpt.catalog import load_experiment
from jgpt.config import Expected

GPU = load_experiment("shakespeare_char")
EXPERIMENT = dataclasses.replace(
  GPU,
  model=dataclasses.replace(
    GPU.model, max_seq_len=64, num_layers=4, num_heads=4, d_model=128, d_ff=512, dropout=0.0, dropout_places=()
  ),
  data=dataclasses.replace(GPU.data, seq_len=64, batch_size=12),
  train=dataclasses.replace(GPU.train, steps=2000, log_every=100, eval_every=250, eval_batches=20, save_every=None),
  expected=(Expected(data="tiny_shakespeare", heldout=True, loss_nats_per_token=1.88, band=0.05),),
)
