"""What a run says: rows that read back exactly, lines of progress, and the curve as text."""

import dataclasses
import json
import math
import time
import tracemalloc
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jgpt.batches import Documents
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import resolve
from jgpt.evaluation import HeldoutLoss
from jgpt.report.console import (
  ConsoleWriter,
  draw_curve,
  format_line,
  format_perplexity,
  format_step,
)
from jgpt.runs.clock import WINDOW_SECONDS, Clock, Pace, Perf, start_clock
from jgpt.runs.log import Call, Chunk, JsonlWriter, Log
from jgpt.runs.rows import MAX_LINE, read_jsonl, read_lines, read_losses


def make_chunk(step, losses, *, seconds=0.5, heldout_loss=None, texts=()):
  """A chunk that ends at `step`; norms and rates are told apart from losses and from each other."""
  losses = np.asarray(losses, np.float32)
  metrics = {"train/loss": losses, "train/grad_norm": losses + 10, "train/lr": losses / 1000}
  metrics["train/skipped"] = np.zeros(len(losses), np.int32)
  return Chunk(step, metrics, seconds, heldout_loss, texts)


# --- metrics.jsonl ---


def test_rows_are_numbered_by_update_and_hold_every_metric(tmp_path):
  """The first update is step 1; a chunk ends at its step."""
  path = tmp_path / "metrics.jsonl"
  writer = JsonlWriter(path, 0)
  writer.write(make_chunk(1, [3.25]))
  writer.write(make_chunk(3, [2.5, 2.25]))
  assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]  # readable while the run goes on
  writer.close()
  assert json.loads(path.read_text(encoding="utf-8").splitlines()[1]) == {
    "step": 2,
    "train/loss": 2.5,
    "train/grad_norm": 12.5,
    "train/lr": float(str(np.float32(0.0025))),
    "train/skipped": 0,
  }
  assert '"train/skipped": 0}' in path.read_text()  # a whole number is written as one


def test_evaluations_stand_in_rows_of_their_own(tmp_path):
  """After the row of their update; a run that goes on drops those it will make again."""
  path = tmp_path / "metrics.jsonl"
  writer = JsonlWriter(path, 0)
  writer.write(Chunk(0, {}, 0.1, 3.5))
  writer.write(make_chunk(2, [3.0, 2.5], heldout_loss=2.75))
  writer.close()
  rows = read_jsonl(path)
  assert rows[0] == {"step": 0, "heldout/loss": 3.5}
  assert [row.get("heldout/loss") for row in rows] == [3.5, None, None, 2.75]
  assert rows[3] == {"step": 2, "heldout/loss": 2.75}
  writer = JsonlWriter(path, 1)
  writer.write(make_chunk(2, [2.25]))
  writer.close()
  assert [row.get("train/loss") for row in read_jsonl(path)] == [None, 3.0, 2.25]


def test_rows_of_time_and_of_the_end_stand_apart(tmp_path):
  """Rows of time are the only ones with "perf/"; the end's is cut off by a run that goes on, and
  written once by one that does not, and again by one that has come to the same end again.
  """
  path = tmp_path / "metrics.jsonl"
  writer = JsonlWriter(path, 0)
  chunk = make_chunk(2, [3.0, 2.5])
  sample, whole = HeldoutLoss(2.75, 96, 3), HeldoutLoss(2.5, 300, None)
  writer.write(
    dataclasses.replace(
      chunk, heldout_loss=2.75, heldout=sample, tokens=14, perf=Perf(0.0123456789, 4.0, 7e5, 1.0)
    )
  )
  for _ in range(2):
    writer.write_final(2, whole, 3.5)
    writer.close()
    rows = read_jsonl(path)
    assert rows[2:] == [
      {"step": 2, "perf/seconds": 0.0123457, "perf/tokens_per_second": 7e5, "tokens": 14},
      {"step": 2, "heldout/loss": 2.75, "heldout/tokens": 96, "heldout/batches": 3},
      {
        "step": 2,
        "heldout/loss": 2.5,
        "heldout/tokens": 300,
        "heldout/bits_per_byte": 3.5,
        "final": True,
      },
    ]
    writer = JsonlWriter(path, 2)
    assert [row["step"] for row in writer.kept] == [1, 2, 2] and "final" not in str(writer.kept)
  assert read_losses(path, 2)[1] == [(2, 2.75)]
  writer.write(make_chunk(3, [2.0]))
  writer.close()
  assert [row for row in read_jsonl(path) if "final" in row] == []
  assert [row["step"] for row in read_jsonl(path)] == [1, 2, 2, 2, 3]
  for _ in range(2):
    writer = JsonlWriter(path, 2)
    writer.write(make_chunk(3, [2.0]))
    writer.write_final(3, whole, 3.5)
    writer.close()
    assert [row["step"] for row in read_jsonl(path) if "final" in row] == [3]


