"""`doctor`: every check says what is wrong and what to do, and the command's exit status says
whether anything is.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import compiled_quickly, train_words

from jgpt import cli, train
from jgpt.config.catalog import load_experiment
from jgpt.data import sources
from jgpt.devices import canary
from jgpt.doctor import cli as doctor_cli
from jgpt.doctor import continuation, findings, machine, packages, probe, soundness, storage
from jgpt.doctor.findings import Finding, format_finding, format_summary, note, ok, problem
from jgpt.doctor.probe import Probe
from jgpt.errors import UserError
from jgpt.plan import plan_run
from jgpt.runs import checkpoint, manifest
from jgpt.runs.folder import read_run_files
from jgpt.runs.log import Chunk, JsonlWriter
from jgpt.system import cache as cache_lib
from jgpt.system import locks, memory
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer

ROOT = Path(doctor_cli.__file__).parents[2]
CPU = Probe([{"platform": "cpu", "kind": "cpu", "memory": None}], "", 1.0)
H200 = "NVIDIA H200, driver 570.86, 143771 MiB, 0 MiB used"


def levels(found):
  return [finding.level for finding in found]


def only_problem(found):
  """The one problem among findings; every problem and only a note or problem says what to do."""
  problems = [finding for finding in found if finding.level == "problem"]
  assert len(problems) == 1, found
  assert problems[0].do
  return problems[0]


def start(*args, **env):
  """Runs the command in a process of its own."""
  env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "90"} | env
  return subprocess.run(
    [sys.executable, "-m", "jgpt.doctor", *map(str, args)],
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )


# --- Packages ---


@pytest.mark.parametrize(
  ("version", "specifiers", "expected"),
  [
    ("0.10.2", ">=0.10.2", True),
    ("0.10.10", ">=0.10.2", True),
    ("0.9.9", ">=0.10.2", False),
    ("0.10.3", "<=0.10.2,>=0.10.1", False),
    ("0.10.2.dev20250101+cuda", "<=0.10.2,>=0.10.1", True),
    ("2.0", "==2.*", True),
    ("2.1.0", "==2.1", True),
    ("1.4.9", "~=1.4.2", True),
    ("1.5.0", "~=1.4.2", False),
    ("1.0", "!=1.0", False),
    ("1.0", "<1.0", False),
    ("1.0", ">1.0", False),
    ("1.0", "", True),
  ],
)
def test_versions_are_compared_by_their_numbers(version, specifiers, expected):
  assert packages.satisfies(version, specifiers) is expected


def test_requirements_are_read_as_metadata_writes_them():
  assert packages.parse_requirement("jax>=0.10.2") == ("jax", ">=0.10.2", None)
  assert packages.parse_requirement("etils[epath, epy] (>=1.0, <2)") == ("etils", ">=1.0,<2", None)
  assert packages.parse_requirement("tokenizers>=0.20; extra == 'bpe'") == (
    "tokenizers",
    ">=0.20",
    "bpe",
  )
  assert packages.parse_requirement('uvloop; platform_system != "Windows"')[2] is not None


def test_what_is_missing_too_old_or_does_not_go_together_is_named_with_the_command_that_mends_it():
  there = {"jax": "0.10.2", "jaxlib": "0.10.3", "flax": "0.11", "numpy": "2.1"}
  needs = {"jax": ["jaxlib<=0.10.2,>=0.10.1", "scipy>=1.14"]}
  required = [
    "jax>=0.10.2",
    "flax>=0.12",
    "numpy>=2.0",
    "optax>=0.2.8",
    "rich>=13",
    "tokenizers>=0.20; extra == 'bpe'",
  ]
  found = packages.examine_packages(required, there.get, lambda name: needs.get(name, []))
  texts = {finding.text: finding.do for finding in found if finding.level == "problem"}
  assert len(texts) == 3
  assert texts["flax 0.11 is there, and jgpt needs flax>=0.12"].endswith(
    "-m pip install --upgrade 'flax>=0.12'"
  )
  assert "jaxlib<=0.10.2" in texts["jaxlib 0.10.3 is there, and jax needs jaxlib<=0.10.2,>=0.10.1"]
  assert texts["optax, rich are not installed"].endswith("'optax>=0.2.8' 'rich>=13'")


def test_what_is_installed_here_goes_together():
  found = packages.examine_packages(packages.list_requirements())
  assert levels(found) == ["ok"] and f"jax {jax.__version__}" in found[0].text
  assert levels(packages.examine_python()) == ["ok", "ok"]
  assert levels(packages.examine_python(">=9")) == ["ok", "problem"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"Requires-Dist: \xff\n"])
def test_metadata_that_are_damaged_are_passed_over(tmp_path, monkeypatch, content):
  (tmp_path / "jgpt-9.dist-info").mkdir()
  (tmp_path / "jgpt-9.dist-info" / "METADATA").write_bytes(content)
  monkeypatch.syspath_prepend(tmp_path)
  assert levels(packages.examine_packages(packages.list_requirements())) == ["ok"]


def test_optional_packages_are_a_note_that_says_what_for():
  required = packages.list_requirements()
  there, missing = packages.examine_extras(required, {"safetensors": "9", "matplotlib": "1.0"}.get)
  assert there == ok("extras", "safetensors 9")
  assert (
    missing.level == "note"
    and "tokenizers (trains byte-level BPE" in missing.text
    and "tokenizers>=" in missing.do
  )
  assert (
    "matplotlib>=" in missing.do and "safetensors" not in missing.do
  )  # too old is as good as absent


# --- The machine ---


@pytest.mark.parametrize(
  "files",
  [
    pytest.param(
      {
        "proc/self/cgroup": "0::/box/job\n",
        "sys/fs/cgroup/box/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/cpu.max": "max 100000",
      }
      | {"sys/fs/cgroup/box/job/memory.max": "2000000000", "sys/fs/cgroup/box/memory.max": "max"}
      | {"sys/fs/cgroup/box/job/memory.current": "500000000"},
      id="version 2",
    ),
    pytest.param(
      {
        "proc/self/cgroup": "4:memory:/box\n1:cpu,cpuacct:/box\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "2000000000",
      }
      | {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}
      | {
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "500000000",
      }
      | {
        "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "150000",
        "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
      },
      id="version 1",
    ),
  ],
)
def test_a_containers_limits_are_found(folder, files):
  folder(files | {"proc/meminfo": "MemTotal:       8000000 kB\nMemAvailable:   7000000 kB\n"})
  assert memory.read_quota(Path()) == (1.5, 2_000_000_000)
  assert memory.measure_memory(Path()) == (2_000_000_000, 1_500_000_000)
  folder({"proc/meminfo": "MemTotal:       1000000 kB\nMemAvailable:   700000 kB\n"})
  assert memory.measure_memory(Path()) == (
    1_024_000_000,
    716_800_000,
  )  # a limit beyond the machine's is none


def test_a_machine_without_control_groups_has_no_limits(folder):
  folder({"proc/meminfo": "MemTotal:       8000000 kB\nMemAvailable:   7000000 kB\n"})
  assert memory.read_quota(Path()) == (None, None)
  assert memory.measure_memory(Path()) == (8_192_000_000, 7_168_000_000)


def test_files_that_the_kernel_remembers_leave_a_container_its_memory(folder):
  """After gigabytes were read, a group's use is near its limit.

  The least room of all groups above counts.
  """
  files = {
    "proc/meminfo": "MemTotal:       8000000 kB\nMemAvailable:   7000000 kB\n",
    "proc/self/cgroup": "0::/box/job\n",
  }
  files |= {
    "sys/fs/cgroup/box/job/memory.max": "2000000000",
    "sys/fs/cgroup/box/job/memory.current": "1900000000",
  }
  folder(
    files | {"sys/fs/cgroup/box/job/memory.stat": "anon 300000000\ninactive_file 1600000000\n"}
  )
  assert memory.measure_memory(Path()) == (2_000_000_000, 1_700_000_000)
  folder(
    {"sys/fs/cgroup/box/memory.max": "4000000000", "sys/fs/cgroup/box/memory.current": "3900000000"}
  )
  assert memory.measure_memory(Path()) == (2_000_000_000, 100_000_000)


def test_how_much_is_read_depends_on_the_containers_memory(tmp_path, monkeypatch):
  (tmp_path / "text.txt").write_bytes(bytes(2000))
  monkeypatch.setattr(continuation, "measure_memory", lambda: (8 * 2000, 0))
  assert continuation.find_risk(str(tmp_path / "text.txt")) is None
  monkeypatch.setattr(continuation, "measure_memory", lambda: (8 * 1999, 0))
  assert "has 2.0 kB, and at most 2.0 kB are read here" in continuation.find_risk(
    str(tmp_path / "text.txt")
  )
  monkeypatch.setattr(continuation, "measure_memory", lambda: (None, None))
  assert continuation.find_risk(str(tmp_path / "text.txt")) is None


def test_more_threads_than_a_container_may_run_is_a_note():
  assert levels(machine.examine_processor(16, 16, None, 1.0)) == ["ok"]
  found = machine.examine_processor(16, 16, 2.5, None)
  assert (
    levels(found) == ["ok", "note"]
    and "2.5 cores" in found[1].text
    and "taskset -c 0-1 " in found[1].do
  )
  assert levels(machine.examine_processor(16, 16, 16.0, None)) == ["ok"]
  assert re.search(r"multiplies (no )?bfloat16", machine.examine_processor(1, 1, None, 1.0)[0].text)
  assert "load" in machine.examine_processor(4, 2, None, 5.0)[0].text
  assert levels(machine.examine_processor(4, 2, None, 5.0)) == ["ok", "note"]


def test_little_memory_is_a_note_and_hardly_any_a_problem():
  assert levels(machine.examine_memory(8 * 10**9, 4 * 10**9)) == ["ok"]
  assert levels(machine.examine_memory(8 * 10**9, 10**9)) == ["note"]
  assert "0.6 GB" in only_problem(machine.examine_memory(8 * 10**9, 2 * 10**8)).text
  assert levels(machine.examine_memory(None, None)) == ["note"]


def test_limits_of_the_shell_are_notes():
  assert machine.examine_limits({"address space": float("inf"), "open files": 1024}) == []
  found = machine.examine_limits({"address space": 4e9, "file size": 1e6, "open files": 64})
  assert [finding.do.split()[1] for finding in found] == ["-v", "-f", "-n"]
  assert set(machine.read_limits()) == {"address space", "file size", "open files"}


def test_variables_are_listed_and_those_that_tell_are_noted():
  env = {
    "JAX_ENABLE_X64": "1",
    "JGPT_DATADIR": "/x",
    "XLA_FLAGS": "--a=b " * 100,
    "HOME": "/root",
    "JAX_DEBUG_NANS": "0",
  }
  first, *rest = machine.examine_environment(env)
  assert "JAX_ENABLE_X64=1" in first.text and "HOME" not in first.text and len(first.text) < 400
  assert levels(rest) == ["note", "note"]
  assert "JGPT_DATADIR" in rest[0].text and "Did you mean JGPT_DATA_DIR" in rest[0].text
  assert "float32 stays float32" in rest[1].text and "unset JAX_ENABLE_X64" in rest[1].do
  assert "nothing set" in machine.examine_environment({"HOME": "/root"})[0].text
  assert levels(machine.examine_environment({"JAX_ENABLE_COMPILATION_CACHE": "false"})) == [
    "ok",
    "note",
  ]


def test_a_gpu_that_jax_does_not_see_is_a_problem_unless_it_was_hidden(monkeypatch):
  monkeypatch.setattr(machine, "find_version", lambda name: {"jaxlib": "0.10.2"}.get(name))
  assert levels(machine.examine_devices(CPU, [], {})) == ["ok"]
  found = only_problem(machine.examine_devices(CPU, [H200], {}))
  assert "sees only the CPU: no plugin" in found.text and "'jax[cuda12]'" in found.do
  assert (
    "'jax[cuda13]'"
    in only_problem(machine.examine_devices(CPU, [H200.replace("570.86", "580.1")], {})).do
  )
  for name, value in (("JAX_PLATFORMS", "cpu"), ("CUDA_VISIBLE_DEVICES", "")):
    hidden = machine.examine_devices(CPU, [H200], {name: value})
    assert levels(hidden) == ["ok", "ok", "note"] and f"unset {name}" in hidden[-1].do
  monkeypatch.setattr(
    machine, "find_version", {"jaxlib": "0.10.2", "jax-cuda12-plugin": "0.9.0"}.get
  )
  found = only_problem(machine.examine_devices(CPU, [H200.replace("570.86", "580.1")], {}))
  assert "jax-cuda12-plugin 0.9.0, jaxlib 0.10.2" in found.text and "'jax[cuda12]'" in found.do
  gpu = Probe([{"platform": "gpu", "kind": "NVIDIA H200", "memory": 10**11}] * 2, "", 3.0)
  assert (
    "2 GPU (NVIDIA H200), 100 GB for jax each" in machine.examine_devices(gpu, [H200], {})[-1].text
  )


@pytest.mark.parametrize(
  ("error", "cause", "env", "do"),
  [
    (
      "RuntimeError: Unable to initialize backend 'x'",
      "devices",
      {"JAX_PLATFORMS": "x"},
      "unset JAX_PLATFORMS (it is 'x')",
    ),
    (
      "Unknown flag in XLA_FLAGS: --y",
      "import",
      {"XLA_FLAGS": "--y"},
      "unset XLA_FLAGS (it is '--y')",
    ),
    (
      "ValueError: invalid value for JAX_ENABLE_X64",
      "import",
      {"JAX_ENABLE_X64": "z"},
      "unset JAX_ENABLE_X64",
    ),
    ("the process was ended by SIGILL", "SIGILL", {}, "AVX"),
    ("the process was ended by SIGKILL", "SIGKILL", {}, "memory"),
    ("ImportError: libfoo.so", "import", {}, "--force-reinstall jax jaxlib"),
    ("no answer within 60 s", "hangs", {}, "nvidia-smi"),
    ("no answer within 60 s", "hangs", {"XLA_FLAGS": "--y"}, "unset XLA_FLAGS"),
  ],
)
def test_a_device_that_does_not_answer_has_advice(error, cause, env, do):
  assert do in only_problem(machine.examine_devices(Probe([], error, 1.0, cause), [], env)).do


def test_a_process_that_hangs_is_given_up_with_its_children():
  began = time.monotonic()
  ended = probe.run_bounded(["sh", "-c", "echo before; sleep 60 & echo $!; sleep 60"], 0.3)
  assert (
    time.monotonic() - began < 10 and ended.status is None and ended.why == "no answer within 0.3 s"
  )
  word, child = ended.out.split()
  assert word == "before"
  for _ in range(100):  # until its new parent has looked
    stat = Path(f"/proc/{child}/stat")
    if not stat.exists() or stat.read_text().split(")")[-1].split()[0] == "Z":
      break
    time.sleep(0.05)
  else:
    raise AssertionError("its child is still there")
  assert probe.run_bounded(["no-such-program"], 1).why == "not found"
  assert probe.run_bounded(["sh", "-c", "exit 3"], 5).status == 3


def test_the_fatal_line_is_the_one_that_is_shown():
  text = (
    "W0101 warning\nF1121 22:36:21.06 368 parse_flags.cc:234] Unknown flag in XLA_FLAGS: --y\n   "
    " @ 0x55 abort\n"
  )
  assert probe.find_error_line(text) == "Unknown flag in XLA_FLAGS: --y"
  assert (
    probe.find_error_line("a\nValueError: b\n\n") == "ValueError: b"
    and probe.find_error_line("") == ""
  )


def test_the_probe_finds_what_this_process_finds():
  assert probe.find_devices()["error"] == "" and len(probe.find_devices()["devices"]) == len(
    jax.devices()
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("env", "cause", "words"),
  [
    ({}, "", ""),
    ({"JAX_PLATFORMS": "nonsense"}, "devices", "nonsense"),
    ({"XLA_FLAGS": "--xla_nonsense=1"}, "import", "Unknown flag in XLA_FLAGS"),
  ],
)
def test_the_probe_survives_what_ends_a_process(env, cause, words):
  found = probe.probe_devices(os.environ | env)
  assert found.cause == cause and words in found.error and bool(found.devices) is not bool(cause)
  assert probe.probe_devices(os.environ | env, 0.01).cause == "hangs"


# --- Folders ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache folder of this user's."""
  monkeypatch.setenv("JGPT_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.delenv("JGPT_DATA_DIR", raising=False)
  (tmp_path / "cache").mkdir(mode=0o700)
  return tmp_path / "cache"


def write_programs(cache, **contents):
  (cache / "compiled").mkdir(mode=0o700)
  for name, content in contents.items():
    (cache / "compiled" / f"jit_{name}-cache").write_bytes(content)


PROGRAM = zlib.compress(bytes(range(256)) * 4096)


def test_a_sound_cache_is_described(cache):
  assert "is made by the first run" in storage.examine_caches({})[0].text
  write_programs(cache, a=PROGRAM, b=zlib.compress(b""), c=b"\x28\xb5\x2f\xfd...")
  found = storage.examine_caches({})
  assert (
    levels(found) == ["ok"]
    and "3 compiled programs" in found[0].text
    and "free there" in found[0].text
  )


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (b"", "is empty"),
    (PROGRAM[:-20], "is cut off"),
    (PROGRAM[:60] + b"\0\xff\0\xff" + PROGRAM[64:], "is damaged"),
    (b"<html>", "is no compiled program"),
  ],
)
def test_a_damaged_program_is_a_problem_that_names_it(cache, content, words):
  write_programs(cache, good=PROGRAM, bad=content)
  found = only_problem(storage.examine_caches({}))
  assert (
    f"jit_bad-cache {words}" in found.text
    and found.do == f"rm {cache / 'compiled' / 'jit_bad-cache'}"
  )


