"""Runs `python -m jgpt.run`: trains an experiment, prints its progress, keeps it, and samples.

Arguments and what is printed. From Python call `plan_run`, in `plan.py`, and `train_run`, in
`train.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jgpt import cli
from jgpt.config import Experiment, TrainConfig, catalog
from jgpt.config.experiment import GPT2_SIZES
from jgpt.config.settings import (
  SEQUENCE_SETTINGS,
  SIZE,
  change,
  format_value,
  list_settings,
  parse_setting,
  resolve,
  setting_names,
  unresolve,
)
from jgpt.data.sources import expected_vocab_size
from jgpt.errors import UserError, first_line, printable, show
from jgpt.params import count_params
from jgpt.runs.folder import RunFiles, read_last_settings
from jgpt.runs.origin import find_checkpoint, read_source_files
from jgpt.runs.resume import find_recorded
from jgpt.system import locks, signals

if TYPE_CHECKING:  # jax is imported after the arguments are understood
  import jax

  from jgpt.plan import Plan
  from jgpt.runs.log import Writer
  from jgpt.system.signals import Stop


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  if args.list:
    print(format_list())
    return 0
  profile = None
  if args.profile is not None:
    from jgpt.runs.profile import parse_profile

    profile = parse_profile(args.profile)
  changes = dict(parse_setting(text) for text in args.set)
  flags = {
    "train.steps": args.steps,
    "train.seed": args.seed,
    "train.log_every": args.log_every,
    "train.init_from": args.init_from,
    "train.continue_from": args.continue_from,
  }
  changes |= {name: value for name, value in flags.items() if value is not None}
  recorded = None
  if args.workdir and not args.experiment:
    workdir = Path(os.path.expanduser(args.workdir))
    recorded = find_recorded_run(workdir, changes)
  if recorded:
    name, (known, base) = recorded.name, find_base(recorded, workdir)
    experiment = change_recorded(recorded, workdir, changes)
  else:
    known, (name, base) = args.experiment, load_base(args.experiment, changes)
    base, experiment = change_base(base, changes)
  if args.print_config:
    vocab_size = recorded.tokenizer.vocab_size if recorded else None
    print(format_config(name, experiment, vocab_size))
    return 0
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(signals.exit_on_signals())
    with stop.leaving(
      "stopped before training; nothing is lost, the same command begins again or goes on"
    ):
      from jgpt.devices import processes, runtime

      if note := runtime.set_up():
        print(note, file=sys.stderr)
      _join(args, experiment, stop, stack)
      workdir = Path(
        processes.on_lead("the run folder", lambda: _name_folder(args, name, base, experiment))
      )
      plan = _plan(args, name, experiment, workdir)
      if profile is not None:
        from jgpt.runs.profile import choose_updates

        chosen = choose_updates(profile, plan.start_step, plan.experiment.train.steps)
        plan = dataclasses.replace(plan, profile=chosen)
    return _train(known, base, experiment, plan, stop)


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m jgpt.run",
    description="Train an experiment. The same command again resumes where it stopped, or samples "
    "when it is finished; so does --workdir DIR alone.",
  )
  parser.add_argument(
    "--experiment",
    metavar="NAME",
    help="an experiment of --list, or the path of a file ending in .py",
  )
  parser.add_argument("--list", action="store_true", help="list the experiments and stop")
  parser.add_argument(
    "--print-config", action="store_true", help="print every setting as --set takes it, and stop"
  )
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    metavar="SECTION.FIELD=VALUE",
    help="change a setting; repeat for more",
  )
  parser.add_argument(
    "--steps",
    type=int,
    metavar="N",
    help="updates in all (train.steps); 0 keeps weights as they are",
  )
  parser.add_argument(
    "--init-from",
    metavar="PATH",
    help="weights to begin from (train.init_from): a Hugging Face folder or model.safetensors, "
    "llm.c's .bin, a run folder or its checkpoints/STEP, or gpt2, gpt2-medium, gpt2-large, "
    "gpt2-xl; sizes, tokenizer and sequences come with them, without --experiment all of a run's "
    "settings",
  )
  parser.add_argument(
    "--continue-from",
    metavar="RUN",
    help="a run, or its checkpoints/STEP, whose parameters and moments a new run begins with "
    "(train.continue_from); step, schedule and order of the data begin anew; its settings are that "
    "run's without --experiment",
  )
  parser.add_argument(
    "--seed", type=int, metavar="N", help="seed of weights, order and samples (train.seed)"
  )
  parser.add_argument(
    "--workdir",
    metavar="DIR",
    help="run folder; without it runs/NAME, changed settings in the name; without --experiment the "
    "run in it goes on",
  )
  parser.add_argument(
    "--fresh", action="store_true", help="set the run folder aside and start over"
  )
  parser.add_argument(
    "--resume", action="store_true", help="resume the run in the folder; an error if there is none"
  )
  _add_reports(parser)
  _add_processes(parser)
  return parser


def _add_processes(parser: argparse.ArgumentParser) -> None:
  """Adds the options of a run of several processes."""
  several = parser.add_argument_group(
    "several processes",
    "for a run on several hosts, started once on each; under Slurm, Open MPI, on TPU pods and in "
    "indexed jobs of Kubernetes no option is needed",
  )
  several.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help="the host of process 0 and a free port there (or JAX_COORDINATOR_ADDRESS)",
  )
  several.add_argument(
    "--num-processes",
    type=int,
    metavar="N",
    help="processes in all; 1 is alone, whatever a launcher says (or JAX_NUM_PROCESSES)",
  )
  several.add_argument(
    "--process-id", type=int, metavar="I", help="this one's number, from 0 (or JAX_PROCESS_ID)"
  )


def _add_reports(parser: argparse.ArgumentParser) -> None:
  """Adds the options of what a run tells of itself."""
  parser.add_argument(
    "--log-every",
    type=int,
    metavar="N",
    help="updates between two lines of progress (train.log_every)",
  )
  parser.add_argument(
    "--profile",
    metavar="DIR[:FIRST-LAST]",
    help="write a profile of these updates to DIR, without a range of the second to the fourth of "
    "this start; xprof and ui.perfetto.dev open it",
  )


# --- Without jax ---


def load_base(experiment: str | None, changes: dict[str, Any]) -> tuple[str, Experiment]:
  """Loads the experiment whose settings a command changes.

  Args:
    experiment: as `--experiment` names it; None takes the settings of the run to begin from.
    changes: `section.field` -> value, of the command.

  Returns:
    Its name, and its settings. Where the command says what to begin from, nothing else does.

  Raises:
    UserError: if there is neither an experiment nor a run to begin from.
  """
  begins = {name: changes.get(name) for name in ("train.init_from", "train.continue_from")}
  source = next((value for value in begins.values() if value is not None), None)
  if experiment:
    name, base = Path(experiment).stem, catalog.load_experiment(experiment)
  elif source is None:
    raise UserError(
      f"choose an experiment: --experiment NAME, one of {', '.join(catalog.list_experiments())}; "
      "or see --list"
    )
  elif begins["train.continue_from"] is None and find_checkpoint(source) is None:
    raise UserError(
      f"train.init_from={show(source)} names no run folder whose settings could be taken: add "
      "--experiment NAME, for example --experiment text --set data.path=FILE"
    )
  else:
    files = read_source_files(source)
    name, base = files.name or "continued", unresolve(files.experiment)
  if source is not None:
    others = [n.removeprefix("train.") for n in begins if n not in changes]
    train = dataclasses.replace(base.train, init="normal", **dict.fromkeys(others))
    base = dataclasses.replace(base, train=train)
  return name, base


def change_base(base: Experiment, changes: dict[str, Any]) -> tuple[Experiment, Experiment]:
  """Returns an experiment and the same with changed settings.

  Settings of the network and of sequences may go together with those of the weights to begin from
  only. Then the weights are looked at, and the experiment has their settings.

  Args:
    base: from `load_base`.
    changes: `section.field` -> value.

  Returns:
    The experiment, and the changed one.

  Raises:
    UserError: as `settings.change` and `adopt_settings` do.
  """
  try:
    return base, change(base, changes)
  except UserError:
    others = {n: value for n, value in changes.items() if not is_decided_by_weights(n)}
    train = change(base, others).train
    if train.init_from is None and train.continue_from is None:
      raise
  from jgpt.plan import open_source
  from jgpt.weights.adoption import adopt_settings

  source = open_source(change(base, others), report=report_download)
  experiment = adopt_settings(base, source, changes)[0]
  with contextlib.suppress(UserError):  # the weights may leave open what only the changes say
    base = adopt_settings(base, source, {})[0]
  return base, experiment


def is_decided_by_weights(name: str) -> bool:
  """Returns whether weights to begin from may decide a setting."""
  is_model = name.startswith("model.") and name in (*setting_names(), SIZE)
  return is_model or name in SEQUENCE_SETTINGS


def find_recorded_run(workdir: Path, changes: dict[str, Any]) -> RunFiles | None:
  """Finds the run in `--workdir` that a command without `--experiment` goes on with.

  Args:
    workdir: the folder.
    changes: of the command; if they say what to begin from, the run must have begun so.

  Returns:
    The run's files; None where a new run is to begin.

  Raises:
    UserError: if nothing says which run this is.
  """
  recorded = find_recorded(workdir)
  begins = [changes.get(name) for name in ("train.init_from", "train.continue_from")]
  if any(begins):
    from jgpt.weights.initial import is_same_source

    train = recorded.experiment.train if recorded else TrainConfig(steps=0)
    began = train.init_from, train.continue_from
    return recorded if all(map(is_same_source, began, begins)) else None
  if recorded is None:
    raise UserError(
      f"{workdir} holds no run to go on with. To begin one there, name an experiment: --experiment "
      f"NAME, one of {', '.join(catalog.list_experiments())}"
    )
  return recorded


def change_recorded(recorded: RunFiles, workdir: Path, changes: dict[str, Any]) -> Experiment:
  """Returns the settings of a run's last start, with the changes of a command.

  What follows from other settings or from the data is None again.

  Args:
    recorded: the run's files.
    workdir: its folder.
    changes: `section.field` -> value.
  """
  last = read_last_settings(workdir, recorded)
  kept: dict[str, Any] = {
    f"train.{name}": getattr(last.train, name) for name in ("init_from", "continue_from")
  }
  if last.model.vocab_size == recorded.tokenizer.vocab_size:
    kept["model.vocab_size"] = None
  if "train.epochs" in changes:
    kept["train.steps"] = None
  return change(change(unresolve(last), kept), changes)


def find_base(recorded: RunFiles, workdir: Path) -> tuple[str | None, Experiment]:
  """Finds the experiment that a run is of, by its name.

  Returns:
    What `--experiment` takes for it, and the experiment; None, and the run's settings, where jgpt
    has none of that name.
  """
  if recorded.name in catalog.list_experiments():
    return recorded.name, catalog.load_experiment(recorded.name)
  return None, change_recorded(recorded, workdir, {})


def format_list() -> str:
  """Formats the table of experiments: name, parameters, data, description, expected result."""
  rows = [("experiment", "parameters", "data", "what it is", "expected loss")]
  for name in catalog.list_experiments():
    experiment, doc = catalog.load_experiment_file(name)
    expected = "; ".join(
      f"{'held out' if e.heldout else 'training'} {e.loss_nats_per_token:.2f} ± {e.band:.2f} on "
      f"{e.data}"
      for e in experiment.expected
    )
    what = doc.strip().splitlines()[0].partition(": ")[2] or doc.strip().splitlines()[0]
    rows.append(
      (
        name,
        f"{_count_params(experiment):,}",
        experiment.data.path or experiment.data.source,
        what,
        expected,
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
  )


def format_config(name: str, experiment: Experiment, vocab_size: int | None = None) -> str:
  """Formats every setting as `--set` takes it.

  Args:
    name: of the experiment.
    experiment: not resolved.
    vocab_size: of its tokenizer; None counts what its data will have.
  """
  sizes = {n: getattr(experiment.model, n) for n in GPT2_SIZES["d12"]}
  known = [f" ({SIZE}={size})" for size, there in GPT2_SIZES.items() if there == sizes]
  lines = [f"# {name}: {_count_params(experiment, vocab_size):,} parameters{''.join(known)}"]
  train = experiment.train
  if source := train.init_from or train.continue_from:
    lines.append(
      f"# sizes, tokenizer and sequences will be those of {source}, unless given by name"
    )
  return "\n".join(lines + [f"{k}={format_value(v)}" for k, v in list_settings(experiment).items()])


def _count_params(experiment: Experiment, vocab_size: int | None = None) -> int:
  """Counts the parameters of an experiment whose settings are not resolved, without its data."""
  return count_params(resolve(experiment, vocab_size or expected_vocab_size(experiment.data)).model)


def set_run_aside(folder: Path) -> Path | None:
  """Renames a run folder to a free name.

  Returns:
    The new path; None where the folder is absent or empty.

  Raises:
    UserError: if it is not a run folder, another process writes to it, or it is the current folder.
  """
  here, folder = Path.cwd(), folder.absolute()
  if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
    return None
  if not os.path.lexists(folder / "experiment.json"):
    raise UserError(
      f"{folder} is not a run folder, so --fresh leaves it alone. Choose another --workdir"
    )
  if locks.is_held(folder):
    raise UserError(
      f"{folder} is being written by another process ({locks.describe_holder(folder)}). Wait until "
      "it ends"
    )
  if here.is_relative_to(folder):
    raise UserError(
      f"--fresh cannot rename {folder}, the folder you are in. Go one up and name it with --workdir"
    )
  number = 1
  while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
    number += 1
  folder.rename(old)
  return old.relative_to(here) if old.is_relative_to(here) else old


# --- Training ---


def report_download(done: int, total: int) -> None:
  """Prints the progress of a download: on a terminal in one line, otherwise every 10%.

  Args:
    done: bytes.
    total: bytes.
  """
  percent = 100 * done // total
  words = f"downloading weights: {done / 1e9:.2f} of {total / 1e9:.2f} GB"
  if sys.stderr.isatty():
    print(f"\r{words}", end="\n" if done == total else "", file=sys.stderr, flush=True)
  elif percent % 10 == 0:
    print(words, file=sys.stderr, flush=True)


def _join(
  args: argparse.Namespace, experiment: Experiment, stop: Stop, stack: contextlib.ExitStack
) -> None:
  """Joins the other processes of the run, if there are any; the lead alone prints from then on."""
  from jgpt.devices import cluster, processes, watch

  cluster.join(
    *(args.coordinator, args.num_processes, args.process_id),
    timeout=experiment.mesh.timeout_seconds,
  )
  stack.enter_context(watch.watching(stop, cli.describe_failure))
  if not processes.is_lead():
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries in C++ print too


def _name_folder(
  args: argparse.Namespace, name: str, base: Experiment, experiment: Experiment
) -> str:
  """Returns the run folder that the arguments ask for."""
  from jgpt.plan import default_workdir, find_default_run

  if args.workdir:
    return os.path.expanduser(args.workdir)
  workdir = default_workdir(name, base, experiment)
  is_new = not args.fresh and not os.path.lexists(workdir)
  if is_new and (same := find_default_run(name, base, experiment)):
    print(f"{same} holds this run, on the same text under another name", file=sys.stderr)
    workdir = same
  return str(workdir)


def _plan(args: argparse.Namespace, name: str, experiment: Experiment, workdir: Path) -> Plan:
  """Plans the run that the arguments ask for, in its folder."""
  from jgpt.devices import processes
  from jgpt.plan import plan_run
  from jgpt.runs import manifest

  if args.fresh and args.resume:
    raise UserError(
      "--fresh and --resume exclude each other: the one starts over, the other goes on"
    )
  if args.fresh:
    source = experiment.train.init_from or experiment.train.continue_from
    if source is not None and Path(os.path.expanduser(source)).resolve().is_relative_to(
      workdir.resolve()
    ):
      raise UserError(
        f"--fresh would set {workdir} aside, where the weights to begin from are. Choose another "
        "--workdir"
      )
    # Raises what is wrong with the settings, before anything is moved.
    plan_run(experiment, report=report_download)
    if old := processes.on_lead("the old run", lambda: _to_text(set_run_aside(workdir))):
      print(f"the old run is kept in {old}")
  if args.resume:
    processes.on_lead("the checkpoints", lambda: manifest.find_step(workdir, None))
  return plan_run(experiment, workdir=workdir, name=name, report=report_download)


def _to_text(path: Path | None) -> str | None:
  return None if path is None else str(path)


def _train(
  known: str | None, base: Experiment, experiment: Experiment, plan: Plan, stop: Stop
) -> int:
  """Trains, and prints what was learned and what to try next; returns the exit status.

  Args:
    known: what `--experiment` takes for it; None where that is not known.
    base: the experiment of that name.
    experiment: the changed one.
    plan: of the run.
    stop: from `exit_on_signals`.
  """
  import jax

  from jgpt import train
  from jgpt.devices import cluster, processes, runtime
  from jgpt.generate import sample_texts
  from jgpt.report import outcome, summary
  from jgpt.report.tables import format_table
  from jgpt.runs.folder import make_subfolder
  from jgpt.system import files

  devices = runtime.devices(to_train=True)
  if table := cluster.survey_devices(devices):
    print(f"{format_table(table, ['left'] * 3)}\n")
  for label, text in summary.describe_plan(plan, devices):
    print(f"{label:<12}{text}")
  print(flush=True)
  steps = plan.experiment.train.steps
  writers, sample_at = _open_console(plan)
  print(end="", flush=True)
  began = time.perf_counter()
  result = train.train_run(plan, writers=writers, sample_at=sample_at, stop=stop)
  step = result.step
  saved = signals.describe_stop(step, plan.workdir)
  if result.signal:
    stop.leave(saved)
  with stop.leaving(saved):
    sampling = time.perf_counter()
    texts = sample_texts(result.state.params, result.tokenizer, step, result.experiment)
  seconds = result.seconds["sampling"] + time.perf_counter() - sampling
  result = dataclasses.replace(result, seconds=result.seconds | {"sampling": seconds})
  if not processes.is_lead():
    return 0
  outcome.write_outcome(plan, result)
  samples = make_subfolder(plan.workdir, "samples")
  files.write_text(samples / f"step_{step}.txt", "".join(f"{t}\n" for t in texts))
  with stop.leaving(saved), processes.busy("the end of the run"):
    summary.print_result(plan, result, texts, time.perf_counter() - began)
    if words := summary.describe_end(plan, result):
      print(f"{words}\n")
    is_named = known or experiment.train.continue_from != base.train.continue_from
    again = summary.format_command(known, base, experiment) if is_named else None
    if plan.start_step < steps:
      draw_curves(plan.workdir)
    summary.print_next(plan, texts, again)
    if plan.start_step < steps:
      print_compiler_check(plan, jax.local_devices()[0])
  return 0


def _open_console(plan: Plan) -> tuple[list[Writer], Callable[[int], bool] | None]:
  """Prints how the run goes on; returns what prints its progress, and when that wants samples."""
  from jgpt.devices import processes
  from jgpt.report.console import ConsoleWriter

  steps = plan.experiment.train.steps
  writers, sample_at = [], None
  if plan.start_step >= steps and not steps:
    print("no updates: this makes a run folder of the weights")
  elif plan.start_step >= steps:
    print(
      f"this run is finished: {plan.start_step:,} steps. A changed setting begins another, --fresh "
      "begins anew"
    )
  else:
    if plan.start_step:
      print(f"going on from step {plan.start_step:,}")
    console = ConsoleWriter(
      steps=steps,
      log_every=plan.experiment.train.log_every,
      start_step=plan.start_step,
      epoch_steps=plan.epoch_steps,
    )
    writers = [console]
    if processes.decide("the console", console.wants_samples and bool(plan.data.documents)):
      sample_at = console.is_line_due
  return writers, sample_at


def draw_curves(workdir: Path) -> None:
  """Draws a run that has just ended into its folder, and prints where, or what is missing for it.

  A failure is a warning: the run itself is finished and saved.
  """
  from jgpt.report.figures import can_draw, render_figure
  from jgpt.runs.folder import PLOT_FILE, check_no_link
  from jgpt.system.files import write_file

  path = workdir / PLOT_FILE
  if not can_draw():
    how = "try pip install matplotlib, or install jgpt with its extra plot"
    print(f"for a picture of the curves, {how}\n")
    return
  print(end="", flush=True)
  try:
    from jgpt.report.run_figure import PANELS, plot_runs

    check_no_link(path)
    write_file(path, render_figure(plot_runs([workdir]), path.suffix))
  except Exception as error:  # another library's, whatever it is
    print(f"WARNING: {path} was not drawn: {first_line(error)[:200]}\n", file=sys.stderr)
  else:
    print(f"{printable(f'wrote {path}: {PANELS}')}\n")


def print_compiler_check(plan: Plan, device: jax.Device) -> None:
  """Compares compiled gradients with a reference, once per machine, and prints the result.

  Called after a run's results are printed, because it takes seconds.
  """
  from jgpt.devices import canary

  print(end="", flush=True)
  try:
    comparison = canary.compare_once(plan.experiment, device)
  except (RuntimeError, MemoryError) as error:  # the run itself is finished and saved
    print(f"\nthe compiler could not be checked: {first_line(error)[:200]}", file=sys.stderr)
    return
  if comparison is not None:
    file = sys.stdout if comparison.passed else sys.stderr
    print(f"\n{canary.describe_comparison(comparison)}", file=file)


if __name__ == "__main__":
  sys.exit(cli.guard(main))
