"""jgpt as a wheel, built without network."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def leave_out(folder, names):
  """What is no part of the source.

  Of folders called `runs` only the one at the top, for jgpt has one too.
  """
  found = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", "dist")(
    folder, names
  )
  return found | {name for name in names if name == "runs" and Path(folder) == ROOT}


def copy_source(folder):
  """Copies the repository to a folder that does not exist yet, and returns it."""
  return shutil.copytree(ROOT, folder, ignore=leave_out)


def build_wheel(folder):
  """Builds the wheel from a copy of the repository; both lie in the folder."""
  source = copy_source(folder / "source")
  build = [
    sys.executable,
    "-m",
    "hatchling",
    "build",
    "-t",
    "wheel",
    "-d",
    str(folder.resolve() / "dist"),
  ]
  done = subprocess.run(build, cwd=source, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  (wheel,) = (folder.resolve() / "dist").glob("*.whl")
  return wheel
