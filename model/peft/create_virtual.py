"""New virtual tokens for a model: what they begin as, and what models cannot have them."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from model import quant
from model.config import ModelConfig
from model.errors import InputError
from model.peft.config import PeftConfig
from model.peft.names import KEY
from model.peft.virtual import PROMPT
from model.peft.written import TABLE, new_prefix_writer, new_prompt_writer, placed_prefix
from model.quant import Quantized


def check_virtual(config: PeftConfig, cfg: ModelConfig) -> None:
  """Raises an InputError for a model that cannot have these virtual tokens."""
  reason = refusal(config.method == "prefix", cfg)
  if reason is not None:
    raise InputError(f"peft.method={config.method!r} is not for this model: {reason}.")
  limit = cfg.max_positions
  if limit is not None and config.virtual_tokens >= limit:
    raise InputError(
      f"peft.virtual_tokens={config.virtual_tokens} leave no room in model.max_positions={limit}: "
      "use fewer."
    )


def refusal(prefix: bool, cfg: ModelConfig) -> str | None:
  """Why a model cannot have a prefix, or a prompt; None if it can."""
  stack = cfg.stacks[-1]
  if not prefix:
    both_ways = cfg.shape == "decoder" and cfg.prefix_attention
    return (
      "its decoder reads prompts in both directions (model.prefix_attention): use 'prefix'"
      if both_ways else None
    )  # fmt: skip
  if cfg.kv_latent_dim is not None:
    return "its keys and values are made of latents (model.kv_latent_dim): use 'prompt'"
  if cfg.positions == "disentangled":
    return "its scores hang on the content of keys at relative positions: use 'prompt'"
  if cfg.layer_uses(stack) > 1:
    return "layers share their parameters (model.layer_sets): use 'prompt'"
  if cfg.head_width != cfg.value_width:
    return "its values are not as wide as its keys (model.v_head_dim): use 'prompt'"
  if cfg.context_attention == "ring":
    return "model.context_attention='ring' knows no keys without a place: use 'gather'"
  return None


def new_virtual(
  config: PeftConfig, cfg: ModelConfig, base: Mapping[str, Any], key: jax.Array
) -> dict:
  """What virtual tokens begin as: a nested dict, to be put beside `base`.

  Args:
    base: the model's parameters, whose table is read where a prompt begins as tokens.
  """
  key = jax.random.fold_in(key, zlib.crc32(config.method.encode()) % 2**31)
  made = _prefix(config, cfg, key) if config.method == "prefix" else {
    (cfg.stacks[0], KEY, name): leaf for name, leaf in _prompt(config, cfg, base, key).items()
  }  # fmt: skip
  return unflatten_dict({path: leaf.astype(config.dtype) for path, leaf in made.items()})


def _prompt(
  config: PeftConfig, cfg: ModelConfig, base: Mapping[str, Any], key: jax.Array
) -> dict[str, jax.Array]:
  count, width = config.virtual_tokens, cfg.embed_width
  if config.method == "ptuning":
    layers = config.encoder_layers if config.encoder == "lstm" else None
    hidden = config.encoder_width or width
    return new_prompt_writer(key, tokens=count, width=width, hidden=hidden, lstm_layers=layers)
  if config.init == "default":
    return {PROMPT: jax.random.normal(key, (count, width))}
  if config.init == "vocabulary":
    ids = jax.random.randint(key, (count,), 0, cfg.real_vocab)
  else:  # Until the tokenizer has been asked there are shapes only.
    told = jnp.array(config.init_tokens or (0,))
    ids = jnp.tile(told, -(-count // len(told)))[:count]
  return {PROMPT: _vectors(cfg, base, ids)}


def _vectors(cfg: ModelConfig, base: Mapping[str, Any], ids: jax.Array) -> jax.Array:
  """What the first layer reads of tokens, in at least float32."""
  leaves: Any = flatten_dict(base)
  table = leaves[("embed", "table")]
  wide = jnp.promote_types(jnp.float32, cfg.param_dtype)
  if isinstance(table, Quantized):
    rows = quant.rows(table, ids[None], wide, axis="vocab")[0]
  else:
    rows = table[ids].astype(wide)
  return rows * jnp.asarray(cfg.d_model**0.5, wide) if cfg.scale_embeddings else rows


def _prefix(config: PeftConfig, cfg: ModelConfig, key: jax.Array) -> dict:
  stack = cfg.stacks[-1]
  size = dict(layers=cfg.depth(stack), heads=cfg.kv_heads, head_width=cfg.head_width)
  zero = config.init == "zero"
  if config.projection:
    hidden = config.encoder_width or cfg.kv_heads * cfg.head_width
    made = new_prefix_writer(key, tokens=config.virtual_tokens, hidden=hidden, zero=zero, **size)
    return {(stack, KEY, name): leaf for name, leaf in made.items()}
  shape = (config.virtual_tokens, size["layers"], 2, size["heads"], size["head_width"])
  table = jnp.zeros(shape) if zero else jax.random.normal(key, shape)
  if cfg.shape == "encoder_decoder":  # Layers share rows there.
    return {(stack, KEY, TABLE): table}
  return placed_prefix(table, cfg)
