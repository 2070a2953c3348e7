"""A names GPT in plain Python, which `bench` times as the peer "plain Python".

It computes what microgpt.py does, with a Python object for each number: the network of `names`, its
gradient by reverse-mode differentiation, and Adam. It needs the standard library only. The process
that runs it is in `peers.py`.

Parameters are matrices by name. A matrix is a list of rows, one for each output, token or position.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
from collections.abc import Sequence
from typing import NamedTuple

from jgpt.config import Experiment, ModelConfig

BLOCK_MATRICES = ("query", "key", "value", "out", "up", "down")  # followed by the block's number


class Value:
  """A number in a graph of computations.

  Attributes:
    data: the number.
    grad: derivative of the value whose `backward` was called with respect to this one.
    inputs: values it was computed from.
    local_grads: its derivative with respect to each input.
  """

  __slots__ = ("data", "grad", "inputs", "local_grads")

  def __init__(self, data: float, inputs: Sequence[Value] = (), local_grads: Sequence[float] = ()):
    self.data, self.grad, self.inputs, self.local_grads = data, 0.0, inputs, local_grads

  def __add__(self, other: Value) -> Value:
    return Value(self.data + other.data, (self, other), (1.0, 1.0))

  def __sub__(self, other: Value) -> Value:
    return Value(self.data - other.data, (self, other), (1.0, -1.0))

  def __mul__(self, other: Value) -> Value:
    return Value(self.data * other.data, (self, other), (other.data, self.data))

  def scale(self, factor: float) -> Value:
    """Multiplies by a constant."""
    return Value(self.data * factor, (self,), (factor,))

  def exp(self) -> Value:
    """Computes e to the power of this value."""
    power = math.exp(self.data)
    return Value(power, (self,), (power,))

  def backward(self) -> None:
    """Sets the `grad` of every value that this one depends on; call it once for a graph."""
    ordered, seen, path = [], {self}, [(self, iter(self.inputs))]
    while path:  # depth first; the graph is too deep for recursion
      value, rest = path[-1]
      unseen = next((x for x in rest if x not in seen), None)
      if unseen is None:
        ordered.append(value)
        path.pop()
      else:
        seen.add(unseen)
        path.append((unseen, iter(unseen.inputs)))
    self.grad = 1.0
    for value in reversed(ordered):
      for x, local_grad in zip(value.inputs, value.local_grads, strict=True):
        x.grad += value.grad * local_grad


def dot(xs: Sequence[Value], ys: Sequence[Value]) -> Value:
  """Computes sum(x * y) as one value."""
  left, right = [x.data for x in xs], [y.data for y in ys]
  return Value(sum(map(operator.mul, left, right)), (*xs, *ys), right + left)


def add(xs: Sequence[Value], ys: Sequence[Value]) -> list[Value]:
  """Adds two vectors."""
  return [x + y for x, y in zip(xs, ys, strict=True)]


def multiply(rows: Sequence[Sequence[Value]], xs: Sequence[Value]) -> list[Value]:
  """Computes the product of a matrix and a vector."""
  return [dot(row, xs) for row in rows]


def log_sum_exp(xs: Sequence[Value]) -> Value:
  """Computes log(sum(exp(x))) as one value; its derivatives are the softmax."""
  largest = max(x.data for x in xs)
  powers = [math.exp(x.data - largest) for x in xs]
  total = sum(powers)
  return Value(largest + math.log(total), xs, [power / total for power in powers])


def normalize(xs: Sequence[Value]) -> list[Value]:
  """Computes x / sqrt(mean(x^2) + 1e-5)."""
  squares = dot(xs, xs)
  mean = squares.data / len(xs) + 1e-5
  factor = Value(mean**-0.5, (squares,), (-0.5 * mean**-1.5 / len(xs),))
  return [x * factor for x in xs]


def attend(
  query: list[Value], keys: list[list[Value]], values: list[list[Value]], num_heads: int
) -> list[Value]:
  """Computes attention of one position to all positions so far, the heads one after the other."""
  size, out = len(query) // num_heads, []
  for first in range(0, len(query), size):
    head = slice(first, first + size)
    scores = [dot(query[head], key[head]).scale(size**-0.5) for key in keys]
    total = log_sum_exp(scores)
    weights = [(score - total).exp() for score in scores]
    out += [dot(weights, column) for column in zip(*(value[head] for value in values), strict=True)]
  return out


def document_loss(
  params: dict[str, list[list[Value]]], tokens: Sequence[int], config: ModelConfig
) -> Value:
  """Computes the mean of -log p(next token) over a document of at most `max_seq_len` + 1 tokens."""
  past = [([], []) for _ in range(config.num_layers)]  # keys and values of the positions so far
  nats = []
  for position, (token, target) in enumerate(itertools.pairwise(tokens)):
    xs = normalize(add(params["token"][token], params["position"][position]))
    for block, (keys, values) in enumerate(past):
      query, key, value, out, up, down = (params[f"{name}{block}"] for name in BLOCK_MATRICES)
      hs = normalize(xs)
      keys.append(multiply(key, hs))
      values.append(multiply(value, hs))
      xs = add(xs, multiply(out, attend(multiply(query, hs), keys, values, config.num_heads)))
      hs = [h.scale(float(h.data > 0)) for h in multiply(up, normalize(xs))]  # ReLU
      xs = add(xs, multiply(down, hs))
    logits = multiply(params["head"], xs)
    nats.append(log_sum_exp(logits) - logits[target])
  return Value(sum(x.data for x in nats) / len(nats), nats, [1 / len(nats)] * len(nats))


class ScalarState(NamedTuple):
  """What an update replaces: parameters, Adam's moments in their order, and the updates so far."""

  params: dict[str, list[list[float]]]
  means: list[float]
  squares: list[float]
  step: int = 0


