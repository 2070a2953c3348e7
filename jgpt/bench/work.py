"""What a compiled program does on each device: floating-point operations, and bytes of memory.

Counted in XLA's optimized HLO, as `hlo.py` parses it, loop bodies times their trips. Pure. XLA's
own `cost_analysis` counts a loop's body once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from jgpt.bench.hlo import COLLECTIVES, Instruction, Module, Place, walk_module

# They neither read nor write arrays, or what they call is counted.
FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
  *("call", "async-start", "async-update", "async-done", "after-all", "partition-id", "replica-id"),
  *("optimization-barrier", "opt-barrier", "domain"),
}
FREE_TARGETS = re.compile('custom_call_target="(AllocateBuffer|ConcatBitcast|Assume)')
SLICES = ("dynamic-slice", "slice", "gather")  # which read as much as they return


def count_flops(module: Module) -> int:
  """Counts the floating-point operations of a program's matrix products, 2 a multiply-add.

  Kernels that XLA did not write are not in it, but the products of NVIDIA's library are.
  """
  return sum(place.trips * _count_product(place) for place in walk_module(module, fused=True))


def _count_product(place: Place) -> int:
  instruction = place.instruction
  if not instruction.shapes or instruction.opcode not in ("dot", "convolution", "custom-call"):
    return 0
  known = [place.scope[name].shapes for name in instruction.operands if name in place.scope]
  if len(known) < 2 or not known[0] or not known[1]:
    return 0
  left, right = known[0][0].dims, known[1][0].dims
  if instruction.opcode == "convolution":
    return _count_convolution(instruction, left, right)
  listed = r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)'
  contracted = re.search(listed, instruction.attributes)
  if not contracted:
    return 0
  dims = [int(d) for d in re.findall(r"\d+", contracted[1])]
  return 2 * instruction.shapes[0].size * math.prod(left[d] for d in dims)


def _count_convolution(
  instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]
) -> int:
  """Counts a convolution's operations; those with padding, or between an array's entries, are none.

  XLA:TPU writes products as convolutions, their batch dimensions as dimensions of the window.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
  fields = dict(field.split("=") for field in window[1].split()) if window else {}
  out = instruction.shapes[0].dims
  total = 2 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
  num_dims = len(labels[1]) - 2

  def read(name: str, default: str) -> list[str]:
    return fields.get(name, "x".join([default] * num_dims)).split("x")

  for i in range(num_dims):
    size, stride = int(read("size", "1")[i]), int(read("stride", "1")[i])
    low = int(read("pad", "0_0")[i].split("_")[0])
    dilate, spread = int(read("lhs_dilate", "1")[i]), int(read("rhs_dilate", "1")[i])
    last = (left[labels[1].index(str(i))] - 1) * dilate
    places = (
      position * stride + entry * spread - low
      for position in range(out[labels[3].index(str(i))])
      for entry in range(size)
    )
    total *= sum(0 <= place <= last and place % dilate == 0 for place in places)
  return total


def count_traffic(module: Module) -> int:
  """Counts the bytes that a program's operations read from a device's large memory and write to it.

  Every operation reads its operands and writes its result, once, but for the arrays that the
  compiler put into a faster memory; of a slice it reads as much as it returns, and an update in
  place writes what is new. What is read again from a cache counts again.
  """
  total, seen = 0, set()
  for place in walk_module(module):
    instruction = place.instruction
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
      continue
    if instruction.opcode == "custom-call" and FREE_TARGETS.search(instruction.attributes):
      continue
    if instruction.opcode == "fusion":
      (inside,) = (module.computations.get(name, {}) for name in instruction.called()[:1])
      num_bytes = sum(_list_fused(place, inside, module, seen))
    else:
      num_bytes = sum(_list_plain(place))
    total += place.trips * num_bytes
  return total


def _measure(instruction: Instruction) -> int:
  """Measures the bytes of a result that are in the large memory."""
  return sum(
    shape.num_bytes
    for shape, space in zip(instruction.shapes, instruction.spaces, strict=True)
    if space == 0
  )


