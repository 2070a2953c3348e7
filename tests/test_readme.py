"""The documents are true: README.md, CHANGELOG.md, CONTRIBUTING.md and the guide.

Their Python runs, and so do their commands, large ones at a small size; those that cannot are
parsed. Their links lead somewhere, the files that they name exist, and their tables, trees and
counts are complete. `test_from_your_code.py` tests that page's rows.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest
import small_runs
import switches
from equivalence import QUICK

import jgpt
from jgpt import prepare, run
from jgpt.cli import VERBS
from jgpt.config import ComputeConfig, ModelConfig, catalog
from jgpt.config.checks import alternatives, choices
from jgpt.config.experiment import GPT2_SIZES
from jgpt.config.settings import (
  SIZE,
  change,
  format_value,
  parse_setting,
  resolve,
  setting_names,
)
from jgpt.data.sources import SOURCES, expected_vocab_size
from jgpt.errors import UserError
from jgpt.params import count_params
from jgpt.plan import plan_run
from jgpt.train import train_run

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "notebooks" / "guide"
TOP = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
PATHS = [*(ROOT / name for name in TOP), *sorted(GUIDE.glob("*.md"))]
PAGES = {
  path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").replace("<wbr>", "")
  for path in PATHS
}
README = PAGES["README.md"]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
# Files of a reader, or of another program.
THEIRS = {"wide.py", "path/to/mine.py", "configurator.py", "tinyshakespeare.py"}

each_page = pytest.mark.parametrize("page", PAGES)


def guide(name: str) -> str:
  return PAGES[f"notebooks/guide/{name}.md"]


def blocks(page: str, language: str) -> list[str]:
  """The code blocks of a page in one language, without the indentation of a list."""
  found = [m for m in BLOCK.finditer(PAGES[page]) if m[2] == language]
  return [re.sub(rf"^{m[1]}", "", m[3], flags=re.MULTILINE) for m in found]


def prose(page: str) -> str:
  """A page without its code blocks."""
  return BLOCK.sub("", PAGES[page])


def spans(page: str) -> list[str]:
  return re.findall(r"`([^`]+)`", prose(page))


# --- Python ---

# How many blocks of Python each page has. Each of them runs in a test below, but for the guide's
# from_your_code.md: `test_from_your_code.py` runs that.
PYTHON = {
  "README.md": 1,
  "notebooks/guide/add_an_experiment.md": 1,
  "notebooks/guide/commands.md": 2,
  "notebooks/guide/from_your_code.md": 1,
}


# What makes a large experiment small, on a text of the reader's; its other settings stay.
LARGE = ("text", "shakespeare_bytes", "shakespeare_char_cpu", "gpt2_shakespeare")
SMALL = {
  "model.num_layers": 1,
  "model.num_heads": 2,
  "model.d_model": 16,
  "model.d_ff": 64,
  "model.max_seq_len": 8,
  "data.seq_len": 8,
  "data.batch_size": 2,
  "mesh.data": 1,
  "data.heldout_tokens": None,
  "data.heldout_fraction": 0.1,
  "data.path": "my_book.txt",
  "train.steps": 3,
  "sample.max_tokens": 5,
  "sample.num": 1,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A folder with the runs that commands name: `names`, with another rate too, and runs/big."""
  folder = tmp_path_factory.mktemp("documents")
  write_theirs(folder)
  small = SMALL | {"data.path": str(folder / "my_book.txt")}
  five = {"train.steps": 5, "train.eval_every": None}
  cases = {
    "names": ("names", five),
    "names,optimizer.peak_lr=0.03": ("names", five | {"optimizer.peak_lr": 0.03}),
    "big": ("text", small),
  }
  with small_runs.compiled_quickly():
    for workdir, (name, changes) in cases.items():
      experiment = change(catalog.load_experiment(name), changes)
      train_run(plan_run(experiment, workdir=folder / "runs" / workdir, name=name))
  return folder


