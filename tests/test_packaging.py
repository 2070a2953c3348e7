"""A wheel, built without network and run from another folder, finds its experiments, its names and
its commands.
"""

import os
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml  # flax depends on it
from wheels import ROOT, build_wheel

import jgpt
from jgpt import cli


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """A folder with the wheel's files, as pip lays them out."""
  pytest.importorskip("hatchling", reason="the wheel is built by hatchling (the test extra)")
  folder = tmp_path_factory.mktemp("wheel")
  wheel = build_wheel(folder)
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / "site")
  return folder / "site"


def run_there(installed, folder, *args):
  env = os.environ | {"PYTHONPATH": str(installed)}
  env.pop("JGPT_DATA_DIR", None)
  return subprocess.run(
    [sys.executable, "-m", *args], cwd=folder, env=env, capture_output=True, text=True, check=False
  )


def test_the_wheel_holds_what_it_needs_and_nothing_else(installed):
  names = {str(p.relative_to(installed)) for p in installed.rglob("*") if p.is_file()}
  assert {"jgpt/experiments/names.py", "jgpt/bundled/names.txt", "jgpt/py.typed"} <= names
  assert {str(p.relative_to(ROOT)) for p in (ROOT / "jgpt").rglob("*.py")} <= names
  assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"jgpt"}


@pytest.mark.slow
def test_the_wheel_trains_names_from_another_folder(installed, tmp_path):
  done = run_there(installed, tmp_path, "jgpt.run", "--experiment", "names", "--steps", "30")
  assert done.returncode == 0 and done.stderr == "", done.stderr
  assert "bundled" in done.stdout and "20 samples" in done.stdout
  where = run_there(installed, tmp_path, "jgpt.run", "--list")
  assert where.returncode == 0 and "4,192" in where.stdout


def test_the_oldest_versions_are_those_that_are_declared():
  """CI tests with the versions of `oldest.txt`; jaxlib's is jax's."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  declared = dict(
    line.split(">=")
    for line in project["dependencies"]
    if re.match("jax|flax|optax|orbax|numpy", line)
  )
  lines = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()
  oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
  assert oldest == declared | {"jaxlib": declared["jax"]}


def test_the_citation_is_of_this_version():
  """The keys that the schema of the Citation File Format 1.2.0 requires, and what is told twice."""
  cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  assert {"cff-version", "message", "title", "authors"} <= set(cited)
  assert (cited["cff-version"], cited["type"], cited["title"]) == ("1.2.0", "software", "jgpt")
  assert (cited["version"], cited["license"]) == (jgpt.__version__, project["license"])
  assert cited["authors"] == [{"name": "The jgpt authors"}]  # an entity, not a person


def test_a_bug_report_asks_for_what_doctor_says():
  """The form has GitHub's shape, and doctor's whole output is required."""
  form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8"))
  assert form["name"] and form["description"]
  assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in form["body"])
  parts = {part["id"]: part for part in form["body"]}
  assert len(parts) == len(form["body"]) and parts["doctor"]["validations"]["required"] is True
  label, description = (parts["doctor"]["attributes"][key] for key in ("label", "description"))
  assert "python -m jgpt.doctor" in label and "python -m jgpt.doctor --run DIR" in description


def test_posix_only_modules_are_not_imported_at_the_top():
  """Windows and macOS import every module; what only POSIX has is imported where it is used."""
  import ast

  posix_only = {"fcntl", "pty", "pwd", "grp", "resource", "termios", "tty"}
  for path in (ROOT / "jgpt").rglob("*.py"):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
      assert not posix_only & set(names), path


def make_checkout(folder, project='name = "jgpt"'):
  (folder / "jgpt").mkdir(parents=True)
  (folder / "jgpt" / "cli.py").write_text("")
  (folder / "pyproject.toml").write_text(f"[project]\n{project}\n")
  return folder


def test_another_copy_than_the_checkout_one_is_in_is_named(tmp_path, monkeypatch, capsys):
  """In one line on standard error, before the command, with how to use what is edited."""
  folder = make_checkout(tmp_path / "my clone")
  (folder / "notebooks").mkdir()
  for place in (folder, folder / "notebooks"):
    monkeypatch.chdir(place)
    assert cli.guard(lambda: 0) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"jgpt is imported from {ROOT / 'jgpt'}, and what is edited in {folder} is not" in err
    assert err.endswith(f" -m pip install -e '{folder}'\n")


def test_one_copy_or_another_project_is_no_matter(tmp_path, monkeypatch):
  other = make_checkout(tmp_path / "other", 'name = "jgpt-plots"')
  (tmp_path / "alone" / "jgpt").mkdir(parents=True)
  (tmp_path / "alone" / "jgpt" / "cli.py").write_text("")
  (tmp_path / "link").symlink_to(ROOT)
  for place in (other, tmp_path / "alone", tmp_path, ROOT, ROOT / "jgpt", tmp_path / "link"):
    monkeypatch.chdir(place)
    assert cli.describe_other_copy() is None, place


@pytest.mark.parametrize(
  ("args", "said"), [([], "usage: jgpt <verb>"), (["run", "--list"], "4,192")]
)
def test_the_package_itself_lists_and_runs_its_verbs(tmp_path, args, said):
  done = run_there(ROOT, tmp_path, "jgpt", *args)
  assert done.returncode == 0 and done.stderr == "" and said in done.stdout
