"""Settings by name: changing and parsing them, filling in defaults, JSON, and comparing two runs.

A setting is written `section.field=value`, as commands take it. Which settings there are, and which
values go together, is in `experiment.py`. Imports no jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import shlex
import types
import typing
from collections.abc import Collection
from typing import Any

from jgpt.config import (
  ComputeConfig,
  DataConfig,
  Experiment,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  SampleConfig,
  TrainConfig,
)
from jgpt.config.checks import alternatives, choices, describe_type
from jgpt.config.experiment import GPT2_SIZES
from jgpt.config.synonyms import (
  LETTERS,
  Translation,
  follows_from_others,
  squeeze,
  synonym_names,
  translate,
)
from jgpt.errors import UserError, near_matches, printable, show

SECTIONS = {
  "model": ModelConfig,
  "data": DataConfig,
  "optimizer": OptimizerConfig,
  "train": TrainConfig,
  "sample": SampleConfig,
  "mesh": MeshConfig,
  "compute": ComputeConfig,
}
OPTIONAL_SECTIONS = ("mesh", "compute")  # older run folders lack them
# Renamed settings, which older run folders have: the new name, and new values for old ones.
RENAMED = {
  "mesh.tricks": ("compute.tricks", {}),
  "mesh.scan_layers": ("compute.layers", {None: "auto", True: "scan", False: "unroll"}),
}
# Former values of settings that have kept their name, which older run folders have.
FORMER = {"mesh.data": {None: -1}}
# What older run folders mean by leaving a setting out, where that is not its default.
LEFT_OUT = {"compute.dtype": "float32"}
SIZE = "model.size"  # not a field: sets several fields
MAX_REPEATED = 200  # characters of a value that an error repeats
SET_OPTIONS = ("--set", "--experiment", "--workdir")  # of `run`, beside a setting
# Settings of the data that weights to begin from may decide, as they may those of the model.
SEQUENCE_SETTINGS = frozenset(
  f"data.{name}"
  for name in (
    *("tokenizer", "bpe_vocab_size", "mark_paragraphs", "batching", "seq_len"),
    *("heldout_tokens", "heldout_fraction"),
  )
)
# Sections and settings that do not change what is learned, and so may differ when a run is resumed.
# All others are a run's identity. Where a text lies is none of it: its digest is, which run folders
# record.
CIRCUMSTANCE = (
  frozenset({"mesh", "sample", "data.source", "data.path"})
  | {
    *(f"compute.{field.name}" for field in dataclasses.fields(ComputeConfig)),
  }
  - {"compute.dtype"}
  | {
    f"train.{name}"
    for name in (
      *("steps", "epochs", "micro_batch_size"),
      *("log_every", "eval_every", "eval_batches", "sample_every"),
      *("save_every", "save_every_seconds", "keep_latest", "keep_best", "max_consecutive_skips"),
      "max_seconds",
    )
  }
)


# --- By name ---


def setting_names() -> list[str]:
  """Lists the names of all settings as `section.field`, in the order of declaration."""
  return [
    f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)
  ]


def list_settings(experiment: Experiment) -> dict[str, Any]:
  """Returns all settings of an experiment: `section.field` -> value."""
  return {
    name: getattr(getattr(experiment, name.split(".")[0]), name.split(".")[1])
    for name in setting_names()
  }


def change(experiment: Experiment, changes: dict[str, Any]) -> Experiment:
  """Returns an experiment with settings replaced, all at once: their order does not matter.

  Their names are added to its `given`. Results that it expects are dropped if a
  changed setting may change them.

  Args:
    experiment: left as it is.
    changes: `section.field` -> value of the declared type. "model.size", one of `GPT2_SIZES`,
      stands for its sizes; sizes that are given by name take precedence.

  Raises:
    UserError: for an unknown setting (with near matches), a wrong type, or values that do not go
      together.
  """
  by_section: dict[str, dict[str, Any]] = {}
  named = expand_size(changes)
  unknown = {n: v for n, v in named.items() if n not in {*setting_names(), *RENAMED}}
  if unknown:
    names = ", ".join(map(show, unknown))
    lead = f"there is no setting {names}" if len(unknown) == 1 else f"there are no settings {names}"
    given = {name: _format_any(value) for name, value in unknown.items()}
    known = {n: v for n, v in changes.items() if n not in unknown}
    with contextlib.suppress(UserError):
      experiment = change(experiment, known)
    raise UserError(explain_unknown(lead, given, experiment))
  for name, value in named.items():
    if name in RENAMED:
      new, values = RENAMED[name]
      word, advice = _read_word(value), "All settings: --print-config"
      if isinstance(word, bool) or (word is None and None in values):
        advice = f"Try --set {new}={format_value(_translate(word, values))}"
      raise UserError(f"{name} is now called {new}. {advice}")
    section, field = name.split(".")
    by_section.setdefault(section, {})[field] = value
  sections = {
    s: dataclasses.replace(getattr(experiment, s), **fields) for s, fields in by_section.items()
  }
  given = tuple(sorted({*experiment.given, *named}))
  changed = dataclasses.replace(experiment, **sections, given=given)
  return (
    changed if is_comparable(experiment, changed) else dataclasses.replace(changed, expected=())
  )


def expand_size(changes: dict[str, Any]) -> dict[str, Any]:
  """Returns changes with the sizes that "model.size" stands for, under those given by name.

  Raises:
    UserError: if there is no such size.
  """
  size = changes.get(SIZE)
  if size is not None and size not in GPT2_SIZES:
    raise UserError(f"{SIZE}={show(size)} must be one of {', '.join(GPT2_SIZES)}.")
  sizes = {f"model.{name}": value for name, value in GPT2_SIZES.get(size, {}).items()}
  return sizes | {name: value for name, value in changes.items() if name != SIZE}


def is_comparable(base: Experiment, changed: Experiment) -> bool:
  """Returns whether the result expected by an experiment holds for a changed one.

  The seed, the dtype and the text may differ: the expected result names its text, and bfloat16
  changes it by less than another seed does.
  """
  before, now = list_settings(base), list_settings(changed)
  length = ("train.steps", "train.epochs")
  decisive = [n for n in now if not is_circumstance(n) or n in length]
  return all(now[n] == before[n] for n in decisive if n not in ("train.seed", "compute.dtype"))


def parse_setting(text: str) -> tuple[str, Any]:
  """Parses `section.field=value` by the field's declared type.

  An unknown name is returned with its text, so that `change` raises an error with near matches.

  Returns:
    The name, and the value.

  Raises:
    UserError: if there is no "=", or the value is not of the declared type.
  """
  name, equals, value = text.partition("=")
  name, value = name.strip(), value.strip()
  if not equals:
    raise UserError(
      f"--set {show(text)} has no '='. Write it as section.field=value, for example --set "
      "train.steps=500"
    )
  if name not in setting_names():
    return name, value
  section, field = name.split(".")
  hint = typing.get_type_hints(SECTIONS[section])[field]
  allowed = alternatives(hint)
  if bool in allowed and value.lower() in ("true", "false"):
    return name, value.lower() == "true"
  words = choices(hint)
  if value in words or (words and not {int, float} & set(allowed)):
    return name, value  # the section's own check lists the words that are allowed
  if types.NoneType in allowed and value.lower() in ("none", "null"):
    return name, None
  try:
    for kind in allowed:
      if kind == tuple[str, ...]:
        return name, tuple(word.strip() for word in value.split(",") if word.strip())
      if kind in (int, float, str):
        return name, kind(value)
  except ValueError:
    pass
  left = " Try --set mesh.data=-1, which takes all devices" if name == "mesh.data" else ""
  raise UserError(f"{name}={show(value)} must be {describe_type(hint)}.{left}")


# --- Names that are not jgpt's ---


def explain_unknown(
  lead: str,
  given: dict[str, str | None],
  experiment: Experiment | None,
  options: Collection[str] = SET_OPTIONS,
) -> str:
  """Explains names that no setting and no option has, and what to give instead.

  Args:
    lead: the beginning of the message, which names them.
    given: name -> value as text; None where it has none.
    experiment: the one that is changed; None where there is none.
    options: of the command that was called; one with --experiment takes every setting.

  Returns:
    One line: other programs' names are translated (`synonyms.py`), for others near ones are listed.
  """
  notes: list[str] = []
  words: list[str] = []
  settings: dict[str, str] = {}
  near = ""
  for name in sorted(given, key=follows_from_others):
    found = _find_counterpart(name, given[name], experiment, settings, options)
    if found is None:
      known = [*options, *([*setting_names(), SIZE] if "--experiment" in options else [])]
      near = near or near_matches(name, known)
      continue
    note, more, changes = _advise(found, options)
    if note:
      notes.append(f"{show(name)[1:-1]}: {note}" if len(given) > 1 else note)
    words += more
    settings |= {n: text for n, text in changes.items() if len(text) <= MAX_REPEATED}
    experiment = experiment and _try_change(experiment, changes)
  words += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
  text = f"{lead}{': ' if len(given) == 1 and notes else '. ' if notes else ''}{'. '.join(notes)}"
  if words:
    return printable(f"{text}. Try {shlex.join(words)}")
  if notes:
    return printable(text)
  return f"{text}.{near} All of them: {'--print-config' if '--set' in options else '--help'}"


def _try_change(experiment: Experiment, texts: dict[str, str]) -> Experiment:
  """Returns an experiment with settings changed, or as it is where they do not go together."""
  try:
    return change(experiment, dict(parse_setting(f"{n}={value}") for n, value in texts.items()))
  except UserError:
    return experiment


def _find_counterpart(
  name: str,
  value: str | None,
  experiment: Experiment | None,
  beside: Collection[str],
  options: Collection[str],
) -> Translation | None:
  """Finds what stands for a name: an option, another program's setting, or one of jgpt's."""
  option = f"--{name.lstrip('-').replace('_', '-').lower()}"
  name = LETTERS.get(name, name)
  found = translate(name, value, experiment, beside)
  if option in options and (found is None or found.value == value):
    return Translation((), (option,), value, "")
  own = [setting for setting in setting_names() if squeeze(setting) == squeeze(name)]
  if found is None and not own:
    fields = [setting.partition(".")[2] for setting in setting_names()]
    last = name.rpartition(".")[2].lower()
    near = difflib.get_close_matches(last[:100], [*synonym_names(), *fields], n=1, cutoff=0.85)
    is_theirs = near and near[0] not in fields
    return translate(near[0], value, experiment, beside) if is_theirs else None
  mine = Translation(tuple(s if value is None else f"{s}={value}" for s in own), (), value, "")
  if found is None:
    return mine
  is_another = not {s.partition("=")[0] for s in found.settings} & {*own}
  if own and is_another and _find_faults(found.settings) and not _find_faults(mine.settings):
    return mine
  return found


def _advise(found: Translation, options: Collection[str]) -> tuple[str, list[str], dict[str, str]]:
  """Describes what to give to a command instead of a name.

  Returns:
    A note, "" for none; words; and settings, name -> value, for `--set`.
  """
  for flag in found.flags:
    if flag in options:
      return found.note, [flag] if found.value is None else [flag, found.value], {}
  if "--experiment" in options:
    if faults := _find_faults(found.settings):
      return "; ".join([*([found.note] if found.note else []), *faults]), [], {}
    pairs = [setting.partition("=") for setting in found.settings]
    return found.note, [], {name: value for name, _, value in pairs}
  words, elsewhere = [], []
  for setting in found.settings:
    name, _, value = setting.partition("=")
    flag = f"--{name.partition('.')[2].replace('_', '-')}"
    is_read = value and not _find_faults([setting])
    if flag in options and is_read:
      words += [flag, value]
    elif "--set" in options and name == "data.path" and is_read:
      words += ["--set", setting]  # commands that read a run find its text there
    else:
      elsewhere.append(name)
  if elsewhere:
    are = "is a setting" if len(elsewhere) == 1 else "are settings"
    return f"{' and '.join(elsewhere)} {are} of python -m jgpt.run", words, {}
  return ("" if words else found.note), words, {}


def _find_faults(settings: typing.Iterable[str]) -> list[str]:
  """Returns what is wrong with texts `section.field=value`, each by itself."""
  faults = []
  for text in settings:
    name = text.partition("=")[0]
    if name == SIZE:
      if text.partition("=")[2] not in GPT2_SIZES:
        faults.append(f"{SIZE} is one of {', '.join(GPT2_SIZES)}")
      continue
    section, field = name.split(".")
    hint = typing.get_type_hints(SECTIONS[section])[field]
    try:
      value = parse_setting(text)[1]
    except UserError:
      value = ...
    least = SECTIONS[section].__dataclass_fields__[field].metadata.get("least")
    too_small = least is not None and isinstance(value, int | float) and value < least
    is_word = isinstance(value, str) and str not in alternatives(hint)
    if value is ... or too_small or (is_word and value not in choices(hint)):
      bound = f", at least {least}" if too_small else ""
      faults.append(f"{name} is {describe_type(hint)}{bound}")
  return faults


def _format_any(value: Any) -> str | None:
  """Formats a value as text; None for one that no setting could have."""
  if isinstance(value, list | tuple) and all(isinstance(v, str | int | float) for v in value):
    return ",".join(map(show, value)).replace("'", "")
  is_short = not isinstance(value, int) or abs(value) < 2**63
  return format_value(value) if isinstance(value, str | int | float) and is_short else None


def _read_word(value: Any) -> Any:
  """Returns None, True or False where a value's text means one of them, else the value."""
  return {"none": None, "true": True, "false": False}.get(str(value).lower(), value)


