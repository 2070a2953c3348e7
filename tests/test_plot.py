"""`jgpt.plot`: pictures of runs, read back from the SVG; runs of every kind; errors."""

import contextlib
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import small_runs

import jgpt
from jgpt import plot, run
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.data.sources import SOURCES
from jgpt.errors import UserError
from jgpt.report import figures, run_figure
from jgpt.report.run_figure import draw_runs, format_tick
from jgpt.runs.folder import RunFiles, write_run_files
from jgpt.runs.history import read_history
from jgpt.text.tokenizer import CharTokenizer

pytest.importorskip("matplotlib", reason="pictures need the extra jgpt[plot]")
LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz", bos=True)
STEPS = 100


def make_rows(steps=STEPS, end=2.4, call=10):
  """Rows of a run: losses that fall to `end` with a noise known by its step, two evaluations."""
  rows = [{"step": 0, "heldout/loss": 3.3}]
  for step in range(1, steps + 1):
    loss = end + np.exp(-step / 20) + 0.1 * np.sin(7.0 * step)
    rows.append({"step": step, "train/loss": float(loss), "train/grad_norm": 2 + np.cos(step)})
    rows[-1] |= {"train/lr": 0.01 * (1 - step / steps), "train/skipped": 0}
    if step % call == 0 or step == steps:
      rows.append({"step": step, "perf/seconds": 0.5, "perf/tokens_per_second": 140.0 + step})
      rows[-1]["tokens"] = 7 * step
  return [*rows, {"step": steps, "heldout/loss": end + 0.05}]


def make_run(folder, rows, changes=None, name="names", torn=""):
  """A run folder without checkpoints: `names` on its list of names, with these rows."""
  experiment = resolve(change(load_experiment("names"), changes or {}), 27)
  data = {"kind": "path", "location": "names.txt", "sha256": SOURCES["names"].sha256}
  write_run_files(folder, RunFiles(name, experiment, LETTERS, data))
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "metrics.jsonl").write_text(text + torn, encoding="utf-8")
  return str(folder)


def read_svg(path):
  """The texts of an SVG, and the points of each curve that has a name: name -> float [n, 2].

  Of dots and ticks the places where they are.
  """
  root = ElementTree.fromstring(Path(path).read_bytes())
  space = "{http://www.w3.org/2000/svg}"
  texts = ["".join(text.itertext()) for text in root.iter(f"{space}text")]
  curves = {}
  for group in root.iter(f"{space}g"):
    name = group.get("id", "")
    if re.fullmatch(r"[a-z-]+-(\d+|loss|norm)", name):
      uses = [(float(u.get("x")), float(u.get("y"))) for u in group.iter(f"{space}use")]
      words = " ".join(p.get("d") or "" for p in group.findall(f"{space}path"))
      points = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", words)
      curves[name] = np.array(uses or points, float)
  return texts, curves


def fit(values, places):
  """The line that turns values into an SVG's places, and the largest distance from it."""
  slope, start = np.polyfit(values, places, 1)
  return (slope, start), np.abs(slope * np.asarray(values) + start - places).max()


# --- What is drawn ---


