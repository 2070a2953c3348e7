"""llm.c's files: what jgpt writes is read by an independent reader, and what that writes is read by
jgpt.

The oracle is reference/llmc_files.py. Which number stands where is written out here by indices, in
llm.c's letters: L layers, C = d_model, H = head size; matrices are (out, in).
"""

import dataclasses
import errno
import functools
import hashlib
import itertools
import struct
import tracemalloc

import jax
import numpy as np
import pytest
from equivalence import QUICK, compare
from hypothesis import given
from hypothesis import strategies as st
from reference import llmc_files, numpy_gpt
from switches import SYSTEMS, draw_params, make_experiment, make_model, to_oracle

from jgpt import batches, cli, export
from jgpt.config import OptimizerConfig
from jgpt.config.settings import change
from jgpt.data.corpus import find_data
from jgpt.errors import UserError
from jgpt.model import apply
from jgpt.runs import checkpoint
from jgpt.runs.folder import RunFiles, write_run_files
from jgpt.runs.open import Run
from jgpt.step import begin_state
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer
from jgpt.weights import llmc
from jgpt.weights.gpt2 import build_params, check_weights_settings, to_gpt2
from jgpt.weights.initial import open_weights

SIZES = {"max_seq_len": 10, "num_layers": 3, "num_heads": 4, "d_model": 36, "d_ff": 144}
MODELS = {
  "257 ids": make_model(SYSTEMS["GPT-2"], **SIZES, vocab_size=257),
  "1000 ids, 1024 rows in memory": make_model(
    SYSTEMS["GPT-2"], **SIZES, vocab_size=1000, vocab_multiple=64
  ),
  "128 ids, 200 rows in memory, one head": make_model(
    SYSTEMS["GPT-2"],
    **SIZES | {"num_heads": 1, "d_model": 5, "d_ff": 20},
    vocab_size=128,
    vocab_multiple=100,
  ),
}
SMALL = make_model(SYSTEMS["GPT-2"], vocab_size=11, d_ff=32)
# Neither biases nor those of norms, and an activation that llm.c has.
WITHOUT_BIASES = make_model(SYSTEMS["nanoGPT"], vocab_size=11, d_ff=32, activation="gelu_tanh")
OPTIMIZER = OptimizerConfig(peak_lr=1e-3, schedule="constant", b1=0.9, b2=0.99, eps=1e-8)
VERSIONS = {"float32": 3, "bfloat16": 5}


def draw(config):
  """Random parameters, float32, gains and biases too."""
  return jax.tree.map(lambda x: x.astype(np.float32), draw_params(config))


def make_run(config, tmp_path, tokenizer=None, params=None, step=7, **data):
  experiment = make_experiment(config, OPTIMIZER, batch_size=2)
  experiment = change(experiment, {f"data.{name}": value for name, value in data.items()})
  return Run(
    params or draw(config), tokenizer or ByteTokenizer(), experiment, step, tmp_path / "run"
  )


def arrange(params, config):
  """llm.c's tensors of jgpt's parameters, float32 and without padding, each number put by its
  indices.
  """
  blocks = params["blocks"]
  L, N, C, H = config.num_layers, config.num_heads, config.d_model, config.head_dim
  tensors = {"wte": params["tok_embed"][: config.vocab_size], "wpe": params["pos_embed"]}
  tensors["qkvw"] = np.zeros((L, 3 * C, C), np.float32)
  tensors["qkvb"] = np.zeros((L, 3 * C), np.float32)
  tensors["attprojw"] = np.zeros((L, C, C), np.float32)
  for layer, n, h in itertools.product(range(L), range(N), range(H)):
    for j in range(3):
      tensors["qkvw"][layer, j * C + n * H + h, :] = blocks["w_qkv"][layer, :, j, n, h]
      if "b_qkv" in blocks:
        tensors["qkvb"][layer, j * C + n * H + h] = blocks["b_qkv"][layer, j, n, h]
    tensors["attprojw"][layer, :, n * H + h] = blocks["w_out"][layer, n, h, :]
  tensors["fcw"] = np.stack([blocks["w_up"][layer].T for layer in range(L)])
  tensors["fcprojw"] = np.stack([blocks["w_down"][layer].T for layer in range(L)])
  for theirs, ours, size in (
    *(("ln1w", "norm_attn_gain", C), ("ln1b", "norm_attn_bias", C), ("ln2w", "norm_mlp_gain", C)),
    *(
      ("ln2b", "norm_mlp_bias", C),
      ("attprojb", "b_out", C),
      ("fcb", "b_up", 4 * C),
      ("fcprojb", "b_down", C),
    ),
  ):
    tensors[theirs] = blocks.get(ours, np.zeros((L, size), np.float32))
  tensors["lnfw"], tensors["lnfb"] = (
    params["norm_final_gain"],
    params.get("norm_final_bias", np.zeros(C, np.float32)),
  )
  return tensors


