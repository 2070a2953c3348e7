"""Proof that the comparisons of test_reference.py bite: each test plants one error in jgpt and
expects them to fail.

Every check traces functions that it makes anew, so what is planted is in the program that runs, and
nothing compiled with an error outlives its test.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equivalence import check_gradients, check_training, must_differ, names_experiment

import jgpt.attention
import jgpt.data.corpus
import jgpt.layers
import jgpt.model
import jgpt.optim.adam
import jgpt.optim.chain
import jgpt.optim.schedule
import jgpt.step

# --- Errors in the loss or its gradient ---


def no_scale_by_root_of_head_dim(put):
  right = jgpt.attention.attention_weights

  def attention_weights(q_BTNH, *rest):
    return right(q_BTNH * q_BTNH.shape[-1] ** 0.5, *rest)

  put(jgpt.attention, "attention_weights", attention_weights)


def mask_shows_the_next_token(put):
  plant_mask(put, lambda T: jnp.tril(jnp.ones((T, T), bool), 1))


def mask_hides_the_token_itself(put):
  # The first token has nothing else to attend to, and would give NaN, which any comparison catches:
  # it keeps itself.
  plant_mask(put, lambda T: jnp.tril(jnp.ones((T, T), bool), -1).at[0, 0].set(True))


def plant_mask(put, make_mask):
  right = jgpt.attention.attention_weights

  def attention_weights(q_BTNH, k_BSNH, visible_TS, precision=None):
    return right(q_BTNH, k_BSNH, make_mask(q_BTNH.shape[1]))

  put(jgpt.attention, "attention_weights", attention_weights)


def closing_bos_dropped(put):
  right = jgpt.data.corpus.make_documents

  def make_documents(documents, tokenizer, seq_len):
    corpus = right(documents, tokenizer, seq_len)
    return corpus._replace(
      lengths=np.minimum(corpus.lengths, [len(document) for document in documents])
    )

  put(jgpt.data.corpus, "make_documents", make_documents)


def padding_counted(put):
  right = jgpt.data.corpus.make_documents

  def make_documents(documents, tokenizer, seq_len):
    corpus = right(documents, tokenizer, seq_len)
    return corpus._replace(lengths=np.full_like(corpus.lengths, seq_len))

  put(jgpt.data.corpus, "make_documents", make_documents)


def positions_shifted_by_one(put):
  right = jgpt.model.embed

  def embed(params, *rest):
    return right(params | {"pos_embed": jnp.roll(params["pos_embed"], -1, axis=0)}, *rest)

  put(jgpt.model, "embed", embed)


def norm_epsilon_ten_times_smaller(put):
  put(jgpt.layers, "NORM_EPS", jgpt.layers.NORM_EPS / 10)


def norm_not_differentiated(put):  # the loss stays right: only gradients can show it
  right = jgpt.layers.rms_norm
  for module in (jgpt.model, jgpt.layers):
    put(module, "rms_norm", lambda x_BTD: x_BTD * jax.lax.stop_gradient(right(x_BTD) / x_BTD))


# --- Errors in the update ---


def b1_and_b2_swapped(put):
  right = jgpt.optim.chain.make_optimizer

  def make_optimizer(experiment, hyper=None):
    b1, b2 = experiment.optimizer.b2, experiment.optimizer.b1
    optimizer = dataclasses.replace(experiment.optimizer, b1=b1, b2=b2)
    return right(dataclasses.replace(experiment, optimizer=optimizer), hyper)

  put(jgpt.step, "make_optimizer", make_optimizer)


def moments_stored_under_each_others_name(
  put,
):  # the parameters stay right: only the moments can show it
  wrap_adam(put, before=swap_moments, after=swap_moments)


def no_bias_correction(put):
  wrap_adam(
    put, before=lambda state: state._replace(count=state.count + 10**6)
  )  # b1**count and b2**count are then 0


def epsilon_inside_the_root(put):
  right = optax.scale_by_adam
  put(
    jgpt.optim.chain, "scale_by_adam", lambda b1, b2, eps, _: right(b1, b2, eps=0.0, eps_root=eps)
  )


def epsilon_squared_inside_the_root(
  put,
):  # as small as eps outside where the gradient is 0: the hardest to see
  right = optax.scale_by_adam
  put(
    jgpt.optim.chain,
    "scale_by_adam",
    lambda b1, b2, eps, _: right(b1, b2, eps=0.0, eps_root=eps**2),
  )


def rate_of_the_next_step(put):
  right = jgpt.optim.schedule.make_schedule

  def make_schedule(*settings):
    schedule = right(*settings)
    return lambda step: schedule(step + 1)

  put(jgpt.optim.chain, "make_schedule", make_schedule)


def swap_moments(state):
  return state._replace(mu=state.nu, nu=state.mu)


def wrap_adam(put, before, after=lambda state: state):
  right = jgpt.optim.adam.scale_by_adam

  def scale_by_adam(*settings):
    adam = right(*settings)

    def update(grads, state, params=None, **rest):
      updates, new_state = adam.update(grads, before(state), params, **rest)
      return updates, after(new_state)

    return optax.GradientTransformationExtraArgs(adam.init, update)

  put(jgpt.optim.chain, "scale_by_adam", scale_by_adam)


# --- The tests ---


def name(plant):
  return plant.__name__.replace("_", "-")


def assert_caught_by_far(found):
  # NaN would be caught whatever was planted, and a difference near the tolerance could be chance.
  assert all(math.isfinite(row.relative) for row in found)
  assert max(row.relative / row.tolerance for row in found) > 100


LOSS_ERRORS = (
  no_scale_by_root_of_head_dim,
  mask_shows_the_next_token,
  mask_hides_the_token_itself,
  closing_bos_dropped,
  padding_counted,
  positions_shifted_by_one,
  norm_epsilon_ten_times_smaller,
  norm_not_differentiated,
)


@pytest.mark.parametrize("plant", LOSS_ERRORS, ids=name)
def test_gradient_comparison_catches(x64, monkeypatch, plant):
  """An error in the network, the mask, the positions or what is predicted cannot pass for the right
  gradient.
  """
  plant(monkeypatch.setattr)
  with must_differ() as found:
    check_gradients(names_experiment(), "float64")
  assert_caught_by_far(found)


UPDATE_ERRORS = (
  b1_and_b2_swapped,
  moments_stored_under_each_others_name,
  no_bias_correction,
  epsilon_inside_the_root,
  epsilon_squared_inside_the_root,
  rate_of_the_next_step,
)


@pytest.mark.parametrize("plant", UPDATE_ERRORS, ids=name)
def test_training_comparison_catches(x64, monkeypatch, plant):
  """An error in Adam or the rate, which no single gradient shows, cannot pass for the right 20
  updates.
  """
  plant(monkeypatch.setattr)
  with must_differ() as found:
    check_training(names_experiment(optimizer__decay_steps=1000), "float64")
  assert_caught_by_far(found)
