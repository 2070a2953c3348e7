"""Loads a text or token files as the training tokens, the held-out tokens and their tokenizer.

All of this is done once, on the host. Finding the text is in `sources.py`, the format of token
files in `token_files.py`, and making batches in `batches.py`.
"""

import contextlib
import dataclasses
import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jgpt.batches import Corpus, Documents, Stream, count_epoch_steps
from jgpt.config import DataConfig
from jgpt.data import paths, sources
from jgpt.data.sources import Text
from jgpt.data.token_files import check_files, open_files, read_header
from jgpt.errors import UserError
from jgpt.text.bpe import BpeTokenizer, import_tokenizers, make_gpt2_tokenizer, train_bpe_tokenizer
from jgpt.text.documents import split_paragraphs
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, train_char_tokenizer

DATA_PARTS = {"heldout": "held out", "test": "a test file"}
# Learning merges takes time quadratic in a word's length: 2 s for a word of this length.
MAX_WORD_CHARS = 1 << 17
_LONG_WORD = re.compile(
  rf"[^\W\d_]{{{MAX_WORD_CHARS}}}|\d{{{MAX_WORD_CHARS}}}"
  rf"|[^\s\w]{{{MAX_WORD_CHARS}}}|\s{{{MAX_WORD_CHARS}}}"
)
# Positions on a device are int32, and so are those that lie one batch further.
MAX_BATCH_TOKENS = 1 << 30
# 256 MB on a device. A larger stream stays in its files and is read a block of steps at a time.
RESIDENT_TOKENS = 1 << 26


@dataclasses.dataclass(frozen=True)
class Data:
  """A loaded text, or loaded token files.

  Attributes:
    text: the text and its origin. For token files `kind` is "token files" and `text` is empty.
    label: the name under which the text is known by its digest, see `sources.find_label`; None for
      any other text, and for token files.
    tokenizer: maps between the text and its ids.
    train: tokens of the training part (NumPy arrays).
    heldout: tokens of the held-out part (NumPy arrays).
    documents: the training documents in training order; [] for a stream.
    summary: printable lines with the sizes of the text and of its parts.
  """

  text: Text
  label: str | None
  tokenizer: Tokenizer
  train: Corpus
  heldout: Corpus
  documents: list[str]
  summary: list[str]


def find_data(
  config: DataConfig, seed: int, *, sha256: str | None = None, tokenizer: Tokenizer | None = None
) -> Data:
  """Finds the text or the token files that `config` names, and loads them.

  Args:
    config: `path` names a file, a folder or a glob; where it is None, `source` names a known text.
    seed: of the shuffle of the documents.
    sha256: digest that the data must have, as recorded by a run; None takes the first text found.
    tokenizer: that of a run which is resumed, or of its initial weights; None makes or finds the
      one that `config` asks for.

  Raises:
    UserError: as `sources.find_text`, `load_data` and `load_token_files` do.
    RecordedTextError: if what is found has another digest.
  """
  if files := paths.find_token_files(config.path):
    return load_token_files(files, config, tokenizer, sha256=sha256)
  return load_data(sources.find_text(config, sha256=sha256), config, seed, tokenizer)


def is_text_of(config: DataConfig, sha256: str, tokenizer: Tokenizer) -> bool:
  """Returns whether `config` names the text that a run recorded; does not tokenize it.

  Args:
    config: as for `find_data`.
    sha256: the recorded digest.
    tokenizer: the recorded one.
  """
  try:
    if files := paths.find_token_files(config.path):
      load_token_files(files, config, tokenizer, sha256=sha256)
    else:
      sources.find_text(config, sha256=sha256)
  except UserError:
    return False
  return True


def check_path(config: DataConfig) -> None:
  """Checks that `find_data` would find its files, without reading a text or ids.

  Takes milliseconds, so that a wrong path is reported before anything is compiled.

  Raises:
    UserError: if `data.path` names nothing that can be read, or `data.source` is not known.
  """
  if config.path is None:
    sources.get_source(config.source)
  elif files := paths.find_token_files(config.path):
    for file in files:
      if paths.part_of(file, config.path) != "test":
        read_header(file)
  else:
    sources.check_text_path(config.path)


