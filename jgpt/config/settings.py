"""Settings by name: changing them, writing and reading them, and telling two runs apart.

Responsible for `section.field=value` as a command takes it, for what an experiment leaves open, for an experiment as JSON,
and for which settings are a run's identity. Not responsible for which settings there are, or which values go together
(`config.py`). Imports no jax.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from jgpt.config import DataConfig, Experiment, MeshConfig, ModelConfig, OptimizerConfig, SampleConfig, TrainConfig
from jgpt.config.checks import alternatives, choices, describe_type
from jgpt.config.experiment import GPT2_SIZES
from jgpt.errors import UserError, near_matches, show

SECTIONS = {
  "model": ModelConfig,
  "data": DataConfig,
  "optimizer": OptimizerConfig,
  "train": TrainConfig,
  "sample": SampleConfig,
  "mesh": MeshConfig,
}
SIZE = "model.size"  # no field: one word for several
# Settings that do not change what is learned: they may differ when a run is resumed. Everything else is a run's identity.
CIRCUMSTANCE = frozenset({"mesh", "sample"}) | {
  f"train.{name}"
  for name in (
    *("steps", "epochs", "micro_batch_size"),
    *("log_every", "eval_every", "eval_batches", "sample_every"),
    *("save_every", "save_every_seconds", "keep_latest", "keep_best", "max_consecutive_skips"),
  )
}


# --- By name ---


def setting_names() -> list[str]:
  """Every setting as `section.field`, in the order of declaration."""
  return [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)]


def list_settings(experiment: Experiment) -> dict[str, Any]:
  """The experiment flattened: `section.field` -> value."""
  return {name: getattr(getattr(experiment, name.split(".")[0]), name.split(".")[1]) for name in setting_names()}


def change(experiment: Experiment, changes: dict[str, Any]) -> Experiment:
  """Returns the experiment with settings replaced, all at once, so that their order does not matter.

  Args:
    experiment: what to start from; it is not changed.
    changes: `section.field` -> value of the declared type. "model.size", one of `GPT2_SIZES`, stands for its sizes; a
      size that is given beside it goes before.

  Raises:
    UserError: for an unknown setting (with near matches), a wrong type or values that do not go together.
  """
  by_section: dict[str, dict[str, Any]] = {}
  size = changes.get(SIZE)
  if size is not None and size not in GPT2_SIZES:
    raise UserError(f"{SIZE}={show(size)} must be one of {', '.join(GPT2_SIZES)}.")
  sizes = {f"model.{name}": value for name, value in GPT2_SIZES.get(size, {}).items()}
  for name, value in (sizes | {n: v for n, v in changes.items() if n != SIZE}).items():
    if name not in setting_names():
      last = [n for n in setting_names() if n.split(".")[1] == name.split(".")[-1]]
      meant = f" Did you mean {' or '.join(last)}?" if last else near_matches(name, [*setting_names(), SIZE])
      raise UserError(f"there is no setting {show(name)}.{meant} All of them: --print-config")
    section, field = name.split(".")
    by_section.setdefault(section, {})[field] = value
  sections = {s: dataclasses.replace(getattr(experiment, s), **fields) for s, fields in by_section.items()}
  return dataclasses.replace(experiment, **sections)


def parse_setting(text: str) -> tuple[str, Any]:
  """Reads one `section.field=value` strictly by the field's declared type.

  Raises:
    UserError: if there is no "=", no such setting, or the value is not of the declared type.
  """
  name, equals, value = text.partition("=")
  name, value = name.strip(), value.strip()
  if not equals:
    raise UserError(f"--set {show(text)} has no '='. Write it as section.field=value, for example --set train.steps=500")
  if name not in setting_names():
    return name, value  # `change` names the near matches
  section, field = name.split(".")
  hint = typing.get_type_hints(SECTIONS[section])[field]
  allowed = alternatives(hint)
  if choices(hint):
    return name, value  # its section says which words there are
  if types.NoneType in allowed and value.lower() in ("none", "null"):
    return name, None
  try:
    for kind in allowed:
      if kind is bool:
        return name, {"true": True, "false": False}[value.lower()]
      if kind == tuple[str, ...]:
        return name, tuple(word.strip() for word in value.split(",") if word.strip())
      if kind in (int, float, str):
        return name, kind(value)
  except (ValueError, KeyError):
    pass
  raise UserError(f"{name}={show(value)} must be {describe_type(hint)}.")


def format_value(value: Any) -> str:
  """A setting's value as `parse_setting` reads it."""
  if isinstance(value, tuple):
    return ",".join(value)
  return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def differences(a: Experiment, b: Experiment) -> dict[str, tuple[Any, Any]]:
  """Identity settings in which two experiments differ: `section.field` -> (value in a, value in b)."""
  first, second = list_settings(a), list_settings(b)
  return {n: (v, second[n]) for n, v in first.items() if v != second[n] and not is_circumstance(n)}


