"""jgpt against PyTorch: a module of its own, Hugging Face's GPT-2, torch's AdamW, llm.c's update,
nanoGPT's initial values.

Here the derivatives are another library's automatic ones, and the optimizer is the one that nanoGPT
and llm.c's reference use. Skipped where PyTorch is not installed: jgpt does not need it.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equivalence import QUICK, cast, compare, must_differ
from switches import (
  NUM_STEPS,
  SYSTEMS,
  TITLES,
  TOLERANCE,
  check_network,
  check_share,
  compare_leaves,
  compare_params,
  covering_switches,
  draw_batch,
  draw_batches,
  draw_masks,
  draw_params,
  from_oracle,
  in_brief,
  label,
  make_experiment,
  make_model,
  masks_given,
  oracle_names,
  oracle_rate,
  run_training,
  to_oracle,
)

import jgpt.step
from jgpt.config import OptimizerConfig
from jgpt.config.catalog import load_experiment
from jgpt.config.experiment import DROPOUT_PLACES, PARAM_KINDS
from jgpt.model import init_params
from jgpt.optim.chain import make_optimizer

torch = pytest.importorskip(
  "torch", reason="PyTorch is not installed (pip install torch): it is an oracle, not a dependency"
)

from reference import torch_gpt  # noqa: E402

torch.set_num_threads(1)


# Two workers of pytest-xdist may meet at a file of the cache that jax does not write at once: it
# compiles instead.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")


def torch_oracle(params, batch, config, masks=None, *, dtype="float64", make=torch_gpt.make_model):
  """Logits, loss and gradients by torch's automatic differentiation, under jgpt's names.

  See `switches.numpy_oracle`.
  """
  model = make(config, to_oracle(params, config), getattr(torch, dtype))
  batch = list(map(np.asarray, batch))
  loss = torch_gpt.loss_fn(model, *batch, masks)
  loss.backward()
  if make is torch_gpt.make_model:
    logits, grads = model(batch[0], masks), torch_gpt.gradients(model)
  else:
    logits, grads = model(torch.tensor(batch[0]).long()).logits, torch_gpt.hf_gradients(model)
  return {
    "logits": logits.detach().numpy(),
    "loss": np.float64(loss.item()),
    "grads": from_oracle(grads, params),
  }


def check_against_torch(config, dtype, what, **settings):
  check_network(
    config,
    dtype,
    what=what,
    oracle=partial(torch_oracle, dtype=dtype),
    oracle_name="PyTorch",
    **settings,
  )


# --- Logits, loss and gradient ---


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
  """Both precisions; float64 is turned on for its test."""
  if request.param == "float64":
    request.getfixturevalue("x64")
  return request.param


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_gradient_entry_of_the_five_systems(dtype, system):
  """The five systems' logits, losses and gradients are those of the same network in torch, by name.

  In float64 to 1e-9; in float32, where each library rounds in its own order, to 1e-5.
  """
  check_against_torch(make_model(SYSTEMS[system]), dtype, system)


def check_switches(switches, dtype):
  check_against_torch(make_model(switches), dtype, "other switches", how="eager")


@pytest.mark.parametrize("switches", covering_switches(), ids=label)
def test_every_gradient_entry_with_other_switches(x64, switches):
  """So are those of models with the other switches: every two values of two switches occur together
  somewhere.
  """
  check_switches(switches, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("switches", covering_switches(), ids=label)
def test_every_gradient_entry_with_other_switches_in_float32(switches):
  """And in float32."""
  check_switches(switches, "float32")


def test_gradient_through_given_masks(x64):
  """Torch, too, drops out where jgpt does."""
  config = make_model(SYSTEMS["GPT-2"])
  masks = draw_masks(config, draw_batch(config), DROPOUT_PLACES, dropout=0.3)
  with masks_given(masks):
    check_against_torch(config, "float64", "GPT-2, given masks", masks=masks, how="eager")


def test_every_gradient_entry_of_hugging_face_s_gpt2(dtype):
  """GPT2LMHeadModel, which nobody here wrote, has the same logits, loss and gradients by name, from
  the same weights.
  """
  pytest.importorskip(
    "transformers", reason="transformers is not installed: Hugging Face's GPT-2 is an oracle only"
  )
  oracle = partial(torch_oracle, dtype=dtype, make=torch_gpt.make_hf_model)
  check_network(
    make_model(SYSTEMS["GPT-2"]), dtype, what="GPT-2", oracle=oracle, oracle_name="GPT2LMHeadModel"
  )


def test_gradients_do_not_accumulate_by_themselves(x64):
  """Computed twice, a gradient is the same to the last bit, and the sum of both is what torch holds
  after two backward().

  Torch adds to what is there unless told otherwise; jgpt has nowhere to add to.
  """
  config = make_model(SYSTEMS["GPT-2"])
  params, batch = draw_params(config), draw_batch(config)
  experiment = make_experiment(config, OptimizerConfig(**ADAMW, schedule="constant"))
  loss_and_grads = jax.jit(jgpt.step.loss_and_grads, static_argnums=3, compiler_options=QUICK)
  first, second = (loss_and_grads(cast(params, "float64"), batch, 0, experiment) for _ in range(2))
  jax.tree.map(partial(np.testing.assert_array_equal, strict=True), first, second)

  model = torch_gpt.make_model(config, to_oracle(params, config), torch.float64)
  for _ in range(2):
    torch_gpt.loss_fn(model, *map(np.asarray, batch)).backward()
  expected, got = (
    from_oracle(torch_gpt.gradients(model), params),
    jax.tree.map(jnp.add, first[1], second[1]),
  )
  with in_brief():
    compare_leaves("PyTorch, float64: GPT-2, two backward()", expected, got, TOLERANCE["float64"])


# --- Training ---

ADAMW = {"peak_lr": 0.02, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
COSINE = {"schedule": "cosine", "end_lr": 0.002, "warmup_steps": 5, "warmup_from_zero": False}


def train_both(system, optimizer, dtype, empty=()):
  """Twenty updates by torch and by jgpt: losses and parameters of each; no update of `empty`."""
  config = make_model(SYSTEMS[system])
  experiment, params = make_experiment(config, optimizer), draw_params(config)
  model = torch_gpt.make_model(config, to_oracle(params, config), getattr(torch, dtype))
  losses = torch_gpt.train(
    model,
    [tuple(map(np.asarray, batch)) for batch in draw_batches(config, empty)],
    rate=oracle_rate(experiment.optimizer),
    b1=optimizer.b1,
    b2=optimizer.b2,
    eps=optimizer.eps,
    weight_decay=optimizer.weight_decay,
    decayed=oracle_names(config, optimizer.decay_kinds),
    clip_norm=optimizer.clip_norm,
    optimizer=optimizer.name,
    momentum=optimizer.momentum,
  )
  applied = np.delete(np.arange(NUM_STEPS), list(empty))
  expected = {"losses": np.array(losses)[applied]}, from_oracle(torch_gpt.parameters(model), params)
  got = run_training(experiment, dtype, empty)
  if optimizer.clip_norm:
    assert np.any(got["train/grad_norm"] > optimizer.clip_norm)
  return expected, ({"losses": got["train/loss"][applied]}, got["params"])


def check_torch_training(trained, what, tolerance=TOLERANCE["float64"], title="AdamW"):
  (expected_losses, expected), (losses, params) = trained
  name = f"torch.optim.{title}, {NUM_STEPS} steps, float64: {what}"
  with in_brief():
    compare(name, expected_losses, losses, tolerance)
    compare_params(name, expected, params, tolerance)


@pytest.mark.parametrize("system", ["GPT-2", "nanoGPT"])
def test_twenty_updates_in_float64(x64, system):
  """Torch's AdamW in two groups, with a schedule, ends at the same parameters by the same losses.

  Without clipping, of which torch has a formula of its own: see below.
  """
  check_torch_training(
    train_both(system, OptimizerConfig(**ADAMW, **COSINE), "float64"), f"{system}, not clipped"
  )


@pytest.mark.parametrize(
  "settings",
  [
    {"name": "adam"},
    {"name": "sgd", "momentum": 0.9, "peak_lr": 0.3},
    pytest.param({"name": "sgd"}, marks=pytest.mark.slow),
  ],
  ids=["Adam", "SGD with momentum", "SGD"],
)
def test_twenty_updates_of_other_optimizers_in_float64(x64, settings):
  """So do torch's Adam and SGD, whose decay is in the gradient; two updates of each are skipped."""
  optimizer = OptimizerConfig(**ADAMW | COSINE | settings)
  trained = train_both("nanoGPT", optimizer, "float64", empty=(3, 8))
  title = TITLES[optimizer.name]
  check_torch_training(trained, f"nanoGPT, momentum {optimizer.momentum:g}", title=title)


