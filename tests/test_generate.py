"""Drawing text: frequencies, limits, prompts, the context's end, and that one seed gives
one text.
"""

import dataclasses
import itertools
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import CPU, QUICK

from jgpt.bench import hlo
from jgpt.config import SampleConfig
from jgpt.config.catalog import load_experiment
from jgpt.config.experiment import PLAIN
from jgpt.config.settings import change
from jgpt.devices.compute import resolve_compute
from jgpt.errors import UserError
from jgpt.generate import (
  check_prompt,
  draw,
  fit_prompt,
  generate,
  generate_texts,
  lower_texts,
  sample_texts,
)
from jgpt.keys import SAMPLE, derive_key
from jgpt.model import apply, init_params
from jgpt.sharding import AXES, arrange_blocks, make_mesh, param_shardings
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer

NAMES = load_experiment("names")
CONFIG = dataclasses.replace(NAMES.model, vocab_size=27, num_layers=2, init_std=0.3)
EXPERIMENT = dataclasses.replace(NAMES, model=CONFIG)
TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz", bos=True)
BOS = TOKENIZER.bos_id


jitted_init = jax.jit(init_params, static_argnums=1, compiler_options=QUICK)


@pytest.fixture(scope="module")
def params():
  return jitted_init(jax.random.key(0), CONFIG)


jitted_draw = jax.jit(draw, static_argnums=(3, 4))


def draw_many(logits, num, *, temperature=1.0, top_k=None, top_p=1.0, seed=0):
  """Counts of each token in `num` draws."""
  rows = jnp.broadcast_to(logits, (num, len(logits)))
  tokens = jitted_draw(rows, jax.random.key(seed), jnp.float32(temperature), top_k, top_p)
  return np.bincount(np.asarray(tokens), minlength=len(logits))


def softmax(logits):
  weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
  return weights / weights.sum()


def chi_square_p(counts, expected):
  """The probability of counts that are less likely; counts that are rarely expected are added up.

  The last axis is one multinomial draw.
  """
  counts, expected = np.atleast_2d(counts, expected)
  x, freedom = 0.0, 0
  for drawn, wanted in zip(counts, expected, strict=True):
    rare = wanted < 5
    drawn, wanted = (np.append(a[~rare], a[rare].sum()) for a in (drawn, wanted))
    drawn, wanted = drawn[wanted > 0], wanted[wanted > 0]
    x, freedom = x + np.sum((drawn - wanted) ** 2 / wanted), freedom + len(wanted) - 1
  return float(jax.scipy.special.gammaincc(freedom / 2, x / 2)) if freedom else 1.0


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


# Rows of logits with equal values, at the ends of what filters keep too, and some that are masked.
ROWS = np.random.default_rng(1).integers(-3, 4, (12, 8)) / 2
ROWS[9] = 0.5
ROWS[10, 2:] = ROWS[11, ::2] = -np.inf


def distribution(logits, temperature, top_k, top_p):
  """What `draw` says of itself, written from its definition in float64.

  Returns the probabilities, and how near top_p is to a sum at which more tokens would be kept.
  """
  logits = np.array(logits, np.float64)
  if temperature == 0:
    return np.eye(len(logits))[np.argmax(logits)], 1.0
  if top_k:
    logits[[np.sum(logits > z) >= top_k for z in logits]] = -np.inf
  p, margin = softmax(logits / temperature), 1.0
  if top_p < 1:
    by_size = [(value, np.sum(p[p >= value])) for value in np.unique(p)[::-1]]
    least = next(value for value, total in by_size if total >= top_p or total > 1 - 1e-9)
    margin = min(abs(total - top_p) for _, total in by_size)
    p = np.where(p >= least, p, 0)
  return p / p.sum(), margin


