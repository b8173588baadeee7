"""A TPU kernel for few rows times a matrix in four bits, which reads the packed bytes only.

XLA multiplies int8 and fp8 where it reads them, but of groups that share a scale it first writes
the dequantized matrix to memory: eight times the bytes. This kernel (Pallas, Mosaic) unpacks a part
of the matrix in fast memory and never writes it. It never meets a mesh of several devices: there,
and for shapes that it does not tile, XLA's form is used.

Codes are small numbers that bfloat16 holds exactly (nf4's are rounded to it), and scales and zero
points meet sums of products in place of the matrix: a row of x becomes one row for each group of a
chunk, with zeros elsewhere, so that one product gives the sums of all its groups apart.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8

from model.quant_formats import SCALES, Arrays, int4_shift, int4_sizes, power_of_two, quantile
from model.sharding import platform

_MOST_ROWS = 32  # Beyond them a product costs more than the reading of its matrix.
_GROUPS = 8  # Of a chunk: as many as a register of a TPU has sublanes of float32.
_LANES = 128  # What a TPU reads is whole rows of so many elements.
_PAIRS = (256, 128)  # Of outputs, in a block; the first that divides.
_KINDS = ("int4", "nf4")
_ARRAYS = {"values", "scales", "steps", "offset"}
_BLOCK_BYTES = 4 * 2**20  # Of codes at most: two blocks are in fast memory at a time.


def fits(x: Float[Array, "... I"], arrays: Arrays, kind: str, group: int | None) -> bool:
  """Whether `product` takes these arrays of a format, and should on the devices in use."""
  if platform() != "tpu" or group is None or kind not in _KINDS or arrays.keys() != _ARRAYS:
    return False
  pairs, inputs = arrays["values"].shape
  return (
    _alone(arrays["values"])
    and x.dtype in (jnp.bfloat16, jnp.float32)
    and math.prod(x.shape[:-1]) <= _MOST_ROWS
    and tiles(pairs, inputs, group)
  )


def tiles(pairs: int, inputs: int, group: int) -> bool:
  """Whether codes of so many pairs of outputs and inputs can be cut into the kernel's blocks."""
  chunk = _GROUPS * group
  return chunk % _LANES == 0 and inputs % chunk == 0 and _block(pairs, inputs) is not None


def product(
  x: Float[Array, "... I"], arrays: Arrays, kind: str, group: int, *, interpret: bool = False
) -> Float32[Array, "... O"]:
  """x · wᵀ of a matrix in int4 or nf4 (`quant_formats`), accumulated in float32.

  Args:
    x: bfloat16 or float32; its rows and the matrix are such that `fits`.
    arrays: of one matrix, int4 or nf4 (`kind`).
    interpret: run the kernel's program step by step on any device, for tests.
  """
  flat, codes = x.reshape(-1, x.shape[-1]), arrays["values"]
  if kind == "nf4":
    y = _kernel(flat, codes, nf4_scales(arrays), None, group, interpret)
  else:
    y = _kernel(flat, codes, arrays["scales"], arrays["offset"], group, interpret)
    y = y * power_of_two(arrays["steps"])
  return y.reshape(*x.shape[:-1], -1)


def _alone(codes: Array) -> bool:
  """Whether a matrix lies on one device, as far as can be known while it is traced."""
  meshes = (jax.sharding.get_abstract_mesh(), jax.typeof(codes).sharding.mesh)
  return all(mesh.empty or mesh.size == 1 for mesh in meshes)


def _block(pairs: int, inputs: int) -> int | None:
  sizes = (size for size in _PAIRS if pairs % size == 0 and size * inputs <= _BLOCK_BYTES)
  return next(sizes, None)


def _kernel(
  x: Float[Array, "R I"], codes: UInt8[Array, "O/2 I"],
  scales: UInt8[Array, "O groups"] | Float32[Array, "O groups"],
  zeros: UInt8[Array, "O/2 groups"] | None, group: int, interpret: bool,
) -> Float32[Array, "R O"]:  # fmt: skip
  """With zero points the codes are int4's, without them nf4's."""
  # Pallas is large to import and not needed elsewhere.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  R, (pairs, inputs), groups = len(x), codes.shape, scales.shape[1]
  block = _block(pairs, inputs) or pairs
  rows = lambda number, width: pl.BlockSpec((number, width), lambda o: (o, 0))
  arrays = [x, codes, scales] + ([] if zeros is None else [zeros])
  specs = [
    pl.BlockSpec((R, inputs), lambda o: (0, 0)),
    rows(block, inputs),
    rows(2 * block, groups),
  ]
  return pl.pallas_call(
    functools.partial(_body, group=group),
    grid=(pairs // block,),
    in_specs=specs + ([] if zeros is None else [rows(block, groups)]),
    out_specs=pl.BlockSpec((R, 2 * block), lambda o: (0, o)),
    out_shape=jax.ShapeDtypeStruct((R, 2 * pairs), jnp.float32),
    cost_estimate=pl.CostEstimate(
      flops=4 * R * pairs * inputs, transcendentals=0,
      bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays) + 8 * R * pairs,
    ),
    scratch_shapes=[pltpu.VMEM((2 * block, groups), jnp.float32),
                    pltpu.VMEM((4, groups, block), jnp.float32),
                    pltpu.VMEM((2 * block, R), jnp.float32)],
    interpret=interpret,
  )(*arrays)  # fmt: skip


