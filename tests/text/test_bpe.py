"""Byte-level BPE: round trips, GPT-2's ids, training against a plain trainer, the same ids from
either package, JSON.
"""

import collections
import copy
import dataclasses
import itertools
import json
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jgpt.errors import UserError
from jgpt.text import bpe
from jgpt.text.bpe import ALPHABET, BpeTokenizer, make_gpt2_tokenizer, train_bpe_tokenizer
from jgpt.text.tokenizer import tokenizer_from_json

tokenizers = pytest.importorskip(
  "tokenizers", reason="trains and encodes byte-level BPE (jgpt's extra: bpe)"
)

NO_DEADLINE = hypothesis_settings(deadline=None)
TEXT = "Café, the cat; the hat's 12 cats' hats:\n\n  they're 3 \t naïve — 猫の手 😀\n" * 3
TRAINED = train_bpe_tokenizer(TEXT, 300)
# Unicode text in which GPT-2's rule for words finds something to do.
PIECES = st.sampled_from(
  ["'s", "'re", " ", "  ", "\n", "the", "hats", "12", "é", "猫", "\u00a0", "<|endoftext|>", "😀"]
)
ANY_TEXT = st.text() | st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join)


@pytest.fixture(scope="module")
def data_dir():
  """The folder of real data."""
  folder = Path(os.environ.get("JGPT_DATA_DIR") or "/nowhere")
  if not (folder / "gpt2/vocab.bpe").is_file() or not (folder / "tinyshakespeare.txt").is_file():
    pytest.skip("JGPT_DATA_DIR does not name a folder with GPT-2's files and tiny Shakespeare")
  return folder


@pytest.fixture(scope="module")
def gpt2(data_dir):
  return make_gpt2_tokenizer(
    (data_dir / "gpt2/encoder.json").read_bytes(), (data_dir / "gpt2/vocab.bpe").read_bytes()
  )


@pytest.fixture(scope="module", params=["trained", "gpt2"])
def tokenizer(request):
  return TRAINED if request.param == "trained" else request.getfixturevalue("gpt2")


def without_tiktoken(tokenizer):
  """The same tokenizer as it is where tiktoken is not installed."""
  slow = dataclasses.replace(tokenizer)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "tiktoken", None)
    assert slow.tiktoken_encoding is None
  return slow


# --- Round trips ---


@NO_DEADLINE
@given(text=ANY_TEXT)
def test_any_text_survives(tokenizer, text):
  ids = tokenizer.encode(text)
  assert all(0 <= i < tokenizer.vocab_size - tokenizer.end_of_text for i in ids)
  assert tokenizer.decode(ids) == text


@NO_DEADLINE
@given(st.lists(st.integers(-5, 320)))
def test_any_ids_decode(ids):
  """Cut-off characters become U+FFFD, ids beyond the tokenizer's have no text, and nothing
  raises.
  """
  known = [i for i in ids if 0 <= i < TRAINED.vocab_size]
  assert TRAINED.decode(ids) == TRAINED.decode(known) == TRAINED._encoder.decode(known)


# --- GPT-2 ---


def test_gpt2_has_the_ids_that_openai_published(gpt2):
  assert (gpt2.vocab_size, gpt2.eot_id, gpt2.stop_id) == (50257, 50256, None)
  assert gpt2.encode("Hello world") == [15496, 995]
  assert gpt2.describe() == "50,257 ids: byte-level BPE, end of text 50256"


def test_end_of_text_is_an_id_that_no_text_becomes(gpt2):
  """Text that looks like it is ordinary text.

  The id is shown as text, and begins an empty prompt.
  """
  assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
  assert gpt2.decode([50256, 15496, 50257, 10**6]) == "<|endoftext|>Hello"
  assert gpt2.encode_prompt("") == [50256]
  assert gpt2.encode_prompt("Hello world") == [15496, 995]
  assert TRAINED.eot_id is None
  assert TRAINED.encode_prompt("") == TRAINED.encode("\n") != []