def load_data(
  text: Text, config: DataConfig, seed: int, tokenizer: Tokenizer | None = None
) -> Data:
  """Splits a text into a training part and a held-out part, and tokenizes both.

  Args:
    text: from `sources.find_text`.
    config: `batching` decides whether the text is read as documents or as one stream.
    seed: of the shuffle of the documents.
    tokenizer: that of a run which is resumed, or of its initial weights; None makes the one that
      `config` asks for.

  Raises:
    UserError: if there is too little text for a window, or too much for 32-bit positions.
  """
  load = _load_documents if config.batching == "documents" else _load_stream
  return load(text, sources.find_label(text), config, seed, tokenizer)


# --- Documents ---


def _load_documents(
  text: Text, label: str | None, config: DataConfig, seed: int, tokenizer: Tokenizer | None
) -> Data:
  """Loads documents: shuffles them by `random.Random(seed)`, then removes the held-out ones."""
  documents = text.documents()
  if not documents:
    raise UserError(f"{text.location} holds no text: it needs one document a line.")
  if len(documents) * config.batch_size >= 2**31:
    raise UserError(
      f"{len(documents):,} documents times data.batch_size={config.batch_size} must stay below "
      "2**31."
    )
  random.Random(seed).shuffle(documents)
  is_heldout = {d: in_heldout(d, config.heldout_fraction) for d in set(documents)}
  train = [d for d in documents if not is_heldout[d]]
  heldout = [d for d in documents if is_heldout[d]]
  if not train:
    raise UserError(
      f"all {len(documents)} documents of {text.location} are held out by "
      f"data.heldout_fraction={config.heldout_fraction}, and none is left to train on. "
      "Try --set data.heldout_fraction=0"
    )
  made = tokenizer or train_char_tokenizer(documents, bos=True)
  with _explain_unknown(tokenizer, text.location):
    corpora = [make_documents(part, made, config.seq_len) for part in (train, heldout)]
  longest, num_cut = max(map(len, documents)), sum(len(d) + 1 > config.seq_len for d in documents)
  num_chars = sum(map(len, documents))
  return Data(
    text=text,
    label=label,
    tokenizer=made,
    train=corpora[0],
    heldout=corpora[1],
    documents=train,
    summary=[
      f"{len(documents):,} documents, {num_chars:,} characters, longest {longest}, {num_cut:,} cut "
      f"at the context of {config.seq_len}",
      f"{len(train):,} for training, {len(heldout):,} held out",
    ],
  )


@contextlib.contextmanager
def _explain_unknown(given: Tokenizer | None, location: str) -> Iterator[None]:
  """Adds to an error about unknown characters where the vocabulary comes from.

  Does so only where a character tokenizer was given; one that is made from the text knows all of
  its characters.
  """
  try:
    yield
  except UserError as error:
    if not isinstance(given, CharTokenizer):
      raise
    raise UserError(
      f"{location}: {error}. It is that of the run or of its initial weights, and a text cannot "
      "extend it. Try a text of these characters, or start without --continue-from or --init-from"
    ) from None


def in_heldout(document: str, fraction: float) -> bool:
  """Returns whether a document is held out.

  A document is held out if its SHA-256, read as a number in [0, 1), is below `fraction`. All copies
  of a document are therefore in the same part.

  Args:
    document: the text of the document.
    fraction: 0 <= fraction < 1, the expected share of held-out documents.
  """
  return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") < fraction * 2**64


def make_documents(documents: list[str], tokenizer: CharTokenizer, seq_len: int) -> Documents:
  """Tokenizes documents into rows of `seq_len` + 1 ids: BOS, the text, and BOS up to the end.

  Args:
    documents: the texts; what does not fit into a row is cut off.
    tokenizer: has a BOS.
    seq_len: predictions in a row.

  Returns:
    NumPy arrays.
  """
  width = seq_len + 1
  texts = [document[:seq_len] for document in documents]
  counts = np.fromiter(map(len, texts), np.int32, len(texts))
  tokens = np.full((len(documents), width), tokenizer.bos_id, np.int32)
  # Position 0 is BOS, and so is each position after the text: `tokens` is full of it already.
  is_text = (np.arange(width) >= 1) & (np.arange(width) <= counts[:, None])
  tokens[is_text] = tokenizer.encode("".join(texts))
  num_chars = np.fromiter(map(len, documents), np.int32, len(documents))
  return Documents(tokens, np.minimum(num_chars + 1, seq_len))


# --- Streams ---


