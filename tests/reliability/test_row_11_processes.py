"""Row 11 over processes: a checkpoint is the same whatever number of processes wrote it or reads
it, and what fails in one process fails in all.
"""

import contextlib
import json
import socket

import children
import jax
import numpy as np
import peer
import pytest

from jgpt.runs import checkpoint, manifest
from jgpt.runs.folder import RunFiles, write_run_files
from jgpt.text.tokenizer import CharTokenizer

FILES = RunFiles(
  "names",
  peer.make_experiment(),
  CharTokenizer("abcdefghijklmnopqrstuvwxyz", bos=True),
  {"kind": "path", "sha256": "0" * 64},
)


def find_port():
  with contextlib.closing(socket.socket()) as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def save_alone(workdir, step, **mesh):
  """Saves the state that the processes draw, from one process; returns its digests."""
  workdir.mkdir()
  write_run_files(workdir, FILES)
  _, draw = peer.shape_state(peer.make_experiment(**mesh), jax.devices())
  state = draw()
  with checkpoint.open_checkpoints(workdir) as manager:
    checkpoint.save_checkpoint(manager, peer.with_step(state, step))
  return peer.digest(state)


@pytest.mark.slow
def test_row_11_two_processes_save_and_restore(tmp_path):
  """Each has half of the state and writes it; one process reads it on 1 and on 4 devices, and they
  read what one process on 4 devices wrote. No error of one leaves the other waiting.
  """
  write_run_files(tmp_path, FILES)
  digests = save_alone(tmp_path / "one", 7, data=2, fsdp=2)
  address = f"127.0.0.1:{find_port()}"
  with contextlib.ExitStack() as stack:
    both = [
      stack.enter_context(children.Child("peer", address, 2, n, tmp_path, cwd=tmp_path))
      for n in range(2)
    ]
    for child in both:
      assert child.wait(120) == 0, both[0].err + both[1].err
  found = [json.loads(child.out.splitlines()[-1]) for child in both]
  for report in found:
    assert report["here"] < 0.6 * report["whole"], report
    assert report["steps"] == [1] and report["after full"] == [1] and report["again"] == [1, 2]
    assert report["digests"] == digests and report["restored"] == digests
    kind, message, seconds = report["full"]
    assert kind == "TrainingError" and "process 1: " in message and "too large" in message.lower()
    assert message.endswith("The last checkpoint is of step 1") and seconds < 20, message
    kind, message, seconds = report["not finite"]
    assert kind == "TrainingError" and "params/tok_embed is not finite" in message, message
    kind, message, seconds = report["damaged"]
    assert kind == "UserError" and "cannot read the checkpoint" in message and seconds < 20, message
  assert found[0]["full"][1] == found[1]["full"][1]
  assert found[0]["damaged"][1] == found[1]["damaged"][1]
  assert children.steps_there(tmp_path) == [1, 2]
  folder = tmp_path / "checkpoints" / "1"
  assert manifest.find_damage(folder) is None
  written = json.loads((folder / "manifest.json").read_text())["leaves"]
  alone = tmp_path / "one" / "checkpoints" / "7"
  of_one = json.loads((alone / "manifest.json").read_text())["leaves"]
  assert {n for n in written if written[n] != of_one[n]} == {"train_state/step"}
  for mesh in ({"data": 1}, {"data": 2, "fsdp": 2}):
    shapes, _ = peer.shape_state(peer.make_experiment(**mesh), jax.devices())
    state = checkpoint.restore(folder, shapes)
    assert peer.digest(state) == digests
  expected = children.read_leaves(alone)
  for name, x in children.read_leaves(folder).items():
    assert name == "train_state/step" or np.array_equal(x, expected[name]), name