@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.0, 2.5])
def test_top_k_and_top_p_keep_what_their_definitions_say(temperature):
  """Alone and together, at the ends of their ranges and beyond V, at every temperature.

  A row of logits is drawn from 2,000 times. No token outside the set is drawn, each that is
  expected ten times is, and what is kept keeps its proportions (chi-square, p > 1e-4). One row
  alone is the first of them.
  """
  settings = [(top_k, top_p) for top_k in (None, 0, 1, 3, 8, 99) for top_p in (1.0, 0.6, 0.9)]
  settings += [(top_k, top_p) for top_k in (None, 2, 5) for top_p in (0.0, 0.26, 0.4, 0.74, 0.985)]
  num, rows_BV = 2000, jnp.asarray(np.repeat(ROWS, 2000, axis=0), jnp.float32)
  for i, (top_k, top_p) in enumerate(settings):
    tokens = draw(rows_BV, jax.random.key(i), jnp.float32(temperature), top_k, top_p)
    one = draw(rows_BV[:1], jax.random.key(i), jnp.float32(temperature), top_k, top_p)
    assert one[0] == tokens[0], (top_k, top_p)
    drawn = np.eye(8, dtype=int)[np.asarray(tokens)].reshape(len(ROWS), num, 8).sum(axis=1)
    p, margins = zip(*(distribution(row, temperature, top_k, top_p) for row in ROWS), strict=True)
    assert min(margins) > 1e-5, f"{top_p=} is too near to tell in float32"
    expected = num * np.array(p)
    assert not drawn[expected == 0].any(), (top_k, top_p)
    assert drawn[expected > 10].all(), (top_k, top_p)
    assert chi_square_p(drawn, expected) > 1e-4, (top_k, top_p)


def test_a_token_that_reaches_top_p_exactly_is_the_last():
  """The probabilities are 1/2, 1/4 and twice 1/8: one token holds 0.5, two hold 0.75."""
  rows_BV = jnp.broadcast_to(jnp.log(jnp.array([0.25, 0, 0.125, 0.5, 0, 0.125, 0, 0])), (24_000, 8))
  for top_p, kept in [(0.5, {3}), (0.75, {0, 3}), (0.76, {0, 2, 3, 5})]:
    drawn = draw(rows_BV, jax.random.key(0), jnp.float32(1.0), None, top_p)
    assert set(np.unique(drawn)) == kept


def texts(params, *, seed=0, prompt="", experiment=EXPERIMENT, **settings):
  sample = SampleConfig(**({"num": 8, "temperature": 1.0, "prompt": prompt} | settings))
  return generate_texts(params, TOKENIZER, jax.random.key(seed), experiment, sample)


def test_without_settings_of_its_own_a_call_samples_as_the_experiment_says(params):
  sample = SampleConfig(num=3, temperature=0.7, top_k=5, prompt="a", max_tokens=4)
  experiment = dataclasses.replace(EXPERIMENT, sample=sample)
  drawn = generate_texts(params, TOKENIZER, jax.random.key(2), experiment)
  assert drawn == generate_texts(params, TOKENIZER, jax.random.key(2), EXPERIMENT, sample)
  assert len(drawn) == 3 and all(text.startswith("a") and len(text) <= 5 for text in drawn)


def test_samples_of_a_run_are_a_function_of_its_seed_and_the_step(params):
  drawn = []
  for seed, step in [(0, 5), (0, 6), (1, 5), (2**31 - 1, 5)]:
    experiment = change(EXPERIMENT, {"train.seed": seed, "sample.temperature": 1.0})
    drawn.append(sample_texts(params, TOKENIZER, step, experiment))
    key = derive_key(seed, SAMPLE, step)
    assert drawn[-1] == generate_texts(params, TOKENIZER, key, experiment)
  assert len(set(map(tuple, drawn))) == 4


def test_a_seed_repeats_and_another_differs(params):
  assert texts(params) == texts(params)
  assert texts(params) != texts(params, seed=1)


@pytest.mark.slow
def test_fewer_texts_are_the_first_of_more(params):
  assert texts(params, num=3) == texts(params, num=8)[:3]


def full_pass(params, ids):
  """Logits after the last of at most 16 ids.

  What is filled up behind them is not seen: one program for every length.
  """
  tokens = jnp.array([ids + [BOS] * (CONFIG.max_seq_len - len(ids))])
  return jitted_apply(params, tokens, CONFIG)[0, len(ids) - 1]


jitted_apply = jax.jit(apply, static_argnums=2)


@pytest.mark.parametrize(("how", "prompt"), [("plain", "ab"), ("as on a CPU", "")])
def test_greedy_decoding_equals_full_passes(params, how, prompt):
  """Temperature 0 with the cache gives token for token what a full forward pass over the text so
  far gives; a prompt of three tokens is filled up for that.
  """
  text = [BOS, *TOKENIZER.encode(prompt)]
  while len(text) <= CONFIG.max_seq_len:
    text.append(int(jnp.argmax(full_pass(params, text))))
    if text[-1] == BOS:
      break
  experiment = EXPERIMENT if how == "plain" else resolve_compute(EXPERIMENT, CPU)
  params = arrange_blocks(params, experiment.compute.layers)
  assert isinstance(params["blocks"], dict) == (how == "plain")
  drawn = texts(params, num=1, temperature=0.0, experiment=experiment, prompt=prompt)
  assert drawn == [TOKENIZER.decode(text)] and len(drawn[0]) > len(prompt) + 3


