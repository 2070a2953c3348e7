"""Token files: headers, ids, several files as one stream, writing.

Which files a path names, and what their ids mean.
"""

import dataclasses
import hashlib
import io
import json
import pickle
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgpt.config import DataConfig
from jgpt.data import paths
from jgpt.data import token_files as shards
from jgpt.data.token_files import (
  TokenFiles,
  check_files,
  check_ids,
  id_bytes,
  open_files,
  parse_header,
  read_header,
  write_tokens,
)
from jgpt.errors import UserError
from jgpt.system import files
from jgpt.text.bpe import BpeTokenizer
from jgpt.text.tokenizer import ByteTokenizer, CharTokenizer
from jgpt.text.tokenizer_files import hugging_face_files

ENGLISH = [15496, 995, 11, 262, 286, 198, 290, 50256]  # ids of GPT-2's
GPT2_SIZE = 50257


def header(magic=20240520, version=1, count=4):
  return struct.pack("<256i", magic, version, count, *[0] * 253)


def file16(ids):
  return header(count=len(ids)) + struct.pack(f"<{len(ids)}H", *ids)


def file32(ids):
  return header(20240801, 7, len(ids)) + struct.pack(f"<{len(ids)}I", *ids)


def save_npy(value):
  target = io.BytesIO()
  np.save(target, value)
  return target.getvalue()


# --- Headers ---


