"""Rows 5 and 6: damaged checkpoints are named and passed over.

Where none is left, nothing begins anew by itself.
"""

import errno
import functools
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import children
import numpy as np
import pytest
import small_runs

from jgpt import train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change
from jgpt.errors import UserError
from jgpt.plan import plan_run
from jgpt.runs import manifest
from jgpt.runs.open import open_run

STEPS = 18
CHANGES = {
  "train.save_every": 4,
  "train.keep_latest": 2,
  "optimizer.decay_steps": STEPS,
  "train.log_every": 5,
}


def experiment(steps):
  base, settings = children.EXPERIMENTS["names"]
  return change(load_experiment(base), settings | CHANGES | {"train.steps": steps})


def go_on(workdir, steps=STEPS):
  with small_runs.compiled_quickly():
    return train.train_run(plan_run(experiment(steps), workdir=workdir, name="names"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """The texts, a run that stopped at step 12 with checkpoints of 8 and 12, and one that went on to
  the end.
  """
  folder = tmp_path_factory.mktemp("damage")
  children.write_texts(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    go_on(folder / "good", 12)
    shutil.copytree(folder / "good", folder / "ended")
    go_on(folder / "ended")
  assert children.steps_there(folder / "good") == [8, 12]
  return folder


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
  monkeypatch.chdir(made)
  return shutil.copytree(made / "good", tmp_path / "run")


def flip(content, place=None):
  place = len(content) // 2 if place is None else place
  return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


DAMAGES = {
  "flipped": flip,
  "first byte": lambda content: flip(content, 0),
  "last byte": lambda content: flip(content, -1) if len(content) > 1 else flip(content, 0),
  "truncated": lambda content: content[:-1],
  "halved": lambda content: content[: len(content) // 2],
  "emptied": lambda content: b"",
  "longer": lambda content: content + b"\0",
  "garbage": lambda content: np.random.default_rng(0).bytes(len(content)),
  "deleted": None,
}


def damage(path, how):
  content = path.read_bytes()
  if DAMAGES[how] is None:
    path.unlink()
    return
  if (changed := DAMAGES[how](content)) == content:
    changed = content + b"x"  # what was empty stays no secret either
  path.write_bytes(changed)


def files_of(folder):
  return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_row_05_every_damage_to_every_file_is_found_and_named(copy):
  """Nine damages to each of some thirty files, one at a time.

  The checkpoint before is not blamed.
  """
  folder = copy / "checkpoints" / "12"
  assert manifest.find_damage(folder) is None
  names, unnoticed = files_of(folder), []
  assert len(names) > 20 and "manifest.json" in names
  for name in names:
    content = (folder / name).read_bytes()
    for how in DAMAGES:
      if name == "manifest.json" and how == "deleted":
        continue  # then there is no such step: below
      damage(folder / name, how)
      found = manifest.find_damage(folder)
      if found is None:
        unnoticed.append((name, how))
      else:
        assert name in found and "\n" not in found, (name, how, found)
      (folder / name).write_bytes(content)
  assert unnoticed == [
    ("manifest.json", "truncated")
  ]  # its last byte ends its last line: it says the same
  assert manifest.find_damage(folder) is None


def test_row_05_a_file_that_nobody_wrote_is_found(copy):
  (copy / "checkpoints" / "12" / "params" / "d" / "0").write_bytes(b"")
  assert "d/0" in manifest.find_damage(copy / "checkpoints" / "12")


@pytest.mark.slow
def test_row_05_no_flipped_bit_of_a_manifest_changes_what_a_run_becomes(copy):
  """Every fifth byte in turn: found.

  Or, where it says nothing that a run is made of, without consequence.
  """
  folder = copy / "checkpoints" / "12"
  path = folder / "manifest.json"
  content, sound = path.read_bytes(), manifest.read_manifest(folder)
  unnoticed = set()
  for place in range(0, len(content), 5):
    path.write_bytes(flip(content, place))
    if manifest.find_damage(folder) is None:
      got = manifest.read_manifest(folder)
      unnoticed |= {
        name
        for name in ("step", "data", "heldout_loss", "files")
        if getattr(got, name) != getattr(sound, name)
      }
  path.write_bytes(content)
  assert unnoticed == set(), (
    f"a flipped bit in these fields of the manifest goes unnoticed: {sorted(unnoticed)}"
  )


def write_sealed(path, value):
  """Writes a manifest with its own digest, as `manifest.py` describes it."""
  value.pop("sha256", None)
  text = json.dumps(value, sort_keys=True, separators=(",", ":"))
  path.write_text(json.dumps(value | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))


@pytest.mark.slow
def test_row_05_a_leaf_that_reads_otherwise_than_recorded_is_named(copy, capfd):
  """Where files are whole and arrays are not those of the digests, the leaf is named."""
  path = copy / "checkpoints" / "12" / "manifest.json"
  value = json.loads(path.read_text())
  for item in ("params", "train_state"):
    name = next(name for name in value["leaves"] if name.startswith(item) and "w_up" in name)
    digest = value["leaves"][name]["digest"]
    value["leaves"][name]["digest"] = ("0" if digest[0] != "0" else "1") + digest[1:]
    write_sealed(path, value)
    if item == "params":  # all that a reader needs
      assert open_run(copy).step == 8
      assert name in capfd.readouterr().err
      with pytest.raises(UserError, match=re.escape(name.removeprefix("params/"))):
        open_run(copy, 12)
    value["leaves"][name]["digest"] = digest
  try:
    go_on(copy)
  except UserError as error:  # may be left to a person: the files are what was written
    assert name in str(error) and children.steps_there(copy) == [8, 12]
  else:
    assert name in capfd.readouterr().err and (copy / "checkpoints" / "12.damaged").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_row_05_a_run_goes_on_from_the_one_before_to_the_same_bits(
  made, tmp_path, monkeypatch, capfd
):
  """Each file in turn, the kind of damage taking turns.

  The damaged folder is kept beside under another name.
  """
  monkeypatch.chdir(made)
  expected = children.bits(made / "ended")
  names = files_of(made / "good" / "checkpoints" / "12")
  for number, name in enumerate(names):
    how = list(DAMAGES)[number % len(DAMAGES)]
    if name == "manifest.json":
      how = "garbage"
    workdir = shutil.copytree(made / "good", tmp_path / str(number))
    damage(workdir / "checkpoints" / "12" / name, how)
    damaged = {
      n: (workdir / "checkpoints" / "12" / n).read_bytes()
      for n in files_of(workdir / "checkpoints" / "12")
    }
    capfd.readouterr()
    # A reader: falls back where it reads that file, and changes nothing. An explicit step is an
    # error.
    if not name.startswith("train_state"):
      before = {n: (workdir / n).read_bytes() for n in files_of(workdir)}
      assert open_run(workdir).step == 8, (name, how)
      warning = capfd.readouterr().err
      assert warning.count("\n") == 1 and name in warning and "step 12 is damaged" in warning, (
        name,
        how,
        warning,
      )
      with pytest.raises(UserError, match=re.escape(name)):
        open_run(workdir, 12)
      assert {n: (workdir / n).read_bytes() for n in files_of(workdir)} == before
    result = go_on(workdir)
    warning = capfd.readouterr().err
    assert name in warning and "12" in warning and "8" in warning, (name, how, warning)
    assert int(result.state.step) == STEPS
    got = children.bits(workdir)
    children.assert_same(got, expected)
    aside = workdir / "checkpoints" / "12.damaged"
    assert {n: (aside / n).read_bytes() for n in files_of(aside)} == damaged, (name, how)
    assert manifest.list_steps(workdir) == children.steps_there(made / "ended")
    shutil.rmtree(workdir)
  print(f"\n{len(names)} files")


@pytest.mark.slow
def test_row_05_damaged_twice_is_set_aside_twice(copy, capfd):
  damage(copy / "checkpoints" / "12" / "params" / "_METADATA", "flipped")
  go_on(copy, 12)
  damage(copy / "checkpoints" / "12" / "params" / "_METADATA", "flipped")
  go_on(copy)
  folders = {p.name for p in (copy / "checkpoints").iterdir()}
  assert len([name for name in folders if name.startswith("12.damaged")]) == 2
  assert capfd.readouterr().err.count("_METADATA") == 2


@pytest.mark.slow
def test_row_05_as_commands(made, copy):
  """`run` says one line, sets aside and goes on.

  `sample` says one line and reads the one before.
  """
  damage(copy / "checkpoints" / "12" / "params" / "manifest.ocdbt", "flipped")
  before = files_of(copy)
  read = children.run("jgpt.sample", "--run", copy, "--num", 2, cwd=made)
  assert read.status == 0 and len(read.out.splitlines()) == 2
  assert read.err.count("\n") == 1 and "params/manifest.ocdbt" in read.err
  refused = children.run("jgpt.sample", "--run", copy, "--num", 2, "--step", 12, cwd=made)
  assert (
    refused.status == 2
    and refused.err.startswith("error: ")
    and "params/manifest.ocdbt" in refused.err
  )
  assert files_of(copy) == before
  args = ["--experiment", "names", "--workdir", copy]
  settings = children.EXPERIMENTS["names"][1] | CHANGES | {"train.steps": STEPS}
  for key, value in settings.items():
    args += ["--set", f"{key}={value}"]
  again = children.train(*args, cwd=made)
  assert (
    "going on from step 8" in again.out
    and "params/manifest.ocdbt" in again.err
    and "12.damaged" in again.err
  )
  assert children.steps_there(copy)[-1] == STEPS


# --- Row 6 ---


def snapshot(workdir):
  return {name: (workdir / name).read_bytes() for name in files_of(workdir)}


@pytest.mark.parametrize("how", ["flipped", "emptied", "garbage"])
@pytest.mark.parametrize(
  "name", ["manifest.json", "params/_METADATA", "train_state/manifest.ocdbt", "experiment.json"]
)
def test_row_06_where_every_checkpoint_is_bad_nothing_begins_anew(copy, name, how):
  for step in (8, 12):
    damage(copy / "checkpoints" / str(step) / name, how)
  before = snapshot(copy)
  with pytest.raises(UserError) as error:
    go_on(copy)
  assert name in str(error.value) and "--fresh" in str(error.value) and "\n" not in str(error.value)
  after = snapshot(copy)
  for relative, content in before.items():  # all of it is still there, perhaps set aside
    if relative not in ("env.json", "metrics.jsonl"):
      moved = re.sub(r"checkpoints/(8|12)/", r"checkpoints/\1.damaged/", relative)
      assert after.get(relative, after.get(moved)) == content, relative
  with pytest.raises(UserError):  # nor the second time
    go_on(copy)
  if not name.startswith("train_state"):
    with pytest.raises(UserError):
      open_run(copy)


def test_row_06_where_every_manifest_is_gone_nothing_begins_anew_without_a_word(copy, capfd):
  """What a person, or a copy that was cut off, may do.

  A killed process leaves one such folder at most.
  """
  for step in (8, 12):
    damage(copy / "checkpoints" / str(step) / "manifest.json", "deleted")
  before = snapshot(copy)
  try:
    go_on(copy)
  except UserError as error:
    assert "manifest" in str(error)
    after = snapshot(copy)
    assert [name for name in before if name != "env.json" and after.get(name) != before[name]] == []
  else:
    pytest.fail(f"began anew, and deleted both: {capfd.readouterr().err!r}")


RUN_FILES = ["experiment.json", "tokenizer.json"]


@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied", "garbage", "deleted"])
@pytest.mark.parametrize("name", RUN_FILES)
def test_row_06_a_damaged_file_of_the_run_folder_is_never_a_fresh_start(made, copy, name, how):
  """Refused by name, or mended from the checkpoint's copy.

  Never overwritten by a run that begins anew.
  """
  if (name, how) == ("experiment.json", "truncated"):
    how = "halved"  # its last byte is a newline
  damage(copy / name, how)
  try:
    result = go_on(copy)
  except UserError as error:
    assert name in str(error) and "\n" not in str(error)
    assert children.steps_there(copy) == [8, 12]
  else:
    assert (int(result.state.step), len(result.losses)) == (STEPS, STEPS)
    children.assert_same(children.bits(copy), children.bits(made / "ended"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flipped", "halved", "emptied", "garbage", "deleted"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "env.json", ".lock"])
def test_row_06_logs_are_not_worth_a_run(made, copy, name, how):
  """A damaged log, list of starts or lock file: the run goes on to the same parameters."""
  if not (copy / name).exists():
    (copy / name).write_text('{"pid": 1, "host": "elsewhere"}')
  damage(copy / name, how)
  assert int(go_on(copy).state.step) == STEPS
  assert children.bits(copy).leaves == children.bits(made / "ended").leaves


@pytest.mark.slow
def test_row_06_no_checkpoint_where_one_was_asked_for(made, copy):
  """Commands that need one: status 2, one line; also where the folder is empty."""
  for number, args in enumerate((["--step", 10], ["--step", -1])):
    asked = children.run("jgpt.sample", "--run", copy, *args, cwd=made)
    assert asked.status == 2 and asked.err.count("error: ") == 1 and asked.out == "", number
  shutil.rmtree(copy / "checkpoints")
  for module in ("jgpt.sample", "jgpt.evaluate"):
    asked = children.run(module, "--run", copy, cwd=made)
    assert asked.status == 2 and asked.err.startswith("error: ") and "no checkpoint" in asked.err


def test_row_05_a_manifest_that_is_gone_is_said(copy, capfd):
  """Without it there is no such step: a save leaves that when it is cut short.

  It is cleared away, with a line.
  """
  (copy / "checkpoints" / "12" / "manifest.json").unlink()
  go_on(copy)
  assert capfd.readouterr().err == (
    f"{copy / 'checkpoints' / '12'} had no manifest.json, as a save leaves it that is cut short: "
    "it was removed\n"
  )
  assert children.steps_there(copy)[-1] == STEPS


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("name", ["manifest.json", "params/_METADATA"])
def test_row_05_what_the_system_does_not_read_now_is_no_damage(copy, monkeypatch, name, number):
  """No permission, too many open files, a server that is away: the checkpoint may be sound, and is
  left alone.
  """
  path = copy / "checkpoints" / "12" / name
  real = os.open, open

  def refuse(given, *args, _open, **kwargs):
    if os.fspath(given) == str(path):
      raise OSError(number, os.strerror(number), str(path))
    return _open(given, *args, **kwargs)

  monkeypatch.setattr(os, "open", functools.partial(refuse, _open=real[0]))
  monkeypatch.setattr("builtins.open", functools.partial(refuse, _open=real[1]))
  with pytest.raises(OSError, match=re.escape(os.strerror(number))) as raised:
    plan_run(experiment(STEPS), workdir=copy, name="names")
  assert raised.value.filename == str(path)
  monkeypatch.undo()
  assert (
    children.steps_there(copy) == [8, 12]
    and manifest.find_damage(path.parents[name.count("/")]) is None
  )


def test_row_05_a_checkpoint_of_another_step_is_named(copy):
  """Its files are whole and its manifest says 12, but its state is that of step 8."""
  eight, twelve = (copy / "checkpoints" / step for step in ("8", "12"))
  shutil.rmtree(twelve / "train_state")
  shutil.copytree(eight / "train_state", twelve / "train_state")
  value, other = (json.loads((folder / "manifest.json").read_text()) for folder in (twelve, eight))
  for table in ("leaves", "files"):
    kept = {name: row for name, row in value[table].items() if not name.startswith("train_state/")}
    value[table] = kept | {
      name: row for name, row in other[table].items() if name.startswith("train_state/")
    }
  write_sealed(twelve / "manifest.json", value)
  with pytest.raises(UserError, match=r"checkpoints/12 holds the state of step 8$"):
    go_on(copy)


def test_row_05_a_checkpoint_that_may_not_be_entered_is_no_step_without_a_manifest(
  copy, monkeypatch
):
  """Whoever cannot look must not clear it away."""
  real = Path.lstat

  def lstat(path):
    if path == copy / "checkpoints" / "12" / "manifest.json":
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return real(path)

  monkeypatch.setattr(Path, "lstat", lstat)
  with pytest.raises(PermissionError):
    go_on(copy)
  monkeypatch.undo()
  assert children.steps_there(copy) == [8, 12]


@pytest.mark.parametrize("size", [-1, 2**63, 10**4000])
def test_row_05_a_size_that_no_file_has_is_said_in_one_line(copy, size):
  folder = copy / "checkpoints" / "12"
  value = json.loads((folder / "manifest.json").read_text())
  value["files"]["experiment.json"]["bytes"] = size
  write_sealed(folder / "manifest.json", value)
  assert (
    manifest.find_damage(folder)
    == f"{folder / 'manifest.json'} is not a manifest: a field is missing or of the wrong type."
  )


def test_row_05_settings_that_cannot_be_read_just_now_are_no_damage(copy, monkeypatch, capfd):
  """Too many open files when a checkpoint's copies are read: neither passed over by a reader nor
  set aside by a run.
  """
  path, real = copy / "checkpoints" / "12" / "experiment.json", os.open

  def refuse(given, *args, **kwargs):
    if os.fspath(given) == str(path):
      raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return real(given, *args, **kwargs)

  monkeypatch.setattr(os, "open", refuse)
  for read in (
    open_run,
    lambda workdir: plan_run(experiment(STEPS), workdir=workdir, name="names"),
  ):
    with pytest.raises(UserError, match=re.escape(f"cannot read {path}: Too many open files")):
      read(copy)
  assert capfd.readouterr().err == "" and children.steps_there(copy) == [8, 12]
