"""Texts that several devices hold: the order of their tokens, and their places in attention."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from model.sharding import mesh_axes, mesh_parts

SEQ = "seq"  # The mesh axis along which texts are split.


def seq_parts() -> int:
  """Into how many parts the mesh in use splits a text."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape.get(SEQ, 1)


def balanced_parts(length: int) -> int:
  """Devices among which the tokens of causal attention are dealt so that all have the same work.

  Of n devices, device i holds chunks i and 2n-1-i of a text's 2n chunks: its early tokens see
  little, its late ones much (so was Llama 3 trained: arXiv:2407.21783, section 3.3.2). 1 where
  texts are not split, or not into equal chunks: their tokens stay as they are.
  """
  parts = seq_parts()
  return 1 if length % (2 * parts) else parts


def balanced_chunks(parts: int) -> np.ndarray:
  """The chunk of a text at each of the 2 · parts places of the balanced order."""
  return np.stack([np.arange(parts), 2 * parts - 1 - np.arange(parts)], axis=1).reshape(-1)


def balanced_index(length: int, parts: int) -> np.ndarray:
  """The place in its row of each of `length` tokens in the balanced order."""
  return np.arange(length).reshape(2 * parts, -1)[balanced_chunks(parts)].reshape(-1)


def balanced(x: Array, parts: int) -> Array:
  """An array (B, T, …) that each device holds whole, its tokens in the balanced order."""
  if parts == 1:
    return x
  early, late = jnp.split(x.reshape(x.shape[0], 2, parts, -1, *x.shape[2:]), 2, axis=1)
  return jnp.stack((early[:, 0], late[:, 0, ::-1]), axis=2).reshape(x.shape)


def in_row_order(x: Array, parts: int) -> Array:
  """An array (B, T, …) that each device holds whole, its tokens from the balanced order back."""
  if parts == 1:
    return x
  held = x.reshape(x.shape[0], parts, 2, -1, *x.shape[2:])
  return jnp.concatenate((held[:, :, 0], held[:, ::-1, 1]), axis=1).reshape(x.shape)


def sent_home(x: Array, parts: int) -> Array:
  """Split hidden states (B, T, D) in the balanced order -> in the order of the row, still split.

  Of the two chunks on each device, and of the two that belong on each, one has an even number: two
  permutations among neighbours move everything, and nothing is held whole.
  """
  if parts == 1:
    return x
  mesh = jax.sharding.get_abstract_mesh()
  where = P(batch_axes(mesh, x.shape[0], "rows"), SEQ, None)
  home = functools.partial(_home_on_one_device, parts=parts)
  return jax.shard_map(home, in_specs=where, out_specs=where, axis_names=free_axes(mesh))(x)


def _home_on_one_device(x: Array, *, parts: int) -> Array:
  held = balanced_chunks(parts).reshape(parts, 2)
  odd = jax.lax.axis_index(SEQ) % 2 == 1  # There the second chunk has the even number.
  first, second = jnp.split(x, 2, axis=1)
  out = []
  for parity, chunk in enumerate((jnp.where(odd, second, first), jnp.where(odd, first, second))):
    number = held[held % 2 == parity]  # One on each device.
    out.append(jax.lax.ppermute(chunk, SEQ, [(i, int(c) // 2) for i, c in enumerate(number)]))
  return jnp.concatenate(out, axis=1)


def free_axes(mesh: AbstractMesh) -> set[str]:
  """The axes of a mesh that no program around this one has taken for itself."""
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return {name for name, kind in kinds if kind == AxisType.Auto}


def batch_axes(mesh: AbstractMesh, rows: int, name: str = "batch") -> tuple[str, ...] | None:
  """The free mesh axes that `rows` of a batch are split over; None where these do not divide it.

  `name` is "batch" inside a layer and "rows" outside.
  """
  free = free_axes(mesh)
  names = tuple(axis for axis in mesh_axes(name, mesh) if axis in free)
  parts = math.prod(mesh.shape[axis] for axis in names)
  return names if parts > 1 and rows % parts == 0 else None


def split_heads(
  mesh: AbstractMesh, q: Array, k: Array, v: Array
) -> tuple[tuple[str, ...] | None, Array, Array]:
  """(mesh axes that heads are split over, keys, values), where devices that share a key/value head
  get copies of it; None where heads cannot be split.
  """
  parts, N, K = mesh_parts("heads", mesh), q.shape[2], k.shape[2]
  axes = mesh_axes("heads", mesh)
  if parts == 1 or not set(axes) <= free_axes(mesh) or N % parts or (K % parts and parts % K):
    return None, k, v
  if K % parts:
    k, v = (jnp.repeat(x, parts // K, axis=2) for x in (k, v))
  return axes, k, v