@pytest.mark.parametrize(
  ("content", "offset", "bits"),
  [
    (file16(ENGLISH), 1024, 16),
    (file32([*ENGLISH[:-1], 128_000]), 1024, 32),
    (struct.pack("<8H", *ENGLISH), 0, 16),
    (struct.pack("<1H", 7), 0, 16),
    (struct.pack("<512H", *[0] * 512)[:60], 0, 16),
  ],
)
def test_ids_are_found_behind_either_header_and_without_one(folder, content, offset, bits):
  (path,) = folder({"a.bin": content})
  found = read_header(path)
  ids = np.frombuffer(content[offset:], f"<u{bits // 8}")
  assert (found.offset, found.dtype.itemsize, found.count) == (offset, bits // 8, len(ids))
  np.testing.assert_array_equal(open_files([found]).read(0, len(ids)), ids)


MALFORMED = {
  "nothing at all": (b"", r"is empty: a token file needs at least 1 id"),
  "an odd byte": (
    struct.pack("<9H", *ENGLISH, 1) + b"\1",
    r"has 19 bytes, and ids of 16 bits .* even number",
  ),
  "a cut header": (header()[:600], r"has 600 bytes, and its header alone needs 1,024"),
  "another version": (
    header(version=2) + bytes(8),
    r"has version 2 in its header, and magic 20240520 needs version 1",
  ),
  "version of the other": (
    header(20240801, 1) + bytes(16),
    r"has version 1 .* magic 20240801 needs version 7",
  ),
  "no ids": (header(count=0), r"has count 0 in its header, and needs at least 1"),
  "a negative count": (header(count=-4) + bytes(8), r"has count -4 in its header"),
  "too few bytes": (
    header(count=5) + bytes(8),
    r"has count 5 .*makes 1,034 bytes, and has 1,032: it is cut",
  ),
  "too many bytes": (
    header(count=3) + bytes(8),
    r"has count 3 .*makes 1,030 bytes, and has 1,032: it is damaged",
  ),
  "a huge count": (header(count=2**31 - 1) + bytes(8), r"has count 2,147,483,647 .*cut"),
  "ids of another width": (
    header(count=4) + struct.pack("<4I", 1, 2, 3, 4),
    r"has count 4 .*makes 1,032 .*has 1,040",
  ),
  "a damaged magic": (
    header(magic=20240521) + bytes(8),
    r"has magic 20240521 in its header and must have 20240520 or 2",
  ),
  "big-endian": (
    struct.pack(">256i", 20240520, 1, 4, *[0] * 253) + bytes(8),
    r"big-endian order, and little-endian",
  ),
  "weights": (header(20240326, 3) + bytes(8), r"is llm\.c's weights"),
  "debug state": (header(20240327, 2) + bytes(8), r"is llm\.c's debug state"),
  "a tokenizer": (header(20240328, 2) + bytes(8), r"is llm\.c's tokenizer"),
  "questions": (header(20240522, 1) + bytes(8), r"is llm\.c's questions for an evaluation"),
  "text": (
    b"First Citizen:\nBefore we proceed any further\n",
    r"is text\. Give a text a name that does not end in \.bin",
  ),
  "long text": ("Größe, 漢字 😀. ".encode() * 400, r"is text"),
  "a pickle": (pickle.dumps([*ENGLISH] * 50), r"is a pickle"),
  "an old pickle": (
    pickle.dumps({"ids": ENGLISH, "name": "x" * 9}, protocol=2) + b".",
    r"is a pickle",
  ),
  "a pickled array": (pickle.dumps(np.array(ENGLISH * 50)), r"is a pickle"),
  "an array": (save_npy(np.array(ENGLISH, np.uint16)), r"is a NumPy array"),
  "a zip archive": (b"PK\x03\x04" + bytes(96), r"is a zip archive"),
  "gzip": (b"\x1f\x8b\x08\x00" + bytes(range(96)), r"is compressed by gzip"),
  "32 bits without a header": (
    struct.pack("<32I", *range(1000, 1032)),
    r"an id of 0 in every second place",
  ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_in_one_line_that_names_them(folder, name):
  content, complaint = MALFORMED[name]
  (path,) = folder({"train.bin": content})
  with pytest.raises(UserError, match=rf"^train\.bin .*{complaint}") as raised:
    read_header(path)
  assert "\n" not in str(raised.value) and "jgpt.prepare" in str(raised.value)


def test_absent_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r"cannot read .*absent\.bin: No such file"):
    read_header(tmp_path / "absent.bin")


@pytest.mark.parametrize(
  "first", [35615, 640, 896, 1152, 1408, 19280]
)  # begin like gzip, pickles and zip archives
def test_ids_that_begin_like_another_file_are_ids(first):
  content = struct.pack("<65H", first, *ENGLISH * 8)
  assert parse_header(Path("a"), content, len(content)).count == 65


@given(st.binary(max_size=1100), st.integers(0, 10_000))
@settings(max_examples=100)
def test_any_bytes_are_ids_or_refused_in_one_line(content, more):
  size = len(content) + (more if len(content) >= 1024 else 0)
  try:
    found = parse_header(Path("a.bin"), content[:1024], size)
  except UserError as error:
    assert str(error).startswith("a.bin ") and "\n" not in str(error)
  else:
    assert found.count >= 1 and found.offset + found.count * found.dtype.itemsize == size


@given(
  st.sampled_from([20240520, 20240801]),
  st.integers(0, 11),
  st.integers(1, 255),
  st.integers(1, 10**6),
)
@settings(max_examples=100)
def test_one_wrong_byte_in_the_fields_of_a_header_never_goes_unseen(magic, place, change, count):
  version, size = {20240520: (1, 2), 20240801: (7, 4)}[magic]
  head = bytearray(header(magic, version, count))
  assert parse_header(Path("a"), bytes(head), 1024 + size * count).count == count
  head[place] ^= change
  with pytest.raises(UserError):
    parse_header(Path("a"), bytes(head), 1024 + size * count)


@given(st.integers(4, 1031))
@settings(max_examples=50)
def test_a_file_cut_anywhere_is_refused(length):
  content = file16([1, 2, 3, 4])[:length]
  with pytest.raises(UserError, match="cut"):
    parse_header(Path("a"), content[:1024], length)


# --- Ids ---


@pytest.mark.parametrize(
  ("write", "offset"), [(file16, 1024), (file32, 1024), (lambda ids: file16(ids)[1024:], 0)]
)
@pytest.mark.parametrize("place", [0, 6, 7, 8, 20])
def test_an_id_beyond_the_vocabulary_is_named_with_its_place(
  folder, monkeypatch, write, offset, place
):
  monkeypatch.setattr(
    shards, "CHECK_BLOCK_BYTES", 16
  )  # places before, at and after the border of what is read at once
  ids = [5] * 21
  ids[place] = 100
  (path,) = folder({"a.bin": write(ids)})
  file = read_header(path)
  with pytest.raises(
    UserError, match=rf"^a\.bin has id 100 at position {place}, .* below 100.*data\.tokenizer"
  ):
    check_ids(file, 100)
  assert check_ids(file, 101) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_grows_or_goes_meanwhile_is_named(folder):
  (path,) = folder({"a.bin": struct.pack("<8H", *ENGLISH)})
  file = read_header(path)
  path.write_bytes(path.read_bytes() * 2)
  with pytest.raises(UserError, match=r"a\.bin had 8 ids, and 16 when they were read"):
    check_ids(file, GPT2_SIZE)
  path.unlink()
  with pytest.raises(UserError, match=r"cannot read a\.bin"):
    check_ids(file, GPT2_SIZE)


def test_digest_is_of_contents_order_and_part_and_not_of_names(folder):
  contents = [file16([1, 2]), file16([3]), file16([4, 5, 6])]
  one, two, three = map(
    read_header, folder(dict(zip(["a.bin", "b.bin", "c.bin"], contents, strict=True)))
  )
  hashes = [hashlib.sha256(content).hexdigest() for content in contents]
  expected = hashlib.sha256(json.dumps([hashes[:2], hashes[2:]]).encode()).hexdigest()
  assert check_files([one, two], [three], 10) == expected
  (renamed,) = map(read_header, folder({"z.bin": contents[0]}))
  assert check_files([renamed, two], [three], 10) == expected
  others = {
    check_files(*parts, 10)
    for parts in (([two, one], [three]), ([one, two, three], []), ([one], [two, three]))
  }
  assert len(others | {expected}) == 4
  with pytest.raises(UserError, match=r"c\.bin has id 6"):
    check_files([one, two], [three], 6)


def test_checking_takes_no_more_memory_than_a_block(tmp_path):
  """64 MB are checked by a process that grows by less than 24 MB."""
  if not Path("/proc/self/status").exists():
    pytest.skip("this system does not say how much memory a process took at most")
  np.arange(32_000_000, dtype="<u2").tofile(tmp_path / "a.bin")
  code = """if True:
    import re, sys
    from pathlib import Path
    from jgpt.data.token_files import check_files, read_header
    file = read_header(Path(sys.argv[1]))
    peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
    before = peak()
    check_files([file], [], 65536)
    print(peak() - before)
  """
  done = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path / "a.bin")],
    capture_output=True,
    text=True,
    check=True,
  )
  assert int(done.stdout) / 1024 < 24


