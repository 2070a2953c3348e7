"""Tricks compute the same: what runs fast against what is written plainly, and against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import (
  GRADIENT_TOLERANCE,
  NAMES,
  QUICK,
  batch_of,
  cast,
  compare,
  initial_params,
  names_experiment,
  oracle_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import compiled_quickly

from jgpt import batches, program
from jgpt.attention import attend_causally, attend_in_blocks
from jgpt.batches import skip_padding
from jgpt.config.catalog import list_experiments, load_experiment
from jgpt.config.settings import change, resolve
from jgpt.devices.compute import PLAIN, choose_tricks, has_padding
from jgpt.plan import plan_run
from jgpt.sharding import stack_blocks, unstack_blocks
from jgpt.step import loss_and_grads, loss_fn
from jgpt.train import train_run

# Four groups of documents: cut at the context, shorter than half of it, and one that fits half of it exactly.
DOCUMENTS = (*NAMES, "a", "ab", "abcdefg", "abcdefgh", "zoe", "o", "mary", "bartholomewjames")

SKIP = skip_padding(jax.value_and_grad(loss_fn))


def resolved(name, **changes):
  experiment = change(load_experiment(name), {k.replace("__", "."): v for k, v in changes.items()})
  return resolve(experiment, {"names": 27}.get(name, 50257 if "gpt2" in name else 256))


# --- Which ---


@pytest.mark.parametrize("name", list_experiments())
def test_one_setting_turns_all_of_them_off(name):
  """Also the layout, and on every platform: what is left is a plain `jax.jit` of the plain definition."""
  for batch_size in (1, 64):
    experiment = resolved(name, data__batch_size=batch_size, train__micro_batch_size=None, mesh__tricks=False)
    for platform in ("cpu", "gpu", "tpu"):
      chosen = choose_tricks(experiment, platform)
      assert chosen == PLAIN
      assert (chosen.layout, chosen.grads_fn) == (stack_blocks, loss_and_grads)
      assert not chosen.step_options and not chosen.init_options


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_they_switch_themselves_off_where_they_were_not_measured(platform):
  for name in list_experiments():
    assert choose_tricks(resolved(name), platform) == PLAIN


def test_each_is_chosen_where_it_helps():
  names, batch, gpt2 = resolved("names"), resolved("names", data__batch_size=16), resolved("gpt2_shakespeare")
  names, batch, gpt2 = (choose_tricks(e, "cpu") for e in (names, batch, gpt2))
  assert (names.layout, gpt2.layout) == (stack_blocks, unstack_blocks)
  assert names.step_options["xla_cpu_multi_thread_eigen"] is False and gpt2.step_options == {}
  assert names.grads_fn is loss_and_grads and gpt2.grads_fn is loss_and_grads
  assert batch.grads_fn is not loss_and_grads and batch.loss_fn is not loss_fn
  for seq_len, blocks in ((64, False), (254, False), (256, True)):
    chosen = choose_tricks(resolved("shakespeare_char", data__seq_len=seq_len), "cpu")
    assert (chosen.grads_fn is not loss_and_grads) == blocks


@pytest.mark.parametrize("scan", [True, False])
def test_a_layout_that_was_asked_for_is_taken(scan):
  layout = stack_blocks if scan else unstack_blocks
  for on in (True, False):
    experiment = resolved("gpt2_shakespeare", mesh__scan_layers=scan, mesh__tricks=on)
    assert choose_tricks(experiment, "cpu").layout is layout


@pytest.mark.parametrize(
  "changes",
  [
    {"data__batch_size": 8},
    {"data__batch_size": 18},
    {"data__seq_len": 15},
    {"train__micro_batch_size": 4},
    {"model__dropout": 0.1, "model__dropout_places": ("mlp_out",)},
    {"mesh__data": 2},
  ],
  ids=lambda changes: next(iter(changes)),
)
def test_padding_is_not_skipped_where_that_would_be_wrong_or_slower(changes):
  assert has_padding(resolved("names", data__batch_size=16))
  assert not has_padding(resolved("names", **{"data__batch_size": 16} | changes))


# --- The same ---


def test_skipping_padding_is_the_oracles_gradient(x64):
  """The mean over a batch of names, each by scalar autodiff: weighted by its predictions."""
  experiment = names_experiment()
  batch, documents = batch_of(DOCUMENTS[:12], experiment), DOCUMENTS[:12]
  counts = np.asarray(batch.weights_BT, np.float64).sum(axis=1)
  ones = [oracle_gradients(experiment.model, document) for document in documents]
  share = counts / counts.sum()
  expected_loss = sum(s * loss for s, (loss, _) in zip(share, ones, strict=True))
  expected = jax.tree.map(lambda *leaves: sum(s * x for s, x in zip(share, leaves, strict=True)), *(g for _, g in ones))
  skip = jax.jit(functools.partial(SKIP, config=experiment.model), compiler_options=QUICK)
  loss, grads = skip(cast(initial_params(experiment.model), "float64"), batch)
  expected, got = expected | {"loss": np.float64(expected_loss)}, grads | {"loss": loss}
  compare("scalar gradients, padding skipped", expected, got, GRADIENT_TOLERANCE["float64"])


@functools.cache
def both():
  """The two ways, compiled once for float64."""
  config = names_experiment(model__num_layers=2).model
  ways = (SKIP, loss_and_grads)
  return [jax.jit(functools.partial(way, config=config), compiler_options=QUICK) for way in ways], config


@given(lengths=st.lists(st.integers(0, 16), min_size=16, max_size=16).filter(any), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_skipping_padding_changes_nothing_for_any_lengths(lengths, seed):
  """Also for empty rows, for groups that all need the second half, and for none that does."""
  with jax.enable_x64(True):
    (skip, plain), config = both()
    params = cast(initial_params(config), "float64")
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, 27, (16, 17)), jnp.int32)
    weights = (np.arange(16) < np.array(lengths)[:, None]).astype(np.float32)
    batch = batches.Batch(tokens[:, :-1], tokens[:, 1:], jnp.asarray(weights))
    expected, got = (dict(zip(("loss", "grads"), way(params, batch), strict=True)) for way in (plain, skip))
  compare("padding skipped, float64", expected, got, 1e-10)


@pytest.mark.parametrize("place", [None, "attention"])
def test_attention_in_blocks_is_attention(x64, place):
  """Loss and every gradient, dropout of attention too: the same entries are dropped."""
  dropout = {"model__dropout": 0.3, "model__dropout_places": (place,)} if place else {}
  config = names_experiment(model__num_layers=2, **dropout).model
  params, batch = cast(initial_params(config), "float64"), batch_of(DOCUMENTS[:4], names_experiment())
  ways = (loss_and_grads, functools.partial(loss_and_grads, attend=attend_in_blocks))
  key = jax.random.key(3) if place else None
  plain, blocks = (jax.jit(functools.partial(way, config=config, key=key), compiler_options=QUICK) for way in ways)
  expected, got = (dict(zip(("loss", "grads"), way(params, batch), strict=True)) for way in (plain, blocks))
  compare(f"attention in blocks, dropout {place}, float64", expected, got, 1e-10)


def test_attention_in_blocks_computes_less():
  """Its products are five eighths of the whole square's."""
  q = jax.ShapeDtypeStruct((1, 64, 1, 5), jnp.float32)
  ways = (attend_causally, attend_in_blocks)
  jaxprs = [jax.make_jaxpr(lambda q, k, v, way=way: way(None, q, k, v, lambda place, x: x))(q, q, q) for way in ways]

  def scores(jaxpr):
    """Entries of products over the head's 5 dimensions: queries times keys."""
    dots = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    over = [(e, [e.invars[0].aval.shape[d] for d in e.params["dimension_numbers"][0][0]]) for e in dots]
    return sum(e.outvars[0].aval.size for e, sizes in over if sizes == [5])

  whole, blocks = (scores(jaxpr.jaxpr) for jaxpr in jaxprs)
  assert whole == 64 * 64 and blocks == whole * 5 // 8


