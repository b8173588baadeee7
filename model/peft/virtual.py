"""Virtual tokens: vectors, or keys and values, that are learned and stand before each text.

A prompt (Lester et al., arXiv:2104.08691; P-tuning, Liu et al., arXiv:2103.10385) is read by the
first layer of the first stack: its tokens are tokens of each text, at its first positions. A prefix
(Li & Liang, arXiv:2101.00190; P-tuning v2, Liu et al., arXiv:2110.07602) has keys and values of its
own in each layer of the last stack, which all texts see. Either way the positions of a text's own
tokens begin behind them, as in torch PEFT.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int

from model.cache import KVCache
from model.mask import EVERY
from model.peft.parameter import adapter_param

PROMPT, PREFIX = "prompt", ("prefix_k", "prefix_v")  # Names of their parameters.


class Prompt(nnx.Module):
  """What the first layer of a stack reads in the place of embedded tokens: (tokens, width)."""

  def __init__(self, leaves: Mapping[str, Any]):
    self.prompt = adapter_param(leaves[PROMPT], (None, "embed"), role="embedding")

  @property
  def tokens(self) -> int:
    """Virtual tokens of each text."""
    return self.prompt.shape[0]

  def put(self, x: Float[Array, "B T D"], pos: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """`x` with the prompt where positions are those of virtual tokens."""
    row = jnp.where(pos < 0, self.tokens, pos)
    own = self.prompt[...].astype(x.dtype).at[row].get(mode="fill", fill_value=0)
    return jnp.where((row < self.tokens)[..., None], own, x)


class Prefix(nnx.Module):
  """Keys and values of one attention, (tokens, K, H), before those of each text; no rotation or
  norm changes them.
  """

  def __init__(self, leaves: Mapping[str, Any]):
    axes = (None, "kv_heads", "head_dim")
    self.prefix_k = adapter_param(leaves[PREFIX[0]], axes, role="embedding")
    self.prefix_v = adapter_param(leaves[PREFIX[1]], axes, role="embedding")

  @property
  def tokens(self) -> int:
    """Virtual tokens of each text."""
    return self.prefix_k.shape[-3]

  def before(
    self, k: Array, v: Array, pos: Int[Array, "B T"], seg: Int[Array, "B T"] | None
  ) -> tuple[Array, Array, Array, Array | None]:
    """(keys, values, positions, segments) with its own in front, which every segment sees."""
    rows = len(pos)
    own = lambda p, x: jnp.broadcast_to(p[...].astype(x.dtype), (rows, *p.shape))
    k = jnp.concatenate((own(self.prefix_k, k), k), axis=1)
    v = jnp.concatenate((own(self.prefix_v, v), v), axis=1)
    if seg is not None:
      seg = jnp.concatenate((jnp.full((rows, self.tokens), EVERY, seg.dtype), seg), axis=1)
    return k, v, with_positions(pos, self.tokens), seg

  def written(self, cache: KVCache) -> KVCache:
    """A cache that has its keys and values at the first positions; of a ring as many as fit."""
    rows, slots = cache.pos.shape
    first = max(0, self.tokens - slots)
    own = lambda p: jnp.broadcast_to(p[first:], (rows, *p[first:].shape))
    pos = jnp.broadcast_to(
      jnp.arange(first, self.tokens, dtype=cache.pos.dtype), (rows, self.tokens - first)
    )
    return cache.update(own(self.prefix_k[...]), own(self.prefix_v[...]), pos)


def has_prompt(params: Mapping[str, Any]) -> bool:
  """Whether the parameters have virtual tokens that a first layer reads."""
  return any(virtual_tokens(params, stack, (PROMPT,)) for stack in params)


def virtual_tokens(
  params: Mapping[str, Any], stack: str, kinds: tuple[str, ...] = (PROMPT, PREFIX[0])
) -> int:
  """How many virtual tokens stand before the texts that a stack reads."""
  below = params.get(stack)
  leaves: Any = flatten_dict(below) if isinstance(below, dict) else {}
  axis = {PROMPT: -2, PREFIX[0]: -3}
  found = (leaf.shape[axis[path[-1]]] for path, leaf in leaves.items() if path[-1] in kinds)
  return next(found, 0)


def with_positions(pos: Int[Array, "B T"], count: int) -> Int[Array, "B V+T"]:
  """Positions of keys with those of `count` virtual tokens in front."""
  first = jnp.broadcast_to(jnp.arange(count, dtype=pos.dtype), (len(pos), count))
  return jnp.concatenate((first, pos), axis=1)


def later(inputs: Any, count: int) -> Any:
  """The `Inputs` of a stack with positions that begin behind `count` virtual tokens."""
  if not count:
    return inputs
  pos = jnp.where(inputs.pos >= 0, inputs.pos + count, inputs.pos)
  length = None if inputs.length is None else inputs.length + count
  return dataclasses.replace(inputs, pos=pos, length=length)


def own_tokens(inputs: Any, count: int) -> Any:
  """`Inputs` among which virtual tokens lie, as if there were none: they have no position, and
  others are counted from the first of their text's own.
  """
  if not count:
    return inputs
  pos = jnp.where(inputs.pos >= count, inputs.pos - count, -1)
  return dataclasses.replace(inputs, pos=pos, placed=False, ordered=False)


def in_front(inputs: Any, count: int) -> Any:
  """`Inputs` with virtual tokens before each text, all of them before the tokens of their row."""
  own = later(inputs, count)
  seg = (inputs.pos >= 0).astype(jnp.int32) if inputs.seg is None else inputs.seg
  number = jnp.arange(1, inputs.texts + 1, dtype=jnp.int32)
  there = jnp.any((seg[:, None] == number[:, None]) & (inputs.pos >= 0)[:, None], axis=-1)
  there = jnp.repeat(there, count, axis=1)
  place = jnp.tile(jnp.arange(count, dtype=own.pos.dtype), inputs.texts)
  before = {
    "tokens": jnp.zeros(there.shape, jnp.int32),
    "pos": jnp.where(there, place, -1),
    "seg": jnp.where(there, jnp.repeat(number, count), 0),
    "types": jnp.zeros(there.shape, jnp.int32),
    "bidirectional": jnp.zeros(there.shape, bool),
  }
  joined = {
    name: jnp.concatenate((front.astype(array.dtype), array), axis=1)
    for name, front in before.items()
    if (array := jnp.asarray(getattr(own, name)) if getattr(own, name) is not None else None)
    is not None
  }
  ordered = inputs.ordered and inputs.seg is None
  return dataclasses.replace(own, **joined, ordered=ordered, placed=True)