@pytest.fixture(scope="module")
def gpt2(runs):
  """The same folder, with runs/gpt2: a small network with GPT-2's tokens."""
  experiment = change(catalog.load_experiment("gpt2_shakespeare"), SMALL)
  path = {"data.path": str(runs / "my_book.txt")}
  try:
    plan = plan_run(change(experiment, path), workdir=runs / "runs" / "gpt2", name="gpt2")
  except UserError as error:
    pytest.skip(f"GPT-2's vocabulary is not here: {error}")
  with small_runs.compiled_quickly():
    train_run(plan)
  return runs


def execute(code: str, page: str, **names: Any) -> tuple[dict, str]:
  """Runs code, given some variables; returns its variables and what it printed."""
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    exec(compile(code, page, "exec"), names)
  return names, printed.getvalue()


def test_every_block_of_python_is_known():
  found = {page: len(blocks(page, "python")) for page in PAGES}
  assert {page: number for page, number in found.items() if number} == PYTHON


@pytest.mark.parametrize("steps", [3, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_readmes_loop_trains(steps, tmp_path, monkeypatch):
  """In fourteen lines, with the first loss that the command above it prints."""
  monkeypatch.chdir(tmp_path)
  (code,) = blocks("README.md", "python")
  assert len([line for line in code.splitlines() if line.strip()]) == 14
  assert code.count("range(1000)") == 1 and code.count("jax.jit(") == 3
  if steps < 1000:  # compiled quickly
    code = code.replace("range(1000)", f"range({steps})").replace("jax.jit(", "quick_jit(")
  quick_jit = partial(jax.jit, compiler_options=QUICK)
  names, printed = execute(code, "README.md", quick_jit=quick_jit)
  assert int(names["state"].step) == steps
  lines = [line.split() for line in printed.splitlines()]
  assert [int(step) for step, _ in lines] == list(range(0, steps, 100))
  stated = re.search(r"step +1/1000 \| loss (\d\.\d+)", README)
  if names["plan"].data.label == "names":
    assert f"{float(lines[0][1]):.4f}" == stated[1]
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("place", ["an empty folder", "the clone"])
def test_the_readmes_loop_runs_after_the_readmes_install(place, tmp_path):
  """In a process of its own, with nothing on its path but what is installed."""
  env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "JGPT_DATA_DIR")}
  folder = tmp_path if place == "an empty folder" else ROOT

  def call(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)

  if call("import jgpt").returncode:
    pytest.skip("jgpt is not installed, as the README does it")
  done = call(blocks("README.md", "python")[0])
  assert done.returncode == 0, done.stderr
  losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
  assert len(losses) == 10 and losses[-1] < losses[0]
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_python_trains_plots_and_samples(tmp_path, monkeypatch):
  matplotlib = pytest.importorskip("matplotlib", reason="the page draws a plot (the test extra)")
  matplotlib.use("Agg")
  monkeypatch.chdir(tmp_path)
  names, printed = execute(blocks("notebooks/guide/commands.md", "python")[0], "commands.md")
  assert len(names["plt"].gca().lines[0].get_xdata()) == 1000
  names["plt"].close()
  texts = ast.literal_eval(printed)
  assert len(texts) == 20 and all(text.startswith("an") for text in texts)
  assert not list(tmp_path.iterdir())  # without a workdir nothing is left on disk


@pytest.mark.slow
def test_python_opens_a_run(runs, monkeypatch):
  monkeypatch.chdir(runs)
  _, printed = execute(blocks("notebooks/guide/commands.md", "python")[1], "commands.md")
  lines = printed.splitlines()
  step, loss = lines[0].split()
  assert step == "5" and 2 < float(loss) < 5
  texts = ast.literal_eval(lines[1])
  assert len(texts) == 5 and all(text.startswith("an") for text in texts)
  assert 2 < float(lines[2]) < 5 and lines[3].startswith("Evaluation(")


