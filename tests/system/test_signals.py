"""Signals in a command's process, where no run is needed to see what happens."""

import subprocess
import sys

import pytest

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
