"""Settings: what is refused and how the refusal helps, round trips, and a run's identity."""

import dataclasses
import json
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jgpt.config import (
  ComputeConfig,
  DataConfig,
  Experiment,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  SampleConfig,
  TrainConfig,
  catalog,
  checks,
)
from jgpt.config.experiment import DROPOUT_PLACES, PARAM_KINDS
from jgpt.config.settings import (
  SECTIONS,
  change,
  differences,
  experiment_from_json,
  experiment_to_json,
  format_value,
  is_circumstance,
  list_settings,
  parse_setting,
  setting_names,
)
from jgpt.errors import UserError

NAMES = catalog.load_experiment("names")
GROUPED = change(NAMES, {"data.batch_size": 16, "compute.group_documents": True})

# For each setting another value than that of `names`, valid by itself, and whether a resumed run
# may differ in it.
OTHER_VALUES = {
  "model.vocab_size": (40, False),
  "model.vocab_multiple": (8, False),
  "model.max_seq_len": (32, False),
  "model.num_layers": (2, False),
  "model.num_heads": (2, False),
  "model.d_model": (32, False),
  "model.d_ff": (128, False),
  "model.norm": ("layer", False),
  "model.norm_embed": (True, False),
  "model.norm_final": (True, False),
  "model.activation": ("gelu_erf", False),
  "model.positions": ("sinusoidal", False),
  "model.biases": ("mlp", False),
  "model.tied_head": (True, False),
  "model.scale_embed": (True, False),
  "model.dropout": (0.1, False),
  "model.dropout_places": (("attention", "mlp_out"), False),
  "model.init_std": (0.02, False),
  "model.scale_residual_init": (True, False),
  "data.source": ("poems", True),
  "data.path": ("words of mine.txt", True),
  "data.tokenizer": ("bytes", False),
  "data.bpe_vocab_size": (300, False),
  "data.mark_paragraphs": (True, False),
  "data.batching": ("epochs", False),
  "data.seq_len": (8, False),
  "data.batch_size": (4, False),
  "data.heldout_fraction": (0.5, False),
  "data.heldout_tokens": (100, False),
  "data.num_batches": (1, False),
  "optimizer.name": ("adam", False),
  "optimizer.momentum": (0.5, False),
  "optimizer.peak_lr": (3e-4, False),
  "optimizer.schedule": ("cosine", False),
  "optimizer.warmup_steps": (10, False),
  "optimizer.warmup_from_zero": (False, False),
  "optimizer.end_lr": (1e-4, False),
  "optimizer.decay_steps": (500, False),
  "optimizer.cooldown_steps": (50, False),
  "optimizer.b1": (0.9, False),
  "optimizer.b2": (0.95, False),
  "optimizer.eps": (1e-10, False),
  "optimizer.weight_decay": (0.1, False),
  "optimizer.decay_kinds": (("matrix", "head"), False),
  "optimizer.clip_norm": (1.0, False),
  "optimizer.skip_spikes": (6.0, False),
  "train.steps": (2000, True),
  "train.epochs": (2, True),
  "train.seed": (1, False),
  "train.init": ("microgpt", False),
  "train.init_from": ("gpt2", False),
  "train.continue_from": ("runs/names", False),
  "train.micro_batch_size": (1, True),
  "train.log_every": (10, True),
  "train.eval_every": (50, True),
  "train.eval_batches": (5, True),
  "train.sample_every": (50, True),
  "train.save_every": (50, True),
  "train.save_every_seconds": (60.0, True),
  "train.max_seconds": (60.0, True),
  "train.keep_latest": (3, True),
  "train.keep_best": (0, True),
  "train.max_consecutive_skips": (5, True),
  "sample.prompt": ("an", True),
  "sample.num": (3, True),
  "sample.temperature": (0.0, True),
  "sample.top_k": (5, True),
  "sample.top_p": (0.9, True),
  "sample.max_tokens": (4, True),
  "mesh.data": (-1, True),
  "mesh.fsdp": (2, True),
  "mesh.tensor": (2, True),
  "mesh.timeout_seconds": (60.0, True),
  "compute.tricks": (False, True),
  "compute.dtype": ("bfloat16", False),
  "compute.precision": ("high", True),
  "compute.attention": ("blocks", True),
  "compute.matmul": ("flat", True),
  "compute.layers": ("unroll", True),
  "compute.remat": ("block", True),
  "compute.loss_chunks": (3, True),
  "compute.group_documents": (False, True),
  "compute.select": ("ordered", True),
  "compute.compiler_options": ("none", True),
}


