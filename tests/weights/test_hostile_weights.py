"""Weights made to do harm, or damaged: refused in one line that names the file, nothing executed,
nothing large allocated.

What is wrong with a file is made by hand, byte by byte; the valid file that each begins from is
checked to be taken.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jgpt import cli, run
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, format_value
from jgpt.errors import UserError
from jgpt.params import walk
from jgpt.plan import plan_run
from jgpt.text.tokenizer import ByteTokenizer
from jgpt.text.tokenizer_files import hugging_face_files
from jgpt.weights.initial import load_params, open_weights

V, S, D, F, L = 257, 6, 4, 8, 3  # vocabulary, positions, width, MLP, layers
FITTING = {
  "data.tokenizer": "bytes",
  "data.mark_paragraphs": False,
  "data.heldout_tokens": None,
  "data.seq_len": 4,
  "data.batch_size": 1,
  "model.vocab_size": V,
  "model.max_seq_len": S,
  "model.num_layers": L,
  "model.num_heads": 2,
  "model.d_model": D,
  "model.d_ff": F,
  "train.steps": 0,
}
CONFIG = {
  "model_type": "gpt2",
  "vocab_size": V,
  "n_positions": S,
  "n_embd": D,
  "n_layer": L,
  "n_head": 2,
}
WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"
EXAMPLES = hypothesis_settings(deadline=None, max_examples=50)


def layer_shapes():
  yield from {
    "ln_1.weight": (D,),
    "ln_1.bias": (D,),
    "ln_2.weight": (D,),
    "ln_2.bias": (D,),
  }.items()
  yield from {"attn.c_attn.weight": (D, 3 * D), "attn.c_attn.bias": (3 * D,)}.items()
  yield from {"attn.c_proj.weight": (D, D), "attn.c_proj.bias": (D,)}.items()
  yield from {"mlp.c_fc.weight": (D, F), "mlp.c_fc.bias": (F,)}.items()
  yield from {"mlp.c_proj.weight": (F, D), "mlp.c_proj.bias": (D,)}.items()


def make_tensors():
  """A GPT-2 of the sizes above: name -> float32 array."""
  shapes = {"wte.weight": (V, D), "wpe.weight": (S, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
  shapes |= {f"h.{i}.{name}": shape for i in range(L) for name, shape in layer_shapes()}
  rng = np.random.default_rng(0)
  return {
    f"transformer.{name}": rng.normal(size=shape).astype("<f4") for name, shape in shapes.items()
  }


def make_header(tensors, dtypes=None):
  """The header that describes them one after the other; `dtypes` replaces "F32" for some."""
  header, at = {}, 0
  for name, array in tensors.items():
    end = at + array.nbytes
    header[name] = {
      "dtype": (dtypes or {}).get(name, "F32"),
      "shape": list(array.shape),
      "data_offsets": [at, end],
    }
    at = end
  return header


def pack(header, data=b"", *, claimed=None):
  """A safetensors file: the header's length, the header, the data."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


def join(tensors):
  return b"".join(array.tobytes() for array in tensors.values())


def pack_tensors(tensors, dtypes=None):
  return pack(make_header(tensors, dtypes), join(tensors))


VALID = pack_tensors(make_tensors())


@pytest.fixture
def folder(tmp_path):
  """A valid Hugging Face folder; a test damages it."""
  folder = tmp_path / "there"
  folder.mkdir()
  (folder / "model.safetensors").write_bytes(VALID)
  (folder / "config.json").write_text(json.dumps(CONFIG))
  (folder / "tokenizer.json").write_text(
    json.dumps(hugging_face_files(ByteTokenizer(), S)["tokenizer.json"])
  )
  return folder


