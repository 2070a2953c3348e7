"""Proof that the comparisons of test_numpy_reference.py bite: each test plants one error in jgpt
and expects one to fail.

`CAUGHT_BY_NETWORK` are caught by `check_network`, `CAUGHT_BY_TRAINING` by `check_training`,
`CAUGHT_BY_SCHEDULE` by `check_schedule`, `CAUGHT_BY_MASKS` by `check_masks`: functions of
switches.py, which trace what they run anew, so that what is planted is in the program and nothing
compiled with an error outlives its test. Each without the error passes in test_numpy_reference.py.
"""

import dataclasses
import math
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import pytest
from equivalence import must_differ
from switches import (
  SYSTEMS,
  check_masks,
  check_network,
  check_schedule,
  check_training,
  draw_batch,
  draw_masks,
  make_model,
  masks_drawn,
  masks_given,
)

import jgpt.attention
import jgpt.keys
import jgpt.layers
import jgpt.loss
import jgpt.model
import jgpt.optim.adam
import jgpt.optim.chain
import jgpt.optim.schedule
import jgpt.step
from jgpt.config import OptimizerConfig
from jgpt.config.experiment import DROPOUT_PLACES
from jgpt.keys import DROPOUT, derive_key, derive_row_keys

# Two workers of pytest-xdist may meet at a file of the cache that jax does not write at once: it
# compiles instead.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")

stop = jax.lax.stop_gradient

# --- Errors in the network, the loss or its gradient ---


def loss_is_the_mean_over_the_vocabulary(put):
  change_nats(put, lambda nats_BT, logits_BTV: nats_BT / logits_BTV.shape[-1])


def loss_is_in_bits(put):
  change_nats(put, lambda nats_BT, logits_BTV: nats_BT / math.log(2))


def change_nats(put, change):
  right = optax.softmax_cross_entropy_with_integer_labels

  def nats(logits_BTV, targets_BT):
    return change(right(logits_BTV, targets_BT), logits_BTV)

  put(optax, "softmax_cross_entropy_with_integer_labels", nats)


def micro_batches_are_averaged(put):  # right where all of them weigh the same
  right = jgpt.step.loss_fn

  def loss_fn(params, batch, experiment, keys_B, total_weight):
    loss = right(params, batch, experiment, keys_B)
    return loss / 2 if experiment.train.micro_batch_size else loss

  put(jgpt.step, "loss_fn", loss_fn)


def tanh_for_erf(put):
  put(
    jgpt.layers,
    "ACTIVATIONS",
    jgpt.layers.ACTIVATIONS | {"gelu_erf": jgpt.layers.ACTIVATIONS["gelu_tanh"]},
  )


def erf_for_tanh(put):
  put(
    jgpt.layers,
    "ACTIVATIONS",
    jgpt.layers.ACTIVATIONS | {"gelu_tanh": jgpt.layers.ACTIVATIONS["gelu_erf"]},
  )


def norm_epsilon_of_1e_6(put):
  put(jgpt.layers, "NORM_EPS", 1e-6)


def no_gradient_for_the_bias_of_a_norm(put):  # the loss stays right: only gradients can show it
  right = jgpt.layers.layer_norm
  put(
    jgpt.layers,
    "layer_norm",
    lambda x, gain, bias: right(x, gain, bias if bias is None else stop(bias)),
  )


def no_gradient_through_the_mean_of_a_norm(put):
  def layer_norm(x_BTD, gain_D, bias_D):
    y_BTD = x_BTD - stop(jnp.mean(x_BTD, axis=-1, keepdims=True))
    scale_BT1 = jax.lax.rsqrt(jnp.mean(y_BTD**2, axis=-1, keepdims=True) + jgpt.layers.NORM_EPS)
    return y_BTD * scale_BT1 * gain_D[None, None] + bias_D[None, None]

  put(jgpt.layers, "layer_norm", layer_norm)


def final_norm_missing(put):
  put(jgpt.model, "finish_blocks", lambda params, x_BTD, config, compute: x_BTD)


def norm_after_the_embedding_missing(put):
  change_embed(put, lambda params, config: (params, dataclasses.replace(config, norm_embed=False)))


