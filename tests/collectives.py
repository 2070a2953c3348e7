"""The collective operations in a compiled program's text, read independently of `jgpt.bench.hlo`.

`count_step_bytes` is the count that a step is held against: what has to move, by formula.
"""

import collections
import dataclasses
import math
import re

from jgpt.config import Experiment
from jgpt.params import param_table

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
TYPE = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation.

  Attributes:
    kind: one of `KINDS`. A TPU's reduce-scatter is an all-reduce in a fusion of that name.
    shapes: of its results, the larger of what it takes and gives: [("f32", (2, 3))].
    trips: how often it runs in a step.
    op: the path of JAX's names.
  """

  kind: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]
  trips: int
  op: str

  @property
  def num_bytes(self) -> int:
    return sum(SIZES.get(dtype, 4) * math.prod(dims) for dtype, dims in self.shapes)


def read_shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
  return [(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in TYPE.findall(text)]


def find_collectives(text: str) -> list[Collective]:
  """Lists the collectives of a program, each once; the loop over steps counts as one step."""
  bodies, entry, lines = {}, None, None
  for line in text.splitlines():
    begin = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if begin:
      lines = bodies[begin[2]] = []
      entry = begin[2] if begin[1] else entry
    elif line.rstrip() == "}":  # the attributes of a kernel may have lines that begin with one
      lines = None
    elif lines is not None:
      lines.append(line)
  found, seen = [], set()

  def walk(name: str, trips: int, caller: str) -> None:
    for line in bodies.get(name, []):
      parts = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
      if not parts:
        continue
      result, opcode = parts.groups()
      kind = opcode.removesuffix("-start")
      if kind in KINDS:
        channel = re.search(r"channel_id=(\d+)", line)
        # A TPU's compiler may write one into several fusions, which run its parts.
        key = (kind, channel[1]) if channel else (name, line)
        if key in seen:
          continue
        seen.add(key)
        shapes = read_shapes(result)
        if kind != opcode:  # the result of a start holds the operands too
          shapes = shapes[len(shapes) // 2 :] if kind == "all-gather" else shapes[:1]
        if "all-reduce-scatter" in caller or "all-reduce-scatter" in name:
          kind = "reduce-scatter"
        op = re.search(r'op_name="([^"]*)"', line)
        found.append(Collective(kind, tuple(shapes), trips, op[1] if op else ""))
      if opcode == "while":
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        body = re.search(r"body=%?([\w.\-]+)", line)[1]
        walk(body, trips * (int(known[1]) if known else 1), body)
        continue
      names = re.findall(r"(?:calls|to_apply|(?:true|false)_computation)=%?([\w.\-]+)", line)
      branches = re.search(r"branch_computations=\{([^}]*)\}", line)
      names += [b.strip().lstrip("%") for b in branches[1].split(",")] if branches else []
      for called in names:
        walk(called, trips, called)

  walk(entry, 1, entry)
  return found


def add_bytes(found: list[Collective]) -> dict[str, int]:
  """Adds the bytes of a step by kind."""
  total = collections.Counter()
  for c in found:
    total[c.kind] += c.trips * c.num_bytes
  return dict(total)


def list_arrays(text: str) -> set[tuple[str, tuple[int, ...]]]:
  """Lists the types of all arrays in a program."""
  return set(read_shapes(text))


def count_step_bytes(
  experiment: Experiment, shape: tuple[int, int, int], weight_size: int = 4
) -> dict[str, float]:
  """Counts the bytes that a step of a stacked network has to move, by kind, on each device.

  Matrices are gathered twice in each layer, for the forward and the backward pass, and once for the
  head. A gradient is summed over "fsdp" where it arises and over "data" in the part that a device
  keeps. Over "tensor" the stream is summed twice in each layer and pass, and for the embedding and
  the gradient of the head. The embedding's rows change sides once in each pass.

  Args:
    experiment: resolved; its head is tied, activations are float32.
    shape: sizes of data, fsdp and tensor, which divide everything.
    weight_size: bytes of a weight that is gathered.
  """
  config, data = experiment.model, experiment.data
  num_data, num_fsdp, num_tensor = shape
  table = param_table(config)
  blocks = [p for p in table["blocks"].values() if len(p.shape) > 1 and p.kind == "matrix"]
  layers = 4 * config.num_layers * sum(math.prod(p.shape) for p in blocks) / num_tensor
  head = 4 * math.prod(table["tok_embed"].shape) / num_tensor
  positions = 4 * math.prod(table["pos_embed"].shape)
  tokens = data.batch_size * data.seq_len / num_data / num_fsdp
  stream = 4 * tokens * config.d_model
  total = collections.Counter()
  if num_fsdp > 1:
    total["all-gather"] = weight_size / 4 * (2 * layers + head) + 4 * tokens * num_fsdp
    total["reduce"] = layers + head
    total["all-to-all"] = 2 * stream
  if num_data > 1:
    total["reduce"] += (layers + 2 * head + positions) / num_fsdp
  if num_tensor > 1:
    total["reduce"] += (4 * config.num_layers + 2) * stream
  return dict(total)
