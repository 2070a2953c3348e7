"""A run's programs, compiled for its devices, and its state and data laid out over them.

What the programs compute is in the pure files; when they are called is decided in `train.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgpt import sharding
from jgpt.batches import Corpus, Documents, Stream
from jgpt.config import Experiment
from jgpt.config.settings import change
from jgpt.data.corpus import Data
from jgpt.data.feed import Feed, make_feed
from jgpt.devices import cluster, processes, runtime
from jgpt.devices.compute import choose_quick_options, choose_step_options, resolve_compute
from jgpt.devices.footprint import (
  Budget,
  describe_bytes,
  describe_footprint,
  estimate_footprint,
  list_remedies,
  measure_program,
  scale_footprint,
  share_params,
)
from jgpt.errors import UserError, first_line
from jgpt.evaluation import lower_evaluation
from jgpt.generate import lower_texts
from jgpt.keys import INIT, derive_key
from jgpt.runs import checkpoint
from jgpt.runs.origin import MOMENT_LINKS, Origin
from jgpt.runs.profile import Profile, record_call
from jgpt.step import TrainState, begin_state, init_state, train_steps
from jgpt.system.signals import print_stderr
from jgpt.text.tokenizer import Tokenizer
from jgpt.weights.initial import InitialParams, draw_microgpt_params

NUM_COMPILERS = 2  # threads in which programs compile
FAR = 1.3  # settings that by formula take so many times what there is are not compiled


@dataclasses.dataclass(frozen=True)
class Program:
  """A run's state, data and step on its devices.

  Attributes:
    experiment: with `compute` resolved for the devices.
    state: after the updates that are done; blocks arranged as `compute.layers` says.
    run_steps: compiled, (corpus, state, num_steps) -> (state, metrics); consumes its state and
      takes at most `MAX_STEPS_PER_CALL` steps. None where no update is left. Under JAX_DISABLE_JIT
      the function itself, which computes operation by operation.
    feed: the training part.
    heldout: the held-out part.
    memory: bytes of each device that a step could take when this was made; None where that is not
      known.
  """

  experiment: Experiment
  state: TrainState
  run_steps: Callable[[Corpus, TrainState, jax.Array], tuple[TrainState, dict]] | None
  feed: Feed
  heldout: Corpus
  memory: int | None = None

  @property
  def budget(self) -> Budget:
    """Returns what the run has of its devices."""
    flops = runtime.find_peaks(self.state.step.sharding.device_set, self.experiment.compute)
    return Budget(flops, self.memory, measure_program(self.run_steps))

  def advance(
    self, state: TrainState, step: int, num_steps: int, profile: Profile | None = None
  ) -> tuple[TrainState, dict]:
    """Starts `num_steps` updates of a state after `step` of them; see `run_steps`.

    Those of a profile are waited for.
    """
    count = sharding.place(np.int32(num_steps), sharding.beside(state))
    corpus = self.feed.corpus_at(step)
    with record_call(profile, step, num_steps) as is_recorded:
      found = self.run_steps(corpus, state, count)
      return jax.block_until_ready(found) if is_recorded else found


def compile_program(
  experiment: Experiment,
  devices: Sequence[jax.Device],
  data: Data,
  initial: InitialParams | Origin | None = None,
  *,
  manager: checkpoint.Manager | None = None,
  saved_step: int | None = None,
  num_steps: int = 1,
) -> Program:
  """Makes the state, the compiled step and the data, each laid out over the mesh from the start.

  Args:
    experiment: resolved; `compute` may hold "auto".
    devices: those there are, as `runtime.devices` finds them.
    data: loaded.
    initial: parameters to begin from, or the checkpoint to continue; None draws parameters.
    manager: where checkpoints are.
    saved_step: the checkpoint to restore; None begins anew.
    num_steps: updates that are left; without any the step is not compiled.

  Raises:
    UserError: if the devices do not fit the settings or each other, a step would take more memory
      than they have, or the weights to begin from are missing.
  """
  cluster.survey_devices(devices)
  given, (mesh, experiment) = experiment, _choose_mesh(experiment, devices)
  chosen = dataclasses.asdict(experiment.compute)  # by what this host's processor can do
  processes.check_same("the programs", chosen, "Try --set compute.dtype=float32")
  memory = _find_memory(mesh)
  feed = make_feed(data.train, experiment.data, experiment.train.seed, mesh)
  whole = sharding.replicated(mesh)
  heldout = sharding.place(data.heldout, whole)
  key = sharding.place(derive_key(experiment.train.seed, INIT, 0), whole)
  init = jax.jit(partial(init_state, experiment=experiment))  # traced once, for shapes and values
  stacked, placed = _shape_states(init, key, experiment, mesh)
  is_read = saved_step is not None or isinstance(initial, Origin)
  source = initial if saved_step is None else manager.folder / str(saved_step)
  make, shapes, make_argument = _choose_state(experiment, data, source, init, key, stacked, mesh)
  make_state = _jit_state(make, placed, experiment, is_read=is_read)
  if num_steps > 0:
    check_state_memory(experiment, mesh.devices.size, memory)
  if jax.config.jax_disable_jit:  # nothing is traced: each function computes as it is called
    run_steps = jit_steps(experiment, placed, mesh) if num_steps > 0 else None
    return Program(experiment, make_state(make_argument()), run_steps, feed, heldout)
  # Tracing holds Python's lock and compiling does not: all is traced in this thread, and what is
  # traced compiles meanwhile.
  with ThreadPoolExecutor(NUM_COMPILERS) as pool:
    lowered = make_state.lower(shapes)
    state = pool.submit(lambda: lowered.compile()(make_argument()))
    run_steps, later = None, {}
    if num_steps > 0:
      corpus = feed.corpus_at(saved_step or 0)
      run_steps = pool.submit(lower_steps(experiment, corpus, placed, mesh).compile)
    if manager is not None:
      later |= list_saving(stacked, placed)
    later |= list_ahead(experiment, data.tokenizer, placed.params, heldout)
    ahead = [pool.submit(lower().compile) for lower in later.values()]
    if run_steps is not None:
      run_steps = check_memory(run_steps, given, devices, corpus, memory)
    for compiled in ahead:  # later calls find them done
      compiled.result()
    return Program(experiment, state.result(), run_steps, feed, heldout, memory)


def _find_memory(mesh: jax.sharding.Mesh) -> int | None:
  """Finds the bytes that a step can take of each device: the least of all processes' ones."""
  here = mesh.local_devices  # others are of other processes
  found = processes.together("the memory", lambda: runtime.find_free_memory(here[0], len(here)))
  return None if None in found else min(found)


