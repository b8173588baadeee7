"""Scales of channels: what AWQ and SmoothQuant multiply the inputs of matrices by."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.quant import Format, quantize

_TRIED = 20  # Exponents of AWQ, from 0.
_LEAST = 1e-4  # Of a channel's mean, beside the largest.


@dataclasses.dataclass(frozen=True)
class Reader:
  """A matrix, the products xᵀx of what it reads, summed over tokens, and how it is to be kept."""

  w: Float[Array, "I O"]
  gram: Float[Array, "I I"]
  format: Format


def error(
  w: Float[Array, "I O"], values: Float[Array, "I O"], gram: Float[Array, "I I"]
) -> Float[Array, ""]:
  """The summed squares by which the outputs x · w change with `values` in the place of `w`."""
  off = values - w
  return jnp.sum(off * jnp.matmul(gram, off, precision="highest"))


def awq_scales(
  readers: Sequence[Reader], mean: Float[Array, "I"], channel: Int[np.ndarray, "I"]
) -> Float[Array, "c"]:
  """Of mean ** exponent, for exponents from 0 to below 1, the scales with the least error of all
  that the readers give; their largest times their least is 1.

  Args:
    mean: absolute value of each input, over tokens.
    channel: which scale each input has.

  Source: Lin et al., arXiv:2306.00978, equations 4 and 5.
  """
  mean = _by_channel(mean, channel, jnp.mean)
  most = jnp.max(mean)
  mean = jnp.maximum(mean / jnp.where(most > 0, most, 1), _LEAST)
  tried = []
  for i in range(_TRIED):
    scales = mean ** (i / _TRIED)
    scales /= jnp.sqrt(jnp.max(scales) * jnp.min(scales))
    each = scales[channel]
    total = sum(_scaled_error(r.w, r.gram, each, format=r.format) for r in readers)
    tried.append((float(total), scales))
  return min(tried, key=lambda one: one[0])[1]


def smooth_scales(
  readers: Sequence[Array], largest: Float[Array, "I"], channel: Int[np.ndarray, "I"],
  strength: float,
) -> Float[Array, "c"]:  # fmt: skip
  """Scales that give to the readers' weights a share of the range of what they read.

  Args:
    readers: matrices (I, O).
    largest: absolute value of each input, over tokens.
    channel: which scale each input has.
    strength: the share, from 0 to 1: the paper's alpha.

  Source: Xiao et al., arXiv:2211.10438, equation 4. A channel without any input or weight keeps
  its scale.
  """
  read = _by_channel(largest, channel, jnp.max)
  weights = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(w), axis=1) for w in readers))
  weights = _by_channel(weights, channel, jnp.max)
  there = (read > 0) & (weights > 0)
  scales = read**strength / jnp.where(there, weights, 1) ** (1 - strength)
  return jnp.where(there, scales, 1)


def _by_channel(values: Array, channel: Int[np.ndarray, "I"], join) -> Array:
  """What the inputs of each channel have together: they are equally many."""
  order = np.argsort(channel, kind="stable").reshape(int(channel.max()) + 1, -1)
  return join(values[order], axis=1)


@functools.partial(jax.jit, static_argnames="format")
def _scaled_error(w, gram, each, *, format: Format):
  values = quantize(w * each[:, None], format).dequantize() / each[:, None]
  return error(w, values, gram)
