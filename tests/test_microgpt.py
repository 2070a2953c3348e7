"""microgpt.py's own start: its random numbers in its order, and the losses that follow from it."""

import dataclasses
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_gpt
from switches import to_oracle

from jgpt import train
from jgpt.config.catalog import load_experiment
from jgpt.config.settings import change, resolve
from jgpt.errors import UserError
from jgpt.plan import plan_run
from jgpt.weights.initial import draw_microgpt_params

MICROGPT = load_experiment("microgpt")
MODEL = resolve(MICROGPT, 27).model


def as_microgpt_draws(num_documents, config):
  """The matrices by name, written out as the program's text describes it."""
  random.seed(42)
  documents = [str(i) for i in range(num_documents)]
  random.shuffle(documents)

  def matrix(nout, nin):
    return np.array([[random.gauss(0, 0.08) for _ in range(nin)] for _ in range(nout)])

  D, F = config.d_model, config.d_ff
  state_dict = {
    "wte": matrix(config.vocab_size, D),
    "wpe": matrix(config.max_seq_len, D),
    "lm_head": matrix(config.vocab_size, D),
  }
  shapes = {
    "attn_wq": (D, D),
    "attn_wk": (D, D),
    "attn_wv": (D, D),
    "attn_wo": (D, D),
    "mlp_fc1": (F, D),
    "mlp_fc2": (D, F),
  }
  for i in range(config.num_layers):
    state_dict |= {f"layer{i}.{name}": matrix(*shape) for name, shape in shapes.items()}
  return state_dict


@pytest.mark.parametrize("num_layers", [1, 2])
def test_initial_values_are_microgpts_bit_for_bit(num_layers):
  """Each matrix (out, in) is that of the program, rounded to float32: order, shuffle before, heads
  side by side.
  """
  config = dataclasses.replace(MODEL, num_layers=num_layers)
  kept = random.getstate()
  expected = as_microgpt_draws(1000, config)
  random.setstate(kept)
  got = to_oracle(
    draw_microgpt_params(42, 1000, config), config
  )  # GPT-2's names, matrices (in, out)
  assert random.getstate() == kept, "drawing leaves Python's global generator alone"
  names = {"wte": "wte", "wpe": "wpe", "lm_head.weight": "lm_head"}
  for name, value in got.items():
    if name in names:
      wanted = expected[names[name]]
    else:
      _, layer, kind = name.split(".", 2)
      p = {k.split(".")[1]: v for k, v in expected.items() if k.startswith(f"layer{layer}.")}
      wanted = {
        "attn.c_attn.weight": np.concatenate([p["attn_wq"], p["attn_wk"], p["attn_wv"]]).T,
        "attn.c_proj.weight": p["attn_wo"].T,
        "mlp.c_fc.weight": p["mlp_fc1"].T,
        "mlp.c_proj.weight": p["mlp_fc2"].T,
      }[kind]
    np.testing.assert_array_equal(value, np.float32(wanted), err_msg=name)


def test_padding_is_zero():
  config = dataclasses.replace(MODEL, vocab_multiple=32)
  params = draw_microgpt_params(42, 10, config)
  assert params["tok_embed"].shape == params["unembed"].shape == (32, 16)
  assert not params["tok_embed"][27:].any() and params["tok_embed"][:27].all()


@pytest.mark.parametrize(
  "changes", [{"biases": "mlp"}, {"tied_head": True}, {"positions": "sinusoidal"}]
)
def test_another_model_is_refused(changes):
  with pytest.raises(UserError, match=r"train\.init=microgpt draws microgpt's parameters"):
    draw_microgpt_params(42, 10, dataclasses.replace(MODEL, **changes))


def oracle_losses(num_steps, documents):
  """The losses of the NumPy GPT, float64, from the program's start, one document a step, the rate
  falling to 0 at 1,000.
  """
  random_state = random.getstate()
  flat = as_microgpt_draws(len(documents), MODEL)
  random.setstate(random_state)
  p = {k.removeprefix("layer0."): v for k, v in flat.items()}
  params = {
    "wte": p["wte"],
    "wpe": p["wpe"],
    "lm_head.weight": p["lm_head"],
    "h.0.attn.c_attn.weight": np.concatenate([p["attn_wq"], p["attn_wk"], p["attn_wv"]]).T,
    "h.0.attn.c_proj.weight": p["attn_wo"].T,
    "h.0.mlp.c_fc.weight": p["mlp_fc1"].T,
    "h.0.mlp.c_proj.weight": p["mlp_fc2"].T,
  }
  chars = sorted(set("".join(documents)))
  order = list(documents)
  random.Random(42).shuffle(order)

  def batches():
    for step in range(num_steps):
      ids = [26, *(chars.index(c) for c in order[step % len(order)]), 26][:17]
      yield np.array([ids[:-1]]), np.array([ids[1:]]), np.ones((1, len(ids) - 1))

  losses, *_ = numpy_gpt.train(
    params,
    batches(),
    MODEL,
    rate=lambda step: numpy_gpt.linear_rate(step, 0.01, 1000),
    b1=0.85,
    b2=0.99,
    eps=1e-8,
  )
  return np.array(losses)


def test_losses_are_those_of_the_program(tmp_path):
  """On a list of a few hundred names: 200 losses of the experiment, as it runs, are those of the
  oracle to 1e-5.
  """
  rng = random.Random(0)
  syllables = [
    "ka",
    "lo",
    "mi",
    "ne",
    "ru",
    "sha",
    "tho",
    "vy",
    "wen",
    "xa",
    "zo",
    "be",
    "cy",
    "dil",
    "fre",
    "gu",
    "hi",
    "jo",
    "pa",
    "que",
  ]
  documents = ["".join(rng.choices(syllables, k=rng.randint(1, 5))) for _ in range(400)] + [
    "abcdefghijklmnopqrstuvwxyz"
  ]
  (tmp_path / "names.txt").write_text("\n".join(documents) + "\n", encoding="utf-8")
  changes = {
    "data.path": str(tmp_path / "names.txt"),
    "train.steps": 200,
    "optimizer.decay_steps": 1000,
  }
  result = train.train_run(plan_run(change(MICROGPT, changes)))
  np.testing.assert_allclose(result.losses, oracle_losses(200, documents), atol=1e-5)


@pytest.mark.slow
def test_all_thousand_losses_with_the_original_names():
  """The experiment as it is, on names.txt: all 1,000 losses of microgpt.py to 1e-5."""
  folder = os.environ.get("JGPT_DATA_DIR")
  if not folder or not os.path.isfile(os.path.join(folder, "names.txt")):
    pytest.skip("names.txt is not at hand: JGPT_DATA_DIR names no folder that has it")
  with open(os.path.join(folder, "names.txt"), encoding="utf-8") as file:
    documents = file.read().split()
  result = train.train_run(plan_run(MICROGPT))
  assert len(documents) == 32_033 and len(result.losses) == 1000
  np.testing.assert_allclose(result.losses, oracle_losses(1000, documents), atol=1e-5)
  assert jnp.isfinite(jax.tree.leaves(result.params)[0]).all()
