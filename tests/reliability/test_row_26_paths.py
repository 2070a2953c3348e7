"""Row 26: a stranger's run folder leads nowhere else, by links, names or pipes.

And nothing in it is executed.

What is read in it is read without following a link or waiting for a pipe, what is written or
deleted is inside of it. Names in a manifest of token files: `tests/data/test_token_files.py`. Any
content of the files: `test_fuzz_run_folders.py`.
"""

import contextlib
import gc
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys

import children
import fuzzing
import numpy as np
import pytest
import small_runs
from test_hostile_weights import Evil

from jgpt import cli, export, run, sample, train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.errors import UserError
from jgpt.plan import plan_run
from jgpt.runs import digest, manifest
from jgpt.runs.folder import RunFiles, append_env, read_run_files, write_run_files
from jgpt.runs.open import open_run
from jgpt.runs.rows import read_jsonl
from jgpt.system import locks
from jgpt.text.tokenizer import CharTokenizer

STEPS = 18
CHANGES = {
  "train.save_every": 4,
  "train.keep_latest": 2,
  "optimizer.decay_steps": STEPS,
  "train.log_every": 5,
}

# Where one fails; they are complained of when they are collected, which should not be in another
# test.
ORBAX_LEAVES_READS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def go_on(workdir, steps=STEPS):
  base, settings = children.EXPERIMENTS["names"]
  experiment = change(load_experiment(base), settings | CHANGES | {"train.steps": steps})
  with small_runs.compiled_quickly():
    return train.train_run(plan_run(experiment, workdir=workdir, name="names"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A folder with the texts, and a run that stopped at step 12 with checkpoints of 8 and 12."""
  folder = tmp_path_factory.mktemp("paths")
  children.write_texts(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    go_on(folder / "good", 12)
  assert children.steps_there(folder / "good") == [8, 12]
  (folder / "good" / "samples").mkdir(exist_ok=True)
  return folder


@pytest.fixture
def folders(made, tmp_path, monkeypatch):
  """A copy of the run, and elsewhere another whole copy, which nothing may touch."""
  monkeypatch.chdir(made)
  shutil.copytree(made / "good", tmp_path / "elsewhere")
  return shutil.copytree(made / "good", tmp_path / "run"), tmp_path / "elsewhere"


def look(folder):
  """All there is in a folder: name -> what it is, its content, when it was changed."""
  return {
    str(path.relative_to(folder)): (
      path.lstat().st_mode,
      path.lstat().st_mtime_ns,
      path.read_bytes() if path.is_file() else b"",
    )
    for path in sorted(folder.rglob("*"))
  }


@contextlib.contextmanager
def alarm(seconds=60):
  """What waits longer, for the other end of a pipe, is interrupted."""

  def stop(number, frame):
    raise AssertionError(f"still waiting after {seconds} s")

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def replace(path, elsewhere, kind):
  """Puts a link, a pipe or a device in the place of what is there."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  path.unlink(missing_ok=True)
  path.parent.mkdir(parents=True, exist_ok=True)
  if kind == "link":
    path.symlink_to(elsewhere)
  elif kind == "pipe":
    os.mkfifo(path)
  else:
    try:
      os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero, which never ends
    except OSError:
      pytest.skip("this process may not make devices")


KINDS = ("link", "pipe", "device")
# What a run folder holds -> where a link in its place leads. (All of them exist elsewhere.)
PLACES = {
  "checkpoints": "checkpoints",
  "checkpoints/12": "checkpoints/12",
  "checkpoints/12/params": "checkpoints/12/params",
  "checkpoints/12/train_state": "checkpoints/12/train_state",
  "checkpoints/12/params/_METADATA": "checkpoints/12/params/_METADATA",
  "checkpoints/12/manifest.json": "checkpoints/12/manifest.json",
  "checkpoints/12/experiment.json": "checkpoints/12/experiment.json",
  "checkpoints/12/tokenizer.json": "checkpoints/12/tokenizer.json",
  "checkpoints/8/params/extra": "checkpoints",
  "checkpoints/10": "checkpoints/12",
  "checkpoints/10/params": "checkpoints",
  "checkpoints/20.orbax-checkpoint-tmp-1": "checkpoints/12",
  "checkpoints/20.orbax-checkpoint-tmp-1/d": "checkpoints",
  "checkpoints/12.damaged": "checkpoints/12",
  "experiment.json": "experiment.json",
  "tokenizer.json": "tokenizer.json",
  "env.json": "env.json",
  "metrics.jsonl": "metrics.jsonl",
  "samples": "samples",
  ".lock": "metrics.jsonl",
  ".experiment.json.tmp": "metrics.jsonl",
  ".env.json.tmp": "metrics.jsonl",
  ".metrics.jsonl.tmp": "metrics.jsonl",
  "checkpoints/12/.manifest.json.tmp": "metrics.jsonl",
}


@pytest.fixture
def files(tmp_path):
  """As `folders`, in a moment: a run folder's files are real, and what orbax would have written is
  not.
  """
  tokenizer = CharTokenizer("\n abc", True)
  experiment = resolve(load_experiment("names"), tokenizer.vocab_size)
  data = {"kind": "path", "location": "x", "sha256": "0" * 64}
  for folder in (tmp_path / "run", tmp_path / "elsewhere"):
    write_run_files(folder, RunFiles("names", experiment, tokenizer, data))
    append_env(folder, {"time": "now"})
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0}\n')
    for step in (8, 12):
      inside = folder / "checkpoints" / str(step)
      for name in (
        "params/_METADATA",
        "params/d/0",
        "train_state/_METADATA",
        "experiment.json",
        "tokenizer.json",
      ):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_bytes(
          (folder / name).read_bytes() if name.endswith(".json") else name.encode()
        )
      manifest.write_manifest(inside, manifest.Manifest(step, data, None, {}, {}))
    (folder / "samples").mkdir()
  return tmp_path / "run", tmp_path / "elsewhere"


READERS = {
  "list_steps": manifest.list_steps,
  "find_damage": lambda run: manifest.find_damage(run / "checkpoints" / "12"),
  "read_run_files": read_run_files,
  "read_jsonl": lambda run: read_jsonl(run / "metrics.jsonl"),
  "is_held": locks.is_held,
  "describe_holder": locks.describe_holder,
}


def refused(readers, run):
  """The names of the readers that raise `UserError` or find damage."""
  names = set()
  for name, read in readers.items():
    try:
      if name == "find_damage" and read(run) is not None:
        names.add(name)
      read(run)
    except UserError as error:
      assert str(run) in str(error) and str(error).isprintable() and len(str(error)) < 800, (
        name,
        error,
      )
      names.add(name)
  return names


@pytest.mark.parametrize("kind", KINDS)
def test_row_26_each_file_is_read_in_its_place_or_not_at_all(files, kind):
  """Neither a link, though what it leads to is sound, nor a pipe or a device, of which there is no
  end.
  """
  run, elsewhere = files
  before, good = look(elsewhere), run.with_name("good")
  shutil.copytree(run, good)
  assert refused(READERS, run) == set()
  found = {}
  for place, there in PLACES.items():
    shutil.rmtree(run)
    shutil.copytree(good, run)
    replace(run / place, elsewhere / there, kind)
    was = look(run)
    with alarm(20):
      found[place] = refused(READERS, run)
    assert look(run) == was and look(elsewhere) == before, place
  for place in PLACES:
    if place.startswith("checkpoints/12/"):
      assert found[place] == {"find_damage"}, place
  assert found["metrics.jsonl"] == {"read_jsonl"}
  assert found["experiment.json"] == found["tokenizer.json"] == {"read_run_files"}
  assert found["samples"] == found[".lock"] == found["env.json"] == set()
  assert "list_steps" in found["checkpoints"] or kind != "link"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_row_26_nothing_is_read_through_a_link_or_waited_for(folders, made, kind, capfd):
  """What is taken is then a step that is whole, which is in this folder.

  Or nothing is, and one line says why.
  """
  run, elsewhere = folders
  before, taken = look(elsewhere), {}
  for place, there in PLACES.items():
    shutil.rmtree(run)
    shutil.copytree(made / "good", run)
    replace(run / place, elsewhere / there, kind)
    was = look(run)
    with alarm():
      try:
        taken[place] = open_run(run).step
      except UserError as error:
        taken[place] = None
        assert str(run) in str(error) and str(error).isprintable() and len(str(error)) < 800, (
          place,
          error,
        )
    assert look(run) == was and look(elsewhere) == before, place
  capfd.readouterr()
  assert taken["checkpoints"] is None
  damaged = [
    place for place in PLACES if place.startswith("checkpoints/12/") and "train_state" not in place
  ]
  assert {place: taken[place] for place in [*damaged, "checkpoints/12"]} == dict.fromkeys(
    [*damaged, "checkpoints/12"], 8
  )
  assert taken["env.json"] == taken["metrics.jsonl"] == taken["samples"] == taken[".lock"] == 12


@pytest.mark.slow
@pytest.mark.parametrize(
  ("place", "kind"),
  [
    *((place, "link") for place in PLACES),
    *((place, "pipe") for place in PLACES if "." in place.split("/")[-1] or place == "checkpoints"),
    *(
      (place, "device")
      for place in ("experiment.json", "metrics.jsonl", "checkpoints/12/manifest.json")
    ),
  ],
)
def test_row_26_nothing_is_written_or_deleted_through_a_link(folders, place, kind, capfd):
  """The run goes on in this folder, with saving, retention and clearing away, or is refused.

  Elsewhere all stays.
  """
  run, elsewhere = folders
  replace(run / place, elsewhere / PLACES[place], kind)
  before, error = look(elsewhere), None
  with alarm(120):
    try:
      go_on(run)
    except UserError as refused:
      error = str(refused)
      assert str(run) in error and error.isprintable() and len(error) < 800, error
  capfd.readouterr()
  assert look(elsewhere) == before
  if error is None:
    assert children.steps_there(run)[-1] == STEPS
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] == STEPS
  if place in ("checkpoints", "experiment.json", "tokenizer.json"):
    assert error is not None


