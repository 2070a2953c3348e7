"""Row 25: weights made to do harm are refused by the command itself: nothing runs, and little
memory is asked for.

The same files one by one, with what is said of each: `tests/weights/test_hostile_weights.py`. Any
bytes: `test_fuzz_parsers.py`.
"""

import json
import os
import resource
import struct
import subprocess
import sys

import children
import numpy as np
import pytest
import test_hostile_weights as made

from jgpt.config.settings import format_value
from jgpt.errors import UserError
from jgpt.weights.initial import open_weights

LIMIT = (
  8 << 30
)  # bytes of address space of a command; jax reserves 2 GB or more of it, by the cores there are
BOMB = 10 << 30  # more than that


def write_evil(folder):
  """Pickles in all their clothes; each would make the folder `executed`."""
  marker = folder / "executed"
  paths = []
  for n, (make, _) in enumerate(made.EVIL.values()):
    for name in (
      f"{n}.pt",
      f"{n}.bin",
      f"{n}.npy",
      f"{n}.safetensors",
      f"{n}/model.safetensors",
      f"{n}/pytorch_model.bin",
    ):
      paths.append(folder / name)
      paths[-1].parent.mkdir(exist_ok=True)
      paths[-1].write_bytes(make(marker))
    paths.append(folder / str(n))
  return paths, marker


def write_lies(folder):
  """Safetensors whose headers lie, tensors that do not belong together, and llm.c's files as large
  as they say.
  """
  tensors = made.make_tensors()
  files = {
    **made.HEADERS,
    "a wrong shape": made.pack_tensors(tensors | {made.WPE: np.zeros((made.S, made.D + 1), "<f4")}),
    "an extra tensor": made.pack_tensors(
      tensors | {"transformer.h.0.attn.rotary": np.zeros(4, "<f4")}
    ),
    "a tensor missing": made.pack_tensors(made.without("transformer.ln_f.bias")),
    "NaN": made.pack_tensors(tensors | {made.WPE: np.full((made.S, made.D), np.nan, "<f4")}),
    "infinity": made.pack_tensors(tensors | {made.WTE: np.full((made.V, made.D), -np.inf, "<f4")}),
  }
  paths = []
  for n, content in enumerate(files.values()):
    paths.append(folder / f"lie-{n}.safetensors")
    paths[-1].write_bytes(content)
  paths.append(folder / "bomb.safetensors")  # its last tensor is a hole as large as the header says
  header = made.make_header(made.without(made.WTE))
  end = len(made.join(made.without(made.WTE)))
  header[made.WTE] = {
    "dtype": "F32",
    "shape": [BOMB // 4 // made.D, made.D],
    "data_offsets": [end, end + BOMB],
  }
  paths[-1].write_bytes(made.pack(header, made.join(made.without(made.WTE))))
  os.truncate(paths[-1], paths[-1].stat().st_size + BOMB)
  for n, sizes in enumerate(
    ((2**31 - 1,) * 6, (4, 5, 2**20, 1, 2**10, 128), (1, 1, 1, 1, 1, 2**31 - 1))
  ):
    paths.append(folder / f"lie-{n}.bin")
    paths[-1].write_bytes(struct.pack("<256i", 20240326, 3, *sizes, *[0] * 248) + bytes(64))
  return paths


# Calls the command for one path after another, in a process that may not have much memory.
SCRIPT = """
import contextlib, io, json, resource, sys
from jgpt import cli, run
task = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (task["limit"], task["limit"]))
rows = []
for path in task["paths"]:
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = cli.guard(lambda: run.main([*task["args"], "--init-from", path]))
  rows.append((status, path, out.getvalue(), err.getvalue()))
  if len(rows) == 1:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
json.dump([rows, grown / 1024], sys.__stdout__)
"""


@pytest.fixture
def arguments(tmp_path):
  text = tmp_path / "text.txt"
  text.write_text("To be, or not to be.\n" * 5)
  changes = made.FITTING | {"data.path": text}
  words = (
    word for name, value in changes.items() for word in ("--set", f"{name}={format_value(value)}")
  )
  return ["--experiment", "gpt2_shakespeare", "--workdir", str(tmp_path / "run"), *words]


def run_limited(*args, cwd):
  with children.Child("jgpt.run", *args, cwd=cwd) as child:
    resource.prlimit(
      child.process.pid, resource.RLIMIT_AS, (LIMIT, LIMIT)
    )  # long before it has imported anything
    child.status = child.wait()
  return child


def assert_refused(status, path, out, err):
  assert (status, out) == (2, ""), (status, path, out, err)
  assert (
    err.startswith("error: ") and err[:-1].isprintable() and err.count("\n") == 1 and len(err) < 800
  ), (path, err)
  assert str(path) in err, (path, err)


@pytest.mark.slow
@pytest.mark.skipif(
  not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does"
)
def test_row_25_no_file_runs_code_or_takes_memory(tmp_path, arguments):
  evil, marker = write_evil(tmp_path)
  paths = [*evil, *write_lies(tmp_path)]
  task = json.dumps({"paths": list(map(str, paths)), "args": arguments, "limit": LIMIT})
  env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, children.PATHS))}
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT], input=task, capture_output=True, text=True, env=env
  )
  assert done.returncode == 0, done.stderr
  rows, megabytes = json.loads(done.stdout)
  assert len(rows) == len(paths) > 70
  for row in rows:
    assert_refused(*row)
  assert not marker.exists() and not (tmp_path / "run").exists()
  assert megabytes < 100
  for make, load in made.EVIL.values():
    load(make(marker))
    marker.rmdir()  # raises where it was not armed


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  ["0.pt", "3.pt", "2/model.safetensors", "3/pytorch_model.bin", "bomb.safetensors", "lie-0.bin"],
)
def test_row_25_the_command_refuses_in_one_line(tmp_path, arguments, name):
  _, marker = write_evil(tmp_path)
  write_lies(tmp_path)
  child = run_limited(*arguments, "--init-from", tmp_path / name, cwd=tmp_path)
  assert_refused(
    child.status, tmp_path / name.removesuffix("/model.safetensors"), child.out, child.err
  )
  assert not marker.exists() and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_row_25_sound_weights_are_taken(tmp_path, arguments):
  """Else every refusal above could have another reason, the limit of memory among them."""
  (tmp_path / "sound.safetensors").write_bytes(made.VALID)
  child = run_limited(*arguments, "--init-from", tmp_path / "sound.safetensors", cwd=tmp_path)
  assert child.status == 0 and children.steps_there(tmp_path / "run") == [0], child.out + child.err


