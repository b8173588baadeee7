"""Several adapters of one base in one model, by name: each row of a batch has its own."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from model.architecture import architecture
from model.errors import InputError, nearest
from model.heads import abstract, unstack
from model.layers import Embed, Linear, param_info
from model.moe import ExpertMatrix
from model.peft import load
from model.peft.attach import KEY, Owner, adapters, apart, attached, of_adapter, owners, together
from model.peft.by_row import NEUTRAL, slot_axis
from model.peft.ia3 import IA3
from model.peft.lora import LoRA, sides
from model.peft.names import Path
from model.sharding import spec
from model.trained import Model

_MOST_OF_EXPERTS = 256  # Numbers of adapters travel with tokens, as floats that may have 8 bits.

Changes = dict[str, np.ndarray]  # Of one adapter at one owner, as ByRow has them, layers in front.


def named(models: Mapping[str, Model]) -> Model:
  """The base of models with an adapter each, with all of their adapters: called, it is the base,
  until `Model.using`, or the setting `adapter` of `infer.generate`, names one.

  LoRA in all its forms, DoRA and IA3 go together, whatever their ranks and what they adapt.

  Raises:
    InputError: if they are not adapters of one base, or of a kind that rows cannot choose.
  """
  if not models:
    raise InputError("adapter={} names no adapter: give at least one.")
  first = next(iter(models.values()))
  slots = {name: _changes(m, name, first) for name, m in models.items()}
  told = first.adapted and dataclasses.replace(first.adapted, rslora=False, whole=())
  return _with(dataclasses.replace(first, adapted=told), slots, _joined(first, slots))


def with_adapter(m: Model, name: str, other: str | File | Model) -> Model:
  """`m`, which has adapters by name, with the adapter at a PATH, or that of a model of the same
  base, under a name, new or in the place of the one that has it.

  In such a place the programs of `m` serve on, nothing is compiled, if its ranks are no larger than
  any that were there and it adapts nothing that none of them did.

  Raises:
    InputError: as `named` does.
  """
  _check_named(m, name)
  if not isinstance(other, Model):
    other = _loaded(m, other)
  slots = {n: _slot(m, i) for i, n in enumerate(m.adapters)}
  slots[name] = _changes(other, name, m)
  tree = _joined(m, slots)
  made = _with(m, slots, tree)
  same = flatten_dict(made.params).keys() == flatten_dict(m.params).keys()
  if same and "_unstacked" in vars(m):  # What was prepared of the base serves on, too.
    net, params = m.unstacked()
    new = _placed(m, _by_layer(m, tree), stacked=False)
    vars(made)["_unstacked"] = net, together(apart(params)[0], new)
  return made


def _loaded(m: Model, path: str | File) -> Model:
  """The base of `m` with the adapter at a PATH."""
  if not load.is_adapter(path):
    raise InputError(f"{path} is no adapter: a PEFT folder or an adapter's workdir.")
  base = dataclasses.replace(m, params=apart(m.params)[0], adapted=None, adapters=(), rows=1)
  told = None if m.adapted is None else m.adapted.base
  if told is None:
    raise InputError(f"{path}: where this model's base lies is not known; load both as a model.")
  return load.adapted(base, path, told, ema=False)


def numbers(m: Model, names: str | Sequence[str | None] | None) -> list[int]:
  """The numbers of adapters by name, one for all or one each; None is the base.

  Raises:
    InputError: for a name that the model does not have.
  """
  _check_named(m, names)
  listed = [names] if names is None or isinstance(names, str) else list(names)
  for name in listed:
    if name is not None and name not in m.adapters:
      raise InputError(
        f"adapter={name!r} is none of the model's: {', '.join(m.adapters)}, or None, the base."
        f"{nearest(str(name), m.adapters)}"
      )
  return [len(m.adapters) if name is None else m.adapters.index(name) for name in listed]


def _check_named(m: Model, asked: Any) -> None:
  if not m.adapters:
    raise InputError(
      f"adapter={asked!r}: the model has no adapters by name. Load it with adapter={{NAME: PATH}}."
    )


def chosen(params: dict, rows: Sequence[int], size: int | None = None) -> dict:
  """Parameters, stacked or not, whose rows have the adapters of these numbers; `size` rows, of
  which the last may be padding. Those without adapters by name are left as they are.
  """
  leaves: Any = flatten_dict(params)
  own = np.zeros(len(rows) if size is None else size, np.int32)
  own[: len(rows)] = rows
  for path, leaf in leaves.items():
    if is_rows(path):
      leaves[path] = np.broadcast_to(own, (*leaf.shape[:-1], len(own)))
  return unflatten_dict(leaves)


def is_rows(path: Path) -> bool:
  """Whether a parameter tells which adapter each row has."""
  return path[-1] == "rows" and of_adapter(path)


def using(m: Model, names: str | Sequence[str | None] | None) -> Model:
  """See Model.using."""
  rows = numbers(m, names)
  made = dataclasses.replace(m, params=chosen(m.params, rows), rows=len(rows))
  vars(made)["graphdef"] = m.graphdef
  if "_unstacked" in vars(m):
    net, params = m.unstacked()
    vars(made)["_unstacked"] = net, chosen(params, rows)
  return made


def _changes(m: Model, name: str, like: Model) -> dict[Path, Changes]:
  """What the adapter of a model changes, by its owner's path."""
  if not isinstance(name, str) or not name:
    raise InputError(f"adapter={{{name!r}: …}}: an adapter's name must be a text, and not empty.")
  _check_base(m, name, like)
  net = nnx.merge(m.graphdef, m.params)
  found, where = {}, dict(owners(net))
  for path, adapter in adapters(net):
    if isinstance(adapter, LoRA):
      found[path] = _of_lora(where[path], adapter)
    elif isinstance(adapter, IA3):
      found[path] = {kind: np.asarray(getattr(adapter, kind)[...])
                     for kind in ("outputs", "inputs") if hasattr(adapter, kind)}  # fmt: skip
  strange = [path for path in flatten_dict(m.params) if of_adapter(path)
             and path[: path.index(KEY)] not in found]  # fmt: skip
  if strange or not found:
    what = f"has {'.'.join(map(str, strange[0]))}, which" if strange else "has no adapter that"
    raise InputError(f"adapter {name!r} {what} rows of a batch cannot choose: load it alone.")
  return found


