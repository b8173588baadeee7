"""Hugging Face folders in and out: config.json, safetensors, tokenizer; a table for each family."""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from model.config import ModelConfig
from model.errors import InputError, nearest
from model.hf import (
  decoders,
  encoder_decoders,
  encoders,
  expert_decoders,
  generation,
  gpt_decoders,
  sentences,
)
from model.hf.engine import Layout
from model.hf.family import Family
from model.hf.safetensors_files import INDEX, SINGLE, open_folder, write_folder
from model.hf.torch_files import open_torch_file
from model.tokenizer_files import holds_tokenizer
from model.trained import Model

FAMILIES: dict[str, Family] = {
  family.model_type: family
  for tables in (decoders, gpt_decoders, expert_decoders, encoders, encoder_decoders)
  for family in tables.FAMILIES
}
_TORCH = "pytorch_model.bin"


def is_folder(path: str | Path) -> bool:
  """Whether `path` is a folder as Transformers writes it."""
  folder = Path(path).expanduser()
  return "model_type" in _config(folder) if (folder / "config.json").is_file() else False


class Folder:
  """A Hugging Face folder: what its model is, and its parameters one after the other.

  Attributes:
    config: of the model; its `param_dtype` is that of the file.
    layout: which tensors make which parameters.
    family: `model_type` of its config.json.
    labels: names of the classes, where its head has them.
    tokenizer: where it lies; None: the folder has none.
    end_ids: tokens that end what the model writes.
    text_limit: tokens of the longest text that it embeds, where the folder says it.
  """

  def __init__(self, path: str | Path):
    """
    Raises:
      InputError: for a family, a class, a field or a tensor that is not known, and for tensors
        that are missing, damaged or of another shape, all of them.
    """
    folder = Path(path).expanduser()
    values = _config(folder)
    family = _family(values.get("model_type"))
    name, cfg = family.read(values)
    pooled = sentences.read(folder)
    self.text_limit = None if pooled is None else pooled.limit
    cfg = cfg if pooled is None else pooled.embedding(cfg)
    self.family = family.model_type
    self.layout = Layout(cfg, family.table(name), name)
    self._tensors = _named(family, _open(folder), name)
    heads = {row.theirs for one in family.classes.values() for row in one.rows}
    _check(family, name, cfg, self.layout, self._tensors, heads if pooled is not None else set())
    stored = self._tensors[_table(self.layout)].dtype.name
    self.config = dataclasses.replace(cfg, param_dtype=stored)
    self.labels = _label_names(cfg, values)
    self.tokenizer = folder if holds_tokenizer(folder) else None
    self.end_ids = generation.read_ends(folder, values, cfg)

  def params(self, wanted: dict) -> dict:
    """Parameters, each read when the one before is where it belongs.

    Args:
      wanted: shapes, dtypes and shardings of all or of some of them, nested.
    """
    place = lambda leaf, like: jax.device_put(
      self.layout.leaf(leaf, self._tensors, like.dtype), like.sharding
    )
    likes: Any = flatten_dict(wanted)
    return unflatten_dict({leaf: place(leaf, like) for leaf, like in likes.items()})


