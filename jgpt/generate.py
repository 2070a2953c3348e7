"""Text from parameters.

Responsible for drawing tokens: reading the prompt, decoding with a cache while the text fits the context, full passes over
the last tokens after that, temperature, top-k, top-p and the stop token. Knows nothing of optimizers, files or experiments'
training. The network is `model.py`'s, the same in every mode.
"""

import shlex
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgpt.attention import Attend, Drop, attend_causally, dot_product_attention
from jgpt.config import ModelConfig, SampleConfig
from jgpt.errors import UserError, show
from jgpt.model import _blocks, _embed, _logits, apply
from jgpt.sharding import unstack_blocks
from jgpt.text.tokenizer import CharTokenizer, Tokenizer


class KVCache(NamedTuple):
  """Keys and values of the positions seen so far.

  The heads stand before the positions: what a new token's query reads of a head then lies in one piece.

  Attributes:
    k: keys, [B, N, S, H]; [L, B, N, S, H] where all layers are stacked.
    v: values, of the same shape.
  """

  k: jax.Array
  v: jax.Array


def attend_and_keep(
  memory: None, q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, drop: Drop
) -> tuple[jax.Array, KVCache]:
  """Attends like `attend_causally`, and keeps keys and values: reading a prompt."""
  y_BTNH, _ = attend_causally(memory, q_BTNH, k_BTNH, v_BTNH, drop)
  return y_BTNH, KVCache(jnp.swapaxes(k_BTNH, 1, 2), jnp.swapaxes(v_BTNH, 1, 2))


def attend_to_cache(position: jax.Array) -> Attend:
  """Makes the function that attends from one new token to itself and the cached positions before it.

  Args:
    position: int32 scalar, where the new token stands, 0 <= position < S. Cache entries after it are not read.
  """

  def attend(
    cache: KVCache, q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, drop: Drop
  ) -> tuple[jax.Array, KVCache]:
    new = KVCache(jnp.swapaxes(k_BTNH, 1, 2), jnp.swapaxes(v_BTNH, 1, 2))
    cache = jax.tree.map(lambda c, x: jax.lax.dynamic_update_slice_in_dim(c, x, position, axis=2), cache, new)
    visible_TS = (jnp.arange(cache.k.shape[2]) <= position)[None]
    k_BSNH, v_BSNH = (jnp.swapaxes(c, 1, 2) for c in cache)
    return dot_product_attention(q_BTNH, k_BSNH, v_BSNH, visible_TS, drop), cache

  return attend


def draw(
  logits_BV: jax.Array, key: jax.Array, temperature: jax.Array, top_k: int | None = None, top_p: float = 1.0
) -> jax.Array:
  """Draws one token for each row from softmax(logits / temperature), by the Gumbel-max trick.

  A row's token depends on the key, its logits and its number: fewer rows are the first of more.

  Args:
    logits_BV: floating point [B, V]; -inf is never drawn.
    key: consumed.
    temperature: scalar >= 0; 0 takes the largest logit.
    top_k: keep only the k largest logits of a row (and those equal to the k-th); None or 0 keeps all.
    top_p: then keep the fewest tokens that hold at least this share of the probability, at least one (and those equal to
      the least of them); 1 keeps all.

  Returns:
    int32 [B].

  Source: Gumbel 1954; Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top-p).
  """
  if top_k:
    kth_B1 = jnp.sort(logits_BV)[:, -min(top_k, logits_BV.shape[1]), None]
    logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
  if top_p < 1:
    sorted_BV = jnp.sort(logits_BV, descending=True)
    p_BV = jax.nn.softmax(sorted_BV / jnp.maximum(temperature, 1e-6))
    kept_BV = (jnp.cumsum(p_BV, axis=1) - p_BV < top_p).at[:, 0].set(True)  # what stands before is not yet enough
    least_B1 = jnp.min(sorted_BV, axis=1, keepdims=True, where=kept_BV, initial=jnp.inf)
    logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
  # logits / temperature + gumbel has its maximum where logits + temperature * gumbel has: 0 needs no case of its own.
  gumbel_BV = jax.random.gumbel(key, logits_BV.shape, logits_BV.dtype)
  return jnp.argmax(logits_BV + temperature * gumbel_BV, axis=1).astype(jnp.int32)


