"""The host loop: the one place where time, files and printing meet the compiled step.

Responsible for planning a run (its data, its resolved settings, its mesh), and for running it: restoring or initialising
the state, calling `train_steps`, handing metrics to writers one call late, saving, stopping on a signal. Everything that
is computed is in the pure files it calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jgpt
from jgpt import checkpoint, runtime, sharding
from jgpt.config import Experiment, UserError, resolve
from jgpt.data import Batch, Corpus, Data, load_data
from jgpt.generate import begin_texts, compile_texts
from jgpt.keys import INIT, SAMPLE, derive_key
from jgpt.metrics import Chunk, Clock, JsonlWriter, Writer, read_jsonl
from jgpt.optim import make_optimizer
from jgpt.params import count_params
from jgpt.settings import change, differences, is_circumstance, settings
from jgpt.sources import find_text
from jgpt.step import TrainState, evaluate, init_state, make_train_steps
from jgpt.tokenizer import CharTokenizer

MAX_STEPS_PER_CALL = 1024  # also the length of the metrics that a call returns
EVAL_BATCH_SIZE = 256
REPEAT_SECONDS = 0.5  # a key that is held down, or a signal sent to the whole group, is one signal

evaluate_corpus = jax.jit(evaluate, static_argnames=("config", "batch_size"))


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run that is about to begin or go on; nothing is on a device yet.

  Attributes:
    name: of the experiment.
    experiment: resolved.
    data: loaded.
    workdir: the run folder, or None to leave nothing on disk.
    start_step: updates that the folder's newest checkpoint holds.
  """

  name: str
  experiment: Experiment
  data: Data
  workdir: Path | None
  start_step: int


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run came to.

  Attributes:
    state: after the last update.
    losses: training loss of each update since the run first began, nats per token, float32.
    heldout_loss: nats per token over the held-out documents; None where none are held out or the run was interrupted.
    heldout_tokens: how many tokens that is over.
    tokenizer: of the run.
    experiment: resolved.
    signal: the signal that ended the run early, or None.
  """

  state: TrainState
  losses: np.ndarray
  heldout_loss: float | None
  heldout_tokens: int
  tokenizer: CharTokenizer
  experiment: Experiment
  signal: int | None

  @property
  def params(self) -> dict:
    """The parameters after the last update."""
    return self.state.params


def plan(experiment: Experiment, *, workdir: str | Path | None = None, name: str = "") -> Plan:
  """Decides what a run will be, without touching a device.

  Args:
    experiment: may leave `model.vocab_size` and `optimizer.decay_steps` open.
    workdir: where the run is kept. A folder that holds the same run is resumed, with the data recorded there.
    name: of the experiment, to be recorded.

  Raises:
    UserError: if the settings, the data or the folder do not go together.
  """
  workdir = Path(workdir) if workdir is not None else None
  recorded = None
  if workdir is not None and (workdir / "experiment.json").exists():
    recorded = checkpoint.read_run_files(workdir)
    experiment = inherit(experiment, recorded)
    refuse_differences(experiment, recorded, workdir)
  elif workdir is not None and checkpoint.list_steps(workdir):
    raise UserError(f"{workdir} has checkpoints but no experiment.json to say what they are. Choose another --workdir")
  text = find_text(experiment.data, sha256=recorded.data["sha256"] if recorded else None)
  data = load_data(text, experiment.data, experiment.train.seed)
  experiment = resolve(experiment, data.tokenizer.vocab_size)
  start_step = checkpoint.latest_step(workdir) or 0 if workdir is not None else 0
  decay_steps = experiment.optimizer.decay_steps
  if start_step and decay_steps <= start_step < experiment.train.steps:
    raise UserError(
      f"train.steps={experiment.train.steps} would add updates to a run that is at step {start_step}, but its learning "
      f"rate is 0 from optimizer.decay_steps={decay_steps} on. Begin a new run, in another --workdir, with "
      f"--set optimizer.decay_steps={experiment.train.steps}"
    )
  return Plan(name, experiment, data, workdir, start_step)


def inherit(experiment: Experiment, recorded: checkpoint.RunFiles) -> Experiment:
  """Fills in what was left open from what a run recorded: the schedule's length does not follow `train.steps`."""
  decay_steps = experiment.optimizer.decay_steps or recorded.experiment.optimizer.decay_steps
  experiment = change(experiment, {"optimizer.decay_steps": decay_steps})
  return resolve(experiment, recorded.tokenizer.vocab_size)


def refuse_differences(experiment: Experiment, recorded: checkpoint.RunFiles, workdir: Path) -> None:
  """Raises `UserError`, naming each field, if a folder holds a run of another identity."""
  differing = differences(recorded.experiment, experiment)
  if differing:
    fields = ", ".join(f"{name} is {old} there and {new} here" for name, (old, new) in differing.items())
    raise UserError(
      f"{workdir} holds a run with other settings: {fields}. Choose another --workdir, or start over with --fresh"
    )


