"""Evaluation of a run folder: against single documents and windows, bytes counted by hand, and the
command as used.
"""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from small_runs import VERSE, WORDS, train_small, train_verse, train_words

from jgpt import cli, evaluate
from jgpt.batches import Documents, Stream
from jgpt.config.settings import change
from jgpt.data.corpus import in_heldout
from jgpt.evaluation import Evaluation, count_bytes, evaluate_loss
from jgpt.model import apply
from jgpt.runs.open import open_run
from jgpt.text.bpe import BpeTokenizer
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  return train_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def verse(tmp_path_factory):
  return train_verse(tmp_path_factory.mktemp("verse"))


jit_apply = jax.jit(apply, static_argnames="config")


def call(capsys, *args):
  status = cli.guard(lambda: evaluate.main([str(a) for a in args]))
  return status, *capsys.readouterr()


def read(capsys, run, *args):
  """What `--json` prints of a run."""
  status, out, err = call(capsys, "--run", run.workdir, "--json", *args)
  assert status == 0 and err == ""
  return json.loads(out)


def total_nats(run, ids: list[int]) -> float:
  """The sum of -log p over a sequence's predictions, with NumPy's softmax."""
  logits = np.asarray(
    jit_apply(run.result.params, np.array([ids[:-1]]), run.experiment.model), np.float64
  )[0]
  log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
  return -sum(log_probs[t, target] for t, target in enumerate(ids[1:]))


@pytest.mark.parametrize("part", ["heldout", "train"])
def test_documents_are_evaluated_as_one_at_a_time(capsys, words, part):
  """Loss, perplexity and bits per byte of a loop over single words, each cut after 5 predictions.

  Bytes from the words.
  """
  documents = [w for w in WORDS if in_heldout(w, 0.2) == (part == "heldout")]
  tokens = [words.data.tokenizer.encode_document(w)[:6] for w in documents]
  nats = sum(total_nats(words, ids) for ids in tokens)
  num_tokens = sum(len(ids) - 1 for ids in tokens)
  num_bytes = sum(
    len(f"{w}\n"[:5].encode()) for w in documents
  )  # 5 predictions: the end is the newline
  assert num_bytes > num_tokens and any(
    len(w) >= 5 for w in documents
  )  # é has two bytes; some words are cut
  got = read(capsys, words, "--part", part)
  assert got["part"] == part and got["step"] == 60 and got["documents"] == len(documents)
  assert got["tokens"] == num_tokens and got["bytes"] == num_bytes
  assert got["loss_nats_per_token"] == pytest.approx(nats / num_tokens, rel=1e-5)
  assert got["perplexity"] == pytest.approx(math.exp(nats / num_tokens), rel=1e-5)
  assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["heldout", "train"])
