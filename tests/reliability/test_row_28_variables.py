"""Row 28: jax's environment variables: each is obeyed, or ends with one line."""

from pathlib import Path

import jax
import pytest
from bad_input import NO_DEVICE, Case, give
from small_runs import train_verse, train_words

import jgpt
from jgpt.errors import UserError

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
@pytest.mark.parametrize("platforms", ["cuda", "tpu", "nonsense", "gpu,cuda"])
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