def pad(tensors, padded):
  wte = tensors["wte"]
  return tensors | {
    "wte": np.concatenate([wte, np.zeros((padded - len(wte), wte.shape[1]), np.float32)])
  }


def bits(array):
  return np.ascontiguousarray(array, np.float32).view(np.uint32)


def check_equal(expected, got):
  assert expected.keys() == got.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(bits(got[name]), bits(value), err_msg=name)


def check_refused(path, *words):
  """The file is refused in one line that names it and has the words."""
  with pytest.raises(UserError) as refusal:
    open_weights(str(path))
  message = str(refusal.value)
  assert "\n" not in message and str(path) in message and len(message) < 500
  for word in words:
    assert word in message


def read_params(path, config):
  found = open_weights(str(path))
  check_weights_settings(found, config)
  return build_params(found, config)


# --- Weights that jgpt writes ---


@pytest.mark.parametrize("dtype", VERSIONS)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_number_stands_where_llmc_looks_for_it(config, dtype, tmp_path):
  run, out = make_run(config, tmp_path, CharTokenizer("ab", bos=True)), tmp_path / "m.bin"
  assert export.export_llmc(run, out, dtype) == [out, tmp_path / "m_tokenizer.bin"]
  header, tensors = llmc_files.read_weights(out)
  padded = {257: 384, 1000: 1024, 128: 128}[config.vocab_size]
  names = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "d_model")
  assert header == {"version": VERSIONS[dtype], "padded_vocab_size": padded} | {
    n: getattr(config, n) for n in names
  }
  assert list(tensors) == list(llmc_files.tensor_shapes(header))
  expected = pad(arrange(run.params, config), padded)
  if dtype == "bfloat16":
    rounded = {
      name: llmc_files.round_to_bfloat16(np.asarray(x, np.float32)) for name, x in expected.items()
    }
    expected = {name: llmc_files.bfloat16_to_float32(x) for name, x in rounded.items()}
  check_equal({name: expected[name] for name in tensors}, tensors)


@pytest.mark.parametrize(
  "config", [MODELS["257 ids"], WITHOUT_BIASES], ids=["all biases", "no biases"]
)
def test_the_file_is_the_same_function(config, tmp_path):
  """Computed from the file by the oracle, the logits are those of jgpt's model."""
  params, tokens_BT = (
    draw(config),
    np.random.default_rng(0).integers(0, config.vocab_size, (2, config.max_seq_len)),
  )
  llmc.write_weights(tmp_path / "m.bin", params, config, "float32")
  header, tensors = llmc_files.read_weights(tmp_path / "m.bin")
  logits_BTV = jax.jit(lambda p, t: apply(p, t, config), compiler_options=QUICK)(
    params, tokens_BT.astype(np.int32)
  )
  expected = llmc_files.forward(tensors, header, tokens_BT)
  compare(
    "llm.c's file, logits",
    {"logits": expected},
    {"logits": logits_BTV[..., : config.vocab_size]},
    1e-5,
  )


def test_bfloat16_is_rounded_to_nearest_ties_to_even(tmp_path):
  ties = np.array(
    [0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0xBF808000, 0x00008000, 0x80000000, 0x7F7F7FFF]
  )
  expected = np.array([0x3F80, 0x3F82, 0x3F81, 0x3F81, 0xBF80, 0x0000, 0x8000, 0x7F7F])
  params = draw(SMALL)
  params["norm_final_gain"] = ties.astype(np.uint32).view(np.float32)
  llmc.write_weights(tmp_path / "m.bin", params, SMALL, "bfloat16")
  content = (tmp_path / "m.bin").read_bytes()
  np.testing.assert_array_equal(
    np.frombuffer(content[-32:-16], "<u2"), expected
  )  # before the 8 of the last bias
  _, tensors = llmc_files.read_weights(tmp_path / "m.bin")
  np.testing.assert_array_equal(bits(tensors["lnfw"]) >> 16, expected)


def test_models_without_biases_get_zeros(tmp_path):
  params = draw(WITHOUT_BIASES)
  llmc.write_weights(tmp_path / "m.bin", params, WITHOUT_BIASES, "float32")
  _, tensors = llmc_files.read_weights(tmp_path / "m.bin")
  check_equal({name: pad(arrange(params, WITHOUT_BIASES), 128)[name] for name in tensors}, tensors)
  for name in ("ln1b", "qkvb", "attprojb", "ln2b", "fcb", "fcprojb", "lnfb"):
    assert not tensors[name].any(), name


