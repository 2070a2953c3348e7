"""microgpt: the names model with the original program's initial weights, loss by loss.

Model: 4,192 parameters, context 16.

Training: 1,000 steps at batch 1. Python's `random.seed(42)` shuffles the documents, then
`gauss(0, 0.08)` draws the weights in that program's order. Nothing is held out. The rate falls
linearly from 0.01 to 0, without a warmup.

Cost: that of `names` on 2 CPU cores, 30 us a step and 2 s in total; the original needs 247 s.

Expected with `names.txt`: each of the 1,000 losses equals that of microgpt.py to 1e-5
(`tests/test_microgpt.py`); `--log-every 1` prints them. The first is 3.3660 and the last 2.6497;
the mean of the last 50 is 2.32, and between 2.25 and 2.50 with nine other seeds.

Differs from microgpt.py in arithmetic only: float32 in place of Python's float64, and the loop is
compiled.

Run: `python -m jgpt.run --experiment microgpt`, seed 42.
"""

import dataclasses

from jgpt.config import Expected
from jgpt.config.catalog import load_experiment

NAMES = load_experiment("names")
EXPERIMENT = dataclasses.replace(
  NAMES,
  data=dataclasses.replace(NAMES.data, heldout_fraction=0.0),
  train=dataclasses.replace(NAMES.train, seed=42, init="microgpt"),
  expected=(Expected(data="names", heldout=False, loss_nats_per_token=2.38, band=0.14),),
)
