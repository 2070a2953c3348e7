"""jgpt on the attached device against float64 on the host: `pytest -m device`.

The oracle is the NumPy GPT, because TPUs have no float64. Wherever jgpt runs in float32, how many
bits of its factors a product reads depends on the device and on `compute.precision`; a tolerance
belongs to each of these forms. Without an accelerator this is the CPU, where errors are planted
that are as large as an accelerator's: each exceeds the tolerance of the next finer form and stays
within its own.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
import switches
from equivalence import CPU, GPU, OLD_GPU, QUICK, TPU, cast, compare, must_differ
from reference import numpy_gpt

import jgpt.sharding
import jgpt.step
from jgpt.attention import attention
from jgpt.batches import Batch
from jgpt.config import Experiment, ModelConfig, OptimizerConfig
from jgpt.config.settings import change
from jgpt.devices.compute import choose_step_options, describe_products, resolve_compute
from jgpt.devices.kernels import choose_attention
from jgpt.generate import generate_texts
from jgpt.runs.open import open_run

pytestmark = pytest.mark.device

# The largest difference from float64, relative to the largest entry of the leaf, by what products
# read of their factors. Measured on a CPU, in the worst leaf of the five systems: float32 8e-7;
# factors rounded to 16, 11 and 8 bits 4.1e-5, 1.3e-3 and 1.1e-2, which is 2.7 times 2^-bits each;
# bfloat16 1.4e-2.
TOLERANCES = {
  "float32": 1e-5,  # 24 bits: CPUs, GPUs before TF32, and "highest" everywhere
  "float32 as bfloat16, three passes": 1.2e-4,  # 16 bits, 8 * 2^-16: TPUs, "high"
  "float32 as TF32": 4e-3,  # 11 bits, 8 * 2^-11: GPUs, "default" and "high"
  "float32 as bfloat16, one pass": 3e-2,  # 8 bits, 8 * 2^-8: TPUs, "default"
  "bfloat16": 3e-2,  # 8 bits, and what lies between the parts: `compute.dtype`, on every device
}
BITS = {
  "float32 as bfloat16, three passes": 16,
  "float32 as TF32": 11,
  "float32 as bfloat16, one pass": 8,
}
CASES = {  # settings
  "as chosen": {},
  "default": {"compute.dtype": "float32", "compute.precision": "default"},
  "high": {"compute.dtype": "float32", "compute.precision": "high"},
  "highest": {"compute.dtype": "float32", "compute.precision": "highest"},
  "bfloat16": {"compute.dtype": "bfloat16"},
}
# Large enough for an accelerator's units of matrices, small enough for a test.
SIZES = {"vocab_size": 64, "max_seq_len": 32, "d_model": 64, "d_ff": 128, "init_std": 0.1}
# At a hidden unit whose input is almost 0, rounding switches relu on or off, and entries of the
# gradient with it. So the system with relu is smaller, on a batch with no input nearer to 0 than
# 0.05: the best of 300 seeds.
RELU = {"sizes": {"num_layers": 1, "d_ff": 16}, "batch": {"seed": 241, "seq_len": 4}}


def list_cases(*lists: Iterable[str], quick: Container[tuple[str, str]]) -> list:
  """Every pair; those that are not quick on a CPU, or that others cover there, are slow."""
  return [
    pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow)
    for pair in itertools.product(*lists)
  ]


def attached() -> jax.Device:
  return jax.devices()[0]


def find_form(experiment: Experiment) -> str:
  """Names how the attached device multiplies, a key of `TOLERANCES`."""
  if experiment.compute.dtype == "bfloat16":
    return "bfloat16"
  device = attached()
  return describe_products(device.platform, device.device_kind, experiment.compute.precision)


def make_case(system: str, settings: dict) -> tuple[Experiment, dict, Batch]:
  """The experiment as it is computed here, its parameters and a batch."""
  values = switches.SYSTEMS[system]
  relu = RELU if "relu" in values else {"sizes": {}, "batch": {}}
  config = switches.make_model(values, **SIZES | relu["sizes"])
  batch = switches.draw_batch(config, batch_size=2, **relu["batch"])
  optimizer = OptimizerConfig(
    peak_lr=1.0, schedule="constant", b1=0.9, b2=0.95, eps=0.1, weight_decay=0.1, clip_norm=1.0
  )
  experiment = change(switches.make_experiment(config, optimizer, batch_size=2), settings)
  return resolve_compute(experiment, attached()), switches.draw_params(config), batch


@functools.cache
def find_expected(config: ModelConfig) -> dict:
  """The oracle's loss and gradients."""
  relu = RELU["batch"] if config.activation == "relu" else {}
  batch = switches.draw_batch(config, batch_size=2, **relu)
  return switches.numpy_oracle(switches.draw_params(config), batch, config)


