"""Row 3: killed at a chosen moment, a run goes on from its newest complete step to the bits of an
uninterrupted one.

Two ways: the process is killed at named moments; and it is stopped before each operation on a file
of its folder, one after the other, and the folder as it is then is copied: what a SIGKILL at that
moment would leave. Killing at random moments is `test_row_03_random_kills.py`.
"""

import contextlib
import os
import shutil
import signal

import children
import pytest
import small_runs

from jgpt import train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change
from jgpt.plan import plan_run
from jgpt.runs import manifest
from jgpt.runs.open import open_run

STEPS, EVERY = 30, 6
KILLED = 128 + signal.SIGKILL
RUN = {
  "train__steps": STEPS,
  "train__save_every": EVERY,
  "train__eval_every": 10,
  "train__keep_latest": 2,
  "train__keep_best": 0,
}


def read_as_others_do(workdir):
  """What a reader finds, at once and without changing anything: the newest complete step, whole."""
  before = sorted((str(p), p.lstat().st_mtime_ns) for p in workdir.rglob("*"))
  steps = manifest.list_steps(workdir)
  assert steps == children.steps_there(workdir)
  for step in steps:
    assert manifest.find_damage(workdir / "checkpoints" / str(step)) is None
  if steps:
    assert open_run(workdir).step == steps[-1]
  assert sorted((str(p), p.lstat().st_mtime_ns) for p in workdir.rglob("*")) == before
  return steps


# Which one is hit, and the newest step that is complete then.
MOMENTS = [
  ("save", 1, None),
  ("save", 3, 12),
  ("leaf", 5, 12),
  ("commit", 3, 12),
  ("commit+", 3, 12),
  ("manifest", 3, 12),
  ("manifest+", 3, 18),
  ("delete", 1, None),
  ("deleting", 3, None),
  ("log", 1, None),
]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("point", "count", "newest"), MOMENTS, ids=[f"{p}:{n}" for p, n, _ in MOMENTS]
)
def test_row_03_killed_at(texts, expected, point, count, newest):
  """The command is killed there, its folder is read, and the same command is given again."""
  workdir = texts / f"{point}{count}"
  args = children.arguments("names", workdir, **RUN)
  where = f"kill@{point.removesuffix('+')}{'+' if point.endswith('+') else ''}:{count}"
  killed = children.run("jgpt.run", *args, cwd=texts, fault=where, folder=workdir.name)
  assert killed.status == KILLED and len(killed.fired) == 1, killed.out + killed.err
  steps = read_as_others_do(workdir)
  if point not in ("delete", "deleting", "log"):
    assert (steps[-1] if steps else None) == newest, killed.fired
  elif (
    point == "deleting"
  ):  # while an old step is deleted it is none any more, and the newer ones are there
    assert len(steps) >= 2 and len(list((workdir / "checkpoints").iterdir())) > len(steps)
  again = children.train(*args, cwd=texts)
  assert ("going on from step" in again.out) == bool(steps)
  assert not steps or f"going on from step {steps[-1]}" in again.out
  children.assert_same(children.bits(workdir), expected)
  assert children.nothing_half_done(workdir) == []


