"""The model's prediction at each position of a text.

Makes the batch that training would make of a text, computes the probability of each of its tokens,
and formats tokens so that blanks, control characters and parts of a character can be told apart.
Pure; the table is printed by `cli.py`.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from jgpt.batches import Batch, documents_in_order
from jgpt.config import Experiment, ModelConfig
from jgpt.data.corpus import make_documents
from jgpt.errors import UserError
from jgpt.model import apply
from jgpt.text.tokenizer import CharTokenizer, Tokenizer

CONTEXT_WIDTH = 24  # characters of the context that a row shows


@dataclasses.dataclass(frozen=True)
class Guess:
  """A candidate for the next token.

  Attributes:
    token: as `show_token` formats it.
    id: of the token.
    probability: that the model gives it.
  """

  token: str
  id: int
  probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The model's prediction at one position, and the target.

  Attributes:
    position: from 0; the row of the position embedding.
    context: the end of the text so far, as `show_context` formats it.
    target: the next token of the text, as `show_token` formats it.
    target_id: its id.
    probability: that the model gives the target.
    nats: -log(probability), the target's loss.
    guesses: the most probable tokens, best first.
  """

  position: int
  context: str
  target: str
  target_id: int
  probability: float
  nats: float
  guesses: tuple[Guess, ...]

  @property
  def one_in(self) -> float:
    """Returns 1 / probability: the target is drawn once in so many draws."""
    return math.exp(self.nats) if self.nats < 700 else math.inf


def make_text_batch(text: str, tokenizer: Tokenizer, experiment: Experiment) -> Batch:
  """Makes the batch of one sequence that training or evaluation would make of a text's beginning.

  Where batches are documents: BOS, characters, BOS, cut or padded to `data.seq_len` predictions;
  padding has weight zero. Otherwise each token of the text predicts the next one, for at most
  `data.seq_len` predictions: further positions were never trained.

  Args:
    text: one document, or a piece of a stream.
    tokenizer: of the run.
    experiment: resolved.

  Raises:
    UserError: if the tokenizer does not know a character, or nothing can be predicted.
  """
  if experiment.data.batching == "documents":
    documents = make_documents([text], tokenizer, experiment.data.seq_len)
    return jax.jit(documents_in_order, static_argnums=(1, 2))(jax.device_put(documents), 0, 1)
  ids = tokenizer.encode(text)
  if len(ids) < 2:
    raise UserError(
      f"the text {text!r} has {len(ids)} token{'s' * (len(ids) != 1)}, and each token predicts the "
      "next: it needs 2. Try a longer --text"
    )
  tokens = np.asarray([ids[: experiment.data.seq_len + 1]], np.int32)
  weights_BT = np.ones((1, tokens.shape[1] - 1), np.float32)
  return jax.device_put(Batch(tokens[:, :-1], tokens[:, 1:], weights_BT))


def make_trace_tokens(text: str, tokenizer: Tokenizer, experiment: Experiment) -> np.ndarray:
  """Makes the tokens that the model reads of a text's beginning, as in training.

  Where batches are documents: BOS and the characters. At most `data.seq_len` tokens.

  Args:
    text: one document, or a piece of a stream.
    tokenizer: of the run.
    experiment: resolved.

  Returns:
    int32 [1, T].

  Raises:
    UserError: if the tokenizer does not know a character, or there is no token.
  """
  if experiment.data.batching == "documents":
    batch = jax.device_get(make_text_batch(text, tokenizer, experiment))
    return batch.inputs_BT[:, : int(np.sum(batch.weights_BT))]
  ids = tokenizer.encode(text)[: experiment.data.seq_len]
  if not ids:
    raise UserError("the text is empty, so that there is nothing to read. Try a longer --attention")
  return np.asarray([ids], np.int32)


