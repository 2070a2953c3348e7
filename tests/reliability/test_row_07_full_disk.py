"""Rows 7 and 8: what cannot be written is said; what was written before stays.

A save ends before its process does.

The disk is full in three ways: a small one that is really mounted (where that is allowed), a limit
on the size of files that the kernel keeps, and failing operations. None of them is known to jgpt.
"""

import errno
import json
import os
import re
import resource
import stat

import children
import pytest

from jgpt import cli
from jgpt.runs import manifest
from jgpt.runs.rows import read_jsonl
from jgpt.system import files

RUN = {"train__steps": 40, "train__save_every": 10, "train__log_every": 10}
NOISE = re.compile(r"Traceback|Exception ignored|Fatal Python error")


@pytest.fixture
def texts(tmp_path):
  children.write_texts(tmp_path)
  return tmp_path


def check_failed(child, workdir, steps):
  """A clear error that names the last checkpoint, a status, and whole checkpoints."""
  assert child.status in (1, 2), (child.status, child.out, child.err)
  errors = [line for line in child.err.splitlines() if line.startswith("error: ")]
  assert errors, child.err
  there = manifest.list_steps(workdir)
  assert set(there) >= set(steps) and 20 not in set(there) - set(steps), (
    there
  )  # a later one may have been tried, and fit
  assert [manifest.find_damage(workdir / "checkpoints" / str(step)) for step in there] == [
    None
  ] * len(there)
  assert f"The last checkpoint is of step {there[-1]}" in errors[0]
  assert not NOISE.search(child.err), child.err  # not among stack traces
  return errors[0]


