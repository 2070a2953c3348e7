"""What the kernel says of a processor."""

import pytest

from jgpt.system.processor import find_bfloat16


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    ("fpu avx512f avx512_bf16 avx512_vnni", "avx512_bf16"),
    ("fpu amx_bf16 amx_tile", "amx_bf16"),
    ("fpu avx512f avx512_bf16x", None),
  ],
)
def test_instructions_are_found_among_the_flags(tmp_path, flags, expected):
  (tmp_path / "proc").mkdir()
  cpuinfo = f"processor\t: 0\nmodel name\t: A\nflags\t\t: {flags}\nbugs\t\t: x\n"
  (tmp_path / "proc" / "cpuinfo").write_text(cpuinfo)
  assert find_bfloat16(tmp_path) == expected


def test_without_a_list_of_flags_there_are_none(tmp_path):
  assert find_bfloat16(tmp_path) is None
