"""Continued runs: `train.continue_from` takes over parameters and moments; all else begins anew."""

import json
import os
import re
import shutil
import signal
import types

import jax
import numpy as np
import pytest
from small_runs import WORDS, compiled_quickly

from jgpt import batches, cli, run, train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve, unresolve
from jgpt.doctor import cli as doctor_cli
from jgpt.errors import UserError
from jgpt.inspect import cli as inspect_cli
from jgpt.plan import plan_run
from jgpt.report import summary
from jgpt.runs import checkpoint, manifest
from jgpt.runs.folder import RunFiles, read_run_files, write_run_files
from jgpt.runs.open import open_run
from jgpt.runs.origin import open_origin
from jgpt.step import loss_fn

STEPS, MIDDLE = 6, 3


def start(experiment, workdir=None, **options):
  return train.train_run(plan_run(experiment, workdir=workdir), **options)


def continued(base, source, **more):
  changes = {n.replace("__", "."): v for n, v in more.items()}
  return change(base, {"train.continue_from": str(source)} | changes)


def equal_bits(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    np.asarray(x).dtype == np.asarray(y).dtype
    and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in pairs
  )


def refusal(experiment, workdir=None):
  """The one line with which a plan is refused."""
  with pytest.raises(UserError) as error:
    plan_run(experiment, workdir=workdir)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """Names' model on words, with Adam's decay, a constant rate and one batch again and again."""
  path = tmp_path_factory.mktemp("data") / "words.txt"
  path.write_text("".join(f"{word}\n" for word in WORDS), encoding="utf-8")
  changes = {
    "data.path": str(path),
    "data.num_batches": 1,
    "data.batch_size": 4,
    "data.heldout_fraction": 0.0,
    "data.seq_len": 5,
    "optimizer.schedule": "constant",
    "optimizer.weight_decay": 0.1,
    "train.steps": STEPS,
    "train.save_every": MIDDLE,
    "train.keep_latest": 3,
    "mesh.data": 1,
    "sample.max_tokens": 2,
  }
  return change(load_experiment("names"), changes)


@pytest.fixture(scope="module")
def first(base, tmp_path_factory):
  """A run of six steps with checkpoints at 3 and 6: its folder and its result."""
  workdir = tmp_path_factory.mktemp("first") / "run"
  with compiled_quickly():
    return workdir, start(base, workdir)


@pytest.fixture
def middle(first):
  """Its checkpoint after three steps."""
  return first[0] / "checkpoints" / str(MIDDLE)


@pytest.fixture
def copy(first, tmp_path):
  """A copy of the run folder, which a test may change."""
  return shutil.copytree(first[0], tmp_path / "copy")


