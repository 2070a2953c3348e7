"""What the benchmark counts and shows, and that its workers and timers work.

No test asserts speed.
"""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from equivalence import QUICK

from jgpt.bench import cases, peers, rounds, startup
from jgpt.bench import cli as bench_cli
from jgpt.bench.results import (
  BANDWIDTH,
  OWN_SHAPES,
  SQUARE,
  Limit,
  Parts,
  Results,
  Row,
  Split,
  divide_rounds,
  format_ratios,
  format_results,
  format_rows,
  format_seconds,
  results_to_json,
)
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, experiment_to_json, resolve
from jgpt.devices import limits
from jgpt.errors import UserError

TINY = {
  "data.batch_size": 2,
  "model.num_layers": 2,
  "model.d_model": 8,
  "model.num_heads": 2,
  "model.d_ff": 12,
}


def names(**changes):
  """Names' experiment with 27 ids; `model__dropout` stands for `model.dropout`."""
  return resolve(
    change(load_experiment("names"), {k.replace("__", "."): v for k, v in changes.items()}), 27
  )


# --- Formulas ---


def test_training_flops_are_those_counted_by_hand():
  gpt2 = resolve(load_experiment("gpt2_shakespeare"), 50257).model
  # Per layer 768 x 2304, 768 x 768, 768 x 3072 and 3072 x 768; the head 50,257 x 768 without the
  # padding of its rows.
  params = 12 * (1_769_472 + 589_824 + 2 * 2_359_296) + 38_597_376
  assert limits.count_matmul_params(gpt2) == params == 123_532_032
  assert limits.count_train_flops(gpt2, 1024) == 6 * params + 56_623_104 == 797_815_296
  assert limits.count_train_flops(gpt2, 64) == 6 * params + 3_538_944


def test_an_untied_head_counts_once_as_a_tied_one_does():
  model = names().model
  assert limits.count_matmul_params(model) == 16 * 48 + 16 * 16 + 2 * 16 * 64 + 27 * 16 == 3504
  assert limits.count_matmul_params(dataclasses.replace(model, tied_head=True)) == 3504
  assert limits.count_train_flops(model, 16) == 6 * 3504 + 6 * 16 * 16


def test_products_of_a_step_multiply_what_its_parameters_are():
  gpt2 = resolve(load_experiment("gpt2_shakespeare"), 50257).model
  products = limits.list_products(gpt2, 4, 64)
  shapes = {p.name: (p.m, p.k, p.n, p.count) for p in products}
  assert shapes == {
    "qkv": (256, 768, 2304, 12),
    "out": (256, 768, 768, 12),
    "up": (256, 768, 3072, 12),
    "down": (256, 3072, 768, 12),
    "head": (256, 768, 50304, 1),
  }
  # 2 m k n for every weight that is multiplied with, the padding's rows too.
  assert sum(p.flops * p.count for p in products) == 2 * 256 * (123_532_032 + 47 * 768)


@pytest.mark.parametrize("transposed", [False, True])
def test_operands_of_a_product_and_its_gradient_give_the_shapes_of_result_inputs_and_weights(
  transposed,
):
  product = limits.Product("head", 2, 3, 5, 1, transposed)
  results = {}
  for name, (left, right, (i, j)) in product.operands().items():
    assert left[i] == right[j]
    results[name] = tuple(np.tensordot(np.zeros(left), np.zeros(right), (i, j)).shape)
  assert results == {
    "forward": (2, 5),
    "inputs": (2, 3),
    "weights": (5, 3) if transposed else (3, 5),
  }


