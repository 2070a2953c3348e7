"""Row 11: a checkpoint is the same on any number of devices, and training goes on with the next
batch on any of them.

jgpt trains in one process: of several there is nothing to test yet.
"""

import itertools
import json
import shutil
from functools import partial

import children
import jax
import numpy as np
import pytest
import small_runs

from jgpt import batches, program, sharding, train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change
from jgpt.plan import plan_run
from jgpt.runs import checkpoint
from jgpt.runs.open import open_run

DEVICES = (1, 2, 4, 8)


def experiment(devices, **changes):
  base, settings = children.EXPERIMENTS["bytes"]
  settings = settings | {
    "data.batch_size": 8,
    "mesh.data": devices,
    "optimizer.decay_steps": 12,
    "train.eval_every": None,
  }
  return change(
    load_experiment(base), settings | {k.replace("__", "."): v for k, v in changes.items()}
  )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A run of 6 updates on each number of devices."""
  folder = tmp_path_factory.mktemp("devices")
  children.write_texts(folder)
  with pytest.MonkeyPatch.context() as patch, small_runs.compiled_quickly():
    patch.chdir(folder)
    for n in DEVICES:
      train.train_run(
        plan_run(experiment(n, train__steps=6), workdir=folder / str(n), name="bytes")
      )
  return folder


def digests(workdir, step):
  return json.loads((workdir / "checkpoints" / str(step) / "manifest.json").read_text())["leaves"]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), list(itertools.product(DEVICES, DEVICES)))
def test_row_11_restored_on_other_devices_the_leaves_are_the_same(
  runs, tmp_path, monkeypatch, before, after
):
  """Read onto the other mesh and written from there: every digest is the first one's, and so is
  every byte.
  """
  monkeypatch.chdir(runs)
  with small_runs.compiled_quickly():
    plan = plan_run(experiment(after, train__steps=12), workdir=runs / str(before), name="bytes")
    mesh = sharding.make_mesh(plan.experiment, jax.devices())
    assert mesh.devices.size == after and plan.start_step == 6
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in ("experiment.json", "tokenizer.json"):
      shutil.copy(runs / str(before) / name, workdir)
    with checkpoint.open_checkpoints(runs / str(before), keep_latest=9) as manager:
      made = program.compile_program(
        plan.experiment, jax.devices(), plan.data, manager=manager, saved_step=6, num_steps=6
      )
    assert all(len(x.sharding.device_set) == after for x in jax.tree.leaves(made.state))
    with checkpoint.open_checkpoints(workdir) as manager:
      checkpoint.save_checkpoint(manager, made.state)
  assert digests(workdir, 6) == digests(runs / str(before), 6)
  expected = children.read_leaves(runs / str(before) / "checkpoints" / "6")
  got = children.read_leaves(workdir / "checkpoints" / "6")
  assert {name: x.tobytes() for name, x in got.items()} == {
    name: x.tobytes() for name, x in expected.items()
  }


@pytest.mark.slow
def test_row_11_the_next_batches_are_the_same_on_any_devices(runs, monkeypatch):
  monkeypatch.chdir(runs)
  found = {}
  for n in DEVICES:
    plan = plan_run(experiment(n, train__steps=12))
    mesh = sharding.make_mesh(plan.experiment, jax.devices())
    corpus = jax.device_put(plan.data.train, sharding.replicated(mesh))
    batch_fn = jax.jit(partial(batches.batch, experiment=plan.experiment))
    found[n] = [
      [np.asarray(x).tobytes() for x in batch_fn(corpus, np.int32(step))] for step in range(12)
    ]
  assert found[1] == found[2] == found[4] == found[8]
  assert len({b"".join(batch) for batch in found[1]}) == 12


@pytest.mark.slow
def test_row_11_processes_with_other_numbers_of_devices(tmp_path):
  """1, 8, 2 and 4 devices one after the other, as commands: the log has each update once, with the
  losses of one device.
  """
  children.write_texts(tmp_path)
  changes = {
    "data__batch_size": 8,
    "optimizer__decay_steps": 12,
    "train__eval_every": None,
    "mesh__data": None,
  }

  def go_on(workdir, devices, steps):
    env = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return children.train(
      *children.arguments("bytes", workdir, **changes, train__steps=steps), cwd=tmp_path, env=env
    )

  go_on("straight", 1, 12)
  for devices, steps in ((1, 3), (8, 6), (2, 9), (4, 12)):
    out = go_on("moving", devices, steps).out
    assert devices == 1 or f"{devices} of {devices} devices" in out
  logs = [
    [row for row in small_runs.read_untimed(tmp_path / name) if "train/loss" in row]
    for name in ("straight", "moving")
  ]
  assert [row["step"] for row in logs[1]] == list(range(1, 13))
  losses = [[row["train/loss"] for row in log] for log in logs]
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
  assert losses[1][:3] == losses[0][:3]
  first, second = (
    json.loads((tmp_path / name / "checkpoints" / "12" / "manifest.json").read_text())
    for name in ("straight", "moving")
  )
  assert first["data"] == second["data"] and first["data"]["sequences"] == 96
  starts = json.loads((tmp_path / "moving" / "env.json").read_text())
  assert [len(start["devices"]) for start in starts] == [1, 8, 2, 4]


@pytest.mark.slow
def test_row_11_any_reader_has_one_device(runs, monkeypatch):
  """A run of eight devices is sampled on one."""
  monkeypatch.chdir(runs)
  params = open_run(runs / "8").params
  assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(params))
  expected = children.read_leaves(runs / "8" / "checkpoints" / "6", ("params",))
  assert np.asarray(params["tok_embed"]).tobytes() == expected["params/tok_embed"].tobytes()
