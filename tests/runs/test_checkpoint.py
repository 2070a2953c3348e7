"""The run folder: what is read back, what is refused, and that nothing of it is executed."""

import json
import os
import re

import jax
import numpy as np
import pytest

from jgpt.config.catalog import load_experiment
from jgpt.config.settings import resolve
from jgpt.errors import TrainingError, UserError
from jgpt.evaluation import HeldoutLoss
from jgpt.keys import INIT, derive_key
from jgpt.runs import checkpoint, manifest
from jgpt.runs.folder import RunFiles, read_run_json, write_run_files
from jgpt.runs.open import open_run
from jgpt.step import init_state
from jgpt.text.tokenizer import CharTokenizer

pytestmark = pytest.mark.usefixtures("quick")

EXPERIMENT = resolve(load_experiment("names"), 27)
FILES = RunFiles(
  "names",
  EXPERIMENT,
  CharTokenizer("abcdefghijklmnopqrstuvwxyz", bos=True),
  {"kind": "path", "sha256": "0" * 64},
)


@pytest.fixture(scope="module")
def state():
  return jax.jit(lambda key: init_state(key, EXPERIMENT))(derive_key(0, INIT))


def saved(workdir, state, steps=(0,)):
  """A run folder with the same arrays under each step."""
  write_run_files(workdir, FILES)
  with checkpoint.open_checkpoints(workdir) as manager:
    for step in steps:
      checkpoint.save_checkpoint(manager, state.replace(step=np.int32(step)))
  return workdir


def test_what_was_saved_comes_back_bit_by_bit(tmp_path, state):
  """Parameters alone (sampling), and the whole state with its structure (resuming)."""
  saved(tmp_path, state)
  run = open_run(tmp_path)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
  restored = checkpoint.restore(tmp_path / "checkpoints" / "0", shapes)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for name, a, b in (("params", run.params, state.params), ("state", restored, state)):
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
      assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), (
        f"{name} {jax.tree_util.keystr(path)}"
      )


def test_arrays_lie_under_readable_names(tmp_path, state):
  """A stranger finds the parameters by name in orbax's metadata."""
  saved(tmp_path, state)
  metadata = (tmp_path / "checkpoints" / "0" / "params" / "_METADATA").read_text()
  for name in ("tok_embed", "pos_embed", "unembed", "blocks", "w_qkv", "w_out", "w_up", "w_down"):
    assert f'"{name}"' in metadata
  moments = (tmp_path / "checkpoints" / "0" / "train_state" / "_METADATA").read_text()
  assert all(f'"{name}"' in moments for name in ("step", "opt_state", "adam", "mu", "nu", "lr"))


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path, state):
  """Whatever the order: the best are never deleted for being old, the newest never for
  being bad.
  """
  write_run_files(tmp_path, FILES)
  losses = {10: 2.5, 20: 2.1, 30: 2.3, 40: 2.1, 50: None, 60: 2.4}
  kept = []
  with checkpoint.open_checkpoints(tmp_path, keep_latest=2, keep_best=1) as manager:
    for step, loss in losses.items():
      heldout = None if loss is None else HeldoutLoss(loss, 9, None)
      note = checkpoint.StepNote(step, None, heldout)
      checkpoint.save_checkpoint(manager, state.replace(step=np.int32(step)), note)
      manager.wait()
      kept.append(manifest.list_steps(tmp_path))
  assert kept == [[10], [10, 20], [20, 30], [30, 40], [40, 50], [40, 50, 60]]
  assert open_run(tmp_path).step == 60 and open_run(tmp_path, 40).step == 40
  with pytest.raises(UserError, match=r"no checkpoint of step 10; it has 40, 50, 60\."):
    open_run(tmp_path, 10)


def rewrite(folder, name, change):
  """Edits a file of a checkpoint, and the manifest accordingly."""
  path = folder / name
  path.write_text(change(path.read_text()))
  recorded = manifest.read_manifest(folder)
  manifest.write_manifest(folder, recorded)


def test_other_shapes_are_refused_and_not_cut_to_fit(tmp_path, state):
  """An experiment.json that names another model than the arrays are of, in a checkpoint that is
  otherwise whole.
  """
  saved(tmp_path, state)
  rewrite(
    tmp_path / "checkpoints" / "0",
    "experiment.json",
    lambda text: text.replace('"d_ff": 64', '"d_ff": 32'),
  )
  with pytest.raises(
    UserError, match=r"blocks/w_down is float32\[1, 64, 16\] there, and float32\[1, 32, 16\]"
  ):
    open_run(tmp_path)


