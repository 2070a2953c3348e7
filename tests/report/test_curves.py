"""From metrics to what is drawn: smoothing, thinning, places of labels, names of what differs."""

import math
from pathlib import Path

import numpy as np
import pytest

from jgpt.config import Expected
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.report.curves import (
  collect_curves,
  keep_evenly,
  keep_extremes,
  name_differences,
  smooth,
  spread,
)
from jgpt.runs.history import History
from jgpt.runs.rows import Series

NAMES = load_experiment("names")


def make_history(label="names", **metrics):
  """A run of `names` with given metrics: name -> (steps, values); "_" stands for "/"."""
  found = {
    name.replace("_", "/"): Series(np.array(steps, np.int64), np.array(values, np.float64))
    for name, (steps, values) in metrics.items()
  }
  return History(Path("runs/mine"), "names", resolve(NAMES, 27), found, label, NAMES.expected)


# --- Smoothing ---


def test_smoothing_is_a_centred_mean_narrower_at_the_start_and_cut_at_the_end():
  values = np.array([8.0, 4.0, 6.0, 2.0, 0.0, 7.0])
  found = smooth(values, 2)
  by_hand = [8, (8 + 4 + 6) / 3, 20 / 5, 19 / 5, (6 + 2 + 0 + 7) / 4, (2 + 0 + 7) / 3]
  np.testing.assert_allclose(found, by_hand, rtol=1e-15)
  np.testing.assert_array_equal(smooth(values, 0), values)
  assert len(smooth(np.zeros(0), 3)) == 0


def test_a_line_is_smoothed_to_itself_until_the_end():
  """So the window is not shifted."""
  line = 3.0 - 0.01 * np.arange(100)
  np.testing.assert_allclose(smooth(line, 7)[:-7], line[:-7], rtol=1e-12)


def test_what_is_not_finite_is_a_gap_and_in_no_mean():
  values = np.array([1.0, np.nan, 3.0, np.inf, 1e30, 5.0])
  found = smooth(values, 1)
  np.testing.assert_allclose(found, [1, np.nan, 3, np.nan, np.nan, 5])


def test_the_window_is_a_twentieth_of_the_updates():
  for number, half in ((1, 0), (39, 0), (40, 1), (1000, 25)):
    steps = np.arange(1, number + 1)
    found = collect_curves(make_history(train_loss=(steps, np.sqrt(steps))))
    assert found.half_window == half
    np.testing.assert_array_equal(found.smoothed.values, smooth(np.sqrt(steps), half))


def test_the_training_loss_is_the_mean_of_the_last_fifty_finite_losses():
  values = np.arange(80.0)
  values[[40, 79]] = np.nan, 1e30
  found = collect_curves(make_history(train_loss=(np.arange(1, 81), values)))
  assert found.training_loss == (sum(range(28, 79)) - 40) / 50 and found.num_last == 50
  found = collect_curves(make_history(train_loss=([1, 2, 3], [2, np.inf, 5])))
  assert (found.training_loss, found.num_last) == (3.5, 2)
  found = collect_curves(make_history(train_loss=([1], [np.nan])))
  assert (found.training_loss, found.num_last) == (None, 0)


# --- What a run has ---


def test_curves_are_of_each_step_once_in_order():
  """Of two rows of a step the later counts; the loss of the end is held out too."""
  run = make_history(
    train_loss=([2, 3, 1, 3], [5, 6, 7, 8]),
    train_skipped=([1, 2, 3], [0, 1, 0]),
    heldout_loss=([0, 2], [3.5, 3.0]),
    final_heldout_loss=([3], [2.5]),
  )
  found = collect_curves(run)
  assert found.losses.steps.tolist() == [1, 2, 3] and found.losses.values.tolist() == [7, 5, 8]
  assert found.heldout.steps.tolist() == [0, 2, 3]
  assert found.heldout.values.tolist() == [3.5, 3.0, 2.5]
  assert found.skipped.tolist() == [2] and found.last_step == 3
  assert found.guessing == math.log(27)
  assert found.expected == Expected(data="names", heldout=True, loss_nats_per_token=2.38, band=0.03)


def test_nothing_is_expected_on_another_text():
  assert collect_curves(make_history(label=None)).expected is None
  assert collect_curves(make_history(label="tiny_shakespeare")).expected is None


def test_a_loss_that_is_not_finite_counts_as_skipped():
  run = make_history(
    train_loss=([1, 2, 3], [3, np.nan, 1e20]), train_skipped=([1, 2, 3], [1, 1, 0])
  )
  assert collect_curves(run).skipped.tolist() == [1, 2, 3]


def test_tokens_and_seconds_are_those_of_the_calls_and_between_them_in_proportion():
  """Calls that end at steps 1, 4 and 8. The second start's seconds go on from the first's."""
  run = make_history(
    train_loss=(np.arange(1, 9), np.ones(8)),
    tokens=([1, 4, 8], [7, 40, 60]),
    perf_seconds=([1, 4, 8], [0.5, 0.3, 0.8]),
  )
  found, steps = collect_curves(run), np.array([0, 1, 2, 4, 6, 8])
  assert found.locate(steps, "step").tolist() == steps.tolist()
  np.testing.assert_allclose(found.locate(steps, "tokens"), [0, 7, 18, 40, 50, 60])
  np.testing.assert_allclose(found.locate(steps, "seconds"), [0, 0.5, 0.6, 0.8, 1.2, 1.6])


