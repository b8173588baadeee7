"""Hugging Face folders in and out: config.json, safetensors, tokenizer; a table for each family.

GGUF files are read by the same tables: gguf_models.py.
"""

import dataclasses
import functools
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
  deberta,
  decoders,
  encoder_decoders,
  encoders,
  expert_decoders,
  generation,
  gpt_decoders,
  latent_decoders,
  layer_norm_decoders,
  mxfp4,
  relative_encoders,
  sentences,
)
from model.hf.engine import Layout
from model.hf.engine import Path as LeafPath
from model.hf.family import Family
from model.hf.gguf_models import read as read_gguf
from model.hf.problems import label_names
from model.hf.safetensors_files import (
  INDEX,
  SINGLE,
  forget,
  open_folder,
  open_indexed,
  write_folder,
)
from model.hf.source import Source
from model.hf.torch_files import open_torch_file
from model.json_files import read_object
from model.tokenizer import Tokenizer
from model.tokenizer_files import holds_tokenizer
from model.trained import Model

_TABLES = (
  decoders, gpt_decoders, layer_norm_decoders, expert_decoders, latent_decoders, encoders,
  relative_encoders, deberta, encoder_decoders,
)  # fmt: skip
FAMILIES: dict[str, Family] = {
  family.model_type: family for tables in _TABLES for family in tables.FAMILIES
}
_NARROW = "bfloat16"
_TORCH, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def is_folder(path: str | Path) -> bool:
  """Whether `path` is a folder as Transformers writes it, or a GGUF file."""
  folder = Path(path).expanduser()
  if _is_gguf(folder):
    return True
  return "model_type" in read_object(folder / "config.json")


def _is_gguf(path: Path) -> bool:
  return path.suffix == ".gguf" and not path.is_dir()


class Folder:
  """A Hugging Face folder or a GGUF file: what its model is, its parameters one after the other.

  Attributes:
    config: of the model; its `param_dtype` is the one of the file, or holds all that are there.
    dtypes: of the tensors that are read in it.
    layout: which tensors make which parameters.
    family: `model_type` of its config.json.
    labels: names of the classes, where its head has them.
    tokenizer: None: the folder has none.
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
    pooled = sentences.read(folder)
    values, tensors, has = _read(folder)
    family = _family(values.get("model_type"))
    name, cfg = family.read(values)
    self.text_limit = None if pooled is None else pooled.limit
    cfg = cfg if pooled is None else pooled.embedding(cfg)
    self.family = family.model_type
    packed = values.get("quantization_config") is not None  # In the one form that `read` lets pass.
    tensors = mxfp4.unpacked(tensors) if packed else tensors
    self._tensors = _named(family, tensors, name, tied=cfg.tie_embeddings)
    told = family.classes[name].told.items()
    cfg = dataclasses.replace(cfg, **{field: tell(self._tensors) for field, tell in told})
    narrow = dataclasses.replace(cfg, param_dtype=_NARROW)  # So that it shows what is kept wider.
    self.layout = Layout(narrow, family.table(name), name)
    heads = {row.theirs for one in family.classes.values() for row in one.rows}
    _check(family, name, cfg, self.layout, self._tensors, heads if pooled is not None else set())
    self.dtypes = _dtypes(self.layout, self._tensors)
    stored = functools.reduce(jnp.promote_types, self.dtypes).name
    self.config = dataclasses.replace(cfg, param_dtype=stored)
    self.labels = None if cfg.num_labels is None else label_names(values)
    self.tokenizer = Tokenizer.load(folder) if has else None
    self.end_ids = generation.read_ends(folder, values, cfg)

  def leaf(self, path: LeafPath, dtype: Any, layer: int | None = None) -> np.ndarray:
    """One parameter, or one layer of a stacked one."""
    out = self.layout.leaf(path, self._tensors, dtype, layer)
    for piece, _ in self.layout.pieces_of(path, layer):
      forget(self._tensors[piece.theirs])
    return out

  def params(self, wanted: dict) -> dict:
    """Parameters, each read when the one before is where it belongs.

    Args:
      wanted: shapes, dtypes and shardings of all or of some of them, nested.
    """
    place = lambda path, like: jax.device_put(self.leaf(path, like.dtype), like.sharding)
    likes: Any = flatten_dict(wanted)
    return unflatten_dict({path: place(path, like) for path, like in likes.items()})


def save(source: Source, folder: Path, *, family: str | None = None) -> None:
  """Writes safetensors, the tokenizer, generation_config.json and, at last, config.json as
  Transformers reads them; with an embedding head, how sentence-transformers pools too.

  No more is held than the parameters that one tensor of theirs is made of, and that tensor.

  Args:
    family: `model_type` of config.json; None: that of the source, or the first that it is one of.

  Raises:
    InputError: if it is not one of the family, or of any, with the fields that differ; or if its
      tokenizer pads with an id from which the family would count positions otherwise.
  """
  cfg, kind = source.config, np.dtype(source.config.param_dtype)
  found, values, layout = _written(cfg, family or source.family)
  ids = generation.token_ids(source, found.pad)
  _check_padding(found, values, ids)
  dtype = lambda piece: np.dtype(layout.leaves[piece.places[0].path].dtype)
  shapes = {piece.theirs: (dtype(piece), piece.shape) for piece in layout.ordered()}
  empty = found.classes[values["architectures"][0]].zeros.items()
  zeros = {name: np.zeros(shape(cfg), kind) for name, shape in empty if name not in shapes}
  shapes |= {name: (kind, array.shape) for name, array in zeros.items()}
  write_folder(folder, shapes, itertools.chain(layout.tensors(source.leaf), zeros.items()))
  if cfg.head_kind == "language":
    generation.write(folder, source, ids)
  if source.tokenizer is not None:
    source.tokenizer.save(folder, token_types=bool(cfg.token_types))
  if sentences.are_told(cfg, source.text_limit, found):
    sentences.write(folder, cfg, source.text_limit)
  ends = ids.get("eos_token_id")
  values |= {"dtype": kind.name, **ids}
  if isinstance(ends, list):  # Older classes take one number here.
    own = None if source.tokenizer is None else source.tokenizer.eos_id
    values["eos_token_id"] = own if own in ends else ends[0]
  if source.labels is not None:
    values |= {"id2label": {str(i): one for i, one in enumerate(source.labels)},
               "label2id": {one: i for i, one in enumerate(source.labels)}}  # fmt: skip
  (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check_padding(family: Family, values: Mapping[str, Any], ids: Mapping[str, Any]) -> None:
  """That ids name the padding that a family's config.json must have, if it must have one."""
  ours, theirs = ids.get("pad_token_id"), values.get("pad_token_id")
  if None not in (ours, theirs) and ours != theirs:
    raise InputError(
      f"the tokenizer pads with id {ours}, and a {family.model_type} counts positions from the id "
      f"of its padding, {theirs} for this model: use a tokenizer that pads with {theirs}, or "
      "format='orbax'."
    )


