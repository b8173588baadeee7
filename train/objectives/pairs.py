"""Two texts in one piece: does the second follow the first (BERT), are they in order (ALBERT)?"""

import dataclasses

import numpy as np
from jaxtyping import Int64

from model.errors import InputError
from model.template import Template
from train.data.arrays import Corpus
from train.objectives.objective import Pieces

FOLLOWS, OTHER = 0, 1  # What the pair head tells apart: its first and its second score.


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two texts as the model reads them. `label` is None where one of the two is empty."""

  tokens: Int64[np.ndarray, "n"]
  types: Int64[np.ndarray, "n"]
  label: int | None


def check_first(template: Template) -> None:
  """Raises an InputError if no special token stands before two texts, for the pair head to read."""
  if not template.pair[0][0]:
    raise InputError(
      "objective.pairs needs a tokenizer that puts a special token before two texts, as BERT's "
      "[CLS]: set data.tokenizer to 'wordpiece:N' or 'bytes', or leave objective.pairs out."
    )


def make_pair(kind: str, template: Template, pieces: Pieces, i: int, chance) -> Pair:
  """The i-th piece, cut in two at a random place, as a pair.

  Args:
    kind: `next_sentence`: half of the time the second text comes from another document and is as
      long as the one that it stands for; `sentence_order`: half of the time the two are swapped.
  """
  text = pieces.tokens(i)
  place, coin, *where = chance.random(4)
  if len(text) < 2:
    return Pair(*template.two(text, text[:0]), None)
  cut = 1 + int(place * (len(text) - 1))
  first, second = text[:cut], text[cut:]
  if coin >= 0.5:
    return Pair(*template.two(first, second), FOLLOWS)
  if kind == "sentence_order":
    return Pair(*template.two(second, first), OTHER)
  other = _other_text(pieces.corpus, int(pieces.documents[i]), len(second), *where)
  return Pair(*template.two(first, other), OTHER)


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