@pytest.mark.parametrize(
  ("kind", "bf16", "default", "highest", "gibi"),
  [
    ("Tesla T4", None, 8.1, 8.1, 0.75 * 14.7),
    ("NVIDIA L4", 121, 60, 30.3, 0.75 * 22.1),
    ("NVIDIA A100-SXM4-40GB", 312, 156, 19.5, 0.75 * 39.3),
    ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5, 0.75 * 79.2),
    ("NVIDIA A100 80GB PCIe", 312, 156, 19.5, 0.75 * 79.2),
    ("NVIDIA H100 80GB HBM3", 989, 494, 67, 0.75 * 79.1),
    ("NVIDIA H100 PCIe", 756, 378, 51, 0.75 * 79.1),
    ("NVIDIA H200", 989, 494, 67, 0.75 * 139),
    ("NVIDIA H200 NVL", 835, 417, 60, 0.75 * 139),
    ("NVIDIA B200", 2250, 1100, 80, 0.75 * 178.3),
    ("TPU v4", 275, 275, 275 / 6, 30.75),
    ("TPU v5 lite", 197, 197, 197 / 6, 15.75),
    ("TPU v5e", 197, 197, 197 / 6, 15.75),
    ("TPU v5p", 459, 459, 459 / 6, 95.74),
    ("TPU v5", 459, 459, 459 / 6, 95.74),
    ("TPU v6 lite", 918, 918, 918 / 6, 31.25),
    ("TPU v6e", 918, 918, 918 / 6, 31.25),
    ("TPU7x", 1153.5, 1153.5, 1153.5 / 6, 94.75),
    ("TPU v4 lite", None, None, None, None),
    ("NVIDIA L40S", None, None, None, None),
    ("NVIDIA GeForce RTX 4090", None, None, None, None),
    ("cpu", None, None, None, None),
  ],
)
def test_peaks_and_memory_of_devices(kind, bf16, default, highest, gibi):
  found = (
    limits.find_peak(kind, "bfloat16", "highest"),  # precision is of float32's products alone
    limits.find_peak(kind, "float32"),
    limits.find_peak(kind, "float32", "highest"),
  )
  expected = tuple(None if tera is None else tera * 1e12 for tera in (bf16, default, highest))
  assert found == pytest.approx(expected)
  memory = limits.find_memory_limit(kind)
  assert memory == (None if gibi is None else pytest.approx(gibi * 2**30, abs=2))


def test_the_limit_of_decoding_is_the_bandwidth_over_what_a_token_reads():
  gpt2 = resolve(load_experiment("gpt2_shakespeare"), 50257).model
  assert limits.count_cache_bytes(gpt2) == 2 * 12 * 768 * 4
  assert limits.compute_decoding_limit(gpt2, 1, 0, 54e9) == pytest.approx(54e9 / (124_439_808 * 4))
  per_step = 124_439_808 * 4 + 16 * 73_728 * 32.5
  assert limits.compute_decoding_limit(gpt2, 16, 32.5, 54e9) == pytest.approx(16 * 54e9 / per_step)
  halved = limits.compute_decoding_limit(gpt2, 16, 32.5, 54e9, entry_bytes=2)
  assert halved == pytest.approx(2 * 16 * 54e9 / per_step)


def test_ratios_are_of_the_same_round():
  assert divide_rounds([2.0, 6.0, 3.0], [1.0, 2.0, 4.0]) == [2.0, 3.0, 0.75]
  assert format_ratios([2.0, 3.0, 0.75]) == "2.00 (0.75 to 3.00)"
  assert format_ratios([21.68, 9.999, 930.4]) == "21.7 (10.00 to 930)"
  assert format_ratios(None) == ""


# --- Tables ---


def made_results(**more):
  ours = Row("case", "jgpt", [0.002, 0.001, 0.003], "step", 4, 100.0, 1e6, 1.234, 2_500_000)
  torch = Row("case", "torch", [0.004, 0.003, 0.003], "step", 4, 100.0, 1e6, ratios=[2.0, 3.0, 1.0])
  failed = Row("case", "torch.compile", [], reason="no C++ compiler")
  limit = [Limit(SQUARE, 1e10, "FLOP/s"), Limit(OWN_SHAPES, 2e9, "FLOP/s", "case")]
  return Results([ours, torch, failed, Row("run", "jgpt", [12.0])], limits=limit, **more)


