"""Two texts in one piece: does the second follow the first (BERT), are they in order (ALBERT)?"""

import dataclasses

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
  """Special ids around two texts, and token types of the two with what surrounds them."""

  before: tuple[int, ...]
  between: tuple[int, ...]
  behind: tuple[int, ...]
  types: tuple[int, ...]  # Of (before, first text, between, second text, behind).

  @classmethod
  def of(cls, tokenizer: Tokenizer) -> "Template":
    """The template of a tokenizer.

    Raises:
      InputError: if it puts nothing before two texts: the pair head reads the first token.
    """
    ids, types, text = _encoded_pair(tokenizer)
    n = len(text)
    places = [i for i in range(len(ids) - n + 1) if ids[i : i + n] == text]
    if len(places) < 2 or not places[0]:
      raise InputError(
        "objective.pairs needs a tokenizer that puts a special token before two texts, as BERT's "
        "[CLS]: set data.tokenizer to 'wordpiece:N' or 'bytes', or leave objective.pairs out."
      )
    first, second = places[0], places[-1]
    parts = ids[:first], ids[first + n : second], ids[second + n :]
    edges = 0, first, first + n, second, len(ids) - 1
    before, between, behind = (tuple(part) for part in parts)
    return cls(before, between, behind, tuple(types[i] for i in edges))

  def __len__(self) -> int:
    """Special tokens of a pair."""
    return len(self.before) + len(self.between) + len(self.behind)

  def joined(self, first: np.ndarray, second: np.ndarray, label: int | None) -> Pair:
    """The tokens and types of two texts."""
    parts = self.before, first, self.between, second, self.behind
    tokens = np.concatenate([np.asarray(part, np.int64) for part in parts])
    return Pair(tokens, np.repeat(np.array(self.types), [len(part) for part in parts]), label)


def make_pair(kind: str, template: Template, pieces: Pieces, i: int, chance) -> Pair:
  """The i-th piece, cut in two at a random place, as a pair.

  Args:
    kind: `next_sentence`: half of the time the second text comes from another document and is as
      long as the one that it stands for; `sentence_order`: half of the time the two are swapped.
  """
  text = pieces.tokens(i)
  place, coin, *where = chance.random(4)
  if len(text) < 2:
    return template.joined(text, text[:0], None)
  cut = 1 + int(place * (len(text) - 1))
  first, second = text[:cut], text[cut:]
  if coin >= 0.5:
    return template.joined(first, second, FOLLOWS)
  if kind == "sentence_order":
    return template.joined(second, first, OTHER)
  other = _other_text(pieces.corpus, int(pieces.documents[i]), len(second), *where)
  return template.joined(first, other, OTHER)


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


def _encoded_pair(tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
  """(ids, token types) of one short text twice, and its ids alone."""
  for i in range(tokenizer.vocab_size):
    text = "" if i in tokenizer.special_ids else tokenizer.backend.decode([i])
    ids = tokenizer.encode(text, add_special_tokens=False) if text.strip() else []
    if ids and not tokenizer.special_ids.intersection(ids):
      pair = tokenizer.backend.encode(text, text)
      return pair.ids, pair.type_ids, ids
  raise InputError("the tokenizer has no token but special ones.")
