"""Row 14: NaN and infinity, in the loss or in a gradient, skip the update.

Nothing of the run is spoilt by them.

What the log says of them is tested in tests/runs/test_health.py, the statistics of spikes in
tests/test_optim.py.
"""

import json
import math
from functools import partial

import bad_numbers
import children
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from equivalence import (
  CPU,
  NAMES,
  QUICK,
  compare,
  corpus_of,
  initial_state,
  leaves_by_name,
  names_experiment,
)

from jgpt import train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change
from jgpt.devices.compute import choose_step_options, resolve_compute
from jgpt.optim import adam, spikes
from jgpt.optim.chain import make_optimizer
from jgpt.plan import plan_run
from jgpt.runs.open import open_run
from jgpt.runs.rows import read_jsonl
from jgpt.sharding import arrange_blocks, stack_blocks
from jgpt.step import train_steps

SETTINGS = {"optimizer__clip_norm": 1.0, "optimizer__weight_decay": 0.1}
STEPS = 12


def compile_steps(experiment, options=QUICK):
  """(state, number of updates) -> (state, metrics) on `NAMES`, compiled."""
  steps = partial(train_steps, experiment=experiment, capacity=STEPS)
  compiled = jax.jit(steps, compiler_options=options)
  corpus = corpus_of(NAMES, experiment)
  return lambda state, num: compiled(state, corpus, jnp.int32(num))


def assert_equal_bits(a, b):
  a, b = leaves_by_name(a), leaves_by_name(b)
  assert a.keys() == b.keys()
  assert [name for name in a if a[name].tobytes() != b[name].tobytes()] == []


@pytest.mark.parametrize(
  "way",
  [
    pytest.param(w, marks=[pytest.mark.slow] * (w != "nan in one gradient"))
    for w in bad_numbers.WAYS
  ],
)
def test_row_14_a_skipped_update_changes_nothing_but_step_and_rate(monkeypatch, way):
  """Parameters, moments and their count keep every bit; step and rate go on.

  Then all is as if it had been left out.
  """
  limit = {"optimizer__skip_spikes": 5.0} if way == "loss of 50" else {}
  experiment = names_experiment(**SETTINGS, **limit)
  if limit:
    monkeypatch.setattr("jgpt.optim.spikes.MIN_COUNT", 3)
  bad_numbers.plant(monkeypatch.setattr, way, [7])
  run = compile_steps(experiment)
  before, first = run(initial_state(experiment), 6)
  after, _ = run(before, 1)
  assert first["train/skipped"].dtype == jnp.int32 and not first["train/skipped"].any()
  assert_equal_bits(
    (after.params, after.opt_state["adam"]), (before.params, before.opt_state["adam"])
  )
  assert (
    int(after.step) == 7
    and int(after.opt_state["lr"].count) == 7
    and int(after.opt_state["adam"].count) == 6
  )
  left_out = before.replace(
    step=before.step + 1, opt_state=after.opt_state | {"adam": before.opt_state["adam"]}
  )
  assert_equal_bits(run(after, 5), run(left_out, 5))
  whole, metrics = run(initial_state(experiment), STEPS)
  assert_equal_bits(whole, run(after, 5)[0])
  assert np.flatnonzero(metrics["train/skipped"]).tolist() == [6]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(whole))


def test_row_14_a_loss_is_a_spike_from_the_limit_on():
  """By the mean and the variance of the losses before, among which it counts then.

  What is left of the metrics is zero.
  """
  experiment = names_experiment(optimizer__skip_spikes=6.0)
  run, start = compile_steps(experiment), initial_state(experiment)
  loss = run(start, 1)[1]["train/loss"][0]
  for z, skipped in ((5.99, 0), (6.01, 1)):
    deviation = math.sqrt(0.04 + spikes.MIN_DEVIATION**2)
    stats = spikes.LossStats(jnp.int32(100), loss - z * deviation, jnp.float32(0.04))
    state = start.replace(opt_state=start.opt_state | {"spikes": stats})
    after, metrics = run(state, 1)
    assert metrics["train/skipped"].tolist() == [skipped] + [0] * (STEPS - 1)
    assert int(after.opt_state["adam"].count) == 1 - skipped
    assert metrics["train/loss"].tolist() == [float(loss)] + [0] * (STEPS - 1)
    observed = spikes.observe(spikes.LossStats(*map(float, stats)), float(loss))
    np.testing.assert_allclose(after.opt_state["spikes"], observed, rtol=1e-4)


@pytest.mark.slow
def test_row_14_every_way_to_compute_skips_the_same(monkeypatch):
  """As on a CPU, and by the definition: the same but for rounding."""
  experiment = names_experiment(**SETTINGS, model__num_layers=2, data__batch_size=16)
  bad_numbers.plant(monkeypatch.setattr, "nan in one gradient", [3, 4, 9])
  found = []
  for tricks in (True, False):
    chosen = resolve_compute(change(experiment, {"compute.tricks": tricks}), CPU)
    assert chosen.compute.group_documents is tricks
    assert chosen.compute.select == ("ordered" if tricks else "plain")
    state = arrange_blocks(initial_state(chosen), chosen.compute.layers)
    state, metrics = compile_steps(chosen, choose_step_options(chosen) or QUICK)(state, STEPS)
    assert np.flatnonzero(metrics["train/skipped"]).tolist() == [2, 3, 8]
    found.append(stack_blocks(state.params))
  compare("tricks, float32, updates skipped", found[1], found[0], 1e-4)