def test_the_table_of_cases_as_it_is_printed():
  assert format_rows(made_results()) == (
    "case                 median        fastest to slowest  us/sample  tokens/s  GFLOP/s  % own  % "
    "2048  compile  memory"
    "  time/jgpt's\n"
    "case                 2000 us/step  1000 to 3000 us     500        50,000    0.5      25.0   "
    "5.0     1.23 s   2.5 MB\n"
    "case: torch          3000 us/step  3000 to 4000 us     750        33,333    0.3333   16.7   "
    "3.3"
    "                      2.00 (1.00 to 3.00)\n"
    "case: torch.compile  n/a\n"
    "run                  12 s          12 to 12 s\n"
    "case: torch.compile: n/a (no C++ compiler)"
  )


def test_what_draws_samples_has_their_rate_below_the_table():
  lines = format_rows(Results([Row("1,000 names", "jgpt", [0.02], "call", 1000)])).splitlines()
  assert lines[1].split() == ["1,000", "names", "20", "ms/call", "20", "to", "20", "ms", "20"]
  assert lines[2] == "1,000 names: 50,000 samples/s"


@pytest.mark.parametrize(("peak", "cell"), [(1e11, "0.5"), (None, "n/a")])
def test_an_accelerator_has_a_share_of_its_peak_or_says_that_it_is_not_known(peak, cell):
  header, ours = format_rows(made_results(accelerated=True, peak=peak)).splitlines()[:2]
  column = header.index("% bf16 peak")
  assert ours[column:].split()[0] == cell


def test_the_tables_of_parts_splits_and_limits_as_they_are_printed():
  results = Results(
    parts=[Parts("case", [0.001, 0.002], [0.004, 0.004], [0.0005, 0.0005], 0.005)],
    splits=[Split("run", {"import": [0.5, 0.7], "exit": [0.25, 0.25]})],
    limits=[
      Limit(BANDWIDTH, 5.4e10, "B/s"),
      Limit("decoding by memory", 108.0, "tokens/s", "GPT-2", 0.5),
    ],
  )
  assert format_results(results) == (
    "of a step, medians  forward  backward  update  sum            whole step\n"
    "case                1500 us  2500 us   500 us  4500 us (90%)  5000 us\n"
    "\n"
    "of a command, medians in s  import  exit\n"
    "run                         0.600   0.250\n"
    "\n"
    "limit               of            rate          reached\n"
    "memory, read        this machine  54 GB/s\n"
    "decoding by memory  GPT-2         108 tokens/s  50.0%"
  )


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (3.1e-5, "31 us"),
    (0.00999, "9990 us"),
    (0.01, "10 ms"),
    (9.87654, "9877 ms"),
    (10.0, "10 s"),
    (-2e-6, "-2 us"),
  ],
)
def test_seconds_have_four_digits_and_a_unit(seconds, text):
  assert format_seconds(seconds) == text


def test_lines_of_every_case_fit_160_columns():
  long = max((t.label for some in cases.TRAININGS.values() for t in some), key=len)
  row = Row(
    long,
    "torch.compile",
    [0.12345, 0.1, 0.2],
    "step",
    64,
    123456.0,
    1e12,
    12.34,
    1234567890,
    [12.3, 10.0, 20.0],
  )
  lines = format_rows(Results([row])).splitlines()
  assert max(map(len, lines)) <= 160


def test_json_holds_every_round_and_what_follows():
  found = json.loads(json.dumps(results_to_json(made_results())))
  ours, torch, failed, _ = found["rows"]
  assert (
    ours["seconds"] == [0.002, 0.001, 0.003]
    and ours["median_seconds"] == 0.002
    and ours["ratios"] is None
  )
  assert ours["tokens_per_second"] == 50_000 and ours["samples_per_second"] == 2000
  assert ours["shares"] == {"own_shapes": 0.25, "square": 0.05, "bf16_peak": None}
  assert torch["median_ratio"] == 2.0
  assert failed["median_seconds"] is None and failed["reason"] == "no C++ compiler"


# --- The command line ---


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--only", "nams"], "no case 'nams'. Did you mean names"),
    (["--rounds", "0"], "--rounds=0 must be at least 1"),
    (["--only", "names", "--only", "xyz"], "There are names, shakespeare_char_cpu"),
  ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(args, words):
  with pytest.raises(UserError, match=words.replace("(", r"\(")):
    bench_cli.main(args)