# --- What is kept, and what begins anew ---


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("layers", ["scan", pytest.param("unroll", marks=pytest.mark.slow)])
def test_a_continued_run_makes_the_updates_of_one_that_never_stopped(
  layers, base, first, middle, tmp_path
):
  """Where the batches are the same: parameters, moments and losses to the bit. The count goes on,
  and the step and the schedule's count begin at 0.
  """
  straight = first[1]
  experiment = continued(base, middle, train__steps=STEPS - MIDDLE, compute__layers=layers)
  result = start(experiment, tmp_path / "run")
  adam, other = result.state.opt_state["adam"], straight.state.opt_state["adam"]
  assert int(adam.count) == STEPS and int(result.state.step) == STEPS - MIDDLE
  assert int(result.state.opt_state["lr"].count) == STEPS - MIDDLE
  if layers == "scan":
    assert equal_bits((result.params, adam), (straight.params, other))
    assert result.losses.tobytes() == straight.losses[MIDDLE:].tobytes()
  np.testing.assert_allclose(result.losses, straight.losses[MIDDLE:], rtol=1e-5)
  assert not np.array_equal(
    start(change(experiment, {"train.continue_from": None, "train.init_from": str(middle)})).losses[
      1:
    ],
    result.losses[1:],
  )


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_run_of_sgd_resumes_and_is_continued_with_its_momentum(base, middle, tmp_path):
  """To the bit; another optimizer's moments, and none, are refused with what to try."""
  changes = {"optimizer.name": "sgd", "optimizer.momentum": 0.9}
  sgd = change(base, changes)
  straight = start(sgd, tmp_path / "straight")
  stopped = change(sgd, {"train.steps": MIDDLE})
  start(stopped, tmp_path / "stopped")
  leaves = manifest.read_manifest(tmp_path / "stopped" / "checkpoints" / str(MIDDLE)).leaves
  moments = {name.split("opt_state/")[1] for name in leaves if "opt_state/" in name}
  assert moments - {"lr/count"} == {
    name.replace("params/", "momentum/trace/") for name in leaves if name.startswith("params/")
  }
  resumed = start(sgd, tmp_path / "stopped")
  assert equal_bits(resumed.state, straight.state)
  origin = tmp_path / "straight" / "checkpoints" / str(MIDDLE)
  # What follows from the moments comes with them.
  result = start(continued(base, origin, train__steps=STEPS - MIDDLE), tmp_path / "continued")
  momentum, other = (x.state.opt_state["momentum"] for x in (result, straight))
  assert equal_bits((result.params, momentum), (straight.params, other))
  assert read_run_files(tmp_path / "continued").experiment.optimizer.momentum == 0.9

  message = refusal(change(continued(base, middle), changes))
  assert "another optimizer" in message and "optimizer.name=adamw there and sgd here" in message
  assert "--set optimizer.name=adamw --set optimizer.momentum=0.0" in message
  assert "name=sgd there and adam here" in refusal(continued(base, origin, optimizer__name="adam"))
  plain = {"optimizer.momentum": 0.0, "optimizer.schedule": "linear", "train.steps": 1}
  start(change(sgd, plain), tmp_path / "plain")
  message = refusal(continued(base, tmp_path / "plain"))
  assert "no moments" in message and f"--init-from {tmp_path / 'plain'}" in message
  assert "0.9 there and 0.5 here" in refusal(
    continued(base, origin, optimizer__name="sgd", optimizer__momentum=0.5)
  )

  # What is refused where a run goes on does not advise what is refused here.
  ways = [
    (tmp_path / "straight", {"optimizer.weight_decay": 0.5}, True),
    (tmp_path / "straight", {"optimizer.name": "adam", "optimizer.momentum": 0.0}, False),
    (tmp_path / "plain", {"data.batch_size": 3}, False),
    (tmp_path / "plain", {"train.steps": 2}, False),
  ]
  for folder, changed, keeps_moments in ways:
    recorded = read_run_files(folder).experiment
    with pytest.raises(UserError) as caught:
      plan_run(change(recorded, changed), workdir=folder)
    assert "--init-from" in str(caught.value) or keeps_moments
    assert ("--continue-from" in str(caught.value)) == keeps_moments, caught.value


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_batches_text_rate_and_spikes_may_be_others(base, first, middle, tmp_path):
  """Another text of known characters in other batches, a warmup, a cosine, dropout, spikes."""
  (tmp_path / "other.txt").write_text("axrst\nbyé\ncz\n" * 9, encoding="utf-8")
  experiment = continued(
    base,
    middle,
    data__path=str(tmp_path / "other.txt"),
    data__batch_size=6,
    data__num_batches=None,
    optimizer__schedule="cosine",
    optimizer__warmup_steps=2,
    optimizer__warmup_from_zero=False,
    optimizer__peak_lr=0.003,
    optimizer__skip_spikes=9.0,
    optimizer__eps=1e-6,
    train__seed=7,
    train__steps=4,
  )
  plan = plan_run(experiment)
  rates = []
  writer = types.SimpleNamespace(
    write=lambda chunk: rates.extend(chunk.metrics["train/lr"].tolist()), close=lambda: None
  )
  result = train.train_run(plan, writers=[writer])
  np.testing.assert_allclose(rates, [0.001, 0.002, 0.003, 0.0015], rtol=1e-6)
  state = result.state.opt_state
  assert int(state["adam"].count) == MIDDLE + 4 and int(state["spikes"].count) == 4

  corpus = jax.device_put(plan.data.train)
  batch = batches.batch(corpus, 0, plan.experiment)
  params = open_run(first[0], MIDDLE).params
  assert result.losses[0] == pytest.approx(float(loss_fn(params, batch, plan.experiment)), rel=1e-6)
  # The first update, by hand: of one number with the moments that the origin left.
  after = start(change(experiment, {"train.steps": 1, "optimizer.decay_steps": 4}))
  grads = jax.grad(loss_fn)(params, batch, plan.experiment)
  there = np.asarray(params["unembed"], np.float64)
  old = restore(first[0], MIDDLE, base).opt_state["adam"]
  o, t = plan.experiment.optimizer, MIDDLE + 1
  g = np.asarray(grads["unembed"], np.float64)
  m = o.b1 * np.asarray(old.mu["unembed"], np.float64) + (1 - o.b1) * g
  v = o.b2 * np.asarray(old.nu["unembed"], np.float64) + (1 - o.b2) * g * g
  step = m / (1 - o.b1**t) / (np.sqrt(v / (1 - o.b2**t)) + o.eps) + o.weight_decay * there
  np.testing.assert_allclose(after.params["unembed"], there - 0.001 * step, rtol=1e-5, atol=1e-7)


