"""Row 23: a token file that is damaged, of another kind or of another tokenizer is refused before
anything is trained.

By the command, whole: one line that names the file and what is wrong in it, exit status 2, no run
folder. What each check says is in `tests/data/test_token_files.py`; any bytes are in
`test_fuzz_parsers.py`.
"""

import json
import os
import struct

import children
import numpy as np
import pytest

from jgpt import cli, run
from jgpt.data.token_files import read_header
from jgpt.text.tokenizer import CharTokenizer

IDS = [ord(c) for c in "To be, or not to be: that is the question.\n" * 4]
SETTINGS = {"data.path": "tokens", "data.heldout_fraction": 0, "train.steps": 2}
LARGE = 300  # the tokenizer's ids are bytes


def pack(ids, magic=20240520, version=1, count=None, dtype="<u2"):
  header = struct.pack("<256i", magic, version, len(ids) if count is None else count, *[0] * 253)
  return header + np.array(ids, dtype).tobytes()


def pack32(ids, **changes):
  return pack(ids, **{"magic": 20240801, "version": 7, "dtype": "<u4"} | changes)


GOOD = {"16 bits": pack(IDS), "32 bits": pack32(IDS), "no header": np.array(IDS, "<u2").tobytes()}
BAD = {
  "bad magic": (pack(IDS, magic=20240521), "has magic 20240521"),
  "magic of another file": (pack(IDS, magic=20240326), "llm.c's weights"),
  "bad version": (pack(IDS, version=2), "has version 2"),
  "version of the other width": (pack32(IDS, version=1), "has version 1"),
  "count too large": (pack(IDS, count=len(IDS) + 1), f"has count {len(IDS) + 1}"),
  "count too small": (pack(IDS, count=len(IDS) - 1), f"has count {len(IDS) - 1}"),
  "count negative": (pack(IDS, count=-1), "has count -1"),
  "no ids": (pack([]), "has count 0"),
  "cut": (pack(IDS)[:-2], "it is cut"),
  "an odd byte": (GOOD["no header"] + b"\0", "an even number"),
  "empty": (b"", "is empty"),
  "a cut header": (pack(IDS)[:700], "its header alone needs 1,024"),
  "32 bits under a header for 16": (pack(IDS, dtype="<u4"), f"has count {len(IDS)}"),
  "32 bits without a header": (np.array(IDS, "<u4").tobytes(), "ids of 32 bits"),
  "big-endian": (struct.pack(">3i", 20240520, 1, 4) + bytes(1012) + bytes(8), "big-endian"),
  "the first id too large": (pack([LARGE, *IDS]), "has id 300 at position 0"),
  "the last id too large": (pack([*IDS, LARGE]), f"has id 300 at position {len(IDS)}"),
  "an id of 2**32 - 1": (
    pack32([*IDS, 2**32 - 1, *IDS]),
    f"has id 4,294,967,295 at position {len(IDS)}",
  ),
  "an id too large without header": (
    np.array([*IDS, 256], "<u2").tobytes(),
    f"has id 256 at position {len(IDS)}",
  ),
  "text": (b"To be, or not to be: that is the question.\n" * 9, "is text"),
  "a pickle": (b"\x80\x04\x95\x20\0\0\0\0\0\0\0" + b"K\x01" * 40, "a pickle"),
}


def arguments(**changes):
  settings = (
    children.STREAM | SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
  )
  words = (word for name, value in settings.items() for word in ("--set", f"{name}={value}"))
  return ["--experiment", "shakespeare_bytes", "--workdir", "run", *words]


def assert_refused(status, out, err, name, words):
  assert (
    (status, out) == (2, "")
    and err.startswith("error: ")
    and err.endswith("\n")
    and err.count("\n") == 1
  ), out + err
  assert name in err and words in err and "Traceback" not in err, err