def test_a_stream_is_evaluated_window_by_window(capsys, verse, part):
  """Every prediction once: whole windows of 16 and the short one at the end; a byte is a token."""
  cut = int(0.9 * len(VERSE))
  ids = list((VERSE[cut:] if part == "heldout" else VERSE[:cut]).encode())
  assert (len(ids) - 1) % 16  # there is a short window
  nats = sum(total_nats(verse, ids[i : i + 17]) for i in range(0, len(ids) - 1, 16))
  got = read(capsys, verse, "--part", part)
  assert got["tokens"] == got["bytes"] == len(ids) - 1 and got["documents"] is None
  assert got["loss_nats_per_token"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
  assert got["bits_per_byte"] == pytest.approx(got["loss_nats_per_token"] / math.log(2))


@pytest.mark.slow
def test_the_loss_is_the_one_that_training_ended_with(capsys, words, verse):
  for run in (words, verse):
    got = read(capsys, run)
    assert got["loss_nats_per_token"] == pytest.approx(run.result.heldout_loss, rel=1e-6)
    assert got["tokens"] == run.result.heldout_tokens


def test_what_is_printed(capsys, words):
  status, out, err = call(capsys, "--run", words.workdir)
  got = read(capsys, words)
  labels = [line[:15].strip() for line in out.splitlines()]
  assert (
    status == 0
    and err == ""
    and labels == ["run", "data", "", "loss", "perplexity", "bits per byte"]
  )
  assert f"{words.workdir} at step 60" in out and "words.txt (path), held-out part" in out
  assert f"{got['documents']} documents, {got['tokens']} tokens, {got['bytes']} bytes" in out
  assert (
    f"loss           {got['loss_nats_per_token']:.4f} nats per token (uniform guessing: " in out
  )
  assert (
    f"perplexity     {got['perplexity']:.2f} " in out
    and f"bits per byte  {got['bits_per_byte']:.4f}" in out
  )


def test_an_older_checkpoint(capsys, words):
  first, last = read(capsys, words, "--step", 30), read(capsys, words)
  assert (first["step"], last["step"]) == (30, 60) and first["loss_nats_per_token"] > last[
    "loss_nats_per_token"
  ]
  status, _, err = call(capsys, "--run", words.workdir, "--step", 3)
  assert status == 2 and "no checkpoint of step 3; it has 30, 60" in err


def test_nothing_held_out(capsys, tmp_path, words):
  run = train_small(
    change(words.experiment, {"train.steps": 1, "data.heldout_fraction": 0.0}), tmp_path
  )
  status, out, err = call(capsys, "--run", tmp_path)
  assert (
    status == 2 and out == "" and err.count("\n") == 1 and "--set data.heldout_fraction=0.1" in err
  )
  assert read(capsys, run, "--part", "train")["documents"] == len(WORDS)


def test_errors_are_one_line(capsys, tmp_path, words):
  status, _, err = call(capsys, "--run", tmp_path)
  assert status == 2 and "no experiment.json" in err
  shutil.copytree(words.workdir, tmp_path / "run")
  settings_file = tmp_path / "run" / "experiment.json"
  recorded = json.loads(settings_file.read_text())
  settings_file.write_text(json.dumps(recorded | {"data": recorded["data"] | {"sha256": 64 * "0"}}))
  status, out, err = call(capsys, "--run", tmp_path / "run")
  assert status == 2 and out == "" and err.count("\n") == 1 and "words.txt has changed" in err


def test_the_optimizer_is_not_read(capsys, tmp_path, words):
  shutil.copytree(words.workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "60" / "train_state")
  status, out, _ = call(capsys, "--run", tmp_path / "run")
  assert status == 0 and "at step 60" in out


def test_what_is_not_finite_is_null_in_json(tmp_path):
  diverged = Evaluation(loss_nats_per_token=math.nan, num_tokens=3, num_bytes=3, num_documents=None)
  got = evaluate.evaluation_to_json(diverged, tmp_path, 1, "train")
  assert (
    got["loss_nats_per_token"] is None
    and got["perplexity"] is None
    and got["bits_per_byte"] is None
  )
  assert Evaluation(1000.0, 3, 3, None).perplexity == math.inf


def test_bytes_of_documents():
  """BOS at the end counts as one byte, a character as many as UTF-8 has.

  What is cut off or filled up counts nothing.
  """
  tokenizer = CharTokenizer("aé", bos=True)  # BOS is 2
  rows = Documents(np.array([[2, 0, 1, 2, 2], [2, 1, 1, 1, 1]]), np.array([3, 4]))
  assert count_bytes(rows, tokenizer) == (1 + 2 + 1) + 4 * 2


def test_bytes_of_streams():
  """The first token is not predicted; tokens may be parts of a character.

  End of text stands for no byte.
  """
  ids = np.array(list("€é".encode()))
  assert count_bytes(Stream(ids), ByteTokenizer()) == 4
  tokenizer = BpeTokenizer(
    "Ã ©\na b", end_of_text=True
  )  # merge 256 is é, 257 is ab, 258 the end of text
  ids = np.array([258, 256, 257, 258, tokenizer.encode("a")[0]])
  assert count_bytes(Stream(ids), tokenizer) == len("éaba".encode())


def test_a_stacked_and_a_listed_model_are_the_same(verse):
  """The state that training ends with has a list of layers on a CPU, the folder stacked ones."""
  assert isinstance(verse.result.state.params["blocks"], list)
  stacked = open_run(verse.workdir).params
  assert isinstance(stacked["blocks"], dict)
  heldout, tokenizer = verse.data.heldout, verse.data.tokenizer
  losses = [
    evaluate_loss(params, heldout, tokenizer, verse.experiment).loss_nats_per_token
    for params in (stacked, verse.result.state.params)
  ]
  assert losses[0] == pytest.approx(losses[1], rel=1e-6)
