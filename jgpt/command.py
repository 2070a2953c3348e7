"""What the commands share: how a command ends, and `jgpt <verb>`.

Responsible for turning errors that a user can mend into one line and an exit status. Imports no jax.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from jgpt.config import UserError

VERBS = {
  "run": "train an experiment, or go on with a run",
  "sample": "draw texts from a run",
  "bench": "measure how fast this machine trains",
}


def guard(main: Callable[[], int]) -> int:
  """Calls a command's `main` and returns its exit status: 2 for a user's error, 130 for Ctrl-C, without a stack trace."""
  try:
    return main()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("\ninterrupted", file=sys.stderr)
    return 130
  except BrokenPipeError:  # the reader of our output left (`| head`); keep Python from complaining at exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except OSError as error:
    if error.filename is None:
      raise
    print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    return 1


def python_word() -> str:
  """How to call the Python that is running: "python" where that is it, else its path, relative where it is below."""
  found = shutil.which("python")
  if found and os.path.abspath(found) == os.path.abspath(sys.executable):
    return "python"
  try:
    return str(Path(sys.executable).relative_to(Path.cwd()))
  except ValueError:
    return sys.executable or "python"


def main() -> int:
  """The console script `jgpt`: `jgpt run --experiment names` is `python -m jgpt.run --experiment names`."""
  verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if verb in ("-h", "--help"):
    print("usage: jgpt <verb> [options]\n")
    print("\n".join(f"  {name:8}{text}" for name, text in VERBS.items()))
    print("\n`jgpt <verb> --help` lists a verb's options; `python -m jgpt.<verb>` is the same.")
    return 0
  if verb not in VERBS:
    print(f"error: there is no verb {verb!r}; there are {', '.join(VERBS)}.", file=sys.stderr)
    return 2
  sys.argv = [f"jgpt {verb}", *sys.argv[2:]]
  return guard(importlib.import_module(f"jgpt.{verb}").main)
