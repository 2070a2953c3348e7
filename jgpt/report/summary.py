"""The start and the end of a run's output: what is planned, what was learned, what to try next.

Lines of progress are in `console.py`, the verdict on the losses is in `verdict.py`; `run.py` calls
these functions in order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jgpt import sharding
from jgpt.batches import count_epoch_steps
from jgpt.config import Experiment, OptimizerConfig
from jgpt.config.experiment import PARAM_KINDS
from jgpt.config.settings import format_value, list_settings
from jgpt.devices import runtime
from jgpt.devices.compute import explain_compute, resolve_compute
from jgpt.devices.footprint import describe_bytes, describe_footprint, estimate_footprint
from jgpt.devices.limits import count_train_flops
from jgpt.errors import UserError, printable
from jgpt.params import count_params, walk
from jgpt.plan import Plan
from jgpt.report.console import draw_curve, format_perplexity, format_samples, indent, uniform_loss
from jgpt.report.verdict import (
  LAST,
  count_idle_updates,
  describe_expected,
  diagnose_losses,
  final_loss,
  match_expected,
)
from jgpt.system.command import python_command
from jgpt.weights.initial import InitialParams

if TYPE_CHECKING:  # jax is imported after the arguments are understood
  from jgpt.runs.result import Result
  from jgpt.text.tokenizer import Tokenizer


def describe_plan(plan: Plan, devices: Sequence[jax.Device]) -> list[tuple[str, str]]:
  """Describes a planned run, as labelled printable lines.

  Args:
    plan: of the run.
    devices: those there are.

  Raises:
    UserError: if the devices do not fit the settings.
  """
  experiment, data = plan.experiment, plan.data
  mesh = sharding.make_mesh(experiment, devices)
  used, device = mesh.devices.size, devices[0]
  kind = f"{os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
  count = (
    f"{used} of {len(devices)} devices ({sharding.describe_shape(mesh)}): "
    if len(devices) > 1
    else ""
  )
  lines = [
    ("experiment", plan.name or "(from Python)"),
    ("device", f"{count}{device.platform.upper()} ({kind}), jax {jax.__version__}"),
    *(("", line) for line in describe_undivided(experiment, mesh)),
    *_describe_numeric_options(),
    ("data", f"{data.text.location} ({data.text.kind}, SHA-256 {data.text.sha256[:12]})"),
  ]
  if data.text.note:
    lines.append(("", data.text.note))
  lines += [("", line) for line in data.summary]
  lines += [
    ("vocabulary", describe_vocabulary(plan)),
    ("model", f"{count_params(experiment.model):,} parameters"),
    *describe_widths(experiment),
    *describe_initial(plan),
    ("optimizer", describe_groups(experiment)),
    ("training", describe_length(plan)),
    *(("", line) for line in describe_rates(experiment)),
    *(("", line) for line in describe_untrained(plan)),
    ("compute", describe_compute(experiment, device)),
    *(("", line) for line in explain_compute(experiment, device)),
    ("products", runtime.describe_precision(device, resolve_compute(experiment, device).compute)),
    ("memory", describe_memory(experiment, mesh.devices.flatten())),
    ("throughput", describe_throughput(experiment, mesh.devices.flatten())),
    (
      "baseline",
      f"uniform guessing: {uniform_loss(experiment.model.vocab_size):.3f} nats per token",
    ),
    ("run folder", str(plan.workdir or "none: nothing is kept")),
    *describe_profile(plan),
  ]
  return [(label, printable(line)) for label, line in lines]  # names of files may be anything


def describe_undivided(experiment: Experiment, mesh: jax.sharding.Mesh) -> list[str]:
  """Describes which parameters an axis of a mesh leaves whole, since it does not divide them.

  Args:
    experiment: resolved.
    mesh: of the run.

  Returns:
    A line for each axis and size that do not go together; none where all is divided.
  """
  model, found = experiment.model, {}
  names = {
    "embed": "model.d_model",
    "heads": "model.num_heads",
    "mlp": "model.d_ff",
    "vocab": "padded vocabulary",
  }
  for name, param, _ in walk(model):
    for axis, size in zip(param.axes, param.shape, strict=True):
      for over in sharding.RULES.get(axis, ()):
        if size % mesh.shape[over]:
          whole = found.setdefault((over, f"{names[axis]}={size}"), [])
          whole.append(name.removeprefix("blocks/"))
  return [
    f"mesh.{over}={mesh.shape[over]} does not divide {what}: each of its "
    f"devices has all of {', '.join(dict.fromkeys(whole))}"
    for (over, what), whole in found.items()
  ]


def describe_profile(plan: Plan) -> list[tuple[str, str]]:
  """Describes which updates are profiled, as a labelled line; none where none are."""
  if plan.profile is None:
    return []
  first, last, folder = plan.profile.first, plan.profile.last, plan.profile.folder
  return [("profile", f"updates {first:,} to {last:,}, in {folder}: xprof --logdir {folder}")]


def _describe_numeric_options() -> list[tuple[str, str]]:
  """Describes options that are not JAX's defaults and may change numbers, as a labelled line."""
  found = runtime.find_numeric_options()
  shown = ", ".join(f"{name.upper()}={value}" for name, value in found.items())
  return [("", f"not the default, and may change results: {shown[:300]}")] if found else []


