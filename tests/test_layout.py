"""The house: what stands where, who may import whom, and that each parameter's shape stands in one place."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jgpt.cli import VERBS
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import resolve
from jgpt.params import param_table

ROOT = Path(__file__).parent.parent
FILES = [p for p in (ROOT / "jgpt").rglob("*.py") if p.name not in ("__init__.py", "__main__.py")]
MODULES = {".".join(p.relative_to(ROOT / "jgpt").with_suffix("").parts): p for p in FILES}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}

# Rooms: files at the top, and folders. One may import from the rows above its own; a folder's files from each other too.
ORDER = [
  ["errors"],
  ["system"],
  ["config"],
  ["text", "keys", "params"],
  ["layers", "attention"],
  ["model"],
  ["optim", "batches"],
  ["sharding"],
  ["step"],
  ["evaluation", "generate"],
  ["data"],
  ["devices"],
  ["runs"],
  ["weights"],
  ["plan", "program"],
  ["train", "cli"],
  ["report"],
  ["run", "sample", "evaluate", "export", "prepare", "inspect", "bench", "doctor"],
]
PURE = {
  *("errors", "keys", "params", "layers", "attention", "model", "optim", "batches", "sharding", "step", "evaluation"),
  *("generate", "config.experiment", "config.checks", "config.settings", "text.tokenizer", "text.tokenizer_files"),
  *("text.bpe", "devices.compute", "devices.limits", "runs.digest", "report.verdict", "bench.results"),
}


def imports(module: str) -> set[str]:
  """The jgpt modules that a module imports, at its top or in a function."""
  found = set()
  for node in ast.walk(TREES[module]):
    if isinstance(node, ast.ImportFrom) and re.match(r"jgpt\b", node.module or ""):
      found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    elif isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
  if "jgpt.config" in found:  # hands on the dataclasses
    found.add("jgpt.config.experiment")
  return {name.removeprefix("jgpt.") for name in found} & MODULES.keys() - {module}


def room(module: str) -> str:
  return module.split(".")[0]


def test_every_room_has_a_row_in_the_order():
  assert sorted(m for row in ORDER for m in row) == sorted({room(module) for module in MODULES})


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module):
  row = {m: i for i, names in enumerate(ORDER) for m in names}
  found = {m for m in imports(module) if room(m) != room(module)}
  wrong = {m for m in found if row[room(m)] >= row[room(module)]}
  assert not wrong, f"{module} imports {wrong}, which stand beside or below it"


def test_no_module_imports_itself_through_others():
  """No cycles, also none through an import inside a function."""

  def visit(module: str, path: tuple[str, ...]) -> None:
    assert module not in path, " -> ".join([*path[path.index(module) :], module])
    if module not in done:
      for other in imports(module):
        visit(other, (*path, module))
      done.add(module)

  done: set[str] = set()
  for module in MODULES:
    visit(module, ())


@pytest.mark.parametrize("module", sorted(PURE))
def test_pure_files_do_not_print_log_time_or_read(module):
  """Pure files stay pure: no clock, no log, no printing, no files."""
  called = {n.func.id for n in ast.walk(TREES[module]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
  imported = {a.name for n in ast.walk(TREES[module]) if isinstance(n, ast.Import) for a in n.names}
  assert not called & {"print", "open", "input", "exec", "eval"}
  assert not imported & {"time", "logging", "os", "pickle", "random", "subprocess"}


def test_the_top_level_holds_what_the_design_names():
  tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
  if tracked.returncode:
    pytest.skip("not a git checkout")
  top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
  files = {".ci", ".gitignore", "LICENSE", "README.md", "pyproject.toml"}
  assert top <= files | {"jgpt", "experiments", "tests", "notebooks"}


def test_each_parameters_shape_stands_in_one_place():
  """Every parameter's name is a key in `param_table` and nowhere else in jgpt: other code reads it by name only."""
  config = resolve(load_experiment("names"), 27).model
  table = param_table(config)
  names = [n for n in table if n != "blocks"] + list(table["blocks"])
  for name in names:
    declared = [m for m, p in MODULES.items() if re.search(rf'"{name}":', p.read_text(encoding="utf-8"))]
    assert declared == ["params"], f"{name} is declared in {declared}"


def test_no_file_and_no_function_outgrows_its_reader():
  """A file over 400 lines, or a function with over 60 of code, wants splitting by noun."""
  for module, path in MODULES.items():
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, f"{module} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef):
        lines = node.end_lineno - node.lineno + 1
        documented = len((ast.get_docstring(node) or "").splitlines())
        assert lines - documented <= 60, f"{module}.{node.name} has {lines - documented} lines of code"


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_imports_no_jax(verb):
  """`--help` answers at once: jax alone would take half a second."""
  code = f"import sys, jgpt.{verb} as verb\ntry: verb.main(['--help'])\nfinally: assert 'jax' not in sys.modules"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "usage" in done.stdout


@pytest.mark.parametrize("args", [["--list"], ["--experiment", "names", "--print-config"]])
def test_listing_and_counting_import_no_jax(args):
  code = f"import sys, jgpt.run\njgpt.run.main({args!r})\nassert 'jax' not in sys.modules"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "4,192" in done.stdout