@pytest.fixture
def refused(tmp_path, capsys):
  """Begins a run with a path by the command.

  Asserts how it is refused and returns what was said.
  """
  text = tmp_path / "text.txt"
  text.write_text("To be, or not to be.\n" * 5)
  changes = [
    f"{name}={format_value(value)}" for name, value in (FITTING | {"data.path": text}).items()
  ]
  before = {name for name in sys.modules if name.split(".")[0] in ("torch", "transformers")}

  def refuse(path, *words, named=None):
    args = [
      "--experiment",
      "gpt2_shakespeare",
      "--workdir",
      str(tmp_path / "run"),
      "--init-from",
      str(path),
    ]
    status = cli.guard(
      lambda: run.main([*args, *(a for change in changes for a in ("--set", change))])
    )
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), (status, out, err)
    assert (
      err.startswith("error: ") and err.endswith("\n") and err[:-1].isprintable() and len(err) < 800
    ), err
    assert str(path if named is None else named) in err, err
    for word in words:
      assert word in err, err
    assert not (tmp_path / "run").exists()
    return err

  yield refuse
  assert before == {name for name in sys.modules if name.split(".")[0] in ("torch", "transformers")}


def plan_with(path, text, **changes):
  experiment = change(
    load_experiment("gpt2_shakespeare"),
    FITTING | {"data.path": str(text), "train.init_from": str(path)},
  )
  return plan_run(
    dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, **changes))
  )


def test_what_the_damaged_files_begin_from_is_taken(folder, tmp_path):
  """Else every refusal below could have another reason."""
  (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 5)
  for path in (folder, folder / "model.safetensors"):
    params = plan_with(path, tmp_path / "text.txt").initial.params
    tensors = make_tensors()
    assert np.array_equal(params["tok_embed"][:V], tensors[WTE])
    assert np.array_equal(
      params["blocks"]["w_down"][2], tensors["transformer.h.2.mlp.c_proj.weight"]
    )


# --- Nothing is executed ---


class Evil:
  """Makes a folder when it is unpickled."""

  def __init__(self, marker):
    self.marker = marker

  def __reduce__(self):
    return os.mkdir, (str(self.marker),)


def as_zip(pickled):
  """As torch.save writes it."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("archive/data.pkl", pickled)
    archive.writestr("archive/version", "3\n")
  return file.getvalue()


def as_npy(marker):
  file = io.BytesIO()
  np.save(file, np.array([Evil(marker)], object), allow_pickle=True)
  return file.getvalue()


EVIL = {
  "pickle 0": (lambda marker: pickle.dumps(Evil(marker), 0), pickle.loads),
  "pickle 2": (lambda marker: pickle.dumps(Evil(marker), 2), pickle.loads),
  "pickle 5": (lambda marker: pickle.dumps({"state": Evil(marker)}, 5), pickle.loads),
  "torch": (
    lambda marker: as_zip(pickle.dumps(Evil(marker), 2)),
    lambda content: pickle.loads(zipfile.ZipFile(io.BytesIO(content)).read("archive/data.pkl")),
  ),
  "npy": (as_npy, lambda content: np.load(io.BytesIO(content), allow_pickle=True)),
}


@pytest.mark.parametrize("kind", EVIL)
def test_pickles_are_not_opened(kind, folder, refused, tmp_path):
  make, load = EVIL[kind]
  marker = tmp_path / "executed"
  content = make(marker)
  words = {
    "pickle 0": (),
    "torch": ("torch.save", "no pickles"),
    "npy": ("NumPy", "no pickles"),
  }.get(kind, ("a pickle",))
  for name in ("weights.pt", "weights.pkl", "weights.npy", "weights", "model.safetensors"):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, *words)
  (folder / "model.safetensors").write_bytes(content)
  refused(folder, *words)
  (folder / "model.safetensors").unlink()
  (folder / "pytorch_model.bin").write_bytes(content)
  refused(folder, "no model.safetensors", "pytorch_model.bin", "no pickles", "save_pretrained")
  assert not marker.exists()
  load(content)
  assert marker.exists()  # it was armed


@pytest.mark.parametrize("kind", [kind for kind in EVIL if kind != "pickle 0"])
def test_a_pytorch_model_bin_is_called_what_it_is(kind, refused, tmp_path):
  """By its name it could be llm.c's; saying which magic number that has helps nobody."""
  (tmp_path / "pytorch_model.bin").write_bytes(EVIL[kind][0](tmp_path / "executed"))
  refused(tmp_path / "pytorch_model.bin", "no pickles")
  assert not (tmp_path / "executed").exists()


# --- Headers that lie ---


