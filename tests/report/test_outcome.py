"""A run's end: result.json, the best state, the limit of time, and when a run evaluates."""

import dataclasses
import math
import os
import signal
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import small_runs

from jgpt import train
from jgpt.batches import Documents, Stream, count_eval_batches
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, parse_setting, resolve
from jgpt.devices import limits
from jgpt.errors import UserError
from jgpt.evaluation import HeldoutLoss, schedule_evaluations
from jgpt.plan import plan_run
from jgpt.report.console import ConsoleWriter, format_duration
from jgpt.report.summary import describe_best
from jgpt.runs import manifest, saving
from jgpt.runs.clock import RUN_PARTS, Perf
from jgpt.runs.log import Chunk
from jgpt.runs.open import open_run
from jgpt.runs.result import find_best, read_result, write_result

pytestmark = pytest.mark.usefixtures("quick")

STEPS = 40
PEAK = 1e9  # FLOP/s that the CPU of the finished run is said to reach
# A rate so high that the loss on the held-out part rises after a few updates.
CHANGES = {
  "train.steps": STEPS,
  "train.log_every": 20,
  "train.eval_every": 4,
  "optimizer.peak_lr": 0.3,
  "optimizer.schedule": "constant",
  "data.heldout_fraction": 0.2,
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "words.txt"
  path.write_text("".join(f"{word}\n" for word in small_runs.WORDS), encoding="utf-8")
  return change(load_experiment("names"), CHANGES | {"data.path": str(path)})


def run(experiment, workdir, **options):
  return train.train_run(plan_run(experiment, workdir=workdir, name="words"), **options)


class Interrupter:
  """Sends this process a signal after a step, as a writer."""

  def __init__(self, step):
    self.step = step

  def write(self, chunk):
    if chunk.step == self.step:
      os.kill(os.getpid(), signal.SIGTERM)

  def close(self):
    pass


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
  """A finished run's folder and what training returned."""
  workdir = tmp_path_factory.mktemp("run") / "run"
  cpu = limits.Accelerator("cpu", *3 * (PEAK,), memory=2**40, bandwidth=1e9)
  with small_runs.compiled_quickly(), mock.patch.object(limits, "ACCELERATORS", (cpu,)):
    return workdir, run(experiment, workdir)


def read_evaluations(workdir):
  """(step, loss) of each evaluation during training, from the file."""
  rows = small_runs.read_untimed(workdir)
  return [(r["step"], r["heldout/loss"]) for r in rows if "heldout/loss" in r and "final" not in r]


# --- result.json ---


def test_the_end_of_a_run_is_in_result_json(finished):
  workdir, result = finished
  found, rows = read_result(workdir), small_runs.read_untimed(workdir)
  assert found["ended_by"] == "finished" and found["is_finished"] is True
  assert (found["name"], found["step"], found["steps"]) == ("words", STEPS, STEPS)
  lengths = plan_run(result.experiment).data.train.lengths
  tokens = int(np.resize(lengths, STEPS).sum())  # one document an update, in order
  assert found["tokens"] == tokens == result.seen.tokens and found["sequences"] == STEPS
  assert found["training_loss"] == pytest.approx(float(result.losses.mean()))
  assert found["heldout_loss"] == result.heldout_loss and rows[-1]["final"] is True
  assert rows[-1]["heldout/loss"] == found["heldout_loss"]
  assert rows[-1]["heldout/tokens"] == found["heldout_tokens"] == result.heldout_tokens
  assert rows[-1]["heldout/bits_per_byte"] == found["heldout_bits_per_byte"] > 0
  step, loss = min(read_evaluations(workdir)[1:], key=lambda e: (e[1], -e[0]))
  best = {"step": step, "loss": loss, "tokens": result.heldout_tokens, "batches": None}
  assert found["best"] == found["best_saved"] == best
  assert found["verdict"]["verdict"] and found["verdict"]["evidence"]
  assert found["expected"] is None  # of other settings
  assert list(found["seconds"]) == list(RUN_PARTS)
  assert all(found["seconds"][part] > 0 for part in ("planning", "compiling", "training", "saving"))
  here = found["tokens"] / found["seconds"]["training"]
  assert found["tokens_per_second"] == pytest.approx(here, rel=1e-3)
  flops = limits.count_train_flops(result.experiment.model, 16)
  assert found["mfu"] == pytest.approx(here * flops / PEAK, rel=1e-3)
  assert found["peak_memory_bytes"]["host"] > 10**8
  assert found["compiled"]["programs"] >= max(2, found["compiled"]["from_cache"])
  assert found["compiled"]["seconds"] > 0


def test_rows_of_time_add_up_to_the_seconds_of_training(finished):
  workdir, result = finished
  metrics = open_run(workdir).metrics
  flops = limits.count_train_flops(result.experiment.model, 16)
  expected = metrics["perf/tokens_per_second"].values * flops / PEAK
  np.testing.assert_allclose(metrics["perf/mfu"].values, expected, rtol=1e-3)
  assert metrics["perf/seconds"].values.sum() == pytest.approx(result.seconds["training"], rel=0.05)
  assert metrics["tokens"].values[-1] == result.seen.tokens
  assert (np.diff(metrics["tokens"].values) > 0).all()


@pytest.mark.slow
def test_a_signal_leaves_a_result_that_says_so_and_the_end_replaces_it(experiment, tmp_path):
  """Also the end of the same bits, except for time; a start that makes updates removes it first."""
  first = run(experiment, tmp_path, writers=[Interrupter(20)])
  found = read_result(tmp_path)
  assert first.signal == signal.SIGTERM and found["ended_by"] == "signal"
  assert found["is_finished"] is False and 20 <= found["step"] < STEPS
  assert found["heldout_loss"] is None and found["verdict"] is not None
  assert [row for row in small_runs.read_untimed(tmp_path) if "final" in row] == []
  seen = []

  class Looking(Interrupter):
    def write(self, chunk):
      seen.append(read_result(tmp_path))

  run(experiment, tmp_path, writers=[Looking(0)])
  assert set(seen) == {None}
  again = read_result(tmp_path)
  assert again["is_finished"] and again["step"] == STEPS
  kept = (tmp_path / "result.json").read_bytes()
  run(experiment, tmp_path)  # finished: it is sampled again
  assert (tmp_path / "result.json").read_bytes() == kept


def test_a_result_that_cannot_be_written_is_a_warning(tmp_path, capfd):
  (tmp_path / "elsewhere").write_text("mine")
  (tmp_path / "result.json").symlink_to(tmp_path / "elsewhere")
  write_result(tmp_path, {"step": 1})
  assert (tmp_path / "elsewhere").read_text() == "mine"
  write_result(tmp_path / "nowhere", {"step": 1})
  lines = capfd.readouterr().err.splitlines()
  assert len(lines) == 2 and all("result.json was not written: " in line for line in lines)


DAMAGED = [
  "",
  "[]",
  "[" * 10**5,
  '{"format": 2, "step": 1, "steps": 1}',
  '{"format": 1, "step": true, "steps": 1}',
  '{"format": 1, "step": -1, "steps": 1}',
  '{"format": 1, "steps": 1}',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_result_is_refused_naming_the_file(tmp_path, content):
  assert read_result(tmp_path) is None
  (tmp_path / "result.json").write_text(content)
  with pytest.raises(UserError, match=r"result\.json"):
    read_result(tmp_path)


# --- The best state ---


def test_the_best_state_is_saved_though_its_step_was_not_due(finished, experiment, tmp_path):
  """With its loss, and the bits of a run that ended there; and a run can resume from it."""
  workdir, _ = finished
  best = read_result(workdir)["best"]["step"]
  assert 0 < best < STEPS and manifest.list_steps(workdir) == [best, STEPS]
  described = manifest.read_manifest(workdir / "checkpoints" / str(best))
  assert described.heldout_loss == dict(read_evaluations(workdir))[best]
  assert described.heldout_tokens and described.heldout_batches is None
  held = {"train.steps": best, "optimizer.decay_steps": STEPS}
  run(change(experiment, held), tmp_path)
  there = manifest.read_manifest(tmp_path / "checkpoints" / str(best))
  assert there.leaves == described.leaves and there.data == described.data


def test_the_best_state_is_saved_on_a_signal(experiment, finished, tmp_path):
  best = read_result(finished[0])["best"]["step"]
  stopped = run(experiment, tmp_path, writers=[Interrupter(best)])
  if (end := int(stopped.state.step)) > best:
    evaluations = dict(read_evaluations(tmp_path))
    lowest = min((k for k in evaluations if k), key=lambda k: (evaluations[k], -k))
    assert set(manifest.list_steps(tmp_path)) == {lowest, end}


@pytest.mark.slow
def test_without_room_a_new_best_is_saved_at_once_but_not_often(experiment, tmp_path, monkeypatch):
  """At most after every fifth evaluation; what was not saved is said."""
  monkeypatch.setattr(saving, "has_room", lambda tree: False)
  changed = change(experiment, {"optimizer.peak_lr": 0.005, "train.keep_latest": 100})
  plan = plan_run(change(changed, {"train.eval_every": 1}), workdir=tmp_path)
  result = train.train_run(plan)
  steps = manifest.list_steps(tmp_path)
  assert len(steps) >= 3 and min(np.diff(steps[:-1])) >= saving.EVALUATIONS_PER_SAVE
  unsaved = dataclasses.replace(result, best=(7, HeldoutLoss(0.5, 9, None)))
  line, command = describe_best(plan, unsaved)
  assert "0.5000, was at step 7, whose parameters are not saved" in line
  assert f"at step {result.best_saved[0]}" in line
  assert command.endswith(f"jgpt.sample --run {tmp_path} --step best")


def test_losses_over_other_batches_are_not_compared(tmp_path):
  """Neither for the best of a run, nor for what retention keeps."""
  sample, whole = (1.0, 96, 3), (2.0, 300, None)
  evaluations = [(0, HeldoutLoss(0.1, *whole[1:])), (5, HeldoutLoss(*sample))]
  evaluations += [(10, HeldoutLoss(*whole)), (15, HeldoutLoss(math.nan, *whole[1:]))]
  assert find_best(evaluations)[0] == 10 and find_best(evaluations[:2])[0] == 5
  assert find_best(evaluations[:1]) is None
  for step, heldout in evaluations[1:]:
    folder = tmp_path / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    described = manifest.Manifest(step, {}, heldout.loss, {}, {}, *heldout.targets)
    manifest.write_manifest(folder, described)
  manifest.delete_old_steps(tmp_path, keep_latest=1, keep_best=1)
  assert manifest.list_steps(tmp_path) == [5, 10, 15]


# --- When a run evaluates ---


@pytest.mark.parametrize("steps", [1, 3, 40, 1000, 10**6])
@pytest.mark.parametrize("batching", ["documents", "random", "epochs"])
def test_a_run_evaluates_a_few_times_at_little_cost(steps, batching):
  """Evaluation's operations are a third of training's for as many tokens."""
  base = load_experiment("names" if batching == "documents" else "shakespeare_char_cpu")
  settings = {"train.steps": steps} | (
    {} if batching == "documents" else {"data.batching": batching}
  )
  experiment = resolve(change(base, settings), 65)
  data, model = experiment.data, experiment.model
  heldout = Stream(np.zeros(100_000, np.int32))
  if batching == "documents":
    heldout = Documents(np.zeros((1573, 17), np.int32), np.full(1573, 7))
  epoch_steps = -(-steps // 3) if batching == "epochs" else None
  found = schedule_evaluations(experiment, heldout, epoch_steps).train
  if found.eval_every is None:
    assert steps < 40 and batching != "documents"
    return
  times = 1 + math.ceil(steps / found.eval_every)
  batches = found.eval_batches or count_eval_batches(heldout, data)
  size = 256 if batching == "documents" else data.batch_size
  share = times * batches * size / (3 * steps * data.batch_size)
  flops = 2 * 4192 * times * batches * size * data.seq_len
  assert share <= 0.02 or (flops <= 1.6e9 and model.d_model == 16)
  assert times >= min(steps + 1, 4) or share > 0.01


def test_evaluations_that_were_asked_for_are_left_as_they_are():
  base = resolve(load_experiment("names"), 27)
  heldout = Documents(np.zeros((1573, 17), np.int32), np.full(1573, 7))
  for name in ("none", "7"):
    asked = change(base, dict([parse_setting(f"train.eval_every={name}")]))
    assert schedule_evaluations(asked, heldout) == asked
  nothing = Documents(np.zeros((0, 17), np.int32), np.zeros(0))
  assert schedule_evaluations(base, nothing).train.eval_every is None
  with pytest.raises(UserError, match=r"train\.eval_every='often' must be a whole number"):
    change(base, dict([parse_setting("train.eval_every=often")]))


def test_evaluating_changes_no_training_loss(finished, experiment):
  plain = run(change(experiment, {"train.eval_every": None}), None)
  assert plain.losses.tobytes() == finished[1].losses.tobytes()


# --- Time ---


@pytest.mark.slow
def test_a_limit_of_time_stops_saves_and_evaluates_and_the_same_plan_goes_on(
  experiment, finished, tmp_path
):
  """A limit that is over at once: each start makes one or two updates."""
  limited = change(experiment, {"train.max_seconds": 0.0})
  for _ in range(2):
    before = max(manifest.list_steps(tmp_path), default=0)
    result = run(limited, tmp_path)
    found, step = read_result(tmp_path), int(result.state.step)
    assert before < step <= before + 2 and step in manifest.list_steps(tmp_path)
    assert found["ended_by"] == "max_seconds" and not found["is_finished"]
    assert found["heldout_loss"] == result.heldout_loss is not None and result.signal is None
  ended = run(change(experiment, {"train.max_seconds": 1e6}), tmp_path)
  assert ended.ended_by == "finished"
  assert ended.losses.tobytes() == finished[1].losses.tobytes()


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0.4, "0 s"),
    (59.6, "1 min 00 s"),
    (185, "3 min 05 s"),
    (3725, "1 h 02 min"),
    (9e4, "1 d 01 h"),
  ],
)
def test_lengths_of_time_are_short(seconds, text):
  assert format_duration(seconds) == text


