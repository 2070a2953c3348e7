"""Timers of jgpt's compiled programs, and of the products and the memory of this machine.

Programs are warmed up before they are timed, and their results are waited for. The cases are in
`cases.py`, rates and shares in `results.py`.

Work of microseconds is repeated in a compiled loop, since a call from Python takes longer. What an
iteration reads passes an optimization barrier together with its number, so that XLA cannot move
work out of the loop.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jgpt import batches, generate, program
from jgpt.config import Experiment, SampleConfig
from jgpt.devices.compute import choose_quick_options, choose_step_options, resolve_compute
from jgpt.devices.footprint import measure_program
from jgpt.devices.limits import FLOAT_BYTES, Product
from jgpt.keys import INIT, SAMPLE, derive_key
from jgpt.model import init_params
from jgpt.optim.adam import select_tree
from jgpt.optim.chain import make_optimizer
from jgpt.plan import Plan
from jgpt.runs import checkpoint
from jgpt.sharding import arrange_blocks
from jgpt.step import MAX_STEPS_PER_CALL, TrainState, loss_and_grads

MAX_COPIED_BYTES = 64 << 20  # a larger state is not copied before each round
LEAST_SECONDS = 0.02  # of one measurement
BANDWIDTH_SHAPE = (50304, 768)  # GPT-2's head, far larger than a cache


# --- The step ---


class StepTimer:
  """A timer of an experiment's training step; calling it times steps.

  Attributes:
    plan: of the run.
    devices: those there are.
    compile_seconds: until the first step could begin: drawing the state, compiling the step,
      evaluation and sampling.
    memory_bytes: of the compiled step, from `measure_program`; the corpus is one of its arguments.
    corpus: the training part, on the devices.
  """

  def __init__(self, plan: Plan, devices: Sequence[jax.Device]):
    self.plan, self.devices = plan, devices
    began = time.perf_counter()
    made = program.compile_program(plan.experiment, devices, plan.data)
    self._state, self._run_steps = jax.block_until_ready(made.state), made.run_steps
    self.compile_seconds = time.perf_counter() - began
    self.memory_bytes = measure_program(made.run_steps)
    self.corpus = made.feed.corpus_at(0)
    self._copies = sum(x.nbytes for x in jax.tree.leaves(self._state)) <= MAX_COPIED_BYTES

  def __call__(self, steps: int) -> float:
    """Applies that many updates, up to 1,024 a call, and returns the seconds of one."""
    state = self.donate_state()
    began = time.perf_counter()
    state = self.run(state, steps)
    seconds = (time.perf_counter() - began) / steps
    self.keep_state(state)
    return seconds

  def run(self, state: TrainState, steps: int) -> TrainState:
    """Applies that many updates to a state, which is donated, and waits for them."""
    for first in range(0, steps, MAX_STEPS_PER_CALL):
      num = min(MAX_STEPS_PER_CALL, steps - first)
      state, _ = self._run_steps(self.corpus, state, jnp.int32(num))
    return jax.block_until_ready(state)

  def donate_state(self) -> TrainState:
    """Returns a state to donate: a copy of the initial one, or a large state itself."""
    if not self._copies:
      return self._state
    return jax.block_until_ready(jax.tree.map(jnp.copy, self._state))

  def keep_state(self, state: TrainState) -> None:
    """Keeps the successor of a large donated state, for the next round."""
    if not self._copies:
      self._state = state


class SaveTimer:
  """A timer of steps with and without a checkpoint written in the background."""

  def __init__(self, steps: StepTimer, manager: checkpoint.Manager):
    """Saves once, which compiles what saves need.

    Args:
      steps: its state is saved.
      manager: from `checkpoint.open_checkpoints`.
    """
    self._steps, self._manager = steps, manager
    self(1)

  def __call__(self, num: int) -> tuple[float, float, float]:
    """Applies `num` updates, one a call, saves, and applies as many again.

    Returns:
      Seconds of the first updates; seconds from the save to the end of the others and of writing;
      and of these the seconds during which the loop waited for the arrays to be copied.
    """
    state = self._run(self._steps.donate_state(), num)
    began = time.perf_counter()
    state = self._run(state, num)
    plain = time.perf_counter() - began
    began = time.perf_counter()
    checkpoint.save_checkpoint(self._manager, state)
    waited = time.perf_counter() - began
    state = self._run(state, num)
    self._manager.wait()
    saving = time.perf_counter() - began
    self._steps.keep_state(state)
    return plain, saving, waited

  def _run(self, state: TrainState, num: int) -> TrainState:
    for _ in range(num):
      state = self._steps.run(state, 1)
    return state


def resolve_plan(plan: Plan, device: jax.Device) -> Experiment:
  """Returns the plan's experiment with `compute` resolved for a device."""
  return resolve_compute(plan.experiment, device)


# --- Its parts ---


