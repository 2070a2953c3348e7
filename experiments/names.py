"""Names: the smallest model worth training (microgpt).

Model: 4,192 parameters, context 16.

Training: 1,000 steps at batch 1, so one name each: 3.3% of the training names of `names.txt`, 8.0%
of the list that comes with jgpt. Twenty samples at temperature 0.5.

Cost on 2 CPU cores (AMD EPYC, AVX-512, jax 0.10.2): a step takes 30 us inside the compiled loop,
and the whole command 1.9 s once its compilations are cached, 4.5 s before. At batch 16 and 64 a
name takes 11 and 8 us.

Expected over seeds 0 to 19, with `names.txt` or with the list that comes with jgpt: a mean of the
last 50 training losses of 2.38 nats per character, between 2.25 and 2.52 (50 names scatter: seed 0
ends at 2.32 and 2.39), and a held-out loss of 2.38, between 2.35 and 2.40. A uniform guess has
ln 27 = 3.30.

To overfit one batch, add `--set data.num_batches=1`: the loss falls below 0.001 by step 200. At
batch 16 it stops at 0.38 and cannot fall below 0.1, because the first letters do not tell which of
the 16 names follows: ln 16 nats per name, over its 7 predictions, are 0.39.

Differs from microgpt.py in the initial weights and the order of the names (other random numbers),
and in keeping 5% of the names for validation; `--set data.heldout_fraction=0` trains on all.

Run: `python -m jgpt.run --experiment names`, seed 0; `python -m jgpt.bench` measures its speed.
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
    norm="rms",
    norm_embed=True,
    norm_final=False,
    activation="relu",
    positions="learned",
    biases="none",
    tied_head=False,
    scale_embed=False,
    init_std=0.08,
    scale_residual_init=False,
  ),
  data=DataConfig(
    source="names",
    tokenizer="characters",
    batching="documents",
    seq_len=16,
    batch_size=1,
    heldout_fraction=0.05,
  ),
  optimizer=OptimizerConfig(peak_lr=0.01, schedule="linear", b1=0.85, b2=0.99, eps=1e-8),
  train=TrainConfig(steps=1000, seed=0, log_every=100),
  sample=SampleConfig(num=20, temperature=0.5),
  mesh=MeshConfig(data=1),  # a batch of one cannot be divided
  expected=(
    Expected(data="names", heldout=True, loss_nats_per_token=2.38, band=0.03),
    Expected(data="names (bundled)", heldout=True, loss_nats_per_token=2.38, band=0.03),
  ),
)
