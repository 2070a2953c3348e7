"""Downloads of pinned files into the user's cache, checked by size and SHA-256.

`download` fetches a small file in memory, and `download_file` a file of gigabytes in blocks. The
server must answer within two seconds. What is used instead of a failed download is decided in
`sources.py`.
"""

from __future__ import annotations

import contextlib
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

from jgpt.system.cache import PinnedFile, cache_dir, digest_bytes, make_private

ANSWER_SECONDS = 2.0  # until the server answers, name resolution included
BODY_SECONDS = 60.0  # after the answer, for the body of a small file that is not bundled
STALL_SECONDS = 30.0  # without a byte, for a large file
FAILURE_SECONDS = 3600.0  # after a failed download, until it is tried again
MAX_REDIRECTS = 5
DOWNLOAD_BLOCK_BYTES = 2**18


class DownloadError(Exception):
  """A download that failed. Its text names the file and the reason."""


def download(file: PinnedFile) -> bytes:
  """Downloads a small file, checks its size and SHA-256, and stores it in the cache.

  A bundled file is given `ANSWER_SECONDS` in all. For any other file the server must answer within
  this time, and then has `BODY_SECONDS` for the body. For `FAILURE_SECONDS` after a failure, calls
  raise at once.

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
  """Downloads a large file into the cache, with at most one block of it in memory.

  The server must answer within `ANSWER_SECONDS`, name resolution included, and then may pause for
  less than `STALL_SECONDS`. The bytes are written to `<name>.partial`, which is renamed to `<name>`
  once size and SHA-256 are right. If the network fails or the user interrupts, the partial file
  stays, and the next call requests the remaining bytes. Two processes that download the same file
  write the same bytes to the same places. For `FAILURE_SECONDS` after a failure, calls raise at
  once, unless the failed call made progress or the disk was the reason.

  Args:
    file: the file to download.
    report: called with the bytes that are stored and the bytes in all, whenever the percentage has
      changed.

  Returns:
    The path of the file in the cache.

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
    with open(
      partial, "r+b", opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o600)
    ) as target:
      _fetch_rest(target, file, report)
    if partial.exists():  # else another process has renamed it
      partial.replace(cached)
    return cached
  except ConnectionError as error:
    reason = str(error)
    if (kept := _size(partial)) > found:
      reason += (
        f"; {kept / 1e9:.1f} of {file.num_bytes / 1e9:.1f} GB are kept, and the same command "
        "fetches the rest"
      )
    else:
      _remember_failure(file)
  except ValueError as error:  # the server sent something else
    reason = str(error)
    _delete(partial)
    _remember_failure(file)
  except OSError as error:
    reason = (
      f"cannot write to {cached.parent}: {_describe(error)}. Make room, or set JGPT_CACHE_DIR to "
      "another folder"
    )
    _delete(partial)
  finally:
    if not _size(partial):
      _delete(partial)
  raise DownloadError(f"no download of {file.filename} ({reason})")


# --- Cache ---


def _check_no_recent_failure(file: PinnedFile) -> None:
  """Checks that no download of the file failed in the last `FAILURE_SECONDS`.

  Raises `DownloadError` with the minutes to wait otherwise.
  """
  failed = cache_dir() / f"{file.filename}.failed"
  with contextlib.suppress(OSError):
    age = time.time() - failed.stat().st_mtime
    if 0 <= age < FAILURE_SECONDS:
      minutes = max(1, round((FAILURE_SECONDS - age) / 60))
      at_once = "" if file.bundled else f" (at once if you delete {failed})"
      raise DownloadError(
        f"no download of {file.filename}: it failed recently and is tried again in {minutes} "
        f"minutes{at_once}"
      )


def _remember_failure(file: PinnedFile) -> None:
  failed = cache_dir() / f"{file.filename}.failed"
  with contextlib.suppress(OSError):
    _make_cache_folder(failed.parent)
    failed.touch()


def _write_to_cache(cached: Path, content: bytes) -> None:
  """Writes a file to the cache by way of a temporary name, so that readers see all of it or none.

  Does nothing where the cache cannot be written.
  """
  with contextlib.suppress(OSError):
    _make_cache_folder(cached.parent)
    with tempfile.NamedTemporaryFile(
      dir=cached.parent, prefix=f".{cached.name}.", delete=False
    ) as file:
      temporary = Path(file.name)
    try:
      temporary.write_bytes(content)
      temporary.replace(cached)
    finally:
      temporary.unlink(missing_ok=True)  # it is left if the disk is full


def _make_cache_folder(folder: Path) -> None:
  make_private(cache_dir())
  make_private(folder)


def _check_space(folder: Path, num_bytes: int) -> None:
  free = shutil.disk_usage(folder).free
  if free < num_bytes:
    raise OSError(f"{num_bytes / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free")


def _size(path: Path) -> int:
  with contextlib.suppress(OSError):
    return path.stat().st_size
  return 0


def _delete(path: Path) -> None:
  with contextlib.suppress(OSError):
    path.unlink()


