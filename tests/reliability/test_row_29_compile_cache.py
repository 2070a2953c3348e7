"""A cache of compiled programs that cannot be trusted: ignored, with one line at most, and what is
computed stays the same.

Compiled programs are machine code: before damage was looked for, half of the runs with one bit
turned over in each program of a cache that zstd had compressed crashed, and one computed other
losses.
"""

import json
import os
import random
import stat
import zlib
from pathlib import Path

import pytest
import small_runs
from bad_input import Case, give
from children import arguments, write_texts

from jgpt.devices import runtime
from jgpt.runs.result import read_result

NUM_SEEDS = 2


@pytest.fixture
def cache(tmp_path):
  """The folder of three compressed programs, as jax names them."""
  for n in range(3):
    (tmp_path / f"jit_{n}-abc-cache").write_bytes(zlib.compress(bytes([n]) * 1000))
  return tmp_path


def programs(folder: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.glob("*-cache")}


def test_row_29_programs_that_were_damaged_are_dropped_and_no_others(cache):
  runtime.delete_damaged_programs(cache)
  there = programs(cache)
  runtime.delete_damaged_programs(cache)
  assert programs(cache) == there and len(there) == 3
  (cache / "jit_0-abc-cache").write_bytes(there["jit_0-abc-cache"][:-1])
  (cache / "jit_1-abc-cache").write_bytes(
    bytes([there["jit_1-abc-cache"][0] ^ 1]) + there["jit_1-abc-cache"][1:]
  )
  runtime.delete_damaged_programs(cache)
  assert programs(cache) == {"jit_2-abc-cache": there["jit_2-abc-cache"]}
  assert list(json.loads((cache / "digests.json").read_text())) == ["jit_2-abc-cache"]


@pytest.mark.parametrize(
  "content", [b"", zlib.compress(b"program" * 99)[:-1], b"\x78\x9c"], ids=["empty", "cut", "begun"]
)
def test_row_29_a_new_program_that_was_not_written_to_its_end_is_dropped(cache, content):
  """What is there is never replaced by jax, so it would be in the way for good."""
  (cache / "jit_new-abc-cache").write_bytes(content)
  runtime.delete_damaged_programs(cache)
  assert len(programs(cache)) == 3 and "jit_new-abc-cache" not in programs(cache)


@pytest.mark.parametrize(
  "content", [b"", b"[]", b"{", b'{"jit_0-abc-cache": 5}', b"[" * 100_000, b"\xff"], ids=range(6)
)
def test_row_29_a_list_of_digests_that_is_none_is_written_anew(cache, content):
  (cache / "digests.json").write_bytes(content)
  runtime.delete_damaged_programs(cache)
  assert json.loads((cache / "digests.json").read_text()).keys() == programs(cache).keys()


def test_row_29_a_folder_that_is_not_there_is_left_alone(tmp_path):
  runtime.delete_damaged_programs(tmp_path / "absent")
  assert list(tmp_path.iterdir()) == []


@pytest.fixture
def train(tmp_path):
  """A function that trains a small run with the cache folder `tmp_path`/cache.

  Returns its losses and what it said.
  """
  write_texts(tmp_path)
  number = iter(range(100))
  env = {
    "JGPT_CACHE_DIR": str(tmp_path / "cache"),
    "JAX_COMPILATION_CACHE_DIR": "",
    "JAX_PLATFORMS": "cpu",
  }
  (tmp_path / "cache").mkdir(mode=0o700)
  (tmp_path / "cache" / "canary.json").write_bytes(
    (Path(os.environ["JGPT_CACHE_DIR"]) / "canary.json").read_bytes()
  )

  def run():
    folder = f"run{next(number)}"
    argv = ["run", *arguments("names", folder, train__steps=20, compute__tricks=False)]
    (outcome,) = give([Case(argv=argv)], cwd=tmp_path, **env)
    assert outcome.status == 0, outcome
    rows = small_runs.read_untimed(tmp_path / folder)
    return [row.get("train/loss", row.get("heldout/loss")) for row in rows], outcome

  return run


@pytest.mark.slow
def test_row_29_whatever_is_wrong_with_a_cache_losses_are_the_same(train, tmp_path):
  compiled = tmp_path / "cache" / "compiled"
  losses, first = train()
  entries = programs(compiled)
  assert len(losses) >= 20 and first.err == "" and len(entries) >= 3
  assert stat.S_IMODE(compiled.stat().st_mode) == 0o700
  again, second = train()
  assert (
    again == losses and second.err == "" and second.num_cached > first.num_cached == 0
  )  # it is used
  compiled_first, compiled_again = (
    read_result(tmp_path / run)["compiled"] for run in ("run0", "run1")
  )
  assert compiled_first["from_cache"] == 0 < compiled_first["programs"]
  assert compiled_again["from_cache"] == compiled_again["programs"] == compiled_first["programs"]
  assert set(json.loads((compiled / "digests.json").read_text())) == set(entries)

  def replace(change):
    for name, content in entries.items():
      (compiled / name).write_bytes(change(content))
    got, outcome = train()
    assert got == losses and outcome.err == "", outcome
    assert programs(compiled).keys() == entries.keys()  # made anew
    for name, content in programs(compiled).items():
      assert zlib.decompress(content), name

  for seed in range(NUM_SEEDS):
    random_bits = random.Random(seed)
    replace(lambda content, bits=random_bits: turn_over(content, bits))
  replace(
    lambda content: content[: len(content) // 2 * (len(content) % 2)]
  )  # cut in half, or empty
  (compiled / "digests.json").unlink()  # damaged before anyone had looked: zlib notices
  replace(lambda content: turn_over(content, random.Random(9)))


@pytest.mark.slow
def test_row_29_a_cache_of_another_version_or_that_others_can_write_is_not_used(train, tmp_path):
  compiled = tmp_path / "cache" / "compiled"
  losses, _ = train()
  for name, content in programs(compiled).items():  # the version is part of the name's digest
    (compiled / name).rename(compiled / f"{name.split('-')[0]}-{'0' * 64}-cache")
    (compiled / f"{name.split('-')[0]}-{'1' * 64}-cache").write_bytes(
      b"from another world" + content
    )
  got, outcome = train()
  assert got == losses and outcome.err == ""
  there = programs(compiled)
  compiled.chmod(0o770)
  got, outcome = train()
  assert (
    got == losses and outcome.err.count("\n") == 1 and "can be written by others" in outcome.err
  )
  assert programs(compiled) == there and outcome.num_cached == 0  # neither read nor written
  compiled.chmod(0o700)
  if os.getuid() == 0:  # only root can give a folder away
    os.chown(compiled, 12345, -1)
    got, outcome = train()
    assert (
      got == losses and outcome.err.count("\n") == 1 and "can be written by others" in outcome.err
    )


def turn_over(content: bytes, bits: random.Random) -> bytes:
  """The content with one bit turned over."""
  changed = bytearray(content)
  changed[bits.randrange(len(changed))] ^= 1 << bits.randrange(8)
  return bytes(changed)
