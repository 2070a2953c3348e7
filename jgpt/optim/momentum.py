"""SGD's momentum, which a skipped update leaves as it is."""

from typing import Any

import optax

from jgpt.optim.adam import Transformation, select_tree


def accumulate(momentum: float) -> Transformation:
  """Makes `optax.trace`, m = momentum * m + g, whose state stays as it is where `ok` is False.

  The update is the m that is kept, as in `scale_by_adam`.

  Args:
    momentum: from 0 to below 1; at 0 there is no m, and the update is the gradient.

  Source: Polyak 1964, "Some methods of speeding up the convergence of iteration methods", equation
  9, with m scaled as in torch.optim.SGD.
  """
  if not momentum:
    return optax.with_extra_args_support(optax.identity())
  trace = optax.trace(momentum)

  def update(
    grads: dict, state: optax.TraceState, params: Any = None, *, ok: Any = True, **_: Any
  ) -> tuple[dict, optax.TraceState]:
    state = select_tree(ok, trace.update(grads, state)[1], state)
    return state.trace, state

  return Transformation(trace.init, update)
