"""Adapters merged into what they adapt, and taken out again."""

import dataclasses
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from model.errors import InputError
from model.layers import Embed
from model.moe import ExpertMatrix
from model.peft.attach import Owner, adapters, apart, is_adapted, owners
from model.peft.bottleneck import Bottleneck, check_none
from model.peft.create import dense
from model.peft.ia3 import IA3
from model.peft.lora import sides
from model.peft.names import Names, Path
from model.peft.tied import scoring_table, untied
from model.peft.virtual_files import has_virtual
from model.quant import Quantized, quantize
from model.trained import Model

_ROUNDINGS = 64.0  # Of the dtype: by so much may what is merged differ from what is applied.
_PROBES = 8  # Random inputs for the comparison.


@dataclasses.dataclass(frozen=True)
class Lost:
  """What rounding has taken of an update that was merged into quantized matrices.

  `parts` has, by the name of each matrix, the norm of what is wrong after rounding beside the norm
  of the update: at 1, rounding changed the matrix as much as the adapter did.
  """

  format: str  # Of most of them.
  parts: dict[str, float]

  @property
  def mean(self) -> float:
    """Of all matrices."""
    return sum(self.parts.values()) / len(self.parts)

  @property
  def largest(self) -> tuple[str, float]:
    """The matrix that lost most, and how much."""
    return max(self.parts.items(), key=lambda part: part[1])

  def lines(self) -> list[str]:
    """What a person is told of it."""
    name, most = self.largest
    told = [
      f"merged into {self.format}: rounding took {self.mean:.1%} of the update (mean of "
      f"{len(self.parts)} matrices), at most {most:.1%} ({name})"
    ]
    drowned = [name for name, share in self.parts.items() if share >= 1]
    if drowned:
      told.append(
        f"warning: in {len(drowned)} of {len(self.parts)} matrices the update is smaller than what "
        f"rounding to {self.format} loses, as in {drowned[0]}: keep the adapter beside the base, "
        "or merge into the float base."
      )
    return told


def merged(m: Model) -> Model:
  """The model without an adapter that computes what it computes with it.

  A table of tokens whose vectors are adapted, and which scores words too, becomes two: scores did
  not see the adapter. What is merged is compared with what is applied, on random inputs. Quantized
  matrices are quantized anew, and what that loses is told on stderr (`merge`).

  Raises:
    InputError: if it has no adapter, or several, or merging is not exact enough.
  """
  made, lost = merge(m)
  for line in [] if lost is None else lost.lines():
    print(line, file=sys.stderr)
  return made


def merge(m: Model) -> tuple[Model, Lost | None]:
  """As `merged`, with what rounding has lost: None where no matrix is quantized."""
  if not is_adapted(m.params):
    raise InputError("the model has no adapter that could be merged.")
  check_none(m.params, "no matrix of it can hold merged")
  if has_virtual(m.params):
    raise InputError(
      "virtual tokens are no part of a matrix and cannot be merged: keep the base, and save them "
      "with format='peft'."
    )
  if m.adapters:
    raise InputError(
      f"the model has several adapters ({', '.join(m.adapters)}): load it with one of them, and "
      "merge that."
    )
  base = apart(m.params)[0]
  leaves: Any = flatten_dict(base)
  net, names = nnx.merge(m.graphdef, m.params), Names(m.config)
  new, parts, formats = dict(leaves), {}, []
  for path, owner in owners(net):
    if hasattr(owner, "adapter"):
      weight = (*path, "table" if isinstance(owner, Embed) else "w")
      if isinstance(leaves[weight], Quantized):
        new[weight], losses = _requantized(path, owner, leaves[weight])
        parts |= dict(zip(names.of(path), losses, strict=True))
        formats += [leaves[weight].format.name] * len(losses)
      else:
        new[weight] = _merged(owner, leaves[weight])
        _check(path, owner, leaves[weight], new[weight])
      if isinstance(owner.adapter, IA3) and (*path, "b") in leaves:
        scale = jax.vmap(IA3.bias) if _stacked(owner, leaves[weight]) else IA3.bias
        new[(*path, "b")] = scale(owner.adapter, leaves[(*path, "b")])
  made, table = dataclasses.replace(m, params=unflatten_dict(new), adapted=None), scoring_table(m)
  if table is not None and new[table] is not leaves[table]:
    made = untied(made, leaves[table])
  return made, Lost(Counter(formats).most_common(1)[0][0], parts) if parts else None