def test_the_tokenizer_is_beside_the_weights(tmp_path):
  run = make_run(
    make_model(SYSTEMS["GPT-2"], vocab_size=6, d_ff=32), tmp_path, CharTokenizer("\nabé", bos=True)
  )
  export.export_llmc(run, tmp_path / "gpt2_124M.bin", "float32")
  tokens, first = llmc_files.read_tokenizer(tmp_path / "gpt2_124M_tokenizer.bin")
  assert (
    tokens[:4] == [b"\n", b"a", b"b", "é".encode()]
    and len(tokens) == 6
    and tokens[first] == b"<|bos|>"
  )


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"norm": "rms"}, ["model.norm=rms"]),
    ({"norm": "rms", "norm_embed": True}, ["model.norm=rms", "model.norm_embed=true"]),
    ({"norm_final": False}, ["model.norm_final=false"]),
    ({"positions": "sinusoidal"}, ["model.positions=sinusoidal"]),
    ({"activation": "gelu_erf"}, ["model.activation=gelu_erf"]),
    ({"activation": "relu", "d_ff": 24}, ["model.activation=relu", "model.d_ff=24 (it has 32)"]),
    ({"tied_head": False}, ["model.tied_head=false"]),
    ({"d_ff": 31}, ["model.d_ff=31 (it has 32)"]),
    ({"scale_embed": True}, ["model.scale_embed=true"]),
  ],
)
def test_models_that_llmc_cannot_hold_are_refused_by_their_settings(changes, named, tmp_path):
  config = dataclasses.replace(SMALL, **changes)
  with pytest.raises(UserError, match=r"llm\.c cannot hold this model") as refusal:
    export.export_llmc(
      make_run(config, tmp_path, CharTokenizer("ab", bos=False)), tmp_path / "m.bin", "float32"
    )
  message = str(refusal.value)
  assert "\n" not in message and message.count("model.") == len(named)
  for name in named:
    assert name in message
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  "changes",
  [{"dropout": 0.1, "dropout_places": ("mlp_out",)}, {"biases": "mlp"}, {"init_std": 9.0}],
)
def test_what_llmc_need_not_know_is_no_reason_to_refuse(changes):
  llmc.check_llmc_model(dataclasses.replace(SMALL, **changes))


# --- Weights that jgpt reads ---


