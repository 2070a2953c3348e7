"""What comes with weights: sizes, tokenizer and sequences need not be typed; what was given by name
must agree.
"""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import VERSE, WORDS
from switches import draw_params

from jgpt import cli, run, train
from jgpt.config.catalog import load_experiment
from jgpt.config.experiment import GPT2_SIZES
from jgpt.config.settings import change, list_settings, resolve
from jgpt.errors import UserError
from jgpt.plan import claim_folder, plan_run
from jgpt.report import summary
from jgpt.runs import checkpoint
from jgpt.runs.folder import RunFiles, read_run_files, write_run_files
from jgpt.step import begin_state
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer
from jgpt.weights import hugging_face, llmc
from jgpt.weights.adoption import adopt_settings
from jgpt.weights.gpt2 import GPT2_SETTINGS, Weights, gpt2_shapes, make_gpt2_config

# A network that no experiment has.
OWN = {
  "model.num_layers": 3,
  "model.num_heads": 3,
  "model.d_model": 12,
  "model.d_ff": 48,
  "model.max_seq_len": 24,
  "model.norm": "layer",
  "model.norm_embed": False,
  "model.activation": "gelu_tanh",
  "model.biases": "all",
  "model.tied_head": True,
  "model.scale_embed": False,
}
SMALL = {"data.batch_size": 2, "train.steps": 2, "sample.max_tokens": 2, "mesh.data": 1}


def draw(config):
  return jax.tree.map(lambda x: x.astype(np.float32), draw_params(config))


def save_run(workdir, experiment, tokenizer):
  """A run folder of drawn parameters."""
  data = {"kind": "path", "location": "there", "sha256": "0" * 64}
  write_run_files(workdir, RunFiles("other", experiment, tokenizer, data))
  state = begin_state(draw(experiment.model), experiment)
  with checkpoint.open_checkpoints(workdir) as manager:
    checkpoint.save_checkpoint(manager, jax.tree.map(jax.numpy.asarray, state))
  return workdir


@pytest.fixture
def there(weights, monkeypatch):
  """Makes the folder of the weights the current one."""
  monkeypatch.chdir(weights)
  return weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A folder with texts and weights of the own network: a run on verse by its characters (chars),
  one on words (words), and bytes as Hugging Face's folder (hf), file alone and llm.c's.
  """
  tmp_path = tmp_path_factory.mktemp("weights")
  (tmp_path / "verse.txt").write_text(VERSE, encoding="utf-8")
  (tmp_path / "words.txt").write_text("".join(f"{w}\n" for w in WORDS), encoding="utf-8")
  chars = CharTokenizer("".join(sorted({*VERSE})), bos=False)
  stream = {"data.tokenizer": "characters", "data.seq_len": 17, "data.path": "verse.txt"}
  base = change(load_experiment("shakespeare_bytes"), OWN | stream | {"sample.prompt": "To"})
  save_run(tmp_path / "chars", resolve(base, chars.vocab_size), chars)
  letters = CharTokenizer("".join(sorted({*"".join(WORDS)})), bos=True)
  words = {"data.seq_len": 7, "data.path": "words.txt", "model.tied_head": False}
  names = change(load_experiment("names"), OWN | words)
  save_run(tmp_path / "words", resolve(names, letters.vocab_size), letters)
  config = resolve(change(base, {"data.tokenizer": "bytes"}), 256).model
  (tmp_path / "hf").mkdir()
  hugging_face.write_folder(tmp_path / "hf", draw(config), config, ByteTokenizer(), "float32")
  shutil.copy(tmp_path / "hf" / "model.safetensors", tmp_path / "alone.safetensors")
  llmc.write_weights(tmp_path / "model.bin", draw(config), config, "float32")
  return tmp_path


def begin(name, source, **more):
  changes = SMALL | {"train.init_from": source}
  return change(load_experiment(name), changes | {n.replace("__", "."): v for n, v in more.items()})


def refusal(experiment):
  with pytest.raises(UserError) as error:
    plan_run(experiment)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("way", ["init_from", "continue_from"])
@pytest.mark.parametrize("name", ["text", "names", "shakespeare_char", "gpt2_shakespeare"])
def test_a_run_of_another_network_needs_no_setting(name, way):
  """Its network, tokenizer, form of sequences and length; the text is the experiment's own."""
  more = {"data__heldout_tokens": 99} if name == "gpt2_shakespeare" else {}
  experiment = begin(name, None, data__path="verse.txt", **{f"train__{way}": "chars"}, **more)
  plan = plan_run(experiment)
  settings, own = list_settings(plan.experiment), list_settings(experiment)
  for setting, value in OWN.items():
    assert settings[setting] == value, setting
  assert plan.data.tokenizer == read_run_files(Path("chars")).tokenizer
  assert settings["data.seq_len"] == 17 and settings["data.tokenizer"] == "characters"
  is_documents = own["data.batching"] == "documents"
  assert settings["data.batching"] == ("random" if is_documents else own["data.batching"])
  kept = ("optimizer.peak_lr", "optimizer.schedule", "model.dropout", "data.batch_size")
  assert all(settings[n] == own[n] for n in kept)
  assert set(OWN) <= set(plan.adopted) and not set(kept) & set(plan.adopted)
  shown = " ".join(line for _, line in summary.describe_initial(plan))
  assert "model.num_layers=3" in shown and "data.seq_len=17" in shown