@hypothesis_settings(deadline=None)
@given(losses=st.lists(st.floats(width=32), min_size=1, max_size=5))
@example(losses=[0.1, 1e-45, 3.4028235e38, math.nan, -math.inf, -0.0])
def test_float32_reads_back_bit_for_bit(tmp_path_factory, losses):
  path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
  writer = JsonlWriter(path, 0)
  writer.write(make_chunk(len(losses), losses))
  writer.close()
  read = np.array([row["train/loss"] for row in read_jsonl(path)], np.float32)
  np.testing.assert_array_equal(read, np.array(losses, np.float32))
  np.testing.assert_array_equal(
    np.signbit(read), np.signbit(np.array(losses, np.float32)) & ~np.isnan(read)
  )


TORN = [
  b"",
  b'{"step": 6, "train/lo',
  b'{"step"',
  b"\0" * 50,
  b"\xff\xfe\x80",
  b"7",
  b"null",
  b"{}",
  b"[6]\n",
]


@pytest.mark.parametrize("torn", TORN)
def test_resuming_drops_rows_after_the_step_and_a_torn_last_line(tmp_path, torn):
  """Whatever a crash left at the end, the file is then that of a run that was never interrupted."""
  path, whole = tmp_path / "metrics.jsonl", tmp_path / "whole.jsonl"
  for name, chunks in ((path, [(5, [5, 4, 3, 2, 1])]), (whole, [(3, [5, 4, 3]), (5, [2.5, 1.5])])):
    writer = JsonlWriter(name, 0)
    for chunk in chunks:
      writer.write(make_chunk(*chunk))
    writer.close()
  with open(path, "ab") as file:
    file.write(torn)
  assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4, 5]
  writer = JsonlWriter(path, 3)
  writer.write(make_chunk(5, [2.5, 1.5]))
  writer.close()
  assert path.read_bytes() == whole.read_bytes()


def test_rows_outlive_a_run_that_is_killed_before_it_writes_any(tmp_path):
  """Opening the file again leaves it whole at once: what it keeps is not held back in a buffer."""
  path = tmp_path / "metrics.jsonl"
  writer = JsonlWriter(path, 0)
  writer.write(make_chunk(3, [3, 2, 1]))
  writer.close()
  before = path.read_bytes()
  resumed = JsonlWriter(path, 3)  # and not closed yet
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
  resumed.close()


def test_absent_file_has_no_rows(tmp_path):
  assert read_jsonl(tmp_path / "metrics.jsonl") == []


NO_ROWS = [
  '{"step": 3, "train/loss": "x"}',
  '{"step": 3, "train/loss": null}',
  '{"step": 3, "train/loss": [1]}',
  '{"step": 3, "train/loss": true}',
  f'{{"step": 3, "train/loss": {"9" * 400}}}',
  '{"step": 3, "train/loss": 1e300}',
  '{"step": 3, "train/loss": 2.5, "train/skipped": "0"}',
  '{"step": 3, "heldout/loss": {}}',
  '{"step": "3"}',
  '{"step": 3.0}',
  '{"step": true}',
  '{"step": -3}',
  '{"step": 3, "heldout/loss": 2.5, "final": 1}',
  '{"step": 3, "heldout/loss": 2.5, "final": false}',
  '{"train/loss": 2.5}',
  "[3]",
  f'{{"step": 3, "train/loss": 2.5{" " * MAX_LINE}}}',
]


