"""A model's layers one after the other: each is quantized for what the quantized ones before it
give, and only one layer's sums are held at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from infer.calibrate.methods import Layer, Made, Part
from infer.calibrate.reads import changes, reads
from model.attention import Context
from model.config import LayerKind, ModelConfig
from model.heads import Network, abstract
from model.transformer import Inputs

Method = Callable[[ModelConfig, Layer], Made]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of tokens: what each stack reads; hidden states `x` as far as they have come."""

  inputs: dict[str, Inputs]
  x: Any = None
  context: Context | None = None


class Walk:
  """A network whose layers are apart from the rest, and run one at a time.

  Args:
    params: of the network as it will be, of which those outside of layers are read.
  """

  def __init__(self, cfg: ModelConfig, params: dict):
    self.cfg, net = cfg, abstract(cfg, stacked=False)
    self.blocks: dict[tuple[str, LayerKind], Any] = {}
    self.shell_params = dict(params)
    for name in cfg.stacks:
      stack = getattr(net, name)
      for kind, block in zip(cfg.layers(name), stack.layers, strict=True):
        self.blocks.setdefault((name, kind), nnx.split(block, nnx.Param)[0])
      stack.layers = nnx.List([])
      self.shell_params[name] = {k: v for k, v in params[name].items() if k != "layers"}
    self.shell = nnx.split(net, nnx.Param)[0]

  def begin(self, name: str, batch: Batch) -> Batch:
    """The batch as the first layer of a stack reads it."""
    return dataclasses.replace(
      batch, x=_begin(self.shell, name, self.shell_params, batch.inputs[name])
    )

  def end(self, name: str, batch: Batch) -> Batch:
    """The batch behind a stack, whose hidden states are what a decoder attends to."""
    x = _end(self.shell, name, self.shell_params, batch.x)
    own = batch.inputs[name]
    return dataclasses.replace(batch, x=None, context=Context(x, own.pos, own.seg))

  def reads(self, name: str, kind: LayerKind, params: dict, batch: Batch):
    """(the batch behind a layer, what its matrices read)."""
    x, read = _reads(*self._told(name, kind), params, self.shell_params, batch)
    return dataclasses.replace(batch, x=x), read

  def run(self, name: str, kind: LayerKind, params: dict, batch: Batch) -> Batch:
    """The batch behind a layer."""
    return dataclasses.replace(
      batch, x=_run(*self._told(name, kind), params, self.shell_params, batch)
    )

  def changes(self, name: str, kind: LayerKind, params: dict, batches: list[Batch], forms: Any):
    """What `reads.changes` says of a layer and all rows."""
    each = [_changes(*self._told(name, kind), params, self.shell_params, b, forms) for b in batches]
    return jax.tree.map(lambda *a: sum(a), *each)

  def _told(self, name: str, kind: LayerKind):
    return self.shell, self.blocks[name, kind], name


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(shell, name: str, shell_params, inputs: Inputs):
  net: Network = nnx.merge(shell, shell_params)
  stack = getattr(net, name)
  table = net.decoder_embed if name == "decoder" and net.cfg.decoder_embed else net.embed
  x = stack.embedded(table, inputs)
  return stack.embed_proj(x) if net.cfg.d_embed is not None else x


@functools.partial(jax.jit, static_argnums=(0, 1))
def _end(shell, name: str, shell_params, x):
  stack = getattr(nnx.merge(shell, shell_params), name)
  return stack.final_norm(x) if stack.cfg.final_norm else x


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _reads(shell, block, name: str, params, shell_params, batch: Batch):
  where = getattr(nnx.merge(shell, shell_params), name).placed(batch.inputs[name], batch.context)
  return reads(nnx.merge(block, params), batch.x, where)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(shell, block, name: str, params, shell_params, batch: Batch):
  where = getattr(nnx.merge(shell, shell_params), name).placed(batch.inputs[name], batch.context)
  return nnx.merge(block, params)(batch.x, where)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _changes(shell, block, name: str, params, shell_params, batch: Batch, forms: Any):
  where = getattr(nnx.merge(shell, shell_params), name).placed(batch.inputs[name], batch.context)
  return changes(nnx.merge(block, params), batch.x, where, forms)


@dataclasses.dataclass(frozen=True)
class Set:
  """A set of a stack's parameters: where it lies, its layers' kind and the first one's number."""

  stack: int
  row: int
  kind: LayerKind
  first: int


def sets(cfg: ModelConfig, name: str) -> Iterator[Set]:
  """All of a stack, in the order in which they run."""
  stack, first, uses = 0, 0, cfg.layer_uses(name)
  for pattern, repeats in cfg.groups(name):
    for row in range(repeats // uses):
      for place, kind in enumerate(pattern):
        yield Set(stack + place, row, kind, first)
        first += uses
    stack += len(pattern)


def calibrated_stack(
  walk: Walk, name: str, params: dict, plain: dict, batches: list[Batch], method: Method,
  tell: Callable[[], Any],
) -> tuple[dict, list[Batch], list[Part]]:  # fmt: skip
  """(the parameters of a stack's layers, what its last layer gives, what became of matrices).

  Args:
    params, plain: of its layers, stacked: as they are, and rounded plainly.
    batches: rows, as its first layer reads them.
    tell: called after each layer.
  """
  made, parts = {stack: [] for stack in params}, []
  row_of = lambda tree, row: jax.tree.map(lambda a: a[row], tree)
  for own in sets(walk.cfg, name):
    pair = row_of(params[own.stack], own.row), row_of(plain[own.stack], own.row)
    layer, told = _calibrated(walk, name, own, *pair, batches, method)
    for _ in range(walk.cfg.layer_uses(name)):
      batches = [walk.run(name, own.kind, layer, batch) for batch in batches]
    made[own.stack].append(layer)
    parts += [dataclasses.replace(p, name=f"{name}.{own.first}.{p.name}") for p in told]
    tell()
  stacked = {s: jax.tree.map(lambda *a: jnp.stack(a), *rows) for s, rows in made.items()}
  return stacked, batches, parts


def _calibrated(
  walk: Walk, name: str, own: Set, params: dict, plain: dict, batches: list[Batch], method: Method
) -> tuple[dict, list[Part]]:
  """A set of parameters for all its layers, each of which reads what those before it give."""
  found, ahead = None, [batches]
  for _ in range(walk.cfg.layer_uses(name)):
    pairs = [walk.reads(name, own.kind, params, batch) for batch in ahead[-1]]
    ahead.append([batch for batch, _ in pairs])
    for _, read in pairs:
      found = read if found is None else {path: found[path] + read[path] for path in found}
  flat: Any = flatten_dict(params)
  rounded: Any = flatten_dict(plain)
  layer = Layer(own.kind, flat, rounded, found or {})
  made = method(walk.cfg, layer)
  forms = made.forms(layer)
  if forms:
    read = [batch for some in ahead[:-1] for batch in some]
    made = made.with_errors(walk.changes(name, own.kind, params, read, forms))
  return unflatten_dict(made.params), made.parts
