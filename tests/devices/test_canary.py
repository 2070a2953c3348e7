"""The check of the compiler finds what is wrong, says what to do, and is made once."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import CPU, GPU
from small_runs import compiled_quickly

from jgpt import run
from jgpt.config.catalog import list_experiments, load_experiment
from jgpt.config.experiment import NUM_GROUPS, PLAIN
from jgpt.config.settings import change, resolve
from jgpt.data.sources import expected_vocab_size
from jgpt.devices import canary
from jgpt.devices.compute import FUSIONS, keep_known_options, resolve_compute
from jgpt.step import loss_and_grads

CHANGES = {"model.num_layers": 1, "data.batch_size": 2, "mesh.data": 1, "data.seq_len": 8}
IN_CI = (
  "names",
  "shakespeare_char_cpu",
  "gpt2_shakespeare",
)  # of the others shapes and functions are much the same


def resolved(name, **changes):
  experiment = change(load_experiment(name), changes)
  return resolve(experiment, expected_vocab_size(experiment.data), 100)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("JGPT_CACHE_DIR", str(tmp_path / "cache"))
  return tmp_path / "cache" / "canary.json"


def miscompile(wrong):
  """Gradients that go through `wrong` unless all is plain, as under a compiler with a fault."""

  def wrong_grads(params, batch, step, experiment):
    loss, grads = loss_and_grads(params, batch, step, experiment)
    if experiment.compute == PLAIN:
      return loss, grads
    return loss, grads | {"tok_embed": wrong(grads["tok_embed"])}

  return wrong_grads


@pytest.mark.slow
def test_a_sound_compiler_passes():
  check = canary.compare_compiled(resolved("shakespeare_bytes", **CHANGES), CPU)
  assert check.passed and check.difference < 1e-5 and check.sound == ()
  assert "gradients agree with float64" in canary.describe_comparison(check)


@pytest.mark.parametrize(
  ("wrong", "passes"),
  [
    pytest.param(lambda g: g, True, id="sound"),
    pytest.param(lambda g: jnp.roll(g, 1, axis=0), False, id="shifted"),
    pytest.param(lambda g: g.at[0].set(jnp.nan), False, id="nan"),
    pytest.param(lambda g: g * 1.1, False, id="scaled"),
  ],
)
@pytest.mark.slow
def test_gradients_in_bfloat16_are_compared_by_what_its_digits_allow(monkeypatch, wrong, passes):
  monkeypatch.setattr(canary, "loss_and_grads", miscompile(wrong))
  changes = CHANGES | {"compute.dtype": "bfloat16"}
  check = canary.compare_compiled(resolved("shakespeare_bytes", **changes), CPU)
  assert check.passed == passes and check.dtype == "bfloat16"
  words = canary.describe_comparison(check)
  if passes:
    assert check.difference > canary.TOLERANCES["float32"] and check.cosine > 0.9999
    assert "gradients in bfloat16, cosine 0.9999" in words
  else:
    assert check.leaf == "tok_embed" and "--set compute.dtype=float32" in words


@pytest.mark.parametrize(
  "wrong",
  [
    pytest.param(lambda g: g.at[3, 5].add(0.01), id="one entry"),
    pytest.param(lambda g: g.at[0].set(jnp.nan), id="nan", marks=pytest.mark.slow),
    pytest.param(lambda g: g * 1.001, id="scaled", marks=pytest.mark.slow),
    pytest.param(lambda g: jnp.roll(g, 1, axis=0), id="shifted", marks=pytest.mark.slow),
    pytest.param(jnp.zeros_like, id="lost", marks=pytest.mark.slow),
  ],
)
@pytest.mark.slow
def test_a_wrong_gradient_is_found_and_what_helps_is_named(monkeypatch, wrong):
  monkeypatch.setattr(canary, "loss_and_grads", miscompile(wrong))
  check = canary.compare_compiled(resolved("shakespeare_bytes", **CHANGES), CPU)
  assert not check.passed and check.leaf == "tok_embed" and check.sound == ("plain",)
  words = canary.describe_comparison(check)
  assert (
    words.startswith("WARNING") and "tok_embed" in words and "--set compute.tricks=false" in words
  )


@pytest.mark.slow
def test_it_is_compiled_as_a_run_of_all_layers_is(monkeypatch):
  """Two layers of a large model are a small one, whose steps have no fusions."""
  experiment, seen = resolved("names", **{"model.num_layers": 40}), []
  right = canary.choose_step_options
  monkeypatch.setattr(
    canary, "choose_step_options", lambda chosen: seen.append(chosen) or right(chosen)
  )
  canary.compare_compiled(experiment, CPU)
  assert [right(chosen) for chosen in seen] == [{}] and seen[0].model.num_layers == 40


def test_where_nothing_helps_it_says_so():
  words = canary.describe_comparison(canary.Comparison(0.5, "unembed", (), 1.0))
  assert "No way of compiling agrees" in words
  words = canary.describe_comparison(canary.Comparison(0.5, "unembed", ("without fusions",), 1.0))
  assert 'XLA_FLAGS="--xla_cpu_experimental_ynn_fusion_type="' in words


def test_the_flag_that_it_advises_is_one_that_the_compiler_knows():
  without_fusions = {FUSIONS: ""} if jax.__version_info__ >= (0, 8, 3) else {}
  assert keep_known_options({FUSIONS: ""}) == without_fusions


def test_it_is_made_once_and_again_for_another_version(cache, monkeypatch):
  experiment, sound = resolved("shakespeare_char_cpu"), canary.Comparison(1e-7, "unembed", (), 0.1)
  monkeypatch.setattr(canary, "compare_compiled", lambda experiment, device: sound)
  assert canary.compare_once(experiment, CPU) is sound
  assert canary.compare_once(experiment, CPU) is None
  assert len(json.loads(cache.read_text(encoding="utf-8"))) == 1
  monkeypatch.setattr(canary.jaxlib, "__version__", "99.0")
  assert canary.compare_once(experiment, CPU) is sound
  assert len(json.loads(cache.read_text(encoding="utf-8"))) == 2


def test_what_failed_is_checked_again(cache, monkeypatch):
  failed = canary.Comparison(1.0, "unembed", (), 0.1)
  monkeypatch.setattr(canary, "compare_compiled", lambda experiment, device: failed)
  for _ in range(2):
    assert canary.compare_once(resolved("shakespeare_char_cpu"), CPU) is failed
  assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe"])
def test_a_damaged_record_is_no_record(cache, monkeypatch, content):
  cache.parent.mkdir()
  cache.write_bytes(content)
  sound = canary.Comparison(1e-7, "unembed", (), 0.1)
  monkeypatch.setattr(canary, "compare_compiled", lambda experiment, device: sound)
  experiment = resolved("shakespeare_char_cpu")
  assert (
    canary.compare_once(experiment, CPU) is sound and canary.compare_once(experiment, CPU) is None
  )


def test_what_has_no_fusions_is_not_checked(cache):
  assert canary.compare_once(resolved("names"), CPU) is None
  assert canary.compare_once(resolved("gpt2_shakespeare"), GPU) is None
  assert not cache.exists()


@pytest.mark.slow
@pytest.mark.parametrize("difference", [1e-7, 0.5])
def test_the_first_run_with_fusions_says_what_was_found(
  cache, folder, monkeypatch, capsys, difference
):
  """After the samples, once; what is wrong is a warning on stderr, at every run."""
  folder({"verse.txt": "To be, or not to be, that is the question:\n" * 20})
  checks = []
  found = canary.Comparison(difference, "unembed", ("plain",), 0.1)
  monkeypatch.setattr(canary, "compare_compiled", lambda *args: checks.append(args) or found)
  changes = {
    "data.path": "verse.txt",
    "data.seq_len": 8,
    "data.batch_size": 2,
    "model.max_seq_len": 8,
    "train.steps": 2,
  }
  changes |= {"mesh.data": 1, "sample.max_tokens": 4, "sample.num": 1}
  changes |= {"train.eval_every": "none", "train.sample_every": "none"}
  changes |= {"compute.tricks": "true", "optimizer.warmup_steps": 0}
  arguments = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
  for number in range(2):
    with compiled_quickly():
      assert (
        run.main(["--experiment", "shakespeare_bytes", *arguments, "--workdir", f"run{number}"])
        == 0
      )
    out, err = capsys.readouterr()
    line = canary.describe_comparison(found)
    if difference > canary.TOLERANCES["float32"]:
      assert line in err and line not in out
    else:
      assert (line in out) == (number == 0)
  assert len(checks) == (1 if difference < canary.TOLERANCES["float32"] else 2)


@pytest.mark.parametrize(
  ("seq_len", "batch_size"), [(16, 16), (16, 500), (450, 16), (1024, 16), (16, 1)]
)
def test_the_batch_can_be_cut_into_groups_where_documents_are_grouped(seq_len, batch_size):
  changes = {"data.seq_len": seq_len, "model.max_seq_len": 1024, "data.batch_size": batch_size}
  experiment = resolve_compute(resolved("names", **changes), CPU)
  assert experiment.compute.group_documents == (batch_size >= 16)
  batch = canary.draw_batch(experiment)
  assert batch.inputs_BT.shape[1] == seq_len and batch.inputs_BT.size <= max(
    canary.MAX_TOKENS, 4 * seq_len
  )
  assert batch_size == 1 or len(batch.inputs_BT) % NUM_GROUPS == 0
  assert float(batch.weights_BT.sum(axis=1).min()) >= 1


def test_a_micro_batch_is_as_much_as_is_checked():
  """The check after a run takes no more sequences at once than its updates."""
  experiment = resolved("names", **{"data.batch_size": 8, "train.micro_batch_size": 2})
  assert canary.draw_batch(resolve_compute(experiment, CPU)).inputs_BT.shape == (2, 16)


def test_a_check_that_fails_to_run_spoils_nothing(monkeypatch, capsys):
  def out_of_memory(*args):
    raise MemoryError("no more")

  monkeypatch.setattr(canary, "compare_once", out_of_memory)
  run.print_compiler_check(SimpleNamespace(experiment=None), "cpu")
  assert "could not be checked: no more" in capsys.readouterr().err


@pytest.mark.slow
def test_grouped_documents_pass_too():
  assert canary.compare_compiled(resolved("names", **{"data.batch_size": 16}), CPU).passed


def test_a_difference_that_is_not_a_number_is_the_worst():
  expected = {"a": np.ones(2), "b": np.ones(2)}
  assert canary.find_worst(expected, {"a": np.array([1, 1.5]), "b": np.array([1, np.nan])}) == (
    "b",
    float("inf"),
  )
  assert canary.find_worst(expected, {"a": np.array([1, 1.5]), "b": np.ones(2)}) == ("a", 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in IN_CI else pytest.mark.exhaustive)
    for name in list_experiments()
    if name != "microgpt"
  ],
)
def test_this_compiler_is_sound_at_every_experiments_shapes(name):
  """Loss and every gradient, as a run compiles them, with XLA's fusions and without, within 1e-5 of
  float64, and in bfloat16 within 2%.
  """
  experiment = resolved(name)
  for on in (True, False):
    check = canary.compare_compiled(change(experiment, {"compute.tricks": on}), CPU)
    assert check.passed, check
    assert check.difference < (1e-5 if check.dtype == "float32" else 0.02), check
