"""Each value of `experiment.compute` computes the plain definition, and what "auto" becomes.

What is compared is named with its tolerance; float64 hides nothing behind rounding.
"""

import dataclasses
import functools
import itertools
import json
import typing
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import switches
from equivalence import (
  CPU,
  GPU,
  GRADIENT_TOLERANCE,
  LOSS_TOLERANCE,
  NAMES,
  OLD_GPU,
  QUICK,
  TPU,
  batch_of,
  cast,
  compare,
  corpus_of,
  initial_params,
  names_experiment,
  oracle_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import compiled_quickly

import jgpt.devices.kernels
from jgpt import batches, program
from jgpt.attention import attention
from jgpt.config import ComputeConfig
from jgpt.config.catalog import list_experiments, load_experiment
from jgpt.config.checks import alternatives, choices
from jgpt.config.experiment import PLAIN, may_group_documents
from jgpt.config.settings import change, format_value, resolve
from jgpt.devices import compute as device_compute
from jgpt.devices import runtime
from jgpt.devices.compute import (
  FUSIONS,
  choose_quick_options,
  choose_step_options,
  describe_products,
  explain_compute,
  explain_products,
  is_grouping_worthwhile,
  keep_known_options,
  resolve_compute,
)
from jgpt.devices.kernels import find_compile_error
from jgpt.generate import decode_step, prefill
from jgpt.params import count_params
from jgpt.plan import plan_run
from jgpt.report.summary import describe_plan
from jgpt.sharding import arrange_blocks, stack_blocks
from jgpt.step import begin_state, loss_and_grads, train_steps
from jgpt.system.precision import enable_x64
from jgpt.train import train_run

# Four groups of documents: cut at the context, shorter than half of it, and one that fits half of
# it exactly.
DOCUMENTS = (*NAMES, "a", "ab", "abcdefg", "abcdefgh", "zoe", "o", "mary", "bartholomewjames")
DEVICES = (CPU, GPU, OLD_GPU, TPU)
# Of loss and gradients, relative to the leaf's largest entry, in float64.
TOLERANCE = 1e-10


def values_of(hint):
  """Every value that a field of this type takes; of numbers two."""
  words = choices(hint)
  numbers = (1, 4) if int in alternatives(hint) else ()
  return [*words, *numbers, *((True, False) if bool in alternatives(hint) else ())]


FUSED = ("cudnn", "splash")  # kernels that no CPU has; `tests/test_attention.py` compares them
VALUES = {
  name: [value for value in values_of(hint) if value not in FUSED]
  for name, hint in typing.get_type_hints(ComputeConfig).items()
  if name not in ("tricks", "dtype")  # bfloat16 has digits of its own: `test_bfloat16.py`
}
# What differs from the definition: "auto" stays in one field only, where it stands for options.
FASTER = [
  (name, value)
  for name, values in VALUES.items()
  for value in values
  if value != getattr(PLAIN, name) and (value != "auto" or name == "compiler_options")
]
ALL_FASTER = dict(FASTER)


def resolved(name, **changes):
  experiment = load_experiment(name)
  experiment = change(experiment, {k.replace("__", "."): v for k, v in changes.items()})
  return resolve(experiment, {"names": 27}.get(name, 50257 if "gpt2" in name else 256))


def made(experiment, **fields):
  """The experiment with every choice the definition's, but for those that are given."""
  return dataclasses.replace(experiment, compute=dataclasses.replace(PLAIN, **fields))


def compute_grads(experiment, params, batch, options=None):
  """Loss and gradients of step 3 as one program, blocks stacked."""

  def run(params):
    params = arrange_blocks(params, experiment.compute.layers)
    loss, grads = loss_and_grads(params, batch, 3, experiment)
    return {"loss": loss, **stack_blocks(grads)}

  return jax.jit(run, compiler_options=QUICK if options is None else options)(params)


@pytest.fixture
def kernels_compile(monkeypatch):
  """Lets every kernel compile for devices that are names only."""
  monkeypatch.setattr(jgpt.devices.kernels, "find_compile_error", lambda *_: None)


# --- Which ---


def test_every_field_has_a_definition_and_another_way():
  """A field or value that is added is compared below without being listed there."""
  assert all(getattr(PLAIN, name) in values for name, values in VALUES.items())
  assert {name for name, _ in FASTER} == set(VALUES) == set(ALL_FASTER)
  assert "auto" not in dataclasses.asdict(PLAIN).values() and PLAIN.tricks is False
  assert FASTER == [
    ("precision", "high"),
    ("precision", "highest"),
    ("attention", "blocks"),
    ("matmul", "flat"),
    ("layers", "unroll"),
    ("remat", "elementwise"),
    ("remat", "block"),
    ("loss_chunks", 4),
    ("group_documents", True),
    ("select", "ordered"),
    ("compiler_options", "auto"),
  ]


def test_every_field_is_auto_unless_it_is_set():
  """No experiment that comes with jgpt chooses for the platform."""
  autos = {"dtype": "auto"} | dict.fromkeys(VALUES, "auto")
  chosen = {"tricks": True, "precision": "default"}
  assert dataclasses.asdict(ComputeConfig()) == autos | chosen
  for name in list_experiments():
    assert load_experiment(name).compute == ComputeConfig()


@pytest.mark.parametrize("name", list_experiments())
def test_one_setting_turns_all_of_them_off(name):
  """On every platform: what is left is a plain `jax.jit` of the plain definition."""
  for batch_size in (1, 64):
    changes = {"data__batch_size": batch_size, "train__micro_batch_size": None}
    experiment = resolved(name, **changes, compute__tricks=False)
    for device in DEVICES:
      chosen = resolve_compute(experiment, device)
      assert chosen == dataclasses.replace(experiment, compute=PLAIN)
      assert choose_step_options(chosen) == choose_quick_options(chosen) == {}


@pytest.mark.parametrize("device", [GPU, OLD_GPU, TPU], ids=lambda device: device.device_kind)
def test_accelerators_have_choices_of_their_own(device, kernels_compile):
  """Those of a CPU switch themselves off; what was compiled for an accelerator is chosen there."""
  for name in list_experiments():
    experiment = resolved(name)
    chosen = resolve_compute(experiment, device)
    dtype, attention = "float32" if device is OLD_GPU else "bfloat16", "plain"
    if experiment.data.seq_len >= 256:
      drops = experiment.model.dropout and "attention" in experiment.model.dropout_places
      kernel = {GPU: "cudnn", TPU: "splash"}.get(device)
      blocks = "blocks" if experiment.data.seq_len >= 512 else "plain"
      attention = kernel if kernel and not drops else blocks
    expected = dataclasses.replace(PLAIN, tricks=True, dtype=dtype, attention=attention)
    if device is not TPU:
      expected = dataclasses.replace(expected, remat="elementwise")
    elif experiment.model.num_layers > 1:
      expected = dataclasses.replace(expected, layers="unroll")
    assert chosen.compute == expected
    assert choose_step_options(chosen) == choose_quick_options(chosen) == {}


@pytest.mark.parametrize(
  ("device", "changes", "wanted", "chosen", "words"),
  [
    (TPU, {}, "auto", "splash", None),
    (GPU, {}, "auto", "cudnn", None),
    (OLD_GPU, {}, "auto", "blocks", None),
    (CPU, {}, "auto", "blocks", None),
    (TPU, {"data__seq_len": 128}, "auto", "plain", None),
    (GPU, {"compute__dtype": "float32"}, "auto", "blocks", None),
    (TPU, {"compute__dtype": "float32"}, "auto", "splash", None),
    (TPU, {"compute__tricks": False}, "auto", "plain", None),
    (TPU, {"data__seq_len": 128}, "splash", "splash", None),
    (TPU, {"compute__tricks": False}, "splash", "splash", None),
    (TPU, {"model__dropout": 0.1}, "auto", "blocks", "in place of splash: splash has no dropout"),
    (GPU, {"model__dropout": 0.1}, "cudnn", "blocks", "in place of cudnn: cuDNN has no dropout"),
    (GPU, {"model__num_heads": 64}, "auto", "blocks", "head sizes that are multiples of 8 up to"),
    (OLD_GPU, {}, "cudnn", "blocks", "in place of cudnn: cuDNN computes in bfloat16 or float16"),
    (CPU, {}, "splash", "blocks", "in place of splash: it is for platform tpu, not cpu"),
    (TPU, {"compute__tricks": False}, "cudnn", "plain", "it is for platform gpu, not tpu"),
    (GPU, {}, "plain", "plain", None),
  ],
)
def test_attention_is_the_kernel_of_the_device_or_a_line_says_why_not(
  device, changes, wanted, chosen, words, kernels_compile
):
  """By "auto" and by name; a line is for a kernel that was tried or asked for."""
  settings = {"data__seq_len": 512, "compute__attention": wanted, "model__dropout": 0.0}
  settings["model__dropout_places"] = ("attention",)
  experiment = resolved("gpt2_shakespeare", **settings | changes)
  assert resolve_compute(experiment, device).compute.attention == chosen
  lines = explain_compute(experiment, device)
  assert len(lines) == (words is not None)
  assert not lines or (f"attention={chosen} in place of" in lines[0] and words in lines[0])


def test_a_kernel_that_does_not_compile_is_replaced():
  """Tried on this CPU, for which neither kernel exists; the compiler's own words are repeated."""
  error = find_compile_error("splash", (1, 128, 2, 8), "float32", jax.devices()[0])
  assert error.startswith("it does not compile: ") and "interpret mode" in error
  assert find_compile_error("blocks", (1, 128, 2, 8), "float32", jax.devices()[0]) is None
  experiment = resolved("gpt2_shakespeare", data__seq_len=512, model__dropout=0.0)
  (line,) = explain_compute(experiment, TPU)  # which is no device that JAX could compile for
  assert line.startswith("attention=blocks in place of splash: it does not compile: ")


@pytest.mark.parametrize("name", list_experiments())
def test_only_compute_is_resolved_and_no_auto_is_left(name):
  """Resolving again changes nothing, and but for the compiler's options every choice is a value."""
  for tricks, device in itertools.product((True, False), DEVICES):
    experiment = resolved(name, compute__tricks=tricks)
    chosen = resolve_compute(experiment, device)
    assert chosen == dataclasses.replace(experiment, compute=chosen.compute)
    assert resolve_compute(chosen, device) == chosen
    fields = dataclasses.asdict(chosen.compute)
    assert [field for field, value in fields.items() if value == "auto"] in (
      [],
      ["compiler_options"],
    )


def test_each_is_chosen_where_it_helps():
  chosen = {
    "names": resolved("names"),
    "batch": resolved("names", data__batch_size=16),
    "gpt2": resolved("gpt2_shakespeare"),
  }
  chosen = {name: resolve_compute(experiment, CPU) for name, experiment in chosen.items()}
  layers = {name: experiment.compute.layers for name, experiment in chosen.items()}
  assert layers == {"names": "scan", "batch": "scan", "gpt2": "unroll"}
  groups = {name: experiment.compute.group_documents for name, experiment in chosen.items()}
  assert groups == {"names": False, "batch": True, "gpt2": False}
  assert {experiment.compute.matmul for experiment in chosen.values()} == {"flat"}
  options = {name: choose_step_options(experiment) for name, experiment in chosen.items()}
  wanted = {"xla_backend_optimization_level": 1, "xla_cpu_multi_thread_eigen": False, FUSIONS: ""}
  assert options["names"] == keep_known_options(wanted)
  assert options["gpt2"] == {} and options["batch"] == options["names"]
  assert all(choose_quick_options(experiment) for experiment in chosen.values())
  for seq_len, way in ((64, "plain"), (254, "plain"), (256, "blocks")):
    experiment = resolved("shakespeare_char", data__seq_len=seq_len)
    assert resolve_compute(experiment, CPU).compute.attention == way


@pytest.mark.parametrize("flag", ["avx512_bf16", None])
def test_large_models_take_bfloat16_where_the_processor_multiplies_it(flag, monkeypatch):
  """And the compiler has what makes it do so; what is asked for wins."""
  monkeypatch.setattr(device_compute, "find_bfloat16", lambda: flag)
  dtypes = {n: resolve_compute(resolved(n), CPU).compute.dtype for n in list_experiments()}
  large = {n for n in dtypes if count_params(resolved(n).model) >= 500_000}
  assert {"shakespeare_char_cpu", "gpt2_shakespeare"} <= large and "names" not in large
  has_fusions = FUSIONS in keep_known_options({FUSIONS: ""})
  chosen = {n for n, dtype in dtypes.items() if dtype == "bfloat16"}
  assert chosen == (large if flag and has_fusions else set())
  for changes in ({"compute__tricks": False}, {"compute__dtype": "float32"}):
    gpt2 = resolve_compute(resolved("gpt2_shakespeare", **changes), CPU)
    assert gpt2.compute.dtype == "float32"


@pytest.mark.parametrize(
  "unknown", [{}, {"xla_no_such": True}, {"xla_backend_optimization_level": "high"}, {"": 1}]
)
def test_options_that_the_compiler_does_not_know_are_left_out(unknown):
  known = {"xla_cpu_multi_thread_eigen": False, "xla_llvm_disable_expensive_passes": True}
  kept = keep_known_options(unknown | known)
  assert kept == known
  assert jax.jit(lambda x: x + 1, compiler_options=kept)(1.0) == 2.0


@pytest.mark.parametrize(
  ("field", "value"),
  [(field, value) for field, values in VALUES.items() for value in values if value != "auto"],
)
def test_a_value_that_is_given_wins(field, value):
  """With tricks and without, on every platform; the other fields are chosen as before."""
  for tricks, device in itertools.product((True, False), DEVICES):
    # "auto" would be: blocks, unroll and, of the second, groups.
    for name, changes in (
      ("gpt2_shakespeare", {"data__seq_len": 256}),
      ("names", {"data__batch_size": 16}),
    ):
      if field == "group_documents" and value and name != "names":
        continue
      experiment = resolved(name, **changes, compute__tricks=tricks)
      given = change(experiment, {f"compute.{field}": value})
      chosen = resolve_compute(given, device).compute
      others = resolve_compute(experiment, device).compute
      assert chosen == dataclasses.replace(others, **{field: value})


@pytest.mark.parametrize(
  "changes",
  [
    {"data__batch_size": 8},
    {"data__batch_size": 18},
    {"data__seq_len": 15},
    {"train__micro_batch_size": 4},
    {"model__dropout": 0.1, "model__dropout_places": ("mlp_out",)},
    {"mesh__data": 2},
  ],
  ids=lambda changes: next(iter(changes)),
)
def test_documents_are_not_grouped_where_that_would_be_wrong_or_slower(changes):
  """Where it would be wrong, it is refused where it is asked for."""
  assert is_grouping_worthwhile(resolved("names", data__batch_size=16))
  experiment = resolved("names", **{"data__batch_size": 16} | changes)
  assert not is_grouping_worthwhile(experiment)
  assert resolve_compute(experiment, CPU).compute.group_documents is False
  asked = {"compute.group_documents": True}
  if changes == {"data__batch_size": 8}:
    assert may_group_documents(change(experiment, asked))
    return
  with pytest.raises(ValueError, match=r"compute\.group_documents=true needs") as refused:
    change(experiment, asked)
  assert "--set compute.group_documents=auto" in str(refused.value)


# --- Said and recorded ---


@pytest.mark.slow
@pytest.mark.parametrize("tricks", [True, False])
def test_what_was_chosen_is_printed_and_recorded(tricks, tmp_path):
  """The start block and env.json hold the resolved values, with which the run computed."""
  changes = {"train.steps": 1, "compute.tricks": tricks, "compute.attention": "blocks"}
  planned = plan_run(change(load_experiment("names"), changes), workdir=tmp_path)
  assert planned.experiment.compute.matmul == "auto"
  chosen = dataclasses.asdict(resolve_compute(planned.experiment, CPU).compute)
  matmul = "flat" if tricks else "einsum"
  assert (chosen["matmul"], chosen["attention"], chosen["tricks"]) == (matmul, "blocks", tricks)
  line = dict(describe_plan(planned, jax.devices()))["compute"]
  assert line == " ".join(f"{name}={format_value(value)}" for name, value in chosen.items())
  assert line.startswith(f"tricks={str(tricks).lower()} dtype=float32 ")
  assert f" attention=blocks matmul={matmul} layers=scan" in line
  with compiled_quickly():
    result = train_run(planned)
  assert dataclasses.asdict(result.experiment.compute) == chosen
  (entry,) = json.loads((tmp_path / "env.json").read_text(encoding="utf-8"))
  assert entry["compute"] == chosen
  # The settings beside are what was asked for.
  assert entry["settings"]["compute.attention"] == "blocks"
  assert entry["settings"]["compute.matmul"] == "auto"


# --- The same: loss and every gradient ---


def small_experiment(**changes):
  """Two layers on 16 documents, of which every value of every field may be asked for."""
  return names_experiment(**{"model__num_layers": 2, "data__batch_size": 16} | changes)


@functools.cache
def documents_and_params(way):
  """An experiment, 16 documents, float64 parameters and what the definition makes of them.

  Args:
    way: "documents", or "system SYSTEM" for one of `switches.SYSTEMS`, whose gains and biases are
      drawn; or a place of dropout, or "micro-batches".
  """
  changes = {}
  if way == "micro-batches":
    changes = {"train__micro_batch_size": 4}
  elif way in DROPOUTS:
    changes = {"model__dropout": 0.3, "model__dropout_places": DROPOUTS[way]}
  experiment = small_experiment(**changes)
  params = initial_params(experiment.model)
  if way in switches.SYSTEMS:
    sizes = {name: getattr(experiment.model, name) for name in switches.SIZES}
    model = switches.make_model(switches.SYSTEMS[way], **sizes)
    experiment = dataclasses.replace(experiment, model=model)
    params = switches.draw_params(model)
  batch, params = batch_of((*DOCUMENTS, *NAMES[:3]), experiment), cast(params, "float64")
  assert batch.inputs_BT.shape == (16, 16)
  return experiment, batch, params, compute_grads(made(experiment), params, batch)


DROPOUTS = {
  "dropout": ("embedding", "attention", "attention_out", "activation", "mlp_out"),
  "dropout of attention": ("attention",),
}


@pytest.mark.parametrize(
  "system",
  ["GPT-2", *(pytest.param(s, marks=pytest.mark.slow) for s in switches.SYSTEMS if s != "GPT-2")],
)
@pytest.mark.parametrize(("field", "value"), FASTER)
def test_each_value_is_the_definition(x64, field, value, system):
  """Of networks with biases and gains and without them, in float64, each value alone."""
  experiment, batch, params, expected = documents_and_params(system)
  experiment = made(experiment, **{field: value})
  options = choose_step_options(experiment) if field == "compiler_options" else None
  assert options is None or options
  got = compute_grads(experiment, params, batch, options)
  compare(f"compute.{field}={value}, float64", expected, got, TOLERANCE)


@pytest.mark.parametrize("way", [*DROPOUTS, "micro-batches"])
@pytest.mark.parametrize(
  ("field", "value"),
  [
    pytest.param(*way, marks=() if way[0] == "attention" else pytest.mark.slow)
    for way in FASTER
    if way[0] != "group_documents"
  ],
)
def test_each_value_is_the_definition_with_dropout_and_in_parts(x64, field, value, way):
  """The same entries are dropped; the gradients of micro-batches add up to the same."""
  experiment, batch, params, expected = documents_and_params(way)
  experiment = made(experiment, **{field: value})
  options = choose_step_options(experiment) if field == "compiler_options" else None
  got = compute_grads(experiment, params, batch, options)
  compare(f"compute.{field}={value}, {way}, float64", expected, got, TOLERANCE)


def test_dropout_and_micro_batches_matter(x64):
  """What the test above compares are different numbers: entries are dropped."""
  losses = [float(documents_and_params(way)[-1]["loss"]) for way in DROPOUTS]
  experiment, batch, params, _ = documents_and_params("micro-batches")
  losses.append(float(compute_grads(made(experiment), params, batch)["loss"]))
  assert len(set(losses)) == len(losses)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_values_at_once_are_the_definition(dtype):
  """What "auto" may come to: no value is the definition's, with the options of the step."""
  with enable_x64(dtype == "float64"):
    experiment = small_experiment()
    batch = batch_of((*DOCUMENTS, *NAMES[:3]), experiment)
    params = cast(initial_params(experiment.model), dtype)
    expected = compute_grads(made(experiment), params, batch)
    faster = made(experiment, **ALL_FASTER)
    got = compute_grads(faster, params, batch, choose_step_options(faster))
  label = f"compute, all at once, {dtype}"
  compare(label, {"loss": expected.pop("loss")}, {"loss": got.pop("loss")}, LOSS_TOLERANCE[dtype])
  compare(label, expected, got, GRADIENT_TOLERANCE[dtype])


@pytest.mark.slow
def test_the_definition_is_the_definition_whatever_tricks_says(x64):
  """`tricks` says what "auto" means, and nothing else: with it no bit changes."""
  experiment, batch, params, expected = documents_and_params("GPT-2")
  got = compute_grads(made(experiment, tricks=True), params, batch)
  compare("compute.tricks, float64", expected, got, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value"), FASTER)
def test_each_value_makes_the_same_updates(x64, field, value):
  """Five updates in one call: losses, parameters and both moments in float64."""
  experiment = small_experiment(optimizer__decay_steps=20)
  corpus = corpus_of((*DOCUMENTS, *NAMES[:3]), experiment)
  params = cast(initial_params(experiment.model), "float64")

  def train(experiment, options):
    def run(params):
      state = begin_state(arrange_blocks(params, experiment.compute.layers), experiment)
      state, metrics = train_steps(state, corpus, jnp.int32(5), experiment, capacity=5)
      return stack_blocks(state.params), stack_blocks(state.opt_state["adam"].nu), metrics

    return jax.jit(run, compiler_options=options)(cast(params, "float64"))

  faster = made(experiment, **{field: value})
  expected = train(made(experiment), QUICK)
  got = train(faster, choose_step_options(faster) or QUICK)
  compare(f"compute.{field}={value}, 5 updates, float64", expected, got, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
  "field", [field for field in VALUES if field in ("attention", "matmul", "layers")]
)
def test_each_value_decodes_the_same(x64, field):
  """Logits and cache of a prompt and a token after it, in float64."""
  experiment, batch, params, _ = documents_and_params("GPT-2")

  def decode(experiment):
    compute = experiment.compute

    def run(params):
      params, model = arrange_blocks(params, compute.layers), experiment.model
      cache = prefill(params, batch.inputs_BT[:, :8], 12, model, compute)
      logits, cache = decode_step(params, batch.inputs_BT[:, 8], cache, 8, model, compute)
      if not isinstance(cache, tuple):
        cache = jax.tree.map(lambda *layers: jnp.stack(layers), *cache)
      return {"logits": logits, "cache": cache}

    return jax.jit(run, compiler_options=QUICK)(params)

  expected, got = decode(made(experiment)), decode(made(experiment, **{field: ALL_FASTER[field]}))
  compare(f"decoding, compute.{field}, float64", expected, got, TOLERANCE)


# --- Grouping documents ---


def group(experiment):
  return made(experiment, group_documents=True)


@pytest.mark.slow
def test_grouped_documents_have_the_oracles_gradient(x64):
  """The mean over a batch of names, each by scalar autodiff: weighted by its predictions."""
  experiment, documents = names_experiment(data__batch_size=12), DOCUMENTS[:12]
  batch = batch_of(documents, experiment)
  counts = np.asarray(batch.weights_BT, np.float64).sum(axis=1)
  ones = [oracle_gradients(experiment.model, document) for document in documents]
  share = counts / counts.sum()
  loss = np.float64(sum(s * loss for s, (loss, _) in zip(share, ones, strict=True)))
  expected = jax.tree.map(
    lambda *leaves: sum(s * x for s, x in zip(share, leaves, strict=True)), *(g for _, g in ones)
  )
  params = cast(initial_params(experiment.model), "float64")
  got = compute_grads(group(experiment), params, batch)
  tolerance = GRADIENT_TOLERANCE["float64"]
  compare("scalar gradients, documents grouped", expected | {"loss": loss}, got, tolerance)


@functools.cache
def both():
  """The two ways, compiled once for float64."""
  experiment = small_experiment()
  ways = [
    jax.jit(
      functools.partial(loss_and_grads, step=0, experiment=way(experiment)), compiler_options=QUICK
    )
    for way in (group, made)
  ]
  return ways, experiment.model


@given(
  lengths=st.lists(st.integers(0, 16), min_size=16, max_size=16).filter(any),
  seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_grouping_documents_changes_nothing_for_any_lengths(lengths, seed):
  """Also for empty rows, for groups that all need the second half, and for none that does."""
  with enable_x64(True):
    (grouped, plain), config = both()
    params = cast(initial_params(config), "float64")
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, 27, (16, 17)), jnp.int32)
    weights = (np.arange(16) < np.array(lengths)[:, None]).astype(np.float32)
    batch = batches.Batch(tokens[:, :-1], tokens[:, 1:], jnp.asarray(weights))
    expected, got = (
      dict(zip(("loss", "grads"), way(params, batch), strict=True)) for way in (plain, grouped)
    )
  compare("documents grouped, float64", expected, got, TOLERANCE)


def test_what_is_not_computed_cannot_reach_the_gradient():
  """Tokens after the end of a short document change no bit: their gradient is zero either way."""
  experiment = group(names_experiment(data__batch_size=12))
  batch = batch_of(DOCUMENTS[:12], experiment)
  other = batch._replace(inputs_BT=jnp.where(batch.weights_BT > 0, batch.inputs_BT, 5))
  grouped = jax.jit(
    functools.partial(loss_and_grads, step=0, experiment=experiment), compiler_options=QUICK
  )
  params = cast(initial_params(experiment.model), "float32")
  one, two = (jax.tree.leaves(grouped(params, x)) for x in (batch, other))
  for a, b in zip(one, two, strict=True):
    np.testing.assert_array_equal(a, b)


def test_grouping_computes_short_documents_at_half_of_the_positions():
  """The program has both branches: one of 16 positions, and one of 8."""
  experiment = group(small_experiment())
  batch = batch_of((*DOCUMENTS, *NAMES[:3]), experiment)
  params = initial_params(experiment.model)
  text = str(jax.make_jaxpr(lambda p, b: loss_and_grads(p, b, 0, experiment))(params, batch))
  vocab_size = experiment.model.vocab_size
  assert f"f32[4,8,{vocab_size}]" in text and f"f32[4,16,{vocab_size}]" in text


# --- Attention in blocks ---


def test_attention_in_blocks_computes_less():
  """Its products are five eighths of the whole square's."""
  q = jax.ShapeDtypeStruct((1, 64, 1, 5), jnp.float32)
  jaxprs = [
    jax.make_jaxpr(functools.partial(attention, implementation=way))(q, q, q)
    for way in ("plain", "blocks")
  ]

  def scores(jaxpr):
    """Entries of products over the head's 5 dimensions: queries times keys."""
    dots = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    over = [
      (e, [e.invars[0].aval.shape[d] for d in e.params["dimension_numbers"][0][0]]) for e in dots
    ]
    return sum(e.outvars[0].aval.size for e, sizes in over if sizes == [5])

  whole, blocks = (scores(jaxpr.jaxpr) for jaxpr in jaxprs)
  assert whole == 64 * 64 and blocks == whole * 5 // 8


# --- Whole runs ---


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["names", pytest.param("shakespeare_bytes", marks=pytest.mark.exhaustive)]
)
def test_a_run_with_and_without_is_one_run(name, tmp_path):
  """Losses agree but for rounding, and a run goes on either way from the other's checkpoint."""
  changes = {"train.steps": 6, "data.batch_size": 16, "mesh.data": 1, "optimizer.decay_steps": 12}
  fast = change(load_experiment(name), changes)
  plain = change(fast, {"compute.tricks": False})
  longer = {"train.steps": 12}
  with compiled_quickly():
    whole = {
      way: train_run(plan_run(change(e, longer))) for way, e in (("fast", fast), ("plain", plain))
    }
    assert whole["plain"].experiment.compute == PLAIN != whole["fast"].experiment.compute
    np.testing.assert_allclose(whole["fast"].losses, whole["plain"].losses, rtol=2e-5)
    train_run(plan_run(fast, workdir=tmp_path))
    went_on = train_run(plan_run(change(plain, longer), workdir=tmp_path))
  np.testing.assert_allclose(went_on.losses, whole["plain"].losses, rtol=2e-5)


