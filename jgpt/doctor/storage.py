"""Checks of folders: the caches, the texts and the tokenizer of experiments, the folder of runs.

Whether files are there and undamaged, who can write to them, and how much room is left. No network
is used, and nothing is left behind. Run folders are checked in `soundness.py`. Imports no jax.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from jgpt.data import sources
from jgpt.data.download import FAILURE_SECONDS
from jgpt.data.sources import GPT2_FILES, SOURCES, PinnedText
from jgpt.doctor.findings import Finding, format_bytes, note, ok, problem
from jgpt.system.cache import PinnedFile, cache_dir

# Three checkpoints of gpt2_shakespeare take 4.5 GB, those of names 0.1 MB each.
FULL_BYTES, NEARLY_FULL_BYTES = 1e8, 3e9
LARGE_BYTES = 5e9  # of a cache
MAX_ENTRIES = 100_000  # files that are listed in a cache
MAX_CHECKED_BYTES = 2**30  # of compiled programs that are read
DIGEST_BLOCK_BYTES = 2**18
OLD_SECONDS = 3600  # no process still writes a temporary file of this age
ZLIB, ZSTD = b"\x78", b"\x28\xb5\x2f\xfd"  # first bytes of a program compressed by jax


# --- The cache of compiled programs ---


def examine_caches(env: Mapping[str, str]) -> list[Finding]:
  """Examines whether the caches can be used, and whether compiled programs are undamaged.

  Args:
    env: JGPT_CACHE_DIR, JAX_COMPILATION_CACHE_DIR and its minimum compile time are read.
  """
  folder = _find_cache_dir()
  if folder is None:
    text = (
      "there is no folder for caches: neither HOME nor JGPT_CACHE_DIR is set, and this user has no "
      "home"
    )
    return [problem("cache", text, "set JGPT_CACHE_DIR to a folder of yours")]
  found = []
  if not folder.is_absolute():
    text = f"{folder} is relative: every folder that you work in has a cache of its own"
    found.append(note("cache", text, "set JGPT_CACHE_DIR to a folder of yours, beginning with /"))
  own = env.get("JAX_COMPILATION_CACHE_DIR")
  if own and "://" in own:
    return [*found, ok("cache", f"{own} (JAX_COMPILATION_CACHE_DIR): not looked at")]
  compiled = Path(own) if own else folder / "compiled"
  for place in [compiled] if own else [folder, compiled]:
    if (wrong := _find_obstacle(place, own is not None)) is not None:
      return [*found, wrong]
  if own and "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in env:
    text = (
      "with a JAX_COMPILATION_CACHE_DIR of your own, jax keeps only what took a second to compile"
    )
    found.append(note("cache", text, "set JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 too"))
  return [*found, *examine_programs(compiled)]


def _find_cache_dir() -> Path | None:
  """Returns `cache_dir`, or None for a user without a home."""
  try:
    return cache_dir()
  except RuntimeError:
    return None


def _find_obstacle(folder: Path, is_own: bool) -> Finding | None:
  """Returns the problem of a cache folder that cannot be used, or None."""
  instead = "JAX_COMPILATION_CACHE_DIR" if is_own else "JGPT_CACHE_DIR"
  another = f"set {instead} to a folder that you can write"
  try:
    info = folder.stat()
  except FileNotFoundError:
    reason = explain_unwritable(_find_existing(folder))
    return reason and problem(
      "cache", f"{folder} cannot be made: {reason}. Everything is compiled anew each time", another
    )
  except OSError as error:
    return problem(
      "cache", f"{folder}: {error.strerror}. Everything is compiled anew each time", another
    )
  if not stat.S_ISDIR(info.st_mode):
    return problem(
      "cache",
      f"{folder} is no folder. Everything is compiled anew each time",
      f"rename it, or {another}",
    )
  if reason := explain_unwritable(folder):
    return problem(
      "cache", f"{folder} cannot be written: {reason}. Nothing new is kept there", another
    )
  if not hasattr(os, "getuid"):
    return None
  mode, quoted = stat.S_IMODE(info.st_mode), shlex.quote(str(folder))
  effect = "who writes compiled programs runs code as you" + (
    "" if is_own else ", so jgpt keeps none there"
  )
  if info.st_uid != os.getuid():
    text = f"{folder} belongs to user {info.st_uid}, and you are {os.getuid()}: {effect}"
    return problem("cache", text, f"set {instead} to a folder of your own")
  if mode & 0o022:
    return problem(
      "cache",
      f"{folder} can be written by others (mode {mode:04o}): {effect}",
      f"chmod 700 {quoted}",
    )
  return None


def examine_programs(folder: Path) -> list[Finding]:
  """Examines whether compiled programs can be read; jax never replaces those that cannot."""
  if not folder.is_dir():
    return examine_room(folder, "cache", f"{folder} is made by the first run")
  files = [file for file in list_folder(folder) if file.name.endswith("-cache")]
  total, checked, damaged, last = 0, 0, [], 0.0
  for file in files:
    with contextlib.suppress(OSError):  # the file may be deleted meanwhile
      info = file.lstat()
      total, last = total + info.st_size, max(last, info.st_mtime)
      if checked < MAX_CHECKED_BYTES:
        checked += info.st_size
        if reason := find_program_damage(file):
          damaged.append((file, reason))
  text = f"{folder}: {len(files):,} compiled programs, {format_bytes(total)}"
  text += f", the newest {format_age(time.time() - last)} old" if files else ""
  found = examine_room(folder, "cache", text)
  if damaged:
    quoted = " ".join(shlex.quote(str(file)) for file, _ in damaged[:5])
    first = f"{damaged[0][0].name} {damaged[0][1]}"
    text = f"{len(damaged)} of them cannot be read and are compiled anew each time: {first}"
    do = (
      f"rm {quoted}"
      if len(damaged) <= 5
      else f"rm -r {shlex.quote(str(folder))} (it is filled again)"
    )
    found.append(problem("cache", text, do))
  if total > LARGE_BYTES:
    do = f"rm -r {shlex.quote(str(folder))} (it is filled again)"
    found.append(
      note(
        "cache",
        f"{format_bytes(total)} of compiled programs; those of older versions are never deleted",
        do,
      )
    )
  return found


def find_program_damage(file: Path) -> str | None:
  """Returns what is wrong with a compiled program's file, or None; uses little memory."""
  try:
    with open(file, "rb") as stream:
      first = stream.read(DIGEST_BLOCK_BYTES)
      if not first:
        return "is empty"
      if first.startswith(ZSTD):
        return None  # Python before 3.14 cannot decompress it
      if not first.startswith(ZLIB):
        return "is no compiled program"
      reader, block = zlib.decompressobj(), first
      out = b"any"
      while not reader.eof and (block or out):
        out = reader.decompress(block, DIGEST_BLOCK_BYTES)
        block = reader.unconsumed_tail or stream.read(DIGEST_BLOCK_BYTES)
      return None if reader.eof else "is cut off"
  except zlib.error:
    return "is damaged"
  except OSError as error:
    return f"cannot be read ({error.strerror})"


