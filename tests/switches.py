"""What the tests of the network's switches share: models that cover them, the oracles' form, and
the comparisons.

The oracles name parameters as GPT-2 does and hold matrices as (in, out); `to_oracle` and
`from_oracle` are the only places that know both forms. `check_network`, `check_training`,
`check_schedule` and `check_masks` are the comparisons. test_numpy_reference.py and
test_torch_reference.py expect them to pass; test_planted_switches.py plants errors in jgpt and
expects the very same functions to fail.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from equivalence import MEASURED, QUICK, Row, UnequalError, cast, compare
from reference import numpy_gpt

import jgpt.attention
import jgpt.batches
import jgpt.keys
import jgpt.model
import jgpt.optim.adam
import jgpt.optim.chain
import jgpt.optim.schedule
import jgpt.sharding
import jgpt.step
from jgpt.batches import Batch
from jgpt.config import (
  DataConfig,
  Experiment,
  ModelConfig,
  OptimizerConfig,
  SampleConfig,
  TrainConfig,
)
from jgpt.config.experiment import DROPOUT_PLACES
from jgpt.config.settings import change, resolve
from jgpt.params import param_table, walk

# Relative to the largest entry of the leaf.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
NUM_STEPS = 20

# --- The models ---

SWITCHES = {
  "norm": ("rms", "layer", "layer_no_bias"),
  "norm_embed": (False, True),
  "norm_final": (False, True),
  "activation": ("relu", "gelu_tanh", "gelu_erf"),
  "positions": ("learned", "sinusoidal"),
  "biases": ("none", "mlp", "all"),
  "tied_head": (False, True),
  "scale_embed": (False, True),
}
# The five systems, as `names`, `shakespeare_bpe`, `shakespeare_bytes`, `shakespeare_char` and
# `gpt2_shakespeare` set them.
SYSTEMS = {
  "microgpt": ("rms", True, False, "relu", "learned", "none", False, False),
  "NumPy GPT": ("layer", False, True, "gelu_tanh", "sinusoidal", "none", True, False),
  "PyTorch bytes": ("layer", False, True, "gelu_erf", "learned", "mlp", True, True),
  "nanoGPT": ("layer_no_bias", False, True, "gelu_erf", "learned", "none", True, False),
  "GPT-2": ("layer", False, True, "gelu_tanh", "learned", "all", True, False),
}
SIZES = {
  "vocab_size": 11,
  "max_seq_len": 8,
  "num_layers": 2,
  "num_heads": 2,
  "d_model": 8,
  "d_ff": 20,
  "init_std": 0.4,
}


def make_model(switches: tuple, **sizes: Any) -> ModelConfig:
  """A small model with the switches given in the order of `SWITCHES`."""
  settings = (
    SIZES | {"scale_residual_init": False} | dict(zip(SWITCHES, switches, strict=True)) | sizes
  )
  return ModelConfig(**settings)


def all_switches() -> list[tuple]:
  """Every combination that a model may have."""
  return [s for s in itertools.product(*SWITCHES.values()) if not (s[1] and s[0] != "rms")]


@functools.cache
def covering_switches() -> list[tuple]:
  """Combinations beyond the systems, so that with them every two values of two switches occur
  together somewhere.
  """

  def pairs(switches: tuple) -> set:
    return set(itertools.combinations(enumerate(switches), 2))

  missing = set().union(*map(pairs, all_switches())) - set().union(*map(pairs, SYSTEMS.values()))
  chosen = []
  while missing:
    chosen.append(max(all_switches(), key=lambda switches: len(pairs(switches) & missing)))
    missing -= pairs(chosen[-1])
  return chosen


def label(switches: tuple) -> str:
  """A name for a combination: that of the system that has it, or its values."""
  names = {v: k for k, v in SYSTEMS.items()}
  return names.get(switches) or ",".join(str(s) for s in switches)


@functools.cache
def draw_params(config: ModelConfig) -> dict:
  """Parameters as NumPy float64 arrays that are float32 numbers too.

  Gains and biases are drawn, where an error could hide.

  Drawn from `param_table`, not by `init_params`: that would have to be compiled for every model.
  """
  rng = np.random.default_rng(2)
  tree = {"blocks": {}}
  for name, param, num_layers in walk(config):
    layers = (num_layers,) if name.startswith("blocks/") else ()
    value = param.mean + (param.std or 0.3) * rng.normal(size=(*layers, *param.shape))
    if param.padding:
      value[-param.padding :] = 0
    (tree["blocks"] if layers else tree)[name.removeprefix("blocks/")] = value.astype(
      np.float32
    ).astype(np.float64)
  return {name: tree[name] for name in param_table(config)}


def draw_batch(
  config: ModelConfig, batch_size: int = 3, seed: int = 0, seq_len: int | None = None
) -> Batch:
  """Random ids, as many as the context holds unless `seq_len` says; some targets weigh nothing."""
  rng, seq_len = np.random.default_rng(seed), seq_len or config.max_seq_len
  ids = rng.integers(0, config.vocab_size, (batch_size, seq_len + 1)).astype(np.int32)
  weights = np.ones((batch_size, seq_len), np.float32)
  weights[0, seq_len // 2 :] = 0
  return Batch(jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:]), jnp.asarray(weights))


# --- The oracles' form ---

OUTSIDE = {
  "tok_embed": "wte",
  "pos_embed": "wpe",
  "norm_final_gain": "ln_f.weight",
  "norm_final_bias": "ln_f.bias",
  "unembed": "lm_head.weight",
}
INSIDE = {
  "norm_attn_gain": "ln_1.weight",
  "norm_attn_bias": "ln_1.bias",
  "w_qkv": "attn.c_attn.weight",
  "b_qkv": "attn.c_attn.bias",
  "w_out": "attn.c_proj.weight",
  "b_out": "attn.c_proj.bias",
  "norm_mlp_gain": "ln_2.weight",
  "norm_mlp_bias": "ln_2.bias",
  "w_up": "mlp.c_fc.weight",
  "b_up": "mlp.c_fc.bias",
  "w_down": "mlp.c_proj.weight",
  "b_down": "mlp.c_proj.bias",
}


def _oracle_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
  D = config.d_model
  return {"w_qkv": (D, 3 * D), "b_qkv": (3 * D,), "w_out": (D, D)}.get(name, ())


def to_oracle(params: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
  """Turns jgpt's parameters (blocks stacked) into the oracles', which know no padding."""
  params = without_padding(params, config)
  flat = {
    OUTSIDE[name]: np.asarray(value, np.float64)
    for name, value in params.items()
    if name != "blocks"
  }
  for name, stacked in params["blocks"].items():
    for layer, value in enumerate(np.asarray(stacked, np.float64)):
      flat[f"h.{layer}.{INSIDE[name]}"] = value.reshape(_oracle_shape(name, config) or value.shape)
  return flat


def from_oracle(flat: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict:
  """Turns the oracles' parameters, gradients or moments into a tree shaped like `like`, but without
  padding.
  """
  tree = {name: np.asarray(flat[OUTSIDE[name]]) for name in like if name != "blocks"}
  layers = range(len(like["blocks"]["w_up"]))
  tree["blocks"] = {
    name: np.stack([np.reshape(flat[f"h.{i}.{INSIDE[name]}"], value.shape[1:]) for i in layers])
    for name, value in like["blocks"].items()
  }
  assert sum(np.size(x) for x in jax.tree.leaves(tree)) == sum(np.size(x) for x in flat.values())
  return tree


def oracle_names(config: ModelConfig, kinds: tuple[str, ...]) -> set[str]:
  """The oracles' names of the parameters of some kinds."""
  names = set()
  for name, param, _ in walk(config):
    if param.kind in kinds:
      outside = name.removeprefix("blocks/")
      layers = range(config.num_layers)
      names |= {OUTSIDE[name]} if outside == name else {f"h.{i}.{INSIDE[outside]}" for i in layers}
  return names


