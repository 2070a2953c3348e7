"""What a run's numbers say: lines that are few, counts that survive a resume, and the array that is
not finite.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from equivalence import CPU, NAMES, corpus_of, initial_state, names_experiment

from jgpt.config.settings import change
from jgpt.devices.compute import resolve_compute
from jgpt.runs import health
from jgpt.runs.health import Health, explain_skip, find_nonfinite

NAN, INF = math.nan, math.inf


def metrics_of(losses, skipped=(), norms=None):
  """Metrics of consecutive updates; `skipped` holds their places."""
  losses = np.asarray(losses, np.float32)
  norms = np.ones(len(losses), np.float32) if norms is None else np.asarray(norms, np.float32)
  return {
    "train/loss": losses,
    "train/grad_norm": norms,
    "train/skipped": np.isin(np.arange(len(losses)), skipped) * 1,
  }


def rows_of(losses, skipped=()):
  return [
    {"step": i + 1, "train/loss": loss, "train/skipped": int(i in skipped)}
    for i, loss in enumerate(losses)
  ]


def noise(num, seed=0):
  return np.random.default_rng(seed).normal(2.4, 0.2, num)


def test_healthy_updates_say_nothing():
  watch, losses = Health([], 10), noise(5000)
  for begin in range(0, 5000, 1000):
    assert watch.observe(begin + 1000, metrics_of(losses[begin : begin + 1000])) == []
  assert watch.skipped == 0 and watch.exhausted is None


def test_a_spike_is_a_line_with_its_score_and_the_mean_before_it():
  losses = np.append(noise(811), 8.1234)
  (line,) = Health([], 10).observe(812, metrics_of(losses))
  assert line.startswith("step 812: loss 8.1234 is a spike, z = ") and line.endswith(
    " (mean 2.39 before it)"
  )
  assert 20 < float(line.partition("z = ")[2].partition(" ")[0]) < 40


def test_of_few_sequences_only_spikes_that_last_are_reported():
  """A single high loss is the scatter of the data, and of many sequences it is not.

  Two calls are watched as one is, and a start goes on from the rows of the one before.
  """
  losses = noise(1000)
  losses[[400, 700]] = 6.0
  assert Health([], 10, 1).observe(1000, metrics_of(losses)) == []
  assert len(Health([], 10, 64).observe(1000, metrics_of(losses))) == 1
  losses[801:804] = 5.5
  for cut in (1, 500, 802, 803):
    watch = Health([], 10, 1)
    lines = watch.observe(cut, metrics_of(losses[:cut]))
    lines += watch.observe(1000, metrics_of(losses[cut:]))
    assert lines and lines[0].startswith("step 803: loss 5.5 is a spike, z = "), (cut, lines)
  resumed = Health(rows_of(losses[:802]), 10, 1)
  (line,) = resumed.observe(1000, metrics_of(losses[802:]))
  assert line.startswith("step 803: ")


def test_many_spikes_are_one_line():
  losses = noise(1000)
  losses[[400, 700, 950]] = 50
  (line,) = Health([], 10).observe(1000, metrics_of(losses))
  assert line.startswith("step 401: loss 50 is a spike") and line.endswith(
    ", and 2 more up to step 951"
  )


@pytest.mark.parametrize(
  ("loss", "norm", "words"),
  [
    (NAN, NAN, "the loss is nan"),
    (INF, NAN, "the loss is inf"),
    (2.5, INF, "the norm of the gradient is inf"),
    (9.5, 1.0, "loss 9.5 is a spike, z = "),
  ],
)
def test_the_first_skipped_update_says_why(loss, norm, words):
  watch = Health(rows_of(noise(100)), 10)
  (line,) = watch.observe(102, metrics_of([2.4, loss], skipped=[1], norms=[1.0, norm]))
  assert line.startswith(f"step 102: {words}") and line.endswith(": the update is skipped")
  assert watch.skipped == 1


@pytest.mark.parametrize("length", [1, 3, 7, 40])
def test_a_series_is_two_lines_however_it_is_cut(length):
  """Where it begins and, told later, where it ends.

  A series within one call is a line that counts it.
  """
  losses, skipped = noise(60), np.arange(10, 25)
  losses[skipped] = NAN
  watch, lines = Health([], 100), []
  for begin in range(0, 60, length):
    part = slice(begin, begin + length)
    step = begin + len(losses[part])
    lines += watch.observe(step, metrics_of(losses[part], skipped - begin))
  assert watch.skipped == 15 and watch.exhausted is None
  assert lines[0].startswith("step 11: the loss is nan: the update is skipped")
  if length == 40:
    assert lines == ["step 11: the loss is nan: the update is skipped, and 14 more up to step 25"]
  else:
    assert lines[1:] == ["step 26: parameters are updated again, after 15 updates skipped in a row"]


@pytest.mark.parametrize("length", [1, 4, 60])
def test_so_many_in_a_row_exhaust_however_they_are_cut(length):
  """The tenth in a row, not the tenth in all; named is the first of the series."""
  losses = noise(60)
  skipped = np.r_[5:14, 20:29, 40:51]  # 9, 9, 11 in a row
  losses[skipped] = NAN
  watch = Health([], 10)
  for begin in range(0, 60, length):
    part = slice(begin, begin + length)
    watch.observe(begin + len(losses[part]), metrics_of(losses[part], skipped - begin))
    assert (watch.exhausted is None) == (begin + length < 50)
  assert watch.exhausted == 41 and watch.skipped == 29


def test_counts_and_series_survive_a_resume():
  """Rows of earlier starts count; what was at its end already gets another try."""
  losses = noise(40)
  rows = rows_of(losses, skipped=[3, *range(32, 40)])
  rows.insert(20, {"step": 20, "heldout/loss": 2.5})
  watch = Health(rows, 10)
  assert watch.skipped == 9 and watch.exhausted is None
  watch.observe(41, metrics_of([NAN], [0]))
  assert watch.exhausted is None
  watch.observe(42, metrics_of([NAN], [0]))
  assert watch.exhausted == 33
  again = Health(rows_of(losses, skipped=range(20, 40)), 10)
  assert again.exhausted is None
  assert again.observe(41, metrics_of([2.4])) == [
    "step 41: parameters are updated again, after 20 updates skipped in a row"
  ]
  assert again.exhausted is None
  once_more = Health(rows_of(losses, skipped=range(20, 40)), 10)
  assert once_more.observe(41, metrics_of([NAN], [0])) == [] and once_more.exhausted == 21


def test_scores_survive_a_resume():
  """The next loss is judged as if the run had not stopped, also after thousands of rows and ones
  that are not finite.
  """
  losses = noise(5000)
  losses[[100, 4990]] = NAN
  straight = Health([], 10)
  straight.observe(5000, metrics_of(losses))
  resumed = Health(rows_of(losses.astype(np.float32).astype(float)), 10)
  np.testing.assert_allclose(resumed.stats[1:], straight.stats[1:], rtol=1e-6)


def test_rows_of_an_older_version_have_no_skips():
  rows = [{"step": i + 1, "train/loss": 2.5} for i in range(30)]
  assert Health(rows, 10).skipped == 0


# --- Which array ---


def test_leaves_that_are_not_finite_are_named():
  tree = {
    "tok_embed": jnp.ones(3),
    "blocks": {"w_up": jnp.array([1.0, INF]), "w_down": jnp.zeros(2)},
    "layers": [{"w": np.array([NAN], np.float32)}, {"w": np.zeros(1, np.float32)}],
    "count": jnp.int32(7),
  }
  assert find_nonfinite(tree) == ["blocks/w_up", "layers/0/w"]
  assert find_nonfinite({}) == []


def test_leaves_of_a_state_are_named():
  state = initial_state(names_experiment())
  state.params["unembed"] = state.params["unembed"].at[2, 3].set(NAN)
  assert find_nonfinite(state) == ["params/unembed"]


def explained(alter, monkeypatch, **changes):
  """What is said of step 3 where loss and gradients went through `alter`."""
  right = health.loss_and_grads
  monkeypatch.setattr(health, "loss_and_grads", lambda *args: alter(*right(*args)))
  experiment = change(names_experiment(), {"mesh.data": 1} | changes)
  experiment = resolve_compute(experiment, CPU)
  return explain_skip(experiment, initial_state(experiment), corpus_of(NAMES, experiment), 3)


@pytest.mark.slow
def test_the_gradient_that_is_not_finite_is_named(monkeypatch):
  words = explained(
    lambda loss, grads: (loss, grads | {"unembed": grads["unembed"] * NAN}), monkeypatch
  )
  assert words.startswith("the update of step 3 was skipped: its loss is 3.")
  assert words.endswith("; not finite: gradients of unembed")


def test_many_gradients_are_three_names_and_a_count(monkeypatch):
  words = explained(
    lambda loss, grads: (loss * NAN, jax.tree.map(lambda g: g * INF, grads)), monkeypatch
  )
  assert (
    "its loss is nan; not finite: gradients of blocks/w_down, blocks/w_out, blocks/w_qkv and 4 more"
    in words
  )


@pytest.mark.slow
def test_a_norm_that_overflows_is_told_from_a_gradient_that_does(monkeypatch):
  words = explained(
    lambda loss, grads: (loss, jax.tree.map(lambda g: jnp.full_like(g, 1e20), grads)), monkeypatch
  )
  assert words.endswith("every gradient is finite, but their norm is too large for float32")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("skip_spikes", "end"), [(4.0, ", a spike; loss and gradients are finite"), (None, "finite now")]
)
def test_what_is_finite_is_a_spike_or_was_another_fault(monkeypatch, skip_spikes, end):
  assert explained(
    lambda *found: found, monkeypatch, **{"optimizer.skip_spikes": skip_spikes}
  ).endswith(end)


@pytest.mark.slow
def test_the_batch_is_that_of_the_step(tmp_path):
  """Loss of the update as a run logged it: step and batch are not off by one.

  Parameters are the first that are named.
  """
  run = small_runs.train_words(tmp_path)
  experiment = change(run.experiment, {"optimizer.peak_lr": 0.0, "train.save_every": None})
  from jgpt.plan import plan_run
  from jgpt.train import train_run

  planned = plan_run(experiment)
  result = train_run(planned)
  for step in (1, 2, 30):
    words = explain_skip(result.experiment, result.state, planned.data.train, step)
    assert f"its loss is {result.losses[step - 1]:.5g};" in words
  result.state.params["tok_embed"] *= NAN
  words = explain_skip(result.experiment, result.state, planned.data.train, 1)
  assert words.endswith("its loss is nan; not finite: the parameters tok_embed")
