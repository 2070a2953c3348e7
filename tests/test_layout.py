"""The house: what stands where, who may import whom, one name for one thing, and one voice."""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
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

# Rooms: files at the top, and folders. One may import from the rows above its own; a folder's files
# from each other too.
ORDER = [
  ["errors"],
  ["system"],
  ["config"],
  ["text", "keys", "params"],
  ["sharding"],
  ["layers", "products", "fused_attention"],
  ["attention", "loss"],
  ["model"],
  ["optim", "batches"],
  ["step"],
  ["evaluation", "generate"],
  ["data"],
  ["devices"],
  ["runs"],
  ["weights"],
  ["plan", "program"],
  ["cli"],
  ["report"],
  ["train"],
  ["run", "sample", "evaluate", "export", "prepare", "plot", "inspect", "bench", "doctor"],
]
PURE = {
  *(
    "errors",
    "keys",
    "params",
    "layers",
    "products",
    "attention",
    "fused_attention",
    "model",
    "loss",
    "optim.adam",
    "optim.chain",
    "optim.momentum",
    "optim.schedule",
    "optim.spikes",
    "batches",
    "sharding",
    "step",
    "evaluation",
  ),
  *(
    "generate",
    "config.experiment",
    "config.checks",
    "config.settings",
    "text.tokenizer",
    "text.tokenizer_files",
  ),
  *(
    "text.bpe",
    "devices.compute",
    "devices.kernels",
    "devices.limits",
    "runs.digest",
    "report.curves",
    "report.tables",
    "report.verdict",
    "bench.hlo",
    "bench.results",
    "inspect.attention",
    "inspect.parameters",
  ),
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


def test_imports_point_one_way():
  row = {m: i for i, names in enumerate(ORDER) for m in names}
  for module in MODULES:
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
  called = {
    n.func.id
    for n in ast.walk(TREES[module])
    if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
  }
  imported = {a.name for n in ast.walk(TREES[module]) if isinstance(n, ast.Import) for a in n.names}
  assert not called & {"print", "open", "input", "exec", "eval"}
  assert not imported & {"time", "logging", "os", "pickle", "random", "subprocess"}


def definitions(module: str) -> list[str]:
  """The public names that a module defines at its top."""
  found = []
  for node in TREES[module].body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      found.append(node.name)
    elif isinstance(node, ast.Assign):
      found += [
        n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)
      ]
    elif isinstance(node, ast.AnnAssign):
      found.append(node.target.id)
  return [name for name in found if not name.startswith("_") and name != "main"]