def _check_base(m: Model, name: str, like: Model) -> None:
  if m.adapters:
    raise InputError(f"adapter {name!r} is several adapters itself: name each of them.")
  if m.adapted is not None and (own := [p for p in m.adapted.whole if not of_adapter(p)]):
    raise InputError(
      f"adapter {name!r} has trained {'.'.join(map(str, own[0]))} itself, which every row of a "
      "batch shares: load it alone."
    )
  here: Any = flatten_dict(apart(m.params)[0])
  there: Any = flatten_dict(apart(like.params)[0])
  same = here.keys() == there.keys() and all(here[p].shape == there[p].shape for p in here)
  if architecture(m.config) != architecture(like.config) or not same:
    raise InputError(f"adapter {name!r} is of another base than the others.")


def _of_lora(owner: Owner, adapter: LoRA) -> Changes:
  """LoRA as A and its scaled B; of DoRA with what its magnitudes multiply outputs by."""
  a, b, scale = (np.asarray(p[...]) for p in (adapter.a, adapter.b, adapter.scale))
  axis = b.ndim - 1 - len(sides(owner)[2])
  if hasattr(adapter, "start_a"):
    a = np.concatenate((a, np.asarray(adapter.start_a[...])), axis=-1)
    b = np.concatenate((b, -np.asarray(adapter.start_b[...])), axis=axis)
  over = lambda vector, like: vector.reshape(*vector.shape, *(1,) * (like.ndim - vector.ndim))
  b = b * over(scale.astype(b.dtype), b)
  if not hasattr(adapter, "magnitude") or not isinstance(owner, Linear):
    return {"a": a, "b": b}
  stacked = scale.ndim
  outputs = np.asarray(_shares(owner, stacked)).astype(b.dtype)
  made = {"a": a, "b": b * np.expand_dims(outputs, stacked), "outputs": outputs}
  if hasattr(owner, "b"):
    made["shift"] = np.asarray(owner.b[...]).astype(b.dtype) * (1 - outputs)
  return made


