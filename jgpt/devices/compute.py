"""What makes a platform faster and computes the same.

Responsible for every choice that depends on the platform, each with its reason and what it was measured to gain (2 cores of
an AMD EPYC, Zen 4, jax 0.10.2; `python -m jgpt.bench`). `--set mesh.tricks=false` turns all of them off: `PLAIN` is the
readable definition, and the equivalence tests run with and without. Not responsible for what is computed (`step.py`).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jgpt.attention import attend_in_blocks
from jgpt.batches import NUM_GROUPS, skip_padding
from jgpt.config import Experiment, ModelConfig
from jgpt.params import count_params
from jgpt.sharding import stack_blocks, unstack_blocks
from jgpt.step import GradsFn, Keep, keep_unless, loss_and_grads, loss_fn

SMALL_MODEL_PARAMS = 100_000
FUSIONS = "xla_cpu_experimental_ynn_fusion_type"  # the option that names XLA's YNNPACK fusions; "" is none


@dataclasses.dataclass(frozen=True)
class Tricks:
  """How an experiment's programs are made.

  Attributes:
    layout: `stack_blocks` or `unstack_blocks`: how layers lie in memory.
    loss_fn: of the training step: `step.loss_fn`, or what computes the same.
    grads_fn: its value and gradient: `step.loss_and_grads`, or what computes the same.
    keep: how an update is skipped: `step.keep_unless`, or what computes the same.
    step_options: the compiler's, for the training step.
    init_options: the compiler's, for a program that runs once.
  """

  layout: Callable = stack_blocks
  loss_fn: Callable = loss_fn
  grads_fn: GradsFn = loss_and_grads
  keep: Keep = keep_unless
  step_options: dict = dataclasses.field(default_factory=dict)
  init_options: dict = dataclasses.field(default_factory=dict)


PLAIN = Tricks()


def choose_tricks(experiment: Experiment, platform: str) -> Tricks:
  """Chooses what makes a resolved experiment faster on a platform ("cpu", "gpu", "tpu"); `PLAIN` where nothing does."""
  tricks = PLAIN
  if experiment.mesh.tricks and platform == "cpu":
    tricks = Tricks(
      layout=choose_layout(experiment.model),
      keep=keep_one_by_one,
      step_options=choose_options(experiment.model),
      init_options=QUICK_OPTIONS,
      **choose_loss(experiment),
    )
  scan = experiment.mesh.scan_layers
  return tricks if scan is None else dataclasses.replace(tricks, layout=stack_blocks if scan else unstack_blocks)


def choose_loss(experiment: Experiment) -> dict[str, Callable]:
  """How the loss and its gradient are computed: `Tricks.loss_fn` and `Tricks.grads_fn`."""
  if has_padding(experiment):
    return {"loss_fn": skip_padding(loss_fn), "grads_fn": skip_padding(jax.value_and_grad(loss_fn))}
  if has_long_context(experiment):
    attend = attend_in_blocks
    return {"loss_fn": partial(loss_fn, attend=attend), "grads_fn": partial(loss_and_grads, attend=attend)}
  return {}


# --- Compiler options ---

# For a program that runs once: LLVM's heavier passes took 0.9 s of the 1.4 s in which `names`' initial values compiled.
QUICK_OPTIONS = {"xla_backend_optimization_level": 1}


def choose_options(config: ModelConfig) -> dict:
  """Compiler options for the training step.

  A small model's operations are shorter than the cost of handing them to other threads, and of XLA's YNNPACK fusions:
  without both, a step of `names` took 36 us instead of 46. LLVM's heavier passes make its loops of 16 longer, not faster:
  at level 1 it took 31 us. At batch 64: 0.92 ms; with the fusions 1.05, with threads 1.72, with neither option 1.23.
  """
  if count_params(config) > SMALL_MODEL_PARAMS:
    return {}
  return QUICK_OPTIONS | {"xla_cpu_multi_thread_eigen": False, FUSIONS: ""}


# --- Layers ---


def choose_layout(config: ModelConfig) -> Callable:
  """Writes several layers out one after the other.

  A loop over stacked layers compiles once for all of them, but its gradient is written piece by piece into the stack, which
  costs a third to half of a step.
  """
  return stack_blocks if config.num_layers == 1 else unstack_blocks


# --- The loss ---


def has_long_context(experiment: Experiment) -> bool:
  """Whether positions are so many that attention is worth cutting into blocks of queries, which compute 5/8 of the scores.

  A step of `shakespeare_char` without dropout at batch 8 took 0.96 s instead of 1.07 at its 256 positions, and 1.37 s
  instead of 1.80 at 1,024 (batch 2); with dropout, whose mask is drawn whole, 1.14 instead of 1.20. At 64 nothing.
  """
  return experiment.data.seq_len >= 256 and experiment.data.seq_len % 4 == 0


def has_padding(experiment: Experiment) -> bool:
  """Whether a batch holds documents, enough of them to put those of a length together, on one device.

  Five of six names fit into half of the 16 positions, where a step takes a third of the time: at batch 64 a name took 8.0
  us instead of 14.0, at batch 16 11.1 instead of 15.8. At batch 1 a step would gain 5 of 30 us, and compiling lose half a
  second.
  """
  data, train = experiment.data, experiment.train
  return (
    data.batching == "documents"
    and data.batch_size >= 16  # below, the groups' own cost is more than what they save
    and data.batch_size % NUM_GROUPS == 0
    and data.seq_len % 2 == 0
    and train.micro_batch_size is None
    and not experiment.model.dropout  # what is dropped out depends on where a document stands
    and experiment.mesh.data == 1  # sorted, a divided batch would move between devices
  )


# --- The update ---


def keep_one_by_one(ok: jax.Array, new: Any, old: Any) -> Any:
  """`keep_unless`, each leaf after the one before.

  Once `ok` is known all leaves are ready, and XLA hands some to other threads: a step of `names` took 58 us of processor
  time instead of 35.
  """
  olds, structure = jax.tree.flatten(old)
  kept = []
  for n, o in zip(jax.tree.leaves(new), olds, strict=True):
    kept.append(jnp.where(ok, n, o))
    ok &= ok | (kept[-1].ravel()[0] > 0)  # what it was, and known only after this leaf: compilers do not see through it
  return jax.tree.unflatten(structure, kept)
