"""One writer for a folder."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jgpt.errors import UserError
from jgpt.system import locks

HOLD = """
import sys, time, pathlib
from jgpt.system import locks
with locks.hold(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that holds the folder."""
  env = os.environ | {"PYTHONPATH": str(Path(locks.__file__).parents[2])}
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
  )
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.communicate()


def test_a_second_writer_is_refused_with_the_first_ones_name(tmp_path, holder):
  with (
    pytest.raises(UserError, match=rf"being written by another process \(process {holder.pid} on "),
    locks.hold(tmp_path),
  ):
    pass
  assert locks.is_held(tmp_path)


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, holder):
  holder.kill()
  holder.wait()
  assert (tmp_path / ".lock").exists() and not locks.is_held(tmp_path)
  with locks.hold(tmp_path):
    assert locks.describe_holder(tmp_path).startswith(f"process {os.getpid()} on ")
  assert list(tmp_path.iterdir()) == []


def test_one_after_the_other_may_hold(tmp_path):
  for _ in range(2):
    with locks.hold(tmp_path):
      assert (tmp_path / ".lock").exists()
  assert not locks.is_held(tmp_path)


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/dev/null"), os.mkfifo, Path.mkdir])
def test_what_is_no_plain_file_is_neither_followed_nor_waited_for(tmp_path, make):
  make(tmp_path / ".lock")
  with (
    pytest.raises(UserError, match=rf"cannot write to {tmp_path}: [^:]*[a-z]\.$"),
    locks.hold(tmp_path),
  ):
    pass
  assert not locks.is_held(tmp_path) and locks.describe_holder(tmp_path) == ""


def test_looking_whether_it_is_held_keeps_no_writer_away(tmp_path):
  """Who looks holds the lock for a moment; a writer that begins then tries again."""
  done = threading.Event()

  def look():
    while not done.is_set():
      locks.is_held(tmp_path)
      time.sleep(0.001)

  watcher = threading.Thread(target=look)
  watcher.start()
  try:
    for _ in range(200):
      with locks.hold(tmp_path):
        pass
  finally:
    done.set()
    watcher.join()