def test_gpt2_equals_tiktokens_own_on_all_of_tiny_shakespeare(gpt2, data_dir, monkeypatch):
  """With tiktoken as the encoder and without it.

  338,025 tokens is also what nanoGPT and llm.c count.
  """
  tiktoken = pytest.importorskip("tiktoken", reason="the oracle")
  monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(data_dir / "tiktoken_cache"))
  text = (data_dir / "tinyshakespeare.txt").read_text(encoding="utf-8")
  ids = tiktoken.get_encoding("gpt2").encode_ordinary(text)
  assert len(ids) == 338_025
  assert gpt2.encode(text) == ids
  assert without_tiktoken(gpt2).encode(text) == ids
  assert gpt2.decode(ids) == text


@pytest.mark.parametrize("what", ["encoder.json", "vocab.bpe"])
@pytest.mark.parametrize(
  "content", [b"", b"\xff", b"[" * 10**5, b'{"a": 0}', b"#version: 0.2\nh e\nx y z\n"]
)
def test_files_that_are_not_gpt2s_are_refused(data_dir, what, content):
  files = {name: (data_dir / "gpt2" / name).read_bytes() for name in ("encoder.json", "vocab.bpe")}
  with pytest.raises(UserError, match=r"encoder\.json|must join two earlier tokens"):
    make_gpt2_tokenizer(*(files | {what: content}).values())


# --- Training ---


def plain_bpe(text, num_merges):
  """Pairs of ids that a byte-level BPE merges, learned in the plainest way from text of the letters
  a-z, A-Z and é.

  Ties go to the pair with the smaller left id, then to the smaller right id.
  """
  byte_order = [
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
    *range(33),
    *range(127, 161),
    173,
  ]  # GPT-2's ids
  pattern = r"'(?:[sdmt]|ll|ve|re)| ?[a-zA-Zé]+| ?[0-9]+| ?[^\sa-zA-Zé0-9]+|\s+(?!\S)|\s+"
  words = collections.Counter(re.findall(pattern, text))
  split = {word: [byte_order.index(b) for b in word.encode()] for word in words}
  merges = []
  while len(merges) < num_merges:
    counts = collections.Counter()
    for word, ids in split.items():
      for pair in itertools.pairwise(ids):
        counts[pair] += words[word]
    if not counts:
      break
    merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
    for ids in split.values():
      for i in range(len(ids) - 1):
        if tuple(ids[i : i + 2]) == merges[-1]:
          ids[i : i + 2] = [255 + len(merges)]
  return merges


def merged_pairs(trained):
  model = trained.to_json()["model"]
  return [tuple(model["vocab"][token] for token in pair) for pair in model["merges"]]


@NO_DEADLINE
@example("aaaa aaa aa", 10)
@given(st.text("ab \n'sé1!", max_size=60), st.integers(0, 30))
def test_training_equals_a_plain_trainer(text, num_merges):
  """The most frequent pair is merged; equally frequent ones in the order of their ids."""
  merges = plain_bpe(text, num_merges)
  trained = train_bpe_tokenizer(text, 256 + len(merges))
  assert merged_pairs(trained) == merges
  assert trained.vocab_size == 256 + len(merges)
  if len(merges) < num_merges:
    with pytest.raises(
      UserError, match=rf"data\.bpe_vocab_size={256 + num_merges} .*Try .*={256 + len(merges)}$"
    ):
      train_bpe_tokenizer(text, 256 + num_merges)


def test_training_on_real_text_equals_a_plain_trainer(data_dir):
  text = (data_dir / "tinyshakespeare.txt").read_text(encoding="utf-8")[:20_000]
  assert merged_pairs(train_bpe_tokenizer(text, 356)) == plain_bpe(text, 100)


def test_training_twice_gives_one_tokenizer():
  assert train_bpe_tokenizer(TEXT, 300) == TRAINED
  assert train_bpe_tokenizer(TEXT, 300).digest == TRAINED.digest


def test_the_least_vocabulary_is_the_bytes():
  assert train_bpe_tokenizer("", 256) == BpeTokenizer("", end_of_text=False)
  assert train_bpe_tokenizer("abc", 256).encode("ab\n") == [
    64,
    65,
    198,
  ]  # GPT-2's ids for single bytes
  with pytest.raises(UserError, match=r"data\.bpe_vocab_size=255 must be at least 256"):
    train_bpe_tokenizer("abc", 255)


# --- One list of ids, whatever is installed ---


