"""What a run predicts, against NumPy's softmax and the training loss.

The first updates of a number, against training.
"""

import ast
import functools
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import equivalence
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from small_runs import compiled_quickly, train_small, train_verse, train_words

import jgpt.batches
import jgpt.inspect.cli
import jgpt.model
import jgpt.step
from jgpt import cli
from jgpt.batches import Batch
from jgpt.config.settings import change
from jgpt.errors import UserError
from jgpt.inspect.attention import format_attention, format_maps
from jgpt.inspect.predictions import make_text_batch, mean_loss, predict, show_context, show_token
from jgpt.inspect.trace_table import describe_formulas, format_updates
from jgpt.inspect.updates import trace_updates
from jgpt.model import apply, init_params
from jgpt.params import find_entry, walk
from jgpt.report import figures
from jgpt.runs.folder import read_run_files
from jgpt.runs.open import open_run
from jgpt.sharding import stack_blocks
from jgpt.step import loss_fn
from jgpt.text.bpe import BpeTokenizer
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer
from jgpt.weights.initial import find_initial

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  return train_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def verse(tmp_path_factory):
  return train_verse(tmp_path_factory.mktemp("verse"))


jit_apply = jax.jit(apply, static_argnames="config")
jit_loss_fn = jax.jit(loss_fn, static_argnames="experiment")


def call(capsys, *args):
  status = cli.guard(lambda: jgpt.inspect.cli.main([str(a) for a in args]))
  return status, *capsys.readouterr()


def make_rows(run, text):
  batch = make_text_batch(text, run.data.tokenizer, run.experiment)
  return predict(run.result.params, batch, run.data.tokenizer, run.experiment.model)


# --- Predictions ---

# What the model reads and what it is to say, by hand: BOS + characters + BOS and at most 5
# predictions; bytes.
FRAMED = {
  "axrst": ("words", ["BOS", "a", "x", "r", "s"], ["a", "x", "r", "s", "t"]),
  "bwé": ("words", ["BOS", "b", "w", "é"], ["b", "w", "é", "BOS"]),
  "–\n\0": ("verse", [0xE2, 0x80, 0x93, 0x0A], [0x80, 0x93, 0x0A, 0x00]),
  "to be that is the question": (
    "verse",
    [*b"to be that is th"],
    [*b"o be that is the"],
  ),  # 16 positions are trained, of the model's 20
}


def to_ids(tokens, tokenizer):
  return [
    t if isinstance(t, int) else tokenizer.bos_id if t == "BOS" else tokenizer.chars.index(t)
    for t in tokens
  ]


@pytest.mark.parametrize("text", FRAMED)
@pytest.mark.slow
def test_rows_are_softmax_of_the_logits(request, text):
  """Probability, -log p and the three best guesses of each position, from `apply` by NumPy in
  float64.
  """
  name, inputs, targets = FRAMED[text]
  run = request.getfixturevalue(name)
  inputs, targets = (to_ids(tokens, run.data.tokenizer) for tokens in (inputs, targets))
  logits = np.asarray(
    jit_apply(run.result.params, jnp.array([inputs]), run.experiment.model), np.float64
  )[0]
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  rows = make_rows(run, text)
  assert [row.position for row in rows] == list(range(len(inputs)))
  assert [row.target_id for row in rows] == targets
  for row, p in zip(rows, probs, strict=True):
    assert row.probability == pytest.approx(p[row.target_id], rel=1e-5)
    assert row.nats == pytest.approx(-math.log(p[row.target_id]), rel=1e-5)
    assert row.one_in == pytest.approx(1 / p[row.target_id], rel=1e-5)
    guessed = [guess.probability for guess in row.guesses]
    assert len(guessed) == 3 and guessed == sorted(guessed, reverse=True)
    assert guessed == pytest.approx(sorted(p, reverse=True)[:3], rel=1e-5)
    assert [p[guess.id] for guess in row.guesses] == pytest.approx(guessed, rel=1e-5)


@pytest.mark.parametrize("text", FRAMED)
def test_the_mean_is_the_training_loss(request, text):
  """Of the text as training frames it, written down here.

  `make_text_batch` makes the same batch.
  """
  name, inputs, targets = FRAMED[text]
  run = request.getfixturevalue(name)
  ids = [jnp.array([to_ids(tokens, run.data.tokenizer)]) for tokens in (inputs, targets)]
  batch = Batch(*ids, jnp.ones(ids[0].shape))
  rows = make_rows(run, text)
  loss = jit_loss_fn(run.result.params, batch, run.experiment)
  assert mean_loss(rows) == pytest.approx(float(loss), rel=1e-6)
  framed = make_text_batch(text, run.data.tokenizer, run.experiment)
  loss = jit_loss_fn(run.result.params, framed, run.experiment)
  assert mean_loss(rows) == pytest.approx(float(loss), rel=1e-6)


