"""jgpt against a GPT in NumPy whose backward passes are derived by hand: every switch, dropout,
AdamW, every schedule.

The scalar oracle of test_reference.py is microgpt and nothing else. This one has all switches, and
shares no code with jgpt or with automatic differentiation.
"""

import dataclasses
import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import QUICK, cast
from switches import (
  SWITCHES,
  SYSTEMS,
  all_switches,
  check_masks,
  check_network,
  check_schedule,
  check_training,
  check_unrelated,
  covering_switches,
  draw_batch,
  draw_masks,
  draw_params,
  label,
  make_experiment,
  make_model,
  masks_drawn,
  masks_given,
  numpy_oracle,
)

import jgpt.evaluation
import jgpt.model
import jgpt.sharding
import jgpt.step
from jgpt.config import ModelConfig, OptimizerConfig
from jgpt.config.catalog import list_experiments, load_experiment
from jgpt.config.checks import alternatives, choices
from jgpt.config.experiment import DROPOUT_PLACES, PARAM_KINDS, Hyper
from jgpt.config.settings import resolve
from jgpt.keys import DROPOUT, derive_key, derive_row_keys
from jgpt.optim.schedule import make_schedule

# Two workers of pytest-xdist may meet at a file of the cache that jax does not write at once: it
# compiles instead.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")

# --- Logits, loss and gradient ---