def place(params: dict, experiment: Experiment) -> dict:
  """Puts parameters on the device, arranged as its program takes them."""
  return jgpt.sharding.arrange_blocks(cast(params, "float32"), experiment.compute.layers)


def options(experiment: Experiment) -> dict:
  """The compiler's options: in a hurry on a CPU, as the commands compile elsewhere."""
  return QUICK if attached().platform == "cpu" else choose_step_options(experiment)


def describe(what: str, form: str) -> str:
  return f"NumPy GPT, on {attached().platform}, {form}: {what}"


def check_gradients(system: str, what: str, settings: dict, form: str | None = None) -> None:
  """Asserts that the loss and every leaf's gradient are the oracle's within a form's tolerance.

  Args:
    system: one of `SYSTEMS`.
    what: of the device this is, for the table.
    settings: of `compute`.
    form: a key of `TOLERANCES`; None takes what the device does with these settings.
  """
  experiment, params, batch = make_case(system, settings)
  form = form or find_form(experiment)

  def run(params: dict, batch: Batch) -> tuple:  # new each time, so that nothing traced is reused
    return jgpt.step.loss_and_grads(params, batch, 0, experiment)

  compiled = jax.jit(run, compiler_options=options(experiment))
  loss, grads = compiled(place(params, experiment), batch)
  expected, name = find_expected(experiment.model), describe(f"{system}, {what}", form)
  with switches.in_brief():
    compare(name, {"loss": expected["loss"]}, {"loss": loss}, TOLERANCES[form])
    grads = jgpt.sharding.stack_blocks(grads)
    switches.compare_leaves(name, expected["grads"], grads, TOLERANCES[form])


@pytest.mark.parametrize(
  ("system", "case"), list_cases(switches.SYSTEMS, CASES, quick=[("GPT-2", "default")])
)
def test_loss_and_every_gradient_leaf(system, case):
  """Each system is the mathematical one, up to what the device's products read."""
  check_gradients(system, case, CASES[case])


# --- The tolerances mean something ---


def test_every_form_has_a_tolerance_and_more_precision_a_smaller_one():
  """What describes the products of any device is in the table."""
  for device in (CPU, GPU, OLD_GPU, TPU):
    forms = [describe_products(*device, precision) for precision in ("default", "high", "highest")]
    tolerances = [TOLERANCES[form] for form in forms]
    assert tolerances == sorted(tolerances, reverse=True)
    assert tolerances[-1] == TOLERANCES["float32"]


@contextlib.contextmanager
def rounded_products(bits: int) -> Iterator[None]:
  """Makes jgpt's products read so many bits of their factors, also in the backward pass."""
  right = jnp.einsum

  def round_to_bits(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits - 1)

  @jax.custom_vjp
  def factor(x: jax.Array) -> jax.Array:
    return round_to_bits(x)

  @jax.custom_vjp
  def result(y: jax.Array) -> jax.Array:
    return y

  factor.defvjp(lambda x: (round_to_bits(x), None), lambda _, g: (g,))
  result.defvjp(lambda y: (y, None), lambda _, g: (round_to_bits(g),))

  def einsum(equation: str, x: jax.Array, y: jax.Array, **settings: object) -> jax.Array:
    return result(right(equation, factor(x), factor(y), **settings))

  with mock.patch.object(jnp, "einsum", einsum):
    yield