def test_a_document_is_framed_as_in_training(words):
  """The batch of a training document is the row that training takes."""
  for i in (0, 1, 2):
    framed = make_text_batch(words.data.documents[i], words.data.tokenizer, words.experiment)
    np.testing.assert_array_equal(framed.inputs_BT[0], words.data.train.tokens[i, :-1])
    np.testing.assert_array_equal(framed.targets_BT[0], words.data.train.tokens[i, 1:])
    assert framed.weights_BT.sum() == words.data.train.lengths[i]


def test_the_table(capsys, words):
  """Each line is a row's, and the last lines say what their mean is."""
  rows = make_rows(words, "bwé")
  status, out, err = call(capsys, "--run", words.workdir, "--text", "bwé")
  assert status == 0 and err == ""
  head, table, loss = out.rstrip("\n").split("\n\n")
  assert (
    f"{words.workdir} at step 60" in head and "'bwé' as in training: BOS, 3 characters, BOS" in head
  )
  header, *lines = table.split("\n")
  assert (
    " ".join(header.split())
    == "position context target probability -log p 1 in best guess second third"
  )
  for line, row, context in zip(
    lines, rows, ["BOS", "BOS 'b'", "BOS 'bw'", "BOS 'bwé'"], strict=True
  ):
    assert line.split() == [
      str(row.position), *context.split(), row.target, f"{row.probability:.3f}", f"{row.nats:.4f}",
      jgpt.inspect.cli.format_count(row.one_in),
      *(w for g in row.guesses for w in (g.token, f"{g.probability:.3f}")),
    ]  # fmt: skip
  nats = [float(line[header.index("-log p") - 1 :].split()[0]) for line in lines]
  assert float(loss.split()[1]) == pytest.approx(np.mean(nats), abs=1e-4)
  assert "training on this document alone would report the same loss" in loss
  assert f"uniform guessing: {math.log(words.experiment.model.vocab_size):.4f}" in loss


@pytest.mark.slow
def test_what_is_cut_is_said(capsys, words, verse):
  assert "cut after 5 predictions" in call(capsys, "--run", words.workdir, "--text", "axrst")[1]
  assert "cut" not in call(capsys, "--run", words.workdir, "--text", "axr")[1]
  out = call(capsys, "--run", verse.workdir, "--text", "x" * 30)[1]
  assert "the first 17 of 30 tokens, one window: training has 16 positions" in out
  assert (
    "evaluation of these tokens alone reports the same loss" in out and "training on" not in out
  )


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 17, 30])
def test_evaluation_of_the_tokens_in_the_table_has_their_loss(capsys, verse, num):
  text = ("to be, or not" * 3)[:num]
  out = call(capsys, "--run", verse.workdir, "--text", text)[1]
  stated = float(re.search(r"loss +(\d+\.\d+) nats", out)[1])
  assert stated == pytest.approx(open_run(verse.workdir).loss(text[:17]), abs=1e-4)


def test_an_older_checkpoint(capsys, words):
  out = call(capsys, "--run", words.workdir, "--text", "ax", "--step", 30)[1]
  assert "at step 30" in out and out != call(capsys, "--run", words.workdir, "--text", "ax")[1]


@pytest.mark.slow
def test_ids_beyond_the_tokenizers_have_a_number(words):
  """A model may have more ids than its tokenizer: they are guesses like others.

  Rows of padding are none.
  """
  experiment = change(words.experiment, {"model.vocab_size": 40, "model.vocab_multiple": 16})
  params = jax.jit(lambda: init_params(jax.random.key(0), experiment.model))()
  batch = make_text_batch("ax", words.data.tokenizer, experiment)
  rows = predict(params, batch, words.data.tokenizer, experiment.model, num_guesses=100)
  assert all(
    len(row.guesses) == 40 and sum(g.probability for g in row.guesses) == pytest.approx(1)
    for row in rows
  )
  assert {g.token for g in rows[0].guesses} >= {"'a'", "BOS", "id 39"}


# --- Tokens for a person ---


def test_tokens_are_shown_apart():
  chars = CharTokenizer("\t\n '\\a\xa0é", bos=True)
  shown = [show_token(i, chars) for i in range(10)]
  assert shown == [r"'\t'", r"'\n'", "' '", '"\'"', r"'\\'", "'a'", r"'\xa0'", "'é'", "BOS", "id 9"]
  bytes_ = ByteTokenizer()
  assert [show_token(i, bytes_) for i in (0, 97, 127, 0xE2)] == [
    r"'\x00'", "'a'", r"'\x7f'", "byte 0xe2",
  ]  # fmt: skip
  bpe = BpeTokenizer(
    "Ġ t\nĠt he\nâ Ģ".replace("he", "h"), end_of_text=True
  )  # " t", " th", and the bytes e2 80
  assert bpe.token_bytes[256:] == [b" t", b" th", b"\xe2\x80", b""]
  assert [show_token(i, bpe) for i in (256, 258, 259)] == ["' t'", r"'\xe2\x80'", "end of text"]