def train(plan: Plan, *, writers: Sequence[Writer] = (), sample_at: Callable[[int], bool] | None = None) -> Result:
  """Trains to `train.steps` updates, or until SIGINT or SIGTERM; then evaluates on the held-out documents.

  Args:
    plan: from `plan`.
    writers: get the metrics of each compiled call; closed at the end. The run folder's metrics.jsonl is written besides.
    sample_at: says after which steps a text is drawn for the writers; that changes no bit of the training.

  Raises:
    UserError: if the devices do not fit the settings, or the run folder cannot be read.
  """
  experiment, workdir = plan.experiment, plan.workdir
  mesh = sharding.make_mesh(experiment, runtime.devices())
  if workdir is not None:  # the folder may have moved on since the plan was made
    plan = dataclasses.replace(plan, start_step=checkpoint.latest_step(workdir) or 0)
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(_stop_signals())
    manager = None
    if workdir is not None:
      _record_start(plan, mesh)
      manager = stack.enter_context(checkpoint.open_checkpoints(workdir))
      writers = [JsonlWriter(workdir / "metrics.jsonl", plan.start_step), *writers]
    writers = list(writers)
    for writer in writers:
      stack.callback(_close, writer)
    state, run_steps, corpus = compile_steps(plan, manager)
    state, losses = _loop(plan, state, partial(run_steps, corpus), manager, writers, stop, sample_at)
    if manager is not None:
      checkpoint.save(manager, state)  # goes on in the background during the evaluation
    heldout_loss, heldout_tokens = (None, 0) if stop else evaluate_heldout(state.params, plan)
  if workdir is not None:  # the losses of earlier starts too
    losses = [row["train/loss"] for row in read_jsonl(workdir / "metrics.jsonl") if "train/loss" in row]
  losses = np.asarray(losses, np.float32)
  return Result(state, losses, heldout_loss, heldout_tokens, plan.data.tokenizer, experiment, stop[0] if stop else None)


def compile_steps(plan: Plan, manager: checkpoint.Manager | None = None) -> tuple[TrainState, Callable, Corpus]:
  """Makes the state, the compiled steps and the corpus, each laid out over the mesh from birth.

  Args:
    plan: from `plan`.
    manager: where the state of `plan.start_step` is restored from; None begins anew.

  Returns:
    The state, a compiled function (corpus, state, num_steps) -> (state, metrics) that consumes its state and takes
    `MAX_STEPS_PER_CALL` at most, and the corpus on the devices.
  """
  experiment = plan.experiment
  mesh = sharding.make_mesh(experiment, jax.devices())
  platform_name = mesh.devices.flat[0].platform
  corpus = jax.device_put(plan.data.train, sharding.replicated(mesh))
  init = partial(init_state, config=experiment.model, tx=make_optimizer(experiment.optimizer, experiment.model))
  key = derive_key(experiment.train.seed, INIT, 0)
  shapes = jax.eval_shape(init, key)
  shardings = sharding.state_shardings(shapes, experiment.model, mesh)
  placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
  batch_sharding = sharding.batch_sharding(mesh)

  def place(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, batch_sharding), batch)

  def make_state() -> TrainState:
    if plan.start_step and manager is not None:
      return checkpoint.restore(manager, plan.start_step, placed)
    return jax.jit(init, out_shardings=shardings, compiler_options=runtime.init_options(platform_name))(key)

  train_steps = make_train_steps(experiment, MAX_STEPS_PER_CALL, place)
  program = jax.jit(
    lambda corpus, state, num_steps: train_steps(state, corpus, num_steps),
    donate_argnums=1,
    out_shardings=(shardings, sharding.replicated(mesh)),
    compiler_options=runtime.step_options(count_params(experiment.model), platform_name),
  )
  num_steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
  with ThreadPoolExecutor(1) as pool:  # where there are cores to spare, the wait is that of the longer compilation
    state = pool.submit(make_state)
    afterwards = pool.submit(_compile_ahead, plan, placed.params)
    compiled = program.lower(corpus, placed, num_steps).compile()
    afterwards.result()
    return state.result(), compiled, corpus


def _compile_ahead(plan: Plan, params: dict) -> None:
  """Compiles sampling and evaluation while the training step compiles; their later calls find them done."""
  experiment = plan.experiment
  key = derive_key(experiment.train.seed, SAMPLE, 0)
  compile_texts(params, plan.data.tokenizer, key, experiment.model, experiment.sample)
  if len(plan.data.heldout.tokens):
    evaluate_corpus.lower(params, plan.data.heldout, config=experiment.model, batch_size=EVAL_BATCH_SIZE).compile()


