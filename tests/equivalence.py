"""What the equivalence tests share: jgpt against the scalar oracle, leaf by leaf, and a record of
what was measured.

`check_gradients` and `check_training` are the comparisons. test_reference.py expects them to pass;
test_planted_errors.py plants errors in jgpt and expects the very same functions to fail.
"""

import collections
import contextlib
import functools
import math
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from reference import scalar_gpt

import jgpt.batches
import jgpt.data.corpus
import jgpt.step
from jgpt.config import Experiment, ModelConfig, OptimizerConfig
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.devices.compute import choose_step_options
from jgpt.model import init_params
from jgpt.params import param_table
from jgpt.system.precision import enable_x64
from jgpt.text.tokenizer import CharTokenizer

# Short, ordinary, and around the context of 16: 15 letters is the longest name whose closing BOS is
# still predicted, 16 loses exactly that, and 24 is cut among its letters.
NAMES = ("io", "emma", "maximilianoluca", "bartholomewjames", "wolfeschlegelsteinhausen")
TOKENIZER = CharTokenizer(string.ascii_lowercase, bos=True)
# Relative to the largest entry of the leaf.
GRADIENT_TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
LOSS_TOLERANCE = {"float64": 1e-10, "float32": 1e-6}
NUM_STEPS = 20
# What `resolve_compute` reads of a device.
Device = collections.namedtuple("Device", "platform device_kind")
CPU = Device("cpu", "cpu")
GPU = Device("gpu", "NVIDIA H100 80GB HBM3")
OLD_GPU = Device("gpu", "Tesla T4")
TPU = Device("tpu", "TPU v5 lite")
# Where the options are not the point: what runs for milliseconds need not be compiled for seconds.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):  # later versions do not know it
  # XLA's emitters of fused loops take two thirds of the time that a small network's gradient takes
  # to compile.
  QUICK["xla_cpu_use_fusion_emitters"] = False


# --- Comparing, and keeping what was measured ---


class Row(NamedTuple):
  """One leaf compared.

  Attributes:
    oracle: what it was compared with.
    parameter: the leaf's name.
    entries: how many numbers were compared.
    difference: the largest absolute difference.
    relative: that, divided by the leaf's largest entry.
    tolerance: what `relative` may be.
  """

  oracle: str
  parameter: str
  entries: int
  difference: float
  relative: float
  tolerance: float


class UnequalError(AssertionError):
  """Leaves differ; `rows` holds those that do."""

  def __init__(self, rows: Sequence[Row]):
    super().__init__(
      f"differs from {rows[0].oracle} in "
      f"{', '.join(f'{r.parameter} by {r.relative:.2g}' for r in rows)}, relative to the "
      f"leaf's largest entry; tolerance {rows[0].tolerance:.0e}"
    )
    self.rows = rows


MEASURED: list[
  Row
] = []  # of the test that runs now; conftest.py takes them away and prints them at the end