def test_twenty_clipped_updates_in_float64(x64, monkeypatch):
  """Clipping is torch's but for the 1e-6 that torch adds to the norm that it divides by.

  That makes its gradients smaller by 1e-6 / norm, here less than 1e-6 as all norms that are clipped
  are above 1: parameters agree to 1e-6 and not to 1e-9. With torch's formula in its place jgpt's
  chain gives torch's parameters to 1e-9.
  """
  optimizer = OptimizerConfig(**ADAMW, **COSINE, clip_norm=1.0)
  trained = train_both("nanoGPT", optimizer, "float64")
  check_torch_training(trained, "nanoGPT, clipped", tolerance=1e-6)
  with must_differ():
    check_torch_training(trained, "nanoGPT, clipped")

  def clip_as_torch_does(max_norm):
    def update(grads, state, params=None):
      factor = jnp.minimum(1, max_norm / (optax.tree.norm(grads) + 1e-6))
      return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

  monkeypatch.setattr(optax, "clip_by_global_norm", clip_as_torch_does)
  check_torch_training(
    train_both("nanoGPT", optimizer, "float64"), "nanoGPT, clipped by torch's formula"
  )


@pytest.mark.parametrize("system", [pytest.param("GPT-2", marks=pytest.mark.slow), "nanoGPT"])
def test_twenty_losses_in_float32(system):
  """In the precision of training, twenty losses in a row are torch's, decay, clipping and schedule
  included.
  """
  expected, got = train_both(system, OptimizerConfig(**ADAMW, **COSINE, clip_norm=1.0), "float32")
  compare(
    f"torch.optim.AdamW, {NUM_STEPS} steps, float32: {system}",
    expected[0],
    got[0],
    TOLERANCE["float32"],
  )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_updates_by_the_rule_of_llm_c(x64, weight_decay):
  """`gpt2_update`, which decays every parameter, makes of the same gradients the same parameters
  and moments.
  """
  config = make_model(SYSTEMS["GPT-2"])
  settings = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": weight_decay}
  optimizer = OptimizerConfig(
    peak_lr=1e-2, schedule="constant", decay_steps=NUM_STEPS, decay_kinds=PARAM_KINDS, **settings
  )
  params, rng = draw_params(config), np.random.default_rng(4)
  grads = jax.tree.map(
    lambda p: rng.normal(size=(NUM_STEPS, *p.shape)) * np.exp(rng.normal()), params
  )

  expected = jax.tree.map(lambda p: (p, np.zeros_like(p), np.zeros_like(p)), params)
  for step in range(NUM_STEPS):
    update = partial(torch_gpt.gpt2_update, t=step + 1, lr=optimizer.peak_lr, **settings)
    expected = jax.tree.map(
      lambda g, pmv, u=update, i=step: u(pmv[0], g[i], *pmv[1:]), grads, expected
    )
  expected = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), expected)

  tx = make_optimizer(make_experiment(config, optimizer))

  def add_update(carry, grads):
    params, opt_state = carry
    updates, opt_state = tx.update(grads, opt_state, params, ok=True)
    return (optax.apply_updates(params, updates), opt_state), None

  start = cast(params, "float64")
  (got, opt_state), _ = jax.jit(partial(jax.lax.scan, add_update), compiler_options=QUICK)(
    (start, cast(tx.init(start), "float64")), grads
  )
  adam = opt_state["adam"]
  what = f"llm.c's gpt2_update, {NUM_STEPS} steps, float64: weight decay {weight_decay}"
  with in_brief():
    for expected_tree, tree in zip(expected, (got, adam.mu, adam.nu), strict=True):
      compare(what, expected_tree, tree, TOLERANCE["float64"])


