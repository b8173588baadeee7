"""The compiled programs of a run, and the shapes and places of what they work on."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from model.compilation import wide_vectors
from model.config import ModelConfig
from model.context import check_lengths
from model.errors import InputError
from model.layers import param_info
from model.peft.attach import attached, together, with_dropout
from model.peft.create import adapter_maker
from model.peft.parts import Parts, parts_of
from model.peft.written import written_out
from model.pipeline import check_pipeline
from model.quant import Format
from model.sharding import batch_sharding, mesh_parts, platform, replicated, shardings, shown_axes
from train.aware import Rounding
from train.config import Config
from train.objectives import make_objective
from train.objectives.loss import Loss
from train.objectives.objective import Objective, batch_fields
from train.optim import make_optimizer, state_axes
from train.packed_base import packed_shardings, packing_of
from train.schedules import make_schedule
from train.step import (
  Aware,
  Batch,
  LossFn,
  TrainState,
  init_state,
  make_eval_step,
  make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Program:
  """What a run is made of. The compiled steps take the shapes they were compiled for, no others.

  Each is compiled, for the mesh in use, when it is first asked for: what is wrong with a run's
  checkpoint is known before, and a run without validation needs no evaluation step.
  """

  graphdef: nnx.GraphDef
  info: dict  # ParamInfo of each parameter.
  state: TrainState  # Abstract, with shardings.
  batch: dict[str, jax.ShapeDtypeStruct]  # Abstract and global, with shardings.
  init: Callable[[], TrainState]
  base: dict  # Parameters without adapters, abstract, with shardings.
  begin: Callable[[dict], TrainState]  # The first state, from parameters like `base`, donated.
  parts: Parts | None  # None: all parameters are trained.
  _train: jax.stages.Wrapped = dataclasses.field(repr=False)
  _evaluate: jax.stages.Wrapped = dataclasses.field(repr=False)

  @functools.cached_property
  def train_step(self) -> jax.stages.Compiled:
    """(state, batch) -> (state, metrics); the state is donated."""
    return _compiled(self._train.lower(self.state, self.batch))

  def tree(self, params: dict, frozen: dict) -> dict:
    """All parameters of the network."""
    return params if self.parts is None else self.parts.join(params, frozen)

  @functools.cached_property
  def eval_step(self) -> jax.stages.Compiled:
    """(params, frozen, batch) -> the Means of a batch."""
    return _compiled(self._evaluate.lower(self.state.params, self.state.frozen, self.batch))


def _compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """The program of a step for the mesh in use."""
  return lowered.compile(compiler_options=wide_vectors(platform()))


def build_program(config: Config, mesh: Mesh) -> Program:
  """Abstract shapes, then shardings, then the initialization and the steps.

  Raises:
    InputError: if the mesh does not divide the batch, a length or an axis of the model.
  """
  check_batch(config, mesh)
  check_experts(config, mesh)
  check_pipeline(config.model, mesh, config.batch_size // config.accumulation)
  check_lengths(config.model, mesh, config.seq_len, config.target_len)
  check_precision(config)
  objective = make_objective(config)
  net = nnx.eval_shape(lambda: objective.build(config.model, nnx.Rngs(0)))
  plain = nnx.to_pure_dict(nnx.state(net, nnx.Param))
  own = param_info(net)
  adapt, parts, net = adaptation(config, net, plain)
  pack = packing_of(config.peft, parts, plain, own)
  places = pack.placed(placed(plain, own, mesh), mesh)
  info = param_info(net)
  graphdef, _ = nnx.split(_as_read(config, net), nnx.Param)
  trained, rest = (info, {}) if parts is None else parts.kinds(info)
  ratio = config.peft.learning_rate_ratio
  tx = make_optimizer(config.optimizer, config.steps, trained, ratio=ratio)

  def begin(base: dict) -> TrainState:
    tree = adapt(base)
    params, frozen = (tree, {}) if parts is None else parts.split(tree)
    return init_state(params, frozen, tx, ema=config.ema_decay is not None)

  def draw() -> dict:
    fresh = objective.build(config.model, nnx.Rngs(params=jax.random.key(config.seed)))
    return pack(nnx.to_pure_dict(nnx.state(fresh, nnx.Param)))

  def init() -> TrainState:
    return begin(draw())

  shapes = jax.eval_shape(init)
  where = _state_shardings(shapes, trained, rest, tx, mesh)
  state = jax.tree.map(_placed, shapes, where)
  batch = _abstract_batch(config, objective, mesh)
  loss_fn = make_loss(graphdef, objective, parts, config.peft.dropout, model=config.model)
  aware = _aware(config, objective, info, where.params, shapes.params)
  model = config.model
  rates = (model.dropout, model.attention_dropout, model.mlp_dropout, config.peft.dropout)
  step = make_train_step(
    loss_fn, objective.weights, tx, make_schedule(config.optimizer, config.steps),
    seed=config.seed, accumulation=config.accumulation, ema_decay=config.ema_decay,
    random=max(rates) > 0 or objective.samples, aware=aware,
  )  # fmt: skip
  first = jax.jit(init, out_shardings=where)
  begun: Any = jax.jit(begin, donate_argnums=0, out_shardings=where)
  if parts is not None:
    # Apart: adapters that read weights would change how, and in which last bits, these are drawn.
    drawn = jax.jit(draw, out_shardings=jax.tree.map(lambda a: a.sharding, places))
    begun = parts.consuming(begin, out_shardings=where)
    first = lambda: begun(drawn())
  return Program(
    graphdef, info, state, batch, first, places, begun, parts,
    jax.jit(step, donate_argnums=0, out_shardings=(where, replicated(mesh))),
    jax.jit(make_eval_step(aware or loss_fn), out_shardings=replicated(mesh)),
  )  # fmt: skip


def adaptation(
  config: Config, net: nnx.Module, plain: dict
) -> tuple[Callable[[dict], dict], Parts | None, nnx.Module]:
  """(parameters -> those with adapters, what of them is trained, the network with adapters)."""
  if config.peft.trains_all:
    return lambda base: base, None, net
  make = adapter_maker(config.peft, config.model, net)

  def adapt(base: dict) -> dict:
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return together(base, make(base, key))

  net = attached(net, jax.eval_shape(adapt, plain))
  return adapt, parts_of(config.peft, config.model, net), net


def _as_read(config: Config, net: nnx.Module) -> nnx.Module:
  """The abstract network that a loss reads: with what networks write of virtual tokens."""
  if not config.peft.adds:
    return net
  shapes = nnx.to_pure_dict(nnx.state(net, nnx.Param))
  read = jax.eval_shape(lambda tree: written_out(tree, config.model), shapes)
  if jax.tree.structure(read) == jax.tree.structure(shapes):
    return net
  objective = make_objective(config)
  return attached(nnx.eval_shape(lambda: objective.build(config.model, nnx.Rngs(0))), read)


def make_loss(
  graphdef: nnx.GraphDef, objective: Objective, parts: Parts | None = None, dropout: float = 0.0,
  *, model: ModelConfig | None = None,
) -> LossFn:  # fmt: skip
  """The loss of an objective as a function of parameters and a batch.

  Args:
    parts: which parameters are trained; None: all.
    dropout: of what adapters read.
    model: of adapters that a network writes; None: there are none.
  """

  def loss(params: dict, frozen: dict, batch: Batch, key: Array | None) -> Loss:
    tree = params if parts is None else parts.join(params, frozen)
    net = nnx.merge(graphdef, tree if model is None else written_out(tree, model))
    if dropout and key is not None:
      key, own = jax.random.split(key)
      with_dropout(net, dropout, own)
    return objective.loss(net, batch, key)

  return loss


def _aware(
  config: Config, objective: Objective, info: dict, where: dict, shapes: dict
) -> Aware | None:
  """What a run with `quantize.format` learns through; None without one."""
  if config.quantize.format is None:
    return None
  rounding = Rounding(Format.parse(config.quantize.format), info)
  net = nnx.eval_shape(lambda: objective.build(config.model, nnx.Rngs(0)))
  rounding.mark(net, shapes)
  graphdef, _ = nnx.split(net, nnx.Param)

  def rounded(params: dict) -> dict:
    return jax.lax.with_sharding_constraint(rounding(params), where)

  return Aware(make_loss(graphdef, objective), rounded, config.quantize.start_step)


@functools.cache
def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a batch that devices of this process hold, ascending, int64.

  Processes whose devices differ in `seq`, `tensor` or `stage` alone hold the same rows; the rows of
  one process need not follow each other.
  """
  held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  every = np.arange(batch_size, dtype=np.int64)
  return np.unique(np.concatenate([every[index] for index in held if index is not None]))