def write_theirs(folder: Path) -> None:
  """Writes the experiment and the texts that the pages' commands name."""
  (code,) = blocks("notebooks/guide/add_an_experiment.md", "python")
  (folder / "poems").mkdir()
  (folder / "texts").mkdir()
  texts = dict.fromkeys(
    ("my_words.txt", "my_book.txt", "poems/a.txt", "texts/a.txt"), "emma\n" * 99
  )
  files = {"wide.py": code} | texts
  for name, text in files.items():
    (folder / name).write_text(text, encoding="utf-8")


# --- Commands ---


def commands() -> list[tuple[str, str, tuple[str, ...], bool]]:
  """Every `python -m jgpt.<verb>` of the pages, once: page, verb, arguments, whether in a block."""
  found = {}
  for page in PAGES:
    in_blocks = [line for _, _, code in BLOCK.findall(PAGES[page]) for line in code.splitlines()]
    in_blocks = [part for line in in_blocks for part in line.split("&&")]
    in_text = [span for span in spans(page) if span.startswith("python -m jgpt.")]
    for line in [*in_blocks, *in_text]:
      line = line.removesuffix("'" if line.count("'") % 2 else "")  # of a command around it
      if m := re.search(r"python -m jgpt\.(\w+)( .*)?$", line.rstrip()):
        args = tuple(shlex.split(m[2] or "", comments=True))
        if args != ("--help",):
          found.setdefault((m[1], args), (page, line in in_blocks))
  return [(page, verb, args, is_whole) for (verb, args), (page, is_whole) in found.items()]


COMMANDS = commands()
# What stands for a reader's own in the README's table.
PLACEHOLDERS = {"DIR": "runs/names", "NAME": "names", "PATH": "exported"}
PREPARE = ["--data", "texts/*.txt", "--tokenizer", "gpt2", "--out", "shards/"]
FEW = ["--heldout-tokens", "20"]  # of a text that is short


def parse(verb: str, args: list[str], *, is_whole: bool) -> argparse.Namespace:
  """What a command reads from its arguments; nothing after that runs.

  In a text a command may stand without the arguments that it requires.
  """

  class ParsedError(Exception):
    pass

  right = argparse.ArgumentParser.parse_args

  def stop(self, args=None, namespace=None):
    for action in self._actions:
      action.required &= is_whole
    raise ParsedError(right(self, args, namespace))

  main = importlib.import_module(f"jgpt.{verb}").main
  with (
    mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
    pytest.raises(ParsedError) as found,
  ):
    main(args)
  return found.value.args[0]


def test_there_are_commands_for_every_verb():
  assert {verb for _, verb, _, _ in COMMANDS} == set(VERBS)
  assert len(COMMANDS) > 25 and len(list_executed()) > 30