def restore(workdir, step, experiment):
  """The whole state of a checkpoint."""
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state = train.compile_program(
    plan_run(experiment).experiment, jax.devices(), plan_run(experiment).data
  ).state
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
  return checkpoint.restore(workdir / "checkpoints" / str(step), shapes)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_an_origin_on_one_device_is_continued_on_eight(base, first, middle):
  result = start(
    continued(base, middle, mesh__data=8, data__batch_size=8, train__steps=0),
  )
  assert len(jax.tree.leaves(result.state.params)[0].sharding.device_set) == 8
  old = restore(first[0], MIDDLE, base)
  assert equal_bits(
    (result.params, result.state.opt_state["adam"]), (old.params, old.opt_state["adam"])
  )


# --- The record ---


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_origin_is_recorded_and_the_run_goes_on_without_it(base, copy, tmp_path):
  experiment = continued(base, copy, train__steps=2, train__save_every=1)
  result = start(experiment, tmp_path / "run")
  files = read_run_files(tmp_path / "run")
  assert files.origin == open_origin(str(copy)).record and files.weights is None
  seen = json.loads((copy / "result.json").read_text())["tokens"]
  own = json.loads((tmp_path / "run" / "result.json").read_text())
  assert files.origin["tokens"] == seen > own["tokens"] > 0 and own["origin"] == files.origin
  assert {n: files.origin[n] for n in ("location", "step")} == {"location": str(copy), "step": 6}
  assert re.fullmatch("[0-9a-f]{64}", files.origin["sha256"])
  assert files.origin == read_run_files(tmp_path / "run" / "checkpoints" / "1").origin
  shutil.rmtree(copy)
  plan = plan_run(experiment, workdir=tmp_path / "run")
  assert plan.start_step == 2 and plan.initial is None and plan.origin == files.origin
  assert summary.describe_initial(plan)[0][1].startswith(f"{copy} at step 6")

  shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")  # as if killed before it was saved
  resumed = start(experiment, tmp_path / "run")
  assert equal_bits(resumed.state, result.state)


