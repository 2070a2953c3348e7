"""The host loop: resuming, sampling, devices, saving; each as a property of whole runs."""

import json
import os
import signal
import threading

import jax
import numpy as np
import pytest

from jgpt import checkpoint, sharding, train
from jgpt.config import UserError, load_experiment
from jgpt.metrics import read_jsonl
from jgpt.settings import change, settings

CHANGES = {"train.steps": 60, "train.log_every": 20, "data.heldout_fraction": 0.1}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  """A text of 40 made-up words."""
  path = tmp_path_factory.mktemp("data") / "words.txt"
  path.write_text("".join(f"{a}{b}{a}{c}\n" for a in "abcd" for b in "xyzw" for c in ("", "q", "rs")), encoding="utf-8")
  return path


@pytest.fixture
def experiment(words):
  return change(load_experiment("names"), CHANGES | {"data.path": str(words)})


def equal_bits(a, b) -> bool:
  return all(
    x.tobytes() == y.tobytes() for x, y in zip(map(np.asarray, jax.tree.leaves(a)), jax.tree.leaves(b), strict=True)
  )


def run(experiment, workdir=None, **options):
  return train.train(train.plan(experiment, workdir=workdir, name="words"), **options)


def test_the_same_run_twice_is_equal_bit_by_bit(experiment):
  a, b = run(experiment), run(experiment)
  assert equal_bits(a.state, b.state)
  assert a.losses.tobytes() == b.losses.tobytes()


@pytest.mark.parametrize("stops", [[1, 60], [20, 37, 60], [59, 60]])
def test_stopping_and_resuming_changes_no_bit(experiment, tmp_path, stops):
  """Parameters, moments, step and every logged loss are those of the run that was never interrupted."""
  straight = run(experiment, tmp_path / "straight")
  held = change(experiment, {"optimizer.decay_steps": 60})
  for steps in stops:
    resumed = run(change(held, {"train.steps": steps}), tmp_path / "resumed")
  assert equal_bits(straight.state, resumed.state)
  assert straight.losses.tobytes() == resumed.losses.tobytes()
  rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("straight", "resumed")]
  assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == list(range(1, 61))


def test_rows_after_the_restored_step_are_written_anew(experiment, tmp_path):
  run(change(experiment, {"train.steps": 40}), tmp_path)
  with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:  # as if killed before the next checkpoint
    file.write('{"step": 41, "train/loss": 99}\n{"step": 42, "tra')
  result = run(change(experiment, {"train.steps": 40, "train.log_every": 7}), tmp_path)
  assert len(result.losses) == 40 and result.losses.max() < 5


class Recorder:
  """A writer that keeps what it gets."""

  def __init__(self):
    self.chunks, self.closed = [], 0

  def write(self, chunk):
    self.chunks.append(chunk)

  def close(self):
    self.closed += 1


def test_sampling_during_training_changes_no_bit(experiment):
  recorder = Recorder()
  plain, sampled = run(experiment), run(experiment, writers=[recorder], sample_at=lambda step: step % 20 == 0)
  assert equal_bits(plain.state, sampled.state)
  assert [c.sample is not None for c in recorder.chunks] == [c.step % 20 == 0 for c in recorder.chunks]


@pytest.mark.parametrize(("log_every", "save_every"), [(1, None), (7, 5), (60, 25), (1000, None)])
def test_call_lengths_change_no_bit_and_every_step_is_reported_once(experiment, tmp_path, log_every, save_every):
  recorder = Recorder()
  base = run(experiment)
  changed = change(experiment, {"train.log_every": log_every, "train.save_every": save_every})
  result = run(changed, tmp_path, writers=[recorder])
  assert equal_bits(base.state, result.state)
  assert recorder.chunks[0].step == 1 and recorder.closed == 1
  np.testing.assert_array_equal(np.concatenate([c.metrics["train/loss"] for c in recorder.chunks]), base.losses)


