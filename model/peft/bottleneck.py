"""Bottleneck adapters: a narrow layer behind, or beside, a part of a block.

A serial one is y + scale · up(f(down(y))) of what attention, cross-attention or an MLP (or experts)
gives, before that is normed (in sandwich form) and added to the residual stream: behind each part
in Houlsby et al. (arXiv:1902.00751, figure 2), behind the MLP only in Pfeiffer et al.
(arXiv:2005.00247). A parallel one adds scale · up(f(down(x))) of what the part reads, x, behind the
norm where that comes first (He et al., arXiv:2110.04366, table 1).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from model.attention import Attention
from model.config import ModelConfig
from model.errors import InputError
from model.layers import MLP, activation, dropout
from model.moe import Experts
from model.peft.config import PeftConfig
from model.peft.names import Names, Path, any_matches, check_used
from model.peft.parameter import adapter_param, fixed_param
from model.sharding import constrain_residual

PLACES = {  # Parts of a block that a method adapts where nothing is said, and those that it may.
  "houlsby": (("attn", "cross_attn", "mlp"),) * 2,
  "pfeiffer": (("mlp",), ("mlp",)),
  "parallel": (("mlp",), ("attn", "cross_attn", "mlp")),
}
REDUCTION = 16  # Of the width, where the config does not say how wide a bottleneck is.
PARALLEL_SCALE = 4.0  # He et al., section 4.2.

BlockPart = Attention | MLP | Experts


def parts(module: Any, path: Path = ()) -> Iterator[tuple[Path, BlockPart]]:
  """The parts of blocks below `module`, with their paths in the nested dict of parameters."""
  if isinstance(module, nnx.List):
    for i, one in enumerate(module):
      yield from parts(one, (*path, i))
  elif isinstance(module, BlockPart):
    yield path, module
  elif isinstance(module, nnx.Module):
    for name, one in vars(module).items():
      if isinstance(one, nnx.Module):
        yield from parts(one, (*path, name))


class Narrow(nnx.Module):
  """The parameters of a bottleneck: down (D, M), up (M, D), a bias behind each, and scale []."""

  def __init__(self, leaves: dict[str, Any]):
    self.down = adapter_param(leaves["down"], ("embed", "rank"))
    self.down_bias = adapter_param(leaves["down_bias"], ("rank",), role="vector")
    self.up = adapter_param(leaves["up"], ("rank", "embed"))
    self.up_bias = adapter_param(leaves["up_bias"], ("embed",), role="vector")
    self.scale = fixed_param(leaves["scale"], ())


class Bottleneck(nnx.Module):
  """Its parameters lie under a name that tells what is computed, such as `serial_gelu`: the tree of
  parameters says all of a model's adapters. In training, `key` is of the dropout of what it reads.
  """

  key: nnx.Param

  def __init__(self, leaves: dict[str, Any]):
    (self.name,) = leaves
    setattr(self, self.name, Narrow(leaves[self.name]))
    self.rate = 0.0

  @property
  def scale(self) -> nnx.Param:
    """What is added is multiplied by it."""
    return getattr(self, self.name).scale

  def __call__(self, x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """What a part of a block gives, `y`, changed.

    Args:
      x: what the part has read. Tokens are worked on where the residual stream has them.
    """
    form, _, kind = self.name.partition("_")
    own, dtype = getattr(self, self.name), y.dtype
    of = lambda p: p[...].astype(dtype)
    key = jax.random.wrap_key_data(self.key[...]) if hasattr(self, "key") else None
    read = dropout(y if form == "serial" else constrain_residual(x).astype(dtype), self.rate, key)
    narrow = activation(kind)(jnp.matmul(read, of(own.down)) + of(own.down_bias))
    return y + of(own.scale) * (jnp.matmul(narrow, of(own.up)) + of(own.up_bias))


@dataclasses.dataclass(frozen=True)
class Place:
  """A part of blocks that gets bottlenecks: stacked layers, sizes, and the name of what they do."""

  path: Path
  stacked: tuple[int, ...]
  width: int
  size: int
  scale: float
  name: str
  rows: tuple[int, ...] | None  # Layers of the stack that are adapted; None: all.

  def begin(self, key: jax.Array) -> dict[Path, jax.Array]:
    """Parameters by path that change nothing: up is 0, and down uniform as LoRA's A."""
    lead, bound = self.stacked, self.width**-0.5
    shape = (*lead, self.width, self.size)
    down = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    if self.rows is not None:
      kept = jnp.zeros(lead, bool).at[jnp.array(self.rows)].set(True)
      down = jnp.where(kept[:, None, None], down, 0)
    made = {
      "down": down, "down_bias": jnp.zeros((*lead, self.size)),
      "up": jnp.zeros((*lead, self.size, self.width)), "up_bias": jnp.zeros((*lead, self.width)),
      "scale": jnp.full(lead, self.scale),
    }  # fmt: skip
    return {(self.name, name): value for name, value in made.items()}


def places(config: PeftConfig, model: ModelConfig, net: nnx.Module) -> list[Place]:
  """Where the bottlenecks of `config` go in `net`, which may be abstract.

  Raises:
    InputError: for a pattern that matches no part of a block, or none that the method adapts.
  """
  usual, allowed = PLACES[config.method]
  names = Names(model)
  every = [(path, names.of(path)) for path, _ in parts(net) if path[-1] in allowed]
  check_used("targets", config.targets, [name for _, own in every for name in own])
  serial = config.method != "parallel"
  scale = config.scale if config.scale is not None else 1.0 if serial else PARALLEL_SCALE
  size = config.bottleneck or max(1, model.d_model // REDUCTION)
  found = []
  for path, own in every:
    default = path[-1] in usual and not config.targets
    taken = [i for i, n in enumerate(own) if default or any_matches(config.targets, n)]
    if taken:
      stacked = () if names.layers(path) is None else (len(own),)
      rows = None if len(taken) == len(own) else tuple(taken)
      name = f"{'serial' if serial else 'parallel'}_{config.activation}"
      found.append(Place(path, stacked, model.d_model, size, scale, name, rows))
  return found


def has_bottlenecks(params: dict) -> bool:
  """Whether there are bottleneck adapters among the parameters (arrays, or only their shapes)."""
  return any(path[-1] == "down_bias" for path in flatten_dict(params))


def check_none(params: dict, what: str) -> None:
  """Raises an InputError that says `what` bottleneck adapters do not allow, if there are any."""
  if has_bottlenecks(params):
    raise InputError(
      f"the model has bottleneck adapters, which {what}: keep it with model.save(format='orbax'), "
      "or the workdir of its run."
    )
