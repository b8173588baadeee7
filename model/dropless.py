"""Each token through its own experts and no others, on one device or on a mesh; none is dropped."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from model.attend import device_facts
from model.context import free_axes
from model.exchange import Work, exchanged
from model.sharding import mesh_axes

Matrices = dict[
  str, dict[str, Array]
]  # gate_proj, up_proj, down_proj -> w (E, in, out), b (E, out)
Axes = dict[str, dict[str, tuple[str, ...]]]  # Their logical axes.
Act = Callable[[Array, Array | None], Array]  # (up, gate) -> what down_proj reads.


@dataclasses.dataclass(frozen=True)
class Layout:
  """Mesh axes that split tokens, and the logical axes of matrices; `all` of the mesh in use."""

  all: frozenset[str]
  batch: tuple[str, ...]
  seq: tuple[str, ...]
  expert: tuple[str, ...]
  mlp: tuple[str, ...]
  embed: tuple[str, ...]

  @property
  def tokens(self) -> P:
    """Where the rows and columns of a batch are."""
    return P(self.batch or None, self.seq or None)

  def place(self, axes: tuple[str, ...]) -> P:
    """Where an array of these logical axes is."""
    return P(*(None if axis == "rank" else getattr(self, axis) or None for axis in axes))


def ragged_experts(
  x: Float[Array, "B T D"],
  weights: Float[Array, "B T k"],
  chosen: Int[Array, "B T k"],
  valid: Bool[Array, "B T"],
  matrices: Matrices,
  axes: Axes,
  act: Act,
) -> Float[Array, "B T D"]:
  """The sum of what each token's experts make of it, with its weights; see moe.Experts.

  Rows are sorted by expert and multiplied in ragged groups. On a mesh each device sorts the tokens
  that it holds: a global sort would gather the whole batch on each. It has the experts, and of them
  the hidden elements, that the mesh gives it, and gathers what `embed` splits of their matrices.
  Tokens that are split over `expert` travel to the devices of their experts, and results back.
  """
  up = matrices["up_proj"]["w"]
  layout = _layout(x.shape, up.shape)
  if layout.expert:
    chosen = jnp.where(valid[..., None], chosen, len(up))  # Padding goes nowhere.

  def local(x, weights, chosen, matrices):
    matrices = jax.tree.map(functools.partial(_gathered, over=layout.embed), matrices, axes)
    if layout.mlp and "b" in matrices["down_proj"]:
      once = jax.lax.axis_index(layout.mlp) == 0  # The sum over devices below must add it once.
      down = matrices["down_proj"]
      matrices["down_proj"] = down | {"b": jnp.where(once, down["b"], 0)}
    if layout.mlp:  # Gradients are summed over them here, of tokens, and not of what has arrived.
      x = jax.lax.pcast(x, layout.mlp, to="varying")
    flat = lambda a: a.reshape(-1, a.shape[-1])
    work = functools.partial(_grouped, matrices=matrices, act=act, padded=bool(layout.expert))
    y = _spread(flat(x), flat(weights), flat(chosen), work, layout, len(up))
    return (jax.lax.psum(y, layout.mlp) if layout.mlp else y).reshape(*x.shape[:2], -1)

  if layout.all:
    tokens = layout.tokens
    specs = jax.tree.map(lambda _, names: layout.place(names), matrices, axes)
    local = jax.shard_map(
      local, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens, axis_names=set(layout.all)
    )
  return local(x, weights, chosen, matrices)


def apart(h: Float[Array, "... D"], matrices: Matrices) -> tuple[Array, Array | None]:
  """(what experts read, the number of each token's adapter where it was put behind that)."""
  if any("lora_a" in own and own["lora_a"].ndim == 4 for own in matrices.values()):
    return h[..., :-1], h[..., -1]
  return h, None


def of_numbers(
  own: dict[str, Array], numbers: Int[Array, "..."] | None, dtype: Any
) -> tuple[Array, Array, Array]:
  """(A, B, what multiplies the ranks of each token: 0 at those of other adapters than its own)."""
  a, b = own["lora_a"], own["lora_b"]
  if numbers is None:
    return a, b, jnp.ones((), dtype)
  several, rank = a.shape[-2:]
  number = jnp.repeat(jnp.arange(several), rank)
  mask = (jnp.round(numbers)[..., None] == number).astype(dtype)
  return a.reshape(*a.shape[:2], -1), b.reshape(len(b), -1, b.shape[-1]), mask


def _layout(tokens: tuple[int, ...], up: tuple[int, ...]) -> Layout:
  """How the mesh in use splits tokens (B, T, D) and matrices (E, D, F).

  What it does not divide stays whole, such as a short batch in inference. Matrices are gathered
  here where each device has tokens of its own, and elsewhere before.
  """
  mesh = jax.sharding.get_abstract_mesh()
  free = frozenset(free_axes(mesh) if mesh.size > 1 else ())

  def split(name: str, size: int) -> tuple[str, ...]:
    names = tuple(axis for axis in mesh_axes(name, mesh) if axis in free)
    return names if size % math.prod(mesh.shape[axis] for axis in names) == 0 else ()

  batch, seq, embed = split("batch", tokens[0]), split("seq", tokens[1]), split("embed", up[1])
  embed = embed if {*batch, *seq}.issuperset(embed) else ()
  return Layout(free, batch, seq, split("expert", up[0]), split("mlp", up[2]), embed)


def _gathered(array: Array, axes: tuple[str, ...], *, over: tuple[str, ...]) -> Array:
  """A device's part of a matrix, whole along `embed`."""
  if not over or "embed" not in axes:
    return array
  return jax.lax.all_gather(array, over, axis=axes.index("embed"), tiled=True)


def _spread(
  x: Float[Array, "n D"], weights: Float[Array, "n k"], chosen: Int[Array, "n k"], work: Work,
  layout: Layout, experts: int,
) -> Float[Array, "n D"]:  # fmt: skip
  """This device's tokens through all experts, wherever they are."""
  over = layout.expert
  if not over:
    return _through(x, weights, chosen, work, experts)
  here = experts // jax.lax.axis_size(over)
  first = jax.lax.axis_index(over) * here
  if not {*layout.batch, *layout.seq}.issuperset(over):
    apart = jax.lax.pcast(x, over, to="varying")  # Its gradients are summed over these devices.
    return jax.lax.psum(_own(apart, weights, chosen - first, work, here), over)
  if device_facts()[0] != "cpu":
    room = jax.lax.axis_size(over) * len(x) * min(here, chosen.shape[-1])
    send = functools.partial(exchanged, work=work, axis=over, room=room)
    return _through(x, weights, chosen, send, experts)
  x, weights, chosen = (jax.lax.all_gather(a, over, tiled=True) for a in (x, weights, chosen))
  y = _own(x, weights, chosen - first, work, here)
  return jax.lax.psum_scatter(y, over, tiled=True)


def _own(x, weights, chosen, work: Work, experts: int) -> Array:
  """What the experts 0 … experts - 1 add; other numbers in `chosen` add nothing."""

  def masked(rows, sizes):
    real = _real(rows, sizes)
    return jnp.where(real, work(jnp.where(real, rows, 0), sizes), 0)

  mine = (chosen >= 0) & (chosen < experts)
  return _through(x, weights, jnp.where(mine, chosen, experts), masked, experts)


def _through(
  x: Float[Array, "n D"], weights: Float[Array, "n k"], chosen: Int[Array, "n k"], work: Work,
  experts: int,
) -> Float[Array, "n D"]:  # fmt: skip
  """Sorts rows by expert, and sums what `work` makes of each token's; `experts` itself is last."""
  expert = chosen.reshape(-1)
  order = jnp.argsort(expert, stable=True)
  back = jnp.argsort(order, stable=True)
  sizes = jnp.bincount(expert, length=experts).astype(jnp.int32)
  rows = jnp.repeat(x, chosen.shape[-1], axis=0)
  rows = rows.at[order].get(unique_indices=True)  # Unique: the gradient adds in no random order.
  y = work(rows, sizes).at[back].get(unique_indices=True)
  y = y.reshape(*chosen.shape, -1).astype(weights.dtype)
  return jnp.einsum("nkD,nk->nD", y, weights).astype(x.dtype)


def _grouped(
  rows: Float[Array, "M D"], sizes: Int[Array, "e"], *, matrices: Matrices, act: Act, padded: bool
) -> Float[Array, "M D"]:
  """Rows sorted by expert, through the experts' matrices.

  With `padded` there may be rows that belong to none. A kernel may leave anything in their place,
  which must not reach the gradients of matrices, not even times 0.
  """

  def through(h, name):
    y = jax.lax.ragged_dot(h, matrices[name]["w"], sizes)
    if "lora_a" in matrices[name]:
      a, b, mask = of_numbers(matrices[name], numbers, h.dtype)
      y += jax.lax.ragged_dot(jax.lax.ragged_dot(h, a, sizes) * mask, b, sizes)
    if "b" in matrices[name]:
      expert = (jnp.arange(len(h))[:, None] >= jnp.cumsum(sizes)).sum(axis=1)
      y += matrices[name]["b"].at[expert].get(mode="fill", fill_value=0)
    return jnp.where(_real(y, sizes), y, 0) if padded and name != "down_proj" else y

  rows, numbers = apart(rows, matrices)
  gate = through(rows, "gate_proj") if "gate_proj" in matrices else None
  return through(act(through(rows, "up_proj"), gate), "down_proj")


def _real(rows: Float[Array, "M D"], sizes: Int[Array, "e"]) -> Bool[Array, "M 1"]:
  """Which rows belong to an expert."""
  return (jnp.arange(len(rows)) < sizes.sum())[:, None]
