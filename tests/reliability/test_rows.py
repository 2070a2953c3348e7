"""Every row of faults has a test that is named after it."""

import re
from pathlib import Path


def test_every_row_has_a_test():
  text = "".join(
    path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_row_*.py")
  )
  rows = {int(number) for number in re.findall(r"^def test_row_(\d\d)_", text, re.MULTILINE)}
  assert rows == set(range(1, 33))