def set_(*texts, base=NAMES):
  """What `--set` does with each of the texts, together."""
  return change(base, dict(parse_setting(text) for text in texts))


# --- Refusals ---


@pytest.mark.parametrize(
  ("text", "meant"),
  [
    ("train.step=5", "train.steps"),
    ("optimizer.peak_lrr=1", "optimizer.peak_lr"),
    ("compute.tricksy=4", "compute.tricks"),
  ],
)
def test_unknown_setting_is_refused_and_the_near_one_named(text, meant):
  with pytest.raises(
    UserError, match=rf"no setting '{text.partition('=')[0]}'\. Did you mean .*{meant}\b"
  ):
    set_(text)


@pytest.mark.parametrize(
  ("text", "need"),
  [
    ("train.steps=ten", "a whole number"),
    ("train.steps=1.5", "a whole number"),
    ("train.log_every=none", "a whole number"),
    ("train.steps=", "a whole number"),
    ("train.steps=1e3", "a whole number"),
    ("data.num_batches=few", "a whole number or none"),
    ("optimizer.peak_lr=fast", "a number"),
    ("optimizer.peak_lr=none", "a number"),
    ("optimizer.peak_lr=nan", "finite"),
    ("optimizer.clip_norm=inf", "finite"),
    ("sample.temperature=-inf", "finite"),
    ("train.steps=-1", "at least 0"),
    ("data.batch_size=0", "at least 1"),
    ("train.seed=2147483648", r"below 2\*\*31"),
    ("model.d_ff=2147483648", r"below 2\*\*31"),
    ("optimizer.b1=1", "below 1"),
    ("optimizer.momentum=1", "below 1"),
    ("optimizer.momentum=0.9", r"sgd's, and optimizer\.name is adamw.*b1=0\.85.*name=sgd"),
    ("optimizer.name=sdg", "adamw, adam or sgd. Did you mean sgd"),
    ("data.heldout_fraction=1", "below 1"),
    ("sample.top_p=1.5", "from 0 to 1"),
    ("optimizer.decay_kinds=matrix,weight", "embedding, matrix, head, gain, bias"),
    (
      "model.dropout_places=mlp,attention",
      "embedding, attention, attention_out, activation, mlp_out",
    ),
    ("model.dropout=1", "below 1"),
    ("model.norm=rmss", "rms, layer or layer_no_bias. Did you mean rms"),
    ("model.activation=gelu", "relu, gelu_tanh or gelu_erf. Did you mean"),
    ("model.tied_head=yes", "true or false"),
    ("optimizer.schedule=linaer", "linear, cosine, constant or wsd. Did you mean linear"),
    ("data.bpe_vocab_size=255", "at least 256"),
    ("train.steps", "no '='"),
    ("compute.tricks=auto", "true or false"),
    ("compute.attention=block", "auto, plain, blocks, cudnn or splash. Did you mean blocks"),
    ("compute.layers=true", "auto, scan or unroll"),
    ("compute.group_documents=yes", "true or false or auto"),
    ("compute.group_documents=none", "true or false or auto"),
    ("compute.group_documents=1", "true or false or auto"),
  ],
)
def test_wrong_value_is_refused_with_the_setting_and_what_it_needs(text, need):
  with pytest.raises(UserError, match=need) as refusal:
    set_(text)
  assert text.partition("=")[0] in str(refusal.value)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("train.steps", True),
    ("train.steps", 5.0),
    ("train.steps", "5"),
    ("model.vocab_size", [27]),
    ("optimizer.peak_lr", "0.1"),
    ("optimizer.peak_lr", False),
    ("optimizer.peak_lr", 10**400),  # a whole number that no float can hold
    ("optimizer.decay_kinds", "matrix"),
    ("optimizer.decay_kinds", [1]),
    ("data.source", None),
    ("data.path", 7),
    ("compute.tricks", "false"),
    ("compute.group_documents", 1),
    ("compute.group_documents", None),
    ("compute.group_documents", "true"),
  ],
)
def test_values_from_python_and_json_are_not_converted_to_the_declared_type(name, value):
  with pytest.raises(UserError, match=rf"{name}=.* must be"):
    change(NAMES, {name: value})


