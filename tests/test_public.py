"""What `import jgpt` gives: the list of names, what they are, and that their examples run."""

import contextlib
import doctest
import importlib
import importlib.util
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_runs

import jgpt
from jgpt import sample
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, list_settings
from jgpt.errors import UserError
from jgpt.plan import plan_run
from jgpt.train import train_run

# Where each stands. In an order in which their examples can run one after the other.
HOMES = {
  "load_experiment": "jgpt.config.catalog",
  "plan_run": "jgpt.plan",
  "train_run": "jgpt.train",
  "open_run": "jgpt.runs.open",
  "plot_runs": "jgpt.report.run_figure",
  "Run": "jgpt.runs.open",
  "evaluate_loss": "jgpt.evaluation",
  "generate_texts": "jgpt.generate",
}
CLASSES = {"Run"}
ROOT = str(Path(jgpt.__file__).parent.parent)


def submodules():
  """Every module of jgpt that can be imported here; `__main__` of a folder runs its command."""
  names = {module.name for module in pkgutil.walk_packages(jgpt.__path__, "jgpt.")}
  names -= {name for name in names if name.endswith(".__main__")}
  if importlib.util.find_spec("torch") is None:
    names.remove("jgpt.bench.peer_torch")
  return sorted(names)


# --- The names ---


def test_the_public_names_are_these():
  assert set(jgpt.__all__) == {"__version__", *HOMES} and len(jgpt.__all__) == len(HOMES) + 1
  assert set(jgpt.__all__) <= set(dir(jgpt))
  assert not hasattr(jgpt, "train_step") and not hasattr(jgpt, "load_run")
  with pytest.raises(AttributeError, match="module 'jgpt' has no attribute 'trainer'"):
    jgpt.trainer  # noqa: B018 (a name that is not there)


def test_no_public_name_is_a_modules():
  """Importing a submodule binds its name in `jgpt`: a function of that name would be gone."""
  assert not {f"jgpt.{name}" for name in HOMES} & set(submodules())


def test_names_are_what_they_are_after_everything_was_imported():
  for name in submodules():
    importlib.import_module(name)
  assert isinstance(jgpt.__version__, str) and jgpt.__version__.count(".") == 2
  for name, home in HOMES.items():
    found = getattr(jgpt, name)
    assert (inspect.isclass if name in CLASSES else inspect.isfunction)(found), name
    assert (found.__module__, found.__name__) == (home, name)
    assert found is getattr(sys.modules[home], name) is getattr(jgpt, name)