@pytest.mark.parametrize(
  ("system", "form"), list_cases(switches.SYSTEMS, BITS, quick=[("microgpt", "float32 as TF32")])
)
def test_a_form_exceeds_the_tolerance_of_the_next_finer_one(system, form):
  """Otherwise a device that reads fewer bits than `compute.precision` asks for would pass."""
  finer = list(TOLERANCES)[list(TOLERANCES).index(form) - 1]
  settings = CASES["highest"] | {"compute.matmul": "einsum"}
  with rounded_products(BITS[form]):
    check_gradients(system, f"{BITS[form]} bits, rounded here", settings, form)
    with must_differ():
      check_gradients(system, f"{BITS[form]} bits, rounded here", settings, finer)


# --- Attention ---


def attend_by_numpy(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray) -> dict:
  """Causal attention of [B, T, N, H] in float64, and the gradient by hand for a cotangent g."""
  scale = 1 / math.sqrt(q.shape[-1])
  scores = np.einsum("btnh,bsnh->bnts", q, k) * scale
  scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
  a = np.exp(scores - scores.max(axis=-1, keepdims=True))
  a /= a.sum(axis=-1, keepdims=True)
  da = np.einsum("btnh,bsnh->bnts", g, v)
  ds = a * (da - np.sum(da * a, axis=-1, keepdims=True)) * scale
  return {
    "values": np.einsum("bnts,bsnh->btnh", a, v),
    "q": np.einsum("bnts,bsnh->btnh", ds, k),
    "k": np.einsum("bnts,btnh->bsnh", ds, q),
    "v": np.einsum("bnts,btnh->bsnh", a, g),
  }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["plain", "blocks", "cudnn", "splash"])
def test_attention(form, dtype):
  """Every form that `choose_attention` takes here: values and gradients, at 256 positions."""
  config = switches.make_model(
    switches.SYSTEMS["GPT-2"], **SIZES | {"d_model": 128, "max_seq_len": 256}
  )
  experiment = switches.make_experiment(config, switches.CONSTANT_RATE)
  experiment = change(experiment, {"compute.attention": form, "compute.dtype": dtype})
  chosen, reasons = choose_attention(experiment, attached())
  if chosen != form:
    pytest.skip(reasons[0])
  rng, shape = np.random.default_rng(0), (2, 256, config.num_heads, config.head_dim)
  # Numbers of bfloat16, so that each dtype gets the same.
  inputs = [np.asarray(jnp.asarray(rng.normal(size=shape), "bfloat16"), float) for _ in range(4)]

  def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> dict:
    y, pull_back = jax.vjp(functools.partial(attention, implementation=form), q, k, v)
    return dict(zip(("values", "q", "k", "v"), (y, *pull_back(g)), strict=True))

  found = jax.jit(run, compiler_options=options(experiment))(
    *(jnp.asarray(x, dtype) for x in inputs)
  )
  name = describe(f"attention, {form}", find_form(experiment))
  with switches.in_brief():
    compare(name, attend_by_numpy(*inputs), found, TOLERANCES[find_form(experiment)])


# --- An update, and a run ---