def test_the_rate_is_that_of_the_step(experiment):
  recorder = Recorder()
  run(change(experiment, {"train.steps": 1000}), writers=[recorder])
  rates = np.concatenate([c.metrics["train/lr"] for c in recorder.chunks])
  np.testing.assert_allclose(rates[[0, 500, 999]], [0.01, 0.005, 0.00001], rtol=1e-3)
  np.testing.assert_allclose(rates, 0.01 * (1 - np.arange(1000) / 1000), rtol=1e-2)


def test_eight_devices_train_as_one(experiment):
  """At batch 16, losses and parameters of 8 virtual devices are those of one within 1e-5 relative, 20 steps."""
  base = change(experiment, {"data.batch_size": 16, "train.steps": 20, "optimizer.decay_steps": 1000})
  one, eight = run(change(base, {"mesh.data": 1})), run(change(base, {"mesh.data": 8}))
  assert len(eight.params["tok_embed"].sharding.device_set) == 8
  np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * float(abs(a).max()))


def test_a_batch_is_divided_over_the_devices(experiment):
  """The placement is real: each device gets its rows of the batch, and the state lies on all of them."""
  plan = train.plan(change(experiment, {"data.batch_size": 16, "mesh.data": 4}))
  mesh = sharding.make_mesh(plan.experiment, jax.devices())
  assert sharding.batch_sharding(mesh).shard_shape((16, 16)) == (4, 16)
  state, run_steps, corpus = train.compile_steps(plan)
  assert all(len(x.sharding.device_set) == 4 for x in jax.tree.leaves((state, corpus)))
  assert "all-reduce" in run_steps.as_text()  # the gradient is summed over devices


def test_a_run_resumes_on_another_number_of_devices(experiment, tmp_path):
  base = change(experiment, {"data.batch_size": 8, "optimizer.decay_steps": 60})
  straight = run(change(base, {"mesh.data": 1}))
  run(change(base, {"mesh.data": 1, "train.steps": 30}), tmp_path)
  resumed = run(change(base, {"mesh.data": 8}), tmp_path)
  np.testing.assert_allclose(resumed.losses, straight.losses, rtol=1e-4)


@pytest.mark.parametrize(("batch_size", "nearest"), [(12, "8 or 16"), (4, "8")])
def test_a_batch_that_devices_do_not_divide_is_refused(experiment, batch_size, nearest):
  base = change(experiment, {"data.batch_size": batch_size, "mesh.data": None})
  with pytest.raises(UserError, match=f"multiple of the 8 devices; nearest: {nearest}"):
    run(base)


def test_another_identity_in_a_folder_is_refused_naming_the_fields(experiment, tmp_path):
  run(experiment, tmp_path)
  with pytest.raises(
    UserError, match=r"optimizer.peak_lr is 0.01 there and 0.02 here, train.seed is 0 there and 3 here\. .*--fresh"
  ):
    run(change(experiment, {"optimizer.peak_lr": 0.02, "train.seed": 3}), tmp_path)
  assert settings(checkpoint.read_run_files(tmp_path).experiment)["optimizer.peak_lr"] == 0.01


