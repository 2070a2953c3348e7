"""Settings that a run takes over from what it begins with: network, tokenizer, form of sequences.

Weights, and the origin of a continued run, decide some of a run's settings. They replace those of
the experiment, but not those that were given by name, which must agree. What weights leave open
stays the experiment's.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from jgpt.config import DataConfig, Experiment, ModelConfig
from jgpt.config.experiment import GPT2_SIZES
from jgpt.config.settings import change, expand_size, list_settings
from jgpt.data.paths import check_tokenizer_kind
from jgpt.errors import UserError
from jgpt.params import walk
from jgpt.runs.origin import (
  FREE_MODEL_SETTINGS,
  Origin,
  check_origin_settings,
  list_moment_settings,
)
from jgpt.text.tokenizer import CharTokenizer, Tokenizer, kind_of
from jgpt.weights.gpt2 import Weights, check_weights_settings, has_fewer_biases, is_bias
from jgpt.weights.initial import GPT2_VOCAB_SIZES, LEFT_OPEN


def adopt_settings(
  experiment: Experiment, source: Weights | Origin, given: dict[str, Any]
) -> tuple[Experiment, tuple[str, ...]]:
  """Returns an experiment with the settings that weights or an origin decide.

  Args:
    experiment: not resolved.
    source: from `open_weights` or `open_origin`.
    given: settings that were given by name: `section.field` -> value, as `settings.change` takes
      them. They replace the experiment's, and are not replaced by the source's.

  Returns:
    The experiment, with the given settings too, and the names of those that the source decided.

  Raises:
    UserError: if a given setting contradicts the source, or the source leaves a setting open that
      the experiment cannot decide.
  """
  given = expand_size(given)
  _check_given(experiment, source, given)
  decided = dict(_decide_model(experiment, source, given))
  decided |= _decide_data(experiment, source, decided, given)
  if isinstance(source, Origin):
    there = source.experiment.optimizer
    decided |= {f"optimizer.{name}": getattr(there, name) for name in list_moment_settings(there)}
  decided |= _decide_prompt(experiment, source)
  decided = {name: value for name, value in decided.items() if name not in given}
  names = tuple(sorted({*experiment.given, *given}))
  return dataclasses.replace(change(experiment, decided | given), given=names), tuple(decided)


def _check_given(experiment: Experiment, source: Weights | Origin, given: dict[str, Any]) -> None:
  """Checks that given settings agree with a source, and raises `UserError` otherwise."""
  values = list_settings(experiment) | given
  if isinstance(source, Origin):
    check_origin_settings(source, {n: value for n, value in values.items() if n in given})
  else:
    names = [name.removeprefix("model.") for name in given if name.startswith("model.")]
    check_weights_settings(source, _section(values, "model"), names)
  if source.tokenizer and "data.tokenizer" in given:
    name = f"the tokenizer that comes with {source.location}"
    check_tokenizer_kind(source.tokenizer, _section(values, "data"), name)
  seq_len, positions = values["data.seq_len"], _model_of(source)["max_seq_len"]
  if "data.seq_len" in given and seq_len > positions:
    raise UserError(
      f"data.seq_len={seq_len} is longer than the {positions} positions of {source.location}. Try "
      f"--set data.seq_len={positions}"
    )


def _section(values: dict[str, Any], section: str) -> Any:
  """Returns a section's settings as attributes, which need not go together."""
  prefix = f"{section}."
  return types.SimpleNamespace(
    **{n.removeprefix(prefix): value for n, value in values.items() if n.startswith(prefix)}
  )


def _model_of(source: Weights | Origin) -> dict[str, Any]:
  """Returns the settings of `ModelConfig` that a source decides."""
  if isinstance(source, Weights):
    return {"biases": "all"} | source.model  # the files of GPT-2's kind have all of them
  there = dataclasses.asdict(source.experiment.model)
  return {name: value for name, value in there.items() if name not in FREE_MODEL_SETTINGS}