def test_a_public_name_stands_in_one_module():
  homes: dict[str, list[str]] = {}
  for module in MODULES:
    for name in definitions(module):
      homes.setdefault(name, []).append(module)
  assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def locals_of(function: ast.FunctionDef) -> set[str]:
  """The parameters and the names that a function assigns, without those of functions inside it."""
  args = function.args
  names = {
    a.arg for a in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg] if a
  }
  rest = list(function.body)
  while rest:
    node = rest.pop()
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
      continue
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      names.add(node.id)
    rest += ast.iter_child_nodes(node)
  return names


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_local_shadows_its_own_function(module):
  """Nor the functions around it, nor one that it calls."""
  wrong = []

  def visit(node: ast.AST, around: tuple[str, ...]) -> None:
    for child in ast.iter_child_nodes(node):
      if isinstance(child, ast.FunctionDef):
        is_method = isinstance(node, ast.ClassDef)  # whose name is no variable
        names = around if is_method else (*around, child.name)
        calls = {
          n.func.id
          for n in ast.walk(child)
          if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        top = {n.name for n in TREES[module].body if isinstance(n, ast.FunctionDef)}
        wrong.extend((child.name, name) for name in locals_of(child) & ({*names} | calls & top))
        visit(child, names)
      else:
        visit(child, around)

  visit(TREES[module], ())
  assert not wrong, f"{module}: (function, local) {wrong}"


# --- The reading path ---

READING_PATH = ("train", "step", "model", "optim.chain")
MAX_READING_LINES = 450  # a later issue may raise it with a reason; denser lines are none


def count_code_lines(source: str) -> int:
  """Lines that hold code: no docstrings, comments or blank lines."""
  tree = ast.parse(source)
  documented = set()
  for node in ast.walk(tree):
    if (
      isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
      and ast.get_docstring(node) is not None
    ):
      documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
  ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
  code = set()
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type not in ignored and token.type != tokenize.ENDMARKER:
      code |= set(range(token.start[0], token.end[0] + 1))
  return len(code - documented)


def test_code_lines_are_counted():
  source = '"""Doc."""\n\n# A comment.\nx = (\n  1,  # one\n)\n\n\n'
  source += 'def f():\n  """Doc.\n\n  More.\n  """\n  return x\n'
  assert count_code_lines(source) == 5


def test_from_the_loop_to_the_gradient_a_reader_opens_four_short_files():
  counts = {
    name: count_code_lines(MODULES[name].read_text(encoding="utf-8")) for name in READING_PATH
  }
  assert sum(counts.values()) <= MAX_READING_LINES, counts
  told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
  assert f"at most {MAX_READING_LINES} lines of code together" in told


def test_between_the_loop_and_the_gradient_stand_three_functions():
  """`train_steps` calls `train_step`, which calls `loss_and_grads`; no function is handed
  to them.
  """
  functions = {n.name: n for n in TREES["step"].body if isinstance(n, ast.FunctionDef)}
  for caller, called in (
    ("train_steps", "train_step"),
    ("train_step", "loss_and_grads"),
    ("loss_and_grads", "value_and_grad"),
  ):
    words = {n.id for n in ast.walk(functions[caller]) if isinstance(n, ast.Name)}
    words |= {n.attr for n in ast.walk(functions[caller]) if isinstance(n, ast.Attribute)}
    assert called in words, f"{caller} calls {called}"
    names = [a.arg for a in functions[caller].args.args + functions[caller].args.kwonlyargs]
    assert not any(
      "Callable" in ast.dump(a.annotation) for a in functions[caller].args.args if a.annotation
    ), names


# --- The voice ---

# First words of docstrings. A verb that is not here is added after a look at what it begins.
VERBS_OF_DOCSTRINGS = (
  "Adds Answers Appends Applies Arranges Begins Calls Checks Chooses Closes Compares Compiles "
  "Computes Constrains Continues Converts Counts Creates Cuts Declares Deletes Derives Describes "
  "Diagnoses Divides Downloads Draws Encodes Ends Escapes Estimates Evaluates Examines Explains "
  "Fills Finds Flushes Formats Gathers Groups Handles Hides Holds Imports Indents Initialises "
  "Installs "
  "Iterates Joins Keeps Limits Lists Loads Locks Looks Makes Maps Marks Measures Multiplies Opens "
  "Pads Parses Places Plans Prepares Prints Reads Receives Records Removes Renames Repeats "
  "Replaces Requests Resolves Restores Returns Runs Saves Sends Sets Shows Sorts Splits Stacks "
  "Starts Takes Times Tokenizes Traces Trains Turns Waits Wraps Writes Yields "
)


def functions_of(tree: ast.AST) -> list[ast.FunctionDef]:
  return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_docstrings_begin_with_a_verb():
  """Every function's does; the verbs are listed, so that a new one is looked at once."""
  verbs, wrong = set(VERBS_OF_DOCSTRINGS.split()), {}
  for module, tree in TREES.items():
    for function in functions_of(tree):
      if (doc := ast.get_docstring(function)) is not None:
        word = re.match(r"\W*(\w+)", doc)[1]
        if word not in verbs:
          wrong[f"{module}.{function.name}"] = word
  assert not wrong


def test_public_functions_and_classes_have_docstrings():
  missing = [
    f"{module}.{node.name}"
    for module, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
    and not node.name.startswith("_")
    and not ast.get_docstring(node)
  ]
  assert missing == []


def test_lines_end_by_column_100():
  places = [
    *(ROOT / "jgpt").rglob("*.py"),
    *(ROOT / "experiments").rglob("*.py"),
    *(ROOT / "tests").rglob("*.py"),
  ]
  long = [
    f"{path.relative_to(ROOT)}:{number}"
    for path in places
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    if len(line) > 100
  ]
  assert long == []


# --- Tests and jgpt ---


def test_jgpt_reaches_into_nothing_of_the_tests():
  for path in (ROOT / "jgpt").rglob("*.py"):
    assert not re.search(r"""\btests/|["']tests["']""", path.read_text(encoding="utf-8")), path


def test_tests_call_no_private_function():
  """What a test needs of jgpt has a public name."""
  private = {
    node.name
    for tree in TREES.values()
    for node in tree.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.startswith("_")
  }
  wrong = []
  for path in (ROOT / "tests").rglob("*.py"):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    mine = {n.name for n in functions_of(tree)} | {
      n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)
    }
    for node in ast.walk(tree):
      name = (
        node.attr
        if isinstance(node, ast.Attribute)
        else node.name
        if isinstance(node, ast.alias)
        else None
      )
      if name in private - mine:
        wrong.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} {name}")
  assert wrong == []


def test_the_top_level_holds_what_the_design_names():
  tracked = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  if tracked.returncode:
    pytest.skip("not a git checkout")
  top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
  hidden, folders = {".ci", ".github", ".gitignore"}, {"jgpt", "experiments", "tests", "notebooks"}
  files = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md"}
  files |= {"pyproject.toml"}
  assert top <= hidden | files | folders
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
  packed = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
  assert {name.removeprefix("/") for name in packed} == top - hidden
  rooms = {name for row in ORDER for name in row}
  assert len({name for name in rooms if name in MODULES}) <= 24
  assert len({name for name in rooms if name not in MODULES}) <= 12


def test_each_parameters_shape_stands_in_one_place():
  """Every parameter's name is a key in `param_table` and nowhere else in jgpt: other code reads it
  by name only.
  """
  config = resolve(load_experiment("names"), 27).model
  table = param_table(config)
  names = [n for n in table if n != "blocks"] + list(table["blocks"])
  for name in names:
    declared = [
      m for m, p in MODULES.items() if re.search(rf'"{name}":', p.read_text(encoding="utf-8"))
    ]
    assert declared == ["params"], f"{name} is declared in {declared}"


def test_no_function_outgrows_its_reader():
  """A function with over 60 lines of code wants splitting by noun."""
  for module, tree in TREES.items():
    for node in functions_of(tree):
      lines = node.end_lineno - node.lineno + 1
      documented = len((ast.get_docstring(node) or "").splitlines())
      assert lines - documented <= 66, (
        f"{module}.{node.name} has {lines - documented} lines of code"
      )


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_imports_no_jax(verb):
  """`--help` answers at once: jax alone would take half a second."""
  code = f"import sys, jgpt.{verb} as verb\ntry: verb.main(['--help'])\n"
  code += "finally: assert 'jax' not in sys.modules"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "usage" in done.stdout


@pytest.mark.parametrize("args", [["--list"], ["--experiment", "names", "--print-config"]])
def test_listing_and_counting_import_no_jax(args):
  code = f"import sys, jgpt.run\njgpt.run.main({args!r})\nassert 'jax' not in sys.modules"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "4,192" in done.stdout
