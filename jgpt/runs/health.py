"""What a run's numbers say while it trains: skipped updates, spikes of the loss, and which array is not finite.

Responsible for the host's look at the metrics that steps return, and for finding out afterwards why an update was skipped.
Not responsible for skipping it (`step.py`), for saying what is found, nor for stopping (`train.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jgpt import sharding
from jgpt.batches import Corpus, make_batch_fn
from jgpt.config import Experiment
from jgpt.devices.compute import choose_tricks
from jgpt.optim import DECAY, LossStats, z_score
from jgpt.runs.digest import name_leaves
from jgpt.step import TrainState, dropout_key

MEMORY = 2000  # losses of earlier starts that are looked at: those before them weigh less than 2e-9


class Health:
  """Watches the metrics of a run as they come.

  Attributes:
    skipped: updates skipped since the run first began.
    exhausted: where `max_consecutive_skips` updates in a row were skipped, the step of the first of them; else None. Only
      an update given to `observe` can bring it about, so that a run that goes on gets one more try.
  """

  def __init__(self, rows: Sequence[dict], max_consecutive_skips: int):
    """Begins where earlier starts of the run ended.

    Args:
      rows: of metrics.jsonl, in order; those of evaluations alone may be among them.
      max_consecutive_skips: see `TrainConfig`.
    """
    rows = [row for row in rows if "train/loss" in row]
    self._max_consecutive_skips = max_consecutive_skips
    self._since: int | None = None  # the first step of the present series of skipped updates
    for row in rows:
      self._since = (self._since or row["step"]) if row.get("train/skipped") else None
    self.skipped = sum(bool(row.get("train/skipped")) for row in rows)
    self.exhausted: int | None = None
    losses = np.array([row["train/loss"] for row in rows[-MEMORY:]], np.float64)
    self._stats = z_scores(LossStats(), losses[np.isfinite(losses)])[-1]

  @property
  def is_skipping(self) -> bool:
    """Whether the last update was skipped."""
    return self._since is not None

  def observe(self, step: int, metrics: dict[str, np.ndarray]) -> list[str]:
    """Takes consecutive updates into account, one or a thousand; what is healthy takes 0.1 ms.

    Args:
      step: of the last of them; the first update of a run is step 1.
      metrics: as `train_step` names them, arrays [n], n at least 1.

    Returns:
      Lines to print, three at most: the first spike, the first skipped update and how many more there are of each, and
      where a series of skipped updates ended that an earlier line told of.
    """
    losses, skipped = np.asarray(metrics["train/loss"], np.float64), np.asarray(metrics["train/skipped"]) != 0
    finite, first = np.isfinite(losses), step - len(losses) + 1
    zs, means = np.zeros(len(losses)), np.zeros(len(losses))
    zs[finite], means[finite], self._stats = z_scores(self._stats, losses[finite])

    def describe(i: int) -> str:
      if not finite[i]:
        return f"the loss is {losses[i]}"
      if not np.isfinite(norm := metrics["train/grad_norm"][i]):
        return f"the norm of the gradient is {norm}"
      return f"loss {losses[i]:.5g} is a spike, z = {zs[i]:.3g} (mean {means[i]:.3g} before it)"

    lines = []
    spikes = np.flatnonzero((zs > SPIKE) & ~skipped)
    if len(spikes):
      lines.append(f"step {first + spikes[0]}: {describe(spikes[0])}{_count_more(spikes, first)}")
    if skipped.any() or self._since is not None:
      told = self._since
      begins = self._follow(first, skipped)
      if told is not None and self._since != told:
        ended = first + int(np.argmin(skipped))
        lines.append(f"step {ended}: parameters are updated again, after {ended - told} updates skipped in a row")
      if len(begins):
        rest = np.flatnonzero(skipped)
        rest = rest[rest >= begins[0]]
        lines.append(f"step {first + rest[0]}: {describe(rest[0])}: the update is skipped{_count_more(rest, first)}")
    return lines

  def _follow(self, first: int, skipped: np.ndarray) -> np.ndarray:
    """Counts skipped updates and how many there are in a row; returns where series begin."""
    before = np.concatenate([[self._since is not None], skipped[:-1]])
    begins, ends = np.flatnonzero(skipped & ~before), np.flatnonzero(~skipped & before)
    firsts = [self._since] * int(before[0]) + [first + int(i) for i in begins]
    stops = [first + int(i) for i in ends] + [first + len(skipped)] * int(skipped[-1])
    for since, stop in zip(firsts, stops, strict=True):
      if stop > first and stop - since >= self._max_consecutive_skips:
        self.exhausted = self.exhausted or since
    self._since = firsts[-1] if skipped[-1] else None
    self.skipped += int(skipped.sum())
    return begins


def _count_more(places: np.ndarray, first: int) -> str:
  """How many come after the first, as the end of a line; "" for none."""
  return f", and {len(places) - 1} more up to step {first + places[-1]}" if len(places) > 1 else ""


def find_nonfinite(tree: Any) -> list[str]:
  """The leaves of a tree that hold NaN or infinity, by name: "blocks/w_qkv"; where layers are a list "blocks/0/w_qkv"."""
  return _name_nonfinite(jax.jit(_are_finite)(tree))


def _are_finite(tree: Any) -> Any:
  return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree)


def _name_nonfinite(are_finite: Any) -> list[str]:
  return [name for name, is_finite in name_leaves(jax.device_get(are_finite)).items() if not is_finite]


def explain(experiment: Experiment, state: TrainState, corpus: Corpus, step: int) -> str:
  """Says why an update was skipped, by computing its loss and gradients again at the present parameters.

  They are those it had if every update since was skipped too. Where a run has several processes, all of them must call.

  Args:
    experiment: resolved.
    state: blocks stacked or a list.
    corpus: that of the update's batch, `feed.corpus_at(step - 1)`.
    step: of the update, as the log counts: the first of a run is 1.

  Returns:
    "the update of step 812 was skipped: its loss is nan; not finite: gradients of tok_embed, unembed": no full stop.
  """
  model, train = experiment.model, experiment.train
  mesh = sharding.make_mesh(experiment, jax.devices())
  tricks = choose_tricks(experiment, mesh.devices.flat[0].platform)
  rows = sharding.batch_sharding(mesh)

  def compute(params: dict, corpus: Corpus, number: jax.Array) -> tuple[jax.Array, jax.Array, Any, Any]:
    batch = make_batch_fn(experiment.data, train.seed)(corpus, number)
    batch = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows), batch)
    key = dropout_key(train.seed, number, model)
    loss, grads = tricks.grads_fn(params, batch, model, key, train.micro_batch_size)
    return loss, optax.tree.norm(grads), _are_finite(params), _are_finite(grads)

  program = jax.jit(compute, compiler_options=tricks.step_options)
  loss, norm, *finite = jax.device_get(program(state.params, corpus, np.int32(step - 1)))
  params, grads = map(_name_nonfinite, finite)
  begin = f"the update of step {step} was skipped: its loss is {loss:.5g}"
  if params:
    return f"{begin}; not finite: the parameters {_list(params)}"
  if grads:
    return f"{begin}; not finite: gradients of {_list(grads)}"
  if not math.isfinite(norm):
    return f"{begin}; every gradient is finite, but their norm is too large for float32"
  if experiment.optimizer.skip_spikes is not None:
    return f"{begin}, a spike; loss and gradients are finite"
  return f"{begin}; loss and gradients are finite now"


def _list(names: Sequence[str]) -> str:
  """The first three names, and how many more."""
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


SPIKE = 7.0  # the z-score above which a loss is logged as a spike


def z_scores(stats: LossStats, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, LossStats]:
  """`z_score` and `observe` of many losses, one after the other, but computed at once.

  Args:
    stats: of the losses before them, Python numbers.
    losses: finite, [n].

  Returns:
    float64 [n]: the z-scores, and the mean before each; and the statistics after all.
  """
  zs, means = np.zeros(len(losses)), np.zeros(len(losses))
  for begin in range(0, len(losses), 1024):
    part = slice(begin, begin + 1024)  # DECAY^-1024 is 3e4: 16 digits are enough
    zs[part], means[part], stats = _z_scores_of_part(stats, losses[part].astype(np.float64))
  return zs, means, stats


def _z_scores_of_part(stats: LossStats, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, LossStats]:
  n = np.arange(len(losses) + 1)
  decay = DECAY**n
  before = (1 - DECAY**stats.count) / (1 - DECAY)  # the weights' sum
  centre = stats.mean if stats.count else float(losses[0])
  rises = losses - centre  # so that squares lose no digits
  weights, firsts, seconds = (
    decay * (start + np.concatenate([[0.0], np.cumsum(values / decay[1:])]))
    for start, values in (
      (before, np.ones(len(losses))),
      (0.0, rises),
      (before * stats.variance, rises * rises),
    )
  )
  weights[0] = weights[0] or 1.0  # nothing was observed
  shifts = firsts / weights
  means, variances = centre + shifts, np.maximum(0.0, seconds / weights - shifts * shifts)
  means[0], variances[0] = stats.mean, stats.variance
  known = LossStats(stats.count + n[:-1], means[:-1], variances[:-1])
  return z_score(known, losses), means[:-1], LossStats(stats.count + len(losses), float(means[-1]), float(variances[-1]))
