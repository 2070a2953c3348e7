"""What the commands share: how a command ends, and `jgpt <verb>`.

Responsible for turning errors that a user can mend into one line and an exit status. Imports no jax.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import importlib
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from jgpt.errors import TrainingError, UserError, first_line, printable

LESS_MEMORY = "Try a smaller data.batch_size, or train.micro_batch_size, which computes the same in parts"
VERBS = {
  "run": "train an experiment, or go on with a run",
  "sample": "draw texts from a run",
  "bench": "measure how fast this machine trains",
  "doctor": "say what is here, what is wrong, and what to do about it",
  "prepare": "make token files from text of any size, to train on",
  "export": "write a run's weights for Hugging Face's Transformers or for llm.c",
  "evaluate": "measure a run's loss over the whole of its held-out text",
  "inspect": "see what a run predicts for each token of a text, or follow one of its parameters through training",
}


def guard(main: Callable[[], int]) -> int:
  """Calls a command's `main` and returns its exit status: 2 for a user's error, 1 where training broke off, no stack trace.

  Ctrl-C ends the process at once with status 130, whatever is being imported or compiled; while training, `train` takes the
  first one and saves. Characters that the output's encoding lacks are replaced.
  """
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="replace")
  _collect_seldom()
  with _quit_on_ctrl_c():
    status = _call(main)
  atexit.register(_ignore_ctrl_c)  # last in, first out: what is left to do is to end, and nothing to say about it
  return status


def _ignore_ctrl_c() -> None:
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collect_seldom() -> None:
  """Has Python look for cyclic garbage less often, and not at all when the process ends.

  Importing jax and tracing make hundreds of thousands of objects that stay: looking through them again and again took 0.2 s
  of `names`, and once more at the end as much. Files are complete by then, and the memory goes with the process.
  """
  gc.set_threshold(100_000)  # objects made and not freed since the last look; of itself Python looks at every 700 to 2,000
  atexit.register(gc.freeze)


@contextlib.contextmanager
def _quit_on_ctrl_c() -> Iterator[None]:
  """Replaces Python's own handler, whose KeyboardInterrupt gets lost in imports and in other people's callbacks."""
  if (
    threading.current_thread() is not threading.main_thread()
    or signal.getsignal(signal.SIGINT) != signal.default_int_handler
  ):
    yield  # not ours to change, or told to ignore it
    return

  def quit_at_once(number: int, frame: object) -> None:
    show_cursor = "\x1b[?25h" if sys.stdout is not None and sys.stdout.isatty() else ""
    with contextlib.suppress(OSError):
      os.write(2, f"{show_cursor}\ninterrupted\n".encode())
    os._exit(130)

  signal.signal(signal.SIGINT, quit_at_once)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _call(main: Callable[[], int]) -> int:
  try:
    status = main()
    if sys.stdout is not None:
      sys.stdout.flush()
    return status
  except UserError as error:
    print(f"error: {printable(str(error))}", file=sys.stderr)
    if isinstance(error, TrainingError):
      _exit_without_joining(error.status)
    return error.status
  except KeyboardInterrupt:
    print("\ninterrupted", file=sys.stderr)
    return 130
  except (MemoryError, RuntimeError) as error:
    if not isinstance(error, MemoryError) and not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
      raise
    print(f"error: there is not enough memory: {' '.join(str(error).split())[:200]}. {LESS_MEMORY}", file=sys.stderr)
    return 1
  except OSError as error:
    if error.filename is not None:
      print(f"error: {printable(os.fsdecode(error.filename))}: {error.strerror}", file=sys.stderr)
    elif error.errno in (errno.EPIPE, errno.ENOSPC, errno.EIO):  # our output: its reader left (`| head`), or it is full
      if error.errno != errno.EPIPE:
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
      os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # keep Python from complaining again at exit
    else:
      print(f"error: {first_line(error)}", file=sys.stderr)
    return 1


def _exit_without_joining(status: int) -> None:
  """Ends the process at once where others' threads are left.

  After a save that failed, orbax's wait for ever for a folder that could not be made, or print what has been said.
  """
  if threading.current_thread() is not threading.main_thread() or all(
    thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()
  ):
    return
  for stream in (sys.stdout, sys.stderr):
    if stream is not None:
      stream.flush()
  os._exit(status)


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
    print("\n".join(f"  {name:10}{text}" for name, text in VERBS.items()))
    print("\n`jgpt <verb> --help` lists a verb's options; `python -m jgpt.<verb>` is the same.")
    return 0
  if verb not in VERBS:
    print(f"error: there is no verb {verb!r}; there are {', '.join(VERBS)}.", file=sys.stderr)
    return 2
  sys.argv = [f"jgpt {verb}", *sys.argv[2:]]
  return guard(importlib.import_module(f"jgpt.{verb}").main)
