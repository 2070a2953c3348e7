"""The table of parameters: counts, its agreement with the arrays, initial values, and what
importing costs.
"""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.config.catalog import experiments_dir, load_experiment
from jgpt.config.experiment import PARAM_KINDS
from jgpt.config.settings import resolve
from jgpt.devices.compute import QUICK_OPTIONS
from jgpt.model import init_params
from jgpt.params import Param, count_params, param_table


def make_config(**changes):
  """The model of `names`, with its 27 ids, changed."""
  return dataclasses.replace(resolve(load_experiment("names"), 27).model, **changes)


WIDE = {"d_model": 64, "d_ff": 256, "max_seq_len": 32, "num_layers": 2}
CONFIGS = [
  make_config(),
  make_config(**WIDE),
  make_config(vocab_size=30, vocab_multiple=32, num_layers=3, num_heads=2),
]


init = jax.jit(init_params, static_argnums=1, compiler_options=QUICK_OPTIONS)


def leaves(tree):
  """A tree's leaves by their path as text."""
  return {
    jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize(("vocab_size", "count"), [(27, 4192), (28, 4224)])
def test_names_has_the_parameters_of_microgpt(vocab_size, count):
  assert count_params(make_config(vocab_size=vocab_size)) == count


@pytest.mark.parametrize("config", CONFIGS)
def test_table_describes_every_array_and_counts_what_is_learned(config):
  """One entry per array, layers stacked in front of those in blocks.

  Rows of padding are arrays but are not counted.
  """
  arrays = leaves(jax.eval_shape(lambda: init_params(jax.random.key(0), config)))
  table = leaves(param_table(config))
  assert arrays.keys() == table.keys()
  for name, param in table.items():
    layers = (config.num_layers,) if "blocks" in name else ()
    assert arrays[name].shape == layers + param.shape
    assert arrays[name].dtype == jnp.float32
    assert len(param.axes) == len(param.shape)
    assert param.kind in PARAM_KINDS
  padding = 2 * config.d_model * (config.padded_vocab_size - config.vocab_size)
  assert count_params(config) == sum(math.prod(a.shape) for a in arrays.values()) - padding


def test_an_entry_of_the_table_is_one_leaf():
  """A tuple would itself be a pytree, and maps over the table would walk into it."""
  assert all(isinstance(leaf, Param) for leaf in jax.tree.leaves(param_table(make_config())))


@pytest.mark.slow
def test_adding_layers_and_padding_changes_no_other_initial_value():
  """Bitwise, so that a deeper model begins as the one it is compared with; but for the last bit
  under jax 0.7, where it depends on an array's length.

  Rows of padding are zero.
  """
  key = jax.random.key(3)
  base = leaves(init(key, make_config()))
  larger = leaves(init(key, make_config(num_layers=2, vocab_multiple=32)))
  for name, value in base.items():
    in_both = larger[name][:1] if "blocks" in name else larger[name][: len(value)]
    np.testing.assert_array_max_ulp(in_both, value, 0 if jax.__version_info__ >= (0, 8) else 2)
  for name in ("['tok_embed']", "['unembed']"):
    padding = larger[name][27:]
    assert padding.shape == (5, 16)
    assert not padding.any()


def test_initial_values_are_normal_and_no_two_parameters_share_them():
  """Each array has mean 0 and the standard deviation asked for (6 standard errors are allowed),
  from a key of its own.
  """
  values = leaves(init(jax.random.key(0), make_config(init_std=0.08, **WIDE)))
  for name, value in values.items():
    standard_error = 0.08 / math.sqrt(value.size)
    assert abs(float(value.mean())) < 6 * standard_error, name
    assert abs(float(value.std()) - 0.08) < 6 * standard_error, (
      name
    )  # that of a deviation is smaller by sqrt(2)
    assert 3 < abs(np.asarray(value) / 0.08).max() < 6, name  # neither cut off nor heavy-tailed
  everything = np.concatenate([np.ravel(v) for v in values.values()])
  assert (
    np.unique(everything).size > 0.98 * everything.size
  )  # a key used twice would repeat a whole array
  assert not np.array_equal(values["['tok_embed']"], values["['unembed']"])


def run_python(code):
  """Runs code in a new interpreter that starts in the repository."""
  env = {**os.environ, "PYTHONPATH": str(experiments_dir().parent), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


NO_DEVICE = ["config.experiment", "config.settings", "config.catalog", "params", "errors", "cli"]
NO_DEVICE += ["text.tokenizer", "data.sources", "data.download"]


@pytest.mark.parametrize("module", NO_DEVICE)
def test_what_needs_no_device_imports_no_jax(module):
  """So that `--help`, `--list` and refusing a misspelt setting are instant."""
  loaded = run_python(f"import sys, jgpt.{module}; print(*sys.modules)")
  assert f"jgpt.{module}" in loaded
  assert not {"jax", "jaxlib", "numpy", "optax", "flax", "orbax", "rich"} & set(loaded)


@pytest.mark.slow
def test_importing_every_module_initialises_no_backend():
  """The number of devices can still be chosen, which jax refuses once a backend has been made."""
  code = """if True:
    import importlib, pkgutil, jgpt
    for module in pkgutil.walk_packages(jgpt.__path__, "jgpt."):
      if not module.name.endswith(".__main__"):
        try:
          importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # what it is measured against need not be installed
          assert (module.name, error.name) == ("jgpt.bench.peer_torch", "torch")
        print(module.name)
    import jax
    jax.config.update("jax_num_cpu_devices", 3)
    print(jax.device_count())
  """
  *modules, devices = run_python(code)
  names = ("config.experiment", "model", "train", "run", "sample")
  assert {f"jgpt.{name}" for name in names} <= set(modules)
  assert devices == "3"
