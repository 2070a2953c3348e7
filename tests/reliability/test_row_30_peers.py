"""Row 30: a process of a run dies, never starts, or hangs.

The others end within a stated time, with a status that is not 0 and one line that names what they
waited for. The processes are real, on this machine, with gloo between them. Times from the fault to
the end are printed (`pytest -s`).
"""

import contextlib
import re
import time

import children
import pytest

TIMEOUT = 8  # mesh.timeout_seconds
MARGIN = 25.0  # on a busy machine; on one at rest it is under two seconds
RUN = {
  "train__steps": 100_000,
  "train__log_every": 1,
  "model__num_layers": 1,
  "mesh__data": -1,
  "mesh__timeout_seconds": TIMEOUT,
}
# What happens to which process, where, and what the other one says.
FAULTS = {
  "dies in a step": (1, "kill@call=program.advance:6", "process 1 .*gave no sign of life"),
  "dies while it compiles": (1, "kill@call=program.lower_steps", "process 1 .*no sign of life"),
  "dies before the first exchange": (1, "kill@call=plan.plan_run", "process 1 .*no sign of life"),
  "is stopped in a step": (1, "freeze@call=program.advance:6", "process 1 .*no sign of life"),
  "hangs in a step": (1, "hang@call=program.advance:6", "process 1 .*has not come so far"),
  "the lead hangs": (0, "hang@call=program.advance:6", "process 0 .*has not come so far"),
  "the lead is stopped": (0, "freeze@call=program.advance:6", "process 0 .*no sign of life"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FAULTS)
def test_row_30_a_process_that(texts, what):
  which, fault, words = FAULTS[what]
  args = children.arguments("bytes", what, **RUN)
  with contextlib.ExitStack() as stack:
    processes = children.start_processes(
      stack, *args, cwd=texts, faults={which: fault}, folder=what
    )
    faulty, other = processes[which], processes[1 - which]
    faulty.wait_until(lambda: faulty.fired)
    began = time.monotonic()
    status = other.wait(150)
    took = time.monotonic() - began
    said = f"{other.out}\n{other.err}\n---\n{faulty.out}\n{faulty.err}"
  print(f"\n{what}: the other one ended after {took:.1f} s with status {status}\n{other.err}")
  assert status == 1 and took < TIMEOUT + MARGIN, said
  assert "Traceback" not in other.err and "Check failure" not in other.err, said
  errors = [line for line in said.splitlines() if line.startswith("error:")]
  assert len(errors) == 1, said
  assert re.search(words, errors[0]), said


@pytest.mark.slow
def test_row_30_the_lead_dies(texts):
  """The coordination service dies with it; jax itself then ends the others at once."""
  args = children.arguments("bytes", "lead", **RUN)
  fault = {0: "kill@call=program.advance:6"}
  with contextlib.ExitStack() as stack:
    lead, other = children.start_processes(stack, *args, cwd=texts, faults=fault, folder="lead")
    lead.wait_until(lambda: lead.fired)
    began = time.monotonic()
    status = other.wait(150)
    took = time.monotonic() - began
  print(f"\nthe lead dies: the other one ended after {took:.1f} s with status {status}")
  assert status != 0 and took < TIMEOUT + MARGIN
  assert "coordination service" in other.err or "error: process 0" in other.err, other.err


@pytest.mark.slow
@pytest.mark.parametrize(
  ("present", "words"),
  [(0, "process 1 of 2 did not join within 2 s"), (1, "did not reach process 0")],
)
def test_row_30_a_process_that_never_starts(texts, present, words):
  args = children.arguments("bytes", f"missing {present}", **(RUN | {"mesh__timeout_seconds": 2}))
  told = ["--coordinator", f"127.0.0.1:{children.find_port()}", "--num-processes", 2]
  child = children.run("jgpt.run", *args, *told, "--process-id", present, cwd=texts)
  assert child.status == 2 and child.err.count("error:") == 1 and words in child.err, child.err
  assert not (texts / f"missing {present}").exists()
