"""What the commands share: arguments, errors as one line and an exit status, Ctrl-C, `jgpt <verb>`.

Imports no jax.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import gc
import importlib
import itertools
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from jgpt.config import Experiment, catalog
from jgpt.config.settings import explain_unknown
from jgpt.errors import TrainingError, UserError, first_line, near_matches, printable, show
from jgpt.system.command import python_command

LESS_MEMORY = (
  "Try a smaller data.batch_size, or train.micro_batch_size, which computes the same in parts"
)
VERBS = {
  "run": "train an experiment, or resume a run",
  "sample": "draw texts from a run",
  "bench": "measure how fast this machine trains",
  "doctor": "report what is installed, what is wrong, and what to do about it",
  "prepare": "make token files from text of any size, to train on",
  "export": "write a run's weights for Hugging Face's Transformers or for llm.c",
  "evaluate": "measure a run's loss over the whole of its held-out text",
  "plot": "draw the losses and the speed of one run or several",
  "inspect": (
    "see a run's parameters and gradients, its predictions and attention on a text, or one "
    "number's updates"
  ),
}

# What other programs call them.
OTHER_VERBS = {
  **dict.fromkeys(("train", "pretrain", "finetune", "fit", "resume"), "run"),
  **dict.fromkeys(("generate", "gen", "infer", "predict", "chat"), "sample"),
  **dict.fromkeys(("eval", "validate", "val", "test", "perplexity"), "evaluate"),
  **dict.fromkeys(("tokenize", "preprocess", "data"), "prepare"),
  **dict.fromkeys(("convert", "save"), "export"),
  **dict.fromkeys(("draw", "curves", "chart"), "plot"),
  "benchmark": "bench",
  "check": "doctor",
}


class Parser(argparse.ArgumentParser):
  """Parses a command's arguments, and explains in one line what is wrong with them.

  Options cannot be abbreviated: `--step` for `--steps` would be another command's option.
  """

  def __init__(self, **settings: Any):
    super().__init__(allow_abbrev=False, **settings)
    for kind in (int, float):
      self.register("type", kind, partial(_parse_number, kind))

  def parse_known_args(
    self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
  ) -> tuple[argparse.Namespace, list[str]]:
    """Parses arguments as argparse does; no word is left over.

    Raises:
      UserError: for options that the command does not have, all of them in one message, and for
        words that belong to no option.
    """
    words = sys.argv[1:] if args is None else list(args)
    options = self._option_string_actions
    if unknown := find_unknown_options(words, options):
      lead = f"{self.prog} has no option {', '.join(unknown)}"
      raise UserError(explain_unknown(lead, unknown, _find_experiment(words), tuple(options)))
    found, rest = super().parse_known_args(words, namespace)
    if rest:
      names = catalog.list_experiments()
      known = [word for word in rest if word in names or word.endswith(".py")]
      advice = (
        f". Try --experiment {shlex.quote(known[0])}" if known and "--experiment" in options else ""
      )
      raise UserError(f"{self.prog} takes options only, not {show(' '.join(rest))}{advice}")
    return found, rest

  def error(self, message: str) -> NoReturn:
    """Explains in one line what argparse refuses, instead of printing it below the usage.

    Raises:
      UserError: always.
    """
    raise UserError(f"{self.prog}: {message.removeprefix('argument ')}. See --help")

  def _check_value(self, action: argparse.Action, value: Any) -> None:
    if action.choices is None or value in action.choices:
      return
    near = near_matches(str(value), action.choices)
    name, choices = "/".join(action.option_strings), ", ".join(action.choices)
    raise UserError(f"{self.prog}: {name}={show(value)} must be one of {choices}.{near}")


def _parse_number(kind: type[int] | type[float], text: str) -> int | float:
  try:
    return kind(text)
  except ValueError as error:
    need = "must be a whole number" if kind is int else "must be a number"
    raise argparse.ArgumentTypeError(f"{show(text)} {need}") from error


def find_unknown_options(words: Sequence[str], known: Container[str]) -> dict[str, str | None]:
  """Finds the options in a command line that its parser does not have.

  Args:
    words: the arguments; those after "--" are no options.
    known: the parser's options, such as "--run".

  Returns:
    Option -> its value as text, None where it has none.
  """
  unknown: dict[str, str | None] = {}
  words = words[: words.index("--")] if "--" in words else words
  for word, after in itertools.pairwise([*words, "-"]):
    name, equals, value = word.partition("=")
    if name in known or not re.fullmatch(r"--?[A-Za-z][\w.-]*", name):
      continue
    is_value = not after.startswith("-") or re.fullmatch(r"-[\d.]+", after)
    unknown[name] = value if equals else after if is_value else None
  return unknown


def _find_experiment(words: Sequence[str]) -> Experiment | None:
  """Loads the experiment that a command line names; None where it names none that there is."""
  names = [word.partition("=")[2] for word in words if word.startswith("--experiment=")]
  names += [after for word, after in itertools.pairwise(words) if word == "--experiment"]
  is_known = names and names[-1] in catalog.list_experiments()
  return catalog.load_experiment(names[-1]) if is_known else None


def parse_step(text: str) -> int | str:
  """Parses `--step`: a number of updates, or "best"."""
  if text == "best":
    return text
  if not re.fullmatch("[0-9]+", text):
    need = "must be a number of updates, or best; without --step it is the newest"
    raise argparse.ArgumentTypeError(f"{show(text)} {need}")
  return int(text)


def guard(command: Callable[[], int]) -> int:
  """Calls a command, and prints errors that a user can correct without a stack trace.

  Ctrl-C ends the process at once with status 130, also during imports and compilation. In training
  the handlers of `system/signals.py` take its place. Characters that the output's encoding lacks
  are replaced.

  Args:
    command: returns an exit status.

  Returns:
    The exit status: that of `command`, 2 after a user's error, 1 after other failures.
  """
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="replace")
  if note := describe_other_copy():
    print(note, file=sys.stderr)
  _reduce_garbage_collection()
  with _quit_on_ctrl_c():
    status = run_command(command)
  # Registered last and so called first: from there on the process only ends.
  atexit.register(_ignore_ctrl_c)
  return status


def describe_other_copy() -> str | None:
  """Describes that the checkout of jgpt that one is in is not the jgpt that is imported.

  Returns:
    A line; None outside of a checkout, and where it is the one that is imported.
  """
  used = Path(__file__).resolve().parent
  try:
    here = Path.cwd()
  except OSError:  # it was deleted
    return None
  for folder in (here, *here.parents):
    try:
      if not (folder / "jgpt" / "cli.py").is_file():
        continue
      project = (folder / "pyproject.toml").read_text(encoding="utf-8", errors="replace")
      is_same = (folder / "jgpt").samefile(used)
    except OSError:
      continue
    if re.search(r'^name = "jgpt"$', project, re.MULTILINE):
      install = shlex.join([python_command(), "-m", "pip", "install", "-e", str(folder)])
      words = (
        f"note: jgpt is imported from {used}, and what is edited in {folder} is not used. To use "
        f"that: {install}"
      )
      return None if is_same else printable(words)
  return None


def _ignore_ctrl_c() -> None:
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _reduce_garbage_collection() -> None:
  """Makes Python collect cyclic garbage less often, and not at all at the end of the process.

  Importing jax and tracing make hundreds of thousands of objects that live until the end. Searching
  them for garbage took 0.2 s of `names`, and as much again at exit, when all files are complete and
  the memory is freed with the process.
  """
  gc.set_threshold(100_000)  # new objects between two collections; Python's default is 700 to 2,000
  atexit.register(gc.freeze)


@contextlib.contextmanager
def _quit_on_ctrl_c() -> Iterator[None]:
  """Installs a handler of Ctrl-C that ends the process at once.

  Python's own raises a KeyboardInterrupt, which imports and other libraries' callbacks may swallow.
  """
  if (
    threading.current_thread() is not threading.main_thread()
    or signal.getsignal(signal.SIGINT) != signal.default_int_handler
  ):
    yield  # a caller's handler, or an ignored signal, stays as it is
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


def run_command(command: Callable[[], int]) -> int:
  """Calls a command; prints its errors as one line and returns its exit status."""
  try:
    status = command()
    if sys.stdout is not None:
      sys.stdout.flush()
    return status
  except UserError as error:
    print(describe_failure(error)[1], file=sys.stderr)
    if isinstance(error, TrainingError):
      _exit_without_joining(error.status)
    return error.status
  except KeyboardInterrupt:
    print("\ninterrupted", file=sys.stderr)
    return 130
  except (MemoryError, RuntimeError) as error:
    if not is_out_of_memory(error):
      raise
    print(describe_failure(error)[1], file=sys.stderr)
    return 1
  except OSError as error:
    if error.filename is not None:
      print(describe_failure(error)[1], file=sys.stderr)
    # Standard output: its reader has ended (`| head`), or the disk is full.
    elif error.errno in (errno.EPIPE, errno.ENOSPC, errno.EIO):
      if error.errno != errno.EPIPE:
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
      os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would print the error again at exit
    else:
      print(describe_failure(error)[1], file=sys.stderr)
    return 1


def describe_failure(error: BaseException) -> tuple[int, str]:
  """Describes an error that ends a command: its exit status, and a line."""
  if isinstance(error, UserError):
    return error.status, f"error: {printable(str(error))}"
  if is_out_of_memory(error):
    words = f"there is not enough memory: {' '.join(str(error).split())[:200]}. {LESS_MEMORY}"
    return 1, f"error: {words}"
  if isinstance(error, OSError) and error.filename is not None:
    return 1, f"error: {printable(os.fsdecode(error.filename))}: {error.strerror}"
  kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
  return 1, f"error: {kind}{printable(first_line(error))}"


def is_out_of_memory(error: BaseException) -> bool:
  """Returns whether memory was lacking, on the host or on a device."""
  is_jax = isinstance(error, RuntimeError)
  words = "RESOURCE_EXHAUSTED|[Oo]ut of memory"
  return isinstance(error, MemoryError) or (is_jax and bool(re.search(words, str(error))))


def _exit_without_joining(status: int) -> None:
  """Ends the process at once where non-daemon threads of other libraries are left.

  After a failed save, orbax's threads may wait forever for a folder that could not be created, or
  print the error again.
  """
  if threading.current_thread() is not threading.main_thread() or all(
    thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()
  ):
    return
  for stream in (sys.stdout, sys.stderr):
    if stream is not None:
      stream.flush()
  os._exit(status)


def add_place_option(parser: argparse.ArgumentParser) -> None:
  """Adds `--set` to a command that reads a run: where the run's text lies now."""
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    metavar="data.path=PATH",
    help="where the run's text lies now, if it was moved since; it is known by its SHA-256",
  )


def main() -> int:
  """Runs the console script `jgpt`: `jgpt run ...` is the same as `python -m jgpt.run ...`."""
  verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if verb in ("-h", "--help"):
    return guard(_print_verbs)
  if verb not in VERBS:
    meant = OTHER_VERBS.get(verb)
    near = f" Did you mean {meant}?" if meant else near_matches(verb, VERBS)
    words = f"there is no verb {show(verb)}.{near} There are {', '.join(VERBS)}."
    print(f"error: {printable(words)}", file=sys.stderr)
    return 2
  sys.argv = [f"jgpt {verb}", *sys.argv[2:]]
  return guard(importlib.import_module(f"jgpt.{verb}").main)


def _print_verbs() -> int:
  print("usage: jgpt <verb> [options]\n")
  print("\n".join(f"  {name:10}{text}" for name, text in VERBS.items()))
  print("\n`jgpt <verb> --help` lists a verb's options; `python -m jgpt.<verb>` is the same.")
  return 0
