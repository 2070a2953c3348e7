"""Every parser of other people's files against inputs that nobody meant to write.

Each of them comes to a valid value, of which something that matters is checked, or to a
`UserError`: one printable line that names the file. Nothing else: no other exception, no warning,
nothing executed or written, no memory beyond what the input takes, no second of CPU.
`JGPT_FUZZ=200000` tries that many inputs instead of 10,000; `JGPT_FUZZ=1000-2000` those.
"""

import dataclasses
import json
import os
import re
import struct

import fuzzing
import ml_dtypes
import numpy as np
import pytest
from fuzzing import Parser, any_bytes, edit_bytes, edit_json

from jgpt.config import DataConfig
from jgpt.config.catalog import list_experiments, load_experiment
from jgpt.config.settings import (
  SIZE,
  change,
  experiment_from_json,
  experiment_to_json,
  format_value,
  list_settings,
  parse_setting,
  setting_names,
)
from jgpt.data import paths, preparation
from jgpt.data import token_files as shards
from jgpt.data.corpus import find_data
from jgpt.data.token_files import read_header
from jgpt.errors import UserError
from jgpt.text.bpe import BpeTokenizer
from jgpt.text.documents import Position, parse_block, read_blocks
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer, tokenizer_from_json
from jgpt.text.tokenizer_files import hugging_face_files
from jgpt.weights import hugging_face, llmc
from jgpt.weights.gpt2 import (
  GPT2_NAMES,
  GPT2_SETTINGS,
  build_params,
  flatten,
  gpt2_shapes,
  make_gpt2_config,
)

QUICK = 100
V, S, D, F, L = 5, 4, 4, 8, 2  # vocabulary, positions, width, MLP, layers
SAMPLE = "To be, or not to be: that is the question.\n"
MERGES = ["t h", "th e", "\u0120 the", "o r", "\u0120 or"]
BPE = [BpeTokenizer("\n".join(MERGES), end_of_text) for end_of_text in (True, False)]
TOKENIZERS = [
  CharTokenizer("\n ab", True),
  CharTokenizer(" .:T\u00e9\U0001f600", False),
  ByteTokenizer(),
  *BPE,
]
STREAM = DataConfig(
  source="names",
  tokenizer="bytes",
  batching="random",
  seq_len=2,
  batch_size=1,
  heldout_fraction=0.0,
  path="here",
)


def dump(value):
  return json.dumps(value).encode()


def mostly(make, *, begin=(b"",)):
  """An input is made so, or of random bytes now and then."""
  return lambda rng: make(rng) if rng.random() < 0.97 else any_bytes(rng, begin)


# --- Token files ---


def token_header(magic, version, ids):
  return struct.pack("<256i", magic, version, len(ids), *[0] * 253)


IDS = [b % 256 for b in range(7, 700, 3)]
TOKENS_16 = token_header(20240520, 1, IDS) + struct.pack(f"<{len(IDS)}H", *IDS)
TOKENS_32 = token_header(20240801, 7, IDS) + struct.pack(f"<{len(IDS)}I", *IDS)
TOKENS_RAW = struct.pack(f"<{len(IDS)}H", *IDS)


def edit_tokens(rng, base):
  """Fields of the header more often than ids."""
  content = bytearray(edit_bytes(rng, base, (TOKENS_16, TOKENS_32)) if rng.random() < 0.6 else base)
  if rng.random() < 0.6 and len(content) >= 12:
    ids = rng.randint(0, 600)
    content[12 if rng.random() < 0.1 else 1024 :] = (content[1024:] * 4)[: ids * rng.choice((2, 4))]
    fields = [*struct.unpack("<3i", content[:12])]
    fields[rng.randrange(3)] = (
      rng.choice((ids, ids, fields[0], 1, 7, 20240520, 20240801, *fuzzing.INTS)) & 0x7FFFFFFF
    )
    content[:12] = struct.pack("<3i", *fields)
    if rng.random() < 0.1:
      content[:1024] = content[:1024][::-1]
  return bytes(content)


def token_files(folder, bases):
  path = folder / "train.bin"
  config = change_data(path=str(path))

  def read(content):
    fuzzing.write(path, content)
    found = find_data(config, 0)
    tokens = np.asarray(found.train.tokens)
    file = read_header(path)
    assert file.offset + file.count * file.dtype.itemsize == len(content) and file.count == len(
      tokens
    )
    assert tokens.dtype == np.int32 and 0 <= tokens.min() <= tokens.max() < 256
    assert np.array_equal(tokens, np.frombuffer(content, file.dtype, file.count, file.offset))

  return Parser(
    mostly(lambda rng: edit_tokens(rng, rng.choice(bases)), begin=bases),
    read,
    "train.bin",
    block=3 << 20,
  )