def test_a_run_is_drawn_with_what_it_expects_and_what_guessing_has(tmp_path, capsys):
  """Every curve lies where the numbers of metrics.jsonl say, over one pair of axes."""
  rows, folder = make_rows(), make_run(tmp_path / "names", make_rows())
  assert plot.main(["--run", folder]) == 0
  shown = "losses, gradient norm, learning rate and tokens per second"
  assert capsys.readouterr().out == f"wrote {tmp_path / 'names' / 'plot.svg'}: {shown}\n"
  texts, curves = read_svg(tmp_path / "names" / "plot.svg")
  curves_of_a_run = {"training-0", "last-0", "heldout-0", "expected-0", "guessing-0", "each-loss"}
  below = {"gradient-norm-0", "each-norm", "learning-rate-0", "tokens-per-second-0"}
  assert set(curves) == curves_of_a_run | below
  losses = np.array([row["train/loss"] for row in rows if "train/loss" in row])
  around = [losses[max(0, i - k) : i + k + 1] for i in range(STEPS) for k in [min(2, i)]]
  smoothed = [part.mean() for part in around]  # 100 updates: five of them, two on each side
  assert {
    *("names: step 100 of 1,000", "step", "held out 2.45", "guessing 3.30", "expected 2.38 ± 0.03"),
    *("gradient norm", "learning rate", "tokens per second", f"training {losses[-50:].mean():.2f}"),
    "line: training, mean of 5 updates (thin: last 50); pale: each update; dots: held out",
  } < {*texts}
  assert f"{losses[-50:].mean():.2f}" != f"{smoothed[-1]:.2f}"  # where the curve ends
  (slope, start), far = fit(smoothed, curves["training-0"][:, 1])
  assert far < 0.01 and slope < 0
  drawn = {"each-loss": losses, "heldout-0": [3.3, 2.45], "guessing-0": [np.log(27)] * 2}
  drawn["last-0"] = [losses[-50:].mean()] * 2
  for name, values in drawn.items():
    places = slope * np.asarray(values) + start
    np.testing.assert_allclose(curves[name][:, 1], places, atol=0.01)
  band = np.unique(curves["expected-0"][:, 1].round(3))
  np.testing.assert_allclose(band, [slope * 2.41 + start, slope * 2.35 + start], atol=0.01)
  steps = np.arange(1, STEPS + 1)
  assert fit(steps, curves["training-0"][:, 0])[1] < 0.01
  assert fit([1, 51, 100], [curves["training-0"][0, 0], *curves["last-0"][:, 0]])[1] < 0.01
  assert fit(0.01 * (1 - steps / STEPS), curves["learning-rate-0"][:, 1])[1] < 0.01


@pytest.mark.parametrize(
  ("lengths", "has_heldout", "words"),
  [
    ((100, 230), True, "line: training, mean of 5 to 11 updates; dots: held out, the last"),
    ((20, 230), False, "line: training, mean of 1 to 11 updates (number: last 20 to 50)"),
    ((20,), False, "line: training (thin: mean of the last 20)"),
    ((1,), False, "line: training"),
  ],
)
def test_a_picture_says_of_how_many_updates_its_lines_and_numbers_are_means(
  lengths, has_heldout, words, tmp_path
):
  runs, ends = [], []
  for steps in lengths:
    rows = [row for row in make_rows(steps) if has_heldout or "heldout/loss" not in row]
    ends.append(np.mean([row["train/loss"] for row in rows if "train/loss" in row][-50:]))
    runs.append(read_history(make_run(tmp_path / str(steps), rows, {"train.steps": steps})))
  figure = draw_runs(runs)
  texts = [text.get_text() for text in figure.axes[0].texts]
  assert texts[-1].startswith(words) and (has_heldout or texts[-1] == words)
  labels = "training" if len(runs) == 1 else "steps "
  found = [float(text.split()[-1]) for text in texts if text.startswith(labels)]
  np.testing.assert_allclose(found, [2.45] * 2 if has_heldout else ends, atol=0.0051)