# --- Network ---


def _fetch(file: PinnedFile) -> bytes:
  """Returns the content of a small file.

  Raises:
    ConnectionError: if the network fails.
    ValueError: if the server sends another file.
  """
  began = time.monotonic()
  # The socket's time-out ends the thread that `_run_within` leaves behind. It is the longer of the
  # two, so that the error is that of `_run_within`.
  response = _open(file.url, timeout=1 + (ANSWER_SECONDS if file.bundled else BODY_SECONDS))

  def read() -> bytes:
    with response:
      return response.read(file.num_bytes + 1)

  if file.bundled:
    content = _run_within(read, ANSWER_SECONDS - (time.monotonic() - began), _timeout_text())
  else:
    content = _run_within(
      read, BODY_SECONDS, f"the server did not send it all within {BODY_SECONDS:.0f} s"
    )
  _check_size(file, len(content))
  _check_digest(file, digest_bytes(content))
  return content


def _fetch_rest(target: BinaryIO, file: PinnedFile, report: Callable[[int, int], None]) -> None:
  """Downloads the remaining bytes of a partial file, and checks the whole file.

  Args:
    target: the partial file, open at its start.
    file: the file to download.
    report: as for `download_file`.

  Raises:
    ConnectionError: if the network fails; the bytes received so far can be kept.
    ValueError: if the server sends another file.
    OSError: if the disk fails.
  """
  digest, percent = hashlib.sha256(), -1
  while block := target.read(DOWNLOAD_BLOCK_BYTES):
    digest.update(block)
  done = target.tell()
  if done < file.num_bytes:
    with _open(file.url, timeout=STALL_SECONDS, start=done) as response:
      if response.status != http.client.PARTIAL_CONTENT:  # the server ignores "Range"
        digest, done = hashlib.sha256(), target.seek(0)
      for block in _receive(response, file, done):
        target.write(block)
        digest.update(block)
        done += len(block)
        if percent != (percent := 100 * done // file.num_bytes):
          report(done, file.num_bytes)
  _check_digest(file, digest.hexdigest())


def _receive(response: http.client.HTTPResponse, file: PinnedFile, done: int) -> Iterator[bytes]:
  """Yields the bytes of a file from offset `done` on, as they arrive. Raises as `_fetch` does."""
  announced = response.headers["Content-Length"]
  if announced not in (None, str(file.num_bytes - done)):
    raise ValueError(
      _printable(f"the server announces {announced} bytes, not {file.num_bytes - done}")
    )
  # Without a Content-Length the body may be a login page, which must not be kept.
  broken_off = ConnectionError if announced else ValueError
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
  """Requests the bytes of a file from offset `start` on.

  Raises ConnectionError if the server does not answer within `ANSWER_SECONDS`.
  """

  def ask() -> http.client.HTTPResponse:
    check_https(url)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
      return urllib.request.build_opener(_HttpsRedirects).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
      error.close()  # else the connection stays open
      raise

  return _run_within(ask, ANSWER_SECONDS, _timeout_text())


def _run_within(work: Callable[[], Any], seconds: float, too_late: str) -> Any:
  """Calls `work` in a thread and returns its result.

  Socket time-outs do not apply to name resolution. A thread that takes too long is therefore left
  behind and its result dropped, so `work` must not write anything.

  Args:
    work: takes no arguments.
    seconds: to wait; a negative number counts as 0.
    too_late: text of the error when time is up.

  Raises:
    ConnectionError: if `work` fails or time is up.
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


def _timeout_text() -> str:
  return f"no answer within {ANSWER_SECONDS:.0f} s"


def _describe(error: Exception) -> str:
  cause = getattr(error, "reason", None) or error  # urllib wraps what the system said
  return _printable(str(getattr(cause, "strerror", None) or cause))


def _printable(reason: str) -> str:
  """Makes a reason, whose words a server may have chosen, one printable line of 200 characters."""
  return "".join(c if c.isprintable() else " " for c in reason[:200]).strip()


def _check_size(file: PinnedFile, got: int) -> None:
  if got != file.num_bytes:
    more = "more than " if got > file.num_bytes else ""
    raise ValueError(f"got {more}{min(got, file.num_bytes):,} bytes, not {file.num_bytes:,}")


def _check_digest(file: PinnedFile, digest: str) -> None:
  if digest != file.sha256:
    raise ValueError(f"its SHA-256 is {digest[:12]}, not {file.sha256[:12]}")


def check_https(url: str) -> None:
  """Checks that an address begins with https://, and raises `ValueError` otherwise."""
  if not url.startswith("https://"):
    raise ValueError(f"{url} is not https")


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
  """Follows redirects from https to https only."""

  max_redirections = MAX_REDIRECTS

  def redirect_request(self, req, fp, code, msg, headers, newurl):
    try:
      check_https(newurl)
    except ValueError:
      fp.close()
      raise
    return super().redirect_request(req, fp, code, msg, headers, newurl)