@pytest.mark.parametrize("line", NO_ROWS)
def test_a_line_whose_values_are_no_numbers_is_no_row(tmp_path, line):
  """It is passed over by each reader, and stays where it is."""
  path = tmp_path / "metrics.jsonl"
  path.write_text(
    f'{{"step": 1, "train/loss": 4}}\n{line}\n{{"step": 4, "train/loss": NaN}}\n', encoding="utf-8"
  )
  before = path.read_bytes()
  assert [row["step"] for row in read_jsonl(path)] == [1, 4]
  losses, evaluations = read_losses(path, 10**6)
  assert losses.dtype == np.float32 and evaluations == []
  np.testing.assert_array_equal(losses, np.float32([4, math.nan]))
  writer = JsonlWriter(path, 4)
  assert [row["step"] for row in writer.kept] == [1, 4]
  writer.write(make_chunk(5, [3.5]))
  writer.close()
  assert path.read_bytes()[: len(before)] == before and read_jsonl(path)[-1]["step"] == 5


def test_a_line_is_read_in_bounded_memory(tmp_path):
  """A hole of 50 MB, which takes no room on the disk; rows after it count."""
  path = tmp_path / "metrics.jsonl"
  row = b'{"step": 1, "train/loss": 2.5}\n'
  with open(path, "wb") as file:
    file.seek(50_000_000)
    file.write(b"\n" + row)
  tracemalloc.start()
  read = [read_jsonl(path), *read_losses(path, 10**6)]
  JsonlWriter(path, 1).close()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert read == [[{"step": 1, "train/loss": 2.5}], np.float32([2.5]), []]
  assert peak < 20 * MAX_LINE
  assert list(read_lines(path)) == [
    (50_000_001, None, True),
    (50_000_001 + len(row), read[0][0], True),
  ]


def write_steps(path, steps, tail=""):
  lines = [f'{{"step": {step}, "train/loss": 2.5}}\n' for step in steps]
  path.write_text("".join(lines) + tail, encoding="utf-8")
  return lines


@pytest.mark.parametrize("damaged", range(8))
def test_one_wrong_step_does_not_cut_off_the_rows_that_follow(tmp_path, damaged):
  """Of 8 rows up to the restored step and 4 past it, any of the first may say a later step.

  What follows is as it was.
  """
  path = tmp_path / "metrics.jsonl"
  steps = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
  steps[damaged] = 90
  lines = write_steps(path, steps)
  writer = JsonlWriter(path, 8)
  assert [row["step"] for row in writer.kept] == [n for n in range(1, 9) if n != damaged + 1]
  writer.write(make_chunk(9, [3.5]))
  writer.close()
  kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]
  assert (
    kept == lines[: 7 if damaged == 7 else 8]
  )  # nothing tells the last one from those past the restored step


def test_one_wrong_step_past_the_restored_one_keeps_none_of_its_neighbours(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = write_steps(path, [1, 2, 3, 4, 5, 6, 7, 2, 9])
  writer = JsonlWriter(path, 4)
  assert [row["step"] for row in writer.kept] == [1, 2, 3, 4]
  writer.write(make_chunk(5, [3.5]))
  writer.close()
  assert path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1] == lines[:4]


def test_what_is_cut_is_said_where_it_is_more_than_a_killed_process_leaves(tmp_path, capfd):
  for steps, words in (
    ([1, 2, 3, 4, 5], ""),
    ([1, 2, 91, 92, 93, 6], "1 earlier rows stand behind later ones"),
  ):
    write_steps(tmp_path / "metrics.jsonl", steps, '{"step": 6, "tr')
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 6 if words else 2)
    writer.write(make_chunk(7, [3.5]))
    writer.close()
    err = capfd.readouterr().err
    assert (words in err and err.count("\n") == 1) if words else err == ""


