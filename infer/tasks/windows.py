"""Texts that are longer than a model's positions, read in windows that share tokens."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from model.errors import InputError
from model.tokenizer import Encoded


@dataclasses.dataclass(frozen=True)
class Window:
  """Part of an encoding: tokens `start` to `stop` of the text that is cut, all of the rest."""

  encoded: Encoded
  first: int  # Place in it of the token `start`.
  start: int
  stop: int


def body(encoded: Encoded, text: int) -> tuple[int, int]:
  """(first place, number) of the tokens of a text: 0 the first, 1 the second of a pair."""
  places = [i for i, s in enumerate(encoded.sequence) if s == text]
  return (places[0], len(places)) if places else (len(encoded.ids), 0)


def windows(encoded: Encoded, limit: int | None, *, text: int, stride: int | None) -> list[Window]:
  """Windows over a text that together hold each of its tokens, all but the last of equal length.

  Args:
    limit: positions of the model; None: one window holds all.
    text: which one is cut; the other and the template's tokens are in each window.
    stride: tokens that neighbours share at least; None: a quarter of a window.

  Raises:
    InputError: if the model's positions have no room for more than the shared tokens.
  """
  first, length = body(encoded, text)
  fixed = len(encoded.ids) - length
  if stride is not None and stride < 0:
    raise InputError(f"stride={stride} counts shared tokens: use a number of at least 0.")
  if limit is None or len(encoded.ids) <= limit:
    return [Window(encoded, first, 0, length)]
  size = limit - fixed
  if size < 1:
    raise InputError(
      f"{fixed} tokens go into every window and the model has {limit} positions, which leaves no "
      "room for the text itself: shorten the question."
    )
  shared = size // 4 if stride is None else stride
  if shared >= size:
    raise InputError(f"stride={stride} leaves nothing new in windows of {size} tokens: lower it.")
  out = []
  for start in range(0, length - shared, size - shared):
    start = min(start, length - size)  # The last one has the same length.
    stop = start + size
    out.append(Window(_cut(encoded, first, length, start, stop), first, start, stop))
  return out


def owners(parts: Sequence[Window]) -> np.ndarray:
  """For each token the window in which it has most context on its poorer side, the first of those.

  An end of the text is no lack of context. int64 (length,).
  """
  length = parts[-1].stop
  owner, most = np.zeros(length, np.int64), np.full(length, -1)
  for i, w in enumerate(parts):
    place = np.arange(w.start, w.stop)
    left = place - w.start if w.start else np.full(len(place), length)
    right = w.stop - 1 - place if w.stop < length else np.full(len(place), length)
    context = np.minimum(left, right)
    better = context > most[w.start : w.stop]
    owner[place[better]], most[place[better]] = i, context[better]
  return owner


def _cut(encoded: Encoded, first: int, length: int, start: int, stop: int) -> Encoded:
  part = lambda values: [
    *values[:first], *values[first + start : first + stop], *values[first + length :]
  ]  # fmt: skip
  return Encoded(
    part(encoded.ids), part(encoded.types), part(encoded.offsets), part(encoded.sequence)
  )