def predict(
  params: dict, batch: Batch, tokenizer: Tokenizer, config: ModelConfig, *, num_guesses: int = 3
) -> list[Prediction]:
  """Computes the model's prediction at each position of one sequence, without dropout.

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    batch: of one sequence, from `make_text_batch`.
    tokenizer: of the run.
    config: of the model.
    num_guesses: guesses at each position, fewer where the vocabulary is smaller.

  Returns:
    One prediction for each position whose weight is not zero.
  """
  log_probs_BTV = jax.device_get(_compute_log_probs(params, batch.inputs_BT, config))
  log_probs_TV, batch = log_probs_BTV[0], jax.device_get(batch)
  inputs, targets = batch.inputs_BT[0].tolist(), batch.targets_BT[0].tolist()
  rows = []
  for t in range(int(np.sum(batch.weights_BT))):
    log_probs_V = log_probs_TV[t, : config.vocab_size].astype(np.float64)
    best = np.argsort(-log_probs_V, kind="stable")[:num_guesses].tolist()
    rows.append(
      Prediction(
        position=t,
        context=show_context(inputs[: t + 1], tokenizer),
        target=show_token(targets[t], tokenizer),
        target_id=targets[t],
        probability=math.exp(log_probs_V[targets[t]]),
        nats=-log_probs_V[targets[t]].item(),
        guesses=tuple(Guess(show_token(i, tokenizer), i, math.exp(log_probs_V[i])) for i in best),
      )
    )
  return rows


@partial(jax.jit, static_argnames="config")
def _compute_log_probs(params: dict, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
  return jax.nn.log_softmax(apply(params, tokens_BT, config))


def mean_loss(rows: Sequence[Prediction]) -> float:
  """Computes the mean of the rows' `nats`: the loss of the text, equal to `step.loss_fn`'s."""
  return math.fsum(row.nats for row in rows) / len(rows)


# --- Tokens for a person ---


def show_token(token_id: int, tokenizer: Tokenizer) -> str:
  r"""Formats a token: `'a'`, `' the'`, `'\n'`, `byte 0xe2` (part of a character), or `BOS`.

  An id of the model that the tokenizer does not have is `id 27`.

  Args:
    token_id: any id of the model.
    tokenizer: of the run.
  """
  if token_id >= tokenizer.vocab_size:
    return f"id {token_id}"
  content = tokenizer.token_bytes[token_id]
  if not content:
    return "BOS" if isinstance(tokenizer, CharTokenizer) else "end of text"
  if len(content) == 1 and content[0] >= 128:
    return f"byte 0x{content[0]:02x}"
  return _quote(_show_characters(content))


def show_context(ids: Sequence[int], tokenizer: Tokenizer) -> str:
  """Formats the end of the text so far: `BOS`, `BOS 'em'`, `…'e or not to be'`.

  Args:
    ids: the tokens so far.
    tokenizer: of the run.
  """
  contents = tokenizer.token_bytes
  content = b"".join(contents[i] for i in ids)
  # A character has at most 4 bytes, and the first one may be cut.
  pieces = _show_characters(content[-4 * CONTEXT_WIDTH - 3 :])
  shown = len(pieces)
  while sum(map(len, pieces[-shown:])) > CONTEXT_WIDTH:
    shown -= 1
  if shown < len(pieces):
    return f"…{_quote(pieces[-shown:])}"
  mark = [show_token(ids[0], tokenizer)] if not contents[ids[0]] else []
  return " ".join([*mark, _quote(pieces)] if pieces else mark)


def label_token(token_id: int, tokenizer: Tokenizer) -> str:
  r"""Formats a token for the edge of a map: `a`, `␣the`, `\n`, `0xe2` (part of a character), `BOS`.

  Args:
    token_id: any id of the model.
    tokenizer: of the run.
  """
  shown = show_token(token_id, tokenizer)
  return (shown[1:-1] if shown[0] in "'\"" else shown.removeprefix("byte ")).replace(" ", "␣")


def _show_characters(content: bytes) -> list[str]:
  r"""Returns each character as `repr` writes it; a byte that is not part of one as `\xe2`."""
  text = content.decode(errors="surrogateescape")
  return [f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else repr(c)[1:-1] for c in text]


def _quote(pieces: Sequence[str]) -> str:
  quote = '"' if "'" in pieces and '"' not in pieces else "'"
  return f"{quote}{''.join(pieces)}{quote}"
