"""The NumPy oracle checked against itself: finite differences, worked values and properties.

Nothing of the project.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from reference import numpy_gpt as oracle

H = 1e-5  # half the distance of a central difference: small, as ReLU has kinks


@dataclasses.dataclass(frozen=True)
class Config:
  vocab_size: int = 7
  max_seq_len: int = 5
  num_layers: int = 2
  num_heads: int = 2
  d_model: int = 4
  d_ff: int = 6
  norm: str = "layer"
  norm_embed: bool = False
  norm_final: bool = True
  activation: str = "gelu_tanh"
  positions: str = "learned"
  biases: str = "all"
  tied_head: bool = True
  scale_embed: bool = False


GPT2 = Config()

# Every value of every switch appears.
COVERING = [
  GPT2,
  Config(
    norm="rms", norm_embed=True, norm_final=False, activation="relu", biases="none", tied_head=False
  ),
  Config(
    norm="layer_no_bias",
    activation="gelu_erf",
    positions="sinusoidal",
    biases="mlp",
    scale_embed=True,
  ),
  Config(norm="rms", activation="gelu_erf", biases="all", scale_embed=True),
  Config(
    norm="layer",
    norm_final=False,
    activation="relu",
    positions="sinusoidal",
    biases="mlp",
    tied_head=False,
  ),
]

SIZES = dataclasses.astuple(GPT2)[:6]
EVERY = [
  Config(*SIZES, *values)
  for values in itertools.product(
    oracle.NORMS,
    (False, True),
    (False, True),
    oracle.ACTIVATIONS,
    oracle.POSITIONS,
    oracle.BIASES,
    (False, True),
    (False, True),
  )
  if values[0] == "rms" or not values[1]
]


def random_params(config, rng):
  """Returns parameters far from any symmetric point: gains about 1, all others about 0."""
  return {
    name: 0.5 * rng.normal(size=shape) + ("ln_" in name and name.endswith("weight"))
    for name, shape in oracle.parameter_shapes(config).items()
  }


def random_batch(config, rng, B=2, T=4):
  tokens_BT, targets_BT = rng.integers(config.vocab_size, size=(2, B, T))
  weights_BT = rng.uniform(0.5, 2, (B, T))
  weights_BT[0, 1] = 0
  return tokens_BT, targets_BT, weights_BT


def mask_shapes(config, B=2, T=4):
  shapes = {"embed": (B, T, config.d_model)}
  for i in range(config.num_layers):
    shapes[f"h.{i}.attention"] = (B, config.num_heads, T, T)
    shapes[f"h.{i}.attention_out"] = (B, T, config.d_model)
    shapes[f"h.{i}.activation"] = (B, T, config.d_ff)
    shapes[f"h.{i}.mlp_out"] = (B, T, config.d_model)
  return shapes


def random_masks(config, rng):
  masks = {
    name: (rng.uniform(size=shape) < 0.75) / 0.75 for name, shape in mask_shapes(config).items()
  }
  masks["embed"][..., 0] = (
    1 / 0.75
  )  # no position loses all: a norm's slope there is 1 / sqrt(epsilon)
  return masks


def loss_of(params, batch, config, masks):
  return oracle.loss_and_gradients(params, *batch, config, masks)[0]


# --- Gradients --------------------------------------------------------------------------------


def test_the_covering_set_covers():
  for field in dataclasses.fields(Config)[6:]:
    assert {getattr(c, field.name) for c in COVERING} == {getattr(c, field.name) for c in EVERY}


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("config", COVERING, ids=lambda c: f"{c.norm}-{c.activation}")
def test_gradients_match_central_differences(config, dropout):
  rng = np.random.default_rng(0)
  params, batch = random_params(config, rng), random_batch(config, rng)
  masks = random_masks(config, rng) if dropout else None
  _, gradients = oracle.loss_and_gradients(params, *batch, config, masks)
  assert list(gradients) == list(params)

  for name, p in params.items():
    measured = np.empty(p.shape)
    for index in np.ndindex(p.shape):
      there = p[index]
      p[index] = there + H
      above = loss_of(params, batch, config, masks)
      p[index] = there - H
      measured[index] = (above - loss_of(params, batch, config, masks)) / (2 * H)
      p[index] = there
    np.testing.assert_allclose(gradients[name], measured, rtol=1e-6, atol=2e-9, err_msg=name)
    assert np.abs(gradients[name]).max() > 1e-4, f"{name} was not tested: its gradient vanishes"


def test_gradients_of_every_combination_match_along_one_direction():
  rng = np.random.default_rng(1)
  for switches in EVERY:
    config = dataclasses.replace(switches, num_layers=1)
    params, batch = random_params(config, rng), random_batch(config, rng)
    masks = random_masks(config, rng) if rng.integers(2) else None
    direction = {name: 0.1 * rng.normal(size=p.shape) for name, p in params.items()}
    _, gradients = oracle.loss_and_gradients(params, *batch, config, masks)
    expected = sum((gradients[name] * direction[name]).sum() for name in params)
    above, below = (
      loss_of({name: p + h * direction[name] for name, p in params.items()}, batch, config, masks)
      for h in (H, -H)
    )
    assert (above - below) / (2 * H) == pytest.approx(expected, rel=1e-6, abs=2e-9), config


# --- The forward pass -------------------------------------------------------------------------


@pytest.mark.parametrize("config", COVERING, ids=lambda c: f"{c.norm}-{c.activation}")
def test_no_position_sees_a_later_one(config):
  rng = np.random.default_rng(2)
  params, (tokens_BT, _, _) = random_params(config, rng), random_batch(config, rng)
  logits = oracle.forward(params, tokens_BT, config)
  changed_BT = tokens_BT.copy()
  changed_BT[:, 2] = (changed_BT[:, 2] + 1) % config.vocab_size
  changed = oracle.forward(params, changed_BT, config)
  np.testing.assert_allclose(changed[:, :2], logits[:, :2], rtol=0, atol=1e-14)
  assert (np.abs(changed - logits)[:, 2:].max(-1) > 1e-6).all()  # it and all later ones do
  np.testing.assert_allclose(
    oracle.forward(params, tokens_BT[:, :2], config), logits[:, :2], rtol=0, atol=1e-14
  )


def test_the_network_is_the_formula_written_out():
  """One position at a time and one head at a time, for GPT-2's switches."""
  rng = np.random.default_rng(3)
  p, (tokens_BT, _, _) = random_params(GPT2, rng), random_batch(GPT2, rng)

  def norm(x, name):
    return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

  def linear(x, name):
    return np.einsum("i,io->o", x, p[f"{name}.weight"]) + p[f"{name}.bias"]

  def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

  expected_BTV = []
  for tokens in tokens_BT:
    xs = [p["wte"][token] + p["wpe"][t] for t, token in enumerate(tokens)]
    for i in range(2):
      qkvs = [linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn") for x in xs]
      for t in range(len(xs)):
        heads = []
        for q, k, v in (
          (slice(0, 2), slice(4, 6), slice(8, 10)),
          (slice(2, 4), slice(6, 8), slice(10, 12)),
        ):
          e = [math.exp(np.dot(qkvs[t][q], qkvs[s][k]) / math.sqrt(2)) for s in range(t + 1)]
          heads.append(sum(e[s] / sum(e) * qkvs[s][v] for s in range(t + 1)))
        x = xs[t] + linear(np.concatenate(heads), f"h.{i}.attn.c_proj")
        xs[t] = x + linear(
          gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj"
        )
    expected_BTV.append([p["wte"] @ norm(x, "ln_f") for x in xs])
  np.testing.assert_allclose(
    oracle.forward(p, tokens_BT, GPT2), expected_BTV, rtol=1e-12, atol=1e-13
  )


def test_layers_have_their_worked_values():
  x = np.array([3.0, -4.0, 0.0, 1.0])  # mean 0, mean square 6.5
  expected = x / math.sqrt(6.5 + 1e-5)
  np.testing.assert_allclose(oracle.rms_norm_forward(x)[0], expected, rtol=1e-15)
  np.testing.assert_allclose(
    oracle.rms_norm_forward(x + 4)[0], (x + 4) / math.sqrt(22.5 + 1e-5), rtol=1e-15
  )
  np.testing.assert_allclose(
    oracle.layer_norm_forward(x + 4, np.full(4, 2.0), np.ones(4))[0], 2 * expected + 1, rtol=1e-14
  )
  np.testing.assert_allclose(
    oracle.layer_norm_forward(x + 4, np.full(4, 2.0), None)[0], 2 * expected, rtol=1e-14
  )

  x = np.array([-1.0, 0.0, 1.0])
  np.testing.assert_array_equal(oracle.relu_forward(x)[0], [0, 0, 1])
  np.testing.assert_allclose(
    oracle.gelu_erf_forward(x)[0], [-0.15865525393145707, 0, 0.8413447460685429], rtol=1e-14
  )
  np.testing.assert_allclose(
    oracle.gelu_tanh_forward(x)[0], [-0.15880800939172324, 0, 0.8411919906082768], rtol=1e-14
  )

  table_TD = oracle.sinusoidal_positions(3, 4)
  np.testing.assert_array_equal(table_TD[0], [0, 1, 0, 1])
  expected = [math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)]
  np.testing.assert_allclose(table_TD[2], expected, rtol=1e-15)

  logits_BTV = np.log([[[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]]])
  loss, _ = oracle.cross_entropy_forward(logits_BTV, np.array([[1, 2]]), np.array([[3.0, 1.0]]))
  assert loss == pytest.approx((3 * math.log(4) + math.log(2)) / 4, rel=1e-15)


