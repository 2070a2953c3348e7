"""Row 10: one writer for a run folder; readers never see half a step."""

import hashlib
import json
import os
import signal
import socket
import time

import children
import pytest
import small_runs

from jgpt.runs import manifest

LONG = {
  "train__steps": 200_000,
  "train__log_every": 100,
  "optimizer__schedule": "constant",
}


@pytest.fixture
def texts(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  children.write_texts(tmp_path)
  return tmp_path


@pytest.mark.slow
def test_row_10_a_second_writer_is_refused_and_the_first_goes_on(texts):
  """Also by another name of the folder, and with --fresh, which would move it away from under the
  first.
  """
  args = children.arguments("names", "run", **LONG)
  with children.Child("jgpt.run", *args, cwd=texts) as first:
    first.wait_until(lambda: "\nstep" in first.out)
    os.symlink(texts / "run", texts / "link")
    others = [args, children.arguments("names", texts / "link", **LONG), [*args, "--fresh"]]
    others.append(children.arguments("names", "run", **(LONG | {"train__steps": 300_000})))
    before = sorted(p.name for p in texts.iterdir())
    for number, other in enumerate(others):
      began = time.monotonic()
      second = children.run("jgpt.run", *other, cwd=texts)
      assert second.status == 2, (number, second.out, second.err)
      assert second.err.startswith("error: ") and second.err.count("\n") == 1, (number, second.err)
      if number != 1:  # through a link it may be refused for that
        assert str(first.process.pid) in second.err and socket.gethostname() in second.err, (
          second.err
        )
      assert time.monotonic() - began < 20
    assert sorted(p.name for p in texts.iterdir()) == before
    assert first.process.poll() is None
    first.send(signal.SIGTERM)
    assert first.wait() == 143 and "error" not in first.err
  starts = json.loads((texts / "run" / "env.json").read_text())
  assert len(starts) == 1  # those who were refused wrote nothing
  rows = small_runs.read_untimed(texts / "run")
  assert [row["step"] for row in rows if "train/loss" in row] == list(
    range(1, manifest.list_steps(texts / "run")[-1] + 1)
  )


@pytest.mark.slow
def test_row_10_of_many_that_begin_at_once_one_writes(texts):
  """Five processes start together in a folder that is not there yet."""
  args = children.arguments("names", "run", train__steps=3000, train__save_every=500)
  with (
    children.Child("jgpt.run", *args, cwd=texts) as a,
    children.Child("jgpt.run", *args, cwd=texts) as b,
    children.Child("jgpt.run", *args, cwd=texts) as c,
  ):
    statuses = [child.wait() for child in (a, b, c)]
  errors = a.err + b.err + c.err
  assert set(statuses) <= {0, 2} and 0 in statuses, errors  # one that comes late finds it finished
  assert errors.count("error: ") == statuses.count(2) == errors.count("\n")
  children.train(
    *children.arguments("names", "straight", train__steps=3000, train__save_every=500), cwd=texts
  )
  children.assert_same(children.bits(texts / "run"), children.bits(texts / "straight"))
  assert children.nothing_half_done(texts / "run") == []


@pytest.mark.slow
def test_row_10_the_lock_of_a_killed_process_is_free_at_once(texts):
  """Killed, and stopped and then killed; what the lock file says afterwards does not matter."""
  args = children.arguments("names", "run", **(LONG | {"train__save_every": 1000}))
  for _ in range(2):
    with children.Child("jgpt.run", *args, cwd=texts) as child:
      child.wait_until(lambda child=child: "\nstep" in child.out)
      child.send(signal.SIGSTOP)
      refused = children.run(
        "jgpt.run", *args, cwd=texts
      )  # it holds the lock though it does nothing
      assert refused.status == 2 and str(child.process.pid) in refused.err
      child.send(signal.SIGKILL)
      child.wait()
  with children.Child("jgpt.run", *args, cwd=texts) as child:
    child.wait_until(lambda: "\nstep" in child.out)
    child.send(signal.SIGTERM)
    assert child.wait() == 143


@pytest.mark.slow
def test_row_10_readers_of_a_run_being_written_never_see_half_a_step(texts):
  """Two processes of two threads load the newest checkpoint over and over.

  Each update is saved, all but one are deleted.

  What they get is compared with the same run when it kept everything.
  """
  changes = {"train__steps": 100, "train__save_every": 1, "train__keep_best": 0}
  children.train(*children.arguments("names", "all", **changes, train__keep_latest=1000), cwd=texts)
  expected = {
    step: children.read_leaves(texts / "all" / "checkpoints" / str(step), ("params",))[
      "params/tok_embed"
    ].tobytes()
    for step in children.steps_there(texts / "all")
  }
  assert len(expected) == 100 and len(set(expected.values())) == 100
  digests = texts / "digests.json"
  digests.write_text(
    json.dumps({step: hashlib.sha256(content).hexdigest() for step, content in expected.items()})
  )
  args = children.arguments("names", "run", **changes, train__keep_latest=1)
  with (
    children.Child("jgpt.run", *args, cwd=texts, fault="freeze@commit+:2") as child,
    children.Child("reader", "run", digests, cwd=texts) as one,
    children.Child("reader", "run", digests, cwd=texts) as other,
  ):

    def start_reading(mark):
      one.wait_until(lambda: children.steps_there(texts / "run"))
      time.sleep(5)  # they import and read the first step meanwhile

    assert child.at_each_stop(start_reading) == 0 and child.err == ""
    (texts / "over").touch()
    assert one.wait() == other.wait() == 0, one.err + other.err
  found = [json.loads(reader.out) for reader in (one, other)]
  seen = [step for reader in found for step in reader["seen"]]
  errors = [error for reader in found for error in reader["errors"]]
  print(
    f"\n{len(seen)} reads of {len(set(seen))} different steps, {len(errors)} errors {errors[:3]}"
  )
  assert errors == []
  assert len(seen) > 20 and len(set(seen)) > 5 and manifest.list_steps(texts / "run") == [100]


@pytest.mark.slow
def test_row_10_sample_while_it_trains(texts):
  """The command as a person gives it, three times during a run that keeps one checkpoint."""
  changes = {
    "train__steps": 4000,
    "train__save_every": 2,
    "train__keep_latest": 1,
    "train__keep_best": 0,
  }
  with children.Child(
    "jgpt.run", *children.arguments("names", "run", **changes), cwd=texts
  ) as child:
    child.wait_until(lambda: children.steps_there(texts / "run"))
    for _ in range(3):
      read = children.run("jgpt.sample", "--run", "run", "--num", 2, cwd=texts)
      assert read.status == 0 and read.err == "" and len(read.out.splitlines()) == 2, read.err
    assert child.process.poll() is None
    child.send(signal.SIGTERM)
    assert child.wait() == 143


@pytest.mark.slow
def test_row_10_evaluating_and_sampling_need_no_lock(texts):
  """Two readers at once and a writer: nobody is refused but a second writer."""
  children.train(*children.arguments("names", "run", train__steps=20), cwd=texts)
  with (
    children.Child("jgpt.sample", "--run", "run", cwd=texts) as one,
    children.Child("jgpt.evaluate", "--run", "run", cwd=texts) as other,
  ):
    assert one.wait() == other.wait() == 0, one.err + other.err