@pytest.mark.usefixtures("there")
def test_documents_and_their_prompt_come_with_a_run_on_documents():
  """For a stream with tokens held out and a prompt of letters that the run does not know."""
  plan = plan_run(begin("gpt2_shakespeare", "words", data__path="words.txt"))
  data = plan.experiment.data
  assert data.batching == "documents" and data.seq_len == 7 and data.heldout_tokens is None
  assert len(plan.data.documents) and plan.experiment.sample.prompt == ""
  message = refusal(begin("names", "words", data__path="verse.txt"))
  assert "not in the vocabulary" in message


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("source", ["hf", "model.bin", "hf/model.safetensors"])
def test_files_of_gpt2s_kind_need_no_setting(source):
  """Documents of characters become a stream; a longer window is cut to their positions."""
  is_bare = source == "model.bin"  # without a tokenizer names would make one of its characters
  more = {"data__tokenizer": "bytes", "data__batching": "random"} if is_bare else {}
  plan = plan_run(begin("names", source, data__path="verse.txt", **more))
  model = plan.experiment.model
  assert (model.num_layers, model.num_heads, model.d_model, model.max_seq_len) == (3, 3, 12, 24)
  assert (model.norm, model.biases, model.positions) == ("layer", "all", "learned")
  assert plan.experiment.data.batching == "random"
  long = plan_run(begin("text", source, data__path="verse.txt"))
  assert long.experiment.data.seq_len == 24


@pytest.mark.usefixtures("there")
def test_what_a_file_alone_leaves_open_is_named():
  """A number of heads that the experiment has for another width would be a guess."""
  message = refusal(begin("text", "alone.safetensors", data__path="verse.txt"))
  assert "does not say its number of heads" in message and "model.num_heads=" in message
  plan = plan_run(
    begin("shakespeare_bytes", "alone.safetensors", data__path="verse.txt", model__num_heads=2)
  )
  assert "model.num_heads (here 2)" in plan.initial.note and "tokenizer" in plan.initial.note
  assert plan.experiment.model.activation == "gelu_tanh"


def test_a_file_of_gpt2s_sizes_has_gpt2s_heads_and_tokenizer():
  """Beside an experiment of another width; beside one of these sizes its own heads stay."""
  sizes = GPT2_SIZES["d24"] | {"vocab_size": 50257, "max_seq_len": 1024}
  model = GPT2_SETTINGS | {"tied_head": True, "biases": "all"} | sizes
  del model["num_heads"]
  shapes = gpt2_shapes(make_gpt2_config(**sizes))
  weights = Weights("the weights", model, shapes, read=lambda name: np.ones(1))
  names, adopted = adopt_settings(load_experiment("names"), weights, {})
  assert names.model.num_heads == 16 and names.model.activation == "gelu_tanh"
  assert names.data.tokenizer == "gpt2" and names.data.batching == "random"
  assert "model.num_heads" in adopted
  own = change(load_experiment("names"), {"model.size": "d24", "model.num_heads": 8})
  own = dataclasses.replace(own, given=())
  assert adopt_settings(own, weights, {})[0].model.num_heads == 8
  assert adopt_settings(names, weights, {"model.num_heads": 4})[0].model.num_heads == 4


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("way", ["init_from", "continue_from"])
@pytest.mark.parametrize(
  ("given", "words"),
  [
    ({"model.num_layers": 2}, ["model.num_layers=3 there and 2 here", "--set model.num_layers=3"]),
    ({"model.num_heads": 5}, ["model.num_heads=3 there and 5 here"]),
    ({"model.norm": "rms"}, ["model.norm=layer there and rms here"]),
    ({"model.max_seq_len": 99}, ["model.max_seq_len=24 there and 99 here"]),
    ({"model.size": "d12"}, ["model.num_layers=3 there and 12 here"]),
    ({"data.tokenizer": "bytes"}, ["of the kind characters", "--set data.tokenizer=characters"]),
    ({"data.seq_len": 25}, ["data.seq_len=25", "24 positions", "--set data.seq_len=24"]),
    ({"data.batch_size": 0}, ["data.batch_size=0"]),
    ({"model.num_layer": 3}, ["there is no setting 'model.num_layer'"]),
  ],
)
def test_a_given_setting_that_contradicts_is_named_with_both_values(given, words, way, capsys):
  """From the command, where the experiment without the weights may not hold together."""
  words = [*words, "error: "]
  sets = [w for n, v in given.items() for w in ("--set", f"{n}={v}")]
  flag = f"--{way.replace('_', '-')}"
  args = ["--experiment", "names", flag, "chars", "--set", "data.path=verse.txt", *sets]
  assert cli.guard(lambda: run.main(args)) == 2
  err = capsys.readouterr().err
  assert all(word in err for word in words) and err.count("\n") == 1, err


