"""Adapters as parts of a network: beside the parameters that they adapt, under `adapter`."""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int

from model.errors import InputError
from model.layers import Embed, Linear
from model.moe import ExpertMatrix
from model.peft.bottleneck import Bottleneck, parts
from model.peft.by_row import ByRow
from model.peft.ia3 import IA3
from model.peft.lora import LoRA
from model.peft.names import KEY, Path
from model.peft.written import attach_virtual

Owner = Linear | Embed | ExpertMatrix


def owners(module: Any, path: Path = ()) -> Iterator[tuple[Path, Owner]]:
  """What may be adapted below `module`, with its path in the nested dict of parameters."""
  if isinstance(module, Linear | Embed | ExpertMatrix):
    yield path, module
  elif isinstance(module, nnx.List):
    for i, one in enumerate(module):
      yield from owners(one, (*path, i))
  elif isinstance(module, nnx.Module):
    for name, one in vars(module).items():
      if isinstance(one, nnx.Module):
        yield from owners(one, (*path, name))


def attached(net: nnx.Module, params: dict) -> nnx.Module:
  """`net` with a module for each adapter in `params` (arrays, or only their shapes).

  Raises:
    InputError: for an adapter of what the network does not have.
  """
  leaves: Any = flatten_dict(params)
  flat: dict[Path, dict[Path, Any]] = {}
  for path, leaf in leaves.items():
    if KEY in path:
      at = path.index(KEY)
      flat.setdefault(path[:at], {})[path[at + 1 :]] = leaf
  found: dict[Path, dict[str, Any]] = {path: unflatten_dict(own) for path, own in flat.items()}
  if not found:
    return net
  attach_virtual(net, found)
  for path, owner in owners(net):
    if path in found:
      own = found.pop(path)
      kind: Any = ByRow if "rows" in own else LoRA if "a" in own else IA3
      owner.adapter = kind(owner, own)
  for path, part in parts(net):
    if path in found:
      part.adapter = Bottleneck(found.pop(path))
  if found:
    name = ".".join(map(str, next(iter(found))))
    raise InputError(f"{len(found)} adapters belong to nothing in this model, as that of {name}.")
  return net


def adapters(module: Any) -> Iterator[tuple[Path, LoRA | IA3 | ByRow | Bottleneck]]:
  """The adapters of a network, each with its owner's path."""
  for path, owner in (*owners(module), *parts(module)):
    if hasattr(owner, KEY):
      yield path, owner.adapter


def of_adapter(path: Path) -> bool:
  """Whether a parameter is one of an adapter."""
  return KEY in path


def is_adapted(params: dict) -> bool:
  """Whether there are adapters among the parameters."""
  return any(map(of_adapter, flatten_dict(params)))


def apart(params: dict) -> tuple[dict, dict]:
  """(the base's parameters, those of adapters), both nested."""
  leaves: Any = flatten_dict(params)
  parts = ({}, {})
  for path, leaf in leaves.items():
    parts[of_adapter(path)][path] = leaf
  return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def together(*trees: dict) -> dict:
  """Nested dicts of different leaves as one."""
  leaves: dict = {}
  for tree in trees:
    leaves |= flatten_dict(tree)
  return unflatten_dict(leaves)


def with_dropout(net: nnx.Module, rate: float, key: jax.Array) -> None:
  """Lets the adapters of `net` drop what they read, each and in each layer by a key of its own."""
  for number, (_, adapter) in enumerate(adapters(net)):
    if isinstance(adapter, LoRA | Bottleneck):
      own, lead = jax.random.fold_in(key, number), adapter.scale.shape
      adapter.rate = rate
      keys = jax.random.split(own, lead) if lead else own
      adapter.key = nnx.Param(jax.random.key_data(keys))


def dropout_rate(net: nnx.Module) -> float:
  """The highest rate at which adapters of `net` drop what they read."""
  return max((getattr(adapter, "rate", 0.0) for _, adapter in adapters(net)), default=0.0)


def with_folded_keys(net: nnx.Module, index: Int[Array, ""]) -> None:
  """Lets the adapters of `net` that drop something drop something else for each index."""
  for _, adapter in adapters(net):
    if isinstance(adapter, LoRA | Bottleneck) and hasattr(adapter, "key"):
      keys = jax.random.wrap_key_data(adapter.key[...])
      own = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys.reshape(-1))
      adapter.key = nnx.Param(jax.random.key_data(own.reshape(keys.shape)))