def layout(m: Model) -> Layout:
  """Which tensors a model's parameters are, as the family that it came from or the first that fits.

  Raises:
    InputError: if it is of none.
  """
  return _written(m.config, m.family)[2]


def family_of(m: Model) -> str:
  """`model_type` of the family that a model came from, or the first that fits.

  Raises:
    InputError: if it is of none.
  """
  return _written(m.config, m.family)[0].model_type


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
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise InputError(
      f"config.json: model_type={model_type!r} is not known, expected one of "
      f"{', '.join(FAMILIES)}.{nearest(str(model_type), FAMILIES)}"
    )
  return FAMILIES[model_type]


def _open(folder: Path) -> dict[str, np.ndarray]:
  if not any((folder / name).is_file() for name in (INDEX, SINGLE)):
    if (folder / _TORCH_INDEX).is_file():
      return open_indexed(folder, _TORCH_INDEX, open_torch_file)
    if (folder / _TORCH).is_file():
      return open_torch_file(folder / _TORCH)
  return open_folder(folder)


def _read(path: Path) -> tuple[dict[str, Any], Mapping[str, Any], bool]:
  """(config.json, tensors, whether a tokenizer is there) of a folder or of a GGUF file."""
  if _is_gguf(path):
    return read_gguf(path)
  return read_object(path / "config.json"), _open(path), holds_tokenizer(path)


def _named(
  family: Family, tensors: Mapping[str, np.ndarray], name: str, *, tied: bool
) -> dict[str, np.ndarray]:
  """Tensors under the names of the table: older names changed, the body's prefix put or taken."""
  out = {}
  for key, array in tensors.items():
    for old, new in family.renamed:
      key = re.sub(old, new, key)
    out |= _apart(family, key, array)
  for twin, other in family.twins.items():
    used, unused = (other, twin) if tied else (twin, other)
    if unused not in out:
      continue
    array = out.pop(unused)
    if not np.array_equal(out.setdefault(used, array), array) and tied:
      raise InputError(f"{twin} differs from {other}, and config.json says that they are tied.")
  if family.classes[name].base:
    return {key.removeprefix(family.prefix): array for key, array in out.items()}
  prefix = family.body_prefix(name)
  if not prefix or any(key.startswith(prefix) for key in out):
    return out
  names = (row.theirs for row in family.table(name) if row.theirs.startswith(prefix))
  bodies = {one.removeprefix(prefix).split(".")[0] for one in names}
  return {prefix + k if k.split(".")[0] in bodies else k: array for k, array in out.items()}


def _apart(family: Family, key: str, array: np.ndarray) -> dict[str, np.ndarray]:
  """The tensors of each expert in one that holds all of them; any other as it is."""
  end = next((end for end in family.stacked if key.endswith(end)), None)
  if end is None or array.ndim < 2 or array.shape[1] % len(family.stacked[end]):
    return {key: array}
  start, names = key.removesuffix(end), family.stacked[end]
  parts = (np.split(expert, len(names)) for expert in array)
  return {
    start + name.format(e=e): part
    for e, one in enumerate(parts)
    for name, part in zip(names, one, strict=True)
  }


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
  repeated, zeros = family.repeats(name, cfg), family.classes[name].zeros
  spare = {*repeated, *zeros, *heads}
  unread = lambda key: key in spare or family.computes_nothing(name, key)
  layout.check(shapes, unread)
  table = _table(layout)
  for key in repeated & set(tensors):
    if not np.array_equal(tensors[key], tensors[table]):
      raise InputError(f"{key} differs from {table}, and config.json says that they are tied.")


def _dtypes(layout: Layout, tensors: Mapping[str, np.ndarray]) -> list[np.dtype]:
  """Those of all tensors, but for those of parameters that hold them whatever the others have."""
  found = set()
  for piece in layout.pieces:
    kind, own = tensors[piece.theirs].dtype, layout.leaves[piece.places[0].path].dtype
    if kind.itemsize > 1 and (own == _NARROW or jnp.promote_types(kind, own) != own):
      found.add(kind)  # Any dtype holds floats of one byte.
  return sorted(found, key=str) or [np.dtype(_NARROW)]


def _table(layout: Layout) -> str:
  """The tensor of theirs that holds the embeddings of tokens, which a head may repeat."""
  own = ("decoder_embed", "table")
  return layout.of_leaf[own if own in layout.leaves else ("embed", "table")][0][0].theirs
