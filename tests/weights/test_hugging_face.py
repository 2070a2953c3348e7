"""GPT-2 in Hugging Face's format: `transformers` computes what jgpt computes, and what comes back
has the same bits.

The oracles are `transformers` itself, a reader of safetensors written here from the format's
description, and a rounding to bfloat16 by bits. Files made to do harm are in
test_hostile_weights.py.
"""

import dataclasses
import functools
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from equivalence import QUICK
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from reference.llmc_files import bfloat16_to_float32, round_to_bfloat16
from small_runs import VERSE

from jgpt import cli, export, run, train
from jgpt.config import SampleConfig
from jgpt.config.catalog import load_experiment
from jgpt.config.experiment import GPT2_SIZES
from jgpt.config.settings import change, parse_setting, resolve
from jgpt.errors import UserError
from jgpt.generate import generate, generate_texts
from jgpt.model import apply
from jgpt.params import count_params, param_table, walk
from jgpt.plan import plan_run
from jgpt.runs import checkpoint
from jgpt.runs import open as open_lib
from jgpt.runs.folder import RunFiles, read_run_files, write_run_files
from jgpt.runs.open import open_run
from jgpt.step import TrainState
from jgpt.text.bpe import BpeTokenizer, make_gpt2_tokenizer
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer, train_char_tokenizer
from jgpt.weights import hugging_face
from jgpt.weights.gpt2 import (
  GPT2_SETTINGS,
  Weights,
  check_weights_settings,
  gpt2_shapes,
  make_gpt2_config,
)
from jgpt.weights.initial import load_params, open_weights

TOLERANCE = 1e-5  # of the largest logit
# Sizes of which none is a multiple of another or of a power of two: a stride that is taken for
# another one shows.
SIZES = {
  "vocab_size": 257,
  "max_seq_len": 64,
  "num_layers": 3,
  "num_heads": 4,
  "d_model": 36,
  "d_ff": 100,
}
ODD = dataclasses.replace(load_experiment("gpt2_shakespeare").model, **SIZES)
VARIANTS = {
  "odd": {},
  "erf": {"activation": "gelu_erf", "vocab_size": 1000, "num_layers": 1},
  "relu": {"activation": "relu", "num_heads": 9, "vocab_multiple": 1},
  "untied": {"tied_head": False, "vocab_size": 261},
  "no biases": {"biases": "none", "norm": "layer_no_bias"},
  "biases of the MLP": {"biases": "mlp"},
}
BPE = BpeTokenizer("t h\nth e\n\u0120 a", end_of_text=False)
TOKENIZERS = {
  "characters": train_char_tokenizer([VERSE], bos=False),
  "characters with BOS": train_char_tokenizer([VERSE, "é"], bos=True),
  "bytes": ByteTokenizer(),
  "bpe": BPE,
  "gpt2": BpeTokenizer(BPE.merges, end_of_text=True),
}
# As transformers' own configuration has it; any of it may be replaced.
THEIRS = {
  "vocab_size": 257,
  "n_positions": 48,
  "n_embd": 36,
  "n_layer": 3,
  "n_head": 4,
  "n_inner": 100,
}
# gpt2_shakespeare made as small, on bytes, and not trained.
SMALL = {
  "data.tokenizer": "bytes",
  "data.mark_paragraphs": False,
  "data.heldout_tokens": None,
  "data.seq_len": 16,
  "data.batch_size": 2,
  "model.vocab_size": 257,
  "model.max_seq_len": 48,
  "model.num_layers": 3,
  "model.num_heads": 4,
  "model.d_model": 36,
  "model.d_ff": 100,
  "train.steps": 0,
  "train.eval_every": None,
  "train.eval_batches": None,
  "train.sample_every": None,
  "sample.max_tokens": 5,
  "mesh.data": 1,
}


# --- Making models, and reading files by other means ---


def draw_params(config, seed=0, scale=0.25):
  """Parameters far from their initial values, so that biases and gains show.

  Rows of padding are zero.
  """
  rng = np.random.default_rng(seed)
  tree = {name: {} for name in param_table(config)}
  for name, param, layers in walk(config):
    shape = (layers, *param.shape) if "/" in name else param.shape
    array = rng.normal(param.mean, scale, shape).astype(np.float32)
    if param.padding:
      array[-param.padding :] = 0
    section, _, inner = name.rpartition("/")
    if section:
      tree[section][inner] = array
    else:
      tree[inner] = array
  return tree


def flat(params):
  """Name -> array, blocks stacked."""
  blocks = {f"blocks/{name}": np.asarray(a) for name, a in params["blocks"].items()}
  return {name: np.asarray(a) for name, a in params.items() if name != "blocks"} | blocks


def assert_same_bits(got, wanted):
  got, wanted = flat(got), flat(wanted)
  assert got.keys() == wanted.keys()
  for name, array in wanted.items():
    assert got[name].dtype == array.dtype == np.float32 and got[name].shape == array.shape, name
    assert got[name].tobytes() == array.tobytes(), name


def write(folder, params, config, tokenizer=BPE, dtype="float32"):
  folder.mkdir(parents=True)
  hugging_face.write_folder(folder, params, config, tokenizer, dtype)
  return folder


def load(path, config):
  return load_params(open_weights(str(path)), config).params


def read_safetensors(path):
  """Name -> array, by the format's description: a length (uint64), a header in JSON, and what it
  says where.
  """
  content = Path(path).read_bytes()
  (size,) = struct.unpack("<Q", content[:8])
  header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
  dtypes = {"F32": "<f4", "BF16": "<u2"}
  return {
    name: np.frombuffer(data[slice(*at["data_offsets"])], dtypes[at["dtype"]]).reshape(at["shape"])
    for name, at in header.items()
    if name != "__metadata__"
  }


