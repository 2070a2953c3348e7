"""Digests of arrays, wherever they lie.

Responsible for 64 bits that tell whether an array has changed, computed on the devices that hold it: the same for every
layout over devices and processes, without gathering anything. Against damage, not against an adversary: whoever can change
an array can make another with its digest. Pure. Not responsible for files (`manifest.py`).

With bits_i the bits of entry i (as an unsigned integer of 32; a wider type counts as twice as many entries, a narrower one
is widened), i its number in row-major order, and all sums and products modulo 2**32:

    h_i = fmix32(bits_i + 0x9E3779B1 * i)
    digest = sum_i h_i, sum_i (h_i ^ h_i >> 15) * 0x85EBCA77

as 16 hexadecimal digits, the first sum first. Source: fmix32 is the last step of MurmurHash3 (Appleby 2011); the two
factors are primes of xxHash (Collet 2012).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def survey(tree: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Computes the digest of each leaf, and whether all its entries are finite.

  Args:
    tree: arrays.

  Returns:
    Name, parts joined by "/" -> (uint32 [2], bool scalar).
  """
  return {name: (digest_array(leaf), jnp.isfinite(leaf).all()) for name, leaf in name_leaves(tree).items()}


def name_leaves(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by their names, parts joined by "/"."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def digest_array(x: jax.Array) -> jax.Array:
  """Computes the two sums of an array of any type and shape: uint32 [2]."""
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
  """The 16 hexadecimal digits of a digest."""
  return "".join(f"{int(word):08x}" for word in np.asarray(sums))


def _to_uint32(x: jax.Array) -> jax.Array:
  """The bits of each entry; 64-bit types get a last axis of 2, the low half first."""
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  if x.dtype.itemsize >= 4:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint8).astype(jnp.uint32)


def _fmix32(h: jax.Array) -> jax.Array:
  h = (h ^ h >> 16) * jnp.uint32(0x85EBCA6B)
  h = (h ^ h >> 13) * jnp.uint32(0xC2B2AE35)
  return h ^ h >> 16
