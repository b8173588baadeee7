"""GPTQ: a matrix is rounded input by input, and the inputs that follow make good for each error.

Source: Frantar et al., arXiv:2210.17323, algorithm 1; inputs by activations and scales that stay as
in the authors' code.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from infer.calibrate.grid import Grid, nearest

DAMPING = 0.01
_BLOCK = 128  # Inputs that are rounded before the rest of the matrix follows.
_MOST_DAMPING = 1.0


def gptq(
  w: Float[Array, "I O"], gram: Float[Array, "I I"], kind: str, grid: Grid, *,
  damping: float = DAMPING, ordered: bool = True,
) -> Float[Array, "I O"]:  # fmt: skip
  """Values of a format near `w` by which the outputs change little.

  An input that calibration never met is rounded to the nearest value, and nothing makes good for
  its errors.

  Args:
    w: the matrix; outputs are x · w.
    gram: xᵀx of what it reads, summed over tokens.
    kind: of `grid.nearest`.
    grid: of `grid.grid_of`, which stays as it is.
    damping: share of the mean of gram's diagonal that is added to it. Where that leaves it singular
      in its precision, ten times as much is tried, up to the mean itself.
    ordered: inputs that matter most first; otherwise as they come.

  Raises:
    ValueError: if gram is not finite, or singular under the most damping.
  """
  while True:
    values = _gptq(w, gram, grid, damping, kind=kind, ordered=ordered)
    if bool(jnp.all(jnp.isfinite(values))):
      return values
    if damping >= _MOST_DAMPING or not bool(jnp.all(jnp.isfinite(gram))):
      raise ValueError("the products of what a matrix reads are singular, or not finite.")
    damping = min(_MOST_DAMPING, 10 * max(damping, 1e-4))


def inverse_factor(gram: Float[Array, "I I"], damping: Any) -> Float[Array, "I I"]:
  """The upper triangular U with UᵀU the inverse of the damped matrix; inputs with zeros on the
  diagonal stand alone.
  """
  diagonal = jnp.diagonal(gram)
  alive = diagonal > 0
  mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(alive), 1)
  added = jnp.where(alive, damping * mean, 1.0)
  # R of H = R Rᵀ is upper triangular where Cholesky's factor of H turned around is lower.
  turned = jnp.linalg.cholesky((gram + jnp.diag(added))[::-1, ::-1])[::-1, ::-1]
  identity = jnp.eye(len(gram), dtype=gram.dtype)
  return jax.scipy.linalg.solve_triangular(turned, identity, lower=False)


@functools.partial(jax.jit, static_argnames=("kind", "ordered"))
def _gptq(w, gram, grid: Grid, damping, *, kind: str, ordered: bool):
  inputs, group = len(w), len(w) // len(grid[0])
  gram = gram.astype(w.dtype)
  order = jnp.argsort(-jnp.diagonal(gram), stable=True) if ordered else jnp.arange(inputs)
  factor = inverse_factor(gram[order][:, order], damping)
  block = max(n for n in range(1, _BLOCK + 1) if inputs % n == 0)

  def one_block(i, carry):
    w, values = carry
    start = i * block
    part = lambda a: jax.lax.dynamic_slice_in_dim(a, start, block)
    rows = part(factor)
    here = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
    groups = part(order) // group
    rounded, errors = _rounded(part(w), here, [a[groups] for a in grid], kind)
    # Inputs that are done change too, and are read no more.
    w = w - jnp.matmul(rows.T, errors, precision="highest")
    return w, jax.lax.dynamic_update_slice_in_dim(values, rounded, start, 0)

  start = (w[order], jnp.zeros_like(w))
  values = jax.lax.fori_loop(0, inputs // block, one_block, start)[1]
  return jnp.zeros_like(w).at[order].set(values)


def _rounded(w, factor, grid, kind: str):
  """A block's weights (b, O), each rounded after those before it -> (values, scaled errors)."""

  def one_input(i, carry):
    w, values, errors = carry
    value = nearest(kind, w[i], *(a[i] for a in grid))
    error = (w[i] - value) / factor[i, i]
    return w - factor[i][:, None] * error, values.at[i].set(value), errors.at[i].set(error)

  zeros = jnp.zeros_like(w)
  return jax.lax.fori_loop(0, len(w), one_input, (w, zeros, zeros))[1:]
