"""How numbers are kept in eight or four bits: each format's arrays from a matrix, and back.

All functions take one matrix (O, I), outputs first, or its arrays; `jax.vmap` sees to more.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

Arrays = dict[str, Array]

INT4_GROUP = 32  # Inputs that share a scale, unless another number is asked for.
NF4_BLOCK = 64  # Inputs that share a scale, as in QLoRA.
_SCALES = 256  # Scales of nf4 that share a scale of their own.
_E4M3_MOST = 448.0

# The quantiles of a normal distribution that QLoRA keeps (Dettmers et al., arXiv:2305.14314,
# appendix E), as bitsandbytes has them.
NF4 = np.array(
  [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
  ],
  np.float32,
)  # fmt: skip


def pack(codes: UInt8[Array, "O I"]) -> UInt8[Array, "O/2 I"]:
  """Two codes of four bits to a byte: those of every second output lie in the high bits."""
  return codes[::2] | (codes[1::2] << 4)


def unpack(packed: UInt8[Array, "O/2 I"]) -> tuple[Array, Array]:
  """The codes of outputs 0, 2, 4, … and of 1, 3, 5, …, int32 (O/2, I).

  A CPU widens and multiplies them in one loop, as it would not if they were put together first.
  """
  wide = packed.astype(jnp.int32)
  return wide & 15, wide >> 4


def interleaved(parts: tuple[Array, ...], axis: int) -> Array:
  """Outputs in order from those that `unpack` parts."""
  if len(parts) == 1:
    return parts[0]
  joined = jnp.stack(parts, axis=axis + 1)
  return joined.reshape(*joined.shape[:axis], -1, *joined.shape[axis + 2 :])


def _each(scales: Float[Array, "O groups"], inputs: int) -> tuple[Array, Array]:
  """Scales of the groups of outputs 0, 2, 4, … and of 1, 3, 5, …, one for each input."""
  pairs = scales.reshape(-1, 2, scales.shape[1])
  size = inputs // scales.shape[1]
  return jnp.repeat(pairs[:, 0], size, axis=1), jnp.repeat(pairs[:, 1], size, axis=1)


def grouped(w: Array, group: int) -> Array:
  """(O, I) -> (O, groups, group)."""
  return w.reshape(len(w), -1, group)


# int8: a scale for each output, symmetric.


def int8(w: Float[Array, "O I"]) -> Arrays:
  scale = _nonzero(jnp.max(jnp.abs(w), axis=1) / 127)
  return {"values": jnp.round(w / scale[:, None]).astype(jnp.int8), "scales": scale}


# fp8: four bits of exponent, three of mantissa, and a scale for each output.


def fp8(w: Float[Array, "O I"]) -> Arrays:
  scale = _nonzero(jnp.max(jnp.abs(w), axis=1) / _E4M3_MOST)
  return {"values": (w / scale[:, None]).astype(jnp.float8_e4m3fn), "scales": scale}


# int4: codes from -8 to 7, and a signed scale for each group, itself kept in eight bits beside a
# scale for each output.


def int4(w: Float[Array, "O I"], group: int) -> Arrays:
  return int4_with_scales(w, _best_scales(grouped(w, group)))


def int4_with_scales(w: Float[Array, "O I"], scales: Float32[Array, "O groups"]) -> Arrays:
  """The nearest codes for given scales, after these have been rounded to eight bits."""
  step = _nonzero(jnp.max(jnp.abs(scales), axis=1) / 127)
  kept = jnp.round(scales / step[:, None])
  kept = jnp.where(kept == 0, jnp.where(scales < 0, -1, 1), kept)
  group = w.shape[1] // scales.shape[1]
  codes = jnp.round(grouped(w, group) / (kept * step[:, None])[..., None])
  codes = (jnp.clip(codes, -8, 7) + 8).astype(jnp.uint8).reshape(w.shape)
  return {"values": pack(codes), "scales": kept.astype(jnp.int8), "steps": step}


def int4_parts(arrays: Arrays) -> tuple[Array, Array]:
  """What the codes stand for, parted as `unpack` does."""
  scales = arrays["scales"].astype(jnp.float32) * arrays["steps"][:, None]
  low, high = _each(scales, arrays["values"].shape[1])
  even, odd = unpack(arrays["values"])
  return (even.astype(jnp.float32) - 8) * low, (odd.astype(jnp.float32) - 8) * high


def _best_scales(w: Float[Array, "O groups group"]) -> Float32[Array, "O groups"]:
  """Of some scales around the largest element's, the one with the least squared error."""
  largest = jnp.take_along_axis(w, jnp.argmax(jnp.abs(w), axis=-1)[..., None], axis=-1)[..., 0]
  largest = jnp.where(largest == 0, 1e-12, largest)

  def tried(i, best):
    # The largest element becomes -8 … -5.5 of one sign, or as much of the other.
    reach = 5.5 + 0.25 * (i % 11)
    scale = largest / jnp.where(i < 11, -reach, reach)
    kept = jnp.clip(jnp.round(w / scale[..., None]), -8, 7) * scale[..., None]
    error = jnp.sum(jnp.square(w - kept), axis=-1)
    better = error < best[0]
    return jnp.where(better, error, best[0]), jnp.where(better, scale, best[1])

  start = jnp.full(largest.shape, jnp.inf), largest / -8
  return jax.lax.fori_loop(0, 22, tried, start)[1]