@pytest.mark.parametrize("ok", [True, False])
def test_row_14_selected_one_after_the_other(ok):
  """Whatever the values: nothing that a leaf holds decides about the next one."""
  values = [0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf]

  def state(values, second, count):
    mu = {f"{i}": jnp.array([v, second]) for i, v in enumerate(values)}
    nu = {f"{i}": jnp.array([abs(v), second]) for i, v in enumerate(values)}
    return adam.AdamState(jnp.int32(count), mu, nu)

  new, old = state(values, 1.0, 3), state(values[::-1], 2.0, 0)
  for select in (adam.select_in_order, adam.select_tree):
    for way in (select, jax.jit(select)):
      assert_equal_bits(way(jnp.bool_(ok), new, old), new if ok else old)


@pytest.mark.parametrize("select", [pytest.param("plain", marks=pytest.mark.slow), "ordered"])
@pytest.mark.parametrize("ok", [True, False])
def test_row_14_what_the_optimizer_keeps_depends_on_nothing_but_ok(ok, select):
  """Whatever the gradients are."""
  values = [0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf]
  experiment = names_experiment(
    optimizer__weight_decay=0.0, optimizer__clip_norm=None, compute__select=select
  )
  optimizer = make_optimizer(experiment)
  params = initial_state(experiment).params
  names = leaves_by_name(params)
  loss = jnp.float32(2.0)
  sound = jax.tree.map(lambda p: jnp.linspace(-1, 1, p.size).reshape(p.shape), params)
  _, before = optimizer.update(
    sound, optimizer.init(params), params, value=loss, ok=jnp.bool_(True)
  )
  numbers = iter(range(len(names)))
  bad = jax.tree.map(lambda p: jnp.full(p.shape, values[next(numbers) % len(values)]), params)
  _, after = optimizer.update(bad, before, params, value=loss, ok=jnp.bool_(ok))
  assert len(names) >= len(values) and int(after["lr"].count) == 2
  if not ok:
    assert_equal_bits(after["adam"], before["adam"])
    return
  assert int(after["adam"].count) == 2
  for moment in (after["adam"].mu, after["adam"].nu):
    wrong = [name for name, leaf in leaves_by_name(moment).items() if not np.isfinite(leaf).all()]
    assert wrong == [
      name for i, name in enumerate(names) if not math.isfinite(values[i % len(values)])
    ]


# --- Spikes ---


def test_row_14_without_a_limit_nothing_is_kept_about_losses():
  assert "spikes" not in initial_state(names_experiment()).opt_state


@pytest.mark.slow
def test_row_14_losses_that_are_not_finite_are_not_observed(monkeypatch):
  """Neither NaN nor what overflows when squared: the next spike is found as if they had not
  been.
  """
  experiment = names_experiment(optimizer__skip_spikes=4.0)
  bad_numbers.plant(monkeypatch.setattr, "infinite loss", [5, 6])
  state, metrics = compile_steps(experiment)(initial_state(experiment), STEPS)
  stats = state.opt_state["spikes"]
  assert int(stats.count) == STEPS - 2 and np.isfinite(stats.mean) and np.isfinite(stats.variance)
  sound = np.delete(np.asarray(metrics["train/loss"], np.float64), [4, 5])
  weights = 0.99 ** np.arange(len(sound))[::-1]
  assert float(stats.mean) == pytest.approx(np.average(sound, weights=weights), rel=1e-5)


# --- Whole runs ---


def run_words(workdir, folder, **changes):
  path = folder / "words.txt"
  path.write_text("".join(f"{word}\n" for word in small_runs.WORDS), encoding="utf-8")
  base = {
    "data.path": str(path),
    "train.steps": 60,
    "optimizer.decay_steps": 60,
    "data.heldout_fraction": 0.2,
  }
  experiment = change(
    load_experiment("names"), base | {k.replace("__", "."): v for k, v in changes.items()}
  )
  with small_runs.compiled_quickly():
    return train.train_run(plan_run(experiment, workdir=workdir, name="words"))


def without(rows, name):
  return [{k: v for k, v in row.items() if k != name} for row in rows]


