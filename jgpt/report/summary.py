"""A planned run in words: what it trains on, what it trains, how and for how long.

Responsible for the lines at the head of a run. Not responsible for what is planned (`train.py`) or for printing it
(`run.py`).
"""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

import jax

from jgpt import cli, sharding
from jgpt.config import Experiment
from jgpt.config.experiment import PARAM_KINDS
from jgpt.config.settings import format_value, is_circumstance, list_settings
from jgpt.devices import runtime
from jgpt.errors import printable
from jgpt.params import count_params, walk
from jgpt.plan import Plan
from jgpt.report.console import draw_curve, format_perplexity, format_samples, indent, uniform_loss
from jgpt.report.verdict import LAST, final_loss, judge_losses

if TYPE_CHECKING:  # jax is imported after the arguments are understood
  from jgpt.train import Result


def describe_plan(plan: Plan) -> list[tuple[str, str]]:
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
    ("baseline", f"uniform guessing: {uniform_loss(experiment.model.vocab_size):.3f} nats per token"),
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

  there = [kind for kind in PARAM_KINDS if count_params(model, (kind,))]
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


def comparable(base: Experiment, experiment: Experiment) -> bool:
  """Whether a run can be held against what its experiment expects: all but the seed, and which text, as it says."""
  before, now = list_settings(base), list_settings(experiment)
  length = ("train.steps", "train.epochs")
  decisive = [n for n in now if not is_circumstance(n) or n in length]
  return all(now[n] == before[n] for n in decisive if n not in ("train.seed", "data.source"))


def print_result(plan: Plan, result: Result, texts: list[str], seconds: float) -> None:
  """Prints what a finished run learned: losses, their curve and what they say, and samples."""
  print()
  if len(result.losses):
    took = "" if plan.start_step >= plan.experiment.train.steps else f", {seconds:.1f} s with compiling and saving"
    num = min(LAST, len(result.losses))
    print(f"training loss {final_loss(result.losses):.4f} (mean of the last {num} updates){took}")
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
    said = judge_losses(result.losses, result.heldout_losses, result.heldout_loss, baseline)
    print(f"\n{said.verdict}: {said.evidence}")
    if said.verdict == "diverging":
      print(f"try a lower rate, --set optimizer.peak_lr={plan.experiment.optimizer.peak_lr / 10:g}")
  if plan.data.documents:
    print(f"\n{format_samples(texts, set(plan.data.documents))}\n")
  else:
    print("\n" + "\n\n".join(f"sample {i + 1}\n{indent(text)}" for i, text in enumerate(texts)) + "\n")


def print_next(plan: Plan, texts: list[str], again: str) -> None:
  """Prints what to try next; `again` is this command."""
  prompt = texts[0][:2] if plan.data.documents else plan.experiment.sample.prompt or texts[0].strip()[:8]
  print("next:")
  python, run = [cli.python_word(), "-m"], ["--run", str(plan.workdir)]
  print(f"  {shlex.join([*python, 'jgpt.sample', *run, f'--prompt={prompt}', '--temperature', '0.8'])}")
  if not plan.experiment.train.steps:  # weights as they were
    if len(plan.data.heldout.tokens):
      print(f"  {shlex.join([*python, 'jgpt.evaluate', *run])}")
    print(f"  {again}")
    return
  print(f"  {again} --steps {2 * plan.experiment.train.steps}")
  if plan.experiment.data.path is None:
    print(f"  {again} --set data.path=my_words.txt")


def command_line(name: str, base: Experiment, experiment: Experiment) -> str:
  """A command for the same experiment with the same changes, whatever flags made them; without `train.steps`."""
  before, now = list_settings(base), list_settings(experiment)
  changed = [f"{n}={format_value(v)}" for n, v in now.items() if v != before[n] and n != "train.steps"]
  words = [cli.python_word(), "-m", "jgpt.run", "--experiment", name, *(w for c in changed for w in ("--set", c))]
  return shlex.join(words)