def test_a_program_is_read_in_bounded_memory(cache):
  write_programs(cache, bomb=zlib.compress(bytes(1 << 24)))
  tracemalloc.start()
  assert storage.find_program_damage(cache / "compiled" / "jit_bomb-cache") is None
  assert tracemalloc.get_traced_memory()[1] < 1 << 22
  tracemalloc.stop()
  assert "cannot be read" in storage.find_program_damage(cache)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="modes are POSIX")
def test_a_cache_that_others_can_write_is_a_problem(cache, monkeypatch):
  write_programs(cache)
  (cache / "compiled").chmod(0o770)
  found = only_problem(storage.examine_caches({}))
  assert "mode 0770" in found.text and found.do == f"chmod 700 {cache / 'compiled'}"
  (cache / "compiled").chmod(0o700)
  cache.chmod(0o777)
  assert only_problem(storage.examine_caches({})).do == f"chmod 700 {cache}"
  cache.chmod(0o700)
  monkeypatch.setattr(os, "getuid", lambda: 12345)
  assert "belongs to user" in only_problem(storage.examine_caches({})).text


def test_a_cache_of_ones_own_is_looked_at_instead(cache, tmp_path):
  (tmp_path / "own").mkdir(mode=0o755)
  (tmp_path / "own" / "x-cache").write_bytes(b"")
  env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
  found = storage.examine_caches(env)
  assert "is empty" in only_problem(found).text and "MIN_COMPILE_TIME_SECS=0" in found[0].do
  assert levels(storage.examine_caches({"JAX_COMPILATION_CACHE_DIR": "gs://bucket/x"})) == ["ok"]


