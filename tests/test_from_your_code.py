"""The page notebooks/from_your_code.md says what is true: what it names exists, its loop runs, and
each line is proven.

Most of its lines are proven elsewhere. Here are the proofs that only the page needs: what the lines
of a torch loop do, and what jgpt does instead.
"""

import ast
import dataclasses
import functools
import importlib
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equivalence import QUICK, cast, compare, must_differ
from switches import (
  SYSTEMS,
  TOLERANCE,
  compare_leaves,
  compare_params,
  draw_batch,
  draw_params,
  from_oracle,
  in_brief,
  make_experiment,
  make_model,
  oracle_names,
  to_oracle,
)

import jgpt.evaluation
import jgpt.model
import jgpt.step
from jgpt import program
from jgpt.batches import Batch, Stream, eval_batch
from jgpt.config import OptimizerConfig
from jgpt.config.experiment import DROPOUT_PLACES
from jgpt.config.settings import change, setting_names
from jgpt.generate import draw
from jgpt.keys import derive_row_keys
from jgpt.optim.chain import make_optimizer

try:
  import torch
  import torch.nn.functional as F  # noqa: N812
  from reference import torch_gpt

  torch.set_num_threads(1)
except ModuleNotFoundError as error:
  if error.name != "torch":
    raise
  torch = None

needs_torch = pytest.mark.skipif(
  torch is None,
  reason="PyTorch is not installed (pip install torch): it is an oracle, not a dependency",
)

# --- The page ---

ROOT = Path(__file__).parent.parent
# Tests stand in <code>, not in backticks, so that a narrow column may break them where <wbr> is.
PAGE = (
  (ROOT / "notebooks" / "guide" / "from_your_code.md")
  .read_text(encoding="utf-8")
  .replace("<wbr>", "")
)
PROSE, CODE = (
  re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL),
  re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL),
)
TABLES = [line.strip().strip("|").split("|") for line in PROSE.splitlines() if line.startswith("|")]
ROWS = [
  [cell.strip() for cell in cells] for cells in TABLES if cells[0].strip() not in ("there", "---")
]
# What stands in the first column is other programs'.
OURS = [line for line in PROSE.splitlines() if not line.startswith("|")] + [
  cell for row in ROWS for cell in row[1:]
]
SPANS = [span for text in OURS for span in re.findall(r"`([^`]+)`", text)]
PROOF = re.compile(r"<code>(tests/[\w/]+\.py)::(test_\w+)</code>")


@functools.cache
def read_tests(path: str) -> list[str]:
  """The names of a file's tests that stand in no class."""
  tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
  return [
    node.name
    for node in tree.body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
  ]


def test_every_row_has_a_proof_that_exists():
  assert len(ROWS) > 40
  for row in ROWS:
    assert len(row) == 3 and all(row), row
    proofs = PROOF.findall(row[2])
    assert (
      proofs and "<br>".join(f"<code>{path}::{name}</code>" for path, name in proofs) == row[2]
    ), row
    for path, name in proofs:
      assert (ROOT / path).is_file() and name in read_tests(path), (
        f"{path}::{name} does not exist; row {row[0]}"
      )


def find(name: str) -> bool:
  """Whether there is such a thing: a setting, or what a module holds, to any depth.

  A class's fields count.
  """
  if name in setting_names():
    return True
  foreign = name.split(".")[0] in ("jgpt", "jax", "torch")
  parts = (name if foreign else f"jgpt.{name}").split(".")
  for i in range(len(parts), 0 if foreign else 1, -1):
    try:
      found = importlib.import_module(".".join(parts[:i]))
    except ModuleNotFoundError:
      continue
    for part in parts[i:]:
      if not hasattr(found, part) and part not in getattr(found, "__dataclass_fields__", {}):
        return False
      found = getattr(found, part, None)
    return True
  return False


def test_every_name_of_jgpts_exists():
  """What stands in backticks as `module.name` is a function, a class, a constant or a setting.

  Files are there.
  """
  names = {
    name
    for span in SPANS
    if "/" not in span
    for name in re.findall(r"\b[A-Za-z_]\w*(?:\.\w*[A-Za-z]\w*)+", span)
  }
  names = {name for name in names if name.rpartition(".")[2] not in ("py", "c", "jsonl")}
  assert len(names) > 40
  assert [
    name for name in sorted(names) if not find(name) and (torch or not name.startswith("torch."))
  ] == []
  for wrong in (
    "step.zero_grad",
    "train.learning_rate",
    "step.TrainState.grads",
    "jax.zero_grad",
    "optimizer.step",
  ):
    assert not find(wrong)
  files = {span for span in SPANS if re.fullmatch(r"\w+/[\w/]*\.\w+", span)}
  assert files and [file for file in files if not (ROOT / file).is_file()] == []


