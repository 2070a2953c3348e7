"""jgpt: training GPTs in JAX with pure functions.

    import jgpt

    plan = jgpt.plan_run(jgpt.load_experiment("names"), workdir="runs/names")
    result = jgpt.train_run(plan)
    run = jgpt.open_run("runs/names")
    run.sample("an")

Importing this package imports nothing else; the names below are imported when they are first used.
They train, sample and evaluate as the commands do; modules hold the rest.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_MODULES = {
  "Run": "jgpt.runs.open",
  "evaluate_loss": "jgpt.evaluation",
  "generate_texts": "jgpt.generate",
  "load_experiment": "jgpt.config.catalog",
  "open_run": "jgpt.runs.open",
  "plan_run": "jgpt.plan",
  "plot_runs": "jgpt.report.run_figure",
  "train_run": "jgpt.train",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
  """Imports a public name from its module."""
  if name not in _MODULES:
    raise AttributeError(f"module 'jgpt' has no attribute {name!r}")
  return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
  """Lists the public names."""
  return sorted({*globals(), *__all__})
