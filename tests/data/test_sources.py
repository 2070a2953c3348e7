"""Where text comes from: the order of places, digests, folders and globs, files that cannot be
read.
"""

import dataclasses
import hashlib
import os
import platform
import re
import sys
import types
from pathlib import Path

import pytest

from jgpt.config import DataConfig
from jgpt.data import download, sources
from jgpt.data.download import DownloadError
from jgpt.data.sources import (
  GPT2_FILES,
  SOURCES,
  RecordedTextError,
  Text,
  expected_vocab_size,
  find_gpt2_files,
  find_label,
  find_text,
)
from jgpt.errors import UserError
from jgpt.system.cache import PinnedFile

BUNDLED = sources.BUNDLED_DIR / "names.txt"
ORIGINAL = b"emma\nolivia\nava\n"  # stands for the 32,033 names


def sha256(content):
  return hashlib.sha256(content).hexdigest()


def data_config(**changes):
  fields = {
    "source": "names",
    "tokenizer": "characters",
    "batching": "documents",
    "seq_len": 16,
    "batch_size": 1,
  }
  return DataConfig(**fields | {"heldout_fraction": 0.0} | changes)


def real_file(name):
  """A file of the folder of real data; skips the test where it is not there."""
  path = Path(os.environ.get("JGPT_DATA_DIR") or "/nowhere", name)
  if not path.is_file():
    pytest.skip(f"$JGPT_DATA_DIR/{name} is not there to compare with")
  return path


