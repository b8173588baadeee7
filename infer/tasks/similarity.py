"""How alike texts are: the cosine of their embeddings."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from infer.tasks.passes import listed
from model.errors import InputError

if TYPE_CHECKING:
  from model import Model


def similarity(
  m: "Model", texts: str | Sequence[str], text_pairs: str | Sequence[str]
) -> Float[np.ndarray, "n"]:
  """From -1 to 1 for each pair of texts, float32.

  Raises:
    InputError: as `m.embed`, or if the numbers of texts differ.
  """
  texts, others = listed(texts), listed(text_pairs)
  if len(texts) != len(others):
    raise InputError(f"{len(texts)} texts and {len(others)} second texts: give one for each.")
  vectors = m.embed([*texts, *others])
  return cosines(vectors[: len(texts)], vectors[len(texts) :])


def cosines(a: Float[np.ndarray, "n D"], b: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n"]:
  """Of each pair of rows; 0 where one of them is 0."""
  lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  return np.sum(a * b, axis=-1) / np.maximum(lengths, np.finfo(np.float32).tiny)