def test_several_runs_are_told_apart_by_what_differs(tmp_path):
  runs = [
    make_run(tmp_path / str(rate), make_rows(end=end), {"optimizer.peak_lr": rate})
    for rate, end in ((0.01, 2.4), (0.03, 2.9), (0.001, 2.0))
  ]
  command = [word for folder in runs for word in ("--run", folder)]
  assert plot.main([*command, "--x", "tokens", "--out", str(tmp_path / "x.svg")]) == 0
  texts, curves = read_svg(tmp_path / "x.svg")
  names = {f"{name}-{i}" for i in range(3) for name in ("training", "heldout", "gradient-norm")}
  names |= {f"{name}-{i}" for i in range(3) for name in ("learning-rate", "tokens-per-second")}
  assert set(curves) == names | {"guessing-0", "expected-0"}  # the first run expects it
  assert {"names: 3 runs", "peak_lr 0.01: 2.45", "peak_lr 0.03: 2.95"} < {*texts}
  assert "tokens seen in training, padding not counted" in texts
  assert "line: training, mean of 5 updates; dots: held out, the last as a number" in texts
  heights = [curves[f"training-{i}"][-1, 1] for i in range(3)]
  assert heights[1] < heights[0] < heights[2]  # places count downwards
  content = (tmp_path / "x.svg").read_bytes()
  figure = jgpt.plot_runs(runs, "tokens")
  assert figures.render_figure(figure, ".svg") == content  # the same bytes again


@pytest.mark.parametrize("x", ["tokens", pytest.param("seconds", marks=pytest.mark.slow)])
def test_an_axis_of_tokens_or_seconds_is_that_of_the_calls(x, tmp_path):
  """Calls of other lengths, whose updates are spread evenly over each."""
  rows = [row for row in make_rows(60) if "tokens" not in row]
  for step, tokens, seconds in ((1, 9, 2.0), (20, 30, 0.25), (60, 500, 3.0)):
    rows.append({"step": step, "perf/seconds": seconds, "tokens": tokens})
  figure = draw_runs([read_history(make_run(tmp_path, rows))], x)
  (line,) = [line for line in figure.axes[0].lines if line.get_gid() == "training-0"]
  known = [0, 9, 30, 500] if x == "tokens" else [0, 2, 2.25, 5.25]
  by_hand = np.interp(np.arange(1, 61), [0, 1, 20, 60], known)
  np.testing.assert_allclose(line.get_xdata(), by_hand)


# --- Runs of every kind ---

NAN = float("nan")


def spoil(rows):
  """Losses that are not finite from step 61 on, and at step 20; those updates were skipped."""
  bad = {"train/loss": NAN, "train/grad_norm": NAN, "train/skipped": 1}
  return [
    row | bad if "train/loss" in row and (row["step"] > 60 or row["step"] == 20) else row
    for row in rows
  ]


KINDS = {
  "killed": (make_rows()[:60], ["training", "held out 3.30", "of 1,000"]),
  "one update": (make_rows(1), ["names: step 1 of 1,000", "training"]),
  "no update": (make_rows()[:1], ["names: step 0 of 1,000", "held out 3.30", "none"]),
  "nothing held out": ([r for r in make_rows() if "train/loss" in r], ["training", "none"]),
  "not finite": (spoil(make_rows()), ["41 skipped", "training", "held out 2.45"]),
  "never finite": ([{"step": 1, "train/loss": NAN, "train/grad_norm": -1e38}], ["1 skipped"]),
  "diverged": ([*make_rows(), {"step": 101, "train/loss": 1e30}], ["1 skipped", "training"]),
  "finished": (make_rows(1000), ["names: 1,000 updates"]),
}
QUICK = ("killed", "not finite", "no update")


