"""When a run's state is saved, and its best state, held until then.

How a checkpoint is written is in `checkpoint.py`.
"""

from __future__ import annotations

import math
import time

import jax

from jgpt.config import TrainConfig
from jgpt.devices import processes
from jgpt.devices.runtime import has_room
from jgpt.evaluation import HeldoutLoss
from jgpt.runs import manifest
from jgpt.runs.checkpoint import Manager, StepNote, save_checkpoint
from jgpt.runs.log import Call, Log
from jgpt.runs.result import find_best
from jgpt.step import TrainState

# Where there is no room to hold the best state, it is saved at once, but not more often than this.
EVALUATIONS_PER_SAVE = 5


def is_save_due(step: int, train: TrainConfig, seconds: float) -> bool:
  """Returns whether a checkpoint is due after a step, `seconds` after the one before."""
  by_steps = train.save_every and step % train.save_every == 0
  by_clock = train.save_every_seconds is not None and seconds >= train.save_every_seconds
  return bool(by_steps or by_clock)


class Saver:
  """Saves a run's states when they are due.

  With `train.keep_best` it also holds a copy of the state with the lowest held-out loss, which is
  saved together with the next state that is due, or the last.

  Every process of a run has one, and all of them decide alike: by the lead's clock and its disk,
  and by the memory of the process that has the least.
  """

  def __init__(self, manager: Manager | None, log: Log, train: TrainConfig):
    """Reads the held-out losses of the checkpoints that are there.

    Args:
      manager: from `open_checkpoints`; None saves nothing.
      log: of this start.
      train: says when a save is due.
    """
    self._manager, self._log, self._train = manager, log, train
    self._last_save = time.monotonic()
    self._held: tuple[TrainState, StepNote] | None = None
    self._evaluations = EVALUATIONS_PER_SAVE  # since a best state was saved at once
    self.saved: dict[int, HeldoutLoss] = {}
    if manager is not None:
      rated = processes.on_lead("the checkpoints' losses", lambda: _list_rated(manager))
      self.saved = {step: HeldoutLoss(*loss) for step, loss in rated}

  def wait(self) -> None:
    """Waits until every save is on disk; see `Manager.wait`."""
    if self._manager is not None:
      self._manager.wait()

  def find_best_saved(self) -> tuple[int, HeldoutLoss] | None:
    """Finds the saved step of the lowest loss, over the same targets as the last evaluation."""
    if self._manager is None:
      return None
    saved = [(step, self.saved[step]) for step in self._manager.steps if step in self.saved]
    if last := self._log.list_evaluations()[-1:]:
      saved = [e for e in saved if e[1].targets == last[0][1].targets]
    return find_best(saved)

  def needs(self, call: Call) -> bool:
    """Returns whether the state after a call is to be passed to `keep` before the next call."""
    if self._manager is None:
      return False
    is_rated = call.evaluation is not None and call.step > 0 and self._train.keep_best > 0
    return is_rated or self._is_due(call.step)

  def _is_due(self, step: int) -> bool:
    seconds = time.monotonic() - self._last_save
    if self._train.save_every_seconds is not None:
      seconds = processes.decide("the time of a save", seconds)
    return is_save_due(step, self._train, seconds)

  def keep(self, state: TrainState, step: int) -> None:
    """Saves a state if it is due; otherwise holds it if it is the best so far.

    Args:
      state: consumed by no call yet.
      step: updates so far, all of them in the log.
    """
    if self._is_due(step):
      self.save(state, step)
      self._last_save = time.monotonic()
      return
    heldout = self._log.find_heldout_loss(step)
    if heldout is None or not self._train.keep_best:
      return
    self._evaluations += 1
    if not self._is_best(heldout):
      return
    self._held = None  # its memory is free before the copy is made
    if all(processes.together("the free memory", lambda: has_room(state))):
      copy = jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), state)
      self._held = copy, StepNote(step, self._log.count_seen(step), heldout)
    elif self._evaluations >= EVALUATIONS_PER_SAVE:
      self._evaluations = 0
      self.save(state, step)
    self._log.clock.look("saving")

  def _is_best(self, heldout: HeldoutLoss) -> bool:
    """Returns whether a loss is below all that are saved or held and over the same targets."""
    others = [*self.saved.values(), *([self._held[1].heldout] if self._held else [])]
    lowest = min((o.loss for o in others if o.targets == heldout.targets), default=math.inf)
    return heldout.loss < lowest

  def save(self, state: TrainState, step: int) -> None:
    """Starts to save a state, and then the held one, unless the state is better.

    Raises:
      TrainingError: see `save_checkpoint`.
    """
    if self._manager is None:
      return
    self._log.sync()  # the rows up to here are on disk before the checkpoint
    held, self._held = self._held, None
    note = StepNote(step, self._log.count_seen(step), self._log.find_heldout_loss(step))
    save_checkpoint(self._manager, state, note)
    if note.heldout is not None and math.isfinite(note.heldout.loss):
      self.saved[step] = note.heldout
    if held is not None and (self._train.keep_best > 1 or self._is_best(held[1].heldout)):
      save_checkpoint(self._manager, *held, is_held=True)
      self.saved[held[1].step] = held[1].heldout
    self._log.clock.look("saving")


def _list_rated(manager: Manager) -> list[tuple[int, HeldoutLoss]]:
  """Lists (step, held-out loss) of the checkpoints whose manifests have a loss."""
  found = manifest.read_manifests(manager.folder.parent)
  return [(n, HeldoutLoss(m.heldout_loss, *m.targets)) for n, m in found.items() if m.is_rated]
