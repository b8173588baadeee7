"""The formats, and how each keeps a matrix in eight or four bits, and back.

These functions take one matrix (O, I), outputs first, or its arrays; `jax.vmap` sees to more.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float32, Int, Int32, UInt8

from model.errors import InputError, nearest

NAMES = ("int8", "int4", "nf4", "fp8", "int8_dynamic", "fp8_dynamic")
Arrays = dict[str, Array]

# Inputs that share a scale, unless another number is asked for; of nf4 as in QLoRA.
GROUPS = {"int4": 32, "nf4": 64}
SCALES = 256  # Scales of nf4 that share a scale of their own.
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


@dataclasses.dataclass(frozen=True)
class Format:
  """How a matrix is kept. `group` inputs share a scale; None: all of an output do.

  `dynamic`: activations are rounded to as many bits when they are multiplied.
  """

  kind: str
  group: int | None = None
  dynamic: bool = False

  @classmethod
  def parse(cls, name: str) -> "Format":
    """`int8`, `int4`, `nf4`, `fp8`, `int8_dynamic`, `fp8_dynamic`, `int4:GROUP` or `nf4:GROUP`.

    Raises:
      InputError: for another name, or a group that is no even number from 2.
    """
    kind, colon, group = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind not in NAMES or (colon and kind not in GROUPS):
      known = f"{', '.join(NAMES)}, int4:GROUP or nf4:GROUP"
      raise InputError(f"quantize={name!r} is not known: use one of {known}.{nearest(kind, NAMES)}")
    if colon and not (group.isdecimal() and int(group) > 0 and int(group) % 2 == 0):
      raise InputError(f"quantize={name!r}: a group must be an even number of inputs, from 2.")
    kind, _, dynamic = kind.partition("_")
    return cls(kind, int(group) if colon else GROUPS.get(kind), bool(dynamic))

  @property
  def name(self) -> str:
    """What `parse` takes."""
    own = self.group == GROUPS.get(self.kind)
    return self.kind + ("" if own else f":{self.group}") + ("_dynamic" if self.dynamic else "")


def check_sizes(format: Format, inputs: int, outputs: int, what: str) -> None:
  """Raises an InputError if the format's groups do not divide the inputs, or bytes the outputs."""
  if format.group is not None and inputs % format.group:
    raise InputError(
      f"quantize={format.name!r}: groups of {format.group} do not divide the {inputs} inputs of "
      f"{what}: use a group that does, or int8."
    )
  if format.group is not None and outputs % 2:
    raise InputError(
      f"quantize={format.name!r}: {what} has {outputs} outputs, and two go into a byte: use int8."
    )


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


# int8: a scale for each output, symmetric. Scales have eight bits of fraction, so that the largest
# element still goes to 127, and to 448 of fp8.


def int8(w: Float[Array, "O I"]) -> Arrays:
  scale = _nonzero(jnp.max(jnp.abs(w), axis=1) / 127)
  return {"values": jnp.round(w / _wide(scale)[:, None]).astype(jnp.int8), "scales": scale}


# fp8: four bits of exponent, three of mantissa, and a scale for each output.


def fp8(w: Float[Array, "O I"]) -> Arrays:
  """Of scales within a power of two, those with the least squared error."""
  widest = _wide(_nonzero(jnp.max(jnp.abs(w), axis=1) / _E4M3_MOST))

  def tried(i, best):
    scale = _short(widest * 2.0 ** (i / 16))
    wide = _wide(scale)[:, None]
    kept = (w / wide).astype(jnp.float8_e4m3fn).astype(w.dtype) * wide
    error = jnp.sum(jnp.square(w - kept), axis=1)
    better = error < best[0]
    return jnp.where(better, error, best[0]), jnp.where(better, scale, best[1])

  start = jnp.full(widest.shape, jnp.inf), widest.astype(jnp.bfloat16)
  scale = jax.lax.fori_loop(0, 16, tried, start)[1]
  return {"values": (w / _wide(scale)[:, None]).astype(jnp.float8_e4m3fn), "scales": scale}


# int4: codes from 0 to 15. A group has a scale, in 64 equal parts of what an output's power of two
# stands for, and a zero point, which code stands for 0, finer near the middle; of six bits each.

_PARTS = 64  # Of a scale.
_MIDDLE = 32  # The code of the zero point 8.
# Scales that are tried: shares of one that just reaches all of a group, and parts that are added
# before the rest of a part is cut off.
_TRIED = ((1, 0), (1, 1), *((1 - 0.03 * i, 0.5) for i in range(1, 9)))