def without_padding(tree: Mapping[str, Any], config: ModelConfig) -> dict:
  """Cuts the rows that exist for compute only off parameters, gradients or moments."""
  return {
    name: x[: config.vocab_size] if name in ("tok_embed", "unembed") else x
    for name, x in tree.items()
  }


# --- The comparisons ---

CONSTANT_RATE = OptimizerConfig(peak_lr=1.0, schedule="constant", b1=0.9, b2=0.95, eps=1e-8)


def numpy_oracle(
  params: Mapping[str, Any],
  batch: Batch,
  config: ModelConfig,
  masks: Mapping[str, Any] | None = None,
) -> dict:
  """The logits, the loss and the gradients that the NumPy GPT derives by hand, under jgpt's
  names.
  """
  flat, (tokens_BT, targets_BT, weights_BT) = to_oracle(params, config), map(np.asarray, batch)
  loss, grads = numpy_gpt.loss_and_gradients(flat, tokens_BT, targets_BT, weights_BT, config, masks)
  logits_BTV = numpy_gpt.forward(flat, tokens_BT, config, masks)
  return {"logits": logits_BTV, "loss": np.float64(loss), "grads": from_oracle(grads, params)}


def compare_leaves(
  oracle: str, expected: Mapping[str, Any], got: Mapping[str, Any], tolerance: float
) -> None:
  """`compare`, for trees like the parameters': queries, keys and values each by themselves, key
  biases absolutely.

  The loss does not depend on the key's bias: it adds the same to all scores of a query. Its
  gradient is 0 but for rounding, of which no share can be asked to be right.
  """
  expected, got = _split_qkv(expected), _split_qkv(got)
  wanted, found = (tree.get("blocks", {}).pop("b_k", None) for tree in (expected, got))
  compare(oracle, expected, got, tolerance)
  if wanted is not None:
    difference = float(np.max(np.abs(np.stack([wanted, wanted - np.asarray(found, np.float64)]))))
    row = Row(oracle, "blocks/b_k (absolute)", wanted.size, difference, difference, tolerance)
    MEASURED.append(row)
    if not difference <= tolerance:
      raise UnequalError([row])


