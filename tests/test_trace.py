"""What `model.trace` finds on the way to the logits: `apply`'s network, and NumPy's attention and
residual stream.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import QUICK, cast, compare, must_differ
from reference import numpy_gpt
from switches import (
  CONSTANT_RATE,
  SYSTEMS,
  TOLERANCE,
  covering_switches,
  draw_batch,
  draw_params,
  label,
  make_experiment,
  make_model,
  to_oracle,
)

import jgpt.model
from jgpt.config.settings import change
from jgpt.sharding import unstack_blocks

ARRANGE = {"stacked": lambda params: params, "list": unstack_blocks}
NAMES = ("residual", "attention", "logits")


def trace(params, tokens_BT, experiment, compiler_options=QUICK):
  """Traced anew each time, so that what a test plants is in it."""
  run = jax.jit(
    lambda *args: jgpt.model.trace(*args, experiment), compiler_options=compiler_options
  )
  return run(params, tokens_BT)


def check_trace(config, dtype="float64", *, what, how="stacked", **settings):
  """Asserts that residual stream, attention and logits are NumPy's, at every layer and position."""
  params, tokens_BT = draw_params(config), draw_batch(config).inputs_BT
  experiment = change(make_experiment(config, CONSTANT_RATE, len(tokens_BT)), settings)
  expected = numpy_gpt.trace(to_oracle(params, config), np.asarray(tokens_BT), config)
  found = trace(ARRANGE[how](cast(params, dtype)), tokens_BT, experiment)
  got = found._replace(logits_BTV=found.logits_BTV[..., : config.vocab_size])
  assert {x.dtype.name for x in found} == {dtype}
  trees = (dict(zip(NAMES, x, strict=True)) for x in (expected, got))
  compare(f"NumPy GPT's trace, {dtype}: {what}", *trees, TOLERANCE[dtype])
  check_probabilities(found.attention_LBNTS)
  assert np.all(found.logits_BTV[..., config.vocab_size :] == -np.inf)


def check_probabilities(weights_LBNTS):
  """Rows sum to 1, and a token reads nothing that comes later: exactly nothing."""
  weights = np.asarray(weights_LBNTS, np.float64)
  T, S = weights.shape[-2:]
  assert T == S and weights.min() >= 0
  assert np.all(weights[..., np.triu(np.ones((T, S), bool), 1)] == 0)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ("system", "how"),
  [
    ("GPT-2", "stacked"),
    *(
      pytest.param(system, how, marks=pytest.mark.slow)
      for system in SYSTEMS
      for how in ARRANGE
      if (system, how) != ("GPT-2", "stacked")
    ),
  ],
)
def test_the_trace_of_the_five_systems(x64, system, how):
  check_trace(make_model(SYSTEMS[system], vocab_multiple=16), what=system, how=how)


@pytest.mark.slow
@pytest.mark.parametrize("switches", covering_switches(), ids=label)
def test_the_trace_with_other_switches(x64, switches):
  check_trace(make_model(switches), what="other switches", how="list")


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_trace_in_float32(system):
  check_trace(make_model(SYSTEMS[system]), "float32", what=system)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["plain", "blocks"])
def test_attention_is_the_definitions_whatever_form_computes_the_block(x64, implementation):
  settings = {"compute.attention": implementation}
  check_trace(make_model(SYSTEMS["GPT-2"]), what=implementation, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("how", ARRANGE)
@pytest.mark.parametrize(
  ("dtype", "tolerance"), [("float64", 1e-14), ("float32", 1e-6), ("bfloat16", 2e-2)]
)
@pytest.mark.parametrize("system", ["microgpt", "nanoGPT"])
def test_its_logits_are_those_of_apply(request, system, dtype, tolerance, how):
  """At every position, in the dtype that activations have; the residual stream is of that dtype."""
  if dtype == "float64":
    request.getfixturevalue("x64")
  config = make_model(SYSTEMS[system])
  params, tokens_BT = draw_params(config), draw_batch(config).inputs_BT
  params = ARRANGE[how](cast(params, "float64" if dtype == "float64" else "float32"))
  experiment = make_experiment(config, CONSTANT_RATE, len(tokens_BT))
  if dtype == "bfloat16":
    experiment = change(experiment, {"compute.dtype": dtype})
  found = trace(params, tokens_BT, experiment)
  logits_BTV = jax.jit(
    lambda *args: jgpt.model.apply(*args, config, experiment.compute), compiler_options=QUICK
  )(params, tokens_BT)
  compare(f"apply, {dtype}", {"logits": logits_BTV}, {"logits": found.logits_BTV}, tolerance)
  assert found.logits_BTV.dtype == logits_BTV.dtype
  assert found.residual_LBTD.dtype == dtype
  assert found.attention_LBNTS.dtype == ("float64" if dtype == "float64" else "float32")
  check_probabilities(found.attention_LBNTS)


@pytest.mark.slow
def test_operation_by_operation_its_logits_have_the_bits_of_apply():
  """Nothing of the network is written twice: where the compiler cannot reorder, all bits agree."""
  config = make_model(SYSTEMS["microgpt"])
  params, tokens_BT = unstack_blocks(cast(draw_params(config), "float32")), draw_batch(config)[0]
  experiment = make_experiment(config, CONSTANT_RATE, len(tokens_BT))
  found = jgpt.model.trace(params, tokens_BT, experiment)
  logits_BTV = jgpt.model.apply(params, tokens_BT, config, experiment.compute)
  np.testing.assert_array_equal(found.logits_BTV, logits_BTV)


# --- Planted errors ---


def no_scale(put):
  right = jgpt.model.attention_weights
  put("attention_weights", lambda q, *rest: right(q * math.sqrt(q.shape[-1]), *rest))


def later_tokens_are_read(put):
  right = jgpt.model.attention_weights

  def attention_weights(q, k, visible_TS, precision):
    return right(q, k, jnp.ones_like(visible_TS), precision)

  put("attention_weights", attention_weights)


def keys_and_queries_exchanged(put):
  right = jgpt.model.project_qkv

  def project_qkv(*args):
    q, k, v = right(*args)
    return k, q, v

  put("project_qkv", project_qkv)


def a_block_without_its_residual(put):
  right = jgpt.model.block

  def block(x_BTD, *args):
    y_BTD, cache = right(x_BTD, *args)
    return y_BTD - x_BTD, cache

  put("block", block)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("plant", "wrong"),
  [
    (no_scale, {"attention"}),
    (later_tokens_are_read, {"attention"}),
    (keys_and_queries_exchanged, {*NAMES}),
    (a_block_without_its_residual, {*NAMES}),
  ],
)
def test_an_error_in_the_trace_is_found(x64, monkeypatch, plant, wrong):
  """The comparison above fails, and names what is wrong."""
  plant(lambda name, function: monkeypatch.setattr(jgpt.model, name, function))
  with must_differ() as rows:
    check_trace(make_model(SYSTEMS["NumPy GPT"]), what="planted")
  assert {row.parameter for row in rows} == wrong
