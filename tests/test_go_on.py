"""`run --workdir DIR` goes on with what the folder records; refusals name the ways on."""

import contextlib
import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import jax
import pytest
import small_runs

from jgpt import cli, run
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, list_settings
from jgpt.errors import UserError
from jgpt.plan import claim_folder, default_workdir, plan_run
from jgpt.runs import manifest
from jgpt.runs.folder import read_last_settings, read_run_files
from jgpt.system import signals

FIXTURES = Path(__file__).parent / "fixtures"
WORDS = "".join(f"{a}{b}{c}\n" for a in "abcd" for b in "xyzw" for c in ("", "e", "rst"))


@pytest.fixture
def stopped(tmp_path, monkeypatch):
  """A run as version 1 wrote it, stopped after 3 of 6 updates, and its text."""
  monkeypatch.chdir(tmp_path)
  shutil.copytree(FIXTURES / "run_format_1", "run")
  shutil.copy(FIXTURES / "run_format_1_words.txt", "words.txt")
  return tmp_path


@pytest.fixture
def words(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "words.txt").write_text(WORDS, encoding="utf-8")
  return tmp_path


def begin(workdir, name="names", base=None, **changes):
  """Begins a run without an update, or starts it again; returns its resolved settings."""
  changes = {"data.path": "words.txt"} | {k.replace("__", "."): v for k, v in changes.items()}
  plan = plan_run(change(base or load_experiment(name), changes), workdir=workdir, name=name)
  with contextlib.ExitStack() as stack:
    claim_folder(plan, jax.devices(), stack)
  return plan.experiment


def call(capsys, *args):
  status = cli.guard(lambda: run.main([str(arg) for arg in args]))
  out, err = capsys.readouterr()
  return status, out, err


@pytest.mark.slow
def test_the_folder_alone_goes_on(stopped, capsys):
  """With the command that was printed when the run stopped, and from a text that was renamed."""
  line = signals.describe_stop(3, Path("run"))
  command = shlex.split(line.split("so does ")[1])
  assert command[1:3] == ["-m", "jgpt.run"] and "after step 3" in line
  Path("words.txt").rename("my words")
  with small_runs.compiled_quickly():
    status, out, err = call(capsys, *command[3:], "--set", "data.path=my words")
  assert status == 0 and err == "", err
  assert "going on from step 3" in out and manifest.list_steps(Path("run"))[-1] == 6
  again = out.split("next:\n")[1].splitlines()[1]
  assert again.endswith(" --steps 12") and "--experiment names" in again
  assert "decay_steps" not in again and "vocab_size" not in again  # they follow from the others
  status, out, err = call(capsys, "--resume", "--workdir", "run", "--steps", "6")
  assert status == 0 and "this run is finished" in out and "data        my words" in out


def test_circumstances_are_those_of_the_last_start(words, capsys):
  """And `--set` is on top. Identity stays what it was."""
  begin("run", train__steps=30, optimizer__schedule="constant", train__log_every=7)
  begin("run", train__steps=60, optimizer__schedule="constant", train__log_every=9, sample__top_k=5)
  recorded = read_run_files(Path("run"))
  assert recorded.experiment.train.steps == 30
  now = run.change_recorded(recorded, Path("run"), {"train.keep_latest": 4})
  wanted = {"train.steps": 60, "train.log_every": 9, "sample.top_k": 5, "train.keep_latest": 4}
  assert {name: list_settings(now)[name] for name in wanted} == wanted
  plan = plan_run(now, workdir="run")
  assert plan.experiment.optimizer == recorded.experiment.optimizer
  assert plan.experiment.model == recorded.experiment.model
  status, out, _ = call(capsys, "--workdir", "run", "--print-config", "--steps", "70")
  assert status == 0 and "train.steps=70" in out and "train.log_every=9" in out
  Path("words.txt").unlink()
  assert call(capsys, "--workdir", "run", "--print-config")[1].startswith("# names: 3,744 param")