@functools.cache
def needs_transformers():
  torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed (pip install torch): transformers needs it"
  )
  torch.set_num_threads(1)
  return pytest.importorskip(
    "transformers", reason="the reader of these files (jgpt's extra: reference)"
  )


def open_theirs(path, **options):
  """The model as `transformers` opens it.

  Every tensor of the file has a place there, and every place a tensor.
  """
  opened = needs_transformers().GPT2LMHeadModel.from_pretrained(
    path, output_loading_info=True, **options
  )
  model, info = opened
  assert not any(info.values()), info
  return model.eval()


def their_logits(model, tokens):
  import torch

  with torch.no_grad():
    return model(torch.tensor(tokens).long()).logits.float().numpy()


def our_logits(params, tokens, config):
  logits = jax.jit(apply, static_argnames="config", compiler_options=QUICK)(
    params, tokens.astype(np.int32), config=config
  )
  return np.asarray(logits)[..., : config.vocab_size]


def assert_same_logits(model, params, config, num_positions=None, tolerance=TOLERANCE):
  tokens = np.random.default_rng(1).integers(
    0, config.vocab_size, (2, num_positions or config.max_seq_len)
  )
  theirs, ours = their_logits(model, tokens), our_logits(params, tokens, config)
  assert theirs.shape == ours.shape and np.abs(theirs).max() > 0.5
  assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def save_theirs(folder, *, dtype=None, seed=0, **changes):
  """A folder as `transformers` saves it, with random weights in every place; returns the model."""
  transformers = needs_transformers()
  import torch

  options = {name: changes.pop(name) for name in ("max_shard_size",) if name in changes}
  torch.manual_seed(seed)
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**THEIRS | changes)).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(torch.randn_like(parameter) * 0.2)
  if dtype:
    model = model.to(getattr(torch, dtype))
  model.save_pretrained(folder, **options)
  return model


def our_config(**changes):
  return dataclasses.replace(ODD, max_seq_len=48, **changes)


@pytest.fixture(params=VARIANTS)
def config(request):
  return dataclasses.replace(ODD, **VARIANTS[request.param])


# --- Export ---


def test_transformers_computes_the_same_logits(config, tmp_path):
  params = draw_params(config)
  model = open_theirs(write(tmp_path / "out", params, config))
  assert str(model.dtype) == "torch.float32"
  assert model.config.vocab_size == config.vocab_size and model.config.n_positions == 64
  assert_same_logits(model, params, config)


def test_transformers_writes_the_same_50_tokens(tmp_path):
  """Greedily.

  At every token the best logit is ahead of the second by far more than the two programs differ.
  """
  params = draw_params(ODD, seed=3)
  model = open_theirs(write(tmp_path / "out", params, ODD))
  import torch

  continuations = set()
  for prompt in ([84, 104, 101], [7], [256, 0, 1, 2, 3, 200, 100]):
    tokens = torch.tensor([prompt])
    theirs = model.generate(
      tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=50
    )[0].tolist()
    padded = np.zeros(8, np.int32)
    padded[: len(prompt)] = prompt
    key = jax.random.key(0)
    new = generate(
      params, padded, np.int32(len(prompt)), key, np.float32(0), config=ODD, num=1, max_tokens=50
    )
    assert [*prompt, *np.asarray(new)[0].tolist()] == theirs
    assert len(theirs) == len(prompt) + 50
    continuations |= {*theirs[len(prompt) :]}
    second, best = np.sort(their_logits(model, [theirs])[0, len(prompt) - 1 : -1])[:, -2:].T
    assert (best - second).min() > 10 * TOLERANCE * best.max()
  assert len(continuations) > 10


def test_what_was_exported_comes_back_with_the_same_bits(config, tmp_path):
  params = draw_params(config)
  special = [-0.0, 1e-45, -1e-38, np.finfo(np.float32).max, np.finfo(np.float32).tiny]
  params["blocks"]["w_up"].flat[: len(special)] = params["pos_embed"].flat[-len(special) :] = (
    special
  )
  folder = write(tmp_path / "out", params, config)
  assert_same_bits(load(folder, config), params)
  again = write(tmp_path / "again", load(folder, config), config)
  assert [p.name for p in sorted(again.iterdir())] == [p.name for p in sorted(folder.iterdir())]
  assert all((again / p.name).read_bytes() == p.read_bytes() for p in folder.iterdir())


def test_padding_is_not_written(tmp_path):
  params = draw_params(ODD)
  assert params["tok_embed"].shape == (384, 36)
  params["tok_embed"][257:] = 9
  tensors = read_safetensors(write(tmp_path / "out", params, ODD) / "model.safetensors")
  assert tensors["transformer.wte.weight"].shape == (257, 36) and "lm_head.weight" not in tensors
  assert not load(tmp_path / "out", ODD)["tok_embed"][257:].any()


def test_biases_that_the_model_lacks_are_zeros_in_the_file(tmp_path):
  bare = dataclasses.replace(ODD, biases="none", norm="layer_no_bias")
  params = draw_params(bare)
  path = write(tmp_path / "out", params, bare)
  biases = {
    n: a for n, a in read_safetensors(path / "model.safetensors").items() if n.endswith(".bias")
  }
  assert len(biases) == 3 * 6 + 1 and not any(a.any() for a in biases.values())
  full = load(path, ODD)
  assert all(
    not full["blocks"][n].any()
    for n in ("b_qkv", "b_out", "b_up", "b_down", "norm_attn_bias", "norm_mlp_bias")
  )
  assert full["blocks"]["b_qkv"].shape == (3, 3, 4, 9)