def test_before_its_first_checkpoint_a_run_keeps_to_the_origin_it_recorded(base, copy, tmp_path):
  """Also when the origin has newer checkpoints by now; a changed or missing one is an error."""
  newest = copy / "checkpoints" / "6"
  aside = newest.rename(tmp_path / "6")
  experiment = continued(base, copy)
  plan = plan_run(experiment)
  data = {"kind": "path", "location": "there", "sha256": plan.data.text.sha256}
  write_run_files(
    tmp_path / "run", RunFiles("x", plan.experiment, plan.data.tokenizer, data, None, plan.origin)
  )
  aside.rename(newest)
  assert plan_run(experiment).origin["step"] == STEPS
  assert plan_run(experiment, workdir=tmp_path / "run").origin == plan.origin
  assert plan.origin["step"] == MIDDLE

  shutil.rmtree(copy / "checkpoints" / "3")
  message = refusal(experiment, tmp_path / "run")
  assert f"{copy} at step 3" in message and "--fresh" in message
  value = json.loads((tmp_path / "run" / "experiment.json").read_text())
  value["origin"] |= {"step": STEPS}
  (tmp_path / "run" / "experiment.json").write_text(json.dumps(value))
  assert "has changed since this run began" in refusal(experiment, tmp_path / "run")
  for damaged in (
    {"step": 3},
    "x",
    value["origin"] | {"step": -1},
    value["origin"] | {"tokens": "1"},
  ):
    (tmp_path / "run" / "experiment.json").write_text(json.dumps(value | {"origin": damaged}))
    with pytest.raises(UserError, match="which checkpoint it continues"):
      read_run_files(tmp_path / "run")


def test_the_newest_sound_checkpoint_is_continued(base, copy, capfd):
  for file in (copy / "checkpoints" / "6" / "train_state").rglob("*"):
    if file.is_file() and file.stat().st_size:
      file.write_bytes(b"x" + file.read_bytes()[1:])
  assert plan_run(continued(base, copy)).origin["step"] == MIDDLE
  assert "WARNING: step 6 of" in capfd.readouterr().err
  assert "is damaged" in refusal(continued(base, copy / "checkpoints" / "6"))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_an_interrupted_continued_run_goes_on_to_the_same_bits(base, first, tmp_path):
  experiment = continued(
    base,
    first[0],
    data__num_batches=None,
    optimizer__schedule="linear",
    train__steps=8,
    train__log_every=1,
    train__save_every=None,
    optimizer__skip_spikes=9.0,
  )
  straight = start(experiment)

  def interrupt(chunk):
    if chunk.step == 2:
      os.kill(os.getpid(), signal.SIGINT)

  writer = types.SimpleNamespace(write=interrupt, close=lambda: None)
  assert start(experiment, tmp_path / "run", writers=[writer]).signal == signal.SIGINT
  assert 1 <= manifest.find_step(tmp_path / "run", None) < 8
  resumed = start(experiment, tmp_path / "run")
  assert resumed.losses.tobytes() == straight.losses.tobytes()
  assert equal_bits(resumed.state, straight.state)
  # A run that continues this one: its origin's tokens are counted where they are known.
  again = plan_run(continued(base, tmp_path / "run")).origin
  assert again["step"] == 8


def test_tokens_of_a_stream_are_counted_over_the_runs_before(base, tmp_path):
  """Batch times length times step, for the origin and for its own origin."""
  stream = change(load_experiment("shakespeare_bytes"), {"data.seq_len": 8, "data.batch_size": 3})
  (tmp_path / "x" / "checkpoints" / "5").mkdir(parents=True)
  plan = plan_run(stream)
  record = {"location": "y", "step": 7, "sha256": "0" * 64, "tokens": 1000}
  data = {"kind": "path", "sha256": "0" * 64}
  files = RunFiles("x", plan.experiment, plan.data.tokenizer, data, None, record)
  for folder in (tmp_path / "x", tmp_path / "x" / "checkpoints" / "5"):
    write_run_files(folder, files)
  described = manifest.Manifest(5, data | {"sequences": 15}, None, {}, {})
  manifest.write_manifest(tmp_path / "x" / "checkpoints" / "5", described)
  assert open_origin(str(tmp_path / "x")).record["tokens"] == 1000 + 5 * 3 * 8


