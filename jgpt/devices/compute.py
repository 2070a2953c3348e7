"""What makes a platform faster and computes the same: "auto" resolved, and compiler options.

Every choice by platform is here, with its reason and what it was measured to gain (2 cores of an
AMD EPYC, Zen 4, jax 0.10.2; `python -m jgpt.bench`). `--set compute.tricks=false` makes every
"auto" the plain definition, and the equivalence tests run with and without. What the fields mean is
in `config/experiment.py`; what is computed is in `model.py` and `step.py`.
"""

import dataclasses
import functools
import re
from typing import Any

import jax

from jgpt.config import ComputeConfig, Experiment
from jgpt.config.experiment import PLAIN, may_group_documents
from jgpt.devices.kernels import choose_attention
from jgpt.params import count_params
from jgpt.system.processor import find_bfloat16

SMALL_MODEL_PARAMS = 100_000
BFLOAT16_PARAMS = 500_000
FUSIONS = "xla_cpu_experimental_ynn_fusion_type"  # names XLA's YNNPACK fusions; "" is none
# For a program that runs once: LLVM's heavier passes took 0.9 s of the 1.4 s in which `names`'
# initial values compiled.
QUICK_OPTIONS = {"xla_backend_optimization_level": 1}


def resolve_compute(experiment: Experiment, device: jax.Device) -> Experiment:
  """Returns the experiment with every "auto" of `compute` replaced; a value that is given stays.

  But for two: `compiler_options` may be left at "auto", where there are any to choose, and a kernel
  of attention that cannot compute the experiment is replaced; `explain_compute` says why.

  Args:
    experiment: resolved otherwise.
    device: one of those that compute, or of a topology that is not there.
  """
  return _choose(experiment, device)[0]


def explain_compute(experiment: Experiment, device: jax.Device) -> list[str]:
  """Explains what `resolve_compute` could not choose as asked, a line each."""
  return _choose(experiment, device)[1]


def _choose(experiment: Experiment, device: jax.Device) -> tuple[Experiment, list[str]]:
  given, chosen = experiment.compute, PLAIN
  is_divided = (experiment.mesh.fsdp, experiment.mesh.tensor) != (1, 1)  # are parameters
  if given.tricks and device.platform == "cpu":
    chosen = ComputeConfig(
      dtype="bfloat16" if is_bfloat16_quicker(experiment) else "float32",
      # A flat product merges dimensions, of which one may be divided.
      matmul="einsum" if is_divided else "flat",
      layers="scan" if experiment.model.num_layers == 1 else "unroll",
      remat="none",
      loss_chunks=1,
      group_documents=is_grouping_worthwhile(experiment),
      # In order, an entry of each moment is looked at, for which divided ones would be gathered.
      select="plain" if is_divided else "ordered",
    )
  elif given.tricks:
    chosen = choose_for_accelerator(experiment, device)
  values = {
    field.name: getattr(chosen, field.name)
    for field in dataclasses.fields(given)
    if getattr(given, field.name) == "auto" and field.name != "attention"
  }
  compute = dataclasses.replace(given, **values)
  attention, lines = choose_attention(dataclasses.replace(experiment, compute=compute), device)
  compute = dataclasses.replace(compute, attention=attention)
  return dataclasses.replace(experiment, compute=compute), lines


def choose_for_accelerator(experiment: Experiment, device: jax.Device) -> ComputeConfig:
  """Chooses for a TPU or a GPU, by what compilers say; nothing of it is measured.

  GPT-2 124M, 8 sequences of 1,024 positions: for a v5e layers written out took 173 M cycles and 7.2
  GB where a loop took 296 M and 15.3 GB, in twice the time to compile; computing norms and
  activation functions again added 12% to the cycles and saved nothing. For an H100 both kinds of
  layers take as much memory, and without those parts 7.3 GB instead of 14.3 with cuDNN.

  Args:
    experiment: resolved otherwise.
    device: one of those that compute; it need not be there.
  """
  is_tpu = device.platform == "tpu"
  return dataclasses.replace(
    PLAIN,
    tricks=True,
    dtype="bfloat16" if multiplies_bfloat16(device) else "float32",
    layers="unroll" if is_tpu and experiment.model.num_layers > 1 else "scan",
    remat="none" if is_tpu else "elementwise",
  )


def resolve_dtype(experiment: Experiment, device: jax.Device) -> Experiment:
  """Returns the experiment with the dtype that it has on a device, a part of a run's identity.

  Args:
    experiment: resolved otherwise; the other fields of `compute` stay.
    device: one of those that compute.
  """
  dtype = resolve_compute(experiment, device).compute.dtype
  compute = dataclasses.replace(experiment.compute, dtype=dtype)
  return dataclasses.replace(experiment, compute=compute)


def is_bfloat16_quicker(experiment: Experiment) -> bool:
  """Returns whether this machine's processor takes less time for a step in bfloat16.

  It must multiply bfloat16 itself, and XLA:CPU have the fusions that make it do so. A step took
  1.5 times less processor time with 0.8 million parameters (`shakespeare_char_cpu`), 1.6 times less
  with 124 million (`gpt2_shakespeare`); smaller models than these gain nothing by it.
  """
  is_large = count_params(experiment.model) >= BFLOAT16_PARAMS
  return is_large and find_bfloat16() is not None and FUSIONS in keep_known_options({FUSIONS: ""})