@pytest.mark.slow
def test_row_14_a_run_with_skipped_updates_stops_and_goes_on_bit_by_bit(
  monkeypatch, tmp_path, capfd
):
  """Stopped in a series, before and after it: state, losses and the count are those of the run that
  was not stopped.
  """
  bad_numbers.plant(monkeypatch.setattr, "nan", [10, *range(20, 26)])
  straight = run_words(tmp_path / "straight", tmp_path)
  err = capfd.readouterr().err
  assert (
    err.count("the update is skipped") <= 2
    and "step 10: the loss is nan: the update is skipped" in err
  )
  for steps in (9, 10, 22, 26, 60):
    resumed = run_words(tmp_path / "resumed", tmp_path, train__steps=steps)
  assert_equal_bits(straight.state, resumed.state)
  assert straight.losses.tobytes() == resumed.losses.tobytes()
  # Each start evaluates at its own end too.
  logs = [
    [row for row in small_runs.read_untimed(tmp_path / name) if "train/loss" in row]
    for name in ("straight", "resumed")
  ]
  assert json.dumps(logs[0]) == json.dumps(logs[1])
  assert [row["step"] for row in logs[0] if row.get("train/skipped")] == [10, *range(20, 26)]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_row_14_skipped_spikes_stop_and_go_on_bit_by_bit(monkeypatch, tmp_path, devices):
  """What is known of the losses is saved with the moments, on any number of devices."""
  bad_numbers.plant(monkeypatch.setattr, "loss of 50", [30, 45])
  changes = {"optimizer__skip_spikes": 6.0, "data__batch_size": 8, "mesh__data": devices}
  straight = run_words(tmp_path / "straight", tmp_path, **changes)
  for steps in (29, 45, 60):
    resumed = run_words(tmp_path / "resumed", tmp_path, train__steps=steps, **changes)
  assert_equal_bits(straight.state, resumed.state)
  assert all(len(x.sharding.device_set) == devices for x in straight.state.opt_state["spikes"])
  rows = read_jsonl(tmp_path / "resumed" / "metrics.jsonl")
  assert [row["step"] for row in rows if row.get("train/skipped")] == [30, 45]
  assert "train_state/opt_state.spikes.mean" in children.bits(tmp_path / "resumed").leaves


@pytest.mark.slow
def test_row_14_so_many_in_a_row_stop_the_run(monkeypatch, tmp_path):
  """The error names the step and says that it is finite now.

  What is saved is the state of before the series.
  """
  bad_numbers.plant(monkeypatch.setattr, "nan", range(20, 61))
  from jgpt.errors import TrainingError

  with pytest.raises(
    TrainingError, match=r"the update of step 20 was skipped.*finite now.*checkpoint \d+ in "
  ) as error:
    run_words(tmp_path / "run", tmp_path, train__max_consecutive_skips=5)
  assert error.value.status == 1
  good = run_words(None, tmp_path, train__steps=19)
  assert_equal_bits(open_run(tmp_path / "run").params, good.params)


# --- Processes ---


@pytest.fixture
def folder(tmp_path):
  children.write_texts(tmp_path)
  return tmp_path


@pytest.mark.slow
def test_row_14_a_rate_that_destroys_the_model_ends_with_one_line(folder):
  """Nothing is planted: the parameters of step 2 are so large that its gradient is not a number."""
  words = children.arguments(
    "names", "run", optimizer__peak_lr=1e20, optimizer__schedule="constant", train__steps=500
  )
  child = children.run("jgpt.run", *words, cwd=folder)
  assert child.status == 1, child.err
  (error,) = [line for line in child.err.splitlines() if line.startswith("error: ")]
  assert (
    "step 2 " in error
    and "blocks/w_qkv" in error
    and "Try " in error
    and "Traceback" not in child.err
  )
  assert "step 2: the norm of the gradient is nan: the update is skipped" in child.err
  saved = children.steps_there(folder / "run")[-1]
  assert f"checkpoint {saved}" in error and not children.nothing_half_done(folder / "run")
  bits = children.read_leaves(folder / "run" / "checkpoints" / str(saved))
  assert all(np.isfinite(x).all() for x in bits.values())
  assert (
    int(bits["train_state/step"]) == saved and int(bits["train_state/opt_state.adam.count"]) == 1
  )
  rows = read_jsonl(folder / "run" / "metrics.jsonl")
  assert [row["train/skipped"] for row in rows if "train/loss" in row] == [0] + [1] * (saved - 1)
  # The same command tries once more, and says the same.
  again = children.run("jgpt.run", *words, cwd=folder)
  assert again.status == 1 and "step 2 " in again.err.splitlines()[-1], again.err


@pytest.mark.slow
def test_row_14_one_bad_step_in_a_process_is_a_line_and_a_row(folder):
  words = children.arguments("bytes", "run", train__steps=20, train__eval_every=None)
  child = children.run("bad_numbers", "infinite gradient@8", "jgpt.run", *words, cwd=folder)
  assert child.status == 0, child.err
  assert "step 8: the norm of the gradient is " in child.err and child.err.count("skipped") == 1
  rows = read_jsonl(folder / "run" / "metrics.jsonl")
  assert [row["step"] for row in rows if row.get("train/skipped")] == [8]
  leaves = children.read_leaves(folder / "run" / "checkpoints" / "20")
  assert (
    all(np.isfinite(x).all() for x in leaves.values())
    and int(leaves["train_state/opt_state.adam.count"]) == 19
  )
