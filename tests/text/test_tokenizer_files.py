"""Tokenizers in other programs' files: the same ids and text through Hugging Face's packages, and
back; llm.c's file.
"""

import contextlib
import copy
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jgpt.errors import UserError
from jgpt.text.bpe import BpeTokenizer, make_gpt2_tokenizer
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer, kind_of, train_char_tokenizer
from jgpt.text.tokenizer_files import (
  hugging_face_files,
  llmc_tokenizer_bytes,
  read_hugging_face_tokenizer,
)

NO_DEADLINE = hypothesis_settings(deadline=None)
SLOW_EXAMPLES = hypothesis_settings(deadline=None, max_examples=25)

# What programs have cut, joined or dropped: composed and combining marks, joined emoji, line ends,
# NUL, runs of spaces.
HARD = (
  "\0 caf\xe9 cafe\u0301  , . ! ' don't\r\n\r\n\t   \U0001f600 \U0001f469\u200d\U0001f467 "
  "\u732b\ufeff\x85\u2028 \ufffd  "
)
LETTERS = train_char_tokenizer([HARD, "abcdefghijklmnopqrstuvwxyz<|>"], bos=True)
SMALL = {
  "characters": CharTokenizer(LETTERS.chars, False),
  "characters with BOS": LETTERS,
  "bytes": ByteTokenizer(),
  "bpe": BpeTokenizer("t h\nth e\n\u0120 a", end_of_text=False),
  "gpt2": BpeTokenizer("t h\nth e\n\u0120 a", end_of_text=True),
  "nothing but BOS": CharTokenizer("", True),
  "bpe without merges": BpeTokenizer("", end_of_text=False),
}
EOT = {
  "id": 259,
  "content": "<|endoftext|>",
  "single_word": False,
  "lstrip": False,
  "rstrip": False,
  "special": True,
}


def special_name(tokenizer):
  """What other programs call the one token that is no text."""
  if isinstance(tokenizer, CharTokenizer):
    return "<|bos|>" if tokenizer.bos else None
  return "<|endoftext|>" if isinstance(tokenizer, BpeTokenizer) and tokenizer.end_of_text else None


def gpt2_folder():
  folder = Path(os.environ.get("JGPT_DATA_DIR", "nowhere"), "gpt2")
  if not (folder / "vocab.bpe").exists():
    pytest.skip("needs encoder.json and vocab.bpe in $JGPT_DATA_DIR/gpt2")
  return folder


@pytest.fixture(scope="module")
def released():
  """GPT-2's tokenizer, of OpenAI's files."""
  folder = gpt2_folder()
  return make_gpt2_tokenizer(
    (folder / "encoder.json").read_bytes(), (folder / "vocab.bpe").read_bytes()
  )


@pytest.fixture(scope="module", params=["released", *SMALL])
def tokenizer(request):
  return (
    request.getfixturevalue("released") if request.param == "released" else SMALL[request.param]
  )


def needs_transformers():
  pytest.importorskip("tokenizers", reason="encodes byte-level BPE, and `transformers` needs it")
  return pytest.importorskip(
    "transformers", reason="the reader of these files (jgpt's extra: reference)"
  )


def write(tokenizer, folder, max_seq_len=1000):
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in hugging_face_files(tokenizer, max_seq_len).items():
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8", newline="\n")
  (folder / "config.json").write_text('{"model_type": "gpt2"}')


def load(folder):
  return needs_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
  """The tokenizer as `transformers` reads it from a folder of our files."""
  folder = tmp_path_factory.mktemp("files")
  write(tokenizer, folder)
  return load(folder)


def known_part(text, tokenizer):
  return (
    "".join(c for c in text if c in tokenizer.chars)
    if isinstance(tokenizer, CharTokenizer)
    else text
  )


# --- Through Hugging Face's packages ---