@pytest.mark.parametrize("text", ["", "a\n\tb", "é – 日本", "".join(map(chr, range(0x250)))])
def test_bytes_of_tokens_are_those_of_the_text(text):
  for tokenizer in (
    ByteTokenizer(),
    BpeTokenizer("Ã ©\nĠ âĢ".replace("âĢ", "â"), end_of_text=True),
  ):
    assert b"".join(tokenizer.token_bytes[i] for i in tokenizer.encode(text)) == text.encode()


def test_contexts_are_shortened_from_the_left():
  tokenizer = ByteTokenizer()

  def show(text: str, num_bytes: int | None = None) -> str:
    return show_context(list(text.encode())[:num_bytes], tokenizer)

  assert show("be\n") == r"'be\n'"
  assert (
    show("caf€", 4) == r"'caf\xe2'"
    and show("caf€", 5) == r"'caf\xe2\x82'"
    and show("caf€") == "'caf€'"
  )
  assert show("x" * 24) == f"'{'x' * 24}'" and show("y" + "x" * 24) == f"…'{'x' * 24}'"
  assert show("\n" * 30) == "…'" + r"\n" * 12 + "'"
  assert show("😀" * 40) == f"…'{'😀' * 24}'"  # cut between characters, never inside one
  names = CharTokenizer("ab", bos=True)
  assert [show_context(ids, names) for ids in ([2], [2, 0], [2] + [1] * 30)] == [
    "BOS", "BOS 'a'", f"…'{'b' * 24}'",
  ]  # fmt: skip


def test_one_in_is_rounded_for_a_person():
  shown = {
    1.0: "1.0",
    1.26: "1.3",
    9.96: "10",
    19.53: "20",
    137.2: "140",
    54321: "54,000",
    2.1e9: "2e+09",
    math.inf: "inf",
  }
  assert {n: jgpt.inspect.cli.format_count(n) for n in shown} == shown


# --- Parameters ---


def list_files(folder):
  return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def read_table(text):
  """The table's header, and a row of numbers for each parameter, by name; None for words."""

  def number(word):
    word = word.replace(",", "")
    return float(word) if re.fullmatch(r"[-+.e\d]+", word) else None

  header, *lines = text.split("\n")
  words = [line.split() for line in lines]
  rows = {w[0]: [number(word) for word in w[(1 if w[0] == "total" else 2) :]] for w in words}
  shapes = {w[0]: w[1] for w in words if w[0] != "total"}
  return header.split(), rows, shapes


def norm(x):
  return float(np.linalg.norm(np.asarray(x, np.float64)))


def check_table(capsys, run, state, *args):
  """The table of a run at a state, against NumPy and against a real update: the training step from
  this state, made to repeat its last update's batch and rate.
  """
  before = list_files(run.workdir)
  status, out, err = call(capsys, "--run", run.workdir, *args)
  assert status == 0 and err == "" and list_files(run.workdir) == before
  head, table, notes = out.rstrip("\n").split("\n\n")
  step = int(state.step) - 1
  assert f"{run.workdir} at step {step + 1}" in head
  lr = state.opt_state["lr"]._replace(count=jnp.int32(step))
  again = state.replace(step=jnp.int32(step), opt_state=state.opt_state | {"lr": lr})
  batch = jgpt.batches.batch(jax.device_put(run.data.train), again.step, run.experiment)
  _, grads = jax.jit(jgpt.step.loss_and_grads, static_argnums=3)(
    again.params, batch, again.step, run.experiment
  )
  after, metrics = jax.jit(jgpt.step.train_step, static_argnums=2)(again, batch, run.experiment)
  params, grads, after = (stack_blocks(tree) for tree in (state.params, grads, after.params))
  updates = jax.tree.map(lambda new, old: np.float64(new) - np.float64(old), after, params)
  header, rows, shapes = read_table(table)
  assert header == ["parameter", "shape", "count", "norm", "rms", "largest", "grad", "ratio"]
  assert [*rows] == [*(name for name, *_ in walk(run.experiment.model)), "total"]
  trees = [equivalence.leaves_by_name(tree) for tree in (params, grads, updates)]
  trees = [tree | {"total": np.concatenate([x.ravel() for x in tree.values()])} for tree in trees]
  for name, row in rows.items():
    p, g, u = (tree[name] for tree in trees)
    assert name == "total" or shapes[name] == "×".join(map(str, p.shape))
    rms, largest = norm(p) / math.sqrt(p.size), np.abs(p).max()
    expected = [p.size, norm(p), rms, largest, norm(g), math.log10(norm(u) / norm(p))]
    assert row == pytest.approx(expected, rel=0.05, abs=0.006), name
  total = rows["total"]
  assert total[4] == pytest.approx(float(metrics["train/grad_norm"]), abs=1e-4)
  assert f"of update {step + 1}, the run's last" in notes
  assert f"is now {float(metrics['train/loss']):.4f} nats" in notes
  rate = float(metrics["train/lr"])
  assert f"that update's rate of {rate:.3g}" in notes
  assert f"would add {math.log10(run.experiment.optimizer.peak_lr / rate):.1f} to each" in notes
  return notes


