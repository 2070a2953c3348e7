"""A test oracle: microgpt on scalar reverse-mode automatic differentiation.

This module computes the same losses, gradients, logits and Adam updates as the project, but by a
deliberately different route, so that agreement between the two means something. It holds:

* `Scalar`, one float that remembers which floats it was computed from, and `backward`, which
  applies the chain rule from a result back to everything the result depends on;
* microgpt's forward pass, written one position at a time with a growing key-value cache. There is
  no attention mask: a position cannot look ahead because later keys do not exist yet;
* the document loss, its gradients, and training with Adam under a linearly decaying rate.

What it is not is fast. It uses only the standard library, makes one Python object per
intermediate float, and computes in double precision. Use it on tiny models.

Parameters are a dict from name to matrix, a matrix being a list of rows. `parameter_shapes` lists
the names and shapes. Every matrix is stored (out, in) and applied as `y = W x`; there are no
biases. The public functions at the end of the file take and return plain floats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

RMSNORM_EPSILON = 1e-5


# --- Scalar automatic differentiation ---------------------------------------------------------


class Scalar:
  """A float together with how it was computed.

  Attributes:
      value: The number itself.
      grad: The derivative of the last `backward` root with respect to this scalar.
      parents: The scalars this one was computed from; empty for an input or a constant.
      derivatives: For each parent, the derivative of `value` with respect to that parent. A
          parent may be listed more than once; its contributions then add up.
  """

  __slots__ = ("derivatives", "grad", "parents", "value")

  def __init__(
    self,
    value: float,
    parents: Sequence[Scalar] = (),
    derivatives: Sequence[float] = (),
  ) -> None:
    self.value = float(value)
    self.grad = 0.0
    self.parents = parents
    self.derivatives = derivatives

  def __repr__(self) -> str:
    return f"Scalar(value={self.value!r}, grad={self.grad!r})"

  def __neg__(self) -> Scalar:
    return Scalar(-self.value, (self,), (-1.0,))

  def __add__(self, other: Scalar | float) -> Scalar:
    other = as_scalar(other)
    return Scalar(self.value + other.value, (self, other), (1.0, 1.0))

  def __sub__(self, other: Scalar | float) -> Scalar:
    other = as_scalar(other)
    return Scalar(self.value - other.value, (self, other), (1.0, -1.0))

  def __mul__(self, other: Scalar | float) -> Scalar:
    other = as_scalar(other)
    return Scalar(self.value * other.value, (self, other), (other.value, self.value))

  def __truediv__(self, other: Scalar | float) -> Scalar:
    other = as_scalar(other)
    quotient = self.value / other.value
    return Scalar(quotient, (self, other), (1.0 / other.value, -quotient / other.value))

  def __pow__(self, exponent: float) -> Scalar:
    """Raises to a constant power; the exponent is not differentiated."""
    derivative = exponent * self.value ** (exponent - 1)
    return Scalar(self.value**exponent, (self,), (derivative,))

  def __radd__(self, other: float) -> Scalar:
    return as_scalar(other) + self

  def __rsub__(self, other: float) -> Scalar:
    return as_scalar(other) - self

  def __rmul__(self, other: float) -> Scalar:
    return as_scalar(other) * self

  def __rtruediv__(self, other: float) -> Scalar:
    return as_scalar(other) / self

  def exp(self) -> Scalar:
    """Returns e to the power of this scalar."""
    result = math.exp(self.value)
    return Scalar(result, (self,), (result,))

  def log(self) -> Scalar:
    """Returns the natural logarithm."""
    return Scalar(math.log(self.value), (self,), (1.0 / self.value,))

  def relu(self) -> Scalar:
    """Returns max(0, x), with the derivative at zero taken to be zero."""
    if self.value > 0.0:
      return Scalar(self.value, (self,), (1.0,))
    return Scalar(0.0, (self,), (0.0,))


Vector = Sequence[Scalar]
Matrix = Sequence[Vector]
Parameters = Mapping[str, Matrix]
FloatParameters = Mapping[str, Sequence[Sequence[float]]]


def as_scalar(number: Scalar | float) -> Scalar:
  """Returns a scalar unchanged, and wraps a plain number as a constant."""
  return number if isinstance(number, Scalar) else Scalar(number)


def total(xs: Vector) -> Scalar:
  """Returns the sum of `xs` as a single node."""
  return Scalar(math.fsum(x.value for x in xs), tuple(xs), (1.0,) * len(xs))


def dot(xs: Vector, ys: Vector) -> Scalar:
  """Returns the inner product of `xs` and `ys` as a single node.

  Chaining `*` and `+` would give the same result from twice as many nodes as terms. Here the
  derivative with respect to each x is the matching y, and the other way round.
  """
  if len(xs) != len(ys):
    raise ValueError(f"dot needs equal lengths, got {len(xs)} and {len(ys)}")
  x_values = [x.value for x in xs]
  y_values = [y.value for y in ys]
  value = math.fsum(x * y for x, y in zip(x_values, y_values, strict=True))
  return Scalar(value, (*xs, *ys), (*y_values, *x_values))


def topological_order(root: Scalar) -> list[Scalar]:
  """Lists every node that `root` depends on, and `root`, each after all of its parents.

  This is a depth-first search with its own stack, because a long chain of operations would
  overflow Python's call stack. A node is on the stack twice: once to be entered, which pushes
  its parents above it, and once to be finished, when all of those have been listed.
  """
  order: list[Scalar] = []
  entered: set[Scalar] = set()
  stack = [(root, False)]
  while stack:
    node, parents_are_listed = stack.pop()
    if parents_are_listed:
      order.append(node)
    elif node not in entered:
      entered.add(node)
      stack.append((node, True))
      stack.extend((parent, False) for parent in node.parents if parent not in entered)
  return order


def backward(root: Scalar) -> None:
  """Sets `node.grad` to d root / d node, for `root` and every node it depends on.

  Grads left from an earlier call are overwritten. Nodes that `root` does not depend on are not
  reached, and keep the grad they have (0.0 for a fresh scalar).
  """
  order = topological_order(root)
  for node in order:
    node.grad = 0.0
  root.grad = 1.0
  # In reverse order a node comes after everything computed from it, so its grad is complete.
  for node in reversed(order):
    for parent, derivative in zip(node.parents, node.derivatives, strict=True):
      parent.grad += node.grad * derivative


# --- The model --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ScalarGPTConfig:
  """The hyper-parameters of the model.

  Attributes:
      vocab_size: Number of distinct tokens.
      context: Number of positions the model can see.
      d_model: Length of the vector that each position carries through the layers.
      num_heads: Attention heads per layer; must divide `d_model`.
      num_layers: Number of layers, each attention followed by a two-matrix MLP.
  """

  vocab_size: int
  context: int
  d_model: int
  num_heads: int
  num_layers: int

  def __post_init__(self) -> None:
    if self.d_model % self.num_heads != 0:
      raise ValueError(f"num_heads={self.num_heads} must divide d_model={self.d_model}")

  @property
  def head_dim(self) -> int:
    """Length of one head's slice of the queries, keys and values."""
    return self.d_model // self.num_heads