@pytest.mark.parametrize(
  "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_runs_of_every_kind_are_drawn(kind, tmp_path, capfd):
  rows, words = KINDS[kind]
  folder = make_run(tmp_path / "names", rows, torn='{"step": 999, "train/lo')
  assert plot.main(["--run", folder]) == 0
  texts, curves = read_svg(tmp_path / "names" / "plot.svg")
  shown = "\n".join(texts)
  assert [word for word in words if word not in shown] == []
  has_line = any("train/loss" in row and row["train/loss"] < 1e9 for row in rows)
  assert (len(curves.get("training-0", ())) > 0) == has_line
  assert "nan" not in shown.lower() and capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_million_updates_make_a_small_file(tmp_path):
  """Three runs, one with 200,000 evaluations; single extremes stay."""
  rng = np.random.default_rng(0)
  folders = []
  for i in range(3):
    rows = [
      {"step": s, "train/loss": 3 + 0.1 * loss, "train/grad_norm": 1 + abs(loss), "train/lr": 0.1}
      for s, loss in enumerate(rng.normal(size=350_000 if i else 300_000), 1)
    ]
    if i == 0:
      rows[123_456]["train/grad_norm"] = 7.5
      rows += [{"step": s, "heldout/loss": 3.1} for s in range(1, 200_001)]
    folders.append(make_run(tmp_path / str(i), rows, {"train.seed": i}))
  for runs in (folders[:1], folders):
    content = figures.render_figure(jgpt.plot_runs(runs), ".svg")
    assert 30_000 < len(content) < 500_000
  figure = jgpt.plot_runs(folders[:1])
  (line,) = [line for line in figure.axes[1].lines if line.get_gid() == "each-norm"]
  assert line.get_ydata().max() == 7.5
  assert sum(len(line.get_xdata()) for ax in figure.axes for line in ax.lines) < 10_000


@pytest.mark.slow
def test_numbers_may_be_anything(tmp_path):
  """In rows in any order: a picture without a warning, or an error for the user."""
  values = [NAN, np.inf, -np.inf, 1e38, -1e38, 0, 1e-45, 3.0, 1e9, -5]
  names = ["train/loss", "train/grad_norm", "train/lr", "train/skipped", "heldout/loss"]
  names += ["perf/seconds", "perf/tokens_per_second", "tokens"]
  drawn = 0
  for seed in range(12):
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(rng.choice([1, 5, 60])):
      row = {"step": int(rng.choice([step, step, rng.integers(50), 2**62]))}
      row |= {name: float(rng.choice(values)) for name in names if rng.random() < 0.5}
      rows.append(row)
    folder = make_run(tmp_path / str(seed), rows)
    for x in ("step", "tokens", "seconds"):
      with contextlib.suppress(UserError):
        figures.render_figure(jgpt.plot_runs(folder, x), ".svg")
        drawn += 1
  assert drawn > 20


@pytest.mark.slow
def test_names_of_folders_may_be_anything(tmp_path, capfd):
  """Dollars are no mathematics, letters that the font lacks give no warning, long ones are cut."""
  names = ["$x_1$", "名前", "x" * 200, "a<b>&\n'c'"]
  runs = [make_run(tmp_path / name, make_rows()) for name in names]
  out = tmp_path / "x.svg"
  assert plot.main([*(w for folder in runs for w in ("--run", folder)), "--out", str(out)]) == 0
  texts, _ = read_svg(out)
  shown = "\n".join(texts)
  assert "$x_1$: 2.45" in shown and "名前: 2.45" in shown and "a<b>&\\n'c': 2.45" in shown
  assert max(map(len, texts)) < 100 and capfd.readouterr().err == ""


# --- The command ---


def test_a_png_is_drawn_without_jax_and_without_parameters(tmp_path):
  folder = make_run(tmp_path / "names", make_rows())
  code = "import sys, jgpt.plot as plot\nstatus = plot.main(sys.argv[1:])\n"
  code += "assert status == 0 and not {'jax', 'matplotlib.pyplot'} & {*sys.modules}"
  command = [sys.executable, "-W", "error", "-c", code, "--run", folder, "--out", "a.png"]
  env = os.environ | {"PYTHONPATH": str(Path(jgpt.__file__).parents[1])}
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0 and done.stderr == "", done.stderr
  content = (tmp_path / "a.png").read_bytes()
  assert content.startswith(b"\x89PNG") and done.stdout.startswith("wrote a.png: losses, ")


def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder = make_run(Path("names"), make_rows())
  empty = make_run(Path("empty"), [])
  untimed = make_run(Path("untimed"), [row for row in make_rows() if "tokens" not in row])
  Path("there.svg").write_text("mine")
  Path("names/checkpoints/50").mkdir(parents=True)
  Path("link").mkdir()
  for name in ("experiment.json", "tokenizer.json", "metrics.jsonl"):
    Path("link", name).write_bytes(Path("names", name).read_bytes())
  Path("link/plot.svg").symlink_to("../there.svg")
  cases = [
    (["--run", folder, "--run", folder], "several runs needs a place. Try --out plot.svg"),
    (["--run", f"{folder}/checkpoints/50"], "up to step 50 needs a place"),
    (["--run", folder, "--out", "there.svg"], "there.svg is there already"),
    (["--run", folder, "--out", "x.pdf"], "must end in .svg or .png"),
    (["--run", folder, "--out", "no/x.svg"], "no is no folder"),
    (["--run", "absent"], "absent is not a run folder"),
    (["--run", empty], "has no metrics, so there is nothing to draw"),
    (["--run", untimed, "--x", "tokens", "--out", "y.svg"], "older jgpt wrote it. Try --x step"),
    (["--run", "link"], "is a symbolic link"),
  ]
  for command, words in cases:
    with pytest.raises(UserError, match=re.escape(words)):
      plot.main(command)
  with pytest.raises(UserError, match="x='epochs' must be one of step, tokens, seconds"):
    jgpt.plot_runs([folder], "epochs")
  with pytest.raises(UserError, match="there is no run to draw"):
    jgpt.plot_runs([])
  monkeypatch.setattr(figures, "can_draw", lambda: False)
  with pytest.raises(UserError, match=r"Try pip install matplotlib, .* its extra plot"):
    plot.main(["--run", folder])
  assert Path("there.svg").read_text() == "mine"
  assert sorted(p.name for p in Path().glob("*/plot.svg")) == ["plot.svg"]  # the link


def test_a_checkpoint_is_drawn_up_to_its_step(tmp_path):
  folder = make_run(tmp_path / "names", make_rows())
  (tmp_path / "names/checkpoints/50").mkdir(parents=True)
  found = read_history(f"{folder}/checkpoints/50")
  assert found.metrics["train/loss"].steps.tolist() == list(range(1, 51))


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0, "0"),
    (0.0003, "0.0003"),
    (1e-7, "1e-07"),
    (2.5, "2.5"),
    (1500, "1,500"),
    (20_000, "20k"),
    (150_000, "150k"),
    (2.5e6, "2.5M"),
    (3e9, "3G"),
    (-20_000, "-20k"),
  ],
)
def test_numbers_of_axes_are_short(value, text):
  assert format_tick(value) == text


