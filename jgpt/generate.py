"""Text from parameters: prefill, decoding with a cache, and how tokens are drawn.

While a text fits the context its tokens come from a cache, after that from full passes over the
last tokens. The network is that of `model.py`.
"""

import dataclasses
import shlex
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jgpt.attention import KVCache
from jgpt.config import ComputeConfig, Experiment, ModelConfig, SampleConfig
from jgpt.config.experiment import PLAIN
from jgpt.errors import UserError, show
from jgpt.keys import SAMPLE, derive_key
from jgpt.layers import store
from jgpt.model import Cache, embed, find_head, predict_logits, run_blocks
from jgpt.products import Tiles, tile_head, tile_weights
from jgpt.sharding import beside, constrain, gather, place, unstack_blocks, use_mesh, with_auto_axes
from jgpt.text.tokenizer import CharTokenizer, Tokenizer, find_known_char

# --- The cache ---


def init_cache(
  params: dict, batch_size: int, length: int, config: ModelConfig, compute: ComputeConfig = PLAIN
) -> Cache:
  """Makes a cache of zeros for `length` positions, in the dtype of the activations."""
  shape = (batch_size, config.num_heads, length, config.head_dim)
  zeros = store(jnp.zeros(shape, params["tok_embed"].dtype), compute)
  caches = [KVCache(zeros, zeros)] * config.num_layers
  if isinstance(params["blocks"], dict):
    return jax.tree.map(lambda *layers: jnp.stack(layers), *caches)
  return caches


def prefill(
  params: dict,
  tokens_BT: jax.Array,
  length: int,
  config: ModelConfig,
  compute: ComputeConfig = PLAIN,
) -> Cache:
  """Reads a prompt into a new cache; entries at T and after are zero.

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    tokens_BT: int32 ids [B, T], T <= `length`.
    length: S, positions that the cache has room for, at most `config.max_seq_len`.
    config: of the network.
    compute: how to compute.
  """
  cache = init_cache(params, tokens_BT.shape[0], length, config, compute)
  x_BTD = embed(params, tokens_BT, 0, config, compute)
  return run_blocks(params, x_BTD, config, compute, cache=cache)[1]


def decode_step(
  params: dict,
  tokens_B: jax.Array,
  cache: Cache,
  position: jax.Array,
  config: ModelConfig,
  compute: ComputeConfig = PLAIN,
) -> tuple[jax.Array, Cache]:
  """Computes the logits after one more token.

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    tokens_B: int32 ids [B], the tokens at `position`.
    cache: keys and values of the positions before.
    position: int32 scalar, 0 <= position < S.
    config: of the network.
    compute: how to compute.

  Returns:
    Logits [B, V] as from `apply` at that position, and the cache with the position added.
  """
  x_BTD = embed(params, tokens_B[:, None], position, config, compute)
  x_BTD, cache = run_blocks(params, x_BTD, config, compute, cache=cache, position=position)
  return predict_logits(params, x_BTD, config, compute)[:, 0], cache


def round_weights(
  params: dict, config: ModelConfig, compute: ComputeConfig
) -> tuple[dict, ModelConfig]:
  """Converts the weights of products to bfloat16 where they are computed so, once for many tokens.

  Args:
    params: blocks in a list.
    config: of the network.
    compute: how to compute.

  Returns:
    Parameters with which products are the same and read half of the bytes, and their network: a
    tied head becomes one of its own, since embeddings are read unrounded.
  """
  if compute.dtype != "bfloat16":
    return params, config

  def round_one(path: tuple, x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16) if path[-1].key.startswith("w_") else x

  rounded = params | {"blocks": jax.tree.map_with_path(round_one, params["blocks"])}
  rounded["unembed"] = find_head(params, config).astype(jnp.bfloat16)
  return rounded, dataclasses.replace(config, tied_head=False)


def arrange_weights(
  params: dict, config: ModelConfig, compute: ComputeConfig
) -> tuple[dict, ModelConfig]:
  """Gathers weights over "fsdp", rounded as `round_weights` does.

  Once and not for every token: parameters by themselves take little beside what training takes.
  """
  params, config = round_weights(params, config, compute)
  blocks = [gather(p, config) for p in params["blocks"]]
  rest = gather({name: x for name, x in params.items() if name != "blocks"}, config)
  return rest | {"blocks": blocks}, config


