"""Texts of every kind of trouble, given to each kind of experiment: a defined result, or an error
that names the file.

`tests/data/test_corpus.py` and `tests/data/test_sources.py` try single functions, any bytes among
them.
"""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input import NO_DEVICE, Case, advice, assert_refused, give, settings

import jgpt

SMALL = ("data.seq_len=16", "model.max_seq_len=16", "data.batch_size=2", "mesh.data=1")
TINY = (
  *SMALL,
  "model.num_layers=1",
  "model.num_heads=2",
  "model.d_model=8",
  "model.d_ff=8",
  "sample.max_tokens=3",
)
KINDS = {
  "documents": ("names",),
  "bytes": ("shakespeare_bytes",),
  "characters": ("shakespeare_char_cpu",),
  "merges": ("shakespeare_bpe", "data.bpe_vocab_size=257"),
}
EMPTY = {"empty": b"", "only a mark": b"\xef\xbb\xbf"}  # of the order of bytes
NOT_UTF8 = {
  "latin1": b"caf\xe9\n" * 300,
  "utf16": ("To be\n" * 200).encode("utf-16"),
  "cut": ("é" * 2000).encode()[:-1],
  "surrogates": b"\xed\xa0\x80" * 500,
  "compressed": b"\x1f\x8b\x08\x00abcdef" * 100,
}
SHORT = {"short": b"abc", "blank": b" \t\r\n\n", "one word": b"To be or not"}
SOUND = {
  "nul": b"a\x00b c\x00\n" * 300,
  "crlf": b"To be\r\nor not\r\n\r\n" * 200,
  "cr": b"To be\ror not\r" * 200,
  "marked": b"\xef\xbb\xbf" + b"To be or not to be\n" * 60,
  "one line": b"to be or not " * 200,
  "one letter": b"a" * 5000,
  "far characters": "\uffff\U0010ffff\x7f\x85\u2028\n\U0001f600\u0301 \u202e".encode() * 200,
}


def write(folder: Path, texts: dict[str, bytes]) -> None:
  for name, content in texts.items():
    (folder / f"{name}.txt").write_bytes(content)


def leads_to_devices(outcome) -> bool:
  """Whether some way that errors advise ends where devices are looked at.

  A longer text is none that can be tried.
  """
  return NO_DEVICE in outcome.err or any(leads_to_devices(further) for further in outcome.followed)


@pytest.mark.slow
def test_row_21_each_text_is_refused_by_name_or_read_by_each_kind(tmp_path):
  write(tmp_path, EMPTY | NOT_UTF8 | SHORT | SOUND)
  table = [(kind, name) for kind in KINDS for name in EMPTY | NOT_UTF8 | SHORT | SOUND]
  cases = [
    Case(argv=settings(*KINDS[kind], *SMALL, f"data.path={name}.txt"), follow=4)
    for kind, name in table
  ]
  for outcome, (kind, name) in zip(give(cases, cwd=tmp_path), table, strict=True):
    if name in SOUND or (kind == "documents" and name in ("short", "one word")):
      assert outcome.status == 2 and outcome.left == []
      assert leads_to_devices(outcome), outcome
      continue
    assert_refused(outcome, f"{name}.txt")
    if name in NOT_UTF8:
      assert re.search(
        r"is not UTF-8 text: byte \d+ is 0x[0-9a-f]{2}\. Save it as UTF-8", outcome.err
      )
    elif name in SHORT and advice(outcome.err):
      assert leads_to_devices(outcome), outcome
  assert sorted(path.suffix for path in tmp_path.iterdir()) == [".txt"] * len(
    EMPTY | NOT_UTF8 | SHORT | SOUND
  )


@pytest.mark.slow
def test_row_21_odd_texts_train(tmp_path):
  """What is read is trained on, and sampled from: one document, one line, characters that are hard
  to show.
  """
  write(tmp_path, SOUND | {"one document": b"emma\n"})
  begin = {"documents": "", "characters": "b", "bytes": ""}
  table = [("documents", "one document"), ("characters", "one line"), ("bytes", "far characters")]
  cases = [
    Case(
      argv=[
        *settings(*KINDS[k], *TINY, f"data.path={n}.txt", f"sample.prompt={begin[k]}"),
        "--steps",
        "2",
      ]
    )
    for k, n in table
  ]
  for outcome in give(cases, cwd=tmp_path, JAX_PLATFORMS="cpu"):
    assert outcome.status == 0 and outcome.err == "", outcome


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["documents", "bytes"])
def test_row_21_one_line_of_100_megabytes_is_read(tmp_path, kind):
  """In seconds and in 16 bytes of memory for each byte, at most, besides what a process takes
  anyway.
  """
  with open(tmp_path / "line.txt", "wb") as file:
    for _ in range(100):
      file.write(b"to be or not to be " * 52_632)
  argv = settings(*KINDS[kind], *SMALL, "data.path=line.txt", "data.heldout_fraction=0")
  program = (
    "import sys; from jgpt import cli, run; sys.exit(cli.guard(lambda: run.main(sys.argv[1:])))"
  )
  env = {"PYTHONPATH": str(Path(jgpt.__file__).parent.parent), "JAX_PLATFORMS": "nowhere"}
  before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
  done = subprocess.run(
    [sys.executable, "-c", program, *argv[1:]],
    cwd=tmp_path,
    env=env,
    capture_output=True,
    text=True,
    check=False,
    preexec_fn=lambda: limit(5 << 30),
  )
  assert done.returncode == 2 and NO_DEVICE in done.stderr, done.stderr
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert usage.ru_utime - before < 60
  if sys.platform == "linux":  # in kilobytes there
    assert usage.ru_maxrss < 2.5e6


@pytest.mark.slow
def test_row_21_one_word_of_a_megabyte_is_refused_where_merges_are_learned(tmp_path):
  """Learning merges takes the square of a word's length: a line of bases would take days."""
  (tmp_path / "genome.txt").write_text("gattaca" * 150_000)
  (outcome,) = give(
    [Case(argv=settings(*KINDS["merges"], *SMALL, "data.path=genome.txt"), follow=2)], cwd=tmp_path
  )
  assert_refused(
    outcome, "genome.txt has a word of more than 131,072 characters", "data.tokenizer=characters"
  )
  assert [leads_to_devices(further) for further in outcome.followed] == [True, True]


def limit(num_bytes: int) -> None:
  resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