def write_drawn(path, version=3, seed=1, **sizes):
  """Has the oracle write a file of random weights.

  Returns its header and tensors, wte with padding.
  """
  header = {
    "max_seq_len": 10,
    "vocab_size": 257,
    "num_layers": 3,
    "num_heads": 4,
    "d_model": 36,
  } | sizes
  header = {"padded_vocab_size": -(-header["vocab_size"] // 128) * 128} | header
  rng = np.random.default_rng(seed)
  tensors = {
    n: rng.normal(size=s).astype(np.float32) for n, s in llmc_files.tensor_shapes(header).items()
  }
  tensors["wte"][header["vocab_size"] :] = 0
  llmc_files.write_weights(path, header, tensors, version)
  return header, llmc_files.read_weights(path)[1]


@pytest.mark.parametrize("version", [3, 5])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_files_of_the_oracle_become_parameters_with_equal_bits(config, version, tmp_path):
  sizes = {name: getattr(config, name) for name in ("vocab_size", "num_heads", "d_model")}
  header, tensors = write_drawn(tmp_path / "m.bin", version, **sizes)
  params = read_params(tmp_path / "m.bin", config)
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
  assert params["tok_embed"].shape == (config.padded_vocab_size, config.d_model)
  assert not params["tok_embed"][config.vocab_size :].any()
  arranged = pad(arrange(params, config), header["padded_vocab_size"])
  check_equal(tensors, {name: arranged[name] for name in tensors})


def test_padding_in_the_file_may_be_of_any_length(tmp_path):
  """Rows past the vocabulary are left out, whatever they hold."""
  header, tensors = write_drawn(
    tmp_path / "m.bin", vocab_size=11, num_heads=2, d_model=8, max_seq_len=8, num_layers=2
  )
  tensors["wte"] = np.concatenate([tensors["wte"][:11], np.full((2, 8), np.nan, np.float32)])
  llmc_files.write_weights(tmp_path / "odd.bin", header | {"padded_vocab_size": 13}, tensors, 3)
  a, b = (read_params(tmp_path / f"{name}.bin", SMALL) for name in ("m", "odd"))
  assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("dtype", VERSIONS)
@pytest.mark.parametrize("config", [*MODELS.values(), WITHOUT_BIASES], ids=[*MODELS, "no biases"])
def test_writing_reading_and_writing_gives_the_same_bytes(config, dtype, tmp_path):
  first, second = tmp_path / "a.bin", tmp_path / "b.bin"
  llmc.write_weights(first, draw(config), config, dtype)
  assert open_weights(str(first)).tokenizer is None
  llmc.write_weights(second, read_params(first, config), config, dtype)
  assert first.read_bytes() == second.read_bytes()


HEADER = [20240326, 3, 8, 11, 2, 2, 8, 128]
NUM_BYTES = 12416  # of a file with this header


def with_header(path, numbers, body=b""):
  path.write_bytes(struct.pack("<256i", *numbers, *[0] * (256 - len(numbers))) + body)
  return path


@pytest.mark.parametrize(
  ("place", "value", "word"),
  [
    (0, 20240520, "20240520, not 20240326"),
    (0, 0, "magic number is 0"),
    (1, 1, "version 1"),
    (1, 4, "3 (float32) and 5 (bfloat16)"),
    *((place, value, name) for value in (0, -1) for place, name in enumerate(llmc_files.SIZES, 2)),
    (5, 3, "'num_heads': 3"),
    (5, 16, "'num_heads': 16"),
    (7, 10, "padded_vocab_size=10"),
    *((place, 2**31 - 1, "") for place in range(2, 8)),
    *((place, 2**30, "") for place in range(2, 8)),
  ],
)
def test_damaged_headers_are_refused_without_memory(place, value, word, tmp_path):
  numbers = HEADER.copy()
  numbers[place] = value
  path = with_header(tmp_path / "m.bin", numbers, bytes(5000))
  tracemalloc.start()
  try:
    check_refused(path, word)
    assert tracemalloc.get_traced_memory()[1] < 2**20
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize("d_model", [2**29, 2**31 - 1])
def test_a_width_whose_matrices_no_model_has_names_the_file(d_model, tmp_path):
  check_refused(
    with_header(tmp_path / "m.bin", [*HEADER[:5], 1, d_model, 128]), f"{d_model}", "d_model"
  )


def test_files_of_the_wrong_length_are_refused(tmp_path):
  path = tmp_path / "m.bin"
  write_drawn(path, vocab_size=11, num_heads=2, d_model=8, max_seq_len=8, num_layers=2)
  content = path.read_bytes()
  assert open_weights(str(path)).model["d_model"] == 8
  for damaged in (content[:-1], content[:-4], content + b"\0", content + content, content[:1024]):
    path.write_bytes(damaged)
    check_refused(path, f"{len(damaged):,} bytes", f"{len(content):,}")
  for damaged in (b"", content[:1], content[:1023]):
    path.write_bytes(damaged)
    check_refused(path, f"{len(damaged)} bytes", "1024")


def test_a_version_that_the_size_contradicts_is_refused(tmp_path):
  """The one field by which the numbers would be taken for others."""
  path = tmp_path / "m.bin"
  for version, other in ((3, 5), (5, 3)):
    write_drawn(path, version, vocab_size=11, num_heads=2, d_model=8)
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<i", other)
    path.write_bytes(content)
    check_refused(path, "bytes")


@pytest.mark.parametrize("version", [3, 5])
@pytest.mark.parametrize("name", ["wte", "qkvw", "lnfb"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(name, value, version, tmp_path):
  header, tensors = write_drawn(
    tmp_path / "m.bin", vocab_size=11, num_heads=2, d_model=8, max_seq_len=8, num_layers=2
  )
  array = tensors[name].copy()
  array[(1,) * array.ndim] = value
  llmc_files.write_weights(tmp_path / "m.bin", header, tensors | {name: array}, version)
  ours = {"wte": "tok_embed[1, 1]", "qkvw": "blocks/w_qkv[1, 1, 1]", "lnfb": "norm_final_bias[1]"}[
    name
  ]
  with pytest.raises(UserError, match="damaged") as refusal:
    read_params(tmp_path / "m.bin", SMALL)
  message = str(refusal.value)
  assert (
    str(tmp_path / "m.bin") in message
    and ours in message
    and f"is {value}" in message
    and "\n" not in message
  )


def test_other_files_of_llmc_are_no_weights(tmp_path):
  run = make_run(SMALL, tmp_path, CharTokenizer("ab", bos=True))
  export.export_llmc(run, tmp_path / "m.bin", "float32")
  check_refused(tmp_path / "m_tokenizer.bin", "20240328, not 20240326")
  tokens = with_header(
    tmp_path / "tokens.bin", [20240520, 1, 600], np.arange(600, dtype="<u2").tobytes()
  )
  check_refused(tokens, "20240520, not 20240326")


@pytest.mark.parametrize(
  "content", [b"PK\x03\x04" + bytes(2000), b"\x80\x02}q\x00." + bytes(2000), b"PK\x03\x04"]
)
def test_a_pickle_by_the_name_of_weights_is_refused_as_one(content, tmp_path):
  """pytorch_model.bin, as older folders of Transformers have it."""
  (tmp_path / "pytorch_model.bin").write_bytes(content)
  check_refused(tmp_path / "pytorch_model.bin", "jgpt reads no pickles", "writes safetensors")


INTERESTING = st.sampled_from(
  [0, 1, 2, 3, 4, 8, 11, 128, -1, -(2**31), 2**31 - 1, 2**16, 2**29, 20240326]
) | st.integers(-(2**31), 2**31 - 1)


@given(
  numbers=st.lists(st.tuples(st.integers(0, 7), INTERESTING), max_size=4),
  rest=st.integers(-1, 255).flatmap(lambda n: st.tuples(st.just(n), INTERESTING)),
  length=st.integers(0, 13000)
  | st.sampled_from([1024 + (NUM_BYTES - 1024) // 2, NUM_BYTES, NUM_BYTES]),
)
def test_any_header_is_weights_or_a_user_error(numbers, rest, length, tmp_path_factory):
  header = HEADER + [0] * 248
  for place, value in [*numbers, rest] if rest[0] > 7 else numbers:
    header[place] = value
  path = tmp_path_factory.getbasetemp() / "any.bin"
  path.write_bytes((struct.pack("<256i", *header) + bytes(NUM_BYTES - 1024))[:length])
  try:
    found = open_weights(str(path))
  except UserError as error:
    assert "\n" not in str(error) and str(path) in str(error)
  else:
    assert not build_params(found, dataclasses.replace(SMALL, **found.model))["tok_embed"].any()


def test_the_file_of_the_fuzz_can_be_weights(tmp_path):
  """The length that it is cut at is that of a model: the fuzz reaches both ends."""
  header = dict(zip(llmc_files.SIZES, HEADER[2:], strict=True))
  shapes = llmc_files.tensor_shapes(header)
  tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  llmc_files.write_weights(tmp_path / "m.bin", header, tensors, 3)
  assert (tmp_path / "m.bin").stat().st_size == NUM_BYTES


# --- The debug state ---


@pytest.fixture
def quick(monkeypatch):
  """What runs for milliseconds is not compiled for seconds."""
  monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "text.txt"
  path.write_bytes(
    np.random.default_rng(4).integers(32, 127, 90, np.uint8).tobytes()
  )  # 90 tokens: bytes of ASCII
  return path


def sequential_batch(tokens, step, batch_size, seq_len):
  """llm.c's loader: the next batch_size * seq_len tokens, from the beginning again where there are
  not as many left.
  """
  stride = batch_size * seq_len
  begin = step % ((len(tokens) - 1) // stride) * stride
  windows = [tokens[begin + row * seq_len :][: seq_len + 1] for row in range(batch_size)]
  return np.array([w[:-1] for w in windows]), np.array([w[1:] for w in windows])


def split_heads(grads):
  """Queries, keys and values by themselves.

  Apart from them the keys' biases, on which the loss does not depend.
  """
  parts = {name: x for name, x in grads.items() if not name.startswith("qkv")}
  for kind in ("qkvw", "qkvb"):
    parts |= {
      f"{kind}.{part}": x for part, x in zip("qkv", np.split(grads[kind], 3, axis=1), strict=True)
    }
  return parts, parts.pop("qkvb.k")


def independent(params, config, inputs_BT, targets_BT):
  """Logits, loss and gradients by the NumPy GPT, whose matrices are (in, out), as llm.c's
  tensors.
  """
  flat, weights_BT = to_oracle(params, config), np.ones(inputs_BT.shape)
  loss, grads = numpy_gpt.loss_and_gradients(flat, inputs_BT, targets_BT, weights_BT, config)
  names = {
    "ln_1": "ln1",
    "attn.c_attn": "qkv",
    "attn.c_proj": "attproj",
    "ln_2": "ln2",
    "mlp.c_fc": "fc",
  }
  names |= {"mlp.c_proj": "fcproj"}
  tensors = {"wte": grads["wte"], "wpe": grads["wpe"], "lnfw": grads["ln_f.weight"]}
  tensors["lnfb"] = grads.get("ln_f.bias", np.zeros(config.d_model))
  for theirs, ours in names.items():
    layers = [grads[f"h.{i}.{theirs}.weight"] for i in range(config.num_layers)]
    tensors[f"{ours}w"] = np.stack([x.T for x in layers])  # of a gain the same
    lost = np.zeros(layers[0].shape[-1])
    tensors[f"{ours}b"] = np.stack(
      [grads.get(f"h.{i}.{theirs}.bias", lost) for i in range(config.num_layers)]
    )
  return numpy_gpt.forward(flat, inputs_BT, config), loss, tensors


@pytest.mark.parametrize(
  ("config", "batch_size"),
  [
    (make_model(SYSTEMS["GPT-2"], **SIZES, vocab_size=257, vocab_multiple=100), 3),
    (make_model(SYSTEMS["nanoGPT"], vocab_size=256, d_ff=32, activation="gelu_tanh"), 2),
  ],
  ids=["all biases", "no biases"],
)
@pytest.mark.usefixtures("quick")
def test_the_state_is_what_an_independent_gpt_computes(config, batch_size, text, tmp_path):
  run = make_run(
    config,
    tmp_path,
    path=str(text),
    batching="sequential",
    batch_size=batch_size,
    seq_len=7,
    step=11,
  )
  assert run.step == 11
  data = find_data(run.experiment.data, seed=0)
  out = tmp_path / "m_debug_state.bin"
  assert export.export_llmc_state(run, data, out) == [out]
  llmc.write_weights(tmp_path / "m.bin", run.params, config, "float32")
  header, tensors = llmc_files.read_weights(tmp_path / "m.bin")
  state = llmc_files.read_state(out, header)

  inputs_BT, targets_BT = sequential_batch(list(text.read_bytes()), 11, batch_size, 7)
  np.testing.assert_array_equal(state["inputs"], inputs_BT)
  np.testing.assert_array_equal(state["targets"], targets_BT)
  logits, loss, grads = independent(run.params, config, inputs_BT, targets_BT)
  forward = llmc_files.forward(tensors, header, inputs_BT)
  found = {name: state[name] for name in ("logits", "loss")}
  compare("llm.c's debug state", {"logits": forward, "loss": loss}, found, 1e-5)
  compare("llm.c's debug state, NumPy", {"logits": logits, "loss": loss}, found, 1e-5)

  got = state["grads"]
  assert list(got) == list(tensors) and not got["wte"][config.vocab_size :].any()
  got["wte"] = got["wte"][: config.vocab_size]
  (expected, of_keys), (found, found_of_keys) = split_heads(grads), split_heads(got)
  zeros = {name for name, x in expected.items() if not x.any()}
  assert len(zeros) == (0 if config.biases == "all" else 8) and not any(
    found[name].any() for name in zeros
  )
  compare(
    "llm.c's debug state, gradients", expected, {name: found[name] for name in expected}, 1e-5
  )
  np.testing.assert_allclose(found_of_keys, of_keys, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("quick")
def test_the_batch_is_the_one_after_the_step(text, tmp_path):
  """Over an epoch each window once.

  The last batch of it, which is short, without the rows that weigh nothing.
  """
  run = make_run(SMALL, tmp_path, path=str(text), batching="epochs", batch_size=5, seq_len=7)
  data = find_data(run.experiment.data, seed=0)
  tokens = list(text.read_bytes())
  batches = [
    export.make_next_batch(run.experiment, data, step, jax.devices()[0]) for step in (3, 4, 5)
  ]  # the second epoch of 12 windows
  assert [b.inputs_BT.shape for b in batches] == [(5, 7), (5, 7), (2, 7)]
  seen = {
    (*i, *t[-1:])
    for b in batches
    for i, t in zip(b.inputs_BT.tolist(), b.targets_BT.tolist(), strict=True)
  }
  assert seen == {tuple(tokens[7 * n : 7 * n + 8]) for n in range(12)}
  assert all(np.all(b.weights_BT == 1) for b in batches)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("devices", [-1, 2])
def test_the_batch_of_tokens_that_are_read_from_the_disk(devices, tmp_path, monkeypatch):
  """Token files too large to be kept on a device.

  On however many the run was trained, the export is one's.
  """
  tokens = np.random.default_rng(6).integers(0, 256, 400).astype("<u2")
  with_header(tmp_path / "train.bin", [20240520, 1, 400], tokens.tobytes())
  run = make_run(
    SMALL,
    tmp_path,
    path=str(tmp_path / "train.bin"),
    batching="sequential",
    batch_size=2,
    seq_len=7,
  )
  monkeypatch.setattr("jgpt.data.corpus.RESIDENT_TOKENS", 10)
  experiment = change(run.experiment, {"mesh.data": devices})
  batch = export.make_next_batch(
    experiment, find_data(experiment.data, seed=0), 31, jax.devices()[0]
  )
  for got, expected in zip(batch, sequential_batch(list(tokens), 31, 2, 7), strict=False):
    np.testing.assert_array_equal(got, expected)


# --- The command ---


@pytest.fixture(scope="module")
def saved(text, tmp_path_factory):
  """The folder of a run at step 2 that reads random windows, with its parameters."""
  workdir, config = (
    tmp_path_factory.mktemp("runs") / "saved",
    dataclasses.replace(SMALL, vocab_size=256),
  )
  experiment = change(make_experiment(config, OPTIMIZER, seed=5), {"data.path": str(text)})
  data = {
    "kind": "path",
    "location": str(text),
    "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
  }
  write_run_files(workdir, RunFiles("saved", experiment, ByteTokenizer(), data))
  params = draw(config)
  state = begin_state(jax.tree.map(jax.numpy.asarray, params), experiment)
  with checkpoint.open_checkpoints(workdir) as manager:
    checkpoint.save_checkpoint(manager, state.replace(step=jax.numpy.int32(2)))
  return workdir, experiment, params


def call(capsys, *args):
  status = cli.guard(lambda: export.main([str(a) for a in args]))
  out, err = capsys.readouterr()
  return status, out, err


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_run_and_the_batch_that_it_trains_on_next(saved, tmp_path, capsys):
  workdir, experiment, params = saved
  status, out, err = call(
    capsys, "--run", workdir, "--format", "llmc", "--out", tmp_path / "a" / "gpt2_124M.bin"
  )
  assert (status, err) == (0, "") and "step 2, float32" in out
  state = tmp_path / "a" / "gpt2_124M_debug_state.bin"
  status, shown, err = call(capsys, "--run", workdir, "--format", "llmc-state", "--out", state)
  assert (status, err) == (0, "") and "test_gpt2.c" in shown
  names = ["gpt2_124M.bin", "gpt2_124M_debug_state.bin", "gpt2_124M_tokenizer.bin"]
  assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
  for name in names:
    path = tmp_path / "a" / name
    assert f"{path}  {path.stat().st_size:,} bytes" in (shown if "state" in name else out)

  header, tensors = llmc_files.read_weights(tmp_path / "a" / names[0])
  arranged = pad(arrange(params, experiment.model), 256)
  check_equal({name: arranged[name] for name in tensors}, tensors)
  found = llmc_files.read_state(state, header)
  corpus = find_data(experiment.data, experiment.train.seed).train
  assert experiment.train.seed == 5
  # As the training's own update 3.
  batch = batches.batch(jax.tree.map(jax.numpy.asarray, corpus), np.int32(2), experiment)
  np.testing.assert_array_equal(found["inputs"], batch.inputs_BT)
  np.testing.assert_array_equal(found["targets"], batch.targets_BT)
  logits = llmc_files.forward(tensors, header, found["inputs"])
  nats = (
    np.log(np.exp(logits).sum(-1))
    - np.take_along_axis(logits, found["targets"][..., None], -1)[..., 0]
  )
  assert found["loss"] == pytest.approx(nats.mean(), rel=1e-6)


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (
      ["--format", "llmc-state", "--out", "OUT/m.bin", "--dtype", "bfloat16"],
      ["llmc-state is float32", "--dtype"],
    ),
    (["--format", "llmc", "--out", "OUT/m"], ["must be a file ending in .bin", "--out OUT/m.bin"]),
    (
      ["--format", "llmc-state", "--out", "OUT/m.pt"],
      ["must be a file ending in .bin", "--out OUT/m.bin"],
    ),
    (["--format", "llmc", "--out", "."], ["--out ."]),
    (["--format", "llmc", "--out", "/"], ["--out /"]),
    (["--format", "llmc", "--out", "OUT/there.bin"], ["OUT/there.bin is there already"]),
    (["--format", "llmc-state", "--out", "OUT/there.bin"], ["OUT/there.bin is there already"]),
    (["--format", "llmc", "--out", "OUT/old.bin"], ["OUT/old_tokenizer.bin is there already"]),
    (["--format", "llmc", "--out", "OUT/m.bin", "--step", "1"], ["no checkpoint of step 1"]),
  ],
)
def test_what_the_command_cannot_do_leaves_nothing_behind(args, words, saved, tmp_path, capsys):
  for name in ("there.bin", "old_tokenizer.bin"):
    (tmp_path / name).write_bytes(b"mine")
  status, out, err = call(
    capsys, "--run", saved[0], *(a.replace("OUT", str(tmp_path)) for a in args)
  )
  assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
  for word in words:
    assert word.replace("OUT", str(tmp_path)) in err
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == dict.fromkeys(
    ("there.bin", "old_tokenizer.bin"), b"mine"
  )


@pytest.mark.parametrize("name", ["llmc", "llmc-state"])
def test_a_run_of_another_model_is_refused_before_its_arrays_are_read(name, tmp_path, capsys):
  experiment = make_experiment(dataclasses.replace(SMALL, norm="rms", vocab_size=256), OPTIMIZER)
  files = RunFiles("other", experiment, ByteTokenizer(), {"kind": "path", "sha256": "0" * 64})
  write_run_files(tmp_path / "run", files)
  status, _, err = call(
    capsys, "--run", tmp_path / "run", "--format", name, "--out", tmp_path / "m.bin"
  )
  assert status == 2 and err.count("\n") == 1 and "model.norm=rms" in err
  assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_documents_have_no_debug_state(tmp_path, capsys):
  config = dataclasses.replace(SMALL, vocab_size=3)
  experiment = change(make_experiment(config, OPTIMIZER), {"data.tokenizer": "characters"})
  experiment = change(experiment, {"data.batching": "documents"})
  files = RunFiles(
    "names", experiment, CharTokenizer("ab", bos=True), {"kind": "path", "sha256": "0" * 64}
  )
  write_run_files(tmp_path / "run", files)
  status, _, err = call(
    capsys, "--run", tmp_path / "run", "--format", "llmc-state", "--out", tmp_path / "m.bin"
  )
  assert status == 2 and err.count("\n") == 1 and "data.batching=documents" in err
  assert [p.name for p in tmp_path.iterdir()] == ["run"]


class FullDiskError(OSError):
  pass


def full_after(monkeypatch, num_tensors):
  """Makes writing fail after so many tensors; returns a list that gets an entry for each file."""
  right, seen = to_gpt2, []

  class Tensors(dict):
    def items(self):
      yield from list(super().items())[:num_tensors]
      raise FullDiskError(errno.ENOSPC, "No space left on device", "m.bin")

  monkeypatch.setattr(llmc, "to_gpt2", lambda *args: seen.append(1) or Tensors(right(*args)))
  return seen


@pytest.mark.parametrize("num_tensors", [0, 5])
def test_a_full_disk_leaves_no_file(num_tensors, tmp_path, monkeypatch):
  run = make_run(SMALL, tmp_path, CharTokenizer("ab", bos=True))
  seen = full_after(monkeypatch, num_tensors)
  out = tmp_path / "m.bin"
  with pytest.raises(FullDiskError):
    export.export_llmc(run, out, "float32")
  params, ids = draw(SMALL), np.zeros((2, 8), np.int32)
  logits = np.zeros((2, 8, 11), np.float32)
  with pytest.raises(FullDiskError):
    export.write_atomically(
      {out: lambda path: llmc.write_state(path, ids, ids, logits, 1.0, params, SMALL)}
    )
  assert len(seen) == 2 and not any(tmp_path.iterdir())


def test_a_full_disk_at_the_tokenizer_leaves_no_weights_alone(tmp_path, monkeypatch):
  """Else the same command again would be refused because of a file that it left itself."""
  run, out = make_run(SMALL, tmp_path, CharTokenizer("ab", bos=True)), tmp_path / "m.bin"

  class FullPath(type(out)):
    def write_bytes(self, content):
      raise FullDiskError(errno.ENOSPC, "No space left on device", str(self))

  monkeypatch.setattr(
    export, "tokenizer_path", lambda path: FullPath(path.with_name("m_tokenizer.bin"))
  )
  with pytest.raises(FullDiskError):
    export.export_llmc(run, out, "float32")
  assert not any(tmp_path.iterdir())


def test_an_export_that_was_killed_is_no_obstacle(tmp_path):
  run, out = make_run(SMALL, tmp_path, CharTokenizer("ab", bos=True)), tmp_path / "m.bin"
  (tmp_path / ".m.bin.tmp").write_bytes(bytes(10**5))
  export.export_llmc(run, out, "bfloat16")
  llmc_files.read_weights(out)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "m_tokenizer.bin"]
