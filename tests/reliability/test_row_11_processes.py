"""Row 11 over processes: a checkpoint is the same whatever number of processes wrote it or reads
it, and what fails in one process fails in all.
"""

import contextlib
import json
import shutil

import children
import jax
import numpy as np
import peer
import pytest
import small_runs

from jgpt import train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change
from jgpt.plan import plan_run
from jgpt.runs import checkpoint, manifest
from jgpt.runs.folder import RunFiles, write_run_files
from jgpt.text.tokenizer import CharTokenizer

FILES = RunFiles(
  "names",
  peer.make_experiment(),
  CharTokenizer("abcdefghijklmnopqrstuvwxyz", bos=True),
  {"kind": "path", "sha256": "0" * 64},
)


def run_peers(function, folder):
  """Runs a function of `peer.py` in two processes; returns what each found."""
  address = f"127.0.0.1:{children.find_port()}"
  with contextlib.ExitStack() as stack:
    both = [
      stack.enter_context(children.Child("peer", function, address, n, folder, cwd=folder))
      for n in range(2)
    ]
    for child in both:
      assert child.wait(300) == 0, both[0].err + both[1].err
  return [json.loads(child.out.splitlines()[-1]) for child in both]


def train_in_two(*args, cwd):
  """Runs `jgpt.run` in two processes of one device each, which must succeed."""
  with contextlib.ExitStack() as stack:
    both = children.start_processes(stack, *args, cwd=cwd)
    for child in both:
      assert child.wait(200) == 0, "".join(f"{c.out}{c.err}" for c in both)


def save_alone(workdir, step, **mesh):
  """Saves the state that the processes draw, from one process; returns its digests."""
  workdir.mkdir()
  write_run_files(workdir, FILES)
  _, draw = peer.shape_state(peer.make_experiment(**mesh), jax.devices())
  state = draw()
  with checkpoint.open_checkpoints(workdir) as manager:
    checkpoint.save_checkpoint(manager, peer.with_step(state, step))
  return peer.digest(state)


@pytest.mark.slow
def test_row_11_two_processes_save_and_restore(tmp_path):
  """Each has half of the state and writes it; one process reads it on 1 and on 4 devices, and they
  read what one process on 4 devices wrote. No error of one leaves the other waiting.
  """
  write_run_files(tmp_path, FILES)
  digests = save_alone(tmp_path / "one", 7, data=2, fsdp=2)
  found = run_peers("save_and_restore", tmp_path)
  for report in found:
    assert report["here"] < 0.6 * report["whole"], report
    assert report["steps"] == [1] and report["after full"] == [1] and report["again"] == [1, 2]
    assert report["digests"] == digests and report["restored"] == digests
    kind, message, seconds = report["full"]
    assert kind == "TrainingError" and "process 1: " in message and "too large" in message.lower()
    assert message.endswith("The last checkpoint is of step 1") and seconds < 20, message
    kind, message, seconds = report["not finite"]
    assert kind == "TrainingError" and "params/tok_embed is not finite" in message, message
    kind, message, seconds = report["damaged"]
    assert kind == "UserError" and "cannot read the checkpoint" in message and seconds < 20, message
  assert found[0]["full"][1] == found[1]["full"][1]
  assert found[0]["damaged"][1] == found[1]["damaged"][1]
  assert children.steps_there(tmp_path) == [1, 2]
  folder = tmp_path / "checkpoints" / "1"
  assert manifest.find_damage(folder) is None
  written = json.loads((folder / "manifest.json").read_text())["leaves"]
  alone = tmp_path / "one" / "checkpoints" / "7"
  of_one = json.loads((alone / "manifest.json").read_text())["leaves"]
  assert {n for n in written if written[n] != of_one[n]} == {"train_state/step"}
  for mesh in ({"data": 1}, {"data": 2, "fsdp": 2}):
    shapes, _ = peer.shape_state(peer.make_experiment(**mesh), jax.devices())
    state = checkpoint.restore(folder, shapes)
    assert peer.digest(state) == digests
  expected = children.read_leaves(alone)
  for name, x in children.read_leaves(folder).items():
    assert name == "train_state/step" or np.array_equal(x, expected[name]), name


RUN = {
  "data__batch_size": 8,
  "train__save_every": 6,
  "train__keep_latest": 9,
  "optimizer__decay_steps": 12,
}


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_row_11_a_run_goes_on_over_other_processes(texts, tmp_path, monkeypatch, axis):
  """Two processes of a device each compute the bits of one process with two, and either goes on
  with the run of the other; one device and four go on with it to the same losses.
  """
  monkeypatch.chdir(texts)

  def arguments(name, steps):
    mesh = {"mesh__data": 1, f"mesh__{axis}": 2}
    return children.arguments("bytes", tmp_path / name, **RUN, **mesh, train__steps=steps)

  train_in_two(*arguments("two", 12), cwd=texts)
  env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  children.train(*arguments("one", 6), cwd=texts, env=env)
  train_in_two(*arguments("one", 12), cwd=texts)
  (tmp_path / "one" / "samples" / "step_6.txt").unlink()  # a run of 6 updates ends with texts
  children.assert_same(children.bits(tmp_path / "one"), children.bits(tmp_path / "two"))

  rows = small_runs.read_untimed(tmp_path / "two")
  base, settings = children.EXPERIMENTS["bytes"]
  settings = settings | {name.replace("__", "."): value for name, value in RUN.items()}
  for mesh in ({"mesh.data": 1}, {"mesh.data": 2, "mesh.fsdp": 2}):
    workdir = tmp_path / f"on {len(mesh)}"
    shutil.copytree(tmp_path / "two", workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    log = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_bytes(b"".join(log[:-1]))  # as before its end
    experiment = change(load_experiment(base), settings | mesh | {"train.steps": 12})
    with small_runs.compiled_quickly():
      plan = plan_run(experiment, workdir=workdir)
      assert plan.start_step == 6
      train.train_run(plan)
    there = small_runs.read_untimed(workdir)
    assert [row.get("step") for row in there] == [row.get("step") for row in rows]
    for row, expected in zip(there, rows, strict=True):
      assert row == pytest.approx(expected, rel=2e-5)


@pytest.mark.slow
def test_row_11_no_process_holds_the_whole_state(tmp_path):
  """Of 512 MB of parameters and moments each of two processes has half, and a save takes as much
  again, for the copy that is written; where blocks are a list they are stacked besides.
  """
  write_run_files(tmp_path, FILES)
  for found in run_peers("measure_memory", tmp_path):
    here = found["here"]
    assert here == pytest.approx(found["whole"] / 2, rel=0.01)
    assert found["scan: saving"] < 1.6 * here  # what orbax copies, and its buffers
    assert found["unroll: saving"] < 2.6 * here  # the same, and the stacked blocks
