"""The start and the end of a run's output: what is said about its settings, what is suggested."""

import types

import jax
import numpy as np
import pytest

from jgpt.batches import Documents, Stream
from jgpt.config import catalog
from jgpt.config.settings import change, resolve
from jgpt.report.summary import (
  describe_groups,
  describe_length,
  describe_throughput,
  describe_undivided,
  describe_untrained,
  describe_widths,
)
from jgpt.sharding import AXES


def test_the_ratio_of_the_mlps_width_is_said_where_it_is_not_four():
  """Changing `model.d_model` alone leaves `model.d_ff` behind; what is advised mends that."""
  names = catalog.load_experiment("names")
  assert describe_widths(names) == []
  wide = change(names, {"model.d_model": 48})
  ((_, line),) = describe_widths(wide)
  assert line.startswith("model.d_ff=64 is 1.33 times model.d_model=48;")
  assert line.endswith("--set model.d_ff=192")
  assert describe_widths(change(wide, {"model.d_ff": 192})) == []


def test_the_start_names_the_optimizer_and_what_decays_how():
  """What each does not read is said, so that a given b1 is not taken for one that acts."""

  def describe(**settings):
    changes = {f"optimizer.{name}": value for name, value in settings.items()}
    return describe_groups(change(resolve(catalog.load_experiment("names"), 27), changes))

  assert describe() == "AdamW without decay" and describe(name="adam") == "Adam without decay"
  ends = "; b1, b2 and eps are not read"
  assert describe(name="sgd") == f"SGD, no momentum, no decay{ends}"
  decays = {"weight_decay": 0.1, "decay_kinds": ("matrix",)}
  what = "3,072 numbers in 4 arrays (matrix); none on 1,120 numbers in 3 arrays (embedding, head)"
  assert describe(**decays) == f"AdamW, decay 0.1 on {what}"
  assert describe(name="adam", **decays) == f"Adam, L2 decay 0.1 in the gradient of {what}"
  line = describe(name="sgd", momentum=0.9, **decays)
  assert line == f"SGD, momentum 0.9, L2 decay 0.1 in the gradient of {what}{ends}"


def test_the_start_names_what_an_axis_does_not_divide():
  """Of GPT-2 twelve heads, over eight devices; where all is divided nothing is said."""
  experiment = resolve(catalog.load_experiment("gpt2_shakespeare"), 50257)

  def describe(*shape):
    return describe_undivided(experiment, jax.sharding.AbstractMesh(shape, AXES))

  assert describe(8, 1, 1) == describe(2, 2, 2) == describe(1, 2, 4) == []
  (line,) = describe(1, 1, 8)
  assert line == (
    "mesh.tensor=8 does not divide model.num_heads=12: each of its devices has all of w_qkv, "
    "b_qkv, w_out"
  )
  first, *_ = describe(1, 5, 1)
  assert "mesh.fsdp=5 does not divide model.d_model=768: " in first and "tok_embed" in first


def test_the_start_names_the_formula_and_the_peak_of_the_mfu():
  """What is computed decides the peak; padding is no token; an unknown device has no peak."""
  experiment = resolve(catalog.load_experiment("gpt2_shakespeare"), 50257)
  experiment = change(experiment, {"data.seq_len": 1024, "compute.attention": "plain"})
  chips = [types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")] * 8
  line = describe_throughput(experiment, chips)
  assert "without padding, each 6 P + 6 L D T = 797,815,296 FLOPs" in line
  assert line.endswith("; MFU is the share of 8 x 197 TFLOP/s")
  card = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-40GB")
  assert describe_throughput(experiment, [card]).endswith("of 312 TFLOP/s")
  float32 = change(experiment, {"compute.dtype": "float32"})
  assert describe_throughput(float32, [card]).endswith("of 156 TFLOP/s")
  float32 = change(float32, {"compute.precision": "highest"})
  assert describe_throughput(float32, [card]).endswith("of 19.5 TFLOP/s")
  assert "MFU n/a: no peak of cpu is known" in describe_throughput(experiment, jax.devices()[:1])


def plan_of(name, weights=None, **changes):
  """A plan on 20,001 tokens, or on 50 documents of 6 predictions."""
  changes = {"data.batch_size": 4, "data.seq_len": 10} | changes
  experiment = change(catalog.load_experiment(name), changes)
  documents = ["abcde"] * 50 if experiment.data.batching == "documents" else []
  stream = Stream(np.zeros(20_001, np.int32))
  rows = Documents(np.zeros((50, 11), np.int32), np.full(50, 6))
  data = types.SimpleNamespace(train=rows if documents else stream, documents=documents)
  return types.SimpleNamespace(
    experiment=experiment, data=data, epoch_steps=None, weights=weights, origin=None
  )


@pytest.mark.parametrize(
  ("name", "changes", "words"),
  [
    ("shakespeare_bytes", {"train.steps": 950}, "1.9 times the training part"),
    ("shakespeare_bytes", {"train.steps": 100}, "20.0% of the training part"),
    (
      "shakespeare_bytes",
      {"train.steps": 950, "data.num_batches": 1},
      "the same batch every time, 0.2% of the training part",
    ),
    (
      "shakespeare_bytes",
      {"train.steps": 950, "data.num_batches": 3},
      "the same 3 batches 316.7 times, 0.6% of the training part",
    ),
    ("shakespeare_bytes", {"train.steps": 2, "data.num_batches": 3}, "0.4% of the training part"),
    ("shakespeare_bytes", {"train.steps": 100_000}, "200 times the training part"),
    (
      "shakespeare_bytes",
      {"train.steps": 1000, "data.batching": "epochs", "data.num_batches": 250},
      "the same 250 batches 4 times, 50.0% of the training part",
    ),
    ("names", {"train.steps": 10}, "80.0% of the training documents"),
    (
      "names",
      {"train.steps": 1000, "data.num_batches": 1},
      "the same batch every time, 8.0% of the training documents",
    ),
    ("names", {"train.steps": 100}, "8.0 times the training documents"),
  ],
)
def test_how_much_of_the_training_part_a_run_takes(name, changes, words):
  assert describe_length(plan_of(name, **changes)).endswith(f": {words}")


def test_positions_that_no_window_has_are_named():
  (line,) = describe_untrained(plan_of("shakespeare_bytes", **{"model.max_seq_len": 64}))
  assert line.startswith("positions 10 to 63 are never trained")
  assert describe_untrained(plan_of("shakespeare_bytes", **{"model.max_seq_len": 10})) == []
  # Weights that were found may have been trained there.
  assert describe_untrained(plan_of("shakespeare_bytes", {"location": "gpt2"})) == []
