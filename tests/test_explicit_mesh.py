"""Under a mesh of explicit axes, as `jax.make_mesh` makes them, everything computes the same.

The user of these tests sets a mesh, whose axes have names of the user's own, and lays out arrays
over it; results are compared with those without any mesh.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from equivalence import QUICK
from jax.sharding import PartitionSpec as P

from jgpt import batches, evaluation, generate, model, step, train
from jgpt.batches import Documents
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.plan import plan_run
from jgpt.runs.open import open_run
from jgpt.sharding import AXES, unstack_blocks

SMALL = {
  "model.max_seq_len": 8,
  "data.seq_len": 8,
  "data.batch_size": 8,
  "mesh.data": 1,
  "optimizer.clip_norm": 0.5,
}
DROPOUT = {"model.dropout": 0.1, "model.dropout_places": ("embedding", "attention", "mlp_out")}
# Sizes of axes, by name; the axis that divides tokens, and the one that divides parameters.
MESHES = {
  "one axis": ({"x": 8}, "x", None),
  "two axes": ({"batch": 4, "model": 2}, "batch", "model"),
  "our name": ({"data": 8}, "data", None),
  "our names": ({"data": 2, "tensor": 4}, "data", "tensor"),
  "parameters over the batch's axis": ({"x": 4}, "x", "x"),
  "tokens whole": ({"data": 4}, None, "data"),
}
WAYS = {
  "documents": {},
  "dropout": DROPOUT,
  "micro-batches": DROPOUT | {"train.micro_batch_size": 8, "data.batch_size": 16},
  "groups": {"compute.group_documents": True, "data.batch_size": 16},
  "in a list": {"compute.layers": "unroll", "compute.remat": "block"},
  "chunks": {"compute.loss_chunks": 3, "compute.attention": "blocks"},
}


@functools.cache
def make_case(way):
  """An experiment of `names`, a state after no update, a corpus and a batch, in float64."""
  experiment = resolve(change(load_experiment("names"), SMALL | WAYS[way]), 27)
  tokens = np.asarray(np.random.default_rng(0).integers(0, 27, (40, 9)), np.int32)
  corpus = Documents(tokens, np.resize(np.arange(2, 9, dtype=np.int32), 40))

  def make(key, corpus):
    params = model.init_params(key, experiment.model)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    if experiment.compute.layers == "unroll":
      params = unstack_blocks(params)
    return step.begin_state(params, experiment), batches.batch(corpus, 0, experiment)

  state, batch = jax.device_get(jax.jit(make, compiler_options=QUICK)(jax.random.key(0), corpus))
  return experiment, state, corpus, batch


def divide(tree, axis, size):
  """Lays out arrays with the last of the dimensions that so many devices divide over an axis."""

  def put(x):
    x = jnp.asarray(x)
    last = max((i for i, n in enumerate(x.shape) if n % size == 0), default=None)
    return jax.device_put(x, P(*(axis if i == last else None for i in range(x.ndim))))

  return jax.tree.map(put, tree)


def lay_out(mesh, state, batch):
  """A state and a batch as the user of a mesh lays them out; the batch is divided in front."""
  sizes, rows, columns = MESHES[mesh]
  return (
    jax.device_put(state, P()) if columns is None else divide(state, columns, sizes[columns]),
    jax.device_put(batch, P(rows)),
  )


def set_mesh(mesh):
  sizes = MESHES[mesh][0]
  num = int(np.prod(list(sizes.values())))
  return jax.set_mesh(
    jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:num])
  )


def assert_equal(got, expected):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10),
    *jax.device_get((got, expected)),
  )


def trim(spec):
  """A spec without the dimensions at its end that are whole, which some versions of jax list."""
  parts = list(spec)
  while parts and parts[-1] is None:
    parts.pop()
  return P(*parts)


def compute_all(state, batch, experiment):
  """What a user may want of a state and a batch, in one program."""
  logits = model.apply(state.params, batch.inputs_BT, experiment.model, experiment.compute)
  return logits, step.train_step(state, batch, experiment)


CASES = [
  pytest.param(mesh, way, marks=() if mesh == "one axis" else pytest.mark.slow)
  for mesh, way in zip(MESHES, WAYS, strict=True)
]


@pytest.mark.parametrize(("mesh", "way"), CASES)
def test_logits_and_updates_are_those_without_a_mesh(mesh, way, x64):
  experiment, state, _, batch = make_case(way)
  compute = jax.jit(compute_all, static_argnums=2, compiler_options=QUICK)
  expected = compute(state, batch, experiment)
  with set_mesh(mesh):
    state, batch = lay_out(mesh, state, batch)
    logits, (new, metrics) = compute(state, batch, experiment)
  assert_equal((logits, (new, metrics)), expected)
  # What comes out lies as what went in.
  assert trim(logits.sharding.spec) == trim(P(MESHES[mesh][1]))
  for x, y in zip(*map(jax.tree.leaves, (state, new)), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["one axis", "our names"])
def test_without_jit_and_under_grad(mesh, x64):
  """Eagerly, and differentiated by a user with a loss of their own."""
  experiment, state, _, batch = make_case("documents")
  apply = functools.partial(model.apply, config=experiment.model)

  def loss(params, tokens_BT):
    return jnp.mean(jax.nn.logsumexp(apply(params, tokens_BT), axis=-1) ** 2)

  grad = jax.jit(jax.grad(loss), compiler_options=QUICK)
  expected = apply(state.params, batch.inputs_BT), grad(state.params, batch.inputs_BT)
  with set_mesh(mesh):
    state, batch = lay_out(mesh, state, batch)
    got = apply(state.params, batch.inputs_BT), grad(state.params, batch.inputs_BT)
  assert_equal(got, expected)


def test_texts_are_drawn(x64):
  """Their tokens are compared below."""
  experiment, state, _, _ = make_case("documents")
  draw = functools.partial(generate.generate, config=experiment.model, num=4, max_tokens=4)
  with set_mesh("one axis"):
    params = jax.device_put(state.params, P())
    prompt = np.asarray([0, 5, 9, 1], np.int32)
    texts = jax.jit(draw, compiler_options=QUICK)(params, prompt, 3, jax.random.key(1), 1.0)
  tokens = jax.tree.leaves(jax.device_get(texts))[0]
  assert len(tokens) == 4 and 0 <= tokens.min() <= tokens.max() < 27


@pytest.mark.slow
def test_many_updates_evaluation_and_texts(x64):
  """Of a corpus that every device has; texts are drawn, with a prompt."""
  experiment, state, corpus, batch = make_case("dropout")
  config, prompt = experiment.model, np.asarray([0, 5, 9, 1], np.int32)

  def compute(state, corpus, key):
    state, _ = step.train_steps(state, corpus, jnp.int32(3), experiment, capacity=4)
    sums = evaluation.evaluate(
      state.params, corpus, experiment, num_batches=2, whole=False, num_rows=8
    )
    settings = {"config": config, "num": 4, "max_tokens": 4}
    return state, sums, generate.generate(state.params, prompt, 3, key, 1.0, **settings)

  compute = jax.jit(compute, compiler_options=QUICK)
  expected = compute(state, corpus, jax.random.key(1))
  with set_mesh("two axes"):
    state, _ = lay_out("two axes", state, batch)
    got = compute(state, jax.device_put(corpus, P()), jax.random.key(1))
  assert_equal(got, expected)


def test_without_explicit_axes_nothing_is_added():
  experiment, state, _, batch = make_case("documents")

  def trace(function):
    compute = functools.partial(function, config=experiment.model)
    words = str(jax.make_jaxpr(compute)(state.params, batch.inputs_BT))
    return re.sub("0x[0-9a-f]+", "", words)  # addresses

  assert trace(model.apply) == trace(model.apply.__wrapped__)
  auto = (jax.sharding.AxisType.Auto,)
  with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=auto)):
    assert trace(model.apply) == trace(model.apply.__wrapped__)
  if jax.__version_info__ >= (0, 10):  # before, a jaxpr's text does not have its axes' types
    with set_mesh("one axis"):
      assert trace(model.apply) != trace(model.apply.__wrapped__)


def test_a_run_trains_over_a_mesh_of_its_own(folder, quick):
  folder({"words.txt": "\n".join(small_runs.WORDS)})
  changes = {"data.path": "words.txt", "mesh.data": 1, "train.steps": 1, "train.eval_every": None}
  with set_mesh("one axis"):
    result = train.train_run(plan_run(change(load_experiment("names"), changes), workdir=None))
    assert jax.sharding.get_abstract_mesh().axis_names == ("x",)
  assert result.state.step.sharding.mesh.axis_names == AXES
  num_ids = result.experiment.model.vocab_size
  assert result.losses[0] == pytest.approx(np.log(num_ids), abs=0.3)  # of a guess


@pytest.mark.slow
@pytest.mark.parametrize("is_global", [True, False])
def test_a_run_does_not_see_the_users_mesh(folder, quick, is_global):
  """`plan_run`, `train_run`, `open_run` and what a `Run` does choose their devices themselves."""
  folder({"words.txt": "\n".join(small_runs.WORDS)})
  changes = {
    "data.path": "words.txt",
    "data.batch_size": 8,
    "mesh.data": 4,
    "train.steps": 2,
    "train.eval_every": None,
    "sample.num": 2,
  }

  def train_and_read(name):
    plan = plan_run(change(load_experiment("names"), changes), workdir=name)
    result = train.train_run(plan)
    run = open_run(name)
    texts = (
      run.sample(),
      generate.sample_texts(result.state.params, run.tokenizer, 2, result.experiment),
    )
    return result.losses, result.heldout_loss, texts, run.loss("axrst"), result.state.params

  *expected, expected_params = train_and_read("without")
  before = jax.sharding.get_abstract_mesh()
  context = set_mesh("one axis")  # which has set it already, for the whole program
  if is_global:
    *got, params = train_and_read("with")
    assert jax.sharding.get_abstract_mesh().axis_names == ("x",)
    context.__exit__(None, None, None)
  else:
    with context:
      *got, params = train_and_read("with")
  assert jax.sharding.get_abstract_mesh() == before
  assert str(got) == str(expected)
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((params, expected_params)))
