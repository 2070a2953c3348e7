"""The notebooks: stored without outputs, made of calls into the package alone, and running to the
end without a remark.
"""

import ast
import json
from pathlib import Path

import pytest

import jgpt

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def code_cells(path: Path) -> list[dict]:
  return [
    cell
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
  ]


def parse(cell: dict) -> ast.Module:
  """Parses a cell's Python.

  IPython's own lines (%pip, !ls) become `pass`, so that a block of them stays a block.
  """
  lines = "".join(cell["source"]).split("\n")
  python = [
    f"{line[: len(line) - len(line.lstrip())]}pass"
    if line.lstrip().startswith(("%", "!"))
    else line
    for line in lines
  ]
  return ast.parse("\n".join(python))


def test_there_are_notebooks():
  assert NOTEBOOKS


@each_notebook
def test_is_stored_without_outputs(path):
  cells = code_cells(path)
  assert cells
  assert [
    cell["id"] for cell in cells if cell["outputs"] or cell["execution_count"] is not None
  ] == []


@each_notebook
def test_defines_no_function_and_no_class(path):
  """What a notebook needs and the package lacks belongs into the package, where it is tested."""
  found = {
    cell["id"]: [n.lineno for n in ast.walk(parse(cell)) if isinstance(n, DEFINITIONS)]
    for cell in code_cells(path)
  }
  assert {cell: lines for cell, lines in found.items() if lines} == {}


@pytest.mark.slow
@each_notebook
def test_runs_without_errors_and_remarks(path, tmp_path, monkeypatch):
  nbformat = pytest.importorskip("nbformat", reason="notebooks need the extra jgpt[notebook]")
  nbclient = pytest.importorskip("nbclient", reason="notebooks need the extra jgpt[notebook]")
  pytest.importorskip("ipykernel", reason="notebooks need the extra jgpt[notebook]")
  # Imported here although the kernel is another process: the first import builds a cache of fonts
  # and says so on stderr.
  pytest.importorskip("matplotlib.font_manager", reason="notebooks need the extra jgpt[notebook]")
  monkeypatch.setenv(
    "PYTHONPATH", str(Path(jgpt.__file__).resolve().parents[1])
  )  # this jgpt, wherever the kernel starts
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("JGPT_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  for name in (
    "MPLBACKEND",
    "PYTHONWARNINGS",
  ):  # the kernel chooses the backend that puts plots into the notebook
    monkeypatch.delenv(name, raising=False)
  (tmp_path / "work").mkdir()

  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  client = nbclient.NotebookClient(
    notebook,
    timeout=240,
    kernel_name="python3",
    resources={"metadata": {"path": str(tmp_path / "work")}},
  )
  client.execute()  # raises with the cell and its traceback if one fails

  outputs = [(cell["id"], output) for cell in notebook.cells for output in cell.get("outputs", [])]
  assert outputs
  assert [
    (cell, output["text"]) for cell, output in outputs if output.get("name") == "stderr"
  ] == []
  assert [cell for cell, output in outputs if output["output_type"] == "error"] == []
