"""Checks of settings against their declared types and ranges.

Which settings there are, and which values go together, is in `experiment.py`. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from typing import Any

from jgpt.errors import UserError, near_matches, show

FLOAT32_MAX = 3.4e38  # a larger number is infinite on a device
FLOAT32_TINY = 1.2e-38  # a smaller number is 0 on a device


def ranged(
  default: Any = dataclasses.MISSING, *, least: float | None = None, most: float | None = None
) -> Any:
  """Declares a dataclass field whose value, unless it is None, must be from `least` to `most`."""
  return dataclasses.field(default=default, metadata={"least": least, "most": most})


def check_fields(config: Any, section: str) -> None:
  """Checks that every field of a dataclass has its declared type and range.

  Whole numbers must be below 2**31. In a field of floats a whole number is replaced by a float, and
  in a field of words a list by a tuple.

  Args:
    config: one section of an experiment.
    section: its name, for errors.

  Raises:
    UserError: with the field's name and value, and what it may be.
  """
  check_types(config, section)
  for field in dataclasses.fields(config):
    value, least, most = (getattr(config, field.name), *map(field.metadata.get, ("least", "most")))
    if value is None or isinstance(value, str):
      continue
    if least is not None and value < least:
      raise UserError(f"{section}.{field.name}={show(value)} must be at least {least}.")
    if most is not None and value > most:
      raise UserError(f"{section}.{field.name}={value} must be at most {most}, as a float32.")


def check_types(config: Any, section: str) -> None:
  """Checks that every field of a dataclass has its declared type; see `check_fields`."""
  for name, hint in typing.get_type_hints(type(config)).items():
    value = getattr(config, name)
    allowed = alternatives(hint)
    if words := choices(hint):
      if value in words and isinstance(value, str):
        continue
      if allowed == (hint,) or isinstance(value, str):
        near = near_matches(value, words) if isinstance(value, str) else ""
        raise UserError(f"{section}.{name}={show(value)} must be {describe_type(hint)}.{near}")
    if float in allowed and type(value) is int and abs(value) <= sys.float_info.max:
      value = float(value)
      object.__setattr__(config, name, value)
    is_list = isinstance(value, list | tuple)
    if tuple[str, ...] in allowed and is_list and all(map(_is_short_text, value)):
      object.__setattr__(config, name, tuple(value))
    elif type(value) not in allowed:
      raise UserError(f"{section}.{name}={show(value)} must be {describe_type(hint)}.")
    elif type(value) is float and not math.isfinite(value):
      raise UserError(f"{section}.{name}={value!r} must be a finite number.")
    elif type(value) is int and value >= 2**31:
      raise UserError(f"{section}.{name}={show(value)} must be below 2**31.")


def _is_short_text(value: Any) -> bool:
  """Returns whether a value is text that is short enough for an error message."""
  return type(value) is str and len(value) <= 80


def alternatives(hint: Any) -> tuple:
  """Returns the types that a declared type allows: (int, NoneType) for `int | None`."""
  is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
  return typing.get_args(hint) if is_union else (hint,)


def choices(hint: Any) -> tuple[str, ...]:
  """Returns the words that a declared `Literal` allows, also in a union; () for other types."""
  literals = [t for t in alternatives(hint) if typing.get_origin(t) is typing.Literal]
  return tuple(word for literal in literals for word in typing.get_args(literal))


def describe_type(hint: Any) -> str:
  """Describes a declared type: "a whole number or none"; "relu, gelu_tanh or gelu_erf"."""
  if (words := choices(hint)) and alternatives(hint) == (hint,):
    return f"{', '.join(words[:-1])} or {words[-1]}"
  shown = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
  shown |= {types.NoneType: "none", tuple[str, ...]: "words separated by commas"}
  plain = [shown[t] for t in alternatives(hint) if t in shown]
  return " or ".join([*plain, *words])


def nearest_divisors(n: int, wanted: int) -> str:
  """Returns the two divisors of `n` that are nearest to `wanted`, as text: "4 or 8"."""
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  divisors = sorted({*small, *(n // d for d in small)}, key=lambda d: (abs(d - wanted), d))
  return " or ".join(str(d) for d in divisors[:2])