def multiplies_bfloat16(device: jax.Device) -> bool:
  """Returns whether an accelerator multiplies bfloat16 faster than float32.

  TPUs do, and NVIDIA's GPUs from compute capability 8.0 on, which are those with TF32.
  """
  return device.platform == "tpu" or (
    device.platform == "gpu" and not WITHOUT_TF32.search(device.device_kind)
  )


def is_grouping_worthwhile(experiment: Experiment) -> bool:
  """Returns whether a batch has documents enough to group those of like length.

  Five of six names fit into half of the 16 positions, where a step takes a third of the time: at
  batch 64 a name took 8.0 us instead of 14.0, at batch 16 11.1 instead of 15.8. Below 16 the
  groups' own cost is more than what they save: at batch 1 a step would gain 5 of 30 us, and
  compiling lose half a second.
  """
  return experiment.data.batch_size >= 16 and may_group_documents(experiment)


def choose_step_options(experiment: Experiment) -> dict:
  """Chooses XLA's options for the training step.

  A small model's operations are shorter than the cost of handing them to other threads, and of
  XLA's YNNPACK fusions: without both, a step of `names` took 36 us instead of 46. LLVM's heavier
  passes make its loops of 16 longer, not faster: at level 1 it took 31 us. At batch 64: 0.92 ms;
  with the fusions 1.05, with threads 1.72, with neither option 1.23.

  Args:
    experiment: from `resolve_compute`.
  """
  is_small = count_params(experiment.model) <= SMALL_MODEL_PARAMS
  if experiment.compute.compiler_options != "auto" or not is_small:
    return {}
  return keep_known_options(QUICK_OPTIONS | {"xla_cpu_multi_thread_eigen": False, FUSIONS: ""})


def choose_quick_options(experiment: Experiment) -> dict:
  """Chooses XLA's options for a program that runs once, of an experiment from `resolve_compute`."""
  if experiment.compute.compiler_options != "auto":
    return {}
  return keep_known_options(QUICK_OPTIONS)


def keep_known_options(options: dict[str, Any]) -> dict[str, Any]:
  """Keeps those of XLA's options that the compiler for CPUs knows; there are none for others.

  Options come and go with its versions (that of jaxlib 0.7.2 has no `FUSIONS`), and an unknown one
  is an error where it is used. An empty program is compiled with them, once in a process: 10 ms.

  Args:
    options: name -> value, as `jax.jit` takes them.
  """
  if _are_known(tuple(options.items())):
    return options
  return {name: value for name, value in options.items() if _are_known(((name, value),))}


def probe_options() -> None:
  """Computes nothing: the program that options are compiled with, to see whether they are known."""


@functools.cache
def _are_known(options: tuple[tuple[str, Any], ...]) -> bool:
  try:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
      jax.jit(probe_options).lower().compile(compiler_options=dict(options))
  except jax.errors.JaxRuntimeError:  # INVALID_ARGUMENT: No such compile option
    return False
  return True


# --- The precision of products ---

# In the kinds of GPUs that do not multiply in TF32: NVIDIA's of a compute capability below 8.0, and
# AMD's. Every other one is taken for a newer one of NVIDIA's.
WITHOUT_TF32 = re.compile(
  r"\b([KMP]\d{1,4}|V100\w*|T4G?|T\d{3,4}|GTX|GT|MX\d+|TITAN|Quadro|RTX 20\d\d)\b"
  r"|^(AMD|Radeon|gfx)",
  re.IGNORECASE,
)
# Values of jax_default_matmul_precision that mean the same.
PRECISIONS = {
  None: "default",
  "bfloat16": "default",
  "fastest": "default",
  "tensorfloat32": "high",
  "bfloat16_3x": "high",
  "float32": "highest",
}
# How jax multiplies float32 -> decimal digits of a factor that it keeps: 24, 11, 8 and 16 bits.
DIGITS = {"float32": 7, "TF32": 3, "bfloat16, one pass": 2, "bfloat16, three passes": 5}


def describe_products(platform: str, kind: str, precision: str | None = None) -> str:
  """Describes in which precision a device multiplies float32 matrices, which JAX decides.

  Sums are float32 in each case.

  Args:
    platform: of the device: "cpu", "gpu" or "tpu".
    kind: its `device_kind`.
    precision: the value of `jax_default_matmul_precision`; None is JAX's default.

  Source: JAX's documentation of `jax.lax.Precision`.
  """
  if precision and precision.isupper():  # a preset of `jax.lax.DotAlgorithmPreset`
    return f"float32 as {precision}"
  chosen = PRECISIONS.get(precision, precision)
  if platform == "tpu" and chosen != "highest":
    passes = "one pass" if chosen == "default" else "three passes"
    return f"float32 as bfloat16, {passes}"
  if platform == "gpu" and chosen != "highest" and not WITHOUT_TF32.search(kind):
    return "float32 as TF32"
  return "float32"


def explain_products(platform: str, kind: str, precision: str | None = None) -> str:
  """Explains in a sentence what `describe_products` names, and which setting changes it.

  Args:
    platform: as for `describe_products`.
    kind: as for `describe_products`.
    precision: as for `describe_products`.
  """
  form = describe_products(platform, kind, precision).removeprefix("float32 as ")
  words = f"float32 matrices are multiplied in {form}"
  if form in DIGITS:
    words += f", which keeps about {DIGITS[form]} digits of each factor"
  return words if form == "float32" else f"{words}; compute.precision=highest keeps all 7"