def test_code_as_a_value_is_text_and_never_executed(tmp_path):
  """Neither a number's parser nor a text's evaluates anything: the file that the code would make is
  not there.
  """
  marker = tmp_path / "executed"
  code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
  for name in setting_names():
    try:
      changed = set_(f"{name}={code}")
    except UserError:
      continue
    assert list_settings(changed)[name] == code  # a field for text takes it as it is
    assert name in (
      *("data.source", "data.path", "train.init_from", "train.continue_from", "sample.prompt"),
    )
  assert not marker.exists()


@pytest.mark.parametrize(
  ("text", "today"),
  [
    ("mesh.tricks=false", "compute.tricks=false"),
    ("mesh.tricks=TRUE", "compute.tricks=true"),
    ("mesh.scan_layers=true", "compute.layers=scan"),
    ("mesh.scan_layers=false", "compute.layers=unroll"),
    ("mesh.scan_layers=none", "compute.layers=auto"),
  ],
)
def test_a_setting_that_has_another_name_today_is_answered_with_it(text, today):
  """And with the value that means the same; what is advised is accepted."""
  with pytest.raises(UserError, match=rf"{text.partition('=')[0]} is .*Try --set {today}$"):
    set_(text)
  section, field = today.partition("=")[0].split(".")
  assert format_value(getattr(getattr(set_(today), section), field)) == today.partition("=")[2]


@pytest.mark.parametrize("value", [[], {}, 10**400, "x" * 1000, "yes"])
def test_any_value_of_a_setting_that_has_another_name_today_is_refused(value):
  for name in ("mesh.tricks", "mesh.scan_layers"):
    with pytest.raises(UserError, match=name) as refused:
      change(NAMES, {name: value})
    assert "Try" not in str(refused.value)


@pytest.mark.parametrize(
  ("text", "value"),
  [("true", True), ("True", True), ("false", False), ("auto", "auto")],
)
def test_grouping_documents_is_true_false_or_auto(text, value):
  base = change(NAMES, {"data.batch_size": 16})
  got = set_(f"compute.group_documents={text}", base=base).compute.group_documents
  assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
  "changes",
  [
    {"data.batching": "random"},
    {"data.batch_size": 6},
    {"data.batch_size": 1},
    {"data.seq_len": 15},
    {"model.dropout": 0.1, "model.dropout_places": ("mlp_out",)},
    {"train.micro_batch_size": 8},
    {"mesh.data": 2},
    {"mesh.data": -1},
  ],
)
def test_documents_are_not_grouped_where_that_would_not_be_the_definition(changes):
  """True is refused, false and auto are not; what is given up for grouping is said."""
  refused = r"compute\.group_documents=true needs data\.batching=documents"
  with pytest.raises(UserError, match=refused):
    change(GROUPED, changes)
  for value in (False, "auto"):
    changed = change(GROUPED, changes | {"compute.group_documents": value})
    assert changed.compute.group_documents == value


# --- Settings that must go together ---