class PartsTimer:
  """A timer of the forward pass, the gradient and the update, each a program of its own.

  The programs have the step's compiler options, batches, dropout and arrangement of blocks. Making
  the batch counts for the forward pass and for the gradient.
  """

  def __init__(self, steps: StepTimer):
    """Makes the three programs, which are compiled in the first round.

    Args:
      steps: of the same plan; its states are donated.
    """
    self._steps, experiment = steps, resolve_plan(steps.plan, steps.devices[0])
    tx = make_optimizer(experiment)
    jit = partial(jax.jit, compiler_options=choose_step_options(experiment))

    @jit
    def forward(params: dict, corpus: Any, num: jax.Array) -> jax.Array:
      def body(i: jax.Array, total: jax.Array) -> jax.Array:
        here, _ = jax.lax.optimization_barrier((params, i))
        batch = batches.batch(corpus, i, experiment)
        # XLA removes the gradients, which are not used.
        return total + loss_and_grads(here, batch, i, experiment)[0]

      return jax.lax.fori_loop(0, num, body, jnp.zeros(()))

    @partial(jit, donate_argnums=0)
    def gradient(grads: dict, params: dict, corpus: Any, num: jax.Array) -> tuple[dict, jax.Array]:
      def body(i: jax.Array, carry: tuple) -> tuple:
        here, _ = jax.lax.optimization_barrier((params, i))
        batch = batches.batch(corpus, i, experiment)
        loss, grads = loss_and_grads(here, batch, i, experiment)
        return grads, carry[1] + loss

      return jax.lax.fori_loop(0, num, body, (grads, jnp.zeros(())))

    @partial(jit, donate_argnums=(0, 1))
    def update(params: dict, opt_state: Any, grads: dict, num: jax.Array) -> tuple[dict, Any]:
      def body(i: jax.Array, carry: tuple) -> tuple:
        params, opt_state = carry
        here, _ = jax.lax.optimization_barrier((grads, i))
        ok, loss = i >= 0, jnp.zeros(())  # not known when compiled, as in a step
        updates, opt_state = tx.update(here, opt_state, params, value=loss, ok=ok)
        return select_tree(ok, optax.apply_updates(params, updates), params), opt_state

      return jax.lax.fori_loop(0, num, body, (params, opt_state))

    self._forward, self._gradient, self._update = forward, gradient, update
    state = steps.donate_state()
    self._grads = jax.tree.map(jnp.zeros_like, state.params)

  def __call__(self, repeats: int) -> tuple[float, float, float]:
    """Repeats each part, and returns the seconds of a forward pass, a gradient and an update."""
    num, corpus, state = jnp.int32(repeats), self._steps.corpus, self._steps.donate_state()
    times = [time.perf_counter()]
    jax.block_until_ready(self._forward(state.params, corpus, num))
    times.append(time.perf_counter())
    self._grads, _ = jax.block_until_ready(self._gradient(self._grads, state.params, corpus, num))
    times.append(time.perf_counter())
    params, opt_state = jax.block_until_ready(
      self._update(state.params, state.opt_state, self._grads, num)
    )
    times.append(time.perf_counter())
    self._steps.keep_state(state.replace(params=params, opt_state=opt_state))
    return tuple((after - before) / repeats for before, after in itertools.pairwise(times))


# --- The machine ---


def time_product(
  left: tuple, right: tuple, contract: tuple, rounds: int, options: dict | None = None
) -> float:
  """Times a float32 matrix product that is repeated in a compiled loop.

  Args:
    left: shape.
    right: shape.
    contract: the contracted dimension of each.
    rounds: that are timed, after one that warms up.
    options: of the compiler.

  Returns:
    The median of the rounds in seconds.
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
  """Measures the rate in FLOP/s of the products of a step, each weighted by its count.

  Each product and the two of its gradient are timed one at a time. Products of less than a
  microsecond, as in the smallest model, include the time of the loop.

  Args:
    products: from `limits.list_products`.
    rounds: that are timed.
    options: of the compiler.
  """
  flops = seconds = 0.0
  for product in products:
    for left, right, contract in product.operands().values():
      flops += product.count * product.flops
      seconds += product.count * time_product(left, right, contract, rounds, options)
  return flops / seconds


def measure_square(rounds: int, size: int = 2048) -> float:
  """Measures the rate in FLOP/s of a square float32 product at jax's default precision."""
  return 2 * size**3 / time_product((size, size), (size, size), (1, 0), rounds)


def measure_bandwidth(rounds: int, shape: tuple[int, int] = BANDWIDTH_SHAPE) -> float:
  """Measures the bytes/s at which a float32 matrix-vector product reads its matrix.

  Both layouts of the matrix are timed, and the faster one counts.
  """
  rows, columns = shape
  seconds = [
    time_product((1, columns), shape, (1, 1), rounds),
    time_product((1, columns), shape[::-1], (1, 0), rounds),
  ]
  return FLOAT_BYTES * rows * columns / min(seconds)


# --- Sampling ---


def draw_params(plan: Plan, device: jax.Device) -> dict:
  """Draws parameters of a plan's network on a device, arranged as in a run there."""
  experiment = resolve_plan(plan, device)

  @partial(jax.jit, compiler_options=choose_quick_options(experiment))
  def draw(key: jax.Array) -> dict:
    return arrange_blocks(init_params(key, experiment.model), experiment.compute.layers)

  return jax.block_until_ready(
    draw(jax.device_put(derive_key(plan.experiment.train.seed, INIT, 0), device))
  )


def make_sample_timer(
  params: dict, plan: Plan, sample: SampleConfig
) -> tuple[Callable[[int], float], float]:
  """Compiles sampling, and makes a function that times it.

  Args:
    params: arranged as in a run.
    plan: seed, network and tokenizer are read.
    sample: what a call draws.

  Returns:
    A function of a number of calls to the seconds of one, and the seconds of compiling.
  """
  (device, *_) = jax.tree.leaves(params)[0].devices()
  experiment, tokenizer = resolve_plan(plan, device), plan.data.tokenizer
  seed = experiment.train.seed
  began = time.perf_counter()
  generate.lower_texts(params, tokenizer, experiment, sample).compile()
  compile_seconds = time.perf_counter() - began

  def seconds_per_call(calls: int) -> float:
    began = time.perf_counter()
    for i in range(calls):  # returns decoded texts, so there is nothing to wait for
      generate.generate_texts(params, tokenizer, derive_key(seed, SAMPLE, i), experiment, sample)
    return (time.perf_counter() - began) / calls

  return seconds_per_call, compile_seconds
