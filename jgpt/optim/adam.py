"""Adam's moments, which a skipped update leaves as they are."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Transformation = optax.GradientTransformationExtraArgs
AdamState = optax.ScaleByAdamState


def scale_by_adam(b1: Any, b2: Any, eps: float, select: str = "plain") -> Transformation:
  """Makes `optax.scale_by_adam`, whose state stays as it is where `ok` is False.

  Written out for two reasons. The update is computed from the moments that are kept: with the
  selection outside, XLA computes the new moments once for the state and again for the parameters,
  and a step of `names` took 1.1 times as long at best. And optax computes 1 - b^t in float32, which
  at the first update is 2e-4 too large for a b of 0.9999, and 1.3% for 0.999999.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    select: see `ComputeConfig.select`.
  """

  def update(
    grads: dict, state: AdamState, params: Any = None, *, ok: Any = True, **_: Any
  ) -> tuple[dict, AdamState]:
    mu = jax.tree.map(lambda m, g: average(m, g, b1), state.mu, grads)
    nu = jax.tree.map(lambda v, g: average(v, g * g, b2), state.nu, grads)
    new = AdamState(optax.safe_increment(state.count), mu, nu)
    state = select_in_order(ok, new, state) if select == "ordered" else select_tree(ok, new, state)
    t = jnp.maximum(state.count, 1)  # 0 where the first update is skipped
    c1, c2 = one_minus_power(b1, t), one_minus_power(b2, t)
    return jax.tree.map(lambda m, v: m / c1 / (jnp.sqrt(v / c2) + eps), *state[1:]), state

  return Transformation(optax.scale_by_adam(b1, b2, eps).init, update)


def average(old: jax.Array, new: jax.Array, b: Any) -> jax.Array:
  """Computes b * old + (1 - b) * new.

  What float32 cannot hold of a Python number b is multiplied apart: at 0.999999 it is 1.3% of
  1 - b, by which the average of equal numbers would be too small.

  Args:
    old: float array.
    new: float array of the same shape.
    b: from 0 to below 1; of an array the value that it holds counts.
  """
  rest = b - float(np.asarray(b, old.dtype)) if isinstance(b, float) else 0.0
  return b * old + (rest * old + (1 - b) * new)


def one_minus_power(b: Any, t: Any) -> Any:
  """Computes 1 - b^t as -expm1(t log b), to a relative error below 1e-6 for any t.

  Args:
    b: from 0 to below 1. A Python number counts with all its digits. Of a float32 array the value
      that it holds counts, whose 1 - b is up to 3e-8 / (1 - b) beside that of the number it was
      rounded from: 3e-4 at 0.9999, 3% at 0.999999.
    t: at least 0, at least 1 where b is 0. Python's int; or an int32 scalar for a float32 result,
      int64 for float64.
  """
  log = math.log(max(b, 1e-300)) if isinstance(b, float) else jnp.log1p(b - 1)
  expm1 = math.expm1 if isinstance(t, int) else jnp.expm1
  return -expm1(t / 1 * log)  # t / 1 is float32 of an int32


def select_tree(ok: Any, new: Any, old: Any) -> Any:
  """Returns the new tree where the bool scalar `ok` holds, else the old one, bit by bit."""
  return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


def select_in_order(ok: Any, new: AdamState, old: AdamState) -> AdamState:
  """Computes `select_tree` one parameter after the other.

  Once `ok` is known all leaves are ready, and XLA:CPU hands more than eight ready operations to
  other threads: a step of `names` took 50 us of processor time instead of 31. Each selection
  therefore depends on the second moment before it, which is never negative: a fact that a compiler
  cannot derive from the program. (XLA:CPU drops `optimization_barrier` before it schedules.)
  """
  (mus, structure), nus = jax.tree.flatten(new.mu), jax.tree.leaves(new.nu)
  kept = []
  for m, v, m_old, v_old in zip(mus, nus, *map(jax.tree.leaves, (old.mu, old.nu)), strict=True):
    kept.append((jnp.where(ok, m, m_old), jnp.where(ok, v, v_old)))
    ok &= ~(kept[-1][1].ravel()[0] < 0)
  mu, nu = (jax.tree.unflatten(structure, leaves) for leaves in zip(*kept, strict=True))
  return AdamState(jnp.where(ok, new.count, old.count), mu, nu)