# --- What the experiment expects ---


def test_a_result_is_expected_of_the_experiment_as_it_is_and_with_another_seed(tmp_path):
  """Not with other settings or another number of updates, nor of a run of another name."""
  expected = load_experiment("names").expected
  cases = [({}, "names", expected), ({"train.seed": 5, "train.log_every": 3}, "names", expected)]
  cases += [({"optimizer.peak_lr": 0.02}, "names", ()), ({"train.steps": 999}, "names", ())]
  cases += [({}, "microgpt", ()), ({}, "mine", ()), ({}, "../names.py", ())]
  for i, (changes, name, found) in enumerate(cases):
    folder = make_run(tmp_path / str(i), [], changes, name=name)
    assert read_history(folder).expected == found, (changes, name)


# --- At the end of a run ---


@pytest.mark.slow
def test_a_run_draws_its_curves_at_its_end(tmp_path, monkeypatch, capsys, quick, drawn):
  """Once it has trained; a failure is a warning; without matplotlib a line says what to install."""
  monkeypatch.chdir(tmp_path)
  names = ["--experiment", "names", "--set", "sample.num=1", "--workdir", "a"]
  names += ["--set", "optimizer.decay_steps=100"]
  assert run.main([*names, "--steps", "5"]) == 0
  out = capsys.readouterr().out
  assert re.search("\n\nwrote a/plot.svg: losses, .* tokens per second\n\nnext:\n", out)
  loss = float(re.search(r"\ntraining loss (\S+) \(mean of the last 5 updates\)", out)[1])
  texts, curves = read_svg("a/plot.svg")
  assert {"names (a): 5 updates", f"training {loss:.2f}"} < {*texts}
  assert len(curves["training-0"]) == 5
  Path("a/plot.svg").unlink()
  assert run.main([*names, "--steps", "5"]) == 0  # it is sampled again
  assert "wrote" not in capsys.readouterr().out and not Path("a/plot.svg").exists()

  def fail(runs):
    raise ValueError("no room\nat all")

  with monkeypatch.context() as patch:
    patch.setattr(run_figure, "plot_runs", fail)
    assert run.main([*names, "--steps", "6"]) == 0
  assert "WARNING: a/plot.svg was not drawn: no room\n\n" in capsys.readouterr().err
  Path("there").write_text("mine")
  Path("a/plot.svg").symlink_to("../there")
  assert run.main([*names, "--steps", "7"]) == 0
  assert "a/plot.svg is a symbolic link" in capsys.readouterr().err
  assert Path("there").read_text() == "mine"
  with monkeypatch.context() as patch:
    patch.setattr(figures, "can_draw", lambda: False)
    assert run.main([*names, "--steps", "8"]) == 0
  out, err = capsys.readouterr()
  how = "try pip install matplotlib, or install jgpt with its extra plot"
  assert f"\n\nfor a picture of the curves, {how}\n\nnext:\n" in out
  assert "\nwrote" not in out and not err


