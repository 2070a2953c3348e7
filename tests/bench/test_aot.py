"""`bench --aot`: what its report says, and which programs it compiles.

Compilers for devices that are not there are in tests/aot; here programs are compiled for the
tests' CPUs in their place.
"""

import dataclasses
import json
import re

import jax
import pytest

from jgpt.bench import aot, aot_report, cli, hlo, roofline
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.devices import topology
from jgpt.errors import UserError

TARGET = topology.parse_target("tpu:v5e:2x4")
STEPS = hlo.Loop(None, "steps")
MESH = {"data": 4, "fsdp": 1, "tensor": 2}
ALONG_TENSOR = tuple((i, i + 1) for i in range(0, 8, 2))


def exchange(kind, num_bytes, loops, groups=()):
  """Over 2x4 chips whose links have 50 GB/s."""
  coords = tuple((i, j) for i in range(2) for j in range(4))
  network = topology.Network((2, 4), (False, False), coords, 50e9)
  return roofline.describe_exchange(hlo.Collective(kind, num_bytes, loops, groups), MESH, network)


PROGRAMS = [
  aot.AheadProgram("init", 1.5, reason="RESOURCE_EXHAUSTED: 18.90G of 15.75G hbm"),
  aot.AheadProgram(
    "steps",
    61.25,
    peak_bytes=7_170_000_000,
    moved_bytes=3_000_000_000,
    exchanges=(
      exchange("all-reduce", 400_000_000, (STEPS,)),
      exchange("all-reduce", 100_000_000, (STEPS,)),
      exchange(
        "all-gather",
        50_000_000,
        (STEPS, hlo.Loop(4, "micro"), hlo.Loop(12, "layers")),
        ALONG_TENSOR,
      ),
    ),
    kernels={"tpu_custom_call": 36},
    cycles=90_000_000,
    flops=7_000_000_000_000,
    traffic_bytes=40_000_000_000,
  ),
  aot.AheadProgram("save", 2.0, peak_bytes=17_000_000_000, moved_bytes=1),
]


@pytest.fixture
def report():
  changes = {"data.seq_len": 1024, "data.batch_size": 64, "compute.dtype": "bfloat16"}
  experiment = resolve(change(load_experiment("gpt2_shakespeare"), changes), 50257)
  made = aot.AheadReport(
    TARGET, "TPU v5 lite", MESH, 16_911_433_728, experiment, ["a note"], {"jax": "1.2"}, PROGRAMS
  )
  return dataclasses.replace(made, step=aot.bound_step(made, PROGRAMS[1]))


def test_the_report_says_what_fits_and_what_is_an_estimate(report):
  text = aot_report.format_report(report)
  lines = [re.sub(" {2,}", "  ", line) for line in text.splitlines()]
  squeezed = [" ".join(line.split()) for line in lines]
  assert "init  no  does not fit  1.5 s" in lines
  assert "init: RESOURCE_EXHAUSTED: 18.90G of 15.75G hbm" in lines
  assert "steps  yes  7.17 GB  fits  61.2 s  90.0 M  36 tpu_custom_call" in lines
  assert "save  yes  17 GB  does not fit  2.0 s" in lines
  # 500 MB * 2 * 7/8 over the two links of a corner; 50 MB / 2 over one, 48 times.
  assert (
    "steps  all-reduce  data+tensor  2  500 MB  875 MB  8750 us  once a step".replace("  ", " ")
    in squeezed
  )
  place = "in a loop of 12 in a loop of 4: 48 times"
  assert f"steps all-gather tensor 1 50 MB 1.2 GB 24 ms {place}" in squeezed
  assert (
    "a note" in lines
    and "compiled only, nothing was run" in lines[0]
    and "8 on each device" in text
  )
  # 90 M cycles at 1.5 GHz, for 65,536 tokens of all devices.
  (line,) = [line for line in squeezed if line.startswith("by estimated cycles")]
  assert line.startswith("by estimated cycles 60 ms 1,092,267 55.3% estimate, not measured")
  (line,) = [line for line in squeezed if line.startswith("all at once")]
  assert line == "all at once 48.84 ms 1,341,850 67.9% bound by memory"
  assert "memory 48.84 ms 40 GB read and written at 819 GB/s" in squeezed


def test_the_bounds_are_those_of_peak_bandwidth_and_links(report):
  """7 TFLOP of the program, the formula's 0.80 GFLOP a token being less; 40 GB; two collectives."""
  step = report.step
  assert step.tokens == 8 * 1024 and step.flops == pytest.approx(8192 * 0.8e9, rel=0.01)
  assert step.compute_seconds == pytest.approx(7e12 / 197e12)
  assert step.memory_seconds == pytest.approx(40e9 / 819e9)
  assert step.tensor_seconds == pytest.approx(0.024 + 0.00875)  # the sum is along both axes
  assert step.network_seconds == pytest.approx(0.024 + 0.00875)
  assert step.least_seconds == step.memory_seconds and step.bound_by == "memory"
  found = json.loads(json.dumps(aot_report.report_to_json(report)))
  assert [p["fits"] for p in found["programs"]] == [False, True, False]
  collective = found["programs"][1]["collectives"][2]
  assert collective["trips"] == 48 and collective["axes"] == ["tensor"]
  assert found["mesh"] == MESH and found["step"]["bound_by"] == "memory"
  assert "estimated_seconds" in found["estimates"]