def change_data(**changes):
  return dataclasses.replace(STREAM, **changes)


def prepared(folder):
  """The manifest of a folder that `prepare` made, which says which files there are."""
  text, out = folder / "text.txt", folder / "made"
  text.write_text(SAMPLE * 9)
  os.utime(text, (1, 1))  # the manifest says when, and an input is to be the same each time
  wanted = preparation.Preparation(
    inputs=[text], tokenizer=ByteTokenizer(), out=out, heldout_tokens=50, shard_tokens=200
  )
  preparation.prepare(wanted)
  base = (out / paths.PREPARATION_FILE).read_bytes()
  config = change_data(path=str(out))

  def read(content):
    fuzzing.write(out / paths.PREPARATION_FILE, content)
    tokens = find_data(config, 0).train.tokens
    assert 0 <= tokens.min() <= tokens.max() < 256

  return Parser(mostly(lambda rng: edit_json(rng, base)), read, "made", block=3 << 20)


def going_on(folder):
  """The same manifest, read by `prepare` itself, which goes on where it says."""
  text, out, outside = folder / "text.txt", folder / "made", folder / "outside"
  text.write_text(SAMPLE * 9)
  os.utime(text, (1, 1))  # the manifest says when, and an input is to be the same each time
  outside.write_text("keep")
  wanted = preparation.Preparation(
    inputs=[text], tokenizer=ByteTokenizer(), out=out, heldout_tokens=50, shard_tokens=200
  )
  preparation.prepare(wanted)
  kept = {file.name: file.read_bytes() for file in out.iterdir()}
  base = kept[paths.PREPARATION_FILE]
  value = json.loads(base)
  half = dump(
    value | {"files": value["files"][:2], "finished": False, "next": {"start": {}, "skip": 250}}
  )

  def read(content):
    with fuzzing.unwatched():
      for file in out.iterdir():
        file.unlink()
      for name, there in kept.items():
        (out / name).write_bytes(there)
      (out / paths.PREPARATION_FILE).write_bytes(content)
    manifest = preparation.prepare(wanted)
    assert manifest["finished"] and outside.read_text() == "keep"
    assert preparation.read_preparation(out) is not None

  def make(rng):
    return edit_json(rng, rng.choice((base, half)), (base,))

  return Parser(mostly(make), read, "made", may_write=str(out), block=3 << 20)


# --- Weights ---


def gpt2_tensors():
  config = make_gpt2_config(vocab_size=V, max_seq_len=S, num_layers=L, d_model=D, d_ff=F)
  rng, names, tensors = np.random.default_rng(0), dict(GPT2_NAMES), {}
  for name, shape in gpt2_shapes(config).items():
    layered = "/" in name
    for i in range(L if layered else 1):
      tensors["transformer." + names[name].format(i)] = rng.normal(size=shape[layered:]).astype(
        "<f4"
      )
  return tensors


def safetensors_header(tensors):
  header, at = {"__metadata__": {"format": "pt"}}, 0
  for name, array in tensors.items():
    header[name] = {
      "dtype": "F32",
      "shape": list(array.shape),
      "data_offsets": [at, at + array.nbytes],
    }
    at += array.nbytes
  return header


def pack(header, content):
  return struct.pack("<Q", len(header)) + header + content


TENSORS = gpt2_tensors()
HEADER = dump(safetensors_header(TENSORS))
VALUES = b"".join(array.tobytes() for array in TENSORS.values())
CONFIG = {
  "model_type": "gpt2",
  "vocab_size": V,
  "n_positions": S,
  "n_embd": D,
  "n_layer": L,
  "n_head": 2,
}
CONFIG |= {
  "activation_function": "gelu_new",
  "layer_norm_epsilon": 1e-5,
  "tie_word_embeddings": True,
}


def edit_safetensors(rng):
  header, values = HEADER, VALUES
  if rng.random() < 0.7:
    header = edit_json(rng, HEADER)
  elif rng.random() < 0.5:
    values = edit_bytes(rng, VALUES)
  content = pack(header, values)
  if rng.random() < 0.1:
    content = (
      struct.pack("<Q", rng.choice((*fuzzing.INTS, len(header) + rng.randint(-9, 9))) % 2**64)
      + content[8:]
    )
  return edit_bytes(rng, content) if rng.random() < 0.1 else content