def test_help_says_how_figures_are_made(capsys):
  with pytest.raises(SystemExit):
    bench_cli.main(["--help"])
  out = capsys.readouterr().out
  assert (
    all(case in out for case in cases.CASES) and "6 P + 6 L D T" in out and "not counted" in out
  )


def test_a_missing_torch_is_said_at_once(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="pip install torch"):
    peers.check_peer_packages(["torch"])
  peers.check_peer_packages(["scalar"])


# --- Rounds and workers ---


def test_contenders_take_turns_and_the_first_round_does_not_count():
  calls = []

  def timer(name):
    def time_steps(steps):
      calls.append((name, steps))
      return len(calls)

    return time_steps

  assert rounds.interleave([timer("a"), timer("b")], [10, 2], rounds=2) == [[3, 5], [4, 6]]
  assert calls == [("a", 10), ("b", 2)] * 3


def save_words(folder):
  """Ten documents of up to 16 predictions, as a worker reads them."""
  rng = np.random.default_rng(0)
  path = folder / "tokens.npz"
  np.savez(
    path, tokens=rng.integers(0, 27, (10, 17), np.int32), lengths=rng.integers(3, 17, 10, np.int32)
  )
  return str(path)


def test_a_worker_times_plain_python_and_ends(tmp_path):
  changes = {"model__num_layers": 1, "model__d_model": 4, "model__num_heads": 2, "model__d_ff": 16}
  spec = {
    "kind": "scalar",
    "experiment": experiment_to_json(names(**changes)),
    "tokens": save_words(tmp_path),
    "warm_up": 1,
  }
  with rounds.open_workers({"plain Python": spec}) as workers:
    worker = workers["plain Python"]
    assert worker.about["versions"] == {}
    assert 0 < worker(2) < math.inf
    process = worker.process
  assert process.returncode == 0


def test_a_worker_that_cannot_run_says_why(tmp_path):
  spec = {
    "kind": "scalar",
    "experiment": experiment_to_json(names()),
    "tokens": str(tmp_path / "none.npz"),
    "warm_up": 1,
  }
  with rounds.open_workers({"plain Python": spec}) as workers:
    assert "none.npz" in workers["plain Python"] and "\n" not in workers["plain Python"]


def test_a_worker_whose_process_dies_is_one_line(tmp_path):
  changes = {"model__num_layers": 1, "model__d_model": 4, "model__num_heads": 2, "model__d_ff": 16}
  spec = {
    "kind": "scalar",
    "experiment": experiment_to_json(names(**changes)),
    "tokens": save_words(tmp_path),
    "warm_up": 1,
  }
  with rounds.open_workers({"plain Python": spec}) as workers:
    workers["plain Python"].process.kill()
    with pytest.raises(UserError, match="stopped while it was timed: its process ended: status -9"):
      workers["plain Python"](1)


@pytest.mark.slow
def test_a_worker_with_torch_trains_a_tiny_model(tmp_path):
  pytest.importorskip("torch")
  experiment = change(
    names(), TINY | {"model.dropout": 0.1, "model.dropout_places": ("embedding", "mlp_out")}
  )
  spec = {
    "kind": "torch",
    "compiled": False,
    "autocast": True,
    "experiment": experiment_to_json(experiment),
    "tokens": save_words(tmp_path),
  }
  with rounds.open_workers({"torch": spec | {"platform": "cpu", "warm_up": 1}}) as workers:
    worker = workers["torch"]
    assert list(worker.about["versions"]) == ["torch"]
    assert 0 < worker(3) < math.inf and 0 < worker(1) < math.inf


# --- Torch's model is jgpt's ---


