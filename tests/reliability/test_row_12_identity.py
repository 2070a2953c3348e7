"""Row 12: what a run is may not change when it goes on; where and how it runs may.

It may become longer.

`tests/test_train.py` and `tests/test_commands.py` have single cases; here is every setting.
"""

import json
import shutil

import children
import pytest
import small_runs

from jgpt import train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import (
  change,
  experiment_from_json,
  experiment_to_json,
  is_circumstance,
  list_settings,
)
from jgpt.errors import UserError
from jgpt.plan import plan_run

STEPS = 6


def experiment(name, **changes):
  base, chosen = children.EXPERIMENTS[name]
  chosen = chosen | {"train.steps": STEPS, "train.log_every": 3}
  return change(
    load_experiment(base), chosen | {k.replace("__", "."): v for k, v in changes.items()}
  )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A short run on documents and one on a stream."""
  folder = tmp_path_factory.mktemp("identity")
  children.write_texts(folder)
  with pytest.MonkeyPatch.context() as patch, small_runs.compiled_quickly():
    patch.chdir(folder)
    for name in ("names", "bytes"):
      train.train_run(plan_run(experiment(name), workdir=folder / name, name=name))
  return folder


# Another value for each setting of a run's identity, which goes with the others.
OTHERS = {
  "compute.dtype": "bfloat16",
  "model.vocab_size": 300,
  "model.vocab_multiple": 8,
  "model.max_seq_len": 21,
  "model.num_layers": 3,
  "model.num_heads": 2,
  "model.d_model": 20,
  "model.d_ff": 40,
  "model.norm": "rms",
  "model.norm_embed": None,
  "model.norm_final": False,
  "model.activation": "relu",
  "model.positions": "sinusoidal",
  "model.biases": "all",
  "model.tied_head": False,
  "model.scale_embed": False,
  "model.dropout": 0.2,
  "model.dropout_places": ("embedding",),
  "model.init_std": 0.03,
  "model.scale_residual_init": True,
  "data.batching": "epochs",
  "data.seq_len": 15,
  "data.batch_size": 8,
  "data.heldout_fraction": 0.2,
  "data.num_batches": 3,
  "optimizer.name": "adam",
  "optimizer.peak_lr": 0.02,
  "optimizer.schedule": "linear",
  "optimizer.warmup_steps": 6,
  "optimizer.warmup_from_zero": False,
  "optimizer.end_lr": 1e-5,
  "optimizer.decay_steps": 7,
  "optimizer.b1": 0.91,
  "optimizer.b2": 0.96,
  "optimizer.eps": 1e-7,
  "optimizer.weight_decay": 0.2,
  "optimizer.decay_kinds": ("matrix",),
  "optimizer.clip_norm": 0.6,
  "optimizer.skip_spikes": 6.0,
  "train.seed": 1,
  "train.init": "microgpt",
}
# Another value does not go with the other settings of this run -> what the run must have, and the
# other value.
NOT_ALONE = {
  "model.norm_embed": ({"model.norm": "rms", "model.norm_embed": False}, True),
  "data.tokenizer": ({}, "characters"),
  "data.bpe_vocab_size": ({"data.tokenizer": "bpe", "data.bpe_vocab_size": 300}, 301),
  "data.mark_paragraphs": ({"data.tokenizer": "gpt2"}, True),
  "data.heldout_tokens": ({"data.heldout_fraction": 0.0, "data.heldout_tokens": 100}, 101),
  "optimizer.momentum": ({"optimizer.name": "sgd", "optimizer.momentum": 0.9}, 0.8),
  "optimizer.cooldown_steps": ({"optimizer.schedule": "wsd", "optimizer.cooldown_steps": 2}, 3),
  "train.init_from": ({}, "elsewhere"),
  "train.continue_from": ({}, "elsewhere"),
  "train.init": ({}, "microgpt"),
}


def test_row_12_every_setting_is_tried_here():
  """A new setting must be decided about: identity or circumstance, and a value for the test
  below.
  """
  identity = {name for name in list_settings(experiment("bytes")) if not is_circumstance(name)}
  assert identity - OTHERS.keys() - NOT_ALONE.keys() == set()


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in NOT_ALONE])
def test_row_12_a_changed_setting_of_the_identity_is_refused_by_name(runs, monkeypatch, name):
  monkeypatch.chdir(runs)
  other = experiment("bytes", **{name: OTHERS[name]})
  before = {p: p.read_bytes() for p in (runs / "bytes").rglob("*") if p.is_file()}
  with pytest.raises(UserError) as error:
    plan_run(other, workdir=runs / "bytes")
  assert (
    f"{name} is " in str(error.value)
    and "--fresh" in str(error.value)
    and "\n" not in str(error.value)
  )
  assert {p: p.read_bytes() for p in (runs / "bytes").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", NOT_ALONE)
def test_row_12_a_changed_setting_that_goes_with_others_is_refused_by_name(
  runs, monkeypatch, tmp_path, name
):
  """The folder's experiment.json is that of a run with these others.

  Nothing else differs, and nothing else is named.
  """
  monkeypatch.chdir(runs)
  base, other = NOT_ALONE[name]
  run = shutil.copytree(runs / ("names" if name == "train.init" else "bytes"), tmp_path / "run")
  path = run / "experiment.json"
  recorded = experiment_from_json(json.loads(path.read_text())["experiment"])
  ours = change(recorded, base)
  path.write_text(
    json.dumps(json.loads(path.read_text()) | {"experiment": experiment_to_json(ours)})
  )
  before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
  with pytest.raises(UserError) as error:
    plan_run(change(ours, {name: other}), workdir=run)
  was = list_settings(ours)[name]
  assert f"holds a run with other settings: {name} is {was} there and {other} here. Choose" in str(
    error.value
  )
  assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_row_12_a_checkpoint_of_another_run_is_not_gone_on_from(tmp_path, monkeypatch, capfd):
  """Its files are whole, its manifest says so; it was put there by mistake.

  The one before is taken, with a warning.
  """
  monkeypatch.chdir(tmp_path)
  children.write_texts(tmp_path)
  changes = {"train__save_every": 2, "train__keep_latest": 3, "optimizer__decay_steps": STEPS}
  with small_runs.compiled_quickly():
    train.train_run(plan_run(experiment("names", **changes), workdir=tmp_path / "straight"))
    train.train_run(
      plan_run(experiment("names", train__steps=4, **changes), workdir=tmp_path / "run")
    )
    train.train_run(
      plan_run(
        experiment("names", train__steps=4, train__seed=7, **changes), workdir=tmp_path / "other"
      )
    )
    foreign = tmp_path / "run" / "checkpoints" / "4"
    shutil.rmtree(foreign)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "4", foreign)
    manifest = (foreign / "manifest.json").read_bytes()
    capfd.readouterr()
    result = train.train_run(plan_run(experiment("names", **changes), workdir=tmp_path / "run"))
  warning = capfd.readouterr().err
  assert (
    warning.count("\n") == 1 and warning.startswith("WARNING: ") and "train.seed is 7" in warning
  ), warning
  assert "going on from step 2" in warning and "4.damaged" in warning
  assert (foreign.with_name("4.damaged") / "manifest.json").read_bytes() == manifest
  assert int(result.state.step) == STEPS
  children.assert_same(children.bits(tmp_path / "run"), children.bits(tmp_path / "straight"))


def test_row_12_several_changed_settings_are_all_named(runs, monkeypatch):
  monkeypatch.chdir(runs)
  changed = {
    name: OTHERS[name]
    for name in ("model.dropout", "optimizer.b1", "train.seed", "data.heldout_fraction")
  }
  with pytest.raises(UserError) as error:
    plan_run(experiment("bytes", **changed), workdir=runs / "bytes")
  assert all(f"{name} is " in str(error.value) for name in changed)
  with pytest.raises(UserError, match=r"train\.init is normal there and microgpt here"):
    plan_run(experiment("names", train__init="microgpt"), workdir=runs / "names")


CIRCUMSTANCES = {
  "data__source": "tiny_shakespeare",
  "data__path": "verse2.txt",  # the same text
  "train__log_every": 2,
  "train__eval_every": 3,
  "train__eval_batches": 1,
  "train__sample_every": 2,
  "train__save_every": 2,
  "train__save_every_seconds": 0.01,
  "train__keep_latest": 3,
  "train__keep_best": 2,
  "train__max_consecutive_skips": 5,
  "sample__num": 2,
  "sample__temperature": 1.0,
  "sample__top_k": 3,
  "sample__top_p": 0.9,
  "sample__max_tokens": 4,
  "sample__prompt": "No",
  "mesh__data": 2,
  "compute__tricks": False,
  "compute__precision": "highest",
  "compute__attention": "blocks",
  "compute__matmul": "einsum",
  "compute__layers": "scan",
  "compute__remat": "block",
  "compute__loss_chunks": 2,
  "compute__group_documents": False,
  "compute__select": "ordered",
  "compute__compiler_options": "none",
  "train__micro_batch_size": 2,
  "train__steps": 8,
}


@pytest.mark.slow
def test_row_12_circumstances_are_free_and_recorded(tmp_path, monkeypatch):
  """Each start lists its own in env.json; those that only watch leave the bits alone."""
  monkeypatch.chdir(tmp_path)
  children.write_texts(tmp_path)
  shutil.copy("verse.txt", "verse2.txt")
  free = {name for name in list_settings(experiment("bytes")) if is_circumstance(name)} - {
    "train.epochs"
  }
  assert {name.replace("__", ".") for name in CIRCUMSTANCES} == free
  left_out = ("mesh", "compute", "train__micro_batch_size", "train__steps")
  watching = {k: v for k, v in CIRCUMSTANCES.items() if not k.startswith(left_out)}
  held = {"optimizer__decay_steps": 12}
  with small_runs.compiled_quickly():
    train.train_run(
      plan_run(experiment("bytes", train__steps=12, **held), workdir=tmp_path / "straight")
    )
    train.train_run(plan_run(experiment("bytes", train__steps=5, **held), workdir=tmp_path / "run"))
    train.train_run(
      plan_run(
        experiment("bytes", **(watching | held | {"train__steps": 12})), workdir=tmp_path / "run"
      )
    )
    children_bits = [children.bits(tmp_path / name) for name in ("straight", "run")]
    assert children_bits[0].leaves == children_bits[1].leaves
    train.train_run(
      plan_run(experiment("bytes", train__steps=5, **held), workdir=tmp_path / "other")
    )
    train.train_run(
      plan_run(experiment("bytes", **(CIRCUMSTANCES | held)), workdir=tmp_path / "other")
    )
  starts = json.loads((tmp_path / "other" / "env.json").read_text())
  assert [start["start_step"] for start in starts] == [0, 5]
  for name, value in CIRCUMSTANCES.items():
    assert starts[1]["settings"][name.replace("__", ".")] == value
  assert starts[0]["settings"]["train.log_every"] == 3 and starts[0]["settings"]["mesh.data"] == 1
  assert all(not start["settings"].keys() & OTHERS.keys() for start in starts)


@pytest.mark.parametrize("how", ["one byte", "longer", "shorter", "gone", "a folder"])
def test_row_12_changed_data_is_refused(runs, tmp_path, monkeypatch, how):
  """Words in a file, and tokens in a shard."""
  monkeypatch.chdir(runs)
  path = runs / "words.txt"
  content = path.read_bytes()
  try:
    match how:
      case "one byte":
        path.write_bytes(b"b" + content[1:])
      case "longer":
        path.write_bytes(content + b"abc\n")
      case "shorter":
        path.write_bytes(content[:-4])
      case "gone":
        path.unlink()
      case "a folder":
        path.unlink()
        path.mkdir()
    with pytest.raises(UserError, match=r"words\.txt"):
      plan_run(experiment("names"), workdir=runs / "names")
  finally:
    if path.is_dir():
      path.rmdir()
    path.write_bytes(content)
  assert plan_run(experiment("names"), workdir=runs / "names").start_step == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("place", [1024, 1500, -2])
def test_row_12_a_changed_byte_of_a_shard_is_refused(tmp_path, monkeypatch, place):
  """In the first token, in the middle, and in the last, which no batch has held yet."""
  monkeypatch.chdir(tmp_path)
  children.write_texts(tmp_path)
  path = tmp_path / "shards" / "train.bin"
  with small_runs.compiled_quickly():
    train.train_run(
      plan_run(
        experiment("shards", train__steps=2, optimizer__decay_steps=6), workdir=tmp_path / "run"
      )
    )
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="changed since"):
      plan_run(experiment("shards", optimizer__decay_steps=6), workdir=tmp_path / "run")
  (tmp_path / "shards" / "more.bin").write_bytes(bytes(content))
  with pytest.raises(UserError):
    plan_run(experiment("shards", optimizer__decay_steps=6), workdir=tmp_path / "run")


@pytest.mark.slow
def test_row_12_a_thousand_steps_grown_to_fifteen_hundred(tmp_path):
  """As commands: the bits of 1,500 steps whose schedule's length was 1,000 from the start.

  Rates after it are `end_lr`.
  """
  children.write_texts(tmp_path)
  common = {"optimizer__end_lr": 0.001, "train__log_every": 500}
  children.train(*children.arguments("names", "grown", **common, train__steps=1000), cwd=tmp_path)
  children.train(*children.arguments("names", "grown", **common, train__steps=1500), cwd=tmp_path)
  whole = common | {"train__steps": 1500, "optimizer__decay_steps": 1000}
  children.train(*children.arguments("names", "whole", **whole), cwd=tmp_path)
  (tmp_path / "grown" / "samples" / "step_1000.txt").unlink()
  children.assert_same(children.bits(tmp_path / "grown"), children.bits(tmp_path / "whole"))
  rates = [
    row["train/lr"]
    for row in map(json.loads, (tmp_path / "grown" / "metrics.jsonl").read_text().splitlines())
    if "train/lr" in row
  ]
  assert rates[1000:] == [rates[1000]] * 500 and rates[1000] == pytest.approx(0.001)


@pytest.mark.slow
def test_row_12_growing_at_a_rate_of_zero_says_what_to_set(tmp_path):
  """And what it says works."""
  children.write_texts(tmp_path)
  children.train(*children.arguments("names", "run", train__steps=20), cwd=tmp_path)
  before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
  refused = children.run(
    "jgpt.run", *children.arguments("names", "run", train__steps=30), cwd=tmp_path
  )
  assert (
    refused.status == 2
    and refused.err.count("\n") == 1
    and "--set optimizer.decay_steps=30" in refused.err
  )
  assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
  advised = children.arguments("names", "another", train__steps=30, optimizer__decay_steps=30)
  assert children.train(*advised, cwd=tmp_path).status == 0


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("names", {"optimizer__schedule": "constant", "optimizer__skip_spikes": 5.0}),
    ("bytes", {"optimizer__schedule": "cosine", "train__micro_batch_size": 2}),
    ("epochs", {"optimizer__schedule": "wsd"}),
  ],
)
def test_row_12_options_of_jax_in_the_environment_change_no_bit(name, changes, tmp_path):
  """64-bit types and another implementation of random keys: initial weights, batches, dropout,
  sampled evaluations and samples are the plain run's, also where a run goes on with them.

  Each start records what is not the default, and says so.
  """
  children.write_texts(tmp_path)
  common = {"optimizer__decay_steps": 8, "train__eval_batches": 1}
  common |= {"model__dropout": 0.1, "model__dropout_places": "mlp_out"}

  def train(workdir, steps, **env):
    words = children.arguments(name, workdir, **common, **changes, train__steps=steps)
    return children.train(*words, cwd=tmp_path, env=env)

  train("plain", 4)
  train("plain", 8)
  options = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg"}
  train("other", 4, JAX_ENABLE_X64="1")
  out = train("other", 8, **options).out
  children.assert_same(children.bits(tmp_path / "other"), children.bits(tmp_path / "plain"))
  assert "may change results: JAX_ENABLE_X64=True, JAX_DEFAULT_PRNG_IMPL=rbg" in out
  starts = [json.loads((tmp_path / at / "env.json").read_text()) for at in ("plain", "other")]
  found = [
    [{name: x for name, x in start["numeric_options"].items() if "jax" in name} for start in part]
    for part in starts
  ]
  x64 = {"jax_enable_x64": True}
  assert found == [[{}, {}], [x64, x64 | {"jax_default_prng_impl": "rbg"}]]
  assert all(start["keys"] == "threefry2x32" for part in starts for start in part)
