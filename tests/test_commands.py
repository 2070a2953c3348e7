"""The commands as a person uses them: what they print, what they leave, how they end."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_runs

from jgpt import cli, export, plot, run, sample
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, list_settings, resolve
from jgpt.report.summary import describe_rates
from jgpt.runs import manifest
from jgpt.runs.rows import read_jsonl
from jgpt.system import command

FAST = ["--experiment", "names", "--steps", "40", "--log-every", "20"]
LINE = re.compile(
  r"step +(\d+)/40 \| loss (\d\.\d{4})(?: \| held out \d\.\d{4})? \| "
  r"grad norm \d+\.\d\d \| lr \d\.\de-\d\d \| [\d,.]+ steps/s$"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """An empty working folder, with the list of names that comes with jgpt."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv("JGPT_DATA_DIR", raising=False)
  return tmp_path


def call(capsys, main, *args):
  """Runs a command in this process; returns its status, standard output and standard error."""
  status = cli.guard(lambda: main([str(a) for a in args]))
  out, err = capsys.readouterr()
  return status, out, err


def start(*args, **options):
  """Starts a command in a process of its own."""
  env = os.environ | {"PYTHONPATH": str(Path(run.__file__).parent.parent), "PYTHONUNBUFFERED": "1"}
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen([sys.executable, "-m", *args], env=env, **(pipes | options))


def test_a_run_says_what_it_is_trains_saves_and_samples(folder, capsys, drawn):
  status, out, err = call(capsys, run.main, *FAST)
  assert status == 0 and err == ""
  for fact in (
    "CPU",
    "bundled",
    "documents",
    "longest",
    "cut at the context of 16",
    "held out",
    "27 ids: a-z and BOS",
  ):
    assert fact in out
  assert (
    "4,192 parameters" in out
    and "uniform guessing: 3.296" in out
    and "40 steps of 1 document" in out
  )
  first, *lines = [line for line in out.splitlines() if line.startswith("step")]
  assert first.startswith("step  0/40 | held out ")
  lines = [LINE.match(line) for line in lines]
  steps = [int(m.group(1)) for m in lines]
  assert steps == [1, 8, 16, 20, 24, 32, 40]  # log_every, and a fifth of all
  assert (
    "held-out loss" in out
    and "perplexity" in out
    and "┌" in out
    and "20 samples" in out
    and "next:" in out
  )
  runs = folder / "runs" / "names,train.steps=40"
  assert {p.name for p in runs.iterdir()} == {
    *("experiment.json", "tokenizer.json", "env.json", "metrics.jsonl", "result.json"),
    *("checkpoints", "samples", "plot.svg"),
  }
  rows = small_runs.read_untimed(runs)
  evaluated = [row["step"] for row in rows if "heldout/loss" in row]
  assert evaluated == [0, 8, 16, 24, 32, 40, 40] and rows[-1]["final"]
  assert json.loads((runs / "result.json").read_text())["is_finished"]
  rows = [row for row in rows if "train/loss" in row]
  assert [row["step"] for row in rows] == list(range(1, 41))
  printed = [float(m.group(2)) for m in lines]
  losses = [row["train/loss"] for row in rows]
  expected = [  # each line: the mean since the last
    sum(losses[before:step]) / (step - before) for before, step in itertools.pairwise([0, *steps])
  ]
  assert printed == pytest.approx(expected, abs=1e-4)
  assert len((runs / "samples" / "step_40.txt").read_text().splitlines()) == 20
  assert json.loads((runs / "env.json").read_text())[0]["versions"].keys() == {
    "jgpt",
    "jax",
    "python",
  }


@pytest.mark.slow
def test_the_suggested_commands_work(folder, capsys):
  """The lines under "next:" run as printed."""
  _, out, _ = call(capsys, run.main, *FAST, "--set", "sample.num=2")
  lines = out.split("next:\n")[1].splitlines()
  commands = [shlex.split(line) for line in lines if line.startswith("  ")]
  assert len(commands) == 2 and all(c[:2] == [command.python_command(), "-m"] for c in commands)
  assert lines[2] == "with a text of your own, add --set data.path=FILE"
  status, texts, _ = call(capsys, sample.main, *commands[0][3:])
  assert status == 0 and len(texts.splitlines()) == 2
  assert run.main(commands[1][3:]) == 0


