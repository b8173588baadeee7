"""The values that a quantized matrix can hold with the scales that it has."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from model import quant_formats as formats
from model.quant import Quantized

_MOST = {"int8": 127.0, "fp8": 448.0}


def scales_of(q: Quantized) -> Float[Array, "groups O"]:
  """What the values of each group of inputs are multiplied by; of one matrix."""
  if q.format.kind == "int4":
    kept = q.scales.astype(jnp.float32) * q.steps[:, None]  # pyright: ignore
  elif q.format.kind == "nf4":
    kept = formats.nf4_scales(q.arrays())
  else:
    kept = q.scales[:, None]
  return kept.T


def nearest(kind: str, w: Float[Array, "..."], scales: Float[Array, "..."]) -> Array:
  """The values of a format nearest to `w`, which its scales multiply."""
  x = w / scales
  if kind == "int4":
    return jnp.clip(jnp.round(x), -8, 7) * scales
  if kind == "nf4":
    table = jnp.asarray(formats.NF4, w.dtype)
    return table[_quantile(x)] * scales
  most = _MOST[kind]
  x = jnp.clip(x, -most, most)
  x = jnp.round(x) if kind == "int8" else x.astype(jnp.float8_e4m3fn).astype(w.dtype)
  return x * scales


def recoded(q: Quantized, w: Float[Array, "I O"]) -> Quantized:
  """The same matrix with the values nearest to `w` in the place of its own; its scales stay."""
  group = q.format.group or len(w)
  scales = jnp.repeat(scales_of(q), group, axis=0)
  x = (w / scales).T
  if q.format.kind == "int4":
    codes = (jnp.clip(jnp.round(x), -8, 7) + 8).astype(jnp.uint8)
    return dataclasses.replace(q, values=formats.pack(codes, group))
  if q.format.kind == "nf4":
    return dataclasses.replace(q, values=formats.pack(_quantile(x), group))
  most = _MOST[q.format.kind]
  x = jnp.clip(x, -most, most)
  x = jnp.round(x) if q.format.kind == "int8" else x
  return dataclasses.replace(q, values=x.astype(q.values.dtype))


def _quantile(x: Float[Array, "..."]) -> Array:
  """Index of the nearest quantile of nf4."""
  bounds = jnp.asarray((formats.NF4[:-1] + formats.NF4[1:]) / 2, x.dtype)
  return jnp.searchsorted(bounds, x).astype(jnp.uint8)