@functools.partial(jax.jit, static_argnums=1)
def _shares(owner: Linear, stacked: int) -> jax.Array:
  share = lambda owner: owner.adapter.share(owner)
  for _ in range(stacked):
    share = jax.vmap(share)
  return share(owner)


def _slot(m: Model, number: int) -> dict[Path, Changes]:
  """What one of a model's adapters changes."""
  leaves: Any = flatten_dict(m.params)
  own, found = dict(owners(abstract(m.config))), {}
  for path, leaf in leaves.items():
    if of_adapter(path) and not is_rows(path):
      owner = path[: path.index(KEY)]
      axis = _stacked(own[owner]) + slot_axis(own[owner], path[-1])
      found.setdefault(owner, {})[path[-1]] = np.take(np.asarray(leaf), number, axis)
  return found


def _stacked(owner: Owner) -> int:
  """How many axes of stacked layers an owner's parameters have."""
  weight = owner.table if isinstance(owner, Embed) else owner.w
  return len(weight.shape) - sum(map(len, sides(owner)))


def _with(m: Model, slots: dict[str, Any], tree: dict) -> Model:
  """A model with adapters in the place of its own."""
  params = together(apart(m.params)[0], _placed(m, tree, stacked=True))
  return dataclasses.replace(m, params=params, adapters=tuple(slots), rows=1)


def _joined(m: Model, slots: dict[str, dict[Path, Changes]]) -> dict:
  """The parameters of ByRow at every owner that an adapter changes; no row has one yet."""
  made = {}
  for path, owner in owners(abstract(m.config)):
    own = [slot.get(path, {}) for slot in slots.values()]
    if not any(own):
      continue
    if isinstance(owner, ExpertMatrix) and len(slots) > _MOST_OF_EXPERTS:
      raise InputError(f"{len(slots)} adapters of experts: at most {_MOST_OF_EXPERTS} go together.")
    stacked = _stacked(owner)
    for name in dict.fromkeys(name for changes in own for name in changes):
      made[(*path, KEY, name)] = _stack(owner, name, own, stacked)
    lead = made[(*path, KEY, name)].shape[:stacked]
    made[(*path, KEY, "rows")] = np.full((*lead, 1), len(slots), np.int32)
  return unflatten_dict(made)


def _stack(owner: Owner, name: str, own: list[Changes], stacked: int) -> np.ndarray:
  """A parameter of all adapters of an owner; lower ranks are filled up with zeros."""
  there = [changes[name] for changes in own if name in changes]
  shape = tuple(map(max, zip(*(array.shape for array in there), strict=True)))
  arrays = [np.full(shape, NEUTRAL[name], there[0].dtype) for _ in own]
  for array, changes in zip(arrays, own, strict=True):
    if name in changes:
      array[tuple(map(slice, changes[name].shape))] = changes[name]
  return np.stack(arrays, stacked + slot_axis(owner, name))


def _placed(m: Model, tree: dict, *, stacked: bool) -> dict:
  """Arrays of adapters where a model's parameters are."""
  net = attached(abstract(m.config, stacked=stacked), tree)
  axes: Any = flatten_dict(param_info(net))
  there = next(a for a in jax.tree.leaves(m.params) if isinstance(a, jax.Array)).sharding
  leaves: Any = flatten_dict(tree)

  def place(path: Path, array: np.ndarray) -> Any:
    if is_rows(path):
      return array
    where: Any = there
    if isinstance(there, jax.sharding.NamedSharding):
      mesh: Any = there.mesh
      where = jax.sharding.NamedSharding(mesh, spec(axes[path].axes, array.shape, mesh))
    return jax.device_put(array, where)

  return unflatten_dict({path: place(path, array) for path, array in leaves.items()})


def _by_layer(m: Model, tree: dict) -> dict:
  """Arrays of adapters with one entry per layer, as `Model.unstacked` has them."""
  full = dict(tree)
  for name in m.config.stacks:
    stacks = sum(len(pattern) for pattern, _ in m.config.groups(name))
    layers = tree.get(name, {}).get("layers", {})
    full[name] = {**tree.get(name, {}), "layers": {i: layers.get(i, {}) for i in range(stacks)}}
  return unstack(m.config, full)