@pytest.mark.slow
def test_the_table_of_parameters(capsys, words):
  """Numbers are those of NumPy, and the ratio is that of an update that was made."""
  check_table(capsys, words, words.result.state)


@pytest.mark.slow
def test_the_table_of_a_run_with_dropout_clipping_and_decay(capsys, verse):
  check_table(capsys, verse, verse.result.state)
  layer = call(capsys, "--run", verse.workdir, "--layer", 1)[1].split("\n\n")[1]
  _, rows, shapes = read_table(layer)
  inside = [name for name, _, layers in walk(verse.experiment.model) if name.startswith("blocks/")]
  assert [*rows] == [*(f"{name}[1]" for name in inside), "total"]
  assert shapes["blocks/w_up[1]"] == "16×32"
  w_up = stack_blocks(verse.result.params)["blocks"]["w_up"]
  assert rows["blocks/w_up[1]"][1] == pytest.approx(norm(w_up[1]), abs=1e-4)
  _, rows, _ = read_table(
    call(capsys, "--run", verse.workdir, "--layer", "all")[1].split("\n\n")[1]
  )
  assert rows["blocks/w_up[0]"][1] == pytest.approx(norm(w_up[0]), abs=1e-4)
  assert "tok_embed" in rows and "blocks/w_up" not in rows


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"name": "adam"}, {"name": "sgd", "momentum": 0.9}])
def test_the_table_of_other_optimizers(capsys, words, tmp_path, changes):
  changes = {f"optimizer.{name}": value for name, value in changes.items()}
  changes |= {"optimizer.weight_decay": 0.1, "train.steps": 3}
  run = train_small(change(words.experiment, changes), tmp_path / "run")
  notes = check_table(capsys, run, run.result.state)
  assert f"{run.experiment.optimizer.name} would now add" in notes


@pytest.mark.slow
def test_the_table_of_an_older_checkpoint_and_of_none(capsys, words, tmp_path):
  """`--step` chooses the parameters, and with them batch and rate; before any update they are the
  first one's.
  """
  out = call(capsys, "--run", words.workdir, "--step", 30)[1]
  assert "at step 30" in out and "of update 30, the run's last" in out
  params = open_run(words.workdir, 30).params
  total = math.hypot(*(norm(x) for x in jax.tree.leaves(params)))
  assert read_table(out.split("\n\n")[1])[1]["total"][1] == pytest.approx(total, abs=1e-4)
  copy = shutil.copy(words.workdir.parent / "words.txt", tmp_path)
  assert call(capsys, "--run", words.workdir, "--set", f"data.path={copy}", "--step", 30)[1] == out
  assert "n/a" not in out
  changes = {"train.steps": 0, "model.biases": "mlp"}
  run = train_small(change(words.experiment, changes), tmp_path / "none")
  out = call(capsys, "--run", run.workdir)[1]
  assert read_table(out.split("\n\n")[1])[1]["blocks/b_up"][-1] is None
  assert "\nn/a         there is no ratio: all entries of the parameter are 0" in out
  rate = words.experiment.optimizer.peak_lr
  assert "of update 1, its first" in out and f"that update's rate of {rate:.3g}" in out


def test_without_a_text_or_an_optimizers_state_the_table_is_shorter(capsys, words, tmp_path):
  """One line says why, and the run is read only."""
  short = ["parameter", "shape", "count", "norm", "rms", "largest"]
  path = words.workdir.parent / "words.txt"
  aside = path.rename(path.with_name("aside.txt"))
  try:
    status, out, err = call(capsys, "--run", words.workdir)
    assert status == 0 and err == ""
    _, table, notes = out.rstrip("\n").split("\n\n")
    assert read_table(table)[0] == short and notes.count("\n") == 0
    assert notes.startswith("gradient    not computed: ") and f"nothing is at {path}" in notes
  finally:
    aside.rename(path)
  weights = shutil.copytree(words.workdir, tmp_path / "weights")
  shutil.rmtree(weights / "checkpoints" / "60" / "train_state")
  status, out, err = call(capsys, "--run", weights)
  assert status == 0 and err == "" and read_table(out.split("\n\n")[1])[0] == short
  assert "checkpoints/60 has no optimizer state, only parameters" in out


# --- Attention ---


def test_attention_is_shown(capsys, words, verse):
  """The maps of what `trace` finds for the tokens that training would make of the text."""
  status, out, err = call(capsys, "--run", words.workdir, "--attention", "bwé")
  assert status == 0 and err == ""
  tokens = jnp.array([to_ids(["BOS", "b", "w", "é"], words.data.tokenizer)])
  found = jgpt.model.trace(words.result.params, tokens, words.experiment)
  assert format_attention(found.attention_LBNTS[:, 0], ["BOS", "b", "w", "é"]) in out
  assert "'bwé' as in training: BOS and 3 characters\n" in out


