"""Which parameters of a model are quantized, and all of them at once.

Quantized are the matrices of layers, experts and heads that score words, and the tables of tokens,
which like these heads are kept in int8 in every format. All the rest stays float: vectors, norms,
biases, the router, tables of positions, of relative biases and of token types, and heads on labels,
all of them small or exact by purpose. A matrix whose inputs the format's own groups (32 of int4, 64
of nf4) do not divide, or whose outputs are no pairs, is kept in int8 instead.
"""

import math
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from model.errors import InputError
from model.layers import ParamInfo
from model.quant import Quantized, is_quantized, quantize
from model.quant_formats import GROUPS, Format, check_sizes

_WORDS = Format("int8")  # A score is a sum over a whole row: of eight bits, these lose the least.


def format_of(
  info: ParamInfo, shape: tuple[int, ...], format: Format, name: str = "a matrix"
) -> Format | None:
  """How a parameter is kept; None: as it is.

  Raises:
    InputError: if a group that was asked for does not divide the parameter's inputs.
  """
  axes = info.axes[lead_axes(info) :]
  if info.role == "vector" or "expert" in axes or "label" in axes:
    return None
  if info.role == "embedding" and axes[0] != "vocab":
    return None
  if "vocab" in axes:
    return _WORDS
  own = shape[lead_axes(info) :]
  inputs, outputs = math.prod(own[: info.inputs]), math.prod(own[info.inputs :])
  if format.group is None or (inputs % format.group == 0 and outputs % 2 == 0):
    return format
  if format.group != GROUPS[format.kind]:
    check_sizes(format, inputs, outputs, name)
  return Format("int8")


def lead_axes(info: ParamInfo) -> int:
  """How many axes come before a matrix: layers, experts."""
  count = 0
  while count < len(info.axes) and info.axes[count] in ("layers", "expert"):
    count += 1
  return count


def quantize_leaf(
  array: jax.Array, info: ParamInfo, format: Format, name: str = "a matrix"
) -> jax.Array | Quantized:
  """A parameter as the format keeps it."""
  own = format_of(info, array.shape, format, name)
  if own is None:
    return array
  table = info.role == "embedding"
  return quantize(array, own, inputs=info.inputs, lead=lead_axes(info), table=table)


def quantize_params(params: dict, info: dict, format: Format | str) -> dict:
  """Parameters with quantized matrices.

  Args:
    info: of `layers.param_info`: the ParamInfo of each parameter.

  Raises:
    InputError: for a format that is not known, a group that does not divide, or parameters that
      are quantized already.
  """
  format = format if isinstance(format, Format) else Format.parse(format)
  if is_quantized(params):
    raise InputError("this model is quantized already: quantize the one that it was made of.")
  leaves: Any = flatten_dict(params)
  infos: Any = flatten_dict(info)
  made = {
    path: quantize_leaf(a, infos[path], format, ".".join(map(str, path)))
    for path, a in leaves.items()
  }
  return unflatten_dict(made)


def quantized_leaves(params: dict) -> dict[tuple[str | int, ...], Quantized]:
  """The quantized matrices among parameters, by path."""
  leaves: Any = flatten_dict(params)
  return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Quantized)}


def report(params: dict) -> str:
  """One line: how many bytes parameters take, how many as float32, and what is kept how."""
  flat: Any = flatten_dict(params)
  bytes_, leaves = resident_bytes(params), flat.values()
  plain = 4 * sum(leaf.size for leaf in leaves)
  kinds: dict[str, int] = {}
  for leaf in leaves:
    name = leaf.format.name if isinstance(leaf, Quantized) else str(leaf.dtype)
    kinds[name] = kinds.get(name, 0) + leaf.size
  parts = ", ".join(f"{count:,} in {name}" for name, count in sorted(kinds.items()))
  return (
    f"parameters: {bytes_ / 2**20:.1f} MiB, {plain / bytes_:.2f} times less than float32 ({parts})"
  )


def dequantize_params(params: dict, dtype: Any) -> dict:
  """The same with plain arrays, of `dtype` where they were quantized."""
  is_leaf = lambda leaf: isinstance(leaf, Quantized)
  plain = lambda leaf: leaf.dequantize(dtype) if isinstance(leaf, Quantized) else leaf
  return jax.tree.map(plain, params, is_leaf=is_leaf)


def resident_bytes(params: dict) -> int:
  """Bytes of all arrays, scales included."""
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))