@pytest.mark.slow
@pytest.mark.parametrize(
  ("verb", "place", "kind", "status"),
  [
    ("sample", "checkpoints", "link", 2),
    ("sample", "checkpoints/12", "link", 0),
    ("sample", "checkpoints/12/params/_METADATA", "pipe", 0),
    ("sample", "checkpoints/12/manifest.json", "device", 0),
    ("evaluate", "experiment.json", "pipe", 2),
    ("evaluate", "experiment.json", "link", 2),
    ("inspect", "checkpoints", "link", 2),
    ("inspect", "checkpoints/12/tokenizer.json", "pipe", 0),
    ("run", "checkpoints", "link", 2),
    ("run", "experiment.json", "pipe", 2),
    ("run", "metrics.jsonl", "link", None),
    ("run", "metrics.jsonl", "pipe", None),
    ("run", "samples", "link", None),
    ("run", ".lock", "pipe", None),
    ("run --fresh", "checkpoints", "link", 0),
    ("run --fresh", "experiment.json", "pipe", 0),
  ],
)
def test_row_26_commands_neither_follow_nor_wait(
  folders, made, tmp_path, verb, place, kind, status
):
  run, elsewhere = folders
  replace(run / place, elsewhere / PLACES[place], kind)
  before = look(elsewhere)
  args = ["--run", run, *(["--text", "ax"] if verb == "inspect" else [])]
  if verb.startswith("run"):
    args = [
      *children.arguments(
        "names", run, **{n.replace(".", "__"): v for n, v in CHANGES.items()}, train__steps=STEPS
      )
    ]
    args += verb.split()[1:]
  child = children.run(f"jgpt.{verb.split()[0]}", *args, cwd=made, timeout=100)
  assert child.status in ((0, 2) if status is None else (status,)), child.out + child.err
  assert "Traceback" not in child.err and look(elsewhere) == before
  if child.status == 2:
    assert (
      child.err.startswith("error: ") and child.err.count("\n") == 1 and str(run) in child.err
    ), child.err