# --- What must be the origin's ---

OTHERS = {
  "model.d_model": 32,
  "model.num_layers": 2,
  "model.num_heads": 2,
  "model.d_ff": 32,
  "model.max_seq_len": 9,
  "model.vocab_multiple": 8,
  "model.activation": "gelu_erf",
  "model.positions": "sinusoidal",
  "model.tied_head": True,
  "model.norm_final": True,
  "model.scale_embed": True,
  "optimizer.b1": 0.8,
  "optimizer.b2": 0.999,
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_shape_or_optimizer_is_named_with_the_way_out(name, base, middle):
  message = refusal(continued(base, middle, **{name.replace(".", "__"): OTHERS[name]}))
  own = getattr(getattr(base, name.split(".")[0]), name.split(".")[1])
  own = str(own).lower() if isinstance(own, bool) else own
  here = str(OTHERS[name]).lower() if isinstance(OTHERS[name], bool) else OTHERS[name]
  assert f"{name}={own} there and {here} here" in message
  assert f"--set {name}={own}" in message and "--init-from" in message
  assert ("another network" in message) == name.startswith("model.")


@pytest.mark.parametrize(
  "changes",
  [
    {"data.tokenizer": "bytes", "data.batching": "random"},
    {"data.tokenizer": "gpt2", "data.batching": "epochs"},
  ],
)
def test_another_tokenizer_is_named(changes, base, middle):
  more = {name.replace(".", "__"): value for name, value in changes.items()}
  message = refusal(continued(base, middle, **more))
  assert "of the kind characters" in message and "--set data.tokenizer=characters" in message


def test_a_text_with_unknown_characters_is_refused(base, middle, tmp_path):
  (tmp_path / "other.txt").write_text("quip\n" * 20)
  message = refusal(continued(base, middle, data__path=str(tmp_path / "other.txt")))
  assert "not in the vocabulary: 'i' 'p' 'q'" in message and "--continue-from" in message


def test_moments_of_another_optimizer_are_no_moments_of_adam(base, copy):
  """A checkpoint whose state has other arrays, as another optimizer would leave them."""
  folder = copy / "checkpoints" / "6"
  there = manifest.read_manifest(folder)
  for old, new in (("adam/nu/tok_embed", "adam/nu/gone"), ("adam/count", "sign/momentum")):
    leaves = {n.replace(old, new): leaf for n, leaf in there.leaves.items()}
    manifest.write_manifest(folder, manifest.Manifest(6, there.data, None, leaves, {}))
    message = refusal(continued(base, folder))
    assert "has another optimizer" in message and "--init-from" in message
    assert f"{new} is there" in message or f"{old} is missing" in message


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("", ["is empty"]),
    ("gpt2", ["does not exist", "--init-from"]),
    ("runs/nothing", ["does not exist", "a run folder"]),
    ("a\0b", ["does not exist"]),
    ("hf", ["must be a run folder", "--init-from"]),
    ("begun", ["has no checkpoint yet"]),
    ("copy/checkpoints/4", ["has no checkpoint of step 4; it has 3, 6"]),
  ],
)
def test_what_is_no_origin_is_refused_in_one_line(name, words, base, copy, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "hf").mkdir()
  (tmp_path / "hf" / "config.json").write_text("{}")
  (tmp_path / "begun").mkdir()
  for file in ("experiment.json", "tokenizer.json"):
    shutil.copy(copy / file, tmp_path / "begun" / file)
  message = refusal(continued(base, name))
  for word in words:
    assert word in message


def test_it_excludes_the_other_ways_to_begin(base):
  with pytest.raises(UserError, match=r"exclude each other\. Try --set train\.init=normal"):
    continued(base, "x", train__init="microgpt")
  with pytest.raises(UserError, match=r"exclude each other\. Try --set train\.init_from=none"):
    continued(base, "x", train__init_from="y")


