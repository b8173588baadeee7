"""64-bit fingerprints of arrays: the same for equal bits, however the array is sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

from model.errors import InputError

_WORDS = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint32}


def check_dtype(name: str, dtype) -> None:
  """Refuses what a checkpoint cannot hold bit for bit.

  Raises:
    InputError: for dtypes narrower than a byte, complex numbers and PRNG keys.
  """
  if jnp.issubdtype(dtype, jax.dtypes.prng_key):
    raise InputError(f"{name} holds PRNG keys, which are not saved: fold keys from counters.")
  if dtype != jnp.bool_ and _bits(dtype) < 8:
    raise InputError(
      f"{name} has dtype {dtype}, narrower than a byte, which cannot be saved: pack the values "
      "into uint8."
    )
  if jnp.issubdtype(dtype, jnp.complexfloating):
    raise InputError(f"{name} has dtype {dtype}: save its real and imaginary parts instead.")


def fingerprints(arrays: list[Shaped[Array, "..."]]) -> list[str]:
  """16 hexadecimal digits for each array, computed where the array lies.

  Each 32-bit word (narrower elements are widened) is mixed with its row-major index by the
  multiply-xorshift steps of MurmurHash3's finalizer, and the mixed words are summed modulo 2³²;
  a second sum mixes further. Integer sums do not depend on their order, so neither sharding nor
  topology matters. A change of one word always changes the first sum; any other change goes
  unseen with probability near 2⁻⁶⁴. Shape and dtype are not part of it.
  """
  digits = []
  for array in arrays:
    where = array.sharding
    mesh = where.mesh if isinstance(where, jax.sharding.NamedSharding) else None
    # One compiled function per shape, each fetched before the next starts: collectives of
    # several programs in flight can deadlock on CPU.
    first, second = np.asarray(_sums(array, mesh=mesh))
    digits.append(f"{first:08x}{second:08x}")
  return digits


@functools.partial(jax.jit, static_argnames="mesh")
def _sums(x: Shaped[Array, "..."], *, mesh: jax.sharding.Mesh | None) -> UInt32[Array, "sums=2"]:
  sums = _sum(x)
  if mesh is None:
    return sums
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.lax.with_sharding_constraint(sums, everywhere)


def _sum(x: Shaped[Array, "..."]) -> UInt32[Array, "sums=2"]:
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  word = jax.lax.bitcast_convert_type(x, _WORDS[_bits(x.dtype)]).astype(jnp.uint32)
  index, stride = jnp.uint32(0), 1
  for axis in reversed(range(word.ndim)):
    place = jax.lax.broadcasted_iota(jnp.uint32, word.shape, axis)
    index = index + place * jnp.uint32(stride % 2**32)
    stride *= word.shape[axis]
  word = word ^ ((index + jnp.uint32(1)) * jnp.uint32(0x9E3779B1))
  word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
  word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
  first = word ^ (word >> 16)
  second = first * jnp.uint32(0x27D4EB2F)
  second = second ^ (second >> 15)
  zero = jnp.uint32(0)
  # One reduction of both: ten times as fast on CPU as two sums.
  both = jax.lax.reduce((first, second), (zero, zero), _add, tuple(range(word.ndim)))
  return jnp.stack(both)


def _add(x, y):
  return x[0] + y[0], x[1] + y[1]


def _bits(dtype) -> int:
  if dtype == jnp.bool_:
    return 8
  info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
  return info(dtype).bits