# --- Downloads ---


def examine_downloads(now: float) -> list[Finding]:
  """Examines what downloads left in jgpt's cache: recorded failures, parts, temporary files.

  Args:
    now: seconds since 1970.
  """
  found, folder = [], _find_cache_dir()
  for file in list_folder(folder, skip="compiled") if folder else ():
    with contextlib.suppress(OSError):  # the file may be deleted meanwhile
      info, name, quoted = file.lstat(), str(file.relative_to(folder)), shlex.quote(str(file))
      age = now - info.st_mtime
      if name.endswith(".failed") and 0 <= age < FAILURE_SECONDS:
        minutes = max(1, round((FAILURE_SECONDS - age) / 60))
        text = (
          f"{name.removesuffix('.failed')}: a download failed {format_age(age)} ago, the next is "
          f"tried in {minutes} minutes"
        )
        found.append(note("downloads", text, f"for another try at once: rm {quoted}"))
      elif name.endswith(".partial"):
        text = (
          f"{name}: {format_bytes(info.st_size)} of a download that broke off; the same command "
          "fetches the rest"
        )
        found.append(note("downloads", text, f"where it is not wanted any more: rm {quoted}"))
      elif age > OLD_SECONDS and (name.endswith(".part") or file.name.startswith(".")):
        text = f"{name}: {format_bytes(info.st_size)} of a process that was killed"
        found.append(note("downloads", text, f"rm {quoted}"))
  return found