def tile_params(params: dict, compute: ComputeConfig) -> dict:
  """Arranges the weights of products for decoding one text, as XLA:CPU is quick at it.

  Args:
    params: from `arrange_weights`.
    compute: how to compute.
  """
  if compute.dtype != "bfloat16" or compute.matmul != "flat":
    return params

  def arrange(path: tuple, w: jax.Array) -> Tiles | jax.Array:
    num = 2 if path[-1].key == "w_out" else 1  # dimensions that a product sums over
    return tile_weights(w, num) if path[-1].key.startswith("w_") else w

  tiled = params | {"blocks": jax.tree.map_with_path(arrange, params["blocks"])}
  tiled["unembed"] = tile_head(params["unembed"])
  return tiled


# --- Tokens and texts ---


def draw(
  logits_BV: jax.Array,
  key: jax.Array,
  temperature: jax.Array,
  top_k: int | None = None,
  top_p: float = 1.0,
) -> jax.Array:
  """Draws one token for each row from softmax(logits / temperature), by the Gumbel-max trick.

  A row's token depends on the key, its logits and its number: fewer rows are the first of more.

  Args:
    logits_BV: floating point [B, V]; -inf is never drawn.
    key: consumed.
    temperature: scalar >= 0; 0 takes the largest logit.
    top_k: keep only the k largest logits of a row (and those equal to the k-th); None or 0 keeps
      all.
    top_p: then keep the fewest tokens that hold at least this share of the probability, at least
      one (and those equal to the least of them); 1 keeps all.

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
    # A token is kept while the probability of those before it is below top_p.
    kept_BV = (jnp.cumsum(p_BV, axis=1) - p_BV < top_p).at[:, 0].set(True)
    least_B1 = jnp.min(sorted_BV, axis=1, keepdims=True, where=kept_BV, initial=jnp.inf)
    logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
  # logits + temperature * gumbel has its maximum where logits / temperature + gumbel has it, and
  # is defined at temperature 0.
  gumbel_BV = jax.random.gumbel(key, logits_BV.shape, logits_BV.dtype)
  return jnp.argmax(logits_BV + temperature * gumbel_BV, axis=1).astype(jnp.int32)


_STATIC = ("config", "compute", "num", "max_tokens", "stop_id", "top_k", "top_p", "past_context")


@partial(jax.jit, static_argnames=_STATIC)
@with_auto_axes(None)
def generate(
  params: dict,
  prompt_P: jax.Array,
  prompt_len: jax.Array,
  key: jax.Array,
  temperature: jax.Array,
  *,
  config: ModelConfig,
  compute: ComputeConfig = PLAIN,
  num: int,
  max_tokens: int,
  stop_id: int | None = None,
  top_k: int | None = None,
  top_p: float = 1.0,
  past_context: bool = False,
) -> jax.Array:
  """Continues one prompt `num` times.

  The i-th text depends on the key and i alone: fewer texts are the first of more. While a text fits
  the context its tokens come from a cache; after that each comes from a full pass over the last
  `config.max_seq_len` tokens.

  Args:
    params: as `init_params` returns them.
    prompt_P: int32 ids, the prompt filled up at the end; P <= `config.max_seq_len`.
    prompt_len: int32 scalar, 1 <= prompt_len <= P.
    key: consumed.
    temperature: scalar >= 0.
    config: of the network.
    compute: how to compute; blocks are always written out.
    num: texts, B below.
    max_tokens: new tokens at most.
    stop_id: a text ends with this token; None never ends.
    top_k: see `draw`.
    top_p: see `draw`.
    past_context: whether tokens past the context are wanted; without, a text ends where the context
      is full, after `config.max_seq_len` - prompt_len + 1 new tokens.

  Returns:
    int32 [B, max_tokens], the new tokens; from the stop token (or the end) on filled with `stop_id`
    (or 0).
  """
  S, P, fill = config.max_seq_len, prompt_P.shape[0], 0 if stop_id is None else stop_id
  text_BT = jnp.full((num, P + max_tokens), fill, jnp.int32).at[:, :P].set(prompt_P)
  # A loop over stacked layers would copy each layer's weights for every token.
  params, config = arrange_weights(unstack_blocks(params), config, compute)
  length = min(S, P + max_tokens)  # a shorter cache is read faster
  if P == 1:
    cache = init_cache(params, num, length, config, compute)
  else:  # entries past the prompt are overwritten before they are read
    cache = jax.tree.map(
      lambda c: jnp.repeat(c, num, axis=0), prefill(params, prompt_P[None], length, config, compute)
    )

  def extend(
    text_BT: jax.Array, done_B: jax.Array, n: jax.Array, logits_BV: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Draws the n-th token of each text that is not done."""
    new_B = draw(logits_BV, jax.random.fold_in(key, n - prompt_len), temperature, top_k, top_p)
    new_B = jnp.where(done_B, fill, new_B)
    done_B = done_B if stop_id is None else done_B | (new_B == stop_id)
    return text_BT.at[:, n].set(new_B), done_B

  decoding = tile_params(params, compute) if num == 1 else params

  def decode(carry: tuple) -> tuple:
    n, text_BT, done_B, cache = carry
    logits_BV, cache = decode_step(decoding, text_BT[:, n - 1], cache, n - 1, config, compute)
    return n + 1, *extend(text_BT, done_B, n, logits_BV), cache

  def slide(carry: tuple) -> tuple:
    n, text_BT, done_B = carry
    window_BS = jax.lax.dynamic_slice_in_dim(text_BT, n - S, S, axis=1)
    x_BSD = embed(params, window_BS, 0, config, compute)
    x_BSD, _ = run_blocks(params, x_BSD, config, compute)
    # The logits of all positions would take S times the memory.
    logits_BV = predict_logits(params, x_BSD[:, -1:], config, compute)[:, 0]
    return n + 1, *extend(text_BT, done_B, n, logits_BV)

  end = prompt_len + max_tokens
  fits = jnp.minimum(end, S + 1)  # the token at n is computed from n tokens
  carry = (prompt_len, text_BT, jnp.zeros(num, bool), cache)
  n, text_BT, done_B, _ = jax.lax.while_loop(
    lambda c: (c[0] < fits) & ~jnp.all(c[2]), decode, carry
  )
  if past_context:
    _, text_BT, _ = jax.lax.while_loop(
      lambda c: (c[0] < end) & ~jnp.all(c[2]), slide, (n, text_BT, done_B)
    )
  new_BT = jax.lax.dynamic_slice_in_dim(text_BT, prompt_len, max_tokens, axis=1)
  return constrain(new_BT, (None, None))  # every process reads them


