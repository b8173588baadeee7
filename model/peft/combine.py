"""Several adapters of one base: by turns in the same compiled programs, or summed with weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from model.errors import InputError
from model.heads import abstract
from model.peft.attach import KEY, Owner, adapters, apart, of_adapter, owners, together
from model.peft.lora import LoRA, sides
from model.peft.names import Path
from model.peft.virtual_files import has_virtual
from model.trained import Model

Low = tuple[jax.Array, jax.Array]  # A, and B with its scale, layers and experts in front.


def alike(models: Sequence[Model]) -> list[Model]:
  """The models on the parameters of the first one's base, their adapters all in the same places and
  of the same rank, so that what is compiled for one serves all: lower ranks, and places without an
  adapter, are filled up with zeros, which is exact.

  Raises:
    InputError: if they are not LoRA adapters of one base.
  """
  base, lows = _of_one_base(models)
  rank = {path: max(low[path][0].shape[-1] for low in lows if path in low) for path in _all(lows)}
  own = _owners(models[0], rank)
  out = []
  for m, low in zip(models, lows, strict=True):
    made = {p: low[p] if p in low else _nothing(own[p], _weight(base, p), rank[p]) for p in rank}
    wide = {p: _widened(own[p], pair, rank[p]) for p, pair in made.items()}
    params = together(base, _adapter(wide, own))
    out.append(dataclasses.replace(m, params=params))
  return out


def combined(models: Sequence[Model], weights: Sequence[float]) -> Model:
  """The base with the weighted sum of what the adapters of the models add to it: exact, as one
  adapter whose rank is the sum of theirs.

  Raises:
    InputError: if they are not LoRA adapters of one base, or there are not as many weights.
  """
  if len(weights) != len(models):
    raise InputError(f"{len(models)} adapters were given {len(weights)} weights: one for each.")
  base, lows = _of_one_base(models)
  own = _owners(models[0], _all(lows))
  summed = {}
  for path in _all(lows):
    there = [(low[path], weight) for low, weight in zip(lows, weights, strict=True) if path in low]
    a = jnp.concatenate([pair[0] for pair, _ in there], axis=-1)
    parts = [pair[1] * jnp.asarray(weight, pair[1].dtype) for pair, weight in there]
    summed[path] = a, jnp.concatenate(parts, axis=_rank_axis(own[path], parts[0]))
  return dataclasses.replace(models[0], params=together(base, _adapter(summed, own)))


def _of_one_base(models: Sequence[Model]) -> tuple[dict, list[dict[Path, Low]]]:
  """(the parameters of the base, the adapters of each model by their owner's path)."""
  if not models:
    raise InputError("no adapters were given: at least one is needed.")
  first = models[0]
  base = apart(first.params)[0]
  for i, m in enumerate(models):
    named = None if m.adapted is None or first.adapted is None else (
      m.adapted.base, first.adapted.base
    )  # fmt: skip
    if m.config != first.config or (named is not None and named[0] != named[1]):
      raise InputError(f"model {i} and model 0 are adapters of different bases: {named}.")
    if m.adapted is not None and any(not of_adapter(p) for p in m.adapted.whole):
      raise InputError(f"model {i} has parameters of its own beside its adapter, which do not add.")
  return base, [_lows(m, i) for i, m in enumerate(models)]


def _lows(m: Model, number: int) -> dict[Path, Low]:
  if has_virtual(m.params):
    raise InputError(f"model {number} has virtual tokens, and only LoRA's adapters add up.")
  net, found = nnx.merge(m.graphdef, m.params), {}
  for path, adapter in adapters(net):
    if not isinstance(adapter, LoRA) or hasattr(adapter, "magnitude"):
      raise InputError(f"model {number} has an adapter that is not LoRA's, and does not add up.")
    halves = lambda one: one.halves(one.a.dtype)
    for _ in range(adapter.scale.ndim):
      halves = jax.vmap(halves)
    found[path] = halves(adapter)
  if not found:
    raise InputError(f"model {number} has no adapter.")
  return found


def _all(lows: list[dict[Path, Low]]) -> list[Path]:
  return list(dict.fromkeys(path for low in lows for path in low))


def _owners(m: Model, paths: Any) -> dict[Path, Owner]:
  return {path: owner for path, owner in owners(abstract(m.config)) if path in paths}


def _weight(base: dict, path: Path) -> Any:
  leaves: Any = flatten_dict(base)
  return leaves[(*path, "w")] if (*path, "w") in leaves else leaves[(*path, "table")]


def _rank_axis(owner: Owner, b: jax.Array) -> int:
  return b.ndim - 1 - len(sides(owner)[2])


def _nothing(owner: Owner, weight: Any, rank: int) -> Low:
  split = len(weight.shape) - len(sides(owner)[2])
  lead = split - len(sides(owner)[1])
  a = jnp.zeros((*weight.shape[:split], rank))
  return a, jnp.zeros((*weight.shape[:lead], rank, *weight.shape[split:]))


def _widened(owner: Owner, low: Low, rank: int) -> Low:
  a, b = low
  more = rank - a.shape[-1]
  pad = lambda x, axis: jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])
  return pad(a, a.ndim - 1), pad(b, _rank_axis(owner, b))


def _adapter(lows: dict[Path, Low], own: dict[Path, Owner]) -> dict:
  """Parameters of adapters whose scale is 1."""
  out = {}
  for path, (a, b) in lows.items():
    experts, inputs, _ = sides(own[path])
    stacked = a.shape[: a.ndim - 1 - len(inputs) - len(experts)]
    named = {"a": a, "b": b, "scale": jnp.ones(stacked)}
    out |= {(*path, KEY, name): array for name, array in named.items()}
  return unflatten_dict(out)