@pytest.mark.parametrize(("page", "verb", "args", "is_whole"), COMMANDS)
def test_a_command_is_one(page, verb, args, is_whole, tmp_path, monkeypatch, capsys):
  """Its arguments are the command's own; `run` prints the settings that it would train with."""
  monkeypatch.chdir(tmp_path)
  write_theirs(tmp_path)
  args = ["names" if arg == "NAME" else arg for arg in args]
  parsed = parse(verb, args, is_whole=is_whole)
  if verb == "run" and parsed.experiment:
    assert run.main([*args, "--print-config"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert not [text for text in parsed.set if text not in printed]


def find_obstacle(verb: str, args: tuple[str, ...]) -> str:
  """Says why a command is parsed only; "" where it is executed."""
  if verb == "bench":
    return "measures for minutes, or compiles for other devices (tests/bench)"
  if "--init-from" in args and "gpt2" in args:
    return "takes half a gigabyte from the network (tests/weights)"
  if verb == "doctor" and not args:
    return "looks at the whole machine, and at the network (tests/doctor)"
  if "--coordinator" in args or any(arg.startswith("mesh.") for arg in args):
    return "is for several processes or hosts (tests/reliability/test_launchers.py)"
  if not args:
    return "names a command without its arguments"
  if verb == "export" and "--run" not in args:
    return "leaves out the run, which the text around it names"
  return ""


def list_executed() -> list[tuple[str, str, tuple[str, ...]]]:
  """Lists the commands to execute; of those that differ in numbers only, the first."""
  found = {}
  for page, verb, args, _ in COMMANDS:
    if not find_obstacle(verb, args):
      found.setdefault(re.sub(r"\d+", "0", f"{verb} {args}"), (page, verb, args))
  return list(found.values())


def shrink(args: list[str]) -> list[str]:
  """Adds settings to the arguments of `run` that make a large experiment small."""
  large = [name for name in args if name in LARGE]
  if not large or "--print-config" in args:
    return args
  given = {arg.partition("=")[0] for arg in args}
  changes = {name: value for name, value in SMALL.items() if name not in given}
  if "--init-from" in args:
    changes = {name: value for name, value in changes.items() if not name.startswith("model.")}
  args = ["train.steps=3" if arg.startswith("train.steps=") else arg for arg in args]
  if "--profile" in args:
    changes["train.steps"] = int(args[args.index("--profile") + 1].rpartition("-")[2]) + 1
  return [*args, *(x for n, v in changes.items() for x in ("--set", f"{n}={format_value(v)}"))]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "verb", "args"), list_executed())
def test_a_command_works(page, verb, args, request, runs, tmp_path, monkeypatch, capsys):
  """Each is executed, in a folder with what it names; large experiments at a small size.

  `find_obstacle` has the others, and why. What installs is executed by CI, as is `pytest`.
  """
  if "gpt2" in " ".join(args) or verb == "export":
    request.getfixturevalue("gpt2")
  folder = tmp_path / "reader"
  is_new = verb == "run" and "runs/names" not in args and "runs/big" not in args
  ignored = shutil.ignore_patterns("runs" if is_new else "", "shards")
  shutil.copytree(runs, folder, ignore=ignored)
  monkeypatch.chdir(folder)
  monkeypatch.setattr(run, "print_compiler_check", lambda *args: None)  # tests/devices have it
  places = PLACEHOLDERS | ({"DIR": "runs/gpt2"} if verb == "export" else {})
  args = [places.get(arg, arg) for arg in args] + FEW * (verb == "prepare")
  if "data.path=shards/" in args:
    prepare.main([*PREPARE, *FEW])
    capsys.readouterr()
  with small_runs.compiled_quickly():
    status = importlib.import_module(f"jgpt.{verb}").main(shrink(args) if verb == "run" else args)
  assert status == 0 and capsys.readouterr().out


@each_page
def test_settings_in_the_text_exist(page):
  """Each `--set section.field=value` is read; `--set data.path=` alone names a setting."""
  found = [text for span in spans(page) for text in re.findall(r"--set (\S+?)=(\S*)", span)]
  for name, value in found:
    if name == "section.field":
      continue
    assert name in (*setting_names(), SIZE), f"there is no setting {name}"
    if value:
      parse_setting(f"{name}={value}")


def test_every_flag_in_the_text_exists():
  """A flag that stands alone, such as `--resume`, is one of some command."""
  flags = {"--set", "--help"}
  for verb in VERBS:
    main = importlib.import_module(f"jgpt.{verb}").main
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
      main(["--help"])
    flags |= set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", printed.getvalue()))
  pages = [span for page in PAGES for span in spans(page)]
  used = {m[1] for span in pages if (m := re.match(r"(--[a-z][a-z-]+)", span))}
  assert len(used) > 10 and used <= flags


def outline(line: str) -> str:
  """A line of output without its numbers, the folder of a file, and the widths of its columns."""
  line = re.sub(r"\S*/names\.txt", "names.txt", line)
  return " ".join(re.sub(r"\d[\d,.]*(e[-+]?\d+)?", "0", line).split())