def test_every_proof_written_for_the_page_is_on_it():
  about_the_page = {
    name for name in read_tests("tests/test_from_your_code.py") if name.startswith("test_every_")
  }
  mine = set(read_tests("tests/test_from_your_code.py")) - about_the_page
  assert mine == {
    name for path, name in PROOF.findall(PAGE) if path == "tests/test_from_your_code.py"
  }


def test_the_loop_written_out(monkeypatch):
  """The page's loop makes the updates of the program that `python -m jgpt.run` runs: 20 of them, in
  float32.

  Both are compiled quickly, and so do not round alike; sampling and evaluation, which are not
  called, not at all.
  """
  (code,) = CODE
  assert code.count("range(1000)") == 1 and code.count("jax.jit(") == 3
  names = {"quick_jit": partial(jax.jit, compiler_options=QUICK)}
  short = code.replace("range(1000)", "range(20)").replace("jax.jit(", "quick_jit(")
  exec(compile(short, "from_your_code.md", "exec"), names)
  monkeypatch.setattr(program, "list_ahead", lambda *args: {})
  monkeypatch.setattr(program, "choose_step_options", lambda experiment: QUICK)
  made = program.compile_program(names["plan"].experiment, jax.devices(), names["plan"].data)
  state, metrics = made.run_steps(made.feed.corpus_at(0), made.state, np.int32(20))
  assert int(state.step) == int(names["state"].step) == 20
  assert float(names["metrics"]["train/loss"]) == pytest.approx(
    float(metrics["train/loss"][19]), rel=1e-5
  )
  for got, expected in zip(
    jax.tree.leaves(names["state"].params), jax.tree.leaves(state.params), strict=True
  ):
    np.testing.assert_allclose(got, expected, atol=1e-4)


# --- One model for both sides ---

CONFIG = make_model(SYSTEMS["nanoGPT"], num_layers=1)
ADAMW = {"peak_lr": 0.02, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
NUM_UPDATES, BATCH_SIZE = 5, 4
OPTIMIZER = OptimizerConfig(**ADAMW, schedule="constant", decay_steps=NUM_UPDATES)
EXPERIMENT = make_experiment(CONFIG, OPTIMIZER, BATCH_SIZE)
loss_and_grads = jax.jit(jgpt.step.loss_and_grads, static_argnums=(2, 3), compiler_options=QUICK)


def draw_batches():
  """One for each update; in each, half of a sequence weighs nothing."""
  return [draw_batch(CONFIG, BATCH_SIZE, seed) for seed in range(NUM_UPDATES)]


def whole(batch):
  """The same batch, every target counted."""
  return batch._replace(weights_BT=jnp.ones_like(batch.weights_BT))


def make_torch_model():
  return torch_gpt.make_model(CONFIG, to_oracle(draw_params(CONFIG), CONFIG), torch.float64)


def torch_loss(model, batch):
  return torch_gpt.loss_fn(model, *map(np.asarray, batch))


def torch_grads(model):
  return from_oracle(torch_gpt.gradients(model), draw_params(CONFIG))


def jgpt_grads(batch, micro_batch_size=None):
  """Of the loss in float64, and the loss."""
  experiment = make_experiment(CONFIG, OPTIMIZER, BATCH_SIZE, micro_batch_size=micro_batch_size)
  return loss_and_grads(cast(draw_params(CONFIG), "float64"), batch, 0, experiment)[::-1]


def check(what, expected, got, by=compare_leaves):
  with in_brief():
    by(f"PyTorch, float64: {what}", expected, got, TOLERANCE["float64"])


# --- zero_grad ---

PLACES = ("before forward", "before backward", "after step")


@functools.cache
def torch_loop(zero_grad, set_to_none=True):
  """The parameters after five updates by torch's AdamW, `zero_grad` being called in one of three
  places, or not at all.
  """
  model = make_torch_model()
  groups = torch_gpt.param_groups(
    model, OPTIMIZER.weight_decay, oracle_names(CONFIG, OPTIMIZER.decay_kinds)
  )
  betas = (OPTIMIZER.b1, OPTIMIZER.b2)
  optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.peak_lr, betas=betas, eps=OPTIMIZER.eps)
  for batch in draw_batches():
    if zero_grad == "before forward":
      optimizer.zero_grad(set_to_none=set_to_none)
    loss = torch_loss(model, batch)
    if zero_grad == "before backward":
      optimizer.zero_grad(set_to_none=set_to_none)
    loss.backward()
    optimizer.step()
    if zero_grad == "after step":
      optimizer.zero_grad(set_to_none=set_to_none)
  return from_oracle(torch_gpt.parameters(model), draw_params(CONFIG))


