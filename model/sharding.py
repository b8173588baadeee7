"""The mesh, and the one table from what an axis is to where it goes."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
  None: None,
  "batch": ("data", "fsdp"),
  "seq": None,
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "embed_out": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "latent": None,
  "mlp": "tensor",
  "expert": None,
  "position": None,
  "label": None,
}


def make_mesh(*, data: int | None, fsdp: int | None, tensor: int | None, devices=None) -> Mesh:
  """A mesh over `devices` (all of JAX's by default); an axis of None takes what is left.

  Raises:
    InputError: if the product of the axes is not the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
  known = int(np.prod([s for s in sizes.values() if s is not None]))
  free = [name for name, size in sizes.items() if size is None]
  rest = len(devices) // known
  if known * (rest if free else 1) != len(devices):
    shown = " x ".join(f"{name}={size or 'the rest'}" for name, size in sizes.items())
    raise InputError(
      f"mesh {shown} does not fit {len(devices)} devices: the product of the axes must be the "
      f"number of devices. Change mesh.{free[0] if free else 'data'} or the others."
    )
  shape = [rest if size is None else size for size in sizes.values()]
  grid = np.asarray(devices).reshape(shape)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
  """Logical names of a shape's axes -> PartitionSpec on `mesh`.

  Leading axes of `shape` that have no name (stacked layers) stay whole. Key/value heads are
  replicated when the mesh has a multiple of them; an unknown name is a KeyError, on purpose.

  Raises:
    InputError: if an axis is not divisible by its mesh axis.
  """
  names = (None,) * (len(shape) - len(axes)) + tuple(axes)
  return P(*(_placed(name, size, mesh) for name, size in zip(names, shape, strict=True)))


def _placed(name: str | None, size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
  where = RULES[name]
  if where is None:
    return None
  parts = mesh_parts(name, mesh)
  if parts == 1:
    return None
  if size % parts == 0:
    return where
  if name == "kv_heads" and parts % size == 0:
    return None
  raise InputError(
    f"{name}={size} is not a multiple of mesh.{where}={parts}: change the size or the mesh."
  )


def mesh_parts(name: str | None, mesh: Mesh | jax.sharding.AbstractMesh) -> int:
  """Into how many parts `mesh` splits a logical axis."""
  where = RULES[name]
  axes = () if where is None else (where,) if isinstance(where, str) else where
  return math.prod(mesh.shape[axis] for axis in axes)


def shardings(abstract: Any, axes: Any, mesh: Mesh) -> Any:
  """A NamedSharding for every leaf of `abstract`, from the same tree of logical axes."""
  place = lambda leaf, names: NamedSharding(mesh, spec(names, leaf.shape, mesh))
  return jax.tree.map(place, abstract, axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Where the rows of a (batch, …) array go."""
  return NamedSharding(mesh, P(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole of an array on every device."""
  return NamedSharding(mesh, P())


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Places an activation by its logical axes on the mesh in use; without one, returns it as it is.

  An axis that the mesh does not divide (a short batch in inference) stays whole.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  places = []
  for name, size in zip(axes, x.shape, strict=True):
    parts = mesh_parts(name, mesh)
    places.append(RULES[name] if parts > 1 and size % parts == 0 else None)
  return jax.lax.with_sharding_constraint(x, P(*places))


def constrain_rows(x: jax.Array) -> jax.Array:
  """`constrain` for an activation of which only the first axis, the rows of a batch, is split.

  Without it the compiler may leave gathered hidden states split like the weights that follow; of
  jax 0.10 on meshes with data, fsdp and tensor axes their gradients were then wrong.
  """
  return constrain(x, ("batch", *(None,) * (x.ndim - 1)))