def follow_advice(*texts):
  """Adds the settings that each refusal advises until nothing is refused.

  Returns what was added.
  """
  added = []
  for _ in range(3):
    try:
      set_(*texts, *added)
    except UserError as refusal:
      added += re.findall(r"Try --set (\S+=\w+)", str(refusal))
  set_(*texts, *added)
  return added


@pytest.mark.parametrize(
  ("texts", "advice"),
  [
    (["model.num_heads=3"], ["model.num_heads=2"]),
    (["model.num_heads=5", "model.d_model=24"], ["model.num_heads=4"]),
    (["model.num_heads=100"], ["model.num_heads=16"]),
    # Large primes: looking for divisors must not take long.
    (["model.d_model=2147483647", "model.num_heads=2147483629"], ["model.num_heads=2147483647"]),
    (["data.seq_len=17"], ["data.seq_len=16"]),
    (["model.max_seq_len=15"], ["data.seq_len=15"]),
    (["data.batch_size=6", "train.micro_batch_size=4"], ["train.micro_batch_size=3"]),
    (["data.batch_size=4", "train.micro_batch_size=8"], ["train.micro_batch_size=4"]),
    (["data.batch_size=6", "mesh.data=4"], ["mesh.data=1"]),
    (["data.batch_size=8", "train.micro_batch_size=2", "mesh.data=4"], ["mesh.data=1"]),
    (
      ["data.batch_size=6", "train.micro_batch_size=4", "mesh.data=5"],
      ["train.micro_batch_size=3", "mesh.data=1"],
    ),
    (["model.norm=layer"], ["model.norm_embed=false"]),
    (["model.dropout=0.1"], ["model.dropout_places=mlp_out"]),
    (["data.tokenizer=bytes"], ["data.batching=random"]),
    (["data.tokenizer=bpe"], ["data.batching=random", "data.bpe_vocab_size=2000"]),
    (["data.heldout_tokens=5", "data.batching=random"], ["data.heldout_fraction=0"]),
    (["train.steps=none"], ["train.steps=1000"]),
    (["train.steps=none", "train.epochs=3"], ["train.steps=1000"]),
    (["compute.group_documents=true"], ["compute.group_documents=auto"]),
  ],
)
def test_values_that_do_not_go_together_are_refused_and_the_advice_mends_them(texts, advice):
  """The value advised is the nearest that would do.

  One correction for each thing that is wrong ends in valid settings.
  """
  began = time.perf_counter()
  assert follow_advice(*texts) == advice
  assert time.perf_counter() - began < 5


def test_changes_are_made_at_once_so_their_order_does_not_matter():
  """What is wrong beside the old value is right beside the new one, within a section and across
  two.
  """
  pairs = [("model.num_heads=3", "model.d_model=24"), ("data.seq_len=64", "model.max_seq_len=64")]
  for a, b in pairs:
    with pytest.raises(UserError):
      set_(a)
    assert set_(a, b) == set_(b, a)
  assert set_(*pairs[0]).model.head_dim == 8


def test_change_leaves_the_original_as_it_was():
  before = experiment_to_json(NAMES)
  changed = change(NAMES, {"train.steps": 7})
  assert changed.train.steps == 7
  assert experiment_to_json(NAMES) == before


# --- Round trips ---