def test_a_leaf_that_is_not_what_was_saved_is_named(tmp_path, state):
  """What no file's digest can tell: here the manifest says another digest, and agrees with
  itself.
  """
  saved(tmp_path, state)
  folder = tmp_path / "checkpoints" / "0"
  recorded = manifest.read_manifest(folder)
  recorded.leaves["params/tok_embed"]["digest"] = 16 * "0"
  manifest.write_manifest(folder, recorded)
  with pytest.raises(UserError, match="params/tok_embed is not what was saved"):
    open_run(tmp_path)


def test_a_model_larger_than_memory_is_refused_before_it_is_read(tmp_path, state):
  """Small files can claim to be large arrays."""
  saved(tmp_path, state)
  folder = tmp_path / "checkpoints" / "0"
  recorded = manifest.read_manifest(folder)
  for name, leaf in recorded.leaves.items():
    if "/w_" in name:
      leaf["shape"][0] = 2**30
  rewrite(
    folder,
    "experiment.json",
    lambda text: text.replace('"num_layers": 1', f'"num_layers": {2**30}'),
  )
  manifest.write_manifest(folder, recorded)
  with pytest.raises(UserError, match=r"GB of memory by its experiment.json; this machine has"):
    open_run(tmp_path)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, state):
  saved(tmp_path, state, steps=(5,))
  bad = state.replace(
    step=np.int32(6),
    params=state.params | {"tok_embed": state.params["tok_embed"].at[0, 0].set(np.nan)},
  )
  message = (
    r"after step 6 params/tok_embed is not finite .1 of 24 arrays.*The last checkpoint is of "
    r"step 5\."
  )
  with (
    pytest.raises(TrainingError, match=message),
    checkpoint.open_checkpoints(tmp_path) as manager,
  ):
    checkpoint.save_checkpoint(manager, bad)
  assert manifest.list_steps(tmp_path) == [5]


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("format", 2),
    ("data", {"sha256": 5}),
    ("data", {}),
    ("experiment", []),
    ("tokenizer_sha256", "0" * 64),
  ],
)
def test_settings_that_are_not_ours_are_refused(tmp_path, state, field, value):
  saved(tmp_path, state)
  rewrite(
    tmp_path / "checkpoints" / "0",
    "experiment.json",
    lambda text: json.dumps(json.loads(text) | {field: value}),
  )
  with pytest.raises(UserError):
    open_run(tmp_path)


def test_a_folder_without_a_checkpoint_says_so(tmp_path):
  write_run_files(tmp_path, FILES)
  with pytest.raises(UserError, match="has no checkpoint yet"):
    open_run(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_file_that_is_no_json_is_refused_by_name(tmp_path, content):
  path = tmp_path / "experiment.json"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=re.escape(str(path))):
    read_run_json(path)


def test_all_of_a_checkpoint_is_on_the_disk_before_its_manifest(tmp_path, state, monkeypatch):
  """After a power cut a step whose manifest is there is whole: files, folders and its name were
  synced before.
  """
  synced, real = [], os.fsync

  def fsync(descriptor):
    synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    real(descriptor)

  monkeypatch.setattr(os, "fsync", fsync)
  saved(tmp_path, state, steps=[3])
  folder = tmp_path / "checkpoints" / "3"
  before = synced[: synced.index(str(folder / ".manifest.json.tmp"))]
  needed = {folder.parent, folder, *folder.rglob("*")} - {folder / "manifest.json"}
  assert {str(path) for path in needed} <= set(before)
  assert synced.index(str(folder), len(before)) and str(tmp_path) in before


def test_a_folder_that_another_host_made_may_be_seen_late(tmp_path, monkeypatch):
  """As on NFS, which keeps for a while that there was nothing; one that is never seen is named."""
  write_run_files(tmp_path, FILES)
  with checkpoint.open_checkpoints(tmp_path) as manager:
    manager.folder.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(
      checkpoint.time, "sleep", lambda _: (tmp_path / "elsewhere").rename(manager.folder)
    )
    manager._check_shared()
    manager.folder.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(checkpoint, "SHARING_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"does not see .*checkpoints.*all hosts share"):
      manager._check_shared()
    (tmp_path / "elsewhere").rename(manager.folder)
