"""What torch PEFT calls an adapter's tensors, and ours: from the tables of families.

A module of theirs may hold several of ours (fused queries, keys and values). Its A is then that of
each of ours, and its B those of ours one beside the other. Back, one A that reads for all of them
exists where theirs are equal; else the ranks of all are put one behind the other, each in a part of
B of its own: as exact, and wider.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import einops
import numpy as np

from model.config import ModelConfig
from model.errors import InputError
from model.heads import abstract
from model.hf.engine import Layout, Piece, Place, groups_of
from model.layers import param_info

PREFIX = "base_model.model."
_LOW_RANK = re.compile(r"(.*)\.lora_(embedding_)?(A|B)(\.weight)?")
_MAGNITUDE = re.compile(r"(.*)\.lora_magnitude_vector(\.weight)?")
_IA3 = re.compile(r"(.*)\.ia3_l")


@dataclasses.dataclass(frozen=True)
class Part:
  """One layer's or expert's part of an adapter: arrays in our order of axes, and its scale.

  a (inputs, R), b (R, outputs), where there are such start_a, start_b and magnitude (outputs), of
  LoRA and DoRA; inputs or outputs of IA3.
  """

  arrays: dict[str, np.ndarray]
  scale: float = 1.0

  @property
  def rank(self) -> int:
    """Of low-rank ones."""
    return self.arrays["a"].shape[-1]


@dataclasses.dataclass(frozen=True)
class TheirModule:
  """A module of theirs whose matrix or table is one or several of ours."""

  name: str
  piece: Piece
  reads: str  # Axes of inputs, of the pattern's right side.
  writes: str  # Axes of outputs.
  left: str  # The group of theirs that the outputs are, `c` within it where they are several.

  @property
  def _several(self) -> str:
    return "c " if re.search(r"\bc\b", self.left) and not self.piece.joined else ""

  @property
  def places(self) -> tuple[Place, ...]:
    return self.piece.places

  def _sizes(self, place: Place) -> dict[str, int]:
    names = [*self.reads.split(), *self.writes.split()]
    return dict(zip(names, place.shape, strict=True))

  def _outputs(self, ranked: bool, rank: int) -> Piece:
    """How an array over outputs, and ranks, divides among the places."""
    many = len(self.reads.split())
    cut = lambda p: dataclasses.replace(p, shape=((rank,) if ranked else ()) + p.shape[many:])
    r = "r " if ranked else ""
    pattern = f"{self.left} {r}-> {self._several}{r}{self.writes}"
    places = tuple(map(cut, self.places))
    return dataclasses.replace(self.piece, pattern=pattern, places=places)

  def matrix(self, ours: Sequence[np.ndarray]) -> np.ndarray:
    """Theirs, (outputs, inputs), from the matrix at each place."""
    many = len(self.reads.split())
    flat = [array.reshape(-1, *array.shape[many:]) for array in ours]
    return self._outputs(True, len(flat[0])).to_theirs(flat)

  def to_ours(self, theirs: Mapping[str, np.ndarray], scale: float) -> list[Part]:
    """The part at each place, from arrays by name: A, B, magnitude, or ia3."""
    if "ia3" in theirs:
      return [Part(one) for one in self._ia3(theirs["ia3"])]
    rank = theirs["A"].shape[0]
    a = self._a(theirs["A"])
    pieces = {"b": (self._outputs(True, rank), theirs["B"])}
    if "magnitude" in theirs:
      pieces["magnitude"] = (self._outputs(False, rank), theirs["magnitude"].reshape(-1))
    return [
      Part({"a": a, **{n: piece.to_ours(x, i) for n, (piece, x) in pieces.items()}}, scale)
      for i in range(len(self.places))
    ]

  def _a(self, array: np.ndarray) -> np.ndarray:
    sizes = {k: v for k, v in self._sizes(self.places[0]).items() if k in self.reads.split()}
    return einops.rearrange(array, f"r ({self.reads}) -> {self.reads} r", **sizes)

  def _ia3(self, array: np.ndarray) -> list[dict[str, np.ndarray]]:
    if array.shape[0] == 1 and array.ndim == 2:  # Of what is read.
      vector = self._a(array)[..., 0]
      return [{"inputs": vector} for _ in self.places]
    piece = self._outputs(False, 1)
    return [{"outputs": piece.to_ours(array.reshape(-1), i)} for i in range(len(self.places))]

  def to_theirs(self, parts: list[Part]) -> tuple[dict[str, np.ndarray], float]:
    """(arrays by name, scale) of a part at each place.

    Raises:
      InputError: for IA3 that scales what is read once for each of several.
    """
    if "a" not in parts[0].arrays:
      return self._ia3_back(parts), 1.0
    a, b = self._joined(parts)
    rank, scale = a.shape[-1], parts[0].scale
    back = lambda array: einops.rearrange(array, f"{self.reads} r -> r ({self.reads})")
    out = {"A": back(a), "B": self._outputs(True, rank).to_theirs(b)}
    if "magnitude" in parts[0].arrays:
      vectors = [part.arrays["magnitude"] for part in parts]
      out["magnitude"] = self._outputs(False, rank).to_theirs(vectors)
    return out, scale

  def _joined(self, parts: list[Part]) -> tuple[np.ndarray, list[np.ndarray]]:
    """One A, and a B for each place: of ranks that are all of them, or each place's in turn."""
    scale = parts[0].scale
    every = [part.arrays["a"] for part in parts]
    bs = [part.arrays["b"] * np.float32(part.scale / scale) for part in parts]
    if all(np.array_equal(every[0], a) for a in every[1:]):
      return every[0], bs
    total, at, wide = sum(part.rank for part in parts), 0, []
    for part, b in zip(parts, bs, strict=True):
      full = np.zeros((total, *b.shape[1:]), b.dtype)
      full[at : at + part.rank] = b
      wide.append(full)
      at += part.rank
    return np.concatenate(every, axis=-1), wide

  def _ia3_back(self, parts: list[Part]) -> dict[str, np.ndarray]:
    if "inputs" in parts[0].arrays:
      first, *others = [part.arrays["inputs"] for part in parts]
      if not all(np.array_equal(first, other) for other in others):
        raise InputError(
          f"PEFT scales what {self.name} reads once, and it is {len(parts)} matrices here, which "
          "scale it differently."
        )
      return {"ia3": first.reshape(1, -1)}
    vectors = [part.arrays["outputs"] for part in parts]
    return {"ia3": self._outputs(False, 1).to_theirs(vectors).reshape(-1, 1)}