def test_a_cache_that_cannot_be_made_or_written_is_a_problem(cache, monkeypatch):
  (cache / "file").write_text("")
  for name, words in (("file", "is no folder"), ("file/below", "Not a directory")):
    monkeypatch.setenv("JGPT_CACHE_DIR", str(cache / name))
    found = only_problem(storage.examine_caches({}))
    assert words in found.text and "JGPT_CACHE_DIR" in found.do
  monkeypatch.setenv("JGPT_CACHE_DIR", "relative")
  assert storage.examine_caches({})[0].level == "note"

  def no_home():
    raise RuntimeError

  for module in (cache_lib, sources, storage):
    monkeypatch.setattr(module, "cache_dir", no_home)
  assert "HOME" in only_problem(storage.examine_caches({})).text
  assert storage.examine_downloads(0.0) == [] and "problem" not in levels(storage.examine_data({}))


@pytest.mark.skipif(
  not Path("/proc/self").is_dir(), reason="needs a folder in which nobody can write"
)
def test_a_folder_in_which_nothing_can_be_written_is_a_problem(monkeypatch):
  assert "cannot be written" in only_problem(storage.examine_runs_folder(Path("/proc/self"))).text
  monkeypatch.setenv("JGPT_CACHE_DIR", "/proc/self/jgpt")
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  assert "cannot be made" in only_problem(storage.examine_caches({})).text


