"""Seconds of jgpt's own compiled programs.

Responsible for timing what `program.py`, `step.py` and `generate.py` compute, and the machine's rates that they are held
against. Everything is warm before it is timed, and waited for. Not responsible for which cases there are (`cases.py`) or
for what the figures mean (`limits.py`, `measured.py`).

What takes microseconds is repeated inside one compiled loop, since a call from Python takes longer than the work. So that
nothing is hoisted out of such a loop, what an iteration reads passes an optimization barrier together with its number.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jgpt import generate, program, train
from jgpt.batches import make_batch_fn
from jgpt.config import SampleConfig
from jgpt.devices.compute import Tricks, choose_tricks
from jgpt.devices.limits import FLOAT_BYTES, Product
from jgpt.keys import INIT, SAMPLE, derive_key
from jgpt.model import init_params
from jgpt.optim import make_optimizer
from jgpt.plan import Plan
from jgpt.runs import checkpoint
from jgpt.step import MAX_STEPS_PER_CALL, TrainState, dropout_key

COPIED_BYTES = 64 << 20  # a larger state is carried from round to round instead
LEAST_SECONDS = 0.02  # of what is timed at once
BANDWIDTH_SHAPE = (50304, 768)  # GPT-2's head: far larger than a cache


# --- The step ---


class StepTimer:
  """An experiment's program, whose steps can be timed.

  Attributes:
    plan: of the run.
    compile_seconds: until the first step could begin: the state drawn, the step, evaluation and sampling compiled.
    memory_bytes: the most that the compiled step holds, by the compiler's own account: arguments, outputs and temporaries,
      what is aliased once. The corpus is an argument. None where it gives no account.
    corpus: the training part, on the devices.
  """

  def __init__(self, plan: Plan):
    self.plan = plan
    began = time.perf_counter()
    made = program.compile_program(plan.experiment, plan.data)
    self._state, self._run_steps = jax.block_until_ready(made.state), made.run_steps
    self.compile_seconds = time.perf_counter() - began
    self.memory_bytes = find_memory(made.run_steps)
    self.corpus = made.feed.corpus_at(0)
    self._copies = sum(x.nbytes for x in jax.tree.leaves(self._state)) <= COPIED_BYTES

  def __call__(self, steps: int) -> float:
    """Runs that many updates in calls of up to 1,024, as a run that prints that seldom; returns the seconds of one."""
    state = self.lend_state()
    began = time.perf_counter()
    state = self.run(state, steps)
    seconds = (time.perf_counter() - began) / steps
    self.take_back(state)
    return seconds

  def run(self, state: TrainState, steps: int) -> TrainState:
    """Applies that many updates to a state, which is consumed, and waits for them."""
    for first in range(0, steps, MAX_STEPS_PER_CALL):
      num = min(MAX_STEPS_PER_CALL, steps - first)
      state, _ = self._run_steps(self.corpus, state, jnp.int32(num))
    return jax.block_until_ready(state)

  def lend_state(self) -> TrainState:
    """A state to consume: a copy of the initial one; or, where that is large, the only one there is."""
    return jax.block_until_ready(jax.tree.map(jnp.copy, self._state)) if self._copies else self._state

  def take_back(self, state: TrainState) -> None:
    """Keeps what a large state that was lent became: the next round goes on from there."""
    if not self._copies:
      self._state = state


class SaveTimer:
  """Times steps with and without a checkpoint being written meanwhile."""

  def __init__(self, steps: StepTimer, manager: checkpoint.Manager):
    """Begins with a save, which compiles what saves need.

    Args:
      steps: whose state is saved.
      manager: from `checkpoint.open_checkpoints`.
    """
    self._steps, self._manager = steps, manager
    self(1)

  def __call__(self, num: int) -> tuple[float, float, float]:
    """Applies `num` updates, one a call, and as many after a save.

    Returns:
      Seconds of the ones; seconds of the others, from before the save until it is on disk; and of these, how long the
      loop stood still while the arrays were copied.
    """
    state = self._run(self._steps.lend_state(), num)
    began = time.perf_counter()
    state = self._run(state, num)
    plain = time.perf_counter() - began
    began = time.perf_counter()
    train.save(self._manager, state)
    stood = time.perf_counter() - began
    state = self._run(state, num)
    self._manager.wait()
    saving = time.perf_counter() - began
    self._steps.take_back(state)
    return plain, saving, stood

  def _run(self, state: TrainState, num: int) -> TrainState:
    for _ in range(num):
      state = self._steps.run(state, 1)
    return state


def find_memory(compiled: Any) -> int | None:
  """The bytes that a compiled program holds at most: arguments + outputs + temporaries - what is aliased; or None."""
  try:
    sizes = compiled.memory_analysis()
  except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
    return None
  if sizes is None:
    return None
  total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
  return total - sizes.alias_size_in_bytes


def tricks_of(plan: Plan) -> Tricks:
  """How the plan's programs are made here."""
  return choose_tricks(plan.experiment, jax.devices()[0].platform)