def describe_initial(plan: Plan) -> list[tuple[str, str]]:
  """Describes what a run begins from and which settings came with it, as labelled lines.

  None for weights that are drawn.
  """
  lines = []
  if plan.origin is not None:
    lines = _describe_origin(plan.origin, plan.experiment.optimizer)
  elif plan.weights is not None:
    began = "" if plan.initial else "began from "
    sha256 = plan.weights["sha256"][:12]
    lines = [("weights", f"{began}{plan.weights['location']} (SHA-256 {sha256})")]
    if isinstance(plan.initial, InitialParams) and plan.initial.note:
      lines.append(("", plan.initial.note))
  settings = list_settings(plan.experiment)
  words = [f"{name}={format_value(settings[name])}" for name in plan.adopted]
  came = textwrap.wrap(" ".join(["came with it:", *words]), 88, break_long_words=False)
  return [*lines, *(("", line) for line in came)] if words else lines


def _describe_origin(origin: dict[str, Any], optimizer: OptimizerConfig) -> list[tuple[str, str]]:
  """Describes what a continued run takes over from its origin, and what begins anew."""
  kept = "parameters, momentum" if optimizer.name == "sgd" else "parameters, moments, their count"
  location, step, tokens = origin["location"], origin["step"], origin["tokens"]
  seen = "" if tokens is None else f", {tokens:,} tokens"
  return [
    ("origin", f"{location} at step {step:,}{seen} (SHA-256 {origin['sha256'][:12]})"),
    ("", f"kept: {kept}; begun anew: step, schedule, order of the data"),
  ]


def describe_vocabulary(plan: Plan) -> str:
  """Describes the tokenizer, and the model's vocabulary if that is larger."""
  there, has = plan.data.tokenizer.describe(), plan.experiment.model.vocab_size
  return there if has == plan.data.tokenizer.vocab_size else f"{there}; the model has {has:,}"


def describe_widths(experiment: Experiment) -> list[tuple[str, str]]:
  """Describes the MLP's width beside the model's, as a labelled line; none if it is 4 times that.

  Changing `model.d_model` leaves `model.d_ff` as it was.
  """
  d_model, d_ff = experiment.model.d_model, experiment.model.d_ff
  if d_ff == 4 * d_model:
    return []
  ratio = f"model.d_ff={d_ff} is {d_ff / d_model:.3g} times model.d_model={d_model}"
  return [("", f"{ratio}; GPT-2 has 4 times: --set model.d_ff={4 * d_model}")]