def modules(layout: Layout, cfg: ModelConfig) -> dict[str, TheirModule]:
  """The modules of theirs that can be adapted, by name."""
  from flax.traverse_util import flatten_dict

  infos: Any = flatten_dict(param_info(abstract(cfg)))
  found = {}
  for piece in layout.pieces:
    path = piece.places[0].path
    if not piece.theirs.endswith(".weight") or path[-1] not in ("w", "table"):
      continue
    name = piece.theirs.removesuffix(".weight")
    made = _module(name, piece, infos[path].inputs)
    if made is not None:
      found[name] = made
  return found


def _module(name: str, piece: Piece, inputs: int) -> TheirModule | None:
  left, right = (groups_of(side) for side in piece.pattern.split(" -> "))
  axes = [a for group in right for a in group]
  if axes[0] == "c" and not piece.joined:
    axes = axes[1:]
  reads, writes = tuple(axes[:inputs]), tuple(axes[inputs:])
  groups = [group for group in left if group != reads]
  if len(left) != 2 or len(groups) != 1 or "1" in axes:
    return None
  return TheirModule(name, piece, " ".join(reads), " ".join(writes), f"({' '.join(groups[0])})")


def cut(leaves: Any, place: Place) -> np.ndarray:
  """What lies at a place of flat parameters."""
  return np.asarray(leaves[place.path][(*place.index, *(slice(0, n) for n in place.shape))])


def tensor_of(piece: Piece, leaves: Any) -> np.ndarray:
  """Their tensor of a piece."""
  return piece.to_theirs([cut(leaves, place) for place in piece.places])


def sorted_out(
  tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
  """({module: {A, B, magnitude or ia3: array}}, whole tensors by name) of an adapter's file."""
  parts: dict[str, dict[str, np.ndarray]] = {}
  whole = {}
  for key, array in tensors.items():
    name = key.removeprefix(PREFIX)
    low, size, ia3 = (r.fullmatch(name) for r in (_LOW_RANK, _MAGNITUDE, _IA3))
    if low:
      parts.setdefault(low[1], {})[low[3]] = np.asarray(array)
    elif size:
      parts.setdefault(size[1], {})["magnitude"] = np.asarray(array)
    elif ia3:
      parts.setdefault(ia3[1], {})["ia3"] = np.asarray(array)
    else:
      whole[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = array
  for name, own in parts.items():
    if own.keys() & {"A", "B"} and not {"A", "B"} <= own.keys():
      raise InputError(f"the adapter has one of A and B of {name}: both are needed.")
  return parts, whole