@pytest.mark.slow
def test_row_07_a_disk_that_is_full_while_saving(texts):
  """A disk of 2 MB: some saves fit, one does not.

  With room again, the run goes on to the same bits.
  """
  disk = texts / "disk"
  disk.mkdir()
  changes = RUN | {"train__keep_latest": 100, "train__steps": 400}
  try:
    with children.small_disk(disk, 2):
      args = children.arguments("names", disk / "run", **changes)
      child = children.run("jgpt.run", *args, cwd=texts)
      there = children.steps_there(disk / "run")
      assert len(there) > 3 and there[-1] < 400
      error = check_failed(child, disk / "run", there)
      assert "space" in error.lower(), error
      copied = texts / "copied"
      os.system(f"cp -r '{disk}/run' '{copied}'")
  except PermissionError as error:
    pytest.skip(str(error))
  children.train(*children.arguments("names", "straight", **changes), cwd=texts)
  again = children.train(*children.arguments("names", copied, **changes), cwd=texts)
  assert f"going on from step {there[-1]}" in again.out
  children.assert_same(children.bits(copied), children.bits(texts / "straight"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytes"])
def test_row_07_files_that_may_not_grow_while_saving(texts, name):
  """The limit is set in the running process, after its first save."""
  args = children.arguments(name, "run", **(RUN | {"train__steps": 400, "train__save_every": 100}))
  with children.Child("jgpt.run", *args, cwd=texts, fault="freeze@save:2") as child:
    limits = []

    def limit(mark):
      limits.append(mark)
      resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (4096, 4096))

    child.status = child.at_each_stop(limit)
  assert len(limits) == 1
  check_failed(child, texts / "run", [100])
  again = children.train(*args, cwd=texts)
  assert "going on from step 100" in again.out
  straight = children.arguments(
    name, "straight", **(RUN | {"train__steps": 400, "train__save_every": 100})
  )
  children.train(*straight, cwd=texts)
  children.assert_same(children.bits(texts / "run"), children.bits(texts / "straight"))


def test_row_07_what_cannot_be_written_is_named(tmp_path, capsys):
  """By the command, whatever the reason: a limit on the size of files, a quota, a disk that is
  full.
  """
  path = tmp_path / "experiment.json"
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
  try:
    status = cli.run_command(lambda: files.write_file(path, bytes(10_000)) or 0)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert (status, capsys.readouterr().err) == (1, f"error: {path}: File too large\n")
  assert list(tmp_path.iterdir()) == []
  with pytest.MonkeyPatch.context() as patch:
    for number in (errno.EDQUOT, errno.ENOSPC, errno.EIO):

      def fail(descriptor, number=number):
        raise OSError(number, os.strerror(number))

      patch.setattr(os, "fsync", fail)
      assert cli.run_command(lambda: files.write_file(path, b"{}") or 0) == 1
      assert capsys.readouterr().err == f"error: {path}: {os.strerror(number)}\n"

  def unnamed():
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

  assert cli.run_command(unnamed) == 1
  assert capsys.readouterr().err == f"error: [Errno {errno.EDQUOT}] {os.strerror(errno.EDQUOT)}\n"


@pytest.mark.slow
def test_row_07_a_disk_that_is_full_from_the_start(texts):
  """Of 8 kB: the first file or the second does not fit; the line names it."""
  disk = texts / "disk"
  disk.mkdir()
  try:
    with children.small_disk(disk, 8 / 1024):
      child = children.run("jgpt.run", *children.arguments("names", disk / "run", **RUN), cwd=texts)
  except PermissionError as error:
    pytest.skip(str(error))
  assert child.status == 1, child.out + child.err
  assert re.fullmatch(rf"error: {disk}/run/[a-z./-]+: No space left on device\n", child.err), (
    child.err
  )


POINTS = [
  "save",
  "leaf",
  "metadata",
  "commit",
  "json",
  "tokenizer",
  "manifest-open",
  "manifest",
]


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_row_08_an_error_in_the_second_save_surfaces_at_the_third(texts, point):
  """It happens in the background while the run trains on, and ends the run at its next save."""
  count = (
    3 if point in ("leaf", "metadata") else 2
  )  # those come once for each of the two folders of arrays
  args = children.arguments("names", "run", **RUN)
  child = children.run("jgpt.run", *args, cwd=texts, fault=f"full@{point}:{count}")
  assert len(child.fired) == 1
  error = check_failed(child, texts / "run", [10])
  assert "space" in error.lower(), error
  assert "step 40" not in child.out
  again = children.train(*args, cwd=texts)
  assert "going on from step" in again.out and children.nothing_half_done(texts / "run") == []
  assert manifest.find_damage(texts / "run" / "checkpoints" / "40") is None


@pytest.mark.slow
@pytest.mark.parametrize("point", ["commit", "manifest"])
def test_row_08_an_error_in_the_last_save_surfaces_at_exit(texts, point):
  args = children.arguments("names", "run", **RUN)
  child = children.run("jgpt.run", *args, cwd=texts, fault=f"full@{point}:4")
  assert len(child.fired) == 1
  error = check_failed(child, texts / "run", [30, 40])  # the same step is tried once more
  assert "space" in error.lower(), error
  children.train(*args, cwd=texts)
  assert manifest.list_steps(texts / "run")[-1] == 40


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full", "kill"])
def test_row_07_a_result_that_cannot_be_written(texts, fault):
  """A full disk is a warning and the run has all the rest; a process that is killed leaves no
  result, and the same command writes it.
  """
  args = children.arguments("names", "run", **RUN)
  child = children.run("jgpt.run", *args, cwd=texts, fault=f"{fault}@result")
  assert len(child.fired) == 1 and child.status == {"full": 0, "kill": 137}[fault], child.err
  if fault == "full":
    assert re.fullmatch(r"WARNING: run/result\.json was not written: .*space.*\n", child.err)
  assert manifest.list_steps(texts / "run")[-1] == 40
  again = children.train(*args, cwd=texts)
  assert again.err == "" and children.nothing_half_done(texts / "run") == []
  assert json.loads((texts / "run" / "result.json").read_text())["is_finished"]


@pytest.mark.slow
@pytest.mark.parametrize("point", ["delete", "deleting"])
def test_row_08_an_old_step_that_cannot_be_deleted(texts, point):
  """Either goes on or says so; nothing that is kept is damaged."""
  args = children.arguments("names", "run", **RUN, train__keep_latest=1)
  child = children.run("jgpt.run", *args, cwd=texts, fault=f"full@{point}")
  assert len(child.fired) == 1 and not NOISE.search(child.err), child.err
  assert child.status in (0, 1) and (child.status == 0 or child.err.count("error: ") == 1)
  there = manifest.list_steps(texts / "run")
  assert there and all(
    manifest.find_damage(texts / "run" / "checkpoints" / str(step)) is None for step in there
  )
  children.train(*args, cwd=texts)
  assert manifest.list_steps(texts / "run") == [40]


@pytest.mark.slow
def test_row_08_a_process_that_ends_right_after_a_save_completes_it(texts):
  """The last save of 60 MB is under way when everything else is done."""
  changes = {
    "model__d_model": 448,
    "model__d_ff": 1792,
    "model__num_layers": 2,
    "train__steps": 2,
    "sample__max_tokens": 1,
  }
  children.train(*children.arguments("names", "run", **changes), cwd=texts)
  folder = texts / "run" / "checkpoints" / "2"
  assert manifest.find_damage(folder) is None
  assert sum(x.nbytes for x in children.read_leaves(folder).values()) > 55e6


@pytest.mark.slow
def test_row_07_a_log_that_is_full_is_said_once_and_training_goes_on(texts):
  """The limit is above what a checkpoint's files have and below what the log gets."""
  changes = {"train__steps": 4000, "train__log_every": 50, "train__save_every": 2000}
  children.train(*children.arguments("names", "straight", **changes), cwd=texts)
  biggest = max(p.stat().st_size for p in (texts / "straight").rglob("checkpoints/**/*"))
  whole = (texts / "straight" / "metrics.jsonl").stat().st_size
  limit = max(2 * biggest, 96 << 10)
  assert limit < whole / 2

  def few_bytes():
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

  args = children.arguments("names", "run", **changes)
  child = children.run("jgpt.run", *args, cwd=texts, prepare=few_bytes)
  assert child.status == 0, child.err
  warnings = [
    line for line in child.err.splitlines() if "metrics.jsonl" in line or "JsonlWriter" in line
  ]
  assert len(warnings) == 1 and "training goes on" in warnings[0] and child.err.count("\n") == 1, (
    child.err
  )
  got, expected = children.bits(texts / "run"), children.bits(texts / "straight")
  assert got.leaves == expected.leaves and got.samples == expected.samples
  assert expected.metrics.startswith(got.metrics.rpartition(b"\n")[0])
  # What comes later is logged again, without what is lost.
  more = changes | {"train__steps": 4100, "optimizer__decay_steps": 4000, "optimizer__end_lr": 0.0}
  later = children.run("jgpt.run", *children.arguments("names", "run", **more), cwd=texts)
  assert later.status in (0, 2) and not NOISE.search(later.err)
  rows = read_jsonl(texts / "run" / "metrics.jsonl")
  steps = [row["step"] for row in rows if "train/loss" in row]
  assert steps == sorted(set(steps))


@pytest.mark.slow
def test_row_07_the_log_on_a_full_device(texts):
  """The operation that opens the log fails: said once, and the run is what it would have been."""
  children.train(*children.arguments("names", "straight", **RUN), cwd=texts)
  child = children.run(
    "jgpt.run", *children.arguments("names", "run", **RUN), cwd=texts, fault="full@log"
  )
  assert len(child.fired) == 1 and not NOISE.search(child.err), child.err
  if child.status == 0:
    assert child.err.count("\n") == 1
    assert children.bits(texts / "straight").leaves == {
      name: (str(x.dtype), x.shape, x.tobytes())
      for name, x in children.read_leaves(texts / "run" / "checkpoints" / "40").items()
    }
  else:  # before anything was trained, it may be refused as well
    assert child.status in (1, 2) and child.err.startswith("error: ")


@pytest.mark.slow
def test_row_07_standard_output_that_is_full(texts):
  """`> /dev/full`: the console stops, said once; the run is saved."""
  args = children.arguments("names", "run", **RUN)
  full = os.open("/dev/full", os.O_WRONLY)
  try:
    child = children.run("jgpt.run", *args, cwd=texts, prepare=lambda: os.dup2(full, 1))
  finally:
    os.close(full)
  assert not NOISE.search(child.err), child.err
  assert child.status in (0, 1) and child.err.strip()
  if manifest.list_steps(texts / "run"):
    assert child.err.count("\n") <= 2


def without_power():
  """Takes root's right to write where permissions forbid it.

  Keeps the process otherwise as it is.
  """
  if os.geteuid() == 0:
    import ctypes

    if ctypes.CDLL(None).prctl(
      24, 1, 0, 0, 0
    ):  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: not in what exec gives
      raise OSError("prctl")


@pytest.mark.slow
def test_row_07_a_folder_that_becomes_read_only_while_training(texts):
  args = children.arguments("names", "run", **RUN)
  checkpoints = texts / "run" / "checkpoints"
  with children.Child(
    "jgpt.run", *args, cwd=texts, fault="freeze@save:2", prepare=without_power
  ) as child:
    child.status = child.at_each_stop(lambda mark: checkpoints.chmod(0o500))
  checkpoints.chmod(0o755)
  error = check_failed(child, texts / "run", [10])
  assert "ermission" in error or "ead-only" in error, error
  again = children.train(*args, cwd=texts)
  assert "going on from step 10" in again.out


@pytest.mark.slow
@pytest.mark.parametrize("place", ["run", "run/checkpoints", "."])
def test_row_07_a_folder_that_is_read_only_from_the_start(texts, place):
  """One line that names it and status 1 or 2; a finished run in it can still be sampled."""
  args = children.arguments("names", "run", **RUN)
  if place != ".":
    children.train(*args, cwd=texts)
  (texts / ".logs").mkdir(exist_ok=True)
  target = texts / place
  mode = stat.S_IMODE(target.stat().st_mode)
  target.chmod(0o500)
  try:
    more = children.arguments(
      "names", "run", **(RUN | {"train__steps": 60, "optimizer__schedule": "linear"})
    )
    child = children.run(
      "jgpt.run", *(args if place == "." else more), cwd=texts, prepare=without_power
    )
    if place != ".":
      read = children.run(
        "jgpt.sample", "--run", texts / "run", "--num", 2, cwd=texts, prepare=without_power
      )
      assert read.status == 0 and read.err == "" and len(read.out.splitlines()) == 2
  finally:
    target.chmod(mode)
  assert (
    child.status in (1, 2) and child.err.count("error: ") == 1 and not NOISE.search(child.err)
  ), child.err