def describe_groups(experiment: Experiment) -> str:
  """Describes the optimizer, and counts the parameters that decay: torch's param_groups."""
  optimizer, model = experiment.optimizer, experiment.model
  momentum = f"momentum {optimizer.momentum:g}" if optimizer.momentum else "no momentum"
  name = {"adamw": "AdamW", "adam": "Adam", "sgd": f"SGD, {momentum}"}[optimizer.name]
  end = "; b1, b2 and eps are not read" if optimizer.name == "sgd" else ""
  if not optimizer.weight_decay:
    return f"{name}{' without' if not end else ', no'} decay{end}"

  def describe_group(kinds: list[str]) -> str:
    found = [
      (param.size * layers, layers) for _, param, layers in walk(model) if param.kind in kinds
    ]
    numbers, arrays = sum(size for size, _ in found), sum(layers for _, layers in found)
    return f"{numbers:,} numbers in {arrays} arrays ({', '.join(kinds)})"

  there = [kind for kind in PARAM_KINDS if count_params(model, (kind,))]
  decays = [kind for kind in there if kind in optimizer.decay_kinds]
  rest = [kind for kind in there if kind not in decays]
  decay = f"decay {optimizer.weight_decay:g} on"
  if optimizer.name != "adamw":
    decay = f"L2 decay {optimizer.weight_decay:g} in the gradient of"
  line = f"{name}, {decay} {describe_group(decays)}" if decays else f"{name}, decay on nothing"
  return f"{line}; none on {describe_group(rest)}{end}" if rest else f"{line}{end}"


def describe_compute(experiment: Experiment, device: jax.Device) -> str:
  """Describes how a run computes on a device, each choice as `--set compute.` takes it."""
  chosen = dataclasses.asdict(resolve_compute(experiment, device).compute)
  return " ".join(f"{name}={format_value(value)}" for name, value in chosen.items())


def describe_memory(experiment: Experiment, devices: Sequence[jax.Device]) -> str:
  """Describes what a step takes of each device by formula, and what is free for it.

  Args:
    experiment: `compute` may hold "auto".
    devices: that the run uses.
  """
  experiment = resolve_compute(experiment, devices[0])
  parts = describe_footprint(estimate_footprint(experiment, len(devices)))
  free = runtime.find_free_memory(devices[0], len(devices))
  return f"by formula: {parts}; free: {'n/a' if free is None else describe_bytes(free)}"


def describe_throughput(experiment: Experiment, devices: Sequence[jax.Device]) -> str:
  """Describes what rates count, and the formula and the peak of the share of it (MFU).

  Args:
    experiment: `compute` may hold "auto".
    devices: that the run uses.
  """
  flops = count_train_flops(experiment.model, experiment.data.seq_len)
  compute = resolve_compute(experiment, devices[0]).compute
  peak = runtime.find_peaks(devices, compute)
  words = f"of tokens without padding, each 6 P + 6 L D T = {flops:,} FLOPs"
  if peak is None:
    return f"{words}; MFU n/a: no peak of {devices[0].device_kind} is known"
  number = f"{len(devices)} x " if len(devices) > 1 else ""
  return f"{words}; MFU is the share of {number}{peak / len(devices) / 1e12:.4g} TFLOP/s"


def describe_length(plan: Plan) -> str:
  """Describes the number of updates, the batch, and how much of the training part they take."""
  experiment, data = plan.experiment, plan.data
  batch_size, steps = experiment.data.batch_size, experiment.train.steps
  num_batches = min(steps, experiment.data.num_batches or steps)
  repeated = ""
  if num_batches == 1 < steps:
    repeated = "the same batch every time, "
  elif num_batches < steps:
    times = f"{steps / num_batches:,.1f}".removesuffix(".0")
    repeated = f"the same {num_batches:,} batches {times} times, "
  if not data.documents:
    T, num_tokens = experiment.data.seq_len, len(data.train.tokens)
    passes = num_batches * batch_size * T / num_tokens
    if epoch_steps := count_epoch_steps(data.train, experiment.data):
      passes = num_batches / epoch_steps
    words = f"{steps:,} steps of {batch_size} × {T} tokens"
    return f"{words}: {repeated}{_format_passes(passes)} the training part"
  tokens = data.train.lengths.mean() * batch_size
  passes = num_batches * batch_size / len(data.documents)
  documents = f"{batch_size} document{'s' * (batch_size > 1)}"
  words = f"{steps:,} steps of {documents} ({tokens:.1f} tokens on average)"
  return f"{words}: {repeated}{_format_passes(passes)} the training documents"


def describe_untrained(plan: Plan) -> list[str]:
  """Describes the positions of the model that no training window has; none where there are none."""
  model, seq_len = plan.experiment.model, plan.experiment.data.seq_len
  if seq_len == model.max_seq_len or plan.weights or plan.origin:  # which may know them
    return []
  return [
    f"positions {seq_len:,} to {model.max_seq_len - 1:,} are never trained, but sampled: "
    f"data.seq_len={seq_len} is less than model.max_seq_len={model.max_seq_len}"
  ]


