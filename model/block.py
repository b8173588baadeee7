"""The Block of every transformer here."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model.attention import Attention, Where
from model.cache import LayerCache
from model.config import LayerKind, ModelConfig
from model.convolution import Convolution
from model.layers import MLP, Norm, dropout
from model.moe import Experts
from model.peft.virtual import Prefix
from model.sharding import constrain_residual, constrain_tokens

Aux = dict[str, Array]


class Block(nnx.Module):
  """Attention, cross-attention where there is an encoder, and an MLP or experts, each added to a
  residual stream.

  `norm_placement`: pre  x + f(norm(x));  post  norm(x + f(x));  sandwich  x + norm(f(norm(x)));
  output  x + norm(f(x)).  `residual`: parallel adds attention and MLP of the same normed input.
  """

  def __init__(self, cfg: ModelConfig, kind: LayerKind, *, rngs: nnx.Rngs):
    self.cfg = cfg
    before, after = cfg.norm_placement in ("pre", "sandwich"), cfg.norm_placement != "pre"
    self.attn = Attention(cfg, kind, rngs=rngs)
    if before and kind.normed:
      self.attn_norm = Norm(cfg, rngs=rngs)
    if after:
      self.attn_post_norm = Norm(cfg, rngs=rngs)
    if kind.cross:
      self.cross_attn = Attention(cfg, kind, rngs=rngs, cross=True)
      if before:
        self.cross_attn_norm = Norm(cfg, rngs=rngs)
      if after:
        self.cross_attn_post_norm = Norm(cfg, rngs=rngs)
    self.mlp = Experts(cfg, rngs=rngs) if kind.experts else MLP(cfg, rngs=rngs)
    if before and cfg.residual != "parallel":
      self.mlp_norm = Norm(cfg, rngs=rngs)
    if after:
      self.mlp_post_norm = Norm(cfg, rngs=rngs)
    if kind.conv and cfg.conv_width is not None:
      self.conv = Convolution(cfg, cfg.conv_width, rngs=rngs)

  def __call__(
    self, x: Float[Array, "B T D"], where: Where, *,
    cache: LayerCache | None = None, key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], LayerCache | None, Aux]:  # fmt: skip
    keys = (None,) * 6 if key is None else jax.random.split(key, 6)
    start = x = constrain_residual(x)
    normed = self._read("attn_norm", x)
    own, cross = (None, None) if cache is None else (cache.own, cache.cross)
    y, own = self.attn(normed, where, cache=own, key=keys[0])
    cache = None if own is None else LayerCache(own, cross)
    if self.cfg.residual == "serial":
      x = self._add("attn", x, normed, y, keys[1])
      if hasattr(self, "cross_attn"):
        normed = self._read("cross_attn_norm", x)
        y, _ = self.cross_attn(normed, where, cache=cross, key=keys[3])
        x = self._add("cross_attn", x, normed, y, keys[4])
      normed = self._read("mlp_norm", x)
      y, aux = self._mlp(normed, where, keys[5])
      x = self._add("mlp", x, normed, y, keys[2])
      return self._beside(start, x, where, key), cache, aux
    both = normed if self.cfg.residual == "parallel" else self._read("mlp_norm", x)
    z, aux = self._mlp(both, where, keys[5])
    x = self._add("attn", x, normed, y, keys[1])
    x = self._add("mlp", x, both, z, keys[2])
    return self._beside(start, x, where, key), cache, aux

  def _beside(self, x: Array, y: Array, where: Where, key: jax.Array | None) -> Array:
    """What the block made of `x`, with the convolution where it has one."""
    if not hasattr(self, "conv"):
      return y
    return self.conv(x, y, where.pos, where.seg, fold(key, 6))

  def _norm(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return getattr(self, name)(x) if hasattr(self, name) else x

  def _read(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """What the matrices of a part of the block read: normed, and gathered over `tensor`."""
    return constrain_tokens(self._norm(name, x))

  def _mlp(
    self, x: Float[Array, "B T D"], where: Where, key: jax.Array | None
  ) -> tuple[Float[Array, "B T D"], Aux]:
    if isinstance(self.mlp, Experts):
      return self.mlp(x, where.pos >= 0)
    return self.mlp(x, key), {}

  def _add(
    self, part: str, x: Array, read: Array, y: Array, key: jax.Array | None
  ) -> Float[Array, "B T D"]:
    """The residual stream with what a part of the block gives, `y`, for what it has read; an
    adapter of the part (model.peft.bottleneck) changes that first.
    """
    post, norm, owner = self.cfg.norm_placement == "post", f"{part}_post_norm", getattr(self, part)
    # First what a product gives, whole: asked for parts of it, XLA gathers what is multiplied.
    y = constrain_residual(constrain_tokens(y))
    if hasattr(owner, "adapter") and not isinstance(owner.adapter, Prefix):
      y = owner.adapter(read, y)
    y = dropout(y if post else self._norm(norm, y), self.cfg.dropout, key)
    if self.cfg.residual_scale is not None:
      y *= jnp.asarray(self.cfg.residual_scale, y.dtype)
    return self._norm(norm, x + y) if post else x + y


def fold(key: jax.Array | None, index) -> jax.Array | None:
  """A key of its own for each index; None stays None."""
  return None if key is None else jax.random.fold_in(key, index)
