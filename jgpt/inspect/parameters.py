"""The size of each parameter, of its gradient and of its update, as tables and pictures show them.

Computed on the device in one call, so that a training loop can measure every update. Pure; the
table is printed by `cli.py`.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jgpt.config import ModelConfig
from jgpt.params import Param, walk
from jgpt.report.tables import format_table

BLOCKS = "blocks/"  # begins the names of parameters that each layer has


@dataclasses.dataclass(frozen=True)
class ParamStats:
  """The size of one parameter.

  Attributes:
    name: "tok_embed", or "blocks/w_up"; of one layer alone "blocks/w_up[3]".
    shape: of the entries that are learned; over all layers the layer comes first. Empty of a total.
    count: of these entries.
    norm: sqrt(sum of squares).
    largest: absolute value of the entry that is farthest from 0.
    grad_norm: norm of its gradient; None where that was not given.
    update_norm: norm of its update; None where that was not given.
  """

  name: str
  shape: tuple[int, ...]
  count: int
  norm: float
  largest: float
  grad_norm: float | None = None
  update_norm: float | None = None

  @property
  def rms(self) -> float:
    """Returns sqrt(mean of squares)."""
    return self.norm / math.sqrt(self.count)

  @property
  def log10_ratio(self) -> float | None:
    """Returns log10(rms of the update / rms of the parameter).

    None where the update was not given, or one of the two is 0.
    """
    if self.update_norm is None or self.update_norm == 0 or self.norm == 0:
      return None
    return math.log10(self.update_norm) - math.log10(self.norm)


def measure_params(
  params: dict,
  grads: dict | None = None,
  updates: dict | None = None,
  config: ModelConfig | None = None,
) -> list[ParamStats]:
  """Measures each parameter, of all layers together.

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    grads: shaped like `params`; None measures none.
    updates: what an update adds to the parameters, shaped like them; None measures none.
    config: of the network, with `vocab_size` resolved: it declares each parameter; its padding is
      not counted, and rows come in the order of `param_table`. None counts every row of the arrays,
      and sorts by name.

  Returns:
    One row for each parameter.

  Example:
    >>> run = jgpt.open_run("runs/names")
    >>> for row in measure_params(run.params):
    ...   print(row.name, row.shape, row.rms)
  """
  layers = measure_layers(params, grads, updates, config)
  by_name: dict[str, list[ParamStats]] = {}
  for row in layers:
    by_name.setdefault(_name_of(row), []).append(row)
  return [
    dataclasses.replace(sum_stats(rows, name), shape=(len(rows), *rows[0].shape))
    if name.startswith(BLOCKS)
    else rows[0]
    for name, rows in by_name.items()
  ]


def measure_layers(
  params: dict,
  grads: dict | None = None,
  updates: dict | None = None,
  config: ModelConfig | None = None,
) -> list[ParamStats]:
  """Measures each parameter, in blocks that of each layer by itself.

  Arguments are those of `measure_params`.

  Returns:
    One row for each parameter outside of blocks, and one for each layer of those in blocks; the
    layers of a parameter follow each other.
  """
  sizes = jax.device_get(_compute_sizes(params, grads, updates))
  declared = {} if config is None else {name: param for name, param, _ in walk(config)}
  order = {name: i for i, name in enumerate(declared)}
  rows = [
    _make_row(name, layer, shape, declared.get(name), numbers)
    for ((name, layer), shape), numbers in zip(_list_shapes(params).items(), sizes.T, strict=True)
  ]
  return sorted(rows, key=lambda row: order[_name_of(row)]) if order else rows


def sum_stats(rows: Sequence[ParamStats], name: str = "total") -> ParamStats:
  """Returns the size of several parameters taken as one vector.

  Args:
    rows: at least one; all with a gradient or none, and likewise for updates.
    name: of the result.
  """

  def join(norms: Sequence[float | None]) -> float | None:
    return None if None in norms else math.hypot(*norms)

  return ParamStats(
    name,
    (),
    sum(row.count for row in rows),
    math.hypot(*(row.norm for row in rows)),
    max(row.largest for row in rows),
    join([row.grad_norm for row in rows]),
    join([row.update_norm for row in rows]),
  )


def format_params(rows: Sequence[ParamStats]) -> str:
  """Formats a table with a row for each parameter and one for all of them.

  It is narrow, one blank between columns: 80 characters hold `shakespeare_char_cpu`.

  Args:
    rows: at least one; columns of gradients and updates are there where these were given.
  """
  rows = [*rows, sum_stats(rows)]
  header = ["parameter", "shape", "count", "norm", "rms", "largest"]
  extra = [] if rows[0].grad_norm is None else ["grad", "ratio"]
  cells = [
    [
      row.name,
      "×".join(map(str, row.shape)),
      f"{row.count:,}",
      *(_format_size(x) for x in (row.norm, row.rms, row.largest)),
      *([_format_size(row.grad_norm), _format_ratio(row)] if extra else []),
    ]
    for row in rows
  ]
  return format_table([header + extra, *cells], ["left", "left", *["right"] * (4 + len(extra))], 1)


def _format_size(x: float) -> str:
  """Formats a number in about seven characters, so that a column is narrow and easy to compare."""
  if x and not 0.001 <= abs(x) < 10_000:
    return f"{x:.1e}"
  return f"{x:.4f}" if abs(x) < 100 else f"{x:.2f}"


def _format_ratio(row: ParamStats) -> str:
  return "n/a" if row.log10_ratio is None else f"{row.log10_ratio:.2f}"


def _name_of(row: ParamStats) -> str:
  return row.name.partition("[")[0]


def _make_row(
  name: str, layer: int, shape: tuple[int, ...], param: Param | None, numbers: np.ndarray
) -> ParamStats:
  """Makes the row of one parameter in one layer from its numbers, those of `_compute_sizes`."""
  shape = (shape[0] - (param.padding if param else 0), *shape[1:])
  norm, largest, grad_norm, update_norm = (None if x < 0 else float(x) for x in numbers)
  name = f"{name}[{layer}]" if name.startswith(BLOCKS) else name
  return ParamStats(name, shape, math.prod(shape), norm, largest, grad_norm, update_norm)


@jax.jit
def _compute_sizes(params: dict, grads: dict | None, updates: dict | None) -> jax.Array:
  """Computes norm, largest entry, norm of the gradient and norm of the update, -1 where not given.

  Returns:
    [4, parameters and layers], in the order of `_list_shapes`: one array, which is one transfer.
  """
  leaves = _list_leaves(params)
  rows = [[_compute_norm(x) for x in leaves], [jnp.max(jnp.abs(x)) for x in leaves]]
  for tree in (grads, updates):
    given = [_compute_norm(x) for x in _list_leaves(tree)] if tree is not None else None
    rows.append(given or [jnp.float32(-1)] * len(leaves))
  return jnp.stack([jnp.stack(row) for row in rows])


def _compute_norm(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return jnp.sqrt(jnp.sum(jnp.square(x)))


def _list_shapes(tree: dict) -> dict[tuple[str, int], tuple[int, ...]]:
  """Returns each parameter's shape by its name and layer, sorted by these."""
  found = {}
  for name, value in tree.items():
    if name != "blocks":
      found[name, 0] = value.shape
    elif isinstance(value, dict):
      for inner, x in value.items():
        found |= {(BLOCKS + inner, i): x.shape[1:] for i in range(x.shape[0])}
    else:
      for i, layer in enumerate(value):
        found |= {(BLOCKS + inner, i): x.shape for inner, x in layer.items()}
  return dict(sorted(found.items()))


def _list_leaves(tree: dict) -> list[jax.Array]:
  """Returns each parameter's array, one for each layer, in the order of `_list_shapes`."""
  leaves = []
  for name, layer in _list_shapes(tree):
    group, _, inner = name.rpartition("/")
    if not group:
      leaves.append(tree[name])
    else:
      blocks = tree[group]
      leaves.append(blocks[inner][layer] if isinstance(blocks, dict) else blocks[layer][inner])
  return leaves