def _requantized(path: Path, owner: Owner, weight: Quantized) -> tuple[Quantized, list[float]]:
  """(a quantized matrix with its update, what rounding lost of it in each layer): a layer after the
  other, so that few of them are in float at a time.
  """
  layers = weight.lead[: len(weight.lead) - len(sides(owner)[0])]
  made, losses = [], []
  for i in range(layers[0]) if layers else [None]:
    one = owner if i is None else jax.tree.map(lambda a: a[i], owner)  # noqa: B023
    before = dense(_weight(one).get_value())
    _weight(one).set_value(before)
    after = _merged(one, before)
    _check(path, one, before, after)
    new, lost = _rounded(before, after, weight)
    made.append(new)
    losses.append(float(lost))
  whole = jax.tree.map(lambda *a: jnp.stack(a), *made) if layers else made[0]
  return jax.tree.map(lambda a, old: jax.device_put(a, old.sharding), whole, weight), losses


@jax.jit
def _rounded(before: jax.Array, after: jax.Array, like: Quantized) -> tuple[Quantized, jax.Array]:
  """(`after`, quantized as `like` is, what that loses of its difference from `before`)."""
  lead = after.ndim - len(like.inputs) - len(like.outputs)
  new = quantize(after, like.format, inputs=len(like.inputs), lead=lead, table=like.table)
  update = jnp.linalg.norm((after - before).reshape(-1))
  wrong = jnp.linalg.norm((new.dequantize(after.dtype) - after).reshape(-1))
  return new, jnp.where(update > 0, wrong / jnp.where(update > 0, update, 1), 0.0)


def _weight(owner: Owner) -> nnx.Param:
  return owner.table if isinstance(owner, Embed) else owner.w


def unmerged(m: Model, adapted: Model) -> Model:
  """The base of a merged model: what `adapted`, the model before merging, added is taken off.

  Parameters come back within rounding.

  Raises:
    InputError: for DoRA, whose norms a merged model does not have, tables that were untied, or
      quantized matrices: merging has rounded them anew, and only the model that was merged still
      has what they were.
  """
  net = nnx.merge(adapted.graphdef, adapted.params)
  if m.config != adapted.config:
    raise InputError("the merged model has another config than the adapter's: load the base again.")
  leaves: Any = flatten_dict(m.params)
  new = dict(leaves)
  for path, adapter in adapters(net):
    if isinstance(adapter, IA3 | Bottleneck) or hasattr(adapter, "magnitude"):
      raise InputError("only what LoRA has added can be taken off again: load the base.")
    owner = dict(owners(net))[path]
    weight = (*path, "table" if isinstance(owner, Embed) else "w")
    if isinstance(leaves[weight], Quantized):
      raise InputError(
        f"{'.'.join(map(str, weight))} is quantized, and merging has rounded it anew: what it was "
        "cannot be computed back. Keep the model that was merged, or load the base."
      )
    new[weight] = leaves[weight] - _merged(owner, jnp.zeros_like(leaves[weight]))
  return dataclasses.replace(m, params=unflatten_dict(new))


def _stacked(owner: Owner, weight: Any) -> bool:
  return len(weight.shape) > sum(map(len, sides(owner)))


def _merged(owner: Owner, weight: jax.Array) -> jax.Array:
  """In float32 or wider, then rounded once."""
  wide = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
  merge = lambda adapter, w: adapter.matrix(w)
  out = (
    jax.vmap(merge)(owner.adapter, wide) if _stacked(owner, weight) else merge(owner.adapter, wide)
  )
  return out.astype(weight.dtype)


def _check(path: Path, owner: Owner, before: jax.Array, after: jax.Array) -> None:
  """Raises an InputError if applying differs from merging by more than rounding."""
  if isinstance(owner, Embed | ExpertMatrix):
    return
  many = owner.inputs

  def both(owner, after, x):
    x = x.astype(after.dtype)
    bias = owner.b[...].astype(owner.dtype) if hasattr(owner, "b") else jnp.zeros((), owner.dtype)
    if isinstance(owner.adapter, IA3) and hasattr(owner, "b"):
      bias = owner.adapter.bias(bias)
    return owner(x), jnp.tensordot(x.astype(owner.dtype), after.astype(owner.dtype), many) + bias

  lead = before.ndim - len(owner.w.axes)
  x = jax.random.normal(jax.random.key(0), (_PROBES, *before.shape[lead : lead + many]))
  run = jax.vmap(both, in_axes=(0, 0, None)) if lead else both
  applied, plain = run(owner, after, x)
  wide = lambda a: a.astype(jnp.float32)
  error = float(jnp.linalg.norm(wide(applied) - wide(plain)) / jnp.linalg.norm(wide(applied)))
  coarse = max((after.dtype, owner.dtype), key=lambda dtype: jnp.finfo(dtype).eps)
  limit = _ROUNDINGS * float(jnp.finfo(coarse).eps)
  if not error <= limit:
    name = ".".join(map(str, path))
    raise InputError(
      f"{name} merged differs from {name} with its adapter by {error:.1e}, and "
      f"{jnp.dtype(coarse).name} rounds to {limit:.1e}: load the model with dtype='float32'."
    )
