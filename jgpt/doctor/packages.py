"""Checks of what is installed: jgpt, Python, required and optional packages, and their versions.

Versions are compared with the requirements in metadata; nothing is imported (that is done in
`probe.py`). Imports the standard library only, so that it can report what is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import jgpt
from jgpt.doctor.findings import Finding, note, ok, problem
from jgpt.doctor.probe import run_bounded
from jgpt.system.command import python_command

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
EXTRAS = {
  "bpe": "trains byte-level BPE, encodes with GPT-2's",
  "tiktoken": "encodes byte-level BPE faster",
  "hf": "weights for and from Hugging Face",
  "plot": "pictures of runs",
  "notebook": "notebooks",
}


def examine_python(requires: str = ">=3.11") -> list[Finding]:
  """Examines the versions of jgpt, Python and the system.

  Args:
    requires: version specifiers for Python.
  """
  package = Path(jgpt.__file__).resolve().parent
  version = f"{jgpt.__version__} in {package}"
  if (package.parent / ".git").exists():
    done = run_bounded(
      ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--tags"], 5
    )
    version += f", git {done.out.strip()}" if done.status == 0 else ""
  system = f"{platform.python_version()}, {sys.executable}; {platform.platform()}"
  if satisfies(platform.python_version(), requires):
    return [ok("jgpt", version), ok("python", system)]
  return [
    ok("jgpt", version),
    problem("python", f"{system}; jgpt needs {requires}", f"install Python {requires}"),
  ]


def list_requirements() -> list[str]:
  """Returns jgpt's requirements from its metadata, or else from pyproject.toml; [] without both."""
  if found := find_requirements("jgpt"):
    return found
  path = Path(jgpt.__file__).resolve().parent.parent / "pyproject.toml"
  try:
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [
      *project["dependencies"],
      *(f"{text}; extra == '{name}'" for name in extras for text in extras[name]),
    ]
  except (OSError, ValueError, KeyError):
    return []


def find_version(name: str) -> str | None:
  """Returns the version of an installed distribution, or None."""
  try:
    return importlib.metadata.version(name)
  except Exception:  # damaged metadata raises anything
    return None


def find_requirements(name: str) -> list[str]:
  """Returns the requirements of an installed distribution; [] where they are not known."""
  try:
    return importlib.metadata.requires(name) or []
  except Exception:  # damaged metadata raises anything
    return []


def examine_packages(
  requirements: Sequence[str],
  version_of: Callable[[str], str | None] = find_version,
  needs_of: Callable[[str], Sequence[str]] = find_requirements,
) -> list[Finding]:
  """Examines whether required packages are installed, in versions that are compatible.

  Args:
    requirements: as in metadata: "jax>=0.10.2", "tokenizers>=0.20; extra == 'bpe'".
    version_of: returns the version of a package; None where it is not installed.
    needs_of: returns the requirements of a package.
  """
  needed = [
    (name, wanted, "jgpt")
    for name, wanted, extra in map(parse_requirement, requirements)
    if extra is None
  ]
  if not needed:
    return [
      problem(
        "packages",
        "what jgpt needs is not known: it has no metadata",
        f"run it in a clone, or install the clone: {python_command()} -m pip install -e FOLDER",
      )
    ]
  for owner in CORE:
    others = [parse_requirement(text) for text in needs_of(owner)] if version_of(owner) else []
    needed += [
      (name, wanted, owner) for name, wanted, extra in others if extra is None and name in CORE
    ]
  missing, wrong = [], {}
  for name, wanted, owner in needed:
    version = version_of(name)
    if version is None and owner == "jgpt":
      missing.append((name, f"{name}{wanted}"))
    elif version is not None and not satisfies(version, wanted):
      wrong.setdefault(
        name, (f"{name} {version} is there, and {owner} needs {name}{wanted}", f"{name}{wanted}")
      )
  found = [problem("packages", text, _install([need])) for text, need in wrong.values()]
  if missing:
    verb = "is" if len(missing) == 1 else "are"
    text = f"{', '.join(name for name, _ in missing)} {verb} not installed"
    found.append(problem("packages", text, _install([need for _, need in missing])))
  names = dict.fromkeys([*CORE, *(name for name, _, owner in needed if owner == "jgpt")])
  there = [f"{name} {version}" for name in names if (version := version_of(name))]
  return [*found, *([ok("packages", ", ".join(there))] if there else [])]


