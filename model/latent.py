"""Multi-head latent attention: queries, keys and values of all heads from one narrow vector each.

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.layers import Initializer, Linear, Norm

_HEADS = ("latent", "heads", "head_dim")


class LatentQueries(nnx.Module):
  """Queries from a normed latent: what takes the place of one wide projection."""

  def __init__(self, cfg: ModelConfig, width: int, *, init: Initializer, rngs: nnx.Rngs):
    D, N, H = cfg.d_model, cfg.num_heads, cfg.head_width
    axes = ("embed", "latent")
    self.down_proj = Linear(cfg, (D, width), axes, rngs=rngs, bias=cfg.attention_bias)
    self.norm = _norm(cfg, width, rngs)
    self.up_proj = Linear(cfg, (width, N, H), _HEADS, rngs=rngs, init=init)

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
    return self.up_proj(self.norm(self.down_proj(x)))


class LatentKeysValues(nnx.Module):
  """Keys and values of all heads from what is kept of a token: a normed latent of width R, and P
  elements behind it that turn with the token's position and end the keys of all heads.

  Few queries meet what is kept as if that were one head's keys and values: they are taken to where
  latents live (`absorbed`), and what they gather there becomes their heads' values (`values`).
  """

  def __init__(self, cfg: ModelConfig, width: int, turning: int, *, rngs: nnx.Rngs):
    D, N = cfg.d_model, cfg.num_heads
    self.width, self.turning = width, turning
    self.still = cfg.head_width - turning  # Elements of a key that come from the latent.
    self.made = self.still + cfg.value_width
    shape, axes = (D, width + turning), ("embed", "latent")
    self.down_proj = Linear(cfg, shape, axes, rngs=rngs, bias=cfg.attention_bias)
    self.norm = _norm(cfg, width, rngs)
    self.up_proj = Linear(cfg, (width, N, self.made), _HEADS, rngs=rngs)

  def latents(self, x: Float[Array, "B S D"]) -> Float[Array, "B S 1 R+P"]:
    """What is kept of tokens; the last P elements have still to turn."""
    latent, key = self._parts(self.down_proj(x))
    return jnp.concatenate((self.norm(latent), key), axis=-1)[:, :, None]

  def expanded(
    self, kept: Float[Array, "B S 1 R+P"]
  ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N Hv"]]:
    """Keys and values of each head."""
    latent, turned = self._parts(kept)
    heads = self.up_proj(latent[:, :, 0])
    turned = jnp.broadcast_to(turned, (*heads.shape[:3], turned.shape[-1]))
    return jnp.concatenate((heads[..., : self.still], turned), axis=-1), heads[..., self.still :]

  def absorbs(self, queries: int) -> bool:
    """Whether that is cheaper, for so many queries of each key, than to make its heads."""
    if hasattr(self.up_proj, "adapter") and hasattr(self.up_proj.adapter, "rows"):
      return False  # Each row has its own matrix.
    more = 2 * (self.width + self.turning) - self.made - self.turning  # Per query, key and head.
    return queries * more < self.width * self.made

  def absorbed(self, q: Float[Array, "B T N H"]) -> Float[Array, "B T N R+P"]:
    """Queries whose products with what is kept are those with the heads' keys."""
    q, into = self.up_proj.beside(q)
    into = into[..., : self.still]
    moved = jnp.einsum("BTNH,RNH->BTNR", q[..., : self.still].astype(into.dtype), into)
    return jnp.concatenate((moved, q[..., self.still :]), axis=-1)

  def values(self, y: Float[Array, "B T N R+P"]) -> Float[Array, "B T N Hv"]:
    """Each head's values from sums of what is kept."""
    y, into = self.up_proj.beside(y)
    into = into[..., self.still :]
    return jnp.einsum("BTNR,RNH->BTNH", self._parts(y)[0].astype(into.dtype), into)

  def _parts(self, kept: Array) -> tuple[Array, Array]:
    return kept[..., : self.width], kept[..., self.width :]


def _norm(cfg: ModelConfig, width: int, rngs: nnx.Rngs) -> Norm:
  return Norm(cfg, rngs=rngs, shape=(width,), axes=("latent",), eps=cfg.latent_norm_eps)