# Of eight devices; CI takes the first three.
SHAPES = [(2, 2, 2), (1, 8, 1), (4, 1, 2), (8, 1, 1), (1, 1, 8), (4, 2, 1), (2, 4, 1), (2, 1, 4)]
SHAPES += [(1, 4, 2), (1, 2, 4)]
MESHES = [
  pytest.param(s, marks=pytest.mark.exhaustive if i > 2 else ()) for i, s in enumerate(SHAPES)
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES)
def test_parameters_on_many_devices_draw_the_same_texts(params, shape):
  """Texts that the devices divide and others, with a prompt and without one; weights are gathered
  before the loop over tokens, and not for each.
  """
  sizes = {f"mesh.{axis}": n for axis, n in zip(AXES, shape, strict=True)}
  experiment = change(EXPERIMENT, {"data.batch_size": 8, "compute.layers": "unroll", **sizes})
  mesh = make_mesh(experiment, jax.devices())
  placed = jax.device_put(params, param_shardings(params, CONFIG, mesh))
  for settings in ({"num": 8, "prompt": "abc"}, {"num": 3, "temperature": 0.0}):
    sample = dataclasses.replace(experiment.sample, **settings)
    key = jax.random.key(3)
    expected = generate_texts(params, TOKENIZER, key, experiment, sample)
    assert generate_texts(placed, TOKENIZER, key, experiment, sample) == expected
  few = dataclasses.replace(experiment.sample, num=2)
  lowered = lower_texts(placed, TOKENIZER, experiment, few)
  module = hlo.parse_module(lowered.compile().as_text())
  size = min(x.size for x in jax.tree.leaves(params["blocks"])) / CONFIG.num_layers
  gathers = [c for c in hlo.find_collectives(module) if c.kind == "all-gather"]
  assert all(not c.loops or c.num_bytes < 4 * size for c in gathers)
  assert any(not c.loops and c.num_bytes >= 4 * size for c in gathers) == (shape[1] > 1)


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
  assert max(len(t) for t in texts(params, num=200, max_tokens=17)) == CONFIG.max_seq_len + 1


@pytest.mark.slow
def test_a_prompt_shorter_by_limits_is_the_beginning_of_the_longer(params):
  short, long = texts(params, max_tokens=3), texts(params, max_tokens=9)
  assert all(b.startswith(a) for a, b in zip(short, long, strict=True))


THREE = dataclasses.replace(CONFIG, vocab_size=3, max_seq_len=2, num_layers=1, init_std=0.5)
TEXTS = np.array(list(itertools.product(range(3), repeat=4)))


def probabilities_of_texts(params, prompt, temperature, stop_id):
  """For each of TEXTS the product of its tokens' probabilities after the two tokens before each.

  After the stop token comes the stop token.
  """
  pairs = np.array([(a, b) for a in range(3) for b in range(3)])
  logits = np.asarray(jitted_apply(params, pairs, THREE))
  next_token = np.array([[softmax(z / temperature) for z in rows] for rows in logits])
  product = []
  for text in TEXTS.tolist():
    ids, p = [*prompt, *text], 1.0
    for n in range(len(prompt), len(ids)):
      if n > len(prompt) and ids[n - 1] == stop_id:
        p *= ids[n] == stop_id
      elif n == 1:
        p *= next_token[3 * ids[0], 0, ids[1]]
      else:
        p *= next_token[3 * ids[n - 2] + ids[n - 1], 1, ids[n]]
    product.append(p)
  return np.array(product)


