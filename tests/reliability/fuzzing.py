"""Inputs that nobody meant to write, and what a parser may do with them: for
`test_fuzz_parsers.py`.

An input is a function of the parser's name and a number, so that a number is all that a failure
needs to be seen again. Valid files are edited as bytes and, where they are JSON, as values; a few
inputs are random from end to end.
"""

import base64
import collections
import contextlib
import copy
import dataclasses
import encodings.utf_8_sig
import encodings.utf_16
import encodings.utf_16_be
import encodings.utf_16_le
import encodings.utf_32
import encodings.utf_32_be

# json.loads imports these by what a file begins with, which is no attack.
import encodings.utf_32_le  # noqa: F401
import hashlib
import json
import os
import random
import re
import struct
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jgpt.errors import UserError

MAX_SECONDS = 1.0  # of CPU for one input
MAX_MESSAGE = 500  # characters of a refusal
MAX_GROWTH = (
  1 << 29
)  # bytes of address space that a whole campaign may add, threads' stacks included
MEASURED = 25  # the memory of one input in so many is measured
INTS = (
  0,
  1,
  -1,
  2,
  255,
  256,
  2**15,
  2**16 - 1,
  2**16,
  2**24,
  2**31 - 1,
  2**31,
  2**32 - 1,
  2**32,
  2**53 + 1,
  2**62,
)
INTS += (2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31), -(2**31) - 1, -(2**63), -(2**63) - 1, 10**30)
FLOATS = (0.5, -0.0, 1e-308, 5e-324, 1e308, -1e308, 1.0, 2.5, 1e16)
TEXTS = (
  "",
  " ",
  "\0",
  "a\nb",
  "\r",
  "\x1b[31m",
  "\ud800",
  "\udc00\ud800",
  "é",
  "😀",
  "\ufeff",
  "\u2028",
  "a\0b",
)
TEXTS += (
  "..",
  "../x",
  "/etc/passwd",
  "a/b",
  "~",
  "~nobody",
  "*",
  "__import__('os').abort()",
  "{0}",
  "%s",
  "none",
  "true",
)
TEXTS += (
  "1",
  "-1",
  "1.5",
  "nan",
  "inf",
  "1e999",
  "0x10",
  "1_0",
  "\u0663",
  "<|endoftext|>",
  "<|bos|>",
  "\u0120a",
  "a" * 600,
)


# --- Bytes ---


