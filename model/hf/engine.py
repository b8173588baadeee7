"""The engine of the tables: tensors of theirs to parameters of ours and back, a leaf at a time."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import einops
import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from model.config import ModelConfig
from model.errors import InputError
from model.heads import abstract
from model.layers import param_info

Path = tuple[str | int, ...]  # Of a leaf in the nested dict of parameters.


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor of theirs lies in ours: a leaf, and indices of its leading axes."""

  path: Path
  index: tuple[int, ...]
  shape: tuple[int, ...]  # Behind those indices, without padding of the vocabulary.


@dataclasses.dataclass(frozen=True)
class Piece:
  """One tensor of theirs.

  Attributes:
    pattern: of einops, theirs -> ours; an axis `c` runs over the places, 1 is an axis of one.
    places: more than one where theirs holds several of ours.
    joined: theirs holds the places one after the other along its first axis.
    parts: into so many equal parts that axis is divided, and each holds its share of all places.
  """

  theirs: str
  pattern: str
  places: tuple[Place, ...]
  joined: bool
  parts: int = 1

  @property
  def shape(self) -> tuple[int, ...]:
    """Of theirs."""
    left, right = (groups_of(side) for side in self.pattern.split(" -> "))
    shapes = []
    for place in self.places if self.joined else self.places[:1]:
      sizes = self._sizes(right, place)
      shapes.append(tuple(math.prod(sizes.get(a, 1) for a in group) for group in left))
    if not self.joined:
      return shapes[0]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])

  @property
  def fits(self) -> bool:
    """Whether the places have the pattern's axes: an MLP's row is none of experts."""
    names = [a for group in groups_of(self.pattern.split(" -> ")[1]) for a in group]
    inner = len(names) - ("c" in names and not self.joined)
    return all(len(place.shape) == inner for place in self.places)

  def _sizes(self, axes: list[tuple[str, ...]], place: Place) -> dict[str, int]:
    names = [a for group in axes for a in group]
    if "c" in names and not self.joined:
      return {"c": len(self.places), **dict(zip(names[1:], place.shape, strict=True))}
    return dict(zip(names, place.shape, strict=True))

  def to_ours(self, array: np.ndarray, which: int) -> np.ndarray:
    """The part of theirs that lies at `places[which]`."""
    place, right = self.places[which], groups_of(self.pattern.split(" -> ")[1])
    if self.joined:
      alone = [dataclasses.replace(self, places=(p,)).shape[0] for p in self.places]
      lengths = [length // self.parts for length in alone]
      begin, rest = sum(lengths[:which]), array.shape[1:]
      parts = array.reshape(self.parts, -1, *rest)
      array = parts[:, begin : begin + lengths[which]].reshape(-1, *rest)
    sizes = self._sizes(right, place)
    parts = einops.rearrange(array, self.pattern, **sizes)
    return parts[which] if "c" in sizes and not self.joined else parts

  def to_theirs(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Theirs from what lies at each place."""
    left, right = self.pattern.split(" -> ")
    back = f"{right} -> {left}"
    if self.joined:
      alone = [einops.rearrange(a, back) for a in arrays]
      parts = [a.reshape(self.parts, -1, *a.shape[1:]) for a in alone]
      return np.concatenate(parts, axis=1).reshape(-1, *alone[0].shape[1:])
    if "c" in [a for group in groups_of(right) for a in group]:
      return einops.rearrange(np.stack(arrays), back)
    return einops.rearrange(arrays[0], back)


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of a table, for all layers and experts.

  Attributes:
    theirs: name of a tensor; `{i}` is a layer of the stack that has its own parameters, `{e}` a
      place along the parameter's first axis: an expert, or a head. Without `{i}` it belongs to the
      one layer that has the parameter.
    ours: path of a parameter; `layers` stands for the layer's place in its stack, `{a,b}` for
      several parameters that theirs holds in one tensor. It is no row of parameters with other
      axes.
    pattern, joined: see Piece; `parts` counts them.
    when: of which configs it is a row, beside those that have its parameters; None: of all.
  """

  theirs: str
  ours: str
  pattern: str
  joined: bool = False
  parts: Callable[[ModelConfig], int] | None = None
  when: Callable[[ModelConfig], bool] | None = None


def linear(theirs: str, ours: str, weight: str, bias: str) -> tuple[Row, ...]:
  """A matrix and its bias."""
  return Row(f"{theirs}.weight", f"{ours}.w", weight), Row(f"{theirs}.bias", f"{ours}.b", bias)


def norm(theirs: str, ours: str) -> tuple[Row, ...]:
  """A norm's scale and bias."""
  scale = Row(f"{theirs}.weight", f"{ours}.scale", "d -> d")
  return scale, Row(f"{theirs}.bias", f"{ours}.bias", "d -> d")


def under(theirs: str, ours: str, *rows: Row) -> tuple[Row, ...]:
  """Rows of parts whose names begin with `theirs` and `ours`."""
  join = lambda r: dataclasses.replace(r, theirs=f"{theirs}.{r.theirs}", ours=f"{ours}.{r.ours}")
  return tuple(map(join, rows))


def groups_of(side: str) -> list[tuple[str, ...]]:
  """`(n h) d` -> [("n", "h"), ("d",)]."""
  return [tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", side)]


class Layout:
  """The parameters of a config, and which tensors of a table make them."""

  def __init__(self, cfg: ModelConfig, rows: Sequence[Row], name: str):
    """
    Raises:
      InputError: if the table has no row for a parameter.
    """
    net = abstract(cfg)
    self._cfg, self.name = cfg, name
    leaves: Any = flatten_dict(nnx.to_pure_dict(nnx.state(net, nnx.Param)))
    infos: Any = flatten_dict(param_info(net))
    self.leaves: dict[Path, jax.ShapeDtypeStruct] = leaves
    self._axes = {path: info.axes for path, info in infos.items()}
    self.pieces = [piece for row in rows for piece in self._expand(row)]
    self.of_leaf = collections.defaultdict(list)  # path -> (piece, which of its places)
    for piece in self.pieces:
      for which, place in enumerate(piece.places):
        self.of_leaf[place.path].append((piece, which))
    unwritten = [".".join(map(str, p)) for p in self.leaves if not self._covered(p)]
    if unwritten:
      raise InputError(
        f"{name} has no place for {len(unwritten)} parameters of this model, as {unwritten[:3]}."
      )

  def _covered(self, path: Path) -> bool:
    found = {piece.places[which].index for piece, which in self.of_leaf[path]}
    depth = {len(index) for index in found}
    return len(depth) == 1 and len(found) == math.prod(self.leaves[path].shape[: depth.pop()])

  def _expand(self, row: Row) -> Iterator[Piece]:
    if row.when is not None and not row.when(self._cfg):
      return
    choice = re.search(r"\{([a-z_,]*)\}", row.ours)
    ours = [row.ours.replace(choice[0], c) for c in choice[1].split(",")] if choice else [row.ours]
    stack = ours[0].split(".")[0]
    layers = self._places(stack) if ".layers." in row.ours else [((), ())]
    for i, (at, repeat) in enumerate(layers):
      paths = [_path(name, at) for name in ours]
      if not all(path in self.leaves for path in paths):
        continue
      first = self.leaves[paths[0]].shape[len(repeat) :][:1]
      for e in range(*first) if "{e}" in row.theirs else [None]:
        index = (*repeat, *(() if e is None else (e,)))
        places = tuple(Place(path, index, self._shape(path, len(index))) for path in paths)
        parts = 1 if row.parts is None else row.parts(self._cfg)
        piece = Piece(row.theirs.format(i=i, e=e), row.pattern, places, row.joined, parts)
        if piece.fits:
          yield piece

  def _places(self, stack: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(place in the list of stacks, index in the stack) of each layer."""
    first, found = 0, []
    for pattern, n in self._cfg.groups(stack):
      sets = range(n // self._cfg.layer_uses(stack))
      found += [((first + p,), (r,)) for r in sets for p in range(len(pattern))]
      first += len(pattern)
    return found

  def _shape(self, path: Path, depth: int) -> tuple[int, ...]:
    real = lambda size, axis: self._cfg.real_vocab if axis == "vocab" else size
    sizes = map(real, self.leaves[path].shape, self._axes[path])
    return tuple(sizes)[depth:]

  def check(self, shapes: Mapping[str, tuple[int, ...]], unread: Callable[[str], bool]) -> None:
    """Compares with the tensors of a checkpoint.

    Args:
      unread: whether a tensor of that name is nothing that is computed with.

    Raises:
      InputError: that lists what is missing, surplus, or of another shape.
    """
    wanted = {piece.theirs: piece.shape for piece in self.pieces}
    missing = [name for name in wanted if name not in shapes]
    surplus = [name for name in shapes if name not in wanted and not unread(name)]
    wrong = [
      f"{name} {list(shapes[name])} instead of {list(shape)}" for name, shape in wanted.items()
      if name in shapes and tuple(shapes[name]) != shape
    ]  # fmt: skip
    kinds = {"missing": missing, "unknown": surplus, "of another shape": wrong}
    said = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    if said:
      raise InputError(
        f"the tensors are not those of {self.name} as its config has it: {'; '.join(said)}."
      )

  def leaf(
    self, path: Path, tensors: Mapping[str, np.ndarray], dtype: Any, layer: int | None = None
  ) -> np.ndarray:
    """A parameter of ours from theirs, or one layer of a stacked one; the padding of the vocabulary
    is zeros.
    """
    drop = 0 if layer is None else 1
    out = np.zeros(self.leaves[path].shape[drop:], dtype)
    for piece, which in self.pieces_of(path, layer):
      place = piece.places[which]
      part = piece.to_ours(np.asarray(tensors[piece.theirs]), which)
      out[(*place.index[drop:], *(slice(0, n) for n in place.shape))] = part
    return out

  def pieces_of(self, path: Path, layer: int | None = None) -> list[tuple[Piece, int]]:
    """(tensor of theirs, which of its places) of a parameter, or of one layer of it."""
    pieces = self.of_leaf[path]
    return [one for one in pieces if layer is None or one[0].places[one[1]].index[0] == layer]

  def tensors(self, leaf: Callable[[Path], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Theirs one after the other; `leaf` is asked for each parameter once, if it has one piece."""
    held: dict[Path, np.ndarray] = {}
    part = lambda p: held[p.path][(*p.index, *(slice(0, n) for n in p.shape))]
    for piece in self.ordered():
      paths = [place.path for place in piece.places]
      for path in held.keys() - set(paths):  # Before the next ones are asked for: they are large.
        del held[path]
      for path in paths:
        if path not in held:
          held[path] = leaf(path)
      yield piece.theirs, piece.to_theirs([part(p) for p in piece.places])

  def ordered(self) -> list[Piece]:
    """Pieces of the same parameters one after the other."""
    groups = collections.defaultdict(list)
    for piece in self.pieces:
      groups[tuple(place.path for place in piece.places)].append(piece)
    return [piece for group in groups.values() for piece in group]


def _path(name: str, at: tuple[int, ...]) -> Path:
  """`decoder.layers.attn.q_proj.w` of the stack `at` -> its path."""
  parts: list[str | int] = []
  for part in name.split("."):
    parts += [part, *at] if part == "layers" else [part]
  return tuple(parts)