@pytest.fixture
def places(tmp_path, monkeypatch):
  """Empty folders instead of the user's; short contents of every pinned file.

  Downloads fail and are counted.
  """
  monkeypatch.setenv("JGPT_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.setenv("JGPT_DATA_DIR", str(tmp_path / "data"))

  data, cache, mine = (tmp_path / name / "names.txt" for name in ("data", "cache", "mine"))
  gpt2 = {file.filename: f"OpenAI's {file.filename}".encode() for file in GPT2_FILES}
  places = types.SimpleNamespace(
    data=data, cache=cache, mine=mine, gpt2=gpt2, downloads=0, online=False
  )
  originals = {"names.txt": ORIGINAL, "tinyshakespeare.txt": ORIGINAL} | gpt2

  def shorten(file: PinnedFile) -> PinnedFile:
    content = originals[file.filename]
    return dataclasses.replace(file, sha256=sha256(content), num_bytes=len(content))

  def fake_download(file: PinnedFile) -> bytes:
    places.downloads += 1
    if not places.online:
      raise DownloadError(f"no download of {file.filename} (no network)")
    return originals[file.filename]

  for name in ("names", "tiny_shakespeare"):
    monkeypatch.setitem(SOURCES, name, shorten(SOURCES[name]))
  monkeypatch.setattr(sources, "GPT2_FILES", tuple(map(shorten, GPT2_FILES)))
  monkeypatch.setattr(download, "download", fake_download)
  for name in ("data", "data/gpt2", "cache", "cache/gpt2", "mine"):
    (tmp_path / name).mkdir()
  return places


# --- The order of places ---


def test_places_are_tried_in_order(places):
  """A path, $JGPT_DATA_DIR, the cache, a download, the bundled list.

  Each is taken only where those before have nothing.
  """
  places.mine.write_bytes(b"mine\n")
  places.data.write_bytes(b"of the folder\n")
  places.cache.write_bytes(ORIGINAL)
  places.online = True

  found = find_text(data_config(path=str(places.mine)))
  assert (found.kind, found.location, found.text) == ("path", str(places.mine), "mine\n")
  found = find_text(data_config())
  assert (found.kind, found.location, found.text) == (
    "JGPT_DATA_DIR",
    str(places.data),
    "of the folder\n",
  )
  places.data.unlink()
  found = find_text(data_config())
  assert (found.kind, found.location, found.text) == ("cache", str(places.cache), ORIGINAL.decode())
  assert places.downloads == 0
  places.cache.unlink()
  found = find_text(data_config())
  assert (found.kind, found.location, found.text) == (
    "download",
    SOURCES["names"].url,
    ORIGINAL.decode(),
  )
  assert (found.sha256, found.note) == (sha256(ORIGINAL), "")
  places.online = False
  found = find_text(data_config())
  assert (found.kind, found.sha256) == ("bundled", sha256(BUNDLED.read_bytes()))
  assert re.search(
    "no network.*bundled list stands in.*JGPT_DATA_DIR to a folder that has it", found.note
  )


@pytest.mark.parametrize("content", [b"emma\n", b"\xff\xfe\xfd"])
def test_damaged_cache_is_passed_over(places, content):
  """Bytes that are not the original's, UTF-8 or not, are as good as none.

  The download replaces them.
  """
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
  with pytest.raises(
    RecordedTextError,
    match=rf"names\.txt is not .* instead of {sha256(b'lost')[:12]}.*names\.txt.*JGPT_DATA_DIR",
  ):
    find_text(data_config(), sha256=sha256(b"lost"))
  assert places.downloads == 0
  with pytest.raises(
    RecordedTextError,
    match=rf"names\.txt is not .* instead of {sha256(ORIGINAL)[:12]}.*names\.txt.*JGPT_DATA_DIR",
  ):
    find_text(data_config(), sha256=sha256(ORIGINAL))


def test_recorded_file_that_has_changed_is_refused_by_name(places):
  places.mine.write_bytes(b"before\n")
  before, after = sha256(b"before\n"), sha256(b"after\n")
  config = data_config(path=str(places.mine))
  assert find_text(config, sha256=before).text == "before\n"
  places.mine.write_bytes(b"after\n")
  with pytest.raises(RecordedTextError, match=f"{places.mine}.*{after[:12]}.*{before[:12]}"):
    find_text(config, sha256=before)


# --- Files ---


def test_text_is_read_the_same_with_a_byte_order_mark_and_windows_line_ends(places):
  """Blank lines and spaces around a line do not count either.

  The digest is still that of the bytes.
  """
  plain = Text("emma\nzoë\n", "path", "", "").documents()
  for content in (
    b"emma\nzo\xc3\xab",
    b"\xef\xbb\xbfemma\r\nzo\xc3\xab\r\n",
    b"\n\n  emma\t\n \n\xc2\xa0zo\xc3\xab \n",
  ):
    places.mine.write_bytes(content)
    found = find_text(data_config(path=str(places.mine)))
    assert found.documents() == plain == ["emma", "zoë"]
    assert found.sha256 == sha256(content)


@pytest.mark.parametrize("content", [b"emma\n\xe9mile\n", b"\xff\xfee\x00m\x00", b"\xed\xa0\x80"])
def test_file_that_is_not_utf8_is_refused_by_name_with_the_byte(places, content):
  places.mine.write_bytes(content)
  where = re.search(rb"[\xe9\xff\xed]", content).start()
  with pytest.raises(
    UserError, match=rf"{places.mine} is not UTF-8 text: byte {where} is 0x{content[where]:02x}"
  ):
    find_text(data_config(path=str(places.mine)))


@pytest.mark.parametrize(
  "path", ["absent.txt", "~nobody-of-this-name/words.txt", "nul\0.txt", "\ud800.txt"]
)
def test_path_that_cannot_be_read_is_refused_by_name(path):
  with pytest.raises(UserError, match=re.escape(f"cannot read {path}: ")):
    find_text(data_config(path=path))


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A function that writes files, given as names and contents, into the current folder, and returns
  the folder.
  """
  monkeypatch.chdir(tmp_path)

  def write(contents):
    for name, content in contents.items():
      path = tmp_path / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)
    return tmp_path

  return write


def test_folder_is_its_text_files_in_the_order_of_their_paths(folder):
  """Files in folders count too, other and hidden ones do not.

  The order is the same on every system.
  """
  shown = {"texts/b.txt": b"two\n", "texts/a/z.txt": b"one\n", "texts/a-c.txt": b"zero\n"}
  folder(
    shown
    | dict.fromkeys(["texts/c.md", "texts/.hidden.txt", "texts/a/.git/x.txt", "other.txt"], b"no\n")
  )
  Path("texts/a/loop").symlink_to("..")
  Path("texts/folder.txt").mkdir()
  for path in ("texts", "texts/"):
    found = find_text(data_config(path=path))
    assert (found.text, found.kind, found.location) == (
      "zero\none\ntwo\n",
      "path",
      f"{path} (3 files)",
    )
    assert found.sha256 == sha256(b"zero\none\ntwo\n")
  Path("texts/folder.txt/d.txt").write_bytes(b"three\n")
  with pytest.raises(RecordedTextError, match=r"^texts \(4 files\) is not the text of the run"):
    find_text(data_config(path="texts"), sha256=found.sha256)


def test_glob_is_its_files_in_order(folder):
  folder(
    {
      "b.md": b"two\n",
      "a.md": b"one\n",
      "c.txt": b"no\n",
      "deep/er/d.md": b"three\n",
      "[x].md": b"brackets\n",
    }
  )
  found = find_text(data_config(path="?.md"))
  assert (found.text, found.location) == ("one\ntwo\n", "?.md (2 files)")
  assert find_text(data_config(path="**/*.md")).text == "brackets\none\ntwo\nthree\n"
  assert (
    find_text(data_config(path="[x].md")).text == "brackets\n"
  )  # a file of this name goes before a glob
  assert find_text(data_config(path="[c].txt")).location == "[c].txt (1 file)"
  for path in ("*.rst", "\0/*"):
    with pytest.raises(UserError, match=re.escape(f"no file is called {path} or matches it")):
      find_text(data_config(path=path))


def test_home_folder_is_meant_by_a_tilde(folder, monkeypatch):
  monkeypatch.setenv("HOME", str(folder({"texts/a.txt": b"one\n"})))
  monkeypatch.chdir("/")
  for path in ("~/texts", "~/texts/*.txt", "~/texts/a.txt"):
    assert find_text(data_config(path=path)).text == "one\n"


def test_files_are_joined_with_a_newline_where_one_is_missing(folder):
  """Else the last word of a file would run into the next.

  Byte order marks go, except for the digest of the first; one file keeps its own digest, and one
  that holds all of them has theirs.
  """
  folder(
    {"t/1.txt": b"\xef\xbb\xbfone", "t/2.txt": b"\xef\xbb\xbftwo\n", "t/3.txt": "drei ü".encode()}
  )
  found = find_text(data_config(path="t"))
  assert found.text == "one\ntwo\ndrei ü"
  assert found.sha256 == sha256(b"\xef\xbb\xbfone\ntwo\ndrei \xc3\xbc")
  folder({"all.txt": b"\xef\xbb\xbfone\ntwo\ndrei \xc3\xbc"})
  whole = find_text(data_config(path="all.txt"))
  assert (whole.text, whole.sha256) == (found.text, found.sha256)
  assert find_text(data_config(path="t/1*")).sha256 == find_text(data_config(path="t/1.txt")).sha256


def test_one_bad_file_of_many_is_named(folder):
  folder({"t/1.txt": b"one\n", "t/2.txt": b"tw\xf6\n"})
  with pytest.raises(UserError, match=r"t/2\.txt is not UTF-8 text: byte 2 is 0xf6"):
    find_text(data_config(path="t"))


def test_folder_without_text_files_is_refused_with_a_glob_for_others(folder):
  folder({"t/1.md": b"one\n"})
  with pytest.raises(UserError, match=r"the folder t holds no \*\.txt file.*'data\.path=t/\*'"):
    find_text(data_config(path="t"))
  assert find_text(data_config(path="t/*")).text == "one\n"


def test_unknown_source_is_refused_and_the_near_one_named():
  with pytest.raises(
    UserError, match=r"data\.source='name' is not known. Did you mean names.*data\.path=FILE"
  ):
    find_text(data_config(source="name"))


def test_vocabulary_is_known_without_reading_a_source(places):
  """Counting parameters downloads nothing; for a file of one's own the characters are counted."""
  stream = {"batching": "random"}
  assert expected_vocab_size(data_config()) == 27  # the letters and BOS
  assert expected_vocab_size(data_config(**stream)) == 27  # the letters and the newline
  assert expected_vocab_size(data_config(source="tiny_shakespeare", **stream)) == 65
  assert (
    expected_vocab_size(data_config(source="tiny_shakespeare")) == 65
  )  # BOS in the place of the newline
  assert expected_vocab_size(data_config(tokenizer="bytes", **stream)) == 256
  assert expected_vocab_size(data_config(tokenizer="bpe", bpe_vocab_size=2000, **stream)) == 2000
  assert expected_vocab_size(data_config(tokenizer="gpt2", **stream)) == 50257
  assert places.downloads == 0
  places.mine.write_bytes(b" b a\r\n\ncab\n")
  assert (
    expected_vocab_size(data_config(path=str(places.mine))) == 5
  )  # a, b, c, the space inside, BOS
  assert (
    expected_vocab_size(data_config(path=str(places.mine), **stream)) == 6
  )  # a, b, c, the space, \r, \n


def test_vocabulary_of_another_file_under_a_known_name_is_counted(places):
  """Not every names.txt is the list of names: parameters are counted for the one that is there."""
  places.data.write_bytes("Zoë\nan\n".encode())
  assert expected_vocab_size(data_config()) == 6  # Z, o, ë, a, n and BOS
  assert expected_vocab_size(data_config(batching="random")) == 6  # a newline for BOS
  places.data.write_bytes(ORIGINAL)
  assert expected_vocab_size(data_config()) == 27
  assert places.downloads == 0


def test_a_text_is_known_by_its_digest_whatever_its_path(places):
  for path in (places.mine, places.data):
    path.write_bytes(b"names of my own\n")
  assert find_label(find_text(data_config())) is None
  assert find_label(find_text(data_config(path=str(places.mine)))) is None
  for path in (places.mine, places.data):
    path.write_bytes(ORIGINAL)
  assert find_label(find_text(data_config())) == "names"
  assert find_label(find_text(data_config(path=str(places.mine)))) == "names"
  bundled = BUNDLED.read_bytes()
  places.mine.write_bytes(bundled)
  assert find_label(find_text(data_config(path=str(places.mine)))) == "names (bundled)"
  places.mine.write_bytes(bundled + b"zoe\n")
  assert find_label(find_text(data_config(path=str(places.mine)))) is None
  for source in ("hamlet", "python_docs"):
    assert find_label(find_text(data_config(source=source))) == source


def test_vocabulary_of_texts_that_are_made_is_counted(places):
  for source in ("hamlet", "python_docs"):
    text = find_text(data_config(source=source))
    for batching, num_ids in (
      ("random", len(set(text.text))),
      ("documents", len(set("".join(text.documents()))) + 1),
    ):
      assert expected_vocab_size(data_config(source=source, batching=batching)) == num_ids
  assert expected_vocab_size(data_config(source="hamlet", batching="random")) == 28


# --- Texts that every installation has ---


def test_hamlet_is_a_newline_and_six_lines_fifty_times(places):
  found = find_text(data_config(source="hamlet"))
  assert (found.kind, found.location) == ("built in", "six lines of Hamlet, 50 times")
  assert len(found.text) == 12_300
  assert found.sha256 == "76c9e2d6fe0f51f9415913321e69b05948049428d9885bddd97a6353d34e6853"
  assert found.text == found.text[:246] * 50
  assert found.text.startswith("\nTo be or not to be that is the question\nWhether tis nobler")
  assert find_text(data_config(source="hamlet"), sha256=found.sha256) == found


def test_python_docs_are_pythons_own(places):
  """Its length differs between versions of Python, and the version is named."""
  found = find_text(data_config(source="python_docs"))
  assert (found.kind, found.location) == (
    "Python's documentation",
    f"Python {platform.python_version()}",
  )
  assert 300_000 < len(found.text) < 1_000_000
  assert 'The "assert" statement' in found.text
  assert found.sha256 == sha256(found.text.encode())


def test_python_docs_of_another_python_are_refused(places):
  """A run that began under one version cannot go on with another's text: the message says which
  this is.
  """
  here = re.escape(f"Python {platform.python_version()} is not the text of the run")
  with pytest.raises(RecordedTextError, match=f"{here}.*abcdefabcdef.*versions"):
    find_text(data_config(source="python_docs"), sha256="abcdef" * 10)


def test_python_without_its_documentation_is_said(places, monkeypatch):
  monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
  with pytest.raises(UserError, match=r"lacks its pydoc_data.*data\.path= names"):
    find_text(data_config(source="python_docs"))


# --- Texts and files that nothing stands in for ---


def test_text_that_is_nowhere_is_refused_with_what_to_do(places):
  """Which file to put where, its address, and a text that is always there."""
  with pytest.raises(
    UserError,
    match=r"no download of tinyshakespeare\.txt \(no network\)\. Save "
    r"https://raw\.\S*/input\.txt as tinyshakespeare\.txt "
    r"in a folder and set JGPT_DATA_DIR to the folder, or .*\. Try --set data\.source=python_docs",
  ):
    find_text(data_config(source="tiny_shakespeare"))
  with pytest.raises(
    UserError, match="JGPT_DATA_DIR"
  ) as refusal:  # a run that has begun cannot take another text
    find_text(data_config(source="tiny_shakespeare"), sha256=sha256(ORIGINAL))
  assert "python_docs" not in str(refusal.value)
  with pytest.raises(
    RecordedTextError,
    match=rf"SHA-256 {sha256(b'lost')[:12]} was found.*tinyshakespeare\.txt.*JGPT_DATA_DIR",
  ):
    find_text(data_config(source="tiny_shakespeare"), sha256=sha256(b"lost"))


def test_text_of_ones_own_in_the_place_of_tiny_shakespeare(places):
  (places.data.parent / "tinyshakespeare.txt").write_bytes(b"short\n")
  found = find_text(data_config(source="tiny_shakespeare"))
  assert (found.kind, found.text) == ("JGPT_DATA_DIR", "short\n")


def test_known_characters_of_tiny_shakespeare_are_its_own():
  content, source = real_file("tinyshakespeare.txt").read_bytes(), SOURCES["tiny_shakespeare"]
  assert (sha256(content), len(content)) == (source.sha256, source.num_bytes)
  assert set(content.decode()) == set(source.chars)


def test_gpt2_files_are_looked_for_in_order(places):
  """$JGPT_DATA_DIR/gpt2, the cache, a download: each file for itself.

  A damaged file in the cache is as good as none.
  """
  encoder_json, vocab_bpe = places.gpt2
  places.online = True
  (places.cache.parent / encoder_json).write_bytes(b"damaged")
  assert find_gpt2_files() == tuple(places.gpt2.values())
  assert places.downloads == 2
  (places.cache.parent / encoder_json).write_bytes(places.gpt2[encoder_json])
  assert find_gpt2_files() == tuple(places.gpt2.values())
  assert places.downloads == 3
  (places.data.parent / vocab_bpe).write_bytes(places.gpt2[vocab_bpe])
  assert find_gpt2_files() == tuple(places.gpt2.values())
  assert places.downloads == 3


def test_gpt2_file_of_the_users_that_is_another_is_refused_by_name(places):
  """Other merges would be another tokenizer under GPT-2's name."""
  wrong = places.data.parent / "gpt2/vocab.bpe"
  wrong.write_bytes(b"#version: 0.2\n")
  places.online = True
  with pytest.raises(
    UserError,
    match=rf"{wrong} is not GPT-2's: its SHA-256 is {sha256(wrong.read_bytes())[:12]}, not ",
  ):
    find_gpt2_files()


def test_gpt2_files_that_are_nowhere_are_refused_with_what_to_do(places):
  with pytest.raises(
    UserError,
    match=r"no download of gpt2/encoder\.json \(no network\)\. Save https://\S*/encoder\.json "
    r"as gpt2/encoder\.json and "
    r"https://\S*/vocab\.bpe as gpt2/vocab\.bpe in a folder and set JGPT_DATA_DIR to the folder",
  ):
    find_gpt2_files()


def test_gpt2_files_of_the_data_folder_are_openais():
  assert real_file("gpt2/encoder.json").parent == real_file("gpt2/vocab.bpe").parent
  assert [len(content) for content in find_gpt2_files()] == [file.num_bytes for file in GPT2_FILES]


# --- The bundled list ---


def test_bundled_list_is_as_clean_as_the_original():
  """At least 4,000 distinct names of 2 to 15 letters a-z, sorted, so that it stands in for the
  original.
  """
  names = BUNDLED.read_text(encoding="ascii").splitlines()
  assert len(names) >= 4000
  assert names == sorted(set(names))
  assert [name for name in names if not re.fullmatch("[a-z]{2,15}", name)] == []
  assert set("\n".join(names)) == set(SOURCES["names"].chars)


def test_bundled_names_are_names():
  """70% of them and more stand in the original, where that is at hand."""
  original = real_file("names.txt").read_bytes()
  assert (sha256(original), len(original)) == (SOURCES["names"].sha256, SOURCES["names"].num_bytes)
  known = set(original.decode().split())
  names = BUNDLED.read_text(encoding="ascii").split()
  assert sum(name in known for name in names) >= 0.7 * len(names)