@pytest.mark.parametrize(
  ("name", "mend"),
  [
    ("b_qkv", "model.biases=all"),
    ("b_down", "model.biases=all"),
    ("norm_mlp_bias", "model.norm=layer"),
  ],
)
def test_a_bias_that_is_not_zero_is_not_dropped(name, mend, tmp_path):
  params = draw_params(ODD, scale=0)
  params["blocks"][name].flat[-1] = 1e-30
  path = write(tmp_path / "out", params, ODD)
  bare = dataclasses.replace(ODD, biases="none", norm="layer_no_bias")
  with pytest.raises(UserError, match=f"{name}, a bias that is not zero.*--set {mend}$"):
    load(path, bare)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_folder_has_the_tokenizer(name, tmp_path):
  tokenizer, text = TOKENIZERS[name], "To be, or not to be\nthe t a"
  config = dataclasses.replace(ODD, vocab_size=tokenizer.vocab_size, num_layers=1)
  folder = write(tmp_path / "out", draw_params(config), config, tokenizer)
  opened = open_weights(str(folder))
  assert opened.tokenizer == tokenizer
  theirs = needs_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
  ids = tokenizer.encode(text)
  assert theirs.encode(text, add_special_tokens=False) == ids and theirs.decode(ids) == text
  assert theirs.model_max_length == 64
  mark = {"characters with BOS": tokenizer.vocab_size - 1, "gpt2": tokenizer.vocab_size - 1}.get(
    name
  )
  model = open_theirs(folder)
  for settings in (model.config, model.generation_config):
    assert (settings.bos_token_id, settings.eos_token_id) == (mark, mark)


def test_dropout_is_told_where_transformers_drops_in_the_same_places(tmp_path):
  places = ("embedding", "attention", "attention_out", "mlp_out")
  config = dataclasses.replace(ODD, num_layers=1, dropout=0.25, dropout_places=places)
  theirs = open_theirs(write(tmp_path / "out", draw_params(config), config)).config
  assert (theirs.embd_pdrop, theirs.attn_pdrop, theirs.resid_pdrop) == (0.25, 0.25, 0.25)
  half = dataclasses.replace(config, dropout_places=("attention", "mlp_out", "activation"))
  theirs = open_theirs(write(tmp_path / "half", draw_params(half), half)).config
  assert (theirs.embd_pdrop, theirs.attn_pdrop, theirs.resid_pdrop) == (0.0, 0.25, 0.0)


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"norm": "rms"}, ["model.norm=rms"]),
    ({"positions": "sinusoidal"}, ["model.positions=sinusoidal"]),
    ({"norm_final": False}, ["model.norm_final=false"]),
    ({"scale_embed": True}, ["model.scale_embed=true"]),
    (
      {"norm": "rms", "norm_embed": True, "norm_final": False},
      ["norm=rms", "norm_embed=true", "norm_final=false"],
    ),
  ],
)
def test_what_the_format_cannot_hold_is_refused(changes, named, tmp_path):
  config = dataclasses.replace(ODD, **changes)
  with pytest.raises(UserError, match="Hugging Face's GPT-2 cannot hold this model") as error:
    write(tmp_path / "out", draw_params(config), config)
  assert all(name in str(error.value) for name in named) and str(error.value).count(
    "model."
  ) == len(named)
  assert not any((tmp_path / "out").iterdir())


# --- bfloat16, and arrays as they lie in memory ---


def test_bfloat16_is_rounded_to_nearest_even(tmp_path):
  params = draw_params(ODD)
  ties = np.array(
    [0x3F808000, 0x3F818000, 0xBF808000, 0x3F80_7FFF, 0x3F80_8001, 0x00008000, 0x007FFFFF],
    np.uint32,
  )
  params["tok_embed"].flat[: len(ties)] = ties.view(np.float32)
  exact = read_safetensors(write(tmp_path / "float32", params, ODD) / "model.safetensors")
  folder = write(tmp_path / "bfloat16", params, ODD, dtype="bfloat16")
  rounded = read_safetensors(folder / "model.safetensors")
  assert rounded.keys() == exact.keys() and len(exact) == 3 * 12 + 4
  for name, bits in rounded.items():
    assert bits.dtype == np.uint16 and np.array_equal(bits, round_to_bfloat16(exact[name])), name
  assert rounded["transformer.wte.weight"].flat[: len(ties)].tolist() == [
    0x3F80, 0x3F82, 0xBF80, 0x3F80, 0x3F81, 0x0000, 0x0080,
  ]  # fmt: skip
  back = load(folder, ODD)
  assert np.array_equal(back["pos_embed"], bfloat16_to_float32(rounded["transformer.wpe.weight"]))
  assert np.array_equal(
    back["blocks"]["w_down"][2], bfloat16_to_float32(rounded["transformer.h.2.mlp.c_proj.weight"])
  )


def test_transformers_loads_bfloat16_as_such(tmp_path):
  params = draw_params(ODD)
  folder = write(tmp_path / "out", params, ODD, dtype="bfloat16")
  model = open_theirs(folder)
  import torch

  assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
  bits = model.state_dict()["transformer.h.1.attn.c_attn.weight"].view(torch.uint16).numpy()
  assert np.array_equal(bits, round_to_bfloat16(params["blocks"]["w_qkv"][1].reshape(36, 108)))
  assert_same_logits(open_theirs(folder, dtype=torch.float32), load(folder, ODD), ODD)


@hypothesis_settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30))
@example([0x7F7FFFFF, 0xFF7F8000, 0x7F7F7FFF])  # the largest: rounded to infinity, and not
def test_every_bit_pattern_is_rounded_as_by_hand(tmp_path_factory, patterns):
  array = np.array(patterns, np.uint32).view(np.float32)
  array[np.isnan(array)] = 1.0  # the bits of a NaN are nobody's promise
  path = tmp_path_factory.mktemp("bits") / "x.safetensors"
  hugging_face.write_safetensors(path, {"x": array}, "bfloat16")
  assert np.array_equal(read_safetensors(path)["x"], round_to_bfloat16(array))