def test_suggestions_call_the_python_that_is_running(tmp_path, monkeypatch):
  """In a clone whose environment is not activated, `python` would be another one, without jgpt."""
  monkeypatch.chdir(tmp_path)
  ours = str(tmp_path / ".venv" / "bin" / "python")
  monkeypatch.setattr(sys, "executable", ours)
  assert command.python_command() == str(Path(".venv", "bin", "python"))
  monkeypatch.setattr(command.shutil, "which", lambda name: ours)
  assert command.python_command() == "python"
  monkeypatch.setattr(sys, "executable", os.path.abspath("/elsewhere/python"))
  assert command.python_command() == sys.executable


def test_the_same_command_is_finished_and_samples_the_same(folder, capsys):
  _, first, _ = call(capsys, run.main, *FAST)
  status, again, _ = call(capsys, run.main, *FAST)
  assert status == 0 and "this run is finished: 40 steps" in again and not LINE.search(again)
  assert first.split("samples")[1] == again.split("samples")[1]
  assert len(list((folder / "runs").iterdir())) == 1


@pytest.mark.slow
def test_a_changed_setting_has_a_folder_of_its_own(folder, capsys):
  for extra in (
    [],
    ["--set", "optimizer.peak_lr=0.02"],
    ["--seed", "1"],
    ["--set", "sample.temperature=1.0"],
  ):
    assert call(capsys, run.main, *FAST, *extra)[0] == 0
  assert sorted(p.name for p in (folder / "runs").iterdir()) == [
    "names,optimizer.peak_lr=0.02,train.steps=40",
    "names,train.steps=40",  # sampling otherwise is the same run
    "names,train.steps=40,train.seed=1",
  ]


def test_fresh_sets_the_old_folder_aside(folder, capsys):
  call(capsys, run.main, *FAST)
  kept = (folder / "runs" / "names,train.steps=40" / "metrics.jsonl").read_bytes()
  _, out, _ = call(capsys, run.main, *FAST, "--fresh")
  assert "the old run is kept in runs/names,train.steps=40.old-1" in out and "finished" not in out
  assert (folder / "runs" / "names,train.steps=40.old-1" / "metrics.jsonl").read_bytes() == kept


@pytest.mark.slow
def test_an_edited_experiment_file_does_not_touch_the_old_run(folder, capsys):
  """The folder's name comes from what differs from the file.

  When the file itself changed, a digest is added.
  """
  text = (Path(run.__file__).parent.parent / "experiments" / "names.py").read_text(encoding="utf-8")
  own = folder / "own.py"
  own.write_text(text.replace("steps=1000", "steps=20"), encoding="utf-8")
  assert call(capsys, run.main, "--experiment", own)[0] == 0
  own.write_text(
    text.replace("steps=1000", "steps=20").replace("d_ff=64", "d_ff=32"), encoding="utf-8"
  )
  assert call(capsys, run.main, "--experiment", own)[0] == 0
  names = sorted(p.name for p in (folder / "runs").iterdir())
  assert names[0] == "own" and re.fullmatch(r"own-[0-9a-f]{6}", names[1])


