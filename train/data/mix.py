"""Which row of which source comes next."""

import dataclasses

import numpy as np
from jaxtyping import Int64

from model.errors import InputError

_PERIOD = 1 << 16  # Rows after which the order of the sources repeats.


@dataclasses.dataclass(frozen=True)
class Mixture:
  """A fixed order in which sources take turns, each as evenly as its share allows."""

  source: Int64[np.ndarray, "P"]  # Of each row of a period.
  turn: Int64[np.ndarray, "P"]  # How many rows of that source came before in the period.
  counts: Int64[np.ndarray, "k"]  # Rows of each source in a period.

  def place(self, rows: Int64[np.ndarray, "n"]) -> tuple[np.ndarray, np.ndarray]:
    """The source of each row, and the row of that source, both (n,)."""
    period, place = np.divmod(rows, len(self.source))
    source = self.source[place]
    return source, period * self.counts[source] + self.turn[place]


def mix(weights: list[float]) -> Mixture:
  """The order in which sources with these weights, shares of rows, take turns.

  Raises:
    InputError: if a share is too small to ever get a turn.
  """
  if len(weights) == 1:
    return Mixture(np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64))
  shares = np.array(weights) / np.sum(weights) * _PERIOD
  counts = np.floor(shares).astype(np.int64)
  for i in np.argsort(counts - shares, kind="stable")[: _PERIOD - counts.sum()]:
    counts[i] += 1
  if not counts.all():
    raise InputError(
      f"data.source: the weight {min(weights)} is less than 1/{_PERIOD} of the mixture."
    )
  source = np.repeat(np.arange(len(counts)), counts)
  turn = np.concatenate([np.arange(n) for n in counts])
  order = np.argsort((turn + 0.5) / counts[source], kind="stable")
  return Mixture(source[order], turn[order], counts)
