"""Row 13: the newest checkpoints and the best ones are there after any retention."""

import json
import math
import random

import children
import jax
import numpy as np
import pytest
import small_runs

from jgpt import train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.evaluation import HeldoutLoss
from jgpt.keys import INIT, derive_key
from jgpt.plan import plan_run
from jgpt.runs import checkpoint, manifest
from jgpt.runs.folder import RunFiles, write_run_files
from jgpt.step import init_state
from jgpt.text.tokenizer import CharTokenizer

EXPERIMENT = resolve(load_experiment("names"), 27)
# Fmt: skip
FILES = RunFiles(
  "names",
  EXPERIMENT,
  CharTokenizer("abcdefghijklmnopqrstuvwxyz", bos=True),
  {"kind": "path", "sha256": "0" * 64},
)


def expected_steps(losses, keep_latest, keep_best):
  """The rule, in other words than the code's: of (step, loss or None) saved one after the other,
  which are left, ascending.
  """
  left = []
  for saved in losses:
    left.append(saved)
    newest = [step for step, _ in sorted(left)][-keep_latest:]
    rated = [(loss, -step) for step, loss in left if loss is not None and math.isfinite(loss)]
    best = [-step for _, step in sorted(rated)[:keep_best]]
    left = [(step, loss) for step, loss in left if step in newest or step in best]
  return sorted(step for step, _ in left)


def fake_step(workdir, step, loss):
  """A step's folder without arrays, for retention alone."""
  folder = workdir / "checkpoints" / str(step)
  folder.mkdir(parents=True)
  (folder / "experiment.json").write_text("{}")
  manifest.write_manifest(folder, manifest.Manifest(step, {"sequences": step}, loss, {}, {}))


@pytest.mark.parametrize("seed", range(10))
def test_row_13_any_sequence_of_losses(tmp_path, seed):
  """Random lengths, numbers kept, gaps without an evaluation, equal losses, NaN and infinity."""
  chance = random.Random(seed)
  keep_latest, keep_best = chance.randint(1, 4), chance.randint(0, 3)
  values = [
    None,
    math.nan,
    math.inf,
    -math.inf,
    *(chance.choice([1.0, 1.5, 2.0, chance.random()]) for _ in range(8)),
  ]
  losses = [(step, chance.choice(values)) for step in sorted(chance.sample(range(500), 25))]
  for number, (step, loss) in enumerate(losses, start=1):
    fake_step(tmp_path, step, loss)
    manifest.delete_old_steps(tmp_path, keep_latest, keep_best)
    assert manifest.list_steps(tmp_path) == expected_steps(
      losses[:number], keep_latest, keep_best
    ), losses[:number]
    rated = [
      (loss, -step) for step, loss in losses[:number] if loss is not None and math.isfinite(loss)
    ]
    if keep_best and rated:  # the best of all that ever was
      assert -min(rated)[1] in manifest.list_steps(tmp_path)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
      str(s) for s in manifest.list_steps(tmp_path)
    }


