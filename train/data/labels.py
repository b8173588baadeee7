"""Labels: from what tables hold to names, and from names to their places in the order."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from model.errors import InputError, nearest
from train.data.arrays import Column, Corpus

_SHOWN = 8  # Labels that a message lists.


def label_name(value: Any, place: str) -> str:
  """Text as it is, numbers in digits (1.0 as 1), truth values as JSON has them.

  Raises:
    InputError: for anything else, and for empty text.
  """
  if isinstance(value, bool):
    return "true" if value else "false"
  if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
    return str(int(value))
  if isinstance(value, float) and math.isfinite(value):
    return repr(value)
  if isinstance(value, str) and value.strip():
    return value
  raise InputError(f"{place} holds {value!r}: a label is text or a number.")


def label_names(value: Any, place: str) -> list[str]:
  """A list of labels, or text with `|` (or, where there is none, `,`) between them; may be empty.

  Raises:
    InputError: as `label_name`, and for a label that is there twice.
  """
  if isinstance(value, str):
    parts = [part.strip() for part in value.split("|" if "|" in value else ",")]
    names = [part for part in parts if part]
  elif isinstance(value, list | tuple):
    names = [label_name(v, place) for v in value]
  else:
    names = [label_name(value, place)]
  if len(set(names)) < len(names):
    raise InputError(f"{place} names a label twice: {', '.join(names)}.")
  return names


def number(value: Any, place: str) -> float:
  """A finite number, also one that is written as text.

  Raises:
    InputError: for anything else.
  """
  try:
    found = math.nan if isinstance(value, bool) else float(value)
  except (TypeError, ValueError):
    found = math.nan
  if not math.isfinite(found):
    raise InputError(f"{place} holds {value!r}: a regression learns from numbers.")
  return found


def label_order(corpora: Sequence[Corpus]) -> tuple[str, ...]:
  """The labels that occur, sorted: as numbers where all are numbers."""
  found = {name for corpus in corpora for name in _occurring(corpus.columns["label"])}
  try:
    return tuple(sorted(found, key=lambda name: (float(name), name)))
  except ValueError:
    return tuple(sorted(found))


def with_order(corpus: Corpus, labels: tuple[str, ...]) -> Corpus:
  """The corpus with label values that are places in `labels`; -1 stays.

  Raises:
    InputError: naming a label that is not among them and where it is.
  """
  column = corpus.columns["label"]
  place = {name: i for i, name in enumerate(labels)}
  moved = np.array([place.get(name, -2) for name in column.names] + [-1])  # -1 reads the last.
  values = moved[column.values]
  for name in _occurring(column):
    if name not in place:
      raise InputError(_unknown(corpus, column, name, labels))
  fresh = dataclasses.replace(column, values=values.astype(np.int32), names=labels)
  return dataclasses.replace(corpus, columns={**corpus.columns, "label": fresh})


def _occurring(column: Column) -> list[str]:
  """Labels of the documents that the column still has."""
  marks = np.zeros(len(column.values) + 1, np.int64)
  np.add.at(marks, column.starts, 1)
  np.add.at(marks, column.starts + column.lengths, -1)
  used = np.unique(column.values[np.cumsum(marks)[:-1] > 0])
  return [column.names[i] for i in used if i >= 0]


def _unknown(corpus: Corpus, column: Column, name: str, labels: tuple[str, ...]) -> str:
  code = column.names.index(name)
  first = next(d for d in range(len(column.starts)) if code in column.of(d))
  shown = ", ".join(labels[:_SHOWN]) + (", …" if len(labels) > _SHOWN else "")
  return (
    f"{place_of(corpus, first)}: the label {name!r} is not among those of the training data or "
    f"data.labels ({shown}): name all labels in data.labels.{nearest(name, labels)}"
  )


def place_of(corpus: Corpus, document: int) -> str:
  """Where an example comes from: its file and line."""
  places = corpus.columns["place"]
  file, line = places.of(document)
  return f"{places.names[file]} {line}"
