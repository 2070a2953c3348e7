"""Drawing text: frequencies, limits, prompts, the context's end, and that one seed gives
one text.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.config import SampleConfig
from jgpt.config.catalog import load_experiment
from jgpt.devices.compute import resolve_compute
from jgpt.errors import UserError
from jgpt.generate import draw, fit_prompt, generate, generate_texts
from jgpt.model import apply, init_params
from jgpt.sharding import arrange_blocks
from jgpt.text.tokenizer import CharTokenizer

NAMES = load_experiment("names")
CONFIG = dataclasses.replace(NAMES.model, vocab_size=27, num_layers=2, init_std=0.3)
EXPERIMENT = dataclasses.replace(NAMES, model=CONFIG)
TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz", bos=True)
BOS = TOKENIZER.bos_id


@pytest.fixture(scope="module")
def params():
  return init_params(jax.random.key(0), CONFIG)


def draw_many(logits, num, *, temperature=1.0, top_k=None, top_p=1.0, seed=0):
  """Counts of each token in `num` draws."""
  rows = jnp.broadcast_to(logits, (num, len(logits)))
  tokens = jax.jit(partial(draw, top_k=top_k, top_p=top_p))(rows, jax.random.key(seed), temperature)
  return np.bincount(np.asarray(tokens), minlength=len(logits))


def softmax(logits):
  weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
  return weights / weights.sum()


LOGITS = jnp.array([2.1, -0.5, 3.4, 0.2, -1.2, 1.8, 0.9, -3.0, 0.0, 1.1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_the_softmax(temperature):
  """Chi-square over 100,000 draws: p > 1e-3.

  The 0.999 quantile of chi-square with 9 degrees of freedom is 27.88.
  """
  counts = draw_many(LOGITS, 100_000, temperature=temperature)
  expected = 100_000 * softmax(LOGITS / temperature)
  assert np.sum((counts - expected) ** 2 / expected) < 27.88


def test_the_chi_square_test_would_notice_a_wrong_temperature():
  counts = draw_many(LOGITS, 100_000, temperature=1.05)
  expected = 100_000 * softmax(LOGITS)
  assert np.sum((counts - expected) ** 2 / expected) > 27.88


@pytest.mark.slow
def test_temperature_zero_is_argmax_whatever_the_filters():
  for top_k, top_p in [(None, 1.0), (3, 1.0), (None, 0.5), (3, 0.0)]:
    assert draw_many(LOGITS, 100, temperature=0.0, top_k=top_k, top_p=top_p)[2] == 100


@pytest.mark.parametrize(
  ("top_k", "kept"), [(1, {2}), (3, {0, 2, 5}), (0, set(range(10))), (99, set(range(10)))]
)
def test_top_k_keeps_the_most_probable(top_k, kept):
  """Top-k 0 and top-k over V keep all; what is kept keeps its proportions."""
  counts = draw_many(LOGITS, 20_000, temperature=2.0, top_k=top_k)
  assert set(np.flatnonzero(counts)) == kept
  p = softmax(LOGITS / 2)
  expected = np.where([i in kept for i in range(10)], p, 0) / sum(p[list(kept)])
  assert np.abs(counts / 20_000 - expected).max() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p):
  p = softmax(LOGITS)
  order = np.argsort(-p)
  size = max(1, int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1)
  assert set(np.flatnonzero(draw_many(LOGITS, 50_000, top_p=top_p))) <= set(order[:size])
  assert draw_many(LOGITS, 50_000, top_p=top_p)[order[:size]].min() > 0


def test_masked_logits_are_never_drawn():
  logits = LOGITS.at[jnp.array([2, 5])].set(-jnp.inf)
  assert draw_many(logits, 20_000, temperature=5.0)[[2, 5]].sum() == 0


def texts(params, *, seed=0, prompt="", experiment=EXPERIMENT, **settings):
  sample = SampleConfig(**({"num": 8, "temperature": 1.0, "prompt": prompt} | settings))
  return generate_texts(params, TOKENIZER, jax.random.key(seed), experiment, sample)


def test_without_settings_of_its_own_a_call_samples_as_the_experiment_says(params):
  sample = SampleConfig(num=3, temperature=0.7, top_k=5, prompt="a", max_tokens=4)
  experiment = dataclasses.replace(EXPERIMENT, sample=sample)
  drawn = generate_texts(params, TOKENIZER, jax.random.key(2), experiment)
  assert drawn == generate_texts(params, TOKENIZER, jax.random.key(2), EXPERIMENT, sample)
  assert len(drawn) == 3 and all(text.startswith("a") and len(text) <= 5 for text in drawn)


def test_a_seed_repeats_and_another_differs(params):
  assert texts(params) == texts(params)
  assert texts(params) != texts(params, seed=1)


def test_fewer_texts_are_the_first_of_more(params):
  assert texts(params, num=3) == texts(params, num=8)[:3]


def full_pass(params, ids):
  """Logits after the last of at most 16 ids.

  What is filled up behind them is not seen: one program for every length.
  """
  tokens = jnp.array([ids + [BOS] * (CONFIG.max_seq_len - len(ids))])
  return jitted_apply(params, tokens, CONFIG)[0, len(ids) - 1]


jitted_apply = jax.jit(apply, static_argnums=2)


@pytest.mark.parametrize("how", ["plain", "as on a CPU"])
def test_greedy_decoding_equals_full_passes(params, how):
  """Temperature 0 with the cache gives token for token what a full forward pass over the text so
  far gives.
  """
  text = [BOS]
  while len(text) <= CONFIG.max_seq_len:
    text.append(int(jnp.argmax(full_pass(params, text))))
    if text[-1] == BOS:
      break
  experiment = EXPERIMENT if how == "plain" else resolve_compute(EXPERIMENT, "cpu")
  params = arrange_blocks(params, experiment.compute.layers)
  assert isinstance(params["blocks"], dict) == (how == "plain")
  assert texts(params, num=1, temperature=0.0, experiment=experiment) == [TOKENIZER.decode(text)]


@pytest.mark.parametrize("prompt", ["", "a", "abc", "abcdefghijklmno", "abcdefghijklmnopqrstuv"])
def test_past_the_context_each_token_comes_from_the_last_tokens(params, prompt):
  """Without a stop token 30 new tokens are drawn.

  Greedy ones equal full passes over the last 16 tokens (nanoGPT).
  """
  ids, _ = fit_prompt([BOS, *TOKENIZER.encode(prompt)], CONFIG)
  padded = np.full(1 if len(ids) == 1 else 16, BOS, np.int32)
  padded[: len(ids)] = ids
  key, zero = jax.random.key(0), np.float32(0)
  new = generate(
    params,
    padded,
    np.int32(len(ids)),
    key,
    zero,
    config=CONFIG,
    num=2,
    max_tokens=30,
    past_context=True,
  )
  full = list(ids)
  for _ in range(30):
    full.append(int(jnp.argmax(full_pass(params, full[-16:]))))
  assert new.tolist() == [full[len(ids) :]] * 2


def test_without_a_limit_a_text_ends_at_bos_or_where_the_context_is_full(params):
  drawn = texts(params, num=200)
  assert (
    max(map(len, drawn)) == CONFIG.max_seq_len
  )  # 16 letters: the last is drawn from BOS and 15 letters
  assert min(map(len, drawn)) < CONFIG.max_seq_len
  assert all(t.startswith("abc") and len(t) <= 16 for t in texts(params, num=50, prompt="abc"))


def test_max_tokens_counts_new_tokens(params):
  assert {len(t) for t in texts(params, num=50, max_tokens=2)} <= {0, 1, 2}
  assert max(len(t) for t in texts(params, num=200, max_tokens=40)) > CONFIG.max_seq_len


def test_a_prompt_shorter_by_limits_is_the_beginning_of_the_longer(params):
  short, long = texts(params, max_tokens=3), texts(params, max_tokens=9)
  assert all(b.startswith(a) for a, b in zip(short, long, strict=True))


def test_an_unknown_character_in_a_prompt_is_named(params):
  with pytest.raises(UserError, match=r"'É' 'é'.*a-z"):
    texts(params, prompt="Éé")


def test_a_long_prompt_keeps_its_tail(params):
  assert fit_prompt(list(range(20)), CONFIG) == (list(range(4, 20)), 4)
  assert all(
    len(t) == 21 for t in texts(params, prompt="a" * 20, num=50) if t != "a" * 20
  )  # one token, then it is full


def test_padding_of_the_vocabulary_is_never_drawn():
  config = dataclasses.replace(CONFIG, vocab_multiple=64)
  params = init_params(jax.random.key(0), config)
  prompt = np.full(1, BOS, np.int32)
  tokens = generate(
    params,
    prompt,
    np.int32(1),
    jax.random.key(1),
    np.float32(50.0),
    config=config,
    num=500,
    max_tokens=16,
  )
  assert int(tokens.max()) == 26


@pytest.mark.parametrize(
  "settings",
  [
    {"temperature": -1.0},
    {"top_p": 1.1},
    {"top_p": -0.1},
    {"top_k": -1},
    {"num": 0},
    {"max_tokens": 0},
  ],
)
def test_settings_outside_their_range_are_refused(settings):
  with pytest.raises(UserError, match=next(iter(settings))):
    SampleConfig(**({"temperature": 1.0} | settings))