def test_the_embedding_and_the_head_follow_their_switches():
  """Without layers the logits are the head's rows times the normed embedding."""
  rng = np.random.default_rng(4)
  for switches in EVERY:
    config = dataclasses.replace(switches, num_layers=0)
    params, (tokens_BT, _, _) = random_params(config, rng), random_batch(config, rng)
    x = params["wte"][tokens_BT] * (2 if config.scale_embed else 1)
    x = x + (
      params["wpe"][:4] if config.positions == "learned" else oracle.sinusoidal_positions(4, 4)
    )
    for norm in [config.norm_embed, config.norm_final]:
      if norm and config.norm == "rms":
        x = oracle.rms_norm_forward(x)[0]
      elif norm:
        x = oracle.layer_norm_forward(x, params["ln_f.weight"], params.get("ln_f.bias"))[0]
    expected = np.einsum("btd,vd->btv", x, params["wte" if config.tied_head else "lm_head.weight"])
    np.testing.assert_allclose(
      oracle.forward(params, tokens_BT, config), expected, rtol=1e-12, atol=1e-14
    )


def test_masks_multiply_where_they_are_named():
  rng = np.random.default_rng(5)
  params, (tokens_BT, _, _) = random_params(GPT2, rng), random_batch(GPT2, rng)
  logits = oracle.forward(params, tokens_BT, GPT2)
  shapes = mask_shapes(GPT2)

  ones = {name: np.ones(shape) for name, shape in shapes.items()}
  np.testing.assert_array_equal(oracle.forward(params, tokens_BT, GPT2, ones), logits)
  for name, shape in shapes.items():  # each has an effect of its own, and broadcasts
    halved = oracle.forward(params, tokens_BT, GPT2, {name: np.full(shape, 0.5)})
    assert np.abs(halved - logits).max() > 1e-3
    np.testing.assert_array_equal(
      oracle.forward(params, tokens_BT, GPT2, {name: np.array(0.5)}), halved
    )

  def zeroed(*names):  # the same by parameters
    return {n: np.zeros_like(p) if n.startswith(names) else p for n, p in params.items()}

  for mask, names in {
    "embed": ("wte", "wpe"),
    "h.1.attention_out": ("h.1.attn.c_proj",),
    "h.1.activation": ("h.1.mlp.c_proj.weight",),
    "h.1.mlp_out": ("h.1.mlp.c_proj",),
    "h.1.attention": ("h.1.attn.c_proj.weight",),
  }.items():
    config = dataclasses.replace(GPT2, tied_head=False)
    head = {"lm_head.weight": params["wte"]}
    masked = oracle.forward(params | head, tokens_BT, config, {mask: np.zeros(shapes[mask])})
    np.testing.assert_allclose(
      masked, oracle.forward(zeroed(*names) | head, tokens_BT, config), rtol=1e-13
    )

  # Attention's mask scales probabilities after the softmax: a doubled column doubles what is taken
  # from that key.
  qkv_BTC = rng.normal(size=(1, 2, 6))
  mask_BNTT = np.array([[[[1.0, 1.0], [2.0, 1.0]]]])
  plain, _ = oracle.attention_forward(qkv_BTC, 1, None)
  masked, saved = oracle.attention_forward(qkv_BTC, 1, mask_BNTT)
  p_BNTT = saved[3]
  np.testing.assert_allclose(
    masked[0, 1] - plain[0, 1], p_BNTT[0, 0, 1, 0] * qkv_BTC[0, 0, 4:], rtol=1e-13
  )
  np.testing.assert_array_equal(masked[0, 0], plain[0, 0])


