"""Row 28: jax's environment variables: each is obeyed, or ends with one line."""

import os
import subprocess
import sys
from pathlib import Path

import children
import jax
import pytest
from bad_input import NO_DEVICE, Case, assert_refused, give
from small_runs import train_verse, train_words

import jgpt
from jgpt.errors import UserError
from jgpt.runs.rows import read_jsonl

OLD_RUN = Path(__file__).parent.parent / "fixtures" / "run_format_1"
# What jax says of platforms that are not installed, not on this machine, or unknown.
REASONS = {
  "cuda": AssertionError(),
  "gpu": RuntimeError("Unable to initialize backend 'rocm' (set JAX_PLATFORMS='' to choose)\nx"),
  "tpu": RuntimeError("Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so"),
  "nonsense": RuntimeError("Unable to initialize backend 'nonsense'"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The folders of two small runs, on documents and on a stream."""
  folder = tmp_path_factory.mktemp("runs")
  return str(train_words(folder).workdir), str(train_verse(folder).workdir)


@pytest.mark.parametrize("platforms", REASONS)
def test_row_28_python_is_told_that_there_is_no_device(monkeypatch, platforms):
  def find_none():
    raise REASONS[platforms]

  monkeypatch.setattr(jax, "devices", find_none)
  for call in (
    lambda: jgpt.open_run(OLD_RUN),
    lambda: jgpt.train_run(jgpt.plan_run(jgpt.load_experiment("names"))),
  ):
    with pytest.raises(UserError) as caught:
      call()
    words = str(caught.value)
    assert words.startswith(NO_DEVICE) and "\n" not in words and words.count("set JAX") == 0
    assert "Try JAX_PLATFORMS=cpu before" in words


@pytest.mark.slow
@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
def test_row_28_without_a_device_each_command_ends_with_one_line(runs, tmp_path, platforms):
  words, verse = runs
  commands = [
    ["run", "--experiment", "names"],
    ["sample", "--run", words],
    ["evaluate", "--run", words],
    ["evaluate", "--run", verse, "--part", "train"],
    ["inspect", "--run", words, "--text", "ax"],
    ["inspect", "--run", words, "--trace", "tok_embed[1,2]"],
    ["bench", "--only", "names"],
  ]
  cases = [Case(argv=argv) for argv in commands]
  for outcome in give(cases, cwd=tmp_path, JAX_PLATFORMS=platforms):
    assert outcome.status == 2 and outcome.err.startswith(f"error: {NO_DEVICE}"), outcome
    assert outcome.err.count("\n") == 1 and f"JAX_PLATFORMS={platforms!r}" in outcome.err
    assert ("the extra" in outcome.err) == (platforms != "nonsense")


def guarded_commands(folder):
  """What reads and writes every kind of run, small; its texts are in the folder."""
  children.write_texts(folder)
  often = {"train__eval_every": 3, "train__sample_every": 4, "optimizer__schedule": "constant"}

  def run(name, workdir, **changes):
    return ["run", *children.arguments(name, workdir, **often, **changes)]

  return [
    run("names", "words", train__steps=6),
    run("names", "words", train__steps=9),  # goes on
    ["run", "--experiment", "names", "--workdir", "from", "--init-from", "words", "--steps", "2",
     "--set", "data.path=words.txt"],
    run("epochs", "epochs", train__steps=3),
    run("shards", "shards_run", train__steps=3, mesh__data=2),
    run("bytes", "checked", train__steps=1, model__d_model=112, compute__select="plain"),
    ["sample", "--run", "words", "--prompt", "ax", "--num", "2"],
    ["evaluate", "--run", "words"],
    ["evaluate", "--run", "epochs", "--part", "train"],
    ["inspect", "--run", "words", "--text", "ax"],
    ["inspect", "--run", "epochs", "--text", "To be"],
    ["inspect", "--run", "epochs", "--trace", "blocks/w_up[1,3,5]"],
    ["doctor", "--run", "epochs"],
  ]  # fmt: skip


@pytest.mark.slow
def test_row_28_every_transfer_is_explicit(tmp_path):
  """Under JAX_TRANSFER_GUARD=disallow, which on a CPU forbids what goes to the devices."""
  cases = [Case(argv=argv) for argv in guarded_commands(tmp_path)]
  env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "JAX_TRANSFER_GUARD": "disallow"}
  outcomes = give(cases, cwd=tmp_path, **env)
  for outcome in outcomes:
    assert outcome.status == 0 and "Traceback" not in outcome.err, outcome
  assert any("gradients agree with float64" in outcome.out for outcome in outcomes)
  skipping = children.arguments("names", "skipping", optimizer__peak_lr=1e30, train__steps=40)
  done = subprocess.run(
    [sys.executable, "-m", "jgpt.run", *skipping],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(Path(jgpt.__file__).parent.parent)} | env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1 and "was skipped: its loss is" in done.stderr, done


@pytest.mark.slow
def test_row_28_without_jit_the_plain_functions_train(tmp_path):
  """Ten updates of `names` as compiled; then what reads the run."""
  children.write_texts(tmp_path)
  for workdir, env in (("compiled", {}), ("plain", {"JAX_DISABLE_JIT": "1"})):
    changes = {"train__steps": 10, "train__eval_every": 5, "sample__num": 1}
    commands = [
      ["run", *children.arguments("names", workdir, **changes)],
      ["sample", "--run", workdir, "--num", "2"],
      ["evaluate", "--run", workdir],
      ["inspect", "--run", workdir, "--text", "ax"],
    ]
    cases = [Case(argv=argv) for argv in commands]
    for outcome in give(cases, cwd=tmp_path, JAX_PLATFORMS="cpu", **env):
      assert outcome.status == 0 and outcome.err == "", outcome
  compiled, plain = (
    read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("compiled", "plain")
  )
  assert [row["step"] for row in plain] == [row["step"] for row in compiled]
  for one, other in zip(plain, compiled, strict=True):
    for name in one.keys() & {"train/loss", "train/grad_norm", "train/lr", "heldout/loss"}:
      assert one[name] == pytest.approx(other[name], abs=1e-6), (name, one, other)
  (outcome,) = give([Case(argv=["bench", "--only", "names"])], cwd=tmp_path, JAX_DISABLE_JIT="1")
  assert_refused(outcome, "unset JAX_DISABLE_JIT")