@pytest.mark.parametrize(
  "tail", ["", '{"step": 6, "tr', "\0" * 50, '{"step": 60, "train/loss": 2.5}\n']
)
def test_a_run_that_has_nothing_to_write_changes_nothing(tmp_path, tail):
  """A finished one: neither a wrong step nor a torn line is touched, and nothing is said of it."""
  path = tmp_path / "metrics.jsonl"
  write_steps(path, [1, 2, 30, 4, 5], tail)
  before = path.read_bytes()
  writer = JsonlWriter(path, 5)
  writer.sync()
  writer.close()
  assert path.read_bytes() == before


def test_a_last_row_without_its_line_break_is_kept(tmp_path):
  """An editor may have taken it away; the next row begins a line of its own."""
  path = tmp_path / "metrics.jsonl"
  lines = write_steps(path, [1, 2, 3])
  path.write_text("".join(lines)[:-1], encoding="utf-8")
  writer = JsonlWriter(path, 3)
  writer.write(make_chunk(4, [3.5]))
  writer.close()
  assert path.read_text(encoding="utf-8").startswith("".join(lines))
  assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4]


# --- Metrics of a start ---


def test_losses_of_a_start_take_four_bytes_each():
  """A million updates, which a small model makes in a minute: what is read back is bit for bit what
  was given.
  """
  experiment = resolve(load_experiment("names"), 27)
  lines = Documents(np.zeros((9, 17), np.int32), np.full(9, 7, np.int32))
  log = Log([], [], experiment, SimpleNamespace(train=lines, heldout=lines), Clock())
  stop = SimpleNamespace()
  losses = np.linspace(3, 2, 1000, dtype=np.float32)
  chunk = {
    "train/loss": losses,
    "train/grad_norm": losses,
    "train/skipped": np.zeros(1000, np.int32),
  }
  tracemalloc.start()
  for step in range(1000, 1_000_001, 1000):
    log.write(Call(step, 1000, chunk, None, None), stop)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 10_000_000
  np.testing.assert_array_equal(np.asarray(log.losses, np.float32), np.tile(losses, 1000))


# --- Lines of progress ---


def test_line_has_the_format_that_is_documented():
  metrics = {
    "train/loss": np.float32([9.0]),
    "train/grad_norm": np.float32([1.021]),
    "train/lr": np.float32([0.009]),
  }
  chunk = Chunk(100, metrics, 1.0, perf=Perf(1.0, 21_000.4, 0.0, 0.0))
  line = format_line(chunk, format_step(100, 1000, None), 2.43214)
  assert line == "step  100/1000 | loss 2.4321 | grad norm 1.02 | lr 9.0e-03 | 21,000 steps/s"
  fast = dataclasses.replace(chunk, perf=Perf(1.0, 21_000.4, 412_345.6, 0.0, 0.4123))
  assert format_line(fast, "step 1/1", 2.43214).endswith(
    "| 21,000 steps/s | 412,346 tokens/s, MFU 41.2%"
  )
  chunk = Chunk(7, metrics, 1.0, 2.5, ("emma",), perf=Perf(1.0, 0.251, 0.0, 0.0))
  line = format_line(chunk, format_step(7, 9, None), math.nan)
  assert (
    line
    == "step 7/9 | loss nan | held out 2.5000 | grad norm 1.02 | lr 9.0e-03 | 0.25 steps/s | emma"
  )
  assert (
    format_line(Chunk(0, {}, 1.0, 3.3), format_step(0, 9, None), None)
    == "step 0/9 | held out 3.3000"
  )
  assert (
    format_line(Chunk(0, {}, 1.0, None, ("a\x00\nb",)), "step 0/9", None)
    == "step 0/9\n  | a\ufffd\n  | b"
  )


@pytest.mark.parametrize(
  ("step", "text"),
  [
    (0, "Epoch 1/3 | step   0/171"),
    (50, "Epoch 1/3 | step  50/171"),
    (171, "Epoch 1/3 | step 171/171"),
    (172, "Epoch 2/3 | step   1/171"),
    (513, "Epoch 3/3 | step 171/171"),
  ],
)
def test_in_epochs_the_steps_of_each_are_counted(step, text):
  assert format_step(step, 513, 171) == text


