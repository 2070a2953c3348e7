"""What a compiled program's text says: its collectives, its kernels, its loops, estimated cycles.

The text is that of `jax.stages.Compiled.as_text`: XLA's optimized HLO. Pure. The program's
operations and the bytes that it moves are counted in `work.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

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
# A type, and after S the memory that it is in: none is the device's large one.
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\](?:\{[^{}]*\bS\((\d+)\)[^{}]*\})?")
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
    spaces: the memory that each of the arrays in its result is in; 0 is the device's large one.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  spaces: tuple[int, ...] = ()

  @property
  def num_bytes(self) -> int:
    """Returns the bytes of its result."""
    return sum(shape.num_bytes for shape in self.shapes)

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
  """An instruction, and where it stands.

  Attributes:
    instruction: itself.
    loops: that it stands in, the outermost first.
    scope: the instructions of its computation, by name.
    fused: whether the computation is that of a fusion.
  """

  instruction: Instruction
  loops: tuple[Loop, ...]
  scope: dict[str, Instruction]
  fused: bool = False

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
    groups: of devices that exchange with one another, by their number in the program's mesh; of a
      collective-permute pairs, from and to. None at all are all devices in one group.
  """

  kind: str
  num_bytes: int
  loops: tuple[Loop, ...]
  groups: tuple[tuple[int, ...], ...] = ()

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
  types = _SHAPE.findall(rest[: end + 1])
  shapes = tuple(
    Shape(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims, _ in types
  )
  # A parameter's number stands between its brackets, as a constant's value does.
  attributes = rest[begin:] if opcode[1] in ("constant", "parameter") else rest[close + 1 :]
  name, spaces = head.strip().lstrip("%"), tuple(int(space or 0) for *_, space in types)
  return Instruction(name, opcode[1], shapes, tuple(operands), attributes, spaces)


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
  yield from _walk(module, module.entry, (), fused, False)


def _walk(
  module: Module, name: str, loops: tuple[Loop, ...], fused: bool, inside: bool
) -> Iterator[Place]:
  scope = module.computations.get(name, {})
  for found in scope.values():
    yield Place(found, loops, scope, inside)
    if found.opcode == "while":
      parts = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", found.attributes)
      op = re.search(r'op_name="([^"]*)"', found.attributes)
      loop = Loop(count_trips(module, found.attributes, parts[1], parts[2]), op[1] if op else "")
      yield from _walk(module, parts[2], (*loops, loop), fused, inside)
    elif fused or found.opcode != "fusion":
      for called in found.called():
        yield from _walk(module, called, loops, fused, inside or found.opcode == "fusion")


def count_trips(module: Module, attributes: str, condition: str, body: str = "") -> int | None:
  """Counts how often a loop's body runs; None where that is not known when it is compiled.

  XLA says so, or the condition compares a counter, which begins at 0, with a constant; the body
  adds 1 to it, or another constant.

  Args:
    module: of the loop.
    attributes: of the loop.
    condition: name of the computation that decides whether it goes on.
    body: name of the computation that is repeated.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes):
    return int(known[1])
  instructions = module.computations.get(condition, {})
  found = [i for i in instructions.values() if i.opcode in ("compare", "fusion")]
  if not found:
    return None
  compared = [instructions[name] for name in found[-1].operands if name in instructions]
  end = max(_list_constants(compared), default=None)
  indices = [re.search(r"\bindex=(\d+)", i.attributes) for i in compared]
  counter = next((int(index[1]) for index in indices if index), None)
  if end is None or counter is None:
    return end
  return -(-end // _find_stride(module, body, counter))


def _find_stride(module: Module, body: str, counter: int) -> int:
  """Finds the constant that a loop's body adds to an entry of its tuple; 1 where it is not seen."""
  scope = module.computations.get(body, {})
  root = next(reversed(scope.values()), None)
  if root is None or root.opcode != "tuple":
    return 1
  step = scope.get(root.operands[counter])
  while step is not None and step.opcode in ("copy", "bitcast"):
    step = scope.get(step.operands[0])
  if step is None or step.opcode not in ("add", "fusion"):
    return 1
  inside = [i for name in step.called() for i in module.computations.get(name, {}).values()]
  given = [scope[name] for name in step.operands if name in scope]
  return max(_list_constants([*given, *inside]), default=0) or 1


def _list_constants(instructions: Sequence[Instruction]) -> list[int]:
  """Lists the values of those that are integer constants."""
  values = [re.match(r"\((\d+)\)", i.attributes) for i in instructions if i.opcode == "constant"]
  return [int(value[1]) for value in values if value]


def find_collectives(module: Module) -> list[Collective]:
  """Finds a program's collective operations, each once however it is split into start and done.

  XLA:TPU also splits one over the fusions beside which it runs, also those of a loop between its
  start and its end: they have its channel. And it writes a reduce-scatter as a fusion of an
  all-reduce of which each device keeps a part.
  """
  found: dict[object, Collective] = {}
  for place in walk_module(module, fused=True):
    instruction = place.instruction
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
      continue
    total = instruction.num_bytes
    given = sum(place.scope[name].num_bytes for name in instruction.operands if name in place.scope)
    if kind == "all-gather":  # a start's result holds the operands too
      num_bytes = total - given if instruction.opcode.endswith("-start") else total
    else:
      num_bytes = given or total
    if place.fused and kind == "all-reduce":
      users = {i.opcode for i in place.scope.values() if instruction.name in i.operands}
      kind = "reduce-scatter" if users == {"dynamic-slice"} else kind
    channel = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
    key = (kind, channel[1]) if place.fused and channel else len(found)
    groups = parse_groups(instruction.attributes)
    collective = Collective(kind, num_bytes, place.loops, groups)
    if key not in found or len(place.loops) < len(found[key].loops):
      found[key] = collective
  return list(found.values())


def parse_groups(attributes: str) -> tuple[tuple[int, ...], ...]:
  """Parses which devices exchange with one another, in each of XLA's notations.

    replica_groups={{0,1},{2,3}}              the groups
    replica_groups=[2,2]<=[2,2]T(1,0)         numbers from 0, in this shape, transposed, as groups
    replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}    along b; the numbers of
                                              devices, likewise, where they are not from 0
    source_target_pairs={{0,1},{1,0}}         pairs

  Returns:
    The groups; none where all devices are one.
  """
  if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes):
    groups = re.findall(r"\{([\d, ]+)\}", listed[1])
    return tuple(tuple(int(n) for n in group.split(",")) for group in groups)
  if counted := re.search(r"replica_groups=\[([\d,]+)\]<=(\[\S*)", attributes):
    return _as_groups(_count_devices(counted[2]).reshape(_parse_ints(counted[1])))
  named = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S*)\))? \{([^}]*)\}", attributes
  )
  if not named:
    return ()
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
  devices = _count_devices(named[2] or f"[{math.prod(sizes.values())}]")
  along = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[3])
  shape, last = [], []  # an axis of which a part is meant is cut into three
  for name, size in sizes.items():
    part = next(((int(a or 1), int(n or size)) for axis, a, n in along if axis == name), None)
    if part is None:
      shape.append(size)
      continue
    last.append(len(shape) + 1)
    shape += [part[0], part[1], size // math.prod(part)]
  others = [axis for axis in range(len(shape)) if axis not in last]
  moved = devices.reshape(shape).transpose(*others, *last)
  return _as_groups(moved.reshape(-1, math.prod(shape[axis] for axis in last)))


def _count_devices(text: str) -> np.ndarray:
  """Counts devices from 0 in the order of "[2,4]T(1,0)": in this shape, transposed."""
  shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  counted = np.arange(math.prod(_parse_ints(shape))).reshape(_parse_ints(shape))
  return counted.transpose(_parse_ints(order)) if order else counted


def _parse_ints(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]


def _as_groups(devices: np.ndarray) -> tuple[tuple[int, ...], ...]:
  return tuple(map(tuple, devices.tolist()))


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
