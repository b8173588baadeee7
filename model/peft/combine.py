"""Several adapters of one base: by turns in the same compiled programs, or summed with weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from model.architecture import architecture
from model.errors import InputError, nearest
from model.heads import abstract
from model.peft.attach import KEY, Owner, adapters, apart, of_adapter, owners, together
from model.peft.lora import LoRA, sides
from model.peft.names import Path
from model.peft.virtual_files import has_virtual
from model.trained import Adapted, Model

HOW = ("cat", "linear", "svd")
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
    out.append(dataclasses.replace(m, config=models[0].config, params=params))
  return out


def combined(
  models: Sequence[Model], weights: Sequence[float], *, how: str = "cat", rank: int | None = None
) -> Model:
  """The base with the weighted sum of what the adapters of the models add to it, as one adapter.

  Args:
    how: as PEFT's `add_weighted_adapter` has them. `cat`: exact, of a rank that is the sum of
      theirs. `svd`: the nearest to it of `rank`, matrix by matrix of ours, where PEFT takes fused
      queries, keys and values as one. `linear`: the sum of A times the sum of B, each weighted by
      the roots of weights and scales, of their own rank; that adds other products too.
    rank: of svd; None: the largest of theirs.

  Raises:
    InputError: if they are not LoRA adapters of one base, or there are not as many weights; for
      linear, if their ranks differ.
  """
  if how not in HOW:
    raise InputError(f"how={how!r} is not known: use one of {', '.join(HOW)}.{nearest(how, HOW)}")
  if rank is not None and (how != "svd" or rank < 1):
    raise InputError(f"rank={rank} is that of how='svd', at least 1: leave it out.")
  if len(weights) != len(models):
    raise InputError(f"{len(models)} adapters were given {len(weights)} weights: one for each.")
  base, lows = _of_one_base(models)
  own, summed = _owners(models[0], _all(lows)), {}
  most = max(low[0].shape[-1] for pairs in lows for low in pairs.values())
  for path in _all(lows):
    there = [i for i, low in enumerate(lows) if path in low]
    pairs, factors = [lows[i][path] for i in there], [weights[i] for i in there]
    if how == "linear":
      scales = [_leaf(models[i], (*path, KEY, "scale")) for i in there]
      summed[path] = _averaged(path, pairs, factors, scales)
      continue
    a = jnp.concatenate([a for a, _ in pairs], axis=-1)
    parts = [b * jnp.asarray(w, b.dtype) for (_, b), w in zip(pairs, factors, strict=True)]
    summed[path] = a, jnp.concatenate(parts, axis=_rank_axis(own[path], parts[0]))
    if how == "svd":
      a, b = summed[path]
      summed[path] = _nearest(a, b, own[path], most if rank is None else rank)
  return dataclasses.replace(models[0], params=together(base, _adapter(summed, own)))


def _averaged(
  path: Path, pairs: list[Low], weights: list[float], scales: list[jax.Array]
) -> Low:  # fmt: skip
  """Sums of A and of B without their scales, by the roots of weight and scale; signs go to A."""
  ranks = {a.shape[-1] for a, _ in pairs}
  if len(ranks) > 1:
    raise InputError(
      f"how='linear' adds up A and B, and {'.'.join(map(str, path))} has the ranks "
      f"{', '.join(map(str, sorted(ranks)))}: use cat or svd."
    )
  times = lambda x, factor: x * factor.reshape(*factor.shape, *(1,) * (x.ndim - factor.ndim))
  sums = [jnp.zeros_like(x) for x in pairs[0]]
  for (a, b), weight, scale in zip(pairs, weights, scales, strict=True):
    root = jnp.sqrt(abs(weight) * scale).astype(a.dtype)
    sums[0] += times(a, -root if weight < 0 else root)
    sums[1] += times(b, root / scale.astype(b.dtype))
  return sums[0], sums[1]


def _nearest(a: jax.Array, b: jax.Array, owner: Owner, rank: int) -> Low:
  """The nearest of a rank to A B, by the singular values of the small matrix between two bases."""
  axis, writes = _rank_axis(owner, b), len(sides(owner)[2])
  lead = b.shape[:axis]
  wide = jnp.promote_types(a.dtype, jnp.float32)
  left = jnp.linalg.qr(a.astype(wide).reshape(*lead, -1, a.shape[-1]))
  right = jnp.linalg.qr(jnp.swapaxes(b.astype(wide).reshape(*lead, a.shape[-1], -1), -1, -2))
  u, s, vh = jnp.linalg.svd(left.R @ jnp.swapaxes(right.R, -1, -2), full_matrices=False)
  kept = min(rank, s.shape[-1])
  made_a = left.Q @ u[..., :kept]
  made_b = (s[..., :kept, None] * vh[..., :kept, :]) @ jnp.swapaxes(right.Q, -1, -2)
  outputs = b.shape[b.ndim - writes :]
  return (made_a.reshape(*a.shape[:-1], kept).astype(a.dtype),
          made_b.reshape(*lead, kept, *outputs).astype(b.dtype))  # fmt: skip


def _leaf(m: Model, path: Path) -> Any:
  leaves: Any = flatten_dict(m.params)
  return leaves[path]


def _of_one_base(models: Sequence[Model]) -> tuple[dict, list[dict[Path, Low]]]:
  """(the parameters of the base, the adapters of each model by their owner's path)."""
  if not models:
    raise InputError("no adapters were given: at least one is needed.")
  first = models[0]
  base = apart(first.params)[0]
  for i, m in enumerate(models):
    same = architecture(m.config) == architecture(first.config)
    if not same or not _same_base(m.adapted, first.adapted):
      named = None if m.adapted is None or first.adapted is None else (
        m.adapted.base, first.adapted.base
      )  # fmt: skip
      raise InputError(f"model {i} and model 0 are adapters of different bases: {named}.")
    if m.adapted is not None and any(not of_adapter(p) for p in m.adapted.whole):
      raise InputError(f"model {i} has parameters of its own beside its adapter, which do not add.")
  return base, [_lows(m, i) for i, m in enumerate(models)]


def _same_base(one: Adapted | None, other: Adapted | None) -> bool:
  """Whether nothing tells that two adapters are of different bases, which may have moved."""
  if one is None or other is None:
    return True
  if one.hash is not None and other.hash is not None:
    return one.hash == other.hash
  return one.base == other.base


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
