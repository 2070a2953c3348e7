"""64-bit digests of arrays, which tell whether an array has changed.

A digest is computed on the devices that hold the array, without gathering it, and is the same for
every layout over devices and processes. It detects damage, not an adversary, who can make another
array with the same digest. Pure; digests of files are in `manifest.py`.

Let bits_i be the bits of entry i as an unsigned 32-bit integer (a wider type counts as twice as
many entries, a narrower one is widened), i its number in row-major order, and all sums and products
modulo 2**32:

    h_i = fmix32(bits_i + 0x9E3779B1 * i)
    digest = sum_i h_i, sum_i (h_i ^ h_i >> 15) * 0x85EBCA77

It is written as 16 hexadecimal digits, the first sum first.

Source: fmix32 is the last step of MurmurHash3 (Appleby 2011); the two factors are primes of xxHash
(Collet 2012).
"""

from typing import Any

import jax
import jax.numpy as jnp


def survey_leaves(tree: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Computes the digest of each leaf and whether all its entries are finite.

  Args:
    tree: of arrays.

  Returns:
    Name, as `name_leaves` gives it -> (uint32 [2], bool scalar).
  """
  return {
    name: (digest_array(leaf), jnp.isfinite(leaf).all()) for name, leaf in name_leaves(tree).items()
  }


def name_leaves(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree by name; the parts of a name are joined by "/"."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def digest_array(x: jax.Array) -> jax.Array:
  """Computes the two sums of an array of any dtype and shape.

  Returns:
    uint32 [2].
  """
  bits = _to_uint32(x)
  number = jnp.zeros(bits.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(bits.ndim)):
    number += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
    stride *= bits.shape[axis]
  h = _fmix32(bits + jnp.uint32(0x9E3779B1) * number)
  second = (h ^ h >> 15) * jnp.uint32(0x85EBCA77)
  return jnp.stack([jnp.sum(h, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


def format_digest(sums: jax.Array) -> str:
  """Formats the sums of `digest_array` as 16 hexadecimal digits."""
  return "".join(f"{int(word):08x}" for word in jax.device_get(sums))


def _to_uint32(x: jax.Array) -> jax.Array:
  """Returns the bits of each entry; 64-bit types get a last axis of 2, the low half first."""
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  if x.dtype.itemsize >= 4:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
  narrow = jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint8
  return jax.lax.bitcast_convert_type(x, narrow).astype(jnp.uint32)


def _fmix32(h: jax.Array) -> jax.Array:
  h = (h ^ h >> 16) * jnp.uint32(0x85EBCA6B)
  h = (h ^ h >> 13) * jnp.uint32(0xC2B2AE35)
  return h ^ h >> 16
