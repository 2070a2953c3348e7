"""Row 11: a checkpoint is the same on any mesh of devices, and training goes on with the next batch
on any of them.

Those of several processes are in row 32.
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
# Sizes of "data", "fsdp" and "tensor".
SHAPES = (
  *((n, 1, 1) for n in DEVICES),
  *((1, n, 1) for n in DEVICES[1:]),
  *((1, 1, n) for n in DEVICES[1:]),
  *((2, 2, 1), (4, 2, 1), (1, 2, 2), (4, 1, 2), (2, 2, 2)),
)
PAIRS = [
  pytest.param(*pair, id="-".join("x".join(map(str, shape)) for shape in pair))
  for pair in itertools.product(SHAPES, SHAPES)
]


def experiment(shape, **changes):
  base, settings = children.EXPERIMENTS["bytes"]
  settings = settings | {
    "data.batch_size": 8,
    **{f"mesh.{axis}": n for axis, n in zip(sharding.AXES, shape, strict=True)},
    "optimizer.decay_steps": 12,
    "train.eval_every": None,
  }
  return change(
    load_experiment(base), settings | {k.replace("__", "."): v for k, v in changes.items()}
  )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Returns the folder of a run of 6 updates on a mesh, which is trained when it is asked for."""
  folder = tmp_path_factory.mktemp("devices")
  children.write_texts(folder)

  def find_run(shape):
    workdir = folder / "x".join(map(str, shape))
    if not workdir.exists():
      with pytest.MonkeyPatch.context() as patch, small_runs.compiled_quickly():
        patch.chdir(folder)
        train.train_run(plan_run(experiment(shape, train__steps=6), workdir=workdir, name="bytes"))
    return workdir

  return find_run


def digests(workdir, step):
  return json.loads((workdir / "checkpoints" / str(step) / "manifest.json").read_text())["leaves"]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_row_11_restored_on_another_mesh_the_leaves_are_the_same(
  runs, tmp_path, monkeypatch, before, after
):
  """Read onto the other mesh and written from there: every digest is the first one's, and so is
  every byte.
  """
  run = runs(before)
  monkeypatch.chdir(run.parent)
  with small_runs.compiled_quickly():
    plan = plan_run(experiment(after, train__steps=12), workdir=run, name="bytes")
    mesh = sharding.make_mesh(plan.experiment, jax.devices())
    assert tuple(mesh.shape.values()) == after and plan.start_step == 6
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in ("experiment.json", "tokenizer.json"):
      shutil.copy(run / name, workdir)
    with checkpoint.open_checkpoints(run, keep_latest=9) as manager:
      made = program.compile_program(
        plan.experiment, jax.devices(), plan.data, manager=manager, saved_step=6, num_steps=6
      )
    assert all(len(x.sharding.device_set) == mesh.size for x in jax.tree.leaves(made.state))
    w_up = made.state.opt_state["adam"].mu["blocks"]
    w_up = w_up["w_up"] if isinstance(w_up, dict) else w_up[0]["w_up"]
    assert w_up.sharding.is_fully_replicated == (after[1] == after[2] == 1)
    with checkpoint.open_checkpoints(workdir) as manager:
      checkpoint.save_checkpoint(manager, made.state)
  assert digests(workdir, 6) == digests(run, 6)
  expected = children.read_leaves(run / "checkpoints" / "6")
  got = children.read_leaves(workdir / "checkpoints" / "6")
  assert {name: x.tobytes() for name, x in got.items()} == {
    name: x.tobytes() for name, x in expected.items()
  }


@pytest.mark.slow
def test_row_11_the_next_batches_are_the_same_on_any_devices(runs, monkeypatch):
  monkeypatch.chdir(runs((1, 1, 1)).parent)
  found = {}
  for shape in SHAPES:
    plan = plan_run(experiment(shape, train__steps=12))
    mesh = sharding.make_mesh(plan.experiment, jax.devices())
    corpus = jax.device_put(plan.data.train, sharding.replicated(mesh))
    batch_fn = jax.jit(partial(batches.batch, experiment=plan.experiment))
    found[shape] = [
      [np.asarray(x).tobytes() for x in batch_fn(corpus, np.int32(step))] for step in range(12)
    ]
  first = found[1, 1, 1]
  assert all(batches_there == first for batches_there in found.values())
  assert len({b"".join(batch) for batch in first}) == 12


@pytest.mark.slow
def test_row_11_processes_with_other_meshes(tmp_path):
  """1, 8, 2 and 4 devices in meshes of other shapes one after the other, as commands: the log has
  each update once, with the losses of one device.
  """
  children.write_texts(tmp_path)
  changes = {
    "data__batch_size": 8,
    "optimizer__decay_steps": 12,
    "train__eval_every": None,
    "mesh__data": -1,
  }

  def go_on(workdir, devices, steps, **sizes):
    env = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    words = children.arguments("bytes", workdir, **changes | sizes, train__steps=steps)
    return children.train(*words, cwd=tmp_path, env=env)

  go_on("straight", 1, 12)
  for devices, steps, sizes in (
    (1, 3, {}),
    (8, 6, {"mesh__fsdp": 2, "mesh__tensor": 2}),
    (2, 9, {"mesh__fsdp": 1, "mesh__tensor": 2}),
    (4, 12, {"mesh__fsdp": 4, "mesh__tensor": 1}),
  ):
    out = go_on("moving", devices, steps, **sizes).out
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
def test_row_11_any_reader_has_one_device(runs):
  """A run of eight devices is read, sampled and evaluated on one, with what it has learned."""
  run, alone = (open_run(runs(shape)) for shape in ((2, 2, 2), (1, 1, 1)))
  assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(run.params))
  expected = children.read_leaves(run.workdir / "checkpoints" / "6", ("params",))
  assert np.asarray(run.params["tok_embed"]).tobytes() == expected["params/tok_embed"].tobytes()
  assert run.loss(children.VERSE) == pytest.approx(alone.loss(children.VERSE), rel=1e-5)
  assert run.sample("To", num=2, temperature=0.0) == alone.sample("To", num=2, temperature=0.0)
