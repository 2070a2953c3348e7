"""Every form of attention against the definition: values, gradients, masks, what is kept."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import QUICK

from jgpt.attention import attention
from jgpt.fused_attention import attend_by_splash, find_obstacle

RATE = 0.3


def draw(T, H=8, dtype=jnp.float32):
  """Queries, keys, values and a cotangent: exact in bfloat16, so that each dtype gets the same."""
  rng = np.random.default_rng(T)
  rounded = (jnp.asarray(rng.normal(size=(2, T, 3, H)), jnp.bfloat16) for _ in range(4))
  return [x.astype(dtype) for x in rounded]


def compute(attend, q, k, v, g):
  """Values, and the gradients of q, k and v."""

  def run(q, k, v, g):
    y, pull = jax.vjp(attend, q, k, v)
    return y, *pull(g)

  return jax.jit(run, compiler_options=QUICK)(q, k, v, g)


def check(found, expected, tolerance):
  """Compares relative to the largest entry, and the dtypes."""
  for name, x, y in zip(("y", "q", "k", "v"), found, expected, strict=True):
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), name


def keys():
  return jax.random.split(jax.random.key(1), 2)


@pytest.mark.parametrize("form", ["plain", "blocks"])
@pytest.mark.parametrize(("T", "drops"), [(8, False), (10, True)])
def test_bfloat16_is_the_definition_up_to_rounding(form, T, drops):
  """The same masks are drawn; T need not be a multiple of the blocks."""
  settings = {"rate": RATE, "keys_B": keys()} if drops else {}
  expected = compute(partial(attention, **settings), *draw(T))
  found = compute(partial(attention, **settings, implementation=form), *draw(T, dtype=jnp.bfloat16))
  assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
  check(found, expected, 2**-7)
  if form == "blocks":
    found = compute(partial(attention, **settings, implementation=form), *draw(T))
    check(found, expected, 1e-6)


@pytest.mark.parametrize(("form", "scores"), [("plain", 64), ("blocks", 40)])
def test_bfloat16_keeps_one_number_per_score_for_its_gradient(form, scores):
  """And with dropout one bit, in a byte."""

  def count_bytes(**settings):
    attend = partial(attention, implementation=form, **settings)
    inputs = draw(8, dtype=jnp.bfloat16)[:3]
    kept = jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(attend, *qkv)[1], *inputs))
    return sum(x.size * x.dtype.itemsize for x in kept if x.ndim == 4 and x.shape[1] == 3)

  assert count_bytes() == 2 * 2 * 3 * scores
  assert count_bytes(rate=RATE, keys_B=keys()) == (2 + 1) * 2 * 3 * scores


def test_what_a_kernel_lacks_is_the_definition():
  """Without an error, also on a device that has no such kernel."""

  def trace(**settings):
    return str(jax.make_jaxpr(partial(attention, **settings))(*draw(8)[:3]))

  drops = {"rate": RATE, "keys_B": keys()}
  for settings in (drops, {"precision": "highest"}, {"is_causal": False}):
    assert trace(implementation="splash", **settings) == trace(**settings)
  assert trace(implementation="cudnn") == trace()
  assert trace(implementation="splash") != trace()


@pytest.mark.parametrize(
  ("form", "H", "dtype", "settings", "words"),
  [
    ("splash", 64, "bfloat16", {}, None),
    ("splash", 48, "float32", {}, None),
    ("splash", 64, "float64", {}, "bfloat16 or float32, not in float64"),
    ("splash", 64, "float32", {"precision": "high"}, "default precision only, not high"),
    ("splash", 64, "bfloat16", {"precision": "high"}, None),
    ("splash", 64, "bfloat16", {"drops": True}, "no dropout"),
    ("cudnn", 64, "bfloat16", {}, None),
    ("cudnn", 64, "float32", {}, "bfloat16 or float16, not in float32"),
    ("cudnn", 20, "bfloat16", {}, "multiples of 8 up to 256, not 20"),
    ("cudnn", 264, "bfloat16", {}, "multiples of 8 up to 256, not 264"),
    ("cudnn", 64, "bfloat16", {"drops": True}, "no dropout"),
  ],
)
def test_what_a_kernel_lacks_is_named(form, H, dtype, settings, words):
  found = find_obstacle(form, H, dtype, **settings)
  assert found is None if words is None else words in found


@pytest.mark.parametrize(
  ("T", "H", "dtype", "tolerance"),
  [
    (16, 16, jnp.float32, 1e-6),
    pytest.param(130, 8, jnp.bfloat16, 2**-6, marks=pytest.mark.slow),
    pytest.param(260, 24, jnp.float32, 2e-6, marks=pytest.mark.slow),
    pytest.param(130, 128, jnp.float32, 2e-6, marks=pytest.mark.slow),
  ],
)
def test_splash_is_the_definition(T, H, dtype, tolerance):
  """Interpreted: values and gradients in one block and in several, positions filled up."""
  inputs = draw(T, H, dtype)
  found = compute(partial(attend_by_splash, interpret=True), *inputs)
  assert {x.dtype for x in found} == {jnp.dtype(dtype)}
  check(found, compute(attention, *draw(T, H)), tolerance)


@pytest.mark.parametrize(
  "attend",
  [
    partial(attention, implementation="blocks"),
    pytest.param(partial(attend_by_splash, interpret=True), marks=pytest.mark.slow),
  ],
  ids=["blocks", "splash"],
)
def test_no_query_sees_a_later_key(attend):
  """The gradient of one position's values with respect to later keys and values is zero."""
  q, k, v, _ = draw(12)

  def pull_back(at, k, v):
    return jax.grad(lambda k, v: jnp.sum(attend(q, k, v)[:, at] ** 2), argnums=(0, 1))(k, v)

  pull_back = jax.jit(pull_back, compiler_options=QUICK)
  for at in (1, 5, 11):
    for gradient in pull_back(at, k, v):
      seen = np.any(gradient, axis=(0, 2, 3))
      assert seen.tolist() == [position <= at for position in range(12)]


@pytest.mark.slow
def test_splash_under_vmap_is_one_call_each():
  """As the members of a sweep call it."""
  first, second = draw(16, 16)[:3], draw(17, 16)[:3]
  second = [x[:, :16] for x in second]
  attend = partial(attend_by_splash, interpret=True)
  both = jax.jit(jax.vmap(attend), compiler_options=QUICK)(
    *(jnp.stack(pair) for pair in zip(first, second, strict=True))
  )
  for one, inputs in zip(both, (first, second), strict=True):
    np.testing.assert_allclose(one, attention(*inputs), atol=2e-6)
