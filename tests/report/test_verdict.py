"""The verdict on a finished run: each one on a real run that shows it, and at its edges."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jgpt import train
from jgpt.config import Expected
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.optim.schedule import make_schedule
from jgpt.plan import plan_run
from jgpt.report.console import uniform_loss
from jgpt.report.verdict import (
  count_idle_updates,
  describe_expected,
  diagnose_losses,
  final_loss,
  match_expected,
)

pytestmark = pytest.mark.usefixtures("quick")

WIDE = {"model.d_model": 64, "model.d_ff": 256, "data.batch_size": 16}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  """Twelve hundred made-up words."""
  path = tmp_path_factory.mktemp("data") / "words.txt"
  rng = np.random.default_rng(0)
  syllables = [c + v for c in "bdfgklmnprst" for v in "aeiou"]
  path.write_text(
    "".join("".join(rng.choice(syllables, rng.integers(2, 5))) + "\n" for _ in range(1200)),
    encoding="utf-8",
  )
  return path


def read(words, **changes):
  """Trains `names` on the words with settings changed, and reads the result."""
  changes = {name.replace("__", "."): value for name, value in changes.items()} | {
    "data.path": str(words)
  }
  result = train.train_run(plan_run(change(load_experiment("names"), changes)))
  baseline = uniform_loss(result.experiment.model.vocab_size)
  return diagnose_losses(result.losses, result.heldout_losses, result.heldout_loss, baseline)


@pytest.mark.slow
def test_a_run_that_learns_and_levels_off_is_healthy(words):
  reading = read(words, data__batch_size=16, train__steps=600)
  assert reading.verdict == "healthy", reading
  assert "levelled off" in reading.evidence and "held-out loss" in reading.evidence


@pytest.mark.slow
def test_a_run_that_learns_its_text_by_heart_is_overfitting(words, tmp_path):
  """Sixty of the words, a wider model, many steps: the held-out loss rises while the training loss
  falls.
  """
  few = tmp_path / "few.txt"
  few.write_text(
    "".join(words.read_text(encoding="utf-8").splitlines(keepends=True)[:60]), encoding="utf-8"
  )
  changes = {
    "data__heldout_fraction": 0.3,
    "train__steps": 400,
    "train__eval_every": 20,
    "data__batch_size": 16,
  }
  reading = read(few, model__d_model=64, model__d_ff=256, **changes)
  assert reading.verdict == "overfitting", reading
  assert "rose from" in reading.evidence
  reading = read(few, model__d_model=64, model__d_ff=256, **changes | {"train__eval_every": None})
  assert reading.verdict == "overfitting" and "far above the training loss" in reading.evidence


@pytest.mark.parametrize(
  ("steps", "verdict", "evidence"),
  [(3, "too short to say", "3 updates do not show"), (60, "underfitting", "still fell")],
)
def test_a_run_that_stops_early_is_underfitting(words, steps, verdict, evidence):
  changes = {"optimizer__decay_steps": 10_000, "optimizer__peak_lr": 0.001, "data__batch_size": 64}
  reading = read(words, train__steps=steps, **changes)
  assert reading.verdict == verdict, reading
  assert evidence in reading.evidence


def test_a_heldout_loss_that_still_falls_is_underfitting():
  """Of a short run with noisy training losses, as GPT-2's 41 updates: 6% in a quarter of
  the run.
  """
  losses = np.linspace(10.9, 7.4, 41) + np.random.default_rng(0).normal(0, 0.4, 41)
  curve = [(0, 11.0), (10, 8.94), (20, 8.23), (30, 7.55), (40, 7.09)]
  reading = diagnose_losses(losses, curve, 7.01, 10.8)
  assert reading.verdict == "underfitting"
  assert reading.evidence == "the held-out loss still fell, from 7.55 at step 30 to 7.09 at step 40"
  levelled = [*curve[:-1], (40, 7.53)]
  assert diagnose_losses(np.full(41, 7.4), levelled, 7.5, 10.8).verdict == "healthy"


def test_a_run_with_too_high_a_rate_is_diverging(words):
  reading = read(words, optimizer__peak_lr=30.0, train__steps=200)
  assert reading.verdict == "diverging", reading


def test_a_loss_that_is_not_finite_is_diverging_and_its_step_is_named():
  losses = np.full(200, 2.0)
  losses[41] = np.nan
  reading = diagnose_losses(losses, [], None, 3.3)
  assert (
    reading == dataclasses.replace(reading, verdict="diverging") and "step 42 " in reading.evidence
  )


@pytest.mark.parametrize("heldout_loss", [None, 2.0])
@pytest.mark.parametrize("num", [1, 2, 3, 49, 51])
def test_short_runs_have_a_verdict_too(num, heldout_loss):
  verdict = diagnose_losses(np.linspace(3.3, 3.0, num), [], heldout_loss, 3.3).verdict
  assert verdict == ("underfitting" if num > 20 else "too short to say")


def scatter(num, size, seed=0):
  return np.random.default_rng(seed).normal(0, size, num)


def falling(num, first, last, size, seed=0):
  """A loss that falls exponentially, with noise."""
  return last + (first - last) * np.exp(-8 * np.arange(num) / num) + scatter(num, size, seed)


# name -> losses, held-out loss, uniform guessing, updates at a rate of 0, verdict, evidence
CURVES = {
  "fine-tuned on unlike text": (
    *(falling(400, 9.3, 5.4, 0.1), 5.5, 4.2, 0),
    *("underfitting", "5.40, is not below uniform guessing, 4.20"),
  ),
  "fine-tuned on unlike text, one sequence at a time": (
    *(falling(300, 7.0, 4.6, 0.9), 4.6, 3.9, 0),
    *("underfitting", "not below uniform guessing"),
  ),
  "fine-tuned, and forgot what it knew": (
    *(np.concatenate([3 + scatter(20, 0.2), 6 + scatter(300, 0.3)]), 6.0, 10.8, 0),
    *("diverging", "ends at"),
  ),
  "fine-tuned a little": (*(3 + scatter(300, 0.3), 3.0, 10.8, 0), *("healthy", "levelled off")),
  "blown up at once": (
    *(np.concatenate([[3.3], 30 + scatter(199, 5.0)]), 30.0, 3.3, 0),
    *("diverging", "after 3.30 at step 1"),
  ),
  "worse than guessing, a little": (
    *(np.concatenate([[3.3], 3.8 + scatter(150, 0.05)]), 3.8, 3.3, 0),
    *("diverging", "after 3.30 at step 1"),
  ),
  "twenty steep updates": (
    *(np.linspace(10.8, 6.1, 20) + scatter(20, 0.1), 6.0, 10.8, 0),
    *("underfitting", "still fell"),
  ),
  "twenty steep updates, noisy": (
    *(np.linspace(10.8, 6.1, 20) + scatter(20, 0.9), 6.0, 10.8, 0),
    *("too short to say", "20 updates do not show"),
  ),
  "ninety updates, nothing held out": (
    *(falling(90, 3.3, 2.4, 0.3), None, 3.3, 0),
    *("too short to say", "90 updates do not show"),
  ),
  "a hundred and twenty updates of very unlike documents": (
    *(2.2 + scatter(120, 0.9), 2.2, 3.3, 0),
    *("too short to say", "scatter by 0."),
  ),
  "one document by heart, nothing held out": (
    *(falling(500, 3.3, 0.02, 0.001), None, 3.3, 0),
    *("levelled off", "learnt by heart (so low a loss usually is) cannot be seen"),
  ),
  "one document by heart, another held out": (
    *(falling(500, 3.3, 0.02, 0.001), 7.0, 3.3, 0),
    *("overfitting", "far above the training loss, 0.02"),
  ),
  "nothing held out": (
    *(falling(1000, 3.3, 2.4, 0.4), None, 3.3, 0),
    *("levelled off", "(3.30 is guessing); nothing is held out"),
  ),
  "a rate of 0": (*(3.3 + scatter(800, 0.4), 3.3, 3.3, 800), *("not trained", "at every update")),
  "a rate of 0 mostly": (
    *(falling(800, 3.3, 2.4, 0.4), 2.4, 3.3, 500),
    *("not trained", "at 500 of 800 updates"),
  ),
  "a rate of 0 for a while": (
    *(falling(800, 3.3, 2.4, 0.4), 2.4, 3.3, 100),
    *("healthy", "the learning rate was 0 at 100 of 800 updates"),
  ),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_verdict_has_its_evidence_and_names_what_cannot_be_seen(name):
  losses, heldout_loss, baseline, num_idle, verdict, evidence = CURVES[name]
  reading = diagnose_losses(losses, [], heldout_loss, baseline, num_idle=num_idle)
  assert reading.verdict == verdict and evidence in reading.evidence, reading


def test_a_thousand_updates_of_single_names_are_healthy_whatever_the_seed():
  for seed in range(40):
    skewed = np.random.default_rng(seed).gamma(9, 0.5 / 3, 1000) - 1.5  # a long tail of odd names
    reading = diagnose_losses(falling(1000, 3.3, 2.38, 0, seed) + skewed, [], 2.39, 3.3)
    assert reading.verdict == "healthy", (seed, reading)


@pytest.mark.parametrize(
  ("changes", "idle"),
  [
    ({}, 0),
    ({"warmup_steps": 9}, 0),
    ({"decay_steps": 30}, 70),
    ({"decay_steps": 30, "end_lr": 1e-5}, 0),
    ({"decay_steps": 300}, 0),
    ({"peak_lr": 0.0}, 100),
    ({"peak_lr": 1e-60, "schedule": "constant", "end_lr": 1.0}, 100),
    ({"peak_lr": 0.0, "end_lr": 0.1, "warmup_steps": 40}, 40),
    ({"peak_lr": 0.0, "end_lr": 0.1, "warmup_steps": 40, "decay_steps": 20}, 20),
    ({"schedule": "constant", "decay_steps": 3}, 0),
  ],
)
def test_updates_at_a_rate_of_zero_are_counted_as_the_schedule_has_them(changes, idle):
  """But for one: a warmup from 0 begins with it, and so does a rise from a peak of 0."""
  changes = {f"optimizer.{name}": value for name, value in changes.items()} | {"train.steps": 100}
  optimizer = resolve(change(load_experiment("names"), changes), 27).optimizer
  assert count_idle_updates(optimizer, 100) == idle
  rates = np.asarray(make_schedule(optimizer)(jnp.arange(100)))
  assert idle <= np.sum(rates == 0) <= idle + 1


def test_a_training_loss_above_the_heldout_loss_is_no_overfitting():
  """With dropout, training is the harder task."""
  losses = np.concatenate([np.linspace(5, 1.3, 300), np.full(700, 1.3)])
  assert diagnose_losses(losses, [(500, 1.15), (1000, 1.13)], 1.13, 5.5).verdict == "healthy"


def test_the_final_loss_is_the_mean_of_the_last_fifty():
  assert final_loss(np.arange(100.0)) == 74.5
  assert final_loss([1.0, 2.0]) == 1.5


EXPECTED = (
  Expected(data="names", heldout=True, loss_nats_per_token=2.38, band=0.03),
  Expected(data="other", heldout=False, loss_nats_per_token=2.0, band=0.1),
)


@pytest.mark.parametrize(
  ("label", "heldout_loss", "words"),
  [
    ("names", 2.40, "as expected: held-out loss 2.40 (2.38 ± 0.03)"),
    ("names", 2.42, "outside the expected band: held-out loss 2.42 (2.38 ± 0.03)"),
    ("names", 2.30, "outside the expected band: held-out loss 2.30 (2.38 ± 0.03)"),
    ("names", float("nan"), "outside the expected band: held-out loss nan (2.38 ± 0.03)"),
    ("other", None, "as expected: training loss 2.05 (2.00 ± 0.10)"),
    ("names", None, ""),
    ("names (bundled)", 2.40, ""),
    (None, 2.40, ""),
  ],
)
def test_a_result_is_held_against_what_is_expected_on_its_data(label, heldout_loss, words):
  found = match_expected(EXPECTED, label, np.full(60, 2.05), heldout_loss)
  assert (describe_expected(found) if found else "") == words