# --- Names ---


def write_manifest(folder, **changes):
  """Writes a step's manifest anew, as somebody would who means its files to be believed."""
  path = folder / "manifest.json"
  value = json.loads(path.read_text()) | changes
  value["files"] = manifest.digest_files(folder) | changes.get("files", {})
  path.write_text(json.dumps(fuzzing.seal_manifest(value)))


@pytest.mark.parametrize(
  "name",
  [
    "../{}",
    "../../../elsewhere/{}",
    "{absolute}",
    "params/../../../../elsewhere/{}",
    "",
    ".",
    "a\0b",
  ],
)
def test_row_26_a_name_in_a_manifest_leads_nowhere(files, name):
  """Even one that is there, with the size and the digest that the manifest says."""
  run, elsewhere = files
  step, target = run / "checkpoints" / "12", elsewhere / "experiment.json"
  before = look(elsewhere)
  there = manifest.digest_files(elsewhere)["experiment.json"]
  write_manifest(step, files={name.format("experiment.json", absolute=target): there})
  assert "manifest.json lists a file that is not there" in manifest.find_damage(step)
  assert manifest.find_damage(step.with_name("8")) is None
  manifest.delete_old_steps(run, 1, 0)
  assert children.steps_there(run) == [12] and look(elsewhere) == before
  manifest.remove_step(step)
  assert look(elsewhere) == before and not step.exists()