def views(array):
  """The same numbers in other places of memory, or other numbers of the same memory: what strides
  can do.
  """
  rows, columns = array.shape
  wide = np.zeros((2 * rows, 3 * columns), np.float32)
  wide[::2, ::3] = array
  yield "itself", array
  yield "transposed", array.T
  yield "Fortran's order", np.asfortranarray(array)
  yield "every other", wide[::2, ::3]
  yield "backwards", array[::-1, ::-1]
  yield "a column", array[:, columns // 2]
  yield "one row for all", np.broadcast_to(array[0], (5, columns))
  yield "one number for all", np.broadcast_to(array[0, 0], (2, 3))
  yield "an inner part", array[rows // 2 :, columns // 3 :]
  yield "axes moved", np.stack([array, -array]).transpose(2, 0, 1)
  yield "other bytes", array.astype(">f4")
  yield "read only", np.asarray(jax.numpy.asarray(array)).T
  yield "float64", array.astype(np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@hypothesis_settings(deadline=None, max_examples=15)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_arrays_are_written_by_value_whatever_their_strides(
  tmp_path_factory, dtype, rows, columns, seed
):
  """`safetensors` takes the memory of an array as it lies.

  Jgpt's tensors are views of stacked parameters.
  """
  array = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
  tensors = dict(views(array))
  path = tmp_path_factory.mktemp("views") / "x.safetensors"
  hugging_face.write_safetensors(path, tensors, dtype)
  there = read_safetensors(path)
  assert there.keys() == tensors.keys()
  for name, wanted in tensors.items():
    values = np.array(wanted.tolist(), np.float32)
    assert there[name].shape == wanted.shape, name
    assert (
      there[name].tolist() == (values if dtype == "float32" else round_to_bfloat16(values)).tolist()
    ), name


def test_parameters_in_any_order_of_memory_are_exported_by_value(tmp_path):
  params = draw_params(ODD)
  strange = jax.tree.map(np.asfortranarray, params)
  assert not strange["blocks"]["w_qkv"].flags.c_contiguous
  plain = write(tmp_path / "plain", params, ODD)
  other = write(tmp_path / "other", strange, ODD)
  on_device = write(tmp_path / "device", jax.tree.map(jax.numpy.asarray, params), ODD)
  first = (plain / "model.safetensors").read_bytes()
  assert (
    first
    == (other / "model.safetensors").read_bytes()
    == (on_device / "model.safetensors").read_bytes()
  )


def test_what_does_not_read_back_is_an_error(tmp_path, monkeypatch):
  import safetensors.numpy

  save_file = safetensors.numpy.save_file

  def damage(tensors, path, metadata):
    save_file(tensors | {"b": -tensors["b"]}, path, metadata)

  monkeypatch.setattr(safetensors.numpy, "save_file", damage)
  zeros = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((2, 3), np.float32)}
  with pytest.raises(OSError, match="b does not read back"):  # -0.0 equals 0.0, and has other bits
    hugging_face.write_safetensors(tmp_path / "x.safetensors", zeros, "float32")


# --- Import of what transformers saved ---


@pytest.mark.parametrize(
  ("changes", "ours", "tolerance"),
  [
    ({}, {}, TOLERANCE),
    ({"max_shard_size": "20KB"}, {}, TOLERANCE),
    (
      {"n_inner": None, "activation_function": "gelu"},
      {"d_ff": 144, "activation": "gelu_erf"},
      TOLERANCE,
    ),
    (
      {"activation_function": "relu", "n_head": 3},
      {"activation": "relu", "num_heads": 3},
      TOLERANCE,
    ),
    ({"activation_function": "gelu_pytorch_tanh"}, {}, TOLERANCE),
    ({"tie_word_embeddings": False, "max_shard_size": "30KB"}, {"tied_head": False}, TOLERANCE),
    ({"dtype": "bfloat16", "max_shard_size": "20KB"}, {}, TOLERANCE),
    ({"dtype": "float16"}, {}, TOLERANCE),
    ({"dtype": "float64"}, {}, TOLERANCE),
  ],
)
def test_what_transformers_saved_computes_the_same_here(changes, ours, tolerance, tmp_path):
  model = save_theirs(tmp_path / "there", **changes).float()
  files = list((tmp_path / "there").glob("*.safetensors"))
  assert len(files) > 3 if "max_shard_size" in changes else len(files) == 1
  config = our_config(**ours)
  opened = open_weights(str(tmp_path / "there"))
  assert opened.tokenizer is None
  params = load_params(opened, config).params
  assert_same_logits(model, params, config, tolerance=tolerance)


def test_names_and_masks_as_in_the_released_files(tmp_path):
  """Without "transformer.", and with causal masks beside the weights; alone, and in a folder."""
  model = save_theirs(tmp_path / "there")
  tensors = read_safetensors(tmp_path / "there" / "model.safetensors")
  old = {name.removeprefix("transformer."): np.ascontiguousarray(a) for name, a in tensors.items()}
  for i in range(3):
    old[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 48, 48), np.float32))
    old[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
  old["h.1.attn.bias"] = old["h.1.attn.bias"].astype(np.uint8)
  from safetensors.numpy import save_file

  save_file(old, tmp_path / "there" / "model.safetensors")
  params = load(tmp_path / "there", our_config())
  assert_same_logits(model, params, our_config())
  assert_same_bits(load(tmp_path / "there" / "model.safetensors", our_config()), params)


def test_a_file_by_itself_takes_heads_and_activation_from_the_experiment(tmp_path):
  for head in (4, 12):
    model = save_theirs(tmp_path / f"{head}", n_head=head, activation_function="relu")
    config = our_config(num_heads=head, activation="relu")
    (tmp_path / f"{head}" / "config.json").unlink()
    opened = open_weights(str(tmp_path / f"{head}" / "model.safetensors"))
    assert opened.tokenizer is None and not opened.model.keys() & {"num_heads", "activation"}
    assert_same_logits(model, load_params(opened, config).params, config)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_in_a_file_by_itself_is_tied_if_it_is_the_embedding(same, tmp_path):
  model = save_theirs(tmp_path / "there", tie_word_embeddings=False)
  path = tmp_path / "there" / "model.safetensors"
  if same:
    tensors = {n: np.array(a) for n, a in read_safetensors(path).items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    hugging_face.write_safetensors(path, tensors, "float32")
    model = open_theirs(tmp_path / "there")
  path = path.rename(tmp_path / "alone.safetensors")
  config = our_config(tied_head=same)
  params = load(path, config)
  assert ("unembed" in params) == (not same)
  assert_same_logits(model, params, config)
  with pytest.raises(UserError, match=f"Try --set model.tied_head={str(same).lower()}$"):
    load(path, our_config(tied_head=not same))


def test_fewer_positions_are_the_first_ones(tmp_path):
  model = save_theirs(tmp_path / "there")
  config = dataclasses.replace(ODD, max_seq_len=20)
  params = load(tmp_path / "there", config)
  assert params["pos_embed"].shape == (20, 36)
  assert_same_logits(model, params, config)
  with pytest.raises(UserError, match=r"--set model\.max_seq_len=48$"):
    load(tmp_path / "there", dataclasses.replace(ODD, max_seq_len=49))


@pytest.fixture
def foreign(tmp_path):
  """A folder that jgpt can read, written without transformers.

  Returns a function that changes its config.json.
  """
  folder = write(tmp_path / "there", draw_params(ODD), ODD)
  path = folder / "config.json"

  def edit(changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))
    return folder

  return edit


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"model_type": "gpt_neo"}, "model_type gpt2, and has 'gpt_neo'"),
    ({"model_type": ...}, "model_type gpt2, and has None"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
    ({"layer_norm_epsilon": None}, "layer_norm_epsilon=None"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ({"add_cross_attention": True}, "add_cross_attention=True"),
    ({"activation_function": "swish"}, "activation_function='swish'"),
    ({"activation_function": "gelu_fast"}, "activation_function='gelu_fast'"),
    ({"activation_function": ["gelu_new"]}, "activation_function="),
    ({"activation_function": {}}, "activation_function="),
    ({"activation_function": None}, "activation_function=None"),
    (
      {"tie_word_embeddings": False},
      "no tensor lm_head.weight, and its config.json says tie_word_embeddings=false",
    ),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
    ({"n_head": 5}, "n_head=5 does not divide n_embd=36"),
    ({"n_head": ...}, "must have n_head"),
    ({"n_layer": 2}, "says num_layers=2, and the tensors have 3"),
    ({"vocab_size": 258}, "says vocab_size=258, and the tensors have 257"),
    ({"n_positions": 65}, "says max_seq_len=65, and the tensors have 64"),
    ({"n_embd": 40}, "says d_model=40, and the tensors have 36"),
  ],
)
def test_a_config_of_another_network_is_refused(changes, named, foreign):
  folder = foreign(changes)
  with pytest.raises(UserError) as error:
    open_weights(str(folder))
  assert (
    named in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
  )