def check_state_memory(experiment: Experiment, num_devices: int, memory: int | None) -> None:
  """Checks that parameters and moments have room, before they are made.

  Args:
    experiment: from `resolve_compute`.
    num_devices: of the mesh.
    memory: bytes of each device that a step can take; None where it is not known.

  Raises:
    UserError: if they have not, whatever the other settings are.
  """

  def measure(experiment: Experiment) -> int:
    footprint = estimate_footprint(experiment, num_devices)
    return footprint.parameters + footprint.moments

  least = measure(experiment)
  if memory is None or least <= memory:
    return
  words = (
    f"parameters and moments alone take {describe_bytes(least)} of memory on each device, and "
    f"{describe_bytes(memory)} are free"
  )
  shared = share_params(experiment, num_devices)
  if shared and (less := measure(change(experiment, shared))) <= memory:
    settings = " ".join(f"--set {name}={value}" for name, value in shared.items())
    raise UserError(f"{words}. Try {settings}, with which they take {describe_bytes(less)}")
  raise UserError(f"{words}. What fits is a smaller model: see model.d_model and model.num_layers")


def check_memory(
  steps: Future[jax.stages.Compiled],
  experiment: Experiment,
  devices: Sequence[jax.Device],
  corpus: Corpus,
  memory: int | None,
) -> jax.stages.Compiled:
  """Checks that a compiled step has the memory that it takes, and returns it.

  Args:
    steps: `Program.run_steps`, compiling.
    experiment: `compute` may hold "auto".
    devices: those there are.
    corpus: of the step.
    memory: bytes of each device that a step can take; None where it is not known.

  Raises:
    UserError: with settings that fit, found by compiling them.
  """
  try:
    compiled = steps.result()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise UserError(
      advise_memory(experiment, devices, corpus, memory, first_line(error))
    ) from error
  size = measure_program(compiled)
  if memory is None or size is None or size <= memory:
    return compiled
  raise UserError(advise_memory(experiment, devices, corpus, memory, size))


