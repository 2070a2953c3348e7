"""The tokenizer of characters: round trips, unknown characters, and reading it back."""

import contextlib
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jgpt import tokenizer
from jgpt.config import UserError
from jgpt.tokenizer import CharTokenizer, show_chars, train_char_tokenizer

LETTERS = train_char_tokenizer(["abcdefghijklmnopqrstuvwxyz"])
NO_DEADLINE = hypothesis_settings(deadline=None)


@NO_DEADLINE
@given(st.lists(st.text(), max_size=5), st.data())
def test_any_text_of_known_characters_survives(documents, data):
  """Encoding a document and decoding it is the identity, whatever the script; BOS frames it and has no text."""
  trained = train_char_tokenizer(documents)
  known = st.sampled_from(trained.chars) if trained.chars else st.nothing()
  for text in [*documents, data.draw(st.text(known))]:
    ids = trained.encode(text)
    assert len(ids) == len(text)
    assert all(0 <= i < trained.bos_id for i in ids)
    assert trained.decode(ids) == text
    assert trained.document(text) == [trained.bos_id, *ids, trained.bos_id]
    assert trained.decode(trained.document(text)) == text


def test_ids_are_those_of_microgpt():
  """Characters in sorted order, then BOS as the last id."""
  assert LETTERS.encode("az") == [0, 25]
  assert (LETTERS.bos_id, LETTERS.vocab_size) == (26, 27)
  assert train_char_tokenizer(["ba", "", "cab"]) == CharTokenizer("abc")


@NO_DEADLINE
@given(st.text(min_size=1), st.sets(st.characters(), max_size=20))
def test_every_unknown_character_is_named_once(text, known):
  unknown = sorted(set(text) - known)
  with pytest.raises(UserError) if unknown else contextlib.nullcontext() as refusal:
    CharTokenizer("".join(sorted(known))).encode(text)
  if unknown:
    assert f" {' '.join(map(repr, unknown))}. " in str(refusal.value)


def test_refusal_shows_what_the_vocabulary_is():
  with pytest.raises(UserError, match=r"'!' 'É'.*a-z"):
    LETTERS.encode("Émile!".replace("m", "É"))


def test_ids_that_the_tokenizer_does_not_have_decode_to_nothing():
  """A model may have more ids than its tokenizer (padding, a larger vocab_size); they and BOS have no text."""
  assert LETTERS.decode([26, 0, 27, 1, 10**6, -1, 26]) == "ab"


@NO_DEADLINE
@given(st.sets(st.characters()), st.sets(st.characters()))
def test_json_and_digest_tell_tokenizers_apart(a, b):
  """What was written reads back equal, with the same digest; the digests of two tokenizers are equal if they are."""
  first, second = (CharTokenizer("".join(sorted(chars))) for chars in (a, b))
  again = tokenizer.from_json(json.loads(json.dumps(first.to_json())))
  assert again == first
  assert again.digest == first.digest
  assert (first.digest == second.digest) == (first == second)


def test_digest_is_that_of_the_json_and_never_changes():
  """Run folders hold it, so it must depend on neither the process nor the version."""
  assert CharTokenizer("aé").digest == hashlib.sha256(b'{"chars": "a\\u00e9", "type": "characters"}').hexdigest()


@pytest.mark.parametrize(
  "value",
  [
    None,
    [],
    "abc",
    {},
    {"type": "characters"},
    {"chars": "abc"},
    {"type": "bytes", "chars": "abc"},
    {"type": "characters", "chars": ["a", "b"]},
    {"type": "characters", "chars": None},
    {"type": "characters", "chars": "ba"},
    {"type": "characters", "chars": "aab"},
  ],
)
def test_json_that_is_no_tokenizer_is_refused(value):
  with pytest.raises(UserError, match="character"):
    tokenizer.from_json(value)


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
  ],
)
def test_characters_are_shown_so_that_each_can_be_seen(chars, shown):
  assert show_chars(chars) == shown
