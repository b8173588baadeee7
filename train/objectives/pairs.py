"""Two texts in one piece: does the second follow the first (BERT), are they in order (ALBERT)?"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from model.errors import InputError
from model.tokenizer import Tokenizer
from train.data.arrays import Corpus
from train.objectives.objective import Pieces

FOLLOWS, OTHER = 0, 1  # What the pair head tells apart: its first and its second score.


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two texts as the model reads them. `label` is None where one of the two is empty."""

  tokens: Int64[np.ndarray, "n"]
  types: Int64[np.ndarray, "n"]
  label: int | None


@dataclasses.dataclass(frozen=True)
class Template:
  """Special ids before, between and after two texts, and the token types of everything."""

  specials: tuple[tuple[int, ...], ...]
  special_types: tuple[tuple[int, ...], ...]
  types: tuple[int, int]  # Of the first text and of the second.

  @classmethod
  def of(cls, tokenizer: Tokenizer) -> "Template":
    """The template of a tokenizer.

    Raises:
      InputError: if it puts nothing before two texts: the pair head reads the first token.
    """
    text = _something(tokenizer)
    found = tokenizer.backend.encode(text, text)
    ids, kinds, types, part = ([], [], []), ([], [], []), [0, 0], 0
    for i, kind, sequence in zip(found.ids, found.type_ids, found.sequence_ids, strict=True):
      if sequence is None:
        ids[part].append(i)
        kinds[part].append(kind)
      else:
        types[sequence], part = kind, sequence + 1
    if not ids[0]:
      raise InputError(
        "objective.pairs needs a tokenizer that puts a special token before two texts, as BERT's "
        "[CLS]: set data.tokenizer to 'wordpiece:N' or 'bytes', or leave objective.pairs out."
      )
    return cls(tuple(map(tuple, ids)), tuple(map(tuple, kinds)), (types[0], types[1]))

  @property
  def added(self) -> int:
    """Special tokens of a pair."""
    return sum(map(len, self.specials))

  @property
  def num_types(self) -> int:
    """Token types that a model needs."""
    return 1 + max(*self.types, *(kind for part in self.special_types for kind in part))

  def two(self, first: np.ndarray, second: np.ndarray, label: int | None) -> Pair:
    """Two texts with their special tokens."""
    (before, between, behind), (a, b) = self.specials, self.types
    kinds = self.special_types
    ids = before, first, between, second, behind
    types = kinds[0], np.full(len(first), a), kinds[1], np.full(len(second), b), kinds[2]
    return Pair(_joined(ids), _joined(types), label)


def make_pair(kind: str, template: Template, pieces: Pieces, i: int, chance) -> Pair:
  """The i-th piece, cut in two at a random place, as a pair.

  Args:
    kind: `next_sentence`: half of the time the second text comes from another document and is as
      long as the one that it stands for; `sentence_order`: half of the time the two are swapped.
  """
  text = pieces.tokens(i)
  place, coin, *where = chance.random(4)
  if len(text) < 2:
    return template.two(text, text[:0], None)
  cut = 1 + int(place * (len(text) - 1))
  first, second = text[:cut], text[cut:]
  if coin >= 0.5:
    return template.two(first, second, FOLLOWS)
  if kind == "sentence_order":
    return template.two(second, first, OTHER)
  other = _other_text(pieces.corpus, int(pieces.documents[i]), len(second), *where)
  return template.two(first, other, OTHER)


def check_documents(kind: str, corpus: Corpus) -> None:
  """Raises an InputError if there is no other document to take a text from."""
  if kind == "next_sentence" and np.count_nonzero(corpus.lengths) < 2:
    raise InputError(
      "objective.pairs='next_sentence' takes texts from other documents, and a part of the corpus "
      "has only one: set data.documents to 'paragraph' or 'line', or use 'sentence_order'."
    )


def _other_text(
  corpus: Corpus, own: int, size: int, which: float, where: float
) -> Int64[np.ndarray, "n"]:
  """`size` tokens of a random document that is not `own`, going on with those behind it."""
  count = len(corpus.lengths)
  document = (own + 1 + int(which * (count - 1))) % count
  start = int(where * max(0, corpus.lengths[document] - size + 1))
  found, left = [], size
  while left:
    if document != own:
      begin, end = corpus.starts[document] + start, corpus.lengths[document] - start
      found.append(np.asarray(corpus.tokens[begin : begin + min(left, end)], np.int64))
      left -= len(found[-1])
    document, start = (document + 1) % count, 0
  return np.concatenate(found)


def _joined(parts: Sequence[Sequence[int] | np.ndarray]) -> Int64[np.ndarray, "n"]:
  return np.concatenate([np.asarray(part, np.int64) for part in parts])


def _something(tokenizer: Tokenizer) -> str:
  """A text that has a token."""
  for i in range(tokenizer.vocab_size):
    text = "" if i in tokenizer.special_ids else tokenizer.backend.decode([i])
    if text and tokenizer.encode(text, add_special_tokens=False):
      return text
  raise InputError("the tokenizer has no token that stands for any text.")
