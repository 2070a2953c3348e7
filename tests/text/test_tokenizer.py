"""Tokenizers of characters and bytes: round trips, unknown characters, prompts, and reading any
kind back.
"""

import contextlib
import hashlib
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jgpt.errors import UserError
from jgpt.text.bpe import BpeTokenizer
from jgpt.text.tokenizer import (
  ByteTokenizer,
  CharTokenizer,
  show_chars,
  tokenizer_from_json,
  train_char_tokenizer,
)

LETTERS = train_char_tokenizer(["abcdefghijklmnopqrstuvwxyz"], bos=True)
WITHOUT_BOS = CharTokenizer("\nab", False)
BYTES = ByteTokenizer()
BPE = BpeTokenizer("t h\nth e", end_of_text=True)
ALL_KINDS = [LETTERS, WITHOUT_BOS, BYTES, BPE]
NO_DEADLINE = hypothesis_settings(deadline=None)


@NO_DEADLINE
@given(st.lists(st.text(), max_size=5), st.booleans(), st.data())
def test_any_text_of_known_characters_survives(documents, bos, data):
  """Encoding a document and decoding it is the identity, whatever the script.

  BOS frames it and has no text.
  """
  trained = train_char_tokenizer(documents, bos=bos)
  known = st.sampled_from(trained.chars) if trained.chars else st.nothing()
  for text in [*documents, data.draw(st.text(known))]:
    ids = trained.encode(text)
    assert len(ids) == len(text)
    assert all(0 <= i < len(trained.chars) for i in ids)
    assert trained.decode(ids) == text
    if bos:
      assert trained.encode_document(text) == [trained.bos_id, *ids, trained.bos_id]
      assert trained.decode(trained.encode_document(text)) == text


def test_ids_are_those_of_microgpt():
  """Characters in sorted order, then BOS as the last id, which ends a text."""
  assert LETTERS.encode("az") == [0, 25]
  assert (LETTERS.bos_id, LETTERS.stop_id, LETTERS.vocab_size) == (26, 26, 27)
  assert train_char_tokenizer(["ba", "", "cab"], bos=True) == CharTokenizer("abc", True)


def test_without_bos_nothing_ends_a_text():
  assert (WITHOUT_BOS.bos_id, WITHOUT_BOS.stop_id, WITHOUT_BOS.vocab_size) == (None, None, 3)
  assert train_char_tokenizer(["ba\n"], bos=False) == WITHOUT_BOS
  assert WITHOUT_BOS.decode([0, 1, 3]) == "\na"


@NO_DEADLINE
@given(st.text())
def test_bytes_are_those_of_utf8(text):
  ids = BYTES.encode(text)
  assert bytes(ids) == text.encode()
  assert BYTES.decode(ids) == text


@NO_DEADLINE
@given(st.lists(st.integers(-5, 300)))
def test_any_ids_decode_as_bytes_do(ids):
  """A model may emit anything: what is not UTF-8 becomes U+FFFD, and ids beyond the bytes have no
  text.
  """
  assert BYTES.decode(ids) == bytes(i for i in ids if 0 <= i <= 255).decode("utf-8", "replace")


def test_half_a_surrogate_pair_is_refused_and_named():
  """A terminal that is not UTF-8 can put one into a prompt."""
  for kind in (BYTES, BPE):
    with pytest.raises(UserError, match=r"not Unicode text: character 2 is '\\udc80'"):
      kind.encode("ab\udc80")


def test_a_prompt_is_never_empty():
  """Generation has to begin from some id: BOS, or else what can stand before a text."""
  assert LETTERS.encode_prompt("") == [26]
  assert LETTERS.encode_prompt("ab") == [26, 0, 1]
  assert WITHOUT_BOS.encode_prompt("") == [0]
  assert WITHOUT_BOS.encode_prompt("ab") == [1, 2]
  assert BYTES.encode_prompt("") == [10]
  assert BYTES.encode_prompt("ab") == [97, 98]
  with pytest.raises(UserError, match=r"neither. Try --prompt \w$"):
    CharTokenizer("ab", False).encode_prompt("")
  assert CharTokenizer("ab", False).encode_prompt("a") == [0]
  with pytest.raises(UserError, match="not in the vocabulary: '!'"):
    LETTERS.encode_prompt("a!")


def test_kinds_describe_themselves():
  assert [kind.describe() for kind in ALL_KINDS] == [
    "27 ids: a-z and BOS (26)",
    r"3 ids: '\n' a b",
    "256 ids: bytes",
    "259 ids: byte-level BPE, end of text 258",
  ]
  assert BpeTokenizer("t h", end_of_text=False).describe() == "257 ids: byte-level BPE"