def compare_params(
  oracle: str, expected: Mapping[str, Any], got: Mapping[str, Any], tolerance: float
) -> None:
  """`compare_leaves`, for parameters after updates: the key's bias to 1e-6.

  Its gradient is rounding, about 1e-17, which Adam divides by eps: at the 1e-8 of all experiments
  what is left is up to 1e-10 of the parameter after 20 updates.
  """
  expected, got = _split_qkv(expected), _split_qkv(got)
  wanted, found = (tree["blocks"].pop("b_k", None) for tree in (expected, got))
  compare(oracle, expected, got, tolerance)
  if wanted is not None:
    compare(oracle, {"blocks/b_k": wanted}, {"blocks/b_k": found}, 1e-6)


def _split_qkv(tree: Mapping[str, Any]) -> dict:
  blocks = dict(tree.get("blocks", {}))
  for name, axis in (("w_qkv", 2), ("b_qkv", 1)):  # after the layers
    if name in blocks:
      parts = np.moveaxis(np.asarray(blocks.pop(name)), axis, 0)
      blocks |= {f"{name[0]}_{part}": value for part, value in zip("qkv", parts, strict=True)}
  return dict(tree) | ({"blocks": blocks} if blocks else {})


@contextlib.contextmanager
def in_brief() -> Iterator[None]:
  """Keeps one row, the worst, of each oracle that this block compares with: the table at the end is
  for people.
  """
  start = len(MEASURED)
  yield
  worst: dict[tuple, Row] = {}
  for row in MEASURED[start:]:
    group = (row.oracle, row.tolerance)
    old = worst.get(group, row._replace(entries=0))
    larger = max(old, row, key=lambda r: r.relative)
    worst[group] = larger._replace(parameter="(all leaves)", entries=old.entries + row.entries)
  MEASURED[start:] = worst.values()