def test_meshes_are_compared_in_one_table(report):
  """One that the compiler refuses has a line too, and its reason is below the table."""
  one = dataclasses.replace(report, programs=[PROGRAMS[1]])
  refused = dataclasses.replace(
    report, mesh={"data": 8, "fsdp": 1, "tensor": 1}, programs=[PROGRAMS[0]], step=None
  )
  lines = [" ".join(line.split()) for line in aot_report.format_meshes([one, refused]).splitlines()]
  (row,) = [line for line in lines if line.startswith("data=4,tensor=2 ")]
  assert row.startswith(
    "data=4,tensor=2 7.17 GB fits 35.53 ms 48.84 ms 32.75 ms memory 48.84 ms to"
  )
  assert "data=8 does not fit" in lines
  assert lines[-1] == "data=8: RESOURCE_EXHAUSTED: 18.90G of 15.75G hbm"


def test_of_an_unknown_device_nothing_is_guessed(report):
  """Neither times nor shares, where neither its rates nor its network are known."""
  unknown = dataclasses.replace(report, kind="TPU v99")
  steps = dataclasses.replace(
    PROGRAMS[1],
    exchanges=(roofline.describe_exchange(hlo.Collective("all-reduce", 4, ()), MESH, None),),
  )
  unknown = dataclasses.replace(unknown, step=aot.bound_step(unknown, steps))
  lines = [" ".join(line.split()) for line in aot_report.format_bound(unknown).splitlines()]
  assert (
    "all at once n/a" in lines and "network n/a 0.007 kB sent, unknown over all its links" in lines
  )


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--aot", "tpu:v5e:2x4"], "--aot needs an experiment: --experiment NAME, one of"),
    (["--aot", "tpu:v5:2x4", "--experiment", "names"], "Did you mean v5p"),
    (["--aot", "gpu:t4", "--experiment", "names", "--only", "step"], "Did you mean steps"),
    (["--aot", "gpu:t4", "--experiment", "names", "--peer", "torch"], "and --scaling measure"),
    (["--experiment", "names"], "go with --aot"),
    (["--mesh", "fsdp=8"], "--mesh goes with --aot"),
    (["--scaling", "--only", "names"], "--only and --peer are of the cases"),
    (["--scaling", "--rounds", "0"], "--rounds=0 must be at least 1"),
    (["--scaling", "--aot", "gpu:t4", "--experiment", "names"], "nothing is run with --aot"),
    (["--scaling", "--set", "data.batch_size=6"], "data.batch_size=6 must be a multiple of"),
    (["--aot", "tpu:v5e:2x4", "--mesh", "fdsp=8"], "Did you mean fsdp"),
    (["--aot", "tpu:v5e:2x4", "--mesh", "fsdp=0"], "fsdp=0 is no number of devices. Try fsdp=8"),
    (["--aot", "tpu:v5e:2x4", "--mesh", "fsdp=8", "--only", "init"], "leave out --only"),
  ],
)
def test_arguments_that_do_not_go_together_are_errors(args, words):
  with pytest.raises(UserError, match=re.escape(words)):
    cli.main(args)


@pytest.mark.parametrize(
  ("mesh", "words"),
  [
    ("fsdp=4", "fsdp=4 is a mesh of 4 devices, and tpu:v5e:2x4 has 8. Try --mesh fsdp=8"),
    ("data=16", "data=16 is a mesh of 16 devices"),
    ("data=8", "data.batch_size=12 must be a multiple of mesh.data=8"),
  ],
)
def test_a_mesh_that_does_not_fit_is_an_error_before_anything_is_compiled(mesh, words, monkeypatch):
  monkeypatch.setattr(topology, "find_target_devices", lambda target: jax.devices())
  monkeypatch.setattr(aot, "compile_ahead", None)
  experiment = resolve(change(load_experiment("names"), {"data.batch_size": 12}), 27)
  meshes = [aot.parse_mesh("data=2,tensor=4"), aot.parse_mesh(mesh)]
  with pytest.raises(UserError, match=re.escape(words)):
    list(aot.compile_meshes(experiment, TARGET, meshes))


@pytest.mark.slow
def test_every_program_is_compiled_and_described(monkeypatch, capsys):
  """For eight CPUs in place of eight TPUs; gradients are summed once, outside the micro-batches."""
  monkeypatch.setattr(topology, "find_target_devices", lambda target: jax.devices())
  monkeypatch.setattr(topology, "set_target_environment", lambda: None)
  settings = ["data.batch_size=32", "train.micro_batch_size=16", "mesh.data=-1"]
  args = ["--aot", "tpu:v5e:2x4", "--experiment", "names", "--json"]
  assert cli.main([*args, *(word for name in settings for word in ("--set", name))]) == 0
  found = json.loads(capsys.readouterr().out)
  programs = {program["name"]: program for program in found["programs"]}
  assert list(programs) == ["init", "steps", "save", "sampling", "evaluation"]
  assert all(p["compiles"] and p["peak_bytes"] for p in programs.values())
  collectives = programs["steps"]["collectives"]
  reduced = sum(c["num_bytes"] for c in collectives)
  assert 4 * 4192 <= reduced <= 4 * 4192 * 1.02
  assert all(len(c["loops"]) == 1 for c in collectives)
  assert found["step"]["least_seconds"] is None and found["memory_bytes"] is None