def test_weights_are_relative_and_weight_zero_does_not_count():
  rng = np.random.default_rng(6)
  params, (tokens_BT, targets_BT, weights_BT) = random_params(GPT2, rng), random_batch(GPT2, rng)
  loss, gradients = oracle.loss_and_gradients(params, tokens_BT, targets_BT, weights_BT, GPT2)
  other_BT = np.where(weights_BT == 0, (targets_BT + 1) % 7, targets_BT)
  other_loss, other = oracle.loss_and_gradients(params, tokens_BT, other_BT, 3 * weights_BT, GPT2)
  assert other_loss == pytest.approx(loss, rel=1e-14)
  for name in params:
    np.testing.assert_allclose(other[name], gradients[name], rtol=1e-12, atol=1e-15)


def test_parameters_are_those_the_switches_call_for():
  layer = {
    "attn.c_attn.weight": (4, 12),
    "attn.c_proj.weight": (4, 4),
    "mlp.c_fc.weight": (4, 6),
    "mlp.c_proj.weight": (6, 4),
  }
  bare = {"wte": (7, 4)} | {f"h.0.{name}": shape for name, shape in layer.items()}
  config = Config(num_layers=1, norm="rms", positions="sinusoidal", biases="none")
  assert oracle.parameter_shapes(config) == bare

  def added(**changes):
    return set(oracle.parameter_shapes(dataclasses.replace(config, **changes)).items()) - set(
      bare.items()
    )

  gains = {(f"{name}.weight", (4,)) for name in ("h.0.ln_1", "h.0.ln_2", "ln_f")}
  mlp = {("h.0.mlp.c_fc.bias", (6,)), ("h.0.mlp.c_proj.bias", (4,))}
  assert added(norm="layer_no_bias") == gains
  assert added(norm="layer") == gains | {
    (name.replace("weight", "bias"), shape) for name, shape in gains
  }
  assert added(norm="layer_no_bias", norm_final=False) == gains - {("ln_f.weight", (4,))}
  assert added(biases="mlp") == mlp
  assert added(biases="all") == mlp | {
    ("h.0.attn.c_attn.bias", (12,)),
    ("h.0.attn.c_proj.bias", (4,)),
  }
  assert added(positions="learned") == {("wpe", (5, 4))}
  assert added(tied_head=False) == {("lm_head.weight", (7, 4))}
  assert added(norm_embed=True, norm_final=False, scale_embed=True, activation="relu") == set()


