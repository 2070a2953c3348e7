"""A profile of a run's updates: which, what is wrong with those asked for, and its file."""

import dataclasses
import os
import re
import signal
from pathlib import Path

import jax
import pytest
import small_runs

from jgpt import run
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.errors import UserError
from jgpt.plan import next_stop, plan_run
from jgpt.program import lower_programs
from jgpt.report.summary import describe_profile
from jgpt.runs.profile import Profile, choose_updates, parse_profile
from jgpt.runs.rows import read_jsonl
from jgpt.train import train_run


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("prof", ("prof", None, None)),
    ("prof:5-8", ("prof", 5, 8)),
    ("a/b:c:7-7", ("a/b:c", 7, 7)),
    ("a:b", ("a:b", None, None)),
  ],
)
def test_a_folder_may_have_a_range_of_updates(text, expected, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  found = parse_profile(text)
  assert (str(found.folder), found.first, found.last) == expected
  assert Path(expected[0]).is_dir() and list(Path(expected[0]).iterdir()) == []


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("", "must be DIR or DIR:first-last"),
    (":3-5", "must be DIR or DIR:first-last"),
    ("prof:", "must be DIR or DIR:first-last"),
    ("prof:5", "must be DIR or DIR:first-last"),
    ("prof:5-", "must be DIR or DIR:first-last"),
    ("prof:0-5", "first must be at least 1.*--profile prof:1-5"),
    ("prof:8-5", "last at least first.*--profile prof:5-8"),
    ("file/prof", "file/prof cannot be written to: Not a directory"),
  ],
)
def test_what_is_no_range_or_no_folder_is_refused_before_a_plan(text, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Path("file").write_text("")
  with pytest.raises(UserError, match=words):
    run.main(["--experiment", "names", "--profile", text])
  assert not Path("runs").exists()


def test_updates_are_those_of_this_start():
  asked = Profile(Path("prof"))
  assert dataclasses.astuple(choose_updates(asked, 0, 100))[1:] == (2, 4)
  assert dataclasses.astuple(choose_updates(asked, 40, 43))[1:] == (42, 43)
  assert choose_updates(Profile(Path("prof"), 41, 100), 40, 100).last == 100
  for profile, start in ((asked, 99), (asked, 100), (Profile(Path("prof"), 40, 50), 40)):
    with pytest.raises(UserError, match=r"this start.* makes (updates|no updates)"):
      choose_updates(profile, start, 100)
  with pytest.raises(UserError, match=r"prof:99-101 is not in .* updates 1 to 100"):
    choose_updates(Profile(Path("prof"), 99, 101), 0, 100)


def test_calls_end_where_the_range_does():
  changes = {"train.steps": 500, "train.log_every": 90, "train.eval_every": None}
  train = resolve(change(load_experiment("names"), changes), 27)
  profile, stops = Profile(Path("prof"), 30, 100), [0]
  while stops[-1] < 200:
    stops.append(next_stop(stops[-1], train.train, profile=profile))
  assert {29, 90, 100} <= set(stops)
  assert [step for step in range(200) if profile.holds(step)] == list(range(29, 100))


def test_parts_of_a_step_have_names_in_its_program():
  """A profile shows them beside the operations."""
  changes = {"model.num_layers": 2, "mesh.data": 1}
  experiment = resolve(change(load_experiment("names"), changes), 27)
  lowered = lower_programs(experiment, jax.devices(), 17 * 9, names=("steps",))["steps"]
  text = lowered.as_text(debug_info=True)
  for name in ("embed", "attention", "mlp", "head", "loss", "optimizer", "layer_1"):
    assert re.search(rf'["/(]{name}[/)]', text), name


@pytest.mark.slow
def test_a_profile_has_the_calls_of_its_updates(tmp_path):
  """A start may be stopped in the midst of them; the next one profiles anew."""
  path = tmp_path / "words.txt"
  path.write_text("".join(f"{word}\n" for word in small_runs.WORDS), encoding="utf-8")
  changes = {"data.path": str(path), "train.steps": 12, "train.eval_every": 2}
  experiment = change(load_experiment("names"), changes)
  plan = plan_run(experiment, workdir=tmp_path / "run", name="words")
  assert describe_profile(plan) == []
  plan = dataclasses.replace(plan, profile=Profile(tmp_path / "prof", 5, 8))
  assert describe_profile(plan)[0][1].startswith("updates 5 to 8, in ")
  with small_runs.compiled_quickly():
    train_run(plan)
    calls = [row["step"] for row in read_jsonl(plan.workdir / "metrics.jsonl") if "tokens" in row]
    assert {4, 6, 8, 12} <= set(calls) and not {5, 7} & set(calls)  # evaluations at 2, 4, ...
    (trace,) = (tmp_path / "prof").rglob("*.xplane.pb")
    content = trace.read_bytes()
    assert b"train" in content and b"step_num" in content and b"run_steps" in content
    plan = dataclasses.replace(plan, workdir=None, profile=Profile(tmp_path / "second", 2, 12))
    result = train_run(plan, writers=[Interrupter()])
  assert result.signal == signal.SIGTERM and 2 <= result.step < 12
  assert len(list((tmp_path / "second").rglob("*.xplane.pb"))) == 1  # what there is, is written
  with jax.profiler.trace(tmp_path / "third"):  # none is running
    pass


class Interrupter:
  """Sends this process a signal once the first profiled update is written, as a writer."""

  def write(self, chunk):
    if chunk.step == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  def close(self):
    pass
