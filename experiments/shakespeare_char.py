"""Shakespeare by characters: nanoGPT's preset for one GPU.

Model: 10,745,088 parameters: 6 layers of width 384, context 256, 65 characters, dropout 0.2.

Training: 5,000 steps of 64 random windows of tiny Shakespeare, 10% held out. AdamW at 1e-3, decay
0.1 on matrices and embeddings; warmup over 100 steps as (step + 1) / (warmup + 1), then cosine to
1e-4; clipped to 1. Every 1,000 steps the loss over the whole held-out part.

Cost on 2 CPU cores: 12 s a step (17 hours in total) and 8 GB of memory.

Expected: not measured to the end here. In the first 14 steps, still in the warmup, the loss falls
from 4.24 to 2.97. nanoGPT reports 1.47 held out on a GPU. A uniform guess has ln 65 = 4.17.

Differs from nanoGPT in random numbers, in float32 throughout, and in evaluating the whole held-out
part (nanoGPT draws 200 batches every 250 steps, of the training part too).

Run: `python -m jgpt.run --experiment shakespeare_char`, seed 0.
"""

from jgpt.config import (
  DataConfig,
  Experiment,
  ModelConfig,
  OptimizerConfig,
  SampleConfig,
  TrainConfig,
)

EXPERIMENT = Experiment(
  model=ModelConfig(
    max_seq_len=256,
    num_layers=6,
    num_heads=6,
    d_model=384,
    d_ff=1536,
    norm="layer_no_bias",
    norm_embed=False,
    norm_final=True,
    activation="gelu_erf",
    positions="learned",
    biases="none",
    tied_head=True,
    scale_embed=False,
    dropout=0.2,
    dropout_places=("embedding", "attention", "attention_out", "mlp_out"),
    init_std=0.02,
    scale_residual_init=True,
  ),
  data=DataConfig(
    source="tiny_shakespeare",
    tokenizer="characters",
    batching="random",
    seq_len=256,
    batch_size=64,
    heldout_fraction=0.1,
  ),
  optimizer=OptimizerConfig(
    peak_lr=1e-3,
    schedule="cosine",
    warmup_steps=100,  # (step + 1) / (warmup + 1): the first update has a rate
    warmup_from_zero=False,
    end_lr=1e-4,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.1,
    decay_kinds=("embedding", "matrix"),  # gains do not decay
    clip_norm=1.0,
  ),
  train=TrainConfig(steps=5000, log_every=50, save_every=500),
  sample=SampleConfig(num=1, temperature=0.8, max_tokens=500),
)