def test_what_it_cannot_mean_is_refused():
  rng = np.random.default_rng(7)
  params, (tokens_BT, targets_BT, weights_BT) = random_params(GPT2, rng), random_batch(GPT2, rng)
  for changes in [
    {"norm_embed": True},
    {"norm": "batch"},
    {"activation": "gelu"},
    {"biases": "some"},
    {"num_heads": 3},
  ]:
    with pytest.raises(ValueError):
      oracle.parameter_shapes(dataclasses.replace(GPT2, **changes))
  for wrong in [
    lambda: oracle.forward({"wte": params["wte"]}, tokens_BT, GPT2),
    lambda: oracle.forward(params | {"wpe": params["wpe"][:4]}, tokens_BT, GPT2),
    lambda: oracle.forward(params, -1 - tokens_BT, GPT2),
    lambda: oracle.forward(params, np.zeros((1, 6), int), GPT2),
    lambda: oracle.forward(params, tokens_BT, GPT2, {"h.0.atention": np.array(1.0)}),
    lambda: oracle.forward(params, tokens_BT, GPT2, {"embed": np.ones((9, 2, 4, 4))}),
    lambda: oracle.loss_and_gradients(params, tokens_BT, targets_BT, 0 * weights_BT, GPT2),
    lambda: oracle.loss_and_gradients(params, tokens_BT, targets_BT, weights_BT[:1], GPT2),
  ]:
    with pytest.raises(ValueError):
      wrong()