def advise_memory(
  experiment: Experiment,
  devices: Sequence[jax.Device],
  corpus: Corpus,
  memory: int | None,
  needed: int | str,
) -> str:
  """Describes what a step that does not fit takes, and the settings that fit and cost least time.

  Settings are compiled one after the other, but those that by formula are far from fitting.

  Args:
    experiment: `compute` may hold "auto".
    devices: those there are.
    corpus: of the step.
    memory: bytes of each device that a step can take; None where it is not known.
    needed: bytes of each device that the step takes, or what its compiler said.
  """
  mesh, resolved = _choose_mesh(experiment, devices)
  num_devices, kind = mesh.devices.size, mesh.devices.flat[0].device_kind
  formula = estimate_footprint(resolved, num_devices)
  taken = needed if isinstance(needed, int) else max(formula.total, memory or 0)
  of_what = "" if mesh.devices.flat[0].platform == "cpu" else f" of {kind}"
  there = "" if memory is None else f", and {describe_bytes(memory)}{of_what} are free"
  if isinstance(needed, int):
    words = f"a step takes {describe_bytes(needed)} of memory on each device{there}"
  else:
    words = f"a step takes more memory than a device has{there} ({needed[:200]})"
  if processes.is_lead():
    print_stderr(f"{words}; compiling others, to see what fits ...")
  words += f"; by formula: {describe_footprint(formula)}"
  remedies, size = list_remedies(experiment, resolved.compute, num_devices, kind), None
  for changes in remedies:
    changed = change(experiment, changes)
    less = estimate_footprint(_choose_mesh(changed, devices)[1], num_devices)
    is_far = memory is not None and scale_footprint(less, formula, taken) > FAR * memory
    if is_far and changes is not remedies[-1]:
      continue
    size = _measure_steps(changed, devices, corpus)
    settings = " ".join(f"--set {name}={value}" for name, value in changes.items())
    if size is not None and (memory is None or size <= memory):
      return f"{words}. Try {settings}, which takes {describe_bytes(size)}"
  if not remedies:
    return f"{words}. Nothing takes less but a smaller model, or a smaller data.seq_len"
  least = "more than there is" if size is None else describe_bytes(size)
  return (
    f"{words}. The least is {least}, with {settings}: what fits is a smaller model, or a smaller "
    "data.seq_len"
  )


def _measure_steps(
  experiment: Experiment, devices: Sequence[jax.Device], corpus: Corpus
) -> int | None:
  """Compiles a step and measures what it takes; None where its compiler refuses it."""
  mesh, experiment = _choose_mesh(experiment, devices)
  _, placed = _shape_states(*_shape_init(experiment, mesh), experiment, mesh)
  try:
    return measure_program(lower_steps(experiment, corpus, placed, mesh).compile())
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None


def lower_programs(
  experiment: Experiment,
  devices: Sequence[jax.Device],
  num_tokens: int,
  *,
  num_heldout: int | None = None,
  tokenizer: Tokenizer | None = None,
  names: Container[str] | None = None,
) -> dict[str, jax.stages.Lowered]:
  """Traces every program of a run from shapes, for devices that are there or not.

  `compile_program` compiles the same ones, but for a run that does not draw its parameters or whose
  tokens stay in files.

  Args:
    experiment: resolved; `compute` may hold "auto".
    devices: of one platform; they may be those of a topology, see `devices/topology.py`.
    num_tokens: in the training part; of documents, with their padding.
    num_heldout: in the held-out part, likewise; 0 evaluates nothing, None is a tenth of
      `num_tokens`.
    tokenizer: of the run; None samples without a prompt and without a token that ends a text.
    names: of the programs that are wanted; None traces all.

  Returns:
    Name -> traced program; `.compile()` compiles it for the devices. The names: "init" makes the
    state, "steps" applies updates, "stack" arranges a state for saving, where its blocks are a
    list, "save" computes its digests, "evaluation" and "evaluation of N batches" the held-out loss,
    "sampling" draws texts.

  Raises:
    UserError: if the devices do not fit the settings.
  """
  mesh, experiment = _choose_mesh(experiment, devices)
  num_heldout = num_tokens // 10 if num_heldout is None else num_heldout
  corpus, heldout = (shape_corpus(experiment, num, mesh) for num in (num_tokens, num_heldout))
  init, key = _shape_init(experiment, mesh)
  stacked, placed = _shape_states(init, key, experiment, mesh)
  programs = {
    "init": lambda: _jit_state(init, placed, experiment).lower(key),
    "steps": lambda: lower_steps(experiment, corpus, placed, mesh),
    **list_saving(stacked, placed),
    **list_ahead(experiment, tokenizer, placed.params, heldout),
  }
  return {name: lower() for name, lower in programs.items() if names is None or name in names}