def test_lines_without_a_terminal_say_the_time_and_what_is_left(capsys, monkeypatch):
  """Evaluations and saves are in it; a run of a second or the bar's lines say nothing."""
  monkeypatch.setattr("jgpt.report.console.time", SimpleNamespace(strftime=lambda f: "12:00:07"))

  def write(perfs, **options):
    writer = ConsoleWriter(steps=1000, log_every=100, **options)
    for step, elapsed in perfs:
      names = ("train/loss", "train/grad_norm", "train/lr")
      metrics = {name: np.float32([1.0]) for name in names}
      writer.write(Chunk(step, metrics, 1.0, perf=Perf(1.0, 5.0, 9.0, elapsed)))
    writer.close()
    return capsys.readouterr().out.splitlines()

  lines = write([(1, 3.0), (100, 22.8), (1000, 300.0)], terminal=False)
  assert lines[0].endswith("| 5.00 steps/s")
  assert lines[1].endswith("| 5.00 steps/s | 12:00:07, 3 min 00 s left")
  assert lines[2].endswith("| 5.00 steps/s | 12:00:07")
  assert not any(
    "12:00" in line for line in write([(1, 0.1), (100, 0.2), (1000, 1.1)], terminal=False)
  )
  assert not any("12:00" in line for line in write([(1, 3.0), (100, 22.8)], terminal=True))