# --- Its parts ---


class PartsTimer:
  """Forward pass, gradient and update of a plan's step, each as a program that repeats it.

  The programs have the step's compiler options, its batches, its dropout and its layout of layers. Gradients go on to the
  update. Cutting a batch is in the forward pass and in the gradient, as it is in a step.
  """

  def __init__(self, steps: StepTimer):
    """Traces the three; they compile in the first round.

    Args:
      steps: of the same plan; lends its state.
    """
    self._steps, experiment = steps, steps.plan.experiment
    model, seed = experiment.model, experiment.train.seed
    tx, batch_fn = make_optimizer(experiment.optimizer, model), make_batch_fn(experiment.data, seed)
    tricks = tricks_of(steps.plan)
    jit = partial(jax.jit, compiler_options=tricks.step_options)
    grad_fn = partial(tricks.grads_fn, config=model, micro_batch_size=experiment.train.micro_batch_size)

    @jit
    def forward(params: dict, corpus: Any, num: jax.Array) -> jax.Array:
      def body(i: jax.Array, total: jax.Array) -> jax.Array:
        here, _ = jax.lax.optimization_barrier((params, i))
        return total + tricks.loss_fn(here, batch_fn(corpus, i), model, dropout_key(seed, i, model))

      return jax.lax.fori_loop(0, num, body, jnp.zeros(()))

    @partial(jit, donate_argnums=0)
    def gradient(grads: dict, params: dict, corpus: Any, num: jax.Array) -> tuple[dict, jax.Array]:
      def body(i: jax.Array, carry: tuple) -> tuple:
        here, _ = jax.lax.optimization_barrier((params, i))
        loss, grads = grad_fn(here, batch_fn(corpus, i), key=dropout_key(seed, i, model))
        return grads, carry[1] + loss

      return jax.lax.fori_loop(0, num, body, (grads, jnp.zeros(())))

    @partial(jit, donate_argnums=(0, 1))
    def update(params: dict, opt_state: Any, grads: dict, num: jax.Array) -> tuple[dict, Any]:
      def body(i: jax.Array, carry: tuple) -> tuple:
        params, opt_state = carry
        here, _ = jax.lax.optimization_barrier((grads, i))
        updates, opt_state = tx.update(here, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

      return jax.lax.fori_loop(0, num, body, (params, opt_state))

    self._forward, self._gradient, self._update = forward, gradient, update
    state = steps.lend_state()
    self._grads = jax.tree.map(jnp.zeros_like, state.params)

  def __call__(self, repeats: int) -> tuple[float, float, float]:
    """Repeats each part that often; returns the seconds of one forward pass, one gradient and one update."""
    num, corpus, state = jnp.int32(repeats), self._steps.corpus, self._steps.lend_state()
    times = [time.perf_counter()]
    jax.block_until_ready(self._forward(state.params, corpus, num))
    times.append(time.perf_counter())
    self._grads, _ = jax.block_until_ready(self._gradient(self._grads, state.params, corpus, num))
    times.append(time.perf_counter())
    params, opt_state = jax.block_until_ready(self._update(state.params, state.opt_state, self._grads, num))
    times.append(time.perf_counter())
    self._steps.take_back(state.replace(params=params, opt_state=opt_state))
    return tuple((after - before) / repeats for before, after in itertools.pairwise(times))


# --- The machine ---


def time_product(left: tuple, right: tuple, contract: tuple, rounds: int, options: dict | None = None) -> float:
  """Median seconds of one float32 matrix product, repeated inside a compiled loop.

  Args:
    left: shape.
    right: shape.
    contract: the dimension of each that is summed over.
    rounds: timed after one that warms up.
    options: the compiler's.
  """
  keys = jax.random.split(jax.random.key(0))
  operands = [jax.random.normal(key, shape) for key, shape in zip(keys, (left, right), strict=True)]
  dimensions = (tuple((d,) for d in contract), ((), ()))
  shape = jax.eval_shape(lambda a, b: jax.lax.dot_general(a, b, dimensions), *operands)

  @partial(jax.jit, compiler_options=options)
  def repeat(a: jax.Array, b: jax.Array, num: jax.Array) -> jax.Array:
    def body(i: jax.Array, product: jax.Array) -> jax.Array:
      a_now, b_now, _ = jax.lax.optimization_barrier((a, b, i))
      return jax.lax.dot_general(a_now, b_now, dimensions)

    return jax.lax.fori_loop(0, num, body, jnp.zeros(shape.shape, shape.dtype))

  def seconds(num: int) -> float:
    began = time.perf_counter()
    jax.block_until_ready(repeat(*operands, jnp.int32(num)))
    return time.perf_counter() - began

  num = 1
  seconds(num)
  while seconds(num) < LEAST_SECONDS:
    num *= 2
  return statistics.median(seconds(num) / num for _ in range(rounds))


def measure_products(products: list[Product], rounds: int, options: dict | None = None) -> float:
  """The rate in FLOP/s of all products of a step: flops over seconds, each product as often as the step has it.

  Each is timed forward and in both directions of its gradient, alone. Where they take less than a microsecond, as those of
  the smallest model do, the loop around them takes part of that.
  """
  flops = seconds = 0.0
  for product in products:
    for left, right, contract in product.operands().values():
      flops += product.count * product.flops
      seconds += product.count * time_product(left, right, contract, rounds, options)
  return flops / seconds


def measure_square(rounds: int, size: int = 2048) -> float:
  """The rate in FLOP/s of a square float32 product at jax's default precision."""
  return 2 * size**3 / time_product((size, size), (size, size), (1, 0), rounds)


def measure_bandwidth(rounds: int, shape: tuple[int, int] = BANDWIDTH_SHAPE) -> float:
  """Bytes per second at which a float32 matrix-vector product reads its matrix, the faster of its two layouts."""
  rows, columns = shape
  seconds = [time_product((1, columns), shape, (1, 1), rounds), time_product((1, columns), shape[::-1], (1, 0), rounds)]
  return FLOAT_BYTES * rows * columns / min(seconds)


# --- Sampling ---


def draw_params(plan: Plan) -> dict:
  """Random parameters of a plan's network, laid out as a run lays them out on this platform."""
  tricks = tricks_of(plan)
  draw = jax.jit(lambda key: tricks.layout(init_params(key, plan.experiment.model)), compiler_options=tricks.init_options)
  return jax.block_until_ready(draw(derive_key(plan.experiment.train.seed, INIT, 0)))


def make_sample_timer(params: dict, plan: Plan, sample: SampleConfig) -> tuple[Callable[[int], float], float]:
  """Makes a function that draws that many times over and returns the seconds of one call; and the seconds compiling took.

  Args:
    params: laid out as the run lays them out.
    plan: gives seed, network and tokenizer.
    sample: what is drawn in one call.
  """
  model, seed, tokenizer = plan.experiment.model, plan.experiment.train.seed, plan.data.tokenizer
  began = time.perf_counter()
  generate.compile_texts(params, tokenizer, derive_key(seed, SAMPLE, 0), model, sample)
  compile_seconds = time.perf_counter() - began

  def seconds_per_call(calls: int) -> float:
    began = time.perf_counter()
    for i in range(calls):  # texts are decoded on the host: nothing is left to wait for
      generate.generate_texts(params, tokenizer, derive_key(seed, SAMPLE, i), model, sample)
    return (time.perf_counter() - began) / calls

  return seconds_per_call, compile_seconds
