"""Losses and gradients that are not finite at chosen steps: `python -m bad_numbers nan@7,8 jgpt.run
--experiment ...`.

`plant` does the same inside a test. Nothing else of the step is touched: what becomes of such
numbers is jgpt's own doing.
"""

import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jgpt.step

# What is multiplied by NaN, infinity, or a number so large that only the norm overflows.
WAYS = {
  "nan": lambda loss, grads, bad: (
    loss * bad(jnp.nan),
    jax.tree.map(lambda g: g * bad(jnp.nan), grads),
  ),
  "infinite loss": lambda loss, grads, bad: (loss * bad(jnp.inf), grads),
  "nan in one gradient": lambda loss, grads, bad: (
    loss,
    change_one(grads, lambda g: g.at[1, 2].multiply(bad(jnp.nan))),
  ),
  "infinite gradient": lambda loss, grads, bad: (
    loss,
    change_one(grads, lambda g: (g + 1e-6) * bad(jnp.inf)),
  ),
  "large gradient": lambda loss, grads, bad: (
    loss,
    change_one(grads, lambda g: g + (bad(2.0) - 1) * 1e30),
  ),
  "loss of 50": lambda loss, grads, bad: (loss + (bad(2.0) - 1) * 50, grads),
}


def change_one(grads: dict, change: Callable[[jax.Array], jax.Array]) -> dict:
  """Gradients of which only the token embedding's is another."""
  return grads | {"tok_embed": change(grads["tok_embed"])}


def plant(put: Callable[[Any, str, Any], None], way: str, steps: Sequence[int]) -> None:
  """Replaces `loss_and_grads`, as a step calls it, by one that returns bad numbers.

  Args:
    put: `monkeypatch.setattr`, or `setattr`.
    way: of `WAYS`.
    steps: as the log counts them: the first update is 1.
  """
  right = jgpt.step.loss_and_grads

  def bad_grads(params, batch, step, experiment, hyper=None):
    is_bad = jnp.isin(step + 1, jnp.array(steps, jnp.int32))
    loss, grads = right(params, batch, step, experiment, hyper)
    return WAYS[way](loss, grads, lambda value: jnp.where(is_bad, value, 1.0))

  put(jgpt.step, "loss_and_grads", bad_grads)


if __name__ == "__main__":
  way, _, steps = sys.argv[1].partition("@")
  plant(setattr, way, [int(step) for step in steps.split(",")])
  sys.argv = sys.argv[2:]
  runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
