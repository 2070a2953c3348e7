"""Documents, the held-out split, and batches as a function of the step."""

import dataclasses
import hashlib
import json
import os
import random
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jgpt import batches
from jgpt.batches import Documents, count_epoch_steps
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change
from jgpt.data import corpus as corpus_lib
from jgpt.data import token_files
from jgpt.data.corpus import check_path, find_data, in_heldout, load_data, make_documents
from jgpt.data.preparation import Preparation, prepare
from jgpt.data.sources import (
  BUNDLED_DIR,
  RecordedTextError,
  Text,
  expected_vocab_size,
  find_text,
  read_text,
)
from jgpt.errors import UserError
from jgpt.evaluation import count_bytes
from jgpt.plan import plan_run
from jgpt.runs.folder import RunFiles, write_run_files
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer, train_char_tokenizer

NAMES = load_experiment("names").data
LAST_STEP = 2**31 - 1
MANY = [
  f"{a}{b}{c}"
  for a in "bdgklmnprst"
  for b in "aeiou"
  for c in ("", "n", "ra", "lind", "s", "x", "y", "z", "m", "o")
]


def make_text(lines):
  return Text("\n".join(lines), "path", "words.txt", "")


def load(lines, *, seed=0, **changes):
  """Loads lines as the experiment `names` would, nothing held out unless asked for."""
  return load_data(
    make_text(lines), dataclasses.replace(NAMES, **{"heldout_fraction": 0.0, **changes}), seed
  )


def batch_of(config):
  """`batches.batch` of the experiment `names` with these settings of its data."""
  experiment = dataclasses.replace(load_experiment("names"), data=config)
  return partial(batches.batch, experiment=experiment)


def to_device(corpus):
  return jax.tree.map(jnp.asarray, corpus)


def microgpt_documents(lines, seed):
  """The order of microgpt, as it is written there."""
  docs = [line.strip() for line in "\n".join(lines).strip().split("\n") if line.strip()]
  random.Random(seed).shuffle(docs)
  return docs


# --- The stream ---


@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 16), (3, 5)])
def test_stream_is_microgpts(batch_size, seq_len):
  """Step by step the document, its ids, its number of positions and nothing beyond.

  Rows of one batch go on in order.
  """
  lines = ["emma ", "", "  olivia", "ava", "\t", "isabella-sophia", "mia", "ava", "zoë"]
  data = load(lines, seed=42, batch_size=batch_size, seq_len=seq_len)
  config = dataclasses.replace(NAMES, batch_size=batch_size, seq_len=seq_len)
  docs = microgpt_documents(lines, 42)
  uchars = sorted(set("".join(docs)))
  bos = len(uchars)
  for step in range(20):
    got = batch_of(config)(to_device(data.train), jnp.int32(step))
    assert (
      got.inputs_BT.shape == got.targets_BT.shape == got.weights_BT.shape == (batch_size, seq_len)
    )
    for row in range(batch_size):
      doc = docs[(step * batch_size + row) % len(docs)]
      tokens = [bos] + [uchars.index(ch) for ch in doc] + [bos]
      n = min(seq_len, len(tokens) - 1)
      assert got.inputs_BT[row, :n].tolist() == tokens[:n]
      assert got.targets_BT[row, :n].tolist() == tokens[1 : n + 1]
      assert got.weights_BT[row].tolist() == [1.0] * n + [0.0] * (seq_len - n)


def test_seed_decides_the_order_and_loading_touches_no_global_random_state():
  state = random.getstate()
  first, again, other = load(MANY, seed=1), load(MANY, seed=1), load(MANY, seed=2)
  assert random.getstate() == state
  assert first.documents == again.documents != other.documents
  assert sorted(first.documents) == sorted(other.documents) == sorted(MANY)


def test_documents_longer_than_the_window_are_cut_and_counted():
  """A cut document predicts as many tokens as fit, and no end that it does not have.

  One that just fits has its end.
  """
  data = load(["abcd", "abcde", "abcdef"], seq_len=5)
  rows = dict(zip(data.documents, data.train.tokens.tolist(), strict=True))
  assert rows == {
    "abcd": [6, 0, 1, 2, 3, 6],
    "abcde": [6, 0, 1, 2, 3, 4],
    "abcdef": [6, 0, 1, 2, 3, 4],
  }
  assert data.train.lengths.tolist() == [5, 5, 5]
  assert data.summary[0] == "3 documents, 15 characters, longest 6, 2 cut at the context of 5"


