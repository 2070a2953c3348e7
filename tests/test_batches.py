"""Batches of a stream as functions of the step: random windows, sequential tokens, epochs of
permuted windows.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jgpt import batches
from jgpt.batches import (
  Batch,
  Documents,
  Stream,
  count_epoch_steps,
  count_eval_batches,
  make_seen_counter,
)
from jgpt.config.catalog import load_experiment
from jgpt.config.experiment import NUM_GROUPS, Hyper
from jgpt.keys import DROPOUT, derive_key, derive_row_keys
from jgpt.layers import dropout
from jgpt.system.precision import enable_x64

NAMES = load_experiment("names")
BASE = dataclasses.replace(NAMES.data, heldout_fraction=0.0)
LAST_STEP = 2**31 - 1


def make_config(batching, *, seq_len=4, batch_size=3, **changes):
  return dataclasses.replace(
    BASE, batching=batching, seq_len=seq_len, batch_size=batch_size, **changes
  )


def make_experiment(config, seed):
  return dataclasses.replace(NAMES, data=config, train=dataclasses.replace(NAMES.train, seed=seed))


def batch_of(config, seed):
  """`batches.batch` of an experiment with these settings of its data."""
  return partial(batches.batch, experiment=make_experiment(config, seed))


def eval_batch_of(config, seed, *, whole):
  return partial(batches.eval_batch, experiment=make_experiment(config, seed), whole=whole)


def make_stream(num_tokens):
  """Token n is 10 n: a window's ids say where it was cut."""
  return Stream(jnp.arange(num_tokens, dtype=jnp.int32) * 10)


def assert_is_window(batch, row, start, num_tokens):
  """Row `row` is the window at `start`: inputs, targets one later, weight 1 where the target is in
  the text.
  """
  T = batch.inputs_BT.shape[1]
  positions = np.arange(start, start + T + 1)
  inside = positions < num_tokens
  assert (batch.inputs_BT[row] == positions[:-1] * 10)[inside[:-1]].all()
  assert (batch.targets_BT[row] == positions[1:] * 10)[inside[1:]].all()
  np.testing.assert_array_equal(batch.weights_BT[row], np.float32(inside[1:]))


def starts(batch):
  return (np.asarray(batch.inputs_BT[:, 0]) // 10).tolist()


@pytest.mark.parametrize("batching", ["random", "sequential", "epochs"])
def test_any_step_is_the_same_inside_jit_and_out(batching):
  """Up to the last step that an int32 holds; every row is a window of the text."""
  config, corpus = make_config(batching), make_stream(50)
  batch = batch_of(config, 7)
  jitted = jax.jit(batch)

  @hypothesis_settings(deadline=None, max_examples=25)
  @given(st.one_of(st.integers(0, 40), st.integers(0, LAST_STEP), st.just(LAST_STEP)))
  def check(step):
    a, b = batch(corpus, jnp.int32(step)), jitted(corpus, jnp.int32(step))
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y, strict=True)
    for row, start in enumerate(starts(a)):
      if a.weights_BT[row].any():
        assert 0 <= start <= 50 - 5
        assert_is_window(a, row, start, 50)

  check()


def test_random_windows_start_everywhere_alike():
  """Every start from the first to the last whole window is drawn, equally often within 5 standard
  deviations.

  nanoGPT's get_batch draws from len(data) - block_size starts; one less or one more would show as a
  start too few or as targets past the end.
  """
  config, corpus = make_config("random", batch_size=500), make_stream(25)
  draw = jax.jit(batch_of(config, 0))
  counts = np.bincount(np.concatenate([starts(draw(corpus, jnp.int32(i))) for i in range(100)]))
  assert len(counts) == 21
  expected = 50_000 / 21
  assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_random_windows_depend_on_seed_and_step_alone():
  corpus = make_stream(1000)
  first, again, other = (batch_of(make_config("random"), seed) for seed in (1, 1, 2))
  assert starts(first(corpus, 5)) == starts(again(corpus, 5))
  assert starts(first(corpus, 5)) != starts(other(corpus, 5))
  assert starts(first(corpus, 5)) != starts(first(corpus, 6))


