"""Downloads, from a server on this machine: what goes wrong, how long it takes, and what is left
behind.
"""

import dataclasses
import errno
import hashlib
import http.server
import io
import os
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jgpt.config import DataConfig
from jgpt.data import download
from jgpt.data.download import DownloadError
from jgpt.data.sources import GPT2_FILES, SOURCES, PinnedText, find_text
from jgpt.errors import UserError
from jgpt.system.cache import PinnedFile, cache_dir
from jgpt.weights.initial import RELEASED, find_released

ORIGINAL = b"emma\nolivia\nava\n"  # stands for the 32,033 names
NAMES = DataConfig(
  source="names",
  tokenizer="characters",
  batching="documents",
  seq_len=16,
  batch_size=1,
  heldout_fraction=0.0,
)


def sha256(content):
  return hashlib.sha256(content).hexdigest()


class Server:
  """Answers each request as `answer(handler)` does, and counts them."""

  def __init__(self, answer):
    self.requests, self.answer = 0, answer
    self.released = threading.Event()  # set at the end: what hangs, stops
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self):
        outer.requests += 1
        outer.answer(self)

      def log_message(self, *args):
        pass

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self._server.handle_error = lambda *args: None  # a client that left is no news
    self._thread = threading.Thread(
      target=self._server.serve_forever, kwargs={"poll_interval": 0.01}
    )
    self._thread.start()
    self.url = f"http://127.0.0.1:{self._server.server_port}/names.txt"

  def close(self):
    self.released.set()
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()


def send(body, *, status=200, length=None, **headers):
  """An answer with this body, announced as `length` bytes."""

  def answer(handler):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
      handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)

  return answer


