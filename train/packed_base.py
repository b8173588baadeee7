"""The frozen base of an adapter's run in fewer bits (QLoRA: Dettmers et al., arXiv:2305.14314).

Which of its matrices, read straight into that form, and never held in float.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from model.errors import InputError
from model.loading import leaf_reader
from model.peft.config import PeftConfig
from model.peft.parts import Parts
from model.quant import Format, Quantized
from model.quant_load import abstract, places, read_quantized
from model.quant_tree import format_of, quantize_leaf
from model.sharding import spec

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Packing:
  """How the matrices of a base are kept, of those that are: nothing of them is trained."""

  formats: dict[Path, Format]
  info: dict  # ParamInfo of each parameter of the base.

  def __call__(self, base: dict) -> dict:
    """Float parameters as they are kept."""
    infos, leaves = _flat(self.info), _flat(base)
    made = {p: quantize_leaf(leaves[p], infos[p], f, _name(p)) for p, f in self.formats.items()}
    return unflatten_dict(leaves | made)

  def placed(self, likes: dict, mesh: Mesh) -> dict:
    """The same, of shapes, dtypes and shardings."""
    infos, leaves = _flat(self.info), _flat(likes)
    made = {p: abstract(leaves[p], infos[p], f, mesh) for p, f in self.formats.items()}
    return unflatten_dict(leaves | made)


def packing_of(config: PeftConfig, parts: Parts | None, shapes: dict, info: dict) -> Packing:
  """What `peft.base_format` keeps in fewer bits, and how.

  Args:
    shapes, info: of the base.

  Raises:
    InputError: if a group that was asked for does not divide the inputs of a matrix.
  """
  if config.base_format is None or parts is None:
    return Packing({}, info)
  wanted, infos = Format.parse(config.base_format), _flat(info)
  frozen = {p: a for p, a in _flat(shapes).items() if parts.rows[p] == ()}
  try:
    found = {p: format_of(infos[p], a.shape, wanted, _name(p)) for p, a in frozen.items()}
  except InputError as error:
    raise InputError(str(error).replace("quantize=", "peft.base_format=", 1)) from error
  return Packing({p: f for p, f in found.items() if f is not None}, info)


def packed_shardings(shapes: dict, info: dict, mesh: Mesh) -> dict:
  """Where the arrays of parameters go, of which some are quantized."""
  infos = _flat(info)

  def where(path: Path, leaf: Any) -> Any:
    if isinstance(leaf, Quantized):
      return places(leaf, infos[path], mesh)
    return NamedSharding(mesh, spec(infos[path].axes, leaf.shape, mesh))

  return unflatten_dict({path: where(path, leaf) for path, leaf in _flat(shapes).items()})


def read_packed(path: str, wanted: dict[Path, Quantized], info: dict) -> dict[Path, Quantized]:
  """Matrices of a checkpoint PATH, each quantized when it has been read.

  Args:
    wanted: what they are kept in, abstract, with shardings.
    info: ParamInfo of the parameters of the base.
  """
  leaf, infos, out = leaf_reader(path), _flat(info), {}
  for one, like in wanted.items():
    mesh: Any = like.values.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
    place = NamedSharding(mesh, spec(infos[one].axes, like.shape, mesh))
    plain = jax.ShapeDtypeStruct(like.shape, np.float32, sharding=place)
    read = functools.partial(leaf, one, np.float32)
    out[one] = read_quantized(read, plain, infos[one], like.format, mesh)
  return out


def _flat(tree: dict) -> dict[Path, Any]:
  leaves: Any = flatten_dict(tree)
  return leaves


def _name(path: Path) -> str:
  return ".".join(map(str, path))