@pytest.mark.slow
@pytest.mark.parametrize("field", ["name", "data", "weights"])
def test_row_26_words_in_experiment_json_name_no_file(folders, field, tmp_path):
  """They are shown to a person; sampling opens none of them."""
  run, _ = folders
  for path in (run / "experiment.json", run / "checkpoints" / "12" / "experiment.json"):
    value = json.loads(path.read_text())
    found = {"kind": "path", "location": "../../../etc/passwd", "sha256": "0" * 64}
    value[field] = {"name": "../../name", "data": found, "weights": found}[field]
    value["experiment"]["data"]["path"] = value["experiment"]["train"]["init_from"] = str(
      tmp_path / "pipe"
    )
    path.write_text(json.dumps(value))
  write_manifest(run / "checkpoints" / "12")
  os.mkfifo(tmp_path / "pipe")
  with alarm():
    assert open_run(run).step == 12


@pytest.mark.slow
@pytest.mark.parametrize("path", ["pipe", "/dev/zero", "/dev/stdin"])
def test_row_26_evaluating_a_strangers_run_reads_no_pipe_or_device(folders, made, tmp_path, path):
  """Its data are where its experiment.json says: that is a stranger's word too."""
  run, _ = folders
  os.mkfifo(tmp_path / "pipe")
  for file in (run / "experiment.json", run / "checkpoints" / "12" / "experiment.json"):
    value = json.loads(file.read_text())
    value["experiment"]["data"]["path"] = str(tmp_path / "pipe") if path == "pipe" else path
    file.write_text(json.dumps(value))
  write_manifest(run / "checkpoints" / "12")
  with children.Child("jgpt.evaluate", "--run", run, cwd=made) as child:
    resource.prlimit(child.process.pid, resource.RLIMIT_AS, (16 << 30, 16 << 30))
    assert child.wait(60) == 2 and child.err.startswith("error: ") and child.err.count("\n") == 1, (
      child.err[-500:]
    )


# A terminal's title, a line that is gone and another, writing backwards.
ESCAPES = "\x1b]0;owned\x07\x1b[2K\rall is well\n\u202e"
ESCAPED = r"\x1b]0;owned\x07\x1b[2K\rall is well\n\u202e"


def test_row_26_a_name_out_of_a_manifest_gives_a_terminal_no_orders(files, capfd):
  """An error is one line that is printable, whoever chose its words."""
  folder, _ = files
  step = folder / "checkpoints" / "12"
  write_manifest(
    step, leaves={f"params/{ESCAPES}": {"dtype": "float32", "shape": [1], "digest": "0"}}
  )
  assert cli.guard(lambda: sample.main(["--run", str(folder), "--step", "12"])) == 2
  said = capfd.readouterr()
  assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
  assert said.err[:-1].isprintable() and f"params/{ESCAPED} is float32[1] there" in said.err