@functools.cache
def jgpt_loop():
  """The parameters after five updates by `train_step`, in float64."""
  state = cast(jgpt.step.begin_state(cast(draw_params(CONFIG), "float64"), EXPERIMENT), "float64")
  train_step = jax.jit(jgpt.step.train_step, static_argnums=2, compiler_options=QUICK)
  for batch in draw_batches():
    state, _ = train_step(state, batch, EXPERIMENT)
  return state.params


@needs_torch
@pytest.mark.parametrize("place", PLACES)
def test_zero_grad_in_three_places(x64, place):
  """Wherever a torch loop zeroes its gradients, it ends at jgpt's parameters: there, nothing is
  kept between updates.
  """
  check(f"zero_grad {place}", torch_loop(place), jgpt_loop(), compare_params)


@needs_torch
@pytest.mark.parametrize("place", PLACES)
def test_set_to_none_changes_no_bit(place):
  """Gradients that are zero and gradients that are gone make the same updates, where the loss uses
  every parameter.
  """
  none, zero = (torch_loop(place, set_to_none) for set_to_none in (True, False))
  jax.tree.map(partial(np.testing.assert_array_equal, strict=True), none, zero)
  assert not np.array_equal(none["tok_embed"], torch_loop("never")["tok_embed"])


@needs_torch
def test_forgotten_zero_grad_adds_up(x64):
  """A torch loop that never zeroes makes the updates of running sums: jgpt's chain makes them of
  sums made on purpose.
  """
  with must_differ():
    check("no zero_grad", torch_loop("never"), jgpt_loop(), compare_params)
  tx, params = make_optimizer(EXPERIMENT), cast(draw_params(CONFIG), "float64")

  @partial(jax.jit, compiler_options=QUICK)
  def add_and_update(params, opt_state, total, batch):
    _, grads = jgpt.step.loss_and_grads(params, batch, 0, EXPERIMENT)
    total = jax.tree.map(jnp.add, total, grads)
    updates, opt_state = tx.update(total, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, total

  opt_state, total = cast(tx.init(params), "float64"), jax.tree.map(jnp.zeros_like, params)
  for batch in draw_batches():
    params, opt_state, total = add_and_update(params, opt_state, total, batch)
  check("no zero_grad, running sums", torch_loop("never"), params, compare_params)


# --- The loss and its gradient ---


@needs_torch
def test_ignored_targets_weigh_nothing(x64):
  """`F.cross_entropy` with `ignore_index` is jgpt's loss, and has its gradient, where the ignored
  targets weigh 0.
  """
  model, batch = make_torch_model(), draw_batches()[0]
  inputs_BT, targets_BT, weights_BT = map(np.asarray, batch)
  targets_BT = np.where(weights_BT == 0, -1, targets_BT)
  assert 0 < np.sum(targets_BT == -1) < targets_BT.size
  logits_BTV = model(inputs_BT)
  loss = F.cross_entropy(
    logits_BTV.flatten(0, 1), torch.tensor(targets_BT).long().flatten(), ignore_index=-1
  )
  loss.backward()
  grads, got = jgpt_grads(batch)
  check("ignore_index", {"loss": np.float64(loss.item())}, {"loss": got}, compare)
  check("ignore_index", torch_grads(model), grads)


def accumulate(batch, num_micro, shares):
  """The gradient that torch holds after a backward() for each part, its mean loss multiplied by the
  part's share.
  """
  model = make_torch_model()
  for i in range(num_micro):
    part = Batch(*(x[i::num_micro] for x in batch))
    (torch_loss(model, part) * shares(part)).backward()
  return torch_grads(model)


@needs_torch
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_accumulated_micro_steps(x64, micro_batch_size):
  """Micro-steps with loss / k are jgpt's micro-batches, where every sequence has the same number of
  targets.
  """
  batch, num_micro = whole(draw_batches()[0]), BATCH_SIZE // micro_batch_size
  expected = accumulate(batch, num_micro, lambda part: 1 / num_micro)
  check("micro-steps", expected, jgpt_grads(batch, micro_batch_size)[0])
  check("micro-steps, the batch at once", expected, jgpt_grads(batch)[0])


@needs_torch
def test_micro_steps_of_unequal_weight(x64):
  """Where parts have unequal numbers of targets loss / k is not the batch's: jgpt weighs by
  targets, as torch then must.
  """
  batch = draw_batches()[0]
  got, total = jgpt_grads(batch, 2)[0], float(batch.weights_BT.sum())
  with must_differ() as found:
    check("micro-steps", accumulate(batch, 2, lambda part: 1 / 2), got)
  assert max(row.relative for row in found) > 0.01
  check(
    "micro-steps by weight",
    accumulate(batch, 2, lambda part: float(part.weights_BT.sum()) / total),
    got,
  )


# --- train(), eval(), no_grad() ---


@needs_torch
def test_train_eval_and_no_grad(x64, monkeypatch):
  """Without a key jgpt's network is torch's in eval(), to the last bit the same each time.

  With one it is as in train().

  What torch keeps in the module is jgpt's argument: the same key drops the same again. no_grad()
  changes no value.
  """
  tokens_BT, model = np.asarray(draw_batches()[0].inputs_BT), make_torch_model()
  plain = model(tokens_BT).detach().numpy()
  model.dropout = torch.nn.Dropout(0.3)
  monkeypatch.setattr(torch_gpt, "_dropout", lambda x, masks, name: model.dropout(x))
  torch.manual_seed(0)
  model.train()
  assert not np.array_equal(model(tokens_BT).detach(), model(tokens_BT).detach())
  model.eval()
  np.testing.assert_array_equal(model(tokens_BT).detach(), plain)
  assert model(tokens_BT).requires_grad
  with torch.no_grad():
    logits_BTV = model(tokens_BT)
  np.testing.assert_array_equal(logits_BTV, plain)
  assert not logits_BTV.requires_grad

  dropping = dataclasses.replace(CONFIG, dropout=0.3, dropout_places=DROPOUT_PLACES)
  apply = jax.jit(jgpt.model.apply, static_argnums=2, compiler_options=QUICK)
  params, key, B = cast(draw_params(CONFIG), "float64"), jax.random.key(0), len(tokens_BT)
  evaluated, again, same, same_again, other = (
    np.asarray(apply(params, tokens_BT, dropping, keys_B=k if k is None else derive_row_keys(k, B)))
    for k in (None, None, key, key, jax.random.key(1))
  )
  np.testing.assert_array_equal(evaluated, again)
  np.testing.assert_array_equal(same, same_again)
  assert not np.array_equal(same, other) and not np.array_equal(same, evaluated)
  check("eval()", {"logits": plain}, {"logits": evaluated}, compare)


@needs_torch
@pytest.mark.parametrize("batching", ["random", "sequential"])
def test_estimate_loss_on_given_windows(x64, batching):
  """The mean of the losses of a few batches, in torch and in `evaluate`.

  Another time, the same bits.

  Random ones as nanoGPT's, or the first in order as llm.c's.
  """
  experiment = change(EXPERIMENT, {"data.batching": batching})
  corpus = Stream(
    jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, 120), jnp.int32)
  )
  num_batches, model = 3, make_torch_model().eval()
  evaluate = partial(
    jgpt.evaluation.evaluate, num_batches=num_batches, whole=False, num_rows=BATCH_SIZE
  )
  run = jax.jit(lambda params: evaluate(params, corpus, experiment), compiler_options=QUICK)
  sums = (run(cast(draw_params(CONFIG), "float64")) for _ in range(2))
  (loss, num_tokens), again = map(jgpt.evaluation.finish_evaluation, sums)
  assert again == (loss, num_tokens) and num_tokens == num_batches * BATCH_SIZE * CONFIG.max_seq_len
  batches = [eval_batch(corpus, i, experiment, whole=False) for i in range(num_batches)]
  read = np.concatenate([np.ravel(batch.inputs_BT) for batch in batches])
  assert np.array_equal(read, corpus.tokens[: len(read)]) == (batching == "sequential")
  with torch.no_grad():
    losses = [torch_loss(model, batch).item() for batch in batches]
  assert len(set(losses)) == num_batches
  check(f"estimate_loss, {batching}", {"loss": np.mean(losses)}, {"loss": loss}, compare)


