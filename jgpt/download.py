"""Fetching a pinned file within two seconds, or saying why not.

Responsible for one thing: the original of a `Source`, checked by size and SHA-256 and kept in the user's cache. Not
responsible for what stands in where there is no network (`sources.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from jgpt.sources import Source, cache_dir, make_private

DOWNLOAD_SECONDS = 2.0  # in all, name resolution included
FAILURE_SECONDS = 3600.0  # how long a failed download is not tried again
MAX_REDIRECTS = 5


class DownloadError(Exception):
  """A download did not succeed; the text is one reason for a person."""


def download(source: Source) -> bytes:
  """Fetches a source's original, checks size and SHA-256, and keeps it in the cache.

  Takes `DOWNLOAD_SECONDS` at most: name resolution obeys no socket time-out, so a thread does all of it and is left
  behind when time is up. It hands over bytes and writes nothing. A failure is remembered for `FAILURE_SECONDS`.

  Raises:
    DownloadError: if the network, the size or the digest fails.
  """
  failed = cache_dir() / f"{source.filename}.failed"
  with contextlib.suppress(OSError):
    age = time.time() - failed.stat().st_mtime
    if 0 <= age < FAILURE_SECONDS:
      minutes = max(1, round((FAILURE_SECONDS - age) / 60))
      raise DownloadError(f"no download of {source.filename}: it failed lately and is tried again in {minutes} minutes")
  result: list[bytes | Exception] = []
  thread = threading.Thread(target=lambda: result.append(_fetch_or_error(source)), daemon=True)
  thread.start()
  thread.join(DOWNLOAD_SECONDS)
  fetched = result[0] if result else TimeoutError(f"no answer within {DOWNLOAD_SECONDS:.0f} s")
  if isinstance(fetched, bytes):
    _write_to_cache(source.filename, fetched)
    return fetched
  with contextlib.suppress(OSError):
    make_private(cache_dir())
    failed.touch()
  cause = getattr(fetched, "reason", None) or fetched  # urllib wraps what the system said
  reason = str(getattr(cause, "strerror", None) or cause)[:200]
  printable = "".join(c if c.isprintable() else " " for c in reason).strip()  # a server may have chosen the words
  raise DownloadError(f"no download of {source.filename} ({printable})")


def _write_to_cache(filename: str, content: bytes) -> None:
  """Writes under a temporary name, then renames: the cache never holds half a file. A cache that is closed is no error."""
  with contextlib.suppress(OSError):
    make_private(cache_dir())
    with tempfile.NamedTemporaryFile(dir=cache_dir(), prefix=f".{filename}.", delete=False) as file:
      temporary = Path(file.name)
    try:
      temporary.write_bytes(content)
      temporary.replace(cache_dir() / filename)
    finally:
      temporary.unlink(missing_ok=True)  # still there where the disk is full


def _fetch_or_error(source: Source) -> bytes | Exception:
  try:
    return _fetch(source)
  except (OSError, ValueError, http.client.HTTPException) as error:
    if isinstance(error, urllib.error.HTTPError):
      error.close()  # it holds the connection
    return error


def _fetch(source: Source) -> bytes:
  _require_https(source.url)
  opener = urllib.request.build_opener(_HttpsRedirects)
  # Longer than `download` waits, so that it always gives the same reason; it ends a thread that was left behind.
  with opener.open(source.url, timeout=DOWNLOAD_SECONDS + 1) as response:
    content = response.read(source.num_bytes + 1)
  if len(content) != source.num_bytes:
    more = "more than " if len(content) > source.num_bytes else ""
    raise ValueError(f"got {more}{min(len(content), source.num_bytes):,} bytes, not {source.num_bytes:,}")
  digest = hashlib.sha256(content).hexdigest()
  if digest != source.sha256:
    raise ValueError(f"its SHA-256 is {digest[:12]}, not {source.sha256[:12]}")
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