def format_value(value: Any) -> str:
  """Formats a setting's value as `parse_setting` reads it."""
  if isinstance(value, tuple):
    return ",".join(value)
  return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def differences(a: Experiment, b: Experiment) -> dict[str, tuple[Any, Any]]:
  """Finds the identity settings in which two experiments differ.

  Returns:
    `section.field` -> (value in a, value in b).
  """
  first, second = list_settings(a), list_settings(b)
  return {n: (v, second[n]) for n, v in first.items() if v != second[n] and not is_circumstance(n)}


def is_circumstance(name: str) -> bool:
  """Returns whether a setting may change when a run is resumed."""
  return name in CIRCUMSTANCE or name.split(".")[0] in CIRCUMSTANCE


# --- Settings that follow from the data ---


def resolve(
  experiment: Experiment, vocab_size: int, steps_per_epoch: int | None = None
) -> Experiment:
  """Fills in the settings that are None and follow from others or from the data.

  `model.vocab_size` is the tokenizer's; `train.steps`, `eval_every` and `sample_every` follow from
  `train.epochs`; `optimizer.decay_steps` is `train.steps`, and `cooldown_steps` a fifth of it.

  Args:
    experiment: not resolved, or resolved before.
    vocab_size: ids of the tokenizer.
    steps_per_epoch: batches in a pass over the training part; None where `train.epochs` is None.

  Raises:
    UserError: if `model.vocab_size` was given and is smaller than the tokenizer's.
  """
  given, train, optimizer = experiment.model.vocab_size, experiment.train, experiment.optimizer
  if given is not None and given < vocab_size:
    raise UserError(
      f"model.vocab_size={given} is smaller than the tokenizer's {vocab_size} ids; none takes the "
      "tokenizer's. Try --set model.vocab_size=none"
    )
  if steps_per_epoch is not None and train.epochs is not None:
    steps = train.epochs * steps_per_epoch if train.steps is None else train.steps
    period = {
      name: getattr(train, name) or steps_per_epoch for name in ("eval_every", "sample_every")
    }
    train = dataclasses.replace(train, steps=steps, **period)
  decay_steps = optimizer.decay_steps or (None if train.steps is None else max(1, train.steps))
  if decay_steps is not None:
    cooldown_steps = (
      optimizer.cooldown_steps or max(1, decay_steps // 5) if optimizer.schedule == "wsd" else None
    )
    optimizer = dataclasses.replace(
      optimizer, decay_steps=decay_steps, cooldown_steps=cooldown_steps
    )
  model = dataclasses.replace(experiment.model, vocab_size=given or vocab_size)
  return dataclasses.replace(experiment, model=model, train=train, optimizer=optimizer)


def unresolve(experiment: Experiment) -> Experiment:
  """Returns a recorded run's settings for a new run, without what the old one began from.

  What `resolve` had filled in is None again, as `drop_derived` does.

  Args:
    experiment: resolved.
  """
  begins = dict.fromkeys(("train.init_from", "train.continue_from"))
  return dataclasses.replace(change(drop_derived(experiment), begins), given=())


def drop_derived(experiment: Experiment) -> Experiment:
  """Returns a resolved experiment in which what `resolve` had filled in is None again.

  So it follows from other settings: `train.steps` from `train.epochs`, `decay_steps` from
  `train.steps`, and what follows from these. A value that was given, and is the one that would have
  been filled in, cannot be told apart.
  """
  train, optimizer, empty = experiment.train, experiment.optimizer, []
  steps, decay_steps = train.steps or 0, optimizer.decay_steps or 0
  if decay_steps == max(1, steps):
    empty.append("optimizer.decay_steps")
  if optimizer.cooldown_steps == max(1, decay_steps // 5):
    empty.append("optimizer.cooldown_steps")
  if train.epochs and steps and steps % train.epochs == 0:
    epoch_steps = steps // train.epochs
    periods = [n for n in ("eval_every", "sample_every") if getattr(train, n) == epoch_steps]
    empty += [f"train.{name}" for name in ("steps", *periods)] if periods else []
  return change(experiment, dict.fromkeys(empty))


# --- JSON ---


def experiment_to_json(experiment: Experiment) -> dict[str, Any]:
  """Converts an experiment to a dict that `json` can write, without `expected`."""
  return {section: dataclasses.asdict(getattr(experiment, section)) for section in SECTIONS}


def experiment_from_json(value: Any) -> Experiment:
  """Makes an experiment from the value that `experiment_to_json` returned.

  Fields that an older file lacks have their defaults, but for `LEFT_OUT`.

  Args:
    value: parsed JSON, which may be untrusted.

  Raises:
    UserError: for an unknown section or field, a wrong type, or a missing field without a default.
  """
  if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
    raise UserError(
      "an experiment in JSON must be an object of sections, each an object of settings."
    )
  sections = {}
  for section, fields in _rename(value).items():
    if section not in SECTIONS:
      raise UserError(
        f"the experiment has an unknown section {show(section)}.{near_matches(section, SECTIONS)}"
      )
    known = {f.name: f for f in dataclasses.fields(SECTIONS[section])}
    for name in fields:
      if name not in known:
        shown = show(f"{section}.{name}").strip("'\"")
        raise UserError(
          f"the experiment has an unknown setting {shown}.{near_matches(name, known)}"
        )
    for name, field in known.items():
      if name not in fields and field.default is dataclasses.MISSING:
        raise UserError(f"the experiment lacks the setting {section}.{name}.")
    sections[section] = SECTIONS[section](**fields)
  for section in SECTIONS.keys() - sections.keys():
    if section not in OPTIONAL_SECTIONS:
      raise UserError(f"the experiment lacks the section {section!r}.")
  return Experiment(**sections)


def _rename(value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Returns an experiment in JSON with the settings of `RENAMED` under their new names.

  What `LEFT_OUT` says is filled in, and the values of `FORMER` are today's.
  """
  value = {section: dict(fields) for section, fields in value.items()}
  for name, meant in LEFT_OUT.items():
    section, field = name.split(".")
    value.setdefault(section, {}).setdefault(field, meant)
  for old, (new, values) in RENAMED.items():
    (section, field), (new_section, new_field) = old.split("."), new.split(".")
    if field in value.get(section, {}):
      given = value[section].pop(field)
      value.setdefault(new_section, {})[new_field] = _translate(given, values)
  for name, values in FORMER.items():
    section, field = name.split(".")
    if field in value.get(section, {}):
      value[section][field] = _translate(value[section][field], values)
  return value


def _translate(value: Any, values: dict[bool | None, Any]) -> Any:
  """Returns the value that a former one of a setting is today."""
  return values.get(value, value) if value is None or isinstance(value, bool) else value