def test_what_a_config_does_not_mention_is_gpt2s(foreign):
  gone = (
    "activation_function",
    "layer_norm_epsilon",
    "tie_word_embeddings",
    "n_inner",
    "torch_dtype",
  )
  opened = open_weights(str(foreign(dict.fromkeys(gone, ...))))
  assert (
    opened.model["activation"] == "gelu_tanh"
    and opened.model["tied_head"] is True
    and opened.model["d_ff"] == 100
  )


def test_a_tied_config_with_another_head_is_refused(tmp_path):
  config = dataclasses.replace(ODD, tied_head=False)
  folder = write(tmp_path / "there", draw_params(config), config)
  value = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(value | {"tie_word_embeddings": True}))
  with pytest.raises(UserError, match=r"lm_head\.weight is not wte\.weight"):
    open_weights(str(folder))


# --- Sizes that differ, and the advice ---


def advice(error):
  """What an error says to try, as a shell would pass it on; of alternatives the first."""
  tries = str(error).rpartition("Try ")[2].split(" or ")[0]
  return dict(parse_setting(text) for text in re.findall(r"--set (\S+)", tries))


def follow_advice(experiment, rounds=1):
  """Plans a run, doing what the errors say.

  Fails where they end without advice, or lead nowhere.
  """
  given = {}
  for _ in range(rounds):
    with pytest.raises(UserError) as error:
      plan_run(change(experiment, given))
    new = advice(error.value)
    assert new, f"no advice: {error.value}"
    given |= new
  return plan_run(change(experiment, given))


@pytest.fixture
def verse(tmp_path):
  path = tmp_path / "verse.txt"
  path.write_text(VERSE, encoding="utf-8")
  return path


def small(verse, **changes):
  names = {name.replace("__", "."): value for name, value in changes.items()}
  return change(load_experiment("gpt2_shakespeare"), SMALL | {"data.path": str(verse)} | names)


ANOTHER = {
  "one size": {"model__d_ff": 144},
  "sizes": {
    "model__num_layers": 2,
    "model__d_model": 32,
    "model__num_heads": 8,
    "model__vocab_size": 300,
  },
  "no size given": {"model__vocab_size": None},
  "switches": {
    "model__activation": "relu",
    "model__tied_head": False,
    "model__positions": "sinusoidal",
  },
  "norms": {
    "model__norm": "rms",
    "model__norm_embed": True,
    "model__norm_final": False,
    "model__scale_embed": True,
  },
  "GPT-2's sizes": {
    "model__num_layers": 12,
    "model__num_heads": 12,
    "model__d_model": 768,
    "model__d_ff": 3072,
  },
}


