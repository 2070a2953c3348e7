"""`bench --aot`: what its report says, and which programs it compiles.

Compilers for devices that are not there are in tests/aot; here programs are compiled for the
tests' CPUs in their place.
"""

import dataclasses
import json
import re

import jax
import pytest

from jgpt.bench import aot, cli, hlo
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.devices import topology
from jgpt.errors import UserError

TARGET = topology.parse_target("tpu:v5e:2x4")
STEPS = hlo.Loop(None, "steps")
PROGRAMS = [
  aot.AheadProgram("init", 1.5, reason="RESOURCE_EXHAUSTED: 18.90G of 15.75G hbm"),
  aot.AheadProgram(
    "steps",
    61.25,
    peak_bytes=7_170_000_000,
    moved_bytes=3_000_000_000,
    collectives=(
      hlo.Collective("all-reduce", 400_000_000, (STEPS,)),
      hlo.Collective("all-reduce", 98_000_000, (STEPS,)),
      hlo.Collective("all-reduce", 4, (STEPS, hlo.Loop(4, "micro"), hlo.Loop(12, "layers"))),
    ),
    kernels={"tpu_custom_call": 36},
    cycles=90_000_000,
  ),
  aot.AheadProgram("save", 2.0, peak_bytes=17_000_000_000, moved_bytes=1),
]


@pytest.fixture
def report():
  changes = {"data.seq_len": 1024, "data.batch_size": 64, "compute.dtype": "bfloat16"}
  experiment = resolve(change(load_experiment("gpt2_shakespeare"), changes), 50257)
  made = aot.AheadReport(
    TARGET, "TPU v5 lite", 8, 16_911_433_728, experiment, ["a note"], {"jax": "1.2"}, PROGRAMS
  )
  return dataclasses.replace(made, step=aot.bound_step(made, PROGRAMS[1]))


def test_the_report_says_what_fits_and_what_is_an_estimate(report):
  text = aot.format_report(report)
  lines = [re.sub(" {2,}", "  ", line) for line in text.splitlines()]
  assert "init  no  does not fit  1.5 s" in lines
  assert "init: RESOURCE_EXHAUSTED: 18.90G of 15.75G hbm" in lines
  assert "steps  yes  7.17 GB  fits  61.2 s  90.0 M  36 tpu_custom_call" in lines
  assert "save  yes  17 GB  does not fit  2.0 s" in lines
  assert "steps  all-reduce  2  498 MB  once a step" in lines
  place = "in a loop of 12 in a loop of 4: 48 times"
  assert f"steps  all-reduce  1  0.004 kB  {place}" in lines
  assert (
    "a note" in lines
    and "compiled only, nothing was run" in lines[0]
    and "8 on each device" in text
  )
  # 90 M cycles at 1.5 GHz, for 8,192 tokens.
  (line,) = [line for line in lines if line.startswith("by estimated cycles")]
  assert line.startswith("by estimated cycles  60 ms  136,533  estimate, not measured")


def test_the_bounds_are_those_of_peak_and_bandwidth(report):
  """0.80 GFLOP a token at 197 TFLOP/s, and 3 GB at 819 GB/s."""
  step = report.step
  assert step.tokens == 8 * 1024 and step.flops == pytest.approx(8192 * 0.8e9, rel=0.01)
  assert step.peak_seconds == pytest.approx(step.flops / 197e12)
  assert step.bandwidth_seconds == pytest.approx(3e9 / 819e9)
  assert step.least_seconds == step.peak_seconds
  found = json.loads(json.dumps(aot.report_to_json(report)))
  assert [p["fits"] for p in found["programs"]] == [False, True, False]
  assert found["programs"][1]["collectives"][2]["trips"] == 48
  assert "estimated_seconds" in found["estimates"]


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--aot", "tpu:v5e:2x4"], "--aot needs an experiment: --experiment NAME, one of"),
    (["--aot", "tpu:v5:2x4", "--experiment", "names"], "Did you mean v5p"),
    (["--aot", "gpu:t4", "--experiment", "names", "--only", "step"], "Did you mean steps"),
    (["--aot", "gpu:t4", "--experiment", "names", "--peer", "torch"], "--peer measures"),
    (["--experiment", "names"], "go with --aot"),
  ],
)
def test_arguments_that_do_not_go_together_are_errors(args, words):
  with pytest.raises(UserError, match=re.escape(words)):
    cli.main(args)


@pytest.mark.slow
def test_every_program_is_compiled_and_described(monkeypatch, capsys):
  """For eight CPUs in place of eight TPUs; gradients are summed once, outside the micro-batches."""
  monkeypatch.setattr(topology, "find_target_devices", lambda target: jax.devices())
  monkeypatch.setattr(topology, "set_target_environment", lambda: None)
  settings = ["data.batch_size=32", "train.micro_batch_size=16", "mesh.data=none"]
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
  assert found["step"]["peak_seconds"] is None and found["memory_bytes"] is None
