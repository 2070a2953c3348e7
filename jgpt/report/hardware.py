"""What devices are here, and what a training step takes of their memory, as rows of tables.

`tables.py` formats them. The numbers are from `devices/limits.py` and `devices/footprint.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jgpt.config import Experiment
from jgpt.config.settings import change, format_value
from jgpt.devices.compute import (
  BFLOAT16_PARAMS,
  explain_products,
  multiplies_bfloat16,
  resolve_compute,
)
from jgpt.devices.footprint import describe_bytes, estimate_footprint
from jgpt.devices.limits import find_accelerator
from jgpt.devices.runtime import find_free_memory
from jgpt.system.processor import find_bfloat16


def describe_devices(devices: Sequence[jax.Device]) -> list[tuple[str, str]]:
  """Describes devices of one kind: their memory, their peak, and what jgpt computes in.

  Args:
    devices: as `runtime.devices` finds them.

  Returns:
    Labels and sentences; the first row names the devices.
  """
  device, free = devices[0], find_free_memory(devices[0], len(devices))
  known = find_accelerator(device.device_kind)
  rows = [
    ("devices", f"{len(devices)} × {device.platform.upper()} ({device.device_kind})"),
    ("memory", "not known" if free is None else f"{describe_bytes(free)} free on each"),
  ]
  if known is None:
    rows.append(("peak", "not known; python -m jgpt.bench measures what is reached"))
  else:
    peaks = {"bfloat16": known.bf16, "TF32": known.tf32, "float32": known.float32}
    words = [f"{peak / 1e12:g} TFLOP/s in {name}" for name, peak in peaks.items() if peak]
    lacks = [name for name, peak in peaks.items() if not peak]
    none = f"; no units for {' and '.join(lacks)}" if lacks else ""
    rows.append(("peak of each", f"{', '.join(words)}{none}"))
  precision = jax.config.jax_default_matmul_precision
  rows.append(("float32", explain_products(device.platform, device.device_kind, precision)))
  return [*rows, ("jgpt", explain_dtype(device))]


def explain_dtype(device: jax.Device) -> str:
  """Explains which `compute.dtype` is chosen on a device where it is "auto".

  Args:
    device: one of those that compute.
  """
  if device.platform != "cpu":
    if multiplies_bfloat16(device):
      return "computes in bfloat16, which this device multiplies faster than float32"
    return "computes in float32, since this device has no units for bfloat16"
  if find_bfloat16() is None:
    return "computes in float32, since this processor does not multiply bfloat16"
  return f"computes in bfloat16 from {BFLOAT16_PARAMS:,} parameters on, smaller models in float32"


def list_memory(
  experiment: Experiment, choices: Sequence[dict[str, Any]], devices: Sequence[jax.Device]
) -> list[tuple[str, ...]]:
  """Lists what a step takes of each device by formula, under each of several changes.

  Args:
    experiment: resolved; `compute` may hold "auto".
    choices: changes as `settings.change` takes them, as from `footprint.list_remedies`; an empty
      one changes nothing.
    devices: that share a batch.

  Returns:
    A header, and a row for each choice; the state is parameters and moments.
  """
  free = find_free_memory(devices[0], len(devices))
  rows = [("settings", "state, gradients", "activations", "logits", "in all", "of free memory")]
  for changes in choices:
    resolved = resolve_compute(change(experiment, changes), devices[0])
    need = estimate_footprint(resolved, len(devices))
    state = need.parameters + need.moments + need.gradients
    sizes = (state, need.activations, need.logits, need.total)
    label = " ".join(f"{name}={format_value(value)}" for name, value in changes.items())
    share = "not known" if free is None else f"{need.total / free:.1%}"
    rows.append((label or "as they are", *map(describe_bytes, sizes), share))
  return rows
