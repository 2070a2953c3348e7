"""The host loop: resuming, sampling, devices, saving; each as a property of whole runs."""

import json
import os
import shutil
import signal
import threading
from unittest.mock import Mock

import jax
import numpy as np
import pytest
import small_runs
from equivalence import QUICK

from jgpt import program, sharding, train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, list_settings
from jgpt.data.download import DownloadError
from jgpt.errors import UserError
from jgpt.evaluation import evaluate_loss
from jgpt.plan import plan_run
from jgpt.runs import manifest
from jgpt.runs.folder import read_run_files
from jgpt.runs.open import open_run

pytestmark = pytest.mark.usefixtures("quick")

CHANGES = {
  "train.steps": 60,
  "train.log_every": 20,
  "train.eval_every": None,
  "data.heldout_fraction": 0.1,
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  """A text of 40 made-up words."""
  path = tmp_path_factory.mktemp("data") / "words.txt"
  path.write_text(
    "".join(f"{a}{b}{a}{c}\n" for a in "abcd" for b in "xyzw" for c in ("", "q", "rs")),
    encoding="utf-8",
  )
  return path


@pytest.fixture
def experiment(words):
  return change(load_experiment("names"), CHANGES | {"data.path": str(words)})


def equal_bits(a, b) -> bool:
  return all(
    x.tobytes() == y.tobytes()
    for x, y in zip(map(np.asarray, jax.tree.leaves(a)), jax.tree.leaves(b), strict=True)
  )


def run(experiment, workdir=None, **options):
  return train.train_run(plan_run(experiment, workdir=workdir, name="words"), **options)


def test_the_same_run_twice_is_equal_bit_by_bit(experiment):
  a, b = run(experiment), run(experiment)
  assert equal_bits(a.state, b.state)
  assert a.losses.tobytes() == b.losses.tobytes()


@pytest.mark.parametrize(
  "stops", [[1, 60], [20, 37, 60], pytest.param([59, 60], marks=pytest.mark.slow)]
)
def test_stopping_and_resuming_changes_no_bit(experiment, tmp_path, stops):
  """Parameters, moments, step and every logged loss are those of the run that was never
  interrupted.
  """
  straight = run(experiment, tmp_path / "straight")
  held = change(experiment, {"optimizer.decay_steps": 60})
  for steps in stops:
    resumed = run(change(held, {"train.steps": steps}), tmp_path / "resumed")
  assert equal_bits(straight.state, resumed.state)
  assert straight.losses.tobytes() == resumed.losses.tobytes()
  rows = [small_runs.read_untimed(tmp_path / name) for name in ("straight", "resumed")]
  assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [*range(1, 61), 60]


def test_rows_after_the_restored_step_are_written_anew(experiment, tmp_path):
  run(change(experiment, {"train.steps": 40}), tmp_path)
  with open(
    tmp_path / "metrics.jsonl", "a", encoding="utf-8"
  ) as file:  # as if killed before the next checkpoint
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


@pytest.mark.slow
def test_sampling_during_training_changes_no_bit(experiment):
  recorder = Recorder()
  plain, sampled = (
    run(experiment),
    run(experiment, writers=[recorder], sample_at=lambda step: step % 20 == 0),
  )
  assert equal_bits(plain.state, sampled.state)
  assert [bool(c.texts) for c in recorder.chunks] == [c.step % 20 == 0 for c in recorder.chunks]


@pytest.mark.slow
@pytest.mark.parametrize(("log_every", "save_every"), [(1, None), (7, 5), (60, 25), (1000, None)])
def test_call_lengths_change_no_bit_and_every_step_is_reported_once(
  experiment, tmp_path, log_every, save_every
):
  recorder = Recorder()
  base = run(experiment)
  changed = change(experiment, {"train.log_every": log_every, "train.save_every": save_every})
  result = run(changed, tmp_path, writers=[recorder])
  assert equal_bits(base.state, result.state)
  assert recorder.chunks[0].step == 1 and recorder.closed == 1
  np.testing.assert_array_equal(
    np.concatenate([c.metrics["train/loss"] for c in recorder.chunks]), base.losses
  )


def test_the_rate_is_that_of_the_step(experiment):
  recorder = Recorder()
  run(change(experiment, {"train.steps": 1000}), writers=[recorder])
  rates = np.concatenate([c.metrics["train/lr"] for c in recorder.chunks])
  np.testing.assert_allclose(rates, 0.01 * (1 - np.arange(1000) / 1000), rtol=1e-6, atol=2e-9)


@pytest.mark.slow
def test_eight_devices_train_as_one(experiment):
  """At batch 16, losses and parameters of 8 virtual devices are those of one within 1e-5 relative,
  20 steps.
  """
  base = change(
    experiment, {"data.batch_size": 16, "train.steps": 20, "optimizer.decay_steps": 1000}
  )
  one, eight = run(change(base, {"mesh.data": 1})), run(change(base, {"mesh.data": 8}))
  assert len(eight.params["tok_embed"].sharding.device_set) == 8
  np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * float(abs(a).max()))