@pytest.mark.slow
def test_the_output_shown_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
  """Of `--experiment names`, in the README and in commands.md: every line but for its numbers."""
  monkeypatch.chdir(tmp_path)
  assert run.main(["--experiment", "names"]) == 0
  printed = set(map(outline, capsys.readouterr().out.splitlines()))
  if not any("names.txt (JGPT_DATA_DIR" in line for line in printed):
    pytest.skip("names.txt is not here")
  short = blocks("README.md", "text")[0].splitlines()
  assert len(short) == 12
  for line in [*short, *blocks("notebooks/guide/commands.md", "text")[0].splitlines()]:
    is_drawn = line.startswith(("  ", "│", "┌", "└", "...", "device"))
    assert is_drawn or outline(line) in printed, line


# --- Links and files ---


def slug(heading: str) -> str:
  """The anchor of a heading, as GitHub makes it."""
  return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@each_page
def test_links_lead_somewhere(page):
  targets = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if ":" not in link]
  for target in targets:
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists(), f"{page}: {target}"
    if anchor:
      headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
      assert anchor in map(slug, headings), f"{page}: {target}"


def test_the_readme_links_every_page():
  linked = set(re.findall(r"\]\(([^)#\s]+)", README))
  assert {path.relative_to(ROOT).as_posix() for path in PATHS} - {"README.md"} <= linked


@each_page
def test_files_in_the_text_exist(page):
  """`jgpt/step.py`, `tests/reference/`, or a bare `test_compute.py` or `layers.py`."""
  words = [word for span in spans(page) for word in span.split()]
  for word in set(words) - THEIRS:
    if re.match(r"(jgpt|tests|experiments|notebooks|\.ci)/", word):
      assert list(ROOT.glob(word.rstrip("/"))), f"{page}: {word}"
    elif re.fullmatch(r"\w+\.py", word):
      folders = ("jgpt", "tests", "experiments")
      assert any(list((ROOT / f).rglob(word)) for f in folders), f"{page}: {word}"


@each_page
def test_the_text_is_wrapped_at_100_columns(page):
  """But for tables, code, and what cannot be broken."""
  for line in prose(page).splitlines():
    is_long = len(line) > 100 and not line.lstrip().startswith("|")
    assert not is_long or len(line.strip().split(" ")) <= 2, f"{page}: {line}"


@each_page
def test_no_path_of_one_machine_is_shown(page):
  assert not re.search(r"/(tmp|root|work|Users)/", PAGES[page])


# --- Figures and lists ---


def test_the_readme_is_short():
  assert README.count("\n") <= 170


def test_the_tree_has_every_file_and_folder_of_the_core():
  (tree,) = [block for block in blocks("README.md", "text") if block.startswith("jgpt/\n")]
  shown = re.findall(r"(?<!\S)(\w+(?:\.py|/))(?=\s|$)", tree.partition("\n")[2])
  core = ROOT / "jgpt"
  files = {path.name for path in core.glob("*.py")} - {"__init__.py", "__main__.py"}
  folders = {
    f"{path.name}/"
    for path in core.iterdir()
    if path.is_dir() and path.name != "__pycache__" and any(p.is_file() for p in path.iterdir())
  }
  assert sorted(shown) == sorted(files | folders)


def test_the_table_has_every_experiment_with_its_parameters():
  for name in catalog.list_experiments():
    experiment = catalog.load_experiment(name)
    count = count_params(resolve(experiment, expected_vocab_size(experiment.data)).model)
    assert f"| `{name}` | {count:,} |" in README


def test_the_table_of_choices_has_every_field_and_value_of_compute():
  """Of speed.md: what is added to `ComputeConfig` is described there."""
  for name, hint in typing.get_type_hints(ComputeConfig).items():
    if name == "tricks":
      continue
    values = [value for value in choices(hint) if value != "auto"]
    values += ["true", "false"] if bool in alternatives(hint) else []
    begin = f"| `compute.{name}`"
    (row,) = [line for line in guide("speed").splitlines() if line.startswith(begin)]
    listed = re.findall(r"`([^`]+)`", row.split("|")[2])
    assert [value for value in listed if value != "auto"] == values


