"""Random keys, derived and never stored.

Every key is a function of the run's seed, a purpose and a step, so that a run resumed at any step draws what it would
have drawn, and drawing for one purpose changes nothing drawn for another.
"""

import jax

# Purposes. A number, once given, keeps its meaning: changing it changes every run.
INIT = 0
SAMPLE = 1
DROPOUT = 2
DATA = 3
EVAL = 4


@jax.jit
def derive_key(seed: int, purpose: int, step: int | jax.Array = 0) -> jax.Array:
  """Derives the key for one purpose at one step: `fold_in(fold_in(key(seed), purpose), step)`."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)