def save(m: Model, folder: Path, *, family: str | None = None) -> None:
  """Writes config.json, generation_config.json, safetensors and the tokenizer as Transformers reads
  them; with an embedding head, how sentence-transformers pools too.

  Args:
    family: `model_type` of config.json; None: the first that the model is one of.

  Raises:
    InputError: if it is not one of the family, or of any, with the fields that differ.
  """
  found, values, layout = _written(m.config, family)
  leaves: Any = flatten_dict(m.params)
  shapes = {
    piece.theirs: (np.dtype(leaves[piece.places[0].path].dtype), piece.shape)
    for piece in layout.ordered()
  }  # fmt: skip
  kind = np.dtype(next(iter(leaves.values())).dtype)
  zeros = {name: np.zeros(shape(m.config), kind) for name, shape in found.zeros.items()}
  shapes |= {name: (kind, array.shape) for name, array in zeros.items()}
  tensors = layout.tensors(lambda leaf: np.asarray(leaves[leaf]))
  write_folder(folder, shapes, itertools.chain(tensors, zeros.items()))
  ids = generation.token_ids(m, found.pad)
  ends = ids.get("eos_token_id")
  values |= {"dtype": kind.name, **ids}
  if isinstance(ends, list):  # Older classes take one number here.
    own = None if m.tokenizer is None else m.tokenizer.eos_id
    values["eos_token_id"] = own if own in ends else ends[0]
  if m.labels is not None:
    values |= {"id2label": {str(i): one for i, one in enumerate(m.labels)},
               "label2id": {one: i for i, one in enumerate(m.labels)}}  # fmt: skip
  (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
  if m.config.head_kind == "language":
    generation.write(folder, m, ids)
  if m.tokenizer is not None:
    m.tokenizer.save(folder, token_types=bool(m.config.token_types))
  if sentences.are_told(m.config, m.text_limit, found):
    sentences.write(folder, m.config, m.text_limit)


def _written(cfg: ModelConfig, family: str | None) -> tuple[Family, dict[str, Any], Layout]:
  reasons = []
  for one in FAMILIES.values() if family is None else [_family(family)]:
    try:
      name, values = one.write(sentences.body(cfg, one))
      return one, values, Layout(cfg, one.table(name), name)
    except InputError as error:
      reasons.append(str(error))
  shortest = min(reasons, key=len)
  known = "" if family else f"none of {', '.join(FAMILIES)} is this model. The nearest: "
  raise InputError(f"{known}{shortest}")


def _family(model_type: Any) -> Family:
  if model_type not in FAMILIES:
    raise InputError(
      f"config.json: model_type={model_type!r} is not known, expected one of "
      f"{', '.join(FAMILIES)}.{nearest(str(model_type), FAMILIES)}"
    )
  return FAMILIES[model_type]


def _config(folder: Path) -> dict[str, Any]:
  try:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  except (ValueError, OSError) as error:
    raise InputError(f"{folder / 'config.json'} cannot be read: {error}.") from None
  if not isinstance(values, dict):
    raise InputError(f"{folder / 'config.json'} must hold a JSON object.")
  return values


def _open(folder: Path) -> dict[str, np.ndarray]:
  if (folder / _TORCH).is_file() and not any((folder / n).is_file() for n in (INDEX, SINGLE)):
    return open_torch_file(folder / _TORCH)
  return open_folder(folder)


def _named(family: Family, tensors: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
  """Tensors under the names of the table: older names changed, the body's prefix put or taken."""
  out = {}
  for key, array in tensors.items():
    for old, new in family.renamed:
      key = re.sub(old, new, key)
    out[key] = array
  prefix = family.prefix
  if family.classes[name].base or any(key.startswith(prefix) for key in out):
    return out
  names = (row.theirs for row in family.table(name) if row.theirs.startswith(prefix))
  bodies = {one.removeprefix(prefix).split(".")[0] for one in names}
  return {prefix + k if k.split(".")[0] in bodies else k: array for k, array in out.items()}


def _check(
  family: Family, name: str, cfg: ModelConfig, layout: Layout, tensors: Mapping[str, np.ndarray],
  heads: set[str],
) -> None:  # fmt: skip
  """Compares with the tensors of a folder; `heads` are those of heads that the model leaves out."""
  whole = [key for key, array in tensors.items() if not jnp.issubdtype(array.dtype, jnp.floating)]
  whole = [key for key in whole if not family.computes_nothing(name, key)]
  if whole:
    kind = tensors[whole[0]].dtype.name
    raise InputError(f"{whole[0]} has dtype {kind}, expected a floating one: {len(whole)} such.")
  shapes = {key: array.shape for key, array in tensors.items()}
  repeated = set(family.repeated) if cfg.tie_embeddings else set(family.repeated[:-1])
  spare = repeated | set(family.zeros) | heads
  unread = lambda key: key in spare or family.computes_nothing(name, key)
  layout.check(shapes, unread)
  table = _table(layout)
  for key in repeated & set(tensors):
    if not np.array_equal(tensors[key], tensors[table]):
      raise InputError(f"{key} differs from {table}, and config.json says that they are tied.")
  for key in set(family.zeros) & set(tensors):
    if np.any(tensors[key]):
      raise InputError(f"{key} is not zero: {name} has no such bias here.")


def _table(layout: Layout) -> str:
  """The tensor of theirs that holds the embeddings of tokens."""
  return layout.of_leaf["embed", "table"][0][0].theirs


def _label_names(cfg: ModelConfig, values: Mapping[str, Any]) -> tuple[str, ...] | None:
  names = values.get("id2label")
  if cfg.num_labels is None or not isinstance(names, dict):
    return None
  return tuple(names[key] for key in sorted(names, key=int))
