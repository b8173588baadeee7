"""The key/value cache: slots that store positions. Masks follow from them; nothing else is kept."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.config import LayerKind, ModelConfig

MOST_INT8 = 127  # The range of int8 is used symmetrically.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of one layer, or of a stack of layers with a leading axis.

  Of latent attention, `k` holds what is kept of a token, as one head, and `v` has no width. In int8
  a value is its integer times the scale of its token and head.

  A ring: the token at position p lies in slot p % S. It is right as long as S is at least the
  number of tokens that are still to be seen, the ones of one update included.
  """

  k: Float[Array, "... B K S H"]  # Heads outermost: no product with a query has to turn it.
  v: Float[Array, "... B K S Hv"]
  pos: Int[Array, "... B S"]  # Position of the token in a slot; -1: empty.
  k_scale: Float[Array, "... B K S"] | None = None  # Of int8.
  v_scale: Float[Array, "... B K S"] | None = None

  def update(
    self, k: Float[Array, "B T K H"], v: Float[Array, "B T K Hv"], pos: Int[Array, "B T"]
  ) -> "KVCache":
    """Writes each token at slot pos % S; padding (position -1) writes nothing."""
    new = {"k": k, "v": v}
    if self.k_scale is not None:
      (k, k_scale), (v, v_scale) = (quantized(x.astype(self.k_scale.dtype)) for x in (k, v))
      new = {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
    return self._written(new, pos)

  def put(self, other: "KVCache") -> "KVCache":
    """Writes the tokens of another cache of the same dtype; what is empty there writes nothing."""
    return self._written({n: a.swapaxes(1, 2) for n, a in other._kept().items()}, other.pos)

  def take(self, row: Int[Array, ""], pos: Int[Array, "T"]) -> "KVCache":
    """A cache of one row that holds the tokens at these positions, in order; they are here."""
    slot = pos % self.pos.shape[-1]
    kept = {name: a[row][:, slot][None] for name, a in self._kept().items()}
    return KVCache(pos=self.pos[row][slot][None], **kept)

  def keys_values(
    self, dtype: jnp.dtype
  ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S Hv"]]:
    """What is kept, as floats: of a dtype where they are kept as int8."""
    if self.k_scale is None or self.v_scale is None:
      return self.k, self.v
    wide = lambda a, scale: (a.astype(scale.dtype) * scale[..., None]).astype(dtype)
    return wide(self.k, self.k_scale), wide(self.v, self.v_scale)

  def _kept(self) -> dict[str, Array]:
    """All that there is of tokens but their positions; the third axis is that of slots."""
    names = ("k", "v") if self.k_scale is None else ("k", "v", "k_scale", "v_scale")
    return {name: getattr(self, name) for name in names}

  def _written(self, new: dict[str, Array], pos: Int[Array, "B T"]) -> "KVCache":
    """`new` has tokens before heads."""
    B, S = self.pos.shape
    slot = jnp.where(pos < 0, S, pos % S)  # Slot S does not exist: dropped.
    row = jnp.arange(B)[:, None]

    def put(old: Array, new: Array) -> Array:
      new = new.astype(old.dtype)
      if B == 1:  # Written without the axis, one row is updated in place; with it, XLA copies all.
        return old[0].at[:, slot[0]].set(new[0].swapaxes(0, 1), mode="drop")[None]
      return old.at[row, :, slot].set(new, mode="drop")

    kept = {name: put(old, new[name]) for name, old in self._kept().items()}
    return KVCache(pos=self.pos.at[row, slot].set(pos, mode="drop"), **kept)


def quantized(x: Float[Array, "... H"]) -> tuple[Float[Array, "... H"], Float[Array, "..."]]:
  """(whole numbers from -127 to 127, the scale of each head of each token), whose product is `x`.

  Symmetric, so that scales can multiply scores and probabilities in the place of keys and values.
  """
  most = jnp.max(jnp.abs(x), axis=-1, initial=0.0)
  scale = jnp.where(most > 0, most, 1.0) / MOST_INT8
  return jnp.round(x / scale[..., None]), scale


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
    dtype: of keys and values; None: the compute dtype; int8: with a scale per head and token.
  """
  dtype = jnp.dtype(cfg.compute_dtype if dtype is None else dtype)
  chunk = length if chunk is None else chunk

  heads, widths = cfg.kv_heads, (cfg.head_width, cfg.value_width)
  if cfg.kv_latent_dim is not None:
    heads, widths = 1, (cfg.kv_latent_dim + cfg.rotated_width, 0)

  def slots(S: int, lead: tuple[int, ...]) -> KVCache:
    k, v = (jnp.zeros((*lead, batch, heads, S, width), dtype) for width in widths)
    pos = jnp.full((*lead, batch, S), -1, jnp.int32)
    if dtype != jnp.int8:
      return KVCache(k, v, pos)
    exact = jnp.promote_types(cfg.compute_dtype, jnp.float32)
    scales = (jnp.zeros((*lead, batch, heads, S), exact) for _ in widths)
    return KVCache(k, v, pos, *scales)

  def empty(kind: LayerKind, lead: tuple[int, ...]) -> LayerCache:
    own = slots(cache_length(kind.window, length, chunk), lead)
    return LayerCache(own, slots(source, lead) if kind.cross else None)

  if not stacked:
    return tuple(empty(kind, ()) for kind in cfg.layers("decoder"))
  groups = cfg.groups("decoder")
  return tuple(empty(kind, (n,)) for pattern, n in groups for kind in pattern)
