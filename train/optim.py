"""Optimizers that see each layer's matrix as the matrix that it is, and the axes of their state.

A leaf of the parameters may stack the matrices of many layers and experts, and a matrix may have
several input or output axes. AdamW, Lion and SGD work element by element, so this does not matter
to them; Adafactor and Muon are mapped over the stacked axes, and the result is that of optax on
separate two-dimensional matrices.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey, GetAttrKey, tree_flatten_with_path, tree_map_with_path
from jaxtyping import Array, Bool, Float, Int, PyTree

from model.layers import ParamInfo
from train.blockwise import in_8_bits, scale_axes
from train.config import OptimizerConfig
from train.schedules import make_schedule

MIN_FACTORED = 128  # Adafactor factors matrices of at least this many rows and columns (optax).
MUON_RMS = 0.2  # Rms of Muon's updates, that of AdamW's: Liu et al., arXiv:2502.16982, section 2.2.
MUON_ADAM_B1 = 0.9  # Momentum of what is no matrix under Muon.
SPIKE_MEMORY = 50  # Updates over which the mean gradient norm runs.
SPIKE_WARMUP = 20  # Updates before the first that may be skipped.
_SHARED = ("count", "ns_coeffs")  # Fields of optax's states that are the same for all matrices.

# (what a leaf is, the shape of one layer's part of it) -> the optimizer of that part.
LayerOptimizer = Callable[[ParamInfo, tuple[int, ...]], optax.GradientTransformation]


class SpikeState(NamedTuple):
  """The running mean of the gradient norm, over how many it runs, and the updates skipped."""

  seen: Int[Array, ""]
  mean: Float[Array, ""]
  skipped: Int[Array, ""]


class OptimizerState(NamedTuple):
  """State of `make_optimizer`; `spikes` is () where no update is skipped."""

  inner: optax.OptState
  spikes: SpikeState | tuple[()]


def make_optimizer(
  config: OptimizerConfig, steps: int, info: dict, *, ratio: float | None = None
) -> optax.GradientTransformationExtraArgs:
  """The optimizer of a run of `steps` steps, for parameters described by the ParamInfo in `info`.

  `update(grads, state, params, step=…)` needs the step of the run, so that the learning rate is
  `make_schedule(config, steps)(step)` also after steps that were skipped. One update, in order:
  the spike test, clipping by the global norm, the optimizer, decay of matrices and embeddings by
  `weight_decay`, and the learning rate, which scales the decay too.

  Moments and updates are at least float32: bfloat16 parameters are widened first, and
  `optax.apply_updates` rounds each new parameter once. Float64 stays float64.

  `ratio` is the learning rate of LoRA's B by that of all else (LoRA+); embeddings have one rate.

  Raises:
    InputError: if warm-up or decay do not fit into `steps`.
  """
  schedule = make_schedule(config, steps)
  direction = _direction(config, info)
  factor = config.skip_spikes
  faster = 1.0 if ratio is None else ratio

  def init(params: PyTree) -> OptimizerState:
    wide = _widened(params)
    spikes = () if factor is None else _no_spikes(wide)
    return OptimizerState(direction.init(wide), spikes)

  def update(updates, state, params=None, *, step):
    grads, params = _widened(updates), _widened(params)
    moves, inner = direction.update(grads, state.inner, params)
    rate = schedule(step)
    of = lambda path: rate * faster if _is_lora_b(path) else rate
    scaled = lambda path, u: -jnp.asarray(of(path), u.dtype) * u
    updates = tree_map_with_path(scaled, moves)
    if factor is None:
      return updates, OptimizerState(inner, ())
    take, spikes = _judged(optax.tree.norm(grads), state.spikes, factor)
    updates = jax.tree.map(lambda u: jnp.where(take, u, jnp.zeros_like(u)), updates)
    inner = jax.tree.map(functools.partial(jnp.where, take), inner, state.inner)
    return updates, OptimizerState(inner, spikes)

  return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _is_lora_b(path: tuple) -> bool:
  names = [key.key for key in path if isinstance(key, DictKey)]
  return names[-2:] == ["adapter", "b"] and not str(names[-3]).endswith("embed")


def skipped_steps(state: OptimizerState) -> Int[Array, ""]:
  """How many updates were skipped because their gradient norm was a spike."""
  return state.spikes.skipped if isinstance(state.spikes, SpikeState) else jnp.zeros((), jnp.int32)


def state_axes(tx: optax.GradientTransformation, params: PyTree, info: dict) -> PyTree:
  """Logical axes of each leaf of `tx.init(params)`, as tuples at the leaves of the same structure.

  `params` may be abstract. Moments have the axes of their parameter, also as 8-bit codes; so
  have the scales of these, but for the one that is cut into blocks. A factored statistic keeps the
  stacked axes and the name of the matrix's rows or columns; where these are several axes in one,
  the name is that of the first, by which the product can be divided too. (Only `kv_heads` is
  dropped then: a mesh may replicate them.) All else, counters and placeholders, has no names.
  """
  state = jax.eval_shape(tx.init, params)
  shapes = {path: leaf.shape for path, leaf in tree_flatten_with_path(params)[0]}
  infos = dict(tree_flatten_with_path(info)[0])

  def axes(path, leaf) -> tuple[str | None, ...]:
    owner = _owner(path, infos)
    field = next((k.name for k in reversed(path) if isinstance(k, GetAttrKey)), "")
    if owner is None or field in _SHARED:
      return (None,) * leaf.ndim
    if field == "scale":
      return scale_axes(infos[owner], shapes[owner])
    if leaf.shape == shapes[owner]:
      return infos[owner].axes
    return _factored_axes(field, leaf.shape, infos[owner], shapes[owner])

  return tree_map_with_path(axes, state)


def _owner(path: tuple, infos: dict[tuple, ParamInfo]) -> tuple | None:
  """The longest part of a path in the optimizer's state that is the path of a parameter."""
  spans = itertools.combinations(range(len(path) + 1), 2)
  found = [path[a:b] for a, b in spans if isinstance(path[a], DictKey) and path[a:b] in infos]
  return max(found, key=len, default=None)