def begin_scalar(params: dict[str, list[list[float]]]) -> ScalarState:
  """Makes the state before the first update of given parameters."""
  zeros = [0.0 for rows in params.values() for row in rows for _ in row]
  return ScalarState(params, zeros, zeros)


def draw_matrices(seed: int, config: ModelConfig) -> dict[str, list[list[float]]]:
  """Draws parameters from the normal distribution with the deviation `init_std`."""
  V, S, D, F = config.vocab_size, config.max_seq_len, config.d_model, config.d_ff
  shapes = {"token": (V, D), "position": (S, D), "head": (V, D)}
  for block in range(config.num_layers):
    names = [f"{name}{block}" for name in BLOCK_MATRICES]
    shapes |= zip(names, [*[(D, D)] * 4, (F, D), (D, F)], strict=True)
  gauss = random.Random(seed).gauss
  return {
    name: [[gauss(0, config.init_std) for _ in range(columns)] for _ in range(rows)]
    for name, (rows, columns) in shapes.items()
  }


def update_scalar(
  state: ScalarState, tokens: Sequence[int], experiment: Experiment
) -> tuple[ScalarState, float]:
  """Applies one update of Adam on a document; the rate falls linearly to 0 at `decay_steps`.

  Args:
    state: not changed.
    tokens: BOS, the document and BOS; at most `max_seq_len` + 1.
    experiment: `names`, resolved.

  Returns:
    The next state, and the loss before the update in nats per token.
  """
  optimizer, step = experiment.optimizer, state.step
  b1, b2 = optimizer.b1, optimizer.b2
  params = {name: [[Value(x) for x in row] for row in rows] for name, rows in state.params.items()}
  loss = document_loss(params, tokens, experiment.model)
  loss.backward()
  flat = [x for rows in params.values() for row in rows for x in row]
  means = [b1 * m + (1 - b1) * x.grad for m, x in zip(state.means, flat, strict=True)]
  squares = [b2 * v + (1 - b2) * x.grad**2 for v, x in zip(state.squares, flat, strict=True)]
  rate = optimizer.peak_lr * max(0.0, 1 - step / optimizer.decay_steps) / (1 - b1 ** (step + 1))
  for x, m, v in zip(flat, means, squares, strict=True):
    x.data -= rate * m / (math.sqrt(v / (1 - b2 ** (step + 1))) + optimizer.eps)
  new = {name: [[x.data for x in row] for row in rows] for name, rows in params.items()}
  return ScalarState(new, means, squares, step + 1), loss.data