@partial(jax.jit, static_argnames=("config", "num", "max_tokens", "stop_id", "top_k", "top_p", "past_context"))
def generate(
  params: dict,
  prompt_P: jax.Array,
  prompt_len: jax.Array,
  key: jax.Array,
  temperature: jax.Array,
  *,
  config: ModelConfig,
  num: int,
  max_tokens: int,
  stop_id: int | None = None,
  top_k: int | None = None,
  top_p: float = 1.0,
  past_context: bool = False,
) -> jax.Array:
  """Continues one prompt `num` times.

  The i-th text depends on the key and i alone: fewer texts are the first of more. While a text fits the context its
  tokens come from a cache; after that each comes from a full pass over the last `config.max_seq_len` tokens.

  Args:
    params: as `init_params` returns them.
    prompt_P: int32 ids, the prompt filled up at the end; P <= `config.max_seq_len`.
    prompt_len: int32 scalar, 1 <= prompt_len <= P.
    key: consumed.
    temperature: scalar >= 0.
    config: sizes.
    num: texts, B below.
    max_tokens: new tokens at most.
    stop_id: a text ends with this token; None never ends.
    top_k: see `draw`.
    top_p: see `draw`.
    past_context: whether tokens past the context are wanted; without, a text ends where the context is full, after
      `config.max_seq_len` - prompt_len + 1 new tokens.

  Returns:
    int32 [B, max_tokens], the new tokens; from the stop token (or the end) on filled with `stop_id` (or 0).
  """
  S = config.max_seq_len
  fill = 0 if stop_id is None else stop_id
  text_BT = jnp.full((num, prompt_P.shape[0] + max_tokens), fill, jnp.int32).at[:, : prompt_P.shape[0]].set(prompt_P)
  params = unstack_blocks(params)  # a loop over stacked layers would copy each layer's weights for every token
  length = min(S, prompt_P.shape[0] + max_tokens)  # what is not needed is not read
  if prompt_P.shape[0] == 1:
    cache = init_cache(params, num, length, config)
  else:  # entries past the prompt are overwritten before they are read
    cache = jax.tree.map(lambda c: jnp.repeat(c, num, axis=0), prefill(params, prompt_P[None], length, config))

  def extend(text_BT: jax.Array, done_B: jax.Array, n: jax.Array, logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws the n-th token of each text that is not done."""
    new_B = draw(logits_BV, jax.random.fold_in(key, n - prompt_len), temperature, top_k, top_p)
    new_B = jnp.where(done_B, fill, new_B)
    done_B = done_B if stop_id is None else done_B | (new_B == stop_id)
    return text_BT.at[:, n].set(new_B), done_B

  def decode(carry: tuple) -> tuple:
    n, text_BT, done_B, cache = carry
    logits_BV, cache = decode_step(params, text_BT[:, n - 1], cache, n - 1, config)
    return n + 1, *extend(text_BT, done_B, n, logits_BV), cache

  def slide(carry: tuple) -> tuple:
    n, text_BT, done_B = carry
    window_BS = jax.lax.dynamic_slice_in_dim(text_BT, n - S, S, axis=1)
    return n + 1, *extend(text_BT, done_B, n, apply(params, window_BS, config)[:, -1])

  end = prompt_len + max_tokens
  fits = jnp.minimum(end, S + 1)  # the token at n is computed from n tokens
  carry = (prompt_len, text_BT, jnp.zeros(num, bool), cache)
  n, text_BT, done_B, _ = jax.lax.while_loop(lambda c: (c[0] < fits) & ~jnp.all(c[2]), decode, carry)
  if past_context:
    _, text_BT, _ = jax.lax.while_loop(lambda c: (c[0] < end) & ~jnp.all(c[2]), slide, (n, text_BT, done_B))
  return jax.lax.dynamic_slice_in_dim(text_BT, prompt_len, max_tokens, axis=1)


def fit_prompt(ids: list[int], config: ModelConfig) -> tuple[list[int], int]:
  """Keeps the last `config.max_seq_len` ids of a prompt; returns them and how many were dropped."""
  kept = ids[-config.max_seq_len :]
  return kept, len(ids) - len(kept)


def check_prompt(sample: SampleConfig, tokenizer: Tokenizer) -> None:
  """Raises `UserError`, with a prompt that would do, where a tokenizer has no ids for the one that is set."""
  try:
    tokenizer.prompt(sample.prompt)
  except UserError as error:
    reason = str(error).partition(". Try ")[0].rstrip(".")
    chars = tokenizer.chars if isinstance(tokenizer, CharTokenizer) else "a"
    known = next(filter(str.isalnum, chars), chars[:1])
    advice = f"Try --set {shlex.quote(f'sample.prompt={known}')}"
    raise UserError(f"sample.prompt={show(sample.prompt)}: {reason}. {advice}") from None


def generate_texts(
  params: dict, tokenizer: Tokenizer, key: jax.Array, config: ModelConfig, sample: SampleConfig
) -> list[str]:
  """Draws texts that begin with a prompt.

  Args:
    params: as `init_params` returns them.
    tokenizer: of the run.
    key: consumed.
    config: sizes and switches.
    sample: the prompt, of which the last `config.max_seq_len` tokens are read; how many texts, how long, how drawn.

  Returns:
    `sample.num` texts, the prompt included, the mark of the end left out.

  Raises:
    UserError: if the prompt has characters that the tokenizer does not know.
  """
  return begin_texts(params, tokenizer, key, config, sample)()


def begin_texts(
  params: dict, tokenizer: Tokenizer, key: jax.Array, config: ModelConfig, sample: SampleConfig
) -> Callable[[], list[str]]:
  """Like `generate_texts`, and returns at once: calling what it returns waits for the device and gives the texts."""
  args, settings, max_tokens = _arguments(params, tokenizer, key, config, sample)
  new = generate(*args, **settings)

  def texts() -> list[str]:
    rows = np.asarray(jax.block_until_ready(new))[:, :max_tokens].tolist()  # where memory ends, that raises; reading aborts
    return [sample.prompt + tokenizer.decode(_until(ids, tokenizer.stop_id)) for ids in rows]

  return texts


def compile_texts(params: dict, tokenizer: Tokenizer, key: jax.Array, config: ModelConfig, sample: SampleConfig) -> None:
  """Compiles what `generate_texts` will call with such arguments, and runs nothing."""
  args, settings, _ = _arguments(params, tokenizer, key, config, sample)
  generate.lower(*args, **settings).compile()


def _arguments(
  params: dict, tokenizer: Tokenizer, key: jax.Array, config: ModelConfig, sample: SampleConfig
) -> tuple[tuple, dict, int]:
  """The arguments of `generate`, by position and by keyword, and how many of its tokens are wanted."""
  ids, _ = fit_prompt(tokenizer.prompt(sample.prompt), config)
  # Filled up to a power of two: prompts of many lengths share an executable. A single token needs no prefill.
  prompt_P = np.zeros(min(config.max_seq_len, 1 << (len(ids) - 1).bit_length()), np.int32)
  prompt_P[: len(ids)] = ids
  room = config.max_seq_len - len(ids) + 1
  max_tokens = room if sample.max_tokens is None else sample.max_tokens
  settings = {
    "config": config,
    "num": sample.num,
    # Without a limit computed for the whole context, and cut by the caller: one executable for every prompt length.
    "max_tokens": config.max_seq_len if sample.max_tokens is None else max_tokens,
    "stop_id": tokenizer.stop_id,
    "top_k": sample.top_k,
    "top_p": sample.top_p,
    "past_context": max_tokens > room,
  }
  return (params, prompt_P, np.int32(len(ids)), key, np.float32(sample.temperature)), settings, max_tokens


def _until(ids: list[int], stop_id: int | None) -> list[int]:
  return ids[: ids.index(stop_id)] if stop_id in ids else ids


Cache = KVCache | list[KVCache]  # as the blocks are: layers stacked, or in a list


def prefill(params: dict, tokens_BT: jax.Array, length: int, config: ModelConfig) -> Cache:
  """Reads a prompt into a new cache; entries at T and after are zero.

  Args:
    params: as `init_params` returns them, or with unstacked blocks.
    tokens_BT: int32 ids [B, T], T <= `length`.
    length: S, positions that the cache has room for, at most `config.max_seq_len`.
    config: sizes and switches.
  """
  x_BTD = _embed(params, tokens_BT, 0, config)
  _, cache = _blocks(params, x_BTD, attend_and_keep, None, config)
  room = length - tokens_BT.shape[1]
  return jax.tree.map(lambda c: jnp.pad(c, [(0, 0)] * (c.ndim - 2) + [(0, room), (0, 0)]), cache)


def init_cache(params: dict, batch_size: int, length: int, config: ModelConfig) -> Cache:
  """Makes a cache of zeros in the parameters' dtype, with room for `length` positions."""
  one = KVCache(*(jnp.zeros((batch_size, config.num_heads, length, config.head_dim), params["tok_embed"].dtype),) * 2)
  caches = [one] * config.num_layers
  return jax.tree.map(lambda *layers: jnp.stack(layers), *caches) if isinstance(params["blocks"], dict) else caches


def decode_step(
  params: dict, tokens_B: jax.Array, cache: Cache, position: jax.Array, config: ModelConfig
) -> tuple[jax.Array, Cache]:
  """Computes the logits after one more token.

  Args:
    params: as `init_params` returns them, or with unstacked blocks.
    tokens_B: int32 ids [B], the tokens at `position`.
    cache: keys and values of the positions before.
    position: int32 scalar, 0 <= position < S.
    config: sizes and switches.

  Returns:
    Logits [B, V] as from `apply` at that position, and the cache with the position added.
  """
  x_BTD = _embed(params, tokens_B[:, None], position, config)
  x_BTD, cache = _blocks(params, x_BTD, attend_to_cache(position), cache, config)
  return _logits(params, x_BTD, config)[:, 0], cache
