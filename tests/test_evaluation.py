"""The loss over a corpus: divided as training is, and added without losing digits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import QUICK, compare, initial_params

from jgpt import program, sharding
from jgpt.batches import Batch, Documents, Stream, count_eval_rows
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.evaluation import (
  EvalSums,
  begin_evaluation,
  eval_step,
  finish_evaluation,
  lower_evaluation,
)
from jgpt.model import init_params
from jgpt.step import init_state, loss_and_grads

SMALL = {
  "model.num_layers": 1,
  "model.d_model": 8,
  "model.d_ff": 16,
  "model.num_heads": 2,
  "model.max_seq_len": 32,
  "data.seq_len": 32,
  "data.batch_size": 16,
  "mesh.data": 1,
}


def make_experiment(name, vocab_size, **changes):
  changes = {key.replace("__", "."): value for key, value in changes.items()}
  return resolve(change(load_experiment(name), SMALL | changes), vocab_size, 10)


# --- Memory ---


def temporaries(experiment, corpus) -> tuple[int, int]:
  """Bytes on each device that an update takes besides its arguments, and an evaluation."""
  mesh = sharding.make_mesh(experiment, jax.devices())
  shapes = jax.eval_shape(partial(init_state, experiment=experiment), jax.random.key(0))
  shardings = sharding.state_shardings(shapes, experiment.model, mesh)

  def place(x, s):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

  state = jax.tree.map(place, shapes, shardings)
  corpus = jax.tree.map(partial(place, s=sharding.replicated(mesh)), corpus)
  train = program.lower_steps(experiment, corpus, state, mesh).compile()
  evaluation = lower_evaluation(state.params, corpus, experiment).compile()
  return tuple(x.memory_analysis().temp_size_in_bytes for x in (train, evaluation))


VOCAB_SIZE = 8192  # a sequence of 32 has 1 MB of logits
STREAM = Stream(jax.ShapeDtypeStruct((5000,), jnp.int32))
LONG_TEXTS = {"model__max_seq_len": 256, "data__seq_len": 256, "model__num_heads": 8}
DIVIDED = {
  "micro-batches": ("shakespeare_bytes", VOCAB_SIZE, STREAM, {"train__micro_batch_size": 2}),
  "devices": ("shakespeare_bytes", VOCAB_SIZE, STREAM, {"mesh__data": 8}),
  "micro-batches on devices": (
    "shakespeare_bytes",
    VOCAB_SIZE,
    STREAM,
    {"mesh__data": 4, "train__micro_batch_size": 4},
  ),
  "documents in micro-batches": (
    "names",
    VOCAB_SIZE,
    Documents(jax.ShapeDtypeStruct((500, 33), jnp.int32), jax.ShapeDtypeStruct((500,), jnp.int32)),
    {"train__micro_batch_size": 2},
  ),
  "long documents": (
    "names",
    27,
    Documents(jax.ShapeDtypeStruct((500, 257), jnp.int32), jax.ShapeDtypeStruct((500,), jnp.int32)),
    LONG_TEXTS | {"data__batch_size": 1},
  ),
  "grouped documents": (
    "names",
    VOCAB_SIZE,
    Documents(jax.ShapeDtypeStruct((500, 33), jnp.int32), jax.ShapeDtypeStruct((500,), jnp.int32)),
    {"compute__group_documents": True},
  ),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
  "case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "micro-batches")) for c in DIVIDED]
)
def test_a_run_that_trains_can_evaluate(case):
  """An evaluation takes no more memory on a device than an update."""
  name, vocab_size, corpus, changes = DIVIDED[case]
  train, evaluation = temporaries(make_experiment(name, vocab_size, **changes), corpus)
  assert evaluation <= train


@pytest.mark.parametrize(
  ("changes", "num_devices", "rows"),
  [
    ({}, 1, 16),
    ({"train__micro_batch_size": 2}, 1, 2),
    ({"mesh__data": 8}, 8, 16),
    ({"mesh__data": 8}, 1, 2),  # a run of eight devices, evaluated on one of them
    ({"mesh__data": 8}, 3, 6),
    ({"mesh__data": -1}, 8, 16),
    ({"mesh__data": 4, "train__micro_batch_size": 4}, 4, 4),
  ],
)
def test_each_device_takes_the_sequences_of_training(changes, num_devices, rows):
  experiment = make_experiment("shakespeare_bytes", 256, **changes)
  assert count_eval_rows(experiment, num_devices) == rows


def test_short_documents_are_taken_many_at_once():
  """Those of `names` 32 at once, though training takes one; never more than a batch's 256."""
  names = resolve(load_experiment("names"), 27)
  assert count_eval_rows(names, 1) == 32
  many = change(names, {"data.batch_size": 600, "mesh.data": 3})
  assert count_eval_rows(many, 3) == 258 and count_eval_rows(many, 1) == 200


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["random", "documents"])
def test_an_evaluation_is_one_however_it_is_divided(batching, x64):
  """Parts that the batch, the text and the devices do not fill: weights of 0 fill them up; and
  parameters that are divided.
  """
  rng = np.random.default_rng(0)
  if batching == "documents":
    name, changes = "names", {"data__batch_size": 12}
    lengths = rng.integers(1, 33, 283).astype(np.int32)  # 256 and 27
    corpus = Documents(rng.integers(0, 27, (283, 33)).astype(np.int32), lengths)
    num_tokens = lengths.sum()
  else:
    name, changes = "shakespeare_bytes", {"data__batch_size": 12}
    corpus = Stream(rng.integers(0, 27, 1000).astype(np.int32))
    num_tokens = 999
  params = init_params(jax.random.key(0), make_experiment(name, 256).model)
  params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
  found = []
  for micro, *shape in (
    (None, 1, 1, 1),
    (4, 2, 1, 1),
    (None, 3, 1, 1),
    (4, 2, 2, 2),
    (None, 1, 6, 1),
  ):
    sizes = {f"mesh__{axis}": n for axis, n in zip(sharding.AXES, shape, strict=True)}
    experiment = make_experiment(name, 256, train__micro_batch_size=micro, **sizes, **changes)
    mesh = sharding.make_mesh(experiment, jax.devices())
    places = sharding.param_shardings(params, experiment.model, mesh)
    placed = jax.device_put(params, places)
    found.append(finish_evaluation(begin_evaluation(placed, corpus, experiment)))
    alone = jax.device_put(params, jax.devices()[7])
    found.append(finish_evaluation(begin_evaluation(alone, corpus, experiment)))
  assert {tokens for _, tokens in found} == {num_tokens}
  np.testing.assert_allclose([loss for loss, _ in found], found[0][0], rtol=1e-10)