@pytest.mark.parametrize(("prompt", "stop_id"), [([1], None), ([0, 1], 2)])
def test_tokens_of_a_text_have_the_joint_distribution_of_the_model(prompt, stop_id):
  """All 81 texts of four tokens are as frequent as the product of their tokens' probabilities.

  So each token is drawn anew and given those before it, from the cache and past the context, until
  the stop token (chi-square over 50,000 texts, p > 1e-4). Texts of one call are independent: two
  tokens of one say nothing of the next one's, at the same place or one before or after.
  """
  params = jitted_init(jax.random.key(3), THREE)
  num, temperature = 50_000, 1.5
  tokens = generate(
    params,
    jnp.array(prompt),
    jnp.int32(len(prompt)),
    jax.random.key(0),
    jnp.float32(temperature),
    config=THREE,
    num=num,
    max_tokens=4,
    stop_id=stop_id,
    past_context=True,
  )
  new = np.asarray(tokens)
  p = probabilities_of_texts(params, prompt, temperature, stop_id)
  assert p.sum() == pytest.approx(1)
  counts = np.bincount(new @ np.array([27, 9, 3, 1]), minlength=81)
  assert not counts[p == 0].any()
  assert chi_square_p(counts, num * p) > 1e-4
  for i, j in [(0, 0), (0, 1), (1, 0)]:
    a, b = (x[:, n] * 3 + x[:, n + 1] for x, n in ((new[::2], i), (new[1::2], j)))
    marginals = [np.bincount(TEXTS[:, n] * 3 + TEXTS[:, n + 1], p, minlength=9) for n in (i, j)]
    counts = np.bincount(a * 9 + b, minlength=81)
    assert chi_square_p(counts, num / 2 * np.outer(*marginals).ravel()) > 1e-4, (i, j)


def test_an_unknown_character_in_a_prompt_is_named(params):
  with pytest.raises(UserError, match=r"'É' 'é'.*a-z"):
    texts(params, prompt="Éé")


@pytest.mark.parametrize(
  ("chars", "known"), [("abc", "a"), ("!,.z", "z"), (",.;", ","), (None, "a")]
)
def test_a_prompt_that_has_no_ids_is_refused_with_one_that_has(chars, known):
  """Its first letter or digit, or its first character, or "a" for a tokenizer of bytes."""
  tokenizer = CharTokenizer(chars, bos=True) if chars else ByteTokenizer()
  with pytest.raises(UserError) as caught:
    check_prompt(SampleConfig(temperature=1.0, prompt="\udcffé"), tokenizer)
  message = str(caught.value)
  assert message.startswith("sample.prompt='") and message.count("Try --set ") == 1
  given = shlex.split(message.partition("Try --set ")[2])
  assert given == [f"sample.prompt={known}"] and ".." not in message
  check_prompt(SampleConfig(temperature=1.0, prompt=known), tokenizer)


def test_a_long_prompt_keeps_its_tail(params):
  assert fit_prompt(list(range(20)), CONFIG) == (list(range(4, 20)), 4)
  assert all(
    len(t) == 21 for t in texts(params, prompt="a" * 20, num=50) if t != "a" * 20
  )  # one token, then it is full


def test_padding_of_the_vocabulary_is_never_drawn():
  """Nor anything past the context, unless that is asked for: there are zeros."""
  config = dataclasses.replace(CONFIG, vocab_multiple=64)
  params = jitted_init(jax.random.key(0), config)
  prompt = np.full(1, BOS, np.int32)
  tokens = generate(
    params,
    prompt,
    np.int32(1),
    jax.random.key(1),
    np.float32(50.0),
    config=config,
    num=500,
    max_tokens=20,
  )
  assert int(tokens.max()) == 26 and tokens[:, 15].any() and not tokens[:, 16:].any()


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


@pytest.mark.parametrize("num", [1, 3])
def test_in_bfloat16_the_largest_logits_are_those_of_a_full_pass(num):
  """Weights that are rounded once, and arranged for one row, compute what `apply` computes."""
  config = dataclasses.replace(CONFIG, d_model=64, d_ff=128, vocab_multiple=64, tied_head=True)
  compute = dataclasses.replace(PLAIN, dtype="bfloat16", matmul="flat", layers="unroll")
  params = jitted_init(jax.random.key(0), config)
  prompt_P = jnp.array([BOS, 4, 9, 0])
  new_BT = generate(
    params,
    prompt_P,
    jnp.int32(3),
    jax.random.key(1),
    jnp.float32(0),
    config=config,
    compute=compute,
    num=num,
    max_tokens=6,
  )
  text_BT = jnp.concatenate([jnp.tile(prompt_P[None, :3], (num, 1)), new_BT], axis=1)
  logits_BTV = jax.jit(apply, static_argnums=(2, 3))(params, text_BT, config, compute)
  logits_BT = jnp.take_along_axis(logits_BTV[:, 2:-1], new_BT[:, :, None], axis=2)[:, :, 0]
  # Sums in another order, and activations that are rounded after them.
  assert (logits_BT >= logits_BTV[:, 2:-1].max(axis=2) - 0.02).all()
  assert len(set(new_BT[0].tolist())) > 1