def fit_prompt(ids: list[int], config: ModelConfig) -> tuple[list[int], int]:
  """Keeps the last `config.max_seq_len` ids of a prompt; returns them and how many were dropped."""
  kept = ids[-config.max_seq_len :]
  return kept, len(ids) - len(kept)


def check_prompt(sample: SampleConfig, tokenizer: Tokenizer) -> None:
  """Checks that a tokenizer has ids for `sample.prompt`.

  Raises:
    UserError: with a prompt that the tokenizer has ids for.
  """
  try:
    tokenizer.encode_prompt(sample.prompt)
  except UserError as error:
    reason = str(error).partition(". Try ")[0].rstrip(".")
    chars = tokenizer.chars if isinstance(tokenizer, CharTokenizer) else "a"
    advice = f"Try --set {shlex.quote(f'sample.prompt={find_known_char(chars)}')}"
    raise UserError(f"sample.prompt={show(sample.prompt)}: {reason}. {advice}") from None


def generate_texts(
  params: dict,
  tokenizer: Tokenizer,
  key: jax.Array,
  experiment: Experiment,
  sample: SampleConfig | None = None,
) -> list[str]:
  """Draws texts that begin with a prompt.

  Args:
    params: as `init_params` returns them; blocks stacked or a list.
    tokenizer: of the run.
    key: consumed.
    experiment: `model` and `compute` are read. That of a `Run` or a `Result` computes as is fastest
      on the device; one with "auto" left computes plainly.
    sample: the prompt, of which the last `model.max_seq_len` tokens are read, and how many texts
      are drawn, how long and how; None takes `experiment.sample`.

  Returns:
    `sample.num` texts, with the prompt and without the token that ends a text.

  Raises:
    UserError: if the prompt has characters that the tokenizer does not know.

  Example:
    >>> run = jgpt.open_run("runs/names")
    >>> jgpt.generate_texts(run.params, run.tokenizer, jax.random.key(0), run.experiment)
  """
  return begin_texts(params, tokenizer, key, experiment, sample)()


