"""The values that a quantized matrix can hold with the scales that it has."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from model import quant_formats as formats
from model.quant import Quantized

_MOST = {"int8": 127.0, "fp8": 448.0}

# (scales, shifts) of groups of inputs (groups, O): values are codes times scales, and shifts.
Grid = tuple[Float[Array, "groups O"], Float[Array, "groups O"]]


def grid_of(q: Quantized) -> Grid:
  """What a matrix has beside its codes, as its own format reads them."""

  def constant(code: int) -> Float[Array, "groups O"]:
    same = dataclasses.replace(q, values=jnp.full_like(q.values, code))
    flat = same.dequantize().reshape(math.prod(q.inputs), -1)
    return flat[:: q.format.group or len(flat)]

  if q.format.kind in _MOST:
    scales = constant(1)
    return scales, jnp.zeros_like(scales)
  low, high = constant(0), constant(255)  # All codes are 0, or 15: two lie in a byte.
  if q.format.kind == "int4":
    return (high - low) / 15, low
  return (high - low) / 2, (high + low) / 2


def nearest(
  kind: str, w: Float[Array, "..."], scales: Float[Array, "..."], shifts: Float[Array, "..."]
) -> Float[Array, "..."]:
  """The values of a format nearest to `w`."""
  x = _relative(w, scales, shifts)
  if kind == "nf4":
    return jnp.asarray(formats.NF4, w.dtype)[_quantile(x)] * scales + shifts
  return _rounded(kind, x).astype(w.dtype) * scales + shifts


def recoded(q: Quantized, w: Float[Array, "I O"]) -> Quantized:
  """The same matrix with the values nearest to `w` in the place of its own; its scales stay."""
  scales, shifts = (jnp.repeat(a, q.format.group or len(w), axis=0) for a in grid_of(q))
  x = _relative(w, scales, shifts).T
  if q.format.kind in _MOST:
    return dataclasses.replace(q, values=_rounded(q.format.kind, x).astype(q.values.dtype))
  codes = _quantile(x) if q.format.kind == "nf4" else _rounded("int4", x).astype(jnp.uint8)
  return dataclasses.replace(q, values=formats.pack(codes))


def _relative(w: Array, scales: Array, shifts: Array) -> Array:
  return (w - shifts) / jnp.where(scales == 0, 1, scales)


def _rounded(kind: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
  """The nearest codes of formats whose values are evenly spaced, or floats."""
  if kind == "int4":
    return jnp.clip(jnp.round(x), 0, 15)
  x = jnp.clip(x, -_MOST[kind], _MOST[kind])
  return jnp.round(x) if kind == "int8" else x.astype(jnp.float8_e4m3fn)


def _quantile(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
  """Index of the nearest quantile of nf4."""
  bounds = jnp.asarray((formats.NF4[:-1] + formats.NF4[1:]) / 2, x.dtype)
  return jnp.searchsorted(bounds, x).astype(jnp.uint8)
