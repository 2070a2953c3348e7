"""From text to token files: documents, ids, shards, interruptions, memory, the command."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jgpt import cli, prepare
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, parse_setting
from jgpt.data import preparation
from jgpt.data.corpus import encode_paragraphs, find_data
from jgpt.data.preparation import Preparation
from jgpt.data.token_files import TokenWriter
from jgpt.errors import UserError
from jgpt.system import files, locks
from jgpt.text import documents
from jgpt.text.bpe import END_OF_TEXT, train_bpe_tokenizer
from jgpt.text.documents import (
  KINDS,
  DocumentEncoder,
  Position,
  check_jsonl,
  parse_block,
  read_blocks,
  split_paragraphs,
)
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer
from jgpt.text.tokenizer_files import hugging_face_files

ROOT = Path(__file__).parents[2]
PLAY = (
  "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 30
)
needs_tokenizers = pytest.mark.skipif(
  not importlib.util.find_spec("tokenizers"), reason="BPE needs tokenizers"
)


@functools.cache
def trained():
  return train_bpe_tokenizer(PLAY, 300)


@functools.cache
def marked():
  """A BPE tokenizer with an end-of-text token, 300."""
  return dataclasses.replace(trained(), end_of_text=True)


@pytest.fixture
def folder(folder):
  """Writes files into an empty folder, the current one; the first is returned."""
  return lambda contents: folder(contents)[0]


def small_blocks(monkeypatch, block=16, word=1 << 20):
  monkeypatch.setattr(documents, "TEXT_BLOCK_BYTES", block)
  monkeypatch.setattr(documents, "MAX_WORD_BYTES", word)


def make(inputs, out="out", **changes):
  """Prepares files with bytes as ids, nothing held out."""
  fields = {"tokenizer": ByteTokenizer(), "heldout_tokens": 0, "documents": "paragraphs"} | changes
  return preparation.prepare(Preparation(inputs=[Path(i) for i in inputs], out=Path(out), **fields))


def read_ids(out="out"):
  """All ids of a folder, files in the order of their names, read without jgpt."""
  files = sorted(Path(out).glob("*.bin"), key=lambda path: ("train" in path.name, path.name))
  return np.concatenate([np.frombuffer(path.read_bytes()[1024:], "<u2") for path in files]).tolist()


def contents(out):
  return {path.name: path.read_bytes() for path in Path(out).iterdir()}


# --- Documents ---


def all_documents(path, kind, *, part=False, start=None):
  """Documents of a file, those that were cut joined again."""
  found = []
  for block in read_blocks([path], [path.stat().st_size], kind, start or Position()):
    assert block.content
    texts = parse_block(block, "text", separate=part)
    if block.start.inside:
      found[-1] += texts.pop(0)
    found += texts
  return found


def cut_paragraphs(text):
  """What `documents.split_paragraphs` says, character by character."""
  found, current, is_blank_next = [], "", False
  for char in text:
    current += char
    if char == "\n" and is_blank_next:
      found, current, is_blank_next = [*found, current], "", False
    elif char != "\r" or current[-2:] != "\n\r":
      is_blank_next = char == "\n"
  return [*found, current]


@given(st.text("ab\n é漢\u3000", max_size=200), st.sampled_from([5, 16, 64]))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_paragraphs_are_cut_at_blank_lines_from_the_left_whatever_the_blocks(folder, text, block):
  path = folder({"a.txt": text})
  *whole, last = text.split("\n\n")
  assert cut_paragraphs(text) == [*(f"{p}\n\n" for p in whole), last]
  with pytest.MonkeyPatch.context() as monkeypatch:
    small_blocks(monkeypatch, block)
    assert all_documents(path, "paragraphs") == (
      [*(f"{p}\n\n" for p in whole), last] if text else []
    )
    lines = [line for line in text.splitlines(keepends=True) if line.strip()]
    assert all_documents(path, "lines") == lines
    assert all_documents(path, "files") == ([text] if text else [])


@given(
  st.lists(st.sampled_from(["a", "\r\n", "\n", "\r", " ", "b\r\n\r\n", "\u3000"]), max_size=60).map(
    "".join
  ),
  st.sampled_from([4, 5, 16, 64]),
  st.sampled_from([8, 1 << 20]),
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blank_lines_of_windows_end_paragraphs_too_whatever_the_blocks(folder, text, block, word):
  path = folder({"a.txt": text.encode()})
  assert split_paragraphs(text) == cut_paragraphs(text)
  with pytest.MonkeyPatch.context() as monkeypatch:
    small_blocks(monkeypatch, block, word)
    assert all_documents(path, "paragraphs") == (cut_paragraphs(text) if text else [])


@needs_tokenizers
def test_a_text_with_line_ends_of_windows_has_its_paragraphs_in_files_and_in_memory(
  folder, monkeypatch
):
  small_blocks(monkeypatch, 16)
  text = PLAY[:300].replace("\n", "\r\n")
  assert split_paragraphs("a\r\n\r\nb") == ["a\r\n\r\n", "b"]
  folder({"a.txt": text.encode()})
  make(["a.txt"], tokenizer=marked())
  assert read_ids() == encode_paragraphs(text, marked())
  assert read_ids().count(300) == 1 + text.count("\r\n\r\n") > 3
  assert marked().decode([i for i in read_ids() if i != 300]) == text  # its line ends stay


def test_a_byte_order_mark_goes_and_newlines_stay(folder):
  assert all_documents(folder({"a.txt": b"\xef\xbb\xbfa\r\n\r\nb\n\nc"}), "paragraphs") == [
    "a\r\n\r\n",
    "b\n\n",
    "c",
  ]
  for content in (b"", b"\xef\xbb\xbf"):
    for kind in KINDS:
      assert all_documents(folder({"a.txt": content}), kind) == []


def test_a_word_longer_than_allowed_is_cut_between_characters(folder, monkeypatch):
  small_blocks(monkeypatch, 16, 64)
  text = "漢" * 500 + "a" * 100 + "\u3000" * 50 + "é" * 100
  path = folder({"a.txt": text})
  blocks = list(read_blocks([path], [path.stat().st_size], "paragraphs", Position()))
  assert max(len(block.content) for block in blocks) <= 128 and len(blocks) > 20
  assert all_documents(path, "paragraphs") == [text]


def test_every_block_begins_the_same_blocks_again(folder, monkeypatch):
  """What resuming rests on."""
  small_blocks(monkeypatch, 16, 64)
  path = folder({"a.txt": "word " * 20 + "x" * 300 + "\n\n\n\nend of it\n\n" + "yz " * 30})
  blocks = list(read_blocks([path], [path.stat().st_size], "paragraphs", Position()))
  assert sum(block.start.inside for block in blocks) > 5
  for number, block in enumerate(blocks):
    assert (
      list(read_blocks([path], [path.stat().st_size], "paragraphs", block.start)) == blocks[number:]
    )


def test_json_lines_are_objects_with_a_text_each(folder, monkeypatch):
  small_blocks(monkeypatch)
  lines = [
    '{"text": "one\\n\\ntwo"}',
    "",
    '{"text": "", "i": 1}\r',
    ' {"id": 2, "text": "drei \\u00fc 漢"} ',
    '{"text":"four"}',
  ]
  path = folder({"a.jsonl": b"\xef\xbb\xbf" + "\n".join(lines).encode()})
  assert all_documents(path, "paragraphs") == ["one\n\ntwo", "drei ü 漢", "four"]
  assert all_documents(path, "files", part=True) == ["one\n\ntwo\n", "drei ü 漢\n", "four\n"]


@pytest.mark.parametrize(
  ("line", "complaint"),
  [
    (b'{"text": "cut', r"^a\.jsonl line 41 is not JSON: "),
    (b"[" * 100_000, r"^a\.jsonl line 41 is not JSON: "),
    (
      b'{"id": 1, "content": "x"}',
      r"line 41 needs a text in the field 'text' and has the fields id, content\. See --field",
    ),
    (b'{"text": 7}', r"line 41 needs a text in the field 'text' and has a JSON int in it"),
    (b'["x"]', r"line 41 needs a text in the field 'text' and has a JSON list"),
    (b'{"text": "\\ud800"}', r"^a\.jsonl line 41 holds '\\ud800', half of a surrogate pair"),
    (b'{"text": "\xff"}', r"^a\.jsonl is not UTF-8 text: byte 330 is 0xff"),
  ],
)
def test_a_bad_line_of_json_is_named_by_its_number(folder, monkeypatch, line, complaint):
  small_blocks(monkeypatch)
  folder({"a.jsonl": b'{"text": "ok"}\n\n' * 20 + line})
  with pytest.raises(UserError, match=complaint) as raised:
    make(["a.jsonl"])
  assert "\n" not in str(raised.value)


def test_a_line_of_json_that_is_too_long_is_refused_before_it_is_read(folder, monkeypatch):
  small_blocks(monkeypatch)
  monkeypatch.setattr(documents, "MAX_LINE_BYTES", 64)
  folder({"a.jsonl": '{"text": "ok"}\n' + json.dumps({"text": "x" * 100})})
  with pytest.raises(UserError, match=r"a\.jsonl line 2 is longer than 64 bytes"):
    make(["a.jsonl"])


def test_a_byte_that_is_no_text_is_named_by_its_place(folder, monkeypatch):
  small_blocks(monkeypatch)
  folder(
    {"a.txt": b"fine\n\n" * 10, "b.txt": b"fine\n\n" * 50 + b"wr\xf6ng\n\n" + b"fine\n\n" * 50}
  )
  with pytest.raises(UserError, match=r"^b\.txt is not UTF-8 text: byte 302 is 0xf6\.$"):
    make(["a.txt", "b.txt"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_nul_says_that_a_file_is_no_text(folder, monkeypatch, kind):
  small_blocks(monkeypatch)
  folder({"a.txt": b"fine\n\n" * 10, "tokens.dat": b"fine\n\n" * 50 + b"a\0b" + b"fine\n\n" * 50})
  with pytest.raises(
    UserError, match=r"^tokens\.dat is no text: byte 301 is 0x00\. Leave data files out of --data$"
  ):
    make(["a.txt", "tokens.dat"], documents=kind)
  folder({"b.jsonl": json.dumps({"text": "a\0b"})})  # spelled out, it is meant
  make(["b.jsonl"], documents=kind)
  assert bytes(read_ids()) == b"a\0b\n"


@pytest.mark.parametrize(
  ("name", "content", "complaint"),
  [
    (
      "a.json",
      '{"text": "x"}',
      r"a\.json would be read as text: JSON lines must .*\.jsonl\. Rename it",
    ),
    ("a.ndjson", '{"text": "x"}\n', r"a\.ndjson would be read as text: .*\.jsonl\. Rename it"),
    ("A.JSONL", '{"text": "x"}\n', r"A\.JSONL would be read as text: .*\.jsonl\. Rename it"),
    (
      "a.Json",
      b"\xef\xbb\xbf\n [\n{",
      r"a\.Json is one JSON array, which is not JSON lines\. Write each object on a line",
    ),
  ],
)
def test_json_under_another_name_is_not_taken_for_text(folder, name, content, complaint):
  folder({name: content})
  with pytest.raises(UserError, match=rf"^{complaint}"):
    make([name])
  assert not Path("out").exists()
  with pytest.raises(UserError, match=r"^cannot read absent\.json: No such file"):
    check_jsonl(Path("absent.json"))


def test_a_file_that_changes_its_size_meanwhile_is_refused(folder, monkeypatch):
  small_blocks(monkeypatch)
  path = folder({"a.txt": "word " * 50})
  for size in (100, 300):
    with pytest.raises(UserError, match=rf"a\.txt had {size} bytes and now has another number"):
      list(read_blocks([path], [size], "paragraphs", Position()))


# --- Ids ---


@needs_tokenizers
@given(
  st.lists(
    st.text("Spea k,\n<|>é漢\u01b5", max_size=60)
    | st.sampled_from([END_OF_TEXT, f"a {END_OF_TEXT} b", "<|endof"]),
    max_size=8,
  )
)
@settings(max_examples=40, deadline=None)
def test_documents_at_once_are_documents_one_by_one(texts):
  """With `tiktoken` and without, with an end-of-text token and without."""
  for tokenizer in (marked(), trained()):
    expected = [
      i for text in texts for i in ([300] if tokenizer is marked() else []) + tokenizer.encode(text)
    ]
    slow = DocumentEncoder(tokenizer)
    slow.__dict__["_tiktoken"] = None
    for encoder in (DocumentEncoder(tokenizer), slow):
      assert encoder.encode(texts).tolist() == expected
      inside = encoder.encode(texts, inside=True).tolist()
      assert inside == (expected[1:] if texts and tokenizer is marked() else expected)


@needs_tokenizers
@pytest.mark.parametrize(
  "text", [" " * 30_000 + "x", "a " + "\n" * 12_000 + "b", "a\u1fffb " * 9, "Speak " * 9_000]
)
def test_long_and_strange_text_has_the_ids_of_the_tokenizer(text):
  encoder = DocumentEncoder(marked())
  assert encoder.encode([text, "b"]).tolist() == [
    300,
    *marked().encode(text),
    300,
    *marked().encode("b"),
  ]


@needs_tokenizers
def test_text_that_tiktoken_may_cut_otherwise_is_not_given_to_it():
  """Runs of 10,000 blanks, wherever they stand, and letters younger than Unicode 3.2."""

  class Recorder:
    calls = 0

    def encode(self, text, allowed_special):
      self.calls += 1
      return []

  encoder = DocumentEncoder(marked())
  encoder.__dict__["_tiktoken"] = recorder = Recorder()
  blanks = [
    f"{'a' * n}{run}b"
    for n in (*range(0, 1100, 90), 999, 1000)
    for run in (" " * 10_000, " \n" * 5_000)
  ]
  for text in (*blanks, "\ua7ae" * 9, f"plain {' ' * 9_999}\n. \u1e9e"):
    assert encoder.encode([text]).tolist() == [300, *marked().encode(text)]
  assert recorder.calls == 0
  for text in ("plain", "é漢 ü", f"{' ' * 9_000}b"):
    encoder.encode([text])
  assert recorder.calls == 3


def test_bytes_and_characters_have_nothing_between_documents():
  assert DocumentEncoder(ByteTokenizer()).encode(["é", "b"]).tolist() == [0xC3, 0xA9, 0x62]
  assert DocumentEncoder(CharTokenizer("ab", bos=False)).encode(["ab", "a"]).tolist() == [0, 1, 0]


@needs_tokenizers
@pytest.mark.parametrize("block", [64, 1000, 1 << 19])
def test_ids_of_a_file_are_those_of_the_whole_text_wherever_blocks_are_cut(
  folder, monkeypatch, block
):
  small_blocks(monkeypatch, block)
  text = (
    PLAY
    + "\n"
    + "a long paragraph, Speak. " * 60
    + "\n \n"
    + f"{END_OF_TEXT}\n\n\n\n\n é漢 漢\u3000 x" * 9
    + "\n\n"
  )
  folder({"a.txt": text})
  make(["a.txt"], tokenizer=marked())
  assert read_ids() == encode_paragraphs(text, marked())


@needs_tokenizers
@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({"documents": "files"}, [["a b\nb\n\nb"], ["x\n"], ["t1", "t2"]]),
    ({"documents": "lines"}, [["a b\n", "b\n", "b"], ["x\n"], ["t1", "t2"]]),
    ({"documents": "paragraphs"}, [["a b\nb\n\n", "b"], ["x\n"], ["t1", "t2"]]),
    ({"documents": "paragraphs", "field": "title"}, [["a b\nb\n\n", "b"], ["x\n"], ["T"]]),
  ],
)
def test_end_of_text_stands_before_each_document(folder, options, expected):
  title = '{"title": "T", "text": "t1"}\n' + (
    '{"title": "", "text": "t2"}' if "field" in options else '{"text": "t2"}'
  )
  folder({"a.txt": "a b\nb\n\nb", "b.txt": "x\n", "c.jsonl": title})
  make(["a.txt", "b.txt", "c.jsonl"], tokenizer=marked(), **options)
  texts = [text for part in expected for text in part]
  assert read_ids() == [i for text in texts for i in (300, *marked().encode(text))]


def test_without_an_end_of_text_token_files_are_parted_by_newlines(folder):
  """As where `data.path` names several texts: their bytes are the ids."""
  folder(
    {
      "1.txt": "one",
      "2.txt": "",
      "3.txt": b"\xef\xbb\xbftwo\n\n",
      "4.jsonl": '{"text": "x"}',
      "5.txt": "drei ü",
    }
  )
  make(["1.txt", "2.txt", "3.txt", "4.jsonl", "5.txt"])
  assert bytes(read_ids()) == "one\ntwo\n\nx\ndrei ü".encode()


def test_a_character_that_the_tokenizer_does_not_know_is_named_with_its_file(folder):
  folder({"a.txt": "ab", "b.txt": "abc"})
  with pytest.raises(UserError, match=r"^b\.txt: not in the vocabulary: 'c'"):
    make(["a.txt", "b.txt"], tokenizer=CharTokenizer("\nab", bos=False))


# --- Shards ---


def test_files_have_llm_cs_names_and_bytes(folder):
  folder({"a.txt": "0123456789"})
  manifest = make(["a.txt"], "shards", heldout_tokens=3, shard_tokens=4)
  head = lambda count: np.array([20240520, 1, count] + [0] * 253, "<i4").tobytes()  # noqa: E731
  ids = lambda text: np.frombuffer(text, np.uint8).astype("<u2").tobytes()  # noqa: E731
  files = {
    "shards_val_000000.bin": head(3) + ids(b"012"),
    "shards_train_000001.bin": head(4) + ids(b"3456"),
    "shards_train_000002.bin": head(3) + ids(b"789"),
  }
  written = contents("shards")
  assert written.keys() == files.keys() | {"tokenizer.json", "prepare.json"}
  assert {name: written[name] for name in files} == files
  assert json.loads(written["tokenizer.json"]) == {"type": "bytes"}
  assert json.loads(written["prepare.json"]) == manifest
  assert (
    manifest["finished"]
    and manifest["inputs"][0]["name"] == "a.txt"
    and manifest["inputs"][0]["bytes"] == 10
  )
  assert [(f["name"], f["tokens"], f["sha256"]) for f in manifest["files"]] == [
    (name, (len(content) - 1024) // 2, hashlib.sha256(content).hexdigest())
    for name, content in files.items()
  ]


@pytest.mark.parametrize(
  ("out", "prefix"),
  [
    ("no-val", "tokens"),
    ("my.shards", "my.shards"),
    ("a/b/", "b"),
    ("..hid", "hid"),
    ("a_test", "a_test"),
  ],
)
def test_a_folders_name_that_would_hold_all_out_or_hide_it_begins_no_files_name(
  folder, out, prefix
):
  folder({"a.txt": "0123456789"})
  manifest = make(["a.txt"], out, heldout_tokens=3)
  assert [file["name"] for file in manifest["files"]] == [
    f"{prefix}_val_000000.bin",
    f"{prefix}_train_000001.bin",
  ]
  experiment = dataclasses.replace(
    load_experiment("shakespeare_bytes").data, seq_len=2, batch_size=1
  )
  for path in (out, f"{out}/*.bin"):
    data = find_data(dataclasses.replace(experiment, path=path), 0)
    assert (bytes(data.heldout.tokens.tolist()), bytes(data.train.tokens.tolist())) == (
      b"012",
      b"3456789",
    )


def test_a_shard_may_end_where_the_input_does(folder):
  folder({"a.txt": "0123456789"})
  for shard_tokens, counts in ((5, [5, 5]), (10, [10]), (3, [3, 3, 3, 1])):
    manifest = make(["a.txt"], f"out{shard_tokens}", shard_tokens=shard_tokens)
    assert [file["tokens"] for file in manifest["files"]] == counts
    assert manifest["files"][0]["name"] == f"out{shard_tokens}_train_000001.bin"


@pytest.mark.parametrize(
  ("content", "complaint"),
  [
    ("0123456789", "the input has only 10 tokens.*--heldout-tokens"),
    ("0123", "only 4 tokens"),
    ("\ufeff", "holds no text"),
    (b"0\xff", "is not UTF-8"),
  ],
)
def test_an_input_that_makes_no_shard_leaves_nothing_behind(folder, content, complaint):
  folder({"a.txt": content})
  with pytest.raises(UserError, match=complaint):
    make(["a.txt"], "new/er/out", heldout_tokens=10)
  assert not Path("new").exists()
  Path("out").mkdir()
  with pytest.raises(UserError, match=complaint):
    make(["a.txt"], heldout_tokens=10)
  assert not list(Path("out").iterdir())
  folder({"a.txt": "0123"})
  assert make(["a.txt"])["finished"] and read_ids() == [*b"0123"]


@pytest.mark.parametrize("lost", ["manifest", "tokenizer", "shard"])
def test_a_beginning_without_a_shard_is_replaced_by_another_wish(folder, monkeypatch, lost):
  """Killed before the manifest records a shard, which may be complete by then."""
  folder({"a.txt": "0123456789"})
  chars = CharTokenizer("0123456789", bos=False)
  write, count = files.write_json, 0

  def kill(path, value):
    nonlocal count
    count += 1
    if count > ["manifest", "tokenizer", "shard"].index(lost):
      raise KilledError
    write(path, value)

  with monkeypatch.context() as patched, pytest.raises(KilledError):
    patched.setattr(preparation, "write_json", kill)
    make(["a.txt"], tokenizer=chars, heldout_tokens=5)
  folder({"out/mine_val_000000.bin": "x"}) if lost != "manifest" else None
  assert make(["a.txt"], heldout_tokens=0)["finished"]
  written = contents("out")
  assert written.pop("mine_val_000000.bin", b"x") == b"x"
  assert written.keys() == {"out_train_000001.bin", "tokenizer.json", "prepare.json"}
  assert json.loads(written["tokenizer.json"]) == {"type": "bytes"}


def test_an_input_without_text_is_refused(folder):
  folder({"a.txt": "", "b.txt": b"\xef\xbb\xbf"})
  with pytest.raises(UserError, match=r"holds no text: a\.txt"):
    make(["a.txt", "b.txt"])


# --- Interruptions ---


class KilledError(BaseException):
  """Stands for a process that ends here."""


@pytest.fixture
def texts(folder, monkeypatch):
  """Three inputs of many blocks; some shards begin inside a block, some inside a document."""
  small_blocks(monkeypatch, 64, 256)
  lines = "".join(json.dumps({"text": f"document {n} " * (n % 5)}) + "\n" for n in range(40))
  folder(
    {
      "in/a.txt": PLAY[:700] + "x" * 600 + " end",
      "in/b.jsonl": lines,
      "in/c.txt": "last words, Speak. " * 40,
    }
  )
  return ["in/a.txt", "in/b.jsonl", "in/c.txt"]


@needs_tokenizers
@pytest.mark.parametrize("place", ["after a shard", "before the manifest", "while encoding"])
def test_interrupted_anywhere_and_started_again_it_makes_the_same_bytes(texts, monkeypatch, place):
  options = {"tokenizer": marked(), "heldout_tokens": 100, "shard_tokens": 170}
  make(texts, "whole/out", **options)
  whole = contents("whole/out")
  num_files = len([name for name in whole if name.endswith(".bin")])
  target, name = {
    "after a shard": (preparation, "digest_file"),
    "before the manifest": (preparation, "write_json"),
    "while encoding": (preparation, "parse_block"),
  }[place]
  original, starts = getattr(target, name), 0

  def fail_at(last):
    count = 0

    def call(*args, **kwargs):
      nonlocal count
      count += 1
      if count > last:
        raise KilledError
      return original(*args, **kwargs)

    return call

  finished = False
  while not finished:
    starts += 1
    monkeypatch.setattr(target, name, fail_at(starts if place == "while encoding" else 1))
    try:
      finished = make(texts, "out", **options)["finished"]
    except KilledError:
      assert not preparation.read_preparation(Path("out"))["finished"]
    assert starts < 100
  assert starts >= min(num_files, 5) and contents("out") == whole


@needs_tokenizers
@pytest.mark.parametrize("shards_done", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_killed_in_the_middle_of_a_shard_it_goes_on_after_the_last_complete_one(texts, shards_done):
  """SIGKILL: what was being written is still there under its temporary name, and nothing was tidied
  up.
  """
  if not hasattr(signal, "SIGKILL"):
    pytest.skip("this system has no SIGKILL")
  Path("tokenizer.json").write_text(json.dumps(marked().to_json()))
  arguments = [
    "--data",
    "in",
    "--tokenizer",
    "tokenizer.json",
    "--heldout-tokens",
    "100",
    "--shard-tokens",
    "300",
  ]
  code = """if True:
    import os, signal, sys
    from jgpt import prepare
    from jgpt.data.token_files import TokenWriter
    from jgpt.text import documents
    documents.TEXT_BLOCK_BYTES, documents.MAX_WORD_BYTES, done = 64, 256, int(sys.argv.pop(1))
    append = TokenWriter.append
    def append_or_die(writer, ids):
      append(writer, ids)
      writer._file.flush()
      num_shards = len([name for name in os.listdir("out") if name.endswith(".bin")])
      if num_shards == done and writer.count > 50:
        os.kill(os.getpid(), signal.SIGKILL)
    TokenWriter.append = append_or_die
    sys.exit(prepare.main())
  """
  command_line = [sys.executable, "-c", code, str(shards_done), *arguments, "--out", "out"]
  killed = subprocess.run(command_line, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
  assert killed.returncode == -signal.SIGKILL
  left = contents("out")
  assert len([name for name in left if name.endswith(".bin")]) == shards_done
  assert [name for name in left if name.endswith(".bin.tmp")]
  assert (
    prepare.main([*arguments, "--out", "out"])
    == 0
    == prepare.main([*arguments, "--out", "whole/out"])
  )
  assert contents("out") == contents("whole/out")
  assert all(contents("out")[name] == left[name] for name in left if name.endswith(".bin"))


def test_finished_folder_is_left_as_it_is(folder, capsys):
  folder({"a.txt": PLAY})
  arguments = ["--data", "a.txt", "--tokenizer", "bytes", "--out", "out", "--heldout-tokens", "10"]
  assert prepare.main(arguments) == 0 and "nothing was changed" not in capsys.readouterr().out
  before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("out").iterdir()}
  assert (
    prepare.main(arguments) == 0
    and "out is finished already: nothing was changed" in capsys.readouterr().out
  )
  assert {
    path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("out").iterdir()
  } == before


@pytest.mark.parametrize(
  ("changes", "what"),
  [
    ({"heldout_tokens": 11}, "heldout_tokens"),
    ({"shard_tokens": 99}, "shard_tokens"),
    ({"documents": "lines"}, "documents"),
    ({"field": "content"}, "field"),
    ({"tokenizer": CharTokenizer("".join(sorted(set(PLAY))), bos=False)}, "tokenizer_sha256"),
  ],
)
def test_another_wish_with_the_same_folder_is_refused(folder, changes, what):
  folder({"a.txt": PLAY})
  make(["a.txt"], heldout_tokens=10)
  before = contents("out")
  with pytest.raises(UserError, match=rf"--out out was made from something else: {what} differs"):
    make(["a.txt"], **({"heldout_tokens": 10} | changes))
  assert contents("out") == before


def test_another_input_with_the_same_folder_is_refused(folder):
  path = folder({"a.txt": PLAY, "b.txt": PLAY})
  make(["a.txt"])
  for inputs in (["b.txt"], ["a.txt", "b.txt"]):
    with pytest.raises(UserError, match="something else: inputs differs"):
      make(inputs)
  path.write_text(PLAY.swapcase())  # of the same size
  os.utime(path, ns=(0, 0))
  with pytest.raises(UserError, match="something else: inputs differs"):
    make(["a.txt"])


def test_other_peoples_files_are_left_alone(folder):
  folder({"a.txt": PLAY, "mine/notes.md": "x", "here/a.txt": PLAY})
  with pytest.raises(
    UserError, match=r"--out mine holds other files \(notes\.md\), which are left alone"
  ):
    make(["a.txt"], "mine")
  for out in ("here", "here/../here", "."):
    with pytest.raises(UserError, match=r"here/a\.txt is inside --out"):
      make(["here/a.txt"], out)
  with pytest.raises(UserError, match=r"cannot write to --out a\.txt: File exists"):
    make(["here/a.txt"], "a.txt")
  assert contents("mine") == {"notes.md": b"x"} and contents("here") == {"a.txt": PLAY.encode()}


def test_a_lost_or_damaged_file_of_the_folder_is_named(folder):
  folder({"a.txt": PLAY})
  make(["a.txt"], shard_tokens=1000)
  path = Path("out/out_train_000002.bin")
  content = path.read_bytes()
  for left, got in ((content[:-2], "3022"), (None, "no")):
    path.write_bytes(left) if left else path.unlink()
    with pytest.raises(
      UserError,
      match=rf"out_train_000002\.bin has {got} bytes and was written with 3,024\. Delete out",
    ):
      make(["a.txt"], shard_tokens=1000)
  path.write_bytes(content)
  for damaged in ("{", "[]", '{"finished": true}'):
    Path("out/prepare.json").write_text(damaged)
    with pytest.raises(UserError, match=r"^out/prepare\.json is damaged"):
      make(["a.txt"], shard_tokens=1000)


def test_a_file_has_its_name_for_good_before_the_manifest_says_so(folder, monkeypatch):
  """After a power cut the manifest may not name a file that the disk has under its
  temporary name.
  """
  said, sync = [], files.sync_folder

  def look(path):
    sync(path)
    listed = json.loads((path / "prepare.json").read_text())["files"]
    said.append((len(list(path.glob("*.bin"))), len(listed)))

  folder({"a.txt": PLAY})
  monkeypatch.setattr(preparation, "sync_folder", look)
  make(["a.txt"], shard_tokens=1000)
  assert said == [(1, 0), (2, 1), (3, 2)]


def test_more_inputs_than_a_manifest_can_list_are_refused_before_anything_is_made(
  folder, monkeypatch
):
  """Else it would be made, and never read."""
  monkeypatch.setattr(preparation, "MAX_PREPARATION_BYTES", 4000)
  folder({f"in/{n}.txt": "words" for n in range(40)})
  with pytest.raises(
    UserError,
    match=r"^--data is 40 files, more than prepare\.json can list\. Join them, as JSON lines$",
  ):
    make([f"in/{n}.txt" for n in range(40)])
  assert not Path("out").exists()
  assert make([f"in/{n}.txt" for n in range(4)])["finished"]


@pytest.mark.parametrize("option", ["--out", "--tokenizer", "--data"])
def test_a_name_that_is_too_long_ends_with_status_2_and_one_line(folder, capsys, option):
  folder({"a.txt": PLAY})
  given = {"--data": "a.txt", "--tokenizer": "bytes", "--out": "out"} | {option: "x" * 300}
  assert cli.guard(lambda: prepare.main([word for pair in given.items() for word in pair])) == 2
  said = capsys.readouterr()
  assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
  assert os.listdir() == ["a.txt"]


def test_two_at_once_do_not_write_into_one_folder(folder):
  pytest.importorskip("fcntl", reason="this system cannot lock a folder")
  folder({"a.txt": PLAY})
  Path("out").mkdir()
  with (
    locks.hold(Path("out")),
    pytest.raises(UserError, match="out is being written by another process"),
  ):
    make(["a.txt"])
  assert make(["a.txt"])["finished"]


def test_a_full_disk_is_said_with_the_folder(folder, monkeypatch):
  folder({"a.txt": PLAY})

  def full(writer, ids):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patched:
    patched.setattr(TokenWriter, "append", full)
    with pytest.raises(
      UserError,
      match=r"cannot write to --out out: No space left on device\. Fix this, and the same "
      r"command continues",
    ):
      make(["a.txt"])
  assert make(["a.txt"])["finished"]


# --- The command ---


def test_llm_cs_shakespeare_becomes_the_ids_that_jgpt_reads_from_the_text(tmp_path, capsys):
  pytest.importorskip("tokenizers", reason="GPT-2's tokenizer needs tokenizers (the extra bpe)")
  text = Path(os.environ.get("JGPT_DATA_DIR") or "/nowhere", "tinyshakespeare.txt")
  if not text.is_file() or not (text.parent / "gpt2").is_dir():
    pytest.skip(
      "tinyshakespeare.txt and gpt2/ are not at hand: JGPT_DATA_DIR names no folder that has them"
    )
  out = tmp_path / "shards"
  assert prepare.main(["--data", str(text), "--tokenizer", "gpt2", "--out", str(out)]) == 0
  said = capsys.readouterr()
  assert "305,260 for training, 32,768 held out" in said.out and "338,028 tokens" in said.err
  assert re.search(
    rf"-m jgpt\.run --experiment gpt2_shakespeare --set data\.path={out}$", said.out.strip()
  )
  config = load_experiment("gpt2_shakespeare").data
  from_text, from_files = (
    find_data(config, 0),
    find_data(dataclasses.replace(config, path=str(out)), 0),
  )
  assert (len(from_files.train.tokens), len(from_files.heldout.tokens)) == (305_260, 32_768)
  np.testing.assert_array_equal(from_files.train.tokens, from_text.train.tokens)
  np.testing.assert_array_equal(from_files.heldout.tokens, from_text.heldout.tokens)
  assert from_files.tokenizer == from_text.tokenizer


@needs_tokenizers
@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_the_next_command_is_one_that_loads(folder, capsys, kind):
  tokenizer = {
    "bytes": ByteTokenizer(),
    "characters": CharTokenizer("".join(sorted(set(PLAY))), bos=False),
    "bpe": trained(),
  }[kind]
  folder({"a.txt": PLAY, "a run/tokenizer.json": json.dumps(tokenizer.to_json())})
  word = "bytes" if kind == "bytes" else "a run"
  assert (
    prepare.main(
      ["--data", "a.txt", "--tokenizer", word, "--out", "my shards", "--heldout-tokens", "100"]
    )
    == 0
  )
  line = capsys.readouterr().out.strip().splitlines()[-1]
  words = shlex.split(line)[3:]
  assert words[:1] + words[2:4] == ["--experiment", "--set", "data.path=my shards"]
  changes = dict(parse_setting(word) for word in words[3::2])
  assert changes.get("data.bpe_vocab_size") == (300 if kind == "bpe" else None)
  assert changes.get("data.seq_len", 1) <= 99  # of 100 tokens that are held out
  data = find_data(change(load_experiment(words[1]), changes).data, 0)
  assert data.tokenizer == tokenizer and len(data.heldout.tokens) == 100
  assert data.tokenizer.decode([*data.heldout.tokens.tolist(), *data.train.tokens.tolist()]) == PLAY


@pytest.mark.parametrize(
  ("arguments", "complaint"),
  [
    (["--data", "absent.txt"], "there is no file absent.txt"),
    (
      ["--data", "empty"],
      r"the folder empty holds no \*\.txt or \*\.jsonl file\. For others try --data 'empty/\*'",
    ),
    (["--data", "*.rst"], r"no file is called \*\.rst"),
    (
      ["--tokenizer", "gpt3"],
      "--tokenizer gpt3 must be gpt2, bytes, a tokenizer.json or a run folder",
    ),
    (
      ["--tokenizer", "names"],
      r"names/tokenizer\.json is the tokenizer of a run of documents, with BOS",
    ),
    (["--heldout-tokens", "-1"], "--heldout-tokens -1 must be at least 0"),
    (["--shard-tokens", "0"], "--shard-tokens 0 must be at least 1"),
    (
      ["--shard-tokens", "2147483648"],
      r"--shard-tokens 2147483648 must be at least 1, and below 2\*\*31",
    ),
  ],
)
def test_a_users_errors_end_with_status_2_and_one_line(folder, capsys, arguments, complaint):
  folder(
    {
      "a.txt": PLAY,
      "empty/a.md": "x",
      "names/tokenizer.json": json.dumps(CharTokenizer("ab", bos=True).to_json()),
    }
  )
  defaults = {"--data": "a.txt", "--tokenizer": "bytes", "--out": "out"}
  given = [word for pair in (defaults | {arguments[0]: arguments[1]}).items() for word in pair]
  assert cli.guard(lambda: prepare.main(given)) == 2
  said = capsys.readouterr()
  assert re.match(f"error: {complaint}", said.err) and said.err.count("\n") == 1 and not said.out
  assert not Path("out").exists()


@needs_tokenizers
def test_the_tokenizer_of_a_hugging_face_folder_is_taken(folder, capsys):
  saved = hugging_face_files(marked(), 8)["tokenizer.json"] | {
    "post_processor": None,
    "padding": None,
  }
  folder({"a.txt": PLAY, "hf/tokenizer.json": json.dumps(saved), "hf/config.json": "{}"})
  assert (
    prepare.main(
      ["--data", "a.txt", "--tokenizer", "hf", "--out", "out", "--heldout-tokens", "100"]
    )
    == 0
  )
  assert read_ids() == encode_paragraphs(PLAY, marked())
  assert json.loads(Path("out/tokenizer.json").read_text()) == marked().to_json()


def test_folder_is_its_texts_and_json_lines_in_the_order_of_names(folder):
  folder({"t/b.txt": "b", "t/a/z.jsonl": "x", "t/c.md": "c", "t/.d.txt": "d", "e.rst": "e"})
  names = lambda path: [file.as_posix() for file in preparation.find_inputs(path)]  # noqa: E731
  assert (
    names("t") == ["t/a/z.jsonl", "t/b.txt"]
    and names("t/*") == ["t/b.txt", "t/c.md"]
    and names("e.rst") == ["e.rst"]
  )


def test_progress_is_said_now_and_then_with_the_time_that_is_left(monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(prepare.time, "perf_counter", lambda: now[0])
  progress = prepare.PreparationProgress(10_000_000)
  for seconds, megabytes, tokens in ((1, 2, 5), (9.9, 2.5, 6), (10, 3, 7), (12, 4, 8), (20, 10, 9)):
    now[0] = seconds
    progress.update(int(1e6 * megabytes), tokens)
  assert capsys.readouterr().err.splitlines() == [
    "3.0 of 10.0 MB (30%), 7 tokens, 0.1 MB/s, 70 s left",
    "10.0 of 10.0 MB (100%), 9 tokens, 0.4 MB/s",
  ]


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  with prepare.PreparationProgress(100) as progress:
    progress.update(50, 7)
    progress.update(100, 9)
    assert progress._bar.tasks[0].completed == 100


def test_memory_does_not_grow_with_the_text_and_jax_is_not_imported(tmp_path):
  """24 MB of text, 3 MB of it one paragraph, go through a process that takes less than 140 MB in
  all.
  """
  if not Path("/proc/self/status").exists():
    pytest.skip("this system does not say how much memory a process took at most")
  (tmp_path / "a.txt").write_text(
    "To be, or not to be: that is the question.\n\n" * 480_000 + "and so on " * 300_000
  )
  code = """if True:
    import re, sys
    from pathlib import Path
    from jgpt import prepare
    prepare.main(sys.argv[1:])
    assert "jax" not in sys.modules
    print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
  """
  arguments = [
    "--data",
    str(tmp_path / "a.txt"),
    "--tokenizer",
    "bytes",
    "--out",
    str(tmp_path / "out"),
  ]
  done = subprocess.run(
    [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
  )
  assert int(done.stdout.splitlines()[-1]) / 1024 < 140
