"""jgpt: training GPTs in JAX with pure functions.

Importing this package imports nothing else. The nouns are modules (`jgpt.config`, `jgpt.model`, `jgpt.step`, `jgpt.train`,
...); the verbs are commands (`python -m jgpt.run`, `python -m jgpt.sample`, `python -m jgpt.bench`).
"""

__version__ = "0.1.0"