@st.composite
def experiments(draw):
  """Any valid experiment."""

  def count(most=2**31 - 1):
    return draw(st.integers(1, most))

  def number(least=0.0, most=checks.FLOAT32_MAX, exclude_max=False):
    return draw(st.floats(least, most, exclude_max=exclude_max))

  def maybe(value):
    return value if draw(st.booleans()) else None

  # What --set can say: no spaces around it, and "none" and "null" mean None.
  text = st.text().map(str.strip).filter(lambda t: t.lower() not in ("none", "null"))
  num_heads, mesh, micro, seq_len = count(64), maybe(count(4)), maybe(count(4)), count(2**30)
  micro = micro and micro * (mesh or 1)
  tensor = count(4)
  norm = draw(st.sampled_from(["rms", "layer", "layer_no_bias"]))
  batching = draw(st.sampled_from(["documents", "random", "sequential", "epochs"]))
  streams = ["characters", "bytes", "bpe", "gpt2"]
  tokenizer = "characters" if batching == "documents" else draw(st.sampled_from(streams))
  heldout_tokens = None if batching == "documents" else maybe(count())
  epochs = maybe(count())
  return Experiment(
    model=ModelConfig(
      vocab_size=maybe(count()),
      vocab_multiple=count(),
      max_seq_len=seq_len + draw(st.integers(0, 5)),
      num_layers=count(),
      num_heads=num_heads,
      d_model=2 * num_heads * count(1000),
      d_ff=count(),
      norm=norm,
      norm_embed=norm == "rms" and draw(st.booleans()),
      norm_final=draw(st.booleans()),
      activation=draw(st.sampled_from(["relu", "gelu_tanh", "gelu_erf"])),
      positions=draw(st.sampled_from(["learned", "sinusoidal"])),
      biases=draw(st.sampled_from(["none", "mlp", "all"])),
      tied_head=draw(st.booleans()),
      scale_embed=draw(st.booleans()),
      dropout=number(0, 1, exclude_max=True),
      dropout_places=tuple(draw(st.lists(st.sampled_from(DROPOUT_PLACES), min_size=1, max_size=3))),
      init_std=number(),
      scale_residual_init=draw(st.booleans()),
    ),
    data=DataConfig(
      source=draw(text),
      path=maybe(draw(text)),
      tokenizer=tokenizer,
      bpe_vocab_size=256 + count(1000) if tokenizer == "bpe" else None,
      mark_paragraphs=tokenizer == "gpt2" and draw(st.booleans()),
      batching=batching,
      seq_len=seq_len,
      batch_size=(micro or mesh or 1) * count(1000),
      heldout_fraction=0.0 if heldout_tokens else number(0, 1, exclude_max=True),
      heldout_tokens=heldout_tokens,
      num_batches=maybe(count()),
    ),
    optimizer=OptimizerConfig(
      peak_lr=number(),
      schedule=draw(st.sampled_from(["linear", "cosine", "constant", "wsd"])),
      warmup_steps=count() - 1,
      warmup_from_zero=draw(st.booleans()),
      end_lr=number(),
      decay_steps=maybe(count()),
      cooldown_steps=maybe(count()),
      b1=number(0, 1 - 2**-24),
      b2=number(0, 1 - 2**-24),
      eps=number(checks.FLOAT32_TINY),
      weight_decay=number(),
      decay_kinds=tuple(draw(st.lists(st.sampled_from(PARAM_KINDS), max_size=3))),
      clip_norm=maybe(number(1e-300)),
    ),
    train=TrainConfig(
      steps=maybe(count() - 1) if epochs and batching == "epochs" else count() - 1,
      epochs=epochs,
      seed=count() - 1,
      init=draw(st.sampled_from(["normal", "microgpt"])),
      micro_batch_size=micro,
      log_every=count(),
      eval_every=maybe(count()),
      eval_batches=maybe(count()),
      sample_every=maybe(count()),
      save_every=maybe(count()),
    ),
    sample=SampleConfig(
      prompt=draw(st.text().map(str.strip)),
      num=count(1_000_000),
      temperature=number(0, 1e6),
      top_k=maybe(count() - 1),
      top_p=number(0, 1),
      max_tokens=maybe(count(100)),
    ),
    mesh=MeshConfig(data=mesh or -1, tensor=tensor),
    compute=ComputeConfig(
      tricks=draw(st.booleans()),
      attention=draw(st.sampled_from(["auto", "plain", "blocks"])),
      matmul=draw(st.sampled_from(["auto", "einsum", "flat"])),
      layers=draw(st.sampled_from(["auto", "scan", "unroll"])),
      group_documents=draw(st.sampled_from(["auto", False])),
      select=draw(st.sampled_from(["auto", "plain", "ordered"])),
      compiler_options=draw(st.sampled_from(["auto", "none"])),
    ),
  )


