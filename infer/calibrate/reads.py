"""What the matrices of a layer read of some tokens, in sums that serve all methods."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from infer.calibrate.folding import Path
from model.attention import Where
from model.block import Block
from model.layers import Linear, activated
from model.moe import Experts
from model.quant import Quantized, dense, product

Hear = Callable[[Path, Linear, Array, Array | None], None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Read:
  """Sums over tokens of what a matrix reads, float32; of experts with a leading axis of them."""

  gram: Float[Array, "I I"]  # xᵀx.
  total: Float[Array, "I"]  # Absolute values.
  largest: Float[Array, "I"]  # The largest absolute value.
  tokens: Float[Array, ""]

  def __add__(self, other: "Read") -> "Read":
    return Read(
      self.gram + other.gram, self.total + other.total, jnp.maximum(self.largest, other.largest),
      self.tokens + other.tokens,
    )  # fmt: skip


def read_of(x: Float[Array, "n I"], valid: Bool[Array, "n"] | None) -> Read:
  x = x.astype(jnp.float32)
  x = x if valid is None else jnp.where(valid[:, None], x, 0)
  size = jnp.abs(x)
  tokens = jnp.asarray(len(x) if valid is None else valid.sum(), jnp.float32)
  gram = jnp.matmul(x.T, x, precision="highest")
  return Read(gram, size.sum(axis=0), size.max(axis=0), tokens)


def reads(block: Block, x: Float[Array, "B T D"], where: Where) -> tuple[Array, dict[Path, Read]]:
  """(what the layer gives, what each of its matrices reads).

  Call it on a block that is made for it, under `jax.jit`: the block is changed.
  """
  found: dict[Path, Read] = {}

  def hear(path: Path, linear: Linear, x: Array, valid: Array | None) -> None:
    flat = _flat(x, linear.inputs)
    one = read_of(flat, None if valid is None else valid.reshape(-1))
    found[path] = found[path] + one if path in found else one

  listen(block, where, hear)
  hear_experts(block, where, found)
  return block(x, where)[0], found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forms:
  """A matrix in its forms: as it was, rounded plainly, and as it is kept now, which reads inputs
  divided by `into` and whose outputs are multiplied by `out` to be what they were.
  """

  w: Float[Array, "I O"]
  plain: Quantized
  now: Quantized
  into: Float[Array, "I"]
  out: Float[Array, "O"]


def changes(
  block: Block, x: Float[Array, "B T D"], where: Where, forms: dict[Path, Forms]
) -> dict[Path, Float[Array, "3"]]:
  """For each matrix the summed squares of its outputs, and of what they change by plainly and now,
  activations rounded as its format does.

  Call it as `reads`.
  """
  found: dict[Path, Array] = {}

  def hear(path: Path, linear: Linear, x: Array, valid: Array | None) -> None:
    if path not in forms:
      return
    form, flat = forms[path], _flat(x, linear.inputs).astype(jnp.float32)
    flat = flat if valid is None else jnp.where(valid.reshape(-1, 1), flat, 0)
    y = jnp.matmul(flat, form.w, precision="highest")
    plain = _outputs(flat, form.plain)
    now = _outputs(flat / form.into, form.now) * form.out
    sums = jnp.stack([jnp.sum(jnp.square(a)) for a in (y, plain - y, now - y)])
    found[path] = found[path] + sums if path in found else sums

  listen(block, where, hear)
  block(x, where)
  return found


def _outputs(x: Float[Array, "n I"], q: Quantized) -> Float[Array, "n O"]:
  return product(x.reshape(-1, *q.inputs), q).reshape(len(x), -1)


def listen(block: nnx.Module, where: Where, hear: Hear) -> None:
  """Lets `hear` know what each Linear below `block` is called with, and which of it is no padding
  (None: all of it).
  """

  def heard(path: Path, linear: Linear, x: Array) -> Array:
    hear(path, linear, x, _valid(path, x, where))
    return linear(x)

  for path, holder, name, linear in list(_linears(block)):
    setattr(holder, name, functools.partial(heard, path, linear))


def _linears(module: nnx.Module, path: Path = ()):
  for name, value in vars(module).items():
    if isinstance(value, Linear):
      yield (*path, name), module, name, value
    elif isinstance(value, nnx.Module):
      yield from _linears(value, (*path, name))


def _flat(x: Array, inputs: int) -> Float[Array, "n I"]:
  return x.reshape(-1, math.prod(x.shape[x.ndim - inputs :]))


def _valid(path: Path, x: Array, where: Where) -> Bool[Array, "B T"] | None:
  """Which tokens of `x` there are; None: it has nothing that could be padding."""
  pos = where.pos
  if path[0] == "cross_attn" and path[1] in ("k_proj", "v_proj", "kv_proj"):
    pos = where.context.pos  # pyright: ignore
  return pos >= 0 if x.shape[:2] == pos.shape else None


def hear_experts(block: Block, where: Where, found: dict[Path, Read]) -> None:
  """Lets `found` know what each expert's matrices read: the tokens that are sent there."""
  experts: Any = block.mlp
  if not isinstance(experts, Experts):
    return
  router, names = experts.router, ("gate_proj", "up_proj", "down_proj")
  stored = {name: getattr(experts, name).stored() for name in names if hasattr(experts, name)}
  plain = lambda own: {part: dense(a, experts.dtype) for part, a in own.items()}
  matrices = {name: plain(own) for name, own in stored.items()}

  def routed(x: Array) -> Any:
    told = router(x)
    into, out = jax.lax.map(
      lambda own: _of_expert(experts, x, (told[3] == own[0]).any(-1) & (where.pos >= 0), own[1]),
      (jnp.arange(experts.cfg.num_experts), matrices),
    )
    found.update({("mlp", name): out if name == "down_proj" else into for name in matrices})
    return told

  experts.router = routed  # pyright: ignore


def _of_expert(experts: Experts, x: Array, mine: Array, matrices: dict) -> tuple[Read, Read]:
  x, mine = x.reshape(-1, x.shape[-1]), mine.reshape(-1)

  def through(name: str) -> Array:
    y = jnp.matmul(x, matrices[name]["w"])
    return y + matrices[name]["b"] if "b" in matrices[name] else y

  gate = through("gate_proj") if "gate_proj" in matrices else None
  hidden = activated(experts.cfg, through("up_proj"), gate)
  return read_of(x, mine), read_of(hidden, mine)
