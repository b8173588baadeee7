"""One optimizer step and one evaluation step, as pure functions of state and batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from train.objectives.loss import Loss, Mean
from train.optim import skipped_steps

Batch = dict[str, Array]
# loss_fn(params, frozen, batch, key) -> Loss. Sums, not means: see `make_train_step`.
LossFn = Callable[[dict, dict, Batch, Array | None], Loss]
# weigh(batch) -> what each term of the loss is divided by.
Weigh = Callable[[Batch], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Aware:
  """What steps learn through from step `start` on: the loss at rounded parameters."""

  loss_fn: LossFn
  rounded: Callable[[dict], dict]  # params -> params of the same shapes and dtypes.
  start: int

  def __call__(self, params: dict, frozen: dict, batch: Batch, key: Array | None) -> Loss:
    return self.loss_fn(self.rounded(params), frozen, batch, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step reads and writes, and all that a checkpoint holds."""

  step: Int[Array, ""]  # Steps done so far.
  params: dict  # What is trained.
  frozen: dict  # The rest of the model: {} unless an adapter is trained.
  opt_state: optax.OptState
  ema: dict  # {} unless asked for; at least in float32.
  bad_steps: Int[Array, ""]  # Non-finite steps in a row.


def init_state(params: dict, frozen: dict, tx: optax.GradientTransformation, *, ema: bool):
  """The state before the first step."""
  zero = jnp.zeros((), jnp.int32)
  average = first_average(params) if ema else {}
  return TrainState(zero, params, frozen, tx.init(params), average, zero)


def first_average(params: dict) -> dict:
  """A copy of the parameters, at least in float32: a narrower one would round its steps away."""
  return jax.tree.map(lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32)), params)


def make_train_step(
  loss_fn: LossFn,
  weigh: Weigh,
  tx: optax.GradientTransformationExtraArgs,
  schedule: optax.Schedule,
  *,
  seed: int,
  accumulation: int,
  ema_decay: float | None,
  random: bool,
  aware: Aware | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """Returns (state, batch) -> (state, metrics), to be jitted with the state donated.

  The gradient is that of the sum over terms of (sum of a term) / (its weight in the global batch),
  whatever the number of parts, devices or padded tokens. A step whose loss or gradient is not
  finite changes nothing but the counters. With `aware` it is the gradient at rounded parameters,
  which are rounded once a step, and it is applied to those of the state.
  """

  gradients = _gradients(loss_fn, weigh, accumulation, aware)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(jax.random.key(seed), state.step) if random else None
    weights = _positive(weigh(batch))
    grads, loss, value = gradients(state, batch, key, weights)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    # Selecting between the old and the new state instead would read and write both once more.
    update = functools.partial(_updated, tx=tx, ema_decay=ema_decay)
    new = jax.lax.cond(finite, update, lambda state, grads: state, state, grads)
    new = dataclasses.replace(
      new, step=state.step + 1, bad_steps=jnp.where(finite, 0, state.bad_steps + 1)
    )
    metrics = _metrics(loss)
    metrics |= dict(
      minimized=value, grad_norm=grad_norm, learning_rate=jnp.asarray(schedule(state.step)),
      bad_steps=new.bad_steps, skipped_steps=skipped_steps(new.opt_state),
    )  # fmt: skip
    return new, metrics

  return train_step


def make_eval_step(loss_fn: LossFn) -> Callable[[dict, dict, Batch], dict[str, Mean]]:
  """Returns (params, frozen, batch) -> (sum, weight) of each mean that is reported."""

  def eval_step(params: dict, frozen: dict, batch: Batch) -> dict[str, Mean]:
    return loss_fn(params, frozen, batch, None).means

  return eval_step


def _gradients(
  loss_fn: LossFn, weigh: Weigh, accumulation: int, aware: Aware | None
) -> Callable[..., tuple[dict, Loss, Array]]:
  """Returns (state, batch, key, weights) -> (gradient, loss, what is minimized)."""

  def of(loss_fn: LossFn, state: TrainState, batch: Batch, key, weights):
    def total(params, frozen, batch, key, weights):
      loss, parts = loss_fn(params, frozen, batch, key), weigh(batch)
      first = next(iter(weights))
      value = sum(loss.terms[name] / weights[name] for name in weights)
      return value + loss.penalty * parts[first] / weights[first], loss

    gradient = jax.value_and_grad(total, has_aux=True)
    return _accumulated(gradient, state, batch, key, weights, accumulation)

  plain = functools.partial(of, loss_fn)
  if aware is None:
    return plain

  def rounded(state: TrainState, *inputs):
    return of(
      aware.loss_fn, dataclasses.replace(state, params=aware.rounded(state.params)), *inputs
    )

  if aware.start == 0:
    return rounded
  return lambda state, *inputs: jax.lax.cond(
    state.step >= aware.start, rounded, plain, state, *inputs
  )


def _metrics(loss: Loss) -> dict[str, Array]:
  """What a step reports of its loss."""
  return {
    **{name: total / jnp.where(w > 0, w, 1) for name, (total, w) in loss.means.items()},
    "target_tokens": loss.means["loss"][1],
    **{f"tokens.{name}": n for name, n in loss.tokens.items()},
    **{f"pairs.{name}": n for name, n in loss.pairs.items()},
  }


def _positive(weights: dict[str, Array]) -> dict[str, Array]:
  """The weights, 1 in the place of 0: a batch without targets has a loss of 0."""
  return {name: jnp.where(w > 0, w, 1) for name, w in weights.items()}


def _updated(
  state: TrainState, grads: dict, *, tx: optax.GradientTransformationExtraArgs,
  ema_decay: float | None,
) -> TrainState:  # fmt: skip
  updates, opt_state = tx.update(grads, state.opt_state, state.params, step=state.step)
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if ema_decay is not None:
    wide = jax.tree.map(lambda p, average: p.astype(average.dtype), params, state.ema)
    ema = optax.incremental_update(wide, state.ema, 1.0 - ema_decay)
  return dataclasses.replace(state, params=params, opt_state=opt_state, ema=ema)


def _accumulated(
  gradient: Callable, state: TrainState, batch: Batch, key: Array | None,
  weights: dict[str, Array], parts: int,
) -> tuple[dict, Loss, Array]:  # fmt: skip
  """Sums of gradients, losses and values over `parts` equal parts, one after the other."""
  if parts == 1:
    (value, loss), grads = gradient(state.params, state.frozen, batch, key, weights)
    return grads, loss, value

  def split(rows: Any) -> Any:
    # Part i takes rows i, i + parts, …: each device's rows stay on it.
    return jnp.moveaxis(rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]), 1, 0)

  def add(sums, part):
    batch, index = part
    part_key = None if key is None else jax.random.fold_in(key, index)
    (value, loss), grads = gradient(state.params, state.frozen, batch, part_key, weights)
    return jax.tree.map(jnp.add, sums, (grads, loss, value)), None

  split_batch = jax.tree.map(split, batch)
  first = jax.tree.map(lambda rows: rows[0], split_batch)
  (value, loss), grads = jax.eval_shape(gradient, state.params, state.frozen, first, key, weights)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (grads, loss, value))
  sums, _ = jax.lax.scan(add, zeros, (split_batch, jnp.arange(parts)))
  return sums
