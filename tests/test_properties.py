"""What must hold between jgpt's own computations, whatever the values: one network however it is
run, batched or padded.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from equivalence import (
  CPU,
  GRADIENT_TOLERANCE,
  LOSS_TOLERANCE,
  NAMES,
  QUICK,
  batch_of,
  cast,
  compare,
  corpus_of,
  initial_params,
  initial_state,
  leaves_by_name,
  names_experiment,
  options_of,
)
from switches import in_brief

from jgpt import batches, generate, model, step
from jgpt.config.experiment import Hyper
from jgpt.config.settings import change
from jgpt.devices.compute import resolve_compute
from jgpt.params import count_params

quick_jit = partial(jax.jit, compiler_options=QUICK)
# More documents than a batch of 16 and not a multiple of it, so that batches run over the end of
# the text.
DOCUMENTS = tuple("abcdefghijklmnopqrstuvwxyz"[i : i + 1 + i * 7 % 19] for i in range(23))


def tokens_for(config, batch_size=3):
  """Random ids that fill the context."""
  ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, config.max_seq_len))
  return jnp.asarray(ids, jnp.int32)


# --- The cache ---


def logits_one_by_one(params, tokens_BT, config):
  """The logits of `decode_step` at every position, each token's keys and values coming from the
  cache.
  """

  def add_token(cache, position_and_tokens):
    position, tokens_B = position_and_tokens
    logits_BV, cache = generate.decode_step(params, tokens_B, cache, position, config)
    return cache, logits_BV

  B, T = tokens_BT.shape
  cache = generate.init_cache(params, B, config.max_seq_len, config)
  return jax.lax.scan(add_token, cache, (jnp.arange(T), tokens_BT.T))[1].swapaxes(0, 1)


@pytest.mark.slow
def test_gradient_through_the_cache_is_that_of_the_full_pass(x64):
  """Decoding computes the same function as training: their gradients agree in every entry.

  Equal gradients say more than equal logits: also what the cache hands from one position to the
  next is the same function.
  """
  config = names_experiment(model__num_layers=2).model
  params, tokens_BT = cast(initial_params(config), "float64"), tokens_for(config)
  cotangent_BTV = jax.random.normal(
    jax.random.key(1), (*tokens_BT.shape, config.vocab_size), jnp.float64
  )

  @quick_jit
  def both_gradients(params):
    forwards = (model.apply, logits_one_by_one)
    return [
      jax.grad(lambda p, f=f: jnp.vdot(f(p, tokens_BT, config), cotangent_BTV))(params)
      for f in forwards
    ]

  full, cached = both_gradients(params)
  compare("full pass, float64: gradient through the cache", full, cached, 1e-10)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cached_logits_are_those_of_the_full_pass(request, dtype):
  """Sampling sees the logits that training optimised, at every position, begun empty or from
  prompts of any length.
  """
  if dtype == "float64":
    request.getfixturevalue("x64")
  config = names_experiment(model__num_layers=2).model
  params, tokens_BT = cast(initial_params(config), dtype), tokens_for(config)
  tolerance = GRADIENT_TOLERANCE[dtype]
  full_BTV = quick_jit(model.apply, static_argnums=2)(params, tokens_BT, config)
  one_by_one_BTV = quick_jit(logits_one_by_one, static_argnums=2)(params, tokens_BT, config)
  compare(
    f"full pass, {dtype}: cached", {"logits": full_BTV}, {"logits": one_by_one_BTV}, tolerance
  )

  decode_step = quick_jit(generate.decode_step, static_argnums=4)
  for prompt_len in (1, 7, config.max_seq_len - 1):
    cache = quick_jit(generate.prefill, static_argnums=(2, 3))(
      params, tokens_BT[:, :prompt_len], config.max_seq_len, config
    )
    for position in range(prompt_len, config.max_seq_len):
      logits_BV, cache = decode_step(
        params, tokens_BT[:, position], cache, jnp.int32(position), config
      )
      expected, got = {"logits": full_BTV[:, position]}, {"logits": logits_BV}
      compare(f"full pass, {dtype}: cached after a prompt", expected, got, tolerance)


@pytest.mark.slow
def test_decoding_ignores_what_the_cache_holds_from_its_position_on():
  """What an earlier, longer text or a padded prompt left in the cache does not change one bit of
  the logits.
  """
  config = names_experiment().model
  params, tokens_BT = cast(initial_params(config), "float32"), tokens_for(config)
  clean = generate.prefill(params, tokens_BT[:, :5], config.max_seq_len, config)
  stale = jax.tree.map(lambda c_LBNSH: c_LBNSH.at[:, :, :, 5:].set(1e3), clean)
  decode_step = quick_jit(generate.decode_step, static_argnums=4)
  from_clean, from_stale = (
    decode_step(params, tokens_BT[:, 5], c, jnp.int32(5), config)[0] for c in (clean, stale)
  )
  np.testing.assert_array_equal(from_clean, from_stale)


# --- The gradient ---


@pytest.mark.slow
def test_gradient_agrees_with_finite_differences(x64):
  """The gradient is the derivative of the loss that is computed, by its definition and along random
  directions.

  The oracle says that loss and gradient are microgpt's; this holds for a batch and needs no second
  implementation.
  """
  experiment = names_experiment(model__num_layers=2)
  # Two short names: of many hidden units one is always so near 0 that the step crosses ReLU's kink.
  params, batch = cast(initial_params(experiment.model), "float64"), batch_of(NAMES[:2], experiment)
  loss = jax.jit(lambda params: step.loss_fn(params, batch, experiment))
  jax.test_util.check_grads(loss, (params,), order=1, modes=["rev"], atol=1e-7, rtol=1e-7, eps=1e-6)


def test_no_gradient_reaches_a_later_position():
  """The logits at t depend on the tokens up to t, and on no later one by even the smallest float.

  A leak would make the training loss a lie: the answer would be in the question. The derivative
  with respect to each token is that of its row of the embedding; each token occurs once, so that a
  row is one position.
  """
  config = names_experiment(model__num_layers=2).model
  params, T = cast(initial_params(config), "float32"), config.max_seq_len
  tokens_T = jnp.asarray(np.random.default_rng(0).permutation(config.vocab_size)[:T], jnp.int32)
  direction_V = jax.random.normal(jax.random.key(1), (config.vocab_size,))

  def one_number_per_position(tables):
    return model.apply(params | tables, tokens_T[None], config)[0] @ direction_V

  tables = {name: params[name] for name in ("tok_embed", "pos_embed")}
  jacobian = quick_jit(jax.jacrev(one_number_per_position))(tables)
  by_position = {
    "tok_embed": jacobian["tok_embed"][:, tokens_T],
    "pos_embed": jacobian["pos_embed"],
  }
  for name, jacobian_TSD in by_position.items():
    reached_TS = np.any(np.asarray(jacobian_TSD) != 0, axis=-1)
    np.testing.assert_array_equal(reached_TS, np.tril(np.ones((T, T), bool)), err_msg=name)


# --- Batches ---


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_batch_is_the_token_weighted_mean_of_its_documents(request, dtype):
  """Documents in a batch do not see each other, and each token counts the same, in a short name or
  in a long one.
  """
  if dtype == "float64":
    request.getfixturevalue("x64")
  experiment = names_experiment()
  params = cast(initial_params(experiment.model), dtype)
  loss_and_grads = quick_jit(partial(step.loss_and_grads, step=0, experiment=experiment))
  together = loss_and_grads(params, batch_of(NAMES, experiment))
  num_tokens = np.array(
    [min(len(name) + 1, experiment.data.seq_len) for name in NAMES]
  )  # the closing BOS is one
  singles = [loss_and_grads(params, batch_of([name], experiment)) for name in NAMES]
  mean = jax.tree.map(
    lambda *leaves: np.average(np.stack(leaves), axis=0, weights=num_tokens), *singles
  )
  oracle = f"names one by one, {dtype}: batch"
  compare(oracle, {"loss": mean[0]}, {"loss": together[0]}, LOSS_TOLERANCE[dtype])
  compare(oracle, mean[1], together[1], GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_micro_batches_add_up_to_the_batch(micro_batch_size):
  """Accumulating over micro-batches gives the large batch's loss and gradient, so memory does not
  decide what is learned.

  The documents differ in length: averaging the micro-batches' means would weigh their tokens
  unequally.
  """
  experiment = names_experiment(data__batch_size=16)
  params, batch = (
    cast(initial_params(experiment.model), "float32"),
    batch_of(DOCUMENTS[:16], experiment),
  )
  loss_and_grads = quick_jit(step.loss_and_grads, static_argnums=3)
  loss, grads = loss_and_grads(params, batch, 0, experiment)
  in_parts = change(experiment, {"train.micro_batch_size": micro_batch_size})
  micro_loss, micro_grads = loss_and_grads(params, batch, 0, in_parts)
  compare("batch of 16, float32: micro-batches", {"loss": loss}, {"loss": micro_loss}, 1e-5)
  compare("batch of 16, float32: micro-batches", grads, micro_grads, 1e-5)


# --- Many steps in one call ---


@pytest.mark.slow
@pytest.mark.parametrize(
  ("batch_size", "options"), [(1, "shipped"), (16, "default"), (16, "shipped")]
)
def test_any_split_into_calls_gives_the_same_bits(batch_size, options):
  """How many updates a call makes changes no bit of the state or the metrics.

  So a run that is logged, saved or resumed at other steps is the same run. One call of 20 updates,
  calls of 7, 1 and 12, and 20 calls of a jitted `train_step` are compared: computed plainly, or as
  a run on a CPU does.
  """
  experiment, num_steps = names_experiment(data__batch_size=batch_size), 20
  if options == "shipped":
    experiment = resolve_compute(experiment, CPU)
    assert experiment.compute.group_documents == (batch_size == 16)
  corpus, start = corpus_of(DOCUMENTS, experiment), initial_state(experiment)
  jit = partial(jax.jit, compiler_options=options_of(options))
  many = jit(partial(step.train_steps, experiment=experiment, capacity=num_steps))
  one = jit(partial(step.train_step, experiment=experiment))
  batch = quick_jit(partial(batches.next_documents, config=experiment.data))

  def split(lengths):
    state, parts = start, []
    for length in lengths:
      state, metrics = many(state, corpus, jnp.int32(length))
      parts.append(jax.tree.map(lambda m, length=length: m[:length], metrics))
    return state, jax.tree.map(lambda *m: np.concatenate(m), *parts)

  def singly():
    state, rows = start, []
    for i in range(num_steps):
      state, metrics = one(state, batch(corpus, jnp.int32(i)))
      rows.append(metrics)
    return state, jax.tree.map(lambda *m: np.stack(m), *rows)

  expected = leaves_by_name(split([num_steps]))
  for name, got in {"calls of 7, 1 and 12": split([7, 1, 12]), "single steps": singly()}.items():
    got = leaves_by_name(got)
    assert got.keys() == expected.keys()
    for leaf, value in expected.items():
      np.testing.assert_array_equal(value, got[leaf], err_msg=f"{name}: {leaf}", strict=True)


# --- Several runs in one program ---

SWEEPS = {
  "documents": {"model__dropout": 0.1, "model__dropout_places": ("embedding", "attention")},
  "random": {"optimizer__schedule": "cosine", "optimizer__clip_norm": 0.5},
  "epochs": {"optimizer__schedule": "wsd", "optimizer__skip_spikes": 6.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("batching", SWEEPS)
def test_the_members_of_a_sweep_are_single_runs(x64, batching):
  """Rates, decays, betas and seeds that are arrays train as the runs that have them as settings.

  Three rates and two seeds under one `vmap`: losses, rates, parameters and moments of ten updates.
  The seed decides what is dropped, or which windows are drawn. Random ones are computed as a run on
  a CPU does, the others plainly.
  """
  settings = {"data__batching": batching, "data__batch_size": 4, "optimizer__warmup_steps": 3}
  num_steps, settings = 10, settings | SWEEPS[batching]
  experiment = names_experiment(optimizer__decay_steps=num_steps, **settings)
  if batching == "random":
    experiment = resolve_compute(experiment, CPU)
  params = cast(initial_params(experiment.model), "float64")
  ids = np.random.default_rng(0).integers(0, 27, 16 * 11 + 1)
  corpus = batches.Stream(jnp.asarray(ids, jnp.int32))
  if batching == "documents":
    corpus = corpus_of(DOCUMENTS, experiment)
  rates = ((0.02, 0.0, 0.85, 0.99), (0.005, 0.1, 0.9, 0.95), (0.01, 0.3, 0.0, 0.5))
  members = [Hyper(*numbers, seed) for numbers in rates for seed in (3, 4)]

  def train(params, corpus, hyper, experiment):
    state = cast(step.begin_state(params, experiment), "float64")  # whatever the decay
    num = jnp.int32(num_steps)
    return step.train_steps(state, corpus, num, experiment, hyper, capacity=num_steps)

  train = quick_jit(train, static_argnums=3)
  hypers = jax.tree.map(lambda *numbers: jnp.array(numbers), *members)
  together = jax.vmap(train, in_axes=(None, None, 0, None))(params, corpus, hypers, experiment)
  for i, member in enumerate(members):
    numbers = {f"optimizer.{name}": value for name, value in member._asdict().items()}
    seed = numbers.pop("optimizer.seed")
    single = change(experiment, numbers | {"train.seed": seed})
    expected = train(params, corpus, None, single)
    got = jax.tree.map(lambda x, i=i: x[i], together)
    assert int(got[0].step) == num_steps
    oracle = f"single runs, float64: a sweep over {batching}"
    with in_brief():
      compare(oracle, expected[1], got[1], 1e-9)
      compare(oracle, expected[0].params, got[0].params, 1e-9)
      for moment in ("mu", "nu"):
        trees = (getattr(state.opt_state["adam"], moment) for state in (expected[0], got[0]))
        compare(oracle, *trees, 1e-9)
  losses = np.asarray(together[1]["train/loss"])
  assert len(np.unique(losses[:, -1])) == len(members)  # each is a run of its own


# --- The padded vocabulary ---


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_padded_vocabulary_changes_no_loss_and_no_gradient(request, dtype):
  """Rows added for speed are invisible: initial values, loss, gradients and the parameter count are
  those without.
  """
  if dtype == "float64":
    request.getfixturevalue("x64")
  plain, padded = names_experiment(), names_experiment(model__vocab_multiple=128)
  assert count_params(plain.model) == count_params(padded.model) == 4192
  results = []
  for experiment in (plain, padded):
    params = cast(initial_params(experiment.model), dtype)
    loss_and_grads = quick_jit(step.loss_and_grads, static_argnums=3)
    loss, grads = loss_and_grads(params, batch_of(NAMES, experiment), 0, experiment)
    results.append((params, loss, grads))
  (params, loss, grads), (padded_params, padded_loss, padded_grads) = results
  oracle = f"vocabulary of 27, {dtype}: padded to 128"
  compare(oracle, {"loss": loss}, {"loss": padded_loss}, LOSS_TOLERANCE[dtype])
  compare(
    oracle, grads, without_padding(padded_grads, plain.model.vocab_size), GRADIENT_TOLERANCE[dtype]
  )
  for tree in (padded_params, padded_grads):
    assert_padding_is_zero(tree, plain.model.vocab_size)
  for name, value in leaves_by_name(params).items():
    got = leaves_by_name(without_padding(padded_params, plain.model.vocab_size))[name]
    np.testing.assert_array_equal(value, got, err_msg=name)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_padded_vocabulary_trains_to_the_same_losses(weight_decay):
  """Twenty updates, decaying or not, learn the same with padding, and leave the padding exactly
  zero.
  """
  finals = []
  for vocab_multiple in (1, 128):
    experiment = names_experiment(
      model__vocab_multiple=vocab_multiple,
      optimizer__weight_decay=weight_decay,
      optimizer__decay_kinds=("embedding", "matrix", "head"),
    )
    train_steps = quick_jit(step.train_steps, static_argnums=3, static_argnames="capacity")
    state, corpus = initial_state(experiment), corpus_of(NAMES, experiment)
    finals.append(train_steps(state, corpus, jnp.int32(20), experiment, capacity=20))
  (_, metrics), (padded_state, padded_metrics) = finals
  expected, got = ({"20 losses": m["train/loss"]} for m in (metrics, padded_metrics))
  compare("vocabulary of 27, float32: padded to 128", expected, got, 1e-5)
  adam = padded_state.opt_state["adam"]
  for tree in (padded_state.params, adam.mu, adam.nu):
    assert_padding_is_zero(tree, experiment.model.vocab_size)


def without_padding(params, vocab_size):
  return params | {name: params[name][:vocab_size] for name in ("tok_embed", "unembed")}


def assert_padding_is_zero(params, vocab_size):
  for name in ("tok_embed", "unembed"):
    assert params[name].shape[0] == 128
    np.testing.assert_array_equal(params[name][vocab_size:], 0, err_msg=name)
