"""Low-rank updates of matrices and tables: LoRA, its scalings and inits, DoRA.

Sources: Hu et al., arXiv:2106.09685; DoRA, Liu et al., arXiv:2402.09353; PEFT's forms of both.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.layers import Embed, Linear, dropout
from model.moe import ExpertMatrix
from model.peft.parameter import adapter_param, fixed_param
from model.sharding import constrain

Owner = Linear | Embed | ExpertMatrix


def sides(owner: Owner) -> tuple[tuple, tuple, tuple]:
  """Logical axes of an owner's matrix: (of experts, of inputs, of outputs)."""
  if isinstance(owner, Embed):
    axes = owner.table.axes
    return (), axes[:1], axes[1:]
  axes = owner.w.axes
  if isinstance(owner, ExpertMatrix):
    return axes[:1], axes[1:2], axes[2:]
  return (), axes[: owner.inputs], axes[owner.inputs :]


class LoRA(nnx.Module):
  """Adds scale · x A B to what its owner makes of x.

  `a` (inputs, R) and `b` (R, outputs) are trained, with experts or stacked layers in front. `scale`
  [] stays. `start_a` and `start_b`, where they are, are what A and B began as when the update was
  to begin at nothing: A B - start_a start_b counts (PiSSA, whose base would else change).
  `magnitude` (outputs) makes it DoRA. In training, `key` is of the dropout of what it reads.
  """

  key: nnx.Param

  def __init__(self, owner: Owner, leaves: dict[str, Any]):
    experts, inputs, outputs = sides(owner)
    many = len(inputs)
    a_axes, b_axes = (*experts, *inputs, "rank"), (*experts, "rank", *outputs)
    self.inputs = many
    self.a = adapter_param(leaves["a"], a_axes, inputs=many)
    self.b = adapter_param(leaves["b"], b_axes)
    self.scale = fixed_param(leaves["scale"], ())
    if "start_a" in leaves:
      self.start_a = fixed_param(leaves["start_a"], a_axes)
      self.start_b = fixed_param(leaves["start_b"], b_axes)
    if "magnitude" in leaves:
      self.magnitude = adapter_param(leaves["magnitude"], outputs, role="vector")
    self.rate = 0.0

  def halves(self, dtype: Any) -> tuple[Array, Array]:
    """(A, scale · B) in `dtype`; what both began as, where that counts, as further ranks."""
    a, b = self.a[...].astype(dtype), self.b[...].astype(dtype)
    if hasattr(self, "start_a"):
      a = jnp.concatenate((a, self.start_a[...].astype(dtype)), axis=-1)
      axis = b.ndim - len(self.b.axes) + self.b.axes.index("rank")
      b = jnp.concatenate((b, -self.start_b[...].astype(dtype)), axis=axis)
    return a, b * self.scale[...].astype(dtype)

  def linear(self, owner: Linear, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """What the owner and its update make of `x`."""
    x = x.astype(owner.dtype)
    read = dropout(x, self.rate, self._key())
    a, b = self.halves(owner.dtype)
    y, update = owner.plain(x), jnp.tensordot(jnp.tensordot(read, a, self.inputs), b, 1)
    if not hasattr(self, "magnitude"):
      return y + update
    share = self.share(owner)
    bias = owner.b[...].astype(owner.dtype) if hasattr(owner, "b") else 0
    own = y - bias if read is x else owner.plain(read) - bias
    return y + (share - 1) * own + share * update

  def share(self, owner: Linear) -> Float[Array, "..."]:
    """What DoRA's magnitudes multiply each output by."""
    # The norm is no path of gradients: section 4.3 there.
    norm = self._norm(owner.plain_matrix(), *self.halves(owner.dtype))
    return self.magnitude[...].astype(owner.dtype) / jax.lax.stop_gradient(norm)

  def matrix(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
    """The matrix that has the effect of `w` (experts or none, inputs, outputs) and its update."""
    a, b = self.halves(w.dtype)
    if self.a.axes[0] == "expert":
      return w + jnp.einsum("EIR,ERO->EIO", a, b)
    merged = w + jnp.tensordot(a, b, 1)
    if not hasattr(self, "magnitude"):
      return merged
    return merged * (self.magnitude[...].astype(w.dtype) / self._norm(w, a, b))

  def embedded(self, ids: Int[Array, "B T"], dtype: Any, row_axis: str | None):
    """What is added to the vectors of `ids`."""
    a, b = self.halves(dtype)
    rows = constrain(constrain(a, (row_axis, None))[ids], ("rows", "seq", None))
    return constrain(jnp.matmul(rows, b), ("rows", "seq", None))

  def arrays(self, dtype: Any) -> dict[str, Array]:
    """A and B of experts, the latter scaled."""
    return dict(zip(("lora_a", "lora_b"), self.halves(dtype), strict=True))

  def axes(self) -> dict[str, tuple[str, ...]]:
    """Their logical axes."""
    return {"lora_a": self.a.axes, "lora_b": self.b.axes}

  def _norm(self, w: Array, a: Array, b: Array) -> Float[Array, "..."]:
    """Of each output's column of the updated matrix, at least in float32."""
    wide = jnp.promote_types(w.dtype, jnp.float32)
    merged = (w + jnp.tensordot(a, b, 1)).astype(wide)
    return jnp.sqrt(jnp.square(merged).sum(tuple(range(self.inputs)))).astype(w.dtype)

  def _key(self) -> jax.Array | None:
    return jax.random.wrap_key_data(self.key[...]) if hasattr(self, "key") else None


def magnitude(w: Float[Array, "..."], stacked: int, inputs: int) -> Float[Array, "..."]:
  """What DoRA's magnitudes begin as: the norm of each output's column."""
  return jnp.sqrt(jnp.square(w).sum(tuple(range(stacked, stacked + inputs))))


def begin(
  method: str, key: jax.Array, w: Array | None, *, lead: tuple[int, ...], inputs: tuple[int, ...],
  outputs: tuple[int, ...], rank: int, scale: float, table: bool,
) -> tuple[Array, Array]:  # fmt: skip
  """(A, B), (lead, inputs, R) and (lead, R, outputs), as `peft.init` says.

  Args:
    w: (lead, inputs, outputs), at least float32, of pissa.
    table: the owner is a table of vectors: A is 0 there, and B normal, as in PEFT.
  """
  n, m = math.prod(inputs), math.prod(outputs)
  a_shape, b_shape = (*lead, *inputs, rank), (*lead, rank, *outputs)
  if method == "pissa":
    if w is None:
      raise ValueError("pissa begins with a matrix")
    u, s, vh = jnp.linalg.svd(w.reshape(*lead, n, m), full_matrices=False)
    root = jnp.sqrt(s[..., :rank] / scale)
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * vh[..., :rank, :]
    return a.reshape(a_shape), b.reshape(b_shape)
  if method == "orthogonal":
    return _orthogonal(key, lead, n, m, rank, (a_shape, b_shape))
  if table:
    return jnp.zeros(a_shape), jax.random.normal(key, b_shape)
  if method == "gaussian":
    return jax.random.normal(key, a_shape) / rank, jnp.zeros(b_shape)
  bound = n**-0.5
  return jax.random.uniform(key, a_shape, minval=-bound, maxval=bound), jnp.zeros(b_shape)


def _orthogonal(key, lead, n: int, m: int, rank: int, shapes) -> tuple[Array, Array]:
  """A reads through the odd rows of an orthogonal matrix and B writes through the even ones, so
  that A B begins as 0 (https://datta0.github.io/posts/rethink-lora-init/).
  """
  keys = jax.random.split(key, 3)
  q = jnp.linalg.qr(jax.random.normal(keys[0], (*lead, rank, rank)))[0]
  half = rank // 2
  a = jnp.matmul(jax.random.normal(keys[1], (*lead, n, half)), q[..., 0::2, :]) / 10
  b = jnp.matmul(jax.random.normal(keys[2], (*lead, m, half)), q[..., 1::2, :]) / 10
  return a.reshape(shapes[0]), jnp.moveaxis(b, -1, -2).reshape(shapes[1])
