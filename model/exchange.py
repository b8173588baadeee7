"""Rows that travel to the devices which have their experts, and back: a ragged all-to-all.

Each device sorts its rows by expert, so that what one expert gets from one device is a slice. The
slices of an expert lie behind each other on the device that has it, those of its experts too: what
arrives is sorted by expert already.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# (rows sorted by expert, rows of each expert of this device) -> as many rows. Rows behind the last
# expert's are nothing, and so is what is made of them.
Work = Callable[[Float[Array, "M D"], Int[Array, "e"]], Float[Array, "M D"]]


class Slices(NamedTuple):
  """Arguments of jax.lax.ragged_all_to_all, each with a number per slice (E)."""

  input_offsets: Int[Array, "E"]
  send_sizes: Int[Array, "E"]
  output_offsets: Int[Array, "E"]  # On the device that gets the slice.
  recv_sizes: Int[Array, "E"]


def slices(table: Int[Array, "n E"], me: Int[Array, ""]) -> tuple[Slices, Slices]:
  """What device `me` sends and gets, there and back.

  Args:
    table: how many rows each of n devices has for each expert. Device i has experts i·e … i·e+e-1,
      with e = E / n.
  """
  n, experts = table.shape
  own = experts // n
  sent = jnp.cumsum(table, axis=1) - table  # Where a slice begins among its sender's rows …
  whole = table.sum(axis=0, dtype=table.dtype).reshape(n, own)
  first = (jnp.cumsum(whole, axis=1) - whole).reshape(-1)
  got = first + jnp.cumsum(table, axis=0) - table  # … and among those of the expert's device.
  mine = lambda a: jax.lax.dynamic_slice_in_dim(a, me * own, own, axis=1).reshape(-1)
  there = Slices(sent[me], table[me], got[me], mine(table))
  back = Slices(mine(got), mine(table), mine(sent), table[me])
  return there, back


def exchanged(
  rows: Float[Array, "R D"], sizes: Int[Array, "E"], work: Work, *, axis: str, room: int
) -> Float[Array, "R D"]:
  """What `work` makes of each row on the device that has its expert.

  Inside jax.shard_map, manual over `axis`; TPUs and GPUs have this collective, CPUs do not.

  Args:
    rows: sorted by expert; those behind the last expert's are nothing.
    sizes: number of rows for each expert of all devices.
    room: the most rows that one device may get.

  Returns:
    A row for each row; 0 for those that are nothing.
  """
  me = jax.lax.axis_index(axis)
  table = jax.lax.all_gather(sizes, axis)
  there, back = slices(table, me)
  own = sizes.shape[0] // table.shape[0]
  here = there.recv_sizes.reshape(-1, own).sum(axis=0, dtype=sizes.dtype)
  got = jax.lax.ragged_all_to_all(rows, _empty(rows, room), *there, axis_name=axis)
  made = work(got, here)
  return jax.lax.ragged_all_to_all(made, _empty(made, len(rows)), *back, axis_name=axis)


def _empty(like: Array, rows: int) -> Array:
  """Zeros of which JAX knows that they differ between the devices that `like` differs between."""
  zero = jnp.where(False, jax.lax.stop_gradient(like[0]), 0)
  return jnp.broadcast_to(zero, (rows, *like.shape[1:]))