@pytest.mark.slow
@pytest.mark.parametrize(
  ("where", "there"),
  [("save:3", {6, 12}), ("commit:3", {6, 12}), ("manifest:3", {6, 12}), ("manifest+:3", {10, 12})],
)
def test_row_03_killed_while_the_best_state_is_saved(texts, expected, where, there):
  """It was held since step 10 and is saved after the state of step 12, which is there; the same
  command goes on to the same bits.
  """
  workdir = texts / f"best {where}"
  args = children.arguments("names", workdir, **RUN | {"train__keep_best": 1})
  killed = children.run("jgpt.run", *args, cwd=texts, fault=f"kill@{where}", folder=workdir.name)
  assert killed.status == KILLED and len(killed.fired) == 1, killed.out + killed.err
  assert there <= set(read_as_others_do(workdir))
  again = children.train(*args, cwd=texts)
  assert "going on from step 12" in again.out
  children.assert_same(children.bits(workdir), expected)
  assert children.nothing_half_done(workdir) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_row_03_killed_before_any_operation_on_a_file(tmp_path, monkeypatch):
  """Every folder that a SIGKILL between two operations could leave, of a whole run with three saves
  and one deletion.
  """
  monkeypatch.chdir(tmp_path)
  children.write_texts(tmp_path)
  base, settings = children.EXPERIMENTS["names"]
  changes = settings | {
    "train.steps": 12,
    "train.save_every": 4,
    "train.eval_every": 6,
    "train.keep_latest": 2,
    "train.keep_best": 0,
  }
  settings_of_train = {k.replace(".", "__"): v for k, v in changes.items() if "train." in k}
  args = children.arguments("names", "run", **settings_of_train)
  images = {}

  def copy(mark):
    there = tuple(
      sorted((str(p.relative_to(workdir)), p.lstat().st_size) for p in workdir.rglob("*"))
    )
    if there not in images:
      images[there] = tmp_path / "images" / str(len(images))
      shutil.copytree(workdir, images[there], symlinks=True) if there else images[there].mkdir(
        parents=True
      )
      marks.append(mark)

  workdir, marks = tmp_path / "run", []
  with children.Child(
    "jgpt.run", *args, cwd=tmp_path, fault="freeze@any", env={"JGPT_COMPILE_QUICKLY": "1"}
  ) as child:
    status = child.at_each_stop(copy)
  assert status == 0, child.out + child.err
  expected = children.bits(workdir)
  assert len(images) > 60  # 3 saves of some 20 operations
  seen, decisive = set(), ("/manifest.json", "/checkpoints/4", "/checkpoints/8", "/checkpoints/12")
  for number, (image, mark) in enumerate(zip(images.values(), marks, strict=True)):
    steps = read_as_others_do(image)
    seen.add(tuple(steps))
    if number % 8 == 0 or mark.endswith(decisive):
      with small_runs.compiled_quickly():
        plan = plan_run(change(load_experiment(base), changes), workdir=image, name="names")
        assert plan.start_step == (steps[-1] if steps else 0), mark
        train.train_run(plan)
      got = children.bits(image)
      assert (got.step, got.leaves, got.digests) == (12, expected.leaves, expected.digests), mark
      assert got.metrics == expected.metrics, mark
      left = [path for path in children.nothing_half_done(image) if not path.startswith("samples")]
      # A first save that was killed before its manifest may be all there is of a run: it is kept
      # under another name.
      assert all(not steps and path.startswith("checkpoints/4.damaged") for path in left), (
        mark,
        left,
      )
    shutil.rmtree(image)
  assert seen >= {(), (4,), (4, 8), (4, 8, 12)}
  print(f"\n{len(marks)} moments; complete steps then: {sorted(seen)}")


BIG = {
  "model__d_model": 896,
  "model__d_ff": 3584,
  "model__num_layers": 2,
  "train__save_every": 1,
  "train__steps": 3,
  "train__keep_latest": 2,
  "sample__max_tokens": 1,
}


def size_of(folder):
  total = 0
  for parent, _, files in os.walk(folder):  # what is renamed meanwhile is passed over
    for name in files:
      with contextlib.suppress(FileNotFoundError):
        total += os.stat(os.path.join(parent, name)).st_size
  return total


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_row_03_killed_half_way_through_a_leaf(texts):
  """231 MB of parameters and moments.

  Killed when a tenth, a half and nine tenths of the second save are on the disk.
  """
  children.train(*children.arguments("names", "big straight", **BIG), cwd=texts, timeout=300)
  expected = children.bits(texts / "big straight")
  whole = sum(len(content) for _, _, content in expected.leaves.values())
  assert whole > 200e6
  on_disk = size_of(texts / "big straight" / "checkpoints" / "3")
  args = children.arguments("names", "big", **BIG)
  checkpoints = texts / "big" / "checkpoints"

  def written():
    return sum(size_of(p) for p in checkpoints.glob("2.*tmp*"))

  for share in (0.1, 0.5, 0.9):
    with children.Child("jgpt.run", *args, cwd=texts) as child:
      child.wait_until(lambda share=share: written() > share * on_disk)
      child.send(signal.SIGKILL)
      assert child.wait() == KILLED
    half = written()
    print(
      f"\nkilled at {half / on_disk:.0%} of {on_disk / 1e6:.0f} MB: "
      f"{children.describe(texts / 'big')}"
    )
    assert 0 < half < on_disk and read_as_others_do(texts / "big") == [1]
  again = children.train(*args, cwd=texts, timeout=300)
  assert "going on from step 1" in again.out
  children.assert_same(children.bits(texts / "big"), expected)
  assert children.nothing_half_done(texts / "big") == []
  shutil.rmtree(texts / "big")
  shutil.rmtree(texts / "big straight")