def _format_passes(passes: float) -> str:
  """Formats a share or a multiple of the training part: "3.3% of", "1.9 times", "120 times"."""
  if passes < 1:
    return f"{passes:.1%} of" if passes >= 0.001 else f"{100 * passes:.1g}% of"
  return f"{passes:.1f} times" if passes < 100 else f"{passes:,.0f} times"


def describe_rates(experiment: Experiment) -> list[str]:
  """Describes learning rates that may not be what was meant; nothing of a schedule that fits.

  Rates of 0, the floor's rate of updates after the schedule's end, a schedule that ends after the
  last update, and a warmup that does not.
  """
  optimizer, steps, lines = experiment.optimizer, experiment.train.steps, []
  warmup, ends_at, is_constant = (
    optimizer.warmup_steps,
    optimizer.decay_steps,
    optimizer.schedule == "constant",
  )
  peak, end = (float(np.float32(rate)) for rate in (optimizer.peak_lr, optimizer.end_lr))
  if not steps:
    return []
  if not peak and (is_constant or not end):
    return [f"rate 0 at every update, which changes nothing: optimizer.peak_lr={peak:g}"]
  if not is_constant and steps > ends_at:
    since = f"from update {ends_at + 1:,} on, where the {optimizer.schedule} schedule has ended"
    what = f"optimizer.end_lr={end:g}, optimizer.decay_steps={ends_at}"
    lines.append(
      f"rate {end:g} {since} ({what})"
      if end
      else f"rate 0 {since} ({what}): the last {steps - ends_at:,} updates change nothing"
    )
  elif not is_constant and steps < ends_at:
    lines.append(
      f"the schedule of the rate goes on after these, to optimizer.decay_steps={ends_at}"
    )
  if warmup and warmup >= (steps if is_constant else min(steps, ends_at)):
    lines.append(f"the rate never reaches its peak: optimizer.warmup_steps={warmup}")
  return lines


def print_result(plan: Plan, result: Result, texts: list[str], seconds: float) -> None:
  """Prints what a finished run learned: losses, their curve, the verdict, and samples."""
  print()
  if len(result.losses):
    took = (
      ""
      if plan.start_step >= plan.experiment.train.steps
      else f", {seconds:.1f} s with compiling and saving"
    )
    num = min(LAST, len(result.losses))
    print(f"training loss {final_loss(result.losses):.4f} (mean of the last {num} updates){took}")
    if result.tokens_per_second is not None:
      mfu = "n/a" if result.mfu is None else f"{result.mfu:.1%}"
      print(f"throughput {result.tokens_per_second:,.0f} tokens/s in training, MFU {mfu}")
  if result.heldout_loss is not None:
    perplexity = format_perplexity(result.heldout_loss)
    documents = f"{len(plan.data.heldout.tokens):,} documents, " if plan.data.documents else ""
    print(
      f"held-out loss {result.heldout_loss:.4f} nats per token, perplexity {perplexity} "
      f"({documents}{result.heldout_tokens:,} tokens)"
    )
  if len(result.losses) > 1:
    last = [(len(result.losses), result.heldout_loss)] if result.heldout_loss is not None else []
    print(f"\n{draw_curve(result.losses, [*result.heldout_losses, *last])}")
    baseline = uniform_loss(plan.experiment.model.vocab_size)
    found = diagnose_losses(
      result.losses,
      result.heldout_losses,
      result.heldout_loss,
      baseline,
      num_idle=count_idle_updates(plan.experiment.optimizer, len(result.losses)),
    )
    print(f"\n{found.verdict}: {found.evidence}")
    for line in describe_best(plan, result):
      print(line)
    if found.verdict == "diverging":
      print(f"try a lower rate, --set optimizer.peak_lr={plan.experiment.optimizer.peak_lr / 10:g}")
  if plan.data.documents:
    print(f"\n{format_samples(texts, set(plan.data.documents))}\n")
  else:
    samples = [f"sample {i + 1}\n{indent(text)}" for i, text in enumerate(texts)]
    print("\n" + "\n\n".join(samples) + "\n")