def shape_corpus(experiment: Experiment, num_tokens: int, mesh: jax.sharding.Mesh) -> Corpus:
  """Returns the shapes of a corpus of so many tokens, whole on every device of a mesh."""
  place = partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=sharding.replicated(mesh))
  if experiment.data.batching != "documents":
    return Stream(place((num_tokens,)))
  length = experiment.data.seq_len + 1
  return Documents(place((num_tokens // length, length)), place((num_tokens // length,)))


def _choose_mesh(
  experiment: Experiment, devices: Sequence[jax.Device]
) -> tuple[jax.sharding.Mesh, Experiment]:
  """Makes the mesh, and resolves `compute` for its devices."""
  mesh = sharding.make_mesh(experiment, devices)
  return mesh, resolve_compute(experiment, mesh.devices.flat[0])


def _shape_init(
  experiment: Experiment, mesh: jax.sharding.Mesh
) -> tuple[Callable[[jax.Array], TrainState], jax.ShapeDtypeStruct]:
  """Returns what draws a state from a key, and the key's shape."""
  key = jax.eval_shape(partial(derive_key, experiment.train.seed, INIT, 0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
  return jax.jit(partial(init_state, experiment=experiment)), key


def _shape_states(
  init: Callable[[jax.Array], TrainState],
  key: jax.Array,
  experiment: Experiment,
  mesh: jax.sharding.Mesh,
) -> tuple[TrainState, TrainState]:
  """Returns the shapes of the state with stacked blocks, and with blocks arranged as in a run."""
  arrange = partial(sharding.arrange_blocks, layers=experiment.compute.layers)
  stacked = _place_shapes(jax.eval_shape(init, key), experiment, mesh)
  return stacked, _place_shapes(jax.eval_shape(arrange, stacked), experiment, mesh)


def _jit_state(
  make: Callable[[Any], TrainState],
  placed: TrainState,
  experiment: Experiment,
  *,
  is_read: bool = False,
) -> Callable[[Any], TrainState]:
  """Returns what makes a state, to be compiled: blocks as in a run, sharded from the start."""
  layers = experiment.compute.layers
  return jax.jit(
    lambda x: sharding.arrange_blocks(make(x), layers),
    out_shardings=jax.tree.map(lambda x: x.sharding, placed),
    compiler_options=choose_quick_options(experiment),
    # Arrays that keep their shape need no second copy.
    donate_argnums=0 if is_read and layers != "unroll" else (),
  )


def _choose_state(
  experiment: Experiment,
  data: Data,
  source: Path | InitialParams | Origin | None,
  init: Callable[[jax.Array], TrainState],
  key: jax.Array,
  stacked: TrainState,
  mesh: jax.sharding.Mesh,
) -> tuple[Callable[[Any], TrainState], Any, Callable[[], Any]]:
  """Chooses how the state is made, blocks stacked or as they are given.

  Args:
    experiment: resolved.
    data: loaded.
    source: a checkpoint's folder to restore, or what to begin from; None draws parameters.
    init: draws a state from a key.
    key: for `init`.
    stacked: the state's shapes, with shardings.
    mesh: the devices.

  Returns:
    A function of one argument, the shapes of that, and a function that makes it.
  """
  if isinstance(source, Path):
    return lambda state: state, stacked, lambda: checkpoint.restore(source, stacked)
  _check_at_hand(experiment, source)
  if isinstance(source, Origin):
    there = jax.eval_shape(partial(init_state, experiment=source.experiment), key)
    there = _place_shapes(there, experiment, mesh)
    restore = partial(checkpoint.restore, source.folder, there)
    begin = partial(continue_state, experiment=experiment)
    return lambda kept: begin(*kept), _select_kept(there), lambda: _select_kept(restore())
  given = source.params if source else None
  if given is None and experiment.train.init == "microgpt":
    seed, num_documents = experiment.train.seed, len(data.documents)
    given = draw_microgpt_params(seed, num_documents, experiment.model)
  if given is None:
    return init, key, lambda: key
  begin = partial(begin_state, experiment=experiment)
  places = sharding.param_shardings(given, experiment.model, mesh)
  shapes = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), given, places
  )
  return begin, shapes, lambda: sharding.place(given, places)


def continue_state(params: dict, moments: dict, experiment: Experiment) -> TrainState:
  """Makes the state before the first update of a continued run.

  Args:
    params: of the origin, as `init_params` returns them.
    moments: of the origin's `opt_state`, under the name of their link, Adam's with their count.
    experiment: of the continued run; whatever else the optimizer's state holds begins anew.
  """
  state = begin_state(params, experiment)
  return state.replace(opt_state=state.opt_state | moments)


def _select_kept(origin: TrainState) -> tuple[dict, dict]:
  """Returns what a continued run keeps of its origin's state."""
  moments = {name: origin.opt_state[name] for name in MOMENT_LINKS if name in origin.opt_state}
  return origin.params, moments


def _check_at_hand(experiment: Experiment, initial: InitialParams | Origin | None) -> None:
  """Checks that there is what a run begins from, since others would make another run."""
  names = {"init_from": InitialParams, "continue_from": Origin}
  for name, kind in names.items():
    source = getattr(experiment.train, name)
    if source is not None and not isinstance(initial, kind):
      raise UserError(f"what train.{name}={source} names is not at hand, nor is a checkpoint.")


def lower_steps(
  experiment: Experiment, corpus: Corpus, state: TrainState, mesh: jax.sharding.Mesh
) -> jax.stages.Lowered:
  """Traces `Program.run_steps` for a corpus and a state of these shapes and shardings."""
  num_steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
  with jax.set_mesh(mesh):
    return jit_steps(experiment, state, mesh).lower(corpus, state, num_steps)


def jit_steps(experiment: Experiment, state: TrainState, mesh: jax.sharding.Mesh) -> Callable:
  """Makes `Program.run_steps`, not compiled yet, for a state of these shapes and shardings."""

  def run_steps(corpus: Corpus, state: TrainState, num_steps: jax.Array) -> tuple[TrainState, dict]:
    return train_steps(state, corpus, num_steps, experiment)

  return jax.jit(
    run_steps,
    donate_argnums=1,
    out_shardings=(jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)),
    compiler_options=choose_step_options(experiment),
  )


def _place_shapes(state: TrainState, experiment: Experiment, mesh: jax.sharding.Mesh) -> TrainState:
  """Returns the shapes of a state with their shardings."""
  shardings = sharding.state_shardings(state, experiment.model, mesh)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
  )


def list_saving(
  stacked: TrainState, placed: TrainState
) -> dict[str, Callable[[], jax.stages.Lowered]]:
  """Returns the programs of a save by name, each as a function that traces it.

  Args:
    stacked: shapes of the state, blocks stacked.
    placed: the same, blocks arranged as in a run.
  """
  programs = {"save": partial(checkpoint.lower_save, stacked)}
  if isinstance(placed.params["blocks"], list):
    programs["stack"] = partial(checkpoint.lower_stack, placed)
  return programs


def list_ahead(
  experiment: Experiment, tokenizer: Tokenizer | None, params: dict, heldout: Corpus
) -> dict[str, Callable[[], jax.stages.Lowered]]:
  """Returns sampling and evaluation by name, each as a function that traces it."""
  programs = {"sampling": partial(lower_texts, params, tokenizer, experiment)}
  if len(heldout.tokens):
    for num in dict.fromkeys((None, experiment.train.eval_batches)):
      name = "evaluation" if num is None else f"evaluation of {num} batches"
      programs[name] = partial(lower_evaluation, params, heldout, experiment, num)
  return programs