@pytest.mark.slow
@pytest.mark.parametrize("system", switches.SYSTEMS)
def test_an_update(system):
  """Loss, norm, parameters and both moments after one step of AdamW, clipped, with decay.

  Its eps of 0.1 keeps the update of an entry a smooth function of its gradient: by an eps near 0 it
  would be the gradient's sign, which rounding turns where the gradient is almost 0.
  """
  experiment, params, batch = make_case(system, CASES["highest"])
  config, optimizer, form = experiment.model, experiment.optimizer, find_form(experiment)

  def run(params: dict, batch: Batch) -> tuple:
    state = jgpt.step.begin_state(params, experiment)
    return jgpt.step.train_step(state, batch, experiment)

  compiled = jax.jit(run, compiler_options=options(experiment))
  state, metrics = jgpt.sharding.stack_blocks(compiled(place(params, experiment), batch))
  losses, *trees = numpy_gpt.train(
    switches.to_oracle(params, config),
    [tuple(map(np.asarray, batch))],
    config,
    rate=lambda step: optimizer.peak_lr,
    b1=optimizer.b1,
    b2=optimizer.b2,
    eps=optimizer.eps,
    weight_decay=optimizer.weight_decay,
    decayed=switches.oracle_names(config, optimizer.decay_kinds),
    clip_norm=optimizer.clip_norm,
  )
  grads = find_expected(config)["grads"]
  expected = {"loss": losses[0], "norm": numpy_gpt.global_norm(switches.to_oracle(grads, config))}
  found = {"loss": metrics["train/loss"], "norm": metrics["train/grad_norm"]}
  name = describe(f"{system}, an update", form)
  with switches.in_brief():
    compare(name, expected, found, TOLERANCES[form])
    adam = state.opt_state["adam"]
    expected = [switches.from_oracle(tree, params) for tree in trees]
    switches.compare_params(name, expected[0], state.params, TOLERANCES[form])
    for moment, found in zip(expected[1:], (adam.mu, adam.nu), strict=True):
      switches.compare_leaves(name, moment, found, TOLERANCES[form])


@pytest.mark.slow
def test_a_run_is_saved_restored_and_sampled(tmp_path):
  """What a folder gives back is what training ended with, to the last bit; a text that it writes
  without chance has at each position a token that the oracle finds the most probable, up to
  rounding.
  """
  run = small_runs.train_words(tmp_path)
  restored = open_run(run.workdir)
  ended = jgpt.sharding.stack_blocks(run.result.params)
  given_back = jgpt.sharding.stack_blocks(restored.params)
  jax.tree.map(np.testing.assert_array_equal, given_back, ended)
  losses = run.result.losses
  assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3

  config, sample = run.experiment.model, run.experiment.sample
  sample = dataclasses.replace(sample, num=1, temperature=0.0)
  key = jax.random.key(0)
  (text,) = generate_texts(restored.params, restored.tokenizer, key, restored.experiment, sample)
  ids = restored.tokenizer.encode_document(text)[: config.max_seq_len]
  flat = switches.to_oracle(ended, config)
  logits_TV = numpy_gpt.forward(flat, np.array([ids[:-1]]), config)[0]
  tolerance = TOLERANCES[find_form(restored.experiment)] * np.abs(logits_TV).max()
  assert len(text) > 1
  assert np.all(logits_TV.max(axis=1) - logits_TV[range(len(ids) - 1), ids[1:]] <= 2 * tolerance)


# --- The platform on which tests run ---

PROBE = """
import os, pathlib, jax
def pytest_collection_modifyitems(items):  # in the process that would run them
  items.clear()
  found = os.environ.get("JAX_PLATFORMS"), jax.config.jax_platforms
  pathlib.Path(os.environ["PROBE_OUT"]).write_text(repr(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("options", "found"),
  [
    (["-m", "device"], (None, None)),
    (["-mdevice and not slow", "-n1"], (None, None)),
    (["-m", "not device"], ("cpu", "cpu")),
    (["-n1"], ("cpu", "cpu")),
  ],
  ids=["device", "device, worker", "not device", "default, worker"],
)
def test_only_tests_of_the_device_leave_jax_its_accelerator(tmp_path, options, found):
  """All others run on 8 virtual CPU devices, wherever they run."""
  (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
  env = os.environ | {"PROBE_OUT": str(tmp_path / "found"), "PYTHONPATH": str(tmp_path)}
  env.pop("JAX_PLATFORMS", None)
  pytest_run = [sys.executable, "-m", "pytest", "-p", "probe", "-p", "no:cacheprovider"]
  here = Path(__file__)
  command = [*pytest_run, *options, f"{here}::test_an_update"]
  subprocess.run(command, cwd=here.parents[1], env=env, capture_output=True, check=False)
  assert (tmp_path / "found").read_text(encoding="utf-8") == repr(found)