@pytest.mark.slow
def test_attention_of_a_stream(capsys, verse, monkeypatch):
  """Every token has a row, at most those of the context in training; of many maps there is a mean
  for each layer, and `--layer` shows a layer's heads.
  """
  out = call(capsys, "--run", verse.workdir, "--attention", "to be")[1]
  found = jgpt.model.trace(verse.result.params, jnp.array([[*b"to be"]]), verse.experiment)
  weights_LNTS = found.attention_LBNTS[:, 0]
  num_heads, labels = weights_LNTS.shape[1], ["t", "o", "␣", "b", "e"]
  assert 2 * num_heads <= jgpt.inspect.cli.MAX_MAPS
  assert format_attention(weights_LNTS, labels) in out and "5 tokens\n" in out
  out = call(capsys, "--run", verse.workdir, "--attention", "to be", "--layer", 1)[1]
  assert format_attention(weights_LNTS[1:], labels, first_layer=1) in out and "layer 0" not in out
  monkeypatch.setattr(jgpt.inspect.cli, "MAX_MAPS", 2 * num_heads - 1)
  out = call(capsys, "--run", verse.workdir, "--attention", "to be", "--text", "to")[1]
  assert out.index("perplexity") < out.index("layer 0")
  assert format_maps(weights_LNTS.mean(1), ["layer 0", "layer 1"], labels) in out
  assert f"the mean of a layer's {num_heads} heads; --layer N shows" in out
  out = call(capsys, "--run", verse.workdir, "--attention", "to be", "--layer", "all")[1]
  assert format_attention(weights_LNTS, labels) in out
  out = call(capsys, "--run", verse.workdir, "--attention", "x" * 30)[1]
  assert "30 tokens; cut after 16 tokens, the context in training" in out
  assert "there is nothing to read" in call(capsys, "--run", verse.workdir, "--attention", "")[2]


@pytest.mark.slow
def test_attention_is_drawn(capsys, words, tmp_path, monkeypatch):
  """A picture of the kind that its suffix names, never over another file."""
  for name, begin in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
    args = ["--run", words.workdir, "--attention", "ax", "--out", tmp_path / name]
    status, out, err = call(capsys, *args)
    assert status == 0 and err == "" and f"wrote {tmp_path / name}: 1 × 4 maps" in out
    assert (tmp_path / name).read_bytes().startswith(begin)
    status, _, err = call(capsys, *args)
    assert status == 2 and "is there already. Choose another name" in err
  svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
  assert "layer 0, head 3" in svg and "BOS" in svg
  monkeypatch.setattr(figures, "can_draw", lambda: False)
  status, out, err = call(
    capsys, "--run", words.workdir, "--attention", "ax", "--out", tmp_path / "b.svg"
  )
  assert status == 2 and out == "" and "Try pip install matplotlib, or install jgpt" in err


# --- Updates ---


ENTRIES = [
  ("words", "tok_embed[4,2]"),
  ("words", "blocks/w_up[0,3,5]"),
  ("verse", "blocks/w_qkv[1,3,2,0,1]"),
  ("verse", "tok_embed[32,2]"),
  ("verse", "norm_final_bias[7]"),
]


@pytest.fixture(scope="module")
def traced(words, verse):
  """(name of a run, place of a number) -> rows of its first ten updates."""
  runs = {"words": words, "verse": verse}

  @functools.cache
  def trace(name, place):
    return trace_updates(
      runs[name].experiment,
      jax.devices(),
      runs[name].data,
      find_entry(place, runs[name].experiment.model),
    )

  return trace


@pytest.fixture(scope="module")
def ten(words, verse):
  """Both runs stopped after 10 updates, the schedule's length held (it is resolved)."""
  return {
    "words": train_small(change(words.experiment, {"train.steps": 10}), None),
    "verse": train_small(change(verse.experiment, {"train.steps": 10}), None),
  }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place"), ENTRIES)
def test_the_trace_is_what_training_did(request, ten, traced, name, place):
  """After ten updates value and moments have the bits of a run of ten.

  Losses and rates those of the run's own log.
  """
  entry, rows, state = (
    find_entry(place, ten[name].experiment.model),
    traced(name, place),
    ten[name].result.state,
  )

  def read(tree):
    for key in entry.name.split("/"):
      tree = tree[key]
    return float(tree[entry.index])

  assert rows[-1].value == read(ten[name].result.params)
  assert rows[-1].m == read(stack_blocks(state.opt_state["adam"].mu))
  assert rows[-1].v == read(stack_blocks(state.opt_state["adam"].nu))
  log = small_runs.read_untimed(request.getfixturevalue(name).workdir)[:10]
  assert [row.step for row in rows] == [row["step"] for row in log] == list(range(1, 11))
  assert [np.float32(row.loss) for row in rows] == [np.float32(row["train/loss"]) for row in log]
  assert [np.float32(row.rate) for row in rows] == [np.float32(row["train/lr"]) for row in log]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place"), ENTRIES)
