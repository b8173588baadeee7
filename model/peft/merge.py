"""Adapters merged into what they adapt, and taken out again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from model.errors import InputError
from model.layers import Embed
from model.moe import ExpertMatrix
from model.peft.attach import Owner, adapters, apart, is_adapted, owners
from model.peft.ia3 import IA3
from model.peft.lora import sides
from model.peft.names import Path
from model.trained import Model

_ROUNDINGS = 64.0  # Of the dtype: by so much may what is merged differ from what is applied.
_PROBES = 8  # Random inputs for the comparison.


def merged(m: Model) -> Model:
  """The model without an adapter that computes what it computes with it.

  A table of tokens whose vectors are adapted, and which scores words too, becomes two: scores did
  not see the adapter. What is merged is compared with what is applied, on random inputs.

  Raises:
    InputError: if it has no adapter, its parameters are quantized, or merging is not exact enough.
  """
  if not is_adapted(m.params):
    raise InputError("the model has no adapter that could be merged.")
  if m.adapters:
    raise InputError(
      f"the model has several adapters ({', '.join(m.adapters)}): load it with one of them, and "
      "merge that."
    )
  base = apart(m.params)[0]
  leaves: Any = flatten_dict(base)
  net = nnx.merge(m.graphdef, m.params)
  new, untied = dict(leaves), None
  for path, owner in owners(net):
    if hasattr(owner, "adapter"):
      weight = (*path, "table" if isinstance(owner, Embed) else "w")
      _check_plain(weight, leaves[weight])
      new[weight] = _merged(owner, leaves[weight])
      _check(path, owner, leaves[weight], new[weight])
      if isinstance(owner.adapter, IA3) and (*path, "b") in leaves:
        scale = jax.vmap(IA3.bias) if _stacked(owner, leaves[weight]) else IA3.bias
        new[(*path, "b")] = scale(owner.adapter, leaves[(*path, "b")])
      untied = weight if path == (_scored(m),) and m.config.tie_embeddings else untied
  config = m.config
  if untied is not None:
    config = dataclasses.replace(config, tie_embeddings=False)
    new[("head", "proj", "w")] = jnp.transpose(leaves[untied])
  return dataclasses.replace(m, config=config, params=unflatten_dict(new), adapted=None)


def unmerged(m: Model, adapted: Model) -> Model:
  """The base of a merged model: what `adapted`, the model before merging, added is taken off.

  Parameters come back within rounding.

  Raises:
    InputError: for DoRA, whose norms a merged model does not have, or tables that were untied.
  """
  net = nnx.merge(adapted.graphdef, adapted.params)
  if m.config != adapted.config:
    raise InputError("the merged model has another config than the adapter's: load the base again.")
  leaves: Any = flatten_dict(m.params)
  new = dict(leaves)
  for path, adapter in adapters(net):
    if isinstance(adapter, IA3) or hasattr(adapter, "magnitude"):
      raise InputError("only what LoRA has added can be taken off again: load the base.")
    owner = dict(owners(net))[path]
    weight = (*path, "table" if isinstance(owner, Embed) else "w")
    new[weight] = leaves[weight] - _merged(owner, jnp.zeros_like(leaves[weight]))
  return dataclasses.replace(m, params=unflatten_dict(new))


def _scored(m: Model) -> str:
  return "decoder_embed" if m.config.decoder_embed else "embed"


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


def _check_plain(path: Path, weight: Any) -> None:
  if not isinstance(weight, jax.Array):
    name = ".".join(map(str, path))
    raise InputError(
      f"{name} is quantized, and an adapter is merged into floats: load the float base with "
      "adapter=, merge, and quantize what comes of it."
    )


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
  limit = _ROUNDINGS * float(jnp.finfo(after.dtype).eps)
  if not error <= limit:
    name = ".".join(map(str, path))
    raise InputError(
      f"{name} merged differs from {name} with its adapter by {error:.1e}, and {after.dtype.name} "
      f"rounds to {limit:.1e}: load the model with dtype='float32'."
    )