@NO_DEADLINE
@given(text=ANY_TEXT)
def test_tiktoken_changes_no_id(tokenizer, text):
  pytest.importorskip("tiktoken", reason="the faster encoder (jgpt's extra: tiktoken)")
  assert (
    tokenizer.tiktoken_encoding.encode_ordinary(text)
    == tokenizer._encoder.encode(text).ids
    == tokenizer.encode(text)
  )


@NO_DEADLINE
@given(st.text("ab ", min_size=5, max_size=200), st.text("ab ", max_size=200), st.integers(0, 20))
def test_tiktoken_changes_no_id_of_a_trained_tokenizer(train_on, text, num_merges):
  """Few letters make many ways to join them: were tiktoken's rule another, it would show here."""
  pytest.importorskip("tiktoken", reason="the faster encoder (jgpt's extra: tiktoken)")
  trained = train_bpe_tokenizer(train_on, 256 + len(plain_bpe(train_on, num_merges)))
  assert trained.tiktoken_encoding.encode_ordinary(text) == trained._encoder.encode(text).ids


def test_tiktoken_is_not_used_where_it_would_join_other_neighbours():
  """No merge joins "ab" and "c", but "abc" is a token: tiktoken would join them."""
  pytest.importorskip("tiktoken", reason="the faster encoder (jgpt's extra: tiktoken)")
  crafted = BpeTokenizer("a b\nb c\na bc", end_of_text=False)
  assert crafted.tiktoken_encoding is None
  assert crafted.encode("abc") == [256, ALPHABET.index("c")]


@pytest.mark.slow
def test_a_million_of_one_character_is_no_trouble():
  """Tiktoken alone panics at a million spaces: its regular expressions overflow a stack."""
  for text in ("a" * 10**6, " " * 10**6 + "x", "\n " * 500_000, "\0" * 10**6):
    assert TRAINED.decode(TRAINED.encode(text)) == text


@pytest.mark.parametrize("text", ["x" + " " * 10**4, "\U00032000", "\u1c90"])
def test_text_on_which_versions_may_differ_is_not_tiktokens(text, monkeypatch):
  """Blanks without end; a character that has no meaning yet (its tables may know one).

  A letter younger than 2002.
  """
  pytest.importorskip("tiktoken", reason="the faster encoder (jgpt's extra: tiktoken)")
  expected = TRAINED.encode(text)
  monkeypatch.setitem(TRAINED.__dict__, "tiktoken_encoding", None)  # absent
  assert TRAINED.encode(text) == expected
  monkeypatch.setitem(TRAINED.__dict__, "tiktoken_encoding", object())  # raises when used
  assert TRAINED.encode(text) == expected


def test_ordinary_text_is_tiktokens(monkeypatch):
  """Emoji and the scripts of the world do not slow it down."""

  class Fast:
    def encode_ordinary(self, text):
      return [0]

  monkeypatch.setitem(TRAINED.__dict__, "tiktoken_encoding", Fast())
  assert TRAINED.encode("Hello, мир! 猫の手 😀 हिन्दी العربية\n") == [0]


@NO_DEADLINE
@given(
  st.lists(
    st.sampled_from(["word", " ", "\n", "\t", "  ", "'s", "12", "\x1c", "\u2003", "。"]),
    max_size=60,
  ).map("".join)
)
def test_cutting_text_into_pieces_changes_no_id(text):
  """Long texts are encoded piece by piece.

  Here the pieces are three characters and more, and blanks are merged.
  """
  tokenizer = BpeTokenizer("Ċ Ċ\nĠ Ġ\nĠ w\nĉ Ġ\nĊ Ġ", end_of_text=False)
  short = re.compile(bpe._PIECES.pattern.replace("65536", "3"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bpe, "_PIECES", short)
    ids = tokenizer.encode(text)
  assert ids == tokenizer._encoder.encode(text).ids
  assert "".join(match.group() for match in short.finditer(text)) == text


def test_long_text_is_cut():
  assert len(list(bpe._PIECES.finditer("word " * 100_000))) == 8


# --- What is absent ---


def test_missing_tokenizers_is_said_with_what_to_install(monkeypatch):
  """Decoding needs no package: samples of a run can be read anywhere."""
  ids = TRAINED.encode("the cats")
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  absent = BpeTokenizer(TRAINED.merges, end_of_text=False)
  for need in (
    lambda: absent.encode("a"),
    lambda: absent.encode_prompt(""),
    lambda: train_bpe_tokenizer("a", 256),
  ):
    with pytest.raises(
      UserError, match=r"need the package `tokenizers`.*pip install tokenizers.*with its extra bpe"
    ):
      need()
  assert absent.decode(ids) == "the cats"


# --- JSON ---


def test_json_is_a_file_that_tokenizers_reads(tokenizer, tmp_path):
  """The same ids and vocabulary; there, the end-of-text token is a special one."""
  (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.to_json()))
  read = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  assert read.encode(TEXT).ids == tokenizer.encode(TEXT)
  assert read.decode(tokenizer.encode(TEXT)) == TEXT
  assert read.get_vocab_size() == tokenizer.vocab_size
  if tokenizer.end_of_text:
    assert read.encode("a<|endoftext|>").ids == [64, 50256]
    assert read.decode([50256, 64]) == "a"


