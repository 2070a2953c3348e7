"""Computing in bfloat16: what is rounded, what is not, and how far gradients are from float32's.

A rounding to bfloat16 is a relative error of 2^-9 at most. Gradients of two layers, as they are
initialised, are within a percent or two of each leaf's largest entry.
"""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import switches
from equivalence import CPU, QUICK

from jgpt import sharding
from jgpt.config import OptimizerConfig
from jgpt.config.experiment import DROPOUT_PLACES
from jgpt.devices.compute import resolve_compute
from jgpt.model import apply, init_params
from jgpt.step import loss_and_grads

OPTIMIZER = OptimizerConfig(peak_lr=0.01, schedule="constant", b1=0.9, b2=0.95, eps=1e-8)
COSINE = 0.998  # where relu is 0 in one of both; 0.9999 without
LARGEST = 0.1  # the same; 0.02 without. Of a leaf's largest entry


def experiments(system="GPT-2", **changes):
  """The same experiment in float32 and in bfloat16."""
  changes = {"num_layers": 2, "d_model": 32, "d_ff": 64, "num_heads": 4, "init_std": 0.1} | changes
  config = switches.make_model(switches.SYSTEMS[system], **changes)
  made = switches.make_experiment(config, OPTIMIZER, batch_size=8)
  return [
    dataclasses.replace(made, compute=dataclasses.replace(made.compute, dtype=dtype))
    for dtype in ("float32", "bfloat16")
  ]


def draw_params(experiment):
  """Initial values, of a network as it is trained; larger ones amplify any rounding."""
  return init_params(jax.random.key(1), experiment.model)


def compute(experiment, params, batch):
  """Loss and gradients of a step, compiled."""
  params = sharding.arrange_blocks(params, experiment.compute.layers)
  run = jax.jit(partial(loss_and_grads, step=3, experiment=experiment), compiler_options=QUICK)
  loss, grads = run(params, batch)
  return loss, sharding.stack_blocks(grads)


def check_near(expected, got, cosine=COSINE, largest=LARGEST):
  """Asserts that every leaf points the same way and has no entry far away."""
  expected, got = (dict(jax.tree.leaves_with_path(tree)) for tree in (expected, got))
  assert expected.keys() == got.keys()
  for path, a in expected.items():
    a, b = (np.asarray(x, np.float64) for x in (a, got[path]))
    name = jax.tree_util.keystr(path)
    assert np.vdot(a, b) >= cosine * np.linalg.norm(a) * np.linalg.norm(b), name
    assert np.abs(a - b).max() <= largest * np.abs(a).max(), name


@pytest.mark.parametrize(
  "system",
  [
    pytest.param(s, marks=() if s == "PyTorch bytes" else pytest.mark.slow)
    for s in switches.SYSTEMS
  ],
)
def test_gradients_are_float32_and_near_those_of_float32(system):
  """As chosen on a CPU and as the plain definition, with what is dropped the same."""
  dropout = {"dropout": 0.2, "dropout_places": DROPOUT_PLACES} if system == "nanoGPT" else {}
  exact, rounded = experiments(system, **dropout)
  params = draw_params(exact)
  batch = switches.draw_batch(exact.model, batch_size=8)
  loss, grads = compute(exact, params, batch)
  for experiment in (rounded, resolve_compute(rounded, CPU)):
    assert experiment.compute.dtype == "bfloat16"
    rounded_loss, rounded_grads = compute(experiment, params, batch)
    assert {x.dtype for x in jax.tree.leaves((rounded_loss, rounded_grads))} == {
      jnp.dtype("float32")
    }
    assert float(rounded_loss) != float(loss)
    assert float(rounded_loss) == pytest.approx(float(loss), rel=2e-3)
    check_near(grads, rounded_grads)


def walk(jaxpr):
  """Every operation of a traced function, also inside of calls and loops."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from walk(inner)


def products_of(experiment):
  """The operands' and the result's dtype of every product in a step's loss and gradients."""
  params, batch = draw_params(experiment), switches.draw_batch(experiment.model, batch_size=8)
  traced = jax.make_jaxpr(partial(loss_and_grads, step=0, experiment=experiment))(params, batch)
  dots = [eqn for eqn in walk(traced.jaxpr) if eqn.primitive.name == "dot_general"]
  return [tuple(str(x.aval.dtype) for x in (*dot.invars, *dot.outvars)) for dot in dots]


@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="has float32 beside them, for CPUs")
def test_products_take_bfloat16_and_sum_in_float32():
  """Those of weights and their gradients; in float32 no number is bfloat16."""
  exact, rounded = experiments()
  assert {dtype for product in products_of(exact) for dtype in product} == {"float32"}
  products = products_of(rounded)
  # Four of weights and two of attention in the loop's body, and the head; two for each gradient.
  assert len(products) >= 3 * (4 + 2 + 1)
  others = [product for product in products if product != ("bfloat16", "bfloat16", "float32")]
  assert len(others) <= 1  # the softmax's derivative sums y * dy over a head, in float32


def test_logits_are_float32_and_parameters_stay():
  exact, rounded = experiments()
  params = draw_params(exact)
  tokens_BT = switches.draw_batch(exact.model).inputs_BT
  logits = [np.asarray(apply(params, tokens_BT, e.model, e.compute)) for e in (exact, rounded)]
  assert logits[1].dtype == np.float32
  largest = np.abs(logits[0]).max()
  assert 0 < np.abs(logits[0] - logits[1]).max() < 0.02 * largest


@pytest.mark.slow
def test_gradients_are_summed_over_devices_in_float32():
  """On 8 devices as on one, and what passes between them is not rounded."""
  _, rounded = experiments()
  params = draw_params(rounded)
  batch = switches.draw_batch(rounded.model, batch_size=8)
  mesh = sharding.make_mesh(rounded, jax.devices())
  divided = jax.device_put(batch, sharding.batch_sharding(mesh))
  placed = jax.device_put(params, sharding.replicated(mesh))
  with jax.set_mesh(mesh):
    run = jax.jit(partial(loss_and_grads, step=3, experiment=rounded), compiler_options=QUICK)
    compiled = run.lower(placed, divided).compile()
    loss, grads = compiled(placed, divided)
  sums = re.findall(r"= (.*) all-reduce\(", compiled.as_text())
  assert sums and not any("bf16" in shapes for shapes in sums)
  expected_loss, expected = compute(rounded, params, batch)
  assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
  check_near(expected, grads, cosine=0.99999, largest=0.003)


def test_what_is_rounded_is_what_autocast_rounds():
  """Torch's autocast leaves parameters and gradients float32 as well, and errs as much.

  Both gradients are compared with float64's. A cosine's distance from 1 is a squared error.
  """
  torch = pytest.importorskip("torch", reason="needs the extra reference")
  from reference import torch_gpt

  _, rounded = experiments()
  params, config = draw_params(rounded), rounded.model
  batch = switches.draw_batch(config, batch_size=8)

  def autocast(dtype, enabled):
    model = torch_gpt.make_model(config, switches.to_oracle(params, config), dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
      loss = torch_gpt.loss_fn(model, *map(np.asarray, batch))
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {dtype}
    return switches.from_oracle(torch_gpt.gradients(model), params)

  exact, theirs = autocast(torch.float64, False), autocast(torch.float32, True)
  ours = compute(rounded, params, batch)[1]

  def measure(grads):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (exact, grads))
    return np.linalg.norm(a - b) / np.linalg.norm(a)

  assert 0.0005 < measure(ours) < 2 * measure(theirs) < 0.05
