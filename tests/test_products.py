"""Products with bfloat16 operands against float64 products of the same rounded operands."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import QUICK

from jgpt.config.experiment import PLAIN
from jgpt.products import project

# equation, shape of x, shape of the weights: qkv, out and up of a small block.
PRODUCTS = [
  ("BTD,DCNH->BTCNH", (2, 5, 12), (12, 3, 2, 6)),
  ("BTNH,NHD->BTD", (2, 5, 2, 6), (2, 6, 12)),
  ("BTD,DF->BTF", (1, 16, 8), (8, 24)),
  ("BTD,DF->BTF", (1, 1, 8), (8, 24)),  # a token that is decoded
]


def draw(*shapes: tuple) -> list[np.ndarray]:
  """Draws float32 arrays from the standard normal distribution."""
  rng = np.random.default_rng(0)
  return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def rounded(x: np.ndarray) -> np.ndarray:
  """Rounds to bfloat16, and returns float64."""
  return np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32), np.float64)


@pytest.mark.parametrize("matmul", ["einsum", "flat"])
@pytest.mark.parametrize(("equation", "x_shape", "w_shape"), PRODUCTS)
def test_operands_are_bfloat16_and_sums_float32(equation, x_shape, w_shape, matmul):
  """Result and both gradients are those of rounded operands, to float32's rounding error."""
  compute = dataclasses.replace(PLAIN, dtype="bfloat16", matmul=matmul)
  (letters_x, letters_w), letters_y = equation.split("->")[0].split(","), equation.split("->")[1]
  y_shape = np.einsum(equation, np.zeros(x_shape), np.zeros(w_shape)).shape
  x, w, g = draw(x_shape, w_shape, y_shape)

  def multiply(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple:
    y, pull_back = jax.vjp(lambda x, w: project(equation, x, w, compute), x, w)
    return y, *pull_back(g)

  made = jax.jit(multiply, compiler_options=QUICK)(x, w, g)
  exact = (
    np.einsum(equation, rounded(x), rounded(w)),
    np.einsum(f"{letters_y},{letters_w}->{letters_x}", rounded(g), rounded(w)),
    np.einsum(f"{letters_x},{letters_y}->{letters_w}", rounded(x), rounded(g)),
  )
  for found, expected in zip(made, exact, strict=True):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_flat_products_are_mapped():
  """A mapped product, as in a run over several seeds, equals each alone."""
  compute = dataclasses.replace(PLAIN, dtype="bfloat16", matmul="flat")
  x, w = draw((3, 2, 4, 8), (3, 8, 6))

  def grads(x: jax.Array, w: jax.Array) -> tuple:
    return jax.grad(lambda *a: jnp.sum(project("BTD,DF->BTF", *a, compute) ** 2), (0, 1))(x, w)

  mapped = jax.jit(jax.vmap(grads), compiler_options=QUICK)(x, w)
  alone = [jax.jit(grads, compiler_options=QUICK)(*operands) for operands in zip(x, w, strict=True)]
  for found, expected in zip(mapped, zip(*alone, strict=True), strict=True):
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5, atol=1e-5)
