"""Special tokens around one text and around two, as a tokenizer's template has them."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int64, Integer

from model.errors import InputError
from model.tokenizer import Tokenizer

Part = tuple[list[int], list[int]]  # Special ids and their token types.


@dataclasses.dataclass(frozen=True)
class Template:
  """What stands before one text and after it, and before, between and after two.

  `types` are the token types of the first text and of the second.
  """

  single: tuple[list[int], list[int]]
  pair: tuple[Part, Part, Part]
  types: tuple[int, int]

  @classmethod
  def of(cls, tokenizer: Tokenizer | None) -> "Template":
    """The template of a tokenizer; without one, no special tokens.

    Raises:
      InputError: if it cannot encode anything.
    """
    if tokenizer is None:
      return cls(([], []), (([], []), ([], []), ([], [])), (0, 0))
    text = _something(tokenizer)
    found = tokenizer.backend.encode(text, text)
    parts: list[Part] = [([], []), ([], []), ([], [])]
    types, seen = [0, 0], 0
    for i, kind, sequence in zip(found.ids, found.type_ids, found.sequence_ids, strict=True):
      if sequence is None:
        parts[seen][0].append(i)
        parts[seen][1].append(kind)
      else:
        types[sequence], seen = kind, sequence + 1
    return cls(tokenizer.affixes, (parts[0], parts[1], parts[2]), (types[0], types[1]))

  def added(self, *, pair: bool) -> int:
    """Special tokens around one text, or around two."""
    parts = [ids for ids, _ in self.pair] if pair else self.single
    return sum(map(len, parts))

  @property
  def num_types(self) -> int:
    """Token types that a model of pairs needs."""
    return 1 + max(*self.types, *(kind for _, kinds in self.pair for kind in kinds))

  def one(self, ids: Integer[np.ndarray, "n"]) -> Int64[np.ndarray, "m"]:
    """A text with its special tokens."""
    before, after = self.single
    return np.concatenate([before, ids, after]).astype(np.int64)

  def two(
    self, first: Integer[np.ndarray, "n"], second: Integer[np.ndarray, "k"]
  ) -> tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "m"]]:
    """(ids, token types) of two texts with their special tokens."""
    (before, between, after), (a, b) = self.pair, self.types
    ids = [before[0], first, between[0], second, after[0]]
    kinds = [before[1], np.full(len(first), a), between[1], np.full(len(second), b), after[1]]
    return np.concatenate(ids).astype(np.int64), np.concatenate(kinds).astype(np.int64)

  @functools.cached_property
  def second(self) -> int:
    """Special tokens before the second of two texts."""
    return len(self.pair[0][0]) + len(self.pair[1][0])


def _something(tokenizer: Tokenizer) -> str:
  """A text that has a token."""
  for i in range(tokenizer.vocab_size):
    text = "" if i in tokenizer.special_ids else tokenizer.backend.decode([i])
    if text and tokenizer.encode(text, add_special_tokens=False):
      return text
  raise InputError("the tokenizer has no token that stands for any text.")