# --- The commands ---


def call(capsys, main, *args):
  status = cli.guard(lambda: main([str(a) for a in args]))
  out, err = capsys.readouterr()
  return status, out, err


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_without_an_experiment_the_settings_are_the_origins(copy, capsys, tmp_path, monkeypatch):
  """The same command goes on; a trace begins with the origin's moments; the doctor is content."""
  monkeypatch.chdir(tmp_path)
  words = ["--continue-from", "copy", "--steps", 2, "--set", "optimizer.peak_lr=0.002"]
  status, out, _ = call(capsys, run.main, *words, "--print-config")
  assert status == 0 and "\ndata.batch_size=4\n" in out and "\noptimizer.decay_steps=none\n" in out
  status, out, err = call(capsys, run.main, *words)
  assert (status, err) == (0, "") and "origin      copy at step 6" in out
  (folder,) = (tmp_path / "runs").iterdir()
  assert folder.name.startswith("continued,") or folder.name.startswith("names,")
  again = re.search(r"^  (.*jgpt\.run.*) --steps 4$", out, re.MULTILINE)[1]
  assert "continue_from=copy" in again and "--experiment" not in again
  status, out, err = call(capsys, run.main, *words)
  assert (status, err) == (0, "") and "this run is finished: 2 steps" in out
  status, out, err = call(
    capsys, inspect_cli.main, "--run", folder, "--trace", "unembed[1,2]", "--trace-steps", 1
  )
  number = float(np.asarray(open_run("copy").params["unembed"])[1, 2])
  assert (status, err) == (0, "") and f"initially {number:.6g}" in out
  status, out, err = call(capsys, doctor_cli.main, "--run", folder)
  assert status == 0 and "finished at step 2" in out


def test_a_run_is_not_continued_into_its_own_folder(base, copy, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  before = sorted(p for p in copy.rglob("*"))
  for flag in ("--continue-from", "--init-from"):
    for words in (["--workdir", "copy"], ["--workdir", tmp_path / "copy"]):
      experiment = ["--experiment", "names"] if flag == "--init-from" else []
      status, out, err = call(capsys, run.main, flag, "copy/checkpoints/6", *words, *experiment)
      assert (status, out, err.count("\n")) == (2, "", 1)
      assert "a folder of its own" in err and "another --workdir" in err
  status, _, err = call(
    capsys, run.main, "--continue-from", "copy", "--workdir", "copy", "--fresh", "--steps", "1"
  )
  assert status == 2 and "--fresh would set copy aside" in err
  assert sorted(p for p in copy.rglob("*")) == before


@pytest.mark.parametrize(
  ("changes", "given"),
  [
    ({}, ["optimizer.decay_steps"]),
    ({"optimizer.schedule": "wsd"}, ["optimizer.decay_steps", "optimizer.cooldown_steps"]),
    ({"optimizer.decay_steps": 77}, []),
    ({"optimizer.schedule": "wsd", "optimizer.cooldown_steps": 3}, ["optimizer.decay_steps"]),
    ({"train.steps": 0}, ["optimizer.decay_steps"]),
    (
      {
        "data.batching": "epochs",
        "data.tokenizer": "bytes",
        "train.epochs": 3,
        "train.steps": None,
      },
      ["optimizer.decay_steps", "train.steps", "train.sample_every"],
    ),
  ],
)
def test_what_followed_from_other_settings_follows_again(changes, given, base):
  before = change(base, changes)
  resolved = resolve(before, 300, 9 if before.train.epochs else None)
  again = unresolve(change(resolved, {"train.init_from": "x"}))
  assert change(again, {"model.vocab_size": None}) == before
  assert all(getattr(getattr(again, n.split(".")[0]), n.split(".")[1]) is None for n in given)
