"""Quantized parameters straight from where they lie: never more of them in float than one matrix
of a layer, and each array where the mesh wants it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from model.layers import ParamInfo
from model.quant import Format, Quantized, quantize
from model.quant_tree import lead_axes
from model.sharding import spec

Read = Callable[[int | None], np.ndarray]  # A parameter in float32, or one layer of it.


def abstract(like: jax.ShapeDtypeStruct, info: ParamInfo, format: Format, mesh: Mesh | None) -> Any:
  """Shapes, dtypes and shardings of what a matrix is kept in."""
  table = info.role == "embedding"
  make = functools.partial(
    quantize, format=format, inputs=info.inputs, lead=lead_axes(info), table=table
  )
  made = jax.eval_shape(make, jax.ShapeDtypeStruct(like.shape, jnp.float32))
  place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  return jax.tree.map(place, made, places(made, info, mesh))


def places(w: Any, info: ParamInfo, mesh: Mesh | None) -> Any:
  """Where the arrays of a quantized matrix go: as the float matrix, along the axes that it divides.

  Groups of inputs are never cut. What belongs to a whole matrix, as the scales of nf4's scales, is
  everywhere.
  """
  if mesh is None:
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: here, w)
  axes, n = tuple(spec(info.axes, w.shape, mesh)), lead_axes(info)
  lead, own, first = axes[:n], axes[n:], len(w.outputs if w.table else w.inputs)
  outs, ins = (own[:first], own[first:]) if w.table else (own[first:], own[:first])
  out = _flat(outs, w.values.shape[-2], mesh)
  groups = w.values.shape[-1] if w.format.group is None else w.scales.shape[-1]
  into = _flat(ins, groups, mesh)
  at = lambda *axes: NamedSharding(mesh, P(*lead, *axes))
  made = {
    "values": at(out, into),
    "scales": at(out) if w.format.group is None else at(out, into),
    "steps": at(out) if w.format.kind == "int4" else at(None),
    "offset": at(),
  }
  where = {name: made[name] if name in w.arrays() else None for name in made}
  return Quantized(**where, format=w.format, inputs=w.inputs, outputs=w.outputs, table=w.table)


def _flat(axes: tuple, size: int, mesh: Mesh) -> Any:
  """Where the one axis goes that several are laid out in: as the first, if only that is split."""
  if not axes or axes[0] is None or any(a is not None for a in axes[1:]):
    return None
  names = axes[0] if isinstance(axes[0], tuple) else (axes[0],)
  parts = int(np.prod([mesh.shape[name] for name in names]))
  return axes[0] if size % parts == 0 else None


def read_quantized(
  read: Read, like: jax.ShapeDtypeStruct, info: ParamInfo, format: Format, mesh: Mesh | None
) -> Quantized:
  """A matrix, read and quantized one layer after the other where it is stacked."""
  target = abstract(like, info, format, mesh)
  shardings = jax.tree.map(lambda a: a.sharding, target)
  table, lead, stacked = info.role == "embedding", lead_axes(info), info.axes[0] == "layers"
  make = functools.partial(quantize, format=format, inputs=info.inputs, table=table)
  if not stacked:
    array = jax.device_put(read(None), like.sharding)
    return jax.device_put(make(array, lead=lead), shardings)
  one = like.sharding
  if mesh is not None:
    one = NamedSharding(mesh, P(*spec(info.axes, like.shape, mesh)[1:]))
  zeros = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), target)
  out = jax.jit(zeros, out_shardings=shardings)()
  put = jax.jit(_put, donate_argnums=0, out_shardings=shardings)
  for layer in range(like.shape[0]):
    array = jax.device_put(read(layer), one)
    out = put(out, make(array, lead=lead - 1), layer)
    jax.block_until_ready(out)  # Before the next layer is read: two would be held.
  return out


def _put(out: Quantized, one: Quantized, layer: jax.Array) -> Quantized:
  return jax.tree.map(lambda o, a: o.at[layer].set(a), out, one)
