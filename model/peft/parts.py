"""Which parameters are trained, and the two trees that they and the others make."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from model.config import ModelConfig
from model.errors import InputError
from model.peft.attach import KEY, of_adapter, together
from model.peft.config import PeftConfig
from model.peft.names import Names, Path, any_matches, check_used

BIASES = ("b", "bias")
LABEL_HEADS = ("sequence", "token", "span")

Trainable = Callable[[str, type], bool]  # (dotted name of a parameter, its type) -> is it trained?


def also(config: PeftConfig, model: ModelConfig) -> tuple[str, ...]:
  """What is trained besides: where nothing is said, a head that tells labels."""
  if config.also is not None or config.method == "full":
    return config.also or ()
  return ("head",) if model.head_kind in LABEL_HEADS else ()


def trainable(config: PeftConfig, model: ModelConfig) -> Trainable:
  """The one predicate that decides what is trained, of a parameter's name and type."""
  besides = also(config, model)

  def decide(name: str, kind: type) -> bool:
    owner, inside, _ = name.partition(f".{KEY}.")
    if inside:
      chosen = not config.targets or any_matches(config.targets, owner)
      return issubclass(kind, nnx.LoRAParam) and chosen
    if config.method == "full":
      wanted = not config.targets or any_matches(config.targets, name)
      return wanted and not any_matches(config.freeze, name)
    if any_matches(besides, name):
      return True
    if config.method == "bitfit":
      bias = name.split(".")[-1] in BIASES
      return bias and (not config.targets or any_matches(config.targets, name))
    return False

  return decide


@dataclasses.dataclass(frozen=True)
class Parts:
  """Which parameters are trained: None, whole; else rows of the axis of layers, () for none."""

  rows: Mapping[Path, tuple[int, ...] | None]

  def split(self, tree: dict) -> tuple[dict, dict]:
    """(what is trained, the rest): a parameter of which some layers are trained is in both."""
    leaves: Any = flatten_dict(tree)
    params, frozen = {}, {}
    for path, leaf in leaves.items():
      rows = self.rows[path]
      if rows is None:
        params[path] = leaf
      elif not rows:
        frozen[path] = leaf
      else:
        params[path], frozen[path] = leaf[np.array(rows)], leaf[self._others(path, leaf)]
    return unflatten_dict(params), unflatten_dict(frozen)

  def kinds(self, infos: dict) -> tuple[dict, dict]:
    """`split`, of what is known of parameters instead of arrays."""
    leaves: Any = flatten_dict(infos)
    whole = {path: info for path, info in leaves.items() if self.rows[path] != ()}
    rest = {path: info for path, info in leaves.items() if self.rows[path] is not None}
    return unflatten_dict(whole), unflatten_dict(rest)

  def join(self, params: dict, frozen: dict) -> dict:
    """The tree that `split` took apart."""
    trained: Any = flatten_dict(params)
    others: Any = flatten_dict(frozen)
    out = {**others, **trained}
    for path in trained.keys() & others.keys():
      pair = (trained[path], others[path])
      both: Any = jnp.concatenate(pair)
      order = np.argsort([*(self.rows[path] or ()), *self._others(path, both)])
      out[path] = both if list(order) == list(range(len(order))) else both[order]
    return unflatten_dict(out)

  def consuming(self, function: Callable[[dict], Any], **options: Any) -> Callable[[dict], Any]:
    """`jax.jit` of a function of a whole tree, which is donated but for parameters of which some
    layers are trained: cut in two, they leave no room that a result could take.
    """
    run = jax.jit(lambda whole, cut: function(together(whole, cut)), donate_argnums=0, **options)

    def call(tree: dict) -> Any:
      leaves: Any = flatten_dict(tree)
      parts: tuple[dict, dict] = ({}, {})
      for path, leaf in leaves.items():
        parts[bool(self.rows[path])][path] = leaf
      return run(*map(unflatten_dict, parts))

    return call

  def _others(self, path: Path, leaf: Any) -> np.ndarray:
    return np.setdiff1d(np.arange(leaf.shape[0]), self.rows[path] or ())


def parts_of(config: PeftConfig, model: ModelConfig, net: nnx.Module) -> Parts:
  """What of `net`, with its adapters, is trained.

  Raises:
    InputError: for a pattern that matches nothing, or if nothing is trained.
  """
  state = nnx.to_pure_dict(nnx.state(net, nnx.Param))
  kinds: Any = flatten_dict(_kinds(net))
  names, decide = Names(model), trainable(config, model)
  found = {path: names.of(path) for path in flatten_dict(state)}
  base = [name for path, own in found.items() if not of_adapter(path) for name in own]
  if not config.adds:
    biases = [name for name in base if name.split(".")[-1] in BIASES]
    check_used("targets", config.targets, biases if config.method == "bitfit" else base)
  check_used("freeze", config.freeze, base)
  check_used("also", also(config, model), base)
  rows = {}
  for path, own in found.items():
    taken = tuple(i for i, name in enumerate(own) if decide(name, kinds[path]))
    rows[path] = None if len(taken) == len(own) else taken
  if all(value == () for value in rows.values()):
    raise InputError(
      f"peft.method={config.method!r} trains none of the parameters of this model: change "
      "peft.targets or the method."
    )
  return Parts(rows)


def _kinds(net: nnx.Module) -> dict:
  """The type of each parameter, nested."""
  is_param = lambda p: isinstance(p, nnx.Param)
  state = nnx.state(net, nnx.Param)
  return nnx.to_pure_dict(jax.tree.map(type, state, is_leaf=is_param))