def parameter_shapes(config: ScalarGPTConfig) -> dict[str, tuple[int, int]]:
  """Returns the (rows, columns) of every parameter, by name."""
  d_model = config.d_model
  shapes = {
    "wte": (config.vocab_size, d_model),
    "wpe": (config.context, d_model),
    "lm_head": (config.vocab_size, d_model),
  }
  for layer in range(config.num_layers):
    for name in ("attn_wq", "attn_wk", "attn_wv", "attn_wo"):
      shapes[f"layer{layer}.{name}"] = (d_model, d_model)
    shapes[f"layer{layer}.mlp_fc1"] = (4 * d_model, d_model)
    shapes[f"layer{layer}.mlp_fc2"] = (d_model, 4 * d_model)
  return shapes


class KeyValueCache:
  """The keys and values of the positions seen so far.

  Attributes:
      keys: `keys[layer][t]` is the key vector, all heads together, of position t.
      values: `values[layer][t]` is likewise the value vector.
  """

  def __init__(self, num_layers: int) -> None:
    self.keys: list[list[Vector]] = [[] for _ in range(num_layers)]
    self.values: list[list[Vector]] = [[] for _ in range(num_layers)]


def add(xs: Vector, ys: Vector) -> list[Scalar]:
  """Adds two vectors elementwise."""
  return [x + y for x, y in zip(xs, ys, strict=True)]


def linear(matrix: Matrix, xs: Vector) -> list[Scalar]:
  """Returns the matrix-vector product `matrix xs`."""
  return [dot(row, xs) for row in matrix]


def rmsnorm(xs: Vector) -> list[Scalar]:
  """Divides a vector by its root mean square; there is no learned gain."""
  mean_square = dot(xs, xs) / len(xs)
  scale = (mean_square + RMSNORM_EPSILON) ** -0.5
  return [x * scale for x in xs]


