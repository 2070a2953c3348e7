"""A stranger's run folder: every file in it against inputs that nobody meant to write, as in
`test_fuzz_parsers.py`.
"""

import contextlib
import json

import fuzzing
import numpy as np
import pytest
from fuzzing import Parser, any_bytes, edit_bytes, edit_json

from jgpt.config.catalog import load_experiment
from jgpt.config.settings import resolve
from jgpt.doctor import continuation
from jgpt.errors import UserError
from jgpt.runs import manifest
from jgpt.runs.folder import RunFiles, append_env, read_run_files, write_run_files
from jgpt.runs.health import Health
from jgpt.runs.log import Chunk, JsonlWriter
from jgpt.runs.rows import read_jsonl, read_losses
from jgpt.system import locks
from jgpt.text.tokenizer import CharTokenizer

QUICK = 100


def write_run(folder, tokenizer=None):
  """experiment.json and tokenizer.json of a run folder; returns their contents."""
  tokenizer = tokenizer or CharTokenizer("\n abc", True)
  experiment = resolve(load_experiment("names"), tokenizer.vocab_size)
  data = {"kind": "path", "location": "x", "sha256": "0" * 64}
  write_run_files(folder, RunFiles("names", experiment, tokenizer, data))
  return {name: (folder / name).read_bytes() for name in ("experiment.json", "tokenizer.json")}


def mostly_json(base):
  return lambda rng: edit_json(rng, base, (base,)) if rng.random() < 0.97 else any_bytes(rng)


def run_file(folder, name):
  """experiment.json or tokenizer.json."""
  base = write_run(folder)[name]

  def read(content):
    fuzzing.write(folder / name, content)
    files = read_run_files(folder)
    assert files.experiment.model.vocab_size >= files.tokenizer.vocab_size
    assert all(isinstance(v, str) for v in files.data.values())
    assert files.name.isprintable() and len(files.name) < 500
    hash(files.experiment)

  return Parser(mostly_json(base), read, str(folder))


def environment(folder):
  """env.json, to which each start adds an entry, whatever is there."""
  path = folder / "env.json"
  base = json.dumps(
    [{"time": "2026-01-01", "devices": 8, "settings": {"train.steps": 5}}] * 2
  ).encode()

  def read(content):
    fuzzing.write(path, content)
    append_env(folder, {"new": 1})
    there = json.loads(path.read_bytes())
    assert isinstance(there, list) and there[-1] == {"new": 1}
    if len(there) == 1:
      raise UserError("begun anew")

  return Parser(mostly_json(base), read, may_write=str(folder))


def manifest_file(folder):
  """What a step says of itself: nothing in it makes a reader raise, and what is called sound is as
  it says.
  """
  write_run(folder)
  step = folder / "checkpoints" / "30"
  for name in (
    "params/_METADATA",
    "params/d/0123",
    "train_state/_METADATA",
    "experiment.json",
    "tokenizer.json",
  ):
    (step / name).parent.mkdir(parents=True, exist_ok=True)
    (step / name).write_bytes(name.encode())
  leaf = {"dtype": "float32", "shape": [27, 16], "digest": "0123456789abcdef"}
  written = manifest.Manifest(
    30, {"kind": "x", "sha256": "0"}, 2.5, {"params/tok_embed": leaf, "train_state/step": leaf}, {}
  )
  manifest.write_manifest(step, written)
  base = (step / "manifest.json").read_bytes()

  def read(content):
    fuzzing.write(step / "manifest.json", content)
    assert manifest.list_steps(folder) == [30]
    manifest.delete_old_steps(folder, 1, 1)
    damage = manifest.find_damage(step)
    if damage is not None:
      raise UserError(damage)
    assert manifest.read_manifest(step).files == manifest.digest_files(step)

  def make(rng):
    edited = mostly_json(base)(rng)
    if rng.random() < 0.8:
      with contextlib.suppress(ValueError, RecursionError, AttributeError):
        edited = json.dumps(fuzzing.seal_manifest(json.loads(edited))).encode()
    return edited

  return Parser(make, read, str(folder), block=2 << 20)


