"""The text of a run is found by its digest, wherever it lies now, and no other is taken for it."""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jgpt import cli, evaluate, export
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change
from jgpt.errors import UserError
from jgpt.inspect import cli as inspect_cli
from jgpt.plan import claim_folder, default_workdir, find_default_run, plan_run
from jgpt.runs.folder import read_run_files, write_run_files
from jgpt.runs.open import open_run
from jgpt.runs.origin import read_source_files
from jgpt.runs.text import find_run_data

FIXTURES = Path(__file__).parents[1] / "fixtures"
WORDS = "".join(f"{a}{b}{c}\n" for a in "abcd" for b in "xyzw" for c in ("", "e", "rst"))
VERSE = "And all the air a solemn stillness holds,\nSave where the beetle wheels\n\n" * 9


def begin(path, workdir, base="names", **changes):
  """Begins a run without an update; returns its experiment and the data."""
  changes = {"data.path": str(path), "train.steps": 6} | changes
  experiment = change(load_experiment(base), changes)
  plan = plan_run(experiment, workdir=workdir, name=base)
  with contextlib.ExitStack() as stack:
    claim_folder(plan, jax.devices(), stack)
  return experiment, plan.data


def go_on(experiment, workdir, path=None):
  """Plans to go on, with the text at `path`, and records this start as training does."""
  plan = plan_run(change(experiment, {"data.path": path or experiment.data.path}), workdir=workdir)
  with contextlib.ExitStack() as stack:
    claim_folder(plan, jax.devices(), stack)
  return plan.data


def same(a, b):
  return a.documents == b.documents and all(
    np.array_equal(x.tokens, y.tokens) for x, y in ((a.train, b.train), (a.heldout, b.heldout))
  )


@pytest.fixture
def home(tmp_path, monkeypatch):
  """The current folder and the user's home, with a list of words and a run on it."""
  folder = tmp_path / "home"
  folder.mkdir()
  (folder / "words.txt").write_text(WORDS, encoding="utf-8")
  monkeypatch.chdir(folder)
  monkeypatch.setenv("HOME", str(folder))
  monkeypatch.setenv("JGPT_DATA_DIR", str(tmp_path / "none"))
  return folder


# How the text moved -> where it is named from then on.
MOVES = {
  "renamed": "liste.lst",
  "into a folder": "texts",
  "a glob of it": "texts/*.t?t",
  "absolute": "HOME/words.txt",
  "of the user's home": "~/words.txt",
  "a link": "link",
  "in two parts": "parts",
  "in two parts, by a glob": "parts/?.txt",
  "upwards": "../words.txt",
  "with brackets in its name": "words [1].txt",
}


def move(how, home):
  words = Path("words.txt")
  match how:
    case "renamed" | "with brackets in its name":
      words.rename(MOVES[how])
    case "into a folder" | "a glob of it":
      Path("texts").mkdir()
      words.rename("texts/any.txt")
    case "a link":
      words.rename("there")
      Path("link").symlink_to("there")
    case "in two parts" | "in two parts, by a glob":
      Path("parts").mkdir()
      cut = WORDS.index("\n", 50)  # a newline is added to the first of the parts
      Path("parts/a.txt").write_text(WORDS[:cut], encoding="utf-8")
      Path("parts/b.txt").write_text(WORDS[cut + 1 :], encoding="utf-8")
      words.unlink()
    case "upwards":
      words.rename("../words.txt")
  return MOVES[how].replace("HOME", str(home))


@pytest.mark.parametrize("how", MOVES)
def test_a_moved_text_is_the_same_text(home, monkeypatch, how):
  """The run goes on, and is read: where the text is named, and later where the last start found it,
  also from another folder.
  """
  experiment, first = begin("words.txt", "run")
  path = move(how, home)
  named = dataclasses.replace(experiment.data, path=path)
  assert same(find_run_data(Path("run"), read_run_files(Path("run")), named)[0], first)
  assert same(go_on(experiment, "run", path), first)
  monkeypatch.chdir("/")
  data, place = find_run_data(home / "run", read_run_files(home / "run"))
  assert same(data, first) and (place.path == path) == path.startswith(("/", "~"))
  assert same(go_on(experiment, home / "run", path), first)