def _list_plain(place: Place) -> Iterator[int]:
  """Lists the bytes that an operation outside of fusions reads and writes."""
  instruction = place.instruction
  operands = [place.scope[name] for name in instruction.operands if name in place.scope]
  if instruction.opcode in SLICES:
    yield 2 * _measure(instruction)
    return
  if instruction.opcode == "dynamic-update-slice":
    yield 2 * _measure(operands[1])
    return
  given = sum(map(_measure, operands))
  yield given
  # The result of a start holds the operands too.
  is_start = instruction.opcode.endswith("-start")
  yield max(_measure(instruction) - given, 0) if is_start else _measure(instruction)


def _list_fused(
  place: Place, inside: dict[str, Instruction], module: Module, seen: set[str | None]
) -> Iterator[int]:
  """Lists the bytes that a fusion reads and writes.

  Args:
    place: of the fusion.
    inside: its computation.
    module: the whole program.
    seen: channels of collectives that were counted; those in fusions are added.
  """
  users = _find_users(inside)
  root = next(reversed(inside.values()), None)
  results = [root] if root and root.opcode != "tuple" else []
  if root and root.opcode == "tuple":
    results = [inside[name] for name in root.operands if name in inside]
  for found in inside.values():
    if found.opcode == "parameter":
      given = place.scope.get(place.instruction.operands[_find_number(found)])
      if given is not None and any(given.spaces) and len(given.spaces) == 1:
        continue
      yield _measure_read(found, users, root, module)
    elif found.opcode in COLLECTIVES:
      channel = re.search(r"channel_id=\d+", found.attributes)
      if channel is None or channel[0] not in seen:
        seen.add(channel and channel[0])
        yield found.num_bytes
  spaces, first = place.instruction.spaces, 0
  for result in results:
    count = len(result.shapes)
    if not any(spaces[first : first + count]):
      yield _measure_written(result, inside, module)
    first += count


def _find_users(inside: dict[str, Instruction]) -> dict[str, list[Instruction]]:
  """Finds the instructions of a computation that take the result of each."""
  users: dict[str, list[Instruction]] = {name: [] for name in inside}
  for found in inside.values():
    for name in dict.fromkeys(found.operands):
      users.get(name, []).append(found)
  return users


def _find_number(parameter: Instruction) -> int:
  return int(re.match(r"\((\d+)\)", parameter.attributes)[1])


def _measure_read(
  parameter: Instruction,
  users: dict[str, list[Instruction]],
  root: Instruction | None,
  module: Module,
) -> int:
  """Measures what a fusion reads of a parameter: of slices of it, no more than they return."""
  total, names = 0, [parameter.name]
  while names:
    name = names.pop()
    for user in users[name]:
      if user.opcode == "bitcast":
        names.append(user.name)
      elif user.opcode in SLICES and user.operands[0] == name:
        total += user.num_bytes
      elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        continue  # in place
      elif (user is root and user.opcode == "tuple") or user.opcode in COLLECTIVES:
        continue  # handed on; a collective is counted by itself
      elif user.opcode == "fusion":
        total += _measure_read_within(user, name, module)
      else:
        return parameter.num_bytes
  return min(total, parameter.num_bytes)


def _measure_read_within(fusion: Instruction, operand: str, module: Module) -> int:
  """Measures what a fusion in a fusion reads of an operand."""
  inside = module.computations[fusion.called()[0]]
  users, root = _find_users(inside), next(reversed(inside.values()))
  total = 0
  for found in inside.values():
    if found.opcode != "parameter" or fusion.operands[_find_number(found)] != operand:
      continue
    last = found
    while len(users[last.name]) == 1 and users[last.name][0].opcode == "bitcast":
      (last,) = users[last.name]
    # What it returns as it is, is read by others.
    total += found.num_bytes if last is root else _measure_read(found, users, root, module)
  return total


def _measure_written(result: Instruction, inside: dict[str, Instruction], module: Module) -> int:
  """Measures what a fusion writes of a result: of an update in place, what is new."""
  while result.opcode == "bitcast" and result.operands[0] in inside:
    result = inside[result.operands[0]]
  if result.opcode == "parameter" or result.opcode in COLLECTIVES:
    return 0
  if result.opcode == "dynamic-update-slice" and result.operands[1] in inside:
    return inside[result.operands[1]].num_bytes
  if result.opcode == "fusion" and len(result.shapes) == 1:
    nested = module.computations[result.called()[0]]
    return _measure_written(next(reversed(nested.values())), nested, module)
  return result.num_bytes