@pytest.mark.slow
def test_a_run_with_attention_in_blocks_is_one_run():
  """256 positions, attention dropped out, micro-batches.

  The losses are those of the run without tricks but for rounding.
  """
  changes = {"train.steps": 4, "data.batch_size": 4, "mesh.data": 1, "train.micro_batch_size": 2}
  changes |= {"model.dropout": 0.2, "model.dropout_places": ("attention", "mlp_out")}
  changes |= {"model.max_seq_len": 256, "data.seq_len": 256}
  fast = change(load_experiment("shakespeare_bytes"), changes)
  assert resolve_compute(resolve(fast, 256, 10), CPU).compute.attention == "blocks"
  with compiled_quickly():
    losses = [
      train_run(plan_run(change(fast, {"compute.tricks": on}))).losses for on in (True, False)
    ]
  np.testing.assert_allclose(*losses, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("on", [True, False], ids=["tricks", "plain"])
def test_a_run_that_stops_and_goes_on_has_the_bits_of_one_that_did_not(on, tmp_path):
  """What is skipped is a function of the batch: where the calls end changes nothing."""
  changes = {"train.steps": 8, "data.batch_size": 16, "optimizer.decay_steps": 8}
  experiment = change(load_experiment("names"), changes | {"compute.tricks": on})
  with compiled_quickly():
    whole = train_run(plan_run(experiment))
    train_run(plan_run(change(experiment, {"train.steps": 3}), workdir=tmp_path))
    resumed = train_run(plan_run(experiment, workdir=tmp_path))
  for a, b in zip(*(jax.tree.leaves(r.state) for r in (whole, resumed)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_program_is_made_as_chosen(monkeypatch):
  """`compile_program` resolves for the platform; the step is compiled with its options."""
  changes = {"mesh.data": 1, "model.num_layers": 2, "train.steps": 1}
  experiment = change(load_experiment("shakespeare_bytes"), changes)
  monkeypatch.setattr(program, "list_ahead", lambda *args: {})
  asked = []
  monkeypatch.setattr(program, "choose_step_options", lambda e: asked.append(e) or QUICK)
  for on, kind in ((True, list), (False, dict)):
    planned = plan_run(change(experiment, {"compute.tricks": on}))
    compiled = program.compile_program(planned.experiment, jax.devices(), planned.data)
    assert compiled.experiment == resolve_compute(planned.experiment, CPU)
    assert (compiled.experiment.compute == PLAIN) == (not on)
    assert isinstance(compiled.state.params["blocks"], kind)
    assert asked.pop() == compiled.experiment and not asked


BFLOAT16, TF32 = "float32 as bfloat16, one pass", "float32 as TF32"


@pytest.mark.parametrize(
  ("platform", "kind", "precision", "words"),
  [
    ("cpu", "cpu", None, "float32"),
    ("cpu", "cpu", "bfloat16", "float32"),
    ("tpu", "TPU v5 lite", None, BFLOAT16),
    ("tpu", "TPU v4", "default", BFLOAT16),
    ("tpu", "TPU v4", "bfloat16", BFLOAT16),
    ("tpu", "TPU v6 lite", "tensorfloat32", "float32 as bfloat16, three passes"),
    ("tpu", "TPU v6 lite", "high", "float32 as bfloat16, three passes"),
    ("tpu", "TPU v5p", "highest", "float32"),
    ("tpu", "TPU v5p", "float32", "float32"),
    ("tpu", "TPU v5p", "BF16_BF16_F32_X6", "float32 as BF16_BF16_F32_X6"),
    *(
      ("gpu", kind, None, TF32)
      for kind in (
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H200",
        "NVIDIA L4",
        "NVIDIA A10G",
        "NVIDIA RTX A6000",
        "NVIDIA RTX 6000 Ada Generation",
        "NVIDIA GeForce RTX 3090",
        "NVIDIA GB200",
        "NVIDIA Thor",
      )
    ),
    *(
      ("gpu", kind, None, "float32")
      for kind in (
        "Tesla T4",
        "NVIDIA T4G",
        "Tesla V100-SXM2-16GB",
        "Tesla P100-PCIE-16GB",
        "Tesla K80",
        "Quadro RTX 8000",
        "NVIDIA GeForce RTX 2080 Ti",
        "NVIDIA GeForce GTX 1080",
        "NVIDIA TITAN RTX",
        "AMD Instinct MI300X",
      )
    ),
    ("gpu", "NVIDIA A100-SXM4-40GB", "high", TF32),
    ("gpu", "NVIDIA A100-SXM4-40GB", "highest", "float32"),
    ("gpu", "Tesla T4", "tensorfloat32", "float32"),
  ],
)
def test_it_is_said_in_which_precision_products_run(platform, kind, precision, words):
  assert describe_products(platform, kind, precision) == words
  sentence = explain_products(platform, kind, precision)
  form = words.removeprefix("float32 as ")
  assert f" in {form}{'' if 'X6' in form else ', which keeps about '}" in sentence
  assert ("compute.precision=highest keeps all 7" in sentence) == (words != "float32")
  with jax.default_matmul_precision(precision):  # jax knows it
    assert jax.config.jax_default_matmul_precision == precision
    assert runtime.describe_precision(jax.devices()[0], PLAIN).startswith("float32")
    # A setting of the run counts more than jax's, and a run in bfloat16 has no products of float32.
    high = dataclasses.replace(PLAIN, precision="highest")
    device = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    assert runtime.describe_precision(device, high) == "float32"
    assert runtime.find_peaks([device] * 4, high) == pytest.approx(4 * 197e12 / 6)
    low = dataclasses.replace(PLAIN, dtype="bfloat16")
    assert runtime.describe_precision(device, low) == "bfloat16, summed in float32"
    assert runtime.find_peaks([device] * 4, low) == 4 * 197e12
    passes = {"high": 3, "tensorfloat32": 3, "bfloat16_3x": 3, "highest": 6, "float32": 6}
    peak = runtime.find_peaks([device], PLAIN)
    is_preset = precision is not None and precision.isupper()
    assert peak == (None if is_preset else pytest.approx(197e12 / passes.get(precision, 1)))