def metrics_file(folder):
  """The log: what is a row is read by everybody, whatever stands around it."""
  path = folder / "metrics.jsonl"
  rows = [
    {"step": n, "train/loss": 3.0 / n, "train/grad_norm": 1.0, "train/lr": 0.01, "train/skipped": 0}
    for n in range(1, 6)
  ]
  rows.insert(3, {"step": 3, "heldout/loss": 2.5})
  lines = [json.dumps(row).encode() for row in rows]
  base = b"".join(line + b"\n" for line in lines)

  def make(rng):
    if rng.random() < 0.6:
      edited = [*lines]
      at = rng.randrange(len(edited))
      edited[at] = edit_json(rng, edited[at], lines)
      return b"\n".join(edited) + b"\n"
    return edit_bytes(rng, base, lines) if rng.random() < 0.95 else any_bytes(rng, [base])

  def read(content):
    fuzzing.write(path, content)
    found = read_jsonl(path)
    assert all(type(value) in (int, float) for row in found for value in row.values())
    losses, heldout_losses = read_losses(path, 10**60)
    assert len(losses) == sum("train/loss" in row for row in found)
    assert [loss for _, loss in heldout_losses] == pytest.approx(
      [row["heldout/loss"] for row in found if "heldout/loss" in row], nan_ok=True
    )
    go_on(content, found)
    if len(found) < len(rows):
      raise UserError("shorter")

  def go_on(content, found):
    """As a run that was restored at step 4 does: what stands before its first row stood there, and
    half of it is right.
    """
    writer = JsonlWriter(path, 4)
    assert path.read_bytes() == content
    watch = Health(writer.kept, 3)
    new = {name: np.float32([2.5]) for name in ("train/loss", "train/grad_norm")} | {
      "train/skipped": np.int32([0])
    }
    watch.observe(5, new)
    writer.write(Chunk(5, new, 1.0))
    writer.close()
    *old, last = read_jsonl(path)
    assert last["step"] == 5 and last["train/loss"] == 2.5
    assert repr(old) == repr(found[: len(old)]) and repr(
      [row for row in old if row["step"] <= 4]
    ) == repr(writer.kept)
    written = path.read_bytes()
    assert 2 * len(writer.kept) >= len(old)
    assert content.startswith(written[: written.rindex(b'{"step": 5')].removesuffix(b"\n"))
    assert continuation.examine_metrics(path, 5)

  return Parser(make, read, may_write=str(folder))


def lock_file(folder):
  """What names the process that writes.

  Nothing in it keeps anybody from saying that there is one.
  """

  def read(content):
    fuzzing.write(folder / locks.LOCK_FILE, content)
    holder = locks.describe_holder(folder)
    assert holder.isprintable() and len(holder) < 200
    if not holder:
      raise UserError("names none")

  return Parser(mostly_json(b'{"pid": 12345, "host": "a-machine.example"}'), read)


PARSERS = {
  "experiment.json": lambda folder: run_file(folder, "experiment.json"),
  "tokenizer.json of a run": lambda folder: run_file(folder, "tokenizer.json"),
  "env.json": environment,
  "manifest.json": manifest_file,
  "metrics.jsonl": metrics_file,
  ".lock": lock_file,
}


@pytest.mark.parametrize("name", PARSERS)
def test_fuzz_a_few_inputs(name, tmp_path):
  count = fuzzing.run_campaign(name, PARSERS[name](tmp_path), range(QUICK))
  assert count.inputs == QUICK and count.valid and count.refusals


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_fuzz_10000_inputs(name, tmp_path, record_property):
  count = fuzzing.run_campaign(name, PARSERS[name](tmp_path), fuzzing.numbers())
  record_property("fuzzed", str(count))
  print(count)
  assert (
    count.inputs == len(fuzzing.numbers()) and count.valid > 0.005 * count.inputs and count.refusals
  )