@pytest.mark.slow
def test_row_26_names_that_are_no_words(tmp_path):
  """Of a text, with a terminal's orders and a byte that is no UTF-8.

  Recorded, found again, and shown escaped.
  """
  children.write_texts(tmp_path)
  name = f"t\udcff{ESCAPES}.txt"
  shutil.copy(tmp_path / "words.txt", tmp_path / name)
  args = children.arguments("names", "run", data__path=name, train__steps=6)
  first, again = children.train(*args, cwd=tmp_path), children.train(*args, cwd=tmp_path)
  assert "this run is finished" in again.out
  starts = json.loads((tmp_path / "run" / "env.json").read_text(encoding="utf-8"))
  assert [f"data.path={name}" in start["command"] for start in starts] == [True, True]
  assert read_run_files(tmp_path / "run").data["location"] == name
  read = [
    children.run(f"jgpt.{verb}", "--run", "run", cwd=tmp_path) for verb in ("sample", "evaluate")
  ]
  assert [child.status for child in read] == [0, 0], read[0].err + read[1].err
  assert all(rf" t\udcff{ESCAPED}.txt (path" in child.out for child in (first, again, read[1])), (
    first.out
  )
  for child in (
    first,
    again,
    *read,
  ):  # a run ends with the command for another, in the user's own words
    assert child.err == "" and child.out.partition("\nnext:")[0].replace("\n", "").isprintable()
  (tmp_path / name).unlink()
  gone = children.run("jgpt.evaluate", "--run", "run", cwd=tmp_path)
  assert (
    gone.status == 2
    and gone.err.count("\n") == 1
    and gone.err[:-1].isprintable()
    and r"\x1b]0;" in gone.err
  )


def test_row_26_a_run_folder_that_is_not_called_in_utf8_is_refused(tmp_path, monkeypatch, capfd):
  """TensorStore opens none; it is said before anything is made or computed."""
  monkeypatch.chdir(tmp_path)
  assert (
    cli.guard(lambda: run.main(["--experiment", "names", "--steps", "1", "--workdir", "w\udcff"]))
    == 2
  )
  said = capfd.readouterr()
  assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
  assert r"w\udcff" in said.err and "UTF-8" in said.err and not os.listdir(tmp_path)


@pytest.mark.parametrize(
  "name", ["x" * 300, "d/" * 3000, "x" * 300 + ".bin", f"{'x' * 300}/model.safetensors"]
)
def test_row_26_weights_with_a_name_that_is_too_long(tmp_path, monkeypatch, capfd, name):
  monkeypatch.chdir(tmp_path)
  assert (
    cli.guard(lambda: run.main(["--experiment", "names", "--workdir", "run", "--init-from", name]))
    == 2
  )
  said = capfd.readouterr()
  assert (
    said.out == "" and said.err.startswith("error: train.init_from=") and said.err.count("\n") == 1
  )
  assert "too long" in said.err and not os.listdir(tmp_path)