def check_network(
  config: ModelConfig,
  dtype: str = "float64",
  *,
  what: str,
  oracle: Callable[..., dict] = numpy_oracle,
  oracle_name: str = "NumPy GPT",
  how: str = "stacked",
  batch: Batch | None = None,
  micro_batch_size: int | None = None,
  masks: Mapping[str, Any] | None = None,
) -> None:
  """Asserts that logits, loss and every entry of the gradient are the oracle's.

  That padding is masked and gets none.

  Logits are those of the whole batch at once, and not compared where there are masks or
  micro-batches.

  Args:
    config: sizes and switches.
    dtype: of the parameters; "float64" needs the fixture x64.
    what: of the oracle this is compared with, for the table.
    oracle: computes what is right, like `numpy_oracle`.
    oracle_name: for the table.
    how: "stacked" compiles one loop over the layers, "unstacked" the layers written out, with flat
      products, as runs on a CPU do; "eager" runs the layers written out operation by operation,
      which compiles nothing that the next model of the same sizes does not use again.
    batch: three sequences that fill the context, if None.
    micro_batch_size: of jgpt; the oracle takes the batch at once.
    masks: the oracle's dropout; with `config.dropout` jgpt draws those of step 0. Without masks
      jgpt is given no key of dropout, as in evaluation.
  """
  params, batch = draw_params(config), draw_batch(config) if batch is None else batch
  experiment = make_experiment(
    config, CONSTANT_RATE, batch.inputs_BT.shape[0], micro_batch_size=micro_batch_size
  )
  if how == "unstacked":
    experiment = change(experiment, {"compute.matmul": "flat"})

  def run(params: dict, batch: Batch) -> tuple:  # new each time, so that nothing traced is reused
    params = params if how == "stacked" else jgpt.sharding.unstack_blocks(params)
    logits_BTV = None
    if not micro_batch_size and not masks:
      logits_BTV = jgpt.model.apply(params, batch.inputs_BT, config, experiment.compute)
    if config.dropout and not masks:
      loss, grads = jax.value_and_grad(jgpt.step.loss_fn)(params, batch, experiment)
    else:
      loss, grads = jgpt.step.loss_and_grads(params, batch, 0, experiment)
    return logits_BTV, loss, jgpt.sharding.stack_blocks(grads)

  compiled = run if how == "eager" else jax.jit(run, compiler_options=QUICK)
  logits_BTV, loss, grads = compiled(cast(params, dtype), batch)
  expected, V = oracle(params, batch, config, masks), config.vocab_size
  name, tolerance = f"{oracle_name}, {dtype}: {what}", TOLERANCE[dtype]
  with contextlib.nullcontext() if what in SYSTEMS else in_brief():
    if logits_BTV is not None:
      compare(name, {"logits": expected["logits"]}, {"logits": logits_BTV[..., :V]}, tolerance)
      shares_BTV = np.exp(logits_BTV[..., V:])
      if shares_BTV.size:
        compare(
          f"{name}, the padding",
          {"e^logits": np.zeros_like(shares_BTV)},
          {"e^logits": shares_BTV},
          0,
        )
    compare(name, {"loss": expected["loss"]}, {"loss": loss}, tolerance)
    compare_leaves(name, expected["grads"], without_padding(grads, config), tolerance)
    if config.padded_vocab_size > V:
      padding = {name: grads[name][V:] for name in ("tok_embed", "unembed") if name in grads}
      compare(f"{name}, the padding", jax.tree.map(np.zeros_like, padding), padding, 0)


def oracle_rate(optimizer: OptimizerConfig) -> Callable[[int], float]:
  """The oracle's learning rate of a step.

  What it has no function for is a case of warmup, stable, decay.
  """
  settings = {
    "peak": optimizer.peak_lr,
    "end": optimizer.end_lr,
    "warmup": optimizer.warmup_steps,
    "total": optimizer.decay_steps,
    "warmup_from_zero": optimizer.warmup_from_zero,
  }
  if optimizer.schedule == "cosine":
    return lambda step: numpy_gpt.cosine_rate(step, **settings)
  if optimizer.schedule == "constant":
    return lambda step: numpy_gpt.wsd_rate(step, cooldown=0, **settings | {"total": 10**9})
  if optimizer.schedule == "linear":  # never stable
    return lambda step: numpy_gpt.wsd_rate(
      step, cooldown=optimizer.decay_steps - optimizer.warmup_steps, **settings
    )
  return lambda step: numpy_gpt.wsd_rate(step, cooldown=optimizer.cooldown_steps, **settings)