# --- Several files as one stream ---


@given(
  st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=5),
  st.data(),
)
@settings(max_examples=60)
def test_read_is_that_of_the_joined_ids(parts, data):
  whole = np.concatenate([np.array(part, np.int32) for part in parts])
  maps = tuple(np.array(part, np.uint16 if n % 2 else np.uint32) for n, part in enumerate(parts))
  stream = TokenFiles(maps, np.cumsum([len(part) for part in parts], dtype=np.int64))
  assert len(stream) == len(whole)
  start = data.draw(st.integers(0, len(whole)))
  stop = data.draw(st.integers(start, len(whole)))
  got = stream.read(start, stop)
  np.testing.assert_array_equal(got, whole[start:stop])
  assert got.dtype == np.int32


def test_places_outside_the_stream_are_refused_and_nothing_is_clamped(folder):
  stream = open_files(
    [read_header(path) for path in folder({"a.bin": file16([1, 2]), "b.bin": file32([3, 70_000])})]
  )
  np.testing.assert_array_equal(stream.read(0, 4), [1, 2, 3, 70_000])
  for start, stop in ((-1, 2), (3, 2), (0, 5)):
    with pytest.raises(IndexError):
      stream.read(start, stop)
  assert len(open_files([])) == 0 and len(open_files([]).read(0, 0)) == 0