def test_a_folder_that_was_named_refuses_another_run(folder, capsys):
  assert call(capsys, run.main, *FAST, "--workdir", "here")[0] == 0
  before = (folder / "here" / "metrics.jsonl").read_bytes()
  status, _, err = call(
    capsys, run.main, *FAST, "--workdir", "here", "--set", "data.batch_size=2", "--seed", "4"
  )
  assert (
    status == 2
    and "data.batch_size is 1 there and 2 here" in err
    and "train.seed is 0 there and 4 here" in err
  )
  assert (folder / "here" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_steps_may_grow_in_a_named_folder_while_the_rate_lasts(folder, capsys):
  args = ["--experiment", "names", "--workdir", "here", "--set", "optimizer.decay_steps=100"]
  assert call(capsys, run.main, *args, "--steps", "20")[0] == 0
  status, out, _ = call(capsys, run.main, *args, "--steps", "40")
  assert status == 0 and "going on from step 20" in out


STOPPED = ["--experiment", "names", "--workdir", "here", "--set", "train.save_every=10"]


@pytest.mark.slow
def test_updates_added_to_a_stopped_run_have_a_rate(folder, capsys):
  """Stopped at 10 of 20 updates: more than 20 are refused at a rate of 0, and fewer are not.

  What the refusal names works. With a floor their rate is said before the training.
  """
  args = [*STOPPED, "--set", "optimizer.schedule=wsd"]
  assert call(capsys, run.main, *args, "--steps", "20")[0] == 0
  shutil.rmtree(folder / "here" / "checkpoints" / "20")
  before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  status, out, err = call(capsys, run.main, *args, "--steps", "50")
  assert status == 2 and out == "" and err.count("\n") == 1
  assert "a learning rate of 0" in err and "planned for 20" in err and "is at step 10" in err
  assert "keep train.steps=20" in err.lower()
  assert "--continue-from here --set train.steps=40" in err
  assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
  status, out, _ = call(capsys, run.main, *args, "--steps", "15")
  assert status == 0 and "goes on after these, to optimizer.decay_steps=20" in out
  new = ["--workdir", "new", "--continue-from", "here", "--set", "train.steps=40"]
  assert call(capsys, run.main, *new)[0] == 0
  rates = [
    row["train/lr"] for row in read_jsonl(folder / "new" / "metrics.jsonl") if "train/lr" in row
  ]
  assert len(rates) == 40 and all(rate > 0 for rate in rates)


@pytest.mark.slow
def test_a_run_stopped_before_its_first_checkpoint_is_not_extended_at_a_rate_of_zero(
  folder, capsys
):
  """Its settings are recorded, and its schedule's length with them."""
  assert call(capsys, run.main, *STOPPED, "--steps", "20")[0] == 0
  shutil.rmtree(folder / "here" / "checkpoints")
  status, _, err = call(capsys, run.main, *STOPPED, "--steps", "50")
  assert status == 2 and "a learning rate of 0" in err and "--fresh" in err
  assert call(capsys, run.main, *STOPPED, "--steps", "20")[0] == 0


@pytest.mark.slow
def test_updates_that_were_planned_at_a_rate_of_zero_can_be_finished(folder, capsys):
  """A schedule that was given a shorter length than the run is said, and kept on resume."""
  args = [*STOPPED, "--set", "optimizer.decay_steps=5"]
  status, out, _ = call(capsys, run.main, *args, "--steps", "20")
  assert status == 0 and "the last 15 updates change nothing" in out
  shutil.rmtree(folder / "here" / "checkpoints" / "20")
  assert call(capsys, run.main, *args, "--steps", "20")[0] == 0
  assert call(capsys, run.main, *args, "--steps", "21")[0] == 2


@pytest.mark.parametrize(
  ("changes", "lines"),
  [
    ({}, []),
    ({"decay_steps": 100, "end_lr": 1e-4}, []),
    ({"schedule": "constant", "decay_steps": 7}, []),
    ({"warmup_steps": 99}, []),
    ({"peak_lr": 0.0}, ["rate 0 at every update, which changes nothing: optimizer.peak_lr=0"]),
    ({"peak_lr": 1e-60, "schedule": "constant", "end_lr": 1.0}, ["rate 0 at every update"]),
    ({"peak_lr": 0.0, "end_lr": 0.1}, []),
    ({"decay_steps": 30}, ["rate 0 from update 31 on", "the last 70 updates change nothing"]),
    (
      {"decay_steps": 30, "schedule": "cosine", "end_lr": 1e-5},
      ["rate 1e-05 from update 31 on, where the cosine schedule has ended"],
    ),
    ({"decay_steps": 1000}, ["goes on after these, to optimizer.decay_steps=1000"]),
    ({"warmup_steps": 100}, ["never reaches its peak: optimizer.warmup_steps=100"]),
    ({"warmup_steps": 300, "schedule": "constant"}, ["never reaches its peak"]),
    ({"warmup_steps": 40, "decay_steps": 30}, ["the last 70 updates", "never reaches its peak"]),
  ],
)
def test_rates_that_may_not_be_meant_are_said_before_training(changes, lines):
  changes = {f"optimizer.{name}": value for name, value in changes.items()} | {"train.steps": 100}
  said = describe_rates(resolve(change(load_experiment("names"), changes), 27))
  assert bool(said) == bool(lines)
  assert all(line in "\n".join(said) for line in lines), said


@pytest.mark.slow
def test_a_list_of_your_own(folder, capsys):
  (folder / "Städte.txt").write_text("Köln\r\nBonn\n\n  Ulm  \nKöln\n", encoding="utf-8")
  args = [
    "--experiment",
    "names",
    "--set",
    "data.path=Städte.txt",
    "--set",
    "data.heldout_fraction=0",
    "--steps",
    "300",
  ]
  status, out, err = call(capsys, run.main, *args)
  assert status == 0 and err == ""
  assert "4 documents, 15 characters, longest 4, 0 cut" in out and "'Köln'" not in out
  assert "9 ids: B K U l-o ö and BOS (8)" in out
  assert "Köln*" in out  # it has learnt the list by heart, and says so
  (folder / "Städte.txt").write_text("Berlin\n", encoding="utf-8")
  status, _, err = call(capsys, run.main, *args)
  assert status == 2 and "Städte.txt has changed since the run" in err


@pytest.mark.parametrize(
  ("args", "error"),
  [
    (["--experiment", "nmaes"], "no experiment 'nmaes'. Did you mean names?"),
    (
      ["--experiment", "names", "--set", "train.step=5"],
      "no setting 'train.step'. Did you mean train.steps",
    ),
    (["--experiment", "names", "--set", "model.d_model=18"], "model.num_heads"),
    (["--experiment", "names", "--set", "data.path=missing.txt"], "cannot read missing.txt"),
    (
      ["--experiment", "names", "--set", "model.vocab_size=20"],
      "smaller than the tokenizer's 27 ids",
    ),
    (["--experiment", "names", "--set", "train.seed"], "has no '='"),
    ([], "choose an experiment"),
  ],
)
def test_a_users_error_is_one_line_and_status_2(folder, capsys, args, error):
  status, out, err = call(capsys, run.main, *args)
  assert (
    status == 2
    and out == ""
    and err.count("\n") == 1
    and error in err
    and err.startswith("error: ")
  )
  assert not (folder / "runs").exists()  # raised before anything was written


@pytest.mark.parametrize(
  ("main", "args", "error"),
  [
    (
      plot,
      "--run r --x token",
      "--x='token' must be one of step, tokens, seconds. Did you mean",
    ),
    (plot, "--run r --x=q", "--x='q' must be one of step, tokens, seconds.\n"),
    (export, "--out o --format hff", "--format='hff' must be one of hf, llmc, llmc-state. Did you"),
    (export, "--run r", "the following arguments are required: --format, --out. See --help"),
    (plot, "", "the following arguments are required: --run. See --help"),
    (run, "--steps 1e3", "--steps: '1e3' must be a whole number. See --help"),
    (run, "--steps", "--steps: expected one argument. See --help"),
    (sample, "--run r --temperature=", "--temperature: '' must be a number. See --help"),
    (sample, "--run r --step new", "--step: 'new' must be a number of updates, or best"),
  ],
)
def test_what_argparse_refuses_is_one_line_and_status_2(folder, capsys, main, args, error):
  """Choices, numbers, and what is required."""
  status, out, err = call(capsys, main.main, *args.split())
  assert status == 2 and out == "" and err.count("\n") == 1
  name = main.__name__
  assert err.startswith(f"error: python -m {name}: ") and error in err
  assert list(folder.iterdir()) == []


def test_print_config_reads_back_as_settings(capsys):
  _, out, _ = call(
    capsys, run.main, "--experiment", "names", "--print-config", "--set", "model.vocab_size=28"
  )
  lines = out.splitlines()
  assert lines[0] == "# names: 4,224 parameters" and "model.vocab_size=28" in lines
  assert [line.split("=")[0] for line in lines[1:]] == list(list_settings(load_experiment("names")))
  again = [word for line in lines[1:] for word in ("--set", line)]
  assert call(capsys, run.main, "--experiment", "names", "--print-config", *again)[1] == out


@pytest.mark.slow
def test_twenty_eight_ids(folder, capsys):
  """The teaching text's model: 4,224 parameters and ln 28, with BOS still 26."""
  _, out, _ = call(capsys, run.main, *FAST, "--set", "model.vocab_size=28")
  for fact in (
    "27 ids: a-z and BOS (26); the model has 28",
    "4,224 parameters",
    "uniform guessing: 3.332",
  ):
    assert fact in out


def test_sample_from_the_folder_alone(folder, capsys):
  """Experiment files, the data and the optimizer's state may be gone."""
  call(capsys, run.main, *FAST, "--workdir", "here")
  for path in (folder / "here").glob("checkpoints/40/train_state/**/*"):
    path.unlink() if path.is_file() else None
  moved = (folder / "here").rename(folder / "elsewhere")
  status, out, err = call(
    capsys, sample.main, "--run", moved, "--num", "4", "--prompt", "an", "--seed", "3"
  )
  assert (
    status == 0
    and err == ""
    and len(out.splitlines()) == 4
    and all(t.startswith("an") for t in out.splitlines())
  )
  assert (
    call(capsys, sample.main, "--run", moved, "--num", "4", "--prompt", "an", "--seed", "3")[1]
    == out
  )
  greedy = call(capsys, sample.main, "--run", moved, "--num", "4", "--temperature", "0")[1]
  assert len(set(greedy.splitlines())) == 1


@pytest.mark.parametrize(
  ("args", "error"),
  [
    (["--prompt", "Zoë"], "not in the vocabulary: 'Z' 'ë'. The vocabulary is: a-z"),
    (["--step", "7"], "no checkpoint of step 7; it has 40"),
    (["--temperature", "-1"], "sample.temperature=-1.0 must be at least 0"),
    (["--top-p", "2"], "sample.top_p=2.0 must be from 0 to 1"),
  ],
)
def test_sampling_errors_are_one_line(folder, capsys, args, error):
  call(capsys, run.main, *FAST, "--workdir", "here")
  status, out, err = call(capsys, sample.main, "--run", "here", *args)
  assert status == 2 and out == "" and err.count("\n") == 1 and error in err


def test_sampling_from_what_is_no_run(folder, capsys):
  status, _, err = call(capsys, sample.main, "--run", ".")
  assert status == 2 and "no experiment.json" in err


def test_a_long_prompt_is_said_to_be_cut(folder, capsys):
  call(capsys, run.main, *FAST, "--workdir", "here")
  status, out, err = call(
    capsys, sample.main, "--run", "here", "--prompt", "abcdefghijklmnopqrst", "--num", "2"
  )
  assert status == 0 and "only its last 16 fit the context" in err
  assert all(t.startswith("abcdefghijklmnopqrst") for t in out.splitlines())


def test_reading_a_run_executes_nothing(folder, capsys):
  """A tokenizer or settings that are not what they should be are refused, whatever they hold."""
  call(capsys, run.main, *FAST, "--workdir", "here")
  (step,) = (folder / "here" / "checkpoints").iterdir()
  told = manifest.read_manifest(step)
  settings_file = step / "experiment.json"
  good = settings_file.read_text()

  def sample_of(name, text):
    """With a manifest to which the file is what it should be."""
    (step / name).write_text(text)
    manifest.write_manifest(step, told)
    return call(capsys, sample.main, "--run", "here")

  for bad in (
    "__import__('os').abort()",
    "[]",
    good.replace('"format": 1', '"format": 2'),
    good.replace('"d_ff"', '"d_f"'),
    "",
  ):
    status, _, err = sample_of("experiment.json", bad)
    assert status == 2 and err.count("\n") == 1
  sample_of("experiment.json", good)
  assert (
    "not the tokenizer"
    in sample_of("tokenizer.json", '{"type": "characters", "chars": "ab", "bos": true}')[2]
  )


def test_a_folder_that_cannot_be_written_is_one_line(folder, capsys):
  (folder / "runs").write_text("a file where the folder should be")
  status, _, err = call(capsys, run.main, *FAST)
  assert status == 2 and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(folder):
  """A real process, a real signal: status 130, one line, and the second run ends where the first
  would have.
  """
  args = ["jgpt.run", "--experiment", "names", "--steps", "60000", "--log-every", "2000"]
  with start(*args) as first:
    for line in first.stdout:
      if line.startswith("step  2000/"):
        first.send_signal(signal.SIGINT)
        break
    err = first.communicate(timeout=60)[1]
  lines = [line for line in err.splitlines() if line and " is a spike" not in line]
  assert (
    first.returncode == 130
    and lines[0] == "stopping after the steps under way; once more quits at once"
  )
  stopped = int(
    re.fullmatch(r"stopped after step ([\d,]+), which is saved in runs/names.*", lines[1])[
      1
    ].replace(",", "")
  )
  assert 2000 <= stopped < 60000
  with start(*args) as second:
    out, err = second.communicate(timeout=120)
  assert second.returncode == 0 and all(" is a spike" in line for line in err.splitlines() if line)
  assert f"going on from step {stopped:,}" in out and "20 samples" in out
  rows = small_runs.read_untimed(folder / "runs" / "names,train.steps=60000")
  assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 60001))


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_encoding_without_our_characters_is_no_error(folder, encoding):
  """Names, frames and the plus-minus sign are replaced; training does not end in a stack trace."""
  env = os.environ | {
    "PYTHONIOENCODING": encoding,
    "PYTHONPATH": str(Path(run.__file__).parent.parent),
  }
  for args in (FAST, ["--list"]):
    done = subprocess.run(
      [sys.executable, "-m", "jgpt.run", *args], env=env, capture_output=True, check=False
    )
    assert done.returncode == 0 and done.stderr == b""


