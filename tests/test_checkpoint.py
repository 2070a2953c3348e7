"""The run folder: what is read back, what is refused, and that nothing of it is executed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jgpt import checkpoint
from jgpt.catalog import load_experiment
from jgpt.checks import UserError
from jgpt.keys import INIT, derive_key
from jgpt.optim import make_optimizer
from jgpt.settings import resolve
from jgpt.step import init_state
from jgpt.tokenizer import CharTokenizer

pytestmark = pytest.mark.usefixtures("quick")

EXPERIMENT = resolve(load_experiment("names"), 27)
FILES = checkpoint.RunFiles(
  "names", EXPERIMENT, CharTokenizer("abcdefghijklmnopqrstuvwxyz", bos=True), {"kind": "path", "sha256": "0" * 64}
)


@pytest.fixture(scope="module")
def state():
  tx = make_optimizer(EXPERIMENT.optimizer, EXPERIMENT.model)
  return jax.jit(lambda key: init_state(key, EXPERIMENT.model, tx))(derive_key(0, INIT))


def saved(workdir, state, steps=(0,)):
  """A run folder with the same arrays under each step."""
  checkpoint.write_run_files(workdir, FILES)
  with checkpoint.open_checkpoints(workdir) as manager:
    for step in steps:
      checkpoint.save(manager, state.replace(step=np.int32(step)))
  return workdir


def test_what_was_saved_comes_back_bit_by_bit(tmp_path, state):
  """Parameters alone (sampling), and the whole state with its structure (resuming)."""
  saved(tmp_path, state)
  run = checkpoint.load_run(tmp_path)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
  with checkpoint.open_checkpoints(tmp_path) as manager:
    restored = checkpoint.restore(manager, 0, shapes)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for name, a, b in (("params", run.params, state.params), ("state", restored, state)):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
      assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), f"{name} {jax.tree_util.keystr(path)}"


def test_arrays_lie_under_readable_names(tmp_path, state):
  """A stranger finds the parameters by name in orbax's metadata."""
  saved(tmp_path, state)
  metadata = (tmp_path / "checkpoints" / "0" / "params" / "_METADATA").read_text()
  for name in ("tok_embed", "pos_embed", "unembed", "blocks", "w_qkv", "w_out", "w_up", "w_down"):
    assert f'"{name}"' in metadata
  moments = (tmp_path / "checkpoints" / "0" / "train_state" / "_METADATA").read_text()
  assert all(f'"{name}"' in moments for name in ("step", "opt_state", "adam", "mu", "nu", "lr"))


def test_the_newest_checkpoints_are_kept(tmp_path, state):
  saved(tmp_path, state, steps=(10, 20, 30))
  assert checkpoint.list_steps(tmp_path) == [20, 30]
  assert checkpoint.load_run(tmp_path).step == 30 and checkpoint.load_run(tmp_path, 20).step == 20
  with pytest.raises(UserError, match=r"no checkpoint of step 10; it has 20, 30\."):
    checkpoint.load_run(tmp_path, 10)


def test_other_shapes_are_refused_and_not_cut_to_fit(tmp_path, state):
  """An experiment.json that names another model than the arrays are of."""
  saved(tmp_path, state)
  path = tmp_path / "experiment.json"
  path.write_text(path.read_text().replace('"d_ff": 64', '"d_ff": 32'))
  with pytest.raises(UserError, match=r"blocks/w_down is float32\[1, 64, 16\] there, and float32\[1, 32, 16\]"):
    checkpoint.load_run(tmp_path)


@pytest.mark.parametrize("lost", ["params/manifest.ocdbt", "params/_METADATA"])
def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path, state, lost):
  """In a process of its own: orbax leaves the reads that failed behind, and they complain when they end."""
  saved(tmp_path, state)
  (tmp_path / "checkpoints" / "0" / lost).write_bytes(b"garbage")
  command = [sys.executable, "-m", "jgpt.sample", "--run", str(tmp_path)]
  env = os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parent.parent)}
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 2 and done.stdout == ""
  assert re.search(r"^error: cannot read the checkpoint .*checkpoints.0: ", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
  ("field", "value"),
  [("format", 2), ("data", {"sha256": 5}), ("data", {}), ("experiment", []), ("tokenizer_sha256", "0" * 64)],
)
def test_settings_that_are_not_ours_are_refused(tmp_path, state, field, value):
  saved(tmp_path, state)
  path = tmp_path / "experiment.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  with pytest.raises(UserError):
    checkpoint.load_run(tmp_path)


def test_a_folder_without_a_checkpoint_says_so(tmp_path):
  checkpoint.write_run_files(tmp_path, FILES)
  with pytest.raises(UserError, match="has no checkpoint yet"):
    checkpoint.load_run(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_file_that_is_no_json_is_refused_by_name(tmp_path, content):
  path = tmp_path / "experiment.json"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=re.escape(str(path))):
    checkpoint.read_json(path)