# --- The update ---


@needs_torch
def test_clipping_and_torchs_1e_6(x64):
  """Clipped gradients differ by the factor norm / (norm + 1e-6) and nothing else.

  Shorter ones are left alone by both.
  """
  batch, params = draw_batches()[0], cast(draw_params(CONFIG), "float64")
  grads = jgpt_grads(batch)[0]
  norm = float(optax.tree.norm(grads))

  def clip_by_torch(max_norm):
    model = make_torch_model()
    torch_loss(model, batch).backward()
    assert float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)) == pytest.approx(
      norm, rel=1e-12
    )
    return torch_grads(model)

  def clip_by_jgpt(max_norm):  # without memory the first moment is the gradient that Adam is given
    tx = make_optimizer(change(EXPERIMENT, {"optimizer.b1": 0.0, "optimizer.clip_norm": max_norm}))
    update = jax.jit(
      lambda grads, params: tx.update(grads, tx.init(params), params)[1], compiler_options=QUICK
    )
    return update(grads, params)["adam"].mu

  theirs, ours = clip_by_torch(norm / 3), clip_by_jgpt(norm / 3)
  scaled = jax.tree.map(lambda g: g * norm / (norm + 1e-6), ours)
  with in_brief():
    compare("PyTorch, float64: clip_grad_norm_, but for 1e-6", theirs, scaled, 1e-12)
  with must_differ() as found:
    compare("PyTorch, float64: clip_grad_norm_", theirs, ours, 1e-12)
  assert max(row.relative for row in found) == pytest.approx(1e-6 / norm, rel=1e-3)
  jax.tree.map(np.testing.assert_array_equal, clip_by_jgpt(3 * norm), grads)
  check("clip_grad_norm_ of a short one", clip_by_torch(3 * norm), grads)