def test_each_column_follows_from_those_before(request, traced, name, place):
  """Adam by hand from the gradients alone: the moments of each update, their corrections, the decay
  and the new value.
  """
  run, rows = request.getfixturevalue(name), traced(name, place)
  optimizer = run.experiment.optimizer
  assert len(rows) == 10 and any(row.gradient for row in rows) and any(row.update for row in rows)
  m = v = 0.0
  for row in rows:
    m = optimizer.b1 * m + (1 - optimizer.b1) * row.gradient
    v = optimizer.b2 * v + (1 - optimizer.b2) * row.gradient**2
    assert row.m == pytest.approx(m, rel=1e-4, abs=1e-9) and row.v == pytest.approx(
      v, rel=1e-4, abs=1e-12
    )
    decay = 0.1 * row.value_before if name == "verse" and "bias" not in place else 0.0
    m_hat, v_hat = m / (1 - optimizer.b1**row.step), v / (1 - optimizer.b2**row.step)
    update = -row.rate * (m_hat / (math.sqrt(v_hat) + 1e-8) + decay)
    assert row.decay == pytest.approx(decay) and row.update == pytest.approx(
      update, rel=1e-3, abs=1e-9
    )
    assert row.value == pytest.approx(row.value_before + row.update, abs=1e-7)
    assert str(row.update) != "-0.0"
  assert [row.value for row in rows[:-1]] == [row.value_before for row in rows[1:]]


def test_clipping_acts_in_the_runs_traced(words, verse):
  """What the test above finds of clipping rests on this."""
  norms = [row["train/grad_norm"] for row in small_runs.read_untimed(verse.workdir)[:10]]
  assert (
    min(norms) > 1.2 * verse.experiment.optimizer.clip_norm
    and words.experiment.optimizer.clip_norm is None
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("rise", "skipped", "changes"),
  [(math.nan, (1, 4, 5), {}), (50.0, (22,), {"optimizer.skip_spikes": 8.0})],
)
def test_skipped_updates_do_not_count_for_adam(words, monkeypatch, rise, skipped, changes):
  """Nor change a number: after them each column follows from those before with Adam's own t."""
  experiment = change(words.experiment, changes)

  def loss_and_grads(params, batch, step, *args):
    loss, grads = right(params, batch, step, *args)
    return loss + jnp.where(jnp.isin(step + 1, jnp.array(skipped)), rise, 0.0), grads

  right = jgpt.step.loss_and_grads
  monkeypatch.setattr(jgpt.step, "loss_and_grads", loss_and_grads)
  entry, optimizer = find_entry("unembed[3,3]", experiment.model), experiment.optimizer
  with compiled_quickly():
    rows = trace_updates(experiment, jax.devices(), words.data, entry, 26 if changes else 8)
  assert [row.step for row in rows if row.is_skipped] == list(skipped)
  m = v = t = 0
  for row in rows:
    if row.is_skipped:
      assert row.update == 0 and row.value == row.value_before
    else:
      t += 1
      m = optimizer.b1 * m + (1 - optimizer.b1) * row.gradient
      v = optimizer.b2 * v + (1 - optimizer.b2) * row.gradient**2
      m_hat, v_hat = m / (1 - optimizer.b1**t), v / (1 - optimizer.b2**t)
      assert (row.m_hat, row.v_hat) == pytest.approx((m_hat, v_hat), rel=1e-4)
      assert row.value == pytest.approx(row.value_before + row.update, abs=1e-7)
    assert row.t == t and (row.m, row.v) == pytest.approx((m, v), rel=1e-4)
  header, *lines = format_updates(entry, optimizer, rows).split("\n")
  assert header.split()[:3] == ["step", "t", "loss"]
  assert [number for number, line in enumerate(lines, 1) if "skipped" in line] == list(skipped)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [None, 0.9, 0.0], ids=["adam", "momentum", "plain sgd"])
