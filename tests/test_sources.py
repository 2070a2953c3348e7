"""Where text comes from: the order of places, digests, files that cannot be read, and downloads that go wrong."""

import dataclasses
import hashlib
import http.server
import os
import re
import stat
import threading
import time
from pathlib import Path

import pytest

from jgpt import download, sources
from jgpt.config import UserError, load_experiment
from jgpt.download import DownloadError
from jgpt.sources import SOURCES, Source, Text, find_text

BUNDLED = Path(sources.__file__).parent / "bundled" / "names.txt"
ORIGINAL = b"emma\nolivia\nava\n"  # stands for the 32,033 names


def sha256(content):
  return hashlib.sha256(content).hexdigest()


def data_config(**changes):
  return dataclasses.replace(load_experiment("names").data, **changes)


@pytest.fixture
def places(tmp_path, monkeypatch):
  """Empty folders instead of the user's; `names` has the digest of ORIGINAL; downloads fail and are counted."""
  monkeypatch.setenv("JGPT_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.setenv("JGPT_DATA_DIR", str(tmp_path / "data"))
  (tmp_path / "data").mkdir()
  source = dataclasses.replace(SOURCES["names"], sha256=sha256(ORIGINAL), num_bytes=len(ORIGINAL))
  monkeypatch.setitem(SOURCES, "names", source)

  class Places:
    data, cache, mine = (tmp_path / name / "names.txt" for name in ("data", "cache", "mine"))
    downloads = 0
    online = False

  def fake_download(source: Source) -> bytes:
    Places.downloads += 1
    if not Places.online:
      raise DownloadError("no download of names.txt (no network)")
    return ORIGINAL

  monkeypatch.setattr(download, "download", fake_download)
  Places.cache.parent.mkdir()
  Places.mine.parent.mkdir()
  return Places


# --- The order of places ---


def test_places_are_tried_in_order(places):
  """A path, $JGPT_DATA_DIR, the cache, a download, the bundled list; each is taken only where those before have nothing."""
  places.mine.write_bytes(b"mine\n")
  places.data.write_bytes(b"of the folder\n")
  places.cache.write_bytes(ORIGINAL)
  places.online = True

  found = find_text(data_config(path=str(places.mine)))
  assert (found.kind, found.location, found.text) == ("path", str(places.mine), "mine\n")
  found = find_text(data_config())
  assert (found.kind, found.location, found.text) == ("JGPT_DATA_DIR", str(places.data), "of the folder\n")
  places.data.unlink()
  found = find_text(data_config())
  assert (found.kind, found.location, found.text) == ("cache", str(places.cache), ORIGINAL.decode())
  assert places.downloads == 0
  places.cache.unlink()
  found = find_text(data_config())
  assert (found.kind, found.location, found.text) == ("download", SOURCES["names"].url, ORIGINAL.decode())
  assert (found.sha256, found.note) == (sha256(ORIGINAL), "")
  places.online = False
  found = find_text(data_config())
  assert (found.kind, found.sha256) == ("bundled", sha256(BUNDLED.read_bytes()))
  assert re.search("no network.*bundled list stands in.*JGPT_DATA_DIR to a folder that has it", found.note)


@pytest.mark.parametrize("content", [b"emma\n", b"\xff\xfe\xfd"])
def test_damaged_cache_is_passed_over(places, content):
  """Bytes that are not the original's, UTF-8 or not, are as good as none; the download replaces them."""
  places.cache.write_bytes(content)
  places.online = True
  assert find_text(data_config()).kind == "download"


def test_unset_environment_and_absent_folder_are_no_place(places, monkeypatch):
  monkeypatch.setenv("JGPT_DATA_DIR", str(places.data.parent / "absent"))
  assert find_text(data_config()).kind == "bundled"
  monkeypatch.delenv("JGPT_DATA_DIR")
  assert find_text(data_config()).kind == "bundled"


# --- Texts that a run recorded ---


def test_recorded_text_is_found_again_in_another_place(places):
  """The first place that has the digest is taken, not the first that has the name."""
  places.data.write_bytes(b"another\n")
  places.cache.write_bytes(ORIGINAL)
  assert find_text(data_config(), sha256=sha256(ORIGINAL)).kind == "cache"
  places.cache.unlink()
  places.online = True
  assert find_text(data_config(), sha256=sha256(ORIGINAL)).kind == "download"
  assert find_text(data_config(), sha256=sha256(b"another\n")).kind == "JGPT_DATA_DIR"
  bundled = find_text(data_config(), sha256=sha256(BUNDLED.read_bytes()))
  assert (bundled.kind, bundled.note) == ("bundled", "")
  assert places.downloads == 1  # only for the text that a download can be


def test_recorded_text_that_is_nowhere_is_refused_with_where_to_put_it(places):
  """Never another text in its place, and without asking the network for what it cannot have."""
  places.data.write_bytes(b"another\n")
  with pytest.raises(UserError, match=rf"SHA-256 {sha256(b'lost')[:12]}.*names\.txt.*JGPT_DATA_DIR.*--fresh"):
    find_text(data_config(), sha256=sha256(b"lost"))
  assert places.downloads == 0
  with pytest.raises(UserError, match=rf"SHA-256 {sha256(ORIGINAL)[:12]}.*names\.txt.*JGPT_DATA_DIR.*--fresh"):
    find_text(data_config(), sha256=sha256(ORIGINAL))


def test_recorded_file_that_has_changed_is_refused_by_name(places):
  places.mine.write_bytes(b"before\n")
  before, after = sha256(b"before\n"), sha256(b"after\n")
  config = data_config(path=str(places.mine))
  assert find_text(config, sha256=before).text == "before\n"
  places.mine.write_bytes(b"after\n")
  with pytest.raises(UserError, match=f"{places.mine} has changed.*{before[:12]}.*{after[:12]}"):
    find_text(config, sha256=before)


# --- Files ---


def test_text_is_read_the_same_with_a_byte_order_mark_and_windows_line_ends(places):
  """Blank lines and spaces around a line do not count either; the digest is still that of the bytes."""
  plain = Text("emma\nzoë\n", "path", "", "").documents()
  for content in (b"emma\nzo\xc3\xab", b"\xef\xbb\xbfemma\r\nzo\xc3\xab\r\n", b"\n\n  emma\t\n \n\xc2\xa0zo\xc3\xab \n"):
    places.mine.write_bytes(content)
    found = find_text(data_config(path=str(places.mine)))
    assert found.documents() == plain == ["emma", "zoë"]
    assert found.sha256 == sha256(content)


@pytest.mark.parametrize("content", [b"emma\n\xe9mile\n", b"\xff\xfee\x00m\x00", b"\xed\xa0\x80"])
def test_file_that_is_not_utf8_is_refused_by_name_with_the_byte(places, content):
  places.mine.write_bytes(content)
  where = re.search(rb"[\xe9\xff\xed]", content).start()
  with pytest.raises(UserError, match=rf"{places.mine} is not UTF-8 text: byte {where} is 0x{content[where]:02x}"):
    find_text(data_config(path=str(places.mine)))


@pytest.mark.parametrize("path", ["absent.txt", ".", "~nobody-of-this-name/words.txt", "nul\0.txt", "\ud800.txt"])
def test_path_that_cannot_be_read_is_refused_by_name(path):
  with pytest.raises(UserError, match=re.escape(f"cannot read {path}: ")):
    find_text(data_config(path=path))


def test_unknown_source_is_refused_and_the_near_one_named():
  with pytest.raises(UserError, match=r"data\.source='name' is not known. Did you mean names\?.*data\.path=FILE"):
    find_text(data_config(source="name"))


def test_vocabulary_is_known_without_reading_a_source(places):
  """Counting parameters downloads nothing; for a file of one's own the characters are counted."""
  assert sources.expected_vocab_size(data_config()) == 27
  assert places.downloads == 0
  places.mine.write_bytes(b" b a\r\n\ncab\n")
  assert sources.expected_vocab_size(data_config(path=str(places.mine))) == 5  # a, b, c, the space inside, BOS


# --- The bundled list ---


def test_bundled_list_is_as_clean_as_the_original():
  """At least 4,000 distinct names of 2 to 15 letters a-z, sorted, so that it stands in for the original."""
  names = BUNDLED.read_text(encoding="ascii").splitlines()
  assert len(names) >= 4000
  assert names == sorted(set(names))
  assert [name for name in names if not re.fullmatch("[a-z]{2,15}", name)] == []
  assert set("".join(names)) == set(SOURCES["names"].chars)


def test_bundled_names_are_names():
  """70% of them and more stand in the original, where that is at hand."""
  folder = os.environ.get("JGPT_DATA_DIR")
  if not folder or not (Path(folder) / "names.txt").is_file():
    pytest.skip("$JGPT_DATA_DIR/names.txt is not there to compare with")
  original = (Path(folder) / "names.txt").read_bytes()
  assert (sha256(original), len(original)) == (SOURCES["names"].sha256, SOURCES["names"].num_bytes)
  known = set(original.decode().split())
  names = BUNDLED.read_text(encoding="ascii").split()
  assert sum(name in known for name in names) >= 0.7 * len(names)


# --- Downloads, from a server on this machine ---


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
    source = Source("names.txt", servers[-1].url, sha256(ORIGINAL), len(ORIGINAL), "aeilmov", bundled=True)
    return servers[-1], source

  yield start
  for server in servers:
    server.close()


def cached_files():
  return sorted(p.name for p in sources.cache_dir().iterdir())


def test_download_is_kept_in_a_cache_that_only_its_user_can_enter(serve, monkeypatch):
  server, source = serve()
  monkeypatch.setitem(SOURCES, "names", source)
  assert find_text(data_config()).kind == "download"
  assert find_text(data_config()).kind == "cache"
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
  found = find_text(data_config())
  assert found.kind == "bundled"
  assert re.search(f"{reason}.*bundled list stands in", found.note)
  assert cached_files() == ["names.txt.failed"]
  assert re.search("failed lately.*bundled list stands in", find_text(data_config()).note)
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


def test_server_that_drips_is_cut_off_in_time(serve, monkeypatch):
  """The limit is on the whole download, not on the wait for one packet; bytes that come too late are not kept."""
  monkeypatch.setattr(download, "DOWNLOAD_SECONDS", 0.3)
  server, source = serve()

  def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    for byte in ORIGINAL:
      time.sleep(0.1)
      handler.wfile.write(bytes([byte]))
    server.released.set()

  server.answer = drip
  began = time.monotonic()
  with pytest.raises(DownloadError, match="no answer within"):
    download.download(source)
  assert time.monotonic() - began < 1.2  # of 1.6
  assert server.released.wait(5)  # the rest of the body, right in every byte
  assert cached_files() == ["names.txt.failed"]


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
  assert all(known.url.startswith("https://") for known in SOURCES.values())


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
