"""Writes the cells that the notebooks share: `python notebooks/make_cells.py`.

A notebook has three such cells, by their ids: "badges", links that open it in Colab and in Kaggle,
where `[project.urls]` in pyproject.toml has an address on GitHub; "install-text"; and "install",
which is `install.py`.
"""

import json
import sys
import tomllib
from pathlib import Path

BRANCH = "main"
BADGES = (
  (
    "Open in Colab",
    "https://colab.research.google.com/assets/colab-badge.svg",
    "https://colab.research.google.com/github/{path}",
  ),
  (
    "Open in Kaggle",
    "https://kaggle.com/static/images/open-in-kaggle.svg",
    "https://kaggle.com/kernels/welcome?src=https://github.com/{path}",
  ),
)
UPLOAD = """\
*To run this on Colab or Kaggle, upload this file there, and beside it a wheel of jgpt (`pip wheel --no-deps .` in jgpt's
repository makes one).*"""
INSTALL_TEXT = """\
## Install

Where jgpt can be imported already, the next cell installs nothing. Otherwise it installs jgpt from the repository that this
notebook lies in; without one, from the newest wheel (`jgpt-*.whl`) that you uploaded beside the notebook; or, first of all,
from `SOURCE`{example}. jax and what else is compiled for this machine stay as they are. The last lines say what
computes here, and how precisely it multiplies."""


def find_github(urls: dict[str, str]) -> str | None:
  """Finds the repository on GitHub among a project's addresses: "OWNER/NAME", or None.

  Args:
    urls: label -> address, as `[project.urls]` has them.
  """
  for url in urls.values():
    parts = url.removesuffix("/").removesuffix(".git").split("/")
    if parts[:3] == ["https:", "", "github.com"] and len(parts) == 5:
      return "/".join(parts[3:])
  return None


def make_badges(repository: str | None, name: str) -> str:
  """Returns the text of the cell "badges".

  Args:
    repository: from `find_github`.
    name: of the notebook's file.
  """
  if repository is None:
    return UPLOAD
  path = f"{repository}/blob/{BRANCH}/notebooks/{name}"
  return "\n".join(
    f"[![{title}]({image})]({link.format(path=path)})" for title, image, link in BADGES
  )


def make_cells(root: Path) -> dict[Path, str]:
  """Returns what each notebook of a repository is to be, with the shared cells written.

  Args:
    root: of the repository.

  Raises:
    ValueError: if a notebook lacks one of the cells.
  """
  project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  repository = find_github(project.get("urls", {}))
  folder, made = root / "notebooks", {}
  example = "" if repository is None else f', for example "git+https://github.com/{repository}"'
  for path in sorted(folder.glob("*.ipynb")):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = {cell["id"]: cell for cell in notebook["cells"]}
    texts = {
      "badges": make_badges(repository, path.name),
      "install-text": INSTALL_TEXT.format(example=example),
      "install": (folder / "install.py").read_text(encoding="utf-8").rstrip("\n"),
    }
    for name, text in texts.items():
      if name not in cells:
        raise ValueError(f"{path} has no cell with the id {name!r}. Add an empty one")
      cells[name]["source"] = text.splitlines(keepends=True)
    made[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
  return made


if __name__ == "__main__":
  root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
  for path, text in make_cells(root).items():
    if text != path.read_text(encoding="utf-8"):
      path.write_text(text, encoding="utf-8")
      print(f"wrote {path}")