def put_batch(program: Program, rows: dict[str, np.ndarray]) -> Batch:
  """This process' rows of a batch (`local_rows`) -> the global batch on the devices."""

  def place(like: jax.ShapeDtypeStruct, array: np.ndarray) -> jax.Array:
    where: Any = like.sharding
    number = local_rows(where.mesh, like.shape[0])
    if len(array) != len(number):
      raise ValueError(f"{len(array)} rows, and devices here hold {len(number)} of a batch")

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      first, *others = index or (slice(None),)
      begin, end, _ = first.indices(like.shape[0])
      return array[(slice(*np.searchsorted(number, (begin, end))), *others)]

    return jax.make_array_from_callback(like.shape, where, part)

  return {name: place(program.batch[name], array) for name, array in rows.items()}


def check_batch(config: Config, mesh: Mesh) -> None:
  """Raises an InputError if the devices cannot share a part of the batch equally."""
  shares = mesh_parts("batch", mesh)
  rows = config.batch_size // config.accumulation
  if rows % shares:
    raise InputError(
      f"batch_size={config.batch_size} / accumulation={config.accumulation} = {rows} sequences is "
      f"not a multiple of the {shares} parts that {shown_axes('batch', mesh)} split them into: "
      "change one of them."
    )


def check_experts(config: Config, mesh: Mesh) -> None:
  """Raises an InputError if the devices cannot share the experts equally, or there are none."""
  model, parts = config.model, mesh_parts("expert", mesh)
  if parts == 1:
    return
  where = shown_axes("expert", mesh)
  if not any(kind.experts for stack in model.stacks for kind in model.layers(stack)):
    raise InputError(
      f"{where} splits experts, and no layer of this model has any: use mesh.data={parts} or "
      f"mesh.fsdp={parts} instead."
    )
  if model.num_experts % parts:
    raise InputError(
      f"model.num_experts={model.num_experts} is not a multiple of {where}: each part of the mesh "
      "has as many experts as any other. Change one of them."
    )


