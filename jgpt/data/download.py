"""Fetching a pinned file if its server answers within two seconds, or saying why not.

Responsible for one thing: the original of a `PinnedFile`, checked by size and SHA-256 and kept in the user's cache: a small
file in memory (`download`), one of gigabytes in blocks (`download_file`). Not responsible for what stands in where there is
no network (`sources.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import os
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jgpt.system.cache import cache_dir, digest_bytes, make_private


@dataclasses.dataclass(frozen=True, kw_only=True)
class PinnedFile:
  """A public file of which jgpt knows every byte.

  Attributes:
    filename: its name in `$JGPT_DATA_DIR`, in the cache and, where `bundled`, in the package; may begin with a folder.
    url: https address of the original.
    sha256: of the original, in hexadecimal.
    num_bytes: of the original.
    bundled: whether the package holds a stand-in for where there is no network.
  """

  filename: str
  url: str
  sha256: str
  num_bytes: int
  bundled: bool = False


ANSWER_SECONDS = 2.0  # until the server answers, name resolution included
BODY_SECONDS = 60.0  # after that, for a small file that nothing stands in for
STALL_SECONDS = 30.0  # without a byte, for a large file
FAILURE_SECONDS = 3600.0  # how long a failed download is not tried again
MAX_REDIRECTS = 5
DOWNLOAD_BLOCK_BYTES = 2**18


class DownloadError(Exception):
  """A download did not succeed; the text is one reason for a person."""


def download(file: PinnedFile) -> bytes:
  """Fetches a file's original, checks size and SHA-256, and keeps it in the cache.

  Takes `ANSWER_SECONDS` at most where a bundled file can stand in. Otherwise the server must answer within this time, and
  then has `BODY_SECONDS` for the body. A failure is remembered for `FAILURE_SECONDS`.

  Raises:
    DownloadError: if the network, the size or the digest fails.
  """
  _check_no_recent_failure(file)
  try:
    content = _fetch(file)
  except (ConnectionError, ValueError) as error:
    _remember_failure(file)
    raise DownloadError(f"no download of {file.filename} ({error})") from None
  _write_to_cache(cache_dir() / file.filename, content)
  return content


def download_file(file: PinnedFile, report: Callable[[int, int], None]) -> Path:
  """Fetches a large file's original into the cache, with never more than a block of it in memory.

  The server must answer within `ANSWER_SECONDS`, name resolution included; then only `STALL_SECONDS` without a byte end it.
  What arrives is written to `<name>.partial`, which becomes `<name>` once size and SHA-256 are right. Where the network
  breaks off, or the user does, the partial file stays, and the next call asks for the rest. (Two processes that fetch one
  file write the same bytes to the same places.) A failure is remembered for `FAILURE_SECONDS`, unless it left more than it
  found or the disk is to blame.

  Args:
    file: what to fetch.
    report: told the bytes that are there and the bytes in all, whenever the percentage has changed.

  Returns:
    Its path in the cache.

  Raises:
    DownloadError: if the network, the size, the digest or the disk fails.
  """
  _check_no_recent_failure(file)
  cached = cache_dir() / file.filename
  partial = cached.with_name(f"{cached.name}.partial")
  found = _size(partial)
  try:
    _make_cache_folder(cached.parent)
    _check_space(cached.parent, file.num_bytes - found)
    with open(partial, "r+b", opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o600)) as target:
      _complete(target, file, report)
    if partial.exists():  # else another process was faster
      partial.replace(cached)
    return cached
  except ConnectionError as error:
    reason = str(error)
    if (kept := _size(partial)) > found:
      reason += f"; {kept / 1e9:.1f} of {file.num_bytes / 1e9:.1f} GB are kept, and the same command fetches the rest"
    else:
      _remember_failure(file)
  except ValueError as error:  # the server sent something else
    reason = str(error)
    _delete(partial)
    _remember_failure(file)
  except OSError as error:
    reason = f"cannot write to {cached.parent}: {_describe(error)}. Make room, or set JGPT_CACHE_DIR to another folder"
    _delete(partial)
  finally:
    if not _size(partial):
      _delete(partial)
  raise DownloadError(f"no download of {file.filename} ({reason})")


# --- Cache ---


def _check_no_recent_failure(file: PinnedFile) -> None:
  """Raises `DownloadError` if a download of the file failed within `FAILURE_SECONDS`."""
  failed = cache_dir() / f"{file.filename}.failed"
  with contextlib.suppress(OSError):
    age = time.time() - failed.stat().st_mtime
    if 0 <= age < FAILURE_SECONDS:
      minutes = max(1, round((FAILURE_SECONDS - age) / 60))
      at_once = "" if file.bundled else f" (at once if you delete {failed})"
      raise DownloadError(
        f"no download of {file.filename}: it failed lately and is tried again in {minutes} minutes{at_once}"
      )


def _remember_failure(file: PinnedFile) -> None:
  failed = cache_dir() / f"{file.filename}.failed"
  with contextlib.suppress(OSError):
    _make_cache_folder(failed.parent)
    failed.touch()


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


def _check_space(folder: Path, num_bytes: int) -> None:
  free = shutil.disk_usage(folder).free
  if free < num_bytes:
    raise OSError(f"{num_bytes / 1e9:.1f} GB are missing, and {free / 1e9:.1f} GB are free")


def _size(path: Path) -> int:
  with contextlib.suppress(OSError):
    return path.stat().st_size
  return 0


def _delete(path: Path) -> None:
  with contextlib.suppress(OSError):
    path.unlink()


# --- Network ---


def _fetch(file: PinnedFile) -> bytes:
  """Returns a small file's content. Raises ConnectionError if the network fails, ValueError if it is another file."""
  began = time.monotonic()
  # A time-out that is longer than this waits gives way to its reason; it ends a thread that was left behind.
  response = _open(file.url, timeout=1 + (ANSWER_SECONDS if file.bundled else BODY_SECONDS))

  def read() -> bytes:
    with response:
      return response.read(file.num_bytes + 1)

  if file.bundled:
    content = _in_time(read, ANSWER_SECONDS - (time.monotonic() - began), _no_answer())
  else:
    content = _in_time(read, BODY_SECONDS, f"the server did not send it all within {BODY_SECONDS:.0f} s")
  _check_size(file, len(content))
  _check_digest(file, digest_bytes(content))
  return content