def sines_and_cosines_swapped(put):
  right = jgpt.layers.sinusoidal_positions

  def swapped(num_positions, d_model):
    return (
      right(num_positions, d_model)
      .reshape(num_positions, -1, 2)[:, :, ::-1]
      .reshape(num_positions, d_model)
    )

  put(jgpt.model, "sinusoidal_positions", swapped)


def sines_first_then_cosines(put):  # as tensor2tensor lays them out
  right = jgpt.layers.sinusoidal_positions

  def halves(num_positions, d_model):
    return (
      right(num_positions, d_model)
      .reshape(num_positions, -1, 2)
      .swapaxes(1, 2)
      .reshape(num_positions, d_model)
    )

  put(jgpt.model, "sinusoidal_positions", halves)


def scale_applied_to_positions_too(put):
  change_embed(
    put,
    lambda params, config: (
      params | {"pos_embed": params["pos_embed"] * config.d_model**0.5},
      config,
    ),
  )


def scale_left_out(put):
  change_embed(put, lambda params, config: (params, dataclasses.replace(config, scale_embed=False)))


def no_gradient_for_the_tied_head(put):
  put(jgpt.step, "find_head", lambda params, *rest: stop(params["tok_embed"]))


def no_gradient_for_the_tied_embedding(put):
  change_embed(
    put, lambda params, config: (params | {"tok_embed": stop(params["tok_embed"])}, config)
  )


def padding_in_the_softmax(put):
  right = jgpt.loss.compute_logits

  def compute_logits(x_BTD, head_VD, config, compute):
    whole = dataclasses.replace(config, vocab_size=config.padded_vocab_size)
    return right(x_BTD, head_VD, whole, compute)

  put(jgpt.loss, "compute_logits", compute_logits)


def a_padded_row_gets_a_gradient(put):  # the loss stays right, and so does every other gradient
  right = jgpt.loss.compute_logits

  def compute_logits(x_BTD, head_VD, config, compute):
    row = jnp.sum(head_VD[-1])
    return right(x_BTD, head_VD, config, compute).at[..., 0].add(row - stop(row))

  put(jgpt.loss, "compute_logits", compute_logits)


def change_embed(put, change):
  right = jgpt.model.embed

  def embed(params, tokens_BT, position, config, *rest):
    params, config = change(params, config)
    return right(params, tokens_BT, position, config, *rest)

  put(jgpt.model, "embed", embed)


def bias_of_attention_left_out(put):
  right = jgpt.model.linear

  def linear(equation, x, p, name, compute):
    return right(equation, x, {"w_qkv": p["w_qkv"]} if name == "qkv" else p, name, compute)

  put(jgpt.model, "linear", linear)


# --- Errors in dropout ---


def dropout_kept_at_evaluation(put):
  right = jgpt.step.run_network

  def run_network(params, tokens_BT, config, compute, keys_B):
    keys_B = derive_row_keys(jax.random.key(0), len(tokens_BT)) if keys_B is None else keys_B
    return right(params, tokens_BT, config, compute, keys_B)

  put(jgpt.step, "run_network", run_network)


def attention_dropped_before_the_softmax(put):  # a score of 0 is no probability of 0
  def attention(q_BTNH, k_BSNH, v_BSNH, *, rate, keys_B, implementation, precision):
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / q_BTNH.shape[-1] ** 0.5
    scores_BNTS = jgpt.attention.dropout(scores_BNTS, rate, keys_B)
    visible_TS = jnp.tril(jnp.ones(scores_BNTS.shape[-2:], bool))
    weights_BNTS = jax.nn.softmax(jnp.where(visible_TS[None, None], scores_BNTS, -jnp.inf))
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)

  put(jgpt.model, "attention", attention)


def dropped_after_the_residual_sum(put):
  right = jgpt.model.block

  def block(x_BTD, p, config, compute, keys_B, *rest):
    drop = jgpt.model.dropout  # that of `masks_given`, whose rates know their places

    def drop_elsewhere(x, rate, keys_B):
      return x if rate.place == "mlp_out" else drop(x, rate, keys_B)

    with mock.patch.object(jgpt.model, "dropout", drop_elsewhere):
      x_BTD, cache = right(x_BTD, p, config, compute, keys_B, *rest)
    return drop(x_BTD, *jgpt.model.dropout_at("mlp_out", config, keys_B)), cache

  put(jgpt.model, "block", block)


