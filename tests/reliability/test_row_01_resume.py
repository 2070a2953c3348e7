"""Rows 1 and 2: where a run was stopped, and how often, leaves no trace in its bits.

Nor does running it again.

`tests/test_train.py` has the same for a few stops; here every kind of place is stopped at, twice in
a row, and what is compared is the run folder: every leaf on disk, the digests recorded for them,
the log and the samples byte by byte.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import children
import jax
import numpy as np
import pytest
import small_runs

from jgpt import batches, train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change
from jgpt.plan import plan_run
from jgpt.runs.log import Chunk, JsonlWriter

STEPS = 21
EPOCH = 7  # of `epochs`: 1,163 bytes in windows of 16, 10 at a time


@pytest.fixture
def texts(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  children.write_texts(tmp_path)
  return tmp_path


def experiment(name, **changes):
  """One of `children.EXPERIMENTS`, whose schedule's length is fixed."""
  base, settings = children.EXPERIMENTS[name]
  settings = settings | {"train.steps": STEPS, "train.log_every": 4, "optimizer.decay_steps": STEPS}
  return change(
    load_experiment(base), settings | {k.replace("__", "."): v for k, v in changes.items()}
  )


def run(chosen, workdir, **changes):
  """Trains in this process, and keeps samples as the command does."""
  chosen = change(chosen, {k.replace("__", "."): v for k, v in changes.items()})
  with small_runs.compiled_quickly():
    result = train.train_run(plan_run(chosen, workdir=workdir, name="small"))
  return result


def assert_same_but_for_ends(got, expected):
  """Where a run ended for a while, it was evaluated once more than the uninterrupted one."""
  rows = expected.metrics.splitlines(keepends=True)
  lines = got.metrics.splitlines(keepends=True)
  kept = [line for line in lines if b'"heldout/loss"' not in line or line in rows]
  children.assert_same(dataclasses.replace(got, metrics=b"".join(kept)), expected)


CASES = {
  "names": experiment("names", train__eval_every=5, train__eval_batches=2),
  "epochs": experiment(
    "epochs", train__eval_every=EPOCH, train__eval_batches=None, data__batch_size=10
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "stops"), [("names", (0, 1, 10, 11, 20, 21)), ("epochs", (1, 6, 7, 8, 14, 20))]
)
def test_row_01_stopped_at_k_and_again_at_k_the_folder_is_that_of_an_uninterrupted_run(
  texts, name, stops
):
  """K: 0, 1, the middle, the last but one, the last, and around the ends of epochs (7, 14) and
  evaluations (10).
  """
  straight = run(CASES[name], texts / "straight")
  expected = children.bits(texts / "straight")
  rows = [json.loads(row) for row in expected.metrics.splitlines()]
  assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
  assert any("heldout/loss" in row for row in rows)
  for k in stops:
    workdir = texts / f"at {k}"
    first = run(CASES[name], workdir, train__steps=k)
    again = run(CASES[name], workdir, train__steps=k)  # restores, and has nothing to do
    assert int(first.state.step) == int(again.state.step) == k
    stopped = small_runs.read_untimed(workdir)
    assert stopped.pop()["final"]
    is_due = k in dict(straight.heldout_losses)
    if k and not is_due:  # an end is evaluated as well
      assert stopped[-1]["step"] == k and "heldout/loss" in stopped.pop()
    assert stopped == [
      row for row in rows if row["step"] <= k and k and "final" not in row
    ]  # without updates nothing is evaluated
    result = run(CASES[name], workdir)
    assert_same_but_for_ends(children.bits(workdir), expected)
    assert result.losses.tobytes() == straight.losses.tobytes()
    assert [e for e in result.heldout_losses if is_due or e[0] != k] == straight.heldout_losses
    assert children.nothing_half_done(workdir) == []


@pytest.mark.slow
def test_row_01_stopped_after_every_single_update(texts):
  """Eight updates one at a time: as many starts as updates."""
  run(CASES["epochs"], texts / "straight", train__steps=8)
  for k in range(1, 9):
    run(CASES["epochs"], texts / "bit by bit", train__steps=k)
  assert_same_but_for_ends(children.bits(texts / "bit by bit"), children.bits(texts / "straight"))


@pytest.mark.slow
def test_row_01_the_next_batches_are_those_of_the_step(texts):
  """What batch n holds is asked of a corpus that was loaded anew, in any order: it depends on n
  alone.
  """
  for name in ("names", "bytes", "epochs"):
    chosen = experiment(name)
    plans = [plan_run(chosen, workdir=None) for _ in range(2)]
    forward = [read_batch(plans[0], n) for n in range(STEPS)]
    for n in np.random.default_rng(0).permutation(STEPS):
      assert read_batch(plans[1], n) == forward[n], (name, n)
    assert len({b"".join(batch) for batch in forward}) > 1


def read_batch(plan, step):
  batch = batches.batch(jax.device_put(plan.data.train), np.int32(step), plan.experiment)
  return [np.asarray(x).tobytes() for x in batch]


