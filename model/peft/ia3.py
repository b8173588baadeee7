"""IA3: what a matrix gives, or what it reads, times a learned vector (arXiv:2205.05638)."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from model.layers import Linear
from model.peft.parameter import adapter_param


class IA3(nnx.Module):
  """`outputs` scales what its owner gives, bias included, or `inputs` what it reads; both have the
  axes of these.
  """

  def __init__(self, owner: Linear, leaves: dict[str, Any]):
    axes, many = owner.w.axes, owner.inputs
    if "outputs" in leaves:
      self.outputs = adapter_param(leaves["outputs"], axes[many:], role="vector")
    else:
      self.inputs = adapter_param(leaves["inputs"], axes[:many], role="vector")

  def linear(self, owner: Linear, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """What the owner makes of `x`, scaled."""
    x = x.astype(owner.dtype)
    if hasattr(self, "outputs"):
      return owner.plain(x) * self.outputs[...].astype(owner.dtype)
    return owner.plain(x * self.inputs[...].astype(owner.dtype))

  def matrix(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
    """The matrix that has the effect of `w` scaled; a bias is scaled by `bias`."""
    if hasattr(self, "outputs"):
      return w * self.outputs[...].astype(w.dtype)
    return w * self.inputs[...].astype(w.dtype).reshape(
      *self.inputs.shape, *(1,) * (w.ndim - self.inputs.ndim)
    )

  def bias(self, b: Float[Array, "..."]) -> Float[Array, "..."]:
    """The bias that belongs to `matrix`."""
    return b * self.outputs[...].astype(b.dtype) if hasattr(self, "outputs") else b
