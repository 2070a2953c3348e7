"""Runs that begin from weights that are there already: `train.init_from`, from the file to the
finished run folder.
"""

import dataclasses
import json
import os
import re
import signal
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from reference import llmc_files, numpy_gpt
from small_runs import VERSE, WORDS
from switches import draw_params, to_oracle

from jgpt import cli, evaluate, export, program, run, sample, train
from jgpt.config.catalog import load_experiment
from jgpt.config.experiment import GPT2_SIZES
from jgpt.config.settings import change, list_settings, parse_setting, resolve
from jgpt.errors import UserError
from jgpt.inspect import cli as inspect_cli
from jgpt.plan import plan_run
from jgpt.report import summary
from jgpt.runs import checkpoint, manifest
from jgpt.runs.folder import RunFiles, read_run_files, write_run_files
from jgpt.runs.open import open_run
from jgpt.step import begin_state
from jgpt.text.bpe import BpeTokenizer
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer
from jgpt.weights import hugging_face, llmc
from jgpt.weights import initial as weights_lib
from jgpt.weights.initial import InitialParams, open_weights

MODEL = {
  "num_layers": 1,
  "num_heads": 2,
  "d_model": 8,
  "d_ff": 32,
  "max_seq_len": 8,
  "activation": "gelu_tanh",
}
MODEL |= {"biases": "all", "scale_embed": False, "dropout": 0.0, "dropout_places": ()}
NANO = {"model.norm": "layer_no_bias", "model.biases": "none"}
CHARS = {"data.tokenizer": "characters", "sample.prompt": "a"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A GPT-2 of one narrow layer on bytes, read in order, 8 × 8 at a time, nothing held out."""
  path = tmp_path_factory.mktemp("data") / "verse.txt"
  path.write_text(VERSE, encoding="utf-8")
  changes = {f"model.{name}": value for name, value in MODEL.items()}
  changes |= {
    "data.path": str(path),
    "data.batching": "sequential",
    "data.seq_len": 8,
    "data.batch_size": 8,
  }
  changes |= {
    "data.heldout_fraction": 0.0,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 2,
  }
  changes |= {
    "optimizer.peak_lr": 0.01,
    "train.steps": 4,
    "train.eval_every": None,
    "train.eval_batches": None,
  }
  changes |= {"mesh.data": 1, "sample.max_tokens": 2}
  return change(load_experiment("shakespeare_bytes"), changes)


def draw(config):
  """Random parameters, float32, gains and biases too."""
  return jax.tree.map(lambda x: x.astype(np.float32), draw_params(config))


def save_run(workdir, experiment, tokenizer, params, step=0):
  """Writes a run folder with these parameters, and with an optimizer that has moments."""
  data = {"kind": "path", "location": "there", "sha256": "0" * 64}
  write_run_files(workdir, RunFiles("other", experiment, tokenizer, data))
  state = begin_state(params, experiment)
  state = jax.tree.map(lambda x: np.full(x.shape, step, x.dtype), state).replace(params=params)
  with checkpoint.open_checkpoints(workdir) as manager:
    checkpoint.save_checkpoint(manager, jax.tree.map(jax.numpy.asarray, state))
  return workdir


def write_weights(folder, kind, experiment, params, tokenizer):
  """Writes weights of a kind; returns what `train.init_from` names."""
  folder.mkdir(exist_ok=True)
  if kind == "run":
    return save_run(folder / "source", experiment, tokenizer, params, step=7)
  if kind == "llmc":
    llmc.write_weights(folder / "model.bin", params, experiment.model, "float32")
    return folder / "model.bin"
  (folder / "hf").mkdir()
  hugging_face.write_folder(folder / "hf", params, experiment.model, tokenizer, "float32")
  if kind == "folder":
    return folder / "hf"
  return (folder / "hf" / "model.safetensors").rename(folder / "model.safetensors")  # by itself


@pytest.fixture
def source(base, tmp_path):
  """llm.c's weights for `base`, and their parameters."""
  experiment = resolve(base, 256)
  params = draw(experiment.model)
  return str(write_weights(tmp_path, "llmc", experiment, params, ByteTokenizer())), params


def begin(base, init_from, **more):
  return change(
    base, {"train.init_from": str(init_from)} | {n.replace("__", "."): v for n, v in more.items()}
  )


def start(experiment, workdir=None, **options):
  return train.train_run(plan_run(experiment, workdir=workdir), **options)


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


def follow(experiment, message):
  """The experiment with what the message advises."""
  tries = re.findall(r"--set (\S+)", message[message.index("Try ") :])
  assert tries
  return change(experiment, dict(parse_setting(text.rstrip(".,")) for text in tries))


# --- The same bits, wherever the weights are ---


@pytest.mark.parametrize("vocab_multiple", [1, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["folder", "safetensors", "llmc", "run"])
def test_a_run_begins_with_the_bits_of_its_source(kind, vocab_multiple, base, tmp_path):
  """Also where its table of embeddings is padded to another length than the source's."""
  experiment = resolve(change(base, {"model.vocab_multiple": 64}), 256)
  params = draw(experiment.model)
  path = write_weights(tmp_path, kind, experiment, params, ByteTokenizer())
  plan = plan_run(begin(base, path, model__vocab_multiple=vocab_multiple))
  rows = plan.initial.params["tok_embed"]
  assert len(rows) == (256 if vocab_multiple == 1 else 300) and not rows[256:].any()
  assert equal_bits(plan.initial.params | {"tok_embed": rows[:256]}, params)
  assert str(path) in plan.initial.location and ("at step 7" in plan.initial.location) == (
    kind == "run"
  )


def test_another_model_of_a_run_is_read_too(tmp_path):
  """Names' network: RMSNorm, a norm of the embeddings, a head of its own, documents."""
  (tmp_path / "words.txt").write_text("".join(f"{word}\n" for word in WORDS), encoding="utf-8")
  names = change(
    load_experiment("names"), {"data.path": str(tmp_path / "words.txt"), "model.vocab_multiple": 8}
  )
  tokenizer = CharTokenizer("".join(sorted({*"".join(WORDS), "q", "z"})), bos=True)
  source = resolve(names, tokenizer.vocab_size)
  params = draw(source.model)
  plan = plan_run(
    begin(
      change(names, {"model.vocab_multiple": 1}),
      save_run(tmp_path / "a", source, tokenizer, params),
    )
  )
  assert (
    plan.data.tokenizer == tokenizer and plan.experiment.model.vocab_size == tokenizer.vocab_size
  )
  for name, value in plan.initial.params.items():
    expected = (
      params[name][: tokenizer.vocab_size] if name in ("tok_embed", "unembed") else params[name]
    )
    assert equal_bits(value, expected), name


def test_equal_weights_have_one_digest(base, tmp_path):
  experiment = resolve(base, 256)
  params = draw(experiment.model)
  digests = {}
  for kind in ("folder", "safetensors", "llmc", "run"):
    path = write_weights(tmp_path / kind, kind, experiment, params, ByteTokenizer())
    digests[kind] = plan_run(begin(base, path)).initial.sha256
  assert len(set(digests.values())) == 1 and re.fullmatch("[0-9a-f]{64}", digests["llmc"])
  params["blocks"]["w_up"].view(np.uint32)[0, 3, 5] ^= 1
  llmc.write_weights(tmp_path / "other.bin", params, experiment.model, "float32")
  assert plan_run(begin(base, tmp_path / "other.bin")).initial.sha256 != digests["llmc"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("devices", "layers"), [(1, 1), (1, 2), (8, 1)])
def test_what_is_kept_before_any_update_is_the_source(devices, layers, base, tmp_path, monkeypatch):
  """On one device and on eight, stacked and written out; and the step is not compiled."""
  base = change(base, {"model.num_layers": layers})
  experiment = resolve(base, 256)
  params = draw(experiment.model)
  path = write_weights(tmp_path, "llmc", experiment, params, ByteTokenizer())
  monkeypatch.setattr(program, "lower_steps", lambda *args: pytest.fail("the step was compiled"))
  workdir = tmp_path / "run" if devices == 1 else None
  result = start(begin(base, path, train__steps=0, mesh__data=devices), workdir)
  assert len(jax.tree.leaves(result.state.params)[0].sharding.device_set) == devices
  assert (
    equal_bits(result.params, params) and int(result.state.step) == 0 and not len(result.losses)
  )
  if workdir is not None:
    kept = open_run(workdir)
    assert kept.step == 0 and equal_bits(kept.params, params)


@pytest.mark.usefixtures("quick")
def test_the_optimizer_begins_anew(base, tmp_path):
  """The source is a run with moments, at step 7."""
  experiment = resolve(base, 256)
  path = write_weights(tmp_path, "run", experiment, draw(experiment.model), ByteTokenizer())
  state = start(begin(base, path, train__steps=0)).state
  adam = state.opt_state["adam"]
  assert int(state.step) == 0 and int(adam.count) == 0
  assert not any(np.any(x) for x in jax.tree.leaves((adam.mu, adam.nu)))


# --- Training from them ---


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_training_is_that_of_the_same_parameters_given_in_python(base, source):
  """The plan can be used again: its parameters are not consumed.

  The first loss is the NumPy GPT's.
  """
  path, params = source
  plan = plan_run(begin(base, path))
  first, again = train.train_run(plan), train.train_run(plan)
  assert equal_bits(plan.initial.params, params)
  given = dataclasses.replace(plan_run(base), initial=InitialParams(params, "here", ""))
  assert given.experiment.train.init_from is None
  other = train.train_run(given)
  assert len(first.losses) == 4 and len(set(first.losses.tolist())) == 4
  for result in (again, other):
    assert first.losses.tobytes() == result.losses.tobytes() and equal_bits(
      first.state, result.state
    )

  tokens = np.frombuffer(VERSE.encode()[:65], np.uint8).astype(np.int32)
  batch = tokens[:64].reshape(8, 8), tokens[1:].reshape(8, 8), np.ones((8, 8))
  loss, _ = numpy_gpt.loss_and_gradients(
    to_oracle(params, plan.experiment.model), *batch, plan.experiment.model
  )
  assert first.losses[0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_an_interrupted_run_goes_on_without_the_weights(base, source, tmp_path):
  experiment = begin(
    base, source[0], optimizer__schedule="linear", optimizer__decay_steps=8, train__log_every=1
  )
  straight = start(experiment)

  def interrupt(chunk):
    if chunk.step == 1:
      os.kill(os.getpid(), signal.SIGINT)

  writer = types.SimpleNamespace(write=interrupt, close=lambda: None)
  assert start(experiment, tmp_path / "run", writers=[writer]).signal == signal.SIGINT
  os.unlink(source[0])
  assert 1 <= manifest.find_step(tmp_path / "run", None) < 4
  resumed = start(experiment, tmp_path / "run")
  assert resumed.losses.tobytes() == straight.losses.tobytes() and equal_bits(
    resumed.state, straight.state
  )


@pytest.mark.usefixtures("quick")
def test_weights_that_changed_before_the_first_checkpoint_are_refused(base, source, tmp_path):
  path, params = source
  experiment, workdir = begin(base, path, train__steps=0), tmp_path / "run"
  start(experiment, workdir)
  recorded = json.loads((workdir / "experiment.json").read_text())
  weights = recorded["weights"]
  assert recorded["experiment"]["train"]["init_from"] == path
  assert weights == {"location": path, "sha256": plan_run(experiment).initial.sha256}

  (workdir / "checkpoints").rename(tmp_path / "gone")  # as if killed before it was saved
  changed = jax.tree.map(np.copy, params)
  changed["norm_final_bias"][3] += 1
  llmc.write_weights(Path(path), changed, resolve(base, 256).model, "float32")
  message = refusal(experiment, workdir)
  assert "have changed since this run began" in message and path in message and "--fresh" in message
  with pytest.raises(UserError, match="have changed"):
    inspect_cli.main(["--run", str(workdir), "--trace", "tok_embed[0,0]"])
  llmc.write_weights(Path(path), params, resolve(base, 256).model, "float32")
  assert equal_bits(start(experiment, workdir).params, params)


@pytest.mark.usefixtures("quick")
def test_a_run_goes_on_only_from_what_it_began_with(base, source, tmp_path):
  start(begin(base, source[0], train__steps=0), tmp_path / "a")
  save_run(tmp_path / "b", resolve(base, 256), ByteTokenizer(), source[1])
  message = refusal(base, tmp_path / "a")
  assert f"train.init_from is {source[0]} there and None here" in message and "--workdir" in message
  assert f"train.init_from is None there and {source[0]} here" in refusal(
    begin(base, source[0]), tmp_path / "b"
  )


def test_what_a_run_recorded_about_its_weights_is_checked(base, source, tmp_path):
  """A folder written before there were such weights is read as one without."""
  experiment = resolve(base, 256)
  save_run(tmp_path, experiment, ByteTokenizer(), source[1])
  path = tmp_path / "experiment.json"
  value = json.loads(path.read_text())
  for damaged in ({"location": "x"}, {"location": 3, "sha256": "0"}, "x", []):
    path.write_text(json.dumps(value | {"weights": damaged}))
    with pytest.raises(UserError, match="which weights it began from"):
      read_run_files(tmp_path)
  del value["weights"], value["experiment"]["train"]["init_from"]
  path.write_text(json.dumps(value))
  files = read_run_files(tmp_path)
  assert files.weights is None and list_settings(files.experiment) == list_settings(experiment)


# --- More updates for weights that were kept as they are ---


@pytest.mark.usefixtures("quick")
def test_kept_weights_can_be_trained_on(base, source, tmp_path):
  """With a constant rate and a warmup: the bits of a run that was begun with these steps."""
  experiment = begin(base, source[0])
  start(change(experiment, {"train.steps": 0}), tmp_path / "grown")
  straight = start(experiment, tmp_path / "straight")
  os.unlink(source[0])  # they are kept
  grown = start(experiment, tmp_path / "grown")
  assert len(grown.losses) == 4 and grown.losses.tobytes() == straight.losses.tobytes()
  assert equal_bits(grown.state, straight.state)
  assert manifest.list_steps(tmp_path / "grown") == [0, 4]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("end_lr", [0.0, 1e-3])
def test_a_schedule_without_length_is_refused_when_the_run_grows(
  schedule, end_lr, base, source, tmp_path
):
  experiment = begin(base, source[0], optimizer__schedule=schedule, optimizer__end_lr=end_lr)
  start(change(experiment, {"train.steps": 0}), tmp_path / "run")
  message = refusal(experiment, tmp_path / "run")
  assert f"another --workdir, with --init-from {tmp_path / 'run'}" in message
  advised = plan_run(
    change(experiment, {"train.init_from": str(tmp_path / "run")}), workdir=tmp_path / "other"
  )
  assert advised.experiment.optimizer.decay_steps == 4
  assert equal_bits(advised.initial.params, plan_run(experiment).initial.params)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_schedule_whose_length_was_given_is_kept(base, source, tmp_path):
  experiment = begin(base, source[0], optimizer__schedule="linear", optimizer__decay_steps=8)
  start(change(experiment, {"train.steps": 0}), tmp_path / "run")
  assert equal_bits(start(experiment, tmp_path / "run").state, start(experiment).state)


# --- Tokenizers ---


def save_source(base, tmp_path, tokenizer, **changes):
  """A run with this tokenizer; its kind is said by `changes`."""
  experiment = resolve(
    change(base, {n.replace("__", "."): v for n, v in changes.items()}), tokenizer.vocab_size
  )
  return save_run(tmp_path / "source", experiment, tokenizer, draw(experiment.model))


def write_text(tmp_path, text):
  (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
  return str(tmp_path / "mine.txt")


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_characters_keep_the_ids_that_the_weights_know(kind, base, tmp_path):
  tokenizer, characters = CharTokenizer(" abcdefgh", bos=False), change(base, CHARS)
  experiment = resolve(characters, 9)
  path = write_weights(tmp_path, kind, experiment, draw(experiment.model), tokenizer)
  mine = begin(characters, path, data__path=write_text(tmp_path, "head gabe " * 20))
  plan = plan_run(mine)
  assert plan.data.tokenizer == tokenizer and plan.experiment.model.vocab_size == 9
  assert plan.data.train.tokens[:10].tolist() == [8, 5, 1, 4, 0, 7, 1, 2, 5, 0]
  message = refusal(change(mine, {"data.path": write_text(tmp_path, "feed zebra! " * 20)}))
  assert "not in the vocabulary: '!' 'r' 'z'" in message


def test_bytes_stay_bytes(base, tmp_path):
  plan = plan_run(begin(base, save_source(base, tmp_path, ByteTokenizer())))
  assert plan.data.train.tokens[:5].tolist() == list(VERSE.encode()[:5])


def test_another_kind_of_tokenizer_is_refused_and_the_advice_works(base, tmp_path):
  text = write_text(tmp_path, "ab ba " * 30)
  path = save_source(base, tmp_path, CharTokenizer(" ab", bos=False), data__tokenizer="characters")
  mine = begin(base, path, data__path=text, data__tokenizer="bytes")
  message = refusal(mine)
  assert str(path) in message and "data.tokenizer=bytes" in message
  assert plan_run(follow(mine, message)).data.tokenizer.chars == " ab"
  assert plan_run(begin(base, path, data__path=text)).experiment.data.tokenizer == "characters"


@pytest.mark.slow
def test_bpe_of_another_size_is_refused_and_the_advice_works(base, tmp_path):
  pytest.importorskip("tokenizers")
  tokenizer, text = (
    BpeTokenizer("a b\nab a", end_of_text=False),
    write_text(tmp_path, "aba ab " * 40),
  )
  path = save_source(base, tmp_path, tokenizer, data__tokenizer="bpe", data__bpe_vocab_size=258)
  mine = begin(base, path, data__path=text)
  wrong = change(mine, {"data.tokenizer": "bpe", "data.bpe_vocab_size": 300})
  message = refusal(wrong)
  assert "--set data.bpe_vocab_size=258" in message
  for fitting in (mine, follow(wrong, message)):
    plan = plan_run(fitting)
    assert plan.data.tokenizer == tokenizer and plan.data.train.tokens[0] == 257
    assert plan.experiment.data.bpe_vocab_size == 258


def test_documents_need_a_tokenizer_with_bos_and_the_advice_works(base, tmp_path):
  tokenizer = CharTokenizer("\nab", bos=False)
  names = change(
    load_experiment("names"), {"data.path": write_text(tmp_path, "ab\nba\naab\n" * 50)}
  )
  path = save_source(names, tmp_path, tokenizer, data__batching="random")
  mine = begin(names, path, data__batching="documents")
  message = refusal(mine)
  assert "BOS" in message
  assert plan_run(follow(mine, message)).data.tokenizer == tokenizer


@pytest.mark.slow
def test_more_ids_than_the_tokenizer_has_are_named(base, tmp_path):
  experiment = resolve(change(base, CHARS | {"model.vocab_size": 12}), 3)
  path = save_run(
    tmp_path / "source", experiment, CharTokenizer(" ab", bos=False), draw(experiment.model)
  )
  mine = change(begin(base, path, data__path=write_text(tmp_path, "ab ba " * 30)), CHARS)
  wrong = change(mine, {"model.vocab_size": 3})
  message = refusal(wrong)
  assert "model.vocab_size=12 there and 3 here" in message
  for fitting in (mine, follow(wrong, message)):
    assert plan_run(fitting).initial.params["tok_embed"].shape == (12, 8)


def test_a_vocabulary_smaller_than_the_tokenizers_is_no_advice_in_a_circle(base, tmp_path):
  """llm.c's file of a model of 9 characters, for a run on bytes: no vocabulary size can
  mend that.
  """
  experiment = resolve(change(base, CHARS), 9)
  path = write_weights(
    tmp_path, "llmc", experiment, draw(experiment.model), CharTokenizer(" abcdefgh", bos=False)
  )
  message = refusal(begin(base, path))
  assert "data.tokenizer" in message and "--set model.vocab_size=9" not in message


def test_token_files_of_another_tokenizer_are_refused(base, tmp_path):
  """Their ids would mean other characters than the weights learned."""
  path = save_source(base, tmp_path, CharTokenizer("abc", bos=False), data__tokenizer="characters")
  tokens = tmp_path / "tokens"
  tokens.mkdir()
  content = np.zeros(512, "<u2")
  content.view("<i4")[:3] = 20240520, 1, 300
  ids = np.arange(300, dtype="<u2") % 3
  (tokens / "train.bin").write_bytes(content.tobytes() + ids.tobytes())
  np.testing.assert_array_equal(llmc_files.read_tokens(tokens / "train.bin"), ids)
  mine = change(begin(base, path, data__path=str(tokens)), CHARS)
  (tokens / "tokenizer.json").write_text(json.dumps(CharTokenizer("abc", bos=False).to_json()))
  assert plan_run(mine).data.tokenizer.chars == "abc"
  (tokens / "tokenizer.json").write_text(json.dumps(CharTokenizer("xyz", bos=False).to_json()))
  assert str(tokens) in refusal(mine)


# --- Weights of another model ---


@pytest.mark.parametrize("kind", ["folder", "safetensors", "llmc", "run"])
def test_weights_of_other_sizes_are_refused_and_the_advice_works(kind, base, tmp_path):
  wider = resolve(
    change(
      base, {"model.d_model": 12, "model.d_ff": 48, "model.num_heads": 3, "model.num_layers": 2}
    ),
    256,
  )
  params = draw(wider.model)
  mine = begin(base, write_weights(tmp_path, kind, wider, params, ByteTokenizer()))
  message = refusal(mine)
  for name, there, here in (("d_model", 12, 8), ("d_ff", 48, 32), ("num_layers", 2, 1)):
    assert (
      f"model.{name}={there} there and {here} here" in message
      and f"--set model.{name}={there}" in message
    )
  assert ("model.num_heads=3" in message) == (
    kind != "safetensors"
  )  # which says nothing about heads
  assert equal_bits(plan_run(follow(mine, message)).initial.params, params)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["norm", "positions", "activation", "tied_head", "scale_embed", "norm_final"]
)
def test_weights_of_another_function_are_refused_and_the_advice_works(name, base, tmp_path):
  other = {
    "norm": "rms",
    "positions": "sinusoidal",
    "activation": "relu",
    "tied_head": False,
    "scale_embed": True,
  }
  other |= {"norm_final": False}
  source = resolve(change(base, {f"model.{name}": other[name]}), 256)
  params = draw(source.model)
  path = save_run(tmp_path / "source", source, ByteTokenizer(), params)
  if f"model.{name}" not in base.given:  # then it comes with the weights
    assert equal_bits(plan_run(begin(base, path)).initial.params, params)
  mine = begin(base, path, **{f"model__{name}": getattr(base.model, name)})
  message = refusal(mine)
  assert (
    f"model.{name}={str(other[name]).lower() if isinstance(other[name], bool) else other[name]} "
    "there" in message
  )
  assert equal_bits(plan_run(follow(mine, message)).initial.params, params)


@pytest.mark.parametrize("kind", ["folder", "llmc", "run"])
def test_fewer_positions_are_the_first_ones(kind, base, tmp_path):
  longer = resolve(change(base, {"model.max_seq_len": 20}), 256)
  params = draw(longer.model)
  path = write_weights(tmp_path, kind, longer, params, ByteTokenizer())
  initial = plan_run(begin(base, path)).initial.params
  assert equal_bits(initial, params | {"pos_embed": params["pos_embed"][:8]})
  more = begin(base, path, model__max_seq_len=21)
  message = refusal(more)
  assert "model.max_seq_len=20 there and 21 here" in message
  assert equal_bits(plan_run(follow(more, message)).initial.params, params)


@pytest.mark.parametrize("kind", ["folder", "llmc", "run"])
def test_biases_of_zero_are_left_out_and_others_are_not(kind, base, tmp_path):
  full, nano = resolve(base, 256), change(base, NANO)
  params = draw(full.model)
  is_bias = {"norm_attn_bias", "b_qkv", "b_out", "norm_mlp_bias", "b_up", "b_down"}
  zero = params | {"norm_final_bias": np.zeros(8, np.float32)}
  zero["blocks"] = {n: np.zeros_like(x) if n in is_bias else x for n, x in params["blocks"].items()}
  wanted = {n: x for n, x in zero.items() if n != "norm_final_bias"}
  wanted["blocks"] = {n: x for n, x in zero["blocks"].items() if n not in is_bias}
  path = write_weights(tmp_path / "zero", kind, full, zero, ByteTokenizer())
  plan = plan_run(begin(nano, path))
  assert equal_bits(plan.initial.params, wanted)

  for name in ["b_up"] if kind == "run" else sorted(is_bias | {"norm_final_bias"}):
    one = zero | {"blocks": dict(zero["blocks"])}
    tree = one if name == "norm_final_bias" else one["blocks"]
    tree[name] = tree[name].copy()
    tree[name].reshape(-1)[-1] = 1e-30
    mine = begin(nano, write_weights(tmp_path / name, kind, full, one, ByteTokenizer()))
    message = refusal(mine)
    assert name in message and "not zero" in message
    advised = plan_run(follow(mine, message)).initial.params
    got = advised["norm_final_bias"] if name == "norm_final_bias" else advised["blocks"][name]
    assert equal_bits(got, tree[name])


def test_biases_that_the_weights_lack_are_named_by_their_setting(base, tmp_path):
  source = resolve(change(base, NANO | {"model.norm": "layer"}), 256)
  mine = begin(base, save_run(tmp_path / "source", source, ByteTokenizer(), draw(source.model)))
  message = refusal(mine)
  assert "model.biases" in message
  assert plan_run(follow(mine, message)).initial


# --- By name ---


@pytest.fixture
def released(monkeypatch, base, tmp_path):
  """Weights under the name gpt2: two narrow layers, and a tokenizer of 258 ids with an end
  of text.
  """
  tokenizer = BpeTokenizer("a b", end_of_text=True)
  sizes = {"num_layers": 2, "num_heads": 4, "d_model": 8, "d_ff": 32}
  experiment = resolve(change(base, {f"model.{n}": v for n, v in sizes.items()}), 258)
  params = draw(experiment.model)
  tensors = hugging_face.to_tensors(params, experiment.model)
  tensors = {
    name.removeprefix("transformer."): x for name, x in tensors.items()
  }  # as OpenAI's come
  hugging_face.write_safetensors(tmp_path / "released.safetensors", tensors, "float32")
  monkeypatch.setattr(weights_lib, "RELEASED", {"gpt2": None, "gpt2-medium": None})
  monkeypatch.setattr(
    weights_lib, "find_released", lambda name, *report: tmp_path / "released.safetensors"
  )
  monkeypatch.setattr(weights_lib, "GPT2_SIZES", {"d2": sizes})
  monkeypatch.setattr(weights_lib.sources, "find_gpt2_files", lambda: (b"", b""))
  monkeypatch.setattr(weights_lib, "make_gpt2_tokenizer", lambda *files: tokenizer)
  return experiment, params, tokenizer


def test_released_weights_come_with_their_tokenizer_and_heads(released, base):
  pytest.importorskip("tokenizers")
  experiment, params, tokenizer = released
  mine = begin(change(experiment, {"model.vocab_size": None}), "gpt2", data__tokenizer="gpt2")
  plan = plan_run(mine)
  assert equal_bits(plan.initial.params, params) and plan.data.tokenizer == tokenizer
  assert plan.initial.location.startswith("gpt2 (")
  heads = refusal(change(mine, {"model.num_heads": 2}))
  assert "model.num_heads=4 there and 2 here" in heads
  assert "model.activation=gelu_tanh there" in refusal(
    change(mine, {"model.activation": "gelu_erf"})
  )
  assert "--set data.tokenizer=gpt2" in refusal(begin(experiment, "gpt2", data__tokenizer="bytes"))


@pytest.mark.skipif(
  not os.environ.get("JGPT_DATA_DIR"), reason="GPT-2's vocabulary is in JGPT_DATA_DIR"
)
def test_released_weights_with_gpt2s_own_tokenizer(released, base, monkeypatch, tmp_path):
  pytest.importorskip("tokenizers")
  monkeypatch.undo()
  sizes = {
    f"model.{name}": value
    for name, value in released[0].model.__dict__.items()
    if name in GPT2_SIZES["d12"]
  }
  experiment = resolve(change(base, sizes), 50257)
  tensors = hugging_face.to_tensors(draw(experiment.model), experiment.model)
  hugging_face.write_safetensors(tmp_path / "released.safetensors", tensors, "float32")
  monkeypatch.setattr(
    weights_lib, "find_released", lambda name, *report: tmp_path / "released.safetensors"
  )
  monkeypatch.setattr(
    weights_lib, "GPT2_SIZES", {"d2": {name.removeprefix("model."): v for name, v in sizes.items()}}
  )
  plan = plan_run(change(begin(base, "gpt2", data__tokenizer="gpt2"), sizes))
  assert plan.data.train.tokens[:6].tolist() == [2514, 307, 11, 393, 407, 284]  # "To be, or not to"
  assert plan.initial.params["tok_embed"].shape == (50257, 8)


def test_a_name_goes_before_a_folder_of_that_name(released, base, tmp_path, monkeypatch):
  (tmp_path / "gpt2").mkdir()
  monkeypatch.chdir(tmp_path)
  assert open_weights("gpt2").location.startswith("gpt2 (")
  with pytest.raises(UserError, match=r"model\.safetensors"):
    open_weights("./gpt2")


# --- What is no weights ---


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("gpt2-medum", ["does not exist", "gpt2-medium"]),
    ("gpt", ["does not exist", "gpt2"]),
    ("runs/nothing", ["does not exist", "a run folder"]),
    ("nothing.bin", ["does not exist"]),
    ("nothing.safetensors", ["does not exist"]),
    ("~no-such-user-here/x", ["no-such-user"]),
    ("a\0b", ["does not exist"]),
    ("empty", ["has no model.safetensors"]),
    ("notes.txt", ["must be a Hugging Face folder"]),
    ("model.pt", ["a zip archive", "no pickles"]),
    ("model.pkl", ["a pickle", "no pickles"]),
    ("begun", ["has no checkpoint yet"]),
  ],
)
def test_what_is_no_weights_is_refused_in_one_line(name, words, base, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty").mkdir()
  (tmp_path / "notes.txt").write_text("weights")
  (tmp_path / "model.pt").write_bytes(b"PK\x03\x04" + bytes(99))
  (tmp_path / "model.pkl").write_bytes(b"\x80\x04\x95.")
  files = RunFiles(
    "other", resolve(base, 256), ByteTokenizer(), {"kind": "path", "sha256": "0" * 64}
  )
  write_run_files(tmp_path / "begun", files)
  message = refusal(begin(base, name))
  for word in words:
    assert word in message
  assert not (tmp_path / "run").exists()


def test_it_excludes_the_other_ways_to_begin(base, source):
  with pytest.raises(
    UserError, match=r"train\.init_from and train\.init=microgpt exclude each other"
  ) as error:
    begin(base, source[0], train__init="microgpt")
  assert str(error.value).endswith("Try --set train.init=normal")


# --- The commands ---

EXPERIMENT_FILE = """\
'''Verse: a test's.'''

from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change

EXPERIMENT = change(load_experiment("shakespeare_bytes"), {changes})
"""


def call(capsys, main, *args):
  status = cli.guard(lambda: main([str(a) for a in args]))
  out, err = capsys.readouterr()
  return status, out, err


@pytest.fixture
def verse(base, source, tmp_path, monkeypatch):
  """A working folder with an experiment file and weights for it: model.bin."""
  monkeypatch.chdir(tmp_path)
  before, changed = list_settings(load_experiment("shakespeare_bytes")), list_settings(base)
  changes = {name: value for name, value in changed.items() if value != before[name]} | {
    "data.heldout_fraction": 0.1
  }
  (tmp_path / "verse.py").write_text(EXPERIMENT_FILE.format(changes=changes), encoding="utf-8")
  return source[1]


def test_both_ways_to_say_it_are_one(verse, capsys, tmp_path):
  shown = [
    call(capsys, run.main, "--experiment", "verse.py", "--print-config", *words)
    for words in (["--init-from", "model.bin"], ["--set", "train.init_from=model.bin"])
  ]
  assert (
    shown[0] == shown[1] and shown[0][0] == 0 and "\ntrain.init_from=model.bin\n" in shown[0][1]
  )
  assert (
    "\ntrain.init_from=none\n"
    in call(capsys, run.main, "--experiment", "verse.py", "--print-config")[1]
  )


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_kept_weights_are_a_run_for_every_command(verse, capsys, tmp_path):
  words = ["--experiment", "verse.py", "--init-from", "model.bin", "--steps", "0"]
  status, out, err = call(capsys, run.main, *words)
  assert (
    (status, err) == (0, "") and "weights     model.bin (SHA-256 " in out and "no updates" in out
  )
  (folder,) = (tmp_path / "runs").iterdir()
  assert "train.init_from=model.bin" in folder.name and "train.steps=0" in folder.name
  heldout = float(re.search(r"held-out loss (\S+)", out)[1])
  status, out, _ = call(capsys, run.main, *words)
  assert status == 0 and "no updates" in out and len(list((tmp_path / "runs").iterdir())) == 1

  status, out, err = call(capsys, sample.main, "--run", folder, "--prompt", "To", "--num", 1)
  assert (status, err) == (0, "") and out.startswith("To")
  status, out, err = call(capsys, evaluate.main, "--run", folder)
  assert (status, err) == (0, "") and f"{heldout:.4f}" in out
  status, out, err = call(capsys, inspect_cli.main, "--run", folder, "--text", "To be")
  assert (status, err) == (0, "") and "at step 0" in out
  model = resolve(load_experiment(str(tmp_path / "verse.py")), 256).model
  logits = numpy_gpt.forward(
    to_oracle(verse, model), np.frombuffer(b"To b", np.uint8)[None].astype(int), model
  )[0]
  nats = np.log(np.exp(logits).sum(-1)) - logits[range(4), list(b"o be")]
  assert f"loss        {nats.mean():.4f} nats" in out

  assert (
    call(capsys, export.main, "--run", folder, "--format", "llmc", "--out", "again.bin")[0] == 0
  )
  assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()
  assert call(capsys, export.main, "--run", folder, "--format", "hf", "--out", "hf")[0] == 0
  again = plan_run(begin(load_experiment(str(tmp_path / "verse.py")), "hf"))
  assert equal_bits(again.initial.params, verse) and isinstance(again.data.tokenizer, ByteTokenizer)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_trace_begins_with_the_imported_number(base, verse, capsys, tmp_path):
  result = start(begin(base, "model.bin", train__steps=2), "run")
  trace = ["--run", "run", "--trace", "blocks/w_up[0,3,5]", "--trace-steps", "2"]
  status, out, err = call(capsys, inspect_cli.main, *trace)
  assert (status, err) == (0, "") and f"initially {verse['blocks']['w_up'][0, 3, 5]:.6g}" in out
  assert f"{float(result.params['blocks']['w_up'][0, 3, 5]):.6g}" in out

  status, _, err = call(
    capsys, run.main, "--experiment", "verse.py", "--workdir", "run", "--steps", 2
  )
  assert (status, err.count("\n")) == (
    2,
    1,
  ) and "train.init_from is model.bin there and None here" in err
  (tmp_path / "model.bin").rename(tmp_path / "moved.bin")
  status, _, err = call(capsys, inspect_cli.main, *trace)
  assert (status, err.count("\n")) == (2, 1) and "model.bin" in err


def test_a_run_that_is_its_own_source_is_not_set_aside(base, verse, capsys, tmp_path):
  """--fresh moves nothing before it is certain that the run can begin."""
  save_run(tmp_path / "own", resolve(base, 256), ByteTokenizer(), verse)
  words = [
    "--experiment",
    "verse.py",
    "--init-from",
    "own",
    "--workdir",
    "own",
    "--steps",
    "0",
    "--fresh",
  ]
  status, _, err = call(capsys, run.main, *words)
  assert status == 0 or ((tmp_path / "own" / "experiment.json").exists() and err.count("\n") == 1)


def test_a_misspelt_name_ends_the_command(verse, capsys, tmp_path):
  status, _, err = call(
    capsys, run.main, "--experiment", "verse.py", "--init-from", "model.bim", "--steps", "0"
  )
  assert (
    status == 2
    and err.startswith("error: train.init_from='model.bim' does not exist")
    and err.count("\n") == 1
  )
  assert not (tmp_path / "runs").exists()


# --- What comes with weights, and what does not ---


@pytest.mark.parametrize(
  ("tokenizer", "more"), [("characters", {}), ("bpe", {"data__bpe_vocab_size": 260})]
)
def test_ids_made_from_the_text_are_no_ids_of_weights_without_a_tokenizer(
  tokenizer, more, base, tmp_path
):
  path = write_weights(
    tmp_path, "llmc", resolve(base, 256), draw(resolve(base, 256).model), ByteTokenizer()
  )
  message = refusal(begin(base, path, data__tokenizer=tokenizer, **more))
  assert "comes without a tokenizer" in message and "--set data.tokenizer=bytes" in message


def test_gpt2s_number_of_ids_asks_for_gpt2s_tokenizer(base, tmp_path):
  config = dataclasses.replace(resolve(base, 256).model, vocab_size=50304)
  path = write_weights(
    tmp_path, "llmc", dataclasses.replace(base, model=config), draw(config), ByteTokenizer()
  )
  message = refusal(begin(base, path, data__tokenizer="bytes", model__vocab_size=None))
  assert "50,304 ids, as GPT-2 has" in message and message.endswith("Try --set data.tokenizer=gpt2")


def test_a_checkpoint_of_a_run_can_be_named(base, tmp_path):
  params = draw(resolve(base, 256).model)
  there = save_run(tmp_path / "run", resolve(base, 256), ByteTokenizer(), params, step=3)
  plan = plan_run(begin(base, there / "checkpoints" / "3"))
  assert plan.initial.location == f"{there} at step 3" and equal_bits(plan.initial.params, params)
  assert "has no checkpoint of step 4; it has 3" in refusal(
    begin(base, there / "checkpoints" / "4")
  )


def test_an_empty_name_is_no_folder(base):
  assert "train.init_from is empty" in refusal(begin(base, ""))


@pytest.mark.slow
def test_a_run_says_where_it_began_also_when_it_goes_on(base, source, tmp_path):
  experiment = change(begin(base, source[0]), {"train.steps": 0})
  first = plan_run(experiment, workdir=tmp_path / "run")
  train.train_run(first)
  again = plan_run(experiment, workdir=tmp_path / "run")
  assert again.initial is None and again.weights == first.weights
  line, *_ = summary.describe_initial(again)
  assert line == ("weights", f"began from {source[0]} (SHA-256 {first.initial.sha256[:12]})")
  assert summary.describe_initial(first)[1] == ("", "they leave open: the tokenizer")