@pytest.mark.parametrize(
  "name", ["x" * 300, f"{'x' * 300}.bin", "d/" * 3000 + "x.bin", "text/x.bin"]
)
def test_row_26_an_export_to_where_no_file_can_be(tmp_path, monkeypatch, capfd, name):
  """Said before the run is read: a name that is too long, or in a folder that is a file."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "text").write_text("")
  kind = "llmc" if name.endswith(".bin") else "hf"
  assert cli.guard(lambda: export.main(["--run", "absent", "--format", kind, "--out", name])) == 2
  said = capfd.readouterr()
  assert said.out == "" and said.err.startswith("error: --out ") and said.err.count("\n") == 1
  assert "cannot be written" in said.err and os.listdir(tmp_path) == ["text"]


# --- Nothing is executed ---


@pytest.mark.slow
@ORBAX_LEAVES_READS
def test_row_26_a_pickle_in_the_place_of_any_file_is_not_opened(folders, tmp_path, capfd):
  """With a manifest that calls it sound, so that it reaches whatever reads that file."""
  run, _ = folders
  step, marker = run / "checkpoints" / "12", tmp_path / "executed"
  names = sorted(
    name for name, _ in manifest.walk_files(step, ["params"]) if name != "manifest.json"
  )
  assert len(names) > 5
  for name in names:
    before = (step / name).read_bytes()
    (step / name).write_bytes(pickle.dumps(Evil(marker)))
    write_manifest(step)
    with (
      fuzzing.watched_for_code(),
      contextlib.suppress(UserError),
    ):  # some of orbax's files decide nothing
      open_run(run, 12)
    assert not marker.exists(), name
    (step / name).write_bytes(before)
  write_manifest(step)
  assert open_run(run, 12).step == 12
  capfd.readouterr()
  gc.collect()
  pickle.loads(pickle.dumps(Evil(marker)))
  assert marker.exists()  # it was armed


@pytest.mark.slow
def test_row_26_a_small_file_that_unpacks_to_gigabytes_is_refused(folders, made, tmp_path):
  """An array of 27 x 16 in one chunk of 32,768 x 32,768, which is 4 GB of zeros and packed a few
  kilobytes.
  """
  import tensorstore

  run, _ = folders
  step = run / "checkpoints" / "12"
  store = {"driver": "ocdbt", "base": f"file://{step}/params/"}
  leaf = "tok_embed"
  spec = {"driver": "zarr", "kvstore": store | {"path": f"{leaf}/"}}
  shape = tensorstore.open(spec).result().shape
  size = 1 << 15
  kvs = tensorstore.KvStore.open(store).result()
  meta = json.loads(kvs.read(f"{leaf}/.zarray").result().value) | {
    "chunks": [size, size],
    "compressor": {"id": "zstd", "level": 1},
  }
  scratch = tmp_path / "scratch"
  bomb = {
    "driver": "zarr",
    "kvstore": f"file://{scratch}/",
    "metadata": meta | {"shape": [size, size]},
    "create": True,
  }
  array = tensorstore.open(bomb).result()
  array.write(np.float32(1e-30)).result()
  kvs.write(f"{leaf}/.zarray", json.dumps(meta).encode()).result()
  kvs.write(f"{leaf}/0.0", (scratch / "0.0").read_bytes()).result()
  assert (scratch / "0.0").stat().st_size < 1 << 20 and shape == tensorstore.open(
    spec
  ).result().shape
  write_manifest(step)
  with children.Child("jgpt.sample", "--run", run, "--step", "12", cwd=made) as child:
    resource.prlimit(child.process.pid, resource.RLIMIT_DATA, (3 << 30, 3 << 30))
    assert child.wait(60) == 2 and child.err.startswith("error: ") and child.err.count("\n") == 1, (
      child.err[-500:]
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such files")
@ORBAX_LEAVES_READS
def test_row_26_any_edit_of_what_orbax_reads_is_refused_or_harmless(folders, capfd):
  """Edits that a manifest calls sound: the arrays are then those that were saved, or one line says
  what is wrong.
  """
  run, _ = folders
  step = run / "checkpoints" / "12"
  names = sorted(
    name for name, _ in manifest.walk_files(step, ["params"]) if name.startswith("params/")
  )
  good = {name: (step / name).read_bytes() for name in names}
  sound = {name: np.asarray(a) for name, a in digest.name_leaves(open_run(run, 12).params).items()}
  faults, refused = {}, 0
  for number in range(200):
    rng = random.Random(f"orbax {number}")
    name = rng.choice(names)
    with contextlib.suppress(ValueError):
      (step / name).write_bytes(fuzzing.edit_json(rng, good[name]))
    if (step / name).read_bytes() == good[name]:
      (step / name).write_bytes(fuzzing.edit_bytes(rng, good[name]))
    write_manifest(step)
    try:
      with fuzzing.watched_for_code(), alarm():
        there = digest.name_leaves(open_run(run, 12).params)
      assert all(np.array_equal(np.asarray(there[n]), a) for n, a in sound.items())
    except UserError as error:
      refused += 1
      if not str(error).isprintable() or len(str(error)) > 1000:
        faults[str(error)[:300]] = number
    except BaseException as error:
      faults[f"{type(error).__name__} {error}"[:300]] = number
    (step / name).write_bytes(good[name])
  capfd.readouterr()
  gc.collect()
  assert not faults, faults
  assert refused > 20