@NO_DEADLINE
@given(
  st.text()
  | st.text(st.sampled_from(HARD))
  | st.lists(st.sampled_from([*HARD, "the", " a", "    ", "\r\n"])).map("".join)
)
@example(HARD)
@example("")
@example(" " * 300 + "\n" * 300 + "the" * 300)
def test_the_same_ids_and_text(tokenizer, theirs, text):
  assume("<|endoftext|>" not in text)  # theirs takes these characters for the token
  text = known_part(text, tokenizer)
  ids = theirs.encode(text, add_special_tokens=False)
  assert ids == tokenizer.encode(text)
  assert (
    theirs.decode(ids)
    == theirs.decode(ids, skip_special_tokens=True)
    == tokenizer.decode(ids)
    == text
  )


@NO_DEADLINE
@given(st.data())
def test_the_same_text_of_any_ids(tokenizer, theirs, data):
  """Also of bytes that are not UTF-8, and of ids that only the model has.

  BOS has no text here, a name there.
  """
  ids = data.draw(
    st.lists(
      st.integers(0, tokenizer.vocab_size + 3) | st.integers(0, min(400, tokenizer.vocab_size))
    )
  )
  assert theirs.decode(
    ids, skip_special_tokens=isinstance(tokenizer, CharTokenizer)
  ) == tokenizer.decode(ids)


@SLOW_EXAMPLES
@given(st.text(), st.booleans())
def test_any_characters(tmp_path_factory, text, bos):
  """Each character has one id, whatever it is; ids are positions in sorted order."""
  trained = train_char_tokenizer([text], bos=bos)
  assume(trained.vocab_size)
  folder = tmp_path_factory.mktemp("characters")
  write(trained, folder)
  theirs = load(folder)
  assert theirs.encode(text, add_special_tokens=False) == [sorted(set(text)).index(c) for c in text]
  assert len(theirs) == len(set(text)) + bos
  assert theirs.bos_token_id == (len(set(text)) if bos else None)


def test_special_tokens_are_those_there_are(tokenizer, theirs):
  """BOS or the end of text begins and ends a text.

  No other id is added, and none stands for padding.
  """
  name = special_name(tokenizer)
  i = tokenizer.vocab_size - 1 if name else None
  assert (theirs.bos_token, theirs.bos_token_id, theirs.eos_token, theirs.eos_token_id) == (
    name,
    i,
    name,
    i,
  )
  assert theirs.pad_token is None
  assert theirs.all_special_ids == ([i] if name else [])
  assert len(theirs) == tokenizer.vocab_size


def test_what_the_model_is_given(tokenizer, theirs):
  """No token types, whose embeddings GPT-2 would add.

  BOS first, as in `encode_prompt`, and nothing else beside the text.
  """
  text = known_part(" the cat\n", tokenizer)
  ids = tokenizer.encode(text)
  bos = [tokenizer.vocab_size - 1] if special_name(tokenizer) == "<|bos|>" else []
  inputs = theirs(text)
  assert set(inputs) == {"input_ids", "attention_mask"}
  assert inputs["input_ids"] == bos + ids
  if text:
    assert bos + ids == tokenizer.encode_prompt(text)
    assert theirs(text, text)["input_ids"] == bos + ids + bos + ids
  assert theirs.model_max_length == 1000
  assert theirs.clean_up_tokenization_spaces is False


@pytest.mark.parametrize("tokenizer", ["released", "gpt2", "characters with BOS"], indirect=True)
def test_a_special_token_spelt_in_a_text(tokenizer, theirs):
  """Ordinary text here; there the token, unless `split_special_tokens` is set."""
  name = special_name(tokenizer)
  text = f"a{name} b"
  ids = tokenizer.encode(text)
  assert tokenizer.vocab_size - 1 not in ids
  assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
  special = [*tokenizer.encode("a"), tokenizer.vocab_size - 1, *tokenizer.encode(" b")]
  assert theirs.encode(text, add_special_tokens=False) == special
  assert theirs.decode(special) == text
  assert theirs.decode(special, skip_special_tokens=True) == "a b"


@pytest.mark.parametrize(
  "tokenizer", ["characters", "characters with BOS", "nothing but BOS"], indirect=True
)
def test_unknown_characters_are_not_dropped(tokenizer, theirs):
  with pytest.raises(Exception, match=r"Missing .* token from the vocabulary"):
    theirs.encode("\u03a9", add_special_tokens=False)
  with pytest.raises(UserError, match="not in the vocabulary"):
    tokenizer.encode("\u03a9")