def test_a_command_ends_without_looking_for_garbage():
  """What jax makes while it is imported and traces takes 0.2 s to look through, and the process's
  memory goes anyway.
  """
  program = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count()))  # called after what is registered later
from jgpt import cli
print(gc.get_freeze_count(), cli.guard(lambda: 0))
"""
  env = os.environ | {"PYTHONPATH": str(Path(run.__file__).parent.parent)}
  done = subprocess.run(
    [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
  )
  before, status, at_exit = map(int, done.stdout.split())
  assert before == status == 0 and at_exit > 1000


@pytest.mark.slow
def test_a_reader_that_leaves_while_training_loses_nothing(folder):
  """`| head -1`: the log stops, one line says so, the run is saved."""
  with start(
    "jgpt.run", "--experiment", "names", "--steps", "40000", "--log-every", "100"
  ) as process:
    while not process.stdout.readline().startswith(
      "step"
    ):  # what stands above is printed before training begins
      pass
    process.stdout.close()
    err = process.stderr.read()
  assert "ConsoleWriter stopped" in err and "training goes on" in err and "Traceback" not in err
  assert (folder / "runs" / "names,train.steps=40000" / "checkpoints" / "40000").is_dir()


def test_names_says_that_it_uses_one_of_eight_devices(folder, capsys):
  """A batch of one cannot be divided: on 8 devices (these are virtual) `names` uses one, and one
  line says so.
  """
  out = call(capsys, run.main, *FAST)[1]
  assert [line for line in out.splitlines() if "1 of 8 devices (mesh.data=1)" in line]


@pytest.mark.slow
def test_a_rate_that_is_too_high_ends_with_a_word_and_no_stack_trace(folder, capsys):
  status, out, err = call(capsys, run.main, *FAST, "--set", "optimizer.peak_lr=1000")
  assert status == 0 and err == "" and "perplexity inf" in out


def test_fresh_leaves_what_is_no_run_folder_alone(folder, capsys):
  (folder / "docs").mkdir()
  (folder / "docs" / "mine.txt").write_text("mine")
  for workdir in ("docs", ".", "/"):
    status, _, err = call(capsys, run.main, *FAST, "--fresh", "--workdir", workdir)
    assert status == 2 and "not a run folder" in err
  call(capsys, run.main, *FAST)
  assert call(capsys, run.main, *FAST, "--fresh", "--set", "data.path=missing.txt")[0] == 2
  assert [p.name for p in (folder / "runs").iterdir()] == ["names,train.steps=40"]


def test_fresh_does_not_rename_the_folder_one_is_in(folder, capsys, monkeypatch):
  call(capsys, run.main, *FAST, "--workdir", "here")
  monkeypatch.chdir("here")
  status, _, err = call(capsys, run.main, *FAST, "--workdir", ".", "--fresh")
  assert (
    status == 2
    and "the folder you are in" in err
    and (folder / "here" / "experiment.json").exists()
  )


def test_an_experiment_file_that_fails_is_named_with_its_line(folder, capsys):
  (folder / "mine.py").write_text("import jgpt\n\nnope\n")
  status, _, err = call(capsys, run.main, "--experiment", "mine.py")
  assert status == 2 and err == "error: mine.py, line 3: NameError: name 'nope' is not defined\n"


@pytest.mark.slow
def test_more_steps_in_an_edited_experiment_begin_a_run_of_their_own(folder, capsys):
  """Also where the edit changes neither the size of the file nor the second of its time."""
  text = (Path(run.__file__).parent.parent / "experiments" / "names.py").read_text(encoding="utf-8")
  for steps in (20, 30):
    (folder / "own.py").write_text(text.replace("steps=1000", f"steps={steps}"), encoding="utf-8")
    os.utime(folder / "own.py", (1_700_000_000, 1_700_000_000))
    assert call(capsys, run.main, "--experiment", "own.py")[0] == 0
  assert len(list((folder / "runs").iterdir())) == 2


def test_a_reader_that_leaves_early_is_no_error(folder):
  with start("jgpt.run", "--experiment", "names", "--print-config") as process:
    process.stdout.close()
    assert process.stderr.read() == ""


def test_the_console_script_dispatches(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["jgpt", "run", "--list"])
  assert cli.main() == 0 and "names" in capsys.readouterr().out
  monkeypatch.setattr(sys, "argv", ["jgpt", "rnu"])
  assert cli.main() == 2 and "There are run, sample, bench" in capsys.readouterr().err


@pytest.mark.slow
def test_a_terminal_shows_a_bar_and_a_name_on_each_line(folder):
  """In a pseudo-terminal each line of progress ends with a name drawn at that moment."""
  pty = pytest.importorskip("pty", reason="pseudo-terminals are POSIX")
  reader, writer = pty.openpty()
  process = start("jgpt.run", *FAST, stdout=writer, stderr=subprocess.STDOUT)
  os.close(writer)
  shown, began = b"", time.monotonic()
  while time.monotonic() - began < 100:
    try:
      chunk = os.read(reader, 65536)
    except OSError:  # the other end is closed
      break
    if not chunk:
      break
    shown += chunk
  os.close(reader)
  assert process.wait(timeout=60) == 0, shown.decode()
  plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
  lines = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("step")]
  named = [line for line in lines if re.search(r"steps/s \| [a-z]*$", line.rstrip())]
  assert [int(line.split("/")[0].split()[1]) for line in named] == [1, 20, 40]
  assert all("held out" in line for line in lines if line not in named)
  assert "training" in plain and "/40" in plain and "[progress" not in plain