def no_gradient_through_dropout(put):
  change_drop(put, lambda drop, x: x + stop(drop(x) - x))


def survivors_not_scaled(put):
  change_drop(put, lambda drop, x: jnp.where(drop(x) == 0, 0, x))


def one_mask_for_all_sequences(put):
  change_drop(put, lambda drop, x: x * drop(jnp.ones_like(x))[:1])


def a_place_forgotten(put):
  right = jgpt.layers.dropout_at

  def dropout_at(place, *rest):
    return (0.0, None) if place == "activation" else right(place, *rest)

  put(jgpt.model, "dropout_at", dropout_at)


def a_tenth_more_dropped_than_asked_for(put):
  right = jax.random.bernoulli
  put(jax.random, "bernoulli", lambda key, p, shape: right(key, p - 0.1, shape))


def change_drop(put, change):
  right = jgpt.layers.dropout

  def dropout(x, rate, keys_B):
    return change(lambda x: right(x, rate, keys_B), x)

  for module in (jgpt.model, jgpt.attention):
    put(module, "dropout", dropout)


def one_mask_for_all_layers(put):
  put(jgpt.model, "fold_in_rows", lambda keys_B, number: keys_B)


def one_key_for_all_places(put):
  put(jgpt.layers, "fold_in_rows", lambda keys_B, number: keys_B)


def one_mask_for_all_rows(put):
  put(jgpt.keys, "derive_row_keys", lambda key, num_rows: jnp.stack([key] * num_rows))


# --- Errors in the update ---


def decay_on_gains(put):
  change_kinds(put, lambda kinds: (*kinds, "gain"))


def embeddings_left_out_of_decay(put):
  change_kinds(put, lambda kinds: tuple(kind for kind in kinds if kind != "embedding"))


def change_kinds(put, change):
  right = jgpt.optim.chain.make_optimizer

  def make_optimizer(experiment, hyper=None):
    kinds = change(experiment.optimizer.decay_kinds)
    optimizer = dataclasses.replace(experiment.optimizer, decay_kinds=kinds)
    return right(dataclasses.replace(experiment, optimizer=optimizer), hyper)

  put(jgpt.step, "make_optimizer", make_optimizer)


def warmup_one_step_longer(put):
  change_rate(put, lambda config: dataclasses.replace(config, warmup_steps=config.warmup_steps + 1))


def warmup_from_zero_for_warmup_from_the_first_step(put):
  change_rate(
    put, lambda config: dataclasses.replace(config, warmup_from_zero=not config.warmup_from_zero)
  )


def decay_ends_one_step_early(put):
  change_rate(put, lambda config: dataclasses.replace(config, decay_steps=config.decay_steps - 1))


def floor_forgotten(put):
  change_rate(put, lambda config: dataclasses.replace(config, end_lr=0.0))


def change_rate(put, change):
  right = jgpt.optim.schedule.make_schedule
  # What updates, what is reported, and what is compared with the oracle's rates.
  for module in (jgpt.optim.chain, jgpt.step, jgpt.optim.schedule):
    put(module, "make_schedule", lambda config, *rest: right(change(config), *rest))


def clip_after_adam(put):
  reorder(put, "adam", "clip", "decay", "lr")


def decay_before_adam(put):  # Adam with L2 regularisation, not AdamW
  reorder(put, "clip", "decay", "adam", "lr")


def decay_after_adam(put):  # AdamW, not Adam with L2 regularisation
  reorder(put, "clip", "adam", "decay", "lr")


def decay_after_momentum(put):
  reorder(put, "clip", "momentum", "decay", "lr")


def momentum_dampened(put):  # an average of gradients, where torch's SGD adds them up
  def trace(momentum):
    def update(grads, state, params=None):
      m = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.trace, grads)
      return m, optax.TraceState(m)

    return optax.GradientTransformation(right(momentum).init, update)

  right = optax.trace
  put(optax, "trace", trace)


def nesterov_s_momentum(put):
  right = optax.trace
  put(jgpt.optim.chain, "accumulate", lambda momentum: right(momentum, nesterov=True))


