"""Unknown settings, wrong types, code as a value: refused by the command itself, and nothing is
executed.

`tests/config/test_settings.py` tries every setting at the level of functions,
`tests/test_commands.py` the files of a run folder.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input import Case, assert_refused, give, settings

import jgpt

CODE = "__import__('os').system('touch executed')"
NAMES = ["run", "--experiment", "names"]
UNKNOWN = {
  "train.step=5": "no setting 'train.step'. Did you mean train.steps",
  "batch_size=4": "Try --set data.batch_size=4",
  "model.__class__=1": "no setting 'model.__class__'",
  "train.steps.__add__=1": "no setting 'train.steps.__add__'. Did you mean train.steps",
  "model.__dict__.x=1": "no setting 'model.__dict__.x'",
  "train.st\u0435ps=5": "Did you mean train.steps",  # the Cyrillic letter that looks like e
  "\uff54rain.steps=5": "Try --set train.steps=5",  # a wide t
  "train\u2024steps=5": "Try --set train.steps=5",  # a dot that is none
  f"{CODE}=1": "no setting",
  "os.system=touch executed": "no setting 'os.system'",
  "=5": "no setting ''",
  "a\nb\x1b[2J=1": r"no setting 'a\nb\x1b[2J'",
  "train.steps": "no '='",
  "": "no '='",
}
WRONG = {
  "train.steps=ten": "must be a whole number or none",
  "train.steps=os.system": "must be a whole number or none",
  'train.steps=f\'{open("executed","w")}\'': "must be a whole number or none",
  "train.steps=1e3": "must be a whole number or none",
  "train.steps=5\n6": "must be a whole number or none",
  "train.steps=" + "9" * 5000: "must be a whole number or none",  # more digits than Python reads
  "train.seed=" + "9" * 4000: "below 2**31",
  "optimizer.peak_lr=nan": "finite",
  "optimizer.peak_lr=1e400": "finite",
  "optimizer.peak_lr=1e39": "at most 3.4e+38",  # infinite as a float32
  "model.init_std=1e300": "at most 3.4e+38",
  "optimizer.eps=1e-300": "Try --set optimizer.eps=1e-8",  # 0 as a float32
  "optimizer.b2=0.99999999": "at most 0.99999994",  # 1 as a float32
  "model.tied_head=1": "must be true or false",
  "optimizer.schedule=jgpt.optim.schedule.make_schedule": "linear, cosine, constant or wsd",
  "model.norm=RMS": "rms, layer or layer_no_bias",
  "model.size=d13": "d12, d24, d36, d48",
  "data.path=": "data.path is empty",
  "data.path=~nobody-of-this-name/x": "cannot read ~nobody-of-this-name/x",
  "data.path=" + "x" * 300: "File name too long",
  "data.source=os.system": "'os.system' is not known",
  "train.init_from=os.system": "'os.system' does not exist",
  "train.init_from=": "train.init_from is empty",
}
EXPERIMENTS = {
  "nmaes": "no experiment 'nmaes'. Did you mean names?",
  "jgpt.config": "no experiment 'jgpt.config'",
  "os.system": "no experiment 'os.system'",
  "../experiments/names": "no experiment '../experiments/names'",
  "": "choose an experiment",
  "absent.py": "absent.py does not exist",
  "folder.py": "folder.py does not exist",
  "x" * 1000 + ".py": "does not exist",
}
OPTIONS = {
  ("--stepz", "1"): "no option --stepz. Did you mean --steps",
  ("--step", "1"): "no option --step. Did you mean --steps",
  ("--batch_size", CODE): "data.batch_size is a whole number",
  ("names",): "takes options only, not 'names'. Try --experiment names",
  ("--steps", "1e3"): "--steps: '1e3' must be a whole number",
  ("--steps", "__import__('os')"): "must be a whole number",
  ("--steps",): "--steps: expected one argument",
}


def test_row_19_bad_settings_are_refused_in_one_line(tmp_path):
  (tmp_path / "folder.py").mkdir()
  (tmp_path / "os.py").write_text("open('executed', 'w')")  # what a dotted path could mean
  fields = (
    "train.steps",
    "optimizer.peak_lr",
    "model.norm",
    "model.tied_head",
    "optimizer.decay_kinds",
    "data.path",
  )
  table = [(settings("names", text), words) for text, words in (UNKNOWN | WRONG).items()]
  table += [
    (settings("names", f"{name}={CODE}"), "__import__")
    for name in (*fields, "data.source", "train.init_from")
  ]
  table += [(["run", "--experiment", name], words) for name, words in EXPERIMENTS.items()]
  table += [([*NAMES, *words], text) for words, text in OPTIONS.items()]
  outcomes = give([Case(argv=argv) for argv, _ in table], cwd=tmp_path)
  for outcome, (_, words) in zip(outcomes, table, strict=True):
    assert_refused(outcome, words)
  assert {path.name for path in tmp_path.iterdir()} == {"folder.py", "os.py"}


def test_row_19_a_real_process_refuses_before_jax_is_imported(tmp_path):
  """A misspelt setting costs no second: where importing jax would fail, the error is still that of
  the setting.
  """
  (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')")
  paths = f"{tmp_path}:{Path(jgpt.__file__).parent.parent}"
  for text, words in (
    ("train.step=5", "Did you mean train.steps"),
    (f"train.steps={CODE}", "must be a whole number"),
  ):
    done = subprocess.run(
      [sys.executable, "-m", "jgpt.run", "--experiment", "names", "--set", text],
      cwd=tmp_path, env={"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and words in done.stderr
  assert [path.name for path in tmp_path.iterdir()] == ["jax.py"]


@pytest.mark.slow
def test_row_19_nothing_that_lies_in_a_run_folder_is_executed(tmp_path):
  """A run folder from a stranger, with modules under the names of those that are imported, and
  pickles.
  """
  given = [Case(argv=["run", "--experiment", "names", "--steps", "2", "--workdir", "run"])]
  assert [outcome.status for outcome in give(given, cwd=tmp_path, JAX_PLATFORMS="cpu")] == [0]
  code = f"open({str(tmp_path / 'executed')!r}, 'w')\n"
  pickled = b"cos\nsystem\n(S'touch executed'\ntR."
  for name in (
    "experiment",
    "names",
    "jax",
    "numpy",
    "sitecustomize",
    "conftest",
    "__init__",
    "tokenizer",
  ):
    (tmp_path / "run" / f"{name}.py").write_text(code)
  for name in ("experiment.pkl", "tokenizer.pkl", "checkpoints/meta.pkl", "model.pt"):
    (tmp_path / "run" / name).write_bytes(pickled)
  verbs = [["sample", "--num", "1"], ["inspect", "--text", "emma"], ["evaluate"]]
  cases = [Case(argv=[verb, "--run", "run", *words]) for verb, *words in verbs]
  cases += [Case(argv=[*NAMES, "--steps", "2", "--workdir", "run"])]
  for outcome in give(cases, cwd=tmp_path, JAX_PLATFORMS="cpu"):
    assert outcome.status == 0, outcome
  for bad in ({"__reduce__": ["os.system", ["touch executed"]]}, CODE):
    for file in tmp_path.rglob("experiment.json"):
      file.write_text(json.dumps(bad))
    assert_refused(give(cases[:1], cwd=tmp_path, JAX_PLATFORMS="cpu")[0])
  assert not list(tmp_path.rglob("executed"))
