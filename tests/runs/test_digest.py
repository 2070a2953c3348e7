"""The digest of an array: the formula, wherever the array lies, and that changes show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jgpt.runs.digest import digest_array, format_digest, name_leaves, survey_leaves

WORD = 2**32


def digest_by_hand(x: np.ndarray) -> str:
  """The formula of the module's docstring in whole numbers of any size."""
  data = np.ascontiguousarray(x).reshape(-1)
  words = data.view(np.uint32) if x.dtype.itemsize >= 4 else data.view(f"u{x.dtype.itemsize}")
  first = second = 0
  for i, bits in enumerate(words.tolist()):
    h = (bits + 0x9E3779B1 * i) % WORD
    h = (h ^ h >> 16) * 0x85EBCA6B % WORD
    h = (h ^ h >> 13) * 0xC2B2AE35 % WORD
    h ^= h >> 16
    first += h
    second += (h ^ h >> 15) * 0x85EBCA77
  return f"{first % WORD:08x}{second % WORD:08x}"


ARRAYS = {
  "a matrix": np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32),
  "four axes": np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32),
  "a scalar": np.int32(812),
  "negative zero, infinity, NaN": np.array([-0.0, np.inf, np.nan], np.float32),
  "bfloat16": np.random.default_rng(2).normal(size=(3, 9)).astype(jnp.bfloat16),
  "bytes": np.arange(200, dtype=np.uint8),
  "truth": np.array([True, False, True]),
  "nothing": np.zeros((0, 4), np.float32),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_the_digest_is_that_of_the_formula(name):
  assert format_digest(digest_array(jnp.asarray(ARRAYS[name]))) == digest_by_hand(
    np.asarray(ARRAYS[name])
  )


def test_a_wide_type_counts_as_two_words_each(x64):
  x = np.random.default_rng(3).normal(size=(4, 3))
  assert format_digest(digest_array(jnp.asarray(x))) == digest_by_hand(x)


@pytest.mark.parametrize(
  "spec", [PartitionSpec("a"), PartitionSpec(None, "b"), PartitionSpec("a", "b"), PartitionSpec()]
)
def test_the_layout_over_devices_does_not_count(spec):
  x = np.random.default_rng(4).normal(size=(8, 6)).astype(np.float32)
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  placed = jax.device_put(x, NamedSharding(mesh, spec))
  assert format_digest(jax.jit(digest_array)(placed)) == digest_by_hand(x)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 34), st.integers(0, 31), st.integers(0, 34))
def test_a_flipped_bit_or_two_entries_exchanged_show(place, bit, other):
  x = ARRAYS["a matrix"]
  flipped = x.copy().reshape(-1)
  flipped.view(np.uint32)[place] ^= np.uint32(1 << bit)
  assert digest_by_hand(flipped) != digest_by_hand(x)
  if place != other:
    swapped = x.copy().reshape(-1)
    swapped[[place, other]] = swapped[[other, place]]
    assert digest_by_hand(swapped) != digest_by_hand(x)


def test_survey_names_each_leaf_and_says_what_is_finite():
  tree = {
    "blocks": {"w": jnp.ones((2, 3))},
    "opt": [jnp.zeros(2), jnp.array([1.0, jnp.nan])],
    "step": jnp.int32(3),
  }
  found = survey_leaves(tree)
  assert list(found) == list(name_leaves(tree)) == ["blocks/w", "opt/0", "opt/1", "step"]
  assert [bool(is_finite) for _, is_finite in found.values()] == [True, True, False, True]
  assert format_digest(found["blocks/w"][0]) == digest_by_hand(np.ones((2, 3), np.float32))
