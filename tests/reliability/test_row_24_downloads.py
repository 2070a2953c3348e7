"""Downloads that fail, in whole commands: refused in one line that says what to do by hand, or the
bundled list stands in.

The commands ask for the real addresses, through a proxy on this machine that answers in the
server's place, with a certificate of its own that they are told to trust.
`tests/data/test_download.py` holds the functions to every clause: sizes and digests, redirects,
what is kept of gigabytes.
"""

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
from bad_input import Case, assert_refused, give, settings

HOST = "raw.githubusercontent.com"
NUM_BYTES = 1_115_394  # of tiny Shakespeare
PAGE = b"<!DOCTYPE html><html>Log in to this network</html>"


def answer(body=b"", *, status="200 OK", length=None, more=()):
  """The bytes of an answer over HTTP."""
  head = [
    f"HTTP/1.1 {status}",
    f"Content-Length: {len(body) if length is None else length}",
    "Connection: close",
    *more,
  ]
  return "\r\n".join([*head, "", ""]).encode() + body


class Proxy:
  """Stands between a command and the network: lets a connection through to a server of its own, or
  does not.

  Attributes:
    reply: what its server sends; None never answers.
    drip: seconds between two bytes.
    requests: how many came.
  """

  def __init__(self, context, reply, drip=0.0):
    self.reply, self.drip, self.requests = reply, drip, 0
    self._context, self._over = context, threading.Event()
    self._socket = socket.create_server(("127.0.0.1", 0))
    self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
    threading.Thread(target=self._accept, daemon=True).start()

  def close(self):
    self._over.set()
    self._socket.close()

  def _accept(self):
    with contextlib.suppress(OSError):
      while True:
        connection, _ = self._socket.accept()
        threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

  def _serve(self, connection):
    with contextlib.suppress(OSError), connection:
      assert connection.recv(65536).startswith(f"CONNECT {HOST}:443".encode())
      self.requests += 1
      connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
      with self._context.wrap_socket(connection, server_side=True) as secured:
        secured.recv(65536)
        if self.reply is None:
          self._over.wait(60)
        elif self.drip:
          for n in range(len(self.reply)):
            secured.sendall(self.reply[n : n + 1])
            if self._over.wait(self.drip):
              break
        else:
          secured.sendall(self.reply)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
  """A key and a certificate for the host, made for this run of the tests."""
  if not shutil.which("openssl"):
    pytest.skip("needs the program openssl to make a certificate")
  folder = tmp_path_factory.mktemp("certificate")
  key, cert = folder / "key.pem", folder / "cert.pem"
  words = (
    f"req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {key} -out {cert} -subj /CN={HOST}".split()
  )
  subprocess.run(
    ["openssl", *words, "-addext", f"subjectAltName=DNS:{HOST}"], check=True, capture_output=True
  )
  return key, cert


@pytest.fixture
def proxies(certificate):
  """A function from what is answered to a proxy, and to the environment in which commands
  use it.
  """
  key, cert = certificate
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(cert, key)
  started = []

  def start(reply, **options):
    started.append(Proxy(context, reply, **options))
    return started[-1], {"https_proxy": started[-1].url, "SSL_CERT_FILE": str(cert), "no_proxy": ""}

  yield start
  for proxy in started:
    proxy.close()


BAD_ANSWERS = {
  "wrong hash": (answer(b"x" * NUM_BYTES), "its SHA-256 is 0"),
  "short body": (answer(b"x" * 1000), "got 1,000 bytes, not 1,115,394"),
  "interrupted": (answer(b"x" * 1000, length=NUM_BYTES), "got 1,000 bytes, not 1,115,394"),
  "page": (answer(PAGE), "got 50 bytes, not 1,115,394"),
  "endless": (answer(b"x" * (NUM_BYTES + 9)), "got more than 1,115,394 bytes"),
  "not there": (answer(PAGE, status="404 Not Found"), "(Not Found)"),
  "to http": (answer(status="302 Found", more=[f"Location: http://{HOST}/x"]), "is not https"),
  "round and round": (
    answer(status="302 Found", more=[f"Location: https://{HOST}/x"]),
    "infinite loop",
  ),
  "no HTTP": (b"SSH-2.0\x1b[2J\r\n", "(SSH-2.0 [2J)"),
}
BY_HAND = "as tinyshakespeare.txt in a folder and set JGPT_DATA_DIR to the folder"


@pytest.mark.slow
def test_row_24_what_is_not_the_original_is_refused_and_leaves_no_file(tmp_path, proxies):
  cases = []
  for name, (reply, _) in BAD_ANSWERS.items():
    env = proxies(reply)[1] | {"JGPT_CACHE_DIR": str(tmp_path / name)}
    cases += [
      Case(argv=settings("shakespeare_char_cpu"), env=env)
    ] * 2  # the second time it is not asked for
  (tmp_path / "here").mkdir()
  outcomes = give(cases, cwd=tmp_path / "here")
  for (name, (_, reason)), first, second in zip(
    BAD_ANSWERS.items(), outcomes[::2], outcomes[1::2], strict=True
  ):
    assert_refused(first, "no download of tinyshakespeare.txt", f"Save https://{HOST}/", BY_HAND)
    if name == "wrong hash":
      assert "its SHA-256 is" in first.err and "not 86c4e6aa9db7" in first.err
    else:
      assert reason in first.err, first
    assert_refused(second, "it failed recently and is tried again in 60 minutes", BY_HAND)
    assert second.seconds < 1
    left = {path.name for path in (tmp_path / name).rglob("*") if path.is_file()} - {"digests.json"}
    assert left == {"tinyshakespeare.txt.failed"}
  assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.slow
def test_row_24_no_answer_costs_two_seconds_and_names_go_on_with_the_bundled_list(
  tmp_path, proxies
):
  """A server that is silent, one that drips, and a network in which names are not found: once, then
  not for an hour.
  """
  silent, dripping = proxies(None), proxies(answer(b"x" * 228_145), drip=0.1)
  argv = [*settings("names"), "--steps", "0", "--workdir", "run"]
  cases = []
  for name, env in (
    ("silent", silent[1]),
    ("dripping", dripping[1]),
    ("no names", {"https_proxy": ""}),
  ):
    cache = {"JGPT_CACHE_DIR": str(tmp_path / name)}
    one = Case(argv=settings("names"), env=env | cache, slow_names=name == "no names")
    cases += [one, one]
  (here := tmp_path / "here").mkdir()
  _, *outcomes = give(
    [Case(argv=settings("shakespeare_bytes")), *cases], cwd=here
  )  # the first one imports jax
  for first, second in zip(
    outcomes[::2], outcomes[1::2], strict=True
  ):  # where there is no device, so that is said
    assert (
      first.status == second.status == 2 and "finds no device" in first.err and first.left == []
    )
    assert 1.9 < first.seconds < 4 and second.seconds < 1, (first, second)
  assert silent[0].requests == dripping[0].requests == 1
  began = time.monotonic()
  (done,) = give([Case(argv=argv, env=cases[0].env)], cwd=here, JAX_PLATFORMS="cpu")
  assert done.status == 0 and done.err == "" and time.monotonic() - began < 100
  assert "the list that comes with jgpt (bundled" in done.out
  assert (
    "it failed recently" in done.out
    and "the bundled list stands in. For the original, set JGPT_DATA_DIR" in done.out
  )
