"""Lists and loads experiment files: every *.py file in the folder `experiments` is an experiment.

What an experiment is, is in `experiment.py`. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import traceback
from pathlib import Path

from jgpt.config import Experiment
from jgpt.config.synonyms import describe_synonym
from jgpt.errors import UserError, near_matches


def experiments_dir() -> Path:
  """Returns the folder of experiment files.

  It is inside the package in a wheel, and beside it in a clone or an editable install.
  """
  package = Path(__file__).resolve().parent.parent
  inside = package / "experiments"
  return inside if inside.is_dir() else package.parent / "experiments"


def list_experiments() -> list[str]:
  """Lists the names of the experiments that come with jgpt, sorted."""
  return sorted(p.stem for p in experiments_dir().glob("*.py") if not p.stem.startswith("_"))


def load_experiment(name: str) -> Experiment:
  """Loads the constant `EXPERIMENT` of an experiment file.

  Args:
    name: of an experiment that comes with jgpt, or the path of a file ending in ".py", which is
      executed.

  Raises:
    UserError: if there is no such experiment, the file raises an error (with its line), or it
      defines no `EXPERIMENT`.

  Example:
    >>> experiment = jgpt.load_experiment("names")
    >>> experiment.model.num_layers
  """
  return load_experiment_file(name)[0]


def load_experiment_file(name: str) -> tuple[Experiment, str]:
  """Loads an experiment as `load_experiment` does, and the file's docstring."""
  path = Path(name) if name.endswith(".py") else experiments_dir() / f"{name}.py"
  if not name.endswith(".py") and name not in list_experiments():
    raise UserError(
      f"there is no experiment {name!r}.{near_matches(name, list_experiments())} They are: "
      f"{', '.join(list_experiments())}; or give the path of a file ending in .py."
    )
  if not os.path.isfile(path):  # False also for a name that no file can have
    raise UserError(f"the experiment file {path} does not exist.")
  spec = importlib.util.spec_from_file_location(f"jgpt_experiment_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  try:
    # Compiled here, because Python's bytecode cache does not notice an edit within the same second
    # that leaves the size as it is.
    exec(spec.loader.source_to_code(path.read_bytes(), str(path)), module.__dict__)
  except UserError:
    raise
  except Exception as error:  # the user's file may raise anything
    frames = [
      f
      for f in traceback.extract_tb(error.__traceback__)
      if Path(f.filename).resolve() == path.resolve()
    ]
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else 1
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    advice = describe_synonym(unknown[1]) if unknown and isinstance(error, TypeError) else ""
    words = f"{type(error).__name__}: {error}{'.' if advice else ''}{advice}"
    raise UserError(f"{path}, line {line}: {words}") from error
  experiment = getattr(module, "EXPERIMENT", None)
  if not isinstance(experiment, Experiment):
    raise UserError(f"{path} must define EXPERIMENT, a jgpt.config.experiment.Experiment.")
  # What the file itself changed by name belongs to the experiment.
  return dataclasses.replace(experiment, given=()), module.__doc__ or ""