@pytest.fixture
def tokens(tmp_path, monkeypatch):
  """A folder of two sound token files; a test damages it."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "tokens").mkdir()
  for name in ("a_train_0.bin", "b_train_1.bin"):
    (tmp_path / "tokens" / name).write_bytes(GOOD["16 bits"])
  return tmp_path / "tokens"


@pytest.mark.parametrize("part", ["train", "val"])
def test_row_23_every_kind_of_damage_names_file_and_field(tokens, part, capsys):
  """In whichever file, one that is held out too: none of it is trained on, but its ids would be
  clamped all the same.
  """
  for name, (content, words) in BAD.items():
    path = tokens / f"c_{part}_2.bin"
    path.write_bytes(content)
    status = cli.guard(lambda: run.main(arguments()))
    assert_refused(status, *capsys.readouterr(), path.name, words)
    assert sorted(os.listdir()) == ["tokens"], name


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_row_23_the_command_refuses_before_anything_is_made(tokens, tmp_path, name):
  content, words = BAD[name]
  (tokens / "c_train_2.bin").write_bytes(content)
  child = children.run("jgpt.run", *arguments(), cwd=tmp_path)
  assert_refused(child.status, child.out, child.err, "c_train_2.bin", words)
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", GOOD)
def test_row_23_sound_files_of_each_kind_are_trained_on(tokens, tmp_path, kind):
  """Else every refusal above could have another reason."""
  (tokens / "c_train_2.bin").write_bytes(GOOD[kind])
  child = children.train(*arguments(), cwd=tmp_path)
  assert "3 token files for training" in child.out and children.steps_there(tmp_path / "run") == [2]


def test_row_23_a_tokenizer_beside_the_files_decides_which_ids_there_are(tokens, capsys):
  """llm.c's and nanoGPT's files say nothing of it: a tokenizer of 3 ids makes id 3 an error, not id
  2.
  """
  (tokens / "tokenizer.json").write_text(json.dumps(CharTokenizer("abc", bos=False).to_json()))
  for path in tokens.glob("*.bin"):
    path.write_bytes(pack([0, 1, 2] * 30))
  (tokens / "b_train_1.bin").write_bytes(pack([0, 1, 2] * 30 + [3]))
  status = cli.guard(lambda: run.main(arguments(data__tokenizer="characters")))
  assert_refused(status, *capsys.readouterr(), "b_train_1.bin", "has id 3 at position 90")


def test_row_23_a_pipe_in_the_place_of_a_file_does_not_hang(tokens, capsys):
  os.mkfifo(tokens / "c_train_2.bin")
  (tokens / "prepare.json").write_text(
    json.dumps({"finished": True, "files": [{"name": "c_train_2.bin"}]})
  )
  for path in ("tokens", "tokens/c_train_2.bin"):
    status = cli.guard(lambda path=path: run.main(arguments(data__path=path)))
    assert_refused(status, *capsys.readouterr(), "c_train_2.bin", "no plain file")
  (tokens / "prepare.json").unlink()
  os.mkfifo(tokens / "prepare.json")
  assert read_header(tokens / "a_train_0.bin").count == len(IDS)
  status = cli.guard(lambda: run.main(arguments()))
  assert_refused(status, *capsys.readouterr(), "prepare.json", "no plain file")


@pytest.mark.slow
def test_row_23_a_folder_that_lost_a_byte_of_its_manifest_is_not_trained_on_as_if_whole(
  tokens, tmp_path
):
  """Which of its files are complete, only that says."""
  (tokens / "a.txt").write_text("To be, or not to be: that is the question.\n" * 40)
  for name in ("a_train_0.bin", "b_train_1.bin"):
    (tokens / name).unlink()
  made = children.run(
    "jgpt.prepare",
    "--data",
    "tokens/a.txt",
    "--tokenizer",
    "bytes",
    "--out",
    "made",
    "--heldout-tokens",
    0,
    cwd=tmp_path,
  )
  assert made.status == 0, made.err
  path = tmp_path / "made" / "prepare.json"
  content = path.read_text()
  children.train(*arguments(data__path="made"), cwd=tmp_path)
  for damaged in (
    content.replace('"finished": true', '"finished": tru'),
    content.replace('"files"', '"filez"'),
    "",
  ):
    assert damaged != content
    path.write_text(damaged)
    child = children.run(
      "jgpt.run", *arguments(data__path="made"), "--workdir", "other", cwd=tmp_path
    )
    assert_refused(child.status, child.out, child.err, "made/prepare.json", "jgpt.prepare")
    assert not (tmp_path / "other").exists()
