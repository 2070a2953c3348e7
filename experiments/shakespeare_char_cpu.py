"""Shakespeare by characters on a laptop: nanoGPT's preset for a CPU.

Model: 804,096 parameters: 4 layers of width 128, context 64, 65 characters, no dropout.

Training: 2,000 steps of 12 random windows of tiny Shakespeare, 10% held out. AdamW at 1e-3, decay
0.1 on matrices and embeddings; warmup over 100 steps as (step + 1) / (warmup + 1), then cosine to
1e-4; clipped to 1. Every 400 steps the held-out loss over 20 random batches.

Cost: 34 ms a step and 90 s in total on 2 CPU cores; 22 ms a step in bfloat16, which `compute.dtype`
takes where the processor multiplies it.

Expected on tiny Shakespeare, seeds 0 and 1: a loss of 1.90 nats per character over the whole
held-out part (1.904 and 1.900; the band is set to 0.03), and a training loss of 1.76. A uniform
guess has ln 65 = 4.17.

Differs from nanoGPT in random numbers, and in evaluating the same windows each time; nanoGPT
reports about 1.88, over 20 batches.

Run: `python -m jgpt.run --experiment shakespeare_char_cpu`, seed 0; `python -m jgpt.bench --only
shakespeare_char_cpu --peer torch` measures its speed.
"""

import dataclasses

from jgpt.config import Expected
from jgpt.config.catalog import load_experiment

GPU = load_experiment("shakespeare_char")
EXPERIMENT = dataclasses.replace(
  GPU,
  model=dataclasses.replace(
    GPU.model,
    max_seq_len=64,
    num_layers=4,
    num_heads=4,
    d_model=128,
    d_ff=512,
    dropout=0.0,
    dropout_places=(),
  ),
  data=dataclasses.replace(GPU.data, seq_len=64, batch_size=12),
  train=dataclasses.replace(GPU.train, steps=2000, log_every=100, save_every=None),
  expected=(Expected(data="tiny_shakespeare", heldout=True, loss_nats_per_token=1.90, band=0.03),),
)