def with_entry(name=WPE, **changes):
  """The valid file with one tensor's entry changed."""
  header = make_header(make_tensors())
  header[name] = {key: value for key, value in (header[name] | changes).items() if value is not ...}
  return pack(header, join(make_tensors()))


def twice(name, text):
  """The valid file with a second entry of a tensor in its header's text."""
  header = json.dumps(make_header(make_tensors())).encode()
  return pack(header[:-1] + f', "{name}": {text}}}'.encode(), join(make_tensors()))


LAST = 4 * (S * D + V * D)
HEADERS = {
  "claims 2**64 - 1": pack(b"{}", claimed=2**64 - 1),
  "claims 2**60": pack(b"{}", claimed=2**60),
  "claims 200 MB": pack(b"{}", b" " * 1000, claimed=200 * 10**6),
  "claims 99 MB": pack(b"{}", b" " * 1000, claimed=99 * 10**6),
  "claims one byte more": pack(b"{}", claimed=3),
  "nothing": b"",
  "7 bytes": bytes(7),
  "8 bytes": bytes(8),
  "no JSON": pack(b"{never mind}"),
  "no object": pack(b"[1, 2]"),
  "no UTF-8": pack(b'{"\xff": 1}'),
  "other entries": pack({"a": 1}),
  "deep": pack(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
  "deep in an entry": twice(
    "x", '{"dtype":"F32","shape":[],"data_offsets":[0,4],"y":' + "[" * 5000 + "]" * 5000 + "}"
  ),
  "a number of 5,000 digits": twice(
    "x", '{"dtype":"F32","shape":[],"data_offsets":[0,4],"y":' + "9" * 5000 + "}"
  ),
  "metadata of numbers": pack({"__metadata__": {"a": 1}}),
  "overlapping": with_entry(data_offsets=[LAST - 4 * S * D - 4, LAST - 4]),
  "a gap": pack(make_header(make_tensors()), bytes(4) + join(make_tensors())),
  "a gap in the middle": with_entry("transformer.ln_f.bias", data_offsets=[LAST + 20, LAST + 36]),
  "bytes that nobody owns": VALID + b"\0",
  "beyond the end": with_entry(data_offsets=[10**15, 10**15 + 4 * S * D]),
  "backwards": with_entry(data_offsets=[LAST, LAST - 4 * S * D]),
  "negative offsets": with_entry(data_offsets=[-4 * S * D, 0]),
  "three offsets": with_entry(data_offsets=[0, 1, 2]),
  "a shape larger than its bytes": with_entry(shape=[S + 1, D]),
  "a shape of 2**80": with_entry(shape=[2**40, 2**40]),
  "a shape of 2**64 that wraps to 0": with_entry(shape=[2**32, 2**32]),
  "a negative shape": with_entry(shape=[-S, -D]),
  "a fraction": with_entry(shape=[S + 0.5, D]),
  "a shape in words": with_entry(shape="many"),
  "no dtype": with_entry(dtype=...),
  "an unknown dtype": with_entry(dtype="F99"),
  "another width": with_entry(dtype="F16"),
  "a name twice": twice(WPE, json.dumps(make_header(make_tensors())[WPE])),
  "an embedding twice, one of them smaller": twice(
    WTE, '{"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}'
  ),
  "a key twice in an entry": twice(
    "x", '{"dtype": "F32", "dtype": "F16", "shape": [0], "data_offsets": [0, 0]}'
  ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(name, folder, refused):
  (folder / "model.safetensors").write_bytes(HEADERS[name])
  refused(folder / "model.safetensors")
  refused(folder, *(["twice"] if name == "a name twice" else []))


@pytest.mark.parametrize("part", [0.0005, 0.003, 0.3, 0.5, 0.9, 0.9999])
def test_a_truncated_file(part, folder, refused):
  (folder / "model.safetensors").write_bytes(VALID[: int(part * len(VALID))])
  refused(folder)


def test_refused_without_large_allocation(tmp_path):
  """In a process that may not have 200 MB more than it has: nothing is allocated because a file
  says so.

  Before that, a file of 8 GB: as large as it says, almost all of it a hole that takes no place on
  the disk.
  """
  if not sys.platform.startswith("linux"):
    pytest.skip("limits a process's memory as Linux does")
  paths = []
  for number, content in enumerate(HEADERS.values()):
    paths.append(tmp_path / f"{number}.safetensors")
    paths[-1].write_bytes(content)
  header, end = make_header(without(WTE)), len(join(without(WTE)))
  header[WTE] = {"dtype": "F32", "shape": [2**29, D], "data_offsets": [end, end + 2**31 * D]}
  big = dict.fromkeys(("vocab_size", "n_positions", "n_layer", "n_embd"), 2**31 - 1) | {"n_head": 1}
  folders = {
    "sizes": json.dumps(CONFIG | big),
    "more": json.dumps(CONFIG | {"n_layer": 10**30}),
    "deep": "[" * 10**6,
    "digits": '{"n_layer": ' + "9" * 10**6 + "}",
  }
  for name, config in {"8 GB": json.dumps(CONFIG), **folders}.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_bytes(VALID)
    (tmp_path / name / "config.json").write_text(config)
  paths += [tmp_path / name for name in folders]
  large = tmp_path / "8 GB" / "model.safetensors"
  large.write_bytes(pack(header, join(without(WTE))))
  os.truncate(large, large.stat().st_size + 2**31 * D)
  code = """
import resource, sys
from jgpt.errors import UserError
from jgpt.weights.initial import open_weights
from safetensors import safe_open
from safetensors.numpy import save_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
  open_weights(sys.argv[1])
  sys.exit("8 GB were taken")
except UserError as error:
  assert "vocab_size=257, and the tensors have 536870912" in str(error), error
own = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (own + 200 * 2**20,) * 2)
for path in sys.argv[2:]:
  try:
    open_weights(path)
  except UserError:
    continue
  sys.exit(f"{path} was taken")
try:
  bytearray(300 * 2**20)
except MemoryError:  # the limit holds
  print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
  env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
  done = subprocess.run(
    [sys.executable, "-c", code, tmp_path / "8 GB", *paths],
    capture_output=True,
    text=True,
    check=False,
    env=env,
  )
  assert done.returncode == 0, done.stderr
  assert float(done.stdout) < 50  # MB


# --- Tensors that do not belong together ---


def without(*names):
  return {name: array for name, array in make_tensors().items() if name not in names}


def replaced(**changes):
  return make_tensors() | {name.replace("__", "."): array for name, array in changes.items()}


@pytest.mark.parametrize("name", make_tensors())
def test_each_tensor_is_needed(name, folder, refused):
  (folder / "model.safetensors").write_bytes(pack_tensors(without(name)))
  refused(folder, name.removeprefix("transformer."))


@pytest.mark.parametrize("name", make_tensors())
def test_each_tensor_has_its_shape(name, folder, refused):
  array = make_tensors()[name]
  for other in (array.reshape(-1, *array.shape, 1), np.concatenate([array, array]), array[:-1]):
    (folder / "model.safetensors").write_bytes(pack_tensors(make_tensors() | {name: other}))
    refused(folder)


NEW = np.zeros((D, D), "<f4")
TENSORS = {
  "with and without the prefix": (make_tensors() | {"wpe.weight": NEW}, ["'wpe.weight' twice"]),
  "one of another network": (
    make_tensors() | {"transformer.h.0.attn.rotary": NEW},
    ["'h.0.attn.rotary'", "does not have"],
  ),
  "one of a layer too many": (
    make_tensors() | {"transformer.h.3.ln_1.weight": NEW[0]},
    ["num_layers=3", "4"],
  ),
  "a layer far away": (
    make_tensors() | {"transformer.h.999999999.ln_1.weight": NEW[0]},
    ["h.999999999"],
  ),
  "a layer not so far away": (
    make_tensors() | {"transformer.h.999999.ln_1.weight": NEW[0]},
    ["h.0, h.1, ..."],
  ),
  "a layer before the first": (
    make_tensors() | {"transformer.h.-1.ln_1.weight": NEW[0]},
    ["'h.-1.ln_1.weight'"],
  ),
  "a layer twice by its number": (
    make_tensors() | {"transformer.h.01.ln_1.weight": NEW[0]},
    ["'h.01.ln_1.weight'"],
  ),
  "a layer in other digits": (
    make_tensors() | {"transformer.h.\u0663.ln_1.weight": NEW[0]},
    ["ln_1.weight"],
  ),
  "no layer in the middle": (
    {n: a for n, a in make_tensors().items() if ".h.1." not in n},
    ["h.0, h.1, ..."],
  ),
  "no first layer": (
    {n: a for n, a in make_tensors().items() if ".h.0." not in n},
    ["h.0, h.1, ..."],
  ),
  "no layers": ({n: a for n, a in make_tensors().items() if ".h." not in n}, ["h.0, h.1, ..."]),
  "none": ({}, ["h.0, h.1, ..."]),
  "another head": (
    make_tensors() | {"lm_head.weight": np.ones((V, D), "<f4")},
    ["lm_head.weight is not wte.weight"],
  ),
  "a head of another shape": (
    make_tensors() | {"lm_head.weight": np.ones((V + 1, D), "<f4")},
    ["lm_head.weight"],
  ),
  "two lines in a name": (make_tensors() | {"a\nb": NEW}, [r"'a\nb'"]),
  "the terminal's words in a name": (make_tensors() | {"\x1b[2J\x1b]0;x\x07": NEW}, [r"\x1b[2J"]),
  "a long name": (make_tensors() | {"n" * 100_000: NEW}, ["nnn"]),
  "two lines in a name, twice": (
    make_tensors() | {"a\nb": NEW, "transformer.a\nb": NEW},
    [r"'a\nb' twice"],
  ),
  "an embedding of nothing": (
    replaced(transformer__wte__weight=np.zeros((V, 0), "<f4")),
    ["wte.weight"],
  ),
  "an embedding of numbers": (
    replaced(transformer__wte__weight=np.zeros(V * D, "<f4")),
    ["wte.weight"],
  ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_no_gpt2(name, folder, refused):
  tensors, words = TENSORS[name]
  (folder / "model.safetensors").write_bytes(pack_tensors(tensors))
  refused(folder, *words)


@pytest.mark.parametrize("dtype", ["I32", "U32", "I64", "U8", "BOOL", "F8_E4M3"])
def test_weights_are_floating_point(dtype, folder, refused):
  width = {"I32": 4, "U32": 4, "I64": 8}.get(dtype, 1)
  tensors = make_tensors() | {"transformer.h.1.mlp.c_fc.bias": np.zeros(F, f"<u{width}")}
  (folder / "model.safetensors").write_bytes(
    pack_tensors(tensors, {"transformer.h.1.mlp.c_fc.bias": dtype})
  )
  refused(folder, "h.1.mlp.c_fc.bias", dtype, named=folder / "model.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
  ("name", "place", "said"),
  [
    (WTE, (256, 3), "tok_embed[256, 3]"),
    (WPE, (0, 0), "pos_embed[0, 0]"),
    ("transformer.h.1.attn.c_attn.weight", (2, 11), "w_qkv[1, 2, 11]"),
    ("transformer.h.2.attn.c_proj.weight", (3, 1), "w_out[2, 3, 1]"),
    ("transformer.h.0.ln_2.bias", (2,), "norm_mlp_bias[0, 2]"),
    ("transformer.ln_f.weight", (1,), "norm_final_gain[1]"),
  ],
)
def test_numbers_that_are_none_are_named_with_their_place(
  value, name, place, said, folder, refused
):
  tensors = make_tensors()
  tensors[name][place] = value
  (folder / "model.safetensors").write_bytes(pack_tensors(tensors))
  refused(folder, f"{said} is {value}")
  tensors[name][...] = value
  tensors[name].flat[::2] = -value
  (folder / "model.safetensors").write_bytes(pack_tensors(tensors))
  refused(folder, said.partition("[")[0], "damaged")  # all of them, of both signs


@pytest.mark.parametrize(
  ("dtype", "bits"),
  [
    ("F64", 0x7E37_E43C_8800_759C),
    ("F64", 0x7FF0_0000_0000_0001),
    ("F16", 0x7C00),
    ("F16", 0xFD01),
    ("BF16", 0x7F81),
  ],
)
def test_numbers_that_float32_does_not_have(dtype, bits, folder, refused):
  """1e300, signalling NaNs, infinity: with one line, and no warning of NumPy's."""
  name, width = "transformer.h.1.mlp.c_fc.bias", {"F64": 8}.get(dtype, 2)
  (folder / "model.safetensors").write_bytes(
    pack_tensors(make_tensors() | {name: np.full(F, bits, f"<u{width}")}, {name: dtype})
  )
  refused(folder, "b_up[1, 0]", "damaged")


def test_weights_that_are_left_out_are_not_looked_at(folder, tmp_path):
  """Positions beyond the model's are no business of the run's."""
  (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 5)
  tensors = make_tensors()
  tensors[WPE][-1] = math.nan
  (folder / "model.safetensors").write_bytes(pack_tensors(tensors))
  assert plan_with(folder, tmp_path / "text.txt", max_seq_len=S - 1).initial.params[
    "pos_embed"
  ].shape == (S - 1, D)
  with pytest.raises(UserError, match="pos_embed"):
    plan_with(folder, tmp_path / "text.txt")


# --- Folders ---


@pytest.mark.parametrize(
  "name",
  [
    *(
      "../../etc/passwd",
      "../model.safetensors",
      "/etc/passwd",
      "/model.safetensors",
      "a/b.safetensors",
      ".safetensors",
    ),
    *(
      "..\\model.safetensors",
      "C:\\model.safetensors",
      "C:model.safetensors",
      "a\0.safetensors",
      "a\n.safetensors",
      "",
      ".",
    ),
    *(
      "model.safetensors/..",
      "pytorch_model.bin",
      "~/model.safetensors",
      "n" * 5000 + ".safetensors",
      7,
      None,
      ["a"],
      {},
    ),
  ],
)
def test_an_index_names_files_beside_it_only(name, folder, refused):
  (folder / "model.safetensors").rename(
    folder.parent / "model.safetensors"
  )  # where "../" would find it
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {WTE: name}}))
  refused(folder, "weight_map", named=folder / "model.safetensors.index.json")


