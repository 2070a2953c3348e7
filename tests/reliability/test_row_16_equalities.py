"""Row 16: ways to compute one thing give one result, here in float64, loss and every gradient, leaf
by leaf.

In float32, and over whole runs: micro-batches and the cache in tests/test_properties.py, attention
and padding in tests/devices/test_compute.py, layers and devices in tests/test_train.py and
test_row_11. The loss over the vocabulary is computed in one piece: there is no chunked one to
compare.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import QUICK, cast, compare, initial_params

from jgpt import generate, model, sharding
from jgpt.batches import Batch
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.sharding import arrange_blocks, stack_blocks
from jgpt.step import loss_and_grads

TOLERANCE = 1e-10  # of a leaf's largest entry, float64
CHANGES = {
  "model.num_layers": 3,
  "model.d_model": 16,
  "model.d_ff": 32,
  "model.max_seq_len": 32,
  "model.num_heads": 4,
}
CHANGES |= {"data.seq_len": 32, "data.batch_size": 8, "model.biases": "all", "model.norm": "layer"}
CHANGES |= {"model.dropout": 0.0, "model.dropout_places": ()}
EXPERIMENT = resolve(change(load_experiment("shakespeare_bytes"), CHANGES), 256, 10)
MODEL = EXPERIMENT.model


def draw_batch():
  """Eight sequences, some of whose positions do not count; two reach to the half and just over."""
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, 256, (8, 33)), jnp.int32)
  lengths = np.array([32, 1, 16, 32, 5, 17, 32, 9])
  return Batch(
    tokens[:, :-1], tokens[:, 1:], jnp.asarray(np.arange(32) < lengths[:, None], jnp.float32)
  )


def on_devices(params, batch):
  """The batch divided over 8 devices."""
  mesh = sharding.make_mesh(change(EXPERIMENT, {"mesh.data": 8}), jax.devices())
  batch = jax.device_put(batch, sharding.batch_sharding(mesh))
  assert len(batch.inputs_BT.sharding.device_set) == 8
  return run({}, jax.device_put(params, sharding.replicated(mesh)), batch)


def run(changes, params, batch):
  experiment = change(EXPERIMENT, changes)
  compiled = jax.jit(partial(loss_and_grads, step=0, experiment=experiment), compiler_options=QUICK)
  return compiled(arrange_blocks(params, experiment.compute.layers), batch)


FAST = {"compute.layers": "unroll", "compute.attention": "blocks", "compute.matmul": "flat"}
DOCUMENTS = {"data.batching": "documents", "data.tokenizer": "characters", "mesh.data": 1}
WAYS = {
  "1 sequence a micro-batch": partial(run, {"train.micro_batch_size": 1}),
  "4 sequences a micro-batch": partial(run, {"train.micro_batch_size": 4}),
  "layers written out": partial(run, {"compute.layers": "unroll"}),
  "attention in blocks": partial(run, {"compute.attention": "blocks"}),
  "flat products": partial(run, {"compute.matmul": "flat"}),
  "documents of like length": partial(run, DOCUMENTS | {"compute.group_documents": True}),
  "8 devices": on_devices,
  "documents, all at once": partial(run, FAST | DOCUMENTS | {"compute.group_documents": True}),
  "all at once": partial(run, FAST | {"train.micro_batch_size": 2}),
}


@pytest.mark.parametrize(
  "way", [pytest.param(w, marks=[pytest.mark.slow] * (w != "all at once")) for w in WAYS]
)
def test_row_16_loss_and_gradients_are_one_whatever_the_way(x64, way):
  params, batch = cast(initial_params(MODEL), "float64"), draw_batch()
  loss, grads = run({}, params, batch)
  way_loss, way_grads = WAYS[way](params, batch)
  if isinstance(way_grads["blocks"], list):
    way_grads = stack_blocks(way_grads)
  compare(
    f"plain, float64: {way}", {"loss": loss} | grads, {"loss": way_loss} | way_grads, TOLERANCE
  )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, FAST], ids=["plain", "fast"])
@pytest.mark.parametrize("prompt_len", [1, 20, 31])
def test_row_16_cached_decoding_is_the_full_pass(x64, prompt_len, changes):
  """LayerNorm, biases and three layers: the logits of each position, the prompt read at once and
  the rest one by one.
  """
  params, batch = cast(initial_params(MODEL), "float64"), draw_batch()
  tokens_BT = batch.inputs_BT
  full_BTV = jax.jit(model.apply, static_argnums=2, compiler_options=QUICK)(
    params, tokens_BT, MODEL
  )
  decode_step = jax.jit(generate.decode_step, static_argnums=(4, 5), compiler_options=QUICK)
  compute = change(EXPERIMENT, changes).compute
  params = arrange_blocks(params, compute.layers)
  cache = generate.prefill(params, tokens_BT[:, :prompt_len], MODEL.max_seq_len, MODEL, compute)
  for position in range(prompt_len, 32):
    token_B = tokens_BT[:, position]
    logits_BV, cache = decode_step(params, token_B, cache, jnp.int32(position), MODEL, compute)
    compare(
      "full pass, float64: cached, LayerNorm",
      {"logits": full_BTV[:, position]},
      {"logits": logits_BV},
      TOLERANCE,
    )