def _loop(
  plan: Plan,
  state: TrainState,
  run_steps: Callable[[TrainState, jax.Array], tuple[TrainState, dict]],
  manager: checkpoint.Manager | None,
  writers: list[Writer],
  stop: list[int],
  sample_at: Callable[[int], bool] | None,
) -> tuple[TrainState, list[np.float32]]:
  """Runs the compiled calls; returns the last state and the losses of this start."""
  steps, save_every = plan.experiment.train.steps, plan.experiment.train.save_every
  step, losses, pending, clock = plan.start_step, [], None, Clock()

  def hand_over(step: int, num: int, metrics: dict, texts: Callable[[], list[str]] | None) -> None:
    metrics = {name: np.asarray(values)[:num] for name, values in metrics.items()}  # waits for that call to end
    losses.extend(metrics["train/loss"])
    chunk = Chunk(step, metrics, clock.lap(), texts()[0] if texts else None)
    for writer in list(writers):
      try:
        writer.write(chunk)
      except OSError as error:  # a full disk, a reader that left: the training is worth more than its log
        writers.remove(writer)
        _say(f"{type(writer).__name__} stopped at step {step} ({error.strerror or error}); training goes on")

  while step < steps and not stop:
    num = next_stop(step, plan.experiment) - step
    state, metrics = run_steps(state, np.int32(num))
    step += num
    texts = begin_samples(plan, state.params, step) if sample_at and sample_at(step) else None
    if pending:  # the previous call's: the device is busy with this one meanwhile
      hand_over(*pending)
    pending = step, num, metrics, texts
    if manager is not None and save_every and step % save_every == 0:
      checkpoint.save(manager, state)
  if pending:
    hand_over(*pending)
  return state, losses


def next_stop(step: int, experiment: Experiment) -> int:
  """The step at which the host looks next: after the first update, where a line or a checkpoint is due, or at the end."""
  if step == 0:
    return min(1, experiment.train.steps)
  periods = [experiment.train.log_every] + ([experiment.train.save_every] if experiment.train.save_every else [])
  return min([experiment.train.steps, step + MAX_STEPS_PER_CALL] + [(step // p + 1) * p for p in periods])


def sample_texts(plan: Plan, params: dict, step: int) -> list[str]:
  """Draws texts as the experiment says; a function of the seed and the step."""
  return begin_samples(plan, params, step)()


def begin_samples(plan: Plan, params: dict, step: int) -> Callable[[], list[str]]:
  """Like `sample_texts`, and returns at once: calling what it returns waits for the texts."""
  key = derive_key(plan.experiment.train.seed, SAMPLE, step)
  return begin_texts(params, plan.data.tokenizer, key, plan.experiment.model, plan.experiment.sample)


def evaluate_heldout(params: dict, plan: Plan) -> tuple[float | None, int]:
  """Computes the loss over the held-out documents, nats per token, and over how many tokens; (None, 0) without any."""
  if not len(plan.data.heldout.tokens):
    return None, 0
  loss, tokens = evaluate_corpus(params, plan.data.heldout, config=plan.experiment.model, batch_size=EVAL_BATCH_SIZE)
  return float(loss), int(tokens)


def _record_start(plan: Plan, mesh: jax.sharding.Mesh) -> None:
  """Writes the run folder's settings where it is new, and what may differ between starts."""
  text = plan.data.text
  if not (plan.workdir / "experiment.json").exists():
    data = {"kind": text.kind, "location": text.location, "sha256": text.sha256}
    checkpoint.write_run_files(plan.workdir, checkpoint.RunFiles(plan.name, plan.experiment, plan.data.tokenizer, data))
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


def _say(line: str) -> None:
  """One line on standard error, also from a signal handler; without a standard error, none."""
  with contextlib.suppress(OSError):
    os.write(2, f"{line}\n".encode())


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
  """Collects the first SIGINT or SIGTERM in a list instead of dying of it.

  A second one, more than `REPEAT_SECONDS` later, has its usual effect. Signals that were ignored stay ignored.
  """
  received: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield received  # only the main thread may install handlers
    return
  handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
  previous = {s: handler for s, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
  first = 0.0

  def on_signal(number: int, frame: object) -> None:
    nonlocal first
    if not received:
      first = time.monotonic()
      received.append(number)
      _say("\nstopping after the steps under way; once more quits at once")
    elif time.monotonic() - first > REPEAT_SECONDS:
      signal.signal(number, previous[number])
      signal.raise_signal(number)

  for s in previous:
    signal.signal(s, on_signal)
  try:
    yield received
  finally:
    for s, handler in previous.items():
      signal.signal(s, handler)
