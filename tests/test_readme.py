"""The README says what is true: its Python runs, its table and its map are complete."""

import re
from pathlib import Path

import pytest

from jgpt import run
from jgpt.config import catalog
from jgpt.config.settings import resolve
from jgpt.data.sources import SOURCES, expected_vocab_size
from jgpt.params import count_params

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_ten_lines_train_plot_and_sample(tmp_path, monkeypatch, capsys):
  matplotlib = pytest.importorskip("matplotlib", reason="the ten lines draw a plot (the test extra)")
  matplotlib.use("Agg")
  monkeypatch.chdir(tmp_path)
  (code,) = [c for c in PYTHON if "plt.plot" in c]
  assert len([line for line in code.splitlines() if line.strip()]) <= 11
  names = {}
  exec(compile(code, "README", "exec"), names)
  assert len(names["plt"].gca().lines[0].get_xdata()) == 1000
  names["plt"].close()
  texts = eval(capsys.readouterr().out)
  assert len(texts) == 20 and all(t.startswith("an") for t in texts)
  assert not list(tmp_path.iterdir())  # without a workdir nothing is left on disk


@pytest.mark.slow
def test_the_added_experiment_runs(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (code,) = [c for c in PYTHON if "EXPERIMENT =" in c]
  (tmp_path / "wide.py").write_text(code, encoding="utf-8")
  assert run.main(["--experiment", "wide.py", "--steps", "3"]) == 0
  assert "runs/wide,train.steps=3" in capsys.readouterr().out.replace("\\", "/")


def test_the_table_has_every_experiment_with_its_parameters():
  for name in catalog.list_experiments():
    experiment = catalog.load_experiment(name)
    count = count_params(resolve(experiment, expected_vocab_size(experiment.data)).model)
    assert f"| `{name}` | {count:,} |" in README


def test_the_map_has_every_module():
  for path in (ROOT / "jgpt").rglob("*.py"):
    assert path.stem in ("__init__", "__main__") or f"`{path.relative_to(ROOT).as_posix()}`" in README, path


def test_the_size_of_the_bundled_list_is_true():
  bundled = (ROOT / "jgpt" / "bundled" / SOURCES["names"].filename).read_text(encoding="utf-8").split()
  assert README.count(f"{len(set(bundled)):,} first names") == 1