def rows_to(step):
  """A log as `JsonlWriter` writes it, with an evaluation every 5 updates."""
  rows = []
  for k in range(1, step + 1):
    rows.append(
      {
        "step": k,
        "train/loss": 3.0 - k / 64,
        "train/grad_norm": 1.0,
        "train/lr": 0.01,
        "train/skipped": 0,
      }
    )
    rows += [{"step": k, "heldout/loss": 2.5}] if k % 5 == 0 else []
  return "".join(json.dumps(row) + "\n" for row in rows)


def go_on(path, step):
  """What a start that goes on from a step makes of a log with its first update."""
  writer = JsonlWriter(path, step)
  writer.write(Chunk(step + 1, {"train/loss": np.float32([0.5])}, 1.0))
  writer.close()
  return path.read_bytes()


@pytest.mark.parametrize("step", [0, 1, 9, 10])
def test_row_01_rows_past_the_restored_step_are_dropped_wherever_the_log_was_torn(tmp_path, step):
  """Cut at every byte of the last two rows, also of those that belong to the restored step, and
  followed by garbage.
  """
  path, whole, kept = tmp_path / "metrics.jsonl", rows_to(12).encode(), rows_to(step).encode()
  expected = kept + f'{{"step": {step + 1}, "train/loss": 0.5}}\n'.encode()
  for length in range(len(rows_to(10).encode()), len(whole) + 1):
    path.write_bytes(whole[:length])
    assert go_on(path, step) == expected
  for tail in (
    b"\0" * 100,
    b"\xff\xfe{",
    b"[" * 10_000,
    b'{"step": "11"}\n',
    b'"',
    b'{"step": 1e400}\n',
    b"\n\n",
    b"\r",
  ):
    path.write_bytes(whole + tail)
    assert go_on(path, step) == expected, tail
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


# The line of the update of step 3, and what became of it.
DAMAGED_LINES = {
  "a later step": lambda line: line.replace(b'"step": 3', b'"step": 93'),
  "a word for a loss": lambda line: b'{"step": 3, "train/loss": "x"}\n',
  "a loss of 400 digits": lambda line: b'{"step": 3, "train/loss": ' + b"9" * 400 + b"}\n",
  "no loss": lambda line: b'{"step": 3, "train/loss": null, "train/skipped": []}\n',
  "a hole": lambda line: b"\0" * 300_000 + b"\n",
}


@pytest.mark.slow
def test_row_01_a_damaged_line_of_the_log_stays_and_changes_nothing_else(texts):
  """As commands: a finished run leaves the log as it is.

  One that goes on adds the rows of an uninterrupted run.
  """
  args = {"train__eval_every": 10, "optimizer__decay_steps": 20, "optimizer__end_lr": 1e-4}
  children.train(*children.arguments("names", "straight", train__steps=20, **args), cwd=texts)

  def read(workdir):
    return small_runs.drop_times((workdir / "metrics.jsonl").read_bytes()).splitlines(keepends=True)

  expected = read(texts / "straight")
  children.train(*children.arguments("names", "run", train__steps=15, **args), cwd=texts)
  for how, damage in DAMAGED_LINES.items():
    workdir = Path(shutil.copytree(texts / "run", texts / how))
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if line.startswith(b'{"step": 3,'))
    lines[at] = damaged = damage(lines[at])
    (workdir / "metrics.jsonl").write_bytes(b"".join(lines))
    again = children.train(
      *children.arguments("names", workdir, train__steps=15, **args), cwd=texts
    )
    assert again.err == "" and "finished" in again.out, how
    assert (workdir / "metrics.jsonl").read_bytes() == b"".join(lines), how
    more = children.train(*children.arguments("names", workdir, train__steps=20, **args), cwd=texts)
    assert more.err == "", how
    at = len([line for line in lines[:at] if b'"perf/' not in line])
    found = [line for line in read(workdir) if not line.startswith(b'{"step": 15, "heldout/loss"')]
    assert found == [*expected[:at], damaged, *expected[at + 1 :]], how
    assert children.bits(workdir).leaves == children.bits(texts / "straight").leaves, how


@pytest.mark.slow
@pytest.mark.parametrize("name", ["names"])
def test_row_02_the_same_command_twice_gives_the_same_bits(texts, name):
  """Two processes, one after the other and two at once; the log and the samples too."""
  args = {
    "train__steps": 40,
    "train__eval_every": 20,
    "train__save_every": 15,
    "train__log_every": 10,
  }
  children.train(*children.arguments(name, "a", **args), cwd=texts)
  with (
    children.Child("jgpt.run", *children.arguments(name, "b", **args), cwd=texts) as b,
    children.Child("jgpt.run", *children.arguments(name, "c", **args), cwd=texts) as c,
  ):
    assert b.wait() == c.wait() == 0, b.err + c.err
  expected = children.bits(texts / "a")
  assert expected.step == 40 and list(expected.samples) == ["step_40.txt"]
  children.assert_same(children.bits(texts / "b"), expected)
  children.assert_same(children.bits(texts / "c"), expected)