INDEXES = [
  "",
  "[]",
  "{}",
  "7",
  '{"weight_map": []}',
  '{"weight_map": {}}',
  "{" * 10**5,
  "[" * 10**5,
  "\xff",
  '{"weight_map": NaN}',
]


@pytest.mark.parametrize("text", INDEXES)
def test_an_index_that_is_none(text, folder, refused):
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors.index.json").write_text(text, encoding="latin-1")
  refused(folder)


def test_an_index_of_files_that_are_not_there_or_none(folder, refused):
  (folder / "model.safetensors").rename(folder / "part-1.safetensors")
  index = folder / "model.safetensors.index.json"
  index.write_text(
    json.dumps({"weight_map": {WTE: "part-1.safetensors", WPE: "part-2.safetensors"}})
  )
  refused(folder, "part-2.safetensors does not exist")
  (folder / "part-2.safetensors").write_bytes(VALID)
  refused(folder, "twice")
  (folder / "part-2.safetensors").write_bytes(b"\x80\x04" * 50)
  refused(folder, "part-2.safetensors is a pickle")
  (folder / "part-2.safetensors").unlink()
  (folder / "part-2.safetensors").symlink_to("part-2.safetensors")
  refused(folder, "part-2.safetensors")
  (folder / "part-2.safetensors").unlink()
  (folder / "part-2.safetensors").mkdir()
  refused(folder, "part-2.safetensors")


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_layer", "n_head", "n_embd"])
@pytest.mark.parametrize(
  "value",
  [
    0,
    -1,
    -(2**70),
    2**31,
    2**63,
    10**30,
    12.0,
    1e308,
    True,
    None,
    "12",
    [12],
    {},
    "x" * 10**5,
    ...,
  ],
)
def test_sizes_in_a_config_are_whole_numbers_that_agree(name, value, folder, refused):
  config = CONFIG | {name: value}
  (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
  refused(folder, "config.json")


CONFIGS = {
  "nothing": "",
  "no JSON": "model_type = gpt2",
  "half": json.dumps(CONFIG)[:-9],
  "a list": json.dumps([CONFIG]),
  "a number": "2",
  "null": "null",
  "deep": '{"model_type":' + "[" * 10**5,
  "deep and closed": '{"model_type": "gpt2", "layer_norm_epsilon":' + "[" * 900 + "]" * 900 + "}",
  "a number of 10,000 digits": '{"model_type": "gpt2", "n_layer": ' + "9" * 10_000 + "}",
  "infinity": '{"model_type": "gpt2", "n_layer": Infinity}',
  "half a pair": '{"model_type": "\\ud800"}',
  "a long word": json.dumps(CONFIG | {"activation_function": "x" * 10**6}),
  "two lines": json.dumps(CONFIG | {"model_type": "gpt2\n\x1b[2J"}),
  "UTF-16 by half": json.dumps(CONFIG).encode("utf-16")[:-1].decode("latin-1"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_none(name, folder, refused):
  (folder / "config.json").write_text(CONFIGS[name], encoding="latin-1")
  refused(folder, "config.json")


def test_without_a_config_a_folder_is_refused(folder, refused):
  (folder / "config.json").unlink()
  refused(folder, "config.json does not exist")


TOKENIZERS = {
  "nothing": "",
  "half": json.dumps(hugging_face_files(ByteTokenizer(), S)["tokenizer.json"])[:-50],
  "another": '{"model": {"type": "Unigram", "vocab": []}}',
  "deep": "[" * 10**5,
  "a list": "[]",
  "no UTF-8": "\xff\xfe\xfd",
  "a long word": json.dumps({"model": {"type": "x" * 10**6, "vocab": {}}}),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_damaged_tokenizer_is_refused_not_ignored(name, folder, refused):
  (folder / "tokenizer.json").write_text(TOKENIZERS[name], encoding="latin-1")
  refused(folder, "tokenizer.json", "copy model.safetensors into a folder of its own")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_folders_and_loops_in_the_place_of_files(name, folder, refused):
  (folder / name).unlink()
  (folder / name).mkdir()
  refused(folder, name)
  (folder / name).rmdir()
  (folder / name).symlink_to(name)
  refused(folder, name)
  (folder / name).unlink()
  (folder / name).symlink_to("nowhere")
  refused(folder, name)


# --- Paths ---


def test_paths_that_are_no_weights(refused, tmp_path):
  (tmp_path / "x.safetensors").mkdir()
  refused(tmp_path / "x.safetensors", "no model.safetensors; it has nothing")
  (tmp_path / "y.safetensors" / "a\nb").mkdir(parents=True)
  refused(tmp_path / "y.safetensors", r"'a\nb'")
  (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
  refused(tmp_path / "loop.safetensors", "symbolic links")
  (tmp_path / "loop").symlink_to("loop")
  refused(tmp_path / "loop", "symbolic links")
  refused(tmp_path / "loop" / "x.safetensors", "symbolic links")
  refused(tmp_path / "nowhere.safetensors", "does not exist")
  refused(tmp_path / "nowhere.bin", "does not exist")
  refused("gpt3", "Did you mean gpt2")
  (tmp_path / "text.md").write_text("no weights")
  refused(tmp_path / "text.md", "must be a Hugging Face folder")
  refused("/dev/null", "must be a Hugging Face folder")


@pytest.mark.parametrize("name", ["a\0b", "a\0b.safetensors", "a\0b.bin", "\0"])
def test_a_path_with_nul(name, tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    open_weights(str(tmp_path / name))


@pytest.mark.parametrize("path", ["~nobody-of-this-name/model.safetensors", "~nobody-of-this-name"])
def test_the_home_of_nobody(path, refused):
  refused(path)


# --- Whatever else ---


def load(path):
  """Reads weights as a run does.

  Returns them if they were taken, None if they were refused as they should be.
  """
  experiment = change(load_experiment("gpt2_shakespeare"), FITTING)
  try:
    params = load_params(open_weights(str(path)), experiment.model).params
  except UserError as error:
    assert str(error).isprintable() and len(str(error)) < 1500, str(error)
    return None
  for name, param, layers in walk(experiment.model):
    section, _, inner = name.rpartition("/")
    array = (params[section] if section else params)[inner]
    assert array.shape == ((layers,) if section else ()) + param.shape and array.dtype == np.float32
    assert np.isfinite(array).all()
  return params


def mutate(content, edits):
  """Replaces, inserts or deletes bytes: each edit is (place from 0 to 1, bytes that go, bytes that
  come).
  """
  for place, gone, new in edits:
    at = int(place * len(content))
    content = content[:at] + new + content[at + gone :]
  return content


edits = st.lists(
  st.tuples(
    st.floats(0, 1),
    st.integers(0, 4),
    st.binary(max_size=4) | st.sampled_from([b"9", b"-", b'"', b"{", b"}", b"[["]),
  ),
  min_size=1,
  max_size=4,
)
HEADER_BYTES = 8 + struct.unpack("<Q", VALID[:8])[0]
json_values = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text(max_size=5)
  | st.sampled_from(["F32", "BF16", "gpt2"]),
  lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
  ),
  max_leaves=5,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
  """A valid folder that one example after another damages; its files are written anew by each."""
  folder = tmp_path_factory.mktemp("scratch")
  (folder / "model.safetensors").write_bytes(VALID)
  (folder / "config.json").write_text(json.dumps(CONFIG))
  assert load(folder) is not None
  return folder


@contextlib.contextmanager
def damaged(path, content):
  """A file with other content for a while."""
  before = path.read_bytes()
  path.write_bytes(content)
  try:
    yield
  finally:
    path.write_bytes(before)


@EXAMPLES
@given(edits)
def test_any_bytes_of_the_header_changed(scratch, edits):
  with damaged(
    scratch / "model.safetensors", mutate(VALID[:HEADER_BYTES], edits) + VALID[HEADER_BYTES:]
  ):
    load(scratch)
    load(scratch / "model.safetensors")


@EXAMPLES
@given(
  st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=1)), min_size=1, max_size=5)
)
def test_any_bytes_changed_in_their_place(scratch, changes):
  """The length stays, so that the damage reaches the numbers: then they are taken, or are none."""
  with damaged(
    scratch / "model.safetensors",
    mutate(VALID, [(min(place, 0.9999), 1, new) for place, new in changes]),
  ):
    load(scratch)


@EXAMPLES
@given(
  st.sampled_from(sorted(make_tensors())),
  st.sampled_from(["dtype", "shape", "data_offsets", None]),
  json_values,
)
def test_any_value_in_the_place_of_a_header_s(scratch, name, field, value):
  header = make_header(make_tensors())
  if field is None:
    header[name] = value
  else:
    header[name][field] = value
  with damaged(scratch / "model.safetensors", pack(header, join(make_tensors()))):
    load(scratch)


@EXAMPLES
@given(edits)
def test_any_bytes_of_a_config_changed(scratch, edits):
  with damaged(scratch / "config.json", mutate(json.dumps(CONFIG).encode(), edits)):
    load(scratch)


FIELDS = (
  *CONFIG,
  *(
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
  ),
  *("add_cross_attention", "tie_word_embeddings", "n_inner", "torch_dtype", "architectures"),
)


@EXAMPLES
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=3))
def test_any_value_in_the_place_of_a_config_s(scratch, changes):
  with damaged(scratch / "config.json", json.dumps(CONFIG | changes).encode()):
    load(scratch)


@EXAMPLES
@given(
  json_values
  | st.dictionaries(st.just("weight_map"), json_values | st.dictionaries(st.text(), json_values))
)
def test_any_index(scratch, value):
  (scratch / "model.safetensors").unlink()
  index = scratch / "model.safetensors.index.json"
  try:
    index.write_text(json.dumps(value))
    assert load(scratch) is None
  finally:
    index.unlink()
    (scratch / "model.safetensors").write_bytes(VALID)


@EXAMPLES
@given(edits)
def test_any_bytes_of_a_tokenizer_changed(scratch, edits):
  path = scratch / "tokenizer.json"
  path.write_bytes(
    mutate(json.dumps(hugging_face_files(ByteTokenizer(), S)["tokenizer.json"]).encode(), edits)
  )
  try:
    load(scratch)
  finally:
    path.unlink()
