"""When the host looks at a run.

Responsible for the steps at which compiled calls end, because something is due then, and for whether a checkpoint is. No
bit of the training depends on any of it. Pure. Not responsible for what is done at those steps (`train.py`).
"""

from jgpt.config import TrainConfig
from jgpt.program import MAX_STEPS_PER_CALL

SECONDS_PER_CALL = 8.0  # of training between two looks at signals and the clock; two calls may be under way


def next_stop(step: int, train: TrainConfig, epoch_steps: int | None = None, block_steps: int | None = None) -> int:
  """The step at which the host looks next: after the first update, where something is due, or at the end.

  Args:
    step: updates that are done.
    train: says when what is due; `steps` resolved.
    epoch_steps: updates in an epoch, where the run is counted in epochs.
    block_steps: the corpus is on the devices up to the next multiple of this only; None for all of it.
  """
  if step == 0:
    return min(1, train.steps)
  stops = [train.steps, step + MAX_STEPS_PER_CALL, next_line(step, train.log_every, epoch_steps)]
  stops += [(step // p + 1) * p for p in (train.save_every, train.eval_every, train.sample_every, block_steps) if p]
  return min(stops)


def next_line(step: int, log_every: int, epoch_steps: int | None) -> int:
  """The first step after `step` at which a line of progress is due; in epochs the steps of each are counted anew."""
  if epoch_steps is None:
    return (step // log_every + 1) * log_every
  begin = step // epoch_steps * epoch_steps
  return min(begin + epoch_steps, begin + ((step - begin) // log_every + 1) * log_every)


def is_save_due(step: int, train: TrainConfig, seconds: float) -> bool:
  """Whether a checkpoint is due after a step, `seconds` after the one before."""
  by_steps = train.save_every and step % train.save_every == 0
  return bool(by_steps or (train.save_every_seconds is not None and seconds >= train.save_every_seconds))