@pytest.mark.usefixtures("there")
def test_given_settings_that_only_the_weights_allow_are_taken():
  """20 tokens are more than names' 16 positions, and 6 heads do not divide its width."""
  base = load_experiment("names")
  changes = SMALL | {"train.init_from": "chars", "data.path": "verse.txt", "data.seq_len": 20}
  with pytest.raises(UserError):
    change(base, changes)
  _, experiment = run.change_base(*(run.load_base("names", changes)[1], changes))
  assert plan_run(experiment).experiment.data.seq_len == 20
  changes = SMALL | {"train.init_from": "alone.safetensors", "data.path": "verse.txt"}
  changes |= {"model.num_heads": 6, "data.tokenizer": "bytes", "data.batching": "random"}
  assert run.change_base(base, changes)[1].model.num_heads == 6


# --- The same command again ---


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("way", ["init_from", "continue_from"])
def test_the_same_settings_go_on_when_the_weights_have_gone(way, weights, tmp_path, monkeypatch):
  there = shutil.copytree(weights, tmp_path / "there")
  monkeypatch.chdir(there)
  experiment = begin("names", None, data__path="verse.txt", **{f"train__{way}": "chars"})
  plan = plan_run(experiment, workdir=there / "run")
  first = train.train_run(plan)
  recorded = read_run_files(there / "run")
  assert set(recorded.adopted) == set(plan.adopted) and recorded.experiment.model.d_model == 12
  shutil.move(there / "chars", there / "moved")
  again = plan_run(experiment, workdir=there / "run")
  compute = first.experiment.compute
  assert again.start_step == 2
  assert dataclasses.replace(again.experiment, compute=compute) == first.experiment
  assert again.adopted == plan.adopted
  with pytest.raises(UserError, match=r"model\.d_ff is 48 there and 32 here"):
    plan_run(change(experiment, {"model.d_ff": 32}), workdir=there / "run")
  with pytest.raises(UserError, match=rf"train\.{way} is chars there and None here"):
    plan_run(change(experiment, {f"train.{way}": None}), workdir=there / "run")
  path = there / "run" / "experiment.json"
  value = json.loads(path.read_text())
  for damaged in ({}, ["model.nothing"], [3], "x"):
    path.write_text(json.dumps(value | {"adopted": damaged}))
    with pytest.raises(UserError, match="which settings came with"):
      read_run_files(there / "run")


@pytest.mark.parametrize("way", ["init_from", "continue_from"])
def test_another_path_of_the_same_weights_is_the_same_run(way, there, tmp_path, capsys):
  """Absolute, through a link, or with a dot; a copy elsewhere is another setting."""
  begun = begin("names", None, data__path="words.txt", **{f"train__{way}": "words"})
  with contextlib.ExitStack() as stack:
    claim_folder(plan_run(begun, workdir=tmp_path / "run"), jax.devices(), stack)
  (tmp_path / "link").symlink_to(there / "words")
  for path in (there / "words", "./words", tmp_path / "link"):
    plan = plan_run(change(begun, {f"train.{way}": str(path)}), workdir=tmp_path / "run")
    assert getattr(plan.experiment.train, way) == "words" and plan.experiment.data.seq_len == 7
  with pytest.raises(UserError, match=rf"train\.{way} is words there and {tmp_path}/copy here"):
    plan_run(change(begun, {f"train.{way}": f"{tmp_path}/copy"}), workdir=tmp_path / "run")
  args = [f"--{way.replace('_', '-')}", there / "words", "--workdir", tmp_path / "run"]
  assert cli.guard(lambda: run.main([*map(str, args), "--print-config"])) == 0
  assert f"\ntrain.{way}={there / 'words'}\n" in capsys.readouterr().out


# --- Without an experiment ---


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("way", ["init_from", "continue_from"])
def test_without_an_experiment_the_runs_own_settings_are_the_base(way, capsys):
  args = [f"--{way.replace('_', '-')}", "words", "--print-config"]
  assert cli.guard(lambda: run.main(args)) == 0
  out = capsys.readouterr().out
  for line in ("data.path=words.txt", "data.seq_len=7", f"train.{way}=words", "model.num_layers=3"):
    assert f"\n{line}\n" in out
  assert "\noptimizer.decay_steps=none\n" in out


@pytest.mark.usefixtures("there")
def test_weights_without_a_run_need_an_experiment(capsys):
  for source in ("hf", "model.bin", "gpt2", "nothing"):
    assert cli.guard(lambda source=source: run.main(["--init-from", source])) == 2
    err = capsys.readouterr().err
    assert "add --experiment NAME" in err and err.count("\n") == 1


@pytest.mark.usefixtures("there")
def test_microgpts_initial_values_make_way():
  changes = {"train.continue_from": "words", "data.path": "words.txt"}
  _, base = run.load_base("microgpt", changes)
  plan = plan_run(change(base, SMALL | changes))
  assert plan.experiment.train.init == "normal" and plan.origin["step"] == 0