def torch_params(experiment, state):
  """Parameters of jgpt by the names that the torch model has."""
  model, D = experiment.model, experiment.model.d_model
  renamed = {"tok_embed.weight": state["tok_embed"], "pos_embed.weight": state["pos_embed"]}
  renamed["head.weight"] = state["tok_embed"] if model.tied_head else state["unembed"]
  gains = {"norm_attn": "norm_attn", "norm_mlp": "norm_mlp"}
  for i in range(model.num_layers):
    p = {name: value[i] for name, value in state["blocks"].items()}
    for name, shape in (
      ("qkv", (D, 3 * D)),
      ("out", (D, D)),
      ("up", (D, model.d_ff)),
      ("down", (model.d_ff, D)),
    ):
      renamed[f"blocks.{i}.{name}.weight"] = p[f"w_{name}"].reshape(shape).T
      if f"b_{name}" in p:
        renamed[f"blocks.{i}.{name}.bias"] = p[f"b_{name}"].reshape(-1)
    for name in gains:
      for ours, theirs in (("gain", "weight"), ("bias", "bias")):
        if f"{name}_{ours}" in p:
          renamed[f"blocks.{i}.{name}.{theirs}"] = p[f"{name}_{ours}"]
  for ours, theirs in (("gain", "weight"), ("bias", "bias")):
    if f"norm_final_{ours}" in state:
      renamed[f"norm_final.{theirs}"] = state[f"norm_final_{ours}"]
  return renamed


@pytest.mark.parametrize("name", ["names", "shakespeare_char_cpu", "gpt2_shakespeare"])
def test_the_torch_peer_has_the_loss_of_jgpt(name):
  """A peer with another network would be measured for nothing."""
  torch = pytest.importorskip("torch")
  import jax

  from jgpt.batches import Batch
  from jgpt.bench import peer_torch
  from jgpt.model import init_params
  from jgpt.step import loss_fn

  sizes = {
    "model.max_seq_len": 16,
    "data.seq_len": 16,
    "model.init_std": 0.3,
    "model.vocab_multiple": 1,
  }
  experiment = resolve(change(load_experiment(name), TINY | sizes), 27)
  params = jax.jit(init_params, static_argnums=1, compiler_options=QUICK)(
    jax.random.key(1), experiment.model
  )
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 27, (2, 17), np.int32)
  weights = (np.arange(16) < np.array([[5], [16]])).astype(np.float32)
  net = peer_torch.TorchModel(experiment.model)
  state = {
    k: torch.tensor(np.asarray(v))
    for k, v in torch_params(experiment, jax.tree.map(np.asarray, params)).items()
  }
  net.load_state_dict(state)
  inputs, targets = (torch.tensor(x, dtype=torch.int64) for x in (tokens[:, :-1], tokens[:, 1:]))
  compute = jax.jit(partial(loss_fn, experiment=experiment), compiler_options=QUICK)
  for some in (weights, None):
    batch = Batch(
      tokens[:, :-1], tokens[:, 1:], np.ones((2, 16), np.float32) if some is None else some
    )
    theirs = net(inputs, targets, None if some is None else torch.tensor(some)).item()
    assert theirs == pytest.approx(float(compute(params, batch)), rel=1e-5)


def scalar_params(model, params):
  """Parameters of jgpt as the matrices of the scalar peer, whose rows are outputs."""
  D, names = model.d_model, {"token": "tok_embed", "position": "pos_embed", "head": "unembed"}
  matrices = {theirs: params[ours].tolist() for theirs, ours in names.items()}
  for i in range(model.num_layers):
    p = {name: value[i] for name, value in params["blocks"].items()}
    for c, name in enumerate(("query", "key", "value")):
      matrices[f"{name}{i}"] = p["w_qkv"][:, c].reshape(D, D).T.tolist()
    for name, shape in (("out", (D, D)), ("up", (D, model.d_ff)), ("down", (model.d_ff, D))):
      matrices[f"{name}{i}"] = p[f"w_{name}"].reshape(shape).T.tolist()
  return matrices