def leaves_by_name(tree: Any) -> dict[str, np.ndarray]:
  """A pytree's leaves as NumPy arrays, under names like "blocks/w_qkv"."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in leaves
  }


def compare(oracle: str, expected_tree: Any, got_tree: Any, tolerance: float) -> None:
  """Asserts, leaf by leaf, that the largest difference is within `tolerance` times the expected
  leaf's largest entry.

  Records every leaf, so that the end of the run can show how close the two were.

  Args:
    oracle: names where `expected_tree` comes from.
    expected_tree: what is right.
    got_tree: of the same structure and shapes.
    tolerance: 0 asks for equality.

  Raises:
    UnequalError: naming every leaf that differs by more, or is not finite.
  """
  expected, got = leaves_by_name(expected_tree), leaves_by_name(got_tree)
  assert expected.keys() == got.keys(), (
    f"leaves {sorted(expected)} were expected, got {sorted(got)}"
  )
  rows = []
  for name, wanted in expected.items():
    assert wanted.shape == got[name].shape, (
      f"{name}: shape {wanted.shape} was expected, got {got[name].shape}"
    )
    wanted = wanted.astype(np.float64)
    difference = float(np.max(np.abs(wanted - got[name].astype(np.float64))))  # NaN if any entry is
    largest = float(np.max(np.abs(wanted)))
    relative = difference / largest if largest else (0.0 if difference == 0 else math.inf)
    rows.append(Row(oracle, name, wanted.size, difference, relative, tolerance))
  MEASURED.extend(rows)
  unequal = [
    row for row in rows if not row.relative <= tolerance
  ]  # "not <=" so that NaN is unequal
  if unequal:
    raise UnequalError(unequal)


@contextlib.contextmanager
def must_differ() -> Iterator[list[Row]]:
  """Asserts that a comparison in this block fails.

  Fills the list with the leaves that differed, and records nothing.
  """
  kept, found = len(MEASURED), []
  try:
    yield found
  except UnequalError as error:
    found.extend(error.rows)
  finally:
    del MEASURED[kept:]
  assert found, "the comparison passed"


def table(rows: Iterable[Row]) -> list[str]:
  """Formats rows for a terminal, one line for each parameter and oracle: the worst of its
  comparisons, entries summed.
  """
  worst: dict[tuple, Row] = {}
  for row in rows:
    group = (row.oracle, row.parameter, row.tolerance)
    old = worst.get(group, row._replace(entries=0))
    worst[group] = max(old, row, key=lambda r: r.relative)._replace(
      entries=old.entries + row.entries
    )
  header = ("oracle", "parameter", "entries", "largest difference", "/ largest entry", "tolerance")
  lines = [header]
  for row in sorted(worst.values(), key=lambda r: r.oracle):
    numbers = (
      f"{row.entries:,}",
      f"{row.difference:.1e}",
      f"{row.relative:.1e}",
      f"{row.tolerance:.0e}",
    )
    lines.append((row.oracle, row.parameter, *numbers))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  pad = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust)
  return [
    "  ".join(p(c, w) for p, c, w in zip(pad, line, widths, strict=True)).rstrip() for line in lines
  ]


# --- What is compared ---


def names_experiment(**changes: Any) -> Experiment:
  """The `names` experiment, resolved for 27 ids.

  `changes` are written with "__" for the dot: model__num_layers=2.
  """
  experiment = change(
    load_experiment("names"), {name.replace("__", "."): value for name, value in changes.items()}
  )
  return resolve(experiment, TOKENIZER.vocab_size)


@functools.cache
def options_of(way: str) -> Mapping[str, Any] | None:
  """XLA's options of the program that users run: "default" under a library user's own `jax.jit`,
  "shipped" as the commands compile `names`.
  """
  return {"default": None, "shipped": choose_step_options(names_experiment())}[way]


@functools.cache
def initial_params(config: ModelConfig) -> dict:
  """The float32 parameters of seed 0, as NumPy arrays, so that tests with and without float64 begin
  from the same.
  """
  with enable_x64(False):
    return jax.tree.map(
      np.asarray, jax.jit(lambda: init_params(jax.random.key(0), config), compiler_options=QUICK)()
    )


def cast(tree: Any, dtype: str) -> Any:
  """Puts a pytree on the device, its floats as `dtype`; for float64 its integers become int64.

  The step count too: optax computes the rate and the bias corrections from it, in float32 if it is
  int32.
  """
  ints = "int64" if dtype == "float64" else "int32"
  return jax.tree.map(
    lambda x: jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else ints), tree
  )


def corpus_of(documents: Sequence[str], experiment: Experiment) -> jgpt.batches.Documents:
  """Tokenizes documents as training does, on the device."""
  return jax.tree.map(
    jnp.asarray,
    jgpt.data.corpus.make_documents(list(documents), TOKENIZER, experiment.data.seq_len),
  )


def batch_of(documents: Sequence[str], experiment: Experiment) -> jgpt.batches.Batch:
  """Makes the batch that holds each of the documents once."""
  config = change(experiment, {"data.batch_size": len(documents)}).data
  return jgpt.batches.next_documents(corpus_of(documents, experiment), jnp.int32(0), config)


def initial_state(experiment: Experiment, dtype: str = "float32") -> jgpt.step.TrainState:
  """The state before the first update."""
  params = jax.tree.map(jnp.asarray, initial_params(experiment.model))
  return cast(jgpt.step.begin_state(params, experiment), dtype)


# --- Parameters in the oracle's form, and back ---


def to_oracle(params: Mapping[str, Any]) -> dict[str, list[list[float]]]:
  """Turns jgpt's parameters into the oracle's: rows of floats, each matrix (out, in), heads side by
  side.
  """
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  matrices = {"wte": params["tok_embed"], "wpe": params["pos_embed"], "lm_head": params["unembed"]}
  for layer in range(len(params["blocks"]["w_up"])):
    p = {name: stacked[layer] for name, stacked in params["blocks"].items()}
    D = p["w_qkv"].shape[0]
    for i, name in enumerate(("attn_wq", "attn_wk", "attn_wv")):
      matrices[f"layer{layer}.{name}"] = p["w_qkv"][:, i].reshape(D, -1).T
    matrices[f"layer{layer}.attn_wo"] = p["w_out"].reshape(-1, D).T
    matrices[f"layer{layer}.mlp_fc1"] = p["w_up"].T
    matrices[f"layer{layer}.mlp_fc2"] = p["w_down"].T
  return {name: matrix.tolist() for name, matrix in matrices.items()}


def from_oracle(rows: scalar_gpt.FloatParameters, config: ModelConfig) -> dict:
  """Turns the oracle's parameters (or gradients, or moments) into a tree shaped like jgpt's,
  float64.
  """
  D, N, H, L = config.d_model, config.num_heads, config.head_dim, config.num_layers
  get = {name: np.array(matrix) for name, matrix in rows.items()}

  def stack(one: Callable[[str], np.ndarray]) -> np.ndarray:
    return np.stack([one(f"layer{layer}.") for layer in range(L)])

  def qkv(prefix: str) -> np.ndarray:
    return np.stack(
      [get[prefix + name].T.reshape(D, N, H) for name in ("attn_wq", "attn_wk", "attn_wv")], axis=1
    )

  blocks = {
    "w_qkv": stack(qkv),
    "w_out": stack(lambda prefix: get[prefix + "attn_wo"].T.reshape(N, H, D)),
    "w_up": stack(lambda prefix: get[prefix + "mlp_fc1"].T),
    "w_down": stack(lambda prefix: get[prefix + "mlp_fc2"].T),
  }
  tree = {
    "tok_embed": get["wte"],
    "pos_embed": get["wpe"],
    "blocks": blocks,
    "unembed": get["lm_head"],
  }
  assert tree.keys() == param_table(config).keys()
  return tree


def oracle_config(config: ModelConfig) -> scalar_gpt.ScalarGPTConfig:
  """The same sizes as the oracle calls them."""
  assert config.d_ff == 4 * config.d_model, "the oracle's MLP is four times as wide as the model"
  return scalar_gpt.ScalarGPTConfig(
    config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.num_layers
  )


@functools.cache
def oracle_gradients(config: ModelConfig, document: str) -> tuple[float, dict]:
  """The oracle's loss and gradients of one document at the initial parameters."""
  params, tokens = to_oracle(initial_params(config)), TOKENIZER.encode_document(document)
  loss, gradients = scalar_gpt.loss_and_gradients(params, tokens, oracle_config(config))
  return loss, from_oracle(gradients, config)