def examine_compiler_record() -> list[Finding]:
  """Examines canary.json, in which runs record the compilers that `compare_once` found right."""
  folder = _find_cache_dir()
  path = folder / "canary.json" if folder else None
  if path is None or not path.exists():
    return [ok("compiler", "no run has checked it yet; here it is checked at once")]
  try:
    content = json.loads(path.read_bytes())
    lines = [f"{compiler}: the worst by {worst}" for compiler, worst in content.items()]
  except (OSError, ValueError, AttributeError, RecursionError):
    text = f"{path}, where runs keep what they found, cannot be read: the next run checks again"
    return [note("compiler", text, f"rm {shlex.quote(str(path))}")]
  return [
    ok(
      "compiler",
      f"runs have found it right {len(lines)} times, the last time {''.join(lines[-1:])}",
    )
  ]


# --- Texts ---


def examine_data(env: Mapping[str, str]) -> list[Finding]:
  """Examines where the text of each known source, and GPT-2's tokenizer, would be read.

  Args:
    env: JGPT_DATA_DIR is read.
  """
  found = []
  own = env.get("JGPT_DATA_DIR")
  if own and not os.path.isdir(os.path.expanduser(own)):
    text = f"JGPT_DATA_DIR={own} is no folder: nothing is found there"
    found.append(problem("data", text, "make it, or unset JGPT_DATA_DIR"))
  for name, source in SOURCES.items():
    found.append(_locate(name, source) if isinstance(source, PinnedText) else _examine_made(name))
  tokenizer = [_locate("GPT-2's tokenizer", file) for file in GPT2_FILES]
  return [*found, *([tokenizer[0]] if tokenizer[0] == tokenizer[1] else tokenizer)]


def _examine_made(name: str) -> Finding:
  if name == "python_docs" and importlib.util.find_spec("pydoc_data") is None:
    return note(
      "data",
      "python_docs: this Python lacks its pydoc_data",
      "for the experiment `text`: --set data.path=FILE",
    )
  return ok("data", f"{name}: {SOURCES[name].kind}, {SOURCES[name].location}")


def _locate(name: str, file: PinnedFile) -> Finding:
  """Finds where a file would be read: JGPT_DATA_DIR, the cache, the package, or a download."""
  where = f"{name}: " if isinstance(file, PinnedText) else f"{name}, {file.filename}: "
  if own := sources.find_user_file(file):
    digest = _compute_digest(own)
    if digest is None:
      return problem(
        "data", f"{where}{own} cannot be read", "mend its permissions, or unset JGPT_DATA_DIR"
      )
    if digest == file.sha256:
      return ok("data", f"{where}{own} (JGPT_DATA_DIR), the original")
    text = (
      f"{where}{own} (JGPT_DATA_DIR) is not the original: its SHA-256 is {digest[:12]}, not "
      f"{file.sha256[:12]}"
    )
    if isinstance(file, PinnedText):
      return note(
        "data",
        f"{text}. It is taken all the same, and losses are not those that experiments expect",
      )
    return problem("data", text, f"s{sources.describe_manual_download(file)[1:]}")
  folder = _find_cache_dir()
  cached = folder / file.filename if folder else None
  digest = _compute_digest(cached) if cached else None
  if digest == file.sha256:
    return ok("data", f"{where}{cached}")
  damaged = f"{cached} is damaged; " if digest is not None else ""
  if file.bundled:
    return ok(
      "data",
      f"{where}{damaged}a download of {format_bytes(file.num_bytes)}, or else the list that comes "
      "with jgpt",
    )
  size = format_bytes(file.num_bytes)
  text = f"{where}{damaged}not here; the first run that needs it downloads {size}"
  advice = sources.describe_manual_download(file)
  return note("data", text, f"where there is no network: s{advice[1:]}")