def test_the_scalar_peer_has_the_losses_of_jgpt():
  """From the same parameters: the first loss, and those after one and two updates of Adam."""
  import jax

  from jgpt.batches import Batch
  from jgpt.bench import peer_scalar
  from jgpt.model import init_params
  from jgpt.step import begin_state, loss_fn, train_step

  changes = TINY | {"data.batch_size": 1, "model.init_std": 0.3, "train.steps": 4}
  experiment = resolve(change(load_experiment("names"), changes), 27)
  draw = jax.jit(init_params, static_argnums=1, compiler_options=QUICK)
  params = jax.tree.map(np.asarray, draw(jax.random.key(1), experiment.model))
  compute = jax.jit(partial(loss_fn, experiment=experiment), compiler_options=QUICK)
  step = jax.jit(partial(train_step, experiment=experiment), compiler_options=QUICK)
  matrices = scalar_params(experiment.model, params)
  drawn = peer_scalar.draw_matrices(0, experiment.model)
  assert {k: np.shape(v) for k, v in matrices.items()} == {k: np.shape(v) for k, v in drawn.items()}
  theirs, ours = peer_scalar.begin_scalar(matrices), begin_state(params, experiment)
  rng = np.random.default_rng(0)
  for number, (length, tolerance) in enumerate([(5, 1e-5), (16, 1e-4), (9, 1e-4)]):
    tokens, weights = rng.integers(0, 27, (1, 17), np.int32), np.float32(np.arange(16) < length)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], weights[None])
    expected = float(compute(ours.params, batch))
    ours, _ = step(ours, batch)
    theirs, loss = peer_scalar.update_scalar(theirs, tokens[0, : length + 1].tolist(), experiment)
    assert loss == pytest.approx(expected, abs=tolerance)
    assert theirs.step == number + 1


