"""A pipeline over the mesh axis `stage`: each stage holds some of the layers and works on
micro-batches, one after the other, which move on to the next stage after each tick.

The schedule is the circular one of praxis and MaxText, written as GSPMD wants it (Xu et al.,
arXiv:2105.04663, section 3.3): what the stages hold is a buffer with a leading stage axis, a tick
maps the layers of a stage over it, and moving the buffer on by one is a collective permute.
Differentiating the scan over ticks runs the same pipeline backwards. With one round this is GPipe's
schedule (arXiv:1811.06965); with more, each stage holds several runs of layers, as in Megatron's
interleaved one (arXiv:2104.04473), and a micro-batch goes round as often.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.errors import InputError
from model.sharding import constrain, mesh_parts, shown_axes

AXIS = "stage"
_MOST = 4  # Micro-batches for each stage, where the config does not say how many.

# stage(layers, x, where, round, micro-batch) -> (x, sums): a run of layers on one micro-batch. Of
# `layers` the second axis is that of rounds (`of_round`).
Stage = Callable[[Any, Array, Any, Int[Array, ""], Int[Array, ""]], tuple[Array, Any]]
Policy = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Who works on what: stage s does the n-th piece of work, micro-batch n mod `parts` in round
  n // `parts`, at tick n + s.
  """

  stages: int
  rounds: int  # Runs of layers that a stage holds.
  parts: int  # Micro-batches, a multiple of the stages.

  @property
  def ticks(self) -> int:
    """Length of the schedule."""
    return self.rounds * self.parts + self.stages - 1

  @property
  def bubble(self) -> float:
    """Share of the ticks in which a stage has nothing to do."""
    return (self.stages - 1) / self.ticks

  @property
  def held(self) -> int:
    """Micro-batches that each stage keeps of those that wait and those that are done."""
    return self.parts // self.stages


def check_pipeline(cfg: ModelConfig, mesh: Mesh, rows: int) -> None:
  """Raises an InputError if `mesh.stage` cannot split the layers and `rows` sequences, or if a
  setting of the pipeline has no effect.
  """
  stages, rounds = mesh.shape[AXIS], cfg.stage_rounds
  if stages == 1:
    for name, value, unset in (("micro_batches", cfg.micro_batches, None),
                               ("stage_rounds", rounds, 1)):  # fmt: skip
      if value != unset:
        raise InputError(
          f"model.{name}={value} has no effect with mesh.stage=1: leave it out, or set mesh.stage."
        )
    return
  if cfg.layer_sets is not None:
    raise InputError(
      f"mesh.stage={stages} splits layers, and model.layer_sets={cfg.layer_sets} shares parameters "
      "among them: use mesh.fsdp or mesh.tensor in the place of mesh.stage."
    )
  for stack in cfg.stacks:
    for pattern, repeats in cfg.groups(stack):
      if repeats % (stages * rounds):
        raise InputError(_uneven(cfg, stack, len(pattern), repeats, stages))
  _check_parts(cfg, mesh, rows)


def _uneven(cfg: ModelConfig, stack: str, pattern: int, repeats: int, stages: int) -> str:
  whole = f"mesh.stage={stages}"
  if cfg.stage_rounds > 1:
    whole += f" x model.stage_rounds={cfg.stage_rounds}"
  rest = "" if len(cfg.groups(stack)) == 1 else (
    " Layers of model.layer_prefix, and those behind the last whole repeat of a pattern, have no "
    "stage: a pipeline takes whole repeats only."
  )  # fmt: skip
  layers = f"{pattern} layer{'s' if pattern > 1 else ''}"
  times = f"{repeats} repeat{'s' if repeats > 1 else ''}"
  return (
    f"the {stack} has {cfg.depth(stack)} layers, among them {times} of {layers}, which is not a "
    f"multiple of {whole}.{rest} Change the number of layers, model.layer_pattern or mesh.stage."
  )


def _check_parts(cfg: ModelConfig, mesh: Mesh, rows: int) -> None:
  stages, own = mesh.shape[AXIS], rows // mesh_parts("batch", mesh)
  if cfg.micro_batches is not None and cfg.micro_batches % stages:
    raise InputError(
      f"model.micro_batches={cfg.micro_batches} is not a multiple of mesh.stage={stages}: each "
      "stage keeps as many of them."
    )
  if plan(cfg, mesh, rows) is None:
    number = cfg.micro_batches or stages
    wanted = f"model.micro_batches={number}" if cfg.micro_batches else f"mesh.stage={stages}"
    over = shown_axes("batch", mesh)
    share = f"a part of {rows} sequences leaves {own} to each share of {over}" if over else (
      f"a part of the batch has {own} sequences"
    )  # fmt: skip
    raise InputError(
      f"{share}, which cannot be cut into {wanted} micro-batches or a multiple of it: change "
      "batch_size, accumulation or the mesh."
    )