def is_circumstance(name: str) -> bool:
  """Whether a setting may change when a run is resumed."""
  return name in CIRCUMSTANCE or name.split(".")[0] in CIRCUMSTANCE


# --- What was left open ---


def resolve(experiment: Experiment, vocab_size: int, steps_per_epoch: int | None = None) -> Experiment:
  """Fills in what was left open.

  `model.vocab_size` is the tokenizer's; `train.steps`, `eval_every` and `sample_every` follow from `train.epochs`;
  `optimizer.decay_steps` is `train.steps`, and `cooldown_steps` a fifth of it.

  Args:
    experiment: settings, perhaps with None in those places.
    vocab_size: ids of the tokenizer.
    steps_per_epoch: batches in a pass over the training part; None where a run is not counted in epochs.

  Raises:
    UserError: if `model.vocab_size` was given and is smaller than the tokenizer's.
  """
  given, train, optimizer = experiment.model.vocab_size, experiment.train, experiment.optimizer
  if given is not None and given < vocab_size:
    raise UserError(
      f"model.vocab_size={given} is smaller than the tokenizer's {vocab_size} ids. Try --set model.vocab_size=none, "
      "which takes the tokenizer's"
    )
  if steps_per_epoch is not None and train.epochs is not None:
    steps = train.epochs * steps_per_epoch if train.steps is None else train.steps
    period = {name: getattr(train, name) or steps_per_epoch for name in ("eval_every", "sample_every")}
    train = dataclasses.replace(train, steps=steps, **period)
  decay_steps = optimizer.decay_steps or (None if train.steps is None else max(1, train.steps))
  if decay_steps is not None:
    cooldown_steps = optimizer.cooldown_steps or max(1, decay_steps // 5) if optimizer.schedule == "wsd" else None
    optimizer = dataclasses.replace(optimizer, decay_steps=decay_steps, cooldown_steps=cooldown_steps)
  model = dataclasses.replace(experiment.model, vocab_size=given or vocab_size)
  return dataclasses.replace(experiment, model=model, train=train, optimizer=optimizer)


# --- JSON ---


def experiment_to_json(experiment: Experiment) -> dict[str, Any]:
  """The experiment as a dict that `json` can write; `expected` is documentation and stays behind."""
  return {section: dataclasses.asdict(getattr(experiment, section)) for section in SECTIONS}


def experiment_from_json(value: Any) -> Experiment:
  """Reads what `to_json` wrote. A field that an older file lacks counts as its default.

  Raises:
    UserError: for anything else than an experiment: an unknown section or field, a wrong type, a missing field.
  """
  if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
    raise UserError("an experiment in JSON must be an object of sections, each an object of settings.")
  sections = {}
  for section, fields in value.items():
    if section not in SECTIONS:
      raise UserError(f"the experiment has an unknown section {show(section)}.{near_matches(section, SECTIONS)}")
    known = {f.name: f for f in dataclasses.fields(SECTIONS[section])}
    for name in fields:
      if name not in known:
        shown = show(f"{section}.{name}").strip("'\"")
        raise UserError(f"the experiment has an unknown setting {shown}.{near_matches(name, known)}")
    for name, field in known.items():
      if name not in fields and field.default is dataclasses.MISSING:
        raise UserError(f"the experiment lacks the setting {section}.{name}.")
    sections[section] = SECTIONS[section](**fields)
  for section in SECTIONS.keys() - sections.keys():
    if section != "mesh":
      raise UserError(f"the experiment lacks the section {section!r}.")
  return Experiment(**sections)