def test_documents_for_torch_are_taken_in_turn_and_weighted():
  torch = pytest.importorskip("torch")
  from jgpt.bench import peer_torch

  tokens, lengths = (
    np.arange(5 * 17, dtype=np.int32).reshape(5, 17),
    np.array([1, 16, 3, 2, 4], np.int32),
  )
  cut = peer_torch.make_batches(names(data__batch_size=2), tokens, lengths, torch.device("cpu"))
  firsts = []
  for _ in range(3):
    inputs, targets, weights = cut()
    firsts.append(inputs[:, 0].tolist())
    assert torch.equal(inputs + 1, targets)
    assert weights.sum(1).tolist() == [lengths[row // 17] for row in inputs[:, 0].tolist()]
  assert firsts == [[0, 17], [34, 51], [0, 17]]


# --- jgpt's timers ---


@pytest.mark.slow
def test_step_and_parts_take_a_finite_time_on_a_tiny_model(tmp_path, quick):
  import jax

  from jgpt.bench import timing
  from jgpt.plan import plan_run

  text = tmp_path / "words.txt"
  text.write_text("ab\nba\nabba\n" * 4, encoding="utf-8")
  experiment = change(
    load_experiment("names"), TINY | {"data.path": str(text), "data.heldout_fraction": 0.0}
  )
  steps = timing.StepTimer(plan_run(experiment), jax.devices())
  parts = timing.PartsTimer(steps)
  times = [steps(3), steps(2000), *parts(2), steps.compile_seconds]
  assert all(0 < seconds < math.inf for seconds in times)
  assert steps.memory_bytes is None or steps.memory_bytes > 0


@pytest.mark.slow
def test_a_product_takes_the_median_of_rounds_that_are_long_enough(monkeypatch):
  """By a clock that is set: the first call is not counted, calls of 1, 2 and 4 products are too
  short, and three of 8 are rounds.
  """
  from jgpt.bench import timing

  lasting = iter([9.0, 0.001, 0.002, 0.004, 0.008, 0.04, 0.008, 0.016])
  readings = iter([t for seconds in lasting for t in (100.0, 100.0 + seconds)])
  monkeypatch.setattr(timing.time, "perf_counter", lambda: next(readings))
  monkeypatch.setattr(timing, "LEAST_SECONDS", 0.007)
  measured = timing.time_product((3, 4), (5, 4), (1, 1), 3)
  assert measured == pytest.approx(0.016 / 8) and next(readings, None) is None


def test_rates_of_the_machine_are_operations_and_bytes_by_seconds(monkeypatch):
  """Each product of a step and the two of its gradient count as often as they occur; of a matrix's
  two layouts the faster one counts.
  """
  from jgpt.bench import timing

  timed = []

  def time_product(left, right, contract, rounds, options=None):
    assert left[contract[0]] == right[contract[1]] and rounds == 7
    timed.append((2 * math.prod(left) * right[1 - contract[1]], 1.0 + len(timed)))
    return timed[-1][1]

  monkeypatch.setattr(timing, "time_product", time_product)
  assert timing.measure_square(7, size=16) == 2 * 16**3 / 1.0
  assert timing.measure_bandwidth(7, shape=(64, 32)) == 4 * 64 * 32 / 2.0
  timed.clear()
  model = names(model__d_model=8, model__num_heads=2, model__num_layers=3).model
  rate = timing.measure_products(limits.list_products(model, 1, 4), 7)
  counts = [3] * 12 + [1] * 3  # qkv, out, up and down in each layer, and the head
  operations, seconds = np.transpose(timed)
  assert operations[-3:].tolist() == [2 * 4 * 8 * model.padded_vocab_size] * 3
  assert rate == pytest.approx(np.dot(counts, operations) / np.dot(counts, seconds))


# --- Start-up ---


def test_every_moment_is_counted_for_the_innermost_part(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(startup.time, "time", lambda: now[0])
  recorder = startup.Recorder(97.0, "import")
  recorder.switch("other")
  now[0] += 1
  with recorder.part("train"):
    now[0] += 5
    with recorder.part("save"):
      now[0] += 2
    now[0] += 0.5
  now[0] += 0.25
  assert recorder.lap() == 108.75
  assert {k: v for k, v in recorder.seconds.items() if v} == {
    "import": 3.0,
    "other": 1.25,
    "train": 5.5,
    "save": 2.0,
  }


@pytest.mark.slow
def test_the_parts_of_a_start_add_up_to_the_whole(tmp_path):
  import time

  env = {"JGPT_CACHE_DIR": str(tmp_path / "cache")}
  began = time.time()
  parts = startup.split_command(
    ["--experiment", "names", "--steps", "20", "--workdir", str(tmp_path / "run")], env
  )
  whole = time.time() - began
  assert list(parts) == list(startup.STARTUP_PARTS) and all(
    seconds > 0 for seconds in parts.values()
  )
  assert 0 <= whole - sum(parts.values()) < 1  # but for making and reading the report
  assert (tmp_path / "run" / "checkpoints" / "20").is_dir()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_bench_names_prints_json_of_what_it_measured(capsys):
  assert bench_cli.main(["--only", "names", "--rounds", "1", "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert (
    found["rounds"] == 1 and found["machine"]["versions"]["jax"] and found["machine"]["cores"] >= 1
  )
  assert [row["case"] for row in found["rows"]] == [f"names, batch {size}" for size in (1, 16, 64)]
  for row in found["rows"]:
    assert len(row["seconds"]) == 1 and row["tokens_per_second"] > 0 and row["flops_per_second"] > 0
    assert (
      row["compile_seconds"] > 0 and row["shares"]["own_shapes"] > 0 and row["shares"]["square"] > 0
    )
  assert all(
    len(parts[name]) == 1
    for parts in found["parts"]
    for name in ("forward", "gradient", "backward", "update")
  )
  assert len(found["limits"]) == 4 and all(limit["rate"] > 0 for limit in found["limits"])


@pytest.mark.slow
def test_bench_startup_splits_whole_commands(capsys, tmp_path):
  command = [sys.executable, "-m", "jgpt.bench", "--only", "startup", "--rounds", "1"]
  done = subprocess.run(
    command, env=rounds.make_child_env(), cwd=tmp_path, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  for words in ("run --help", "nothing compiled yet", "compilations cached", "import", "exit"):
    assert words in done.stdout


def test_a_case_that_fails_leaves_the_others(monkeypatch, capsys):
  """A peer that dies while it is timed costs its case, and not what was measured before."""

  def die(session):
    raise UserError("a peer stopped while it was timed: killed")

  def measure(session):
    session.results.rows.append(Row("made", "jgpt", [0.5], per="step"))

  monkeypatch.setattr(bench_cli, "CASES", {"first": measure, "second": die})
  assert bench_cli.main(["--rounds", "1"]) == 1
  out, err = capsys.readouterr()
  assert (
    "made" in out
    and "second was not measured to its end: a peer stopped while it was timed: killed" in err
  )
