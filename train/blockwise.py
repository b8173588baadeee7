"""Optimizer states of 8 bits: moments as codes of a dynamic data type, scaled block by block.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861, as
bitsandbytes has it: 7 decades below the largest magnitude of a block, the one at 10^(i-6) cut into
2^i equal parts (2^(i+1) without a sign), besides 0 and 1.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from model.layers import ParamInfo
from model.sharding import RULES

BLOCK = 256  # Elements that share a scale.
LEAST_SIZE = 4096  # A layer's smaller arrays keep float moments, and so do all vectors.
SIGNED = {"mu": True, "nu": False}  # Moments in optax's states.
_DECADES = 7
_LEAST_AXIS = 32  # Of an axis that no mesh splits, for blocks to lie along it.


class Blocks(NamedTuple):
  """An array in 8 bits: value = code's value · scale of its block."""

  codes: UInt8[Array, "..."]  # The shape of the array.
  scale: Float[Array, "..."]  # That shape, but along one axis a number for each block.


def in_8_bits(tx: optax.GradientTransformation, info: dict) -> optax.GradientTransformation:
  """`tx` with its moments (`mu`, `nu`) in 8 bits between updates.

  Each update widens them, is that of `tx`, and moves by the new moments before they are narrowed.
  """

  def pack(state: Any) -> Any:
    return _each_moment(lambda i, x, signed: narrowed(x, i, signed=signed), state, info)

  def unpack(state: Any) -> Any:
    return _each_moment(lambda i, x, signed: widened(x, i, signed=signed), state, info)

  def update(updates, state, params=None):
    moves, new = tx.update(updates, unpack(state), params)
    return moves, pack(new)

  return optax.GradientTransformation(lambda params: pack(tx.init(params)), update)


def _each_moment(change: Any, state: Any, info: dict) -> Any:
  is_info = lambda leaf: isinstance(leaf, ParamInfo)
  new = {}
  for name in set(state._fields) & set(SIGNED):
    leaf = lambda i, x, signed=SIGNED[name]: change(i, x, signed)
    new[name] = jax.tree.map(leaf, info, getattr(state, name), is_leaf=is_info)
  return state._replace(**new)


def narrowed(x: Float[Array, "..."], info: ParamInfo, *, signed: bool) -> Blocks | Array:
  """An array in 8 bits, if `info` says that it is worth it.

  Args:
    signed: whether x may be negative.
  """
  axis = block_axis(info, x.shape)
  if axis is None:
    return x
  size = x.shape[axis]
  blocks = _in_blocks(x, axis)
  scale = jnp.max(jnp.abs(blocks), axis=axis + 1)
  share = blocks / jnp.expand_dims(jnp.where(scale > 0, scale, 1), axis + 1)
  codes = _encode(share, signed).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
  return Blocks(jax.lax.slice_in_dim(codes, 0, size, axis=axis), scale)


def widened(x: Blocks | Array, info: ParamInfo, *, signed: bool) -> Float[Array, "..."]:
  """What `narrowed` was given, as near as 8 bits come to it."""
  if not isinstance(x, Blocks):
    return x
  shape = x.codes.shape
  axis = block_axis(info, shape)
  if axis is None:
    return x.codes
  values = _decode(_in_blocks(x.codes, axis), signed, x.scale.dtype)
  values = (values * jnp.expand_dims(x.scale, axis + 1)).reshape(
    *shape[:axis], -1, *shape[axis + 1 :]
  )
  return jax.lax.slice_in_dim(values, 0, shape[axis], axis=axis)


def block_axis(info: ParamInfo, shape: tuple[int, ...]) -> int | None:
  """Along which axis blocks lie; None: the array keeps its floats.

  One that no mesh splits, such as the width of heads, else the longest but for `embed`, which fsdp
  splits into the most parts: each device then has whole blocks in all but small cases.
  """
  stacked = sum(axis in ("layers", "expert") for axis in info.axes)
  if info.role == "vector" or math.prod(shape[stacked:]) < LEAST_SIZE:
    return None
  places = [i for i, axis in enumerate(info.axes) if axis not in ("layers", "expert")]
  whole = [i for i in places if RULES.get(info.axes[i] or "") is None and shape[i] >= _LEAST_AXIS]
  others = [i for i in places if info.axes[i] != "embed"]
  return max(whole or others or places, key=lambda i: (shape[i], i))


def scale_axes(info: ParamInfo, shape: tuple[int, ...]) -> tuple[str | None, ...]:
  """Logical axes of the scales of an array of `shape`: no mesh divides the number of blocks."""
  axis = block_axis(info, shape)
  return tuple(None if i == axis else name for i, name in enumerate(info.axes))


def _in_blocks(x: Array, axis: int) -> Array:
  """The axis as two, blocks and what is in one; behind its end there are zeros."""
  size = x.shape[axis]
  width = min(size, BLOCK)
  rest = -size % width
  if rest:
    x = jnp.pad(x, [(0, rest if i == axis else 0) for i in range(x.ndim)])
  return x.reshape(*x.shape[:axis], -1, width, *x.shape[axis + 1 :])


def _parts(decade: Any, signed: bool) -> Any:
  """Into how many parts a decade is cut."""
  return 2 ** (decade if signed else decade + 1)


def _edges(signed: bool) -> list[float]:
  """Where the decades begin for magnitudes: half-way between their nearest values; the last edge is
  that of 1."""
  middle = lambda i, j: 10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / _parts(i, signed))
  first = [0.0] + [middle(i, 0) for i in range(_DECADES)] + [1.0]
  last = [0.0] + [middle(i, _parts(i, signed) - 1) for i in range(_DECADES)]
  return [(a + b) / 2 for a, b in zip(last, first[1:], strict=True)]


def _encode(share: Float[Array, "..."], signed: bool) -> UInt8[Array, "..."]:
  """The nearest code of numbers between -1 and 1; there are no tables, which accelerators are slow
  to look up."""
  size = jnp.abs(share)
  edges = _edges(signed)
  code = jnp.zeros(share.shape, jnp.int32)
  for i in range(_DECADES):
    parts = _parts(i, signed)
    part = jnp.floor((size * 10.0 ** (6 - i) - 0.1) * (parts / 0.9)).astype(jnp.int32)
    first = parts if signed else parts - 1
    code = jnp.where(size >= edges[i], first + jnp.clip(part, 0, parts - 1), code)
  if not signed:
    return jnp.where(size >= edges[-1], 255, code).astype(jnp.uint8)
  code = jnp.where(share >= edges[-1], 128, code)  # -1 has no code of its own.
  return (127 + jnp.where(share < 0, -code, code)).astype(jnp.uint8)


def _decode(codes: UInt8[Array, "..."], signed: bool, dtype: Any) -> Float[Array, "..."]:
  number = codes.astype(jnp.int32)
  place = jnp.abs(number - 127) if signed else number + 1
  value = jnp.zeros(codes.shape, dtype)
  for i in range(_DECADES):
    parts = _parts(i, signed)
    inside = (0.1 + 0.9 * (place - parts + 0.5) / parts).astype(dtype)
    value = jnp.where(place >= parts, inside * 10.0 ** (i - 6), value)
  value = jnp.where(place >= _parts(_DECADES, signed), 1.0, value)
  return jnp.where(number < 127, -value, value) if signed else value


def code_values(signed: bool) -> np.ndarray:
  """The 256 values of the data type, in the order of their codes."""
  return np.asarray(_decode(jnp.arange(256, dtype=jnp.uint8), signed, jnp.float32))