def test_importing_tokenizers_imports_no_package_that_may_be_absent():
  code = (
    "import sys, jgpt.text.tokenizer; assert not {'tokenizers', 'tiktoken', 'jax', 'numpy'} & "
    "sys.modules.keys()"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


@NO_DEADLINE
@given(st.text(min_size=1), st.sets(st.characters(codec="utf-8"), max_size=20))
def test_every_unknown_character_is_named_once(text, known):
  unknown = sorted(set(text) - known)
  with pytest.raises(UserError) if unknown else contextlib.nullcontext() as refusal:
    CharTokenizer("".join(sorted(known)), True).encode(text)
  if unknown:
    assert f" {' '.join(map(repr, unknown))}. " in str(refusal.value)


def test_refusal_shows_what_the_vocabulary_is():
  with pytest.raises(UserError, match=r"'!' 'É'.*a-z"):
    LETTERS.encode("Émile!".replace("m", "É"))


def test_ids_that_the_tokenizer_does_not_have_decode_to_nothing():
  """A model may have more ids than its tokenizer (padding, a larger vocab_size).

  They and BOS have no text.
  """
  assert LETTERS.decode([26, 0, 27, 1, 10**6, -1, 26]) == "ab"


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: type(kind).__name__)
def test_json_reads_back_equal(kind):
  """Equal values are equal in every respect: a run's tokenizer is found again by its digest."""
  again = tokenizer_from_json(json.loads(json.dumps(kind.to_json())))
  assert again == kind
  assert hash(again) == hash(kind)
  assert again.digest == kind.digest
  assert len({each.digest for each in ALL_KINDS}) == len(ALL_KINDS)


@NO_DEADLINE
@given(
  st.sets(st.characters(codec="utf-8")),
  st.sets(st.characters(codec="utf-8")),
  st.booleans(),
  st.booleans(),
)
def test_json_and_digest_tell_tokenizers_apart(a, b, bos_a, bos_b):
  """What was written reads back equal, with the same digest.

  The digests of two tokenizers are equal if they are.
  """
  first, second = (
    CharTokenizer("".join(sorted(chars)), bos) for chars, bos in ((a, bos_a), (b, bos_b))
  )
  again = tokenizer_from_json(json.loads(json.dumps(first.to_json())))
  assert again == first
  assert again.digest == first.digest
  assert (first.digest == second.digest) == (first == second)


@pytest.mark.parametrize("chars", ["\ud83d", "\ud83d\ude00"])
def test_halves_of_a_pair_are_no_characters(chars):
  """JSON would read the two halves back as one character, and the run's tokenizer would be
  another.
  """
  with pytest.raises(UserError, match="half of a surrogate pair"):
    CharTokenizer(chars, bos=False)


def test_digest_is_that_of_the_json_and_never_changes():
  """Run folders hold it, so it must depend on neither the process nor the version."""
  written = b'{"bos": true, "chars": "a\\u00e9", "type": "characters"}'
  assert CharTokenizer("a\u00e9", True).digest == hashlib.sha256(written).hexdigest()
  assert BYTES.digest == hashlib.sha256(b'{"type": "bytes"}').hexdigest()


@pytest.mark.parametrize(
  "value",
  [
    None,
    [],
    "abc",
    {},
    {"type": "characters"},
    {"chars": "abc", "bos": True},
    {"type": "characters", "chars": "abc"},
    {"type": "characters", "chars": "abc", "bos": 1},
    {"type": "characters", "chars": "abc", "bos": True, "more": 1},
    {"type": "characters", "chars": ["a", "b"], "bos": True},
    {"type": "characters", "chars": None, "bos": True},
    {"type": "characters", "chars": "ba", "bos": True},
    {"type": "characters", "chars": "aab", "bos": True},
    {"type": "bytes", "chars": "abc"},
    {"type": ["bytes"]},
  ],
)
def test_json_that_is_no_tokenizer_is_refused(value):
  with pytest.raises(UserError, match="character"):
    tokenizer_from_json(value)


ANY_JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
  ),
)


def some_of(value):
  """Strategy for JSON like `value`, with parts of it left out or replaced, at any depth."""
  if isinstance(value, dict):
    return (
      st.just(value)
      | st.fixed_dictionaries({}, optional={k: some_of(v) for k, v in value.items()})
      | ANY_JSON
    )
  if isinstance(value, list):
    return (
      st.just(value)
      | st.lists(st.sampled_from(value) | ANY_JSON if value else ANY_JSON, max_size=3)
      | ANY_JSON
    )
  return st.just(value) | st.just(value) | ANY_JSON


def with_one_part_replaced(value):
  """Strategy for JSON that differs from `value` below one key."""
  return st.sampled_from(sorted(value)).flatmap(
    lambda key: some_of(value[key]).map(lambda part: {**value, key: part})
  )


@NO_DEADLINE
@given(
  ANY_JSON | st.sampled_from(ALL_KINDS).flatmap(lambda kind: with_one_part_replaced(kind.to_json()))
)
def test_any_json_is_a_tokenizer_or_a_user_error(value):
  """What is accepted is exactly what would be written again."""
  with contextlib.suppress(UserError):
    assert tokenizer_from_json(value).to_json() == value


@pytest.mark.parametrize(
  ("chars", "shown"),
  [
    ("", ""),
    ("abcdefghijklmnopqrstuvwxyz", "a-z"),
    (" !,0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", "' ' ! , 0-9 A-Z"),
    ("abde", "a b d e"),  # a run of two is no shorter with a dash
    ("abcxyz", "a-c x-z"),
    ("89:;", "8 9 : ;"),
    ("\n\x00\u200b", r"'\n' '\x00' '\u200b'"),
    (
      "!.02468;?acegikmoqsuwy",
      "! . 0 2 4 6 8 ; ? a c e g i k m o q ... y",
    ),  # of more than 20 entries, some
  ],
)
def test_characters_are_shown_so_that_each_can_be_seen(chars, shown):
  assert show_chars(chars) == shown
