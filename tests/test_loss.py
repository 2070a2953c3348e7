"""The loss in chunks of tokens against the plain definition."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import QUICK

from jgpt.config.catalog import load_experiment
from jgpt.config.experiment import PLAIN
from jgpt.loss import sum_nats

B, T, D, V = 3, 5, 8, 26
# The vocabulary of V - 3 is padded to V in memory.
CONFIG = dataclasses.replace(
  load_experiment("names").model, vocab_size=V - 3, vocab_multiple=V, d_model=D
)


def make_inputs() -> tuple:
  """Draws a residual stream, a head, targets and unequal weights, one of them 0."""
  rng = np.random.default_rng(0)
  x_BTD = rng.standard_normal((B, T, D)).astype(np.float32)
  head_VD = rng.standard_normal((V, D)).astype(np.float32)
  weights_BT = rng.uniform(0.1, 2, (B, T)).astype(np.float32)
  weights_BT[1, 2] = 0
  return x_BTD, head_VD, rng.integers(0, V - 3, (B, T)).astype(np.int32), weights_BT


def differentiate(inputs: tuple, **settings) -> tuple:
  """Computes a third of the sum, and its gradients by residual stream, head and weights."""
  compute = dataclasses.replace(PLAIN, **settings)

  def third(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    return sum_nats(x, head, targets, weights, CONFIG, compute) / 3

  return jax.jit(jax.value_and_grad(third, (0, 1, 3)), compiler_options=QUICK)(*inputs)


@pytest.mark.parametrize("num", [2, 4, 15, 40])
def test_chunks_equal_the_definition(num):
  """Loss and gradients agree within 1e-6, also where chunks are filled up."""
  inputs = make_inputs()
  plain, chunked = differentiate(inputs), differentiate(inputs, loss_chunks=num)
  for found, expected in zip(jax.tree.leaves(chunked), jax.tree.leaves(plain), strict=True):
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("matmul", ["einsum", "flat"])
def test_chunks_equal_the_definition_in_bfloat16(matmul):
  """The same products of rounded operands: only the cotangent is rounded before it is scaled."""
  x, *others = make_inputs()
  inputs = (jnp.asarray(x, jnp.bfloat16), *others)
  settings = {"dtype": "bfloat16", "matmul": matmul}
  plain = differentiate(inputs, **settings)
  chunked = differentiate(inputs, **settings, loss_chunks=4)
  np.testing.assert_allclose(chunked[0], plain[0], rtol=1e-6)
  assert chunked[1][0].dtype == jnp.bfloat16
  for found, expected in zip(chunked[1], plain[1], strict=True):
    expected = np.asarray(expected, np.float32)
    tolerance = 0.01 * np.abs(expected).max()  # bfloat16 has 8 bits
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_never_whole(dtype):
  """No array has the vocabulary for every token, and evaluation computes no gradient."""
  x, head, targets, weights = make_inputs()
  compute = dataclasses.replace(PLAIN, dtype=dtype, loss_chunks=5)

  def total(x: jax.Array, head: jax.Array) -> jax.Array:
    return sum_nats(x, head, targets, weights, CONFIG, compute)

  whole = re.compile(rf"\[({B},{T}|{B * T}),{V}\]")
  plain = partial(sum_nats, targets_BT=targets, weights_BT=weights, config=CONFIG, compute=PLAIN)
  assert whole.search(str(jax.make_jaxpr(plain)(x, head)))
  assert not whole.search(str(jax.make_jaxpr(jax.grad(total, (0, 1)))(x, head)))
  evaluation = jax.jit(total).lower(x, head).as_text()
  products = [line for line in evaluation.splitlines() if "stablehlo.dot_general" in line]
  assert len(products) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_are_mapped(dtype):
  """Several heads at once, as in runs with several seeds, have the gradients of each alone."""
  x, head, targets, weights = make_inputs()
  heads = np.stack([head, head[::-1]])
  compute = dataclasses.replace(PLAIN, dtype=dtype, matmul="flat", loss_chunks=4)

  def total(head: jax.Array) -> jax.Array:
    return sum_nats(x, head, targets, weights, CONFIG, compute)

  mapped = jax.jit(jax.vmap(jax.grad(total)), compiler_options=QUICK)(heads)
  for found, head in zip(mapped, heads, strict=True):
    alone = jax.jit(jax.grad(total), compiler_options=QUICK)(head)
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5 * np.abs(alone).max())