def describe_best(plan: Plan, result: Result) -> list[str]:
  """Describes the step of the lowest held-out loss, where that is not the last, and if it is saved.

  Returns:
    Lines: the step, and the command that samples from the best saved one; none where the last step
    is the best, or nothing was evaluated.
  """
  if result.best is None or result.best[0] == result.step:
    return []
  step, heldout = result.best
  line = f"the lowest held-out loss, {heldout.loss:.4f}, was at step {step:,}"
  if result.best_saved is None:
    return [f"{line}, whose parameters are not saved"]
  saved, saved_loss = result.best_saved
  if saved != step:
    line += ", whose parameters are not saved; "
    line += f"the lowest of those saved, {saved_loss.loss:.4f}, was at step {saved:,}"
  command = [python_command(), "-m", "jgpt.sample", "--run", str(plan.workdir)]
  return [line, f"  {shlex.join([*command, '--step', 'best'])}"]


def describe_end(plan: Plan, result: Result) -> str:
  """Compares a finished run with what its experiment expects, or says how to go on with it."""
  steps, train = result.step, result.experiment.train
  if result.ended_by == "max_seconds":
    return (
      f"not finished: train.max_seconds={train.max_seconds:g} were over after step {steps:,} of "
      f"{train.steps:,}, which is saved in {plan.workdir}; the same command goes on from there"
    )
  expected = result.experiment.expected
  found = match_expected(expected, plan.data.label, result.losses, result.heldout_loss)
  return describe_expected(found) if found else ""


def print_next(plan: Plan, texts: list[str], again: str | None) -> None:
  """Prints what to try next.

  Args:
    plan: of the finished run.
    texts: its samples.
    again: this command, from `format_command`; None where it is not known.
  """
  length = 2 if plan.data.documents else 8
  begins = [text.strip().partition("\n")[0][:length] for text in texts]
  encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
  prompt = choose_prompt([plan.experiment.sample.prompt, *begins], plan.data.tokenizer, encoding)
  given = [f"--prompt={prompt}"] if prompt else []
  print("next:")
  python, run = [python_command(), "-m"], ["--run", str(plan.workdir)]
  print(f"  {shlex.join([*python, 'jgpt.sample', *run, *given, '--temperature', '0.8'])}")
  holds_weights = not plan.experiment.train.steps  # only those that it began from
  if holds_weights and len(plan.data.heldout.tokens):
    print(f"  {shlex.join([*python, 'jgpt.evaluate', *run])}")
  if again is None:
    return
  if holds_weights:
    print(f"  {again}")
    return
  print(f"  {again} --steps {2 * plan.experiment.train.steps}")
  if plan.experiment.data.path is None:
    print("with a text of your own, add --set data.path=FILE")


def choose_prompt(candidates: Iterable[str], tokenizer: Tokenizer, encoding: str) -> str:
  """Chooses the first prompt that can be printed and pasted and that the tokenizer gives back.

  The replacement character, in place of bytes that are no text, and line breaks cannot.

  Args:
    candidates: prompts.
    tokenizer: of the run.
    encoding: of what is printed.

  Returns:
    "" where there is none.
  """
  for prompt in candidates:
    is_whole = prompt.encode(encoding, "replace").decode(encoding) == prompt
    if prompt and prompt.isprintable() and "\ufffd" not in prompt and is_whole:
      with contextlib.suppress(UserError):
        if tokenizer.decode(tokenizer.encode(prompt)) == prompt:
          return prompt
  return ""


def format_command(name: str | None, base: Experiment, experiment: Experiment) -> str:
  """Formats a command that makes the same changes to an experiment with `--set`.

  `train.steps` is left out.

  Args:
    name: of the experiment, as `--experiment` takes it; None for the settings of the run that is
      continued.
    base: the experiment of that name.
    experiment: the changed one.
  """
  before, now = list_settings(base), list_settings(experiment)
  words = [python_command(), "-m", "jgpt.run", *(["--experiment", name] if name else [])]
  for setting, value in now.items():
    if value != before[setting] and setting != "train.steps":
      words += ["--set", f"{setting}={format_value(value)}"]
  return shlex.join(words)
