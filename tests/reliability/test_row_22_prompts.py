"""Prompts: what a tokenizer does not know is named, an empty one has a beginning, a long one keeps
its tail and says so.

`tests/test_generate.py` and `tests/text/test_tokenizer.py` hold the functions to it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input import NO_DEVICE, Case, assert_refused, give, settings

import jgpt

TINY = (
  *(
    "data.seq_len=16",
    "data.batch_size=2",
    "model.max_seq_len=16",
    "model.num_layers=1",
    "model.num_heads=2",
  ),
  *("model.d_model=8", "model.d_ff=8", "mesh.data=1", "sample.max_tokens=3", "sample.num=1"),
)
PATH = "data.path=line.txt"
LINE = "to be or not to be " * 60


@pytest.fixture
def text(tmp_path):
  """A text of one line: its characters have no newline, with which an empty prompt could begin."""
  (tmp_path / "line.txt").write_text(LINE)
  return tmp_path


def test_row_22_a_prompt_that_cannot_be_read_is_refused_before_training(text):
  """A run draws samples at its end: what is wrong with their prompt is said before a device is
  looked at.
  """
  table = {
    ("names", "sample.prompt=Zoë"): "not in the vocabulary: 'Z' 'ë'. The vocabulary is: a-z",
    ("names", "sample.prompt=a\nb"): r"not in the vocabulary: '\n'",
    (
      "names",
      "sample.prompt=\udcff",
    ): r"not in the vocabulary: '\udcff'",  # a byte of the command that is no UTF-8
    ("shakespeare_bytes", "sample.prompt=\udcff"): r"'\udcff', half of a surrogate pair",
    ("shakespeare_char_cpu", *TINY, PATH, "sample.prompt=be!"): "not in the vocabulary: '!'",
    (
      "shakespeare_char_cpu",
      *TINY,
      PATH,
      "sample.prompt=",
    ): "an empty prompt begins with BOS or a newline",
  }
  for outcome, words in zip(
    give([Case(argv=settings(*case)) for case in table], cwd=text), table.values(), strict=True
  ):
    assert_refused(outcome, words)


def test_row_22_a_prompt_that_can_be_read_reaches_the_devices(text):
  cases = [
    settings("names", "sample.prompt="),
    settings("names", "sample.prompt=" + "a" * 100),
    settings("shakespeare_bytes", "sample.prompt="),
    settings("shakespeare_bytes", "sample.prompt=日本\x00"),
    settings("shakespeare_char_cpu", *TINY, PATH, "sample.prompt=" + LINE),
  ]
  for outcome in give([Case(argv=argv) for argv in cases], cwd=text):
    assert outcome.status == 2 and NO_DEVICE in outcome.err and outcome.left == [], outcome


@pytest.mark.slow
def test_row_22_prompts_to_sample_and_inspect(text):
  """Of a run with BOS, of one on bytes and of one whose characters have no newline."""
  runs = [
    [*settings("names", *TINY[2:]), "--steps", "2", "--workdir", "names"],
    [*settings("shakespeare_bytes", *TINY), "--steps", "2", "--workdir", "bytes"],
    [
      *settings("shakespeare_char_cpu", *TINY, PATH, "sample.prompt=to"),
      "--steps",
      "2",
      "--workdir",
      "line",
    ],
  ]
  assert [
    o.status for o in give([Case(argv=argv) for argv in runs], cwd=text, JAX_PLATFORMS="cpu")
  ] == [0, 0, 0]
  refused = {
    (
      "sample",
      "names",
      "--prompt",
      "Zoë",
    ): "not in the vocabulary: 'Z' 'ë'. The vocabulary is: a-z",
    ("sample", "names", "--prompt", "a\x00"): r"not in the vocabulary: '\x00'",
    ("sample", "names", "--prompt", "\udcff"): r"not in the vocabulary: '\udcff'",
    ("sample", "bytes", "--prompt", "\udcff"): "half of a surrogate pair",
    ("sample", "line", "--prompt", ""): "an empty prompt begins with BOS or a newline",
    ("sample", "line", "--prompt", "ж"): "not in the vocabulary: 'ж'",
    ("inspect", "names", "--text", "Zoë"): "not in the vocabulary: 'Z' 'ë'",
    ("inspect", "bytes", "--text", "\udcff"): "half of a surrogate pair",
    ("inspect", "bytes", "--text", "a"): "each token predicts the next: it needs 2",
    ("inspect", "line", "--text", "to be!"): "not in the vocabulary: '!'",
  }
  drawn = {
    ("sample", "names", "--prompt", ""): ("", ""),
    ("sample", "names", "--prompt", "a" * 100): (
      "a" * 100,
      "101 tokens; only its last 16 fit the context",
    ),
    ("sample", "bytes", "--prompt", ""): ("", ""),
    ("sample", "bytes", "--prompt", "é" * 20): (
      "é" * 20,
      "40 tokens; only its last 16 fit the context",
    ),
    ("sample", "line", "--prompt", LINE): (LINE, "1140 tokens; only its last 16 fit the context"),
    ("inspect", "names", "--text", ""): ("run", ""),
    ("inspect", "line", "--text", LINE): ("run", ""),  # it says on standard output what it reads
  }
  cases = [Case(argv=[verb, "--run", run, *words]) for verb, run, *words in [*refused, *drawn]]
  outcomes = give(cases, cwd=text, JAX_PLATFORMS="cpu")
  for outcome, words in zip(outcomes, refused.values(), strict=False):
    if (
      words == "each token predicts the next: it needs 2"
    ):  # which the run's own length of batches decides
      assert (
        outcome.status == 2
        and outcome.out == ""
        and outcome.err.count("\n") == 1
        and words in outcome.err
      ), outcome
    else:
      assert_refused(outcome, words)
  for outcome, (begin, said) in zip(outcomes[len(refused) :], drawn.values(), strict=True):
    assert outcome.status == 0 and outcome.out.startswith(begin) and outcome.left == [], outcome
    assert outcome.err.count("\n") == bool(said) and said in outcome.err, outcome
  assert "the first 17 of 1,140 tokens: the context is 16" in outcomes[-1].out


@pytest.mark.skipif(os.name == "nt", reason="arguments are bytes on POSIX only")
def test_row_22_an_argument_that_is_no_utf8_is_shown_and_refused(tmp_path):
  """The byte reaches a real process, and its error is text that any terminal shows."""
  env = {
    "PYTHONPATH": str(Path(jgpt.__file__).parent.parent),
    "JAX_PLATFORMS": "nowhere",
    "LC_ALL": "C.UTF-8",
  }
  command = [
    sys.executable.encode(),
    b"-m",
    b"jgpt.run",
    b"--experiment",
    b"names",
    b"--set",
    b"model.norm=\xff",
  ]
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False)
  assert done.returncode == 2 and done.stdout == b"" and done.stderr.count(b"\n") == 1
  assert rb"error: model.norm='\udcff' must be rms, layer or layer_no_bias" in done.stderr
