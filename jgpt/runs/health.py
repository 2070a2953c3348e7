"""Watching a run's numbers: skipped updates, spikes of the loss, and arrays that are not finite.

Reads the metrics that steps return, and finds out afterwards why an update was skipped. The update
is skipped in `step.py`; printing and stopping are in `log.py` and `train.py`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jgpt import batches, sharding
from jgpt.batches import Corpus
from jgpt.config import Experiment
from jgpt.devices.compute import choose_step_options
from jgpt.optim.spikes import STATS_DECAY, LossStats, z_score
from jgpt.runs.digest import name_leaves
from jgpt.step import TrainState, loss_and_grads

SPIKE = 7.0  # the z-score above which a loss is reported as a spike
FEW_SEQUENCES = 8  # the loss of a smaller batch scatters as its sequences do
BESIDE_SPIKE = 3.0  # of so few, the z-score that the loss before or after a spike has at least
MAX_EARLIER_LOSSES = 2000  # of earlier starts; those before them have weights below 2e-9


class Health:
  """Statistics of a run's losses and skipped updates, updated with every compiled call.

  Attributes:
    skipped: updates skipped since the run first began.
    stats: of the finite losses so far.
    exhausted: once `max_consecutive_skips` updates in a row were skipped, the step of the first of
      them; else None. Rows of earlier starts do not set it, so that a resumed run gets one more
      try.
  """

  def __init__(
    self, rows: Sequence[dict], max_consecutive_skips: int, batch_size: int = FEW_SEQUENCES
  ):
    """Initialises the statistics from earlier starts of the run.

    Args:
      rows: of metrics.jsonl, in order; rows of evaluations are ignored.
      max_consecutive_skips: see `TrainConfig`.
      batch_size: sequences that a loss is the mean of. Of fewer than `FEW_SEQUENCES` a single high
        loss is reported as no spike: it is one odd sequence, and the next batch has another.
    """
    rows = [row for row in rows if "train/loss" in row]
    self._max_consecutive_skips = max_consecutive_skips
    self._since: int | None = None  # the first step of the present series of skipped updates
    for row in rows:
      self._since = (self._since or row["step"]) if row.get("train/skipped") else None
    self.skipped = sum(bool(row.get("train/skipped")) for row in rows)
    self.exhausted: int | None = None
    losses = np.array([row["train/loss"] for row in rows[-MAX_EARLIER_LOSSES:]], np.float64)
    zs, _, self.stats = compute_z_scores(LossStats(), losses[np.isfinite(losses)])
    self._has_few, self._last_z = batch_size < FEW_SEQUENCES, float(zs[-1]) if len(zs) else 0.0

  @property
  def is_skipping(self) -> bool:
    """Returns whether the last update was skipped."""
    return self._since is not None

  def observe(self, step: int, metrics: dict[str, np.ndarray]) -> list[str]:
    """Adds consecutive updates to the statistics; takes 0.1 ms where there is nothing to report.

    Args:
      step: of the last of them; the first update of a run is step 1.
      metrics: as `train_step` names them, arrays [n], n at least 1.

    Returns:
      Lines to print, at most three: the first spike and the number of further ones, the first
      skipped update and the number of further ones, and the end of a series of skipped updates that
      an earlier call reported.
    """
    losses = np.asarray(metrics["train/loss"], np.float64)
    skipped = np.asarray(metrics["train/skipped"]) != 0
    finite, first = np.isfinite(losses), step - len(losses) + 1
    zs, means = np.zeros(len(losses)), np.zeros(len(losses))
    zs[finite], means[finite], self.stats = compute_z_scores(self.stats, losses[finite])

    def describe(i: int) -> str:
      if not finite[i]:
        return f"the loss is {losses[i]}"
      if not np.isfinite(norm := metrics["train/grad_norm"][i]):
        return f"the norm of the gradient is {norm}"
      return f"loss {losses[i]:.5g} is a spike, z = {zs[i]:.3g} (mean {means[i]:.3g} before it)"

    lines = []
    earlier = np.concatenate([[self._last_z], zs[:-1]])
    is_spike = zs > SPIKE
    if (
      self._has_few
    ):  # the second of two losses in a row shows that it was not the first's sequence
      is_spike = (np.maximum(zs, earlier) > SPIKE) & (np.minimum(zs, earlier) > BESIDE_SPIKE)
    self._last_z = float(zs[-1])
    spikes = np.flatnonzero(is_spike & ~skipped)
    if len(spikes):
      more = _describe_more(spikes, first)
      lines.append(f"step {first + spikes[0]}: {describe(spikes[0])}{more}")
    if skipped.any() or self._since is not None:
      before = self._since
      begins = self._count_skipped(first, skipped)
      if before is not None and self._since != before:
        ended = first + int(np.argmin(skipped))
        lines.append(
          f"step {ended}: parameters are updated again, after {ended - before} updates skipped in "
          "a row"
        )
      if len(begins):
        rest = np.flatnonzero(skipped)
        rest = rest[rest >= begins[0]]
        more = _describe_more(rest, first)
        lines.append(f"step {first + rest[0]}: {describe(rest[0])}: the update is skipped{more}")
    return lines

  def _count_skipped(self, first: int, skipped: np.ndarray) -> np.ndarray:
    """Counts skipped updates and the length of each series of them.

    Args:
      first: step of the first update.
      skipped: bool [n].

    Returns:
      The indices at which series begin.
    """
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


def _describe_more(places: np.ndarray, first: int) -> str:
  """Describes how many places follow the first, as the end of a line; "" for none."""
  return f", and {len(places) - 1} more up to step {first + places[-1]}" if len(places) > 1 else ""


def find_nonfinite(tree: Any) -> list[str]:
  """Finds the leaves of a tree that hold NaN or infinity.

  Returns:
    Their names, as "blocks/w_qkv", or "blocks/0/w_qkv" where layers are a list.
  """
  return _name_nonfinite(jax.jit(_are_finite)(tree))


def _are_finite(tree: Any) -> Any:
  return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree)


def _name_nonfinite(are_finite: Any) -> list[str]:
  return [
    name for name, is_finite in name_leaves(jax.device_get(are_finite)).items() if not is_finite
  ]


def explain_skip(experiment: Experiment, state: TrainState, corpus: Corpus, step: int) -> str:
  """Describes why an update was skipped, by computing its loss and gradients again.

  They are computed at the present parameters, which are those of the update if every update since
  was skipped too. Where a run has several processes, all of them must call.

  Args:
    experiment: from `resolve_compute`.
    state: blocks stacked or a list.
    corpus: that of the update's batch, `feed.corpus_at(step - 1)`.
    step: of the update, as the log counts: the first of a run is 1.

  Returns:
    For example "the update of step 812 was skipped: its loss is nan; not finite: gradients of
    tok_embed, unembed", without a full stop.
  """

  def compute(params: dict, corpus: Corpus, step: jax.Array) -> tuple:
    batch = batches.batch(corpus, step, experiment)
    loss, grads = loss_and_grads(params, batch, step, experiment)
    return loss, optax.tree.norm(grads), _are_finite(params), _are_finite(grads)

  whole = sharding.beside(state.params)  # so that every process can read all of it
  options = choose_step_options(experiment)
  program = jax.jit(compute, out_shardings=whole, compiler_options=options)
  with sharding.use_mesh(state.params):
    count = sharding.place(np.int32(step - 1), whole)
    found = program(state.params, corpus, count)
  loss, norm, *finite = jax.device_get(found)
  params, grads = map(_name_nonfinite, finite)
  begin = f"the update of step {step} was skipped: its loss is {loss:.5g}"
  if params:
    return f"{begin}; not finite: the parameters {_join_names(params)}"
  if grads:
    return f"{begin}; not finite: gradients of {_join_names(grads)}"
  if not math.isfinite(norm):
    return f"{begin}; every gradient is finite, but their norm is too large for float32"
  if experiment.optimizer.skip_spikes is not None:
    return f"{begin}, a spike; loss and gradients are finite"
  return f"{begin}; loss and gradients are finite now"


def explain_stop(
  experiment: Experiment, state: TrainState, corpus: Corpus, health: Health, workdir: Path | None
) -> str:
  """Explains why training stops after a series of skipped updates, what is kept, what to try.

  Args:
    experiment: from `resolve_compute`.
    state: after the series; saved where there is a run folder.
    corpus: of the batch of the first update of the series.
    health: with `exhausted` set.
    workdir: the run folder, or None.
  """
  step, kept, advice = int(jax.device_get(state.step)), "Nothing was kept", ""
  if workdir is not None:
    last = "of the last good update" if health.is_skipping else "of the good updates that followed"
    kept = f"The parameters {last} are saved as checkpoint {step} in {workdir}"
    source = shlex.quote(f"{workdir}/checkpoints/{step}")
    advice = f", in another --workdir with --continue-from {source}"
  words = explain_skip(experiment, state, corpus, health.exhausted)
  lower = experiment.optimizer.peak_lr / 10
  return f"{words}. {kept}. Try a lower rate, --set optimizer.peak_lr={lower:g}{advice}"


def _join_names(names: Sequence[str]) -> str:
  """Joins the first three names and how many more there are."""
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def compute_z_scores(
  stats: LossStats, losses: np.ndarray
) -> tuple[np.ndarray, np.ndarray, LossStats]:
  """Computes `optim.z_score` and `optim.observe` of consecutive losses, vectorised.

  Args:
    stats: of the losses before them, Python numbers.
    losses: finite, [n].

  Returns:
    float64 [n]: the z-scores, and the mean before each loss; and the statistics after all.
  """
  zs, means = np.zeros(len(losses)), np.zeros(len(losses))
  for begin in range(0, len(losses), 1024):
    part = slice(begin, begin + 1024)  # STATS_DECAY^-1024 is 3e4: 16 digits are enough
    zs[part], means[part], stats = _z_scores_of_part(stats, losses[part].astype(np.float64))
  return zs, means, stats


def _z_scores_of_part(
  stats: LossStats, losses: np.ndarray
) -> tuple[np.ndarray, np.ndarray, LossStats]:
  n = np.arange(len(losses) + 1)
  decay = STATS_DECAY**n
  before = (1 - STATS_DECAY**stats.count) / (1 - STATS_DECAY)  # the weights' sum
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
  return (
    z_score(known, losses),
    means[:-1],
    LossStats(stats.count + len(losses), float(means[-1]), float(variances[-1])),
  )
