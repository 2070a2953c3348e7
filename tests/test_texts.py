"""The numbers that the teaching texts print, as jgpt computes them: loss, gradient, AdamW,
clipping, schedule.

Whoever works through a text with jgpt at hand must find its numbers again. Expected values are
exact, to 1e-4; where a text rounds or slips, what it prints stands beside them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equivalence import QUICK
from switches import CONSTANT_RATE, SYSTEMS, make_experiment, make_model

import jgpt.loss
import jgpt.step
from jgpt.batches import Batch
from jgpt.config import OptimizerConfig
from jgpt.optim.chain import make_optimizer
from jgpt.optim.schedule import make_schedule
from jgpt.params import param_table
from jgpt.report.console import format_perplexity


def about(value, rel=1e-4):
  """`pytest.approx` without its absolute tolerance, which would let small numbers be anything."""
  return pytest.approx(value, rel=rel, abs=0)


# --- The loss ---

TINY = make_model(
  SYSTEMS["GPT-2"], vocab_size=2, max_seq_len=2, num_layers=1, num_heads=1, d_model=2, d_ff=2
)
EXPERIMENT = make_experiment(TINY, CONSTANT_RATE)


@pytest.fixture
def loss_of(monkeypatch):
  """The loss of given logits and targets, and its gradient by the logits, through `jgpt.step` as
  training computes them.
  """
  monkeypatch.setattr(jgpt.step, "run_network", lambda logits_BTV, *rest: logits_BTV)
  monkeypatch.setattr(jgpt.step, "find_head", lambda logits_BTV, *rest: None)
  monkeypatch.setattr(jgpt.loss, "compute_logits", lambda logits_BTV, *rest: logits_BTV)

  @jax.jit
  def compute(logits_BTV, targets_BT):
    batch = Batch(jnp.zeros_like(targets_BT), targets_BT, jnp.ones(targets_BT.shape))
    return jgpt.step.loss_and_grads(logits_BTV, batch, 0, EXPERIMENT)

  def loss_and_gradient(logits, targets):
    loss, gradient_BTV = compute(np.array([logits], np.float32), np.array([targets], np.int32))
    return float(loss), np.asarray(gradient_BTV[0])

  return loss_and_gradient


def test_loss_and_gradient_of_six_logits(loss_of):
  """The gradient of the logits is the softmax, less 1 at the target."""
  loss, gradient = loss_of([[2.1, -0.5, 3.4, 0.2, -1.2, 1.8]], [2])
  assert loss == about(0.43532)
  assert gradient[0] == about([0.176335, 0.013097, -0.352953, 0.026375, 0.006504, 0.130632])
  assert gradient.sum() == pytest.approx(0, abs=1e-6)


def test_loss_of_two_predictions_is_their_mean(loss_of):
  """The text prints 0.56, 0.33 and 0.45."""
  first, second = [1.5, 0.2, 2.1, -0.5], [0.8, 2.3, 0.1, -0.2]
  assert loss_of([first], [2])[0] == about(0.572463)
  assert loss_of([second], [1])[0] == about(0.347830)
  assert loss_of([first, second], [2, 1])[0] == about(0.460147)


@pytest.mark.parametrize(
  ("p", "nats"), [(0.9, 0.105361), (0.5, 0.693147), (0.1, 2.302585), (0.01, 4.605170)]
)
def test_loss_is_minus_the_logarithm_of_the_probability(loss_of, p, nats):
  """The logits ln p and ln (1 - p) are a softmax that says p."""
  assert loss_of([[math.log(p), math.log(1 - p)]], [0])[0] == about(nats)


@pytest.mark.parametrize(
  ("vocab_size", "nats"), [(27, 3.295837), (28, 3.332205), (50_000, 10.819778), (50_257, 10.824905)]
)
def test_guessing_costs_the_logarithm_of_the_vocabulary(loss_of, vocab_size, nats):
  """A model that has learned nothing is at ln V.

  A first loss far above says that something is wrong.
  """
  assert loss_of([[0.0] * vocab_size], [vocab_size // 2])[0] == about(nats)


def test_a_logit_of_five_among_ten(loss_of):
  """The text prints a loss of 0.0589 and a perplexity of 1.061."""
  loss, _ = loss_of([[0.0] * 3 + [5.0] + [0.0] * 6], [3])
  assert loss == about(0.058870)
  assert math.exp(loss) == about(1.060637)
  assert format_perplexity(loss) == "1.06"


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite(loss_of, scale):
  """Computed as written, exp(1e4) would be infinite, and its share of the sum not a number."""
  loss, gradient = loss_of([[scale, 0.0, -scale]], [2])
  assert loss == about(2e4) if scale > 0 else loss == 0
  assert gradient[0] == pytest.approx([1.0, 0.0, -1.0] if scale > 0 else [0.0, 0.0, 0.0])


# --- The optimizer ---


def first_update(value, gradient, **settings):
  """The parameters after one update of jgpt's chain, in float64, and Adam's state.

  Every entry is `value`.
  """
  settings = {
    "schedule": "constant",
    "decay_steps": 1,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
  } | settings
  tx = make_optimizer(make_experiment(TINY, OptimizerConfig(**settings)))

  def filled(x):
    return jax.tree.map(lambda p: jnp.full(p.shape, x, jnp.float64), param_table(TINY))

  def update(params, grads):
    updates, state = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), state["adam"]

  return jax.jit(update, compiler_options=QUICK)(filled(value), filled(gradient))


def test_first_update_of_adamw(x64):
  """From 0.5 with gradient 0.2, rate 3e-4 and decay 0.01: the rate times the sign, and the decay's
  share: 0.4996985.
  """
  params, _ = first_update(0.5, 0.2, peak_lr=3e-4, weight_decay=0.01)
  assert float(params["tok_embed"][0, 0]) == about(0.4996985, rel=1e-9)
  assert float(params["tok_embed"][0, 0]) - 0.5 == about(
    -3.015e-4
  )  # to 1e-4 of what an error could show in
  assert float(params["norm_final_gain"][0]) - 0.5 == about(-3e-4)  # gains do not decay


def test_bias_correction_divides_by_what_the_first_moment_lacks(x64):
  """With b1 0.85 the first moment begins at 0.15 of the gradient, and is divided by 0.15.

  An eps of 1 makes the update depend on the gradient's size, from which the corrected moments
  follow.
  """
  rate, gradient = 0.1, 0.2
  params, adam = first_update(0.0, gradient, peak_lr=rate, b1=0.85, eps=1.0)
  m, v = float(adam.mu["tok_embed"][0, 0]), float(adam.nu["tok_embed"][0, 0])
  assert m == about(0.15 * gradient)
  corrected = -float(params["tok_embed"][0, 0]) / rate * (math.sqrt(v / (1 - 0.999)) + 1.0)
  assert m / corrected == about(0.15)


def test_a_gradient_of_norm_1000_is_clipped_to_1(x64):
  """Its direction stays, and one below the limit is left as it is: the first moment holds a tenth
  of what was clipped.
  """
  num_entries = sum(math.prod(p.shape) for p in jax.tree.leaves(param_table(TINY)))
  for norm, clipped in ((1000.0, 1.0), (0.5, 0.5)):
    _, adam = first_update(0.0, norm / math.sqrt(num_entries), peak_lr=1e-3, clip_norm=1.0)
    entries = np.concatenate([np.ravel(m) for m in jax.tree.leaves(adam.mu)]) / (1 - 0.9)
    assert np.linalg.norm(entries) == about(clipped)
    assert entries == about(np.full(num_entries, clipped / math.sqrt(num_entries)))


def test_rates_of_a_warmup_and_a_cosine():
  """Peak 3e-4, 100 of 1,000 steps of warmup: half at 50.

  The text prints 1.1e-5 at 900, which is 9.0e-6.
  """
  config = OptimizerConfig(
    peak_lr=3e-4, schedule="cosine", warmup_steps=100, decay_steps=1000, b1=0.9, b2=0.999, eps=1e-8
  )
  rate = make_schedule(config)
  got = [float(rate(jnp.int32(step))) for step in (0, 50, 100, 500, 900, 1000)]
  assert got == [
    0.0,
    about(1.5e-4),
    about(3e-4),
    about(1.760472e-4),
    about(9.046107e-6),
    pytest.approx(0, abs=1e-11),
  ]


# --- Gradient descent ---


def test_gradient_descent_on_a_line():
  """The slope 5 of y = 5 x found from 2 at rate 0.1: each step halves the distance and changes
  sides.
  """
  x = jnp.arange(1.0, 5.0)
  slope = jax.jit(jax.grad(lambda w: jnp.mean((w * x - 5 * x) ** 2)))
  values = [2.0]
  for _ in range(10):
    values.append(values[-1] - 0.1 * float(slope(values[-1])))
  assert values[1:5] == about([6.5, 4.25, 5.375, 4.8125])
  assert values[10] == about(4.997070, rel=1e-6)