def _factored_axes(
  field: str, shape: tuple[int, ...], info: ParamInfo, param_shape: tuple[int, ...]
) -> tuple[str | None, ...]:
  """Axes of Adafactor's v_row and v_col: v_row belongs to the shorter side, or to the rows."""
  stacked = _stacked_axes(info)
  if shape[stacked:] == (1,):  # The placeholder of a statistic that is not kept.
    return (*info.axes[:stacked], None)
  rows, columns = _matrix_shape(info, param_shape[stacked:])
  of_rows = (field == "v_row") == (rows <= columns)
  split = stacked + info.inputs
  first, *merged = info.axes[stacked:split] if of_rows else info.axes[split:]
  return (*info.axes[:stacked], None if merged and first == "kv_heads" else first)


def _direction(config: OptimizerConfig, info: dict) -> optax.GradientTransformation:
  """From gradients to what is subtracted, but for the learning rate."""
  stages = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
  stages.append(_preconditioner(config, info))
  if config.weight_decay:
    decays = jax.tree.map(lambda i: i.role != "vector", info)
    stages.append(optax.add_decayed_weights(config.weight_decay, decays))
  return optax.chain(*stages)


def _preconditioner(config: OptimizerConfig, info: dict) -> optax.GradientTransformation:
  m = config.moments()
  narrow = lambda tx: in_8_bits(tx, info) if config.state_bits == 8 else tx
  if config.name == "adamw":
    return narrow(_adam(m["b1"], m["b2"], m["eps"]))
  if config.name == "lion":
    return narrow(optax.scale_by_lion(m["b1"], m["b2"]))
  if config.name == "sgd":
    return optax.trace(m["b1"]) if m["b1"] else optax.identity()
  if config.name == "adafactor":
    return _by_layer(functools.partial(_adafactor, eps=m["eps"]), info)
  return _by_layer(functools.partial(_muon, beta=m["b1"], b2=m["b2"], eps=m["eps"]), info)


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """optax.scale_by_adam, whose moves are read off the new moments.

  Otherwise XLA computes them from the old ones once more, of which it then keeps copies on a CPU
  because the new moments are written over them.
  """
  plain = optax.scale_by_adam(b1, b2, eps)

  def update(updates, state, params=None):
    new: Any = plain.update(updates, state, params)[1]
    mu, nu = jax.lax.optimization_barrier((new.mu, new.nu))
    means = optax.tree.bias_correction(mu, b1, new.count)
    squares = optax.tree.bias_correction(nu, b2, new.count)
    moves = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), means, squares)
    return moves, new._replace(mu=mu, nu=nu)

  return optax.GradientTransformation(plain.init, update)


def _adafactor(
  info: ParamInfo, shape: tuple[int, ...], *, eps: float
) -> optax.GradientTransformation:
  """Shazeer & Stern, arXiv:1804.04235, without momentum, as optax composes it.

  A matrix too small to be factored keeps its own axes, because the result is the same.
  """
  matrix = _matrix_shape(info, shape)
  factored = min(matrix) >= MIN_FACTORED
  tx = optax.chain(
    optax.scale_by_factored_rms(factored, min_dim_size_to_factor=MIN_FACTORED, epsilon=eps),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(),
  )
  return _reshaped(tx, matrix, shape) if factored else tx


