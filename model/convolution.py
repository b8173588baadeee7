"""A convolution beside a layer: what neighbouring tokens say, for DeBERTa-v2's first layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.layers import Linear, Norm, activation, dropout


class Convolution(nnx.Module):
  """norm(y + f(convolution of x)) for a layer that made y of x (DeBERTa, arXiv:2006.03654, v2).

  Neighbours are the tokens of the same segment at the next positions, wherever they lie.
  """

  def __init__(self, cfg: ModelConfig, width: int, *, rngs: nnx.Rngs):
    self.reach, self.activation, self.dropout = width // 2, cfg.conv_activation, cfg.dropout
    shape, axes = (width, cfg.d_model, cfg.d_model), (None, "embed", "embed_out")
    self.proj = Linear(cfg, shape, axes, rngs=rngs, inputs=2, bias=True)
    self.norm = Norm(cfg, rngs=rngs)

  def __call__(
    self, x: Float[Array, "B T D"], y: Float[Array, "B T D"], pos: Int[Array, "B T"],
    seg: Int[Array, "B T"] | None, key: jax.Array | None,
  ) -> Float[Array, "B T D"]:  # fmt: skip
    near = [self._neighbour(x, pos, seg, n) for n in range(-self.reach, self.reach + 1)]
    z = dropout(self.proj(jnp.stack(near, axis=2)), self.dropout, key)
    return self.norm(y + activation(self.activation)(z))

  def _neighbour(self, x: Array, pos: Array, seg: Array | None, n: int) -> Float[Array, "B T D"]:
    """The token `n` positions on; zeros where there is none."""
    found = (pos[:, None] >= 0) & (pos[:, None] == pos[:, :, None] + n)
    if seg is not None:
      found &= seg[:, None] == seg[:, :, None]
    rows = jnp.take_along_axis(x, jnp.argmax(found, axis=-1)[..., None], axis=1)
    return jnp.where(jnp.any(found, axis=-1)[..., None], rows, 0)