def test_json_reads_back_equal(tokenizer):
  again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
  assert again == tokenizer
  assert again.digest == tokenizer.digest


def changed(path, value):
  """GPT-2-like JSON with one place changed."""
  made = place = copy.deepcopy(BpeTokenizer("t h\nth e", end_of_text=True).to_json())
  for key in path[:-1]:
    place = place[key]
  place[path[-1]] = value
  return made


@pytest.mark.parametrize(
  "value",
  [
    {"model": None},
    {"model": {}},
    changed(["normalizer"], {"type": "Lowercase"}),
    changed(["pre_tokenizer"], {"type": "Whitespace"}),
    changed(["pre_tokenizer", "add_prefix_space"], True),
    changed(["post_processor"], {"type": "ByteLevel"}),
    changed(["decoder"], None),
    changed(["truncation"], {"max_length": 5}),
    changed(["added_tokens"], [{"id": 0, "content": "!"}]),
    changed(["added_tokens"], []),
    changed(["more"], None),
    changed(["model", "type"], "WordPiece"),
    changed(["model", "dropout"], 0.1),
    changed(["model", "ignore_merges"], True),
    changed(["model", "vocab", "the"], 255),
    changed(["model", "vocab", "other"], 259),
    changed(["model", "merges"], [["h", "e"], ["t", "he"]]),  # of another vocabulary
    changed(["model", "merges"], [["t", "h"]]),
    changed(["model", "merges"], [["th", "e"], ["t", "h"]]),  # before its parts
    changed(["model", "merges"], [["t", "h"], ["t", "h"]]),
    changed(["model", "merges"], [["t", "h"], ["", "th"]]),
    changed(["model", "merges"], [["t", "h"], ["th e"]]),
    changed(["model", "merges"], [["t", "h"], ["th", "e", ""]]),
    changed(["model", "merges"], ["t h", "th e"]),
    changed(["model", "merges"], "t h"),
    changed(["model", "merges"], [["t", 0]]),
    changed(["model", "merges"], None),
    changed(["model", "merges"], 5),
  ],
)
def test_json_that_is_not_as_jgpt_writes_it_is_refused(value):
  """Whatever else it holds would mean other ids, or text that is changed before it is encoded."""
  with pytest.raises(UserError, match="BPE tokenizer"):
    tokenizer_from_json(value)


@pytest.mark.parametrize(
  "merges", ["t h\nt h", "th e", "t  h", "t h ", " th", "t", "\n", "t h\n", "€ t"]
)
def test_merges_that_join_nothing_new_are_refused(merges):
  with pytest.raises(
    UserError, match=r"merge [01] \(.*\) must join two earlier tokens into a new one"
  ):
    BpeTokenizer(merges, end_of_text=False)


def test_end_of_text_is_never_made_by_merges():
  """Else text could become it."""
  merges = "\n".join(
    f"{bpe.END_OF_TEXT[:n]} {bpe.END_OF_TEXT[n]}" for n in range(1, len(bpe.END_OF_TEXT))
  )
  with pytest.raises(UserError, match=r"merge 11 \('<\|endoftext\| >'\)"):
    BpeTokenizer(merges, end_of_text=True)
