"""Every test sees 8 virtual CPU devices, and implicit rank promotion is an error.

But for the tests of the attached device: `-m device` leaves jax its accelerator.
What the equivalence tests measured in this run is printed as a table at its end.
"""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

if (
  signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # so a shell starts what runs in the background; children inherit it
  signal.signal(signal.SIGINT, signal.default_int_handler)
if (
  "JGPT_TEST_CACHE" not in os.environ
):  # one for this run: pytest-xdist's workers and child processes inherit it
  cache = Path(tempfile.mkdtemp(prefix="jgpt-test-cache-"))
  atexit.register(shutil.rmtree, cache, ignore_errors=True)
  # Compiled programs are shared between tests. No test uses the network: a download is remembered
  # to have failed.
  (cache / "gpt2").mkdir()
  weights = [
    f"gpt2/{name}.safetensors" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
  ]
  for name in ("names.txt", "tinyshakespeare.txt", "gpt2/encoder.json", "gpt2/vocab.bpe", *weights):
    (cache / f"{name}.failed").touch()
  os.environ |= {
    "JGPT_TEST_CACHE": str(cache),
    "JGPT_CACHE_DIR": str(cache),
    "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
  }
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import equivalence
import jax
import pytest
import small_runs

from jgpt import run
from jgpt.devices import canary
from jgpt.system.precision import enable_x64

# Runs under test do not check the compiler; `test_canary.py` does.
canary.write_sound(
  Path(os.environ["JGPT_CACHE_DIR"]) / "canary.json",
  {f"{canary.describe_compiler()}, tricks {on}": "not checked: a test" for on in (True, False)},
)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

rows = []  # measured by all tests


def pytest_configure(config):
  """Chooses the platform, before a test is imported and in pytest-xdist's workers too."""
  chosen = config.option.markexpr
  if chosen == "device" or chosen.startswith("device and "):
    return
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of child processes
  jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


@pytest.fixture
def x64():
  """Turns on float64 for one test."""
  with enable_x64(True):
    yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Writes files, name -> text or bytes, into an empty folder, the current one.

  Returns their paths.
  """
  monkeypatch.chdir(tmp_path)

  def write(contents):
    for name, content in contents.items():
      Path(name).parent.mkdir(parents=True, exist_ok=True)
      Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [Path(name) for name in contents]

  return write


@pytest.fixture
def quick():
  """Whole runs are compiled quickly, for tests in which the program that users run is not the
  point.
  """
  with small_runs.compiled_quickly():
    yield


@pytest.fixture
def drawn():
  """Runs draw their curves at their end, as users' do."""


@pytest.fixture(autouse=True)
def _draw_nothing(request, monkeypatch):
  """Runs of the command in this process draw no curves, which takes 0.2 s, unless asked for."""
  if "drawn" not in request.fixturenames:
    monkeypatch.setattr(run, "draw_curves", lambda workdir: None)


@pytest.fixture(autouse=True)
def _send_measured(request):
  """Sends what a test measured along with its report, which comes back from pytest-xdist's workers
  too.
  """
  equivalence.MEASURED.clear()
  yield
  request.node.user_properties.extend(("measured", list(row)) for row in equivalence.MEASURED)


def pytest_runtest_logreport(report):
  if report.when == "teardown":
    rows.extend(
      equivalence.Row(*value) for name, value in report.user_properties if name == "measured"
    )


def pytest_terminal_summary(terminalreporter):
  if rows:
    terminalreporter.section("equivalence")
    terminalreporter.write("\n".join([*equivalence.table(rows), ""]))
