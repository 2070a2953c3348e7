"""A planned run in words: what it trains on, what it trains, how and for how long.

Responsible for the lines at the head of a run. Not responsible for what is planned (`train.py`) or for printing it
(`run.py`).
"""

from __future__ import annotations

import os

import jax

from jgpt import config, metrics, runtime, sharding
from jgpt.checks import printable
from jgpt.config import Experiment
from jgpt.params import count_params, walk
from jgpt.train import Plan


def describe(plan: Plan) -> list[tuple[str, str]]:
  """What a run is, as labelled lines that are printable; the first look at a device."""
  experiment, data = plan.experiment, plan.data
  devices = runtime.devices()
  mesh = sharding.make_mesh(experiment, devices)
  used, there = mesh.devices.size, len(devices)
  device = devices[0]
  kind = f"{os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
  of = f" of {there} devices (mesh.data={used}):" if there > 1 else ""
  lines = [
    ("experiment", plan.name or "(from Python)"),
    ("device", f"{f'{used}{of} ' if of else ''}{device.platform.upper()} ({kind}), jax {jax.__version__}"),
    ("data", f"{data.text.location} ({data.text.kind}, SHA-256 {data.text.sha256[:12]})"),
  ]
  if data.text.note:
    lines.append(("", data.text.note))
  lines += [("", line) for line in data.summary]
  lines += [
    ("vocabulary", describe_vocabulary(plan)),
    ("model", f"{count_params(experiment.model):,} parameters"),
    *describe_initial(plan),
    ("optimizer", describe_groups(experiment)),
    ("training", describe_length(plan)),
    ("baseline", f"uniform guessing: {metrics.uniform_loss(experiment.model.vocab_size):.3f} nats per token"),
    ("run folder", str(plan.workdir or "none: nothing is kept")),
  ]
  return [(label, printable(line)) for label, line in lines]  # names of files may be anything


def describe_initial(plan: Plan) -> list[tuple[str, str]]:
  """Where the weights that the run begins from were found; nothing where they are drawn."""
  if plan.weights is None:
    return []
  began = "" if plan.initial else "began from "
  lines = [("weights", f"{began}{plan.weights['location']} (SHA-256 {plan.weights['sha256'][:12]})")]
  return [*lines, ("", plan.initial.note)] if plan.initial and plan.initial.note else lines


def describe_vocabulary(plan: Plan) -> str:
  """The tokenizer's ids, and how many the model has where those are more."""
  there, has = plan.data.tokenizer.describe(), plan.experiment.model.vocab_size
  return there if has == plan.data.tokenizer.vocab_size else f"{there}; the model has {has:,}"


def describe_groups(experiment: Experiment) -> str:
  """Which parameters decay, with their numbers: what torch calls param_groups."""
  optimizer, model = experiment.optimizer, experiment.model
  if not optimizer.weight_decay:
    return "AdamW without decay"

  def group(kinds: list[str]) -> str:
    found = [(param.size * layers, layers) for _, param, layers in walk(model) if param.kind in kinds]
    numbers, arrays = sum(size for size, _ in found), sum(layers for _, layers in found)
    return f"{numbers:,} numbers in {arrays} arrays ({', '.join(kinds)})"

  there = [kind for kind in config.PARAM_KINDS if count_params(model, (kind,))]
  decays = [kind for kind in there if kind in optimizer.decay_kinds]
  rest = [kind for kind in there if kind not in decays]
  line = f"AdamW, decay {optimizer.weight_decay:g} on {group(decays)}" if decays else "AdamW, decay on nothing"
  return f"{line}; none on {group(rest)}" if rest else line


def describe_length(plan: Plan) -> str:
  """How many updates of what."""
  experiment, data = plan.experiment, plan.data
  batch, steps = experiment.data.batch_size, experiment.train.steps
  if not data.documents:
    T, num_tokens = experiment.data.seq_len, len(data.train.tokens)
    passes = steps / plan.epoch_steps if plan.epoch_steps else steps * batch * T / num_tokens
    return f"{steps:,} steps of {batch} × {T} tokens: {passes:.2g} times the training part"
  tokens = data.train.lengths.mean() * batch
  taken = min(steps, experiment.data.num_batches or steps) * batch
  passes = taken / len(data.documents)
  share = f"{passes:.1%} of the training documents" if passes < 1 else f"{passes:.1f} times the training documents"
  return f"{steps:,} steps of {batch} document{'s' * (batch > 1)} ({tokens:.1f} tokens on average): {share}"