def test_vocab_json_and_merges_txt_alone_are_enough(released, tmp_path):
  """What programs older than `tokenizer.json` read; the merges are OpenAI's file."""
  files = hugging_face_files(released, 1024)
  assert (
    files["merges.txt"].splitlines()
    == (gpt2_folder() / "vocab.bpe").read_text(encoding="utf-8").splitlines()
  )
  assert files["vocab.json"] == json.loads(
    (gpt2_folder() / "encoder.json").read_text(encoding="utf-8")
  )
  write(released, tmp_path)
  (tmp_path / "tokenizer.json").unlink()
  theirs = load(tmp_path)
  assert theirs.encode(HARD, add_special_tokens=False) == released.encode(HARD)


def test_which_files_there_are():
  assert set(hugging_face_files(LETTERS, 8)) == {"tokenizer.json", "tokenizer_config.json"}
  assert set(hugging_face_files(SMALL["bytes"], 8)) == {"tokenizer.json", "tokenizer_config.json"}
  files = hugging_face_files(SMALL["bpe"], 8)
  assert set(files) == {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
  assert files["merges.txt"] == "#version: 0.2\nt h\nth e\n\u0120 a\n"
  assert hugging_face_files(SMALL["bpe without merges"], 8)["merges.txt"] == "#version: 0.2\n"


def test_importing_imports_no_package_that_may_be_absent():
  code = (
    "import sys, jgpt.text.tokenizer_files; assert not {'tokenizers', 'transformers', 'jax', "
    "'numpy'} & sys.modules.keys()"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


# --- Reading ---


def test_kinds_have_the_words_of_the_settings(released):
  assert kind_of(released) == "gpt2"
  assert {name: kind_of(tokenizer) for name, tokenizer in SMALL.items()} == {
    "characters": "characters",
    "characters with BOS": "characters",
    "bytes": "bytes",
    "bpe": "bpe",
    "gpt2": "gpt2",
    "nothing but BOS": "characters",
    "bpe without merges": "bpe",
  }


def read_file(path):
  return read_hugging_face_tokenizer(json.loads(path.read_text(encoding="utf-8")))


def test_ours_read_back_equal(tokenizer, tmp_path):
  write(tokenizer, tmp_path)
  assert read_file(tmp_path / "tokenizer.json") == tokenizer


def test_ours_as_transformers_saves_it_again(tokenizer, theirs, tmp_path):
  theirs.save_pretrained(tmp_path)
  assert read_file(tmp_path / "tokenizer.json") == tokenizer


def test_what_is_saved_after_cutting_and_padding(tmp_path):
  """Lengths are written into the file, and change no text's ids."""
  write(SMALL["gpt2"], tmp_path)
  theirs = load(tmp_path)
  theirs.pad_token = theirs.eos_token
  theirs("the cat", truncation=True, max_length=2, padding="max_length")
  theirs.save_pretrained(tmp_path / "again")
  saved = json.loads((tmp_path / "again" / "tokenizer.json").read_text(encoding="utf-8"))
  assert saved["truncation"]
  assert saved["padding"]
  assert read_hugging_face_tokenizer(saved) == SMALL["gpt2"]


def test_gpt2_made_by_transformers_of_openais_files(released, tmp_path):
  (tmp_path / "vocab.json").write_bytes((gpt2_folder() / "encoder.json").read_bytes())
  (tmp_path / "merges.txt").write_bytes((gpt2_folder() / "vocab.bpe").read_bytes())
  (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
  load(tmp_path).save_pretrained(tmp_path / "saved")
  assert read_file(tmp_path / "saved" / "tokenizer.json") == released


def test_gpt2_made_by_tokenizers_of_openais_files(released, tmp_path):
  tokenizers = pytest.importorskip("tokenizers", reason="makes the file")
  made = tokenizers.ByteLevelBPETokenizer(
    str(gpt2_folder() / "encoder.json"), str(gpt2_folder() / "vocab.bpe")
  )
  made.save(str(tmp_path / "tokenizer.json"))
  assert read_file(tmp_path / "tokenizer.json") == released


def changed(value, path, new):
  """A copy of JSON with one place changed; `...` removes it."""
  made = place = copy.deepcopy(value)
  for key in path[:-1]:
    place = place[key]
  if new is ...:
    del place[path[-1]]
  else:
    place[path[-1]] = new
  return made


def published(tokenizer):
  """JSON in the form in which Hugging Face published GPT-2's, by an early release of
  `tokenizers`.
  """
  value = tokenizer.to_json()
  model = value["model"] | {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
  for name in ("type", "byte_fallback", "ignore_merges"):
    del model[name]
  model["merges"] = [f"{left} {right}" for left, right in model["merges"]]
  byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
  value |= {
    "model": model,
    "post_processor": byte_level,
    "decoder": byte_level,
    "added_tokens": [EOT | {"normalized": True}],
  }
  value["added_tokens"][0]["id"] = tokenizer.eot_id
  value["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
  return value


def test_gpt2_as_published(released):
  assert read_hugging_face_tokenizer(published(released)) == released


@pytest.mark.parametrize(
  ("path", "new"),
  [
    (["model", "type"], "BPE"),
    (["model", "unk_token"], "<|endoftext|>"),
    (["model", "fuse_unk"], True),
    (["model", "dropout"], 0.0),
    (["model", "continuing_subword_prefix"], None),
    (["model", "ignore_merges"], False),
    (["model", "merges"], [["t", "h"], "th e", ["\u0120", "a"]]),
    (
      ["model", "vocab", "<|endoftext|>"],
      ...,
    ),  # `tokenizers` gives added tokens the ids after the model's
    (["added_tokens"], []),
    (["added_tokens"], None),
    (["normalizer"], ...),
    (["truncation"], {"max_length": 5}),
    (["padding"], {"strategy": "BatchLongest"}),
    (["decoder"], None),
    (["post_processor"], None),
    (["pre_tokenizer", "use_regex"], True),
    (["pre_tokenizer", "trim_offsets"], False),
    (["version"], "2.0"),
    (["more"], {}),
  ],
)
def test_what_changes_no_ids_is_read(path, new):
  assert read_hugging_face_tokenizer(changed(published(SMALL["gpt2"]), path, new)) == SMALL["gpt2"]


@pytest.mark.parametrize(
  ("name", "path", "new", "message"),
  [
    ("gpt2", ["model"], ..., "model is null, and jgpt needs an object with a vocabulary"),
    ("gpt2", ["model"], [1, 2], "model is a list of 2"),
    ("gpt2", ["model", "vocab"], ..., r"model\.vocab is null"),
    ("gpt2", ["model", "vocab"], [["a", 0.5]], r"model\.vocab is a list of 1"),
    ("gpt2", ["model", "vocab", "the"], 255, r"model\.vocab is an object of 260 entries"),
    ("gpt2", ["model", "vocab", "<|endoftext|>"], 0, r"model\.vocab"),
    ("gpt2", ["model", "vocab", "other"], 260, r"model\.vocab"),
    ("gpt2", ["model", "vocab", "!"], ..., r"model\.vocab"),
    (
      "gpt2",
      ["model", "type"],
      "Unigram",
      r"model\.type is 'Unigram', and jgpt needs BPE, or WordLevel",
    ),
    ("gpt2", ["model", "type"], None, r"model\.type is null"),
    ("gpt2", ["model", "dropout"], 0.1, r"model\.dropout is 0\.1, and jgpt needs null"),
    (
      "gpt2",
      ["model", "continuing_subword_prefix"],
      "##",
      r"model\.continuing_subword_prefix is '##'",
    ),
    ("gpt2", ["model", "end_of_word_suffix"], "</w>", r"model\.end_of_word_suffix is '</w>'"),
    ("gpt2", ["model", "ignore_merges"], True, r"model\.ignore_merges is true"),
    ("gpt2", ["model", "merges"], ..., r"model\.merges is null"),
    ("gpt2", ["model", "merges"], "t h", r"model\.merges is 't h'"),
    ("gpt2", ["model", "merges"], [], r"model\.vocab"),
    (
      "gpt2",
      ["model", "merges"],
      [["t", "h"], ["th", "e", "x"]],
      r"model\.merges is a list of 2.* pairs",
    ),
    ("gpt2", ["model", "merges"], [["t", 5]], r"model\.merges is a list of 1"),
    ("gpt2", ["model", "merges"], [5], r"model\.merges is a list of 1"),
    (
      "gpt2",
      ["model", "merges"],
      ["t h", "the e", "\u0120 a"],
      r"model\.merges: .* merge 1 \('the e'\)",
    ),
    ("gpt2", ["model", "merges"], ["t h\nth e", "\u0120 a"], r"model\.merges"),
    ("gpt2", ["model", "merges"], [["t", "h\nth e\n\u0120 a"]], r"model\.merges"),
    ("gpt2", ["model", "merges"], ["th", "th e"], r"model\.merges"),
    ("gpt2", ["normalizer"], {"type": "NFC"}, "normalizer is of type 'NFC', and jgpt needs null"),
    ("gpt2", ["pre_tokenizer"], None, "pre_tokenizer is null, and jgpt needs ByteLevel"),
    ("gpt2", ["pre_tokenizer"], {"type": "Whitespace"}, "pre_tokenizer is of type 'Whitespace'"),
    (
      "gpt2",
      ["pre_tokenizer", "add_prefix_space"],
      True,
      r"pre_tokenizer\.add_prefix_space is true, and jgpt needs false",
    ),
    (
      "gpt2",
      ["pre_tokenizer", "add_prefix_space"],
      ...,
      r"pre_tokenizer\.add_prefix_space is null",
    ),
    ("gpt2", ["pre_tokenizer", "use_regex"], False, r"pre_tokenizer\.use_regex is false"),
    (
      "gpt2",
      ["added_tokens"],
      [{"id": 260, "content": "[PAD]"}],
      "added_tokens .* needs no tokens or .*endoftext.* the id 259",
    ),
    ("gpt2", ["added_tokens"], [{"id": 260, "content": "<|endoftext|>"}], "added_tokens"),
    ("gpt2", ["added_tokens"], [{"content": "<|endoftext|>"}], "added_tokens"),
    ("gpt2", ["added_tokens"], ["<|endoftext|>"], "added_tokens"),
    ("gpt2", ["added_tokens"], {"id": 259}, "added_tokens"),
    ("bpe", ["added_tokens"], [{"id": 259, "content": "[PAD]"}], "added_tokens"),
    (
      "bytes",
      ["added_tokens"],
      [{"id": 256, "content": "[PAD]"}],
      "added_tokens .* needs no tokens",
    ),
    ("bytes", ["model", "vocab", "!"], 34, r"model\.vocab"),
    ("bytes", ["model", "merges"], ["t h"], r"model\.vocab"),
    ("characters", ["model", "vocab", "a"], 0, r"model\.vocab"),
    ("characters", ["model", "vocab", "ab"], 1000, r"model\.vocab"),
    ("characters", ["model", "vocab", "<|bos|>"], 3, r"model\.vocab"),
    ("characters", ["model", "vocab", "\ud800"], 1000, r"model\.vocab"),
    ("characters", ["model", "unk_token"], "a", r"model\.unk_token is 'a'"),
    (
      "characters",
      ["pre_tokenizer"],
      {"type": "Whitespace"},
      "pre_tokenizer is of type 'Whitespace'.* isolates every",
    ),
    ("characters", ["pre_tokenizer", "behavior"], "Removed", "pre_tokenizer is of type 'Split'"),
    ("characters", ["normalizer"], {"type": "Lowercase"}, "normalizer is of type 'Lowercase'"),
    ("characters with BOS", ["added_tokens", 0, "id"], 0, "added_tokens"),
    ("characters with BOS", ["added_tokens", 0, "content"], "<s>", "added_tokens"),
  ],
)
def test_what_would_give_other_ids_is_refused_by_its_field(name, path, new, message):
  value = changed(hugging_face_files(SMALL[name], 8)["tokenizer.json"], path, new)
  with pytest.raises(UserError, match=r"^the tokenizer's " + message) as refusal:
    read_hugging_face_tokenizer(value)
  assert "\n" not in str(refusal.value)
  assert len(str(refusal.value)) < 400


def test_a_lone_surrogate_is_no_character():
  value = hugging_face_files(CharTokenizer("ab", False), 8)["tokenizer.json"]
  value["model"]["vocab"] = {"a": 0, "\ud800": 1}
  with pytest.raises(UserError, match=r"^the tokenizer's model\.vocab"):
    read_hugging_face_tokenizer(value)


@pytest.mark.parametrize("value", [None, [], "model", 5, {}, {"model": {"type": "BPE"}}])
def test_what_is_no_tokenizer_json_is_refused(value):
  with pytest.raises(UserError, match=r"^the tokenizer's model"):
    read_hugging_face_tokenizer(value)


NOT_LOOKED_AT = ("post_processor", "decoder", "truncation", "padding")
ANY_JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text(st.characters(exclude_categories=[])),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
  ),
)


@st.composite
def almost_tokenizers(draw):
  """JSON of a tokenizer with one or two places replaced, removed or swapped, at any depth."""
  tokenizer = draw(st.sampled_from(list(SMALL.values())))
  value = copy.deepcopy(hugging_face_files(tokenizer, 8)["tokenizer.json"])
  for _ in range(draw(st.integers(1, 2))):
    place = value
    while True:
      keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
      if not keys:
        break
      key = draw(st.sampled_from(keys))
      if isinstance(place[key], dict | list) and draw(st.booleans()):
        place = place[key]
        continue
      match draw(st.sampled_from(["replace", "remove", "swap"])):
        case "replace":
          place[key] = draw(ANY_JSON)
        case "remove":
          del place[key]
        case "swap":
          other = draw(st.sampled_from(keys))
          place[key], place[other] = place[other], place[key]
      break
  return value


@NO_DEADLINE
@given(ANY_JSON | almost_tokenizers())
def test_anything_is_a_tokenizer_or_a_user_error(value):
  """What is read is what stands there: written again, the model and what it is given are
  the same.
  """
  with contextlib.suppress(UserError):
    read = read_hugging_face_tokenizer(value)
    again = hugging_face_files(read, 8)["tokenizer.json"]
    merges = value["model"].get("merges", [])
    assert [m.split(" ") if isinstance(m, str) else m for m in merges] == again["model"].get(
      "merges", []
    )
    special = {token["content"]: token["id"] for token in again["added_tokens"]}
    assert special | value["model"]["vocab"] == again["model"]["vocab"]
    assert {
      k: v
      for k, v in value["pre_tokenizer"].items()
      if k in ("type", "pattern", "behavior", "add_prefix_space")
    } == {
      k: v
      for k, v in again["pre_tokenizer"].items()
      if k in ("type", "pattern", "behavior", "add_prefix_space")
    }


@NO_DEADLINE
@given(almost_tokenizers())
def test_what_is_read_has_the_ids_that_it_has_there(value):
  """Whatever jgpt reads and `tokenizers` loads: one text, the same ids.

  Without the parts that are not looked at.
  """
  tokenizers = pytest.importorskip("tokenizers", reason="the reader of these files")
  try:
    read = read_hugging_face_tokenizer(value)
  except UserError:
    return
  try:
    theirs = tokenizers.Tokenizer.from_str(json.dumps(value | dict.fromkeys(NOT_LOOKED_AT)))
  except Exception:  # they raise nothing narrower
    return
  text = known_part("the cat  and\n the hat", read)
  assert theirs.encode(text, add_special_tokens=False).ids == read.encode(text)


# --- llm.c ---


def read_llmc(content):
  """Reads llm.c's tokenizer file under the rules of its reader: (id that begins a text, tokens)."""
  header = struct.unpack("<256I", content[:1024])
  assert header[:2] == (20240328, 2)
  assert set(header[4:]) == {0}
  tokens, at = [], 1024
  for _ in range(header[2]):
    length = content[at]
    assert length > 0
    tokens.append(content[at + 1 : at + 1 + length])
    at += 1 + length
  assert at == len(content)
  return header[3], tokens


def bytes_of_gpt2():
  """The bytes of each of GPT-2's tokens, from `encoder.json`: a byte without a character of its own
  has one from 256 on.
  """
  own = [*range(33, 127), *range(161, 173), *range(174, 256)]
  byte_of = {chr(b): b for b in own} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in own)
  }
  vocab = json.loads((gpt2_folder() / "encoder.json").read_text(encoding="utf-8"))
  return [bytes(byte_of[c] for c in token) for token in sorted(vocab, key=vocab.get)]


def test_gpt2_for_llmc(released):
  first, tokens = read_llmc(llmc_tokenizer_bytes(released))
  assert first == 50256
  assert tokens == bytes_of_gpt2()
  assert tokens[50256] == b"<|endoftext|>"


@pytest.mark.parametrize("name", SMALL)
def test_any_kind_for_llmc(name):
  """Texts begin where they begin here; what decodes to a text here has its bytes there."""
  tokenizer = SMALL[name]
  first, tokens = read_llmc(llmc_tokenizer_bytes(tokenizer))
  assert len(tokens) == tokenizer.vocab_size
  assert [first] == tokenizer.encode_prompt("")
  if special := special_name(tokenizer):
    assert tokens.pop() == special.encode()
  assert [t.decode(errors="replace") for t in tokens] == [
    tokenizer.decode([i]) for i in range(len(tokens))
  ]


def test_bytes_for_llmc():
  assert read_llmc(llmc_tokenizer_bytes(SMALL["bytes"])) == (10, [bytes([b]) for b in range(256)])


def test_nothing_to_begin_with_for_llmc():
  """Its samples then begin with the first character."""
  assert read_llmc(llmc_tokenizer_bytes(CharTokenizer("ab\u00e9", False))) == (
    0,
    [b"a", b"b", b"\xc3\xa9"],
  )


def test_ids_that_only_the_model_has_for_llmc():
  """A NUL each: llm.c prints nothing for it, and refuses a token without bytes."""
  abc = CharTokenizer("abc", True)
  assert read_llmc(llmc_tokenizer_bytes(abc, 6)) == (
    3,
    [b"a", b"b", b"c", b"<|bos|>", b"\0", b"\0"],
  )
  assert llmc_tokenizer_bytes(abc, 4) == llmc_tokenizer_bytes(abc)
  with pytest.raises(
    UserError, match=r"model\.vocab_size=3 must be at least the tokenizer's 4\. Try --set model"
  ):
    llmc_tokenizer_bytes(abc, 3)


def test_tokens_of_more_than_255_bytes_for_llmc():
  """The length of a token is one byte; the size that is proposed has all tokens but those."""
  doubling = [f"{'a' * 2**n} {'a' * 2**n}" for n in range(8)]
  longest = BpeTokenizer(
    "\n".join([*doubling[:7], f"{'a' * 128} {'a' * 64}", f"{'a' * 192} {'a' * 32}"]),
    end_of_text=False,
  )
  assert max(map(len, read_llmc(llmc_tokenizer_bytes(longest))[1])) == 224
  exact = BpeTokenizer(
    longest.merges
    + f"\n{'a' * 16} {'a' * 8}\n{'a' * 24} {'a' * 4}\n{'a' * 28} aa\n{'a' * 30} a\n{'a' * 224} "
    f"{'a' * 31}",
    end_of_text=False,
  )
  assert max(map(len, read_llmc(llmc_tokenizer_bytes(exact))[1])) == 255
  too_long = BpeTokenizer("\n".join([*doubling, "t h"]), end_of_text=False)
  with pytest.raises(
    UserError,
    match=r"token 263 has 256 bytes.* at most 255\. Try .* --set data\.bpe_vocab_size=263$",
  ):
    llmc_tokenizer_bytes(too_long)
  assert (
    read_llmc(llmc_tokenizer_bytes(BpeTokenizer("\n".join(doubling[:7]), end_of_text=False)))[1][-1]
    == b"a" * 128
  )