def check_schedule(optimizer: OptimizerConfig, what: str) -> None:
  """Asserts that the rate is the oracle's at 999 steps and around each turn, past the last too.

  Needs the fixture x64.
  """
  last, warmup, cooldown = (
    optimizer.decay_steps,
    optimizer.warmup_steps,
    optimizer.cooldown_steps or 0,
  )
  turns = [turn + i for turn in (0, warmup, last - cooldown, last) for i in (-2, -1, 0, 1, 2)]
  steps = np.maximum(0, np.sort([*turns, *np.linspace(0, 1.5 * last, 999, dtype=int)]))
  expected = np.array([oracle_rate(optimizer)(step) for step in steps.tolist()])
  got = jnp.broadcast_to(
    jgpt.optim.schedule.make_schedule(optimizer)(jnp.asarray(steps)), steps.shape
  )
  compare(f"NumPy rates, float64: {what}", {"rate": expected}, {"rate": got}, TOLERANCE["float64"])


def make_experiment(
  config: ModelConfig, optimizer: OptimizerConfig, batch_size: int = 3, **train: Any
) -> Experiment:
  """A resolved experiment of `NUM_STEPS` updates; `train` holds settings of that section."""
  data = DataConfig(
    source="",
    tokenizer="bytes",
    batching="random",
    seq_len=config.max_seq_len,
    batch_size=batch_size,
    heldout_fraction=0.0,
  )
  train_config = TrainConfig(**{"steps": NUM_STEPS} | train)
  sample = SampleConfig(temperature=1.0)
  experiment = Experiment(
    model=config, data=data, optimizer=optimizer, train=train_config, sample=sample
  )
  return resolve(experiment, config.vocab_size)


def draw_batches(config: ModelConfig, empty: Collection[int] = ()) -> list[Batch]:
  """A batch for each of `NUM_STEPS` updates; those of `empty` count no token, and have no loss."""
  batches = [draw_batch(config, seed=seed) for seed in range(NUM_STEPS)]
  for i in empty:
    batches[i] = batches[i]._replace(weights_BT=np.zeros_like(batches[i].weights_BT))
  return batches


def run_training(experiment: Experiment, dtype: str, empty: Collection[int] = ()) -> dict:
  """The losses, rates, norms, parameters and moments of `NUM_STEPS` updates by jgpt in one compiled
  call; `empty` as for `draw_batches`.
  """
  params = cast(draw_params(experiment.model), dtype)
  batches = jax.tree.map(lambda *x: jnp.stack(x), *draw_batches(experiment.model, empty))

  def batch_of(batches: Batch, step: jax.Array, *_: Any) -> Batch:
    return jax.tree.map(lambda x: x[step], batches)

  def run(params: dict, batches: Batch) -> tuple:
    state = cast(jgpt.step.begin_state(params, experiment), dtype)
    with mock.patch.object(jgpt.batches, "batch", batch_of):
      num_steps = jnp.int32(NUM_STEPS)
      return jgpt.step.train_steps(state, batches, num_steps, experiment, capacity=NUM_STEPS)

  state, metrics = jax.jit(run, compiler_options=QUICK)(params, batches)
  moments = {}
  if adam := state.opt_state.get("adam"):
    moments = {"mu": adam.mu, "nu": adam.nu}
  elif experiment.optimizer.momentum:
    moments = {"mu": state.opt_state["momentum"].trace}
  assert np.flatnonzero(metrics["train/skipped"]).tolist() == sorted(empty)
  return metrics | {"params": state.params, **moments}


TITLES = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}


