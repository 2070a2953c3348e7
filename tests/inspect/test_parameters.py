"""The size of parameters, gradients and updates, against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.inspect.parameters import (
  ParamStats,
  format_params,
  measure_layers,
  measure_params,
  sum_stats,
)
from jgpt.params import count_params, walk
from jgpt.sharding import stack_blocks, unstack_blocks

CONFIG = resolve(
  change(
    load_experiment("shakespeare_bytes"),
    {"model.d_model": 16, "model.d_ff": 24, "model.num_heads": 2, "model.vocab_multiple": 48},
  ),
  250,
).model  # 250 tokens, padded to 288


def draw(seed):
  """A tree shaped like the parameters, padding 0, in another order than the table's."""
  rng, tree = np.random.default_rng(seed), {"blocks": {}}
  for name, param, layers in reversed(list(walk(CONFIG))):
    group, _, inner = name.rpartition("/")
    shape = (layers, *param.shape) if group else param.shape
    x = rng.normal(0, 3, shape).astype(np.float32)
    if param.padding:
      x[-param.padding :] = 0
    (tree[group] if group else tree)[inner] = x
  return tree


TREES = [draw(seed) for seed in range(3)]


def norm(x):
  return math.sqrt((np.asarray(x, np.float64) ** 2).sum())


@pytest.mark.parametrize(
  "arrange", [stack_blocks, pytest.param(unstack_blocks, marks=pytest.mark.slow)]
)
def test_rows_are_numpys(arrange):
  """Norm, rms, largest entry, the gradient's norm and the update's share, without padding."""
  assert CONFIG.padded_vocab_size > CONFIG.vocab_size and CONFIG.num_layers > 1
  trees = [arrange(jax.tree.map(jnp.asarray, tree)) for tree in TREES]
  rows, by_layer = measure_params(*trees, CONFIG), measure_layers(*trees, CONFIG)
  assert [row.name for row in rows] == [name for name, *_ in walk(CONFIG)]
  expected = []
  for row in rows:
    group, _, inner = row.name.rpartition("/")
    p, g, u = ((tree[group] if group else tree)[inner] for tree in TREES)
    if row.name == "tok_embed":
      p = p[: CONFIG.vocab_size]
    expected += [(f"{row.name}[{i}]", p[i], g[i], u[i]) for i in range(len(p))] if group else [
      (row.name, p, g, u)
    ]  # fmt: skip
    check(row, p, g, u)
  assert [row.name for row in by_layer] == [name for name, *_ in expected]
  for row, (_, *arrays) in zip(by_layer, expected, strict=True):
    check(row, *arrays)
  for total in (sum_stats(rows), sum_stats(by_layer)):
    assert total.count == count_params(CONFIG)
    p, g, u = (norm(np.concatenate([x.ravel() for x in jax.tree.leaves(tree)])) for tree in TREES)
    assert (total.norm, total.grad_norm, total.update_norm) == pytest.approx((p, g, u), rel=1e-5)
    assert total.largest == max(np.abs(x).max() for x in jax.tree.leaves(TREES[0]))
    assert total.log10_ratio == pytest.approx(math.log10(u / p), abs=1e-5)


def check(row, p, g, u):
  assert row.shape == p.shape and row.count == p.size and row.largest == np.abs(p).max()
  rms = math.sqrt((p.astype(np.float64) ** 2).mean())
  assert (row.norm, row.rms, row.grad_norm) == pytest.approx((norm(p), rms, norm(g)), rel=1e-5)
  assert row.log10_ratio == pytest.approx(math.log10(norm(u) / norm(p)), abs=1e-5)


def test_a_parameter_that_the_config_does_not_declare_is_an_error():
  """It would have no place in the table."""
  with pytest.raises(KeyError, match="gain"):
    measure_params({"gain": jnp.ones(3), "tok_embed": jnp.ones((288, 16))}, config=CONFIG)


def test_the_table_of_shakespeare_char_cpu_fits_a_terminal():
  """Of 80 columns, also with a row for each layer."""
  config = resolve(load_experiment("shakespeare_char_cpu"), 65).model
  rows, by_layer = [], []
  for name, param, layers in walk(config):
    shape = (layers, *param.shape) if name.startswith("blocks/") else param.shape
    sizes = (99.1234, 1.0, 1e-5, 0.001)  # norm, largest, and norms of gradient and update
    rows.append(ParamStats(name, shape, math.prod(shape), *sizes))
    by_layer += [
      ParamStats(f"{name}[{i}]", param.shape, math.prod(param.shape), *sizes) for i in range(layers)
    ]
  for table in (rows, by_layer):
    header, *lines = format_params(table).split("\n")
    names = ["parameter", "shape", "count", "norm", "rms", "largest", "grad", "ratio"]
    assert header.split() == names and len(lines) == len(table) + 1
    assert max(map(len, [header, *lines])) <= 80
    assert lines[-1].split()[2] == f"{99.1234 * math.sqrt(len(table)):.2f}"
    for row, line in zip(table, lines, strict=False):
      assert line.split()[2] == f"{row.count:,}" and line.split()[3] == "99.1234"
      assert line.split()[-2:] == ["1.0e-05", "-5.00"]


def test_what_is_not_given_or_zero_has_no_ratio():
  """Without a config every row of the arrays counts, and the names are sorted."""
  params = {"b": jnp.ones((2, 2)), "a": jnp.zeros(3)}
  a, b = measure_params(params)
  assert (a.name, b.name) == ("a", "b") and (a.count, b.count) == (3, 4)
  assert (b.norm, b.rms, b.largest, b.grad_norm, b.log10_ratio) == (2, 1, 1, None, None)
  a, b = measure_params(params, params, params)
  assert (a.grad_norm, a.log10_ratio) == (0, None) and (b.grad_norm, b.log10_ratio) == (2, 0)
  updates = {"a": jnp.ones(3), "b": jnp.zeros((2, 2))}
  table = format_params(measure_params(params, params, updates)).split("\n")
  assert [line.split()[-1] for line in table] == ["ratio", "n/a", "n/a", "-0.06"]
  a, b = measure_params(params, updates=updates)
  assert (a.log10_ratio, b.log10_ratio) == (None, None) and (a.update_norm, b.update_norm) == (
    pytest.approx(math.sqrt(3)),
    0,
  )
  nan = measure_params({"a": jnp.array([1.0, math.nan])})[0]
  assert math.isnan(nan.norm) and math.isnan(nan.largest)