def check_precision(config: Config) -> None:
  """Raises an InputError for parameters in float16, and for float64 in a JAX of 32 bits."""
  if config.model.param_dtype == "float16":
    raise InputError(
      "model.param_dtype='float16' cannot be trained: small gradients are lost. Use 'bfloat16', or "
      "'float32' with model.dtype='bfloat16'."
    )
  for name in ("dtype", "param_dtype"):
    if getattr(config.model, name) == "float64" and not jax.config.read("jax_enable_x64"):
      raise InputError(
        f"model.{name}='float64' needs 64-bit JAX: set JAX_ENABLE_X64=1 in the environment."
      )


def _abstract_batch(
  config: Config, objective: Objective, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  where = batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct((config.batch_size, *shape), np.dtype(dtype), sharding=where)
    for name, (shape, dtype, _) in batch_fields(objective.sides).items()
  }


def placed(shapes: dict, info: dict, mesh: Mesh) -> dict:
  """Abstract parameters with their shardings."""
  return jax.tree.map(_placed, shapes, packed_shardings(shapes, info, mesh))


def _state_shardings(
  shapes: TrainState, info: dict, frozen: dict, tx: Any, mesh: Mesh
) -> TrainState:
  """A state with a sharding in the place of each array; `info` and `frozen` are ParamInfo of what
  is trained and of the rest.
  """
  whole: Any = replicated(mesh)
  params = packed_shardings(shapes.params, info, mesh)
  return TrainState(
    step=whole,
    params=params,
    frozen=packed_shardings(shapes.frozen, frozen, mesh),
    opt_state=shardings(shapes.opt_state, state_axes(tx, shapes.params, info), mesh),
    ema=params if shapes.ema else {},
    bad_steps=whole,
  )


def _placed(leaf: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