def int4(w: Float[Array, "O I"], group: int) -> Arrays:
  """The scales and zero points with the least squared error among some up to the widest scale,
  which counts more for large elements.
  """
  w = grouped(w, group)
  weight = jnp.abs(w) + 2 * jnp.sqrt(jnp.mean(jnp.square(w), axis=-1, keepdims=True))
  total = jnp.maximum(jnp.sum(weight, axis=-1), 1e-30)
  least = jnp.minimum(jnp.min(w, axis=-1), 0)
  reach = (jnp.maximum(jnp.max(w, axis=-1), 0) - least) / 15
  steps = _power_above(jnp.max(reach, axis=1) / _PARTS)
  step = power_of_two(steps)[:, None]

  def tried(i, best):
    share, added = jnp.asarray(_TRIED, jnp.float32)[i // 2]
    scales = jnp.clip(jnp.floor(share * reach / step + added) - 1, 0, _PARTS - 1)
    size = (scales + 1) * step
    near = w / size[..., None]
    # The codes that the zero point in the middle of the group gives, and the zero point that gives
    # them the least error.
    codes = jnp.clip(jnp.round(near + (7.5 - middle / size)[..., None]), 0, 15)
    zero = jnp.sum(weight * (codes - near), axis=-1) / total
    zeros = jnp.clip(_zero_below(zero) + i % 2, 0, 63)
    error = jnp.sum(weight * jnp.square(_int4_values(w, size, zeros)[1] - w), axis=-1)
    better = error < best[0]
    return tuple(
      jnp.where(better, *pair) for pair in zip((error, scales, zeros), best, strict=True)
    )

  middle = least + 7.5 * reach
  start = jnp.full(reach.shape, jnp.inf), jnp.zeros_like(reach), jnp.zeros_like(reach)
  _, scales, zeros = jax.lax.fori_loop(0, 2 * len(_TRIED), tried, start)
  codes = _int4_values(w, (scales + 1) * step, zeros)[0]
  scales, zeros = scales.astype(jnp.uint8), zeros.astype(jnp.uint8)
  return {
    "values": pack(codes.reshape(len(w), -1)),
    "scales": scales | (zeros >> 4 << 6),
    "steps": steps,
    "offset": pack(zeros & 15),
  }


def int4_moved(arrays: Arrays, scales: Array, starts: Array) -> tuple[Array, Array]:
  """code * scale + start, parted as `unpack` does: `int4_scales` and `int4_starts` make it what the
  codes stand for, in the fewest operations.
  """
  each = functools.partial(_each, inputs=arrays["values"].shape[1])
  parts = zip(unpack(arrays["values"]), each(scales), each(starts), strict=True)
  even, odd = (code.astype(jnp.float32) * scale + start for code, scale, start in parts)
  return even, odd


def int4_starts(arrays: Arrays) -> Float32[Array, "O groups"]:
  """What code 0 of each group stands for."""
  return int4_shifts(arrays) - 8 * int4_scales(arrays)


def int4_parts(arrays: Arrays) -> tuple[Array, Array]:
  """What the codes stand for, parted as `unpack` does."""
  inputs = arrays["values"].shape[1]
  shifts = _each(int4_shifts(arrays), inputs)
  return tuple(a + b for a, b in zip(int4_centred(arrays), shifts, strict=True))  # pyright: ignore


def int4_centred(arrays: Arrays) -> tuple[Array, Array]:
  """(code - 8) * scale, parted as `unpack` does: what codes stand for, less `int4_shifts`."""
  low, high = _each(int4_scales(arrays), arrays["values"].shape[1])
  even, odd = unpack(arrays["values"])
  return (even.astype(jnp.float32) - 8) * low, (odd.astype(jnp.float32) - 8) * high


def int4_scales(arrays: Arrays) -> Float32[Array, "O groups"]:
  return int4_sizes(arrays["scales"]) * power_of_two(arrays["steps"])[:, None]


def int4_shifts(arrays: Arrays) -> Float32[Array, "O groups"]:
  """What is added to (code - 8) * scale in each group."""
  low = interleaved(unpack(arrays["offset"]), 0)
  return int4_shift(arrays["scales"], low) * int4_scales(arrays)


def int4_sizes(scales: Int[Array, "..."]) -> Float32[Array, "..."]:
  """Scales of groups in parts of their output's."""
  return ((scales.astype(jnp.int32) & 63) + 1).astype(jnp.float32)


def int4_shift(scales: Int[Array, "..."], low: Int32[Array, "..."]) -> Float32[Array, "..."]:
  """8 less the zero point, whose upper bits lie in `scales`; `low` are its other four."""
  return 8 - zero_point((low | (scales.astype(jnp.int32) >> 6 << 4)).astype(jnp.float32))


def _int4_values(w: Array, scales: Array, zeros: Array) -> tuple[Array, Array]:
  """(the nearest codes, what they stand for)."""
  zero, scale = zero_point(zeros)[..., None], scales[..., None]
  codes = jnp.clip(jnp.round(w / scale + zero), 0, 15)
  return codes.astype(jnp.uint8), (codes - zero) * scale


def zero_point(zeros: Float32[Array, "..."]) -> Float32[Array, "..."]:
  """From 0 to almost 16: its codes lie a ninth apart in the middle, half at the ends."""
  u = (zeros - _MIDDLE) / _MIDDLE
  return 8 + u * (3.5 + 4.5 * u * u)


def _zero_below(zero: Float32[Array, "..."]) -> Float32[Array, "..."]:
  """The code of the last `zero_point` that is not above."""
  points = zero_point(jnp.arange(64, dtype=jnp.float32))
  return jnp.searchsorted(points, zero, side="right").astype(jnp.float32) - 1


def power_of_two(codes: UInt8[Array, "..."]) -> Float32[Array, "..."]:
  """2 ** (code - 127), of codes from 1 to 254."""
  return jax.lax.bitcast_convert_type(codes.astype(jnp.int32) << 23, jnp.float32)


def _power_above(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
  """The least `power_of_two` that is not below."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  return jnp.clip((bits + 0x7FFFFF) >> 23, 1, 254).astype(jnp.uint8)


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
  parts = jnp.pad(flat, (0, -len(flat) % SCALES)).reshape(-1, SCALES)
  steps = jnp.max(jnp.abs(parts), axis=1)
  kept = _nearest(_relative(parts, steps[:, None]), dynamic_values())
  kept = kept.reshape(-1)[: len(flat)].reshape(scales.shape)
  values = pack(codes.reshape(w.shape))
  return {"values": values, "scales": kept, "steps": steps, "offset": offset}


def nf4_scales(arrays: Arrays) -> Float32[Array, "O blocks"]:
  """The largest elements of blocks, as they are kept."""
  kept = jnp.asarray(dynamic_values())[arrays["scales"]]
  steps = jnp.repeat(arrays["steps"], SCALES)[: kept.size].reshape(kept.shape)
  return kept * steps + arrays["offset"]


def nf4_parts(
  arrays: Arrays, scales: Float32[Array, "O blocks"] | None = None
) -> tuple[Array, Array]:  # fmt: skip
  """What the codes stand for, parted as `unpack` does; `scales` are `nf4_scales`, if at hand."""
  scales = nf4_scales(arrays) if scales is None else scales
  low, high = _each(scales, arrays["values"].shape[1])
  even, odd = unpack(arrays["values"])
  return quantile(even) * low, quantile(odd) * high


def quantile(codes: Array) -> Float32[Array, "..."]:
  """NF4[codes] by their bits, which is faster than a look-up.

  Of the lowest bit without a choice between constants: JAX takes constants spread to arrays out of
  a loop over layers, and holds sixteen of the matrix's size.
  """
  bits = NF4.view(np.int32)
  low = -(codes.astype(jnp.int32) & 1)
  pairs = zip(bits[::2].tolist(), bits[1::2].tolist(), strict=True)
  left = [jax.lax.bitcast_convert_type(even ^ (low & (even ^ odd)), jnp.float32)
          for even, odd in pairs]  # fmt: skip
  for bit in range(1, 4):
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


def _nonzero(scale: Float[Array, "..."]) -> BFloat16[Array, "..."]:
  return _short(jnp.where(scale == 0, 1, scale))


def _short(scale: Float[Array, "..."]) -> BFloat16[Array, "..."]:
  # XLA may leave out a cast that is undone at once, but never this.
  return jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)


def _wide(scale: BFloat16[Array, "..."]) -> Float32[Array, "..."]:
  return scale.astype(jnp.float32)
