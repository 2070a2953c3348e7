"""Row 3, at moments that nobody chose: killed at least 20 times over one run, it ends with the bits
of one never killed.

The moment is uniform over the time of a start, from the first import on. Checkpoints are saved so
often that many a process is killed within one. One line for each kill is printed (`pytest -s`).
"""

import random
import signal
import time

import children
import pytest

from jgpt.runs import manifest

COMMON = {"train__save_every": 3, "train__keep_latest": 2, "train__log_every": 10, "sample__num": 2}
# name -> seed of the moments and of the run, and the run: long enough for all kills.
RUNS = {
  "names": (0, {"train__steps": 240, "train__eval_every": 12}),
  "bytes": (1, {"train__steps": 180, "train__eval_every": 20, "train__eval_batches": 2}),
  "bpe": (
    2,
    {
      "train__steps": 180,
      "train__eval_every": 30,
      "train__eval_batches": 2,
      "train__sample_every": 30,
    },
  ),
  "epochs": (3, {"train__steps": 180, "train__eval_every": 9, "train__eval_batches": 2}),
}


def kill_and_compare(folder, name, seed, kills, changes):
  """Runs an experiment once without interruption and once killed `kills` times."""
  children.write_texts(folder)
  changes = COMMON | changes | {"train__seed": seed}
  chance = random.Random(seed)
  with children.Child(
    "jgpt.run", *children.arguments(name, "straight", **changes), cwd=folder
  ) as straight:
    straight.wait_until(lambda: "\nstep" in straight.out or "\nEpoch" in straight.out)
    until_training = time.monotonic() - straight.began
    assert straight.wait() == 0, straight.err
  expected = children.bits(folder / "straight")
  args, workdir = children.arguments(name, folder / "killed", **changes), folder / "killed"
  # A start's time: until it trains, and so much of the training that some is left after all kills.
  longest = until_training + (straight.seconds - until_training) * 3 / kills
  reached = []
  print(
    f"\n{name}, seed {seed}: training begins after {until_training:.1f} s and all takes "
    f"{straight.seconds:.1f} s"
  )
  for number in range(1, kills + 1):
    moment = chance.uniform(0, longest)
    enough = (
      changes["train__steps"] * number // (kills + 1)
    )  # on a machine that is quick now some is left too
    with children.Child("jgpt.run", *args, cwd=folder) as child:
      while (
        time.monotonic() - child.began < moment
        and max(children.steps_there(workdir), default=0) < enough
      ):
        time.sleep(0.01)
      moment = time.monotonic() - child.began
      child.send(signal.SIGKILL)
      assert child.wait() == 128 + signal.SIGKILL and "error" not in child.err, child.err
    steps = manifest.list_steps(workdir)
    print(f"{number:3} killed after {moment:.2f} s: {children.describe(workdir)}")
    assert steps == children.steps_there(workdir)
    assert [manifest.find_damage(workdir / "checkpoints" / str(step)) for step in steps] == [
      None
    ] * len(steps)
    reached.append(steps[-1] if steps else 0)
  assert (
    reached == sorted(reached) and len(set(reached)) >= 3
  )  # nothing that was saved is ever lost
  children.train(*args, cwd=folder)
  children.assert_same(children.bits(workdir), expected)
  assert children.nothing_half_done(workdir) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RUNS)
def test_row_03_killed_twenty_times_at_random_moments(tmp_path, name):
  seed, changes = RUNS[name]
  kill_and_compare(tmp_path, name, seed, 20, changes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [20, 40])
def test_row_03_a_long_run_killed_again_and_again(tmp_path, kills):
  """6,000 updates from microgpt's own start."""
  changes = {
    "train__steps": 6000,
    "train__save_every": 30,
    "train__log_every": 100,
    "optimizer__decay_steps": 6000,
  }
  kill_and_compare(tmp_path, "microgpt", 42, kills, changes)
