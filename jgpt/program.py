"""What a run computes, compiled for its devices.

Responsible for laying the state, the data and the compiled step out over the mesh, and for evaluation and sampling as
compiled programs. What they compute is in the pure files; when they are called is decided by `train.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp

from jgpt import sharding
from jgpt.batches import Batch, Corpus
from jgpt.config import Experiment
from jgpt.data.corpus import Data
from jgpt.data.feed import Feed, make_feed
from jgpt.devices.compute import choose_tricks
from jgpt.errors import UserError
from jgpt.evaluation import _eval_settings, evaluate_compiled
from jgpt.generate import compile_texts
from jgpt.keys import INIT, SAMPLE, derive_key
from jgpt.optim import make_optimizer
from jgpt.runs import checkpoint
from jgpt.sharding import unstack_blocks
from jgpt.step import MAX_STEPS_PER_CALL, TrainState, begin_state, init_state, make_train_steps
from jgpt.weights.initial import draw_microgpt_params


@dataclasses.dataclass(frozen=True)
class Program:
  """A run's state, data and step on its devices.

  Attributes:
    state: after the updates that are done; its blocks are stacked or a list, as `layout` chose.
    run_steps: compiled, (corpus, state, num_steps) -> (state, metrics); consumes its state and takes
      `MAX_STEPS_PER_CALL` at most. None where no update is left.
    feed: the training part.
    heldout: the held-out part.
  """

  state: TrainState
  run_steps: Callable[[Corpus, TrainState, jax.Array], tuple[TrainState, dict]] | None
  feed: Feed
  heldout: Corpus


def compile_program(
  experiment: Experiment,
  data: Data,
  params: dict | None = None,
  *,
  manager: checkpoint.Manager | None = None,
  saved_step: int | None = None,
  num_steps: int = 1,
) -> Program:
  """Makes the state, the compiled step and the data, each laid out over the mesh from birth.

  Args:
    experiment: resolved.
    data: loaded.
    params: to begin from, NumPy arrays; None draws them.
    manager: where checkpoints are.
    saved_step: the one to restore; None begins anew.
    num_steps: updates that are left; without any the step is not compiled.
  """
  mesh = sharding.make_mesh(experiment, jax.devices())
  platform = mesh.devices.flat[0].platform
  feed = make_feed(data.train, experiment.data, experiment.train.seed, mesh)
  heldout = jax.device_put(data.heldout, sharding.replicated(mesh))
  tricks = choose_tricks(experiment, platform)
  layout = tricks.layout
  tx = make_optimizer(experiment.optimizer, experiment.model)
  key = derive_key(experiment.train.seed, INIT, 0)
  init = jax.jit(partial(init_state, config=experiment.model, tx=tx))  # jit: traced once for its shapes and for its values
  stacked = _placed(jax.eval_shape(init, key), experiment, mesh)
  placed = _placed(jax.eval_shape(layout, stacked), experiment, mesh)

  def lower_state() -> tuple[jax.stages.Lowered, Callable]:
    """Traces the program that makes the state; also returns what its argument comes from."""
    shardings = jax.tree.map(lambda x: x.sharding, placed)
    jit = partial(jax.jit, out_shardings=shardings, compiler_options=tricks.init_options)
    if saved_step is not None:
      donated = () if layout is unstack_blocks else 0  # what keeps its shape needs no second copy
      folder = manager.folder / str(saved_step)
      return jit(layout, donate_argnums=donated).lower(stacked), lambda: checkpoint.restore(folder, stacked)
    given = params
    if given is None and experiment.train.init_from is not None:  # to draw others would be another run
      raise UserError(f"the weights of train.init_from={experiment.train.init_from} are not at hand, nor is a checkpoint.")
    if given is None and experiment.train.init == "microgpt":
      given = draw_microgpt_params(experiment.train.seed, len(data.documents), experiment.model)
    if given is not None:
      return jit(lambda params: layout(begin_state(params, tx))).lower(given), lambda: given
    return jit(lambda key: layout(init(key))).lower(key), lambda: key

  # Tracing holds Python's lock, compiling does not: all is traced here, and what is traced compiles meanwhile.
  with ThreadPoolExecutor(2) as pool:
    lowered, argument = lower_state()
    state = pool.submit(lambda: lowered.compile()(argument()))
    run_steps = None
    if num_steps > 0:
      run_steps = pool.submit(_lower_steps(experiment, feed.corpus_at(saved_step or 0), placed, mesh).compile)
    surveyed = pool.submit(checkpoint.compile_save(stacked)) if manager is not None else None
    _compile_ahead(experiment, data, placed.params, heldout)
    if surveyed is not None:
      surveyed.result()
    return Program(state.result(), run_steps.result() if run_steps else None, feed, heldout)


def _lower_steps(experiment: Experiment, corpus: Corpus, state: TrainState, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
  """Traces `Program.run_steps` for a corpus and a state of these shapes."""
  batch_sharding = sharding.batch_sharding(mesh)

  def place(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, batch_sharding), batch)

  tricks = choose_tricks(experiment, mesh.devices.flat[0].platform)
  train_steps = make_train_steps(experiment, MAX_STEPS_PER_CALL, place, tricks.grads_fn, tricks.keep)
  program = jax.jit(
    lambda corpus, state, num_steps: train_steps(state, corpus, num_steps),
    donate_argnums=1,
    out_shardings=(jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)),
    compiler_options=tricks.step_options,
  )
  return program.lower(corpus, state, jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh)))


def _placed(state: TrainState, experiment: Experiment, mesh: jax.sharding.Mesh) -> TrainState:
  """The shapes of a state with their shardings."""
  shardings = sharding.state_shardings(state, experiment.model, mesh)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def _compile_ahead(experiment: Experiment, data: Data, params: dict, heldout: Corpus) -> None:
  """Compiles sampling and evaluation; their later calls find them done."""
  key = derive_key(experiment.train.seed, SAMPLE, 0)
  compile_texts(params, data.tokenizer, key, experiment.model, experiment.sample)
  for num_batches in {None, experiment.train.eval_batches} if len(heldout.tokens) else ():
    settings = _eval_settings(experiment, heldout, num_batches)
    evaluate_compiled.lower(params, heldout, **settings).compile()