def _load_stream(
  text: Text, label: str | None, config: DataConfig, seed: int, tokenizer: Tokenizer | None
) -> Data:
  """Loads a stream. Holds out the last `heldout_fraction` of it, or its first `heldout_tokens`."""
  num_train = int((1 - config.heldout_fraction) * len(text.text))
  train_text, heldout_text = text.text[:num_train], text.text[num_train:]
  made = tokenizer or _make_stream_tokenizer(text, train_text, config)
  with _explain_unknown(tokenizer, text.location):
    train, heldout = (_encode(part, made, config) for part in (train_text, heldout_text))
  if config.heldout_tokens is not None:
    if tokenizer is None and config.tokenizer == "bpe":
      made, train = _learn_beyond(text, made, train, config)
    heldout, train = train[: config.heldout_tokens], train[config.heldout_tokens :]
  _check_lengths(len(train), len(heldout), text.location, config)
  streams = Stream(train), Stream(heldout)
  summary = [f"{len(text.text):,} characters", _describe_parts(*streams, config)]
  return Data(text, label, made, *streams, documents=[], summary=summary)


def _learn_beyond(
  text: Text, tokenizer: Tokenizer, ids: np.ndarray, config: DataConfig
) -> tuple[Tokenizer, np.ndarray]:
  """Trains a BPE on what follows a text's first `heldout_tokens` tokens.

  How many characters these tokens are depends on the merges. So merges are learnt beyond a cut, and
  again beyond a later one while the tokens reach over it.

  Args:
    text: the whole text.
    tokenizer: learnt from all of it, to find the first cut.
    ids: of the text, by that tokenizer.
    config: `heldout_tokens` and `bpe_vocab_size` are read.

  Returns:
    The tokenizer, and the ids of the whole text.
  """
  cut, num_heldout = 0, config.heldout_tokens
  # Where nothing is left to learn from, `_check_lengths` says so.
  while num_heldout < len(ids) and cut < (end := _count_chars(ids[:num_heldout], tokenizer)):
    cut = end + end // 100  # a little further, so that the next merges hardly reach over it
    tokenizer = _make_stream_tokenizer(text, text.text[cut:], config)
    ids = _encode(text.text, tokenizer, config)
  return tokenizer, ids


def _count_chars(ids: np.ndarray, tokenizer: Tokenizer) -> int:
  """Counts the characters that the first ids of a text reach into."""
  content = b"".join(tokenizer.token_bytes[i] for i in ids.tolist())
  whole = content.decode(errors="ignore")
  return len(whole) + (len(whole.encode()) < len(content))


def _make_stream_tokenizer(text: Text, train_text: str, config: DataConfig) -> Tokenizer:
  """Makes the tokenizer like `make_tokenizer`, with errors that name the text."""
  if config.tokenizer != "bpe":
    return make_tokenizer(config, text.text, train_text)
  import_tokenizers()  # outside of `try`: a missing package is not an error of this text
  if not train_text:
    raise _make_length_error("training", 0, config.seq_len + 1, text.location, config, "")
  if word := _LONG_WORD.search(train_text):
    raise UserError(
      f"{text.location} has a word of more than {MAX_WORD_CHARS:,} characters, "
      f"{word.group()[:20]!r}..., in which pairs would be merged for hours. "
      "Try --set data.tokenizer=characters or --set data.tokenizer=bytes"
    )
  try:
    return make_tokenizer(config, text.text, train_text)
  except UserError as error:
    raise UserError(f"{text.location}: {error}") from None


def make_tokenizer(config: DataConfig, text: str, train_text: str) -> Tokenizer:
  """Makes the tokenizer of a stream.

  Args:
    config: `tokenizer` says which one; `bpe_vocab_size` is the size of "bpe".
    text: the whole text, whose characters are the vocabulary of "characters".
    train_text: the training part, from which "bpe" learns its merges.
  """
  if config.tokenizer == "characters":
    return train_char_tokenizer([text], bos=False)
  if config.tokenizer == "bytes":
    return ByteTokenizer()
  if config.tokenizer == "bpe":
    return train_bpe_tokenizer(train_text, config.bpe_vocab_size)
  return make_gpt2_tokenizer(*sources.find_gpt2_files())


def _encode(text: str, tokenizer: Tokenizer, config: DataConfig) -> np.ndarray:
  if not config.mark_paragraphs:
    return np.asarray(tokenizer.encode(text), np.int32)
  return np.asarray(encode_paragraphs(text, tokenizer), np.int32)