def test_what_downloads_left_is_noted_with_when_it_expires(cache):
  now = time.time()
  (cache / "gpt2").mkdir()
  ages = {
    "names.txt.failed": 600,
    "old.failed": 7200,
    "gpt2/m.safetensors.partial": 10,
    "canary.json.7.part": 7200,
    ".x.y": 10,
  }
  for name, age in ages.items():
    (cache / name).write_bytes(bytes(5))
    os.utime(cache / name, (now - age, now - age))
  found = storage.examine_downloads(now)
  assert levels(found) == ["note"] * 3
  texts = " / ".join(finding.text for finding in found)
  assert "names.txt: a download failed 10 minutes ago, the next is tried in 50 minutes" in texts
  assert (
    "m.safetensors.partial: 5 bytes of a download that broke off" in texts
    and "canary.json.7.part" in texts
  )
  assert all("rm " in finding.do for finding in found)


def test_where_each_text_would_come_from_is_said_without_network(cache, tmp_path, monkeypatch):
  by_name = {finding.text.partition(":")[0]: finding for finding in storage.examine_data({})}
  assert by_name["names"].level == "ok" and "the list that comes with jgpt" in by_name["names"].text
  assert (
    by_name["tiny_shakespeare"].level == "note"
    and "JGPT_DATA_DIR" in by_name["tiny_shakespeare"].do
  )
  assert (
    by_name["hamlet"].level == "ok" and by_name["GPT-2's tokenizer, gpt2/vocab.bpe"].level == "note"
  )
  (cache / "tinyshakespeare.txt").write_text("half of it")
  assert "is damaged" in " ".join(finding.text for finding in storage.examine_data({}))
  (tmp_path / "own" / "gpt2").mkdir(parents=True)
  (tmp_path / "own" / "names.txt").write_text("uno\n")
  (tmp_path / "own" / "gpt2" / "vocab.bpe").write_text("other\n")
  monkeypatch.setenv("JGPT_DATA_DIR", str(tmp_path / "own"))
  found = storage.examine_data(os.environ)
  assert "vocab.bpe" in only_problem(found).text
  assert any(
    f.level == "note" and "names.txt (JGPT_DATA_DIR) is not the original" in f.text for f in found
  )
  monkeypatch.setenv("JGPT_DATA_DIR", str(tmp_path / "nowhere"))
  assert "is no folder" in only_problem(storage.examine_data(os.environ)).text


def test_a_full_disk_is_a_problem(tmp_path, monkeypatch):
  def free(num_bytes):
    monkeypatch.setattr(
      shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**12, 0, num_bytes)
    )
    return storage.examine_runs_folder(tmp_path)

  assert levels(free(10**11)) == ["ok"] and levels(free(10**9)) == ["note"]
  assert "10 MB are free" in only_problem(free(10**7)).text
  (tmp_path / "runs").write_text("")
  assert "is no folder" in only_problem(free(10**11)).text


# --- The compiler ---


def test_what_runs_found_of_the_compiler_is_shown(cache):
  assert "no run has checked it" in storage.examine_compiler_record()[0].text
  (cache / "canary.json").write_text(
    json.dumps({"jaxlib 0.1": "1e-6 in a", "jaxlib 0.2, tricks True": "2e-6 in b"})
  )
  found = storage.examine_compiler_record()
  assert (
    levels(found) == ["ok"]
    and "2 times, the last time jaxlib 0.2, tricks True: the worst by 2e-6 in b" in found[0].text
  )
  for content in ("{", "[]", "[" * 10**5):
    (cache / "canary.json").write_text(content)
    assert levels(storage.examine_compiler_record()) == ["note"]


def test_a_compiler_that_is_wrong_is_a_problem_with_the_canarys_advice(monkeypatch):
  monkeypatch.setattr(
    canary, "compare_compiled", lambda *args: canary.Comparison(0.5, "tok_embed", ("plain",), 1.0)
  )
  found = only_problem(doctor_cli.examine_compiler("names", "cpu"))
  assert "0.5" not in found.do and "tok_embed" in found.text and "WARNING" not in found.text
  assert found.do == "do not trust what was trained. Try --set compute.tricks=false"
  monkeypatch.setattr(
    canary, "compare_compiled", lambda *args: canary.Comparison(1e-7, "tok_embed", (), 1.0)
  )
  found = doctor_cli.examine_compiler("names", "cpu")
  assert levels(found) == ["ok"] and "worst by 1.0e-07 in tok_embed" in found[0].text
  assert levels(doctor_cli.examine_compiler("names", "gpu")) == ["note"]


# --- Lines ---


def test_lines_fit_and_what_others_wrote_is_harmless():
  long = Finding("problem", "topic", "word " * 60 + "/a/path/that/is/not/broken/" * 5, "mend " * 40)
  lines = format_finding(long, 90).split("\n")
  assert all(len(line) <= 90 for line in lines if "/a/path" not in line)
  assert lines[0].startswith("problem  topic        word word") and any(
    line.strip().startswith("do: mend") for line in lines
  )
  shown = format_finding(note("topic", "a\x1b[31m\nproblem  b\udcff"), 90)
  assert (
    "\n" not in shown
    and "\x1b" not in shown
    and "\\x1b[31m\\nproblem" in shown
    and "\\udcff" in shown
  )
  assert len(format_finding(ok("topic", "x " * 10**6), 90)) < 4000


def test_the_summary_counts():
  assert format_summary([ok("a", "")]) == "no problem found"
  assert format_summary([note("a", ""), problem("b", "", "do")]) == "1 problem found (b), 1 note"
  assert (
    format_summary([problem(topic, "", "do") for topic in ("b", "c", "b")])
    == "3 problems found (b, c)"
  )


