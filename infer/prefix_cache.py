"""What a model has computed for the beginnings of prompts, kept for prompts that begin alike.

Kept in blocks of tokens, each behind the one before it, so that a prompt finds the longest
beginning that any prompt before it had. A block has the keys and values of all layers at its
positions: it serves rings, too, whatever has left them since.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from model.cache import Cache, LayerCache
from model.config import ModelConfig
from model.errors import InputError
from model.peft.virtual import virtual_tokens

if TYPE_CHECKING:
  from model import Model

CAPACITY_BYTES = 2**30
BLOCK = 32


@dataclasses.dataclass(frozen=True)
class _Kept:
  number: int  # Names the block to those behind it.
  block: Cache
  bytes: int


class PrefixCache:
  """Beginnings of prompts that a model has read: `infer.generate(m, …, prefix_cache=this)`.

  Of a prompt, the longest beginning of whole blocks that was read before is not computed again; at
  least its last token is. What is generated does not change. The blocks that have not been used for
  longest go when there is no room.
  """

  def __init__(self, m: "Model", *, capacity_bytes: int = CAPACITY_BYTES, block: int = BLOCK):
    """An empty cache.

    Args:
      m: the model that it is for.
      capacity_bytes: the most bytes of keys and values that are kept.
      block: tokens of a block, a power of two: beginnings are shared in multiples of it.

    Raises:
      InputError: for a model whose prompts have no beginning of their own, because an encoder or a
        prefix LM reads them in both directions, or an impossible value.
    """
    for name, value in (("capacity_bytes", capacity_bytes), ("block", block)):
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}={value!r} of a PrefixCache must be a whole number of at least 1.")
    if block & (block - 1):
      raise InputError(f"block={block} of a PrefixCache must be a power of two.")
    if m.config.shape != "decoder" or m.config.prefix_attention:
      raise InputError(
        "a PrefixCache keeps what a decoder makes of the beginnings of prompts, and this model "
        "reads prompts in both directions: what it makes of a beginning depends on the rest."
      )
    self.capacity_bytes, self.block = capacity_bytes, block
    self.hits = 0  # Prompts of which something was kept.
    self.misses = 0
    self.tokens_reused = 0
    self.bytes = 0  # Of what is kept now.
    self._config, self._params = m.config, m.params
    self._before = virtual_tokens(m.params, "decoder")  # Caches have them at their first positions.
    self._numbers = itertools.count()
    self._roots: dict[Any, int] = {}
    self._kept: collections.OrderedDict[tuple[int, tuple[int, ...]], _Kept] = (
      collections.OrderedDict()
    )

  def __len__(self) -> int:
    """Blocks that are kept."""
    return len(self._kept)

  def clear(self) -> None:
    """Forgets what is kept."""
    self._kept.clear()
    self.bytes = 0

  def check(self, m: "Model") -> None:
    """Raises an InputError for another model than the one that this is for."""
    if m.params is not self._params or m.config != self._config:
      raise InputError(
        "prefix_cache is for another model: what is kept are a model's own keys and values. Make a "
        "PrefixCache for each."
      )

  def trail(
    self, text: Sequence[int], dtype: str | None, adapter: int | None = None
  ) -> "Trail":  # fmt: skip
    """Where a text leads in what is kept, in caches of a dtype by an adapter of the model's; counts
    as a hit or a miss.
    """
    regime = _regime(self._config, len(text) + self._before)
    root = None if regime is None else self._root((dtype, regime, adapter))
    trail = Trail(self, text, root)
    self.hits += trail.tokens > 0
    self.misses += trail.tokens == 0
    self.tokens_reused += trail.tokens
    return trail

  def _root(self, key: Any) -> int:
    if key not in self._roots:
      self._roots[key] = next(self._numbers)
    return self._roots[key]

  def _look(self, key: tuple[int, tuple[int, ...]]) -> _Kept | None:
    return self._kept.get(key)

  def _used(self, keys: Sequence[tuple[int, tuple[int, ...]]]) -> None:
    """Marks blocks, given from the first on, so that none goes before those behind it."""
    for key in reversed(keys):
      self._kept.move_to_end(key)

  def _add(
    self, before: list[tuple[int, tuple[int, ...]]], key: tuple[int, tuple[int, ...]], block: Cache
  ) -> _Kept | None:
    """Keeps a block behind others; None where these leave no room."""
    size = sum(a.nbytes for a in jax.tree.leaves(block))
    while self.bytes + size > self.capacity_bytes:
      oldest = next(iter(self._kept), None)
      if oldest is None or oldest in before:
        return None
      self.bytes -= self._kept.pop(oldest).bytes
    self._kept[key] = _Kept(next(self._numbers), block, size)
    self.bytes += size
    self._used([*before, key])
    return self._kept[key]


class Trail:
  """The blocks of one text: those that were found, then those that are added while it is read."""

  def __init__(self, cache: PrefixCache, text: Sequence[int], root: int | None):
    """`root` names the kind of caches; None: nothing can be kept of this text."""
    self.blocks: list[Cache] = []  # Found ones: positions from 0 on.
    self._cache, self._text, self._open = cache, text, root is not None
    self._number = root
    self._keys: list[tuple[int, tuple[int, ...]]] = []
    while self._open and (len(self.blocks) + 1) * cache.block < len(text):
      kept = cache._look(self._key())
      if kept is None:
        break
      self._keys.append(self._key())
      self._number = kept.number
      self.blocks.append(kept.block)
    self.tokens = len(self.blocks) * cache.block  # That need not be read.
    cache._used(self._keys)

  def _key(self) -> tuple[int, tuple[int, ...]]:
    start = len(self._keys) * self._cache.block
    return self._number or 0, tuple(self._text[start : start + self._cache.block])

  def keep(self, cache: Cache, row: int, start: int, stop: int) -> None:
    """Keeps the whole blocks that a row has read from `start` up to `stop`."""
    size = self._cache.block
    for at in range(start, stop - size + 1, size):
      if not self._open:
        return
      key = self._key()
      kept = self._cache._look(key)
      lost = self._keys and self._cache._look(self._keys[-1]) is None
      if kept is None and not lost:
        first = np.int32(at + self._cache._before)
        block = take(cache, np.int32(row), first, count=size)
        kept = self._cache._add(self._keys, key, block)
      if kept is None:  # What follows would have nothing before it.
        self._open = False
        return
      self._keys.append(key)
      self._number = kept.number


@functools.partial(jax.jit, static_argnames=("count",))
def take(cache: Cache, row: Int[Array, ""], start: Int[Array, ""], *, count: int) -> Cache:
  """What a row of a cache has of `count` tokens from `start` on, which are still in its rings."""
  pos = start + jnp.arange(count)
  return tuple(LayerCache(layer.own.take(row, pos)) for layer in cache)


def _regime(cfg: ModelConfig, length: int) -> int | None:
  """What besides its tokens decides the keys of a text: how long it is, for some rotary scalings.

  None: its exact length does.
  """
  original = cfg.rope_original_positions
  if cfg.rope_scaling not in ("longrope", "dynamic") or original is None or length <= original:
    return 0
  return 1 if cfg.rope_scaling == "longrope" else None
