"""microgpt: the names model from the original program's own start, loss by loss.

Python's `random.seed(42)` shuffles the documents, then `gauss(0, 0.08)` draws the weights; nothing is held out. With
`names.txt` the 1,000 losses are those of microgpt.py: print them with `--log-every 1`.

FIGURES
"""

import dataclasses

from jgpt.catalog import load_experiment
from jgpt.config import Expected

NAMES = load_experiment("names")
EXPERIMENT = dataclasses.replace(
  NAMES,
  data=dataclasses.replace(NAMES.data, heldout_fraction=0.0),
  train=dataclasses.replace(NAMES.train, seed=42, init="microgpt"),
  expected=(Expected(data="names", heldout=False, loss_nats_per_token=2.32, band=0.14),),
)
