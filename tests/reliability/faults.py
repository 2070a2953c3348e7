"""Faults at named moments of a command, in a process of its own: `python -m faults jgpt.run
--experiment names ...`.

    JGPT_FAULT=kill@commit:2       SIGKILL right before the second rename that gives a step's folder
    its number JGPT_FAULT=kill@manifest+      ... right after the first step's manifest is there,
    before anything else is done JGPT_FAULT=full@json           the operation fails as on a full
    disk JGPT_FAULT=term@call=evaluation.begin_evaluation    SIGTERM to itself where that function
    is called JGPT_FAULT=freeze@any          stopped before every operation in the run folder, until
    the parent lets it go on JGPT_FAULT=hang@call=...       the thread that calls it sleeps, and
    others go on JGPT_FAULT=fail@call=...       the call raises an error
    JGPT_FAULT=mark@call=...       nothing but the mark

What happens is written to the file JGPT_FAULT_MARK, one line for each time, before it happens.
Several faults are separated by ";". Nothing of jgpt is replaced: Python reports each operation on a
file to audit hooks before it is done, and each call of a Python function to profilers. What
libraries in C++ write (the arrays) is seen by neither.
"""

import errno
import os
import re
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
STEP = r"/checkpoints/[0-9]+"
# Point -> the operation, and what its path (for a rename the new one) ends with.
POINTS = {
  "save": (
    "os.mkdir",
    r"/checkpoints/[0-9]+\.orbax-checkpoint-tmp[^/]*",
  ),  # before anything of a save
  "leaf": ("os.mkdir", r"-tmp[^/]*/(params|train_state)"),  # before the arrays
  "metadata": (
    "open",
    r"/(params|train_state)[^/]*/_METADATA",
  ),  # between the arrays and the commit
  "commit": ("os.rename", STEP),
  "json": ("os.rename", STEP + r"/experiment\.json"),
  "tokenizer": ("os.rename", STEP + r"/tokenizer\.json"),
  "manifest-open": ("open", STEP + r"/\.manifest\.json\.tmp"),
  "manifest": ("os.rename", STEP + r"/manifest\.json"),
  "delete": ("os.remove", STEP + r"/manifest\.json"),
  "log": ("open", r"/metrics\.jsonl"),
  "log-rename": ("os.rename", r"/metrics\.jsonl"),
  "lock": ("open", r"/\.lock"),
  "settings": ("os.rename", r"^(?!.*/checkpoints/).*/experiment\.json"),
  "env": ("os.rename", r"/env\.json"),
  "result": ("os.rename", r"/result\.json"),
  "samples": ("os.rename", r"/step_[0-9]+\.txt"),
}
SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT}


class Fault:
  """One of JGPT_FAULT."""

  def __init__(self, text: str):
    self.action, _, where = text.partition("@")
    self.calls = where.startswith("call=")
    where, _, count = where.partition(":")
    self.point, self.count = where.removesuffix("+"), int(count or 1)
    self.after = where.endswith("+")
    self.seen, self.done, self.waits_for = 0, False, None
    if self.action not in {"kill", "full", "fail", "freeze", "hang", "mark", *SIGNALS}:
      raise ValueError(text)
    if not self.calls and self.point not in {*POINTS, "any", "deleting"}:
      raise ValueError(text)

  def matches(self, event: str, path: str, dir_fd: int) -> bool:
    if self.point == "any":
      return event != "open" or "/." in path or "orbax" in path
    if self.point == "deleting":  # what a step's folder holds: `shutil.rmtree` goes by descriptors
      return event in ("os.remove", "os.rmdir") and dir_fd != -1
    operation, pattern = POINTS[self.point]
    return event == operation and re.search(f"{pattern}$", path) is not None

  def on_change(self, event: str, path: str, dir_fd: int) -> None:
    """Called before each operation that changes something; raises where it shall fail."""
    if self.calls or (self.done and self.point != "any"):
      return
    if self.waits_for is not None:  # fires once that is there
      if os.path.lexists(self.waits_for):
        self.fire(f"after {self.waits_for}")
      return
    if not self.matches(event, path, dir_fd):
      return
    self.seen += 1
    if self.point != "any" and self.seen < self.count:
      return
    if self.after:
      self.waits_for = path
    else:
      self.fire(f"{event} {path}")

  def on_call(self, name: str) -> None:
    """Called at each call of a function of jgpt."""
    if self.calls and not self.done and f"call={name}" == self.point:
      self.seen += 1
      if self.seen == self.count:
        self.fire(name)

  def fire(self, what: str) -> None:
    self.done = True
    os.write(marks, f"{self.action}@{self.point} {what}\n".encode())
    match self.action:
      case "kill":
        os.kill(os.getpid(), signal.SIGKILL)
      case "freeze":  # to this thread: the process has stopped before this call returns
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
      case "fail":
        raise ValueError("what failed here")
      case "hang":
        time.sleep(1e6)
      case "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what.split(" ", 1)[1])
      case "term" | "int":
        os.kill(os.getpid(), SIGNALS[self.action])


def install(faults: list[Fault]) -> None:
  inside = threading.local()  # what a fault does itself is no moment

  def on_audit(event: str, args: tuple[Any, ...]) -> None:
    if event not in CHANGES or getattr(inside, "here", False):
      return
    if event == "open" and not (
      isinstance(args[0], str | bytes | os.PathLike) and is_writing(args[1], args[2])
    ):
      return
    path = os.fsdecode(args[1] if event == "os.rename" else args[0])
    dir_fd = args[-1] if event in ("os.remove", "os.rmdir") else -1
    if dir_fd == -1:
      path = os.path.abspath(path)
      if not is_ours(path):
        return
    inside.here = True
    try:
      for fault in faults:
        fault.on_change(event, path, dir_fd)
    finally:
      inside.here = False

  def on_profile(frame: Any, event: str, arg: Any) -> None:
    if event == "call" and "/jgpt/" in (
      file := frame.f_code.co_filename
    ):  # a command's module is called __main__
      for fault in faults:
        fault.on_call(f"{file.rpartition('/')[2].removesuffix('.py')}.{frame.f_code.co_name}")

  if any(fault.calls for fault in faults):
    threading.setprofile(on_profile)
    sys.setprofile(on_profile)
  if not all(fault.calls for fault in faults):
    sys.addaudithook(on_audit)


def is_writing(mode: str | None, flags: int) -> bool:
  return bool(flags & (os.O_WRONLY | os.O_RDWR)) or (
    mode is not None and set(mode) & set("wax+") != set()
  )


def is_ours(path: str) -> bool:
  """Whether a path is in the run folder, which is named by JGPT_FAULT_FOLDER."""
  return path == folder or path.startswith(f"{folder}/")


def main(run: Callable[..., Any] = runpy.run_module) -> None:
  global folder, marks
  folder = os.path.abspath(os.environ["JGPT_FAULT_FOLDER"])
  marks = os.open(os.environ["JGPT_FAULT_MARK"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  install([Fault(text) for text in os.environ["JGPT_FAULT"].split(";")])
  sys.argv = sys.argv[1:]
  if os.environ.get("JGPT_COMPILE_QUICKLY"):
    import small_runs

    with small_runs.compiled_quickly():
      run(sys.argv[0], run_name="__main__", alter_sys=True)
  else:
    run(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
