"""Disentangled attention: tokens and their relative positions are vectors of their own, and a score
sums what content says to content, content to position (c2p) and position to content (p2c).

Source: DeBERTa, arXiv:2006.03654, section 3.1.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model import positions
from model.config import ModelConfig
from model.layers import Embed, Linear, Norm, dropout
from model.sharding import constrain

Projection = Callable[[Float[Array, "R D"]], Float[Array, "R N H"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Relative:
  """Vectors of relative positions, and which of them stands between a query and a key."""

  vectors: Float[Array, "R D"]
  between: Int[Array, "B T S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativeHeads:
  """The same as keys (c2p) and as queries (p2c) of one layer; None: not asked for."""

  keys: Float[Array, "R N H"] | None
  queries: Float[Array, "R N H"] | None
  between: Int[Array, "B T S"]


class RelativeTable(nnx.Module):
  """The vectors, which all layers of a stack share."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    self.buckets, self.distance = cfg.relative_buckets, cfg.relative_max_distance
    self.embed = Embed(cfg, cfg.relative_buckets, None, rngs=rngs)
    if cfg.relative_norm:
      self.norm = Norm(cfg, rngs=rngs)

  def __call__(self, pos: Int[Array, "B T"]) -> Relative:
    vectors = self.embed.table[...].astype(self.embed.dtype)
    vectors = self.norm(vectors) if hasattr(self, "norm") else vectors
    between = positions.signed_buckets(
      constrain(pos, ("batch", "seq")), pos, num_buckets=self.buckets, max_distance=self.distance
    )
    return Relative(vectors, constrain(between, ("batch", "seq", None)))


class RelativeProjections(nnx.Module):
  """What makes keys and queries of the vectors: a layer's own projections, or those of tokens."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    self.terms, self.dropout = cfg.relative_scores, cfg.dropout
    shape, axes = (cfg.d_model, cfg.num_heads, cfg.head_width), ("embed", "heads", "head_dim")
    if cfg.relative_own_proj and "c2p" in self.terms:
      self.k_proj = Linear(cfg, shape, axes, rngs=rngs, bias=cfg.attention_bias)
    if cfg.relative_own_proj and "p2c" in self.terms:
      self.q_proj = Linear(cfg, shape, axes, rngs=rngs, bias=cfg.attention_bias)

  def __call__(
    self, relative: Relative, q_proj: Projection, k_proj: Projection, key: jax.Array | None
  ) -> RelativeHeads:
    """
    Args:
      q_proj, k_proj: those of tokens.
      key: of the vectors' dropout.
    """
    vectors = dropout(relative.vectors, self.dropout, key)
    k_proj, q_proj = getattr(self, "k_proj", k_proj), getattr(self, "q_proj", q_proj)
    return RelativeHeads(
      k_proj(vectors) if "c2p" in self.terms else None,
      q_proj(vectors) if "p2c" in self.terms else None,
      relative.between,
    )


def disentangled(
  attend: Callable[..., Array], heads: RelativeHeads, scale: float, q: Float[Array, "B T N H"],
  k: Float[Array, "B S N H"], v: Float[Array, "B S N H"], *, bias: Array | None, **settings,
) -> Float[Array, "B T N H"]:  # fmt: skip
  """`attend`, which gets `settings`, with c2p and p2c, multiplied by `scale`, beside a bias."""
  between, exact = heads.between[:, None], jnp.promote_types(q.dtype, jnp.float32)
  total = jnp.zeros((), exact)
  equation = "BTNH,RNH->BNTR"
  if heads.keys is not None:
    said = jnp.einsum(equation, q, heads.keys, preferred_element_type=exact)
    total += jnp.take_along_axis(said, between, axis=-1, mode="clip")
  if heads.queries is not None:
    said = jnp.einsum(equation, k, heads.queries, preferred_element_type=exact)
    said = jnp.take_along_axis(said, between.swapaxes(2, 3), axis=-1, mode="clip")
    total += said.swapaxes(2, 3)
  total *= jnp.asarray(scale, exact)
  return attend(q, k, v, bias=total if bias is None else bias + total, **settings)