@pytest.mark.parametrize("batching", ["random", "epochs"])
def test_a_seed_may_be_an_array(batching):
  """Given as `hyper` and traced, it draws what it draws as the experiment's."""
  config, corpus = make_config(batching), make_stream(100)
  hyper = Hyper.of(make_experiment(config, 0))
  drawn = jax.vmap(lambda seed: batch_of(config, 0)(corpus, 5, hyper=hyper._replace(seed=seed)))
  both = drawn(jnp.array([1, 2]))
  for i in (0, 1):
    expected = batch_of(config, i + 1)(corpus, 5)
    for x, y in zip(expected, both, strict=True):
      np.testing.assert_array_equal(x, y[i], strict=True)
  assert starts(batch_of(config, 1)(corpus, 5)) != starts(batch_of(config, 2)(corpus, 5))


@pytest.mark.parametrize("num_tokens", [13, 24, 25, 26, 36, 37, 50])
def test_sequential_tokens_are_those_of_llm_cs_loader(num_tokens):
  """B*T+1 tokens from a position that advances by B*T, and starts over where they would pass the
  end.

  The loader is played here with a position that moves, as llm.c writes it.
  """
  config, corpus = make_config("sequential"), make_stream(num_tokens)
  B, T, tokens, position = 3, 4, np.arange(num_tokens) * 10, 0
  batch = jax.jit(batch_of(config, 0))
  for step in range(20):
    if position + B * T + 1 > num_tokens:
      position = 0
    got = batch(corpus, jnp.int32(step))
    np.testing.assert_array_equal(np.ravel(got.inputs_BT), tokens[position : position + B * T])
    np.testing.assert_array_equal(
      np.ravel(got.targets_BT), tokens[position + 1 : position + B * T + 1]
    )
    assert (got.weights_BT == 1).all()
    position += B * T


