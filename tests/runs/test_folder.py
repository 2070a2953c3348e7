"""A run folder of today's format, kept as it was written: later versions must read it, and so must
a stranger.

`fixtures/run_format_1` is a run of `names` on ten words, with layers of width 8, stopped after 3 of
6 updates.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore
from test_digest import digest_by_hand

from jgpt import train
from jgpt.config import ComputeConfig, MeshConfig
from jgpt.errors import UserError
from jgpt.generate import generate_texts
from jgpt.keys import SAMPLE, derive_key
from jgpt.plan import plan_run
from jgpt.runs import manifest
from jgpt.runs.folder import MAX_SETTINGS, MAX_STARTS, append_env, read_run_files
from jgpt.runs.open import open_run
from jgpt.runs.rows import read_jsonl

FIXTURES = Path(__file__).parents[1] / "fixtures"
FLOAT32 = ComputeConfig(dtype="float32")  # there was no other dtype
FORMAT_1 = FIXTURES / "run_format_1"
STEP = FORMAT_1 / "checkpoints" / "3"


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
  """A copy, in a current folder that has its text."""
  shutil.copytree(FORMAT_1, tmp_path / "run")
  shutil.copy(FIXTURES / "run_format_1_words.txt", tmp_path / "words.txt")
  monkeypatch.chdir(tmp_path)
  return Path("run")


def read_leaf(name: str) -> np.ndarray:
  """Reads an array as `manifest.py` tells a stranger to."""
  item, _, leaf = name.partition("/")
  kvstore = {
    "driver": "ocdbt",
    "base": f"file://{STEP / item}/",
    "path": f"{leaf.replace('/', '.')}/",
  }
  return np.asarray(
    tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True).result().read().result()
  )


def test_a_stranger_reads_every_array_and_finds_its_digest():
  """With TensorStore, JSON and the formula: nothing of jgpt, nothing of orbax."""
  told = json.loads((STEP / "manifest.json").read_text())
  assert len(told["leaves"]) == 24 and told["format"] == 1 and told["step"] == 3
  for name, leaf in told["leaves"].items():
    array = read_leaf(name)
    assert (str(array.dtype), list(array.shape), digest_by_hand(array)) == tuple(
      leaf[k] for k in ("dtype", "shape", "digest")
    )
  for name, file in told["files"].items():
    content = (STEP / name).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
  rest = {name: value for name, value in told.items() if name != "sha256"}
  assert (
    hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    == told["sha256"]
  )


def test_it_is_read_whole_and_sampled(run_folder):
  run = open_run(run_folder)
  assert run.step == 3 and run.experiment.model.d_model == 8 and run.tokenizer.vocab_size == 17
  for name in ("tok_embed", "pos_embed", "unembed"):
    np.testing.assert_array_equal(np.asarray(run.params[name]), read_leaf(f"params/{name}"))
  texts = generate_texts(run.params, run.tokenizer, derive_key(0, SAMPLE, 3), run.experiment)
  assert len(texts) == 3 and run.sample() == texts


def test_it_is_whole_and_says_what_it_is(run_folder):
  files = read_run_files(run_folder)
  assert (
    files.name == "names" and files.data["kind"] == "path" and files.experiment.train.steps == 6
  )
  assert files.experiment.mesh == MeshConfig(data=1) and files.experiment.compute == FLOAT32
  assert (
    manifest.list_steps(run_folder) == [3]
    and manifest.find_damage(run_folder / "checkpoints" / "3") is None
  )
  told = manifest.read_manifest(run_folder / "checkpoints" / "3")
  assert told.data["sequences"] == 3 and told.heldout_loss == pytest.approx(2.8685, abs=1e-4)


@pytest.mark.parametrize(
  ("mesh", "compute"),
  [
    ({"tricks": False}, ComputeConfig(dtype="float32", tricks=False)),
    ({"scan_layers": True}, ComputeConfig(dtype="float32", layers="scan")),
    ({"scan_layers": False}, ComputeConfig(dtype="float32", layers="unroll")),
    (
      {"tricks": False, "scan_layers": False},
      ComputeConfig(dtype="float32", tricks=False, layers="unroll"),
    ),
  ],
)
def test_settings_that_have_another_name_today_are_read(run_folder, mesh, compute):
  """`mesh.tricks` and `mesh.scan_layers` were written by earlier versions.

  What follows computes as they say.
  """
  path = run_folder / "experiment.json"
  settings = json.loads(path.read_text())
  assert {"tricks", "scan_layers"} <= settings["experiment"]["mesh"].keys()
  settings["experiment"]["mesh"] |= mesh
  path.write_text(json.dumps(settings))
  experiment = read_run_files(run_folder).experiment
  assert experiment.mesh == MeshConfig(data=1) and experiment.compute == compute
  plan = plan_run(experiment, workdir=run_folder, name="names")
  assert plan.start_step == 3


@pytest.mark.slow
def test_training_goes_on(run_folder, quick):
  """Its own log has the rows of the run that was not stopped, which a run that goes on writes
  again.
  """
  losses = [
    row["train/loss"] for row in read_jsonl(FORMAT_1 / "metrics.jsonl") if "train/loss" in row
  ]
  plan = plan_run(read_run_files(run_folder).experiment, workdir=run_folder, name="names")
  assert plan.start_step == 3
  result = train.train_run(plan)
  assert int(result.state.step) == 6 and manifest.list_steps(run_folder) == [3, 6]
  np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))
  before, now = json.loads((run_folder / "env.json").read_text())
  assert "mesh.scan_layers" in before["settings"] and "compute.layers" in now["settings"]
  assert now["compute"] == dataclasses.asdict(result.experiment.compute)


def test_a_start_is_recorded_whatever_the_names_of_its_files(tmp_path):
  """A name that is no UTF-8 reaches Python with halves of pairs in it, which UTF-8 cannot hold."""
  for number in range(3):
    append_env(tmp_path, {"number": number, "command": ["--workdir", "w\udcff", "é"]})
  starts = json.loads((tmp_path / "env.json").read_text(encoding="utf-8"))
  assert [start["number"] for start in starts] == [0, 1, 2]
  assert {tuple(start["command"]) for start in starts} == {("--workdir", "w\udcff", "é")}


def test_files_are_read_no_further_than_they_can_mean(run_folder):
  """Small pieces of JSON take 25 times their bytes of memory: settings of 60 MB would take
  1.5 GB.
  """
  path = run_folder / "experiment.json"
  path.write_text(path.read_text() + " " * MAX_SETTINGS)
  with pytest.raises(
    UserError, match=r"experiment\.json has .* bytes; at most 1,048,576 are read of such a file"
  ):
    read_run_files(run_folder)
  path = run_folder / "env.json"
  path.write_text("[" + "[]," * (MAX_STARTS // 3) + "[]]")
  append_env(run_folder, {"number": 1})
  assert json.loads(path.read_text()) == [{"number": 1}]


@pytest.mark.parametrize("key", ["data", "weights"])
def test_where_something_was_found_is_a_path_at_most(run_folder, key):
  path = run_folder / "experiment.json"
  settings = json.loads(path.read_text())
  for location, sound in (("d/" * 2047 + "a\udcff\x1b", True), ("d" * 9000, False), (7, False)):
    path.write_text(
      json.dumps(settings | {key: {"kind": "path", "location": location, "sha256": "0" * 64}})
    )
    if sound:
      assert getattr(read_run_files(run_folder), key)["location"] == location
    else:
      with pytest.raises(UserError, match=r"experiment\.json does not say which (data|weights)"):
        read_run_files(run_folder)


def test_starts_that_cannot_be_read_just_now_are_not_forgotten(run_folder):
  """Too many open files: the log of starts begins anew where it is damaged only."""
  before = (run_folder / "env.json").read_bytes()
  real = os.open

  def refuse(path, *args, **kwargs):
    if str(path).endswith("env.json"):
      raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return real(path, *args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"env\.json: Too many open files"):
      append_env(run_folder, {"command": []})
  assert (run_folder / "env.json").read_bytes() == before