@pytest.mark.slow
@pytest.mark.parametrize(("keep_latest", "keep_best"), [(1, 0), (1, 1), (2, 1), (1, 3), (3, 2)])
def test_row_13_through_saving(tmp_path, keep_latest, keep_best):
  """Real saves; opened anew in the middle, as a run that goes on does."""
  state = jax.jit(lambda key: init_state(key, EXPERIMENT))(derive_key(0, INIT))
  write_run_files(tmp_path, FILES)
  losses = list(enumerate([3.0, 2.0, None, 2.5, 1.75, 2.0, None, 1.75, 4.0, 3.5], start=1))
  for part in (losses[:4], losses[4:]):
    with checkpoint.open_checkpoints(
      tmp_path, keep_latest=keep_latest, keep_best=keep_best
    ) as manager:
      for step, loss in part:
        heldout = None if loss is None else HeldoutLoss(loss, 9, None)
        note = checkpoint.StepNote(step, None, heldout)
        checkpoint.save_checkpoint(manager, state.replace(step=np.int32(step)), note)
  steps = manifest.list_steps(tmp_path)
  assert steps == expected_steps(losses, keep_latest, keep_best)
  for step in steps:
    assert manifest.find_damage(tmp_path / "checkpoints" / str(step)) is None
    assert (
      manifest.read_manifest(tmp_path / "checkpoints" / str(step)).heldout_loss
      == dict(losses)[step]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("save_every", "keep_latest", "keep_best"),
  [(5, 1, 1), (5, 2, 2), (10, 1, 2), (None, 1, 1), (3, 2, 1)],
)
def test_row_13_a_run_that_gets_worse_keeps_its_best(
  tmp_path, monkeypatch, save_every, keep_latest, keep_best
):
  """A rate so high that the held-out loss goes up and down; interrupted in the middle.

  What counts stands in the log. A better state between two saves is there after the second.
  """
  monkeypatch.chdir(tmp_path)
  children.write_texts(tmp_path)
  base, settings = children.EXPERIMENTS["names"]
  changes = {
    "train.steps": 50,
    "train.save_every": save_every,
    "train.eval_every": 5,
    "optimizer.peak_lr": 0.1,
  }
  changes |= {
    "train.keep_latest": keep_latest,
    "train.keep_best": keep_best,
    "optimizer.decay_steps": 50,
  }
  changes |= {"train.eval_batches": None}
  with small_runs.compiled_quickly():
    for steps in (25, 50):
      experiment = change(load_experiment(base), settings | changes | {"train.steps": steps})
      train.train_run(plan_run(experiment, workdir=tmp_path / "run", name="names"))
  rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  evaluated = {row["step"]: row["heldout/loss"] for row in rows if "heldout/loss" in row}
  assert list(evaluated) == list(range(0, 51, 5)) and list(evaluated.values()) != sorted(
    evaluated.values()
  )
  saved = sorted({*range(save_every or 50, 51, save_every or 50), 25, 50})
  losses = []
  for before, step in zip([0, *saved], saved, strict=False):
    known = min((loss for _, loss in losses if loss is not None), default=math.inf)
    between = [(evaluated[k], k) for k in evaluated if before < k < step]
    losses.append((step, evaluated.get(step)))
    if between and min(between)[0] < known:  # held, and saved with this step
      loss, k = min(between)
      if keep_best > 1 or loss < (evaluated.get(step) or math.inf):
        losses.append((k, loss))
  best = min(evaluated, key=evaluated.get)
  assert best in [0, *manifest.list_steps(tmp_path / "run")]
  assert manifest.list_steps(tmp_path / "run") == expected_steps(losses, keep_latest, keep_best), (
    losses
  )
  for step in manifest.list_steps(tmp_path / "run"):
    folder = tmp_path / "run" / "checkpoints" / str(step)
    assert manifest.read_manifest(folder).heldout_loss == evaluated.get(step)


@pytest.mark.slow
def test_row_13_as_a_command(tmp_path):
  """The best of a run is still there at its end, and `sample --step` reads it."""
  children.write_texts(tmp_path)
  changes = {
    "train__steps": 60,
    "train__save_every": 5,
    "train__eval_every": 5,
    "optimizer__peak_lr": 0.1,
  }
  children.train(
    *children.arguments("names", "run", **changes, train__keep_latest=1, train__keep_best=1),
    cwd=tmp_path,
  )
  rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  evaluated = {
    row["step"]: row["heldout/loss"] for row in rows if row.get("heldout/loss") and row["step"]
  }
  best = min(evaluated, key=lambda step: (evaluated[step], -step))
  assert set(children.steps_there(tmp_path / "run")) == {best, 60}
  read = children.run("jgpt.sample", "--run", "run", "--step", best, "--num", 2, cwd=tmp_path)
  assert read.status == 0 and len(read.out.splitlines()) == 2