def test_bytes_are_shown_in_thousands():
  assert [findings.format_bytes(n) for n in (5, 1500, 25e9, 1.5e12)] == [
    "5 bytes",
    "1.5 kB",
    "25 GB",
    "1.5 TB",
  ]


def test_a_check_that_breaks_off_is_a_problem_and_not_the_end():
  def check(error):
    raise error

  broken = list(findings.run_check("cache", lambda: check(KeyError("x"))))
  assert "KeyError" in only_problem(broken).text
  assert levels(findings.run_check("cache", lambda: check(ImportError("no rich")))) == ["note"]
  denied = only_problem(
    list(
      findings.run_check("cache", lambda: check(PermissionError(13, "Permission denied", "/a/b")))
    )
  )
  assert denied.text == "/a/b: Permission denied" and "report" not in denied.do
  assert (
    "report" in only_problem(list(findings.run_check("cache", lambda: check(OSError("odd"))))).do
  )
  mend = only_problem(
    list(findings.run_check("cache", lambda: check(UserError("it is gone. Put it back."))))
  )
  assert (mend.text, mend.do) == ("it is gone", "put it back")


def test_the_exit_status_counts_problems_only(capsys):
  assert doctor_cli.report(iter([ok("a", "b"), note("c", "d", "e")]), as_json=False) == 0
  assert "no problem found, 1 note" in capsys.readouterr().out
  assert doctor_cli.report(iter([ok("a", "b"), problem("c", "d", "e")]), as_json=True) == 1
  assert json.loads(capsys.readouterr().out) == {
    "status": 1,
    "findings": [
      {"level": "ok", "topic": "a", "text": "b", "do": ""},
      {"level": "problem", "topic": "c", "text": "d", "do": "e"},
    ],
  }


def test_wrong_arguments_have_status_2(tmp_path, capsys):
  assert cli.guard(lambda: doctor_cli.main(["--run", str(tmp_path / "nowhere")])) == 2
  assert "no such folder" in capsys.readouterr().err
  assert cli.guard(lambda: doctor_cli.main(["--run", str(tmp_path), "--all"])) == 2
  assert cli.guard(lambda: doctor_cli.main(["--unknown"])) == 2
  assert "no option --unknown" in capsys.readouterr().err


# --- A run's log and data ---


def write_log(path, rows):
  path.write_text(
    "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows),
    encoding="utf-8",
  )


def rows(*steps, **more):
  return [{"step": step, "train/loss": 1.0, "train/skipped": 0, **more} for step in steps]