def plan(cfg: ModelConfig, mesh: Mesh | AbstractMesh, rows: int) -> Plan | None:
  """The schedule for `rows` sequences on `mesh`; None without stages, or if rows do not divide."""
  stages = mesh.shape.get(AXIS, 1)
  own, rest = divmod(rows, mesh_parts("batch", mesh))
  if stages == 1 or rest:
    return None
  if cfg.micro_batches is not None:
    fitting = [cfg.micro_batches]
  else:
    fitting = [n * stages for n in range(_MOST, 0, -1)]
  parts = next((n for n in fitting if own % n == 0 and n % stages == 0), None)
  return None if parts is None else Plan(stages, cfg.stage_rounds, parts)


def current_plan(cfg: ModelConfig, rows: int) -> Plan | None:
  """`plan` on the mesh in use."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else plan(cfg, mesh, rows)


def pipelined(
  stage: Stage, layers: Any, x: Float[Array, "B T D"], where: Any, plan: Plan
) -> tuple[Float[Array, "B T D"], Any]:
  """Runs all layers on all rows; returns (x, what `stage` sums, over all micro-batches).

  Args:
    stage: what a stage does; the leading axis of `layers` and of its sums counts the layers.
    layers: arrays with a leading axis of all layers (or repeats of their pattern).
    where: arrays (B, T, …) that a micro-batch takes along.
  """
  run = jax.vmap(stage, spmd_axis_name=AXIS)
  chunks = jax.tree.map(lambda a: _chunks(a, plan), layers)
  stream = jax.tree.map(lambda a: _stream(a, plan), (x, where))
  first = jax.tree.map(lambda a: a[:, 0], stream)  # Any rows will do: nobody reads what they give.
  numbers = jnp.zeros(plan.stages, jnp.int32)
  shapes = jax.eval_shape(run, chunks, *first, numbers, numbers)[1]
  sums = jax.tree.map(lambda a: jnp.zeros((plan.rounds, *a.shape), a.dtype), shapes)
  waiting = plan.parts - plan.stages + 1
  ring = jax.tree.map(lambda a: jnp.repeat(a[:, None], waiting, 1), first)

  def tick(carry, t):
    moved, stream, ring, sums = carry
    moved = jax.tree.map(lambda a: jnp.roll(a, 1, axis=0), moved)
    enters = _slot(stream, t % plan.held)
    if plan.rounds > 1:  # What has gone round waits for its turn at the first stage.
      ring = _put(ring, moved, t % waiting)
      back = _slot(ring, (t + 1) % waiting)
      enters = jax.tree.map(lambda new, old: jnp.where(t < plan.parts, new, old), enters, back)
    x, where = jax.tree.map(lambda a, b: _split(_at(0, a, b)), enters, moved)
    number = t - jnp.arange(plan.stages)
    turn = jnp.clip(number // plan.parts, 0, plan.rounds - 1)
    x, more = run(chunks, x, where, turn, number % plan.parts)
    busy = (number >= 0) & (number < plan.rounds * plan.parts)
    busy &= turn == jnp.arange(plan.rounds)[:, None]
    sums = jax.tree.map(lambda all, new: all + _only(busy, new), sums, more)
    left = (_split(x), where)
    return (left, _moved_on(stream, left, t % plan.held), ring, sums), None

  carry = (first, stream, ring if plan.rounds > 1 else None, sums)
  (_, (done, _), _, sums), _ = jax.lax.scan(tick, carry, jnp.arange(plan.ticks))
  return _rows(done, plan), jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), sums)


def of_round(layers: Any, turn: Int[Array, ""]) -> Any:
  """The layers of round `turn`, of those of all rounds, which lie on the leading axis.

  To be called inside what jax.checkpoint repeats: kept for the backward pass of each tick, what is
  taken here would be all parameters, as often as there are micro-batches.
  """
  take = lambda a: a[0] if len(a) == 1 else jax.lax.dynamic_index_in_dim(a, turn, 0, False)
  return jax.tree.map(take, layers)


def stage_policy(policy: Policy) -> Policy:
  """A policy of jax.checkpoint for layers that are mapped over stages: it does not see the batch
  axis that products have from that.
  """

  def seen(primitive, *args, **params):
    if primitive.name == "dot_general":
      contracted, (left, right) = params["dimension_numbers"]
      params |= {"dimension_numbers": (contracted, (left[1:], right[1:]))}
    return policy(primitive, *args, **params)

  return seen


def _chunks(a: Array, plan: Plan) -> Array:
  """(layers, …) -> (stages, layers of a stage and round, rounds, …)."""
  if plan.rounds > 1:
    exchange = functools.partial(_exchanged, plan)
    a = jax.shard_map(exchange, in_specs=P(AXIS), out_specs=P(AXIS), axis_names={AXIS})(a)
  a = a.reshape(plan.stages, plan.rounds, -1, *a.shape[1:])
  free = (P.UNCONSTRAINED,) * (a.ndim - 3)
  a = jax.lax.with_sharding_constraint(a, P(AXIS, None, None, *free))
  return jnp.moveaxis(a, 1, 2)


def _exchanged(plan: Plan, a: Array) -> Array:
  """On each stage: of layers in their order, one run behind the other, those that it works on.

  Of R rounds and S stages, stage s holds the runs sR … sR + R − 1 and works on s, s + S, s + 2S, …
  Run c lies on stage c div R and belongs to stage c mod S. It takes R permutations; in the k-th,
  stage s sends its run k + ⌊s · gcd(R, S) / S⌋ mod R, and no two of these belong to one stage.
  """
  S, R = plan.stages, plan.rounds
  runs, me = a.reshape(R, -1, *a.shape[1:]), jax.lax.axis_index(AXIS)
  out, source = runs, np.arange(S)
  for k in range(R):
    own = (k + source * math.gcd(R, S) // S) % R
    target, place = (source * R + own) % S, (source * R + own) // S
    sent = jax.lax.dynamic_index_in_dim(runs, jnp.asarray(own)[me], 0, keepdims=False)
    got = jax.lax.ppermute(sent, AXIS, list(zip(source.tolist(), target.tolist(), strict=True)))
    put = jnp.asarray(place[np.argsort(target)])[me]
    out = jax.lax.dynamic_update_index_in_dim(out, got, put, 0)
  return out.reshape(a.shape)


def _stream(a: Array, plan: Plan) -> Array:
  """(B, T, …) -> (stages, micro-batches of a stage, rows, T, …): rows stay where they are."""
  shares = mesh_parts("batch", jax.sharding.get_abstract_mesh())
  a = constrain(a, ("rows", "seq", *(None,) * (a.ndim - 2)))
  a = a.reshape(shares, plan.stages, plan.held, -1, *a.shape[1:])
  a = jnp.moveaxis(a, 0, 2)
  a = a.reshape(*a.shape[:2], -1, *a.shape[4:])
  return constrain(a, ("layers", None, "batch", "seq", *(None,) * (a.ndim - 4)))


def _rows(a: Array, plan: Plan) -> Array:
  """The inverse of `_stream` for what the last stage has written there, `stages - 1` ticks late."""
  shares = mesh_parts("batch", jax.sharding.get_abstract_mesh())
  a = jnp.roll(a, 1 - plan.stages, axis=1)
  a = a.reshape(*a.shape[:2], shares, -1, *a.shape[3:])
  a = jnp.moveaxis(a, 2, 0)
  a = a.reshape(-1, *a.shape[4:])
  return constrain(a, ("rows", "seq", *(None,) * (a.ndim - 2)))


def _moved_on(stream: Any, left: Any, k: Array) -> Any:
  """The stream after a tick: slot k a stage further to the first, the last one's output behind."""
  last = left[0].shape[0] - 1
  slot = jax.tree.map(lambda a: jnp.roll(a, -1, axis=0), _slot(stream, k))
  return _put(stream, jax.tree.map(lambda a, b: _at(last, a, b), left, slot), k)


def _slot(buffer: Any, k: Array) -> Any:
  return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, k, 1, keepdims=False), buffer)


def _put(buffer: Any, values: Any, k: Array) -> Any:
  put = lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, k, 1)
  return jax.tree.map(put, buffer, values)


def _at(stage: int, a: Array, b: Array) -> Array:
  """`a` at one stage, `b` at the others."""
  here = jnp.arange(a.shape[0]) == stage
  return jnp.where(here.reshape(-1, *(1,) * (a.ndim - 1)), a, b)


def _split(a: Array) -> Array:
  """A buffer (stages, rows, T, …) on its devices."""
  return constrain(a, ("layers", "batch", "seq", *(None,) * (a.ndim - 3)))


def _only(busy: Array, a: Array) -> Array:
  """`a` (stages, …) where `busy` (rounds, stages) says so, 0 elsewhere."""
  return jnp.where(busy.reshape(*busy.shape, *(1,) * (a.ndim - 1)), a, jnp.zeros_like(a))