@pytest.mark.parametrize(
  "how", ["stacked", "unstacked", pytest.param("eager", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_gradient_entry_of_the_five_systems(x64, system, how):
  """Each system that an experiment reproduces has the mathematical logits, loss and gradient, to
  1e-9.

  With the layers as one loop, written out, and run operation by operation: training uses either of
  the first two, and a disagreement of the last would be the network's, not the compiler's.
  """
  check_network(make_model(SYSTEMS[system]), what=system, how=how)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_gradient_entry_of_the_five_systems_in_float32(system):
  """In the precision that training uses they are the mathematical ones up to float32's rounding."""
  check_network(make_model(SYSTEMS[system]), "float32", what=system)


@pytest.mark.parametrize("switches", covering_switches(), ids=label)
def test_every_gradient_entry_with_other_switches(x64, switches):
  """Switches do not interfere: with those of the systems, every two values of two switches occur
  together somewhere.
  """
  check_network(make_model(switches), what="other switches", how="eager")


@pytest.mark.parametrize("system", ["NumPy GPT", "GPT-2"])
def test_sequences_shorter_than_the_context(x64, system):
  """Positions begin at the first, and those that are not used get no gradient."""
  config = make_model(SYSTEMS[system])
  check_network(
    config, what=f"{system}, short sequences", batch=draw_batch(config, batch_size=2, seq_len=5)
  )


def test_the_other_switches_cover_every_pair():
  """What the test above claims of its models is so."""
  tested = [*SYSTEMS.values(), *covering_switches()]
  for switches in all_switches():
    for i in range(len(switches)):
      for j in range(i):
        assert any((s[i], s[j]) == (switches[i], switches[j]) for s in tested)


def test_every_switch_and_value_that_a_model_may_have_is_tested():
  """A value that is new in `ModelConfig` is compared with the oracles, or this fails."""
  declared = {}
  for name, hint in typing.get_type_hints(ModelConfig).items():
    values = {False, True} if bool in alternatives(hint) else set()
    if values | set(choices(hint)):
      declared[name] = values | set(choices(hint))
  del declared["scale_residual_init"]  # of initial values: test_torch_reference.py
  assert {name: set(values) for name, values in SWITCHES.items()} == declared


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["rms", "rms after the embedding", "layer", "layer_no_bias"])
def test_every_gradient_entry_with_all_switches(x64, norm):
  """Nothing is left to a covering set: the network is the mathematical one for all 576 combinations
  of switches.
  """
  of_this_norm = [
    s for s in all_switches() if (s[0], s[1]) == (norm.split(" ")[0], "after" in norm)
  ]
  assert len(of_this_norm) == 144
  for switches in of_this_norm:
    check_network(make_model(switches), what=f"all switches with norm {norm}", how="eager")


@pytest.mark.parametrize("system", ["microgpt", "GPT-2"])
def test_a_padded_vocabulary_changes_nothing(x64, system):
  """Rows added for speed are masked and get no gradient at all.

  The others' is that of the oracle, which has no padding.
  """
  check_network(make_model(SYSTEMS[system], vocab_multiple=8), what=f"{system}, padded vocabulary")


def test_micro_batches_have_the_gradient_of_the_batch(x64):
  """Gradients accumulated over parts of unequal weight are those that the oracle computes of the
  batch at once.
  """
  config = make_model(SYSTEMS["GPT-2"])
  check_network(
    config, what="GPT-2, micro-batches", batch=draw_batch(config, batch_size=4), micro_batch_size=2
  )


# --- Training ---

ADAM = {"peak_lr": 0.02, "b1": 0.85, "b2": 0.99, "eps": 1e-8}
FROM_ZERO, FROM_FIRST = {"warmup_steps": 5}, {"warmup_steps": 5, "warmup_from_zero": False}
SGD = {"name": "sgd", "peak_lr": 0.3}
TRAININGS = {
  "linear": ("microgpt", {"schedule": "linear", "decay_kinds": ("head", "matrix")}),
  "linear with a floor and warmup from zero": (
    "nanoGPT",
    {"schedule": "linear", "end_lr": 0.004} | FROM_ZERO,
  ),
  "cosine with warmup from zero": (
    "NumPy GPT",
    {"schedule": "cosine", "decay_kinds": PARAM_KINDS} | FROM_ZERO,
  ),
  "cosine with a floor and warmup": (
    "nanoGPT",
    {"schedule": "cosine", "end_lr": 0.002, "clip_norm": 1.0} | FROM_FIRST,
  ),
  "constant": ("GPT-2", {"schedule": "constant", "clip_norm": 1.0}),
  "constant with warmup": ("PyTorch bytes", {"schedule": "constant"} | FROM_FIRST),
  "wsd with warmup from zero": (
    "PyTorch bytes",
    {"schedule": "wsd", "decay_kinds": ("embedding", "bias")} | FROM_ZERO,
  ),
  "wsd with a floor and warmup": (
    "GPT-2",
    {"schedule": "wsd", "cooldown_steps": 6, "end_lr": 0.001} | FROM_FIRST,
  ),
  "Adam": ("nanoGPT", {"name": "adam", "schedule": "cosine", "clip_norm": 1.0} | FROM_FIRST),
  "momentum": (
    "nanoGPT",
    SGD | {"schedule": "linear", "clip_norm": 1.0, "momentum": 0.9} | FROM_ZERO,
  ),
  "no momentum": ("microgpt", SGD | {"schedule": "constant", "decay_kinds": ("matrix",)}),
}


# Their rates are compared by themselves below, and nothing else of them is theirs alone.
LATER = ("constant with warmup", "wsd with warmup from zero")


@pytest.mark.parametrize(
  "case", [pytest.param(x, marks=pytest.mark.slow) if x in LATER else x for x in TRAININGS]
)
def test_twenty_updates_in_float64(x64, case):
  """Twenty updates end at the oracle's parameters and moments, on the way of its losses, for every
  schedule and optimizer.

  One gradient shows nothing of the moments, their corrections, the rate, or what decays and what is
  clipped. Updates 3 and 8 are skipped where clipping is tried: their batches have no loss.
  """
  system, settings = TRAININGS[case]
  optimizer = OptimizerConfig(**ADAM | {"weight_decay": 0.1} | settings)
  empty = (3, 8) if optimizer.clip_norm else ()
  config = make_model(SYSTEMS[system])
  norms = check_training(config, optimizer, what=f"{system}, {case}", empty=empty)[
    "train/grad_norm"
  ]
  if optimizer.clip_norm:  # at work, and not always
    assert np.any(norms > optimizer.clip_norm)
    assert np.any(norms < optimizer.clip_norm)


# --- The rate by itself ---

# Peak 1, floor 0.2, warmup 4, 12 updates, the last 4 of them cooling down: step and rate, at the
# ends and on either side.
EIGHTH = 0.4 * np.cos(np.pi / 8)
RATES = {
  "linear": {0: 0, 1: 0.25, 3: 0.75, 4: 1, 5: 0.9, 8: 0.6, 11: 0.3, 12: 0.2, 13: 0.2, 999: 0.2},
  "cosine": {
    0: 0,
    1: 0.25,
    3: 0.75,
    4: 1,
    5: 0.6 + EIGHTH,
    8: 0.6,
    11: 0.6 - EIGHTH,
    12: 0.2,
    13: 0.2,
    999: 0.2,
  },
  "constant": {0: 0, 1: 0.25, 3: 0.75, 4: 1, 5: 1, 11: 1, 12: 1, 13: 1, 999: 1},
  "wsd": {0: 0, 1: 0.25, 3: 0.75, 4: 1, 7: 1, 8: 1, 9: 0.8, 11: 0.4, 12: 0.2, 13: 0.2, 999: 0.2},
}
WARMUP = {True: {}, False: {0: 0.2, 1: 0.4, 3: 0.8}}  # step / 4, or (step + 1) / 5


def make_rate(schedule, **settings):
  settings = {
    "peak_lr": 1.0,
    "end_lr": 0.2,
    "warmup_steps": 4,
    "decay_steps": 12,
    "cooldown_steps": 4,
  } | settings
  return OptimizerConfig(schedule=schedule, b1=0.9, b2=0.95, eps=1e-8, **settings)


@pytest.mark.parametrize("from_zero", [True, False])
@pytest.mark.parametrize("schedule", RATES)
def test_rates_are_those_written_out(schedule, from_zero):
  """At step 0, around the end of the warmup, at the last step and past it, the rate is what one
  computes on paper.

  In float32 and from an int32 step, as training asks for it. An error of one step shows nowhere but
  there.
  """
  rate = make_schedule(make_rate(schedule, warmup_from_zero=from_zero))
  expected = RATES[schedule] | WARMUP[from_zero]
  got = {step: float(rate(jnp.int32(step))) for step in expected}
  assert got == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("schedule", RATES)
def test_rates_of_every_step_are_the_oracle_s(x64, schedule):
  """With and without warmup (either way), floor and cooldown, the rate of every step is the
  oracle's formula.
  """
  for warmup_steps in (0, 1, 4):
    for from_zero in (True, False):
      for end_lr in (0.0, 0.2):
        settings = {
          "warmup_steps": warmup_steps,
          "warmup_from_zero": from_zero,
          "end_lr": end_lr,
          "cooldown_steps": 5,
        }
        check_schedule(make_rate(schedule, **settings), schedule)


def test_rates_of_the_experiments_are_the_oracle_s(x64):
  """So is that of every step of every experiment there is."""
  for name in list_experiments():
    check_schedule(
      resolve(load_experiment(name), 256, steps_per_epoch=300).optimizer, "the experiments'"
    )


# --- Dropout by given masks ---


def experiment_places(name):
  return load_experiment(name).model.dropout_places


PLACES = {
  "all": ("GPT-2", DROPOUT_PLACES),
  "shakespeare_bytes": ("PyTorch bytes", experiment_places("shakespeare_bytes")),
  "shakespeare_char": ("nanoGPT", experiment_places("shakespeare_char")),
}


@pytest.mark.parametrize("case", PLACES)
def test_gradient_through_given_masks(x64, case):
  """Entries are dropped where the oracle drops them, and its gradient passes through what
  is left.
  """
  system, places = PLACES[case]
  config = make_model(SYSTEMS[system])
  masks = draw_masks(config, draw_batch(config), places, dropout=0.3)
  with masks_given(masks):
    check_network(config, what=f"{system}, given masks", masks=masks, how="eager")


# --- Dropout as jgpt draws it ---

WIDE = {"d_model": 16, "d_ff": 32, "max_seq_len": 16, "dropout": 0.3}


DROPPING = make_model(SYSTEMS["GPT-2"], dropout=0.3, dropout_places=DROPOUT_PLACES)


@pytest.mark.slow
def test_gradient_through_drawn_masks(x64):
  """What jgpt drops in training, its layers one loop, has the oracle's gradient for just the masks
  that jgpt draws.

  On one device, and with the batch divided over 8: the masks do not depend on how many there are.
  """
  batch = draw_batch(DROPPING, batch_size=8)
  masks = masks_drawn(DROPPING, batch.inputs_BT, derive_key(0, DROPOUT, 0))
  mesh = jgpt.sharding.make_mesh(
    make_experiment(DROPPING, make_rate("constant"), batch_size=8), jax.devices()
  )
  assert mesh.size == 8
  divided = jax.device_put(batch, jgpt.sharding.batch_sharding(mesh))
  for what, placed in (("drawn masks", batch), ("drawn masks on 8 devices", divided)):
    check_network(DROPPING, what=f"GPT-2, {what}", masks=masks, batch=placed)


@pytest.mark.slow
def test_gradient_through_drawn_masks_of_micro_batches(x64):
  """A sequence's masks depend on its place in the whole batch: micro-batches drop the same."""
  batch = draw_batch(DROPPING, batch_size=4)
  masks = masks_drawn(DROPPING, batch.inputs_BT, derive_key(0, DROPOUT, 0))
  settings = {"batch": batch, "masks": masks, "micro_batch_size": 2}
  check_network(DROPPING, what="GPT-2, drawn masks of micro-batches", **settings)


def test_masks_are_independent_and_scaled():
  """A share p is dropped and what is left is scaled by 1 / (1 - p).

  Places, layers, sequences and keys differ.

  One key used twice would drop the same entries in two layers, which no gradient shows.
  """
  config = make_model(SYSTEMS["GPT-2"], **WIDE, dropout_places=DROPOUT_PLACES)
  tokens_BT = draw_batch(config, batch_size=8).inputs_BT
  masks, others = (masks_drawn(config, tokens_BT, jax.random.key(seed)) for seed in (0, 1))
  assert len(masks) == 1 + 4 * config.num_layers
  check_masks(config, masks)
  for name in masks:
    check_unrelated(f"{name} of two keys", masks[name], others[name], config.dropout)


@pytest.mark.parametrize("experiment", ["shakespeare_bytes", "shakespeare_char"])
def test_only_the_places_of_the_experiment_are_dropped(experiment):
  """A place that the experiment does not name keeps every entry; those that it names do not."""
  config = make_model(
    SYSTEMS["GPT-2"], num_layers=1, **WIDE, dropout_places=experiment_places(experiment)
  )
  check_masks(
    config, masks_drawn(config, draw_batch(config, batch_size=8).inputs_BT, jax.random.key(0))
  )


def test_without_a_key_or_a_probability_nothing_is_dropped(x64):
  """Evaluation, and training without dropout, are the network itself: to the last bit, and the
  oracle's.
  """
  plain = dataclasses.replace(DROPPING, dropout=0.0, dropout_places=())
  params, tokens_BT = jax.tree.map(jnp.asarray, draw_params(plain)), draw_batch(plain).inputs_BT
  logits = []
  for config, key in ((plain, None), (DROPPING, None), (plain, jax.random.key(0))):
    apply = jax.jit(partial(jgpt.model.apply, config=config), compiler_options=QUICK)
    keys_B = None if key is None else derive_row_keys(key, len(tokens_BT))
    logits.append(apply(params, tokens_BT, keys_B=keys_B))
  np.testing.assert_array_equal(logits[0], logits[1])
  np.testing.assert_array_equal(logits[0], logits[2])
  check_network(DROPPING, what="GPT-2, evaluation with dropout")


def test_evaluation_of_a_model_with_dropout_drops_nothing():
  """`eval_step` is the oracle's sum of losses, whatever the model drops in training."""
  params, batch = draw_params(DROPPING), draw_batch(DROPPING)
  experiment = make_experiment(DROPPING, make_rate("constant"))
  eval_step = jax.jit(jgpt.evaluation.eval_step, static_argnums=2, compiler_options=QUICK)
  nats, num_tokens = eval_step(cast(params, "float32"), batch, experiment)
  assert num_tokens == np.sum(batch.weights_BT)
  assert float(nats) == pytest.approx(
    float(num_tokens * numpy_oracle(params, batch, DROPPING)["loss"]), rel=1e-5
  )


def test_what_a_step_drops_is_a_function_of_seed_and_step():
  """The same step of the same seed has the same loss to the last bit, and every other step or seed
  another.

  At a rate of 0 nothing but the masks changes from step to step. A resumed run thus drops what it
  would have dropped.
  """
  experiment = make_experiment(DROPPING, make_rate("constant", peak_lr=0.0))

  @partial(jax.jit, compiler_options=QUICK)
  def train_step(state, seed):
    hyper = Hyper.of(experiment)._replace(seed=seed)
    return jgpt.step.train_step(state, batch, experiment, hyper)

  batch, losses = draw_batch(DROPPING), []
  for seed in (0, 1):
    state = start = jgpt.step.begin_state(cast(draw_params(DROPPING), "float32"), experiment)
    for _ in range(3):
      state, metrics = train_step(state, seed)
      losses.append(float(metrics["train/loss"]))
    assert float(train_step(start, seed)[1]["train/loss"]) == losses[-3]
    assert float(train_step(start.replace(step=jnp.int32(2)), seed)[1]["train/loss"]) == losses[-1]
  assert len(set(losses)) == 6