def test_line_is_the_mean_since_the_last_line(capsys):
  """The first and the last update have a line whatever `log_every` is.

  Norm and rate are those of the last update.
  """
  writer = ConsoleWriter(steps=7, log_every=3, terminal=False)
  for step, losses in [(1, [9]), (2, [4]), (3, [2]), (6, [1, 2, 6]), (7, [5])]:
    perf = Perf(0.5, 2.0 * len(losses), 0.0, 0.0)
    writer.write(dataclasses.replace(make_chunk(step, losses), perf=perf))
  writer.close()
  assert capsys.readouterr().out.splitlines() == [
    "step 1/7 | loss 9.0000 | grad norm 19.00 | lr 9.0e-03 | 2.00 steps/s",
    "step 3/7 | loss 3.0000 | grad norm 12.00 | lr 2.0e-03 | 2.00 steps/s",
    "step 6/7 | loss 3.0000 | grad norm 16.00 | lr 6.0e-03 | 6.00 steps/s",
    "step 7/7 | loss 5.0000 | grad norm 15.00 | lr 5.0e-03 | 2.00 steps/s",
  ]


def test_a_rate_is_over_a_window():
  """Calls that seem to take no time, or a long one among short ones, leave the rate as it is.

  The first call of a start, in which devices warm up, counts for its own rate only.
  """
  pace = Pace()
  assert pace.add(1, 8, 0.5) == (2.0, 16.0)
  assert pace.add(10, 80, 0.0)[0] > 1e9  # a clock that stood still divides by no zero
  assert pace.add(10, 80, 0.02) == pytest.approx((1000, 8000))
  rates = [pace.add(10, 80, (0.0, 0.02)[n % 2])[0] for n in range(5000)]  # 50 s in all
  assert rates[1::2] == pytest.approx([1000.0] * 2500) and max(rates) <= 1500
  seconds = 0.0
  while seconds < 1.2 * WINDOW_SECONDS:  # five times as slow from here on
    seconds += 0.05
    rate = pace.add(10, 80, 0.05)[0]
  assert rate == pytest.approx(200)


def test_seconds_are_counted_for_one_part_each(monkeypatch):
  """Every second between two looks, so that the parts add up to the time that passed."""
  times = iter([5.0, 6.5, 8.5, 9.0])
  monkeypatch.setattr("jgpt.runs.clock.time.perf_counter", lambda: next(times))
  clock = Clock()
  assert [clock.look(part) for part in ("training", "saving", "training")] == [1.5, 2.0, 0.5]
  assert {part: seconds for part, seconds in clock.seconds.items() if seconds} == {
    "training": 2.0,
    "saving": 2.0,
  }
  assert clock.elapsed == sum(clock.seconds.values()) == 4.0


def test_compilations_are_counted_until_the_clock_is_closed():
  """Programs in all, and those that jax read from its persistent cache; each clock for itself."""
  number = time.time_ns()  # in the program, so that no earlier one is the same

  def compile_it():
    jax.jit(lambda x: x * float(number)).lower(np.float32(1)).compile()

  with start_clock() as outer:
    compile_it()
    first = dataclasses.replace(outer.compilations)
    with start_clock() as inner:
      compile_it()
    compile_it()
  compile_it()
  assert (first.programs, first.from_cache) == (1, 0) and first.seconds > 0
  assert (inner.compilations.programs, inner.compilations.from_cache) == (1, 1)
  assert (outer.compilations.programs, outer.compilations.from_cache) == (3, 2)
  assert outer.compilations.seconds > inner.compilations.seconds > 0