def check_training(
  config: ModelConfig, optimizer: OptimizerConfig, *, what: str, empty: Collection[int] = ()
) -> dict:
  """Asserts that losses, rates, parameters and moments of `NUM_STEPS` updates in float64 are the
  NumPy GPT's.

  Args:
    config: sizes and switches.
    optimizer: all of it but `decay_steps` and `cooldown_steps`, which follow from `NUM_STEPS`.
    what: for the table.
    empty: as for `draw_batches`: updates that are skipped.

  Returns:
    jgpt's metrics, each with an entry for every update.
  """
  experiment = make_experiment(config, optimizer)
  optimizer, params = experiment.optimizer, draw_params(config)
  rate, flat = oracle_rate(optimizer), to_oracle(params, config)
  batches = [tuple(map(np.asarray, batch)) for batch in draw_batches(config, empty)]
  losses, *trees = numpy_gpt.train(
    flat,
    batches,
    config,
    rate=rate,
    b1=optimizer.b1,
    b2=optimizer.b2,
    eps=optimizer.eps,
    weight_decay=optimizer.weight_decay,
    decayed=oracle_names(config, optimizer.decay_kinds),
    clip_norm=optimizer.clip_norm,
    optimizer=optimizer.name,
    momentum=optimizer.momentum,
  )
  got = run_training(experiment, "float64", empty)
  name, tolerance = (
    f"NumPy {TITLES[optimizer.name]}, {NUM_STEPS} steps, float64: {what}",
    TOLERANCE["float64"],
  )
  applied = np.delete(np.arange(NUM_STEPS), list(empty))
  _, grads = numpy_gpt.loss_and_gradients(flat, *batches[0], config)
  expected = {
    "losses": np.array(losses)[applied],
    "rates": np.array([rate(step) for step in range(NUM_STEPS)]),
    "first norm": np.float64(numpy_gpt.global_norm(grads)),
  }
  found = {
    "losses": got["train/loss"][applied],
    "rates": got["train/lr"],
    "first norm": got["train/grad_norm"][0],
  }
  with in_brief():
    compare(name, expected, found, tolerance)
    for tree, expected_flat in zip(("params", "mu", "nu"), trees, strict=True):
      if tree not in got:
        continue
      expected, found = from_oracle(expected_flat, params), without_padding(got[tree], config)
      if tree == "params":
        compare_params(name, expected, found, tolerance)
      else:
        compare_leaves(name, expected, found, tolerance)
  return {name: np.asarray(value) for name, value in got.items() if name.startswith("train/")}


# --- Dropout ---

ORACLE_PLACES = {
  place: "embed" if place == "embedding" else f"h.{{}}.{place}" for place in DROPOUT_PLACES
}


@contextlib.contextmanager
def every_drop(visit: Callable[[str, Callable, jax.Array], jax.Array]) -> Iterator[None]:
  """Replaces what drops out entries: `visit(name, drop, x)` does instead.

  `name` is the oracles' for the mask.
  Layers are counted as they come, so the blocks must be unstacked. The place travels with the rate.
  """
  right_at, layer = jgpt.model.dropout_at, -1

  class Rate(float):
    place: str

  def dropout_at(place: str, config: ModelConfig, keys_B: jax.Array | None) -> tuple:
    rate, place_keys = right_at(place, config, keys_B)
    rate = Rate(rate)
    rate.place = place
    return rate, place_keys

  def visiting(right: Callable) -> Callable:
    def dropout(x: jax.Array, rate: Rate, keys_B: jax.Array | None) -> jax.Array:
      nonlocal layer
      if rate.place in ("embedding", "attention"):  # the first of a pass and the first of a block
        layer = -1 if rate.place == "embedding" else layer + 1
      return visit(
        ORACLE_PLACES[rate.place].format(layer), lambda x: right(x, float(rate), keys_B), x
      )

    return dropout

  with (
    mock.patch.object(jgpt.model, "dropout_at", dropout_at),
    mock.patch.object(jgpt.model, "dropout", visiting(jgpt.model.dropout)),
    mock.patch.object(jgpt.attention, "dropout", visiting(jgpt.attention.dropout)),
  ):
    yield


def masks_given(masks: Mapping[str, np.ndarray]) -> contextlib.AbstractContextManager:
  """In this context jgpt, its blocks unstacked, multiplies by these masks where the oracles do."""

  def visit(name: str, drop: Callable, x: jax.Array) -> jax.Array:
    return x * jnp.asarray(masks[name], x.dtype) if name in masks else x

  return every_drop(visit)


