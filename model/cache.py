"""The key/value cache: slots that store positions. Masks follow from them; nothing else is kept."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.config import LayerKind, ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of one layer, or of a stack of layers with a leading axis.

  Of latent attention, `k` holds what is kept of a token, as one head, and `v` has no width.

  A ring: the token at position p lies in slot p % S. It is right as long as S is at least the
  number of tokens that are still to be seen, the ones of one update included.
  """

  k: Float[Array, "... B K S H"]  # Heads outermost: no product with a query has to turn it.
  v: Float[Array, "... B K S Hv"]
  pos: Int[Array, "... B S"]  # Position of the token in a slot; -1: empty.

  def update(
    self, k: Float[Array, "B T K H"], v: Float[Array, "B T K Hv"], pos: Int[Array, "B T"]
  ) -> "KVCache":
    """Writes each token at slot pos % S; padding (position -1) writes nothing."""
    B, S = self.pos.shape
    slot = jnp.where(pos < 0, S, pos % S)  # Slot S does not exist: dropped.
    row = jnp.arange(B)[:, None]

    def put(old: Float[Array, "B K S H"], new: Float[Array, "B T K H"]) -> Float[Array, "B K S H"]:
      new = new.astype(old.dtype)
      if B == 1:  # Written without the axis, one row is updated in place; with it, XLA copies all.
        return old[0].at[:, slot[0]].set(new[0].swapaxes(0, 1), mode="drop")[None]
      return old.at[row, :, slot].set(new, mode="drop")

    return KVCache(put(self.k, k), put(self.v, v), self.pos.at[row, slot].set(pos, mode="drop"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """What a layer keeps between steps: of its own tokens, and of what its encoder has read."""

  own: KVCache
  cross: KVCache | None = None  # Filled once for each request.


Cache = tuple[LayerCache, ...]


def cache_length(window: int | None, length: int, chunk: int) -> int:
  """Slots of a layer: all of `length`, or a ring of the window and what one step may write."""
  return length if window is None else min(length, window + chunk - 1)


def new_cache(
  cfg: ModelConfig, batch: int, length: int, *, stacked: bool, chunk: int | None = None,
  source: int = 0, dtype: jnp.dtype | None = None,
) -> Cache:  # fmt: skip
  """Empty caches for sequences of up to `length` tokens, in the order of the decoder's layers.

  Args:
    stacked: one cache per stack with a leading layer axis, as in training; otherwise one per layer.
    chunk: the most tokens that one step writes (None: `length`), which sizes the rings.
    source: tokens that the encoder reads, of an encoder–decoder.
    dtype: of keys and values; None: the compute dtype.
  """
  dtype = cfg.compute_dtype if dtype is None else dtype
  chunk = length if chunk is None else chunk

  heads, widths = cfg.kv_heads, (cfg.head_width, cfg.value_width)
  if cfg.kv_latent_dim is not None:
    heads, widths = 1, (cfg.kv_latent_dim + cfg.rotated_width, 0)

  def slots(S: int, lead: tuple[int, ...]) -> KVCache:
    k, v = (jnp.zeros((*lead, batch, heads, S, width), dtype) for width in widths)
    return KVCache(k, v, jnp.full((*lead, batch, S), -1, jnp.int32))

  def empty(kind: LayerKind, lead: tuple[int, ...]) -> LayerCache:
    own = slots(cache_length(kind.window, length, chunk), lead)
    return LayerCache(own, slots(source, lead) if kind.cross else None)

  if not stacked:
    return tuple(empty(kind, ()) for kind in cfg.layers("decoder"))
  groups = cfg.groups("decoder")
  return tuple(empty(kind, (n,)) for pattern, n in groups for kind in pattern)
