"""A run's settings and metrics, read from its folder without parameters and without jax.

`open_run` (`open.py`) reads the parameters too.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jgpt.config import Expected, Experiment, catalog
from jgpt.config.settings import change, drop_derived, is_comparable
from jgpt.data.sources import Text, find_label
from jgpt.runs.folder import RunFiles, read_last_settings, read_run_files
from jgpt.runs.locate import locate_run
from jgpt.runs.rows import Series, read_series


@dataclasses.dataclass(frozen=True)
class History:
  """What a run's folder says of its training, from `read_history`.

  Attributes:
    workdir: the run folder.
    name: of the experiment that the run was started with.
    experiment: resolved; settings that may change are those of its last start.
    metrics: by name, as `Run.metrics`.
    label: of the text, as `data.corpus.Data.label`.
    expected: results that the experiment of this name expects; none where the run's settings are
      others than that experiment's.
  """

  workdir: Path
  name: str
  experiment: Experiment
  metrics: dict[str, Series]
  label: str | None
  expected: tuple[Expected, ...]


def read_history(workdir: str | Path) -> History:
  """Reads a run's settings and metrics; the run may be going on, or have been killed.

  Args:
    workdir: a run folder, or one of its checkpoints/STEP: then up to that step.

  Raises:
    UserError: if it is not a run folder, or one of its files cannot be read.
  """
  workdir, step = locate_run(workdir)
  recorded = read_run_files(workdir)
  where = {"kind": "", "location": ""} | recorded.data
  text = Text("", where["kind"], where["location"], where["sha256"])
  experiment = read_last_settings(workdir, recorded)
  return History(
    workdir=workdir,
    name=recorded.name,
    experiment=experiment,
    metrics=read_series(workdir / "metrics.jsonl", step),
    label=find_label(text),
    expected=find_recorded_expected(recorded, experiment),
  )


def find_recorded_expected(recorded: RunFiles, ours: Experiment) -> tuple[Expected, ...]:
  """Returns the results that a run's experiment expects, of its texts; none if it was changed.

  Args:
    recorded: the run's files; run folders do not record what is expected.
    ours: the run's settings.
  """
  if recorded.name not in catalog.list_experiments():
    return ()
  theirs = catalog.load_experiment(recorded.name)
  if theirs.model.vocab_size is None and ours.model.vocab_size == recorded.tokenizer.vocab_size:
    ours = change(ours, {"model.vocab_size": None})
  is_same = is_comparable(drop_derived(theirs), drop_derived(ours))
  return theirs.expected if is_same else ()