def test_a_run_counted_in_epochs_goes_on_and_grows(words):
  counted = {"train__steps": None, "train__epochs": 2, "optimizer__schedule": "constant"}
  first = begin("run", "shakespeare_bytes", **counted, data__batching="epochs", data__seq_len=8)
  recorded = read_run_files(Path("run"))
  steps = [
    plan_run(run.change_recorded(recorded, Path("run"), changes), workdir="run").experiment
    for changes in ({}, {"train.epochs": 3}, {"train.steps": 5})
  ]
  assert first.compute.dtype == "auto" and steps[0].compute.dtype == "float32"  # it is identity
  assert dataclasses.replace(steps[0], compute=first.compute) == dataclasses.replace(
    first, expected=()
  )
  assert [x.train.steps for x in steps] == [first.train.steps, first.train.steps // 2 * 3, 5]


@pytest.mark.parametrize("damage", ["gone", "no list", "other entries", "unknown settings"])
def test_without_its_starts_a_run_has_its_first_settings(words, damage):
  begin("run", train__log_every=7)
  env = Path("run", "env.json")
  entry = json.loads(env.read_text())[0]
  others = {"mesh.tricks": False, "train.new": 1, "no section": 2, "model.d_ff": 3, "a.b.c": 4}
  match damage:
    case "gone":
      env.unlink()
    case "no list":
      env.write_text("{}")
    case "other entries":
      env.write_text(json.dumps([1, None, {"settings": 3}, {}]))
    case "unknown settings":
      env.write_text(json.dumps([entry, entry | {"settings": others}]))
  found = read_last_settings(Path("run"), recorded := read_run_files(Path("run")))
  assert found.train == recorded.experiment.train and found.model == recorded.experiment.model
  assert found.compute.tricks == (damage != "unknown settings")  # by its new name


def test_a_value_that_a_setting_cannot_have_is_named_with_its_file(words):
  begin("run")
  env = Path("run", "env.json")
  entry = json.loads(env.read_text())[0]
  env.write_text(json.dumps([entry | {"settings": {"train.log_every": "often"}}]))
  with pytest.raises(UserError, match=r"run/env\.json: .*train\.log_every"):
    read_last_settings(Path("run"), read_run_files(Path("run")))


@pytest.mark.parametrize("flag", [[], ["--resume"], ["--fresh"]])
def test_what_is_no_run_folder_is_said(stopped, capsys, flag):
  Path("empty").mkdir()
  for path, said in (
    ("empty", "empty holds no run to go on with. To begin one there, name an experiment"),
    ("none", "none holds no run"),
    ("words.txt", "words.txt holds no run"),
    ("run/checkpoints", "run, and none itself. To go on with the run: --workdir run"),
    ("run/checkpoints/3", "--continue-from run/checkpoints/3"),
  ):
    status, _, err = call(capsys, *flag, "--workdir", path)
    assert status == 2 and said in err and err.count("\n") == 1, err
  with pytest.raises(UserError, match="part of the run folder run, "):
    plan_run(read_run_files(Path("run")).experiment, workdir="run/checkpoints/3")
  Path("run/experiment.json").unlink()
  status, _, err = call(capsys, *flag, "--workdir", "run")
  assert status == 2 and "Copy the one in checkpoints/3" in err
  assert not Path("none").exists() and not list(Path().glob("*.old-*"))


def test_another_identity_is_refused_there_too(stopped, capsys):
  before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
  status, _, err = call(capsys, "--workdir", "run", "--seed", "4", "--set", "model.d_ff=24")
  assert status == 2 and "train.seed is 0 there and 4 here" in err
  assert "model.d_ff is 16 there and 24 here" in err
  for way in ("another --workdir", "--fresh", "--init-from run"):
    assert way in err
  assert "--continue-from" not in err  # moments belong to the network
  assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_fresh_starts_over_with_the_settings_of_the_folder(words, capsys):
  """Also on a text with more characters."""
  begin("run", train__steps=0, optimizer__peak_lr=0.02)
  Path("words.txt").write_text(f"{WORDS}fghij\n", encoding="utf-8")
  with small_runs.compiled_quickly():
    status, out, _ = call(capsys, "--workdir", "run", "--fresh")
  assert status == 0 and "the old run is kept in run.old-1" in out
  recorded = read_run_files(Path("run")).experiment
  assert recorded.optimizer.peak_lr == 0.02 and recorded.model.vocab_size == 18


# --- Names of folders ---


VALUES = ["a b.txt", "*.txt", "it's", "a=b", "Köln/~x", "$(x)", "a;b", "x{1,2}", "[a]", "!", "a\\b"]


@pytest.mark.parametrize("value", VALUES)
def test_default_folders_need_no_quotes(value):
  """And two values never have the same one."""
  base = load_experiment("names")

  def folder(value):
    changed = {"data.path": value, "sample.prompt": value, "data.batch_size": 16}
    return str(default_workdir("names", base, change(base, changed)))

  assert shlex.quote(folder(value)) == folder(value)
  assert not set(folder(value)) & set("~*?[]{}'\"$!;&|<> \\")
  assert folder(value) != folder(f"{value} ")


def test_default_folders_that_needed_no_quotes_are_called_as_before():
  base = load_experiment("names")
  changed = change(base, {"data.batch_size": 16, "data.path": "my_words.txt", "train.steps": 50})
  assert str(default_workdir("names", base, base)) == "runs/names"
  assert str(default_workdir("names", base, changed)) == (
    "runs/names,data.path=my_words.txt,data.batch_size=16,train.steps=50"
  )
