"""Row 17: no clipping, zero gradients, a rate of 0, warmups of 0 and 1, and 0 or 1 updates are
finite and defined.
"""

import itertools

import children
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import NAMES, QUICK, batch_of, initial_state, leaves_by_name, names_experiment

import jgpt.step
from jgpt.config import Hyper
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change
from jgpt.errors import UserError
from jgpt.optim.schedule import make_schedule


@pytest.fixture
def no_gradients(monkeypatch):
  """All gradients are zero."""
  right = jgpt.step.loss_and_grads

  def loss_and_grads(*args):
    loss, grads = right(*args)
    return loss, jax.tree.map(jnp.zeros_like, grads)

  monkeypatch.setattr(jgpt.step, "loss_and_grads", loss_and_grads)


def updates(num, **changes):
  """The states before each of `num` updates and after the last, and the metrics of each."""
  experiment = names_experiment(**changes)

  def train_step(state, batch):  # new each time, so that nothing traced is reused
    return jgpt.step.train_step(state, batch, experiment)

  step = jax.jit(train_step, compiler_options=QUICK)
  states, rows = [initial_state(experiment)], []
  for _ in range(num):
    state, metrics = step(states[-1], batch_of(NAMES[:2], experiment))
    states.append(state)
    rows.append(metrics)
  return states, rows


def equal_bits(a, b):
  a, b = leaves_by_name(a), leaves_by_name(b)
  return all(a[name].tobytes() == b[name].tobytes() for name in a)


def all_finite(tree):
  return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def test_row_17_a_clip_of_0_is_refused_and_none_is_offered():
  """It would scale every gradient to nothing, and where the gradient is 0 divide 0 by 0."""
  with pytest.raises(
    UserError, match=r"optimizer\.clip_norm=0 would scale every gradient to nothing; none turns"
  ):
    change(load_experiment("names"), {"optimizer.clip_norm": 0.0})


@pytest.mark.slow
@pytest.mark.parametrize("clip_norm", [None, 1e-30, 1.0, 1e30])
def test_row_17_zero_gradients_change_nothing(no_gradients, clip_norm):
  """They are no fault: not skipped, divided by no zero, and without decay no parameter moves."""
  states, rows = updates(3, optimizer__clip_norm=clip_norm)
  assert equal_bits(states[0].params, states[3].params) and all_finite(states[3])
  assert not any(
    np.any(x)
    for x in jax.tree.leaves((states[3].opt_state["adam"].mu, states[3].opt_state["adam"].nu))
  )
  assert [float(row["train/grad_norm"]) for row in rows] == [0.0] * 3 and not any(
    row["train/skipped"] for row in rows
  )


@pytest.mark.slow
def test_row_17_zero_gradients_leave_decay_alone(no_gradients):
  """What decays shrinks by rate times decay.

  Only padding's gradients are always 0, and it is 0 itself.
  """
  states, rows = updates(1, optimizer__weight_decay=0.1, optimizer__decay_kinds=("matrix",))
  before, after = leaves_by_name(states[0].params), leaves_by_name(states[1].params)
  for name, value in after.items():
    shrunk = (
      before[name] * (1 - 0.1 * float(rows[0]["train/lr"]))
      if name.startswith("blocks/w_")
      else before[name]
    )
    np.testing.assert_allclose(value, shrunk, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("clip_norm", [1e-30, 1e30])
def test_row_17_clips_out_of_all_proportion_are_finite(clip_norm):
  states, rows = updates(3, optimizer__clip_norm=clip_norm)
  assert (
    all_finite(states[3]) and all_finite(rows) and not any(row["train/skipped"] for row in rows)
  )


@pytest.mark.slow
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_row_17_a_rate_of_0_moves_nothing(weight_decay):
  """Moments gather, parameters keep every bit, decay or not: it is multiplied by the rate."""
  states, rows = updates(3, optimizer__peak_lr=0.0, optimizer__weight_decay=weight_decay)
  assert equal_bits(states[0].params, states[3].params)
  assert [float(row["train/lr"]) for row in rows] == [0.0] * 3 and float(
    rows[2]["train/grad_norm"]
  ) > 0
  assert int(states[3].opt_state["adam"].count) == 3


SCHEDULES = ("linear", "cosine", "constant", "wsd")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_row_17_every_rate_is_finite_and_between_0_and_the_peak(schedule):
  """Warmups of 0, 1 and more than there are updates; schedules of 1 and 2 updates; a peak of 0.

  Also at steps past the end. With a peak that is an array, as in a sweep, the rates are the same.
  """
  cooldowns = (1, 5) if schedule == "wsd" else (None,)
  values = itertools.product((0, 1, 5), (True, False), (1, 2, 7), (0.0, 0.5), (0.0, 0.1), cooldowns)
  names = (
    "warmup_steps",
    "warmup_from_zero",
    "decay_steps",
    "peak_lr",
    "end_share",
    "cooldown_steps",
  )
  for settings in (dict(zip(names, v, strict=True)) for v in values):
    warmup, from_zero, decay, peak = (settings[name] for name in names[:4])
    end = settings.pop("end_share") * peak
    changed = {
      f"optimizer__{name}": value
      for name, value in (settings | {"end_lr": end, "schedule": schedule}).items()
    }
    experiment = names_experiment(**changed)
    rates = np.asarray(jax.vmap(make_schedule(experiment.optimizer))(jnp.arange(12)))
    hyper = Hyper.of(experiment)._replace(peak_lr=jnp.float32(peak))
    of_array = jax.vmap(make_schedule(experiment.optimizer, hyper))(jnp.arange(12))
    np.testing.assert_allclose(of_array, rates, rtol=1e-6, atol=1e-9, err_msg=f"{settings}")
    assert np.isfinite(rates).all() and (rates >= 0).all() and (rates <= peak * (1 + 1e-6)).all(), (
      settings,
      rates,
    )
    if warmup == 0:
      assert rates[0] == np.float32(peak), (settings, rates)
    if warmup == 1 and (schedule == "constant" or decay > 1):
      assert rates[0] == (0.0 if from_zero else np.float32(peak / 2)), (settings, rates)
    if schedule != "constant":
      np.testing.assert_allclose(rates[decay:], end, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 1])
def test_row_17_runs_of_no_or_one_update(tmp_path, steps):
  """A run folder that can be sampled, with so many rows; finite, whatever the warmup."""
  children.write_texts(tmp_path)
  words = children.arguments(
    "bytes", "run", train__steps=steps, optimizer__warmup_steps=steps, train__eval_every=None
  )
  child = children.train(*words, cwd=tmp_path)
  assert children.steps_there(tmp_path / "run") == [steps] and "nan" not in child.out.lower()
  leaves = children.read_leaves(tmp_path / "run" / "checkpoints" / str(steps))
  assert all(np.isfinite(x).all() for x in leaves.values())
  rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert sum("train/loss" in row for row in rows) == steps