# --- The held-out split ---


def test_heldout_documents_are_chosen_by_their_sha256():
  """The hash read as a number in [0, 1) is below the fraction: the choice can be repeated by any
  program.
  """
  for document in MANY[:50]:
    place = int(hashlib.sha256(document.encode()).hexdigest(), 16) / 2**256
    assert in_heldout(document, place * 1.0001)
    assert not in_heldout(document, place * 0.9999)
    assert not in_heldout(document, 0.0)


def test_heldout_split_keeps_repeats_together_and_is_near_its_fraction():
  data = load(MANY * 3, heldout_fraction=0.3)
  heldout = len(data.heldout.tokens)
  train, both = set(data.documents), len(data.documents) + heldout
  assert both == 3 * len(MANY)
  assert heldout == 3 * (
    len(MANY) - len(train)
  )  # no held-out document stands in the training documents
  assert 0.2 < heldout / both < 0.4


def test_five_percent_of_the_bundled_names_are_held_out():
  names = read_text(BUNDLED_DIR / "names.txt", "path").documents()
  share = sum(in_heldout(name, 0.05) for name in names) / len(names)
  assert abs(share - 0.05) < 4 * (0.05 * 0.95 / len(names)) ** 0.5  # 4 standard deviations


def test_nothing_is_held_out_at_fraction_zero():
  data = load(MANY)
  assert data.heldout.tokens.shape == (0, NAMES.seq_len + 1)
  assert len(data.documents) == len(MANY)


def test_heldout_documents_depend_on_neither_the_order_of_lines_nor_the_seed():
  """Nor do they change when other lines are added; so results stay comparable when a list grows."""

  def training(lines, seed):
    return set(load(lines, seed=seed, heldout_fraction=0.2).documents)

  kept = training(MANY, 0)
  assert 0 < len(kept) < len(MANY)
  assert training(MANY[::-1], 0) == training(MANY, 7) == kept
  assert training([*MANY, "zyxwv", "another"], 0) & set(MANY) == kept


def test_heldout_characters_have_ids_too():
  """The tokenizer is made from all documents, so evaluating cannot meet an unknown character."""
  lines = [chr(0x4E00 + i) for i in range(100)]  # each character in one document
  data = load(lines, heldout_fraction=0.5)
  assert data.tokenizer.chars == "".join(lines)
  assert len(data.documents) < 100


# --- Batches ---


def by_hand(corpus, step, config):
  """The rows of a batch in Python's unbounded integers."""
  if config.num_batches:
    step %= config.num_batches
  return [(step * config.batch_size + i) % len(corpus.tokens) for i in range(config.batch_size)]


def assert_is_batch(got, corpus, rows):
  tokens, lengths = (np.asarray(x)[rows] for x in corpus)
  np.testing.assert_array_equal(got.inputs_BT, tokens[:, :-1])
  np.testing.assert_array_equal(got.targets_BT, tokens[:, 1:])
  positions = np.arange(tokens.shape[1] - 1)
  np.testing.assert_array_equal(got.weights_BT, np.float32(positions < lengths[:, None]))
  assert (got.inputs_BT.dtype, got.targets_BT.dtype, got.weights_BT.dtype) == (
    jnp.int32,
    jnp.int32,
    jnp.float32,
  )