def run_python(program):
  """Runs a program in a process of its own; returns what it printed."""
  env = os.environ | {"PYTHONPATH": ROOT}
  done = subprocess.run(
    [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
  )
  return done.stdout.strip()


def test_importing_jgpt_imports_neither_jax_nor_numpy():
  """Nor does listing its names; loading an experiment needs no jax."""
  there = "[name for name in ('jax', 'jaxlib', 'numpy', 'optax', 'orbax') if name in sys.modules]"
  program = f"import sys, jgpt; dir(jgpt), jgpt.__version__, jgpt.__all__; print({there})"
  assert run_python(program) == "[]"
  program = "import sys, jgpt; jgpt.load_experiment('names'); print('jax' in sys.modules)"
  assert run_python(program) == "False"


def test_a_star_import_gives_the_names():
  program = "from jgpt import *; print(sorted(name for name in dir() if name[:2] != '__'))"
  assert run_python(program) == str(sorted(HOMES))


# --- The examples ---


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  """The experiment `names` after 50 of its 1,000 updates, in `runs/names`."""
  changes = {"train.steps": 50, "optimizer.decay_steps": 1000}
  changes |= {"train.eval_every": 25, "train.save_every": 25, "sample.num": 3}
  experiment = change(load_experiment("names"), changes)
  with contextlib.chdir(tmp_path_factory.mktemp("public")), small_runs.compiled_quickly():
    yield train_run(plan_run(experiment, workdir="runs/names", name="names"))


def examples(name):
  """The statements of a docstring's examples."""
  text = inspect.getdoc(getattr(jgpt, name))
  assert "\nExample:\n" in text, f"{name} has no example"
  found = doctest.DocTestParser().get_examples(text.partition("\nExample:\n")[2])
  return [example.source.strip() for example in found]


def test_every_example_runs(result):
  """As they stand, one after the other; the last line of each has a value."""
  names = {"jgpt": jgpt, "jax": jax}
  with small_runs.compiled_quickly():
    for name in HOMES:
      *statements, last = examples(name)
      assert f"jgpt.{name}(" in "\n".join([*statements, last]) or name in CLASSES
      for statement in statements:
        exec(statement, names)
      names[f"value of {name}"] = eval(last, names)
  values = {name: names[f"value of {name}"] for name in HOMES}
  assert values["load_experiment"] == values["open_run"] == 1 and values["plot_runs"] == 4
  assert values["plan_run"] == (50, 1000)
  assert 1.5 < values["train_run"] < 3.5 and len(names["result"].losses) == 1000
  assert 1.5 < values["Run"] < 3.5
  assert values["evaluate_loss"].loss_nats_per_token == pytest.approx(result.heldout_loss, rel=1e-6)
  assert len(values["generate_texts"]) == 3 and all(map(str.isalpha, values["generate_texts"]))


def test_every_public_method_is_documented():
  for name, member in vars(jgpt.Run).items():
    if not name.startswith("_") and (callable(member) or hasattr(member, "func")):
      assert inspect.getdoc(member), name


# --- An opened run ---


@pytest.fixture(scope="module")
def run(result):
  return jgpt.open_run("runs/names")


def test_an_opened_run_has_what_training_ended_with(run, result):
  assert isinstance(run, jgpt.Run) and run.step == 50 and run.workdir == Path("runs/names")
  for a, b in zip(jax.tree.leaves(run.params), jax.tree.leaves(result.params), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  assert jax.tree.structure(run.params) == jax.tree.structure(result.params)
  assert run.tokenizer == result.tokenizer
  assert run.tokenizer.decode(run.tokenizer.encode("anna")) == "anna"
  assert list_settings(run.experiment) == list_settings(result.experiment)
  assert "auto" not in {run.experiment.compute.layers, run.experiment.compute.matmul}


def test_metrics_are_those_of_every_update(run, result):
  ends = {f"final/heldout/{name}" for name in ("loss", "tokens", "bits_per_byte")}
  assert ends | {"heldout/loss", "heldout/tokens", "tokens"} | {
    *("train/loss", "train/grad_norm", "train/lr", "train/skipped"),
    *("perf/seconds", "perf/tokens_per_second"),
  } == {*run.metrics}
  assert run.metrics["final/heldout/loss"].values.tolist() == [result.heldout_loss]
  steps, losses = run.metrics["train/loss"]
  assert steps.tolist() == list(range(1, 51))
  np.testing.assert_array_equal(losses.astype(np.float32), result.losses)
  heldout = run.metrics["heldout/loss"]
  assert list(zip(heldout.steps, heldout.values, strict=True)) == result.heldout_losses
  assert heldout.steps.tolist() == [0, 25, 50]


def test_an_earlier_checkpoint_has_the_metrics_up_to_it(run, result):
  earlier = jgpt.open_run("runs/names", step=25)
  assert earlier.step == 25 and earlier.metrics["train/loss"].steps.tolist() == list(range(1, 26))
  assert earlier.metrics["heldout/loss"].steps.tolist() == [0, 25]
  assert not np.array_equal(earlier.params["unembed"], run.params["unembed"])


def test_the_loss_of_the_heldout_documents_is_that_of_training(run, result):
  """Given as a text with one document a line; in any order."""
  tokens, lengths = run.data().heldout
  lines = [
    run.tokenizer.decode(row[1:length].tolist())
    for row, length in zip(tokens, lengths, strict=True)
  ]
  assert len(lines) > 100 and all(map(str.isalpha, lines))
  assert run.loss("\n".join(lines)) == pytest.approx(result.heldout_loss, rel=1e-6)
  assert run.loss("\n".join(lines[::-1]) + "\n\n") == pytest.approx(result.heldout_loss, rel=1e-5)
  one = run.loss(lines[0])
  both = jgpt.evaluate_loss(run.params, run.data().heldout, run.tokenizer, run.experiment)
  assert both.loss_nats_per_token == pytest.approx(result.heldout_loss, rel=1e-6) != one
  with pytest.raises(UserError, match="nothing to predict"):
    run.loss(" \n")
  with pytest.raises(UserError, match="Ω"):
    run.loss("Ω")


@pytest.mark.slow
def test_the_loss_of_a_stream_is_that_of_its_windows(tmp_path):
  small = small_runs.train_verse(tmp_path)
  run = jgpt.open_run(small.workdir)
  text = run.tokenizer.decode(small.data.heldout.tokens.tolist())
  assert run.loss(text) == pytest.approx(small.result.heldout_loss, rel=1e-6)
  with pytest.raises(UserError, match="nothing to predict"):
    run.loss("T")


def test_a_sample_is_what_the_command_prints(run, capsys):
  assert sample.main(["--run", "runs/names", "--prompt", "an"]) == 0
  texts = capsys.readouterr().out.splitlines()
  assert run.sample("an") == texts and len(texts) == 3
  assert all(text.startswith("an") for text in texts)
  assert sample.main(["--run", "runs/names"]) == 0
  assert run.sample() == capsys.readouterr().out.splitlines() != texts


def test_settings_of_a_sample_are_those_of_the_command(run, capsys):
  options = ["--num", "5", "--temperature", "0.9", "--top-k", "9", "--max-tokens", "4"]
  options += ["--seed", "7"]
  assert sample.main(["--run", "runs/names", *options]) == 0
  texts = run.sample(num=5, temperature=0.9, top_k=9, max_tokens=4, seed=7)
  assert texts == capsys.readouterr().out.splitlines()
  assert len(texts) == 5 and texts != run.sample(num=5, temperature=0.9, top_k=9, max_tokens=4)
  with pytest.raises(UserError, match=r"there is no setting sample\.nun"):
    run.sample(nun=5)
  with pytest.raises(UserError, match=r"sample\.num=0 must be at least 1"):
    run.sample(num=0)