def test_a_relative_path_is_found_from_another_folder_and_another_machine(home, monkeypatch):
  """Below the folder of the start; where that has gone, below the current one."""
  experiment, first = begin("words.txt", "runs/[a]")
  (home / "elsewhere").mkdir()
  monkeypatch.chdir("elsewhere")
  assert same(go_on(experiment, "../runs/[a]"), first)
  monkeypatch.chdir("/")
  moved = home.rename(home.with_name("usb"))
  monkeypatch.chdir(moved)
  assert same(go_on(experiment, "runs/[a]"), first)


def test_a_run_that_continues_another_takes_its_text_from_where_that_lies(home, monkeypatch):
  """From another folder, and where the last start found it."""
  experiment, first = begin("words.txt", "run")
  Path("words.txt").rename("moved.txt")
  go_on(experiment, "run", "moved.txt")
  monkeypatch.chdir("/")
  base = read_source_files(str(home / "run")).experiment
  assert base.data.path == str(home / "moved.txt") and same(plan_run(base).data, first)
  (home / "moved.txt").unlink()
  assert read_source_files(str(home / "run")).experiment.data.path == "words.txt"


def test_another_text_of_the_same_name_in_the_current_folder_is_passed_over_aloud(
  home, monkeypatch
):
  """Here a text of that name is another, and the run's own is where it was."""
  experiment, first = begin("words.txt", "run")
  (home / "b").mkdir()
  (home / "b" / "words.txt").write_text("zz\n", encoding="utf-8")
  monkeypatch.chdir("b")
  data = plan_run(experiment, workdir="../run").data
  assert same(data, first) and data.text.location == str(home / "words.txt")
  assert data.text.note.startswith("words.txt is not the text of the run: its SHA-256 is ")
  with pytest.raises(UserError, match="another one"):  # it is named, and the other is not
    plan_run(change(experiment, {"data.path": str(home / "b" / "words.txt")}), workdir="../run")


def test_a_text_that_is_nowhere_is_named_by_digest_place_and_setting(home):
  experiment, first = begin("words.txt", "run")
  Path("words.txt").rename("away")
  for path, said in (("words.txt", "words.txt"), ("typo.txt", "typo.txt"), ("no/*.txt", r"no/\*")):
    with pytest.raises(UserError) as error:
      plan_run(change(experiment, {"data.path": path}), workdir="run")
    assert error.match(
      rf"the text of run, words\.txt \(SHA-256 {first.text.sha256[:12]}\), was not found: "
      rf"nothing is at {said}.*--set data\.path=PATH; or .*--workdir.*--fresh"
    )
  with pytest.raises(UserError, match=rf"{first.text.sha256[:12]}.*--set data\.path=PATH$"):
    find_run_data(Path("run"), read_run_files(Path("run")))  # reading a run needs no other way


def test_another_text_is_refused_with_both_digests_and_the_ways_on(home):
  experiment, first = begin("words.txt", "run")
  before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
  Path("other").write_text(f"{WORDS}axle\n", encoding="utf-8")
  ours = first.text.sha256[:12]
  with pytest.raises(UserError, match=rf"words\.txt \(SHA-256 {ours}\).*other is another one"):
    plan_run(change(experiment, {"data.path": "other"}), workdir="run")
  with pytest.raises(UserError, match=rf"{ours}.*the list that comes with jgpt is another one"):
    plan_run(change(experiment, {"data.path": None}), workdir="run")
  Path("words.txt").write_text(f"{WORDS}axle\n", encoding="utf-8")
  with pytest.raises(
    UserError, match=rf"words\.txt has changed since the run in run began.* was {ours} and is now "
  ) as error:
    plan_run(experiment, workdir="run")
  assert "Put the old text back" in str(error.value) and "--fresh" in str(error.value)
  Path("words.txt").write_bytes(b"\xff")
  with pytest.raises(UserError, match=rf"not UTF-8 text.*SHA-256 {ours}.*data\.path=PATH"):
    plan_run(experiment, workdir="run")
  assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