def examine_extras(
  requirements: Sequence[str], version_of: Callable[[str], str | None] = find_version
) -> list[Finding]:
  """Examines which optional packages are installed.

  Args:
    requirements: as in metadata.
    version_of: returns the version of a package; None where it is not installed.
  """
  there, missing, needs = [], [], []
  for extra, purpose in EXTRAS.items():
    absent = []
    for name, wanted, _ in [
      part for part in map(parse_requirement, requirements) if part[2] == extra
    ]:
      version = version_of(name)
      if version and satisfies(version, wanted):
        there.append(f"{name} {version}")
      else:
        absent.append(name)
        needs.append(f"{name}{wanted}")
    missing += [f"{', '.join(absent)} ({purpose})"] if absent else []
  found = [ok("extras", ", ".join(there))] if there else []
  return [
    *found,
    *(
      [note("extras", f"not there: {', '.join(missing)}", f"if wanted: {_install(needs)}")]
      if missing
      else []
    ),
  ]


def _install(requirements: Sequence[str]) -> str:
  return f"{python_command()} -m pip install --upgrade {' '.join(map(shlex.quote, requirements))}"


def examine_shadows(folder: Path) -> list[Finding]:
  """Examines whether files in a folder hide packages: `python -m` searches there first."""
  found = []
  for name in (name.partition("-")[0] for name in CORE):
    spec = importlib.util.find_spec(name) if name not in sys.modules else sys.modules[name].__spec__
    origin = Path(spec.origin) if spec and spec.origin else None
    if origin and folder.resolve() in (origin.resolve().parent, origin.resolve().parent.parent):
      found.append(
        problem(
          "packages",
          f"{origin} stands before the package {name}",
          "rename it, or run in another folder",
        )
      )
  return found


def parse_requirement(text: str) -> tuple[str, str, str | None]:
  """Parses a requirement.

  Returns:
    Its name, its version specifiers, and its extra; another condition (a system, a version of
    Python) stands in place of the extra.
  """
  wanted, _, condition = text.partition(";")
  match = re.match(r"\s*([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^)]*)\)?", wanted)
  name, specifiers = match.groups() if match else (wanted, "")
  extra = re.search(r"""extra\s*==\s*['"]([^'"]+)""", condition)
  other = condition.strip() or None
  return (
    name.lower().replace("_", "-") if name != "ml_dtypes" else name,
    specifiers.replace(" ", ""),
    (extra.group(1) if extra else other),
  )


def satisfies(version: str, specifiers: str) -> bool:
  """Returns whether a version is in a range such as ">=0.10.2,<1"; only numbers are compared."""
  got = _parse_release(version)
  for specifier in filter(None, specifiers.split(",")):
    sign, wanted = re.match(r"([<>=!~]*)(.*)", specifier.strip()).groups()
    need = _parse_release(wanted)
    width = max(len(got), len(need))
    a, b = (numbers + (0,) * (width - len(numbers)) for numbers in (got, need))
    starts = got[: len(need)] == need
    fine = {
      ">=": a >= b,
      "<=": a <= b,
      ">": a > b,
      "<": a < b,
      "!=": not (starts if "*" in wanted else a == b),
    }
    fine |= {
      "==": starts if "*" in wanted else a == b,
      "~=": a >= b and got[: len(need) - 1] == need[:-1],
    }
    if not fine.get(sign, True):
      return False
  return True


def _parse_release(version: str) -> tuple[int, ...]:
  match = re.match(r"\d+(?:\.\d+)*", version.strip())
  return tuple(int(number[:9]) for number in match.group().split(".")) if match else ()
