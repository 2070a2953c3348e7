"""The run that a path names, and the checkpoint that a path and `--step` name, in every command."""

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jgpt
from jgpt import cli, evaluate, export, run, sample
from jgpt.config import catalog
from jgpt.doctor import cli as doctor_cli
from jgpt.errors import UserError
from jgpt.inspect import cli as inspect_cli
from jgpt.keys import INIT, derive_key
from jgpt.plan import claim_folder, plan_run
from jgpt.runs import checkpoint, manifest
from jgpt.runs.locate import find_checkpoint, locate_run, order_steps
from jgpt.step import init_state


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run with the checkpoints 30, 45 and 60, of which 45 is the best; step 40 was better."""
  folder = tmp_path_factory.mktemp("located")
  workdir = folder / "words"
  plan = plan_run(catalog.load_experiment("names"), workdir=workdir)
  with contextlib.ExitStack() as stack:
    claim_folder(plan, jax.devices(), stack)
    manager = stack.enter_context(checkpoint.open_checkpoints(workdir, keep_latest=3))
    state = jax.jit(init_state, static_argnums=1)(derive_key(0, INIT), plan.experiment)
    for step in (30, 45, 60):
      params = jax.tree.map(lambda x, step=step: x * step / 30, state.params)
      now = dataclasses.replace(state, step=jnp.int32(step), params=params)
      checkpoint.save_checkpoint(manager, now)
  for step, loss in ((45, 2.0), (30, 2.5), (60, 2.25)):
    set_loss(workdir / "checkpoints" / str(step), loss)
  (workdir / "metrics.jsonl").write_text('{"step": 40, "heldout/loss": 1.5}\n')
  return workdir


def set_loss(folder, loss):
  """Records a held-out loss in the manifest of a checkpoint."""
  told = manifest.read_manifest(folder)
  manifest.write_manifest(folder, dataclasses.replace(told, heldout_loss=loss))


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
  """A copy of the run, `runs/words` below the current folder."""
  shutil.copytree(trained, tmp_path / "runs" / "words")
  monkeypatch.chdir(tmp_path)
  return Path("runs/words")


PATHS = {
  "runs/words": (Path("runs/words"), None),
  "runs/words/": (Path("runs/words"), None),
  "runs/words/checkpoints": (Path("runs/words"), None),
  "runs/words/checkpoints/": (Path("runs/words"), None),
  "runs/words/samples": (Path("runs/words"), None),
  "runs/words/experiment.json": (Path("runs/words"), None),
  "runs/words/metrics.jsonl": (Path("runs/words"), None),
  "runs/words/checkpoints/30": (Path("runs/words"), 30),
  "runs/words/checkpoints/30/": (Path("runs/words"), 30),
  "runs/words/checkpoints/30/params": (Path("runs/words"), 30),
  "runs/words/checkpoints/30/params/": (Path("runs/words"), 30),
  "runs/words/checkpoints/30/manifest.json": (Path("runs/words"), 30),
  "./runs/../runs/words/checkpoints/60": (..., 60),
  "runs/words/checkpoints/31": (Path("runs/words"), 31),  # which is not there, as is said later
  "runs": None,
  "runs/words/nothing": None,
  "runs/words/checkpoints/x": None,
  "": None,
  "a\0b": None,
}


@pytest.mark.parametrize("source", PATHS)
def test_a_path_in_a_run_names_the_run_and_its_checkpoint(here, source):
  (here / "samples").mkdir(exist_ok=True)
  found, expected = find_checkpoint(source), PATHS[source]
  if expected is None:
    assert found is None
    return
  assert found[1] == expected[1]
  assert found[0].resolve() == here.resolve() and (expected[0] is ... or found[0] == expected[0])


def test_from_inside_a_run_and_by_a_link(here, monkeypatch):
  whole = here.absolute()
  (whole / "best").symlink_to("checkpoints/45")
  for inside, source, step in (
    (".", "runs/words/best", 45),
    ("runs/words", ".", None),
    ("runs/words", "checkpoints/60", 60),
    ("runs/words/checkpoints", "60", 60),
    ("runs/words/checkpoints", ".", None),
    ("runs/words/checkpoints/45", ".", 45),
    ("runs/words/checkpoints/45/params", "..", 45),
  ):
    with monkeypatch.context() as patch:
      patch.chdir(whole.parent.parent / inside)
      found = find_checkpoint(source)
      assert found[0].resolve() == whole and found[1] == step, (inside, source)


def test_a_run_that_is_called_checkpoints_5_is_a_run(here):
  moved = Path("mine/checkpoints/5")
  moved.parent.mkdir(parents=True)
  shutil.move(here, moved)
  assert find_checkpoint(moved) == (moved, None)
  assert find_checkpoint(moved / "checkpoints" / "45") == (moved, 45)
  shutil.copytree(moved / "checkpoints" / "45", "alone")
  with pytest.raises(UserError, match="a checkpoint outside of a run folder"):
    locate_run("alone")


def test_a_step_beside_a_checkpoint_must_be_the_same(here):
  assert locate_run("runs/words/checkpoints/30", 30) == (here, 30)
  assert locate_run("runs/words/checkpoints", 30) == (here, 30)
  for step in (60, "best"):
    with pytest.raises(UserError, match=rf"step 30, and --step asks for {step}\. Try --run runs"):
      locate_run("runs/words/checkpoints/30", step)


def test_the_best_step_is_the_saved_one_of_the_lowest_recorded_loss(here):
  """Of equal losses the newer one; a loss that is no number and an unreadable manifest do not
  count.
  """
  assert order_steps(here, "best") == [45, 60, 30]
  assert order_steps(here, None) == [60, 45, 30] and order_steps(here, 30) == [30]
  steps = here / "checkpoints"
  set_loss(steps / "60", 2.0)
  assert order_steps(here, "best") == [60, 45, 30]
  (steps / "60" / "manifest.json").write_text("{}")
  assert order_steps(here, "best") == [45, 30]
  set_loss(steps / "45", float("inf"))
  assert order_steps(here, "best") == [30]
  set_loss(steps / "30", None)
  with pytest.raises(UserError, match=r"no checkpoint of runs/words has a held-out loss.*--step"):
    order_steps(here, "best")
  with pytest.raises(UserError, match="no checkpoint of step 31; it has 30, 45, 60"):
    order_steps(here, 31)


def test_open_run_takes_the_best_sound_step_and_names_a_better_one(here, capfd):
  assert jgpt.open_run(here, "best").step == 45
  err = capfd.readouterr().err
  assert err.count("\n") == 1
  assert err.startswith("step 40 had a lower held-out loss, 1.5000, and was not saved; ")
  next((here / "checkpoints" / "45" / "params").rglob("*/*")).write_text("damaged")
  assert jgpt.open_run(here, step="best").step == 60
  assert "step 45 is damaged, the next best is taken" in capfd.readouterr().err
  assert jgpt.open_run(here / "checkpoints" / "30").step == 30
  assert jgpt.open_run(here).step == 60
  assert capfd.readouterr().err == ""


def test_no_run_is_kept_inside_another(here):
  for inside in ("checkpoints/30", "checkpoints", "checkpoints/99"):
    with pytest.raises(UserError, match="part of the run folder runs/words"):
      plan_run(catalog.load_experiment("names"), workdir=here / inside)
  assert run.main(["--experiment", "names", "--print-config"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
  ("main", "args"),
  [
    (sample.main, ["--num", "2"]),
    pytest.param(evaluate.main, ["--json"], marks=pytest.mark.slow),
    pytest.param(inspect_cli.main, ["--text", "ax"], marks=pytest.mark.slow),
    pytest.param(export.main, ["--format", "hf", "--out", "out"], marks=pytest.mark.slow),
  ],
)
def test_commands_take_a_checkpoints_path_and_the_best_step(here, capfd, main, args):
  """The same is printed for the path of a checkpoint and for its step."""

  def call(*words):
    shutil.rmtree("out", ignore_errors=True)
    status = cli.guard(lambda: main([*words, *args]))
    return status, *capfd.readouterr()

  if main is export.main:
    args = ["--format", "llmc", "--out", "out.bin"]
    status, _, err = call("--run", f"{here}/checkpoints/45")
    assert status == 2 and "model." in err  # names has no biases; the run was found
    return
  by_path = call("--run", f"{here}/checkpoints/45")
  assert by_path == call("--run", str(here), "--step", "45") and by_path[0] == 0
  assert by_path == call("--run", f"{here}/checkpoints/45/params/", "--step", "45")
  best = call("--run", f"{here}/checkpoints", "--step", "best")
  assert best[:2] == by_path[:2] and "step 40 had a lower held-out loss" in best[2]
  status, out, err = call("--run", f"{here}/checkpoints/45", "--step", "60")
  assert status == 2 and out == "" and "asks for 60" in err


@pytest.mark.slow
def test_doctor_examines_the_run_of_a_checkpoint(here, capsys):
  doctor_cli.main(["--run", f"{here}/checkpoints/30"])
  assert "experiment.json" not in capsys.readouterr().err


@pytest.mark.parametrize("step", ["newest", "-1", "1e3", "best ", ""])
def test_a_step_is_a_number_or_best(step, capsys):
  status = cli.guard(lambda: sample.main(["--run", "r", f"--step={step}"]))
  out, err = capsys.readouterr()
  assert status == 2 and out == "" and err.count("\n") == 1
  assert "a number of updates, or best; without --step it is the newest" in err
  assert not os.path.exists("r")