def test_changed_data_is_refused_and_the_recorded_data_is_used(experiment, tmp_path, monkeypatch):
  """A source's text that the run began with is found again by its digest, not taken from the first place that has one."""
  folder = tmp_path / "data"
  folder.mkdir()
  monkeypatch.setenv("JGPT_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.setattr("jgpt.download._fetch_or_error", lambda source: OSError("no network"))
  monkeypatch.delenv("JGPT_DATA_DIR", raising=False)
  base = change(experiment, {"data.path": None, "train.steps": 20})
  first = train.plan(base, workdir=tmp_path / "run")
  assert first.data.text.kind == "bundled"
  train.train(first)
  (folder / "names.txt").write_text("anna\nbob\n", encoding="utf-8")
  monkeypatch.setenv("JGPT_DATA_DIR", str(folder))
  assert train.plan(base, workdir=tmp_path / "run").data.text.kind == "bundled"
  assert train.plan(base).data.text.kind == "JGPT_DATA_DIR"


def test_more_steps_at_a_rate_of_zero_are_refused(experiment, tmp_path):
  run(experiment, tmp_path)
  with pytest.raises(UserError, match=r"--set optimizer.decay_steps=100"):
    run(change(experiment, {"train.steps": 100}), tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_last_completed_step(experiment, tmp_path, number):
  """The signal stops after the call under way; the same plan then goes on to the bits of the uninterrupted run."""

  class Interrupter(Recorder):
    def write(self, chunk):
      super().write(chunk)
      if chunk.step == 20:
        os.kill(os.getpid(), number)

  handler = signal.getsignal(number)
  stopped = run(experiment, tmp_path, writers=[Interrupter()])
  assert signal.getsignal(number) is handler
  assert stopped.signal == number and stopped.heldout_loss is None
  assert 20 <= int(stopped.state.step) < 60 and checkpoint.latest_step(tmp_path) == int(stopped.state.step)
  assert equal_bits(run(experiment, tmp_path).state, run(experiment).state)


def test_training_works_outside_the_main_thread(experiment):
  results = []
  thread = threading.Thread(target=lambda: results.append(run(experiment)))
  thread.start()
  thread.join()
  assert int(results[0].state.step) == 60


def test_zero_steps_make_a_run_folder_that_can_be_sampled(experiment, tmp_path):
  result = run(change(experiment, {"train.steps": 0}), tmp_path)
  assert len(result.losses) == 0 and checkpoint.load_run(tmp_path).step == 0


def test_the_folder_alone_is_enough_to_sample(experiment, tmp_path, words):
  result = run(experiment, tmp_path)
  loaded = checkpoint.load_run(tmp_path)
  assert equal_bits(loaded.params, result.params)
  assert loaded.tokenizer == result.tokenizer and settings(loaded.experiment) == settings(result.experiment)
  data = json.loads((tmp_path / "experiment.json").read_text())["data"]
  assert data["kind"] == "path" and data["location"] == str(words) and len(data["sha256"]) == 64


def test_heldout_loss_is_the_mean_over_all_heldout_tokens(experiment):
  """Equal to the token-weighted mean of documents taken one at a time."""
  from jgpt.data import Batch
  from jgpt.step import loss_fn

  plan = train.plan(experiment)
  result = train.train(plan)
  tokens, lengths = plan.data.heldout
  weights = (np.arange(16)[None] < lengths[:, None]).astype(np.float32)
  losses = [
    float(loss_fn(result.params, Batch(t[None, :-1], t[None, 1:], w[None]), plan.experiment.model))
    for t, w in zip(tokens, weights, strict=True)
  ]
  assert result.heldout_tokens == lengths.sum()
  assert result.heldout_loss == pytest.approx(np.average(losses, weights=lengths), rel=1e-5)


def test_one_batch_can_be_learnt_by_heart(experiment):
  """The overfit-one-batch check on one document: the loss falls under 0.1 nats per token."""
  changes = {"data.num_batches": 1, "train.steps": 300}
  assert run(change(experiment, changes)).losses[-50:].mean() < 0.1


def test_a_writer_that_fails_does_not_end_the_training(experiment, tmp_path, capfd):
  class Full(Recorder):
    def write(self, chunk):
      raise OSError(28, "No space left on device")

  result = run(experiment, tmp_path, writers=[Full()])
  assert int(result.state.step) == 60 and checkpoint.latest_step(tmp_path) == 60
  assert "Full stopped at step 1 (No space left on device); training goes on" in capfd.readouterr().err


def test_checkpoints_that_nothing_describes_are_refused(experiment, tmp_path):
  run(experiment, tmp_path)
  (tmp_path / "experiment.json").unlink()
  with pytest.raises(UserError, match=r"no experiment\.json"):
    run(experiment, tmp_path)


def test_the_steady_loop_moves_nothing_unasked(experiment):
  """After the first call nothing moves between host and device but what is asked for."""
  plan = train.plan(experiment)
  state, run_steps, corpus = train.compile_steps(plan)
  num = jax.device_put(np.int32(3), sharding.replicated(sharding.make_mesh(plan.experiment, jax.devices())))
  state, _ = run_steps(corpus, state, num)
  with jax.transfer_guard("disallow"):
    for _ in range(3):
      state, _ = run_steps(corpus, state, num)
  assert int(state.step) == 12