def _body(x, codes, scales, *refs, group: int):
  """One block of pairs of outputs; even ones lie in the low bits of bytes, odd ones in the high."""
  from jax.experimental import pallas as pl

  *zeros, y, wide, turned, columns = refs
  lanes, R, pairs = _GROUPS * group, x.shape[0], codes.shape[0]
  _turn(scales, zeros, wide, turned)
  shape = (R, _GROUPS, lanes)
  lane, row = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (2, 1))
  own = lane // group == row
  exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  values = _int4 if zeros else quantile

  def add(chunk, totals):
    at = pl.ds(pl.multiple_of(chunk * lanes, lanes), lanes)
    code = codes[:, at].astype(jnp.int32)
    wide_rows = jnp.where(own, x[:, at].astype(jnp.float32)[:, None], 0)
    apart = wide_rows.reshape(R * _GROUPS, lanes).astype(x.dtype)
    scale = turned[:, pl.ds(pl.multiple_of(chunk * _GROUPS, _GROUPS), _GROUPS)]

    def sums(code, odds):
      one = jax.lax.dot_general(
        apart, values(code).astype(x.dtype), (((1,), (1,)), ((), ())),
        precision=exact, preferred_element_type=jnp.float32,
      ).reshape(R, _GROUPS, pairs)  # fmt: skip
      if zeros:
        one += wide_rows.sum(axis=-1, keepdims=True) * scale[2 + odds]
      return (one * scale[odds]).sum(axis=1)

    return totals[0] + sums(code & 15, 0), totals[1] + sums(code >> 4, 1)

  start = jnp.zeros((R, pairs), jnp.float32)
  each = jax.lax.fori_loop(0, codes.shape[1] // lanes, add, (start, start))
  for odds in range(2):  # A TPU takes every second row as it is, but not every second column.
    columns[pl.ds(odds, pairs, stride=2)] = each[odds].T
  y[...] = columns[...].T


def _turn(scales, zeros, wide, turned):
  """Scales of even and odd outputs, and what int4's codes less 8 are shifted by, groups first."""
  from jax.experimental import pallas as pl

  pairs = turned.shape[2]
  wide[...] = scales[...].astype(jnp.int32).astype(jnp.float32) if zeros else scales[...]
  for odds in range(2):
    kept = wide[pl.ds(odds, pairs, stride=2)]
    if zeros:
      kept = kept.astype(jnp.int32)
      low = (zeros[0][...].astype(jnp.int32) >> 4 * odds) & 15
      turned[2 + odds] = int4_shift(kept, low).T
      kept = int4_sizes(kept)
    turned[odds] = kept.T


def _int4(code: Int32[Array, "n I"]) -> Float32[Array, "n I"]:
  return (code - 8).astype(jnp.float32)


def nf4_scales(arrays: Arrays) -> Float32[Array, "O groups"]:
  """`quant_formats.nf4_scales` with values that are computed in place of a table's.

  The m-th value above 0, 2ᵉ ≤ m < 2ᵉ⁺¹, lies (m - 2ᵉ + ½) / 2ᵉ of the way from a tenth of 10ᵉ⁻⁶ to
  all of it, and the last one, behind those of e = 6, is 1.
  """
  place = arrays["scales"].astype(jnp.int32) - 127
  m = jnp.abs(place)
  bits = jax.lax.bitcast_convert_type(m.astype(jnp.float32), jnp.int32)
  e = (bits >> 23) - 127
  power = jnp.left_shift(1, jnp.clip(e, 0, 6)).astype(jnp.float32)
  most = jnp.float32(1e-6)
  for exponent in range(1, 7):
    most = jnp.where(e == exponent, jnp.float32(10.0 ** (exponent - 6)), most)
  value = (0.1 + 0.9 * (m.astype(jnp.float32) - power + 0.5) / power) * most
  value = jnp.where(place == 128, 1.0, jnp.where(m == 0, 0.0, jnp.sign(place) * value))
  steps = jnp.repeat(arrays["steps"], SCALES)[: place.size].reshape(place.shape)
  return value * steps + arrays["offset"]
