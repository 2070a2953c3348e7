"""What a compiled program's text says: its collectives, its kernels, its loops, estimated cycles.

The text is that of `jax.stages.Compiled.as_text`: XLA's optimized HLO. Pure.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# Targets of custom calls: Pallas's kernels on TPUs and on GPUs, and NVIDIA's libraries.
KERNEL_TARGETS = re.compile("tpu_custom_call|mosaic|triton|cudnn|cublas")
MAX_CYCLES = 2**60  # what is more stands for an operation without an estimate
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-<>]+) \(.*\{$")
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Shape:
  """The type of an array."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def size(self) -> int:
    """Returns the number of entries."""
    return math.prod(self.dims)

  @property
  def num_bytes(self) -> int:
    """Returns the bytes of its entries, without padding."""
    bits = _BITS.search(self.dtype)  # none in "pred"
    return self.size * max(1, int(bits[0]) // 8 if bits else 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """An instruction.

  Attributes:
    name: of its result.
    opcode: as HLO names it.
    shapes: of the arrays in its result.
    operands: names of its operands.
    attributes: the rest of the line.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str

  def called(self) -> list[str]:
    """Returns the computations that are called once when this one is."""
    keys = "calls|to_apply" if self.opcode in ("call", "fusion", "async-start") else "branch"
    if self.opcode == "conditional":
      found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
      names = found[1].split(",") if found else []
      names += re.findall(r"(?:true|false)_computation=(\S+?)[,\s]", f"{self.attributes} ")
    else:
      names = re.findall(rf"\b(?:{keys})=(%?[\w.\-]+)", self.attributes)
    return [name.strip().lstrip("%") for name in names]


@dataclasses.dataclass(frozen=True)
class Loop:
  """A while loop around an instruction.

  Attributes:
    trips: how often its body runs; None where that is not known when it is compiled.
    op: where it comes from: the path of JAX's names.
  """

  trips: int | None
  op: str


@dataclasses.dataclass(frozen=True)
class Place:
  """An instruction, and the loops that it stands in, the outermost first."""

  instruction: Instruction
  loops: tuple[Loop, ...]

  @property
  def trips(self) -> int:
    """Returns how often it runs; a loop whose trips are not known counts once."""
    return math.prod(loop.trips or 1 for loop in self.loops)


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation.

  Attributes:
    kind: one of `COLLECTIVES`.
    num_bytes: of the arrays that each device contributes; of an all-gather, that it gets.
    loops: that it stands in, the outermost first.
  """

  kind: str
  num_bytes: int
  loops: tuple[Loop, ...]

  @property
  def trips(self) -> int:
    """Returns how often it runs; a loop whose trips are not known counts once."""
    return math.prod(loop.trips or 1 for loop in self.loops)


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program.

  Attributes:
    computations: name -> its instructions, by name.
    entry: the name of the computation that is run.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str


def parse_module(text: str) -> Module:
  """Parses the text of a compiled program.

  Raises:
    ValueError: if it has no entry computation.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = None, None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations.setdefault(match[2], {})
      entry = match[2] if match[1] else entry
    elif line.rstrip() == "}":  # the attributes of a kernel may have lines that begin with one
      current = None
    elif current is not None and (found := parse_instruction(line)):
      current[found.name] = found
  if entry is None:
    raise ValueError("the text has no ENTRY computation")
  return Module(computations, entry)


def parse_instruction(line: str) -> Instruction | None:
  """Parses a line of a computation; None if it holds no instruction."""
  head, equals, rest = line.strip().removeprefix("ROOT ").partition(" = ")
  if not equals:
    return None
  # A tuple's type is in brackets, as its operands are; layouts have brackets too, but no spaces.
  end = _find_closing(rest) if rest.startswith("(") else rest.find(" ") - 1
  opcode = re.match(r"\s*([\w\-]+)\(", rest[end + 1 :])
  if not opcode:
    return None
  begin = end + opcode.end()
  close = begin + _find_closing(rest[begin:])
  operands = re.findall(r"%([\w.\-]+)", rest[begin:close])
  if not operands and opcode[1] not in ("constant", "parameter"):
    operands = re.findall(r"\b([A-Za-z_][\w.\-]*)(?=[,)])", rest[begin : close + 1])
  shapes = tuple(
    Shape(dtype, tuple(int(d) for d in dims.split(",") if d))
    for dtype, dims in _SHAPE.findall(rest[: end + 1])
  )
  attributes = rest[begin:] if opcode[1] == "constant" else rest[close + 1 :]
  return Instruction(head.strip().lstrip("%"), opcode[1], shapes, tuple(operands), attributes)


def _find_closing(text: str) -> int:
  """Returns the position of the bracket that closes the first one of a text."""
  depth = 0
  for match in re.finditer(r"[()]", text):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return match.start()
  return len(text) - 1


def walk_module(module: Module, *, fused: bool = False) -> Iterator[Place]:
  """Iterates over the instructions of a program, each with the loops that it stands in.

  Args:
    module: from `parse_module`.
    fused: whether those inside fusions are wanted too. Every branch of a conditional is.
  """
  yield from _walk(module, module.entry, (), fused)


def _walk(module: Module, name: str, loops: tuple[Loop, ...], fused: bool) -> Iterator[Place]:
  for found in module.computations.get(name, {}).values():
    yield Place(found, loops)
    if found.opcode == "while":
      parts = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", found.attributes)
      op = re.search(r'op_name="([^"]*)"', found.attributes)
      loop = Loop(count_trips(module, found.attributes, parts[1]), op[1] if op else "")
      yield from _walk(module, parts[2], (*loops, loop), fused)
    elif fused or found.opcode != "fusion":
      for called in found.called():
        yield from _walk(module, called, loops, fused)


def count_trips(module: Module, attributes: str, condition: str) -> int | None:
  """Counts how often a loop's body runs; None where that is not known when it is compiled.

  XLA says so, or the condition compares a counter, which begins at 0, with a constant.

  Args:
    module: of the loop.
    attributes: of the loop.
    condition: name of the computation that decides whether it goes on.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes):
    return int(known[1])
  instructions = module.computations.get(condition, {})
  found = [i for i in instructions.values() if i.opcode in ("compare", "fusion")]
  constants = [
    int(match[1])
    for last in found[-1:]
    for operand in last.operands
    if operand in instructions and instructions[operand].opcode == "constant"
    if (match := re.match(r"\((\d+)\)", instructions[operand].attributes))
  ]
  return max(constants, default=None)


def find_collectives(module: Module) -> list[Collective]:
  """Finds a program's collective operations, each once however it is split into start and done."""
  found = []
  for place in walk_module(module, fused=True):
    instruction = place.instruction
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
      continue
    total = sum(shape.num_bytes for shape in instruction.shapes)
    around = next(
      known for known in module.computations.values() if known.get(instruction.name) is instruction
    )
    given = sum(
      shape.num_bytes
      for operand in instruction.operands
      if operand in around
      for shape in around[operand].shapes
    )
    if kind == "all-gather":  # a start's result holds the operands too
      num_bytes = total - given if instruction.opcode.endswith("-start") else total
    else:
      num_bytes = given or total
    found.append(Collective(kind, num_bytes, place.loops))
  return found


def count_kernels(module: Module) -> dict[str, int]:
  """Counts the calls of kernels that XLA did not write, by target, trips included."""
  counts: dict[str, int] = {}
  for place in walk_module(module):
    target = re.search(r'custom_call_target="([^"]*)"', place.instruction.attributes)
    if place.instruction.opcode == "custom-call" and target and KERNEL_TARGETS.search(target[1]):
      counts[target[1]] = counts.get(target[1], 0) + place.trips
  return counts


def estimate_cycles(module: Module) -> int | None:
  """Adds XLA:TPU's estimated cycles, loop bodies times their trips; None where there are none.

  Kernels and collectives have no estimate. A loop whose trips are not known counts once.
  """
  total, is_estimated = 0, False
  for place in walk_module(module):
    found = re.search(r'"estimated_cycles":"(\d+)"', place.instruction.attributes)
    if found and place.instruction.opcode != "while" and int(found[1]) < MAX_CYCLES:
      total, is_estimated = total + place.trips * int(found[1]), True
  return total if is_estimated else None


def list_types(module: Module) -> set[Shape]:
  """Finds the types of all arrays in a program, those inside fusions included."""
  return {
    shape
    for instructions in module.computations.values()
    for instruction in instructions.values()
    for shape in instruction.shapes
  }


def find_arrays_of_batch(module: Module, batch_size: int, seq_len: int) -> list[Shape]:
  """Finds floating-point arrays that hold more than a number for each token of a whole batch.

  Where devices divide a batch, no device should have one: token ids and weights are exempt.

  Args:
    module: from `parse_module`.
    batch_size: sequences over all devices.
    seq_len: positions of each.
  """

  def has_batch(dims: Sequence[int]) -> bool:
    pairs = itertools.pairwise(dims)
    return (batch_size, seq_len) in pairs or batch_size * seq_len in dims

  return sorted(
    (
      shape
      for shape in list_types(module)
      if "f" in shape.dtype and has_batch(shape.dims) and shape.size > batch_size * (seq_len + 1)
    ),
    key=lambda shape: -shape.num_bytes,
  )