# --- Digits ---


def test_sums_of_many_batches_lose_no_digit():
  """2^31 + 2^15 tokens and their losses: neither fits float32, nor the count int32."""
  num_batches, size = 2**16 + 1, 2**15
  nats = np.float32(size * 0.68651234)
  sums = EvalSums(np.full((num_batches, 1), nats), np.full((num_batches, 1), size, np.int32))
  loss, num_tokens = finish_evaluation(sums)
  assert num_tokens == num_batches * size > 2**31
  assert loss == pytest.approx(float(nats) / size, rel=1e-12)


@pytest.mark.slow
def test_the_sum_over_a_large_batch_keeps_its_digits():
  """262,144 equal losses: added one after the other in float32 they would be off by 2e-5."""
  experiment = make_experiment("shakespeare_bytes", 256, data__seq_len=16)
  params = init_params(jax.random.key(3), experiment.model)
  tokens = np.full((2**14, 16), 7, np.int32)
  batch = Batch(tokens, tokens, np.ones(tokens.shape, np.float32))
  run = jax.jit(partial(eval_step, experiment=experiment), compiler_options=QUICK)
  one = run(params, jax.tree.map(lambda x: x[:1], batch))
  nats, num_tokens = run(params, batch)
  assert num_tokens == 2**18 and nats.dtype == jnp.float32
  assert float(nats) / 2**14 == pytest.approx(float(one.nats), rel=2e-6)  # two programs


@pytest.mark.slow
def test_more_predictions_than_float32_can_count():
  """2^24 + 1 equal predictions in 16,385 batches."""
  tiny = {"model__d_model": 1, "model__d_ff": 1, "model__num_heads": 1, "data__batch_size": 1024}
  tiny |= {"model__max_seq_len": 1, "data__seq_len": 1, "data__batching": "sequential"}
  experiment = make_experiment("shakespeare_bytes", 256, **tiny)
  params = init_params(jax.random.key(0), experiment.model)
  corpus = Stream(np.full(2**24 + 2, 65, np.int32))
  loss, num_tokens = finish_evaluation(begin_evaluation(params, corpus, experiment))
  one, _ = finish_evaluation(begin_evaluation(params, Stream(corpus.tokens[:2]), experiment))
  assert num_tokens == 2**24 + 1
  assert loss == pytest.approx(one, rel=2e-6)  # two programs


@pytest.mark.slow
def test_the_loss_over_many_micro_batches_keeps_its_digits(x64):
  """512 equal micro-batches: their losses added one after the other would be off by 2e-6; the
  gradient is off by 9e-6 of a leaf's largest entry, that of the whole batch at once by 2e-5.
  """
  changes = {"data__seq_len": 16, "data__batch_size": 512}
  whole = make_experiment("shakespeare_bytes", 256, **changes)
  whole = change(whole, {"model.dropout": 0.0, "model.dropout_places": ()})
  tokens = np.random.default_rng(0).integers(0, 256, (1, 17)).astype(np.int32)
  tokens = np.repeat(tokens, 512, axis=0)
  batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((512, 16)))

  def run(dtype, experiment):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), initial_params(experiment.model))
    made = batch._replace(weights_BT=batch.weights_BT.astype(dtype))
    return jax.jit(partial(loss_and_grads, step=0, experiment=experiment))(params, made)

  loss, grads = run("float64", whole)
  micro_loss, micro_grads = run("float32", change(whole, {"train.micro_batch_size": 1}))
  assert micro_loss.dtype == jnp.float32 and float(micro_loss) == pytest.approx(
    float(loss), rel=3e-7
  )

  compare("float64: 512 equal micro-batches", grads, micro_grads, 2e-5)
