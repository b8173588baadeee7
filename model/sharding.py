"""The mesh, and the one table from what an axis is to where it goes."""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model.errors import InputError

# Outermost first: what is said least often crosses the slowest wires. `slices` is the network
# between TPU slices or hosts of GPUs, `tensor` the nearest neighbours.
MESH_AXES = ("slices", "stage", "data", "fsdp", "expert", "seq", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
  None: None,
  "batch": ("slices", "data", "fsdp", "expert"),  # Rows of activations inside layers.
  "rows": ("slices", "data", "fsdp", "expert", "stage"),  # Rows everywhere else.
  "seq": "seq",
  "residual": ("seq", "tensor"),
  "layers": "stage",
  "vocab": "tensor",
  "embed": "fsdp",
  "embed_out": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "latent": None,
  "mlp": "tensor",
  "expert": "expert",
  "position": None,
  "label": None,
  "rank": None,
}


def make_mesh(
  *, slices: int | None = 1, stage: int | None = 1, data: int | None = 1, fsdp: int | None = 1,
  expert: int | None = 1, seq: int | None = 1, tensor: int | None = 1, devices=None,
) -> Mesh:  # fmt: skip
  """A mesh over `devices` (all of JAX's by default); an axis of None takes what is left.

  Raises:
    InputError: if the product of the axes is not the number of devices, or `slices` is not the
      number of slices that the devices say they are in.
  """
  devices = jax.devices() if devices is None else list(devices)
  given = dict(
    slices=slices, stage=stage, data=data, fsdp=fsdp, expert=expert, seq=seq, tensor=tensor
  )
  sizes = {name: given[name] for name in MESH_AXES}
  known = math.prod(s for s in sizes.values() if s is not None)
  free = [name for name, size in sizes.items() if size is None]
  rest = len(devices) // known
  if known * (rest if free else 1) != len(devices):
    named = {name: size for name, size in sizes.items() if size != 1 or name == "data"}
    shown = " x ".join(f"{name}={size or 'the rest'}" for name, size in named.items())
    raise InputError(
      f"mesh {shown} does not fit {len(devices)} devices: the product of the axes must be the "
      f"number of devices. Change mesh.{free[0] if free else 'data'} or the others."
    )
  shape = [rest if size is None else size for size in sizes.values()]
  grid = _laid_out(devices, shape)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _laid_out(devices: list, shape: list[int]) -> np.ndarray:
  """Devices in the shape of a mesh, near each other where TPUs say where they are."""
  found = len({getattr(d, "slice_index", 0) for d in devices})
  tpu = devices[0].platform == "tpu"
  if tpu and found != shape[0]:  # What other devices call a slice may be a host.
    there = f"{found} slices" if found > 1 else "1 slice"
    raise InputError(
      f"mesh.slices={shape[0]}, and the devices lie in {there}: set mesh.slices={found}."
    )
  if not tpu:
    return np.asarray(devices).reshape(shape)
  if found == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  between, within = [shape[0]] + [1] * (len(shape) - 1), [1, *shape[1:]]
  return mesh_utils.create_hybrid_device_mesh(
    within, between, devices, allow_split_physical_axes=True
  )


def platform() -> str:
  """What the devices of the mesh in use, or the default device, are: "cpu", "tpu", "gpu".

  A mesh may describe devices that are not here, as when a program is compiled ahead of time.
  """
  mesh = jax.sharding.get_abstract_mesh()
  described = None if mesh.empty else mesh.abstract_device
  if described is not None and described.device_kind.upper().startswith("TPU"):
    return "tpu"
  return jax.default_backend()


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
  """Logical names of a shape's axes -> PartitionSpec on `mesh`.

  Leading axes of `shape` that have no name (stacked layers) stay whole. Key/value heads are
  replicated when the mesh has a multiple of them; an unknown name is a KeyError, on purpose.

  Raises:
    InputError: if an axis is not divisible by its mesh axis.
  """
  names = (None,) * (len(shape) - len(axes)) + tuple(axes)
  return P(*(_placed(name, size, mesh) for name, size in zip(names, shape, strict=True)))


def _placed(name: str | None, size: int, mesh: Mesh) -> tuple[str, ...] | None:
  parts = mesh_parts(name, mesh)
  if parts == 1:
    return None
  if size % parts == 0:
    return mesh_axes(name, mesh)
  if name == "kv_heads" and parts % size == 0:
    return None
  where = shown_axes(name, mesh)
  raise InputError(f"{name}={size} is not a multiple of {where}: change the size or the mesh.")


def mesh_axes(name: str | None, mesh: Mesh | jax.sharding.AbstractMesh) -> tuple[str, ...]:
  """The axes of `mesh` that split a logical axis into more than one part."""
  where = RULES[name]
  axes = () if where is None else (where,) if isinstance(where, str) else where
  return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def mesh_parts(name: str | None, mesh: Mesh | jax.sharding.AbstractMesh) -> int:
  """Into how many parts `mesh` splits a logical axis."""
  return math.prod(mesh.shape[axis] for axis in mesh_axes(name, mesh))


def shown_axes(name: str | None, mesh: Mesh | jax.sharding.AbstractMesh) -> str:
  """The mesh axes that split a logical axis, as the config names them."""
  return " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in mesh_axes(name, mesh))


def shardings(abstract: Any, axes: Any, mesh: Mesh) -> Any:
  """A NamedSharding for every leaf of `abstract`, from the same tree of logical axes."""
  place = lambda leaf, names: NamedSharding(mesh, spec(names, leaf.shape, mesh))
  return jax.tree.map(place, abstract, axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Where the rows of a (batch, …) array go."""
  return NamedSharding(mesh, P(mesh_axes("rows", mesh)))


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
    places.append(mesh_axes(name, mesh) if parts > 1 and size % parts == 0 else None)
  return jax.lax.with_sharding_constraint(x, P(*places))


def constrain_rows(x: jax.Array) -> jax.Array:
  """`constrain` for vectors of tokens (batch, length, …) or of whole texts (batch, …), outside
  layers.

  Without it the compiler may leave gathered hidden states split like the weights that follow; of
  jax 0.10 on meshes with data, fsdp and tensor axes their gradients were then wrong.
  """
  length = ("seq",) * (x.ndim > 2)
  return constrain(x, ("rows", *length, *(None,) * (x.ndim - 1 - len(length))))


def constrain_tokens(x: jax.Array) -> jax.Array:
  """`constrain` for what the matrices of a layer read and give (batch, length, width)."""
  return constrain(x, ("batch", "seq", None))


def constrain_residual(x: jax.Array) -> jax.Array:
  """Places the residual stream (batch, length, width): its length is split over `tensor` too.

  What tensor parallelism would sum on every device is then summed in parts, and gathered before the
  next matrices: as many bytes move, and norms, dropouts and what is kept of them shrink
  (Korthikanti et al., arXiv:2205.05198, section 4.2). A length that this does not divide, such as
  the single token of a step of decoding, is split over `seq` alone.
  """
  mesh = jax.sharding.get_abstract_mesh()
  whole = mesh.empty or x.shape[1] % mesh_parts("residual", mesh)
  return constrain(x, ("batch", "seq" if whole else "residual", None))