def test_the_trace_of_other_optimizers_is_what_training_did(words, momentum):
  """Their columns follow from each other, the decay inside the gradient, and the last value is that
  of a run of as many steps.
  """
  changes = {"optimizer.weight_decay": 0.1, "optimizer.clip_norm": 1.0}
  changes |= {"optimizer.name": "adam"} if momentum is None else {"optimizer.name": "sgd"}
  changes |= {"optimizer.momentum": momentum} if momentum else {}
  experiment = change(words.experiment, changes)
  entry, optimizer = find_entry("blocks/w_up[0,3,5]", experiment.model), experiment.optimizer
  with compiled_quickly():
    rows = trace_updates(experiment, jax.devices(), words.data, entry, 4)
  run = train_small(change(experiment, {"train.steps": 4}), None)
  assert rows[-1].value == float(stack_blocks(run.result.params)["blocks"]["w_up"][0, 3, 5])
  m = v = 0.0
  for row in rows:
    assert row.decay == pytest.approx(0.1 * row.value_before) and row.decay
    g = row.gradient + row.decay
    if momentum is None:
      m, v = optimizer.b1 * m + (1 - optimizer.b1) * g, optimizer.b2 * v + (1 - optimizer.b2) * g**2
      m_hat, v_hat = m / (1 - optimizer.b1**row.step), v / (1 - optimizer.b2**row.step)
      update = -row.rate * m_hat / (math.sqrt(v_hat) + 1e-8)
      assert row.v == pytest.approx(v, rel=1e-4)
    else:
      m = momentum * m + g
      update = -row.rate * m
    assert (row.m, row.update) == pytest.approx((m, update), rel=1e-4)
    assert row.value == pytest.approx(row.value_before + row.update, abs=1e-7)
  header = format_updates(entry, optimizer, rows).split("\n")[0].split()
  formulas = dict(describe_formulas(entry, optimizer, rows))
  names = {None: "decay m v m_hat v_hat", 0.9: "decay m", 0.0: "decay"}[momentum]
  assert header == f"step loss gradient {names} rate update value".split()
  assert "L2" in formulas["decay"] and "norm of 1" in formulas["gradient"]
  assert momentum != 0.9 or formulas["m"].startswith("m = 0.9 m + (gradient + decay)")
  assert momentum != 0.0 or formulas["update"] == "-rate × (gradient + decay)"


@pytest.mark.slow
def test_a_run_that_continues_another_is_traced_from_its_moments(words, tmp_path, capsys):
  """Adam's t goes on, whatever the run's own step is."""
  changes = {"train.continue_from": str(words.workdir), "train.steps": 3}
  run = train_small(change(words.experiment, changes), tmp_path / "continued")
  entry = find_entry("tok_embed[4,2]", run.experiment.model)
  with compiled_quickly():
    rows = trace_updates(
      run.experiment, jax.devices(), run.data, entry, 3, find_initial(read_run_files(run.workdir))
    )
  assert [(row.step, row.t) for row in rows] == [(1, 61), (2, 62), (3, 63)]
  assert rows[-1].value == float(run.result.params["tok_embed"][4, 2])
  assert rows[0].value == pytest.approx(rows[0].value_before + rows[0].update, abs=1e-7)
  out = call(capsys, "--run", run.workdir, "--trace", "tok_embed[4,2]", "--trace-steps", 2)[1]
  assert "both begin as the moments of 60 updates" in out and "1 - 0.85^t" in out


@pytest.mark.slow
def test_where_the_momentum_begins_is_said(words, tmp_path, capsys):
  """At 0, or where the run that is continued left it: one of the two."""
  changes = {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "train.steps": 3}
  first = train_small(change(words.experiment, changes), tmp_path / "first")
  changes = {"train.continue_from": str(first.workdir), "train.steps": 2}
  second = train_small(change(first.experiment, changes), tmp_path / "second")
  for run, begin in ((first, "at 0"), (second, f"as {first.workdir} at step 3 left it")):
    out = call(capsys, "--run", run.workdir, "--trace", "tok_embed[4,2]", "--trace-steps", 2)[1]
    assert f"m             m = 0.9 m + gradient; it begins {begin}\n" in out


@pytest.mark.slow
def test_microgpts_initial_values_are_traced(words):
  """The initial weights are those of the run, however they are drawn."""
  experiment = change(words.experiment, {"train.init": "microgpt"})
  rows = trace_updates(
    experiment, jax.devices(), words.data, find_entry("unembed[1,1]", experiment.model), 1
  )
  zero = train_small(change(experiment, {"train.steps": 0}), None)
  assert rows[0].value_before == float(zero.result.params["unembed"][1, 1])


@pytest.mark.slow
def test_the_trace_is_printed(capsys, words, verse, traced):
  status, out, err = call(
    capsys, "--run", words.workdir, "--trace", "tok_embed[1,2]", "--trace-steps", 3
  )
  assert status == 0 and err == ""
  head, table, notes = out.rstrip("\n").split("\n\n")
  assert "the first 3 updates" in head and "tok_embed[1,2], in the row of 'b'" in head
  header, *lines = table.split("\n")
  assert (
    " ".join(header.split()) == "step loss gradient m v m_hat v_hat rate update value"
    and len(lines) == 3
  )
  for line, row in zip(lines, traced("words", "tok_embed[1,2]"), strict=False):
    numbers = [
      row.step,
      row.loss,
      row.gradient,
      row.m,
      row.v,
      row.m_hat,
      row.v_hat,
      row.rate,
      row.update,
      row.value,
    ]
    assert [float(word) for word in line.split()] == pytest.approx(numbers, rel=1e-3, abs=5e-5)
  assert "clipped" not in notes and "none on this number" in notes and "1 - 0.85^step" in notes
  out = call(
    capsys, "--run", verse.workdir, "--text", "To", "--trace", "tok_embed[32,2]", "--trace-steps", 2
  )[1]
  assert out.index("perplexity") < out.index("the first 2 updates")  # one after the other
  assert (
    "in the row of ' '" in out
    and " decay " in out
    and "clipped to a norm of 0.5" in out
    and "0.1 × value" in out
  )