@functools.cache
def oracle_training(config: ModelConfig, optimizer: OptimizerConfig) -> dict:
  """The oracle's losses, parameters and moments after `NUM_STEPS` updates on `NAMES`, one name an
  update.
  """
  result = scalar_gpt.adam_steps(
    to_oracle(initial_params(config)),
    [TOKENIZER.encode_document(name) for name in NAMES],
    oracle_config(config),
    num_steps=NUM_STEPS,
    total_steps=optimizer.decay_steps,
    lr=optimizer.peak_lr,
    b1=optimizer.b1,
    b2=optimizer.b2,
    eps=optimizer.eps,
  )
  trees = {"params": result.values, "mu": result.first_moments, "nu": result.second_moments}
  return {
    "losses": np.array(result.losses),
    **{name: from_oracle(rows, config) for name, rows in trees.items()},
  }


# --- The comparisons ---


def check_gradients(
  experiment: Experiment,
  dtype: str,
  *,
  jit: bool = True,
  documents: Sequence[str] = NAMES,
  compiler_options: Mapping[str, Any] | None = QUICK,
) -> None:
  """Asserts that each document's loss, and every entry of its gradient, is the oracle's.

  Args:
    experiment: resolved.
    dtype: of the parameters; "float64" needs the fixture x64.
    jit: whether to compile the whole, as training does, or to run it operation by operation.
    documents: each is a batch of one.
    compiler_options: for `jax.jit`.
  """
  config = experiment.model
  params = cast(initial_params(config), dtype)

  def loss_and_grads(
    params: dict, batch: jgpt.batches.Batch
  ) -> tuple:  # new each time, so that nothing traced is reused
    return jgpt.step.loss_and_grads(params, batch, 0, experiment)

  run = jax.jit(loss_and_grads, compiler_options=compiler_options) if jit else loss_and_grads
  oracle = f"scalar gradients, {config.num_layers}-layer {dtype}"
  for document in documents:
    expected_loss, expected = oracle_gradients(config, document)
    loss, grads = run(params, batch_of([document], experiment))
    compare(oracle, expected, grads, GRADIENT_TOLERANCE[dtype])
    compare(oracle, {"loss": np.float64(expected_loss)}, {"loss": loss}, LOSS_TOLERANCE[dtype])


def check_training(
  experiment: Experiment, dtype: str, compiler_options: Mapping[str, Any] | None = QUICK
) -> None:
  """Asserts that `NUM_STEPS` updates on `NAMES` in one compiled call are the oracle's.

  In float64 losses, parameters and both moments to 1e-9 of the leaf's largest entry. In float32 the
  losses to 1e-5: Adam divides by the root of the second moment, which magnifies the rounding of
  gradients near zero without bound.

  Args:
    experiment: resolved; `data.batch_size` 1.
    dtype: of the state; "float64" needs the fixture x64.
    compiler_options: for `jax.jit`.
  """

  def train_steps(state: jgpt.step.TrainState, corpus: jgpt.batches.Documents) -> tuple:
    num_steps = jnp.int32(NUM_STEPS)
    return jgpt.step.train_steps(state, corpus, num_steps, experiment, capacity=NUM_STEPS)

  state, corpus = initial_state(experiment, dtype), corpus_of(NAMES, experiment)
  state, metrics = jax.jit(train_steps, compiler_options=compiler_options)(state, corpus)
  got = {"losses": metrics["train/loss"], "params": state.params}
  got |= {name: getattr(state.opt_state["adam"], name) for name in ("mu", "nu")}
  expected = oracle_training(experiment.model, experiment.optimizer)
  oracle = f"scalar Adam, {NUM_STEPS} steps, {experiment.model.num_layers}-layer {dtype}"
  if dtype == "float64":
    compare(oracle, expected, got, 1e-9)
  else:
    compare(oracle, {"losses": expected["losses"]}, {"losses": got["losses"]}, 1e-5)
