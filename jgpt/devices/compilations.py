"""Counts what jax compiles: programs, those from its persistent cache, and seconds.

jax tells its listeners of each program (`jax.monitoring`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

from jax import monitoring

COMPILED = "/jax/core/compile/backend_compile_duration"  # reading the cache counts as compiling
FROM_CACHE = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass
class Compilations:
  """What jax compiled since counting began.

  Attributes:
    programs: that were made ready, compiled or not.
    from_cache: of these, read from jax's persistent cache.
    seconds: in XLA, or reading the cache, added up over programs, of which some compile at once.
  """

  programs: int = 0
  from_cache: int = 0
  seconds: float = 0.0


_counting: list[Compilations] = []
_lock = threading.Lock()  # programs compile in several threads
_listens = False


@contextlib.contextmanager
def count_compilations() -> Iterator[Compilations]:
  """Counts what jax compiles in this process until the context ends.

  Contexts may overlap; each counts for itself. jax has one listener of them all, which it loses
  with the last context. jax 0.7.2 keeps it, with nothing left to count.
  """
  global _listens
  counts = Compilations()
  with _lock:
    _counting.append(counts)
    if not _listens:
      monitoring.register_event_duration_secs_listener(_on_duration)
      monitoring.register_event_listener(_on_event)
      _listens = True
  try:
    yield counts
  finally:
    with _lock:
      # By identity: equal counts are others'.
      _counting[:] = [other for other in _counting if other is not counts]
      if not _counting and hasattr(monitoring, "unregister_event_listener"):
        monitoring.unregister_event_duration_listener(_on_duration)
        monitoring.unregister_event_listener(_on_event)
        _listens = False


def _on_duration(event: str, seconds: float, **_: str | int) -> None:
  if event == COMPILED:
    with _lock:
      for counts in _counting:
        counts.programs += 1
        counts.seconds += seconds


def _on_event(event: str, **_: str | int) -> None:
  if event == FROM_CACHE:
    with _lock:
      for counts in _counting:
        counts.from_cache += 1
