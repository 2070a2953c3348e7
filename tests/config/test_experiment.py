"""Experiments: what is filled in when a run starts, and the files that define them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jgpt.batches import Batch
from jgpt.config import catalog
from jgpt.config.settings import change, differences, parse_setting, resolve
from jgpt.data.sources import expected_vocab_size
from jgpt.errors import UserError
from jgpt.params import count_params
from jgpt.step import init_state, train_step

NAMES = catalog.load_experiment("names")


def set_(*texts, base=NAMES):
  """What `--set` does with each of the texts, together."""
  return change(base, dict(parse_setting(text) for text in texts))


def test_resolve_fills_in_what_was_left_open_and_nothing_else():
  resolved = resolve(NAMES, 27)
  assert differences(NAMES, resolved) == {
    "model.vocab_size": (None, 27),
    "optimizer.decay_steps": (None, 1000),
  }
  given_ = change(NAMES, {"model.vocab_size": 50, "optimizer.decay_steps": 10})
  assert resolve(given_, 27) == given_
  assert resolve(resolved, 27) == resolved


def test_resolve_of_no_steps_leaves_a_schedule_that_divides_by_no_zero():
  assert resolve(change(NAMES, {"train.steps": 0}), 27).optimizer.decay_steps == 1


def test_vocabulary_smaller_than_the_tokenizer_is_refused_with_what_would_do():
  small = set_("model.vocab_size=26")
  with pytest.raises(
    UserError, match=r"model.vocab_size=26 .* 27 ids; none takes .* Try --set model.vocab_size=none"
  ):
    resolve(small, 27)
  assert resolve(set_("model.vocab_size=none", base=small), 27).model.vocab_size == 27


def test_unresolved_vocabulary_cannot_be_counted():
  with pytest.raises(UserError, match="not resolved"):
    count_params(NAMES.model)


# --- Experiment files ---


def test_experiment_is_found_by_name_and_by_path(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    (catalog.experiments_dir() / "names.py").read_text(encoding="utf-8"), encoding="utf-8"
  )
  assert catalog.load_experiment("names") == catalog.load_experiment(str(path))


def test_unknown_experiment_is_refused_and_the_near_one_named():
  with pytest.raises(UserError, match=r"no experiment 'nmes'. Did you mean names\?"):
    catalog.load_experiment("nmes")
  with pytest.raises(UserError, match=r"no experiment '../experiments/names'"):
    catalog.load_experiment("../experiments/names")


def test_experiment_file_that_is_missing_or_holds_none_is_refused_by_name(tmp_path):
  path = tmp_path / "mine.py"
  with pytest.raises(UserError, match=re.escape(f"{path} does not exist")):
    catalog.load_experiment(str(path))
  path.write_text("EXPERIMENT = {'model': 'large'}\n")
  with pytest.raises(UserError, match=re.escape(f"{path} must define EXPERIMENT")):
    catalog.load_experiment(str(path))


@pytest.mark.parametrize("name", catalog.list_experiments())
def test_experiment_has_the_parameters_that_its_docstring_states(name):
  experiment, doc = catalog.load_experiment_file(name)
  stated = re.search(r"([\d,]+) parameters", doc)
  assert stated, f"experiments/{name}.py states no number of parameters"
  resolved = resolve(experiment, expected_vocab_size(experiment.data))
  assert int(stated[1].replace(",", "")) == count_params(resolved.model)


@pytest.mark.parametrize("name", catalog.list_experiments())
def test_experiment_traces_one_update_that_keeps_every_shape_and_dtype(name):
  """Without an array: shapes alone run through the model, the loss, the gradient and the
  optimizer.
  """
  experiment = catalog.load_experiment(name)
  experiment = resolve(experiment, expected_vocab_size(experiment.data), steps_per_epoch=10)
  state = jax.eval_shape(lambda: init_state(jax.random.key(0), experiment))
  tokens = jax.ShapeDtypeStruct((experiment.data.batch_size, experiment.data.seq_len), jnp.int32)
  batch = Batch(tokens, tokens, jax.ShapeDtypeStruct(tokens.shape, jnp.float32))
  after, metrics = jax.eval_shape(partial(train_step, experiment=experiment), state, batch)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  expected = dict.fromkeys(("train/loss", "train/grad_norm", "train/lr"), ((), jnp.float32))
  assert {k: (v.shape, v.dtype) for k, v in metrics.items()} == expected | {
    "train/skipped": ((), jnp.int32)
  }
