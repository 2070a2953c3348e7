"""When the host looks at a run: where something is due, and never later."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jgpt.config.catalog import load_experiment
from jgpt.plan import next_line, next_stop
from jgpt.runs.saving import is_save_due
from jgpt.step import MAX_STEPS_PER_CALL

TRAIN = load_experiment("names").train
PERIODS = ("save_every", "eval_every", "sample_every")


@given(
  st.integers(1, 5000),
  st.lists(st.none() | st.integers(1, 2000), min_size=3, max_size=3),
  st.integers(1, 2000),
  st.data(),
)
def test_no_step_at_which_something_is_due_is_passed_over(steps, periods, log_every, data):
  """From any step: the next stop is the first one that is due, counted one by one."""
  train = dataclasses.replace(
    TRAIN, steps=steps, log_every=log_every, **dict(zip(PERIODS, periods, strict=True))
  )
  step = data.draw(st.integers(1, steps))
  due = step + 1
  while due < min(steps, step + MAX_STEPS_PER_CALL) and not any(
    due % p == 0 for p in (*periods, log_every) if p
  ):
    due += 1
  assert next_stop(step, train) == min(due, steps)


def test_the_first_call_is_one_step():
  assert next_stop(0, TRAIN) == 1 and next_stop(0, dataclasses.replace(TRAIN, steps=0)) == 0


def test_lines_begin_anew_with_each_epoch():
  assert [next_line(step, 50, 171) for step in (0, 49, 50, 150, 170, 171, 221)] == [
    50,
    50,
    100,
    171,
    171,
    221,
    271,
  ]


@pytest.mark.parametrize(
  ("every", "seconds", "step", "passed", "due"),
  [
    (None, None, 100, 1e9, False),
    (50, None, 100, 0.0, True),
    (50, None, 99, 1e9, False),
    (None, 900.0, 99, 899.0, False),
    (None, 900.0, 99, 900.0, True),
    (50, 900.0, 99, 900.0, True),
    (None, 0.0, 1, 0.0, True),
  ],
)
def test_a_save_is_due_by_steps_or_by_the_clock(every, seconds, step, passed, due):
  train = dataclasses.replace(TRAIN, save_every=every, save_every_seconds=seconds)
  assert is_save_due(step, train, passed) is due
