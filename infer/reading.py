"""Texts into a cache, a chunk of each row at a time: all chunks by one compiled program.

A short text is one chunk, of the next power of two. Of a long one each pass reads as many tokens as
a chunk has, so that memory for scores is bounded and no length needs a program of its own. Where a
row begins is a value: what a cache of prefixes holds of it is put into the cache, not read again.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from infer.prefix_cache import Trail
from infer.requests import bucket
from infer.settings import Settings
from model.cache import Cache, LayerCache, new_cache
from model.config import ModelConfig
from model.peft.named import chosen
from model.transformer import Inputs

if TYPE_CHECKING:
  from model import Model

LEAST_PROMPT = 16  # The smallest size of a pass.
PREFILL_CHUNK = 256  # Tokens that one pass reads of each row, if nothing else is asked for.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Behind:
  """What is known behind texts."""

  cache: Cache
  last: Float[Array, "B D"]  # Last hidden state of the last token of each.
  states: Float[Array, "B L D"] | None  # Those of all tokens, where a search needs them.


@dataclasses.dataclass(frozen=True)
class Reader:
  """A network with its parameters, and what the caches that it fills are like."""

  graphdef: nnx.GraphDef
  params: dict
  config: ModelConfig
  length: int  # Tokens that a cache has room for.
  chunk: int  # The most tokens that one pass reads of each row.
  dtype: str | None  # Of caches; None: what is computed in.
  ahead: int = 0  # Tokens that will be guessed ahead.

  def with_adapters(self, numbers: Sequence[int] | None, rows: int) -> "Reader":
    """What reads rows, of which the first have adapters of these numbers; None: as it is."""
    if numbers is None:
      return self
    return dataclasses.replace(self, params=chosen(self.params, numbers, rows))

  def read(
    self, texts: Sequence[list[int]], size: int, *, source: Inputs | None = None,
    prompts: Sequence[int] | None = None, trails: Sequence[Trail] = (), states: bool = False,
  ) -> Behind:  # fmt: skip
    """What is known behind texts; rows beyond them are padding.

    Args:
      size: rows.
      source: what the encoder of an encoder–decoder reads, whole and once; `texts` then begin its
        decoder.
      prompts: how much of each text is its prompt, which a prefix LM reads in both directions;
        None: all.
      trails: what is kept of the beginning of each text, if anything is.
      states: also keep the hidden states of all tokens.
    """
    starts, lengths = np.zeros(size, np.int32), np.zeros(size, np.int32)
    starts[: len(trails)] = [trail.tokens for trail in trails]
    lengths[: len(texts)] = [len(text) for text in texts]
    given = lengths.copy()
    given[: len(texts)] = lengths[: len(texts)] if prompts is None else prompts
    # A wrong guess may not have taken the slot of a token that is still to be seen.
    written = max(self.chunk, self.ahead + 2)
    behind = begin(
      self.graphdef, self.params, source, lengths, cfg=self.config, length=self.length,
      chunk=written, dtype=self.dtype, states=states,
    )  # fmt: skip
    for block, rows in _shared(trails, size):
      behind = dataclasses.replace(behind, cache=place(behind.cache, block, rows))
    width = self._width(int(max(lengths - starts)))
    for done in range(0, int(max(lengths - starts)), width):
      first = starts + done
      tokens = np.zeros((size, width), np.int32)
      for i, text in enumerate(texts):
        part = text[first[i] : first[i] + width]
        tokens[i, : len(part)] = part
      behind = read_chunk(self.graphdef, self.params, behind, tokens, first, lengths, given)
      for i, trail in enumerate(trails):
        trail.keep(behind.cache, i, int(first[i]), min(int(first[i]) + width, len(texts[i])))
    return behind

  def _width(self, most: int) -> int:
    """Tokens of one pass, for texts that go on by so many."""
    least = 1 if self.config.shape == "encoder_decoder" else LEAST_PROMPT
    return min(self.chunk, bucket(most, least, self.config.max_positions))


def reader(m: "Model", settings: Settings, length: int) -> Reader:
  """What reads prompts of a model as the settings say."""
  return Reader(
    *m.unstacked(), m.config, length, chunk_of(m.config, settings, length),
    kept_dtype(settings), settings.guesses,
  )  # fmt: skip


def chunk_of(cfg: ModelConfig, settings: Settings, length: int) -> int:
  """The most tokens that one pass reads of each row; a prefix LM reads its prompts whole.

  A block of a cache of prefixes is kept from one pass.
  """
  if cfg.prefix_attention:
    return length
  block = settings.prefix_cache.block if settings.prefix_cache is not None else 0
  return min(settings.prefill_chunk or max(PREFILL_CHUNK, block), length)


def kept_dtype(settings: Settings) -> str | None:
  """The dtype of caches; None: what is computed in."""
  return None if settings.cache_dtype == "auto" else settings.cache_dtype


@functools.partial(
  jax.jit, static_argnames=("graphdef", "cfg", "length", "chunk", "dtype", "states")
)
def begin(
  graphdef: nnx.GraphDef, params: dict, source: Inputs | None, lengths: Int[Array, "B"], *,
  cfg: ModelConfig, length: int, chunk: int, dtype: str | None, states: bool,
) -> Behind:  # fmt: skip
  """Before anything is read, but by the encoder of an encoder–decoder, and virtual tokens.

  Args:
    lengths: tokens of each text.
  """
  kept, read, rows = None if dtype is None else jnp.dtype(dtype), 0, len(lengths)
  net = nnx.merge(graphdef, params)
  if source is not None:
    read = source.tokens.shape[1] + net.prompt_tokens
  chunk = max(chunk, net.decoder.prompt_tokens)
  cache = new_cache(cfg, rows, length, stacked=False, chunk=chunk, source=read, dtype=kept)
  if source is not None:
    cache = net.read(cache, source)
  cache = net.begun(cache, lengths)
  last = jnp.zeros((rows, cfg.d_model), cfg.compute_dtype)
  return Behind(cache, last, jnp.zeros((rows, length, cfg.d_model)) if states else None)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("behind",))
def read_chunk(
  graphdef: nnx.GraphDef, params: dict, behind: Behind, tokens: Int[Array, "B T"],
  first: Int[Array, "B"], lengths: Int[Array, "B"], prompts: Int[Array, "B"],
) -> Behind:  # fmt: skip
  """Reads the next tokens of each row.

  Args:
    behind: donated.
    first: position of the first of them; a row whose text ends before it reads nothing.
    lengths: tokens of each text.
    prompts: of them, those of its prompt.
  """
  net = nnx.merge(graphdef, params)
  pos = first[:, None] + jnp.arange(tokens.shape[1])
  pos = jnp.where(pos < lengths[:, None], pos, -1)
  both_ways = (pos >= 0) & (pos < prompts[:, None]) if net.cfg.prefix_attention else None
  inputs = Inputs(tokens, pos, bidirectional=both_ways, length=lengths)
  x, cache, _ = net.hidden(inputs, cache=behind.cache)
  place = lengths - 1 - first
  here = (place >= 0) & (place < tokens.shape[1])
  newest = jnp.take_along_axis(x, jnp.where(here, place, 0)[:, None, None], axis=1)[:, 0]
  last = jnp.where(here[:, None], newest.astype(behind.last.dtype), behind.last)
  states = behind.states
  if states is not None:
    slot = jnp.where(pos < 0, states.shape[1], pos)
    row = jnp.arange(len(tokens))[:, None]
    states = states.at[row, slot].set(x.astype(states.dtype), mode="drop")
  return Behind(cache, last, states)


@jax.jit
def spread(behind: Behind, rows: Int[Array, "B"]) -> Behind:
  """The same for several rows each."""
  return jax.tree.map(lambda a: a[rows], behind)


@functools.partial(jax.jit, donate_argnames=("cache",))
def place(cache: Cache, block: Cache, rows: Bool[Array, "B"]) -> Cache:
  """Puts kept tokens into some rows of a cache, which is donated."""
  size = len(rows)

  def put(layer: LayerCache, kept: LayerCache) -> LayerCache:
    own = jax.tree.map(lambda a: jnp.broadcast_to(a, (size, *a.shape[1:])), kept.own)
    own = dataclasses.replace(own, pos=jnp.where(rows[:, None], own.pos, -1))
    return LayerCache(layer.own.put(own), layer.cross)

  return tuple(put(*pair) for pair in zip(cache, block, strict=True))


def _shared(trails: Sequence[Trail], size: int) -> list[tuple[Cache, Any]]:
  """Kept blocks, those of earlier positions first, each with the rows that it is meant for."""
  rows: dict[int, Any] = {}
  blocks: dict[int, Cache] = {}
  for depth in range(max((len(trail.blocks) for trail in trails), default=0)):
    for i, trail in enumerate(trails):
      if depth < len(trail.blocks):
        block = trail.blocks[depth]
        blocks[id(block)] = block
        rows.setdefault(id(block), np.zeros(size, bool))[i] = True
  return [(block, rows[key]) for key, block in blocks.items()]
