"""Row 6: where going on is asked for and there is nothing to go on from, nothing begins anew.

`run --resume` as a command. Damaged checkpoints are in `test_row_05_damage.py`.
"""

import re
import shutil

import children
import pytest


def resume(workdir, cwd, **changes):
  return children.run(
    "jgpt.run", *children.arguments("names", workdir, **changes), "--resume", cwd=cwd
  )


def look(folder):
  return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def assert_refused(child, words):
  assert (child.status, child.out) == (2, ""), child.out + child.err
  assert re.fullmatch(rf"error: .*{words}.*\n", child.err), child.err


def test_row_06_resume_where_there_is_no_folder(tmp_path):
  child = resume("run", tmp_path)
  assert_refused(child, "run has no checkpoint yet")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_row_06_resume_where_there_is_no_checkpoint_and_where_there_is_one(tmp_path):
  """An empty folder.

  A run folder without `checkpoints`, with an empty one, with what a killed save left; a whole one.
  """
  children.write_texts(tmp_path)
  run, changes = tmp_path / "run", {"train__save_every": 4, "optimizer__decay_steps": 10}
  children.train(*children.arguments("names", "run", train__steps=4, **changes), cwd=tmp_path)
  children.train(*children.arguments("names", "straight", train__steps=10, **changes), cwd=tmp_path)
  for name in ("empty", "without", "nothing in it", "half"):
    (tmp_path / name).mkdir()
    if name != "empty":
      shutil.copytree(run, tmp_path / name, dirs_exist_ok=True)
      shutil.rmtree(tmp_path / name / "checkpoints")
    if name == "nothing in it":
      (tmp_path / name / "checkpoints").mkdir()
    if name == "half":
      shutil.copytree(run / "checkpoints" / "4", tmp_path / name / "checkpoints" / "4")
      (tmp_path / name / "checkpoints" / "4" / "manifest.json").unlink()
    before = look(tmp_path / name)
    assert_refused(
      resume(name, tmp_path, train__steps=10, **changes), f"{name} has no checkpoint yet"
    )
    assert look(tmp_path / name) == before, name
  child = resume("run", tmp_path, train__steps=10, **changes)
  assert child.status == 0 and "going on from step 4" in child.out and child.err == "", child.err
  (run / "samples" / "step_4.txt").unlink()
  children.assert_same(children.bits(run), children.bits(tmp_path / "straight"))