# --- Optimizer and training -------------------------------------------------------------------


def zeros(params):
  return {name: np.zeros_like(p) for name, p in params.items()}


def test_adam_first_moves_by_the_rate_against_the_sign():
  params, gradients = {"a": np.array([1.0, 2.0, 3.0])}, {"a": np.array([1e-3, -50.0, 0.0])}
  settings = {"lr": 0.1, "b1": 0.9, "b2": 0.95, "weight_decay": 0.5, "decayed": set()}
  new, m, v = oracle.adamw_update(
    params, gradients, zeros(params), zeros(params), 1, eps=1e-12, **settings
  )
  np.testing.assert_allclose(new["a"], [0.9, 2.1, 3.0], rtol=1e-9)
  np.testing.assert_allclose(m["a"], 0.1 * gradients["a"])
  np.testing.assert_allclose(v["a"], 0.05 * gradients["a"] ** 2)
  np.testing.assert_array_equal(params["a"], [1, 2, 3])  # the old ones are left
  new, _, _ = oracle.adamw_update(
    params, {"a": np.ones(3)}, zeros(params), zeros(params), 1, eps=1.0, **settings
  )
  np.testing.assert_allclose(new["a"], params["a"] - 0.1 / (1 + 1.0))  # eps is added to the root


def test_adam_has_its_worked_second_update_and_decay():
  params = {"a": np.array([10.0]), "b": np.array([10.0])}
  m, v = zeros(params), zeros(params)
  settings = {"lr": 0.5, "b1": 0.5, "b2": 0.75, "eps": 0.0, "weight_decay": 0.1, "decayed": {"b"}}
  params, m, v = oracle.adamw_update(
    params, {"a": np.ones(1), "b": np.ones(1)}, m, v, 1, **settings
  )
  np.testing.assert_allclose([params["a"][0], params["b"][0]], [9.5, 9.5 - 0.5 * 0.1 * 10])
  params, m, v = oracle.adamw_update(
    params, {"a": np.full(1, 2.0), "b": np.full(1, 2.0)}, m, v, 2, **settings
  )
  moved = 0.5 * (5 / 3) / math.sqrt(19 / 7)  # m = 5/4 of 3/4, v = 19/16 of 7/16
  np.testing.assert_allclose(
    [params["a"][0], params["b"][0]], [9.5 - moved, 9.0 - moved - 0.5 * 0.1 * 9.0]
  )
  np.testing.assert_allclose([m["a"][0], v["a"][0]], [1.25, 1.1875])


def test_decay_in_the_gradient_and_momentum_have_worked_values():
  """The gradient 1 at 10 decays by 0.1 * 10: Adam and SGD see 2 where it does, in their moments."""
  params, ones = {"a": np.array([10.0]), "b": np.array([10.0])}, {"a": np.ones(1), "b": np.ones(1)}
  settings = {"lr": 0.5, "weight_decay": 0.1, "decayed": {"b"}}
  new, m, v = oracle.adam_update(
    params, ones, zeros(params), zeros(params), 1, b1=0.5, b2=0.75, eps=0.0, **settings
  )
  assert [*m.values(), *v.values()] == [
    0.5,
    1.0,
    0.25,
    1.0,
  ]  # half of 1 and 2, a quarter of 1 and 4
  assert [*new.values()] == [9.5, 9.5]  # whatever the size of a first gradient
  new, m = oracle.sgd_update(params, ones, zeros(params), momentum=0.5, **settings)
  assert [*m.values(), *new.values()] == [1.0, 2.0, 9.5, 9.0]
  new, m = oracle.sgd_update(new, ones, m, momentum=0.5, **settings)
  assert [*m.values()] == pytest.approx([1.5, 1.0 + 1.9])
  assert [*new.values()] == pytest.approx([9.5 - 0.75, 9.0 - 1.45])
  with pytest.raises(ValueError, match="no parameters are named"):
    oracle.sgd_update(params, ones, m, momentum=0.5, **settings | {"decayed": {"c"}})