@pytest.mark.parametrize(
  ("num_documents", "changes"),
  [
    (7, {"batch_size": 1}),
    (7, {"batch_size": 3}),
    (3, {"batch_size": 8}),  # one batch goes around more than twice
    (1, {"batch_size": 2}),
    (7, {"batch_size": 3, "num_batches": 1}),
    (7, {"batch_size": 3, "num_batches": 5}),
    (7, {"batch_size": 3, "num_batches": 2**30 + 1}),  # more than int32 can multiply by 3
  ],
)
def test_batch_of_any_step_is_the_next_documents_in_turn(num_documents, changes):
  """Around the end of the documents, up to the last step that an int32 holds.

  Inside jit as outside.
  """
  documents = MANY[:: len(MANY) // num_documents][:num_documents]
  corpus = to_device(make_documents(documents, train_char_tokenizer(documents, bos=True), 6))
  config = dataclasses.replace(NAMES, seq_len=6, **changes)
  batch = batch_of(config)
  jitted = jax.jit(batch)

  @hypothesis_settings(deadline=None, max_examples=20)
  @given(st.one_of(st.integers(0, 30), st.integers(0, LAST_STEP), st.just(LAST_STEP)))
  def check(step):
    rows = by_hand(corpus, step, config)
    for made in (batch(corpus, jnp.int32(step)), jitted(corpus, jnp.int32(step))):
      assert_is_batch(made, corpus, rows)

  check()


def test_large_corpora_and_batches_do_not_overflow():
  """The largest product that `load_data` allows, at the last step before the order repeats and at
  the last step of all.
  """
  n, size = 40_000, 53_687  # their product is 7,168 below 2**31
  corpus = to_device(
    Documents(np.arange(2 * n, dtype=np.int32).reshape(n, 2), np.ones(n, np.int32))
  )
  config = dataclasses.replace(NAMES, seq_len=1, batch_size=size)
  for step in (n - 1, n, LAST_STEP):
    made = batch_of(config)(corpus, jnp.int32(step))
    assert_is_batch(made, corpus, by_hand(corpus, step, config))


def test_sizes_whose_rows_an_int32_cannot_count_are_refused():
  with pytest.raises(
    UserError, match=r"2 documents times data\.batch_size=1073741824 must stay below 2\*\*31"
  ):
    load(["emma", "ava"], batch_size=2**30)
  assert len(load(["emma", "ava"], batch_size=2**30 - 1).documents) == 2


# --- Texts that nobody wishes for ---


@pytest.mark.parametrize("content", ["", "\n", " \t\r\n\n\u2003\n", "\ufeff"])
def test_text_without_a_document_is_refused_by_name(tmp_path, content):
  path = tmp_path / "words.txt"
  path.write_text(content, encoding="utf-8")
  config = dataclasses.replace(NAMES, path=str(path))
  with pytest.raises(UserError, match=f"{path} holds no text"):
    load_data(find_text(config), config, 0)


def test_text_that_is_held_out_whole_is_refused_with_what_would_do():
  document = min(MANY, key=lambda d: hashlib.sha256(d.encode()).digest())
  with pytest.raises(
    UserError, match=r"all 2 documents of words\.txt are held out .*--set data\.heldout_fraction=0"
  ):
    load([document, document], heldout_fraction=0.1)
  assert load([document, document], heldout_fraction=0.0).documents == [document, document]


def test_one_document_is_every_batch():
  data = load(["a"], batch_size=2)
  made = batch_of(dataclasses.replace(NAMES, batch_size=2))(to_device(data.train), jnp.int32(5))
  assert_is_batch(made, data.train, [0, 0])
  assert data.train.lengths.tolist() == [2]  # a, then the end


def test_huge_line_costs_no_more_than_its_window():
  """A file without line ends is one document.

  Its first characters are learned and the rest is counted as cut.
  """
  data = load(["ab" * 500_000])
  assert data.train.tokens.tolist() == [[2, *[0, 1] * 8]]
  assert (
    data.summary[0]
    == "1 documents, 1,000,000 characters, longest 1000000, 1 cut at the context of 16"
  )


def test_nul_is_a_character_like_any_other():
  data = load(["a\0b"])
  assert data.tokenizer.chars == "\0ab"
  assert data.train.tokens[0, :5].tolist() == [3, 1, 0, 2, 3]


ODD_LINES = st.lists(
  st.sampled_from(["emma", "\xe9", "\0", "\r", " ", "\ufeff", "\u2028", "\x1c", "\U0001f600", "\n"])
)


@hypothesis_settings(deadline=None, max_examples=200)
@given(
  st.one_of(
    st.binary(), st.text().map(str.encode), ODD_LINES.map(lambda parts: "".join(parts).encode())
  ),
  st.sampled_from([0.0, 0.5]),
  st.integers(0, 3),
)
def test_any_bytes_are_data_or_a_user_error_that_names_the_file(content, heldout_fraction, seed):
  """Where they are data, every document is in it once, and decodes back to itself up to where it
  was cut.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "words.txt"
    path.write_bytes(content)
    config = dataclasses.replace(NAMES, path=str(path), heldout_fraction=heldout_fraction)
    try:
      text = find_text(config)
      data = load_data(text, config, seed)
    except UserError as error:
      assert str(path) in str(error)
      return
  assert len(data.train.tokens) + len(data.heldout.tokens) == len(text.documents())
  assert [data.tokenizer.decode(row) for row in data.train.tokens] == [
    d[: config.seq_len] for d in data.documents
  ]
  for corpus in (data.train, data.heldout):
    assert (corpus.tokens.dtype, corpus.lengths.dtype) == (np.int32, np.int32)
    assert ((corpus.lengths >= 1) & (corpus.lengths <= config.seq_len)).all()
    assert ((corpus.tokens >= 0) & (corpus.tokens < data.tokenizer.vocab_size)).all()


# --- Streams ---


TEXT = "First line of the play.\n\nSecond speech:\nmore of it.\n\n" * 40


def load_stream(text=TEXT, **changes):
  """Loads a text as one stream of characters, nothing held out unless asked for."""
  base = {"batching": "random", "heldout_fraction": 0.0, "seq_len": 8, "batch_size": 2}
  return load_data(
    Text(text, "path", "play.txt", ""), dataclasses.replace(NAMES, **(base | changes)), 0
  )


@pytest.mark.parametrize(
  ("fraction", "num_train"), [(0.0, 1_115_394), (0.1, 1_003_854), (0.5, 557_697)]
)
def test_the_last_characters_of_a_stream_are_held_out(fraction, num_train):
  """At tiny Shakespeare's length the split is nanoGPT's and the NumPy GPT's: 1,003,854 and 111,540
  characters.
  """
  text = ("ab\n" * 371_798)[:1_115_394]
  data = load_stream(text, heldout_fraction=fraction)
  assert len(data.train.tokens) == num_train and len(data.heldout.tokens) == 1_115_394 - num_train
  assert (
    data.tokenizer.decode(np.concatenate([data.train.tokens, data.heldout.tokens]).tolist()) == text
  )


def test_a_streams_characters_are_those_of_the_whole_text_and_have_no_bos():
  data = load_stream("a" * 90 + "b" * 10, heldout_fraction=0.1)
  assert (
    data.tokenizer.chars == "ab"
    and data.tokenizer.vocab_size == 2
    and data.tokenizer.stop_id is None
  )


def test_the_first_tokens_can_be_held_out_instead():
  data = load_stream(heldout_tokens=100)
  whole = load_stream()
  np.testing.assert_array_equal(data.heldout.tokens, whole.train.tokens[:100])
  np.testing.assert_array_equal(data.train.tokens, whole.train.tokens[100:])


def test_merges_are_learned_from_the_training_part_alone():
  """Text that only the held-out part has makes no tokens: the comparison would not be fair."""
  pytest.importorskip(
    "tokenizers", reason="byte-level BPE is trained by tokenizers (the extra bpe)"
  )
  text = "the cat sat on the mat. " * 200 + "zyxwvut " * 60
  data = load_stream(text, tokenizer="bpe", bpe_vocab_size=265, heldout_fraction=0.1)
  assert data.tokenizer.vocab_size == 265
  assert len(data.heldout.tokens) > 0.8 * len(text) * 0.1  # next to nothing is merged
  assert len(data.train.tokens) < 0.5 * len(text) * 0.9


@pytest.mark.parametrize("num_heldout", [60, 700])
def test_merges_are_learned_from_what_follows_the_first_tokens(num_heldout):
  """The held-out tokens come first, and how many characters they are depends on the merges.

  A run that goes on with the recorded tokenizer has the same parts.
  """
  pytest.importorskip(
    "tokenizers", reason="byte-level BPE is trained by tokenizers (the extra bpe)"
  )
  text = "zyxwvüt " * (num_heldout // 8 + 1) + "the cat sat on the mat. " * 200
  changes = {"tokenizer": "bpe", "bpe_vocab_size": 265, "heldout_tokens": num_heldout}
  data = load_stream(text, **changes)
  assert len(data.heldout.tokens) == num_heldout
  assert not any(b"z" in token or b"xw" in token for token in data.tokenizer.token_bytes[256:])
  ids = np.concatenate([data.heldout.tokens, data.train.tokens]).tolist()
  assert data.tokenizer.decode(ids) == text and data.tokenizer.encode(text) == ids
  config = dataclasses.replace(NAMES, batching="random", seq_len=8, heldout_fraction=0.0, **changes)
  again = load_data(Text(text, "path", "play.txt", ""), config, 0, data.tokenizer)
  np.testing.assert_array_equal(again.heldout.tokens, data.heldout.tokens)
  np.testing.assert_array_equal(again.train.tokens, data.train.tokens)


def test_too_many_tokens_held_out_leave_nothing_to_learn_merges_from():
  pytest.importorskip(
    "tokenizers", reason="byte-level BPE is trained by tokenizers (the extra bpe)"
  )
  text = "the cat sat on the mat. " * 200
  with pytest.raises(UserError, match=r"takes .* of .* tokens"):
    load_stream(text, tokenizer="bpe", bpe_vocab_size=257, heldout_tokens=10**6)


def test_llm_cs_shakespeare_is_read_as_llm_c_does():
  """An end-of-text token before each paragraph.

  32,768 tokens for validation first, then 305,260 for training.
  """
  pytest.importorskip("tokenizers", reason="GPT-2's tokenizer needs tokenizers (the extra bpe)")
  folder = os.environ.get("JGPT_DATA_DIR")
  if not folder or not os.path.isfile(os.path.join(folder, "tinyshakespeare.txt")):
    pytest.skip("tinyshakespeare.txt is not at hand: JGPT_DATA_DIR names no folder that has it")
  config = load_experiment("gpt2_shakespeare").data
  data = load_data(find_text(config), config, 0)
  assert len(data.heldout.tokens) == 32_768 and len(data.train.tokens) == 305_260
  assert data.heldout.tokens[0] == 50256
  text = find_text(config).text
  marks = 1 + text.count("\n\n")
  everything = np.concatenate([data.heldout.tokens, data.train.tokens])
  assert (everything == 50256).sum() == marks
  assert data.tokenizer.decode(everything.tolist()).replace("<|endoftext|>", "") == text


def test_numpy_gpts_shakespeare_has_171_steps_an_epoch():
  """2,000 ids learned from 1,003,854 characters make about 348,600 tokens: 171 batches of 32
  windows of 64.
  """
  pytest.importorskip(
    "tokenizers", reason="byte-level BPE is trained by tokenizers (the extra bpe)"
  )
  folder = os.environ.get("JGPT_DATA_DIR")
  if not folder or not os.path.isfile(os.path.join(folder, "tinyshakespeare.txt")):
    pytest.skip("tinyshakespeare.txt is not at hand: JGPT_DATA_DIR names no folder that has it")
  config = load_experiment("shakespeare_bpe").data
  data = load_data(find_text(config), config, 0)
  assert data.tokenizer.vocab_size == 2000
  assert abs(len(data.train.tokens) - 348_600) < 1000
  assert count_epoch_steps(data.train, config) == 171


def test_hamlet_is_12300_bytes_and_its_held_out_part_stands_in_training_too():
  config = load_experiment("shakespeare_bytes").data
  data = load_data(find_text(config), config, 0)
  assert (len(data.train.tokens), len(data.heldout.tokens)) == (11_070, 1_230)
  heldout, train = (bytes(c.tokens.tolist()) for c in (data.heldout, data.train))
  assert heldout[:200] in train


@pytest.mark.parametrize(
  ("length", "changes", "complaint"),
  [
    (8, {}, r"the training part of play\.txt has 8 tokens, and a batch needs 9"),
    (16, {"batching": "sequential"}, r"has 16 tokens, and a batch needs 17\. .*data\.batch_size=1"),
    (
      30,
      {"heldout_fraction": 0.2},
      r"the held-out part of play\.txt has 6 tokens.*data\.heldout_fraction=0",
    ),
    (0, {}, r"has 0 tokens"),
  ],
)
def test_a_stream_too_short_for_its_windows_is_refused_with_what_would_do(
  length, changes, complaint
):
  with pytest.raises(UserError, match=complaint):
    load_stream(("ab" * 50)[:length], **changes)


# --- Token files ---


BYTES = dataclasses.replace(
  NAMES, tokenizer="bytes", batching="random", heldout_fraction=0.0, seq_len=8, batch_size=2
)


@pytest.fixture
def write_ids(tmp_path, monkeypatch):
  """Writes token files without a header into the folder "ids" of an empty folder, the
  current one.
  """
  monkeypatch.chdir(tmp_path)
  Path("ids").mkdir()

  def write(**files):
    for name, ids in files.items():
      Path("ids", f"{name}.bin").write_bytes(np.array(ids, "<u2").tobytes())

  return write


def load_ids(path="ids", seed=0, sha256=None, **changes):
  return find_data(dataclasses.replace(BYTES, path=path, **changes), seed, sha256=sha256)


def parts_of(data):
  return data.train.tokens.tolist(), data.heldout.tokens.tolist()


def test_files_with_val_in_their_names_are_held_out_and_the_others_are_one_stream(write_ids):
  """And then no other tokens are, whatever the settings say; the summary says so."""
  write_ids(
    b_train=range(30), a=range(100, 120), my_val=range(200, 220), other_validation=range(50, 60)
  )
  train, heldout = [*range(100, 120), *range(30)], [*range(200, 220), *range(50, 60)]
  for changes, num_heldout, said in (
    ({}, 30, ""),
    ({"heldout_fraction": 0.5}, 30, " instead of data.heldout_fraction"),
    ({"heldout_tokens": 25}, 25, " (data.heldout_tokens: the first 25 of 30 tokens)"),
    ({"heldout_tokens": 30}, 30, ""),
    ({"heldout_tokens": 1000}, 30, ""),
  ):
    data = load_ids(**changes)
    assert parts_of(data) == (train, heldout[:num_heldout]) and data.train.tokens.dtype == np.int32
    assert data.summary[0] == f"2 token files for training, 2 held out{said}"
    assert data.summary[1] == f"50 tokens for training, {num_heldout} held out"
  assert (data.text.kind, data.text.location, data.text.text, data.label) == (
    "token files",
    "ids (4 files)",
    "",
    None,
  )
  assert data.documents == [] and data.tokenizer == ByteTokenizer()


def test_folders_names_say_parts_and_test_files_are_left_out_aloud(write_ids):
  for part in ("train", "val", "test"):
    Path("ids", part).mkdir()
  write_ids(
    **{
      "train/0": range(40),
      "val/0": range(50, 60),
      "test/0": range(70, 80),
      "my_test": range(90, 99),
    }
  )
  data = load_ids()
  assert parts_of(data) == ([*range(40)], [*range(50, 60)])
  assert data.summary[0] == "1 token file for training, 1 held out; 2 left out, test by name"
  sha256 = data.text.sha256
  write_ids(my_test=range(30))
  assert parts_of(load_ids(sha256=sha256)) == parts_of(load_ids("ids/*/*.bin")) == parts_of(data)
  with pytest.raises(
    UserError, match=r"holds nothing to train on: my_test\.bin is a test file by its name"
  ):
    load_ids("ids/my_test.bin")
  assert parts_of(load_ids("ids/test")) == ([*range(70, 80)], [])  # a folder that is named is meant


def test_without_such_names_the_stream_is_split_as_a_text_is(write_ids):
  write_ids(a=range(60), b=range(60, 100))
  assert parts_of(load_ids()) == ([*range(100)], [])
  assert parts_of(load_ids(heldout_fraction=0.3)) == ([*range(70)], [*range(70, 100)])
  data = load_ids(heldout_tokens=65)
  assert parts_of(data) == ([*range(65, 100)], [*range(65)])
  assert data.summary == ["2 token files for training", "35 tokens for training, 65 held out"]
  assert parts_of(load_ids("ids/a.bin"))[0] == parts_of(load_ids("ids/[a]*.bin"))[0] == [*range(60)]


@pytest.mark.parametrize("heldout_tokens", [0, 300])
def test_ids_from_prepared_files_are_those_from_the_text(tmp_path, heldout_tokens):
  """With bytes and with characters; one file, several shards, both ways of holding out."""
  text = tmp_path / "a.txt"
  text.write_text(TEXT, encoding="utf-8")
  for kind, tokenizer in (
    ("bytes", ByteTokenizer()),
    ("characters", train_char_tokenizer([TEXT], bos=False)),
  ):
    out = tmp_path / kind
    prepare(
      Preparation(
        inputs=[text], tokenizer=tokenizer, out=out, heldout_tokens=heldout_tokens, shard_tokens=500
      )
    )
    split = {"heldout_tokens": heldout_tokens} if heldout_tokens else {"heldout_fraction": 0.2}
    from_text, from_files = (load_ids(str(path), tokenizer=kind, **split) for path in (text, out))
    assert (
      parts_of(from_files) == parts_of(from_text) and from_files.tokenizer == from_text.tokenizer
    )
    assert len(from_files.heldout.tokens) == heldout_tokens or int(len(TEXT) * 0.2) + 1
    assert count_bytes(from_files.heldout, tokenizer) == len(from_files.heldout.tokens) - 1
    assert (
      expected_vocab_size(dataclasses.replace(BYTES, path=str(out), tokenizer=kind))
      == tokenizer.vocab_size
    )


def test_changed_token_files_are_refused_and_renamed_ones_are_not(write_ids):
  write_ids(a=range(60), b=range(60, 100), val=range(20))
  sha256 = load_ids().text.sha256
  Path("ids/b.bin").rename("ids/c.bin")
  assert load_ids(sha256=sha256).text.sha256 == sha256
  write_ids(c=range(61, 101))
  with pytest.raises(
    RecordedTextError, match=rf"^ids \(3 files\) is not the text of the run.* {sha256[:12]}"
  ):
    load_ids(sha256=sha256)
  write_ids(c=range(60, 100))
  load_ids(sha256=sha256)
  Path("ids/val.bin").rename("ids/z.bin")  # the same bytes, but no longer held out
  with pytest.raises(RecordedTextError):
    load_ids(sha256=sha256)


@pytest.mark.parametrize(
  ("files", "changes", "complaint"),
  [
    (
      {"a": range(60)},
      {"batching": "documents", "tokenizer": "characters"},
      r"data\.batching=documents needs text.*ids \(1 f",
    ),
    (
      {"val": range(60)},
      {},
      r"ids \(1 file\) holds nothing to train on: val\.bin is held out by its name",
    ),
    (
      {"a": range(60), "b": [256] * 60},
      {},
      r"b\.bin has id 256 at position 0, and the tokenizer's ids are below 256",
    ),
    ({"a": range(60), "val": [7] * 59 + [256]}, {}, r"val\.bin has id 256 at position 59"),
    (
      {"a": range(60)},
      {"tokenizer": "characters"},
      r"no tokenizer\.json that says what their ids mean",
    ),
    ({"a": range(8)}, {}, r"the training part of ids \(1 file\) has 8 tokens, and a batch needs 9"),
    (
      {"a": range(60), "val": range(8)},
      {},
      r"the held-out part of ids \(2 files\) has 8 tokens, and a batch needs 9",
    ),
    (
      {"a": range(60)},
      {"heldout_tokens": 60},
      r"training part of ids \(1 file\) has 0 tokens.*needs 9: "
      r"data\.heldout_tokens=60 takes 60 of 60 tokens\. "
      r"Try a longer text, or --set data\.heldout_tokens=9$",
    ),
    (
      {"a": range(12)},
      {"heldout_tokens": 10},
      r"has 2 tokens.*data\.heldout_tokens=10 takes 10 of 12 tokens\. Try a longer "
      r"text, or --set data\.seq_len=1$",
    ),
    (
      {"a": range(60)},
      {"heldout_tokens": 5},
      r"the held-out part of .* has 5 tokens.*or --set data\.heldout_tokens=9$",
    ),
    (
      {"a": range(60), "val": range(40)},
      {"heldout_tokens": 5},
      r"held-out part .* 5 tokens.*data\.heldout_tokens=9$",
    ),
    (
      {"a": range(60), "val": range(8)},
      {},
      r"data\.seq_len=4, or leave the held-out files out: --set data\.path=",
    ),
    (
      {"a": range(60)},
      {"heldout_fraction": 0.1},
      r"the held-out part of .*or --set data\.heldout_fraction=0$",
    ),
    ({"a": []}, {}, r"ids/a\.bin is empty"),
  ],
)
def test_token_files_that_cannot_be_trained_on_are_refused_in_one_line(
  write_ids, files, changes, complaint
):
  write_ids(**files)
  with pytest.raises(UserError, match=complaint) as raised:
    load_ids(**changes)
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize("batching", ["documents", "random"])
def test_a_given_tokenizer_that_lacks_characters_is_said_to_be_the_runs(batching):
  text, config = (
    Text("abcab\n" * 9, "path", "my.txt", ""),
    dataclasses.replace(NAMES, batching=batching, seq_len=4),
  )
  given = CharTokenizer("\nab", bos=batching == "documents")
  with pytest.raises(
    UserError,
    match=r"^my\.txt: not in the vocabulary: 'c'\. .* It is that of the run or.*--init-from$",
  ) as raised:
    load_data(text, config, 0, given)
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
  "path",
  [
    *(
      "absent.txt",
      "absent.bin",
      "*.absent",
      "empty",
      "mixed",
      "mixed/*",
      "unfinished",
      "pickled",
      "cut.bin",
    ),
    *("~nobody-has-this-name/a.txt", "a\0b"),
  ],
)
def test_a_path_that_cannot_be_read_is_noticed_before_anything_is_read(
  write_ids, monkeypatch, path
):
  """With the same words as when it is read."""
  for folder in ("empty", "mixed", "unfinished", "pickled"):
    Path(folder).mkdir()
  for name in (
    "mixed/a.bin",
    "mixed/a.txt",
    "unfinished/a.bin",
    "pickled/a.bin",
    "pickled/meta.pkl",
  ):
    Path(name).write_bytes(bytes(64))
  Path("unfinished/prepare.json").write_text('{"finished": false}')
  Path("cut.bin").write_bytes(b"abc")
  config = dataclasses.replace(BYTES, path=path)
  with pytest.raises(UserError) as late:
    find_data(config, 0)
  with pytest.raises(UserError) as early:
    check_path(config)
  assert str(early.value) == str(late.value)


def test_a_path_that_can_be_read_is_checked_without_reading(write_ids, monkeypatch):
  write_ids(a=range(60), my_test=[])  # a test file is not read
  Path("texts").mkdir()
  Path("texts/a.txt").write_bytes(b"\xff")
  for module in (corpus_lib, token_files):
    monkeypatch.setattr(module, "check_files", None)
  for path in ("ids", "ids/*.bin", "texts", "texts/*", "texts/a.txt", None):
    check_path(dataclasses.replace(BYTES, path=path))
  with pytest.raises(UserError, match=r"data\.source='shakespere' is not known"):
    check_path(dataclasses.replace(BYTES, source="shakespere"))


def test_vocabulary_is_counted_without_reading_an_id(write_ids, monkeypatch):
  write_ids(a=range(60))
  for module in (corpus_lib, token_files):
    monkeypatch.setattr(module, "read_header", None)
  config = dataclasses.replace(BYTES, path="ids")
  assert expected_vocab_size(config) == 256
  assert expected_vocab_size(dataclasses.replace(config, tokenizer="gpt2")) == 50257
  characters = dataclasses.replace(config, tokenizer="characters")
  with pytest.raises(UserError, match=r"no tokenizer\.json"):
    expected_vocab_size(characters)
  Path("ids/tokenizer.json").write_text(json.dumps(CharTokenizer("\nabc", bos=False).to_json()))
  assert expected_vocab_size(characters) == 4


def test_a_run_on_token_files_goes_on_with_the_same_content_only(write_ids):
  write_ids(train=list(range(97, 123)) * 8, val=list(range(97, 123)) * 2)
  experiment = change(load_experiment("shakespeare_bytes"), {"data.path": "ids", "data.seq_len": 8})
  first = plan_run(experiment)
  recorded = {"kind": "token files", "location": "ids (2 files)", "sha256": first.data.text.sha256}
  write_run_files(Path("run"), RunFiles("mine", first.experiment, first.data.tokenizer, recorded))
  assert parts_of(plan_run(experiment, workdir="run").data) == parts_of(first.data)
  write_ids(val=list(range(98, 124)) * 2)
  with pytest.raises(UserError, match=r"ids \(2 files\) has changed since the run in run began"):
    plan_run(experiment, workdir="run")