@needs_torch
@pytest.mark.parametrize("system", SYSTEMS)
def test_two_dimensional_parameters_decay(system):
  """What nanoGPT finds by `p.dim() >= 2` are the kinds that decay unless an experiment says
  otherwise.

  In jgpt dimensions would not tell: a gain has two, the layers being stacked.
  """
  config = make_model(SYSTEMS[system])
  expected = {
    name for name, param in torch_gpt.named(torch_gpt.TorchGPT(config)).items() if param.dim() >= 2
  }
  assert oracle_names(config, OPTIMIZER.decay_kinds) == expected


# --- Sampling ---

LOGITS = (
  2.1,
  -0.5,
  3.4,
  0.2,
  -1.2,
  1.8,
  0.9,
  -3.0,
  1.8,
  1.1,
)  # the third and the fourth largest are equal


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_are_multinomial(temperature, top_k):
  """`draw` has the probabilities that `torch.multinomial` is given: divided by the temperature, all
  below the k-th removed.

  Each token's share of 100,000 draws is within 5 standard deviations; what is equal to the k-th
  stays, as there.
  """
  num = 100_000
  logits = torch.tensor(LOGITS) / temperature
  if top_k:
    logits[logits < torch.topk(logits, top_k).values[-1]] = -torch.inf
  p = torch.softmax(logits.double(), dim=-1)
  torch.manual_seed(0)
  theirs = torch.bincount(torch.multinomial(p, num, replacement=True), minlength=len(p)).numpy()
  rows_BV = jnp.broadcast_to(jnp.array(LOGITS), (num, len(LOGITS)))
  ours = np.bincount(
    jax.jit(partial(draw, top_k=top_k))(rows_BV, jax.random.key(0), temperature), minlength=len(p)
  )
  p = p.numpy()
  assert np.sum(p > 0) == (4 if top_k else 10)
  for counts in (theirs, ours):
    assert np.all(np.abs(counts - num * p) <= 5 * np.sqrt(num * p * (1 - p))), counts
