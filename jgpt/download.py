"""Fetching a pinned file if its server answers within two seconds, or saying why not.

Responsible for one thing: the original of a `PinnedFile`, checked by size and SHA-256 and kept in the user's cache. Not
responsible for what stands in where there is no network (`sources.py`).
"""

from __future__ import annotations

import contextlib
import http.client
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from jgpt.sources import PinnedFile, cache_dir, digest_bytes, make_private

ANSWER_SECONDS = 2.0  # until the server answers, name resolution included
BODY_SECONDS = 60.0  # after that, for a file that nothing stands in for
FAILURE_SECONDS = 3600.0  # how long a failed download is not tried again
MAX_REDIRECTS = 5


class DownloadError(Exception):
  """A download did not succeed; the text is one reason for a person."""


def download(file: PinnedFile) -> bytes:
  """Fetches a file's original, checks size and SHA-256, and keeps it in the cache.

  Takes `ANSWER_SECONDS` at most where a bundled file can stand in. Otherwise the server must answer within this time, and
  then has `BODY_SECONDS` for the body. Name resolution obeys no socket time-out, so a thread does all of it and is left
  behind when time is up. It hands over bytes and writes nothing. A failure is remembered for `FAILURE_SECONDS`.

  Raises:
    DownloadError: if the network, the size or the digest fails.
  """
  cached = cache_dir() / file.filename
  failed = cached.with_name(f"{cached.name}.failed")
  with contextlib.suppress(OSError):
    age = time.time() - failed.stat().st_mtime
    if 0 <= age < FAILURE_SECONDS:
      minutes = max(1, round((FAILURE_SECONDS - age) / 60))
      at_once = "" if file.bundled else f" (at once if you delete {failed})"
      raise DownloadError(
        f"no download of {file.filename}: it failed lately and is tried again in {minutes} minutes{at_once}"
      )
  fetched = _fetch_in_time(file)
  if isinstance(fetched, bytes):
    _write_to_cache(cached, fetched)
    return fetched
  with contextlib.suppress(OSError):
    _make_cache_folder(cached.parent)
    failed.touch()
  cause = getattr(fetched, "reason", None) or fetched  # urllib wraps what the system said
  reason = str(getattr(cause, "strerror", None) or cause)[:200]
  printable = "".join(c if c.isprintable() else " " for c in reason).strip()  # a server may have chosen the words
  raise DownloadError(f"no download of {file.filename} ({printable})")


def _write_to_cache(cached: Path, content: bytes) -> None:
  """Writes under a temporary name, then renames: the cache never holds half a file. A cache that is closed is no error."""
  with contextlib.suppress(OSError):
    _make_cache_folder(cached.parent)
    with tempfile.NamedTemporaryFile(dir=cached.parent, prefix=f".{cached.name}.", delete=False) as file:
      temporary = Path(file.name)
    try:
      temporary.write_bytes(content)
      temporary.replace(cached)
    finally:
      temporary.unlink(missing_ok=True)  # still there where the disk is full


def _make_cache_folder(folder: Path) -> None:
  make_private(cache_dir())
  make_private(folder)


def _fetch_in_time(file: PinnedFile) -> bytes | Exception:
  """Returns the file's content, or the reason for having none, when there is one of them or time is up."""
  result: list[bytes | Exception] = []
  answered = threading.Event()
  thread = threading.Thread(target=lambda: result.append(_fetch_or_error(file, answered)), daemon=True)
  thread.start()
  thread.join(ANSWER_SECONDS)
  if answered.is_set() and not file.bundled:
    thread.join(BODY_SECONDS)
    return result[0] if result else TimeoutError(f"the server did not send it all within {BODY_SECONDS:.0f} s")
  return result[0] if result else TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} s")


def _fetch_or_error(file: PinnedFile, answered: threading.Event) -> bytes | Exception:
  try:
    return _fetch(file, answered)
  except (OSError, ValueError, http.client.HTTPException) as error:
    if isinstance(error, urllib.error.HTTPError):
      error.close()  # it holds the connection
    return error


def _fetch(file: PinnedFile, answered: threading.Event) -> bytes:
  _require_https(file.url)
  opener = urllib.request.build_opener(_HttpsRedirects)
  # Longer than `_fetch_in_time` waits, so that it always gives the same reason; it ends a thread that was left behind.
  patience = ANSWER_SECONDS if file.bundled else BODY_SECONDS
  with opener.open(file.url, timeout=patience + 1) as response:
    answered.set()
    content = response.read(file.num_bytes + 1)
  if len(content) != file.num_bytes:
    more = "more than " if len(content) > file.num_bytes else ""
    raise ValueError(f"got {more}{min(len(content), file.num_bytes):,} bytes, not {file.num_bytes:,}")
  digest = digest_bytes(content)
  if digest != file.sha256:
    raise ValueError(f"its SHA-256 is {digest[:12]}, not {file.sha256[:12]}")
  return content


def _require_https(url: str) -> None:
  if not url.startswith("https://"):
    raise ValueError(f"{url} is not https")


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
  """Follows redirects from https to https only."""

  max_redirections = MAX_REDIRECTS

  def redirect_request(self, req, fp, code, msg, headers, newurl):
    try:
      _require_https(newurl)
    except ValueError:
      fp.close()
      raise
    return super().redirect_request(req, fp, code, msg, headers, newurl)