def _complete(target: BinaryIO, file: PinnedFile, report: Callable[[int, int], None]) -> None:
  """Adds to a partial file what is missing, and checks the whole.

  Raises:
    ConnectionError: if the network fails; what the file holds is right as far as can be known.
    ValueError: if the server sends something else.
    OSError: if the disk fails.
  """
  digest, percent = hashlib.sha256(), -1
  while block := target.read(DOWNLOAD_BLOCK_BYTES):
    digest.update(block)
  done = target.tell()
  if done < file.num_bytes:
    with _open(file.url, timeout=STALL_SECONDS, start=done) as response:
      if response.status != http.client.PARTIAL_CONTENT:  # this server sends all or nothing
        digest, done = hashlib.sha256(), target.seek(0)
      for block in _receive(response, file, done):
        target.write(block)
        digest.update(block)
        done += len(block)
        if percent != (percent := 100 * done // file.num_bytes):
          report(done, file.num_bytes)
  _check_digest(file, digest.hexdigest())


def _receive(response: http.client.HTTPResponse, file: PinnedFile, done: int) -> Iterator[bytes]:
  """Yields a file's bytes from number `done` on as they arrive. Raises as `_fetch` does."""
  announced = response.headers["Content-Length"]
  if announced not in (None, str(file.num_bytes - done)):
    raise ValueError(_printable(f"the server announces {announced} bytes, not {file.num_bytes - done}"))
  broken_off = ConnectionError if announced else ValueError  # what came unannounced may be a login page: it is not kept
  while True:
    try:
      block = response.read1(DOWNLOAD_BLOCK_BYTES)
    except TimeoutError:
      raise broken_off(f"no byte for {STALL_SECONDS:.0f} s") from None
    except (OSError, http.client.HTTPException) as error:
      raise broken_off(_describe(error)) from None
    done += len(block)
    if announced and not block and done < file.num_bytes:
      raise broken_off("the connection ended early")
    if not block or done > file.num_bytes:
      return _check_size(file, done)
    yield block


def _open(url: str, *, timeout: float, start: int = 0) -> http.client.HTTPResponse:
  """Asks for a file's bytes from number `start` on. Raises ConnectionError if there is no answer in time."""

  def ask() -> http.client.HTTPResponse:
    _check_https(url)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
      return urllib.request.build_opener(_HttpsRedirects).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
      error.close()  # it holds the connection
      raise

  return _in_time(ask, ANSWER_SECONDS, _no_answer())


def _in_time(work: Callable[[], Any], seconds: float, too_late: str) -> Any:
  """Returns what `work` does, or raises ConnectionError with the reason, which is `too_late` when time is up.

  Name resolution obeys no socket time-out, so a thread does the work and is left behind. It writes nothing, and what it
  gets later is dropped with it.
  """
  result: list[Any] = []

  def run() -> None:
    try:
      result.append(work())
    except (OSError, ValueError, http.client.HTTPException) as error:
      result.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(max(0.0, seconds))
  if not result:
    raise ConnectionError(too_late)
  if isinstance(result[0], Exception):
    raise ConnectionError(_describe(result[0]))
  return result[0]


def _no_answer() -> str:
  return f"no answer within {ANSWER_SECONDS:.0f} s"


def _describe(error: Exception) -> str:
  cause = getattr(error, "reason", None) or error  # urllib wraps what the system said
  return _printable(str(getattr(cause, "strerror", None) or cause))


def _printable(reason: str) -> str:
  """One line without control codes: a server may have chosen the words."""
  return "".join(c if c.isprintable() else " " for c in reason[:200]).strip()


def _check_size(file: PinnedFile, got: int) -> None:
  if got != file.num_bytes:
    more = "more than " if got > file.num_bytes else ""
    raise ValueError(f"got {more}{min(got, file.num_bytes):,} bytes, not {file.num_bytes:,}")


def _check_digest(file: PinnedFile, digest: str) -> None:
  if digest != file.sha256:
    raise ValueError(f"its SHA-256 is {digest[:12]}, not {file.sha256[:12]}")


def _check_https(url: str) -> None:
  if not url.startswith("https://"):
    raise ValueError(f"{url} is not https")


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
  """Follows redirects from https to https only."""

  max_redirections = MAX_REDIRECTS

  def redirect_request(self, req, fp, code, msg, headers, newurl):
    try:
      _check_https(newurl)
    except ValueError:
      fp.close()
      raise
    return super().redirect_request(req, fp, code, msg, headers, newurl)
