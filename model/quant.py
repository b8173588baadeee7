"""Matrices in eight or four bits, and what multiplies by them.

The contract. A quantized matrix is one `Quantized` in the place of the array that a parameter holds
(`Linear.w`, `Embed.table`, `ExpertMatrix.w`): a frozen pytree of arrays whose leading axes, of
stacked layers and of experts, are those of the float array, so that slicing, scanning and placing
need not know it. `w.shape` is the float array's, `w.dequantize(dtype)` that array. What reads a
weight calls `product(x, w)`, `rows(w, ids)` for a table's vectors, or `dense(w, dtype)`, which take
plain arrays too where that makes sense, and knows no formats. `quantize(w, format, …)` makes one
of an array, `quantize_params(params, info, format)` (in `quant_tree`) all of a model's.

Arithmetic hangs on the format only. `int8`, `int4`, `nf4` and `fp8` keep activations as they are
and multiply by the dequantized matrix, however few rows there are. `int8_dynamic` and `fp8_dynamic`
round each row of activations to eight bits, with a scale of its own, so that batches say nothing.
Gradients flow to `x`, through the matrix dequantized once more; the matrix itself has none.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from model import quant_formats as formats
from model import quant_kernels as kernels
from model import quant_rows as cpu
from model.quant_formats import NAMES, Format, check_sizes
from model.sharding import constrain, platform

__all__ = ["NAMES", "Format", "Quantized", "beside", "dense", "is_quantized", "product", "quantize",
           "rows"]  # fmt: skip

_MOST_WIDENED = 2**26  # Bytes of a matrix in eight bits, widened: a larger one is in parts.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """A matrix of `inputs` and `outputs` axes, kept as (outputs, inputs), both flat.

  `values` are int8, float8_e4m3fn or codes of four bits, of two outputs in a byte
  (`quant_formats.pack`). `scales` multiply an output or a group of its inputs; of int4 and nf4 they
  are in few bits themselves (`quant_formats.int4_scales`, `nf4_scales`), and `steps` multiply
  them. A `table` (Embed) has its outputs, the rows, first in `shape`, other matrices their inputs.
  """

  values: Array  # (…, O, I), or (…, O/2, I) uint8.
  scales: Array  # (…, O) bfloat16; int4, nf4: (…, O, groups) uint8.
  steps: Array | None  # int4: (…, O) uint8; nf4: (…, groups of a matrix / 256, rounded up) float32.
  offset: Array | None  # int4: zero points (…, O/2, groups) uint8; nf4: (…) float32.
  format: Format = dataclasses.field(metadata={"static": True})
  inputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  table: bool = dataclasses.field(default=False, metadata={"static": True})

  @property
  def lead(self) -> tuple[int, ...]:
    """Sizes of axes before the matrix: stacked layers, experts."""
    return self.values.shape[:-2]

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the matrix that this stands for."""
    own = self.outputs + self.inputs if self.table else self.inputs + self.outputs
    return self.lead + own

  @property
  def ndim(self) -> int:
    """Axes of `shape`."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Elements of the matrix that this stands for."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Of all arrays together."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))

  def arrays(self) -> dict[str, Array]:
    """Its arrays by name, without those that its format does not have."""
    return {name: getattr(self, name) for name in ("values", "scales", "steps", "offset")
            if getattr(self, name) is not None}  # fmt: skip

  def flat(self, dtype: Any) -> Float[Array, "... O I"]:
    """The matrix that this stands for, outputs first, both flat."""
    one = lambda arrays: formats.interleaved(_PARTS[self.format.kind](arrays), 0).astype(dtype)
    for _ in self.lead:
      one = jax.vmap(one)
    return one(self.arrays())

  def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "..."]:
    """The matrix that this stands for, in its shape."""
    w, n = self.flat(dtype), len(self.lead)
    if not self.table:
      w = jnp.swapaxes(w, n, n + 1)
    return w.reshape(self.shape)


def _scaled(arrays: formats.Arrays) -> tuple[Float[Array, "O I"]]:
  return (arrays["values"].astype(jnp.float32) * arrays["scales"][:, None],)


_PARTS: dict[str, Any] = {
  "int8": _scaled,
  "fp8": _scaled,
  "int4": formats.int4_parts,
  "nf4": formats.nf4_parts,
}


def quantize(
  w: Float[Array, "..."], format: Format | str, *, inputs: int = 1, lead: int = 0,
  table: bool = False,
) -> Quantized:  # fmt: skip
  """A matrix in fewer bits: scales that reach its largest elements, of int4 and fp8 those with the
  least squared error among some.

  Args:
    w: (…, inputs…, outputs…), or of a `table` (…, outputs…, inputs…).
    inputs: how many axes are inputs.
    lead: how many axes come before, each with matrices of its own.

  Raises:
    InputError: for a format that is not known, or a group that does not divide the inputs.
  """
  format = format if isinstance(format, Format) else Format.parse(format)
  own = w.shape[lead:]
  split = len(own) - inputs if table else inputs
  first, second = own[:split], own[split:]
  ins, outs = (second, first) if table else (first, second)
  check_sizes(format, math.prod(ins), math.prod(outs), f"a matrix of shape {w.shape}")
  return _quantize(w, format, ins, outs, lead, table)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _quantize(w, format: Format, inputs, outputs, lead: int, table: bool) -> Quantized:
  run: Any = {
    "int8": formats.int8,
    "fp8": formats.fp8,
    "int4": lambda w: formats.int4(w, format.group or 0),
    "nf4": lambda w: formats.nf4(w, format.group or 0),
  }[format.kind]
  flat = w.astype(jnp.float32).reshape(*w.shape[:lead], *map(math.prod, (
    (outputs, inputs) if table else (inputs, outputs)
  )))  # fmt: skip
  flat = flat if table else jnp.swapaxes(flat, lead, lead + 1)
  for _ in range(lead):
    run = jax.vmap(run)
  arrays = {"steps": None, "offset": None} | run(flat)
  return Quantized(**arrays, format=format, inputs=inputs, outputs=outputs, table=table)


def is_quantized(tree: Any) -> bool:
  """Whether any matrix of a tree of parameters is quantized."""
  leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))
  return any(isinstance(leaf, Quantized) for leaf in leaves)


def dense(w: Array | Quantized, dtype: Any) -> Float[Array, "..."]:
  """A weight as an array of its shape."""
  return w.dequantize(dtype) if isinstance(w, Quantized) else w.astype(dtype)


def beside(x: Array, w: Any) -> tuple[Array, Any]:
  """x and weights that are dequantized for it, where it is: a loop of steps would otherwise widen
  its matrices once, before it, and hold them all; on a TPU a loop of layers would turn them all.
  """
  if not is_quantized(w):
    return x, w
  w = jax.tree.map(_as_it_lies, w, is_leaf=lambda leaf: isinstance(leaf, Quantized))
  return jax.lax.optimization_barrier((x, w))


def _as_it_lies(w: Any) -> Any:
  if not isinstance(w, Quantized) or platform() != "tpu":
    return w
  rows = Layout(tuple(range(w.values.ndim)))
  return dataclasses.replace(w, values=with_layout_constraint(w.values, rows))


def rows(
  w: Quantized, ids: Int[Array, "..."], dtype: Any, *, axis: str | None = None
) -> Float[Array, "... D"]:
  """Vectors of a table, whose rows are the logical axis `axis`."""
  if w.format.kind not in ("int8", "fp8"):
    return constrain(w.dequantize(dtype), (axis, None))[ids]
  scale = constrain(w.scales, (axis,))[ids][..., None]
  values = constrain(w.values, (axis, None))[ids].astype(jnp.float32)
  return (values * scale).astype(dtype)


def product(x: Float[Array, "..."], w: Quantized, dtype: Any = None) -> Float[Array, "..."]:
  """x, whose last axes are the inputs of `w`, times the matrix: (…, outputs…).

  Args:
    dtype: of the result, which is accumulated in at least float32; None: that of x.
  """
  dtype = x.dtype if dtype is None else dtype
  lead = x.shape[: x.ndim - len(w.inputs)]
  flat = x.reshape(*lead, math.prod(w.inputs))
  return _product(flat, w).astype(dtype).reshape(*lead, *w.outputs)


@jax.custom_vjp
def _product(x: Float[Array, "... I"], w: Quantized) -> Float[Array, "... O"]:
  wide = jnp.promote_types(x.dtype, jnp.float32)
  kind, group = w.format.kind, w.format.group
  if kernels.fits(x, w.arrays(), kind, group):
    return kernels.product(x, w.arrays(), kind, group or 0)
  if cpu.few(x, kind) and not w.format.dynamic:
    return cpu.row_by_row(x, w.arrays(), kind)
  x, w = beside(x, w)
  return _kept_product(x, w, wide)


def _kept_product(x: Float[Array, "... I"], w: Quantized, wide: Any) -> Float[Array, "... O"]:
  if w.format.kind not in ("int8", "fp8"):
    return _grouped(x, w, wide)
  if w.format.dynamic:
    return _dynamic(x, w, wide)
  parts = _parts(x, w)
  if parts > 1:
    one = lambda part: _kept_product(x, part, wide)
    y = jax.lax.map(lambda i: one(_part(w, parts, i)), jnp.arange(parts))
    return jnp.moveaxis(y, 0, -1).reshape(*x.shape[:-1], -1)
  return cpu.times(x, cpu.widened(w.values, x.dtype), wide) * w.scales.astype(wide)


def _forward(x, w):
  return _product(x, w), (w, jnp.zeros((), x.dtype))


def _backward(kept, gradient):
  w, like = kept
  gradient, w = beside(gradient.astype(like.dtype), w)
  parts = _parts(gradient, w)
  if parts == 1:
    return jnp.matmul(gradient, w.flat(like.dtype)), None
  wide = jnp.promote_types(like.dtype, jnp.float32)
  split = gradient.reshape(*gradient.shape[:-1], -1, parts)

  def add(total, i):
    back = _part(w, parts, i).flat(like.dtype)
    return total + jnp.matmul(split[..., i], back, preferred_element_type=wide), None

  start = jnp.zeros((*gradient.shape[:-1], w.values.shape[-1]), wide)
  return jax.lax.scan(add, start, jnp.arange(parts))[0].astype(like.dtype), None


_product.defvjp(_forward, _backward)


def _parts(x: Float[Array, "..."], w: Quantized) -> int:
  """In how many parts of its outputs a matrix is widened, so that few bytes of it are at a time: a
  head that scores 128,256 words would be the largest array of all. A TPU widens as it multiplies.
  """
  outputs = w.values.shape[-2]
  size = w.values.size * jnp.promote_types(x.dtype, jnp.bfloat16).itemsize
  eight = w.format.kind in ("int8", "fp8") and not w.format.dynamic
  many = math.prod(x.shape[:-1]) > cpu.FEW_ROWS
  if not (eight and many and w.values.ndim == 2) or platform() == "tpu":
    return 1
  fitting = (n for n in range(1, outputs) if outputs % n == 0 and size <= n * _MOST_WIDENED)
  return next(fitting, 1)


def _part(w: Quantized, parts: int, i: Int[Array, ""]) -> Quantized:
  """The outputs i, i + parts, …: each device has as many of each part."""
  values = w.values.reshape(-1, parts, w.values.shape[-1])[:, i]
  scales = w.scales.reshape(-1, parts)[:, i]
  return dataclasses.replace(w, values=values, scales=scales, outputs=(len(values),))


def _grouped(x: Float[Array, "... I"], w: Quantized, wide: Any) -> Float[Array, "... O"]:
  """A product with four bits; of int4 the shifts of groups meet the sums of their inputs."""
  arrays, centred = w.arrays(), w.format.kind == "int4"
  parts = formats.int4_centred(arrays) if centred else formats.nf4_parts(arrays)
  y = cpu.in_order(tuple(cpu.times(x, part.astype(x.dtype), wide) for part in parts))
  if not centred:
    return y
  sums = x.reshape(*x.shape[:-1], -1, w.format.group or 0).astype(wide).sum(axis=-1)
  return y + cpu.times(sums, formats.int4_shifts(arrays).astype(wide), wide)


def _dynamic(x: Float[Array, "... I"], w: Quantized, wide: Any) -> Float[Array, "... O"]:
  """Both rounded to eight bits; each row of x has a scale of its own."""
  small, scale = _rounded(x, w.format.kind, wide)
  few = math.prod(x.shape[:-1]) <= cpu.FEW_ROWS and cpu.on_one_cpu()
  if few and w.format.kind == "int8":
    y = cpu.whole_times(small.astype(jnp.int8), w.values).astype(wide)
  elif cpu.few(x, w.format.kind):
    return cpu.row_by_row(small.astype(jnp.float32), w.arrays(), w.format.kind) * scale
  elif platform() == "cpu":  # XLA has no fast product of small numbers there.
    y = cpu.times(small.astype(wide), cpu.widened(w.values, wide), wide)
  else:
    small = small.astype(w.values.dtype)
    exact = jnp.int32 if w.format.kind == "int8" else jnp.float32
    y = jnp.matmul(small, w.values.T, preferred_element_type=exact).astype(wide)
  return y * scale * w.scales.astype(wide)


def _rounded(x: Float[Array, "... I"], kind: str, wide: Any) -> tuple[Array, Array]:
  """Rows in eight bits (whole numbers in `wide`, or float8_e4m3fn), and what multiplies each."""
  most = 127 if kind == "int8" else 448
  scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(wide) / most
  scale = jnp.where(scale == 0, 1, scale)
  small = x.astype(wide) / scale
  return jnp.round(small) if kind == "int8" else small.astype(jnp.float8_e4m3fn), scale


def rounded(x: Float[Array, "..."], inputs: int, kind: str) -> Float[Array, "..."]:
  """What a dynamic format of this kind makes of activations, with gradients that pass straight
  through.

  Args:
    inputs: how many of the last axes are one row.
  """
  wide = jnp.promote_types(x.dtype, jnp.float32)
  flat = x.reshape(*x.shape[: x.ndim - inputs], -1)
  small, scale = _rounded(flat, kind, wide)
  return straight_through(x, (small.astype(wide) * scale).astype(x.dtype).reshape(x.shape))


@jax.custom_jvp
def straight_through(x: Array, rounded: Array) -> Array:
  """`rounded`, whose gradient reaches x as if it were x (Bengio et al., arXiv:1308.3432)."""
  del x
  return rounded


straight_through.defjvps(lambda tangent, *_: tangent, None)