@hypothesis_settings(deadline=None, max_examples=30)
@given(experiments())
@example(dataclasses.replace(GROUPED, expected=()))
def test_experiment_survives_json_and_set(experiment):
  """Bitwise, floats included.

  Equal experiments are also equal as static arguments of jit, which go by the hash.
  """
  through_json = experiment_from_json(json.loads(json.dumps(experiment_to_json(experiment))))
  texts = [f"{name}={format_value(value)}" for name, value in list_settings(experiment).items()]
  through_set = set_(*texts, base=dataclasses.replace(NAMES, expected=()))
  assert through_json == through_set == experiment
  assert hash(through_json) == hash(through_set) == hash(experiment)


def test_values_written_by_hand_are_read_as_meant():
  changed = set_(
    " optimizer.decay_kinds = matrix , head ",
    "data.path=a=b.txt",
    "optimizer.clip_norm=NONE",
    "optimizer.peak_lr=1",
  )
  assert changed.optimizer.decay_kinds == ("matrix", "head")
  assert changed.data.path == "a=b.txt"
  assert changed.optimizer.clip_norm is None
  assert type(changed.optimizer.peak_lr) is float
  assert set_("optimizer.decay_kinds=", base=changed).optimizer.decay_kinds == ()


def test_optional_fields_that_an_older_file_lacks_count_as_their_defaults():
  value = experiment_to_json(change(NAMES, {"optimizer.clip_norm": 2.0, "mesh.data": 1}))
  del value["optimizer"]["clip_norm"], value["train"]["seed"], value["mesh"], value["compute"]
  read = experiment_from_json(value)
  assert read.optimizer.clip_norm is None
  assert read.train.seed == 0
  assert read.mesh == MeshConfig()
  # Computing in another dtype came later.
  assert read.compute == ComputeConfig(dtype="float32")


@pytest.mark.parametrize(
  ("old", "today"),
  [
    ({"tricks": True}, {"tricks": True}),
    ({"tricks": False}, {"tricks": False}),
    ({"scan_layers": None}, {"layers": "auto"}),
    ({"scan_layers": True}, {"layers": "scan"}),
    ({"scan_layers": False}, {"layers": "unroll"}),
    ({"scan_layers": True, "tricks": False}, {"layers": "scan", "tricks": False}),
  ],
)
def test_settings_of_an_older_file_are_read_under_the_names_of_today(old, today):
  """A run folder of the time before there was a section `compute`; what it says is not changed."""
  value = experiment_to_json(NAMES)
  del value["compute"]
  value["mesh"] |= old
  written = json.dumps(value)
  assert experiment_from_json(value).compute == ComputeConfig(dtype="float32", **today)
  assert json.dumps(value) == written


@pytest.mark.parametrize(
  "old", [{"tricks": None}, {"tricks": 1}, {"scan_layers": 1}, {"scan_layers": []}]
)
def test_values_that_no_older_file_had_are_refused(old):
  value = experiment_to_json(NAMES)
  del value["compute"]
  value["mesh"] |= old
  with pytest.raises(UserError, match=r"compute\.(tricks|layers)=.* must be"):
    experiment_from_json(value)


def replaced(section, field=None, value=None):
  """The JSON of `names` with one thing put in, or taken out where the value is `...`."""
  top = experiment_to_json(NAMES)
  inside, key = (top, section) if field is None else (top[section], field)
  if value is ...:
    del inside[key]
  else:
    inside[key] = value
  return top