def test_a_batch_is_divided_over_the_devices(experiment):
  """The placement is real: each device gets its rows of the batch, and the state lies on all of
  them.
  """
  plan = plan_run(change(experiment, {"data.batch_size": 16, "mesh.data": 4}))
  mesh = sharding.make_mesh(plan.experiment, jax.devices())
  assert sharding.batch_sharding(mesh).shard_shape((16, 16)) == (4, 16)
  made = program.compile_program(plan.experiment, jax.devices(), plan.data)
  state, run_steps, corpus = made.state, made.run_steps, made.feed.corpus_at(0)
  assert all(len(x.sharding.device_set) == 4 for x in jax.tree.leaves((state, corpus)))
  assert "all-reduce" in run_steps.as_text()  # the gradient is summed over devices


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_devices(experiment, tmp_path):
  base = change(experiment, {"data.batch_size": 8, "optimizer.decay_steps": 60})
  straight = run(change(base, {"mesh.data": 1}))
  run(change(base, {"mesh.data": 1, "train.steps": 30}), tmp_path)
  resumed = run(change(base, {"mesh.data": 8}), tmp_path)
  np.testing.assert_allclose(resumed.losses, straight.losses, rtol=1e-4)


@pytest.mark.parametrize(("batch_size", "nearest"), [(12, "8 or 16"), (4, "8")])
def test_a_batch_that_devices_do_not_divide_is_refused(experiment, batch_size, nearest):
  base = change(experiment, {"data.batch_size": batch_size, "mesh.data": -1})
  with pytest.raises(UserError, match=f"the 8 devices that it is divided over; nearest: {nearest}"):
    run(base)


def test_another_identity_in_a_folder_is_refused_naming_the_fields(experiment, tmp_path):
  run(experiment, tmp_path)
  with pytest.raises(
    UserError,
    match=r"optimizer.peak_lr is 0.01 there and 0.02 here, train.seed is 0 there and 3 here\. "
    r".*--fresh",
  ):
    run(change(experiment, {"optimizer.peak_lr": 0.02, "train.seed": 3}), tmp_path)
  assert list_settings(read_run_files(tmp_path).experiment)["optimizer.peak_lr"] == 0.01