# --- Writing ---


@pytest.mark.parametrize(
  ("vocab_size", "expected"), [(50257, file16), (65536, file16), (65537, file32), (256, file16)]
)
def test_writer_writes_llm_cs_bytes_and_the_vocabulary_chooses_the_width(
  tmp_path, vocab_size, expected
):
  ids = [0, 1, 255, vocab_size - 1, 7]
  path = tmp_path / "a.bin"
  with write_tokens(path, vocab_size) as writer:
    writer.append(np.array(ids[:2], np.uint32))
    writer.append(np.array([], np.int64))
    writer.append(np.array(ids[2:], np.int64))
    assert writer.count == 5 and not path.exists()
  assert path.read_bytes() == expected(ids)
  assert id_bytes(vocab_size) == (len(expected(ids)) - 1024) // 5
  assert files.digest_file(path) == hashlib.sha256(expected(ids)).hexdigest()


@given(st.lists(st.lists(st.integers(0, 70_000)), max_size=5), st.sampled_from([65_536, 70_001]))
@settings(max_examples=40)
def test_what_is_written_is_read(tmp_path_factory, blocks, vocab_size):
  blocks = [[i % vocab_size for i in block] for block in blocks] + [[1]]
  path = tmp_path_factory.mktemp("tokens") / "a.bin"
  with write_tokens(path, vocab_size) as writer:
    for block in blocks:
      writer.append(np.array(block, np.int32))
  ids = [i for block in blocks for i in block]
  np.testing.assert_array_equal(open_files([read_header(path)]).read(0, len(ids)), ids)


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / "a.bin"
  path.write_bytes(b"old")
  with pytest.raises(ZeroDivisionError), write_tokens(path, 256) as writer:
    writer.append(np.array([1, 2]))
    1 / 0  # noqa: B018
  assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ids", [[256], [-1], [0, 2**40]])
def test_an_id_that_does_not_fit_is_never_written(tmp_path, ids):
  with (
    pytest.raises(ValueError, match="of a vocabulary of 256"),
    write_tokens(tmp_path / "a.bin", 256) as writer,
  ):
    writer.append(np.array(ids, np.int64))
  assert not list(tmp_path.iterdir())


# --- Which files a path names ---


@pytest.mark.parametrize(
  ("name", "part"),
  [
    *(
      ("val.bin", "heldout"),
      ("tiny_shakespeare_val.bin", "heldout"),
      ("fineweb_val_000000.bin", "heldout"),
    ),
    *(
      ("a-valid-1.bin", "heldout"),
      ("VALIDATION.bin", "heldout"),
      ("x.val.bin", "heldout"),
      ("train_val.bin", "heldout"),
    ),
    *(
      ("train.bin", "train"),
      ("validated.bin", "train"),
      ("ovals.bin", "train"),
      ("val1.bin", "train"),
    ),
    *(
      ("carnival.bin", "train"),
      ("interval_train.bin", "train"),
      ("my_test_train_000001.bin", "train"),
    ),
    *(
      ("test.bin", "test"),
      ("x_test_0.bin", "test"),
      ("latest.bin", "train"),
      ("contest-1.bin", "train"),
    ),
    *(
      ("val/0.bin", "heldout"),
      ("a/test/0.bin", "test"),
      ("train/0.bin", "train"),
      ("test/my_train_1.bin", "train"),
    ),
  ],
)
def test_the_last_word_of_a_name_says_the_part_and_folders_below_the_path_count(folder, name, part):
  (file,) = folder({f"my val/{name}": b".."})
  assert (
    paths.part_of(file, "my val")
    == paths.part_of(file, "my val/")
    == paths.part_of(file, "my val/**/*.bin")
    == part
  )
  assert paths.part_of(file.absolute(), str(Path("my val").absolute())) == part
  assert paths.part_of(file, str(file)) == (
    part if "/" not in name or "train" in name else "train"
  )  # a file by its name
  if "/" in name:
    assert paths.part_of(file, f"{file.parent.parent}/*/*.bin") == part
    assert paths.part_of(file, f"{file.parent}/*.bin") == "train"  # a folder that is named is meant


