"""Row 18: one compiled program trains and one evaluates, however many updates a call makes.

The bits are the same.

Calls of one, several and all updates of the same compiled program:
`test_any_split_into_calls_gives_the_same_bits` in tests/test_properties.py. Here are whole runs.
"""

import collections
import logging
import re

import jax
import numpy as np
import pytest
import small_runs

from jgpt import train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change
from jgpt.plan import plan_run

# Lines, evaluations, samples and checkpoints at every beat: calls of 1 to 13 updates.
CADENCES = {
  "train.log_every": 7,
  "train.eval_every": 5,
  "train.sample_every": 9,
  "train.save_every": 13,
}


class Compilations(logging.Handler):
  """Counts by name what XLA compiles."""

  def __init__(self):
    super().__init__()
    self.names = collections.Counter()

  def emit(self, record):
    if match := re.match(r"Finished XLA compilation of (\S+) in", record.getMessage()):
      self.names[match.group(1)] += 1


@pytest.fixture
def compilations():
  handler, logger = Compilations(), logging.getLogger("jax")
  level, propagate = logger.level, logger.propagate
  logger.addHandler(handler)
  logger.setLevel(logging.DEBUG)
  logger.propagate = False
  with jax.log_compiles():
    yield handler.names
  logger.removeHandler(handler)
  logger.setLevel(level)
  logger.propagate = propagate


@pytest.mark.slow
def test_row_18_one_program_trains_and_one_evaluates(tmp_path, compilations):
  """A run that does something at every beat, or stops and goes on, compiles what one does that
  makes two calls, no more.
  """
  path = tmp_path / "words.txt"
  path.write_text("".join(f"{word}\n" for word in small_runs.WORDS), encoding="utf-8")
  changes = {
    "data.path": str(path),
    "data.heldout_fraction": 0.2,
    "train.steps": 60,
    "optimizer.decay_steps": 60,
  }
  plain = change(load_experiment("names"), changes | {"train.log_every": 1000, "sample.num": 1})

  def run(experiment, name):
    jax.clear_caches()
    compilations.clear()
    result = train.train_run(plan_run(experiment, workdir=tmp_path / name, name="words"))
    compilations.pop("jit(probe_options)", None)  # once in a process
    return result, compilations.copy()

  whole, once = run(plain, "plain")
  busy, often = run(change(plain, CADENCES), "busy")
  names = ("<lambda>", "run_steps", "evaluate")  # <lambda> makes the state
  assert [once[f"jit({name})"] for name in names] == [1, 1, 1]
  assert often == once
  run(change(plain, CADENCES | {"train.steps": 31}), "stopped")
  resumed, again = run(change(plain, CADENCES), "stopped")
  assert again["jit(run_steps)"] == again["jit(evaluate)"] == 1 and again.total() <= once.total()
  for other in (busy, resumed):
    assert whole.losses.tobytes() == other.losses.tobytes()
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(other.state), strict=True):
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
