"""Random keys, derived and never stored.

Every key is a function of the seed, a purpose and a step. So a run that is resumed draws the same
numbers as one that was not interrupted, and draws for one purpose do not affect those for another.
The implementation is named, and every draw its dtype, so that neither JAX_DEFAULT_PRNG_IMPL nor
JAX_ENABLE_X64 changes a number.
"""

import jax
import jax.numpy as jnp

# Purposes. Never renumber them: that would change every run.
INIT = 0
SAMPLE = 1
DROPOUT = 2
DATA = 3
EVAL = 4

IMPLEMENTATION = "threefry2x32"  # of every key; another would change every run


def derive_key(seed: int, purpose: int, step: int | jax.Array = 0) -> jax.Array:
  """Derives the key for a purpose at a step: `fold_in(fold_in(key(seed), purpose), step)`.

  The key is of `IMPLEMENTATION`, whatever JAX's default is.

  Args:
    seed: of the experiment.
    purpose: one of the constants above.
    step: updates applied before, or the number of the draw.
  """
  return _derive_key(*jax.device_put((seed, purpose, step)))


def derive_row_keys(key: jax.Array, num_rows: int) -> jax.Array:
  """Derives a key for each row of a batch [num_rows]: `fold_in(key, row)`."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_rows, dtype=jnp.int32))


@jax.jit
def _derive_key(seed: jax.Array, purpose: jax.Array, step: jax.Array) -> jax.Array:
  key = jax.random.key(seed, impl=IMPLEMENTATION)
  return jax.random.fold_in(jax.random.fold_in(key, purpose), step)
