"""How XLA multiplies few rows by a quantized matrix fastest on a CPU (docs/log.md has the figures).

XLA reads small numbers and widens them in one loop if a single row is multiplied, and writes the
widened matrix to memory if there are more. So rows are multiplied one after the other, as long as
there are few.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, Int32

from model import quant_formats as formats
from model.sharding import platform

FEW_ROWS = 32  # Up to so many rows, a product costs the reading of its matrix.
# More rows than these are cheaper by a dequantized matrix.
_SINGLE_ROWS = {"int8": 16, "fp8": 8, "int4": 8, "nf4": 4}


def few(x: Float[Array, "... I"], kind: str) -> bool:
  """Whether rows of x are multiplied one by one as a CPU reads the matrix."""
  number = math.prod(x.shape[:-1])
  return number <= _SINGLE_ROWS[kind] and on_one_cpu() and x.dtype == jnp.float32


def row_by_row(
  x: Float32[Array, "... I"], arrays: formats.Arrays, kind: str
) -> Float32[Array, "... O"]:
  """Few rows on a CPU, each with a loop of its own over the matrix as it is kept.

  What belongs to groups is computed beside the matrix: once, before a loop of steps.
  """
  starts = formats.int4_starts(arrays) if kind == "int4" else None
  scales = {"int4": formats.int4_scales, "nf4": formats.nf4_scales}.get(kind, _own_scales)(arrays)

  def one(row):
    row, own = jax.lax.optimization_barrier((row, arrays))
    if starts is not None:
      parts = formats.int4_moved(own, scales, starts)
    elif kind == "nf4":
      parts = formats.nf4_parts(own, scales)
    else:
      return jnp.matmul(row, widened(own["values"], row.dtype).T) * scales
    return in_order(tuple(jnp.matmul(row, part.T) for part in parts))

  return _each_row(one, _settled(x))


def whole_times(x: Int8[Array, "... I"], w: Int8[Array, "O I"]) -> Int32[Array, "... O"]:
  """x · wᵀ, exactly, row by row: XLA widens both in one loop of a CPU's own sums of products."""

  def one(row):
    row, own = jax.lax.optimization_barrier((row, w))  # As `quant.beside`.
    return jnp.matmul(row.astype(jnp.int32), own.astype(jnp.int32).T)

  # As `_settled`, of whole numbers.
  return _each_row(one, jax.lax.div(x, jnp.where(x == -128, x, jnp.int8(1))))


def in_order(parts: tuple[Array, ...]) -> Float[Array, "... O"]:
  """Outputs in order from those that `unpack` parts.

  A CPU multiplies them in one loop with what puts them together, element by element, unless that is
  a gather.
  """
  if not on_one_cpu():
    return formats.interleaved(parts, parts[0].ndim - 1)
  half = parts[0].shape[-1]
  order = np.arange(2 * half).reshape(2, half).T.reshape(-1)
  return jnp.concatenate(parts, axis=-1)[..., order]


def times(x: Float[Array, "... I"], w: Float[Array, "O I"], wide: Any) -> Float[Array, "... O"]:
  """x · wᵀ, whichever way is faster."""
  if 1 < math.prod(x.shape[:-1]) <= FEW_ROWS and on_one_cpu():
    return matrix_first(w, x, wide)
  return jnp.matmul(x, w.T, preferred_element_type=wide)


def matrix_first(
  w: Float[Array, "O I"], x: Float[Array, "... I"], dtype: Any
) -> Float[Array, "... O"]:
  """x · wᵀ as w · xᵀ, accumulated in `dtype` (None: as they are).

  On a CPU, XLA packs the second matrix of a product before it multiplies. That is cheap where it is
  many rows' x, but for few rows the matrix has to come first. XLA would turn the product around if
  it saw that its result is turned.
  """
  y = jnp.matmul(w, x.reshape(-1, x.shape[-1]).T, preferred_element_type=dtype)
  return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)


def on_one_cpu() -> bool:
  """Whether what is traced runs on a CPU that nothing is shared with."""
  mesh = jax.sharding.get_abstract_mesh()
  return platform() == "cpu" and (mesh.empty or mesh.size == 1)


def widened(values: Array, dtype: Any) -> Float[Array, "O I"]:
  """Small numbers in a wider type; of float8 by its bits, which a CPU does faster than a cast."""
  if values.dtype != jnp.float8_e4m3fn or platform() != "cpu" or dtype != jnp.float32:
    return values.astype(dtype)
  bits = jax.lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.uint32)
  moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
  return jax.lax.bitcast_convert_type(moved, jnp.float32) * jnp.float32(2.0**120)


def _own_scales(arrays: formats.Arrays) -> Float32[Array, "O"]:
  return arrays["scales"].astype(jnp.float32)


def _each_row(one: Callable[[Array], Array], x: Float[Array, "... I"]) -> Float[Array, "... O"]:
  """`one` of each row of x, in a program that is as small for many rows as for one."""
  rows = x.reshape(-1, x.shape[-1])
  y = one(rows[0])[None] if len(rows) == 1 else jax.lax.map(one, rows)
  return y.reshape(*x.shape[:-1], -1)


def _settled(x: Float[Array, "... I"]) -> Float[Array, "... I"]:
  """x, exactly, by a division that XLA cannot see through.

  On a CPU, XLA puts what computes x, the norm before it and all, into the loop over the matrix and
  repeats it for every output, unless its last operation is as dear as a division.
  """
  return x / jnp.where(jnp.isnan(x), x, 1.0)
