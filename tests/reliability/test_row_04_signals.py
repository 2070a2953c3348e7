"""Row 4: SIGTERM and Ctrl-C at any time.

What was computed is saved, one line says so, and the same command goes on.

The child sends itself the signal where a function is called, or is sent it by its parent while
something takes long. Times from signal to exit are printed (`pytest -s`).
"""

import re
import signal
import time

import children
import pytest

from jgpt.runs import manifest

RUN = {
  "train__steps": 30,
  "train__save_every": 10,
  "train__eval_every": 10,
  "train__eval_batches": 2,
  "train__sample_every": 15,
}
STATUS = {"term": 143, "int": 130}
SOON = 4.0  # seconds on a machine that is busy with other tests; on an idle one it is under one


EARLY = [
  "call=runtime.set_up",
  "call=plan.plan_run",
  "call=corpus.find_data",
  "call=summary.describe_plan",
  "settings",
  "lock",
  "env",
  "log",
  "call=program.compile_program",
  "call=program.lower_steps",
]
# Where, and which steps may be the newest that is saved then.
LATE = [
  ("call=evaluation.begin_evaluation:2", (1, 10)),
  ("call=generate.begin_texts:1", (15, 20)),
  ("save", (10, 20)),
  ("commit", (10, 20, 30)),
  ("manifest:2", (20, 30)),
  ("call=evaluation.evaluate_heldout", (30,)),
  ("call=generate.sample_texts", (30,)),
  ("samples", (30,)),
  ("call=summary.print_result", (30,)),
  ("call=summary.print_next", (30,)),
]


def stop_at(texts, workdir, place, kind):
  """Starts the run, which sends itself a signal there; returns how it ended."""
  args = children.arguments("names", workdir, **RUN)
  options = {"fault": f"{kind}@{place}", "folder": workdir.name}
  child = children.run("jgpt.run", *args, cwd=texts, **options)
  assert len(child.fired) == 1, (place, child.out + child.err)
  assert "Traceback" not in child.err, child.err
  assert child.status == STATUS[kind], (place, child.status, child.out, child.err)
  return child


@pytest.mark.slow
def test_row_04_a_signal_before_it_trains(texts, expected):
  """Ten places from the first import until everything is compiled.

  Three of the folders then get the whole run.
  """
  for number, place in enumerate(EARLY):
    workdir = texts / f"early {number}"
    child = stop_at(texts, workdir, place, ("term", "int")[number % 2])
    assert children.steps_there(workdir) == []
    lines = [
      line
      for line in (child.out + child.err).splitlines()
      if line.startswith(("stopped", "interrupted"))
    ]
    assert len(lines) == 1, (place, child.out, child.err)
    if place in ("settings", "env", "call=program.lower_steps"):
      children.train(*children.arguments("names", workdir, **RUN), cwd=texts)
      children.assert_same(children.bits(workdir), expected)
      assert children.nothing_half_done(workdir) == []


@pytest.mark.slow
@pytest.mark.parametrize(("place", "steps"), LATE, ids=[place for place, _ in LATE])
def test_row_04_a_signal_at(texts, expected, place, steps):
  """Which of the two signals alternates.

  Both are tried where it matters most, in the tests below.
  """
  workdir = texts / place.replace("=", " ").replace(":", " ")
  child = stop_at(texts, workdir, place, ("term", "int")[LATE.index((place, steps)) % 2])
  there = manifest.list_steps(workdir)
  assert there[-1] in steps and said(child, there[-1]), child.out + child.err
  assert children.steps_there(workdir) == there
  again = children.train(*children.arguments("names", workdir, **RUN), cwd=texts)
  assert (f"going on from step {there[-1]}" in again.out) == (there[-1] < 30)
  children.assert_same(children.bits(workdir), expected)
  assert children.nothing_half_done(workdir) == []


def said(child, step):
  """Whether one line says that it stopped, after which step, and how to go on."""
  lines = [line for line in (child.out + child.err).splitlines() if line.startswith("stopped")]
  return len(lines) == 1 and re.search(rf"\b{step:,}\b.*the same command", lines[0])


# --- While something takes long ---