def _muon(
  info: ParamInfo, shape: tuple[int, ...], *, beta: float, b2: float, eps: float
) -> optax.GradientTransformation:
  """Muon for matrices of the body, AdamW for embeddings, heads and vectors.

  Updates are scaled by 0.2·√max(rows, columns), so that AdamW's learning rate and weight decay
  serve both (Liu et al., arXiv:2502.16982).
  """
  matrix = _matrix_shape(info, shape)
  if info.role != "matrix" or "vocab" in info.axes or 1 in matrix:
    return _adam(MUON_ADAM_B1, b2, eps)
  axes = tuple(range(len(shape)))
  sides = optax.contrib.MuonDimensionNumbers(axes[: info.inputs], axes[info.inputs :])
  return optax.chain(
    optax.contrib.scale_by_muon(beta=beta, eps=eps, weight_dimension_numbers=sides),
    optax.scale(MUON_RMS * math.sqrt(max(matrix))),
  )


def _by_layer(make: LayerOptimizer, info: dict) -> optax.GradientTransformation:
  """Maps the optimizer of one layer's part of a leaf over its layers and experts.

  The state has the structure of the parameters with an optimizer state at each leaf: that of one
  part with the stacked axes in front, except that counters are shared.
  """

  def over_stack(leaf_info: ParamInfo, param: Array):
    stacked = _stacked_axes(leaf_info)
    shape = param.shape[stacked:]
    tx = make(leaf_info, shape)
    state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(shape, param.dtype))
    where = tree_map_with_path(lambda path, _: None if path[-1].name in _SHARED else 0, state)
    init, update = tx.init, tx.update
    for _ in range(stacked):
      init = jax.vmap(init, out_axes=where)
      update = jax.vmap(update, in_axes=(0, where, 0), out_axes=(0, where))
    return init, update

  def init(params):
    return jax.tree.map(lambda i, p: over_stack(i, p)[0](p), info, params)

  def update(updates, state, params=None):
    leaves, tree = jax.tree.flatten(updates)
    parts = zip(
      tree.flatten_up_to(info), leaves, tree.flatten_up_to(state), tree.flatten_up_to(params),
      strict=True,
    )  # fmt: skip
    done = [over_stack(i, p)[1](u, s, p) for i, u, s, p in parts]
    return tree.unflatten([u for u, _ in done]), tree.unflatten([s for _, s in done])

  return optax.GradientTransformation(init, update)


def _reshaped(
  tx: optax.GradientTransformation, matrix: tuple[int, int], shape: tuple[int, ...]
) -> optax.GradientTransformation:
  """`tx` on an array of `shape`, seen by it as a matrix."""
  seen = lambda array: jax.tree.map(lambda x: x.reshape(matrix), array)

  def init(params):
    return tx.init(seen(params))

  def update(updates, state, params=None):
    updates, state = tx.update(seen(updates), state, seen(params))
    return jax.tree.map(lambda u: u.reshape(shape), updates), state

  return optax.GradientTransformation(init, update)


def _stacked_axes(info: ParamInfo) -> int:
  """How many leading axes stack separate matrices or vectors: layers, experts."""
  leading = list(itertools.takewhile(lambda axis: axis in ("layers", "expert"), info.axes))
  numbers = len(leading) == len(info.axes) and "expert" in leading
  return len(leading) - numbers  # One number per expert is a vector over experts.


def _matrix_shape(info: ParamInfo, shape: tuple[int, ...]) -> tuple[int, int]:
  """(rows, columns) of one layer's matrix of `shape`; a vector is a single row."""
  inputs = 0 if info.role == "vector" else info.inputs
  return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def _widened(tree: PyTree) -> PyTree:
  """Arrays in at least float32."""
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _no_spikes(params: Any) -> SpikeState:
  zero = jnp.zeros((), jnp.int32)
  return SpikeState(zero, jnp.zeros((), jnp.result_type(*jax.tree.leaves(params))), zero)


def _judged(
  norm: Float[Array, ""], state: SpikeState, factor: float
) -> tuple[Bool[Array, ""], SpikeState]:
  """Whether to take an update of this gradient norm, and the mean that includes it.

  A spike enters the mean as the largest norm that would not have been one, so that a lasting
  change of scale is followed instead of skipped for ever. A norm that is not finite is never taken
  and leaves the state as it is: it is the training step that counts those.
  """
  finite, warm = jnp.isfinite(norm), state.seen >= SPIKE_WARMUP
  limit = factor * state.mean
  spike = finite & warm & (norm > limit)
  rate = jnp.maximum(1.0 / (state.seen + 1), 1.0 / SPIKE_MEMORY).astype(norm.dtype)
  mean = state.mean + rate * (jnp.where(spike, limit, norm) - state.mean)
  seen, mean = state.seen + finite, jnp.where(finite, mean, state.mean)
  return finite & ~spike, SpikeState(seen, mean, state.skipped + spike)