def test_terminal_has_whole_lines_with_samples_as_they_are(capsys):
  """Samples may look like rich's markup, and lines may be wider than the terminal.

  Neither is touched.
  """
  writer = ConsoleWriter(steps=10, log_every=5, start_step=4, terminal=True)
  assert writer.wants_samples
  sample = "[bold]emma[/bold] " + "x" * 200
  writer.write(make_chunk(5, [2], texts=(sample,)))
  writer.close()
  assert (
    f"step  5/10 | loss 2.0000 | grad norm 12.00 | lr 2.0e-03\n  | {sample}\n"
    in capsys.readouterr().out
  )
  assert not ConsoleWriter(steps=10, log_every=5, terminal=False).wants_samples


# --- The curve ---


def test_curve_falls_as_the_losses_do():
  """Marks lie lower further to the right, and each column averages as many losses as the others."""
  rows = draw_curve(np.linspace(4, 1, 10_000)).splitlines()
  assert "training loss" in rows[0]
  columns = [
    [row for row, line in enumerate(rows[2:14]) if line[1 + column] != " "] for column in range(64)
  ]
  lowest = [max(marks) for marks in columns if marks]
  assert len(lowest) > 60
  assert lowest == sorted(lowest)
  assert (lowest[0], lowest[-1]) == (0, 11)


def test_evaluations_are_marked_where_they_belong():
  """The first at the left edge and the height of its loss, the last at the right.

  Beyond the line they widen the plot.
  """
  rows = draw_curve(np.linspace(3, 2, 100), [(0, 4.0), (50, 2.5), (100, 1.0)]).splitlines()
  assert rows[0] == "training loss (line) and held-out loss (o), nats per token"
  marks = {(row, line.index("o") - 1) for row, line in enumerate(rows[2:14]) if "o" in line}
  assert {(0, 0), (11, 63)} <= marks
  ((row, column),) = marks - {(0, 0), (11, 63)}
  assert row in (5, 6) and 29 <= column <= 34
  assert "o" not in "".join(draw_curve([3, 2], [(1, math.nan), (2, math.inf)]).splitlines()[1:14])


@pytest.mark.parametrize(
  "losses",
  [
    [2.5],
    [2.5, 2.0],
    [3.0 - i / 10 for i in range(10)],
    [2.0] * 10_000,
    [0.0] * 3,
    [1e-45, 0.0],
    [-1.0, 1.0],
    [3.0, math.nan, 2.0],
    [3.0, 1e30, math.inf],
    np.float32([3, 2, 1]),
  ],
)
def test_curve_of_any_losses_is_text_of_the_size_asked_for(losses):
  """Losses that are not finite leave a gap: a run that diverged still ends with its summary."""
  rows = draw_curve(losses, width=40, height=8).splitlines()
  frame = [row for row in rows if row[:1] in "┌│└"]
  assert [row[0] for row in frame] == ["┌", *"│" * 8, "└"]
  assert all(len(row) >= 42 for row in frame)
  assert any(row[1:41].strip() for row in frame[1:-1])


@pytest.mark.parametrize("losses", [[], [math.nan] * 3, [math.inf], [1e30, -1e30]])
def test_losses_without_a_curve_are_said_to_have_none(losses):
  assert "no curve" in draw_curve(losses)


def test_labels_of_the_curve_are_the_values_of_their_rows():
  """A straight line from 3 to 1: each label is near where the line crosses its row."""
  losses = np.linspace(3.0, 1.0, 1000)
  rows = [
    line for line in draw_curve(losses, width=60, height=12).splitlines() if line.startswith("│")
  ]
  labelled = [
    (i, row, float(row.rsplit("│", 1)[1]))
    for i, row in enumerate(rows)
    if row.rsplit("│", 1)[1].strip()
  ]
  assert len(rows) == 12 and len(labelled) == 4
  for _, row, label in labelled:
    columns = [x for x, c in enumerate(row.rsplit("│", 1)[0][1:]) if c != " "]
    assert abs(3.0 - 2.0 * np.mean(columns) / 59 - label) < 0.1


@pytest.mark.parametrize(
  ("loss", "shown"), [(0.0, "1.00"), (2.39, "10.91"), (20.0, "4.852e+08"), (1e5, "inf")]
)
def test_perplexity_for_a_person(loss, shown):
  assert format_perplexity(loss) == shown