def begin_texts(
  params: dict,
  tokenizer: Tokenizer,
  key: jax.Array,
  experiment: Experiment,
  sample: SampleConfig | None = None,
) -> Callable[[], list[str]]:
  """Starts `generate_texts`; calling what is returned waits for the device and gives the texts."""
  sample = sample or experiment.sample
  ids, _ = fit_prompt(tokenizer.encode_prompt(sample.prompt), experiment.model)
  settings, max_tokens = _settings(ids, tokenizer, experiment, sample)
  others = (*_prompt_arrays(ids, experiment.model), key, np.float32(sample.temperature))
  with use_mesh(params):
    new = generate(params, *place(others, beside(params)), **settings)

  def texts() -> list[str]:
    # Where memory runs out, waiting raises an error; reading would abort the process.
    rows = jax.device_get(jax.block_until_ready(new))[:, :max_tokens].tolist()
    return [sample.prompt + tokenizer.decode(_until(ids, tokenizer.stop_id)) for ids in rows]

  return texts


def lower_texts(
  params: dict,
  tokenizer: Tokenizer | None,
  experiment: Experiment,
  sample: SampleConfig | None = None,
) -> jax.stages.Lowered:
  """Traces what `generate_texts` calls with such arguments.

  Args:
    params: arrays, or shapes with shardings.
    tokenizer: of the run; None samples without a prompt and without a token that ends a text.
    experiment: `model` and `compute` are read.
    sample: None takes `experiment.sample`.
  """
  config, sample = experiment.model, sample or experiment.sample
  ids = [0] if tokenizer is None else fit_prompt(tokenizer.encode_prompt(sample.prompt), config)[0]
  settings, _ = _settings(ids, tokenizer, experiment, sample)
  key = jax.eval_shape(partial(derive_key, experiment.train.seed, SAMPLE, 0))
  others = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=beside(params)),
    (*_prompt_arrays(ids, config), key, np.float32(sample.temperature)),
  )
  with use_mesh(params):
    return generate.lower(params, *others, **settings)


def sample_texts(
  params: dict, tokenizer: Tokenizer, step: int, experiment: Experiment
) -> list[str]:
  """Draws texts as `experiment.sample` says: a function of the seed and the step."""
  return begin_samples(params, tokenizer, step, experiment)()


def begin_samples(
  params: dict, tokenizer: Tokenizer, step: int, experiment: Experiment
) -> Callable[[], list[str]]:
  """Starts `sample_texts`; calling what is returned waits for the texts."""
  key = derive_key(experiment.train.seed, SAMPLE, step)
  return begin_texts(params, tokenizer, key, experiment)


def _prompt_arrays(ids: list[int], config: ModelConfig) -> tuple[np.ndarray, np.int32]:
  """Returns a prompt and its length as `generate` takes them, on the host.

  It is filled up to a power of two: prompts of many lengths share an executable. A single token
  needs no prefill.
  """
  prompt_P = np.zeros(min(config.max_seq_len, 1 << (len(ids) - 1).bit_length()), np.int32)
  prompt_P[: len(ids)] = ids
  return prompt_P, np.int32(len(ids))


def _settings(
  ids: list[int],
  tokenizer: Tokenizer | None,
  experiment: Experiment,
  sample: SampleConfig,
) -> tuple[dict, int]:
  """Returns the keyword arguments of `generate`, and the tokens wanted of it."""
  config = experiment.model
  room = config.max_seq_len - len(ids) + 1
  max_tokens = room if sample.max_tokens is None else sample.max_tokens
  settings = {
    "config": config,
    "compute": experiment.compute,
    "num": sample.num,
    # Without a limit computed for the whole context, and cut by the caller: one executable for
    # every prompt length.
    "max_tokens": config.max_seq_len if sample.max_tokens is None else max_tokens,
    "stop_id": None if tokenizer is None else tokenizer.stop_id,
    "top_k": sample.top_k,
    "top_p": sample.top_p,
    "past_context": max_tokens > room,
  }
  return settings, max_tokens


def _until(ids: list[int], stop_id: int | None) -> list[int]:
  return ids[: ids.index(stop_id)] if stop_id in ids else ids