def encode_paragraphs(text: str, tokenizer: BpeTokenizer) -> list[int]:
  """Encodes each paragraph by itself, with the end-of-text token before it, as llm.c does.

  A paragraph keeps the blank line after it.
  """
  if not text:
    return []
  return [i for p in split_paragraphs(text) for i in (tokenizer.eot_id, *tokenizer.encode(p))]


def _check_lengths(
  num_train: int, num_heldout: int, location: str, config: DataConfig, *, is_own: bool = False
) -> None:
  """Checks that a stream's parts are long enough for a batch and short enough for 32-bit positions.

  Raises `UserError` with the settings that would fit otherwise.

  Args:
    num_train: tokens of the training part.
    num_heldout: tokens of the held-out part, 0 where there is none.
    location: names the text in errors.
    config: `seq_len` and `batch_size` decide the lengths that are needed.
    is_own: whether the held-out part has files of its own, instead of being cut from the stream.
  """
  if config.batch_size * config.seq_len > MAX_BATCH_TOKENS:
    raise UserError(
      f"data.batch_size={config.batch_size} times data.seq_len={config.seq_len} must be at most "
      f"{MAX_BATCH_TOKENS:,}. "
      f"Try --set data.batch_size={max(1, MAX_BATCH_TOKENS // config.seq_len)}"
    )
  is_sequential, limit = config.batching == "sequential", config.heldout_tokens
  need = config.seq_len * config.batch_size + 1 if is_sequential else config.seq_len + 1
  if num_train < need:
    fix, why = " --set data.batch_size=1" if is_sequential and num_train > 1 else "", ""
    if limit is not None and not is_own:
      total, enough = num_train + num_heldout, config.seq_len + 1
      why = f": data.heldout_tokens={limit} takes {num_heldout:,} of {total:,} tokens"
      if total >= 2 * max(enough, need):
        fix += f", or --set data.heldout_tokens={max(enough, total // 10)}"
    raise _make_length_error("training", num_train, need, location, config, fix, why)
  if num_heldout and num_heldout < config.seq_len + 1:
    if limit is not None and limit <= config.seq_len:
      fix = f" or --set data.heldout_tokens={config.seq_len + 1}"
    elif is_own:
      fix = ", or leave the held-out files out: --set data.path= with a glob for the others"
    else:
      fix = " or --set data.heldout_fraction=0"
    raise _make_length_error("held-out", num_heldout, config.seq_len + 1, location, config, fix)
  if num_heldout >= 2**31 - config.seq_len * config.batch_size:
    raise UserError(
      f"{num_heldout:,} tokens held out from {location} are more than 32-bit positions can count, "
      "and an evaluation reads them all. Try --set data.heldout_fraction=0 "
      "--set data.heldout_tokens=1000000"
    )


def _make_length_error(
  part: str, count: int, need: int, location: str, config: DataConfig, fix: str, why: str = ""
) -> UserError:
  seq_len = f", or --set data.seq_len={min(config.seq_len, count // 2)}" if count > 1 else ""
  return UserError(
    f"the {part} part of {location} has {count:,} tokens, and a batch needs {need:,}{why}. Try a "
    f"longer text{seq_len}{fix}"
  )


def _describe_parts(train: Stream, heldout: Stream, config: DataConfig) -> str:
  """Returns the summary's line with the tokens of both parts and the steps of an epoch."""
  epoch = count_epoch_steps(train, config)
  counts = f"{len(train.tokens):,} tokens for training, {len(heldout.tokens):,} held out"
  return counts + (f"; {epoch:,} steps an epoch" if epoch else "")


# --- Token files ---