def softmax(xs: Vector) -> list[Scalar]:
  """Turns scores into probabilities.

  The largest score is subtracted first so that `exp` cannot overflow. Shifting every score by
  the same amount leaves the result as it is, so the shift can be a plain constant.
  """
  largest = max(x.value for x in xs)
  exponentials = [(x - largest).exp() for x in xs]
  normalizer = total(exponentials)
  return [exponential / normalizer for exponential in exponentials]


def attend(query: Vector, keys: Matrix, values: Matrix, num_heads: int) -> list[Scalar]:
  """Runs multi-head attention for one query over all cached positions.

  Args:
      query: The current position's query, all heads together.
      keys: One key per position so far, the current one included.
      values: One value per position so far, the current one included.
      num_heads: Number of equal contiguous slices that the vectors are cut into.

  Returns:
      The heads' outputs, concatenated in order.
  """
  head_dim = len(query) // num_heads
  scale = math.sqrt(head_dim)
  outputs = []
  for head in range(num_heads):
    start, stop = head * head_dim, (head + 1) * head_dim
    scores = [dot(query[start:stop], key[start:stop]) / scale for key in keys]
    weights = softmax(scores)
    outputs += [dot(weights, [value[column] for value in values]) for column in range(start, stop)]
  return outputs


def forward(
  params: Parameters, token: int, position: int, cache: KeyValueCache, config: ScalarGPTConfig
) -> list[Scalar]:
  """Computes the next-token logits at one position.

  Args:
      params: The model's parameters.
      token: The token at this position.
      position: Its index, counting from zero.
      cache: The keys and values of all earlier positions; this position's are appended to it.
      config: The hyper-parameters.

  Returns:
      One logit per vocabulary entry.
  """
  x = rmsnorm(add(params["wte"][token], params["wpe"][position]))
  for layer in range(config.num_layers):
    prefix = f"layer{layer}."
    keys, values = cache.keys[layer], cache.values[layer]

    residual = x
    x = rmsnorm(x)
    query = linear(params[prefix + "attn_wq"], x)
    keys.append(linear(params[prefix + "attn_wk"], x))
    values.append(linear(params[prefix + "attn_wv"], x))
    x = attend(query, keys, values, config.num_heads)
    x = add(linear(params[prefix + "attn_wo"], x), residual)

    residual = x
    x = rmsnorm(x)
    x = [hidden.relu() for hidden in linear(params[prefix + "mlp_fc1"], x)]
    x = add(linear(params[prefix + "mlp_fc2"], x), residual)
  return linear(params["lm_head"], x)


def document_loss(params: Parameters, tokens: Sequence[int], config: ScalarGPTConfig) -> Scalar:
  """Returns the mean negative log-likelihood of a document's next tokens, in nats.

  Args:
      params: The model's parameters.
      tokens: The document: BOS, its characters, BOS. What does not fit the context is ignored.
      config: The hyper-parameters.

  Returns:
      The mean over positions t of -log p(tokens[t + 1] | tokens[: t + 1]).
  """
  num_positions = min(config.context, len(tokens) - 1)
  if num_positions < 1:
    raise ValueError("a document needs at least two tokens")
  cache = KeyValueCache(config.num_layers)
  losses = []
  for position in range(num_positions):
    logits = forward(params, tokens[position], position, cache, config)
    target = tokens[position + 1]
    losses.append(-softmax(logits)[target].log())
  return total(losses) / num_positions


# --- Floats in, floats out --------------------------------------------------------------------


def map_entries(
  function: Callable[..., Any], *trees: Mapping[str, Sequence[Sequence[Any]]]
) -> dict[str, list[list[Any]]]:
  """Applies `function` to matching entries of one or more parameter dicts.

  Returns:
      A new dict of the same structure holding the results.
  """
  return {
    name: [
      [function(*entries) for entries in zip(*rows, strict=True)]
      for rows in zip(*(tree[name] for tree in trees), strict=True)
    ]
    for name in trees[0]
  }


def scalar_parameters(
  values: FloatParameters, config: ScalarGPTConfig
) -> dict[str, list[list[Scalar]]]:
  """Wraps every float in a fresh `Scalar`, after checking names and shapes.

  Raises:
      ValueError: If a name is missing or unknown, or a matrix has the wrong shape.
  """
  shapes = parameter_shapes(config)
  if values.keys() != shapes.keys():
    raise ValueError(f"wrong parameter names: {sorted(values.keys() ^ shapes.keys())}")
  for name, (num_rows, num_columns) in shapes.items():
    if [len(row) for row in values[name]] != [num_columns] * num_rows:
      raise ValueError(f"{name} must be {num_rows} x {num_columns}")
  return map_entries(Scalar, values)


