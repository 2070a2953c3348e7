"""The roll of the processes of a run, called before jax's own service starts, on the same port.

jax ends a process whose peers do not come with a C++ stack trace, and cannot say which of them are
missing. Here each process reports to process 0, which answers all of them at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jgpt.devices import processes
from jgpt.errors import UserError

RETRY_SECONDS = 0.1  # between two attempts to reach process 0
LATE_SECONDS = 0.3  # for reports that are under way when the roll fails
REPLY_SECONDS = 5.0  # for the few bytes of an answer
LONGEST_LINE = 4096  # bytes of a report or an answer


@dataclasses.dataclass(frozen=True)
class Member:
  """A process's place among those of a run.

  Attributes:
    coordinator: HOST:PORT at which process 0 is reached.
    num_processes: of the run.
    process_id: of this process, from 0.
    local_device_ids: the GPUs of this host that are this process's; None for all.
  """

  coordinator: str
  num_processes: int
  process_id: int
  local_device_ids: tuple[int, ...] | None = None


def call_roll(place: Member, timeout: float) -> None:
  """Waits until every process of a run has reported to process 0.

  Args:
    place: of this process.
    timeout: seconds.

  Raises:
    UserError: in every process that came: naming those that did not, two with the same id, or
      another number of processes; or if process 0 is not reached.
  """
  host, _, port = place.coordinator.rpartition(":")
  if place.process_id == 0:
    _receive_reports(place, int(port), timeout)
  else:
    _report(place, host.strip("[]"), int(port), timeout)


def _receive_reports(place: Member, port: int, timeout: float) -> None:
  """Receives the others' reports, and answers all of them at once.

  Nothing is authenticated: whoever reaches the port can take a process's place.
  """
  end, there, wrong = time.monotonic() + timeout, {0: socket.gethostname()}, ""
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(_listen(place, port))
    peers: list[socket.socket] = []
    for peer, report in _await_reports(server, stack, end):
      number, count, host = report["process"], report["num_processes"], report["host"]
      if not 0 < number < count:  # not one of ours
        continue
      peers.append(peer)
      if count != place.num_processes:
        wrong = f"process {number} on {host} says --num-processes={count}, and process 0 "
        wrong += f"{place.num_processes}. Start all of them with the same number"
      elif number in there:
        wrong = f"two processes have --process-id={number}, on {there[number]} and on {host}. Give "
        wrong += f"each of the {count} an id of its own, from 0"
      there[number] = host
      if wrong or len(there) == place.num_processes:
        break
    else:
      missing = [i for i in range(place.num_processes) if i not in there]
      wrong = _describe_missing(place, missing, timeout)
    server.settimeout(LATE_SECONDS)
    with contextlib.suppress(OSError):  # those that have come meanwhile are to know too
      while wrong:
        peers.append(stack.enter_context(server.accept()[0]))
    for peer in peers:
      _send(peer, {"error": wrong})
    for peer in peers:  # which close first, so that the port is free at once
      _receive(peer)
  if wrong:
    raise UserError(wrong)


def _await_reports(
  server: socket.socket, stack: contextlib.ExitStack, end: float
) -> Iterator[tuple[socket.socket, dict[str, Any]]]:
  """Yields reports as they come, with their connections; one that says nothing delays nobody.

  Args:
    server: listens.
    stack: closes the connections.
    end: by `time.monotonic`, after which nothing is waited for.
  """
  received: dict[socket.socket, bytes] = {}
  server.settimeout(RETRY_SECONDS)
  with selectors.DefaultSelector() as selector:
    selector.register(server, selectors.EVENT_READ)
    while (left := end - time.monotonic()) > 0:
      for peer in [key.fileobj for key, _ in selector.select(left)]:
        if peer is server:
          with contextlib.suppress(OSError):  # who came is gone already
            peer = stack.enter_context(server.accept()[0])
            selector.register(peer, selectors.EVENT_READ)
            received[peer] = b""
          continue
        try:
          part = peer.recv(LONGEST_LINE)
        except OSError:
          part = b""
        received[peer] += part
        if part and b"\n" not in part and len(received[peer]) < LONGEST_LINE:
          continue
        selector.unregister(peer)
        report = _read_message(received.pop(peer))
        if report is not None and "process" in report:
          yield peer, report


def _describe_missing(place: Member, missing: Sequence[int], timeout: float) -> str:
  shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
  who = f"process {shown}" if len(missing) == 1 else f"processes {shown}"
  return (
    f"{who} of {place.num_processes} did not join within {timeout:g} s at {place.coordinator}. See "
    "whether each was started, with that address, and reaches it; --set mesh.timeout_seconds waits "
    "longer"
  )


def _listen(place: Member, port: int) -> socket.socket:
  """Opens the coordinator's port.

  Raises:
    UserError: if it is in use.
  """
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
  except OSError as error:
    raise UserError(
      f"process 0 cannot listen at {place.coordinator}: {error.strerror}. Choose another port, the "
      "same in every process"
    ) from error


def _report(place: Member, host: str, port: int, timeout: float) -> None:
  """Sends a report to process 0, and waits for its answer."""
  end, reason = time.monotonic() + timeout, "no answer"
  mine = {"process": place.process_id, "num_processes": place.num_processes}
  mine["host"] = socket.gethostname()
  while time.monotonic() < end:
    try:
      with socket.create_connection((host, port), timeout=REPLY_SECONDS) as peer:
        _send(peer, mine)
        # Process 0 may have begun to wait later; it is the one that knows who is missing.
        answer = _receive(peer, timeout + REPLY_SECONDS)
    except OSError as error:
      reason = error.strerror or str(error)
      time.sleep(RETRY_SECONDS)
      continue
    if answer is None:
      reason = "it ended while it waited for the others"
      break
    if answer["error"]:
      raise processes.mark_told(UserError(answer["error"]))
    return
  raise UserError(
    f"process {place.process_id} did not reach process 0 at {place.coordinator} within "
    f"{timeout:g} s: {reason}. See whether it was started, on that host, and no firewall is between"
  )


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
  with contextlib.suppress(OSError):
    peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(peer: socket.socket, timeout: float = REPLY_SECONDS) -> dict[str, Any] | None:
  """Receives a line of JSON; None where it does not come, or is none of ours."""
  peer.settimeout(timeout)
  try:
    with peer.makefile("rb") as file:
      return _read_message(file.readline(LONGEST_LINE))
  except OSError:
    return None


def _read_message(line: bytes) -> dict[str, Any] | None:
  """Reads a report or an answer; None where a line is neither."""
  try:
    found = json.loads(line)
  except (ValueError, RecursionError):
    return None
  is_report = isinstance(found, dict) and all(
    isinstance(found.get(name), kind)
    for name, kind in (("process", int), ("num_processes", int), ("host", str))
  )
  is_answer = isinstance(found, dict) and isinstance(found.get("error"), str)
  return found if is_report or is_answer else None
