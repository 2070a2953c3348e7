"""Row 9: a checkpoint holds the values of its step, though the state's memory is given to the next
update at once.
"""

import time

import children
import jax
import numpy as np
import pytest
import small_runs

from jgpt import program, train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change
from jgpt.plan import plan_run
from jgpt.runs import manifest
from jgpt.sharding import stack_blocks


def reference(experiment, steps):
  """Leaves after each update, copied to the host before the next one is begun: name -> array, as on
  disk.
  """
  plan = plan_run(experiment)
  made = program.compile_program(plan.experiment, jax.devices(), plan.data, num_steps=steps)
  state, found = made.state, []
  for step in range(steps):
    state, _ = made.run_steps(made.feed.corpus_at(step), state, np.int32(1))
    stacked = stack_blocks(state) if isinstance(state.params["blocks"], list) else state
    items = {
      "params": stacked.params,
      "train_state": {"step": stacked.step, "opt_state": stacked.opt_state},
    }
    leaves = jax.tree_util.tree_leaves_with_path(items)
    found.append({flat_name(path): np.array(x) for path, x in leaves})
  return found


def flat_name(path):
  item, *rest = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
  return f"{item}/{'.'.join(rest)}"


def assert_every_step_is_its_own(workdir, expected):
  assert manifest.list_steps(workdir) == list(range(1, len(expected) + 1))
  for step, leaves in enumerate(expected, start=1):
    got = children.read_leaves(workdir / "checkpoints" / str(step))
    assert got.keys() == leaves.keys()
    different = [name for name, x in leaves.items() if x.tobytes() != got[name].tobytes()]
    assert different == [], (step, different)
    assert manifest.find_damage(workdir / "checkpoints" / str(step)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["names", "bytes"])
def test_row_09_saving_every_step_of_a_small_state(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  children.write_texts(tmp_path)
  base, settings = children.EXPERIMENTS[name]
  changes = {
    "train.steps": 25,
    "train.save_every": 1,
    "train.keep_latest": 100,
    "train.eval_every": None,
  }
  experiment = change(load_experiment(base), settings | changes)
  with small_runs.compiled_quickly():
    expected = reference(experiment, 25)
    train.train_run(plan_run(experiment, workdir=tmp_path / "run", name=name))
  assert_every_step_is_its_own(tmp_path / "run", expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_row_09_saving_every_step_of_a_state_of_231_megabytes(tmp_path, monkeypatch, layers):
  """Writing takes longer than an update does. With layers in a list what is saved is a copy.

  Stacked, the state itself.
  """
  monkeypatch.chdir(tmp_path)
  children.write_texts(tmp_path)
  base, settings = children.EXPERIMENTS["names"]
  sizes = {
    "model.d_model": 896,
    "model.d_ff": 3584,
    "model.num_layers": 2,
    "compute.layers": layers,
  }
  changes = {
    "train.steps": 4,
    "train.save_every": 1,
    "train.keep_latest": 100,
    "data.heldout_fraction": 0,
  }
  experiment = change(load_experiment(base), settings | sizes | changes)
  with small_runs.compiled_quickly():
    expected = reference(experiment, 4)
    assert sum(x.nbytes for x in expected[0].values()) > 200e6
    began = time.monotonic()
    train.train_run(plan_run(experiment, workdir=tmp_path / "run", name="names"))
  print(f"\n4 steps, each saved: {time.monotonic() - began:.1f} s")
  assert_every_step_is_its_own(tmp_path / "run", expected)