def test_clipping_is_by_the_norm_of_all_and_only_above_it():
  gradients = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
  assert oracle.global_norm(gradients) == 5
  for max_norm, scale in [(1.0, 0.2), (4.0, 0.8), (5.0, 1.0), (6.0, 1.0)]:
    clipped = oracle.clip_by_global_norm(gradients, max_norm)
    for name in gradients:
      np.testing.assert_allclose(clipped[name], scale * gradients[name], rtol=1e-15)


def test_schedules_have_their_worked_values():
  assert oracle.constant_rate(17, 0.3) == 0.3
  assert [oracle.linear_rate(s, 0.4, 4) for s in range(5)] == pytest.approx(
    [0.4, 0.3, 0.2, 0.1, 0.0]
  )

  def cosine(from_zero):
    settings = {"peak": 1.0, "end": 0.2, "warmup": 2, "total": 6, "warmup_from_zero": from_zero}
    return [oracle.cosine_rate(s, **settings) for s in range(8)]

  falling = [1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2, 0.2]
  assert cosine(True) == pytest.approx([0, 1 / 2, *falling])
  assert cosine(False) == pytest.approx([1 / 3, 2 / 3, *falling])

  def wsd(from_zero):
    settings = {
      "peak": 1.0,
      "end": 0.2,
      "warmup": 2,
      "total": 8,
      "cooldown": 4,
      "warmup_from_zero": from_zero,
    }
    return [oracle.wsd_rate(s, **settings) for s in range(10)]

  falling = [1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
  assert wsd(True) == pytest.approx([0, 1 / 2, *falling])
  assert wsd(False) == pytest.approx([1 / 3, 2 / 3, *falling])

  settings = {"peak": 1.0, "end": 0.0, "warmup": 0, "total": 2, "warmup_from_zero": True}
  assert [oracle.cosine_rate(s, **settings) for s in range(3)] == pytest.approx([1, 0.5, 0])
  assert [oracle.wsd_rate(s, cooldown=0, **settings) for s in range(3)] == [1, 1, 0]


def test_training_is_its_parts_in_order_and_learns():
  rng = np.random.default_rng(8)
  params = random_params(GPT2, rng)
  batches = [random_batch(GPT2, rng) for _ in range(3)]
  adam = {"b1": 0.8, "b2": 0.9, "eps": 1e-8, "weight_decay": 0.1, "decayed": {"wte"}}
  rates = [0.01, 0.02, 0.005]
  losses, trained, m, v = oracle.train(
    params, iter(batches), GPT2, rate=rates.__getitem__, clip_norm=0.5, **adam
  )
  by_hand, m_by_hand, v_by_hand = params, zeros(params), zeros(params)
  for t, (batch, lr) in enumerate(zip(batches, rates, strict=True), 1):
    loss, gradients = oracle.loss_and_gradients(by_hand, *batch, GPT2)
    assert losses[t - 1] == pytest.approx(loss, rel=1e-13)
    assert oracle.global_norm(gradients) > 0.5  # clipping is at work
    gradients = oracle.clip_by_global_norm(gradients, 0.5)
    by_hand, m_by_hand, v_by_hand = oracle.adamw_update(
      by_hand, gradients, m_by_hand, v_by_hand, t, lr=lr, **adam
    )
  for got, expected in [(trained, by_hand), (m, m_by_hand), (v, v_by_hand)]:
    for name in params:
      np.testing.assert_allclose(got[name], expected[name], rtol=1e-9, atol=1e-12)

  losses, _, _, _ = oracle.train(
    params, batches[:1] * 100, GPT2, rate=lambda _: 0.02, b1=0.9, b2=0.99, eps=1e-8
  )
  assert losses[-1] < 0.5 * losses[0]