@pytest.mark.parametrize("changes", ANOTHER.values(), ids=ANOTHER)
def test_the_advice_makes_the_experiment_fit(changes, verse, tmp_path):
  folder = write(tmp_path / "there", draw_params(ODD), ODD, ByteTokenizer())
  plan = follow_advice(small(verse, train__init_from=str(folder), **changes))
  assert plan.initial.params["blocks"]["w_up"].shape == (3, 36, 100)
  assert plan.experiment.model.max_seq_len == 48  # fewer than there are: no difference


def test_every_setting_that_differs_is_named(verse, tmp_path):
  folder = write(tmp_path / "there", draw_params(ODD), ODD, ByteTokenizer())
  experiment = small(
    verse, train__init_from=str(folder), model__num_layers=2, model__activation="relu"
  )
  with pytest.raises(UserError) as error:
    plan_run(experiment)
  assert "model.num_layers=3 there and 2 here" in str(error.value) and "d_model" not in str(
    error.value
  )
  assert "model.activation=gelu_tanh there and relu here" in str(error.value) and str(
    folder
  ) in str(error.value)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_advice_on_tokenizers_works(tokenizer, verse, tmp_path):
  """The experiment marks paragraphs, which only GPT-2's tokenizer can: that needs another round."""
  folder = tmp_path / "there"
  config = dataclasses.replace(ODD, vocab_size=TOKENIZERS[tokenizer].vocab_size)
  write(folder, draw_params(config), config, TOKENIZERS[tokenizer])
  small_bytes = small(verse, train__init_from=str(folder), model__vocab_size=None)
  if tokenizer == "bytes":
    small_bytes = change(small_bytes, {"data.tokenizer": "characters"})
  plan = follow_advice(small_bytes)
  assert plan.data.tokenizer == TOKENIZERS[tokenizer]


def test_the_advice_on_a_tokenizer_holds_for_the_experiment_as_it_is(verse, tmp_path):
  folder = write(tmp_path / "there", draw_params(ODD), ODD, ByteTokenizer())
  marked = {
    "data.tokenizer": "gpt2",
    "data.mark_paragraphs": True,
    "data.path": str(verse),
    "train.init_from": str(folder),
  }
  plan = follow_advice(change(load_experiment("gpt2_shakespeare"), SMALL | marked))
  assert plan.data.tokenizer == ByteTokenizer()


def test_fewer_positions_than_the_training_window_can_be_had_by_following_the_advice(
  verse, tmp_path
):
  config = dataclasses.replace(ODD, max_seq_len=12)
  folder = write(tmp_path / "there", draw_params(config), config, ByteTokenizer())
  plan = follow_advice(small(verse, train__init_from=str(folder)), rounds=2)
  assert plan.experiment.model.max_seq_len == plan.experiment.data.seq_len == 12


def test_a_vocabulary_smaller_than_the_tokenizers_is_not_advised(verse, tmp_path):
  """model.vocab_size=200 would be refused for a tokenizer of 256: the advice must not go round in
  circles.
  """
  config = dataclasses.replace(ODD, vocab_size=200)
  folder = write(tmp_path / "there", draw_params(config), config, ByteTokenizer())
  with pytest.raises(UserError) as error:
    plan_run(small(verse, train__init_from=str(folder), model__vocab_size=None))
  assert "200" in str(error.value) and "256" in str(error.value)
  assert "model.vocab_size" not in advice(error.value)


def fake_weights(size, *, file_alone=False):
  """Weights of GPT-2's sizes that nobody reads."""
  sizes = GPT2_SIZES[size] | {"vocab_size": 50257, "max_seq_len": 1024}
  shapes = gpt2_shapes(make_gpt2_config(**sizes))
  model = GPT2_SETTINGS | {"activation": "gelu_tanh", "tied_head": True} | sizes
  if file_alone:
    model = {
      name: value for name, value in model.items() if name not in ("num_heads", "activation")
    }
  return Weights("the weights", model, shapes, read=None)


def resolved(changes=None):
  return resolve(change(load_experiment("gpt2_shakespeare"), changes or {}), 50257).model


@pytest.mark.parametrize("alone", [False, True], ids=["folder", "file by itself"])
@pytest.mark.parametrize("size", GPT2_SIZES)
def test_gpt2s_sizes_are_advised_by_their_name(size, alone):
  """A file by itself says nothing about heads: naming its widths only would lead to the wrong
  number.
  """
  given = fake_weights(size, file_alone=alone)
  check_weights_settings(given, resolved({"model.size": size}))
  other = resolved({"model.size": "d24" if size == "d12" else "d12"})
  with pytest.raises(UserError, match=f"Try --set model.size={size}$"):
    check_weights_settings(given, other)
  with pytest.raises(UserError) as error:
    check_weights_settings(given, dataclasses.replace(other, tied_head=False, max_seq_len=2000))
  assert advice(error.value) == {
    "model.size": size,
    "model.tied_head": True,
    "model.max_seq_len": 1024,
  }


@pytest.mark.parametrize(
  ("size", "count"),
  [("d12", 124_439_808), ("d24", 354_823_168), ("d36", 774_030_080), ("d48", 1_557_611_200)],
)
def test_gpt2s_sizes_have_their_numbers_of_parameters(size, count, capsys):
  assert count_params(resolved({"model.size": size})) == count
  assert (
    run.main(["--experiment", "gpt2_shakespeare", "--set", f"model.size={size}", "--print-config"])
    == 0
  )
  first = capsys.readouterr().out.splitlines()[0]
  assert f"{count:,} parameters" in first and f"model.size={size}" in first


