"""Attention that is watched: the probabilities that a pass computes, beside what it gives."""

import contextlib
import contextvars
from collections.abc import Iterator

from jaxtyping import Array, Float

_seen: contextvars.ContextVar[list[Array] | None] = contextvars.ContextVar("seen", default=None)


@contextlib.contextmanager
def observe() -> Iterator[list[Float[Array, "B N T S"]]]:
  """Collects the probabilities of every attention that is computed or traced inside, in order.

  Each is at least float32: what a query gives each key after softmax, without dropout. With a sink,
  the rest of 1 is the sink's; a query that sees nothing has zeros. A function that is being traced
  may return them where its layers are neither scanned nor rematerialized: they are arrays of its
  own.
  """
  seen: list[Array] = []
  token = _seen.set(seen)
  try:
    yield seen
  finally:
    _seen.reset(token)


def observing() -> bool:
  """Whether somebody collects."""
  return _seen.get() is not None


def observed(weights: Float[Array, "B N T S"]) -> None:
  """Tells the probabilities of one attention to whom collects."""
  seen = _seen.get()
  if seen is not None:
    seen.append(weights)