def reorder(put, *names):
  right = optax.named_chain
  put(optax, "named_chain", lambda *parts: right(*((name, dict(parts)[name]) for name in names)))


def clipped_leaf_by_leaf(put):
  def clip(max_norm):
    def update(grads, state, params=None):
      return jax.tree.map(
        lambda g: g * jnp.minimum(1, max_norm / jnp.linalg.norm(g.ravel())), grads
      ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

  put(optax, "clip_by_global_norm", clip)


def decay_not_multiplied_by_the_rate(put):
  reorder(put, "clip", "adam", "lr", "decay")
  right = optax.add_decayed_weights
  put(optax, "add_decayed_weights", lambda decay, mask: right(-decay, mask))


# --- The tests ---


def name(plant):
  return plant.__name__.replace("_", "-")


def assert_caught_by_far(found):
  # NaN would be caught whatever was planted, and a difference near the tolerance could be chance.
  assert all(math.isfinite(row.relative) or not row.tolerance for row in found)
  assert max(row.relative / row.tolerance if row.tolerance else math.inf for row in found) > 100


PADDED = {"vocab_multiple": 8}
DROPPING = {"dropout": 0.3, "dropout_places": DROPOUT_PLACES}
CAUGHT_BY_NETWORK = {
  loss_is_the_mean_over_the_vocabulary: ("GPT-2", {}),
  loss_is_in_bits: ("GPT-2", {}),
  tanh_for_erf: ("nanoGPT", {}),
  erf_for_tanh: ("GPT-2", {}),
  norm_epsilon_of_1e_6: ("GPT-2", {}),
  no_gradient_for_the_bias_of_a_norm: ("GPT-2", {}),
  no_gradient_through_the_mean_of_a_norm: ("GPT-2", {}),
  final_norm_missing: ("GPT-2", {}),
  norm_after_the_embedding_missing: ("microgpt", {}),
  sines_and_cosines_swapped: ("NumPy GPT", {}),
  sines_first_then_cosines: ("NumPy GPT", {}),
  scale_applied_to_positions_too: ("PyTorch bytes", {}),
  scale_left_out: ("PyTorch bytes", {}),
  no_gradient_for_the_tied_head: ("GPT-2", {}),
  no_gradient_for_the_tied_embedding: ("GPT-2", {}),
  bias_of_attention_left_out: ("GPT-2", {}),
  padding_in_the_softmax: ("GPT-2", PADDED),
  a_padded_row_gets_a_gradient: ("GPT-2", PADDED),
  dropout_kept_at_evaluation: ("GPT-2", DROPPING),
}


@pytest.mark.parametrize("plant", CAUGHT_BY_NETWORK, ids=name)
def test_network_comparison_catches(x64, monkeypatch, plant):
  """An error in the network or the loss cannot pass for the right logits, loss and gradient of its
  system.
  """
  system, settings = CAUGHT_BY_NETWORK[plant]
  plant(monkeypatch.setattr)
  config = make_model(SYSTEMS[system], **settings)
  with must_differ() as found:
    check_network(
      config, what=system, how="stacked" if config.dropout else "eager"
    )  # whichever is quicker
  assert_caught_by_far(found)


def test_network_comparison_catches_averaged_micro_batches(x64, monkeypatch):
  """Parts of unequal weight cannot pass for the batch where their means are averaged."""
  config = make_model(SYSTEMS["GPT-2"])
  micro_batches_are_averaged(monkeypatch.setattr)
  with must_differ() as found:
    check_network(config, what="GPT-2", batch=draw_batch(config, batch_size=4), micro_batch_size=2)
  assert_caught_by_far(found)


@pytest.mark.parametrize(
  "plant", [attention_dropped_before_the_softmax, dropped_after_the_residual_sum], ids=name
)
def test_network_comparison_with_given_masks_catches(x64, monkeypatch, plant):
  """What is dropped in the wrong place cannot pass for the oracle's network with the same masks."""
  config = make_model(SYSTEMS["GPT-2"])
  masks = draw_masks(config, draw_batch(config), DROPOUT_PLACES, dropout=0.3)
  plant(monkeypatch.setattr)
  with must_differ() as found, masks_given(masks):
    check_network(config, what="GPT-2", masks=masks, how="eager")
  assert_caught_by_far(found)


@pytest.mark.slow
def test_network_comparison_with_drawn_masks_catches(x64, monkeypatch):
  """Nor can a gradient that passes through what was dropped."""
  config = make_model(SYSTEMS["GPT-2"], **DROPPING)
  batch = draw_batch(config)
  masks = masks_drawn(config, batch.inputs_BT, derive_key(0, DROPOUT, 0))
  no_gradient_through_dropout(monkeypatch.setattr)
  with must_differ() as found:
    check_network(config, what="GPT-2", masks=masks, batch=batch)
  assert_caught_by_far(found)


CAUGHT_BY_MASKS = {  # and by which of its assertions
  survivors_not_scaled: "Not equal to tolerance",
  one_mask_for_all_sequences: "embed: the first and second of axis 0 agree: 1.0",
  a_place_forgotten: "were expected",
  a_tenth_more_dropped_than_asked_for: "dropped: 0.",
  one_mask_for_all_layers: "h.0.activation and h.1.activation agree: 1.0",
  one_key_for_all_places: "h.0.activation and h.0.attention agree: 1.0",
  one_mask_for_all_rows: "embed: the first and second of axis 0 agree: 1.0",
}


@pytest.mark.parametrize("plant", CAUGHT_BY_MASKS, ids=name)
def test_comparison_of_masks_catches(monkeypatch, plant):
  """Masks that are related, or of another probability, show in the masks alone: their gradients are
  right.
  """
  config = make_model(SYSTEMS["GPT-2"], d_model=16, d_ff=32, max_seq_len=16, **DROPPING)
  plant(monkeypatch.setattr)
  masks = masks_drawn(config, draw_batch(config, batch_size=8).inputs_BT, jax.random.key(0))
  with pytest.raises(AssertionError, match=CAUGHT_BY_MASKS[plant]):
    check_masks(config, masks)


OPTIMIZER = OptimizerConfig(
  peak_lr=0.02,
  schedule="cosine",
  warmup_steps=5,
  warmup_from_zero=False,
  end_lr=0.002,
  b1=0.85,
  b2=0.99,
  eps=1e-8,
  weight_decay=0.1,
  clip_norm=1.0,
)
MOMENTUM = {"name": "sgd", "momentum": 0.9, "peak_lr": 0.3}
CAUGHT_BY_TRAINING = {
  decay_on_gains: {},
  embeddings_left_out_of_decay: {},
  decay_before_adam: {},
  decay_not_multiplied_by_the_rate: {},
  clip_after_adam: {},
  clipped_leaf_by_leaf: {},
  warmup_one_step_longer: {},
  decay_after_adam: {"name": "adam"},
  decay_after_momentum: MOMENTUM,
  momentum_dampened: MOMENTUM,
  nesterov_s_momentum: MOMENTUM,
}


LATER = {decay_after_momentum, nesterov_s_momentum}


@pytest.mark.parametrize(
  "plant",
  [pytest.param(x, marks=pytest.mark.slow) if x in LATER else x for x in CAUGHT_BY_TRAINING],
  ids=name,
)
def test_training_comparison_catches(x64, monkeypatch, plant):
  """An error in what decays, what is clipped, how the rate warms up or what momentum adds up cannot
  pass for the right 20 updates.
  """
  plant(monkeypatch.setattr)
  optimizer = dataclasses.replace(OPTIMIZER, **CAUGHT_BY_TRAINING[plant])
  with must_differ() as found:
    check_training(make_model(SYSTEMS["nanoGPT"]), optimizer, what="nanoGPT")
  assert_caught_by_far(found)


CAUGHT_BY_SCHEDULE = (
  warmup_one_step_longer,
  warmup_from_zero_for_warmup_from_the_first_step,
  decay_ends_one_step_early,
  floor_forgotten,
)


@pytest.mark.parametrize("plant", CAUGHT_BY_SCHEDULE, ids=name)
def test_schedule_comparison_catches(x64, monkeypatch, plant):
  """An error of one step, or of a floor that few steps reach, shows in the rates of all steps."""
  plant(monkeypatch.setattr)
  with must_differ() as found:
    check_schedule(dataclasses.replace(OPTIMIZER, decay_steps=1000), "planted")
  assert_caught_by_far(found)
