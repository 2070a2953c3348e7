"""Row 15: compiled and operation by operation, with XLA's CPU fusions and without, loss and every
gradient are float64's.

As runs compile them, with fusions for all but the smallest,
`test_this_compiler_is_sound_at_every_experiments_shapes` in tests/devices/test_canary.py compares
them. Here are the other ways, for one experiment of each kind, two layers of it.
"""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from equivalence import CPU

from jgpt.config.catalog import load_experiment
from jgpt.config.experiment import PLAIN
from jgpt.config.settings import change, resolve
from jgpt.data.sources import expected_vocab_size
from jgpt.devices import canary
from jgpt.devices.compute import (
  FUSIONS,
  choose_quick_options,
  keep_known_options,
  resolve_compute,
)
from jgpt.model import init_params
from jgpt.sharding import stack_blocks, unstack_blocks
from jgpt.step import loss_and_grads

TOLERANCE = 1e-5  # of a leaf's largest entry
PIECES = {
  "model.num_layers": 2,
  "model.dropout": 0.0,
  "model.dropout_places": (),
  "data.batch_size": 1,
}


def small(name):
  """An experiment with its own widths and length, two layers and one sequence."""
  experiment = load_experiment(name)
  layers = min(2, experiment.model.num_layers)
  experiment = change(
    experiment,
    PIECES | {"model.num_layers": layers, "mesh.data": 1, "train.micro_batch_size": None},
  )
  return resolve(experiment, expected_vocab_size(experiment.data), 100)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["names", "shakespeare_bytes", "shakespeare_char_cpu", "gpt2_shakespeare"]
)
def test_row_15_eager_and_compiled_without_fusions_are_float64(name):
  experiment = resolve_compute(small(name), CPU)
  init = jax.jit(
    partial(init_params, config=experiment.model), compiler_options=choose_quick_options(experiment)
  )
  params = jax.tree.map(np.asarray, init(jax.random.key(0)))
  batch = canary.draw_batch(experiment)
  plain = dataclasses.replace(experiment, compute=PLAIN)
  expected = canary.compute_in_float64(params, batch, plain)
  run = partial(loss_and_grads, step=0, experiment=experiment)
  ways = {
    "operation by operation": lambda: run(unstack_blocks(params), batch),
    "without fusions": lambda: jax.jit(run, compiler_options=keep_known_options({FUSIONS: ""}))(
      unstack_blocks(params), batch
    ),
  }
  for way, compute in ways.items():
    loss, grads = compute()
    leaf, difference = canary.find_worst(expected, {"loss": loss, **stack_blocks(grads)})
    assert difference < TOLERANCE, f"{way}: {leaf} by {difference:.1e}"
