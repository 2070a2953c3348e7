"""What the processor can do. Imports no jax."""

import re
from pathlib import Path

from jgpt.system.memory import read_kernel

BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")  # as Linux names them


def find_bfloat16(root: Path = Path("/")) -> str | None:
  """Finds the processor's instructions that multiply bfloat16 into float32.

  Args:
    root: folder with proc.

  Returns:
    Their name, or None where there are none, or the kernel does not list them.
  """
  flags = re.search(r"^flags\s*: (.+)$", read_kernel(root / "proc" / "cpuinfo"), re.M)
  there = flags.group(1).split() if flags else []
  return next((flag for flag in BFLOAT16_FLAGS if flag in there), None)
