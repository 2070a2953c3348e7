"""The host loop: the one place where time, files and printing meet the compiled step.

Responsible for planning a run (its data, its resolved settings, its mesh), and for running it: restoring or initialising
the state, calling `train_steps`, handing metrics to writers one call late, saving, stopping on a signal. Everything that
is computed is in the pure files it calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

import jgpt
from jgpt import checkpoint, runtime, sharding
from jgpt.batches import Corpus, count_epoch_steps
from jgpt.checks import UserError
from jgpt.config import Experiment
from jgpt.data import Data, check_path, find_data
from jgpt.generate import begin_texts
from jgpt.keys import SAMPLE, derive_key
from jgpt.metrics import Chunk, Clock, JsonlWriter, Writer, read_jsonl
from jgpt.model import stack_blocks
from jgpt.program import MAX_STEPS_PER_CALL, Program, begin_evaluation, compile_program
from jgpt.settings import change, differences, is_circumstance, resolve, settings
from jgpt.signals import say, stop_signals
from jgpt.step import TrainState
from jgpt.tokenizer import Tokenizer
from jgpt.weights import (
  InitialParams,
  load_params,
  open_weights,
  refuse_other_tokenizer,
  refuse_other_vocabulary,
  require_same,
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run that is about to begin or go on; nothing is on a device yet.

  Attributes:
    name: of the experiment.
    experiment: resolved.
    data: loaded.
    workdir: the run folder, or None to leave nothing on disk.
    start_step: updates that the folder's newest checkpoint holds; 0 without any.
    epoch_steps: updates in an epoch, where the run is counted in epochs.
    initial: the parameters to begin from; None draws them, or restores a checkpoint.
    weights: where the weights that it begins from, or began from, were found: location, sha256; None where they are drawn.
  """

  name: str
  experiment: Experiment
  data: Data
  workdir: Path | None
  start_step: int
  epoch_steps: int | None
  initial: InitialParams | None = None
  weights: dict[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run came to.

  Attributes:
    state: after the last update; its blocks are stacked or a list, whichever the run used.
    losses: training loss of each update since the run first began, nats per token, float32.
    heldout_losses: (updates, loss in nats per token) of each evaluation since the run first began.
    heldout_loss: nats per token over the whole held-out part; None where nothing is held out or the run was interrupted.
    heldout_tokens: how many tokens that is over.
    tokenizer: of the run.
    experiment: resolved.
    signal: the signal that ended the run early, or None.
  """

  state: TrainState
  losses: np.ndarray
  heldout_losses: list[tuple[int, float]]
  heldout_loss: float | None
  heldout_tokens: int
  tokenizer: Tokenizer
  experiment: Experiment
  signal: int | None

  @property
  def params(self) -> dict:
    """The parameters after the last update, as `init_params` returns them."""
    return stack_blocks(self.state.params)


def plan(
  experiment: Experiment,
  *,
  workdir: str | Path | None = None,
  name: str = "",
  report: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
  """Decides what a run will be, without touching a device.

  Args:
    experiment: may leave open what `settings.resolve` fills in.
    workdir: where the run is kept. A folder that holds the same run is resumed, with the data recorded there.
    name: of the experiment, to be recorded.
    report: told the bytes that are there and the bytes in all while weights to begin from are downloaded.

  Raises:
    UserError: if the settings, the data, the weights to begin from or the folder do not go together.
  """
  workdir = Path(workdir) if workdir is not None else None
  recorded = None
  if workdir is not None and (workdir / "experiment.json").exists():
    recorded = checkpoint.read_run_files(workdir)
    experiment = inherit(experiment, recorded)
    refuse_differences(experiment, recorded, workdir)
  elif workdir is not None and checkpoint.list_steps(workdir):
    raise UserError(f"{workdir} has checkpoints but no experiment.json to say what they are. Choose another --workdir")
  saved_step = checkpoint.latest_step(workdir) if workdir is not None else None
  weights = None
  if experiment.train.init_from is not None and saved_step is None:
    check_path(experiment.data)  # before a download of gigabytes begins
    weights = open_weights(experiment.train.init_from, report)
    refuse_other_tokenizer(weights, experiment.data)
  data = find_data(
    experiment.data,
    experiment.train.seed,
    sha256=recorded.data["sha256"] if recorded else None,
    tokenizer=recorded.tokenizer if recorded else weights.tokenizer if weights else None,
  )
  if weights:
    refuse_other_vocabulary(weights, data.tokenizer)
  epoch_steps = count_epoch_steps(data.train, experiment.data) if experiment.train.epochs else None
  experiment = resolve(experiment, data.tokenizer.vocab_size, epoch_steps)
  if saved_step is not None:
    refuse_schedule_that_ended(experiment, saved_step, workdir)
  initial = load_params(weights, experiment.model) if weights else None
  if initial and recorded and recorded.weights:
    initial = require_same(initial, recorded.weights["sha256"])
  found = {"location": initial.location, "sha256": initial.sha256} if initial else recorded.weights if recorded else None
  return Plan(name, experiment, data, workdir, saved_step or 0, epoch_steps, initial, found)


def refuse_schedule_that_ended(experiment: Experiment, saved_step: int, workdir: Path) -> None:
  """Raises `UserError` where a run would get more updates, and its learning rate has come to its end."""
  optimizer, steps = experiment.optimizer, experiment.train.steps
  if saved_step >= steps or optimizer.schedule == "constant":
    return
  if not saved_step and optimizer.decay_steps == 1 and steps > 1:  # a length that nobody chose
    raise UserError(
      f"{workdir} was made without any update, so the schedule of its learning rate has no length. Begin a new run from "
      f"it, in another --workdir, with --init-from {workdir}"
    )
  if saved_step and optimizer.decay_steps <= saved_step and optimizer.end_lr == 0:
    raise UserError(
      f"train.steps={steps} would add updates to a run that is at step {saved_step}, but the schedule of its learning rate "
      f"ends at optimizer.decay_steps={optimizer.decay_steps}. Begin a new run, in another --workdir, with "
      f"--set optimizer.decay_steps={steps}"
    )


def inherit(experiment: Experiment, recorded: checkpoint.RunFiles) -> Experiment:
  """Fills in what was left open from what a run recorded: the schedule's length does not follow `train.steps`."""
  optimizer = recorded.experiment.optimizer
  kept = {
    f"optimizer.{name}": getattr(experiment.optimizer, name) or getattr(optimizer, name)
    for name in ("decay_steps", "cooldown_steps")
  }
  return resolve(change(experiment, kept), recorded.tokenizer.vocab_size)


def refuse_differences(experiment: Experiment, recorded: checkpoint.RunFiles, workdir: Path) -> None:
  """Raises `UserError`, naming each field, if a folder holds a run of another identity."""
  differing = differences(recorded.experiment, experiment)
  if differing:
    fields = ", ".join(f"{name} is {old} there and {new} here" for name, (old, new) in differing.items())
    raise UserError(
      f"{workdir} holds a run with other settings: {fields}. Choose another --workdir, or start over with --fresh"
    )


def train(plan: Plan, *, writers: Sequence[Writer] = (), sample_at: Callable[[int], bool] | None = None) -> Result:
  """Trains to `train.steps` updates, or until SIGINT or SIGTERM; then evaluates on the whole held-out part.

  Args:
    plan: from `plan`.
    writers: get the metrics of each compiled call; closed at the end. The run folder's metrics.jsonl is written besides.
    sample_at: says after which updates texts are drawn for the writers, besides `train.sample_every`; that changes no
      bit of the training.

  Raises:
    UserError: if the devices do not fit the settings, or the run folder cannot be read.
  """
  experiment, workdir = plan.experiment, plan.workdir
  mesh = sharding.make_mesh(experiment, runtime.devices())
  saved_step = checkpoint.latest_step(workdir) if workdir is not None else None
  plan = dataclasses.replace(plan, start_step=saved_step or 0)  # the folder may have moved on since the plan was made
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(stop_signals())
    manager = None
    if workdir is not None:
      _record_start(plan, mesh)
      manager = stack.enter_context(checkpoint.open_checkpoints(workdir))
      writers = [JsonlWriter(workdir / "metrics.jsonl", plan.start_step), *writers]
    for writer in writers:
      stack.callback(_close, writer)
    program = compile_program(
      experiment,
      plan.data,
      plan.initial.params if plan.initial else None,
      manager=manager,
      saved_step=saved_step,
      num_steps=experiment.train.steps - plan.start_step,
    )
    log = _Log(list(writers))  # its clock starts here: compiling is no step's time
    state = _loop(plan, program, manager, log, stop, sample_at)
    if manager is not None:
      save(manager, state)  # goes on in the background during the evaluation
    heldout_loss, heldout_tokens = None, 0
    if not stop:
      done = log.whole_evaluation(plan)
      heldout_loss, heldout_tokens = done or evaluate_heldout(state.params, program.heldout, experiment)
  losses, heldout_losses = log.losses, [(step, loss) for step, loss, _ in log.evaluations]
  if workdir is not None:  # those of earlier starts too
    rows = read_jsonl(workdir / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    heldout_losses = [(row["step"], row["heldout/loss"]) for row in rows if "heldout/loss" in row]
  return Result(
    state=state,
    losses=np.asarray(losses, np.float32),
    heldout_losses=heldout_losses,
    heldout_loss=heldout_loss,
    heldout_tokens=heldout_tokens,
    tokenizer=plan.data.tokenizer,
    experiment=experiment,
    signal=stop[0] if stop else None,
  )


def save(manager: checkpoint.Manager, state: TrainState) -> None:
  """Saves a state under its step; on disk blocks are always stacked."""
  checkpoint.save(manager, jax.jit(stack_blocks)(state) if isinstance(state.params["blocks"], list) else state)


class _Log:
  """Hands what compiled calls return to the writers, and keeps the losses of this start."""

  def __init__(self, writers: list[Writer]):
    self._writers, self._clock = writers, Clock()
    self.losses: list[np.float32] = []
    self.evaluations: list[tuple[int, float, int]] = []

  def whole_evaluation(self, plan: Plan) -> tuple[float, int] | None:
    """The loss after the last update and its tokens, if it was computed over the whole held-out part."""
    train = plan.experiment.train
    if train.eval_batches is None and self.evaluations and self.evaluations[-1][0] == train.steps:
      return self.evaluations[-1][1:]
    return None

  def write(
    self,
    step: int,
    num: int,
    metrics: dict,
    evaluation: tuple[jax.Array, jax.Array] | None,
    texts: Callable[[], list[str]] | None,
  ) -> None:
    """Waits for the call that ended at `step` with its last `num` updates, and for what was begun after it."""
    metrics = {name: np.asarray(values)[:num] for name, values in metrics.items()}
    self.losses.extend(metrics.get("train/loss", ()))
    heldout_loss = None
    if evaluation is not None:
      heldout_loss = float(evaluation[0])
      self.evaluations.append((step, heldout_loss, int(evaluation[1])))
    chunk = Chunk(step, metrics, self._clock.lap(), heldout_loss, tuple(texts()) if texts else ())
    for writer in list(self._writers):
      try:
        writer.write(chunk)
      except OSError as error:  # a full disk, a reader that left: the training is worth more than its log
        self._writers.remove(writer)
        say(f"{type(writer).__name__} stopped at step {step} ({error.strerror or error}); training goes on")


def _loop(
  plan: Plan,
  program: Program,
  manager: checkpoint.Manager | None,
  log: _Log,
  stop: list[int],
  sample_at: Callable[[int], bool] | None,
) -> TrainState:
  """Runs the compiled calls; returns the last state."""
  train, state, step = plan.experiment.train, program.state, plan.start_step

  def evaluation(step: int) -> tuple[jax.Array, jax.Array] | None:
    if not (train.eval_every and step % train.eval_every == 0 and len(program.heldout.tokens)):
      return None
    return begin_evaluation(state.params, program.heldout, plan.experiment, train.eval_batches)

  def texts(step: int) -> Callable[[], list[str]] | None:
    due = train.sample_every and step % train.sample_every == 0 and step < train.steps  # at the end the caller samples
    return begin_samples(plan, state.params, step) if due or (sample_at and sample_at(step)) else None

  pending = None
  if step == 0 and train.steps and (first := evaluation(0)):
    pending = 0, 0, {}, first, None
  while step < train.steps and not stop:
    num = next_stop(step, plan, program.feed.block_steps) - step
    state, metrics = program.run_steps(program.feed.corpus_at(step), state, np.int32(num))
    step += num
    due = step, num, metrics, evaluation(step), texts(step)
    if pending:  # the previous call's: the device is busy with this one meanwhile
      log.write(*pending)
    pending = due
    if manager is not None and train.save_every and step % train.save_every == 0:
      save(manager, state)
  if pending:
    log.write(*pending)
  return state


def next_stop(step: int, plan: Plan, block_steps: int | None = None) -> int:
  """The step at which the host looks next: after the first update, where something is due, or at the end.

  Args:
    step: updates that are done.
    plan: of the run.
    block_steps: the corpus is on the devices up to the next multiple of this only; None for all of it.
  """
  train = plan.experiment.train
  if step == 0:
    return min(1, train.steps)
  stops = [train.steps, step + MAX_STEPS_PER_CALL, next_line(step, train.log_every, plan.epoch_steps)]
  stops += [(step // p + 1) * p for p in (train.save_every, train.eval_every, train.sample_every, block_steps) if p]
  return min(stops)


def next_line(step: int, log_every: int, epoch_steps: int | None) -> int:
  """The first step after `step` at which a line of progress is due; in epochs the steps of each are counted anew."""
  if epoch_steps is None:
    return (step // log_every + 1) * log_every
  begin = step // epoch_steps * epoch_steps
  return min(begin + epoch_steps, begin + ((step - begin) // log_every + 1) * log_every)


def sample_texts(plan: Plan, params: dict, step: int) -> list[str]:
  """Draws texts as the experiment says; a function of the seed and the step."""
  return begin_samples(plan, params, step)()


def begin_samples(plan: Plan, params: dict, step: int) -> Callable[[], list[str]]:
  """Like `sample_texts`, and returns at once: calling what it returns waits for the texts."""
  key = derive_key(plan.experiment.train.seed, SAMPLE, step)
  return begin_texts(params, plan.data.tokenizer, key, plan.experiment.model, plan.experiment.sample)


def evaluate_heldout(params: dict, heldout: Corpus, experiment: Experiment) -> tuple[float | None, int]:
  """Computes the loss over the held-out part, nats per token, and over how many tokens; (None, 0) without any."""
  if not len(heldout.tokens):
    return None, 0
  loss, tokens = begin_evaluation(params, heldout, experiment)
  return float(loss), int(tokens)


def _record_start(plan: Plan, mesh: jax.sharding.Mesh) -> None:
  """Writes the run folder's settings where it is new, and what may differ between starts."""
  text = plan.data.text
  if not (plan.workdir / "experiment.json").exists():
    data = {"kind": text.kind, "location": text.location, "sha256": text.sha256}
    files = checkpoint.RunFiles(plan.name, plan.experiment, plan.data.tokenizer, data, plan.weights)
    checkpoint.write_run_files(plan.workdir, files)
  devices = mesh.devices.flatten()
  entry = {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "start_step": plan.start_step,
    "command": sys.argv,
    "versions": {"jgpt": jgpt.__version__, "jax": jax.__version__, "python": platform.python_version()},
    "platform": platform.platform(),
    "devices": [f"{d.platform} {d.device_kind}" for d in devices],
    "settings": {name: value for name, value in settings(plan.experiment).items() if is_circumstance(name)},
  }
  checkpoint.append_env(plan.workdir, entry)


def _close(writer: Writer) -> None:
  with contextlib.suppress(OSError):  # it was said when writing failed
    writer.close()