def test_changed_data_is_refused_and_the_recorded_data_is_used(experiment, tmp_path, monkeypatch):
  """A source's text that the run began with is found again by its digest, not taken from the first
  place that has one.
  """
  folder = tmp_path / "data"
  folder.mkdir()
  monkeypatch.setenv("JGPT_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.setattr("jgpt.data.download.download", Mock(side_effect=DownloadError("no network")))
  monkeypatch.delenv("JGPT_DATA_DIR", raising=False)
  base = change(experiment, {"data.path": None, "train.steps": 20})
  first = plan_run(base, workdir=tmp_path / "run")
  assert first.data.text.kind == "bundled"
  train.train_run(first)
  (folder / "names.txt").write_text("anna\nbob\n", encoding="utf-8")
  monkeypatch.setenv("JGPT_DATA_DIR", str(folder))
  assert plan_run(base, workdir=tmp_path / "run").data.text.kind == "bundled"
  assert plan_run(base).data.text.kind == "JGPT_DATA_DIR"


def test_more_steps_at_a_rate_of_zero_are_refused(experiment, tmp_path):
  """Of a finished run, of one that stopped before its end, and of one without a checkpoint."""
  experiment = change(experiment, {"train.save_every": 20})
  run(experiment, tmp_path)
  for words in ("is at step 60. Begin", "is at step 40. Keep train.steps=60, or begin", "--fresh"):
    with pytest.raises(UserError, match=rf"at a learning rate of 0: .*planned for 60.*{words}"):
      plan_run(change(experiment, {"train.steps": 100}), workdir=tmp_path)
    assert words == "--fresh" or plan_run(experiment, workdir=tmp_path).start_step
    for step in manifest.list_steps(tmp_path)[-1:]:
      shutil.rmtree(tmp_path / "checkpoints" / str(step))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_last_completed_step(experiment, tmp_path, number):
  """The signal stops after the call under way.

  The same plan then goes on to the bits of the uninterrupted run.
  """

  class Interrupter(Recorder):
    def write(self, chunk):
      super().write(chunk)
      if chunk.step == 20:
        os.kill(os.getpid(), number)

  handler = signal.getsignal(number)
  stopped = run(experiment, tmp_path, writers=[Interrupter()])
  assert signal.getsignal(number) is handler
  assert stopped.signal == number and stopped.heldout_loss is None
  assert 20 <= int(stopped.state.step) < 60 and manifest.find_step(tmp_path, None) == int(
    stopped.state.step
  )
  assert equal_bits(run(experiment, tmp_path).state, run(experiment).state)


def test_checkpoints_by_the_clock_change_no_bit(experiment, tmp_path):
  """One is due at each look of the host, and each is kept: after the first update, then
  every 20.
  """
  often = change(experiment, {"train.save_every_seconds": 0.0, "train.keep_latest": 100})
  assert equal_bits(run(often, tmp_path).state, run(experiment).state)
  assert manifest.list_steps(tmp_path) == [1, 20, 40, 60]


@pytest.mark.slow
def test_calls_are_short_enough_to_hear_a_signal(experiment, tmp_path, monkeypatch):
  """However many steps are due: what is computed does not depend on it."""
  monkeypatch.setattr(train, "SECONDS_PER_CALL", 0.0)
  recorder = Recorder()
  assert equal_bits(run(experiment, writers=[recorder]).state, run(experiment).state)
  assert [chunk.step for chunk in recorder.chunks] == [*range(1, 61)]


@pytest.mark.slow
def test_an_evaluation_that_a_stop_cut_short_is_made_when_the_run_goes_on(experiment, tmp_path):
  """Its row stands where it stands in the run that was not stopped."""
  evaluated = change(experiment, {"train.eval_every": 20, "train.save_every": 20})
  run(evaluated, tmp_path / "straight")
  run(change(evaluated, {"train.steps": 40, "optimizer.decay_steps": 60}), tmp_path / "stopped")
  log = tmp_path / "stopped" / "metrics.jsonl"
  lines = log.read_text().splitlines(keepends=True)
  ends = [json.loads(lines.pop()) for _ in range(2)]  # the evaluation's, and the end's
  assert [(row["step"], "heldout/loss" in row) for row in ends] == 2 * [(40, True)]
  log.write_text("".join(lines))
  run(change(evaluated, {"optimizer.decay_steps": 60}), tmp_path / "stopped")
  straight = (tmp_path / "straight" / "metrics.jsonl").read_bytes()
  assert small_runs.drop_times(log.read_bytes()) == small_runs.drop_times(straight)


def test_training_works_outside_the_main_thread(experiment):
  results = []
  thread = threading.Thread(target=lambda: results.append(run(experiment)))
  thread.start()
  thread.join()
  assert int(results[0].state.step) == 60


def test_zero_steps_make_a_run_folder_that_can_be_sampled(experiment, tmp_path):
  result = run(change(experiment, {"train.steps": 0}), tmp_path)
  assert len(result.losses) == 0 and open_run(tmp_path).step == 0


@pytest.mark.slow
def test_the_folder_alone_is_enough_to_sample(experiment, tmp_path, words):
  result = run(experiment, tmp_path)
  loaded = open_run(tmp_path)
  assert equal_bits(loaded.params, result.params)
  assert loaded.tokenizer == result.tokenizer and list_settings(loaded.experiment) == list_settings(
    result.experiment
  )
  data = json.loads((tmp_path / "experiment.json").read_text())["data"]
  assert data["kind"] == "path" and data["location"] == str(words) and len(data["sha256"]) == 64


def test_heldout_loss_is_the_mean_over_all_heldout_tokens(experiment):
  """Equal to the token-weighted mean of documents taken one at a time, for the parameters at the
  end: the last evaluation on the way was ten updates earlier.
  """
  from jgpt.batches import Batch
  from jgpt.step import loss_fn

  plan = plan_run(change(experiment, {"train.eval_every": 25}))
  result = train.train_run(plan)
  tokens, lengths = plan.data.heldout
  weights = (np.arange(16)[None] < lengths[:, None]).astype(np.float32)
  losses = [
    float(loss_fn(result.params, Batch(t[None, :-1], t[None, 1:], w[None]), plan.experiment))
    for t, w in zip(tokens, weights, strict=True)
  ]
  assert result.heldout_tokens == lengths.sum()
  assert result.heldout_loss == pytest.approx(np.average(losses, weights=lengths), rel=1e-5)


@pytest.mark.slow
def test_the_loss_at_the_end_is_over_the_whole_heldout_part(experiment):
  """Also where the last evaluation on the way, after the same update, was over a sample: that of
  windows taken one at a time.
  """
  from jgpt.batches import Batch
  from jgpt.step import loss_fn

  changes = {"data.batching": "random", "data.batch_size": 2, "train.steps": 6}
  changes |= {"train.eval_every": 3, "train.eval_batches": 1, "data.seq_len": 8}
  changes |= {"train.log_every": 2}
  plan = plan_run(change(experiment, changes))
  result = train.train_run(plan)
  tokens, nats = plan.data.heldout.tokens, []
  loss_of = jax.jit(loss_fn, static_argnums=2, compiler_options=QUICK)
  for window in (tokens[i : i + 9] for i in range(0, len(tokens) - 1, 8)):
    weights = np.ones((1, len(window) - 1), np.float32)
    batch = Batch(window[None, :-1], window[None, 1:], weights)
    nats.append(float(loss_of(result.params, batch, result.experiment)) * weights.size)
  assert len(nats) > 2  # batches of two windows
  assert result.heldout_loss == pytest.approx(sum(nats) / (len(tokens) - 1), rel=1e-5)
  steps, sampled = zip(*result.heldout_losses, strict=True)
  assert steps == (0, 3, 6) and sampled[-1] != pytest.approx(result.heldout_loss, rel=1e-3)
  whole = evaluate_loss(result.params, plan.data.heldout, result.tokenizer, result.experiment)
  assert whole.loss_nats_per_token == pytest.approx(result.heldout_loss, rel=1e-6)
  assert result.heldout_tokens == whole.num_tokens == len(tokens) - 1
  assert whole.num_documents is None


def test_one_batch_can_be_learnt_by_heart(experiment):
  """The overfit-one-batch check on one document: the loss falls under 0.1 nats per token."""
  changes = {"data.num_batches": 1, "train.steps": 300}
  assert run(change(experiment, changes)).losses[-50:].mean() < 0.1


def test_a_writer_that_fails_does_not_end_the_training(experiment, tmp_path, capfd):
  class Full(Recorder):
    def write(self, chunk):
      raise OSError(28, "No space left on device")

  result = run(experiment, tmp_path, writers=[Full()])
  assert int(result.state.step) == 60 and manifest.find_step(tmp_path, None) == 60
  assert (
    "Full stopped at step 1 (No space left on device); training goes on" in capfd.readouterr().err
  )


def test_checkpoints_that_nothing_describes_are_refused(experiment, tmp_path):
  run(experiment, tmp_path)
  (tmp_path / "experiment.json").unlink()
  with pytest.raises(UserError, match=r"no experiment\.json"):
    run(experiment, tmp_path)


def test_the_steady_loop_moves_nothing_unasked(experiment):
  """After the first call nothing moves between host and device but what is asked for."""
  plan = plan_run(experiment)
  made = program.compile_program(plan.experiment, jax.devices(), plan.data)
  state, run_steps, corpus = made.state, made.run_steps, made.feed.corpus_at(0)
  num = jax.device_put(
    np.int32(3), sharding.replicated(sharding.make_mesh(plan.experiment, jax.devices()))
  )
  state, _ = run_steps(corpus, state, num)
  with jax.transfer_guard("disallow"):
    for _ in range(3):
      state, _ = run_steps(corpus, state, num)
  assert int(state.step) == 12


# --- Streams: epochs, evaluation, layouts ---


@pytest.fixture
def play(tmp_path):
  """A text of 1,200 characters."""
  path = tmp_path / "play.txt"
  path.write_text("Speak, speak. You are all resolved rather to die?\n" * 24, encoding="utf-8")
  return path


@pytest.fixture
def stream(play):
  """A two-layer model of bytes with dropout, trained in epochs of 9 updates."""
  changes = {
    "data.path": str(play),
    "data.batching": "epochs",
    "data.seq_len": 16,
    "data.batch_size": 8,
    "model.max_seq_len": 16,
    "model.num_layers": 2,
    "model.d_model": 16,
    "model.d_ff": 32,
    "optimizer.warmup_steps": 5,
    "train.steps": 27,
    "train.log_every": 4,
    "train.eval_every": None,
    "train.eval_batches": None,
    "sample.max_tokens": 10,
    "mesh.data": 1,
  }
  return change(load_experiment("shakespeare_bytes"), changes)


@pytest.mark.slow
def test_a_run_in_epochs_evaluates_samples_and_prints_by_epochs(stream, capsys):
  """Three epochs of 9 updates: evaluated before the first and after each, sampled after each but
  the last.
  """
  from jgpt.report.console import ConsoleWriter

  plan = plan_run(change(stream, {"train.steps": None, "train.epochs": 3}))
  assert (
    plan.epoch_steps == 9
    and plan.experiment.train.steps == 27
    and plan.experiment.optimizer.decay_steps == 27
  )
  recorder, console = (
    Recorder(),
    ConsoleWriter(steps=27, log_every=4, epoch_steps=9, terminal=False),
  )
  result = train.train_run(plan, writers=[recorder, console])
  assert [c.step for c in recorder.chunks if c.heldout_loss is not None] == [0, 9, 18, 27]
  assert [c.step for c in recorder.chunks if c.texts] == [9, 18]
  assert result.heldout_losses[-1] == (27, result.heldout_loss)
  lines = [
    line.partition(" | loss")[0]
    for line in capsys.readouterr().out.splitlines()
    if line.startswith("Epoch")
  ]
  assert lines[0].startswith("Epoch 1/3 | step 0/9 | held out")
  ends = [f"Epoch {e}/3 | step {s}/9" for e in (1, 2, 3) for s in (4, 8, 9)]
  assert lines[1:] == ["Epoch 1/3 | step 1/9", *ends]


@pytest.mark.slow
def test_epochs_stop_and_resume_at_their_edges(stream, tmp_path):
  """Around the end of an epoch the same windows come in the same order, with the same dropout:
  equal bits.
  """
  held = change(stream, {"train.eval_every": 9, "optimizer.decay_steps": 27})
  straight = run(held, tmp_path / "straight")
  for steps in (8, 9, 10, 18, 27):
    resumed = run(change(held, {"train.steps": steps}), tmp_path / "resumed")
  assert equal_bits(straight.state, resumed.state)
  assert straight.losses.tobytes() == resumed.losses.tobytes()
  assert {*straight.heldout_losses} <= {*resumed.heldout_losses}
  # A start evaluates after its last update too.
  assert [step for step, _ in resumed.heldout_losses] == [0, 8, 9, 10, 18, 27]


@pytest.mark.slow
def test_evaluating_and_sampling_change_no_bit(stream):
  plain = run(stream)
  often = run(
    change(stream, {"train.eval_every": 2, "train.eval_batches": 1, "train.sample_every": 3})
  )
  assert equal_bits(plain.state, often.state) and plain.heldout_loss == often.heldout_loss
  assert [step for step, _ in often.heldout_losses] == [*range(0, 27, 2), 27]


@pytest.mark.slow
def test_layers_scanned_or_written_out_are_one_run(stream, tmp_path):
  """The same losses and parameters but for rounding.

  A run goes on in the other layout from the same checkpoint.
  """
  changes = {"model.dropout": 0.1, "optimizer.decay_steps": 27}
  written, scanned = (
    change(stream, changes | {"compute.layers": way}) for way in ("unroll", "scan")
  )
  a, b = run(written), run(scanned)
  assert isinstance(a.state.params["blocks"], list) and isinstance(b.state.params["blocks"], dict)
  np.testing.assert_allclose(a.losses, b.losses, rtol=1e-5)
  assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
  run(change(written, {"train.steps": 13}), tmp_path)
  np.testing.assert_allclose(run(scanned, tmp_path).losses, b.losses, rtol=1e-5)
  assert open_run(tmp_path).params["blocks"]["w_up"].shape == (2, 16, 32)


@pytest.mark.slow
def test_eight_devices_drop_out_the_same(stream):
  """What is dropped out is a function of the step, not of how the batch is divided."""
  one, eight = (run(change(stream, {"mesh.data": n, "train.steps": 9})) for n in (1, 8))
  np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-5)