def logits_at_each_position(
  values: FloatParameters, tokens: Sequence[int], config: ScalarGPTConfig
) -> list[list[float]]:
  """Returns the next-token logits after each input token.

  Args:
      values: The model's parameters, as floats.
      tokens: The input tokens; those beyond `config.context` are ignored.
      config: The hyper-parameters.

  Returns:
      A list of min(context, len(tokens)) rows, each of `vocab_size` logits.
  """
  params = scalar_parameters(values, config)
  cache = KeyValueCache(config.num_layers)
  return [
    [logit.value for logit in forward(params, token, position, cache, config)]
    for position, token in enumerate(tokens[: config.context])
  ]


def loss_and_gradients(
  values: FloatParameters, tokens: Sequence[int], config: ScalarGPTConfig
) -> tuple[float, dict[str, list[list[float]]]]:
  """Returns `document_loss` and its derivative with respect to every parameter.

  Args:
      values: The model's parameters, as floats.
      tokens: The document: BOS, its characters, BOS.
      config: The hyper-parameters.

  Returns:
      The loss, and a dict of the same structure as `values` holding the gradient.
  """
  params = scalar_parameters(values, config)
  loss = document_loss(params, tokens, config)
  backward(loss)
  return loss.value, map_entries(lambda parameter: parameter.grad, params)


def adam_update(
  values: FloatParameters,
  gradients: FloatParameters,
  m: FloatParameters,
  v: FloatParameters,
  *,
  step: int,
  lr: float,
  b1: float,
  b2: float,
  eps: float,
) -> tuple[dict[str, list[list[float]]], ...]:
  """Makes one Adam update; `step` counts from zero and `lr` is this step's rate.

  Returns:
      The new parameters, first moments m and second moments v.
  """
  m = map_entries(lambda old, g: b1 * old + (1 - b1) * g, m, gradients)
  v = map_entries(lambda old, g: b2 * old + (1 - b2) * g**2, v, gradients)
  # The moments start at zero; dividing by these makes up for the weight that start still has.
  m_correction = 1 - b1 ** (step + 1)
  v_correction = 1 - b2 ** (step + 1)

  def updated(parameter: float, m_entry: float, v_entry: float) -> float:
    m_hat = m_entry / m_correction
    v_hat = v_entry / v_correction
    return parameter - lr * m_hat / (math.sqrt(v_hat) + eps)

  return map_entries(updated, values, m, v), m, v


class AdamResult(NamedTuple):
  """What `adam_steps` returns.

  Attributes:
      values: The parameters after the last step.
      losses: The loss at each step, measured before that step's update.
      first_moments: Adam's m after the last step, without bias correction.
      second_moments: Adam's v after the last step, without bias correction.
  """

  values: dict[str, list[list[float]]]
  losses: list[float]
  first_moments: dict[str, list[list[float]]]
  second_moments: dict[str, list[list[float]]]


def adam_steps(
  values: FloatParameters,
  documents: Sequence[Sequence[int]],
  config: ScalarGPTConfig,
  *,
  num_steps: int,
  total_steps: int,
  lr: float = 0.01,
  b1: float = 0.85,
  b2: float = 0.99,
  eps: float = 1e-8,
) -> AdamResult:
  """Trains with Adam from zero moments, one document per step.

  Args:
      values: The initial parameters, as floats; not modified.
      documents: The training documents, taken in order and then from the start again.
      config: The hyper-parameters.
      num_steps: Number of steps to take.
      total_steps: The step at which the linearly decaying learning rate would reach zero.
      lr: Learning rate of step 0.
      b1: Decay rate of the first moments.
      b2: Decay rate of the second moments.
      eps: Added to the square root of the corrected second moment.

  Returns:
      The final parameters, the loss of every step, and the final moments.
  """
  values = map_entries(float, values)
  m = map_entries(lambda _: 0.0, values)
  v = map_entries(lambda _: 0.0, values)
  losses = []
  for step in range(num_steps):
    loss, gradients = loss_and_gradients(values, documents[step % len(documents)], config)
    losses.append(loss)
    step_lr = lr * (1 - step / total_steps)
    values, m, v = adam_update(
      values, gradients, m, v, step=step, lr=step_lr, b1=b1, b2=b2, eps=eps
    )
  return AdamResult(values, losses, m, v)