def test_places_are_read(words, verse):
  entry = find_entry(" blocks/w_up[0, 3, 5] ", words.experiment.model)
  assert (entry.name, entry.index, entry.param.kind) == ("blocks/w_up", (0, 3, 5), "matrix")
  assert find_entry("blocks/b_up[1,31]", verse.experiment.model).index == (1, 31)
  padded = change(words.experiment, {"model.vocab_multiple": 16}).model
  with pytest.raises(
    UserError, match=r"tok_embed has the shape \[14, 16\]"
  ):  # rows of padding are no parameters
    find_entry("tok_embed[14,0]", padded)


@pytest.mark.parametrize(
  ("args", "error"),
  [
    (["--text", "ax", "--layer", "0"], "--layer goes with --attention, or with the table"),
    (["--layer", "1"], "--layer=1: the model has one layer, 0. Try --layer 0"),
    (
      ["--attention", "ax", "--set", "data.path=x"],
      "--set goes with --trace or the table of parameters; --text and --attention read no text of",
    ),
    (["--set", "data.path=nowhere.txt"], "nothing is at nowhere.txt"),
    (["--attention", "Zoë"], "not in the vocabulary: 'Z' 'o' 'ë'"),
    (["--out", "a.svg"], "--out is a picture of attention: it goes with --attention"),
    (["--attention", "ax", "--out", "a.gif"], "a.gif must end in .svg or .png"),
    (["--attention", "ax", "--out", "nowhere/a.svg"], "nowhere is no folder. Make it first"),
    (["--attention", "ax", "--out", __file__ + "/a.svg"], "is no folder"),
    (["--text", "Zoë"], "not in the vocabulary: 'Z' 'o' 'ë'. The vocabulary is: a-d"),
    (["--text", "ax", "--step", "7"], "no checkpoint of step 7; it has 30, 60"),
    (["--trace", "w_up[0,3,5]"], "no parameter 'w_up'. Did you mean blocks/w_up?"),
    (["--trace", "tok_embd[0,3]"], "no parameter 'tok_embd'. Did you mean tok_embed"),
    (["--trace", "zzz[0,3]"], "no parameter 'zzz'. There are: tok_embed, pos_embed, blocks/w_qkv"),
    (
      ["--trace", "blocks/w_up[3,5]"],
      "blocks/w_up has the shape [1, 16, 64], the layer first. Try 'blocks/w_up[0,1,2]'",
    ),
    (
      ["--trace", "blocks/w_up[1,3,5]"],
      "is outside the parameter; indices count from 0, and blocks/w_up has the shape",
    ),
    (["--trace", "tok_embed[-1,0]"], "is outside the parameter"),
    (
      ["--trace", "tok_embed"],
      "must name one number, with an index for each dimension: tok_embed has the shape [14, 16]",
    ),
    (["--trace", "tok_embed[1,2"], "must name one number"),
    (["--trace", "tok_embed[1,2][0]"], "must name one number"),
    (["--trace", "tok_embed[1,2]", "--trace-steps", "0"], "--trace-steps=0 must be at least 1"),
    (["--trace", "tok_embed[1,2]", "--step", "30"], "--step goes with --text"),
    (["--trace", "tok_embed[1,2]", "--step", "0"], "--step goes with --text"),
  ],
)
def test_errors_are_one_line(capsys, words, args, error):
  status, out, err = call(capsys, "--run", words.workdir, *args)
  assert (
    status == 2
    and out == ""
    and err.count("\n") == 1
    and error in err
    and err.startswith("error: ")
  )


def test_a_stream_needs_two_tokens(capsys, verse, tmp_path):
  for text in ("", "x"):
    status, _, err = call(capsys, "--run", verse.workdir, "--text", text)
    assert status == 2 and f"the text {text!r} has {len(text)} token" in err and "needs 2" in err
  status, _, err = call(capsys, "--run", tmp_path, "--text", "x")
  assert status == 2 and "no experiment.json" in err


# --- The module's name ---


def test_it_runs_as_a_module_and_leaves_pythons_own_alone(tmp_path):
  """`python -m jgpt.inspect` is ours, `import inspect` Python's.

  In a module of jgpt the short name is Python's too.
  """
  root = Path(jgpt.__file__).parent
  done = subprocess.run(
    [sys.executable, "-m", "jgpt.inspect", "--help"],
    cwd=tmp_path, env={"PYTHONPATH": str(root.parent)}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0 and "usage: python -m jgpt.inspect" in done.stdout
  import inspect

  assert Path(inspect.__file__) != Path(jgpt.inspect.__file__)
  for path in root.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
      assert "inspect" not in names, path


def test_in_the_packages_own_folder_the_cause_is_said():
  """There Python finds this package where it looks for its own `inspect`."""
  folder = Path(jgpt.__file__).parent
  done = subprocess.run(
    [sys.executable, "-c", "import inspect"],
    cwd=folder,
    env={},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode and "Start it in another folder" in done.stderr
