"""How the running Python is called in commands that are printed."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def python_command() -> str:
  """Returns the command that starts the running Python, for commands that are printed.

  Returns:
    "python" where the shell finds the running one by that name; else its path, relative where it is
    below the current folder.
  """
  found = shutil.which("python")
  if found and os.path.abspath(found) == os.path.abspath(sys.executable):
    return "python"
  try:
    return str(Path(sys.executable).relative_to(Path.cwd()))
  except ValueError:
    return sys.executable or "python"