def test_a_whole_log_is_counted(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write_log(
    path,
    [{"step": 0, "heldout/loss": 3.0}, *rows(1, 2), {"step": 2, "heldout/loss": 2.0}, *rows(3)],
  )
  found = continuation.examine_metrics(path, 3)
  assert levels(found) == ["ok"] and "3 updates, 2 evaluations, to step 3" in found[0].text
  write_log(
    path, [*rows(1), *rows(2, **{"train/skipped": 1}), *rows(3, **{"train/loss": float("nan")})]
  )
  found = continuation.examine_metrics(path, 3)
  assert (
    levels(found) == ["note"] and "1 updates were skipped, 1 losses are not finite" in found[0].text
  )


def test_a_log_with_gaps_or_a_torn_end_is_a_note(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write_log(path, rows(1, 2, 5, 6))
  found = continuation.examine_metrics(path, 6)
  assert levels(found) == ["ok", "note"] and "step 5 follows step 2" in found[1].text
  write_log(path, [*rows(1, 2), '{"step": 3, "tr'])
  found = continuation.examine_metrics(path, 2)
  assert levels(found) == ["ok", "note"] and "torn" in found[1].text
  found = continuation.examine_metrics(path, 4)
  assert levels(found) == ["ok", "note", "note"] and "ends at step 2" in found[2].text
  path.unlink()
  assert (
    levels(continuation.examine_metrics(path, 4)) == ["note"]
    and continuation.examine_metrics(path, 0) == []
  )


@pytest.mark.parametrize(
  "line",
  [
    "{\n",
    "[" * 70_000 + "\n",
    '{"step": "1", "train/loss": 1.0}\n',
    '{"step": 1, "train/loss": "x"}\n',
    f'{{"step": 3, "train/loss": {"9" * 400}}}\n',
    "\0" * 200_000 + "\n",
    "[]\n",
  ],
)
def test_a_line_that_cannot_be_read_is_a_note_and_what_follows_counts(tmp_path, line):
  """As for the run that goes on, which reads the same rows and leaves the line where it is."""
  path = tmp_path / "metrics.jsonl"
  write_log(path, [*rows(1, 2), line, line, *rows(5, 6)])
  counted, passed_over, gap = continuation.examine_metrics(path, 6)
  assert levels([counted, passed_over, gap]) == ["ok", "note", "note"]
  assert (
    "4 updates, 0 evaluations, to step 6" in counted.text and "step 5 follows step 2" in gap.text
  )
  assert "cannot be read and are passed over: 2, the first is line 3" in passed_over.text
  before = path.read_bytes()
  writer = JsonlWriter(path, 6)
  writer.write(Chunk(7, {"train/loss": np.float32([1])}, 1.0))
  writer.close()
  assert path.read_bytes()[: len(before)] == before


def test_a_log_that_claims_any_size_is_not_read(tmp_path):
  with open(tmp_path / "metrics.jsonl", "wb") as file:
    file.truncate(10**13)
  (found,) = continuation.examine_metrics(tmp_path / "metrics.jsonl", 3)
  assert found.level == "note" and "has 10 TB, and at most 10 GB are read" in found.text


def test_a_log_that_is_a_link_or_a_pipe_is_not_followed(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.symlink_to("/dev/zero")
  assert (
    "symbolic link"
    in only_problem(
      list(findings.run_check("metrics", lambda: continuation.examine_metrics(path, 3)))
    ).text
  )
  path.unlink()
  os.mkfifo(path)
  assert (
    "no plain file"
    in only_problem(
      list(findings.run_check("metrics", lambda: continuation.examine_metrics(path, 3)))
    ).text
  )


def test_data_that_a_stranger_names_are_not_read_without_bound(tmp_path, monkeypatch):
  monkeypatch.setattr(continuation, "MAX_FILES", 50)
  for n in range(60):
    (tmp_path / f"{n}.txt").write_text("x")
  assert (
    continuation.find_risk(None) is None and continuation.find_risk(str(tmp_path / "1.txt")) is None
  )
  assert "no plain file" in continuation.find_risk("/dev/zero")
  assert "more than 50 files" in continuation.find_risk(str(tmp_path))
  for pattern in ("**/*.txt", "*", "?.txt", "**/**/**/nothing", "*/nothing", "[0-9]/*/*"):
    assert "more than 50 files" in continuation.find_risk(str(tmp_path / pattern)), pattern
  for name in ("nowhere", "nowhere/*", "no\0where/*"):  # said where the data are looked for
    assert continuation.find_risk(str(tmp_path / name)) is None
  with open(tmp_path / "1.txt", "wb") as file:
    file.truncate(10**13)
  assert "has 10 TB" in continuation.find_risk(str(tmp_path / "1.txt"))


def test_a_glob_over_the_whole_machine_is_given_up_soon():
  """At its first part that leads to more names than are looked at.

  Expanding it would take hours.
  """
  began = time.process_time()
  assert "may stand for more than" in continuation.find_risk("/*/*/*/*/*/*/*")
  assert time.process_time() - began < 2


def test_a_tokenizer_is_tried():
  assert levels(soundness.examine_tokenizer(CharTokenizer(" abé", True))) == ["ok"]
  assert levels(soundness.examine_tokenizer(ByteTokenizer())) == ["ok"]

  class Forgetful(ByteTokenizer):
    def decode(self, ids):
      return super().decode(ids)[1:]

  assert "not the same" in only_problem(soundness.examine_tokenizer(Forgetful())).text


# --- Run folders ---


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  return train_words(tmp_path_factory.mktemp("doctor")).workdir


@pytest.fixture
def run(words, tmp_path):
  """A copy of a run that has checkpoints of steps 30 and 60."""
  return Path(shutil.copytree(words, tmp_path / "run"))


def snapshot(folder):
  files = {path: path.lstat() for path in sorted(folder.rglob("*"))}
  return {path: (info.st_mtime_ns, info.st_size, info.st_mode) for path, info in files.items()}


def examine(run):
  """What is found; nothing in the folder is changed by looking."""
  before = snapshot(run)
  found = list(soundness.examine_run(run))
  assert snapshot(run) == before
  assert all(
    format_finding(finding, 90).isprintable() or "\n" in format_finding(finding, 90)
    for finding in found
  )
  return found


def largest(folder):
  return max(
    (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
  )


def rewrite(folder, change):
  """Changes a step's manifest so that it is right in itself: what somebody could do on purpose."""
  old = manifest.read_manifest(folder)
  change(old)
  manifest.write_manifest(folder, old)


@pytest.mark.slow
def test_a_sound_run_has_no_problem(run):
  found = examine(run)
  assert levels(found) == ["ok"] * len(found)
  texts = " / ".join(finding.text for finding in found)
  assert "step 30" in texts and "step 60" in texts and "digests right, all finite" in texts
  assert (
    "60 updates" in texts
    and "finished at step 60" in texts
    and "as recorded" in texts
    and "free" in texts
  )


def flip(run):
  path = largest(run / "checkpoints" / "60" / "params")
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def claim_shape(run):
  leaf = {"dtype": "float32", "shape": [10**15, 16], "digest": "0" * 16}
  rewrite(run / "checkpoints" / "60", lambda m: m.leaves.update({"params/tok_embed": leaf}))


def claim_digest(run):
  rewrite(
    run / "checkpoints" / "60",
    lambda m: m.leaves["train_state/opt_state/adam/mu/tok_embed"].update(digest="0" * 16),
  )


def outside(run):
  path = run / "checkpoints" / "60" / "manifest.json"
  value = json.loads(path.read_text())
  value["files"]["../../../../../../etc/passwd"] = {"bytes": 1, "sha256": "0" * 64}
  del value["sha256"]
  content = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
  path.write_text(json.dumps(value | {"sha256": hashlib.sha256(content).hexdigest()}))


DAMAGES = {
  "flipped": (flip, "has changed"),
  "truncated": (
    lambda run: os.truncate(largest(run / "checkpoints" / "60" / "train_state"), 3),
    "has 3 bytes instead of",
  ),
  "deleted": (
    lambda run: largest(run / "checkpoints" / "60" / "params").unlink(),
    "a file that is not there",
  ),
  "added": (
    lambda run: (run / "checkpoints" / "60" / "params" / "more").write_text("x"),
    "more is not in the manifest",
  ),
  "linked": (
    lambda run: (run / "checkpoints" / "60" / "params" / "x").symlink_to("/etc"),
    "neither a plain file nor a folder",
  ),
  "manifest": (
    lambda run: (run / "checkpoints" / "60" / "manifest.json").write_bytes(b"\xff\0"),
    "manifest.json is not readable",
  ),
  "large manifest": (
    lambda run: os.truncate(run / "checkpoints" / "60" / "manifest.json", 10**11),
    "at most",
  ),
  "digest": (claim_digest, "adam/mu/tok_embed is not what was saved"),
  "shape": (claim_shape, "params/tok_embed is float32[1000000000000000, 16] there"),
  "outside": (outside, "lists a file that is not there: '../../../../../../etc/passwd'"),
  "another step": (
    lambda run: (run / "checkpoints" / "60").rename(run / "checkpoints" / "70"),
    "is the manifest of step 60",
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_a_problem_that_names_the_file_or_array(run, damage):
  apply, words = DAMAGES[damage]
  apply(run)
  found = examine(run)
  wrong = only_problem(found)
  assert wrong.topic == "checkpoint" and words in wrong.text and "mv " in wrong.do
  assert any("step 30" in finding.text and finding.level == "ok" for finding in found)
  goes_on = any(finding.topic == "going on" and "from step 30" in finding.text for finding in found)
  assert (
    goes_on == ("sets it aside" in wrong.do) == (damage not in ("digest", "shape"))
  )  # whose files are right


@pytest.mark.slow
def test_where_no_checkpoint_is_sound_it_says_so(run):
  for step in ("30", "60"):
    largest(run / "checkpoints" / step / "params").write_bytes(b"")
  assert "no checkpoint is sound" in [
    finding.text for finding in examine(run) if finding.level == "problem"
  ]


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_a_problem(run):
  """As a program that is not jgpt's could have written them: manifest and digests are right."""
  files = read_run_files(run)
  state = soundness.restore_state(run / "checkpoints" / "60", files, jax.devices()[0])
  state.params["tok_embed"] = state.params["tok_embed"].at[1, 2].set(np.nan)
  items = {
    "params": state.params,
    "train_state": {"step": state.step, "opt_state": state.opt_state},
  }
  shutil.rmtree(run / "checkpoints" / "60")
  with checkpoint.open_checkpoints(run) as manager:
    leaves = checkpoint.survey(items)
    manager.begin_save(checkpoint.StepNote(60), items, leaves, is_held=False)
  assert "step 60: params/tok_embed is not finite" in only_problem(examine(run)).text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experiment.json", "tokenizer.json"])
@pytest.mark.parametrize(
  "content", [None, b"{", b'{"format": 1, "\x1b[31m"', b"[" * 10**6, "/dev/zero"]
)
def test_settings_that_cannot_be_read_can_be_had_from_a_checkpoint(run, name, content):
  (run / name).unlink()
  if isinstance(content, bytes):
    (run / name).write_bytes(content)
  elif content:
    (run / name).symlink_to(content)
  wrong = [finding for finding in examine(run) if finding.level == "problem"]
  copies = [run / "checkpoints" / "60" / copy for copy in checkpoint.COPIES]
  assert wrong[-1].topic == "settings" and wrong[-1].do == f"cp {copies[0]} {copies[1]} {run}/"
  (run / name).unlink(missing_ok=True)
  shutil.copy(run / "checkpoints" / "60" / name, run)
  assert "problem" not in levels(examine(run))


@pytest.mark.slow
def test_settings_of_another_run_are_told_from_a_checkpoint_that_is(run):
  value = json.loads((run / "experiment.json").read_text())
  value["experiment"]["optimizer"]["peak_lr"] = 0.5
  (run / "experiment.json").write_text(json.dumps(value))
  wrong = [finding for finding in examine(run) if finding.level == "problem"]
  assert (
    len(wrong) == 3 and "optimizer.peak_lr is 0.01 in its experiment.json, and 0.5" in wrong[0].text
  )
  assert f"cp {run / 'checkpoints' / '30' / 'experiment.json'}" in wrong[0].do


@pytest.mark.slow
def test_leftovers_are_notes(run):
  for name in ("80", "90.orbax-checkpoint-tmp-1", "10.damaged", "mine\x1b[31m"):
    (run / "checkpoints" / name).mkdir()
  (run / ".metrics.jsonl.tmp").write_text("")
  found = examine(run)
  notes = [finding.text for finding in found if finding.level == "note"]
  assert "problem" not in levels(found) and len(notes) == 5
  for words in (
    "80 has no manifest",
    "tmp-1 has no manifest",
    "10.damaged was found damaged",
    "is nothing that jgpt made",
  ):
    assert any(words in text for text in notes)


def lose_manifests(run, *steps):
  for step in steps:
    (run / "checkpoints" / step / "manifest.json").unlink()


def lose_all_but_one_checkpoint(run):
  lose_manifests(run, "60")
  shutil.rmtree(run / "checkpoints" / "30")


def replace_by_file(run):
  shutil.rmtree(run / "checkpoints")
  (run / "checkpoints").write_text("")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("damage", "says"),
  [
    (
      lambda run: lose_manifests(run, "30", "60"),
      "none of the checkpoints in checkpoints has its manifest.json",
    ),
    (replace_by_file, "checkpoints is no folder"),
  ],
)
def test_what_a_run_refuses_is_a_problem(run, damage, says):
  """In the words of the run; nothing is said of going on."""
  damage(run)
  found = examine(run)
  wrong = only_problem(found)
  assert says in wrong.text and not any(finding.topic == "going on" for finding in found)
  with pytest.raises(UserError) as refused:
    go_on(run)
  assert str(refused.value).replace(f"{run}{os.sep}", "").startswith(wrong.text)


def go_on(run):
  """Trains for no further update."""
  files = read_run_files(run)
  with compiled_quickly():
    return train.train_run(plan_run(files.experiment, workdir=run, name=files.name))


@pytest.mark.slow
@pytest.mark.parametrize(
  "damage", [lose_all_but_one_checkpoint, lambda run: lose_manifests(run, "60")]
)
def test_what_is_said_of_a_checkpoint_without_its_manifest_is_what_the_next_run_does(run, damage):
  damage(run)
  found = examine(run)
  (said,) = [
    finding
    for finding in found
    if finding.text.startswith(f"{Path('checkpoints', '60')} has no manifest.json")
  ]
  is_kept = "keeps it under another name" in said.text
  assert is_kept == (said.level == "problem") and is_kept != (
    "the next run removes it" in said.text
  )
  assert is_kept or damage is not lose_all_but_one_checkpoint
  assert any(finding.topic == "going on" and finding.level == "ok" for finding in found)
  assert int(go_on(run).state.step) == 60
  assert (run / "checkpoints" / "60.damaged" / "params").is_dir() == is_kept
  assert "problem" not in levels(examine(run))


def test_what_the_next_run_does_with_a_checkpoint_without_manifest_is_said(tmp_path):
  step = tmp_path / "checkpoints" / "60"
  step.mkdir(parents=True)
  kept, removed = manifest.Leftovers([], [step]), manifest.Leftovers([step], [])
  wrong = only_problem(soundness.examine_leftovers(tmp_path, [30], kept, False))
  assert (
    "keeps it under another name, and goes on from step 30" in wrong.text
    and "put it back" in wrong.do
  )
  assert (
    "and begins anew" in only_problem(soundness.examine_leftovers(tmp_path, [], kept, False)).text
  )
  (gone,) = soundness.examine_leftovers(tmp_path, [30], removed, False)
  assert gone.level == "note" and "the next run removes it" in gone.text
  (saving,) = soundness.examine_leftovers(tmp_path, [30], removed, True)
  assert saving.level == "note" and saving.text.endswith("60 is being saved")


# Begins a command without the powers by which root reads what a file's mode forbids: they leave its
# bounding set (24).
WITHOUT_POWERS = """
import ctypes, os, sys
for power in (1, 2):
  ctypes.CDLL(None).prctl(24, power, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="modes do not bind root elsewhere")
@pytest.mark.parametrize(
  "closed", ["checkpoints", "checkpoints/60", "checkpoints/60/params", "metrics.jsonl", "."]
)
def test_what_cannot_be_read_is_a_problem_and_not_the_end(run, closed):
  """The whole of the JSON is printed, and nobody is asked to report it."""
  (run / closed).chmod(0)
  done = subprocess.run(
    [sys.executable, "-c", WITHOUT_POWERS, "-m", "jgpt.doctor", "--json", "--run", str(run)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  (run / closed).chmod(0o755)
  assert done.returncode == 1 and done.stderr == ""
  wrong = [
    finding for finding in json.loads(done.stdout)["findings"] if finding["level"] == "problem"
  ]
  assert wrong and "report it" not in str(wrong)
  assert "ermission denied" in str(wrong) or closed == "."


@pytest.mark.slow
def test_links_are_named_and_not_followed(run, tmp_path):
  (run / "checkpoints" / "60").rename(tmp_path / "elsewhere")
  (run / "checkpoints" / "60").symlink_to(tmp_path / "elsewhere")
  assert "checkpoints/60 is a symbolic link" in only_problem(examine(run)).text
  (run / "checkpoints").rename(tmp_path / "all")
  (run / "checkpoints").symlink_to(tmp_path / "all")
  assert "checkpoints is a symbolic link" in only_problem(examine(run)).text


@pytest.mark.slow
def test_data_that_are_gone_or_changed_are_a_problem(run, words):
  source = words.parent / "words.txt"
  text = source.read_text(encoding="utf-8")
  try:
    source.write_text(f"{text}more\n", encoding="utf-8")
    wrong = only_problem(examine(run))
    assert (
      wrong.topic == "going on"
      and "has changed since the run" in wrong.text
      and "old text back" in wrong.do
    )
    source.unlink()
    wrong = only_problem(examine(run))
    assert "words.txt" in wrong.text and "data.path=PATH" in wrong.do
  finally:
    source.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_a_text_that_would_be_downloaded_is_a_note(run, monkeypatch, tmp_path):
  monkeypatch.setenv("JGPT_DATA_DIR", str(tmp_path))
  files = read_run_files(run)
  changed = files.experiment
  changed = type(changed)(**{**vars(changed), "data": load_experiment("names").data})
  files = type(files)(files.name, changed, files.tokenizer, files.data | {"sha256": "f" * 64}, None)
  (run / "env.json").unlink()  # its last start found the text elsewhere
  found = continuation.examine_resume(run, files, True)
  assert levels(found) == ["note"] and "download" in found[0].text


@pytest.mark.slow
def test_a_disk_without_room_for_the_next_save_is_a_problem(run, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**12, 0, 1000))
  assert "make room" in only_problem(continuation.examine_next_save(run, 60, 120)).do
  monkeypatch.setattr(
    shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**12, 0, 10**9)
  )
  assert levels(continuation.examine_next_save(run, 60, 120)) == ["ok"]
  assert levels(continuation.examine_next_save(run, None, 36 * 10**7)) == ["note"]
  assert levels(continuation.examine_next_save(run, None, 12 * 10**9)) == ["problem"]


@pytest.mark.slow
def test_a_model_that_does_not_fit_memory_is_not_read(run, monkeypatch):
  monkeypatch.setattr(soundness, "measure_memory", lambda: (10**9, 1000))
  found = examine(run)
  assert (
    "problem" not in levels(found)
    and sum("arrays were not read" in finding.text for finding in found) == 2
  )


@pytest.mark.slow
def test_what_is_being_written_is_said(run):
  with locks.hold(run):
    code = "import sys, pathlib; from jgpt.doctor.soundness import examine_run as examine; "
    code += "print(next(examine(pathlib.Path(sys.argv[1]))).text)"
    done = subprocess.run(
      [sys.executable, "-c", code, str(run)],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
      check=True,
    )
  assert f"process {os.getpid()} on " in done.stdout


# --- The command ---


@pytest.mark.slow
def test_the_command_checks_this_machine(tmp_path):
  """All of it, with the compiler.

  What is wrong with the machine that runs the tests is not this test's business.
  """
  done = start(
    "--json", JGPT_CACHE_DIR=str(tmp_path / "cache"), JAX_COMPILATION_CACHE_DIR="", XLA_FLAGS=""
  )
  value = json.loads(done.stdout)
  assert done.returncode == value["status"] and done.stderr == ""
  by_topic = {}
  for finding in value["findings"]:
    by_topic.setdefault(finding["topic"], []).append(finding)
  wrong = {
    topic
    for topic, found in by_topic.items()
    if "problem" in {finding["level"] for finding in found}
  }
  assert wrong <= {"memory", "cache", "run folders"}, value
  assert {
    "jgpt",
    "python",
    "packages",
    "processor",
    "environment",
    "data",
    "devices",
    "compiler",
  } <= set(by_topic)
  assert [finding["text"].split(":")[0] for finding in by_topic["compiler"][1:]] == [
    "names",
    "shakespeare_char_cpu",
  ]
  assert all(finding["level"] == "ok" for finding in by_topic["compiler"])


@pytest.mark.slow
@pytest.mark.parametrize(
  ("env", "words"),
  [
    ({"JAX_PLATFORMS": "nonsense"}, ["problem  devices", "do: unset JAX_PLATFORMS", "not checked"]),
    (
      {
        "JAX_PLATFORMS": "nonsense",
        "JGPT_CACHE_DIR": "/dev/null/x",
        "JAX_COMPILATION_CACHE_DIR": "",
      },
      ["problem  cache"],
    ),
    (
      {"JAX_PLATFORMS": "nonsense", "JGPT_DATA_DIR": "/nowhere"},
      ["problem  data", "/nowhere is no folder"],
    ),
    (
      {"XLA_FLAGS": "--xla_nonsense=1", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
      ["do: unset XLA_FLAGS"],
    ),
  ],
)
def test_the_command_says_what_is_wrong_with_status_1(env, words):
  done = start(**env)
  assert done.returncode == 1 and done.stderr == ""
  assert all(word in done.stdout for word in words) and "problem" in done.stdout.splitlines()[-1]
  assert all(len(line) <= 90 or len(line.split()) < 5 for line in done.stdout.splitlines())


@pytest.mark.slow
def test_a_file_that_stands_before_a_package_is_named(tmp_path, monkeypatch):
  (tmp_path / "jax.py").write_text("print('mine')\n")
  monkeypatch.chdir(tmp_path)
  done = start()
  assert (
    done.returncode == 1
    and f"{tmp_path / 'jax.py'} stands before the package jax"
    in done.stdout.replace("\n" + " " * 22, " ")
  )


@pytest.mark.slow
def test_the_command_checks_a_run_folder_whatever_the_devices(run):
  done = start("--run", run, JAX_PLATFORMS="nonsense")
  assert done.returncode == 0 and done.stderr == "" and done.stdout.endswith("no problem found\n")
  flip(run)
  done = start("--run", run)
  assert done.returncode == 1 and "problem  checkpoint" in done.stdout and done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {("model", "num_layers"): 2**31 - 1},
    {("model", "vocab_size"): 2**31 - 1},
    {("model", "max_seq_len"): 2**29, ("data", "seq_len"): 2**29},
    {("data", "path"): "/dev/zero"},
    {("data", "path"): "/**/*.txt"},
    {("data", "path"): "/proc/kcore"},
  ],
)
def test_a_strangers_folder_takes_little_memory(run, changes):
  """Its settings claim anything, consistently; the process may have 6 GB of data."""
  done = subprocess.run(
    [
      "sh",
      "-c",
      'ulimit -d 6291456 && exec "$0" -m jgpt.doctor --run "$1"',
      sys.executable,
      str(run),
    ],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=200,
    check=False,
  )
  out = done.stdout
  assert done.returncode in (0, 1) and "found" in out.splitlines()[-1] and "broke off" not in out, (
    out
  )