@pytest.mark.slow
def test_small_runs_are_drawn_whole(tmp_path):
  """Documents and a stream, as training leaves them."""
  for small in (small_runs.train_words(tmp_path), small_runs.train_verse(tmp_path)):
    for x in ("step", "tokens", "seconds"):
      figure = jgpt.plot_runs([small.workdir], x)
      (line,) = [line for line in figure.axes[0].lines if line.get_gid() == "heldout-0"]
      assert line.get_ydata()[-1] == pytest.approx(small.result.heldout_loss)
      ends = {"step": small.result.step, "tokens": small.result.seen.tokens}
      assert x not in ends or line.get_xdata()[-1] == ends[x]


# --- The README's pictures ---


@pytest.mark.slow
def test_the_readmes_pictures_are_what_their_script_makes(tmp_path):
  """The same curves to half a point of the picture, where the text is the same, but for those of
  time; the same words, and maps of the same size.
  """
  pictures = Path(jgpt.__file__).parents[1] / "notebooks" / "pictures"
  command = [sys.executable, str(pictures / "make.py"), str(tmp_path)]
  env = os.environ | {"PYTHONPATH": str(Path(jgpt.__file__).parents[1])}
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0 and done.stderr == "", done.stderr
  assert sorted(path.name for path in tmp_path.iterdir()) == ["attention.svg", "names.svg"]
  there, here = (read_svg(folder / "names.svg") for folder in (pictures, tmp_path))
  assert set(there[1]) == set(here[1]) and "expected-0" in here[1]
  words = {"names: 1,000 updates", "expected 2.38 ± 0.03", "guessing 3.30"}
  assert words < {*here[0]} and words < {*there[0]}
  maps = [{*read_svg(folder / "attention.svg")[0]} for folder in (pictures, tmp_path)]
  assert maps[0] == maps[1] >= {*"gabriel", "BOS", "layer 0, head 3"}
  if not Path(os.environ.get("JGPT_DATA_DIR", "."), "names.txt").is_file():
    pytest.skip("the committed pictures are of names.txt, which is not in JGPT_DATA_DIR")
  assert {text for text in here[0] if text.startswith(("held out", "training"))} < {*there[0]}
  for name in set(here[1]) - {"tokens-per-second-0"}:
    np.testing.assert_allclose(here[1][name], there[1][name], atol=0.5, err_msg=name)