def test_rows_of_time_that_cannot_be_true_are_left_out():
  run = make_history(
    train_loss=(np.arange(1, 5), np.ones(4)),
    tokens=([1, 2, 3, 4], [7, np.inf, 5, 20]),
    perf_seconds=([1, 2, 3, 4], [0.5, 1.0, np.nan, -3]),
  )
  steps, tokens, seconds = collect_curves(run).clock
  assert steps.tolist() == [0, 1, 3, 4] and tokens.tolist() == [0, 7, 7, 20]
  assert seconds.tolist() == [0, 0.5, 1.5, 1.5]


def test_a_run_without_rows_has_empty_curves():
  found = collect_curves(make_history())
  assert found.last_step == 0 and not len(found.losses.steps) and not len(found.skipped)


# --- Few enough points ---


def test_thinned_curves_keep_what_is_seen():
  x = np.arange(100_000.0)
  y = np.sin(x / 10_000)
  y[33_333], y[66_666] = 9.0, -9.0
  at, values = keep_extremes(x, y, 400)
  assert len(at) <= 400 and (np.diff(at) > 0).all()
  assert values.max() == 9 and values.min() == -9 and (y[at.astype(int)] == values).all()
  at, values = keep_evenly(x, y, 400)
  assert len(at) <= 400 and (at[0], at[-1]) == (0, 99_999) and (y[at.astype(int)] == values).all()
  for keep in (keep_extremes, keep_evenly):
    assert [array.tolist() for array in keep(x[:5], y[:5], 400)] == [
      x[:5].tolist(),
      y[:5].tolist(),
    ]


def test_a_stretch_without_finite_values_stays_a_gap():
  y = np.ones(1000)
  y[500:700] = np.nan
  at, values = keep_extremes(np.arange(1000.0), y, 100)
  assert np.isnan(values[(at >= 520) & (at < 680)]).all() and (values[at < 490] == 1).all()


# --- Labels ---


@pytest.mark.parametrize(
  ("places", "heights", "by_hand"),
  [
    ([1, 5], [1, 1], [1, 5]),  # far enough apart
    ([5, 1], [1, 1], [5, 1]),
    ([3, 3], [1, 1], [2.5, 3.5]),
    ([3, 3.5, 8], [1, 3, 1], [2.25, 4.25, 8]),  # middles 2 apart, about their mean
    ([3, 3.5, 4.5], [1, 1, 1], [8 / 3, 11 / 3, 14 / 3]),  # the second pushes the third
    ([0, 10], [1, 1], [0.5, 9.5]),  # inside
    ([9.9, 9.9], [1, 1], [8.5, 9.5]),
    ([5], [1], [5]),
  ],
)
def test_labels_are_moved_apart(places, heights, by_hand):
  np.testing.assert_allclose(spread(places, heights, 0, 10), by_hand)


def label(*changes, name="names", vocab_size=27):
  base = load_experiment(name)
  experiments = [resolve(change(base, c), vocab_size) for c in changes]
  return name_differences(experiments, [f"run{i}" for i in range(len(changes))])


def test_labels_name_what_differs():
  assert label({}, {"optimizer.peak_lr": 0.03}) == ["peak_lr 0.01", "peak_lr 0.03"]
  assert label({"data.batch_size": 16, "train.seed": 3}, {}) == [
    "batch_size 16, seed 3",
    "batch_size 1, seed 0",
  ]
  assert label({}, {"optimizer.name": "sgd"}) == ["optimizer adamw", "optimizer sgd"]
  assert label({"model.tied_head": True}, {"sample.num": 1}) == [
    "tied_head true",
    "tied_head false",
  ]


def test_momentum_belongs_to_the_name_of_sgd_where_optimizers_differ():
  """It is no fourth setting, nor one of the Adams, which have none."""
  sgd = {"optimizer.name": "sgd", "optimizer.momentum": 0.9}
  more = {"train.seed": 1, "optimizer.peak_lr": 0.1}
  assert label({}, sgd, {"optimizer.name": "adam"}) == [
    *("optimizer adamw", "optimizer sgd, momentum 0.9", "optimizer adam"),
  ]
  assert label({}, sgd | more) == [
    "optimizer adamw, peak_lr 0.01, seed 0",
    "optimizer sgd, momentum 0.9, peak_lr 0.1, seed 1",
  ]
  assert label(sgd, {"optimizer.name": "sgd"}) == ["momentum 0.9", "momentum 0.0"]
  assert label(sgd, {"optimizer.name": "sgd"}, {})[1] == "optimizer sgd, momentum 0.0"


def test_what_follows_from_a_setting_is_not_named():
  """`optimizer.decay_steps` is `train.steps`."""
  assert label({}, {"train.steps": 500}) == ["steps 1000", "steps 500"]


def test_settings_that_learn_nothing_are_named_only_if_no_other_differs():
  changes = {"train.log_every": 7, "compute.attention": "plain"}
  assert label({}, changes) == [
    "log_every 100, attention auto",
    "log_every 7, attention plain",
  ]
  assert label({}, changes | {"train.seed": 1}) == ["seed 0", "seed 1"]


def test_runs_that_differ_in_nothing_or_in_much_have_their_folders_names():
  assert label({}, {}) == ["run0", "run1"]
  much = {f"optimizer.{n}": 0.5 for n in ("b1", "b2", "eps", "weight_decay")}
  assert label({}, much) == ["run0", "run1"]
  long = {"data.path": "a_folder/of_a/text_with_a/long_name/that_goes_on.txt"}
  assert label({}, long) == ["run0", "run1"]


def test_labels_that_would_be_the_same_have_their_folders_names_added():
  assert label({}, {}, {"train.seed": 1}) == ["seed 0 (run0)", "seed 0 (run1)", "seed 1"]
