"""Surroundings that lack something: a command runs, or ends with one clear line and a status that
says so.

Each is a real process that trains a tiny run. Encodings without our characters are tried in
`tests/test_commands.py`.
"""

import contextlib
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from children import arguments, write_texts

import jgpt

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    sys.platform != "linux", reason="closed streams, /dev/full and limits as Linux has them"
  ),
]
ROOT = str(Path(jgpt.__file__).parent.parent)
COMMAND = [*arguments("names", "run", train__steps=2, compute__tricks=False)]
MODULE = ["-m", "jgpt.run", *COMMAND]


@pytest.fixture
def folder(tmp_path):
  """Where the command runs, with its text."""
  write_texts(tmp_path)
  return tmp_path


def run(folder, *, python=(), shell="", env=None, without=(), module=MODULE, **options):
  """Runs the command in `folder`; `shell` stands after it on a shell's line."""
  env = {**os.environ, "PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu", **(env or {})}
  env = {name: value for name, value in env.items() if name not in without}
  command = [sys.executable, *python, *module]
  if shell:
    command = ["bash", "-c", f"exec {shlex.join(command)} {shell}"]
  options = {
    "stdout": subprocess.PIPE,
    "stderr": subprocess.PIPE,
    "stdin": subprocess.DEVNULL,
  } | options
  return subprocess.run(command, cwd=folder, env=env, check=False, **options)


def assert_trained(folder, done):
  assert done.returncode == 0, done
  assert not done.stderr and (folder / "run" / "checkpoints" / "2" / "manifest.json").exists()


def assert_one_line(done, *words, status):
  """What the process says is one line, and no more; it does not crash."""
  lines = done.stderr.decode().splitlines()
  assert done.returncode == status and len(lines) == 1, done
  for word in words:
    assert word in lines[0], done


ENVIRONMENTS = {
  "no home": {"without": ("HOME", "JGPT_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR")},
  "a home that is not there": {"env": {"HOME": "/nonexistent/home", "XDG_CACHE_HOME": ""}},
  "the C locale": {
    "env": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
  },
  "no place for temporary files": {"env": {"TMPDIR": "/nonexistent"}},
  "warnings are errors": {"env": {"PYTHONWARNINGS": "error"}},
  "no assertions": {"python": ("-O",)},
  "a cache that is a file": {
    "env": {"JGPT_CACHE_DIR": "/dev/null", "JAX_COMPILATION_CACHE_DIR": ""}
  },
  "one core": {"preexec_fn": lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})},
  "standard input is closed": {"shell": "<&-"},
  "standard output is closed": {"shell": ">&-"},
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_row_28_a_run_needs_none_of_this(folder, name):
  assert_trained(folder, run(folder, **ENVIRONMENTS[name]))


def test_row_28_an_isolated_python_runs_the_console_script(folder):
  """Without the environment and without the current folder in the way, as an installed command is
  run.
  """
  program = f"import sys; sys.path.insert(0, {ROOT!r}); from jgpt.cli import main; sys.exit(main())"
  assert_trained(folder, run(folder, python=("-I", "-c", program), module=["run", *COMMAND]))


def test_row_28_standard_error_is_closed_or_full(folder):
  for number, shell in enumerate(("2>&-", "2>/dev/full")):
    done = run(folder, shell=shell, module=[*MODULE, "--workdir", f"run{number}"])
    assert done.returncode == 0 and b"samples" in done.stdout
  done = run(folder, shell="2>/dev/full", module=[*MODULE, "--set", "train.step=1"])
  assert (
    done.returncode not in (0, None) and done.stdout == b""
  )  # the error cannot be said, and is one all the same


def test_row_28_standard_output_is_full(folder):
  done = run(folder, shell=">/dev/full")
  assert_one_line(done, "error: standard output: No space left on device", status=1)
  done = run(folder, shell=">/dev/full 2>&1")
  assert done.returncode not in (0, None)


@contextlib.contextmanager
def read_only_disk(folder):
  """Mounts what `folder` holds so that nobody can write to it."""
  mounts = [["mount", "--bind", folder, folder], ["mount", "-o", "remount,bind,ro", folder, folder]]
  if not shutil.which("mount") or any(
    subprocess.run(words, capture_output=True).returncode for words in mounts
  ):
    pytest.skip("this process may not mount a disk")
  try:
    yield
  finally:
    subprocess.run(["umount", "-l", folder], check=True)


def test_row_28_a_cache_that_can_only_be_read(folder):
  """No word of it: programs that are there are used, and others compiled each time."""
  cache = folder / "cache"
  (cache / "compiled").mkdir(parents=True, mode=0o700)
  (cache / "canary.json").write_bytes(
    (Path(os.environ["JGPT_CACHE_DIR"]) / "canary.json").read_bytes()
  )
  with read_only_disk(cache):
    assert_trained(
      folder, run(folder, env={"JGPT_CACHE_DIR": str(cache), "JAX_COMPILATION_CACHE_DIR": ""})
    )
  assert list((cache / "compiled").iterdir()) == []


def test_row_28_a_folder_that_is_gone_or_can_only_be_read(folder):
  gone = folder / "gone"
  gone.mkdir()
  done = subprocess.run(
    ["bash", "-c", f"cd {gone} && rmdir {gone} && exec {shlex.join([sys.executable, *MODULE])}"],
    env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, check=False,
  )  # fmt: skip
  assert (
    done.returncode in (1, 2)
    and done.stderr.startswith(b"error: ")
    and done.stderr.count(b"\n") == 1
  ), done
  with read_only_disk(folder):
    assert_one_line(run(folder), "error: run: Read-only file system", status=1)


@pytest.mark.parametrize("megabytes", [700, 1300])
def test_row_28_too_little_memory_is_said_in_one_line(folder, megabytes):
  """Where `ulimit -v` leaves too little for jax to start its threads, which would abort the
  process.
  """
  done = run(
    folder,
    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20)),
  )
  assert_one_line(done, "error: this process may use", "Try ulimit -v unlimited", status=2)
  assert not (folder / "run").exists() and done.stdout == b""


def test_row_28_four_gigabytes_of_address_space_are_enough(folder):
  assert_trained(
    folder,
    run(folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))),
  )