def edit_bytes(rng: random.Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
  """Edits a file in a few places: flips, inserts, removes, repeats, cuts, splices, or writes
  numbers over what is there.
  """
  edited = bytearray(content)
  for _ in range(_few(rng)):
    size = len(edited)
    at = rng.choice(
      (rng.randint(0, size), min(size, rng.randint(0, 40)), max(0, size - rng.randint(0, 8)))
    )
    end = min(size, at + rng.choice((1, 2, 4, 8, rng.randint(0, 1 + size // 2))))
    match rng.randrange(10):
      case 0 if at < size:
        edited[at] ^= 1 << rng.randrange(8)
      case 1 if at < size:
        edited[at] = rng.choice(
          (0, 1, 9, 10, 13, 32, 34, 47, 92, 127, 128, 255, rng.randrange(256))
        )
      case 2:
        edited[at:at] = rng.randbytes(rng.choice((1, 2, 3, 16)))
      case 3:
        del edited[at:end]
      case 4:
        edited[at:at] = edited[at:end] * rng.choice((1, 1, 2, 50))
      case 5:
        del edited[at:]
      case 6:
        edited += rng.choice(
          (
            b"\0",
            b"\n",
            b"\r\n",
            bytes(rng.randint(1, 5000)),
            rng.randbytes(rng.randint(1, 64)),
            bytes(edited),
          )
        )
      case 7 if others:
        other = rng.choice(others)
        start = rng.randint(0, len(other))
        edited[at:end] = other[start : start + rng.randint(0, 64)]
      case _:
        kind, where = rng.choice(("<i", "<i", "<I", "<q", "<Q", "<H", ">i")), at // 4 * 4
        number = rng.choice((*INTS, rng.randint(-(10**6), 10**6)))
        packed = struct.pack("<Q", number % 2**64)[: struct.calcsize(kind)]
        packed = packed[::-1] if kind[0] == ">" else packed
        edited[where : where + len(packed)] = packed
  return bytes(edited[: 1 << 20])


def any_bytes(rng: random.Random, begin: Sequence[bytes] = (b"",)) -> bytes:
  """Random bytes, of all values or of a few, perhaps behind the beginning of a real file."""
  start = rng.choice(begin)
  size = rng.choice((0, 1, 2, 7, 8, 9, rng.randint(0, 300), rng.randint(0, 3000)))
  alphabet = rng.choice((None, b"\0\1", b" \n\r\t", b'{}[]":,0 \\', "aé😀\n".encode()))
  noise = rng.randbytes(size) if alphabet is None else bytes(rng.choices(alphabet, k=size))
  return start[: rng.randint(0, len(start))] + noise


def _few(rng: random.Random) -> int:
  """1, 2, 3 ...: half as often each."""
  count = 1
  while count < 8 and rng.random() < 0.5:
    count += 1
  return count


# --- JSON ---


class Pairs(list):
  """An object as its (name, value) pairs, so that names can be repeated."""


class Raw(str):
  """A piece of JSON as it stands."""

  __slots__ = ()


def edit_json(rng: random.Random, text: bytes, others: Sequence[bytes] = ()) -> bytes:
  """Edits a JSON file: any value in the place of any other, then perhaps its bytes."""
  root = [json.loads(text, object_pairs_hook=Pairs)]
  for _ in range(_few(rng)):
    _edit_value(rng, root, others)
  written = _write(root[0], rng.random() < 0.7).encode("utf-8", "surrogatepass")
  match rng.randrange(40):
    case 0:
      return b"\xef\xbb\xbf" + written
    case 1:
      return written.replace(b",", b",\r\n")
    case 2:
      return written.decode("utf-8", "replace").encode(
        rng.choice(("utf-16", "utf-32", "utf-16-le", "latin-1")), "replace"
      )
    case 3 | 4:
      return edit_bytes(rng, written, others)
    case 5:
      return edit_bytes(rng, text, others)
    case 6:
      return _write(any_json(rng), True).encode("utf-8", "surrogatepass")
  return written


def any_json(rng: random.Random, depth: int = 3):
  """Any value, small."""
  if depth == 0 or rng.random() < 0.5:
    return edge_value(rng)
  if rng.random() < 0.5:
    return [any_json(rng, depth - 1) for _ in range(rng.randrange(4))]
  return Pairs((rng.choice(TEXTS), any_json(rng, depth - 1)) for _ in range(rng.randrange(4)))


def edge_value(rng: random.Random):
  """A value at the edge of what a field may hold, or far beyond."""
  match rng.randrange(12):
    case 0 | 1 | 2:
      return rng.choice(INTS)
    case 3:
      return rng.choice(FLOATS)
    case 4 | 5:
      return rng.choice(TEXTS)
    case 6 | 7:
      return rng.choice((None, True, False))
    case 8:
      return [] if rng.random() < 0.5 else Pairs()
    case 9:
      return Raw(
        rng.choice(
          (
            "1e400",
            "-1e400",
            "NaN",
            "Infinity",
            "-Infinity",
            "1E5",
            "-0",
            "1.0e0",
            '"\\ud83d\\ude00"',
          )
        )
      )
    case 10:
      count = rng.choice((20, 309, 400, 4300, 4301, 50_000))
      return Raw(
        rng.choice(("9" * count, f'"{"a" * count}"', f'"{"9" * count}"', f"-1{'0' * count}"))
      )
    case _:  # Python's limit is 1,000 levels, of which a test takes some
      count = rng.choice((2, 60, rng.randint(700, 1000), rng.randint(700, 1000), 5_000))
      return Raw(rng.choice(("[" * count + "]" * count, '{"a":' * count + "1" + "}" * count)))


def _edit_value(rng: random.Random, root: list, others: Sequence[bytes]) -> None:
  holder, at = _choose_place(rng, root)
  value = holder[at][1] if isinstance(holder, Pairs) else holder[at]

  def put(new) -> None:
    holder[at] = (holder[at][0], new) if isinstance(holder, Pairs) else new

  match rng.randrange(10):
    case 0 | 1 | 2:
      put(edge_value(rng))
    case 3 if holder is not root:
      del holder[at]
    case 4 if holder is not root:
      holder.insert(rng.randint(0, len(holder)), holder[at])
    case 5 if isinstance(holder, Pairs):
      name = holder[at][0]
      holder[at] = (
        rng.choice((*TEXTS, name + "s", name[1:], name.upper(), _some_name(rng, root))),
        value,
      )
    case 6:
      other, there = _choose_place(rng, root)
      put(
        copy.deepcopy(other[there][1] if isinstance(other, Pairs) else other[there])
      )  # else it might hold itself
    case 7 if others:
      other = [json.loads(rng.choice(others), object_pairs_hook=Pairs)]
      part, there = _choose_place(rng, other)
      put(part[there][1] if isinstance(part, Pairs) else part[there])
    case 8:
      put(rng.choice(([value], Pairs([("a", value)]), any_json(rng))))
    case _:
      put(_tweak(rng, value))


def _choose_place(rng: random.Random, root: list) -> tuple[list, int]:
  """A place in a value, rather near its root: what has many entries is not chosen more often for
  it.
  """
  holder, at = root, 0
  while True:
    value = holder[at][1] if isinstance(holder, Pairs) else holder[at]
    if not isinstance(value, list) or not value or (holder is not root and rng.random() < 0.3):
      return holder, at
    holder, at = value, rng.randrange(len(value))


def _some_name(rng: random.Random, root: list) -> str:
  holder, at = _choose_place(rng, root)
  return holder[at][0] if isinstance(holder, Pairs) else "a"


def _tweak(rng: random.Random, value):
  """Nearly the same value."""
  match value:
    case bool() | None:
      return rng.choice((0, 1, "true", not value))
    case int() | float():
      return rng.choice(
        (value + 1, value - 1, -value, value * 2, float(value), str(value), bool(value))
      )
    case Raw():
      return value
    case str():
      return "".join(
        edit_bytes(rng, value.encode("utf-16-le", "surrogatepass")).decode("utf-16-le", "replace")
      )[:300]
    case list():
      return type(value)(
        rng.choice((value[::-1], value[:-1], value * 2, value[1:], rng.sample(value, len(value))))
      )
  return value


def _write(value, ascii_only: bool) -> str:
  match value:
    case Raw():
      return value
    case Pairs():
      return (
        "{"
        + ", ".join(
          f"{json.dumps(n, ensure_ascii=ascii_only)}: {_write(v, ascii_only)}" for n, v in value
        )
        + "}"
      )
    case list():
      return "[" + ", ".join(_write(v, ascii_only) for v in value) + "]"
  return json.dumps(value, ensure_ascii=ascii_only)


def seal_manifest(value: dict) -> dict:
  """A checkpoint's manifest with the digest of its other fields, as whoever wants it believed would
  write it.
  """
  fields = {name: field for name, field in value.items() if name != "sha256"}
  text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
  return fields | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


# --- What a parser must not do ---

FORBIDDEN = {
  "exec",
  "compile",
  "pickle.find_class",
  "marshal.loads",
  "os.system",
  "os.exec",
  "os.fork",
  "os.posix_spawn",
}
FORBIDDEN |= {
  "subprocess.Popen",
  "socket.connect",
  "socket.getaddrinfo",
  "ctypes.dlopen",
  "os.kill",
  "os.putenv",
}
WRITES = {
  "os.remove",
  "os.rename",
  "os.mkdir",
  "os.rmdir",
  "os.link",
  "os.symlink",
  "os.truncate",
  "os.chmod",
  "os.chown",
}
WRITES |= {"os.utime", "os.setxattr", "shutil.rmtree", "shutil.move", "shutil.copyfile"}
IMPORTS = {
  "exec",
  "compile",
  "marshal.loads",
  "ctypes.dlopen",
  "socket.connect",
  "socket.getaddrinfo",
  "os.putenv",
}
_watch = {"on": False, "may_write": None, "code": False, "seen": []}


class ForbiddenError(BaseException):
  """Raised in the place of something that no file may bring about."""


def _hook(event: str, args: tuple) -> None:
  if not _watch["on"]:
    return
  if event == "open":
    path, mode, flags = args
    if isinstance(path, int):
      return  # it was opened by name before
    writes = (
      any(c in mode for c in "wax+")
      if isinstance(mode, str)
      else bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    )
    if not writes:
      return
  elif event in WRITES:
    path = args[0]
  elif event in FORBIDDEN and not (
    _watch["code"] and event in IMPORTS
  ):  # which orbax does on its own
    if event in ("exec", "compile") and sys._getframe(1).f_code.co_filename == _TYPING:
      return  # annotations of our own classes, which are text
    path = None
  else:
    return
  if path is not None and _watch["may_write"] is not None and _is_inside(path, _watch["may_write"]):
    return
  _watch["on"] = False
  _watch["seen"].append(f"{event} {str(args)[:200]}")
  raise ForbiddenError(_watch["seen"][-1])


_TYPING = sys.modules["typing"].__file__


def _is_inside(path, folder: str) -> bool:
  return isinstance(path, str | os.PathLike) and f"{os.path.realpath(path)}/".startswith(
    f"{os.path.realpath(folder)}/"
  )


@contextlib.contextmanager
def watched(may_write: str | None = None) -> Iterator[None]:
  """Nothing is executed, connected to or written in the body, but for files below `may_write`."""
  if "hook" not in _watch:
    _watch["hook"] = sys.addaudithook(_hook)
  _watch.update(on=True, may_write=may_write, seen=[])
  try:
    yield
  finally:
    _watch["on"] = False
  assert not _watch["seen"], _watch["seen"]


@contextlib.contextmanager
def watched_for_code() -> Iterator[None]:
  """As `watched`, but files may be written: no pickle finds a function in the body, and no other
  program is called.
  """
  with watched("/"):
    _watch["code"] = True
    try:
      yield
    finally:
      _watch["code"] = False


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
  """Inside of `watched`: a test writes its input."""
  on, _watch["on"] = _watch["on"], False
  try:
    yield
  finally:
    _watch["on"] = on


def write(path: Path, content: bytes) -> None:
  """Writes an input's file."""
  with unwatched():
    path.write_bytes(content)


@contextlib.contextmanager
def limited_memory(growth: int) -> Iterator[None]:
  """This process's address space may grow by so many bytes.

  Where a system does not say how large it is, by any.
  """
  try:
    import resource

    with open("/proc/self/statm") as file:
      size = int(file.read().split()[0]) * resource.getpagesize()
  except (ImportError, OSError):
    yield
    return
  before = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (size + growth, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, before)


# --- A campaign ---


@dataclasses.dataclass
class Parser:
  """What is fuzzed.

  Attributes:
    make: a random source -> an input, any value whose repr shows it.
    read: parses it and checks what came out; raises `UserError` where it is refused.
    named: what a refusal must name; None for an input without a name.
    may_write: a folder in which files may be written.
    block: bytes that it may allocate whatever the input.
  """

  make: Callable[[random.Random], bytes | str]
  read: Callable[[bytes | str], object]
  named: str | None = None
  may_write: str | None = None
  block: int = 1 << 20


@dataclasses.dataclass
class Count:
  """What a campaign saw: inputs, those taken, and refusals by their words (names, numbers and
  values left out).
  """

  name: str
  inputs: int = 0
  valid: int = 0
  slowest: float = 0.0
  largest: int = 0
  refusals: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def __str__(self) -> str:
    return (
      f"{self.name}: {self.inputs:,} inputs, {self.valid:,} valid, {len(self.refusals)} kinds of "
      "refusals, slowest "
      f"{1000 * self.slowest:.0f} ms, most memory {self.largest / 1e6:.1f} MB"
    )


def numbers(default: int = 10_000) -> range:
  """The numbers of inputs that a long campaign tries: `JGPT_FUZZ=200000`, or
  `JGPT_FUZZ=1000-2000`.
  """
  first, _, end = os.environ.get("JGPT_FUZZ", str(default)).rpartition("-")
  return range(int(first or 0), int(end))


def run_campaign(name: str, parser: Parser, numbers: range) -> Count:
  """Gives a parser the inputs of these numbers.

  Raises `AssertionError` with the first number that shows a fault.
  """
  count = Count(name)
  for number in range(5):  # what is imported late is imported now
    with contextlib.suppress(Exception):
      parser.read(parser.make(random.Random(f"{name} {number}")))
  with limited_memory(MAX_GROWTH):
    for number in numbers:
      content = parser.make(random.Random(f"{name} {number}"))
      try:
        _try_one(parser, content, count, measured=number % MEASURED == 0)
      except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
          raise
        shown = base64.b64encode(
          zlib.compress(
            content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
          )
        )
        text = f"{name!r} number {number}: {type(error).__name__}: {str(error)[:1000]}\n"
        text += f"input (base64 of zlib): {shown.decode()[:5000]}\n{content[:300]!r}"
        raise AssertionError(text) from error
  return count


def _try_one(parser: Parser, content, count: Count, *, measured: bool) -> None:
  count.inputs += 1
  if measured:
    tracemalloc.start()
  begin = time.process_time()
  try:
    with watched(parser.may_write):
      parser.read(content)
    count.valid += 1
  except UserError as error:
    _check_refusal(str(error), parser.named, count)
  finally:
    seconds = time.process_time() - begin
    peak = 0
    if measured:
      peak = tracemalloc.get_traced_memory()[1]
      tracemalloc.stop()
  if not measured:
    if seconds >= MAX_SECONDS:  # now and then it is another thread of the process, or the kernel
      seconds = min(seconds, _time_again(parser, content), _time_again(parser, content))
    count.slowest = max(count.slowest, seconds)
    assert seconds < MAX_SECONDS, f"{seconds:.1f} s for {len(content):,} bytes"
  count.largest = max(count.largest, peak)
  assert peak < parser.block + 400 * len(content), (
    f"{peak:,} bytes for an input of {len(content):,}"
  )


def _time_again(parser: Parser, content) -> float:
  """Measures the processor time of an input that seemed slow."""
  begin = time.process_time()
  with contextlib.suppress(UserError), watched(parser.may_write):
    parser.read(content)
  return time.process_time() - begin


def _check_refusal(message: str, named: str | None, count: Count) -> None:
  assert named is None or named in message, f"does not name {named}: {message[:300]!r}"
  said = message.replace(named, "") if named else message
  assert said.isprintable(), f"not one printable line: {message[:300]!r}"
  assert len(said) < MAX_MESSAGE, f"{len(said):,} characters: {message[:300]!r}"
  count.refusals[re.sub(r"'[^']*'|\"[^\"]*\"|[\d,.]+|\S*/\S*", "*", said)[:60]] += 1
