"""Downloads, from a server on this machine: what goes wrong, how long it takes, and what is left behind."""

import dataclasses
import hashlib
import http.server
import os
import re
import stat
import threading
import time

import pytest

from jgpt import download, sources
from jgpt.config import DataConfig
from jgpt.download import DownloadError
from jgpt.sources import GPT2_FILES, SOURCES, PinnedFile, PinnedText, find_text

ORIGINAL = b"emma\nolivia\nava\n"  # stands for the 32,033 names
NAMES = DataConfig(
  source="names", tokenizer="characters", batching="documents", seq_len=16, batch_size=1, heldout_fraction=0.0
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
    self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
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
  """A function from an answer to a server and a source of ORIGINAL that points to it; http is allowed, proxies are not."""
  monkeypatch.setenv("JGPT_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.delenv("JGPT_DATA_DIR", raising=False)
  monkeypatch.setenv("no_proxy", "*")
  monkeypatch.setattr(download, "_require_https", lambda url: None)
  servers = []

  def start(answer=None):
    servers.append(Server(answer or send(ORIGINAL)))
    pinned = {"sha256": sha256(ORIGINAL), "num_bytes": len(ORIGINAL), "chars": "\naeilmov", "bundled": True}
    return servers[-1], PinnedText(filename="names.txt", url=servers[-1].url, **pinned)

  yield start
  for server in servers:
    server.close()


def cached_files():
  return sorted(p.name for p in sources.cache_dir().iterdir())


def test_download_is_kept_in_a_cache_that_only_its_user_can_enter(serve, monkeypatch):
  server, source = serve()
  monkeypatch.setitem(SOURCES, "names", source)
  assert find_text(NAMES).kind == "download"
  assert find_text(NAMES).kind == "cache"
  assert server.requests == 1
  assert cached_files() == ["names.txt"]
  assert stat.S_IMODE(sources.cache_dir().stat().st_mode) == 0o700
  assert stat.S_IMODE((sources.cache_dir() / "names.txt").stat().st_mode) & 0o077 == 0


BAD_ANSWERS = {
  "wrong hash": (send(ORIGINAL.upper()), "SHA-256 is .*, not"),
  "short body": (send(ORIGINAL[:-1]), "got 15 bytes, not 16"),
  "empty body": (send(b""), "got 0 bytes, not 16"),
  "long body": (send(ORIGINAL + b"x" * 10**6), "got more than 16 bytes, not 16"),
  "interrupted body": (send(ORIGINAL[:-6], length=len(ORIGINAL)), "got 10 bytes, not 16"),
  "HTML page": (send(b"<!DOCTYPE html><html>Log in to this network</html>"), "got more than 16 bytes"),
  "not found": (send(b"no such file", status=404), "Not Found"),
  "no HTTP": (lambda handler: handler.wfile.write(b"SSH-2.0\x1b[2J\r\n"), r"\(SSH-2.0 \[2J\)"),  # no code for the terminal
  "nothing": (lambda handler: handler.connection.close(), "no download of names.txt"),
  "broken chunks": (
    lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nem"),
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
  assert re.search("failed lately.*bundled list stands in", find_text(NAMES).note)
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
  """The limit is on the whole download, not on the wait for one packet; bytes that come too late are not kept."""
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
  assert 0.8 < time.monotonic() - began < 10
  with pytest.raises(DownloadError, match=r"tried again in 60 minutes \(at once if you delete .*names\.txt\.failed\)"):
    download.download(source)
  (sources.cache_dir() / "names.txt.failed").unlink()
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
  assert [p.name for p in (sources.cache_dir() / "gpt2").iterdir()] == ["vocab.bpe.failed"]
  (sources.cache_dir() / "gpt2/vocab.bpe.failed").unlink()
  server.answer = send(ORIGINAL)
  assert download.download(file) == ORIGINAL
  assert (sources.cache_dir() / "gpt2/vocab.bpe").read_bytes() == ORIGINAL
  for folder in (sources.cache_dir(), sources.cache_dir() / "gpt2"):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_failed_download_is_tried_again_after_an_hour_and_not_before(serve):
  server, source = serve(send(b"", status=500))
  failed = sources.cache_dir() / "names.txt.failed"
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
      os.utime(sources.cache_dir() / "names.txt.failed", (time.time() - seconds_ago,) * 2)
    for reason in ("Internal Server Error", "failed lately"):
      with pytest.raises(DownloadError, match=reason):
        download.download(source)
  assert server.requests == 2


def test_nobody_listening_is_a_reason_like_any_other(serve):
  server, source = serve()
  server.close()
  with pytest.raises(DownloadError, match="refused"):
    download.download(source)


def test_cache_that_cannot_be_written_is_no_error_and_holds_no_half_file(serve):
  """A folder stands where the file should; what was downloaded is used, and the temporary file is taken away."""
  _, source = serve()
  (sources.cache_dir() / "names.txt").mkdir(parents=True)
  assert download.download(source) == ORIGINAL
  assert cached_files() == ["names.txt"]


@pytest.fixture
def https_required(serve, monkeypatch):
  """The real check for every address but the server's own, which stands for an https address."""

  def start(answer):
    server, source = serve(answer)
    monkeypatch.setattr(download, "_require_https", lambda url: None if url == source.url else require_https(url))
    return server, source

  return start


require_https = download._require_https  # before a fixture replaces it


@pytest.mark.parametrize("to", ["/elsewhere", "ftp://127.0.0.1/names.txt", "file:///etc/passwd"])
def test_redirect_to_anything_but_https_is_refused_before_it_is_followed(https_required, to):
  """The address beside the first is plain http on the same server: it is never asked for."""
  server, source = https_required(send(b"", status=302, Location=to))
  with pytest.raises(DownloadError, match=r"is not https|not allowed"):
    download.download(source)
  assert server.requests == 1


def test_source_that_is_not_https_is_refused_without_a_request(serve, monkeypatch):
  server, source = serve()
  monkeypatch.setattr(download, "_require_https", require_https)
  with pytest.raises(DownloadError, match="is not https"):
    download.download(source)
  assert server.requests == 0
  pinned = [*GPT2_FILES, *(source for source in SOURCES.values() if isinstance(source, PinnedFile))]
  assert len(pinned) == 4
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
