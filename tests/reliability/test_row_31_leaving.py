"""Row 31: processes of one run leave at different times.

All of them end cleanly, with one status, and only process 0 wrote metrics. The processes are real,
on this machine, with gloo between them.
"""

import contextlib
import re
import signal
import time

import children
import pytest

from jgpt import run

RUN = {
  "train__steps": 6,
  "train__save_every": 4,
  "train__log_every": 2,
  "model__num_layers": 1,
  "mesh__data": -1,
}
SOON = 30.0  # seconds until all have ended; they take about three


def train(texts, workdir, stack, faults=None, more=None, **changes):
  """Starts two processes of a small run on a stream of bytes."""
  args = children.arguments("bytes", workdir, **(RUN | changes))
  options = {"faults": faults, "more": more, "folder": workdir}
  return children.start_processes(stack, *args, cwd=texts, **options)


def wait_for_all(processes, timeout=150, tracebacks=0):
  """The exit statuses, and a text of everything printed for assertions."""
  end = time.monotonic() + timeout
  statuses = [child.wait(max(1, end - time.monotonic())) for child in processes]
  said = "\n".join(f"--- {i}\n{c.out}\n{c.err}" for i, c in enumerate(processes))
  assert said.count("Traceback") == tracebacks and "Check failure" not in said, said
  return statuses, said


def lines_of(text):
  """Lines but those of gloo, which prints to whatever standard output is."""
  return [line for line in text.splitlines() if line.strip() and not line.startswith("[Gloo]")]


def losses_of(workdir):
  log = (workdir / "metrics.jsonl").read_text(encoding="utf-8")
  return [float(loss) for loss in re.findall(r'"(?:train|heldout)/loss": ([0-9.e-]+)', log)]


@pytest.mark.slow
def test_row_31_two_processes_train_as_one(texts, monkeypatch, capsys, quick):
  """The losses are those of one process with two devices; process 0 alone prints and writes."""
  monkeypatch.chdir(texts)
  with contextlib.ExitStack() as stack:
    processes = train(texts, "pair", stack)
    assert run.main(children.arguments("bytes", "alone", **(RUN | {"mesh__data": 2}))) == 0
    statuses, said = wait_for_all(processes)
  assert statuses == [0, 0], said
  first, second = processes
  table = [line.split() for line in lines_of(first.out)[:3]]
  assert [row[0] for row in table] == ["process", "0", "1"] and table[2][-3:] == ["1", "×", "CPU"]
  assert lines_of(second.out) == lines_of(second.err) == lines_of(first.err) == [], said
  assert first.out.count("step 6/6") == 1
  assert "process" not in capsys.readouterr().out.splitlines()[0]
  assert losses_of(texts / "pair") == pytest.approx(losses_of(texts / "alone"), rel=1e-6)
  assert len(losses_of(texts / "pair")) == RUN["train__steps"] + 1
  assert children.steps_there(texts / "pair") == [4, 6]
  assert children.nothing_half_done(texts / "pair") == []


# --- Signals ---