# nf4 with double quantization: the nearest quantile, times the largest element of a block; of these
# scales less their mean the nearest value of a dynamic exponent, times the largest of 256.


def nf4(w: Float[Array, "O I"], block: int) -> Arrays:
  scales = jnp.max(jnp.abs(grouped(w, block)), axis=-1)
  return nf4_with_scales(w, scales)


def nf4_with_scales(w: Float[Array, "O I"], scales: Float32[Array, "O blocks"]) -> Arrays:
  """The nearest quantiles for given scales, which are then quantized themselves."""
  block = w.shape[1] // scales.shape[1]
  codes = _nearest(_relative(grouped(w, block), scales[..., None]), NF4)
  offset = jnp.mean(scales)
  flat = (scales - offset).reshape(-1)
  parts = jnp.pad(flat, (0, -len(flat) % _SCALES)).reshape(-1, _SCALES)
  steps = jnp.max(jnp.abs(parts), axis=1)
  kept = _nearest(_relative(parts, steps[:, None]), dynamic_values())
  kept = kept.reshape(-1)[: len(flat)].reshape(scales.shape)
  values = pack(codes.reshape(w.shape))
  return {"values": values, "scales": kept, "steps": steps, "offset": offset}


def nf4_scales(arrays: Arrays) -> Float32[Array, "O blocks"]:
  """The largest elements of blocks, as they are kept."""
  kept = jnp.asarray(dynamic_values())[arrays["scales"]]
  steps = jnp.repeat(arrays["steps"], _SCALES)[: kept.size].reshape(kept.shape)
  return kept * steps + arrays["offset"]


def nf4_parts(arrays: Arrays) -> tuple[Array, Array]:
  """What the codes stand for, parted as `unpack` does."""
  low, high = _each(nf4_scales(arrays), arrays["values"].shape[1])
  even, odd = unpack(arrays["values"])
  return _quantile(even) * low, _quantile(odd) * high


def _quantile(codes: Array) -> Float32[Array, "..."]:
  """NF4[codes] by their bits, which is faster than a look-up."""
  left: list[Any] = [jnp.float32(value) for value in NF4]
  for bit in range(4):
    high = (codes >> bit) & 1 == 1
    left = [jnp.where(high, odd, even) for even, odd in zip(left[::2], left[1::2], strict=True)]
  return left[0]


@functools.cache
def dynamic_values() -> Float32[np.ndarray, "256"]:
  """Signed numbers up to 1 with an exponent of 0 to 6 (powers of ten) whose length is dynamic, so
  that the rest of eight bits is fraction (Dettmers, arXiv:1511.04561, section 2.1).
  """
  values = [0.0, 1.0]
  for exponent in range(7):
    edges = np.linspace(0.1, 1, 2**exponent + 1, dtype=np.float32)
    means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
    values += [*means, *-means]
  return np.sort(np.array(values, np.float32))


def _nearest(x: Float[Array, "..."], values: Float32[np.ndarray, "n"]) -> UInt8[Array, "..."]:
  """Index of the nearest of rising `values`, the lower of two."""
  bounds = jnp.asarray((values[:-1] + values[1:]) / 2)
  return jnp.searchsorted(bounds, x, side="left").astype(jnp.uint8)


def _relative(x: Float[Array, "..."], most: Float[Array, "..."]) -> Float[Array, "..."]:
  return jnp.clip(x * (1 / jnp.maximum(most, 1e-38)), -1, 1)


def _nonzero(scale: Float[Array, "..."]) -> Float32[Array, "..."]:
  return jnp.where(scale == 0, 1, scale).astype(jnp.float32)