def masks_drawn(config: ModelConfig, tokens_BT: jax.Array, key: jax.Array) -> dict[str, np.ndarray]:
  """The masks that jgpt itself draws with this key, under the oracles' names, whatever it derives
  from the key.
  """
  params = cast(draw_params(config), "float64" if jax.config.jax_enable_x64 else "float32")

  def run(params: dict, tokens_BT: jax.Array, key: jax.Array) -> dict:
    masks = {}

    def record(name: str, drop: Callable, x: jax.Array) -> jax.Array:
      ones = jnp.ones_like(x)
      mask = drop(ones)
      if mask is not ones:  # a place where nothing is dropped hands back what it was given
        masks[name] = mask
      return drop(x)

    with every_drop(record):
      keys_B = jgpt.keys.derive_row_keys(key, len(tokens_BT))
      jgpt.model.apply(jgpt.sharding.unstack_blocks(params), tokens_BT, config, keys_B=keys_B)
    return masks

  return jax.tree.map(np.asarray, jax.jit(run, compiler_options=QUICK)(params, tokens_BT, key))


def draw_masks(
  config: ModelConfig, batch: Batch, places: tuple[str, ...], dropout: float
) -> dict[str, np.ndarray]:
  """Masks for the oracles and `masks_given`: 0 with probability `dropout`, else 1 / (1 -
  dropout).
  """
  B, T = batch.inputs_BT.shape
  D, F, N = config.d_model, config.d_ff, config.num_heads
  shapes = dict.fromkeys(DROPOUT_PLACES, (B, T, D)) | {
    "attention": (B, N, T, T),
    "activation": (B, T, F),
  }
  rng, masks = np.random.default_rng(3), {}
  for place in places:
    for layer in range(1 if place == "embedding" else config.num_layers):
      masks[ORACLE_PLACES[place].format(layer)] = (rng.random(shapes[place]) >= dropout) / (
        1 - dropout
      )
  return masks


def check_masks(config: ModelConfig, masks: Mapping[str, np.ndarray]) -> None:
  """Asserts that masks hold 0 and 1 / (1 - p), the zeros a share p.

  That no two, nor two slices, have anything in common.

  Shares may be off by 5 standard deviations, which chance does to one in two million.
  """
  layers = range(config.num_layers)
  names = {
    ORACLE_PLACES[place].format(layer) for place in config.dropout_places for layer in layers
  }
  assert masks.keys() == names, f"masks {sorted(names)} were expected, got {sorted(masks)}"
  p = config.dropout
  for name, mask in masks.items():
    kept = mask != 0
    np.testing.assert_allclose(mask[kept], 1 / (1 - p), rtol=1e-6, err_msg=name)
    check_share(f"{name} dropped", ~kept, p)
    for axis in range(mask.ndim):
      what = f"{name}: the first and second of axis {axis}"
      check_unrelated(what, np.take(mask, 0, axis), np.take(mask, 1, axis), p)
  for (a, mask_a), (b, mask_b) in itertools.combinations(masks.items(), 2):
    num = min(
      mask_a.size, mask_b.size
    )  # also of different shapes: drawn with one key, they would begin alike
    check_unrelated(f"{a} and {b}", mask_a.ravel()[:num], mask_b.ravel()[:num], p)


def check_unrelated(what: str, a: np.ndarray, b: np.ndarray, dropout: float) -> None:
  """Asserts that two masks agree as often as independent ones."""
  check_share(f"{what} agree", (a != 0) == (b != 0), dropout**2 + (1 - dropout) ** 2)


def check_share(what: str, hits: np.ndarray, share: float) -> None:
  """Asserts that a share of hits is what is expected, up to 5 standard deviations."""
  sigma = math.sqrt(share * (1 - share) / hits.size)
  assert abs(hits.mean() - share) < 5 * sigma, (
    f"{what}: {hits.mean():.4f} of {hits.size}, expected {share:.4f}"
  )