def test_what_is_not_computed_cannot_reach_the_gradient():
  """The gradient by what stands after a short document is zero either way: tokens there change no bit."""
  experiment = names_experiment()
  batch = batch_of(DOCUMENTS[:12], experiment)
  other = batch._replace(inputs_BT=jnp.where(batch.weights_BT > 0, batch.inputs_BT, 5))
  skip = jax.jit(functools.partial(SKIP, config=experiment.model), compiler_options=QUICK)
  params = cast(initial_params(experiment.model), "float32")
  for a, b in zip(*(jax.tree.leaves(skip(params, x)) for x in (batch, other)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["names", pytest.param("shakespeare_bytes", marks=pytest.mark.exhaustive)])
def test_a_run_with_and_without_is_one_run(name, tmp_path):
  """Losses agree but for rounding, and a run goes on either way from the other's checkpoint."""
  changes = {"train.steps": 6, "data.batch_size": 16, "mesh.data": 1, "optimizer.decay_steps": 12}
  fast = change(load_experiment(name), changes)
  plain = change(fast, {"mesh.tricks": False})
  with compiled_quickly():
    whole = {way: train_run(plan_run(change(e, {"train.steps": 12}))) for way, e in (("fast", fast), ("plain", plain))}
    np.testing.assert_allclose(whole["fast"].losses, whole["plain"].losses, rtol=2e-5)
    train_run(plan_run(fast, workdir=tmp_path))
    went_on = train_run(plan_run(change(plain, {"train.steps": 12}), workdir=tmp_path))
  np.testing.assert_allclose(went_on.losses, whole["plain"].losses, rtol=2e-5)


@pytest.mark.slow
def test_a_run_with_attention_in_blocks_is_one_run():
  """256 positions, attention dropped out, micro-batches: the losses of the run without tricks but for rounding."""
  changes = {"train.steps": 4, "data.batch_size": 4, "mesh.data": 1, "train.micro_batch_size": 2, "model.dropout": 0.2}
  changes |= {"model.max_seq_len": 256, "data.seq_len": 256, "model.dropout_places": ("attention", "mlp_out")}
  fast = change(load_experiment("shakespeare_bytes"), changes)
  assert choose_tricks(resolve(fast, 256, 10), "cpu").grads_fn is not loss_and_grads
  with compiled_quickly():
    losses = [train_run(plan_run(change(fast, {"mesh.tricks": on}))).losses for on in (True, False)]
  np.testing.assert_allclose(*losses, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("on", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tricks", "plain"])
def test_a_run_that_stops_and_goes_on_has_the_bits_of_one_that_did_not(on, tmp_path):
  """What is skipped is a function of the batch: where the calls end changes nothing."""
  changes = {"train.steps": 8, "data.batch_size": 16, "optimizer.decay_steps": 8, "mesh.tricks": on}
  experiment = change(load_experiment("names"), changes)
  with compiled_quickly():
    whole = train_run(plan_run(experiment))
    train_run(plan_run(change(experiment, {"train.steps": 3}), workdir=tmp_path))
    resumed = train_run(plan_run(experiment, workdir=tmp_path))
  for a, b in zip(*(jax.tree.leaves(r.state) for r in (whole, resumed)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_program_is_made_as_chosen(monkeypatch):
  """`compile_program` asks `choose_tricks` and nobody else: plain layers stay stacked."""
  experiment = change(load_experiment("shakespeare_bytes"), {"mesh.data": 1, "model.num_layers": 2, "train.steps": 1})
  for on, kind in ((True, list), (False, dict)):
    made = plan_run(change(experiment, {"mesh.tricks": on}))
    monkeypatch.setattr(program, "_compile_ahead", lambda *args: None)
    state = program.compile_program(made.experiment, made.data, num_steps=0).state
    assert isinstance(state.params["blocks"], kind)