def test_token_files_are_named_by_a_file_a_glob_or_a_folder_without_texts(folder):
  folder(
    {
      "s/b.bin": b"..",
      "s/a/z.bin": b"..",
      "s/.c.bin.tmp": b"..",
      "s/.d.bin": b"..",
      "s/notes.md": b"..",
    }
  )
  folder({"mixed/a.bin": b"..", "mixed/a.txt": b"..", "texts/a.txt": b"..", "empty/a.md": b".."})
  names = lambda path: [file.as_posix() for file in paths.find_token_files(path)]  # noqa: E731
  assert names("s") == names("s/") == ["s/a/z.bin", "s/b.bin"]
  assert names("s/*.bin") == ["s/b.bin"] and names("s/**/*.bin") == ["s/a/z.bin", "s/b.bin"]
  assert names("s/b.bin") == ["s/b.bin"] and names("s/absent.bin") == ["s/absent.bin"]
  for text in (None, "mixed/*.txt", "texts", "texts/a.txt", "texts/*", "empty", "absent.txt"):
    assert paths.find_token_files(text) == []
  with pytest.raises(UserError, match=r"^mixed/\* matches mixed/a\.bin and mixed/a\.txt: "):
    paths.find_token_files("mixed/*")
  with pytest.raises(UserError, match=r"no file is called mixed/\*\.bim"):
    paths.find_token_files("mixed/*.bim")


@pytest.mark.parametrize(
  ("files", "path"),
  [
    (["d/train.bin", "d/val.bin", "d/input.txt"], "d"),
    (["d/a/train.bin", "d/notes.txt"], "d"),
    (["d/train.bin", "d/a/b/notes.txt"], "d/"),
    (["my [1]'s/a.bin", "my [1]'s/a.txt"], "my [1]'s"),
  ],
)
def test_a_folder_of_token_files_and_texts_is_refused_with_a_glob_for_each(folder, files, path):
  folder(dict.fromkeys(files, b".."))
  with pytest.raises(
    UserError, match=r" holds token files \(.*\.bin\) and texts \(.*\.txt\)\. Choose: "
  ) as raised:
    paths.find_token_files(path)
  assert "\n" not in str(raised.value)
  globs = [
    word.removeprefix("data.path=")
    for word in shlex.split(str(raised.value).split("Choose: ")[1])
    if "=" in word
  ]
  assert [file.as_posix() for file in paths.find_token_files(globs[0])] == [
    name for name in files if name.endswith(".bin")
  ]
  assert paths.find_token_files(globs[1]) == []
  assert [file.as_posix() for file in paths.list_files(globs[1], [])] == [files[-1]]


def test_a_finished_folder_is_the_files_of_its_manifest_whatever_else_lies_there(folder):
  names = [{"name": "s_val_000000.bin", "tokens": 1}, {"name": "s_train_000001.bin", "tokens": 1}]
  manifest = {"finished": True, "files": names}
  folder(
    {
      "s/prepare.json": json.dumps(manifest).encode(),
      "s/notes.txt": b"x",
      "s/old_train_000009.bin": b"..",
    }
  )
  folder({"s/s_val_000000.bin": b"..", "s/s_train_000001.bin": b".."})
  assert [file.name for file in paths.find_token_files("s")] == [
    "s_train_000001.bin",
    "s_val_000000.bin",
  ]
  for hostile in (
    {"name": "../x.bin"},
    {"name": "/x.bin"},
    {"name": ".."},
    {"name": "a\0b"},
    {"name": 7},
    {},
    "a",
  ):
    folder(
      {"s/prepare.json": json.dumps({"finished": True, "files": [names[0], hostile]}).encode()}
    )
    with pytest.raises(
      UserError, match=r"^s/prepare\.json is damaged: .* is not the name of a file beside it\.$"
    ):
      paths.find_token_files("s")