def test_the_public_names_are_listed():
  listed = guide("commands").partition("## From Python")[2].partition("```")[0]
  names = set(re.findall(r"`(\w+)`", listed))
  assert set(jgpt.__all__) - {"__version__"} <= names


def test_counts_are_true():
  """Of names, of combinations of switches, of planted errors, of GPT-2's parameters."""
  bundled = ROOT / "jgpt" / "bundled" / SOURCES["names"].filename
  names = set(bundled.read_text(encoding="utf-8").split())
  assert guide("data").count(f"{len(names):,} first names") == 1
  combinations = len(switches.all_switches())
  for text in (README, guide("equivalence")):
    assert f"all {combinations} combinations" in text
  planted = 0
  for file in ("test_planted_errors.py", "test_planted_switches.py"):
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    planted += sum([arg.arg for arg in node.args.args] == ["put"] for node in functions)
  assert f"Of {planted} errors" in guide("equivalence")
  gpt2 = resolve(catalog.load_experiment("gpt2_shakespeare"), 50257)
  for size in GPT2_SIZES:
    assert f"{count_params(change(gpt2, {SIZE: size}).model):,}" in guide("weights")


# --- A new switch ---


def apply_changes(page: str) -> dict[str, str]:
  """The files that the page's diffs change, by path, as they are with all of them applied."""
  files: dict[str, str] = {}
  for diff in blocks(page, "diff"):
    head, *lines = diff.splitlines()
    path = head.removeprefix("--- ")
    text = files.get(path) or (ROOT / path).read_text(encoding="utf-8")
    old, new = (
      "".join(f"{line[1:]}\n" for line in lines if line[:1] != mark) for mark in ("+", "-")
    )
    assert text.count(old) == 1, f"{path} does not hold once:\n{old}"
    files[path] = text.replace(old, new)
  return files


def test_the_lines_that_the_new_switch_changes_are_there():
  changed = apply_changes("notebooks/guide/add_a_switch.md")
  assert len(changed) == 5
  for path, text in changed.items():
    ast.parse(text, path)


@pytest.mark.slow
def test_the_new_switch_is_the_references(tmp_path):
  """The page's lines in a copy of jgpt: the network with SiLU has the reference's gradients."""
  ignored = shutil.ignore_patterns("__pycache__")
  for name in ("jgpt", "tests", "experiments"):
    shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
  for path, text in apply_changes("notebooks/guide/add_a_switch.md").items():
    (tmp_path / path).write_text(text, encoding="utf-8")
  code = """
from jgpt.system.precision import enable_x64
from switches import SWITCHES, SYSTEMS, check_network, make_model
assert "silu" in SWITCHES["activation"]
with enable_x64(True):
  check_network(make_model(SYSTEMS["GPT-2"], activation="silu"), what="SiLU", how="eager")
try:
  import torch
except ModuleNotFoundError:
  raise SystemExit
from test_torch_reference import check_against_torch
with enable_x64(True):
  check_against_torch(make_model(SYSTEMS["GPT-2"], activation="silu"), "float64", "SiLU")
"""
  paths = os.pathsep.join([str(tmp_path), str(tmp_path / "tests")])
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": paths},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


def test_every_value_of_a_switch_is_compared():
  """What add_a_switch.md says of tests/switches.py."""
  hints = typing.get_type_hints(ModelConfig)
  for name, hint in hints.items():
    if words := choices(hint):
      assert switches.SWITCHES[name] == tuple(words)
  flags = {name for name, hint in hints.items() if hint is bool} - {"scale_residual_init"}
  assert flags <= switches.SWITCHES.keys()
  fields = {field.name for field in dataclasses.fields(ModelConfig)}
  assert set(itertools.chain(switches.SWITCHES)) <= fields