# --- Runs and the command ---


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  """A run folder with checkpoints of 2 and 4 updates, as if it had been trained: that would take
  seconds to compile.
  """
  folder = tmp_path_factory.mktemp("runs")
  (folder / "verse.txt").write_text(VERSE, encoding="utf-8")
  plan = plan_run(small(folder / "verse.txt", train__steps=4))
  text, tokenizer = plan.data.text, plan.data.tokenizer
  data = {"kind": text.kind, "location": text.location, "sha256": text.sha256}
  files = RunFiles("small", plan.experiment, tokenizer, data, None)
  write_run_files(folder / "run", files)
  with checkpoint.open_checkpoints(folder / "run") as manager:
    for step in (2, 4):
      params = jax.tree.map(jax.numpy.asarray, draw_params(plan.experiment.model, seed=step))
      checkpoint.save_checkpoint(
        manager,
        TrainState(step=jax.numpy.int32(step), params=params, opt_state={"lr": jax.numpy.zeros(1)}),
      )
  return folder / "run"


def call(capsys, main, *args):
  status = cli.guard(lambda: main([str(a) for a in args]))
  out, err = capsys.readouterr()
  return status, out, err


def test_the_command_exports_the_step_that_is_asked_for(two_steps, tmp_path, capsys):
  for step, options in ((4, []), (2, ["--step", "2"])):
    out = tmp_path / "new" / f"{step}"
    status, said, err = call(
      capsys, export.main, "--run", two_steps, "--format", "hf", "--out", out, *options
    )
    assert status == 0 and err == "" and f"at step {step}" in said and "model.safetensors" in said
    there = open_run(two_steps, step)
    assert_same_bits(load(out, there.experiment.model), there.params)
  weights_2, weights_4 = ((tmp_path / "new" / n / "model.safetensors").read_bytes() for n in "24")
  assert weights_2 != weights_4
  assert {p.name for p in tmp_path.rglob("*") if p.name.startswith(".")} == set()
  status, _, err = call(
    capsys,
    export.main,
    "--run",
    two_steps,
    "--format",
    "hf",
    "--out",
    tmp_path / "3",
    "--step",
    "3",
  )
  assert (
    status == 2 and "no checkpoint of step 3; it has 2, 4" in err and not (tmp_path / "3").exists()
  )


def test_a_run_opens_in_transformers_and_continues_a_prompt_as_here(two_steps, tmp_path, capsys):
  """What the command says: GPT2LMHeadModel.from_pretrained(PATH) and AutoTokenizer."""
  status, said, _ = call(
    capsys, export.main, "--run", two_steps, "--format", "hf", "--out", tmp_path / "out"
  )
  assert status == 0 and f"GPT2LMHeadModel.from_pretrained('{tmp_path / 'out'}')" in said
  model, there = open_theirs(tmp_path / "out"), open_run(two_steps)
  assert_same_logits(model, there.params, there.experiment.model)
  tokenizer = needs_transformers().AutoTokenizer.from_pretrained(tmp_path / "out")
  given = tokenizer("To be", return_tensors="pt")
  theirs = tokenizer.decode(model.generate(**given, do_sample=False, max_new_tokens=20)[0])
  sample = SampleConfig(prompt="To be", num=1, temperature=0.0, max_tokens=20)
  assert generate_texts(
    there.params, there.tokenizer, jax.random.key(0), there.experiment, sample
  ) == [theirs]


@pytest.mark.slow
def test_a_run_begins_with_the_bits_of_the_export_and_exports_them_again(
  two_steps, tmp_path, capsys
):
  folder = tmp_path / "out"
  assert call(capsys, export.main, "--run", two_steps, "--format", "hf", "--out", folder)[0] == 0
  experiment = read_run_files(two_steps).experiment
  changes = {
    "train.init_from": str(folder),
    "train.steps": 0,
    "train.save_every": None,
    "optimizer.decay_steps": None,
  }
  plan = plan_run(change(experiment, changes), workdir=tmp_path / "run")
  train.train_run(plan)
  assert_same_bits(open_run(tmp_path / "run").params, open_run(two_steps).params)
  assert (
    call(
      capsys, export.main, "--run", tmp_path / "run", "--format", "hf", "--out", tmp_path / "again"
    )[0]
    == 0
  )
  assert {p.name for p in (tmp_path / "again").iterdir()} == {p.name for p in folder.iterdir()}
  for path in folder.iterdir():
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_command_rounds_to_bfloat16(two_steps, tmp_path, capsys):
  out = tmp_path / "out"
  status, said, _ = call(
    capsys,
    export.main,
    "--run",
    two_steps,
    "--format",
    "hf",
    "--out",
    out,
    "--dtype",
    "bfloat16",
    "--step",
    "2",
  )
  assert status == 0 and "bfloat16" in said
  wanted = flat(open_run(two_steps, 2).params)["blocks/w_down"]
  there = read_safetensors(out / "model.safetensors")
  assert np.array_equal(there["transformer.h.2.mlp.c_proj.weight"], round_to_bfloat16(wanted[2]))


def test_nothing_is_overwritten_and_nothing_is_left_half_done(
  two_steps, tmp_path, capsys, monkeypatch
):
  taken, file = tmp_path / "taken", tmp_path / "file"
  taken.mkdir()
  (taken / "thesis.txt").write_text("mine")
  file.write_text("mine")
  for out in (taken, file):
    status, _, err = call(capsys, export.main, "--run", two_steps, "--format", "hf", "--out", out)
    assert status == 2 and f"{out} is there already" in err and err.count("\n") == 1
  assert [p.name for p in taken.iterdir()] == ["thesis.txt"] and file.read_text() == "mine"

  def full(*args):
    raise OSError(28, "No space left on device", "model.safetensors")

  monkeypatch.setattr(hugging_face, "write_safetensors", full)
  (tmp_path / "empty").mkdir()
  before = sorted(tmp_path.iterdir())
  for out in (tmp_path / "out", tmp_path / "empty"):
    status, _, err = call(capsys, export.main, "--run", two_steps, "--format", "hf", "--out", out)
    assert status == 1 and "No space left" in err
  assert sorted(tmp_path.iterdir()) == before
  monkeypatch.undo()
  assert (
    call(capsys, export.main, "--run", two_steps, "--format", "hf", "--out", tmp_path / "empty")[0]
    == 0
  )