LEAVING = {
  # What the process that is sent the signal is doing, and which.
  "compiling": (1, "term", "program.lower_steps", {}, None),
  "training": (
    1,
    "int",
    "program.advance:9",
    {"train__steps": 4000, "train__log_every": 1},
    "saved",
  ),
  "training in the lead": (
    *(0, "term", "program.advance:9", {"train__steps": 4000, "train__log_every": 1}, "saved"),
  ),
  "evaluating": (0, "term", "evaluation.evaluate_heldout", {}, "saved"),
  "sampling": (1, "int", "generate.sample_texts", {}, "saved"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", LEAVING)
def test_row_31_a_signal_to_one_process_ends_all(texts, what):
  """At the same update, which all of them save; the same command goes on."""
  which, kind, where, changes, is_saved = LEAVING[what]
  workdir, status = f"signal {what}", {"term": 143, "int": 130}[kind]
  with contextlib.ExitStack() as stack:
    processes = train(texts, workdir, stack, {which: f"{kind}@call={where}"}, **changes)
    statuses, said = wait_for_all(processes)
  assert len(processes[which].fired) == 1 and statuses == [status, status], said
  stopped = [line for c in processes for line in c.err.splitlines() if line.startswith("stopped")]
  assert len(stopped) == 1 and stopped[0] in processes[0].err, said
  there = children.steps_there(texts / workdir)
  assert bool(there) == bool(is_saved)
  if is_saved:
    assert f"after step {there[-1]:,}" in stopped[0], said
    assert children.nothing_half_done(texts / workdir) == []


@pytest.mark.slow
def test_row_31_all_are_sent_the_signal_and_one_is_late(texts):
  """As by a launcher: two seconds later the second process gets it too."""
  changes = {"train__steps": 100_000, "train__log_every": 1}
  with contextlib.ExitStack() as stack:
    processes = train(texts, "late", stack, **changes)
    processes[0].wait_until(lambda: "\nstep" in processes[0].out)
    processes[0].send(signal.SIGTERM)
    time.sleep(2)
    if processes[1].process.poll() is None:
      processes[1].send(signal.SIGTERM)
    statuses, said = wait_for_all(processes)
  assert statuses == [143, 143], said
  assert len(children.steps_there(texts / "late")) > 0


# --- Errors ---


@pytest.mark.slow
def test_row_31_an_error_of_one_process_is_shown_once_and_ends_all(texts):
  """What differs between processes is named with the process."""
  with contextlib.ExitStack() as stack:
    other = {1: ["--set", "optimizer.peak_lr=0.02"]}
    processes = train(texts, "different", stack, more=other)
    statuses, said = wait_for_all(processes)
  assert statuses == [2, 2], said
  errors = [line for c in processes for line in c.err.splitlines() if line.startswith("error:")]
  assert len(errors) == 1 and errors[0] in processes[0].err, said
  assert "process 1 on" in errors[0] and "optimizer.peak_lr is 0.02 there and 0.01 in" in errors[0]
  assert not (texts / "different").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("which", "where"), [(0, "log"), (1, "call=generate.sample_texts")])
def test_row_31_a_failure_of_one_process_ends_all(texts, which, where):
  """A disk that is full before the training, and a bug in one process, which shows where."""
  action = "full" if where == "log" else "fail"
  workdir = f"failed in {which}"
  with contextlib.ExitStack() as stack:
    processes = train(texts, workdir, stack, {which: f"{action}@{where}"})
    statuses, said = wait_for_all(processes, tracebacks=which)
  assert statuses == [1, 1] and processes[which].fired, said
  errors = [line for c in processes for line in c.err.splitlines() if line.startswith("error:")]
  assert len(errors) == 1 and errors[0] in processes[0].err, said


# --- From Python ---


def start_library_users(stack, texts, folder, steps, timeout, fault=None):
  """Starts two processes of a program that calls `train_run`; the second may have a fault."""
  address = f"127.0.0.1:{children.find_port()}"
  return [
    stack.enter_context(
      children.Child(
        *("library_user", address, i, 2, folder, steps, timeout),
        cwd=texts,
        fault=fault if i else None,
        folder=folder,
      )
    )
    for i in range(2)
  ]


@pytest.mark.slow
def test_row_31_processes_that_a_user_has_started(texts):
  """As the command, but nothing is printed for them, and no process is ended."""
  with contextlib.ExitStack() as stack:
    processes = start_library_users(stack, texts, "library", 3, 60)
    statuses, said = wait_for_all(processes)
  assert statuses == [0, 0], said
  assert all("trained 3 steps, 3 losses" in child.out for child in processes), said
  assert children.steps_there(texts / "library") == [3]


@pytest.mark.slow
def test_row_31_an_end_that_is_caught_does_not_end_what_comes_next(texts):
  """After a signal, an error and an interrupt; and exchanges that all have passed are deleted."""
  address = f"127.0.0.1:{children.find_port()}"
  with contextlib.ExitStack() as stack:
    processes = [
      stack.enter_context(children.Child("watches", address, i, cwd=texts)) for i in range(2)
    ]
    statuses, said = wait_for_all(processes, 60)
  assert statuses == [0, 0], said
  keys = [int(n) for child in processes for n in re.findall(r"signal 15, (\d+) keys", child.out)]
  assert len(keys) == 2 and max(keys) < 10, said
  assert "caught TrainingError nothing there\ncaught TrainingError inter" in processes[0].out, said
  assert "caught LookupError nothing there\ncaught KeyboardInterrupt" in processes[1].out, said
  assert all(child.out.endswith("the end\n") for child in processes), said


@pytest.mark.slow
def test_row_31_a_user_catches_what_ends_another_process(texts):
  with contextlib.ExitStack() as stack:
    fault = "hang@call=program.advance:4"
    processes = start_library_users(stack, texts, "caught", 10_000, 6, fault)
    processes[1].wait_until(lambda: processes[1].fired)
    processes[0].wait_until(lambda: "caught: " in processes[0].out)
    line = processes[0].out.partition("caught: ")[2]
  assert "process 1 " in line and "has not come so far" in line