@pytest.mark.slow
def test_the_whole_heldout_part_is_evaluated_window_by_window(stream):
  from jgpt.batches import Batch
  from jgpt.step import loss_fn

  plan = plan_run(stream)
  result = train.train_run(plan)
  tokens, T, nats = plan.data.heldout.tokens, 16, 0.0
  for start in range(0, len(tokens) - 1, T):
    window = tokens[start : start + T + 1]
    batch = Batch(window[None, :-1], window[None, 1:], np.ones((1, len(window) - 1), np.float32))
    nats += float(loss_fn(result.params, batch, result.experiment)) * (len(window) - 1)
  assert result.heldout_tokens == len(tokens) - 1
  assert result.heldout_loss == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)


@pytest.mark.slow
def test_a_run_keeps_its_tokenizer_when_it_goes_on(stream, tmp_path, monkeypatch):
  """Merges are not learned again: another version of the package that learns them may break ties
  otherwise.
  """
  pytest.importorskip(
    "tokenizers", reason="byte-level BPE is trained by tokenizers (the extra bpe)"
  )
  base = change(
    stream,
    {"data.tokenizer": "bpe", "data.bpe_vocab_size": 260, "data.seq_len": 8, "train.steps": 5},
  )
  base = change(base, {"optimizer.decay_steps": 10})
  first = run(base, tmp_path / "run")
  monkeypatch.setattr(
    "jgpt.data.corpus.train_bpe_tokenizer", lambda *args: pytest.fail("learned again")
  )
  assert run(change(base, {"train.steps": 10}), tmp_path / "run").tokenizer == first.tokenizer