@pytest.mark.parametrize(
  "name", ["config.json", "tokenizer.json", "vocab.json", "model.safetensors.index.json"]
)
def test_row_25_a_pipe_or_a_hole_beside_the_weights_neither_hangs_nor_fills_memory(tmp_path, name):
  """A pipe that nobody writes to, and a file of a terabyte that takes no place on the disk."""
  folder = tmp_path / "there"
  folder.mkdir()
  files = {
    "config.json": json.dumps(made.CONFIG).encode(),
    "model.safetensors": made.VALID,
    "merges.txt": b"#\n",
  }
  if name == "model.safetensors.index.json":
    files.pop("model.safetensors")
  for other, content in files.items():
    (folder / other).write_bytes(content)
  (folder / name).unlink(missing_ok=True)
  with open(folder / name, "wb") as file:
    file.truncate(1 << 40)
  with pytest.raises(UserError, match=rf"{name} has 1,099,511,627,776 bytes; at most"):
    open_weights(str(folder))
  (folder / name).unlink()
  os.mkfifo(folder / name)
  if name in ("config.json", "tokenizer.json"):
    with pytest.raises(UserError, match=rf"cannot read .*{name}: it is no plain file"):
      open_weights(str(folder))
  elif name == "vocab.json":
    assert open_weights(str(folder)).tokenizer is None
  else:
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
      open_weights(str(folder))