def _compute_digest(path: Path) -> str | None:
  """Computes the SHA-256 of a file; None where it is missing or not readable."""
  try:
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError:
    return None


# --- Room ---


def examine_runs_folder(folder: Path) -> list[Finding]:
  """Examines whether runs can be written to `runs/` in a folder, and how much room there is."""
  runs = folder / "runs"
  place = runs if runs.exists() else folder
  if runs.exists() and not runs.is_dir():
    return [
      problem(
        "run folders",
        f"{runs} is no folder, and runs are kept in it",
        "rename it, or choose a --workdir",
      )
    ]
  if reason := explain_unwritable(place):
    text = f"{place} cannot be written: {reason}"
    return [problem("run folders", text, "choose a --workdir that can, or go to another folder")]
  return examine_room(place, "run folders", str(runs))


def examine_room(folder: Path, topic: str, text: str) -> list[Finding]:
  """Examines whether a folder's disk has room.

  Args:
    folder: may be missing.
    topic: of the findings.
    text: of the finding, before the room.
  """
  place = _find_existing(folder)
  try:
    free = shutil.disk_usage(place).free
    files = os.statvfs(place) if hasattr(os, "statvfs") else None
  except OSError as error:
    return [note(topic, f"{text}; how much room there is cannot be told ({error.strerror})")]
  do = f"make room on the disk of {place}, or choose another one"
  if free < FULL_BYTES:
    return [
      ok(topic, text),
      problem(topic, f"{format_bytes(free)} are free there: what is written may be lost", do),
    ]
  if files and files.f_files and not files.f_favail:
    return [
      ok(topic, text),
      problem(topic, "no more files can be made there: the disk has none left (inodes)", do),
    ]
  if free < NEARLY_FULL_BYTES:
    return [
      note(
        topic,
        f"{text}; {format_bytes(free)} are free there, and a checkpoint of gpt2_shakespeare takes "
        "1.5 GB",
      )
    ]
  return [ok(topic, f"{text}; {format_bytes(free)} free there")]


def explain_unwritable(folder: Path) -> str | None:
  """Returns why a folder cannot be written to, or None; tries it with a temporary file."""
  try:
    with tempfile.TemporaryFile(dir=folder) as file:
      file.write(bytes(DIGEST_BLOCK_BYTES))
      file.flush()
    return None
  except OSError as error:
    return error.strerror or str(error)


def _find_existing(folder: Path) -> Path:
  """Returns the folder, or the nearest one above it that exists."""
  folder = Path(os.path.abspath(folder))
  return next((place for place in (folder, *folder.parents) if os.path.lexists(place)), folder)


def list_folder(folder: Path, skip: str = "") -> Iterator[Path]:
  """Yields the files in a folder and in those below it, at most `MAX_ENTRIES`.

  Links are not followed. A folder that is missing or not readable has no files.

  Args:
    folder: any path.
    skip: name of a folder in it that is skipped.
  """
  count = 0
  for root, folders, files in os.walk(folder):
    if Path(root) == folder and skip in folders:
      folders.remove(skip)
    for name in sorted(files):
      if (count := count + 1) > MAX_ENTRIES:
        return
      yield Path(root, name)


def format_age(seconds: float) -> str:
  """Formats a time span: "40 seconds", "5 minutes", "3 days"."""
  for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
    if seconds >= size:
      count = int(seconds // size)
      return f"{count} {unit}{'s'[: count != 1]}"
  return f"{max(0, int(seconds))} seconds"