def test_a_manifest_of_100000_shards_is_read_and_none_that_unpacks_to_gigabytes(folder):
  names = [
    {"name": f"shards_train_{n:06}.bin", "tokens": 100_000_000, "sha256": "0" * 64}
    for n in range(100_000)
  ]
  content = json.dumps({"finished": True, "files": names}, indent=2).encode()
  assert len(content) * 1.9 < paths.MAX_PREPARATION_BYTES  # with as many inputs
  folder({"s/prepare.json": b"[" + b"[]," * (paths.MAX_PREPARATION_BYTES // 3) + b"[]]"})
  with pytest.raises(
    UserError,
    match=r"^s/prepare\.json has .* bytes; at most 33,554,432 are read of such a file\. Make",
  ):
    paths.find_token_files("s")


@pytest.mark.parametrize("path", ["d", "d/*.bin", "d/train.bin"])
def test_characters_that_only_a_pickle_lists_are_refused_with_their_text(folder, path):
  folder({"d/train.bin": b"..", "d/val.bin": b"..", "d/meta.pkl": b"."})
  mend = (
    r"^d has a meta\.pkl: .*which jgpt does not read\. .*--set data\.path={} --set "
    r"data\.tokenizer=characters$"
  )
  with pytest.raises(UserError, match=mend.format("FILE")):
    paths.find_token_files(path)
  folder({"d/input.txt": b"x"})
  with pytest.raises(UserError, match=mend.format(r"d/input\.txt")):
    paths.find_token_files(path)
  assert paths.find_token_files("d/input.txt") == []
  folder({"d/tokenizer.json": b"{}"})
  assert Path("d/train.bin") in paths.find_token_files("d/*.bin")


REFUSALS = {
  "unfinished": r"{} is not finished.*prepare\.json.*the same python -m jgpt\.prepare again",
  "damaged": r"{}/prepare\.json is damaged: .*Make the folder again .*--set "
  r"data\.path='{}/\*\.bin'$",
  "unreadable": r"{}/prepare\.json is not readable as JSON: .*Make the folder again .*--set "
  r"data\.path='{}/\*\.bin'$",
}


@pytest.mark.parametrize(
  ("manifest", "refused"),
  [
    (b'{"finished": false}', "unfinished"),
    (b'{"finished": true}', "damaged"),
    (b'{"finished": 1, "files": []}', "damaged"),
    (b'{"finished": true, "files": {"name": "a.bin"}}', "damaged"),
    (b'{"finishee": false, "files": [], "next": {}}', "damaged"),
    (b'{"finished": fal', "unreadable"),
    (b"\xff", "unreadable"),
    (b"", "unreadable"),
    (b"[]", None),
    (b'{"name": "of another program", "files": ["a.bin"]}', None),
  ],
)
def test_a_folder_that_was_not_finished_is_refused_and_so_is_one_of_which_that_is_unknown(
  folder, manifest, refused
):
  folder({"s/a.bin": b"..", "s/prepare.json": manifest})
  if refused is None:
    assert paths.find_token_files("s") == [Path("s/a.bin")]
  else:
    with pytest.raises(UserError, match=f"^{REFUSALS[refused].format('s', 's')}"):
      paths.find_token_files("s")
    folder({"t/s/a.bin": b"..", "t/s/prepare.json": manifest})
    with pytest.raises(UserError, match=f"^{REFUSALS[refused].format('t/s', 't/s')}"):
      paths.find_token_files("t")
  assert paths.find_token_files("s/*.bin") == [
    Path("s/a.bin")
  ]  # named by themselves, they are meant


# --- What the ids mean ---


CONFIG = DataConfig(
  source="names",
  tokenizer="bytes",
  batching="random",
  seq_len=8,
  batch_size=1,
  heldout_fraction=0.0,
)


def config_of(tokenizer, **changes):
  return dataclasses.replace(CONFIG, tokenizer=tokenizer, **changes)


def test_ids_mean_what_the_folders_tokenizer_says(folder):
  chars = CharTokenizer("\nab", bos=False)
  files = folder({"s/a.bin": b"..", "s/b.bin": b".."})
  assert (
    paths.find_tokenizer(files, config_of("bytes")) is None
    and paths.find_tokenizer(files, config_of("gpt2")) is None
  )
  for kind, more in (("characters", {}), ("bpe", {"bpe_vocab_size": 300})):
    complaint = (
      rf"s has token files and no tokenizer\.json .*data\.tokenizer={kind} needs\. Train on "
      r".*--tokenizer RUN"
    )
    with pytest.raises(UserError, match=complaint):
      paths.find_tokenizer(files, config_of(kind, **more))
  folder({"s/tokenizer.json": json.dumps(chars.to_json()).encode()})
  assert paths.find_tokenizer(files, config_of("characters")) == chars
  mend = (
    r"of the kind characters with 3 ids, and the run's is data\.tokenizer=gpt2\. Try --set "
    r"data\.tokenizer=characters"
  )
  with pytest.raises(
    UserError, match=rf"^s/tokenizer\.json is .*{mend} --set data\.mark_paragraphs=false$"
  ):
    paths.find_tokenizer(files, config_of("gpt2", mark_paragraphs=True))
  folder({"t/tokenizer.json": json.dumps(ByteTokenizer().to_json()).encode()})
  with pytest.raises(
    UserError, match=r"s/tokenizer\.json and t/tokenizer\.json are different tokenizers"
  ):
    paths.find_tokenizer([*files, Path("t/a.bin")], config_of("characters"))


def test_a_bpe_tokenizer_must_have_the_ids_that_the_settings_say(folder):
  tokenizer = BpeTokenizer("a b\nab c", end_of_text=False)
  files = folder({"s/a.bin": b"..", "s/tokenizer.json": json.dumps(tokenizer.to_json()).encode()})
  assert paths.find_tokenizer(files, config_of("bpe", bpe_vocab_size=258)) == tokenizer
  for config in (config_of("bpe", bpe_vocab_size=300), config_of("bytes")):
    with pytest.raises(
      UserError, match=r"--set data\.tokenizer=bpe --set data\.bpe_vocab_size=258$"
    ):
      paths.find_tokenizer(files, config)


@pytest.mark.parametrize(
  ("content", "complaint"),
  [(b"{", "not readable as JSON"), (b'{"type": "x"}', "must be"), (b"\xff", "JSON")],
)
def test_a_damaged_tokenizer_is_named(folder, content, complaint):
  (path,) = folder({"s/tokenizer.json": content})
  with pytest.raises(UserError, match=rf"^s/tokenizer\.json.*{complaint}"):
    paths.read_tokenizer(path)


@pytest.mark.parametrize(
  "tokenizer",
  [
    CharTokenizer("\n ab", bos=False),
    ByteTokenizer(),
    BpeTokenizer("a b\nab c", True),
    BpeTokenizer("a b", False),
  ],
  ids=repr,
)
def test_hugging_faces_tokenizer_json_is_read_too(folder, tokenizer):
  value = hugging_face_files(tokenizer, 8)["tokenizer.json"]
  if isinstance(tokenizer, BpeTokenizer):  # as Transformers saves it again
    value |= {
      "model": value["model"]
      | {"merges": [" ".join(pair) for pair in value["model"]["merges"]], "dropout": 0}
    }
  (path,) = folder({"s/tokenizer.json": json.dumps(value).encode()})
  assert paths.read_tokenizer(path) == tokenizer
  folder({"s/tokenizer.json": json.dumps(value | {"normalizer": {"type": "NFC"}}).encode()})
  with pytest.raises(
    UserError, match=r"^s/tokenizer\.json: the tokenizer's normalizer is of type 'NFC'"
  ):
    paths.read_tokenizer(path)