@pytest.mark.parametrize(
  ("num_tokens", "batch_size"), [(50, 3), (49, 3), (48, 4), (5, 3), (41, 10)]
)
def test_an_epoch_holds_each_window_once(num_tokens, batch_size):
  """Each token is a target once an epoch, but for a rest that fills no window.

  The last batch is short, not filled up.
  """
  config, corpus = make_config("epochs", batch_size=batch_size), make_stream(num_tokens)
  num_windows, num_steps = (num_tokens - 1) // 4, count_epoch_steps(corpus, config)
  assert num_steps == -(-num_windows // batch_size)
  assert count_epoch_steps(corpus, make_config("random", batch_size=batch_size)) is None
  batch, orders = jax.jit(batch_of(config, 0)), []
  for epoch in range(3):
    seen, weights = [], 0
    for i in range(num_steps):
      got = batch(corpus, jnp.int32(epoch * num_steps + i))
      kept = np.asarray(got.weights_BT[:, 0]) == 1
      assert (np.asarray(got.weights_BT) == kept[:, None]).all()  # a row counts whole or not at all
      seen += np.asarray(starts(got))[kept].tolist()
      weights += int(got.weights_BT.sum())
    assert sorted(seen) == [4 * w for w in range(num_windows)]
    assert weights == 4 * num_windows
    orders.append(seen)
  if num_windows > 5:
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_a_short_last_batch_is_the_mean_of_its_own_tokens():
  """Rows that are missing weigh nothing: the loss divides by the tokens there are."""
  from equivalence import QUICK, initial_params, names_experiment

  from jgpt.step import loss_fn

  experiment = names_experiment()
  config = make_config("epochs", batch_size=4)
  corpus = Stream(
    jnp.asarray(np.random.default_rng(0).integers(0, 27, 21), jnp.int32)
  )  # 5 windows: batches of 4 and 1
  params = jax.tree.map(jnp.asarray, initial_params(experiment.model))
  short = batch_of(config, 0)(corpus, jnp.int32(1))
  assert short.weights_BT.sum() == 4
  loss = jax.jit(lambda b: loss_fn(params, b, experiment), compiler_options=QUICK)
  alone = jax.tree.map(lambda x: x[:1], short)
  np.testing.assert_allclose(loss(short), loss(alone), rtol=1e-6)


@pytest.mark.parametrize("num_tokens", [2, 5, 6, 13, 14, 50])
def test_evaluation_counts_every_prediction_once(num_tokens):
  """In order, whatever the text's length: the last window may be short, and nothing past the end
  weighs anything; no batch is empty.
  """
  config, corpus = make_config("random"), make_stream(num_tokens)
  batch, seen = jax.jit(eval_batch_of(config, 0, whole=True)), []
  for i in range(count_eval_batches(corpus, config)):
    got = batch(corpus, jnp.int32(i))
    counted = np.asarray(got.weights_BT) == 1
    assert counted.any()
    seen += (np.asarray(got.targets_BT)[counted] // 10).tolist()
    np.testing.assert_array_equal(
      np.asarray(got.inputs_BT)[counted], np.asarray(got.targets_BT)[counted] - 10
    )
  assert seen == list(range(1, num_tokens))
  assert (
    count_eval_batches(make_stream(0), config) == count_eval_batches(make_stream(1), config) == 0
  )


def make_corpus(num_documents):
  """Documents whose row i holds 100 i + position, and 1, 2, 3, 4, 1, ... predictions."""
  rows = np.arange(num_documents)
  tokens = rows[:, None] * 100 + np.arange(5)
  return Documents(jnp.asarray(tokens, jnp.int32), jnp.asarray(rows % 4 + 1, jnp.int32))


def assert_holds_documents(batch, rows, num_counted):
  """The batch's first rows are these documents, and what is counted is theirs."""
  tokens = np.array(rows)[:, None] * 100 + np.arange(5)
  weights_BT = np.arange(4) < np.array(rows)[:, None] % 4 + 1
  np.testing.assert_array_equal(batch.inputs_BT[: len(rows)], tokens[:, :-1])
  np.testing.assert_array_equal(batch.targets_BT[: len(rows)], tokens[:, 1:])
  np.testing.assert_array_equal(batch.weights_BT[: len(rows)], np.float32(weights_BT))
  assert batch.weights_BT.sum() == weights_BT.sum() == num_counted


@pytest.mark.parametrize(("num_documents", "num_batches"), [(1, 1), (256, 1), (257, 2)])
def test_evaluation_counts_every_document_once(num_documents, num_batches):
  """In order, 256 at a time; the last batch may be short, and is not empty."""
  corpus, config = make_corpus(num_documents), make_config("documents")
  assert count_eval_batches(corpus, config) == num_batches
  batch = jax.jit(eval_batch_of(config, 0, whole=False))
  for i in range(num_batches):
    rows = range(num_documents)[256 * i : 256 * (i + 1)]
    assert_holds_documents(batch(corpus, jnp.int32(i)), rows, sum(n % 4 + 1 for n in rows))


@pytest.mark.parametrize("num_documents", [1, 3, 7])
def test_documents_are_taken_in_order_and_again(num_documents):
  """Three at a time, up to the last step that an int32 holds, where their product does not fit."""
  corpus, batch = make_corpus(num_documents), jax.jit(batch_of(make_config("documents"), 0))
  for step in (0, 1, 2, 3, 6, 7, 10**9, LAST_STEP - 1, LAST_STEP):
    rows = [(3 * step + i) % num_documents for i in range(3)]
    assert_holds_documents(batch(corpus, jnp.int32(step)), rows, sum(n % 4 + 1 for n in rows))


def test_sampled_evaluation_draws_the_same_windows_each_time_and_others_than_training():
  """Two evaluations differ by the model alone."""
  config, corpus = make_config("random"), make_stream(10_000)
  sampled = eval_batch_of(config, 3, whole=False)
  assert starts(sampled(corpus, 2)) == starts(eval_batch_of(config, 3, whole=False)(corpus, 2))
  assert starts(sampled(corpus, 2)) != starts(batch_of(config, 3)(corpus, 2))
  assert starts(sampled(corpus, 2)) != starts(sampled(corpus, 1))
  assert starts(sampled(corpus, 2)) != starts(eval_batch_of(config, 4, whole=False)(corpus, 2))
  in_order = eval_batch_of(make_config("sequential"), 3, whole=False)
  assert starts(in_order(corpus, 1)) == [12, 16, 20]


@pytest.mark.parametrize("batching", ["random", "sequential", "epochs"])
def test_num_batches_repeats_the_first_ones(batching):
  corpus = make_stream(100)
  few, all_ = (batch_of(make_config(batching, num_batches=n), 0) for n in (2, None))
  for step in range(6):
    for x, y in zip(few(corpus, jnp.int32(step)), all_(corpus, jnp.int32(step % 2)), strict=True):
      np.testing.assert_array_equal(x, y)


# --- Parts of a batch ---


def make_documents(lengths, T=7):
  """A batch whose row i holds 100 i + position, and predictions as many as its length."""
  tokens = np.arange(len(lengths))[:, None] * 100 + np.arange(T + 1)
  weights_BT = np.float32(np.arange(T) < np.array(lengths)[:, None])
  return jax.tree.map(jnp.asarray, Batch(tokens[:, :-1], tokens[:, 1:], weights_BT))


def rows_of(part):
  """Which rows of `make_documents` a part holds; each with all that belongs to it."""
  rows = np.asarray(part.inputs_BT)[..., 0] // 100
  whole = make_documents(LENGTHS)
  for got, all_rows in zip(part, whole, strict=True):
    np.testing.assert_array_equal(got, np.asarray(all_rows)[rows])
  return rows.tolist()


LENGTHS = [7, 1, 3, 4, 2, 7, 1, 3, 5, 2, 3, 6]


@pytest.mark.parametrize("micro_batch_size", [1, 3, 12])
def test_micro_batches_take_turns(micro_batch_size):
  parts = batches.split(make_documents(LENGTHS), 12 // micro_batch_size)
  num_micro = 12 // micro_batch_size
  assert rows_of(parts) == [list(range(i, 12, num_micro)) for i in range(num_micro)]


def test_groups_are_of_like_length_and_only_long_ones_need_all_positions():
  """Sorted from short to long; of 7 positions the first three are the half that may be enough."""
  groups = batches.group_by_length(make_documents(LENGTHS))
  rows = rows_of(groups)
  assert np.shape(rows) == (NUM_GROUPS, 12 // NUM_GROUPS) and sorted(np.ravel(rows)) == [*range(12)]
  lengths = np.array(LENGTHS)[np.array(rows)]
  assert np.ravel(lengths).tolist() == sorted(LENGTHS)
  needs = [
    bool(batches.needs_all_positions(jax.tree.map(lambda x, i=i: x[i], groups)))
    for i in range(NUM_GROUPS)
  ]
  assert needs == (lengths.max(axis=1) > 3).tolist() and len(set(needs)) == 2


# --- What the environment may set ---


def test_draws_are_the_same_with_64_bit_types_and_another_default_of_keys():
  """Keys, random windows, the order of an epoch and what dropout drops; all of them int32."""

  def draw():
    key = derive_key(5, DROPOUT, jnp.int32(3))
    starts, _ = batches.window_starts(1000, jnp.int32(7), 5, make_config("random"))
    order = batches.epoch_order(37, jnp.int32(2), 5)
    kept = dropout(jnp.ones((4, 33), jnp.float32), 0.3, derive_row_keys(key, 4))
    return jax.random.key_data(key), starts, order, kept

  expected = [np.asarray(x) for x in draw()]
  with enable_x64(True), jax.default_prng_impl("rbg"):
    got = [np.asarray(x) for x in draw()]
  for a, b in zip(expected, got, strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


# --- What a run was trained on ---


@pytest.mark.parametrize("num_batches", [None, 3, 20])
@pytest.mark.parametrize("batching", ["documents", "random", "sequential", "epochs"])
def test_what_was_seen_is_what_the_batches_hold(batching, num_batches):
  """Their weights and rows, summed; the batches of 3 leave 2 of 8 windows to the last of an epoch,
  and 11 documents go round in the middle of a batch.
  """
  config = make_config(batching, num_batches=num_batches)
  corpus = make_stream(35)  # 8 windows of 4
  if batching == "documents":
    lengths = np.array([4, 1, 3, 2, 4, 4, 1, 2, 3, 4, 1], np.int32)
    corpus = Documents(np.zeros((11, 5), np.int32), lengths)
  take, count = jax.jit(batch_of(config, 0)), make_seen_counter(corpus, config)
  sequences = tokens = 0
  for step in range(40):
    assert count(step) == (sequences, tokens)
    weights_BT = np.asarray(take(jax.tree.map(jnp.asarray, corpus), jnp.int32(step)).weights_BT)
    sequences += int((weights_BT.sum(1) > 0).sum())
    tokens += int(weights_BT.sum())
  assert type(count(40).tokens) is int


def test_what_was_seen_is_exact_at_any_step():
  """Beyond the integers of 32 and 64 bits and of float32."""
  epochs = make_seen_counter(make_stream(35), make_config("epochs"))
  assert epochs(3 * 10**20 + 2) == (8 * 10**20 + 6, 4 * (8 * 10**20 + 6))
  lengths = np.full(7, 2**31 - 1, np.int32)  # their sum is none of 32 bits
  documents = make_seen_counter(Documents(np.zeros((7, 5)), lengths), make_config("documents"))
  assert documents(7 * 10**18).tokens == 3 * 7 * 10**18 * (2**31 - 1)
