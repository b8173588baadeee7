"""Quantized parameters straight from where they lie: never more of them in float than one matrix
of a layer, and each array where the mesh wants it.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from model.layers import ParamInfo
from model.quant import Format, Quantized, quantize
from model.quant_tree import format_of, lead_axes
from model.sharding import spec

Path = tuple[str | int, ...]
Read = Callable[[int | None], np.ndarray]  # A parameter in float32, or one layer of it.


def read_params(
  leaf: Callable[[Path, Any, int | None], np.ndarray], likes: dict, info: dict, mesh: Mesh | None,
  format: Format,
) -> dict:  # fmt: skip
  """Parameters, each quantized when it has been read.

  Args:
    leaf: reads the parameter at a path in a dtype: all of it, or one layer of a stacked one.
    likes: shapes, dtypes and shardings of float parameters.
    info: of `layers.param_info`.

  Raises:
    InputError: if a group that was asked for does not divide a matrix.
  """
  flat: Any = flatten_dict(likes)
  infos: Any = flatten_dict(info)
  kept = {p: format_of(infos[p], a.shape, format, _name(p)) for p, a in flat.items()}
  out = {}
  for path, like in flat.items():
    own = kept[path]
    if own is None:
      out[path] = jax.device_put(leaf(path, like.dtype, None), like.sharding)
    else:
      read = functools.partial(leaf, path, np.float32)
      out[path] = read_quantized(read, like, infos[path], own, mesh)
  return unflatten_dict(out)


def by_layer(
  leaf: Callable[[Path], np.ndarray],
) -> Callable[[Path, Any, int | None], np.ndarray]:
  """Reads layers of a stacked parameter, which is held until another one is asked for."""
  held: dict[Path, np.ndarray] = {}

  def read(path: Path, dtype: Any, layer: int | None) -> np.ndarray:
    if path not in held:
      held.clear()
      held[path] = leaf(path)
    array = held[path] if layer is None else held[path][layer]
    return array.astype(dtype)

  return read


def as_stored(likes: dict, info: dict, names: dict[str, str], mesh: Mesh | None) -> dict:
  """`likes` with what quantized matrices are kept in; `names` of formats by dotted path."""
  flat: Any = flatten_dict(likes)
  infos: Any = flatten_dict(info)
  for path, like in flat.items():
    name = names.get(_name(path))
    if name is not None:
      flat[path] = abstract(like, infos[path], Format.parse(name), mesh)
  return unflatten_dict(flat)


def main_format(names: Iterable[str]) -> str:
  """Which of a model's formats was asked for: words keep eight bits where others have fewer."""
  found = map(Format.parse, names)
  return max(found, key=lambda f: (f.dynamic, f.group is not None, f.name)).name


def _name(path: Path) -> str:
  return ".".join(map(str, path))


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

  Groups of inputs are never cut. What belongs to a whole matrix, as what multiplies nf4's scales,
  is everywhere.
  """
  if mesh is None:
    here = SingleDeviceSharding(jax.local_devices()[0])
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
    "offset": at(out, into) if w.format.kind == "int4" else at(),
  }
  where: dict[str, Any] = {name: made[name] if name in w.arrays() else None for name in made}
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
