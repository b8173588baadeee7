"""The documents that certificates read."""

from typing import NamedTuple

import numpy as np

SMALLEST_VOCABULARY = 97
# Tokens of each; the first passes all windows, and the edges of relative positions' buckets.
LENGTHS = (520, 97)
END = 4  # Where a class looks for the end of a text.


class Document(NamedTuple):
  """Token ids int (T,), and of a decoder beside an encoder int (U,)."""

  tokens: np.ndarray
  answer: np.ndarray


def documents() -> list[Document]:
  """Random tokens; none is padding, the mask or the beginning of a text."""
  rng = np.random.default_rng(0)
  text = lambda n: np.append(rng.integers(END + 1, SMALLEST_VOCABULARY, n - 1), END)
  return [Document(text(n), text(n // 3)) for n in LENGTHS]