# One call of a thousand updates, an evaluation, a compilation and a text: each would take a minute
# or more.
BIG = {
  "model__d_model": 256,
  "model__d_ff": 1024,
  "model__num_layers": 4,
  "data__seq_len": 20,
  "data__batch_size": 32,
}
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
LONG = {
  "compile": (
    BIG | {"train__steps": 5, "model__num_layers": 12, "compute__layers": "unroll"},
    "program.lower_steps",
  ),
  "final evaluation": (
    {"train__steps": 2, "train__eval_every": None, "data__path": "long.txt"},
    "evaluation.evaluate_heldout",
  ),
  "sampling": (
    {"train__steps": 2, "train__eval_every": None, "sample__max_tokens": 20000},
    "generate.sample_texts",
  ),
  "compiler's check": (
    BIG | {"train__steps": 2, "train__eval_every": None},
    "canary.compare_compiled",
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["term", "int"])
@pytest.mark.parametrize("what", LONG)
def test_row_04_a_signal_while_something_takes_long_is_heard_at_once(texts, what, kind):
  changes, function = LONG[what]
  if not (texts / "long.txt").exists():
    (texts / "long.txt").write_text(children.VERSE * 4000, encoding="utf-8")
  workdir = texts / f"{what} {kind}"
  args = children.arguments("bytes", workdir, **changes)
  env = {
    "compile": NO_CACHE,
    "compiler's check": NO_CACHE | {"JGPT_CACHE_DIR": str(workdir) + " cache"},
  }.get(what, {})
  with children.Child(
    "jgpt.run", *args, cwd=texts, fault=f"mark@call={function}", folder=workdir.name, env=env,
  ) as child:  # fmt: skip
    child.wait_until(lambda: child.fired)
    time.sleep({"compile": 1.5, "compiler's check": 0}.get(what, 0.7))
    assert child.process.poll() is None, "over too soon for this test"
    sent = child.send(signal.SIGTERM if kind == "term" else signal.SIGINT)
    status = child.wait()
    took = time.monotonic() - sent
  print(f"\n{what}, SIG{kind.upper()}: exit after {took:.2f} s")
  assert status == STATUS[kind] and "Traceback" not in child.err, (status, child.out, child.err)
  assert took < SOON, child.out + child.err
  if what != "compile":
    assert manifest.list_steps(workdir)[-1] == 2 and said(child, 2), child.out + child.err


@pytest.mark.slow
def test_row_04_a_second_signal_ends_at_once_and_the_checkpoint_before_is_whole(texts):
  """A call of a thousand updates takes a minute. The second signal does not wait for it."""
  changes = BIG | {
    "train__steps": 1000,
    "train__save_every": 1000,
    "train__log_every": 1000,
    "train__eval_every": None,
  }
  workdir = texts / "twice"
  args = children.arguments("bytes", workdir, **changes, optimizer__decay_steps=1000)
  first = children.train(*children.arguments("bytes", workdir, **(changes | {"train__steps": 1}),
                                             optimizer__decay_steps=1000), cwd=texts)  # fmt: skip
  assert first.status == 0
  before = children.bits(workdir)
  with children.Child("jgpt.run", *args, cwd=texts) as child:
    child.wait_until(lambda: "going on from step 1" in child.out)
    time.sleep(4)  # the steps are under way
    child.send(signal.SIGTERM)
    time.sleep(0.1)
    child.send(signal.SIGTERM)  # a key held down: no second signal yet
    time.sleep(0.9)
    if child.process.poll() is None:
      sent = child.send(signal.SIGTERM)
      status = child.wait()
      took = time.monotonic() - sent
      print(f"\nsecond signal: exit after {took:.2f} s")
      assert took < 1.5
    else:
      status = child.wait()
      print(f"\nthe first signal was enough: {child.out.splitlines()[-1]}")
  assert status == 143 and "Traceback" not in child.err
  after = children.bits(workdir)
  if after.step == 1:
    assert after.leaves == before.leaves and after.digests == before.digests


@pytest.mark.slow
def test_row_04_a_second_signal_during_the_save_leaves_the_one_before(texts, expected):
  """The save that the first signal began is held up, and the second comes meanwhile."""
  workdir = texts / "held up"
  args = children.arguments("names", workdir, **RUN)
  fault = "int@call=evaluation.begin_evaluation:2;freeze@commit:2"
  with children.Child("jgpt.run", *args, cwd=texts, fault=fault, folder=workdir.name) as child:
    stops = []

    def insist(mark):
      stops.append(mark)
      time.sleep(0.7)
      child.send(signal.SIGINT)

    assert 128 - child.at_each_stop(insist) == 130 or child.process.returncode == 130, (
      child.out + child.err
    )
  there = manifest.list_steps(workdir)
  assert there and all(
    manifest.find_damage(workdir / "checkpoints" / str(step)) is None for step in there
  )
  children.train(*args, cwd=texts)
  children.assert_same(children.bits(workdir), expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_row_04_stopped_again_and_again_while_it_trains(texts, number):
  """Every start is stopped in its steps, wherever it is then.

  In the end the bits are those of one start.
  """
  changes = {
    "train__steps": 40_000,
    "train__log_every": 200,
    "train__eval_every": 5000,
    "train__eval_batches": 2,
  }
  children.train(*children.arguments("names", "undisturbed", **changes), cwd=texts)
  workdir = texts / f"again and again {number.name}"
  args = children.arguments("names", workdir, **changes)
  stopped = []
  for _ in range(3):
    with children.Child("jgpt.run", *args, cwd=texts) as child:
      child.wait_until(lambda: "\nstep" in child.out)
      time.sleep(0.01 * len(stopped))
      child.send(number)
      status = child.wait()
    if status == 0:
      break
    assert status == 128 + number, child.err
    stopped.append(manifest.list_steps(workdir)[-1])
    assert said(child, stopped[-1]), child.out + child.err
  assert stopped and sorted(stopped) == stopped
  children.train(*args, cwd=texts)
  children.assert_same(children.bits(workdir), children.bits(texts / "undisturbed"))


@pytest.mark.slow
def test_row_04_ignored_signals_stay_ignored(texts):
  """`nohup` and shells' background jobs: a signal that was ignored at the start ends nothing."""
  args = children.arguments("names", "ignoring", train__steps=2000, train__log_every=20)
  with children.Child(
    "jgpt.run", *args, cwd=texts, prepare=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
  ) as child:
    child.wait_until(lambda: "\nstep" in child.out)
    child.send(signal.SIGINT)
    assert child.wait() == 0, child.err


@pytest.mark.slow
def test_row_04_a_last_save_that_failed_is_no_stop(texts):
  """The signal comes in the final evaluation, while the last save has failed: status 1, whoever
  waits is told.
  """
  args = children.arguments("names", "failed", **(RUN | {"train__steps": 35}))
  fault = "full@commit:4;term@call=evaluation.evaluate_heldout"
  child = children.run("jgpt.run", *args, cwd=texts, fault=fault, folder="failed")
  assert len(child.fired) == 2 and child.status == 1, (child.status, child.err)
  assert "error: a checkpoint could not be written" in child.err and "Traceback" not in child.err
