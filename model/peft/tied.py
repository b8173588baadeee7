"""A table of tokens that scores words too, where an adapter brings it whole.

Torch PEFT trains a copy of such a table and leaves the head with the old one, unless it brings a
head that is the same, as `ensure_weight_tying` has it.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from model import hf
from model.errors import InputError
from model.heads import WORD_HEADS
from model.peft.create import dense
from model.peft.names import Path
from model.peft.tensors import tensor_of
from model.quant import Quantized
from model.trained import Model

_HEAD = ("head", "proj", "w")


def scoring_table(m: Model) -> Path | None:
  """The table that scores words; None: a head has a matrix of its own, or tells something else."""
  if not m.config.tie_embeddings or m.config.head_kind not in WORD_HEADS:
    return None
  return ("decoder_embed" if m.config.decoder_embed else "embed", "table")


def untied(m: Model, table: jax.Array | Quantized) -> Model:
  """A model whose table scores words, with a head of its own, which scores as `table` does."""
  leaves: Any = flatten_dict(m.params)
  if isinstance(table, Quantized):
    turned: Any = dataclasses.replace(table, table=False)
  else:
    turned = jnp.transpose(table)
  return dataclasses.replace(
    m, config=_untied(m).config, params=unflatten_dict(leaves | {_HEAD: turned})
  )


def heads(m: Model) -> set[str]:
  """What the family calls the matrix of the head that a model with a scoring table has not.

  Raises:
    InputError: if the family has no models with such a head.
  """
  return {p.theirs for p in hf.layout(_untied(m)).pieces if p.places[0].path == _HEAD}


def as_told(
  m: Model, config: Mapping[str, Any], parts: Iterable[str], whole: Mapping[str, np.ndarray]
) -> tuple[Model, dict[str, np.ndarray]]:
  """(the model, what an adapter of PEFT's brings whole): where that makes head and table differ, or
  adapts the head alone, a model with a head of its own; else without the tensor of the head.

  Args:
    config: adapter_config.json.
    parts: names of the modules that it adapts.
  """
  table = scoring_table(m)
  if table is None:
    return m, dict(whole)
  own = _heads_if_any(m)
  leaves: Any = flatten_dict(m.params)
  piece = next(p for p in hf.layout(m).pieces if p.places[0].path == table)
  adapts = any(f"{name}.weight" in own for name in parts)
  if not adapts and not whole.keys() & {piece.theirs, *own}:
    return m, dict(whole)
  old = tensor_of(piece, {table: dense(leaves[table])})
  new = whole.get(piece.theirs, old)
  head = next((whole[name] for name in own if name in whole), None)
  if head is None:
    head = new if config.get("ensure_weight_tying") else old
  kind = jnp.dtype(m.config.param_dtype)
  if not adapts and np.array_equal(np.asarray(head).astype(kind), np.asarray(new).astype(kind)):
    return m, {name: array for name, array in whole.items() if name not in own}
  return untied(m, leaves[table]), dict(whole)


def _untied(m: Model) -> Model:
  return dataclasses.replace(m, config=dataclasses.replace(m.config, tie_embeddings=False))


def _heads_if_any(m: Model) -> set[str]:
  try:
    return heads(m)
  except InputError:
    return set()
