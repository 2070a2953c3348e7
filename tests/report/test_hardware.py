"""What devices are here, and what a step takes of their memory."""

import types

import jax
import pytest

from jgpt.config import catalog
from jgpt.config.settings import change, resolve
from jgpt.report.hardware import describe_devices, list_memory


def make_device(platform, kind, **memory):
  return types.SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: memory)


@pytest.mark.parametrize(
  ("platform", "kind", "count", "memory", "peak", "multiplies", "computes"),
  [
    (
      *("gpu", "Tesla T4", 1, "11.8 GB", "8.1 TFLOP/s in float32; no units for bfloat16 and TF32"),
      *("in float32, which keeps about 7", "float32, since this device has no units for bfloat16"),
    ),
    (
      *("tpu", "TPU v5 lite", 8, "16.9 GB", "197 TFLOP/s in bfloat16; no units for TF32 and float"),
      *("in bfloat16, one pass", "bfloat16, which this device multiplies faster"),
    ),
    (
      *(
        "gpu",
        "NVIDIA H100 80GB HBM3",
        1,
        "63.7 GB",
        "989 TFLOP/s in bfloat16, 494",
      ),
      *("in TF32, which keeps about 3", "bfloat16, which this device multiplies faster"),
    ),
    ("gpu", "NVIDIA GeForce RTX 9090", 2, "not known", "not known", "in TF32", "bfloat16, which"),
  ],
)
def test_a_device_is_described(platform, kind, count, memory, peak, multiplies, computes):
  rows = dict(describe_devices([make_device(platform, kind)] * count))
  assert rows["devices"] == f"{count} × {platform.upper()} ({kind})"
  assert memory in rows["memory"]
  assert rows.get("peak of each", rows.get("peak")).startswith(peak)
  assert multiplies in rows["float32"] and computes in rows["jgpt"]


def test_a_processor_is_described_by_what_it_multiplies(monkeypatch):
  """And a device that says what is free on it is believed."""
  for has, words in (("avx512_bf16", "from 500,000 parameters on"), (None, "does not mul")):
    monkeypatch.setattr("jgpt.report.hardware.find_bfloat16", lambda has=has: has)
    assert words in dict(describe_devices(jax.devices()))["jgpt"]
  device = make_device("gpu", "Tesla T4", bytes_limit=10**10, bytes_in_use=10**9)
  assert dict(describe_devices([device]))["memory"] == "9 GB free on each"


def test_the_memory_of_a_step_is_listed_for_each_choice():
  """Of GPT-2 at 16 sequences of 1,024 tokens in float32 on a T4, by hand."""
  experiment = resolve(catalog.load_experiment("gpt2_shakespeare"), 50257)
  settings = {"data.seq_len": 1024, "data.batch_size": 16, "compute.attention": "plain"}
  experiment = change(experiment, settings | {"compute.remat": "block"})
  device = make_device("gpu", "Tesla T4", bytes_limit=10**11)
  choices = [{}, {"train.micro_batch_size": 4, "compute.loss_chunks": 8}]
  header, whole, less = list_memory(experiment, choices, [device])
  assert header[0] == "settings" and whole[0] == "as they are"
  assert less[0] == "train.micro_batch_size=4 compute.loss_chunks=8"
  logits = 8 * 16 * 1024 * 50304
  state, kept = 16 * 124_439_808, 4 * 16 * 1024 * (12 * 768 + 8 * 768 + 2 * 3072 + 12 * 1024)
  assert whole[1:5] == tuple(
    f"{n / 1e9:.3g} GB" for n in (state, kept, logits, state + kept + logits)
  )
  assert whole[5] == f"{(state + kept + logits) / 1e11:.1%}"
  assert less[1] == f"{(state + 4 * 124_439_808) / 1e9:.3g} GB", "a sum of gradients besides"
  assert less[3] == f"{logits / 32 / 1e6:.3g} MB"
