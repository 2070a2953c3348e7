"""microgpt: the names model from the original program's own start, loss by loss.

4,192 parameters, context 16, batch 1, 1,000 steps. Python's `random.seed(42)` shuffles the documents, then `gauss(0, 0.08)`
draws the weights in that program's order; nothing is held out. With `names.txt` each of the 1,000 losses is that of
microgpt.py to 1e-5 (`tests/test_microgpt.py`): print them with `--log-every 1`. The first is 3.3660 and the last 2.6497;
the mean of the last 50 is 2.32, and between 2.25 and 2.50 with nine other seeds. No warmup: the rate falls linearly from
0.01 to 0.

On 2 CPU cores it takes what `names` takes, 30 us a step and 2 s in all; the original needs 247 s. Differs from the text in
arithmetic only: float32 for Python's float64, and the loop is compiled. Seed 42; reproduce with `python -m jgpt.run
--experiment microgpt`.
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