def _decide_model(
  experiment: Experiment, source: Weights | Origin, given: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
  """Yields the settings of the model that a source decides, and their values."""
  there, here = _model_of(source), experiment.model
  for name, value in there.items():
    if name == "vocab_size" and here.vocab_size is None and value == _count_ids(source):
      continue  # as many as the tokenizer has, which is what None means
    if isinstance(source, Weights) and _may_lack(name, value, here, source):
      continue
    yield f"model.{name}", value
  left_open = set(LEFT_OPEN) - there.keys()
  sizes = [name for name in GPT2_SIZES["d12"] if name != "num_heads"]
  if any(there[name] != getattr(here, name) for name in sizes):
    # The experiment describes another model: its settings mean nothing to these weights.
    if "activation" in left_open:
      yield "model.activation", "gelu_tanh"
    if "num_heads" in left_open and "model.num_heads" not in given:
      yield "model.num_heads", _find_heads({name: there[name] for name in sizes}, source.location)


def _count_ids(source: Weights | Origin) -> int | None:
  return source.tokenizer.vocab_size if source.tokenizer else None


def _may_lack(name: str, value: Any, config: ModelConfig, weights: Weights) -> bool:
  """Returns whether a model lacks biases that are zero in the weights."""
  here = getattr(config, name)
  if not has_fewer_biases(name, here, value):
    return False
  there = {param for param, _, _ in walk(dataclasses.replace(config, vocab_size=1))}
  lacked = [
    n for n in weights.shapes.keys() - there if is_bias(n) and ("norm" in n) == (name == "norm")
  ]
  return not any(np.any(weights.read(n)) for n in lacked)


def _find_heads(sizes: dict[str, int], location: str) -> int:
  """Returns GPT-2's number of heads for the other sizes.

  Raises:
    UserError: if no GPT-2 has these sizes.
  """
  for known in GPT2_SIZES.values():
    if known.items() >= sizes.items():
      return known["num_heads"]
  said = ", ".join(f"{name}={value}" for name, value in sizes.items())
  raise UserError(
    f"{location} holds a model of {said}, and does not say its number of heads. Name it with --set "
    "model.num_heads=, or name the folder with its config.json"
  )


def _decide_data(
  experiment: Experiment, source: Weights | Origin, model: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
  """Returns the settings of the data that a source decides.

  Args:
    experiment: not resolved.
    source: weights or an origin.
    model: what was decided about the model.
    given: as for `adopt_settings`.
  """
  here, run = experiment.data, _run_of(source)
  there = run.data if run else None
  decided: dict[str, Any] = {}
  if tokenizer := source.tokenizer:
    decided["tokenizer"] = kind_of(tokenizer)
  elif model.get("model.vocab_size", experiment.model.vocab_size) in GPT2_VOCAB_SIZES:
    decided["tokenizer"] = "gpt2"
  if decided.get("tokenizer") == "bpe":
    decided["bpe_vocab_size"] = tokenizer.vocab_size
  kind = given.get("data.tokenizer", decided.get("tokenizer", here.tokenizer))
  decided |= _decide_form(here, there, kind, tokenizer)
  wanted = {"model.max_seq_len": experiment.model.max_seq_len} | model | given
  decided["seq_len"] = min((there or here).seq_len, wanted["model.max_seq_len"])
  return {f"data.{name}": value for name, value in decided.items()}


def _run_of(source: Weights | Origin) -> Experiment | None:
  """Returns the settings of the run that a source belongs to; None if there is none."""
  return source.run if isinstance(source, Weights) else source.experiment


def _decide_form(
  here: DataConfig, there: DataConfig | None, kind: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
  """Chooses whether sequences are documents or windows of a stream, and where paragraphs begin.

  The order of windows stays the experiment's.

  Args:
    here: of the experiment.
    there: of the run that the weights come from; None for other weights.
    kind: of the tokenizer, as `data.tokenizer` names it.
    tokenizer: that comes with the weights, or None.
  """
  decided: dict[str, Any] = {}
  if there is not None and "documents" in (here.batching, there.batching):
    decided["batching"] = there.batching
    if there.batching == "documents" and here.heldout_tokens:
      decided |= {"heldout_tokens": None, "heldout_fraction": there.heldout_fraction}
  elif here.batching == "documents" and (
    kind != "characters" or (tokenizer is not None and tokenizer.stop_id is None)
  ):
    decided["batching"] = "random"
  if there is not None:
    decided["mark_paragraphs"] = there.mark_paragraphs
  elif kind != "gpt2":
    decided["mark_paragraphs"] = False
  return decided


def _decide_prompt(experiment: Experiment, source: Weights | Origin) -> dict[str, Any]:
  """Chooses `sample.prompt` where a vocabulary of characters lacks some of the experiment's."""
  tokenizer, run = source.tokenizer, _run_of(source)
  if not isinstance(tokenizer, CharTokenizer):
    return {}
  for prompt in (
    experiment.sample.prompt,
    run.sample.prompt if run else "",
    "",
    tokenizer.chars[:1],
  ):
    try:
      tokenizer.encode_prompt(prompt)
    except UserError:
      continue
    return {} if prompt == experiment.sample.prompt else {"sample.prompt": prompt}
  return {}