def load_token_files(
  files: Sequence[Path],
  config: DataConfig,
  tokenizer: Tokenizer | None = None,
  *,
  sha256: str | None = None,
) -> Data:
  """Loads token files as one stream, and checks every id against the vocabulary.

  The files that are validation files by their names (`paths.part_of`) are the held-out part: all of
  their tokens, or the first `heldout_tokens`. Without such files the first `heldout_tokens` tokens
  of the stream are held out, or the last `heldout_fraction` of it. Test files are skipped: many
  datasets have them in the same folder, where no glob matches the other files alone.

  Args:
    files: in the order of the stream.
    config: decides the held-out part and the batches. `mark_paragraphs` has no effect: the ids are
      taken as they are.
    tokenizer: that of a run which is resumed, or of its initial weights; None takes the one beside
      the files, or the one that `config` asks for.
    sha256: digest that the files must have, as recorded by a run whose tokenizer is given; then
      they need none beside them. None accepts any.

  Raises:
    UserError: if a file is damaged, an id is outside of the vocabulary, or there are too few or too
      many ids.
    RecordedTextError: if the digest differs.
  """
  location = f"{config.path} ({len(files)} {'file' if len(files) == 1 else 'files'})"
  if config.batching == "documents":
    raise UserError(
      f"data.batching=documents needs text, one document a line, and {location} holds tokens in "
      "one stream. An experiment on streams reads them, for example --experiment gpt2_shakespeare"
    )
  is_alone = not any((file.parent / paths.TOKENIZER_FILE).is_file() for file in files)
  is_known = is_alone and tokenizer is not None and sha256 is not None
  found = None if is_known else paths.find_tokenizer(files, config)
  if tokenizer and found and tokenizer.digest != found.digest:
    raise UserError(
      f"the token files of {location} were made with another tokenizer than the run's, which came "
      "with its folder or its weights. Make them again: python -m jgpt.prepare --tokenizer with "
      f"the path of that {paths.TOKENIZER_FILE}"
    )
  tokenizer = tokenizer or found or make_tokenizer(config, "", "")
  named = [(paths.part_of(file, config.path), file) for file in files]
  if all(part != "train" for part, _ in named):
    raise UserError(
      f"{location} holds nothing to train on: {files[0].name} is {DATA_PARTS[named[0][0]]} by its "
      "name. Name other files too."
    )
  parts = [
    [read_header(file) for part, file in named if part == wanted] for wanted in ("train", "heldout")
  ]
  text = Text("", "token files", location, check_files(*parts, tokenizer.vocab_size))
  sources.check_same_text(text, sha256)
  train, heldout = map(open_files, parts)
  num_left = len(files) - len(parts[0]) - len(parts[1])
  line = _describe_files(*map(len, parts), num_left, len(heldout), config)
  is_own = len(heldout) > 0
  if is_own:
    bounds = 0, len(train)
    heldout_bounds = 0, min(len(heldout), config.heldout_tokens or len(heldout))
  else:
    heldout = train
    bounds, heldout_bounds = _split_bounds(len(train), config)
  _check_lengths(
    bounds[1] - bounds[0], heldout_bounds[1] - heldout_bounds[0], location, config, is_own=is_own
  )
  is_large = bounds[1] - bounds[0] > RESIDENT_TOKENS
  # A large training part is not read here: `feed.py` reads it during training.
  tokens = train.part(*bounds) if is_large else train.read(*bounds)
  streams = Stream(tokens), Stream(heldout.read(*heldout_bounds))
  summary = [line, _describe_parts(*streams, config)]
  return Data(text, None, tokenizer, *streams, documents=[], summary=summary)


def _describe_files(
  train: int, heldout: int, left: int, num_tokens: int, config: DataConfig
) -> str:
  """Returns the summary's line with the files of each part and what is left out.

  Args:
    train: number of training files.
    heldout: number of held-out files.
    left: number of test files.
    num_tokens: tokens of the held-out files.
    config: `heldout_fraction` and `heldout_tokens` are read.
  """
  line = f"{train} token {'file' if train == 1 else 'files'} for training"
  if heldout:
    line += f", {heldout} held out"
    if config.heldout_fraction:
      line += " instead of data.heldout_fraction"
    elif config.heldout_tokens and config.heldout_tokens < num_tokens:
      line += (
        f" (data.heldout_tokens: the first {config.heldout_tokens:,} of {num_tokens:,} tokens)"
      )
  return line + (f"; {left} left out, test by name" if left else "")


def _split_bounds(num_tokens: int, config: DataConfig) -> tuple[tuple[int, int], tuple[int, int]]:
  """Returns (start, stop) of a stream's training part, and of its held-out part."""
  if config.heldout_tokens is not None:
    first = min(config.heldout_tokens, num_tokens)
    return (first, num_tokens), (0, first)
  num_train = int((1 - config.heldout_fraction) * num_tokens)
  return (0, num_train), (num_train, num_tokens)