@pytest.fixture
def serve(tmp_path, monkeypatch):
  """A function from an answer to a server and a source of ORIGINAL that points to it.

  Http is allowed, proxies are not.
  """
  monkeypatch.setenv("JGPT_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.delenv("JGPT_DATA_DIR", raising=False)
  monkeypatch.setenv("no_proxy", "*")
  monkeypatch.setattr(download, "check_https", lambda url: None)
  servers = []

  def start(answer=None):
    servers.append(Server(answer or send(ORIGINAL)))
    pinned = {
      "sha256": sha256(ORIGINAL),
      "num_bytes": len(ORIGINAL),
      "chars": "\naeilmov",
      "bundled": True,
    }
    return servers[-1], PinnedText(filename="names.txt", url=servers[-1].url, **pinned)

  yield start
  for server in servers:
    server.close()


def cached_files():
  return sorted(p.name for p in cache_dir().iterdir())


def test_download_is_kept_in_a_cache_that_only_its_user_can_enter(serve, monkeypatch):
  server, source = serve()
  monkeypatch.setitem(SOURCES, "names", source)
  assert find_text(NAMES).kind == "download"
  assert find_text(NAMES).kind == "cache"
  assert server.requests == 1
  assert cached_files() == ["names.txt"]
  assert stat.S_IMODE(cache_dir().stat().st_mode) == 0o700
  assert stat.S_IMODE((cache_dir() / "names.txt").stat().st_mode) & 0o077 == 0


BAD_ANSWERS = {
  "wrong hash": (send(ORIGINAL.upper()), "SHA-256 is .*, not"),
  "short body": (send(ORIGINAL[:-1]), "got 15 bytes, not 16"),
  "empty body": (send(b""), "got 0 bytes, not 16"),
  "long body": (send(ORIGINAL + b"x" * 10**6), "got more than 16 bytes, not 16"),
  "interrupted body": (send(ORIGINAL[:-6], length=len(ORIGINAL)), "got 10 bytes, not 16"),
  "HTML page": (
    send(b"<!DOCTYPE html><html>Log in to this network</html>"),
    "got more than 16 bytes",
  ),
  "not found": (send(b"no such file", status=404), "Not Found"),
  "no HTTP": (
    lambda handler: handler.wfile.write(b"SSH-2.0\x1b[2J\r\n"),
    r"\(SSH-2.0 \[2J\)",
  ),  # no code for the terminal
  "nothing": (lambda handler: handler.connection.close(), "no download of names.txt"),
  "broken chunks": (
    lambda handler: handler.wfile.write(
      b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nem"
    ),
    "no download of names.txt",
  ),
}


@pytest.mark.parametrize("what", BAD_ANSWERS)
def test_bad_download_is_refused_with_the_reason_and_leaves_no_file(serve, monkeypatch, what):
  """The bundled list stands in and says why, and the server is not asked again."""
  answer, reason = BAD_ANSWERS[what]
  server, source = serve(answer)
  monkeypatch.setitem(SOURCES, "names", source)
  found = find_text(NAMES)
  assert found.kind == "bundled"
  assert re.search(f"{reason}.*bundled list stands in", found.note)
  assert cached_files() == ["names.txt.failed"]
  assert re.search("failed recently.*bundled list stands in", find_text(NAMES).note)
  assert server.requests == 1


def test_server_that_does_not_answer_costs_two_seconds_once(serve):
  """In all, name resolution included; a second call returns at once and asks nobody."""
  server, source = serve()
  server.answer = lambda handler: server.released.wait(30)
  began = time.monotonic()
  with pytest.raises(DownloadError, match="no answer within 2 s"):
    download.download(source)
  assert 1.9 < time.monotonic() - began < 3.5
  began = time.monotonic()
  with pytest.raises(DownloadError, match="tried again in 60 minutes"):
    download.download(source)
  assert time.monotonic() - began < 0.5
  assert server.requests == 1
  assert cached_files() == ["names.txt.failed"]


def drip(handler):
  """A good answer whose body takes 1.6 s."""
  handler.send_response(200)
  handler.end_headers()
  for byte in ORIGINAL:
    time.sleep(0.1)
    handler.wfile.write(bytes([byte]))


def test_server_that_drips_is_cut_off_in_time(serve, monkeypatch):
  """The limit is on the whole download, not on the wait for one packet.

  Bytes that come too late are not kept.
  """
  monkeypatch.setattr(download, "ANSWER_SECONDS", 0.3)
  server, source = serve()
  server.answer = lambda handler: (drip(handler), server.released.set())
  began = time.monotonic()
  with pytest.raises(DownloadError, match="no answer within"):
    download.download(source)
  assert time.monotonic() - began < 1.2  # of 1.6
  assert server.released.wait(5)  # the rest of the body, right in every byte
  assert cached_files() == ["names.txt.failed"]


def test_file_without_a_stand_in_is_given_time_once_the_server_has_answered(serve, monkeypatch):
  """A megabyte on a slow line takes longer than two seconds."""
  monkeypatch.setattr(download, "ANSWER_SECONDS", 0.7)
  _, source = serve(drip)
  assert download.download(dataclasses.replace(source, bundled=False)) == ORIGINAL
  assert cached_files() == ["names.txt"]


def test_file_without_a_stand_in_is_not_waited_for_without_end(serve, monkeypatch):
  """Two seconds for the answer as for any file, and a limit for its body."""
  monkeypatch.setattr(download, "ANSWER_SECONDS", 0.7)
  monkeypatch.setattr(download, "BODY_SECONDS", 0.2)
  server, source = serve()

  def stall(handler):
    handler.send_response(200)
    handler.end_headers()
    server.released.wait(30)

  server.answer = stall
  source = dataclasses.replace(source, bundled=False)
  began = time.monotonic()
  with pytest.raises(DownloadError, match="did not send it all within"):
    download.download(source)
  assert 0.15 < time.monotonic() - began < 10
  with pytest.raises(
    DownloadError, match=r"tried again in 60 minutes \(at once if you delete .*names\.txt\.failed\)"
  ):
    download.download(source)
  (cache_dir() / "names.txt.failed").unlink()
  server.answer = lambda handler: server.released.wait(30)
  monkeypatch.setattr(download, "BODY_SECONDS", 60)
  began = time.monotonic()
  with pytest.raises(DownloadError, match="no answer within"):
    download.download(source)
  assert time.monotonic() - began < 10


def test_file_in_a_folder_is_cached_in_that_folder(serve):
  """Only the user can enter it, and a failure is remembered beside the file."""
  server, source = serve(send(b"", status=404))
  file = dataclasses.replace(source, filename="gpt2/vocab.bpe", bundled=False)
  with pytest.raises(DownloadError, match=r"no download of gpt2/vocab\.bpe \(Not Found\)"):
    download.download(file)
  assert [p.name for p in (cache_dir() / "gpt2").iterdir()] == ["vocab.bpe.failed"]
  (cache_dir() / "gpt2/vocab.bpe.failed").unlink()
  server.answer = send(ORIGINAL)
  assert download.download(file) == ORIGINAL
  assert (cache_dir() / "gpt2/vocab.bpe").read_bytes() == ORIGINAL
  for folder in (cache_dir(), cache_dir() / "gpt2"):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_failed_download_is_tried_again_after_an_hour_and_not_before(serve):
  server, source = serve(send(b"", status=500))
  failed = cache_dir() / "names.txt.failed"
  with pytest.raises(DownloadError, match="Internal Server Error"):
    download.download(source)
  server.answer = send(ORIGINAL)
  os.utime(failed, (time.time() - 3540,) * 2)
  with pytest.raises(DownloadError, match="tried again in 1 minutes"):
    download.download(source)
  assert server.requests == 1
  os.utime(failed, (time.time() - 3601,) * 2)
  assert download.download(source) == ORIGINAL
  assert server.requests == 2


def test_failure_after_an_hour_is_remembered_for_another(serve):
  server, source = serve(send(b"", status=500))
  for seconds_ago in (0, 3601):
    if seconds_ago:
      os.utime(cache_dir() / "names.txt.failed", (time.time() - seconds_ago,) * 2)
    for reason in ("Internal Server Error", "failed recently"):
      with pytest.raises(DownloadError, match=reason):
        download.download(source)
  assert server.requests == 2


def test_nobody_listening_is_a_reason_like_any_other(serve):
  server, source = serve()
  server.close()
  with pytest.raises(DownloadError, match="refused"):
    download.download(source)


def test_cache_that_cannot_be_written_is_no_error_and_holds_no_half_file(serve):
  """A folder stands where the file should.

  What was downloaded is used, and the temporary file is taken away.
  """
  _, source = serve()
  (cache_dir() / "names.txt").mkdir(parents=True)
  assert download.download(source) == ORIGINAL
  assert cached_files() == ["names.txt"]


@pytest.fixture
def https_required(serve, monkeypatch):
  """The real check for every address but the server's own, which stands for an https address."""

  def start(answer):
    server, source = serve(answer)
    monkeypatch.setattr(
      download, "check_https", lambda url: None if url == source.url else check_https(url)
    )
    return server, source

  return start


check_https = download.check_https  # before a fixture replaces it


@pytest.mark.parametrize("to", ["/elsewhere", "ftp://127.0.0.1/names.txt", "file:///etc/passwd"])
def test_redirect_to_anything_but_https_is_refused_before_it_is_followed(https_required, to):
  """The address beside the first is plain http on the same server: it is never asked for."""
  server, source = https_required(send(b"", status=302, Location=to))
  with pytest.raises(DownloadError, match=r"is not https|not allowed"):
    download.download(source)
  assert server.requests == 1


def test_source_that_is_not_https_is_refused_without_a_request(serve, monkeypatch):
  server, source = serve()
  monkeypatch.setattr(download, "check_https", check_https)
  with pytest.raises(DownloadError, match="is not https"):
    download.download(source)
  assert server.requests == 0
  pinned = [
    *GPT2_FILES,
    *(source for source in SOURCES.values() if isinstance(source, PinnedFile)),
    *RELEASED.values(),
  ]
  assert len(pinned) == 8
  assert all(file.url.startswith("https://") for file in pinned)


@pytest.mark.parametrize("redirects", [5, 6])
def test_five_redirects_are_followed_and_six_are_not(serve, redirects):
  server, source = serve()

  def answer(handler):
    last = server.requests > redirects
    (send(ORIGINAL) if last else send(b"", status=302, Location=f"/{server.requests}"))(handler)

  server.answer = answer
  if redirects == 5:
    assert download.download(source) == ORIGINAL
  else:
    with pytest.raises(DownloadError):
      download.download(source)
  assert server.requests == 6


# --- Files of gigabytes, here of one megabyte ---

WEIGHTS = hashlib.shake_256(b"weights").digest(2**20)
HALF = 2**19


@pytest.fixture
def serve_weights(serve, monkeypatch):
  """A function from an answer to a server and the `PinnedFile` of WEIGHTS, which stands for the
  released gpt2.
  """

  def start(answer=None):
    server, source = serve(answer or send_part())
    pinned = {"sha256": sha256(WEIGHTS), "num_bytes": len(WEIGHTS)}
    file = PinnedFile(
      filename="gpt2/gpt2.safetensors",
      url=source.url.replace("names.txt", "model.safetensors"),
      **pinned,
    )
    monkeypatch.setitem(RELEASED, "gpt2", file)
    return server, file

  return start


def send_part(content=WEIGHTS, asked=None):
  """An answer with the part that is asked for; appends what was asked to a list."""

  def answer(handler):
    wanted = handler.headers["Range"]
    if asked is not None:
      asked.append(wanted)
    start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
    ranges = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if wanted else {}
    send(content[start:], status=206 if wanted else 200, **ranges)(handler)

  return answer


def unannounced(body):
  """An answer without a length: it ends where the connection does."""

  def answer(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(body)

  return answer


def silent(done, total):
  pass


def left_files():
  return sorted(p.name for p in (cache_dir() / "gpt2").iterdir())


def put_partial(content):
  partial = cache_dir() / "gpt2/gpt2.safetensors.partial"
  partial.parent.mkdir(parents=True)
  partial.write_bytes(content)
  return partial


def test_large_file_is_kept_in_the_cache_and_its_progress_is_told(serve_weights):
  server, _ = serve_weights()
  told = []
  found = find_released("gpt2", lambda *progress: told.append(progress))
  assert found == cache_dir() / "gpt2/gpt2.safetensors"
  assert found.read_bytes() == WEIGHTS
  assert left_files() == ["gpt2.safetensors"]
  assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
  assert stat.S_IMODE(found.stat().st_mode) & 0o077 == 0
  assert told[-1] == (len(WEIGHTS), len(WEIGHTS))
  assert told == sorted(set(told))
  assert len(told) <= 101
  server.close()
  assert find_released("gpt2") == found
  assert server.requests == 1


BAD_WEIGHTS = {
  "wrong hash": (send(WEIGHTS[::-1]), "its SHA-256 is .*, not"),
  "short body": (send(WEIGHTS[:-1]), "the server announces 1048575 bytes, not 1048576"),
  "long body": (send(WEIGHTS + b"x"), "the server announces 1048577 bytes, not 1048576"),
  "HTML page": (send(b"<!DOCTYPE html>"), "the server announces 15 bytes, not 1048576"),
  "unannounced HTML page": (unannounced(b"<!DOCTYPE html>"), "got 15 bytes, not 1,048,576"),
  "unannounced short body": (unannounced(WEIGHTS[:-1]), "got 1,048,575 bytes, not 1,048,576"),
  "unannounced long body": (
    unannounced(WEIGHTS + b"x"),
    "got more than 1,048,576 bytes, not 1,048,576",
  ),
  "unannounced wrong hash": (unannounced(WEIGHTS[::-1]), "its SHA-256 is .*, not"),
  "empty body": (unannounced(b""), "got 0 bytes"),
  "body that breaks off at once": (send(b"", length=len(WEIGHTS)), "the connection ended early"),
  "not found": (send(b"no such file", status=404), "Not Found"),
  "no number": (send(WEIGHTS, length="\x1b[2J"), r"announces  \[2J bytes"),
  "no HTTP": (lambda handler: handler.wfile.write(b"SSH-2.0\x1b[2J\r\n"), r"SSH-2.0 \[2J"),
  "broken chunks": (BAD_ANSWERS["broken chunks"][0], "IncompleteRead"),
}


@pytest.mark.parametrize("what", BAD_WEIGHTS)
def test_bad_large_download_is_refused_with_advice_and_leaves_no_file(serve_weights, what):
  """The reason, then which address to save under which name in which folder.

  The server is not asked again.
  """
  answer, reason = BAD_WEIGHTS[what]
  server, file = serve_weights(answer)
  for why in (
    rf"no download of gpt2/gpt2\.safetensors \(.*{reason}.*\)",
    "it failed recently and is tried again in 60 minutes",
  ):
    with pytest.raises(UserError, match=why) as error:
      find_released("gpt2")
    advice = (
      f". Save {file.url} as gpt2/gpt2.safetensors in a folder and set JGPT_DATA_DIR to the folder"
    )
    assert str(error.value).endswith(advice)
    assert str(error.value).isprintable()
    assert left_files() == ["gpt2.safetensors.failed"]
  assert server.requests == 1


def test_large_body_that_is_too_long_is_not_read_to_its_end(serve_weights):
  """A server that never ends does not fill the disk."""
  server, _ = serve_weights()

  def answer(handler):
    handler.send_response(200)
    handler.end_headers()
    try:
      while not server.released.is_set():
        handler.wfile.write(WEIGHTS)
    finally:
      server.released.set()

  server.answer = answer
  with pytest.raises(UserError, match="got more than 1,048,576 bytes"):
    find_released("gpt2")
  assert server.released.wait(5)


def stall_half_way(server):
  def answer(handler):
    send(WEIGHTS[:HALF], length=len(WEIGHTS))(handler)
    server.released.wait(30)

  return answer


def test_large_download_that_stalls_is_ended_and_goes_on_at_the_next_call(
  serve_weights, monkeypatch
):
  """What arrived is kept, and that is no failure to remember."""
  monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
  server, file = serve_weights()
  server.answer = stall_half_way(server)
  began = time.monotonic()
  with pytest.raises(
    DownloadError,
    match=r"no byte for 0 s; 0\.0 of 0\.0 GB are kept, and the same command fetches the rest",
  ):
    download.download_file(file, silent)
  assert 0.25 < time.monotonic() - began < 5
  assert left_files() == ["gpt2.safetensors.partial"]
  asked = []
  server.answer = send_part(asked=asked)
  assert download.download_file(file, silent).read_bytes() == WEIGHTS
  assert asked == [f"bytes={HALF}-"]
  assert left_files() == ["gpt2.safetensors"]


def test_large_download_that_breaks_off_goes_on_at_the_next_call(serve_weights):
  server, file = serve_weights(send(WEIGHTS[:HALF], length=len(WEIGHTS)))
  with pytest.raises(DownloadError, match=r"the connection ended early; .* are kept"):
    download.download_file(file, silent)
  partial = cache_dir() / "gpt2/gpt2.safetensors.partial"
  assert partial.read_bytes() == WEIGHTS[:HALF]
  server.answer = send(WEIGHTS[HALF : HALF + 9], status=206, length=HALF)
  with pytest.raises(DownloadError, match=r"the connection ended early; .* are kept"):
    download.download_file(file, silent)
  assert partial.read_bytes() == WEIGHTS[: HALF + 9]
  server.answer = send_part()
  assert download.download_file(file, silent).read_bytes() == WEIGHTS
  assert server.requests == 3


def test_interrupted_large_download_goes_on_at_the_next_call(serve_weights):
  server, _ = serve_weights()

  def interrupt(done, total):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    find_released("gpt2", interrupt)
  (name,) = left_files()
  assert name == "gpt2.safetensors.partial"
  arrived = (cache_dir() / "gpt2" / name).read_bytes()
  assert 0 < len(arrived) <= download.DOWNLOAD_BLOCK_BYTES
  assert WEIGHTS.startswith(arrived)
  asked = []
  server.answer = send_part(asked=asked)
  assert find_released("gpt2").read_bytes() == WEIGHTS
  assert asked == [f"bytes={len(arrived)}-"]


def test_interrupted_before_a_byte_has_come_leaves_no_file(serve_weights, monkeypatch):
  serve_weights()

  def interrupted(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(download, "_receive", interrupted)
  with pytest.raises(KeyboardInterrupt):
    find_released("gpt2")
  assert left_files() == []


def test_server_that_sends_all_or_nothing_is_read_from_the_start(serve_weights):
  server, file = serve_weights(send(WEIGHTS))
  put_partial(WEIGHTS[:HALF])
  assert download.download_file(file, silent).read_bytes() == WEIGHTS
  assert server.requests == 1


def test_server_that_sends_another_part_is_refused(serve_weights):
  """The length is that of the file instead of its rest.

  With the right length only the digest can tell.
  """
  _, file = serve_weights(send(WEIGHTS, status=206))
  put_partial(WEIGHTS[:HALF])
  with pytest.raises(DownloadError, match="the server announces 1048576 bytes, not 524288"):
    download.download_file(file, silent)
  assert left_files() == ["gpt2.safetensors.failed"]


def test_damaged_partial_file_is_found_by_the_digest_and_deleted(serve_weights):
  server, file = serve_weights()
  put_partial(WEIGHTS[: HALF - 1] + b"x")
  with pytest.raises(DownloadError, match="its SHA-256 is"):
    download.download_file(file, silent)
  assert left_files() == ["gpt2.safetensors.failed"]
  (cache_dir() / "gpt2/gpt2.safetensors.failed").unlink()
  assert download.download_file(file, silent).read_bytes() == WEIGHTS
  assert server.requests == 2


def test_partial_file_that_is_whole_needs_no_server(serve_weights):
  server, file = serve_weights()
  put_partial(WEIGHTS)
  assert download.download_file(file, silent).read_bytes() == WEIGHTS
  assert server.requests == 0
  assert left_files() == ["gpt2.safetensors"]


def test_two_downloads_of_a_file_at_once_are_both_right(serve_weights):
  """The second begins when half is there, and ends before the first."""
  server, file = serve_weights()
  second = []

  def report(done, total):
    if done >= HALF and not second:
      second.append(download.download_file(file, silent))

  first = download.download_file(file, report)
  assert second == [first]
  assert first.read_bytes() == WEIGHTS
  assert left_files() == ["gpt2.safetensors"]
  assert server.requests == 2


def test_no_network_is_remembered_and_costs_the_partial_file_nothing(serve_weights):
  server, file = serve_weights()
  server.close()
  partial = put_partial(WEIGHTS[:HALF])
  for why in ("refused", "failed recently"):
    with pytest.raises(
      UserError, match=f"{why}.*Save {re.escape(file.url)} as gpt2/gpt2.safetensors"
    ):
      find_released("gpt2")
  assert partial.read_bytes() == WEIGHTS[:HALF]
  assert left_files() == ["gpt2.safetensors.failed", "gpt2.safetensors.partial"]


def test_answer_for_a_large_file_that_comes_too_late_is_not_taken(serve_weights, monkeypatch):
  """Its connection is closed, not left open behind the caller's back."""
  monkeypatch.setattr(download, "ANSWER_SECONDS", 0.3)
  server, file = serve_weights()

  def late(handler):
    time.sleep(0.6)
    handler.send_response(200)
    handler.end_headers()
    try:
      while not server.released.is_set():
        handler.wfile.write(WEIGHTS)
    except OSError:
      server.released.set()

  server.answer = late
  began = time.monotonic()
  with pytest.raises(DownloadError, match="no answer within"):
    download.download_file(file, silent)
  assert 0.25 < time.monotonic() - began < 0.6
  assert left_files() == ["gpt2.safetensors.failed"]
  assert server.released.wait(5)


def test_large_file_may_take_its_time(serve_weights, monkeypatch):
  """Each byte comes in time; there is no limit on them all."""
  for limit in ("ANSWER_SECONDS", "BODY_SECONDS", "STALL_SECONDS"):
    monkeypatch.setattr(download, limit, 0.5)
  _, file = serve_weights(drip)
  file = dataclasses.replace(file, sha256=sha256(ORIGINAL), num_bytes=len(ORIGINAL))
  assert download.download_file(file, silent).read_bytes() == ORIGINAL


def test_disk_without_room_is_found_before_anything_is_sent(serve_weights, monkeypatch):
  """It is no failure to remember: with room made, the same command works.

  What is there already needs no room.
  """
  server, _ = serve_weights()
  usage = dataclasses.make_dataclass("Usage", ["free"])
  monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage(HALF - 1))
  with pytest.raises(
    UserError,
    match=r"cannot write to .*gpt2: 0\.0 GB are needed, and 0\.0 GB are free.*JGPT_CACHE_DIR",
  ):
    find_released("gpt2")
  assert server.requests == 0
  assert left_files() == []
  (cache_dir() / "gpt2").rmdir()
  put_partial(WEIGHTS[: HALF + 1])
  assert find_released("gpt2").read_bytes() == WEIGHTS


def test_disk_that_fills_up_leaves_no_file(serve_weights, monkeypatch):
  class FullDisk(io.BufferedRandom):
    def write(self, content):
      if self.tell() >= HALF // 2:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      return super().write(content)

  server, file = serve_weights()
  monkeypatch.setattr(
    download,
    "open",
    lambda path, mode, opener: FullDisk(io.FileIO(path, mode, opener=opener)),
    raising=False,
  )
  with pytest.raises(
    DownloadError,
    match=r"cannot write to .*gpt2: No space left on device\. Make room, or set JGPT_CACHE_DIR",
  ):
    download.download_file(file, silent)
  assert left_files() == []
  monkeypatch.delattr(download, "open")
  assert download.download_file(file, silent).read_bytes() == WEIGHTS
  assert server.requests == 2


def test_cache_that_cannot_be_written_is_an_error_for_a_large_file(serve_weights):
  server, _ = serve_weights()
  cache_dir().mkdir()
  (cache_dir() / "gpt2").write_text("no folder")
  with pytest.raises(UserError, match=r"cannot write to .*gpt2: File exists.*Save http"):
    find_released("gpt2")
  assert server.requests == 0


def test_redirect_keeps_the_part_asked_for_and_https(serve_weights, monkeypatch):
  server, file = serve_weights()
  put_partial(WEIGHTS[:HALF])
  asked = []

  def answer(handler):
    elsewhere = handler.path == "/elsewhere"
    (send_part(asked=asked) if elsewhere else send(b"", status=302, Location="/elsewhere"))(handler)

  server.answer = answer
  monkeypatch.setattr(
    download, "check_https", lambda url: None if url == file.url else check_https(url)
  )
  with pytest.raises(DownloadError, match="is not https"):
    download.download_file(file, silent)
  assert asked == []
  (cache_dir() / "gpt2/gpt2.safetensors.failed").unlink()
  monkeypatch.setattr(download, "check_https", lambda url: None)
  assert download.download_file(file, silent).read_bytes() == WEIGHTS
  assert asked == [f"bytes={HALF}-"]


def test_large_file_is_never_held_in_memory(serve_weights, tmp_path):
  """64 MB raise the peak of a fresh process by less than 20 MB."""
  if not Path("/proc/self/status").exists():
    pytest.skip("needs /proc to measure memory")
  blocks = 64

  def answer(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(blocks * len(WEIGHTS)))
    handler.end_headers()
    for _ in range(blocks):
      handler.wfile.write(WEIGHTS)

  _, file = serve_weights(answer)
  digest = hashlib.sha256()
  for _ in range(blocks):
    digest.update(WEIGHTS)
  code = f"""
from pathlib import Path
from jgpt.data import download
from jgpt.system.cache import PinnedFile
from jgpt.weights import initial
def peak():
  return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
download.check_https = lambda url: None
pinned = dict(url="{file.url}", sha256="{digest.hexdigest()}", num_bytes={blocks} * 2**20)
initial.RELEASED["gpt2"] = PinnedFile(filename="x", **pinned)
before = peak()
found = initial.find_released("gpt2")
assert initial.find_released("gpt2") == found
print(found.stat().st_size, peak() - before)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  size, kilobytes = map(int, done.stdout.split())
  assert size == 64 * 2**20
  assert kilobytes < 20 * 1024


@pytest.fixture
def data_dir(serve_weights, tmp_path, monkeypatch):
  """The user's folder; a server that must not be asked."""
  server, _ = serve_weights()
  (tmp_path / "mine/gpt2").mkdir(parents=True)
  monkeypatch.setenv("JGPT_DATA_DIR", str(tmp_path / "mine"))
  yield tmp_path / "mine/gpt2/gpt2.safetensors"
  assert server.requests == 0


def test_own_weights_go_before_the_cache_and_the_network(data_dir):
  data_dir.write_bytes(WEIGHTS)
  assert find_released("gpt2") == data_dir


@pytest.mark.parametrize(
  "content, difference",
  [
    (WEIGHTS[:-1], "it has 1,048,575 bytes, not 1,048,576"),
    (WEIGHTS[::-1], f"not {sha256(WEIGHTS)[:12]}"),
  ],
)
def test_own_weights_that_are_others_are_refused(data_dir, content, difference):
  """Not passed over: the user put them there to be used."""
  data_dir.write_bytes(content)
  with pytest.raises(
    UserError, match=f"gpt2.safetensors is not the released gpt2: .*{difference}. Save http"
  ):
    find_released("gpt2")


def test_own_weights_that_cannot_be_read_are_an_error(data_dir, monkeypatch):
  def fail(*args):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  data_dir.write_bytes(WEIGHTS)
  monkeypatch.setattr(hashlib, "file_digest", fail)
  with pytest.raises(UserError, match=r"cannot read .*gpt2\.safetensors: Input/output error\."):
    find_released("gpt2")


@pytest.mark.parametrize("damaged", [WEIGHTS[:-1], WEIGHTS[:-1] + b"x"])
def test_damaged_weights_in_the_cache_are_replaced(serve_weights, damaged):
  server, _ = serve_weights()
  found = find_released("gpt2")
  found.write_bytes(damaged)
  assert find_released("gpt2").read_bytes() == WEIGHTS
  assert server.requests == 2


def test_weights_that_were_not_released_are_unknown():
  with pytest.raises(
    UserError, match=r"'gpt2-large-x' is not a released GPT-2\. Did you mean gpt2-large"
  ):
    find_released("gpt2-large-x")


@pytest.mark.parametrize(
  "name, layers, width",
  [("gpt2", 12, 768), ("gpt2-medium", 24, 1024), ("gpt2-large", 36, 1280), ("gpt2-xl", 48, 1600)],
)
def test_released_sizes_are_those_of_the_tensors_and_a_header(name, layers, width):
  """float32 parameters, a causal mask of 1024 x 1024 float32 per layer, 8 bytes, and some 90
  characters per tensor.
  """
  parameters = (50257 + 1024 + 2) * width + layers * (12 * width**2 + 13 * width)
  tensors = 4 + 13 * layers
  file = RELEASED[name]
  header = file.num_bytes - 8 - 4 * (parameters + layers * 1024**2)
  assert 85 * tensors < header < 95 * tensors
  assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
  assert re.fullmatch(
    rf"https://huggingface\.co/openai-community/{name}/resolve/[0-9a-f]{{40}}/model\.safetensors",
    file.url,
  )
  assert file.filename == f"gpt2/{name}.safetensors"