def test_a_source_and_a_path_to_the_same_bytes_are_one(home, tmp_path):
  """Named, the run of the default folder is found; a copy may stand in for what a Python lacks."""
  source = change(load_experiment("shakespeare_bytes"), {"train.steps": 6})
  plan = plan_run(source, workdir="run")
  with contextlib.ExitStack() as stack:
    claim_folder(plan, jax.devices(), stack)
  Path("hamlet").write_text(plan.data.text.text, encoding="utf-8")
  assert same(go_on(source, "run", "hamlet"), plan.data)
  assert same(plan_run(source, workdir="run").data, plan.data)
  Path("hamlet").write_text(f"{plan.data.text.text}.", encoding="utf-8")
  with pytest.raises(UserError, match="hamlet is another one"):
    plan_run(change(source, {"data.path": "hamlet"}), workdir="run")


def write_shards(folder, **shards):
  Path(folder).mkdir()
  for name, text in shards.items():
    ids = np.frombuffer(text.encode(), np.uint8).astype("<u2")
    Path(folder, f"{name}.bin").write_bytes(ids.tobytes())


def test_token_files_move_and_their_order_and_parts_matter(home):
  a, b, c = VERSE, VERSE[::-1], VERSE * 2
  write_shards("ids", a=a, b=b, val=c)
  small = {"data.seq_len": 8, "model.max_seq_len": 16}
  experiment, first = begin("ids", "run", "shakespeare_bytes", **small)
  Path("ids").rename("elsewhere")
  assert same(go_on(experiment, "run", "elsewhere"), first)
  Path("elsewhere/a.bin").rename("elsewhere/1.bin")
  assert same(go_on(experiment, "run", "elsewhere/*.bin"), first)
  Path("elsewhere/1.bin").rename("elsewhere/z.bin")  # after b
  with pytest.raises(UserError, match=r"ids \(3 files\).*elsewhere \(3 files\) is another one"):
    plan_run(change(experiment, {"data.path": "elsewhere"}), workdir="run")
  Path("elsewhere/z.bin").rename("elsewhere/a.bin")
  Path("elsewhere/val.bin").rename("elsewhere/c.bin")  # no longer held out
  with pytest.raises(UserError, match="another one"):
    plan_run(change(experiment, {"data.path": "elsewhere"}), workdir="run")


def test_token_files_of_a_run_need_no_tokenizer_beside_them(home):
  """It is the run's; those of a run that begins do."""
  ids = [*range(9)] * 40
  Path("ids").mkdir()
  Path("ids/train.bin").write_bytes(np.array(ids, "<u2").tobytes())
  tokenizer = plan_run(change(load_experiment("text"), {
    "data.path": "words.txt", "data.heldout_fraction": 0.0, "data.seq_len": 8,
    "data.tokenizer": "characters",
  })).data.tokenizer  # fmt: skip
  Path("ids/tokenizer.json").write_text(json.dumps(tokenizer.to_json()))
  small = {"data.seq_len": 8, "data.tokenizer": "characters", "model.max_seq_len": 16}
  small["sample.prompt"] = "a"
  experiment, first = begin("ids", "run", "shakespeare_bytes", **small)
  Path("ids/train.bin").rename("train.bin")
  assert same(go_on(experiment, "run", "train.bin"), first)
  with pytest.raises(UserError, match=r"no tokenizer\.json"):
    plan_run(change(experiment, {"data.path": "train.bin"}))


