"""Signals in a command's process, where no run is needed to see what happens."""

import signal
import subprocess
import sys

import pytest

from jgpt.system import signals

SLOW_END = """
import os, pathlib, signal, time
from jgpt.system.signals import exit_on_signals

def finish():
  time.sleep(0.3)  # a save that is under way

with exit_on_signals() as stop:
  with stop.leaving("stopped", finish):
    os.kill(os.getpid(), signal.SIGTERM)
    while WAITS and stop.signal is None:
      time.sleep(0.01)
  pathlib.Path("went on").touch()
"""


@pytest.mark.parametrize("waits", [True, False], ids=["heard in the block", "at its very end"])
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_after_a_signal_nothing_runs_beside_the_end(tmp_path, waits):
  """The end writes files; what follows the block would write the same ones."""
  code = [sys.executable, "-c", SLOW_END.replace("WAITS", str(waits))]
  done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
  assert done.returncode == 143 and done.stderr.endswith("stopped\n"), done.stderr
  assert not (tmp_path / "went on").exists()


RELAYED = """
import os, signal, time
from jgpt.system.signals import exit_on_signals

with exit_on_signals() as stop:
  stop.receive(signal.SIGTERM)
  for _ in range(NUMBER):
    time.sleep(0.6)
    os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(0.2)
  stop.leave("saved")
"""


@pytest.mark.parametrize(("number", "line"), [(1, "saved"), (2, "stopped at once")])
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_signal_that_was_relayed_first_is_the_same_one_when_it_comes(number, line):
  """A launcher sends it to every process, and another process's is faster; a second one quits."""
  code = [sys.executable, "-c", RELAYED.replace("NUMBER", str(number))]
  done = subprocess.run(code, capture_output=True, text=True, timeout=60, check=False)
  assert done.returncode == 143 and line in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_library_user_is_interrupted_by_the_second_signal_after_a_relayed_one(monkeypatch):
  monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
  with signals.stop_signals() as stop:
    stop.receive(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert stop.signal == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
