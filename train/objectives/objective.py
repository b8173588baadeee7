"""What an objective is: pieces of documents to the arrays of a batch, and a batch to a loss."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int64, UInt64

from model.config import ModelConfig
from train.data.arrays import Corpus
from train.data.fit import Fitted

Batch = dict[str, np.ndarray]
# What a piece becomes: by side the arrays of its fields, all as long as the piece is on that side.
Example = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Field:
  """One array of a batch, with a value for each place of its side.

  `shape` is that of one value. `place_of` names the side that values are places in: they count from
  the beginning of a piece there, and become places in the row.
  """

  dtype: Any
  empty: float = 0
  shape: tuple[int, ...] = ()
  place_of: str | None = None


@dataclasses.dataclass(frozen=True)
class Side:
  """An axis of a batch along which the pieces of a row lie, one behind the other.

  The name is what the names of its fields begin with. A `read` side is one that a stack of the
  model reads: it has `segments`, from 1 (0 is nothing), and `positions` (-1 is nothing) besides.
  """

  length: int
  fields: Mapping[str, Field]
  read: bool = True


@dataclasses.dataclass(frozen=True)
class Pieces:
  """Pieces of documents, and the row of a batch that each goes to, ascending."""

  corpus: Corpus
  rows: Int64[np.ndarray, "s"]
  documents: Int64[np.ndarray, "s"]
  starts: Int64[np.ndarray, "s"]  # Place of the first token in `corpus.tokens`.
  lengths: Int64[np.ndarray, "s"]
  salts: UInt64[np.ndarray, "s"]  # A number of each piece's own, the same in every epoch.
  chance: Callable[[int], np.random.Generator]  # Of the i-th piece; another in each epoch.

  def tokens(self, i: int) -> np.ndarray:
    """Token ids of the i-th piece, int64."""
    start = self.starts[i]
    return np.asarray(self.corpus.tokens[start : start + self.lengths[i]], np.int64)


class Objective(Protocol):
  """From documents to batches, and from batches to losses. A frozen dataclass in each file.

  Attributes:
    sides: what a row has room for, by name.
    whole: tokens of the longest piece that every row has room for; None: documents are never cut,
      and one that is too long is an error.
    overlap: tokens at the end of a piece that the next one begins with (one, where each token
      predicts the next: every token but the first is then predicted once).
    samples: whether the loss draws random numbers in training, without dropout too.
    moves: whether the cuts of long documents may move from epoch to epoch, which asks that two
      pieces together take no more room than one of their length.
  """

  @property
  def sides(self) -> Mapping[str, Side]: ...
  @property
  def whole(self) -> int | None: ...
  @property
  def overlap(self) -> int: ...
  @property
  def samples(self) -> bool: ...
  @property
  def moves(self) -> bool: ...

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """Places that pieces of these lengths take on each side."""
    ...

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """Writes pieces into the rows of an empty batch."""
    ...

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """What is trained: the network of `cfg`, and what else learns beside it."""
    ...

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """What each term of the loss is divided by, over a whole batch."""
    ...

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> "Any":
    """The train.objectives.loss.Loss of a batch, or of a part of one."""
    ...


@runtime_checkable
class TaskObjective(Objective, Protocol):
  """An objective on examples of a task: their columns are read by `train.data.examples`."""

  def fit(self, corpus: Corpus) -> Fitted:
    """Examples, or windows on them, each of which a row has room for.

    Raises:
      InputError: naming one that is too long, unless it may be cut.
    """
    ...


def batch_fields(sides: Mapping[str, Side]) -> dict[str, tuple[tuple[int, ...], Any, float]]:
  """(shape of a row, dtype, empty value) of each array of a batch."""
  fields = {}
  for name, side in sides.items():
    if side.read:
      fields[f"{name}segments"] = (side.length,), np.int32, 0
      fields[f"{name}positions"] = (side.length,), np.int32, -1
    for field, what in side.fields.items():
      fields[name + field] = (side.length, *what.shape), what.dtype, what.empty
  return fields


def empty_batch(sides: Mapping[str, Side], rows: int) -> Batch:
  """Rows without anything in them."""
  fields = batch_fields(sides)
  return {name: np.full((rows, *shape), v, dtype) for name, (shape, dtype, v) in fields.items()}


def place(
  batch: Batch, sides: Mapping[str, Side], rows: Iterable[int], examples: Iterable[Example]
) -> None:
  """Writes examples into `batch`, one behind the other from the left of their rows, ascending."""
  last, number, at = -1, 0, dict.fromkeys(sides, 0)
  for row, example in zip(rows, examples, strict=True):
    if row != last:
      last, number, at = row, 0, dict.fromkeys(sides, 0)
    number += 1
    begins = dict(at)
    for name, arrays in example.items():
      side, begin = sides[name], begins[name]
      size = len(next(iter(arrays.values())))
      end = at[name] = begin + size
      for field, values in arrays.items():
        shift = side.fields[field].place_of
        moved = values if shift is None else np.asarray(values) + begins[shift]
        batch[name + field][row, begin:end] = moved
      if side.read:
        batch[f"{name}segments"][row, begin:end] = number
        batch[f"{name}positions"][row, begin:end] = np.arange(size)