@pytest.mark.parametrize("out", [".", "./", "~nobody-of-this-name/out"])
def test_places_without_a_name_or_an_owner(out, two_steps, tmp_path, capsys, monkeypatch):
  """The empty folder one is in, and the home of nobody: written or refused, in one line."""
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  status, _, err = call(capsys, export.main, "--run", two_steps, "--format", "hf", "--out", out)
  assert status in (0, 2) and err.count("\n") <= 1
  assert status == 2 or any(tmp_path.rglob("config.json"))


def test_a_run_that_the_format_cannot_hold_is_refused_before_any_array_is_read(
  tmp_path, capsys, monkeypatch
):
  (tmp_path / "words.txt").write_text("emma\nava\nio\n" * 9)
  experiment = change(
    load_experiment("names"), {"data.path": str(tmp_path / "words.txt"), "train.steps": 0}
  )
  plan = plan_run(experiment, workdir=tmp_path / "run")
  files = RunFiles(
    "names", plan.experiment, plan.data.tokenizer, {"kind": "", "location": "", "sha256": ""}, None
  )
  write_run_files(tmp_path / "run", files)
  monkeypatch.setattr(open_lib, "open_run", None)
  status, _, err = call(
    capsys, export.main, "--run", tmp_path / "run", "--format", "hf", "--out", tmp_path / "out"
  )
  assert status == 2 and "model.norm=rms (it has layer)" in err and err.count("\n") == 1
  assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_neither_transformers_nor_torch_is_needed(two_steps, tmp_path):
  """Export, and a run that begins with it, where neither can be imported."""
  out = tmp_path / "out"
  code = f"""
import pathlib, sys
missing = dict.fromkeys(["torch", "transformers", "huggingface_hub"])
sys.modules.update(missing)
from jgpt import export, plan, train
from jgpt.config.settings import change
from jgpt.runs import checkpoint, folder
assert export.main(["--run", {str(two_steps)!r}, "--format", "hf", "--out", {str(out)!r}]) == 0
experiment = folder.read_run_files(pathlib.Path({str(two_steps)!r})).experiment
planned = plan.plan_run(change(experiment, {{"train.init_from": {str(out)!r}}}))
assert planned.initial.location == {str(out)!r}
assert not any(sys.modules.get(name) for name in missing)
"""
  env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env
  )
  assert done.returncode == 0, done.stderr


def test_without_safetensors_the_extra_is_named(two_steps, tmp_path, capsys, monkeypatch):
  folder = write(tmp_path / "there", draw_params(ODD), ODD)
  monkeypatch.setitem(sys.modules, "safetensors", None)
  with pytest.raises(UserError, match=r"pip install safetensors.*with its extra hf"):
    open_weights(str(folder))
  status, _, err = call(
    capsys, export.main, "--run", two_steps, "--format", "hf", "--out", tmp_path / "out"
  )
  assert status == 2 and "pip install safetensors" in err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_gpt2s_own_tokenizer_goes_along(tmp_path):
  files = Path(os.environ.get("JGPT_DATA_DIR", "nowhere"), "gpt2")
  if not (files / "vocab.bpe").exists():
    pytest.skip("needs encoder.json and vocab.bpe in $JGPT_DATA_DIR/gpt2")
  tokenizer = make_gpt2_tokenizer(
    (files / "encoder.json").read_bytes(), (files / "vocab.bpe").read_bytes()
  )
  config = dataclasses.replace(
    ODD, vocab_size=50257, d_model=4, d_ff=4, num_layers=1, max_seq_len=4
  )
  folder = write(tmp_path / "out", draw_params(config), config, tokenizer)
  assert open_weights(str(folder)).tokenizer == tokenizer
  theirs = needs_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
  assert theirs("Hello world").input_ids == [15496, 995] and theirs.eos_token_id == 50256
  assert open_theirs(folder).config.eos_token_id == 50256


def test_characters_that_begin_with_bos_end_with_it_there_too(tmp_path):
  """A text ends at BOS in both programs: at the same token."""
  tokenizer = CharTokenizer("abcdefgh", bos=True)
  config = dataclasses.replace(ODD, vocab_size=9, num_layers=1)
  params = next(
    p
    for p in (draw_params(config, seed=s) for s in range(40))
    if 3 < len(greedy(p, config, tokenizer)) < 30
  )
  model = open_theirs(write(tmp_path / "out", params, config, tokenizer))
  theirs = needs_transformers().AutoTokenizer.from_pretrained(tmp_path / "out")
  given = theirs("a", return_tensors="pt")
  assert given.input_ids.tolist() == [[8, 0]]
  ids = model.generate(**given, do_sample=False, max_new_tokens=40, pad_token_id=8)[0]
  assert (
    theirs.decode(ids, skip_special_tokens=True) == greedy(params, config, tokenizer)
    and ids[-1] == 8
  )


def greedy(params, config, tokenizer):
  sample = SampleConfig(prompt="a", num=1, temperature=0.0, max_tokens=40)
  experiment = dataclasses.replace(load_experiment("gpt2_shakespeare"), model=config)
  return generate_texts(params, tokenizer, jax.random.key(0), experiment, sample)[0]