@pytest.mark.parametrize(
  ("value", "complaint"),
  [
    (None, "must be an object"),
    ([], "must be an object"),
    ("names", "must be an object"),
    ({"model": 3}, "must be an object"),
    ({}, "lacks the section"),
    (replaced("modle", value={}), "unknown section 'modle'. Did you mean model"),
    (replaced("model", "d_modle", 16), r"unknown setting model.d_modle. Did you mean d_model"),
    (replaced("model", "d_model", ...), "lacks the setting model.d_model"),
    (replaced("train", value=...), "lacks the section 'train'"),
    (replaced("train", "steps", "1000"), "train.steps='1000' must be a whole number"),
    (replaced("model", "num_heads", 3), "must be a multiple"),
    (replaced("data", "seq_len", 99), "max_seq_len=16"),
  ],
)
def test_json_that_is_no_experiment_is_refused(value, complaint):
  with pytest.raises(UserError, match=complaint):
    experiment_from_json(value)


ANY_NUMBER = st.one_of(st.integers(), st.integers(2**30, 2**70), st.floats(), st.just(10**400))
ANY_JSON = st.recursive(
  st.one_of(st.none(), st.booleans(), ANY_NUMBER, st.text()),
  lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)
  ),
  max_leaves=5,
)


@hypothesis_settings(deadline=None, max_examples=200)
@given(st.one_of(ANY_JSON, st.dictionaries(st.sampled_from([*SECTIONS, "other"]), ANY_JSON)))
def test_any_json_is_an_experiment_or_a_user_error(value):
  with pytest.raises(UserError):  # nothing drawn here has every field that is needed
    experiment_from_json(value)


@hypothesis_settings(deadline=10_000, max_examples=300)
@given(st.dictionaries(st.sampled_from(setting_names()), ANY_JSON, min_size=1, max_size=4))
@example({"model.d_model": 2**61 - 1, "model.num_heads": 2**60})
def test_an_experiments_json_with_any_values_is_an_experiment_or_a_user_error(values):
  """What is accepted is valid: it survives JSON.

  The deadline catches checks whose cost grows with a value.
  """
  value = experiment_to_json(NAMES)
  for name, field_value in values.items():
    section, field = name.split(".")
    value[section][field] = field_value
  try:
    read = experiment_from_json(value)
  except UserError as error:
    assert any(section in str(error) for section in SECTIONS)
  else:
    assert experiment_from_json(experiment_to_json(read)) == read


@hypothesis_settings(deadline=10_000, max_examples=300)
@given(
  st.one_of(
    st.text(),
    st.builds(
      "{}={}".format,
      st.one_of(st.sampled_from(setting_names()), st.text()),
      st.one_of(
        ANY_NUMBER,
        st.text(),
        st.sampled_from(["none", "true", "1_0", "٣", "0x10", "1e999", "1" * 5000]),
      ),
    ),
  )
)
def test_any_text_is_a_setting_or_a_user_error(text):
  """What is accepted can be printed and set again (`--print-config` says what to give to
  `--set`).
  """
  try:
    name, value = parse_setting(text)
    changed = change(NAMES, {name: value})
  except UserError:
    return
  assert set_(f"{name}={format_value(value)}") == changed


# --- Identity and circumstance ---


def test_every_setting_is_either_identity_or_circumstance():
  """A run is refused on resume for exactly those settings that change what is learned, with both
  values.
  """
  assert list(OTHER_VALUES) == setting_names()
  # From here each setting can be changed alone.
  changes = {
    "data.batch_size": 8,
    "data.batching": "random",
    "data.tokenizer": "gpt2",
    "data.heldout_fraction": 0.0,
    "optimizer.name": "sgd",
  }
  base = change(
    NAMES, changes | {"model.norm_embed": False, "model.dropout_places": ("attention",)}
  )
  for name, (value, may_change) in OTHER_VALUES.items():
    changed = change(base, {name: value})
    expected = {} if may_change else {name: (list_settings(base)[name], value)}
    assert differences(base, changed) == expected
    assert is_circumstance(name) == may_change
