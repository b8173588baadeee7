"""Whether examples fit into rows: those that are too long are cut, and counted, or refused."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int64

from model.errors import InputError
from train.data.arrays import Corpus
from train.data.labels import place_of

Lengths = Int64[np.ndarray, "d"]


@dataclasses.dataclass(frozen=True)
class Fitted:
  """Examples each of which a row has room for, and what was cut off to get there."""

  corpus: Corpus
  truncated_tokens: int = 0
  truncated_documents: int = 0
  dropped_documents: int = 0


def lengths_of(corpus: Corpus, name: str) -> Lengths:
  """Tokens of each example in a column."""
  return corpus.lengths if name == "text" else corpus.columns[name].lengths


def fit(corpus: Corpus, room: Mapping[str, Lengths], *, truncate: bool, remedy: str) -> Fitted:
  """Examples whose columns are no longer than `room`.

  Args:
    room: tokens of each example that there is a place for, by column.
    truncate: cut what is longer; otherwise it is an error.
    remedy: what to change, for the message.

  Raises:
    InputError: naming the first example that is too long, and how many there are.
  """
  over = {name: np.maximum(lengths_of(corpus, name) - most, 0) for name, most in room.items()}
  total = sum(over.values(), start=np.zeros(len(corpus.lengths), np.int64))
  if not total.any():
    return Fitted(corpus)
  if not truncate:
    first = int(np.argmax(total > 0))
    name = next(name for name in over if over[name][first])
    raise InputError(
      f"{place_of(corpus, first)}: data.{name} has {lengths_of(corpus, name)[first]} tokens and "
      f"room for {room[name][first]} ({(total > 0).sum()} of {len(total)} examples are too long): "
      f"{remedy}, or set data.truncate."
    )
  columns = dict(corpus.columns)
  for name in room.keys() & columns.keys():
    column = columns[name]
    columns[name] = dataclasses.replace(column, lengths=column.lengths - over[name])
  lengths = corpus.lengths - over.get("text", 0)
  cut = dataclasses.replace(corpus, lengths=lengths, columns=columns)
  return Fitted(cut, int(total.sum()), int((total > 0).sum()))


def shares(first: Lengths, second: Lengths, room: int) -> tuple[Lengths, Lengths]:
  """Room of two texts that share `room` tokens: what the longer one has too much is cut off.

  The shorter text keeps up to half, the rest is the longer one's.
  """
  half = room // 2
  of_first = np.minimum(first, np.maximum(room - second, room - half))
  return of_first, np.minimum(second, room - of_first)