# --- The start ---


def init_as_nanogpt_does(model):
  """Runs nanoGPT's `_init_weights`, and what its constructor does to the projections into the
  residual stream.
  """
  for module in model.modules():
    if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
      torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
      if getattr(module, "bias", None) is not None:
        torch.nn.init.zeros_(module.bias)
  for name, param in model.named_parameters():
    if name.endswith("c_proj.weight"):
      torch.nn.init.normal_(param, mean=0.0, std=0.02 / math.sqrt(2 * len(model.h)))


@pytest.mark.parametrize(
  "experiment", ["shakespeare_char", pytest.param("gpt2_shakespeare", marks=pytest.mark.slow)]
)
def test_initial_values_are_spread_as_nanogpt_s(experiment):
  """Every parameter of every layer begins with nanoGPT's mean and standard deviation, and all with
  a normal's tails.

  Up to chance: 5 standard deviations of each of these numbers. What nanoGPT sets to 1 or 0 is
  exactly that.
  """
  sizes = {
    "vocab_size": 70,
    "max_seq_len": 40,
    "num_layers": 2,
    "num_heads": 2,
    "d_model": 32,
    "d_ff": 128,
  }
  config = dataclasses.replace(load_experiment(experiment).model, **sizes, vocab_multiple=1)
  params = jax.jit(init_params, static_argnums=1, compiler_options=QUICK)(jax.random.key(0), config)
  model = torch_gpt.TorchGPT(config)
  torch.manual_seed(0)
  init_as_nanogpt_does(model)
  expected = torch_gpt.parameters(model)
  got, deviations = to_oracle(params, config), []
  assert got.keys() == expected.keys()
  for name, value in got.items():
    std, n = expected[name].std(), value.size
    if std == 0:
      np.testing.assert_array_equal(value, expected[name], err_msg=name)
      continue
    assert abs(value.mean()) < 5 * std / math.sqrt(n), name
    assert abs(value.std() / std - 1) < 5 / math.sqrt(n), (
      name
    )  # of both, whose deviations are 1 / sqrt(2n) each
    deviations.append(np.ravel(value) / value.std())
  check_share(
    "beyond 2.5 deviations", abs(np.concatenate(deviations)) > 2.5, math.erfc(2.5 / math.sqrt(2))
  )
