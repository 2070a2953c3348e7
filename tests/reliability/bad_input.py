"""Commands given bad input: many in one process, as a command line would give them, and what came
of each.

`give` starts a process that runs this file: it calls the commands one after the other through
`command.guard`, as `python -m jgpt.<verb>` does, and says of each its status, what it printed, how
long it took and what it left on disk. With `JAX_PLATFORMS` naming what does not exist, whatever
looks at a device ends with `NO_DEVICE` and with no other error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

NO_DEVICE = "jax finds no device"
TRAINS = "this would train"  # the error that stands for training where a case asks for that


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A command.

  Attributes:
    argv: the verb and its arguments.
    env: set while it runs.
    slow_names: whether looking up a host's name takes ten seconds.
    plan_only: whether training is replaced by the error `TRAINS`, once devices have been divided
      among.
    follow: how often the advice of an error is taken: each way that it names is tried, as a case of
      its own.
  """

  argv: list[str]
  env: dict[str, str] = dataclasses.field(default_factory=dict)
  slow_names: bool = False
  plan_only: bool = False
  follow: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What came of it.

  Attributes:
    argv: what was given.
    status: the exit status; None where the command ended with an exception, which is in `err`.
    out: standard output.
    err: standard error.
    left: files and folders that were not there before.
    seconds: how long it took.
    num_compiled: programs compiled, or taken from the cache of compiled programs.
    num_cached: those taken from the cache.
    followed: what came of each way of mending it that `err` advises.
  """

  argv: list[str]
  status: int | None
  out: str
  err: str
  left: list[str]
  seconds: float
  num_compiled: int
  num_cached: int
  followed: list[Outcome]


def settings(experiment: str, *words: str) -> list[str]:
  """The command `run` with settings."""
  return ["run", "--experiment", experiment, *(w for word in words for w in ("--set", word))]


def advice(err: str) -> list[list[str]]:
  """The ways of mending an error that it names: of each the words to add to the command.

  "Try --set a.b=1 --set a.c=2 or --set d.e=3" names two. A place-holder (FILE) or an empty value is
  none.
  """
  ways = []
  for sentence in err.split("Try ")[1:]:
    for way in re.split(r",? or (?:for a new run )?(?=--set)", sentence):
      found = re.findall(r"--set ([\w.]+=[^\s,;'\"]+)", way)
      values = [word.rstrip(".") for word in found]
      if values and not any(value.partition("=")[2] in ("", "FILE", "TEXT") for value in values):
        ways.append([w for value in values for w in ("--set", value)])
  return ways


def assert_refused(outcome: Outcome, *words: str) -> None:
  """One line that says what is wrong, status 2, and nothing else happened."""
  assert outcome.status == 2, outcome
  assert outcome.out == "" and outcome.left == [] and outcome.num_compiled == 0, outcome
  assert (
    outcome.err.startswith("error: ")
    and outcome.err.endswith("\n")
    and outcome.err.count("\n") == 1
  ), outcome
  assert len(outcome.err) < 2000 and outcome.err[:-1].isprintable(), outcome
  assert NO_DEVICE not in outcome.err, outcome
  for word in words:
    assert word in outcome.err, (word, outcome)


def give(cases: Sequence[Case], *, cwd: Path, timeout: float = 250, **env: str) -> list[Outcome]:
  """Gives the cases to a process in the folder `cwd`, with `env` set besides this process's own."""
  import jgpt  # only here: the child, which gets its own path, need not find it before

  root = Path(jgpt.__file__).parent.parent
  env = (
    os.environ
    | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "nowhere", "PYTHONIOENCODING": "utf-8"}
    | env
  )
  env.pop("JGPT_DATA_DIR", None)
  done = subprocess.run(
    [sys.executable, __file__],
    input=json.dumps([dataclasses.asdict(case) for case in cases]).encode(),
    cwd=cwd,
    env=env,
    capture_output=True,
    timeout=timeout,
    check=False,
  )
  assert done.returncode == 0 and not done.stderr, done.stderr.decode(errors="replace")[-3000:]
  outcomes = [_read(value) for value in json.loads(done.stdout)]
  assert len(outcomes) == len(cases)
  return outcomes


def _read(value: dict) -> Outcome:
  return Outcome(**{**value, "followed": [_read(inner) for inner in value["followed"]]})


# --- In the child ---


def _files() -> set[str]:
  return {str(path) for path in Path().rglob("*")}


class _Compiled:
  """Counts programs that jax compiles, or takes from its cache."""

  def __init__(self):
    import jax

    self.count = self.cached = 0
    jax.monitoring.register_event_duration_secs_listener(self._hear_duration)
    jax.monitoring.register_event_listener(self._hear)

  def _hear_duration(self, event: str, *args: object, **kwargs: object) -> None:
    self.count += event.endswith("/backend_compile_duration")

  def _hear(self, event: str, **kwargs: object) -> None:
    self.cached += event.endswith("/cache_hits")


@contextlib.contextmanager
def _changed(case: Case) -> Iterator[None]:
  """The surroundings that a case asks for."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(mock.patch.dict(os.environ, case.env))
    if case.slow_names:
      stack.enter_context(
        mock.patch.object(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(10))
      )
    if case.plan_only:
      from jgpt import sharding, train
      from jgpt.devices import runtime
      from jgpt.errors import UserError
      from jgpt.plan import Plan

      def stand_in(plan: Plan, **kwargs: object) -> None:
        sharding.make_mesh(plan.experiment, runtime.devices())
        raise UserError(TRAINS)

      stack.enter_context(mock.patch.object(train, "train_run", stand_in))
    yield


def _call(case: Case, compiled: _Compiled) -> dict:
  from jgpt import cli

  before, began = _files(), time.monotonic()
  num_compiled, num_cached = compiled.count, compiled.cached
  out, err = (
    io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)
  )
  with _changed(case), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      verb, *argv = case.argv
      status = cli.guard(lambda: importlib.import_module(f"jgpt.{verb}").main(argv))
    except SystemExit as stop:
      status = stop.code
    except BaseException:
      status = None
      traceback.print_exc()
  texts = [stream.buffer.getvalue().decode(errors="replace") for stream in (out, err)]
  result = {
    "argv": case.argv,
    "status": status,
    "out": texts[0],
    "err": texts[1],
    "left": sorted(_files() - before),
    "seconds": time.monotonic() - began,
    "num_compiled": compiled.count - num_compiled,
    "num_cached": compiled.cached - num_cached,
    "followed": [],
  }
  if case.follow:
    for words in advice(texts[1]):
      again = dataclasses.replace(case, argv=case.argv + words, follow=case.follow - 1)
      result["followed"].append(_call(again, compiled))
  return result


def _main() -> None:
  compiled = _Compiled()
  results = [_call(Case(**value), compiled) for value in json.load(sys.stdin)]
  json.dump(results, sys.stdout)


if __name__ == "__main__":
  _main()