def take_weights(path, opened):
  """Reads all that was found: what is taken is a model's parameters, float32, finite and of the
  model's shapes.
  """
  assert opened.location == str(path)
  config = make_gpt2_config(
    **{name: v for name, v in opened.model.items() if name not in GPT2_SETTINGS}
  )
  params = build_params(opened, config)
  for name, array in flatten(params, config).items():
    assert (
      array.shape == opened.shapes[name] and array.dtype == np.float32 and np.isfinite(array).all()
    )


def safetensors(folder):
  path = folder / "model.safetensors"

  def read(content):
    fuzzing.write(path, content)
    take_weights(path, hugging_face.open_hugging_face(path))

  return Parser(mostly(edit_safetensors, begin=[pack(HEADER, VALUES)]), read, "model.safetensors")


def hugging_face_folder(folder, base):
  """A folder of which one JSON file is edited: config.json, or the index of weights in two
  parts.
  """
  half = list(TENSORS)[: len(TENSORS) // 2]
  parts = {"a.safetensors": half, "b.safetensors": [name for name in TENSORS if name not in half]}
  for file, names in parts.items():
    chosen = {name: TENSORS[name] for name in names}
    (folder / file).write_bytes(
      pack(dump(safetensors_header(chosen)), b"".join(a.tobytes() for a in chosen.values()))
    )
  files = {
    "config.json": dump(CONFIG),
    "model.safetensors.index.json": dump(
      {"metadata": {}, "weight_map": {n: f for f, ns in parts.items() for n in ns}}
    ),
  }
  for name, content in files.items():
    (folder / name).write_bytes(content)

  def read(content):
    fuzzing.write(folder / base, content)
    take_weights(folder, hugging_face.open_hugging_face(folder))

  return Parser(mostly(lambda rng: edit_json(rng, files[base])), read, str(folder))


def llmc_weights(folder):
  # llm.c's d_ff is four times the width: other sizes than those above, and their values do not
  # matter here.
  path, bases = folder / "model.bin", []
  for dtype, version in ((np.dtype("<f4"), 3), (np.dtype(ml_dtypes.bfloat16), 5)):
    config = make_gpt2_config(
      vocab_size=V, max_seq_len=S, num_layers=L, num_heads=2, d_model=D, d_ff=4 * D
    )
    count = sum(int(np.prod(shape)) for shape in gpt2_shapes(config).values()) + (128 - V) * D
    header = struct.pack("<256i", 20240326, version, S, V, L, 2, D, 128, *[0] * 248)
    bases.append(header + np.random.default_rng(0).normal(size=count).astype(dtype).tobytes())

  def make(rng):
    content = bytearray(rng.choice(bases))
    if rng.random() < 0.05:
      struct.pack_into(
        "<6i", content, 8, *(rng.choice((1, 2 ** rng.randrange(31), 12, 768)) for _ in range(6))
      )
    elif rng.random() < 0.7:
      at = 4 * rng.randrange(9)
      old = struct.unpack_from("<i", content, at)[0]
      new = rng.choice(
        (old + 1, old - 1, 2 * old, 1, 0, -1, 3, 5, 128, rng.randint(1, 200), 2**29, 2**31 - 1)
      )
      struct.pack_into("<i", content, at, max(-(2**31), min(2**31 - 1, new)))
    return bytes(content) if rng.random() < 0.5 else edit_bytes(rng, bytes(content), bases)

  def read(content):
    fuzzing.write(path, content)
    take_weights(path, llmc.open_llmc(path))

  return Parser(mostly(make, begin=bases), read, "model.bin")


# --- Tokenizers ---


def take_tokenizer(tokenizer):
  """What is taken has distinct ids, keeps text, and is the same tokenizer when it is written and
  read.
  """
  again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
  assert again.digest == tokenizer.digest and again.vocab_size == tokenizer.vocab_size == len(
    tokenizer.token_bytes
  )
  text = tokenizer.chars[:50] if isinstance(tokenizer, CharTokenizer) else SAMPLE
  ids = (
    tokenizer.encode(text)
    if not isinstance(tokenizer, BpeTokenizer)
    else list(range(tokenizer.vocab_size))[:300]
  )
  assert all(0 <= i < tokenizer.vocab_size for i in ids)
  assert isinstance(tokenizer, BpeTokenizer) or tokenizer.decode(ids) == text
  assert tokenizer.describe().isprintable() and len(tokenizer.describe()) < 500
  tokenizer.decode(ids)


def own_tokenizer(folder):
  path, bases = folder / "tokenizer.json", [dump(tokenizer.to_json()) for tokenizer in TOKENIZERS]

  def read(content):
    fuzzing.write(path, content)
    take_tokenizer(paths.read_tokenizer(path))

  return Parser(
    mostly(lambda rng: edit_json(rng, rng.choice(bases), bases)), read, "tokenizer.json"
  )


def hugging_face_tokenizer(folder):
  path = folder / "tokenizer.json"
  bases = [dump(hugging_face_files(tokenizer, S)["tokenizer.json"]) for tokenizer in TOKENIZERS]

  def read(content):
    fuzzing.write(path, content)
    take_tokenizer(hugging_face.read_folder_tokenizer(folder))

  return Parser(
    mostly(lambda rng: edit_json(rng, rng.choice(bases), bases)), read, "tokenizer.json"
  )


def older_tokenizer(folder):
  """GPT-2's two files, in one input with a NUL twice between them."""
  files = hugging_face_files(BPE[0], S)
  vocab, merges = dump(files["vocab.json"]), files["merges.txt"].encode()
  part = b"\0\0"

  def make(rng):
    chosen = rng.randrange(3)
    first = vocab if chosen == 0 else edit_json(rng, vocab)
    second = merges if chosen == 1 else edit_bytes(rng, merges, (merges,))
    return first + part + second

  def read(content):
    first, _, second = content.partition(part)
    fuzzing.write(folder / "vocab.json", first)
    fuzzing.write(folder / "merges.txt", second)
    take_tokenizer(hugging_face.read_folder_tokenizer(folder))

  return Parser(mostly(make), read, str(folder))


# --- Settings ---


def experiment_json(folder):
  bases = [dump(experiment_to_json(load_experiment(name))) for name in list_experiments()]

  def read(content):
    try:
      value = json.loads(content)
    except (ValueError, RecursionError):
      raise UserError("not JSON: whoever reads the file says so") from None
    take_experiment(experiment_from_json(value))

  return Parser(mostly(lambda rng: edit_json(rng, rng.choice(bases), bases)), read)


def take_experiment(experiment):
  """It survives JSON and `--set`, and its whole numbers are such as arrays and schedules
  can hold.
  """
  plain = dataclasses.replace(experiment, expected=())  # which are documentation
  assert experiment_from_json(json.loads(json.dumps(experiment_to_json(plain)))) == plain
  for name, value in list_settings(experiment).items():
    least = -1 if name.startswith("mesh.") else 0  # -1 takes the devices that are left
    assert type(value) is not int or least <= value < 2**31, (name, value)
    assert type(value) is not float or np.isfinite(value), (name, value)
  hash(experiment)


def one_setting(folder):
  """A few `--set`, in one text by NUL."""
  bases = {name: load_experiment(name) for name in list_experiments()}
  names = [*setting_names(), SIZE]
  words = [
    "none",
    "null",
    "true",
    "False",
    "relu",
    "layer",
    "bpe",
    "gpt2",
    "epochs",
    "d12",
    "embedding,matrix",
    "a,,b",
  ]
  edges = [str(n) for n in (*fuzzing.INTS, *fuzzing.FLOATS)] + [
    "nan",
    "-inf",
    "1e400",
    "9" * 5000,
    "1_000",
    " 7 ",
    "+3",
    "0b1",
  ]

  def one(rng):
    name = rng.choice(names)
    if rng.random() < 0.15:
      name = rng.choice(
        (
          name.upper(),
          name[1:],
          name + rng.choice(fuzzing.TEXTS),
          rng.choice(fuzzing.TEXTS),
          f" {name} ",
        )
      )
    known = list_settings(rng.choice(list(bases.values()))).get(name)
    value = rng.choice(
      (format_value(known), rng.choice(words), rng.choice(edges), rng.choice(fuzzing.TEXTS))
    )
    if rng.random() < 0.1:
      value += rng.choice((*fuzzing.TEXTS, "a" * 10_000))
    return name + ("=" if rng.random() < 0.97 else " ") + value

  def make(rng):
    if rng.random() < 0.03:
      return any_bytes(rng, [b"train.steps=5"]).decode(
        "utf-8", rng.choice(("replace", "surrogateescape"))
      )
    return "\0\0".join(one(rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))

  def read(content):
    changes = dict(map(parse_setting, content.split("\0\0")))
    base = bases[sorted(bases)[len(content) % len(bases)]]
    take_experiment(change(base, changes))

  return Parser(make, read)


# --- Text ---

TEXT = (
  "First Citizen:\nBefore we proceed any further, hear me speak.\r\n\r\nAll:\n\n\nÉé 漢字 😀.\n"
)


def text_data(folder, **changes):
  path = folder / "text.txt"
  config = change_data(path=str(path), **changes)
  bases = [
    TEXT.encode(),
    TEXT.encode("utf-8-sig"),
    b"emma\nolivia\nava\n",
    TEXT.encode("latin-1", "replace"),
    TEXT.encode("utf-16"),
  ]

  def read(content):
    fuzzing.write(path, content)
    found = find_data(config, 0)
    tokens = np.asarray(found.train.tokens)
    assert (
      tokens.dtype == np.int32 and 0 <= tokens.min() <= tokens.max() < found.tokenizer.vocab_size
    )
    text = content.decode("utf-8-sig")
    if config.batching == "documents":
      assert sorted(found.documents) == sorted(
        filter(None, map(str.strip, re.split("[\r\n]", text)))
      )
    else:
      assert found.tokenizer.decode(tokens.tolist()) == text

  return Parser(
    mostly(lambda rng: edit_bytes(rng, rng.choice(bases), bases), begin=bases), read, "text.txt"
  )


def json_lines(folder):
  path = folder / "lines.jsonl"
  base = b'{"text": "To be, or not to be", "id": 1}\n'
  base += b'{"id": "a", "text": "\\u00e9\\ud83d\\ude00\\n"}\n\n{"text": ""}\n'

  def make(rng):
    lines = base.split(b"\n")
    at = rng.choice((0, 1))
    lines[at] = edit_json(rng, lines[at])
    return b"\n".join(lines) if rng.random() < 0.7 else edit_bytes(rng, base)

  def read(content):
    fuzzing.write(path, content)
    for block in read_blocks([path], [len(content)], "paragraphs", Position()):
      for text in parse_block(block, "text", separate=True):
        assert text.encode()

  return Parser(mostly(make), read, "lines.jsonl", block=3 << 20)


PARSERS = {
  "token file with 16 bits": lambda folder: token_files(folder, [TOKENS_16]),
  "token file with 32 bits": lambda folder: token_files(folder, [TOKENS_32]),
  "token file without header": lambda folder: token_files(folder, [TOKENS_RAW]),
  "prepare.json": prepared,
  "prepare.json, going on": going_on,
  "safetensors": safetensors,
  "safetensors index": lambda folder: hugging_face_folder(folder, "model.safetensors.index.json"),
  "config.json": lambda folder: hugging_face_folder(folder, "config.json"),
  "llm.c weights": llmc_weights,
  "tokenizer.json": own_tokenizer,
  "tokenizer.json of Hugging Face": hugging_face_tokenizer,
  "vocab.json and merges.txt": older_tokenizer,
  "experiment in JSON": experiment_json,
  "--set": one_setting,
  "text of bytes": text_data,
  "text of characters": lambda folder: text_data(folder, tokenizer="characters"),
  "text of documents": lambda folder: text_data(
    folder, tokenizer="characters", batching="documents"
  ),
  "JSON lines": json_lines,
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
  """Token files are read in several blocks, although they are small."""
  monkeypatch.setattr(shards, "CHECK_BLOCK_BYTES", 256)


@pytest.mark.parametrize("name", PARSERS)
def test_fuzz_a_few_inputs(name, tmp_path):
  count = fuzzing.run_campaign(name, PARSERS[name](tmp_path), range(QUICK))
  assert count.inputs == QUICK and count.valid and count.refusals


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_fuzz_10000_inputs(name, tmp_path, record_property):
  """Some are valid and the refusals are of many kinds, or else the inputs would try nothing."""
  count = fuzzing.run_campaign(name, PARSERS[name](tmp_path), fuzzing.numbers())
  record_property("fuzzed", str(count))
  print(count)
  assert count.inputs == len(fuzzing.numbers())
  assert count.valid > 0.005 * count.inputs and len(count.refusals) >= 4, (
    f"{count} {count.refusals}"
  )