# --- Default folders ---


def test_a_renamed_text_goes_on_in_the_folder_of_its_former_name(home):
  """And in one that was named by all of Unicode's letters; never in another run's."""
  base = load_experiment("names")

  def folders(path):
    experiment = change(base, {"data.path": path, "train.steps": 6})
    return default_workdir("names", base, experiment), find_default_run("names", base, experiment)

  first, none = folders("words.txt")
  assert first.name == "names,data.path=words.txt,train.steps=6" and none is None
  begin("words.txt", first)
  Path("words.txt").rename("Wörter.txt")
  second, found = folders("Wörter.txt")
  assert second != first and found == first
  assert folders("~/Wörter.txt")[1] == folders(f"{home}/*.txt")[1] == first
  first.rename("runs/names,data.path=Wörter.txt,train.steps=6")
  files = read_run_files(Path("runs/names,data.path=Wörter.txt,train.steps=6"))
  config = dataclasses.replace(files.experiment.data, path="Wörter.txt")
  experiment = dataclasses.replace(files.experiment, data=config)
  write_run_files(
    Path("runs/names,data.path=Wörter.txt,train.steps=6"),
    dataclasses.replace(files, experiment=experiment),
  )
  assert folders("Wörter.txt")[1].name == "names,data.path=Wörter.txt,train.steps=6"
  Path("runs/names,data.path=Wörter.txt,train.steps=6").rename(
    "runs/names,data.path=Wörter.txt,train.steps=6.old-1"
  )
  assert folders("Wörter.txt")[1] is None
  shutil.move("runs/names,data.path=Wörter.txt,train.steps=6.old-1", first)
  Path("Wörter.txt").write_text(WORDS[:-1], encoding="utf-8")
  assert folders("Wörter.txt")[1] is None


# --- Commands ---


@pytest.fixture
def stopped(home):
  """A run as version 1 wrote it, stopped after 3 of 6 updates, whose text has another name."""
  shutil.copytree(FIXTURES / "run_format_1", "run")
  shutil.copy(FIXTURES / "run_format_1_words.txt", "my list")
  Path("words.txt").unlink()
  return home


def call(capsys, main, *args):
  status = cli.guard(lambda: main(list(args)))
  out, err = capsys.readouterr()
  return status, out, err


@pytest.mark.parametrize(
  ("main", "args"),
  [
    (evaluate.main, ["--run", "run", "--part", "train"]),
    pytest.param(
      inspect_cli.main,
      ["--run", "run", "--trace", "tok_embed[4,2]", "--trace-steps", "1"],
      marks=pytest.mark.slow,
    ),
  ],
)
def test_commands_that_read_a_run_are_told_where_its_text_is(stopped, capsys, main, args):
  status, _, err = call(capsys, main, *args)
  assert status == 2 and err.count("\n") == 1
  assert "words.txt (SHA-256 177949bb5155)" in err and "--set data.path=PATH" in err
  status, out, err = call(capsys, main, *args, "--set", "data.path=my list")
  assert status == 0 and err == "" and out
  status, _, err = call(capsys, main, *args, "--set", "data.seq_len=3")
  assert status == 2 and "--set data.seq_len has no meaning here" in err


def test_python_is_told_where_a_runs_text_is(stopped):
  with pytest.raises(UserError, match="was not found"):
    open_run("run").data()
  assert open_run("run").data("my list").text.sha256.startswith("177949bb5155")


@pytest.mark.parametrize(
  ("main", "args"),
  [
    (inspect_cli.main, ["--run", "run", "--text", "a"]),
    (export.main, ["--run", "run", "--format", "hf", "--out", "out"]),
  ],
)
def test_where_no_text_is_read_its_place_is_refused(stopped, capsys, main, args):
  status, _, err = call(capsys, main, *args, "--set", "data.path=my list")
  assert status == 2 and "--set goes with " in err and not os.path.exists("out")
