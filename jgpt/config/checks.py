"""What a setting may hold, and the error that says what is wrong with it.

Responsible for checking values against declared types and ranges, and for the words of such errors. Not responsible for
which settings there are or which go together (`config.py`). Imports no jax.
"""

from __future__ import annotations

import math
import sys
import types
import typing
from typing import Any

from jgpt.errors import UserError, near_matches, show


def check_types(config: Any, section: str) -> None:
  """Raises unless each field holds a value of its declared type, whole numbers below 2**31; 1 becomes 1.0 for a float."""
  for name, hint in typing.get_type_hints(type(config)).items():
    value = getattr(config, name)
    allowed = alternatives(hint)
    if words := choices(hint):
      if value not in words:
        near = near_matches(value, words) if isinstance(value, str) else ""
        raise UserError(f"{section}.{name}={show(value)} must be {describe_type(hint)}.{near}")
      continue
    if float in allowed and type(value) is int and abs(value) <= sys.float_info.max:
      value = float(value)
      object.__setattr__(config, name, value)
    if tuple[str, ...] in allowed and isinstance(value, list | tuple) and all(map(_is_word, value)):
      object.__setattr__(config, name, tuple(value))
    elif type(value) not in allowed:
      raise UserError(f"{section}.{name}={show(value)} must be {describe_type(hint)}.")
    elif type(value) is float and not math.isfinite(value):
      raise UserError(f"{section}.{name}={value!r} must be a finite number.")
    elif type(value) is int and value >= 2**31:
      raise UserError(f"{section}.{name}={show(value)} must be below 2**31.")


def _is_word(value: Any) -> bool:
  """Whether a value is text that an error can name."""
  return type(value) is str and len(value) <= 80


def check_range(config: Any, section: str, *, least: int, names: str) -> None:
  """Raises unless each of the fields named (in one text, by spaces) is None or at least `least`."""
  for name in names.split():
    value = getattr(config, name)
    if value is not None and value < least:
      raise UserError(f"{section}.{name}={show(value)} must be at least {least}.")


def alternatives(hint: Any) -> tuple:
  """The types that a declared type allows: (int, NoneType) for `int | None`."""
  return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def choices(hint: Any) -> tuple[str, ...]:
  """The words that a declared `Literal` allows; () for other types."""
  return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def describe_type(hint: Any) -> str:
  """A setting's declared type for a person: "a whole number or none"; "relu, gelu_tanh or gelu_erf"."""
  if words := choices(hint):
    return f"{', '.join(words[:-1])} or {words[-1]}"
  words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
  words[tuple[str, ...]] = "words separated by commas"
  return " or ".join(words[t] for t in alternatives(hint))


def nearest_divisors(n: int, wanted: int) -> str:
  """The divisors of `n` next to `wanted`, nearest first, as text: "4 or 8"."""
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  divisors = sorted({*small, *(n // d for d in small)}, key=lambda d: (abs(d - wanted), d))
  return " or ".join(str(d) for d in divisors[:2])


FLOAT32_MAX, FLOAT32_TINY = 3.4e38, 1.2e-38  # beyond the one a number is infinite on a device, below the other 0


def check_float32(config: Any, section: str, *, names: str) -> None:
  """Raises if one of the fields named (in one text, by spaces) is larger than a float32 can be."""
  if large := [name for name in names.split() if (getattr(config, name) or 0) > FLOAT32_MAX]:
    raise UserError(f"{section}.{large[0]}={getattr(config, large[0])} must be at most {FLOAT32_MAX}, as a float32.")
