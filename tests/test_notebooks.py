"""The notebooks: stored without outputs, made of calls of public functions, running to the end
without a remark; and their first cell, which installs jgpt in machines that lack it.
"""

import ast
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from venv import create as create_venv

import pytest
from wheels import ROOT, build_wheel, copy_source

import jgpt

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
TELLS_AN_UPDATE = "01_names"
ON_ACCELERATORS = "03_gpt2_tpu_gpu"
WRITES_ORACLES_OUT = "02_gradient_equivalence"  # as a reader would, so it defines functions
NO_NETWORK = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}

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
def test_is_a_valid_notebook_whose_cells_have_names(path):
  ids = [cell["id"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
  assert len(set(ids)) == len(ids)
  assert [name for name in ids if not re.fullmatch("[a-z][a-z0-9-]*", name)] == []
  nbformat = pytest.importorskip("nbformat", reason="notebooks need the extra jgpt[notebook]")
  nbformat.validate(nbformat.read(path, as_version=4))


@each_notebook
def test_defines_no_function_and_no_class(path):
  """What a notebook needs and the package lacks belongs into the package, where it is tested."""
  found = {
    cell["id"]: [n.lineno for n in ast.walk(parse(cell)) if isinstance(n, DEFINITIONS)]
    for cell in code_cells(path)
  }
  assert path.stem == WRITES_ORACLES_OUT or {c: lines for c, lines in found.items() if lines} == {}


@each_notebook
def test_takes_nothing_private_and_nothing_of_the_tests(path):
  names = {name.stem for name in (ROOT / "tests").rglob("*.py")} | {"tests"}
  names |= {name.name for name in (ROOT / "tests").iterdir() if name.is_dir()}
  for node in (node for cell in code_cells(path) for node in ast.walk(parse(cell))):
    if isinstance(node, ast.Import):
      assert not [a.name for a in node.names if a.name.split(".")[0] in names or "._" in a.name]
    elif isinstance(node, ast.ImportFrom):
      assert node.module.split(".")[0] not in names
      assert not [a.name for a in node.names if a.name.startswith("_") or "._" in node.module]
    elif isinstance(node, ast.Attribute):
      assert re.fullmatch("__.*__|[^_].*", node.attr), f"private: {ast.unparse(node)}"


# --- The cells that all notebooks share ---


def test_the_shared_cells_are_those_that_the_script_writes():
  make_cells = runpy.run_path(str(FOLDER / "make_cells.py"))["make_cells"]
  made = make_cells(ROOT)
  assert sorted(made) == NOTEBOOKS
  for path, text in made.items():
    assert text == path.read_text(encoding="utf-8"), "run python notebooks/make_cells.py"


def test_badges_lead_to_the_address_that_the_project_declares(tmp_path):
  """Without an address on GitHub, which Colab and Kaggle open notebooks from, there is none."""
  shutil.copytree(FOLDER, tmp_path / "notebooks")
  project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
  urls = (
    '[project.urls]\nHome = "https://{}/someone"\nRepository = "https://{}/someone/a.gpt.git"\n\n'
  )
  script = [sys.executable, str(tmp_path / "notebooks" / "make_cells.py")]
  for host, has_badges in (("github.com", True), ("example.org", False)):
    changed = project.replace("[project.scripts]", urls.format(host, host) + "[project.scripts]", 1)
    assert changed != project
    (tmp_path / "pyproject.toml").write_text(changed, encoding="utf-8")
    subprocess.run(script, check=True, capture_output=True)
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
      cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
      texts = {cell["id"]: "".join(cell["source"]) for cell in cells}
      links = re.findall(r"\]\((.*?)\)", texts["badges"])
      place = f"github.com/someone/a.gpt/blob/main/notebooks/{path.name}"
      assert [link for link in links if not link.endswith(".svg")] == (
        [
          f"https://colab.research.google.com/{place.replace('.com', '', 1)}",
          f"https://kaggle.com/kernels/welcome?src=https://{place}",
        ]
        if has_badges
        else []
      )
      assert ("git+https://github.com/someone/a.gpt" in texts["install-text"]) == has_badges
      assert ("upload this file" in texts["badges"]) != has_badges


# --- The cell that installs ---


def run_install(python, folder, *options, source="", **env):
  """Runs the cell in a folder, which is in sys.path as a kernel's is.

  Returns its exit status, output and errors.
  """
  env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | NO_NETWORK | env
  cell = (FOLDER / "install.py").read_text(encoding="utf-8")
  cell = cell.replace('SOURCE = ""', f"SOURCE = {source!r}")
  done = subprocess.run(
    [str(python), *options, "-c", cell],
    cwd=folder,
    env=env | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


def list_packages(python) -> dict[str, str]:
  """Lists what pip finds: name -> version."""
  command = [str(python), "-m", "pip", "list", "--format=json"]
  env = os.environ | NO_NETWORK
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
  return {package["name"]: package["version"] for package in json.loads(done.stdout)}


def make_wheel(folder: Path, name: str, version: str, *requires: str) -> Path:
  """Makes a wheel with a module of one line."""
  path = folder / f"{name}-{version}-py3-none-any.whl"
  about = f"{name}-{version}.dist-info"
  lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
  files = {
    f"{name}.py": f"__version__ = {version!r}\n",
    f"{about}/METADATA": "\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires), ""]),
    f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
  }
  files[f"{about}/RECORD"] = "".join(f"{n},,\n" for n in [*files, f"{about}/RECORD"])
  with zipfile.ZipFile(path, "w") as archive:
    for file, text in files.items():
      archive.writestr(file, text)
  return path


def find_site(python) -> Path:
  """Finds the folder of an environment's packages."""
  code = "import sysconfig; print(sysconfig.get_path('purelib'))"
  done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
  return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def empty_machine(tmp_path_factory):
  """The Python of an environment that has pip and nothing else."""
  folder = tmp_path_factory.mktemp("empty") / "venv"
  create_venv(folder, with_pip=True)
  return folder / "bin" / "python"


@pytest.fixture
def machine(empty_machine, tmp_path):
  """The Python of an environment that has what this one has, as links, but no jgpt."""
  folder = shutil.copytree(empty_machine.parents[1], tmp_path / "venv", symlinks=True)
  python = folder / "bin" / "python"
  site = find_site(python)
  here = Path(str(importlib.metadata.distribution("jax").locate_file("")))
  for entry in here.iterdir():
    if "jgpt" not in entry.name and not (site / entry.name).exists():
      (site / entry.name).symlink_to(entry)
  assert "jgpt" not in list_packages(python)
  return python


def test_without_a_wheel_the_cell_says_how_to_make_one(tmp_path):
  status, _, error = run_install(sys.executable, tmp_path, "-S")
  assert status == 1
  assert "FileNotFoundError: jgpt is not installed" in error
  assert "`pip wheel --no-deps .` makes one" in error and str(tmp_path) in error


@pytest.mark.slow
def test_the_cell_installs_the_newest_wheel_beside_it(machine, tmp_path):
  (tmp_path / "alone").mkdir()
  wheel = shutil.copy(build_wheel(tmp_path), tmp_path / "alone")
  old = make_wheel(tmp_path / "alone", "jgpt", "99.0")
  os.utime(old, (0, 0))
  before = list_packages(machine)
  for again in (False, True):
    status, output, error = run_install(machine, tmp_path / "alone")
    assert (status, error) == (0, "")
    assert (f"Installing {wheel}" in output) != again
    assert f"jgpt      {jgpt.__version__}\n" in output
    assert "1 × CPU (cpu)" in output and "multiplied in float32, which keeps about 7" in output
  assert list_packages(machine) == before | {"jgpt": jgpt.__version__}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["notebooks", "."])
def test_the_cell_installs_the_repository_around_it(machine, tmp_path, place):
  """Also where the working folder is the repository's, and what jgpt needs is missing."""
  pytest.importorskip("hatchling", reason="pip builds jgpt with it")
  source = copy_source(tmp_path / "source")
  make_wheel(source / place, "jgpt", "99.0")
  (find_site(machine) / "uniplot").unlink()
  make_wheel(tmp_path, "uniplot", "99.0")
  for entry in find_site(machine).glob("uniplot-*"):
    entry.unlink()
  env = {"PIP_NO_BUILD_ISOLATION": "0", "PIP_FIND_LINKS": str(tmp_path)}
  status, output, error = run_install(machine, source / place, **env)
  assert (status, error) == (0, "")
  assert f"Installing {source} " in output
  packages = list_packages(machine)
  assert packages["jgpt"] == jgpt.__version__ and packages["uniplot"] == "99.0"


def test_the_cell_looks_for_all_that_jgpt_needs():
  """By the names that are imported; jax brings NumPy and its types."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  needs = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
  (line,) = re.findall(r"^needed = (.*)$", (FOLDER / "install.py").read_text(), re.MULTILINE)
  names = {"orbax-checkpoint" if name == "orbax" else name for name in ast.literal_eval(line)}
  assert names == needs - {"numpy", "ml_dtypes"} | {"jgpt"}


@pytest.mark.slow
def test_a_source_is_a_place_and_never_a_name_that_pip_looks_up(empty_machine, tmp_path):
  """Also a bare `jgpt`; it counts more than a wheel that lies there."""
  make_wheel(tmp_path, "jgpt", "99.0")
  status, output, error = run_install(empty_machine, tmp_path, source="jgpt")
  assert status == 1 and not output
  assert f"SOURCE is 'jgpt', and nothing is at {tmp_path / 'jgpt'}\n" in error
  address = "git+file:///nowhere/jgpt"
  status, output, _ = run_install(empty_machine, tmp_path, source=address)
  assert status == 1 and f"Installing matplotlib {address} " in output


@pytest.mark.slow
def test_where_pip_fails_the_cell_says_so_and_jax_stays(empty_machine, tmp_path):
  """Of packages that pip could take there are newer ones here, which jgpt asks for."""
  python = (
    shutil.copytree(empty_machine.parents[1], tmp_path / "venv", symlinks=True) / "bin/python"
  )
  (tmp_path / "index").mkdir()
  (tmp_path / "work").mkdir()
  for name, version in (("jax", "0.7.2"), ("jax", "99.0"), ("matplotlib", "3.9")):
    make_wheel(tmp_path / "index", name, version)
  make_wheel(tmp_path / "work", "jgpt", "9.0", "jax>=99")
  env = {"PIP_FIND_LINKS": str(tmp_path / "index")}
  install = [str(python), "-m", "pip", "install", "-q", "jax==0.7.2"]
  subprocess.run(install, env=os.environ | NO_NETWORK | env, check=True, capture_output=True)
  before = list_packages(python)
  status, _, error = run_install(python, tmp_path / "work", **env)
  assert status == 1 and "RuntimeError" in error
  assert "jax>=99" in error and "jax==0.7.2" in error, "pip's own words"
  assert "choose a newer runtime" in error
  assert list_packages(python) == before


# --- Notebooks run ---


@pytest.fixture
def quiet(monkeypatch, tmp_path):
  """The environment of a kernel, with nothing that would make it speak."""
  pytest.importorskip("nbformat", reason="notebooks need the extra jgpt[notebook]")
  pytest.importorskip("nbclient", reason="notebooks need the extra jgpt[notebook]")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("JGPT_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  for name in (
    "MPLBACKEND",
    "PYTHONPATH",
    "PYTHONWARNINGS",
  ):  # the kernel chooses the backend that puts plots into the notebook
    monkeypatch.delenv(name, raising=False)
  return monkeypatch


def read_notebook(path: Path):
  """Reads a notebook as a value that nbclient runs."""
  import nbformat

  return nbformat.read(path, as_version=4)


def execute(notebook, folder: Path, kernel: str) -> list[tuple[str, dict]]:
  """Runs a notebook's cells in a folder; returns their outputs, none of them an error."""
  import nbclient

  where = {"metadata": {"path": str(folder)}}
  client = nbclient.NotebookClient(notebook, timeout=240, kernel_name=kernel, resources=where)
  client.execute()  # raises with the cell and its traceback if one fails
  outputs = [(cell["id"], output) for cell in notebook.cells for output in cell.get("outputs", [])]
  assert outputs
  assert [
    (cell, output["text"]) for cell, output in outputs if output.get("name") == "stderr"
  ] == []
  assert [cell for cell, output in outputs if output["output_type"] == "error"] == []
  return outputs


def check_what_is_told(outputs: list[tuple[str, dict]]):
  """Checks in the outputs of `01_names` what its text says of them, with either list of names."""
  printed = "".join(output.get("text", "") for _, output in outputs)
  differences = [float(x) for x in re.findall(r"largest difference .*: (\S+)\n", printed)]
  assert len(differences) == 2
  assert max(differences) < 1e-5
  tables = {name: o["data"]["text/html"] for name, o in outputs if "text/html" in o.get("data", {})}
  cells = {name: re.findall("<td[^>]*>(.*?)</td>", table) for name, table in tables.items()}
  told = [cells["adam"][i : i + 4] for i in range(0, len(cells["adam"]), 4)]
  values = {label: [float(x) for x in row] for label, *row in told}
  for formula, kept in (
    ("m by the formula", "m in opt_state"),
    ("v by the formula", "v in opt_state"),
    ("update by the formula", "weight after − before"),
  ):
    assert values[formula] == pytest.approx(values[kept], rel=1e-3)
  adamw, adam, sgd = (cells["why"][i : i + 6] for i in (0, 6, 12))  # a name, four rates, the best
  assert [row[-1] for row in (adamw, adam, sgd)] == ["0.01", "0.01", "0.03"]
  assert sgd[4] == "diverges"
  assert "diverges" not in adamw
  assert float(adamw[2]) < float(sgd[3]) < float(adam[2])
  begin, by_adamw, by_adam = (float(cells["why-rare"][i]) for i in (1, 4, 7))  # the rarest letter
  assert by_adam < begin < by_adamw


@pytest.mark.slow
@each_notebook
def test_runs_without_errors_and_remarks(path, tmp_path, quiet):
  pytest.importorskip("ipykernel", reason="notebooks need the extra jgpt[notebook]")
  # Imported here although the kernel is another process: the first import builds a cache of fonts
  # and says so on stderr.
  pytest.importorskip("matplotlib.font_manager", reason="notebooks need the extra jgpt[notebook]")
  quiet.setenv("PYTHONPATH", str(ROOT))  # this jgpt, wherever the kernel starts
  quiet.setenv("JAX_NUM_CPU_DEVICES", "2" if path.stem == ON_ACCELERATORS else "1")
  (tmp_path / "work").mkdir()
  outputs = execute(read_notebook(path), tmp_path / "work", "python3")
  if path.stem == TELLS_AN_UPDATE:
    check_what_is_told(outputs)
  if path.stem == ON_ACCELERATORS:
    said = {
      name: "".join(o.get("text", "") for cell, o in outputs if cell == name) for name, _ in outputs
    }
    assert "mesh.data=2" in said["experiment"]
    assert "not finished: train.max_seconds=1 were over" in said["train"]
    assert re.match("[1-9][0-9]* of 300 updates are done", said["again"]), "it went on"
    assert "model.safetensors" in said["export"] and "weights     jgpt_runs" in said["finetune"]


@pytest.mark.slow
def test_without_gpt2s_weights_a_small_model_learns_the_text(tmp_path, quiet):
  """What a machine without a network says, on which no such file was saved either."""
  quiet.setenv("PYTHONPATH", str(ROOT))
  quiet.delenv("JGPT_DATA_DIR", raising=False)
  (tmp_path / "cache" / "gpt2").mkdir(parents=True)
  (tmp_path / "cache" / "gpt2" / "gpt2.safetensors.failed").touch()  # so none is tried again
  notebook = read_notebook(FOLDER / f"{ON_ACCELERATORS}.ipynb")
  first = ("install", "imports", "folder", "device", "experiment", "finetune", "fit")
  notebook.cells = [cell for cell in notebook.cells if cell["id"] in first]
  for cell in notebook.cells:
    cell["source"] = cell["source"].replace('str(exported) if SMALL else "gpt2"', '"gpt2"')
  said = [o["text"] for cell, o in execute(notebook, tmp_path, "python3") if cell == "finetune"]
  line, *rest = "".join(said).splitlines()
  assert line.startswith("GPT-2's weights cannot be had here, so a small model learns the text")
  assert "experiment  my_text_bytes" in rest and "model       836,736 parameters" in rest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["01_names", ON_ACCELERATORS])
def test_runs_at_colabs_versions_where_its_first_cell_installs_jgpt(name, tmp_path, quiet):
  """In an environment with `oldest.txt`'s versions, and in a folder with a wheel and no more."""
  python = os.environ.get("JGPT_COLAB_PYTHON")
  if not python:
    pytest.skip("JGPT_COLAB_PYTHON names no Python with Colab's versions, ipykernel and no jgpt")
  before = list_packages(python)
  lines = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()
  pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
  assert {package: before.get(package) for package in [*pinned, "jgpt"]} == pinned | {"jgpt": None}
  kernel = tmp_path / "jupyter" / "kernels" / "colab"
  kernel.mkdir(parents=True)
  start = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
  spec = {"argv": start, "display_name": "Colab", "language": "python"}
  (kernel / "kernel.json").write_text(json.dumps(spec))
  quiet.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
  (tmp_path / "content").mkdir()
  shutil.copy(build_wheel(tmp_path), tmp_path / "content")
  shutil.copy(FOLDER / f"{name}.ipynb", tmp_path / "content")
  subprocess.run([python, "-c", "import matplotlib.font_manager"], check=True, capture_output=True)
  try:
    notebook = read_notebook(tmp_path / "content" / f"{name}.ipynb")
    outputs = execute(notebook, tmp_path / "content", "colab")
    said = "".join(output["text"] for cell, output in outputs if cell == "install")
    assert "Installing" in said and f"jax       {pinned['jax']}\n" in said
    after = list_packages(python)
    assert after.items() > before.items() and after["jgpt"] == jgpt.__version__  # nothing replaced
  finally:  # another time it is to be installed again
    added = list_packages(python).keys() - before
    uninstall = [python, "-m", "pip", "uninstall", "-q", "-y", "jgpt", *added]
    subprocess.run(uninstall, check=True, capture_output=True)
