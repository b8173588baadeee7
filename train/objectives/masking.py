"""Which tokens of a row are masked, and what stands in their places."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64
from tokenizers import decoders

from model.tokenizer import Tokenizer
from train.config import ObjectiveConfig
from train.objectives.special_tokens import need_mask

_WORD_START = "▁"  # SentencePiece's.
_CONTINUES = "##"  # WordPiece's.


@dataclasses.dataclass(frozen=True)
class Words:
  """The units of a text that are masked whole, in order. Special tokens are in none of them."""

  starts: Int64[np.ndarray, "w"]  # Place of the first token.
  sizes: Int64[np.ndarray, "w"]  # Tokens.
  joined: Bool[np.ndarray, "w"]  # Whether the next one follows without a token between.


@dataclasses.dataclass(frozen=True, eq=False)
class Masker:
  """Masks `mask_rate` of the tokens of each row that are not special.

  The number is drawn for a row, whatever texts share it: the rate is met in the mean, and a row
  never masks more than `most`. It is at least one (BERT, arXiv:1810.04805, appendix A.1). A token
  or word is as likely as any other; one that is too long for what is left is passed over, as
  BERT's whole-word masking does. N-grams of n words make up a share proportional to 1/n of all
  (ALBERT, arXiv:1909.11942, section 3.1).
  """

  config: ObjectiveConfig  # With the objective's own values in it.
  tokenizer: Tokenizer

  @functools.cached_property
  def special(self) -> Bool[np.ndarray, "V"]:
    """Whether an id is a special token."""
    special = np.zeros(self.tokenizer.vocab_size, bool)
    special[list(self.tokenizer.special_ids)] = True
    return special

  @functools.cached_property
  def ordinary(self) -> Int64[np.ndarray, "v"]:
    """The ids that random tokens are drawn from."""
    return np.flatnonzero(~self.special)

  @functools.cached_property
  def edges(self) -> tuple[Bool[np.ndarray, "V"], Bool[np.ndarray, "V"]]:
    """See `word_edges`."""
    return word_edges(self.tokenizer)

  def choose(
    self, texts: Sequence[np.ndarray], rows: Int64[np.ndarray, "s"],
    chances: Sequence[np.random.Generator],
  ) -> list[Int64[np.ndarray, "m"]]:  # fmt: skip
    """Places of each text that are masked, ascending.

    Args:
      texts: token ids.
      rows: of a batch, which the texts lie in, ascending.
      chances: of each text.
    """
    ends = (np.flatnonzero(np.diff(rows, append=-1)) + 1).tolist()
    chosen = []
    for begin, end in itertools.pairwise([0, *ends]):
      chosen += self._choose_in_row(texts[begin:end], chances[begin:end])
    return chosen

  def replaced(
    self, targets: Int64[np.ndarray, "m"], chance: np.random.Generator
  ) -> Int64[np.ndarray, "m"]:
    """What the model reads in the places of chosen tokens: the mask, a random token, or the same.

    Each token has its own chance (`mask_share`, `random_share`).
    """
    kind, token = chance.random((2, len(targets)))
    random = self.ordinary[(token * len(self.ordinary)).astype(np.int64)]
    shares = self.config.mask_share or 0.0, self.config.random_share or 0.0
    read = np.where(kind < sum(shares), random, targets)
    return np.where(kind < shares[0], need_mask(self.tokenizer, self.config.name), read)

  def words(self, text: Int64[np.ndarray, "n"]) -> Words:
    """The units of a text: tokens, or words for `word` and `ngram`."""
    maskable = ~self.special[text]
    begins = maskable.copy()
    if self.config.mask_unit != "token":
      first, last = self.edges
      begins[1:] &= ~(maskable[:-1] & first[text[1:]] & last[text[:-1]])
    starts = np.flatnonzero(begins)
    number = np.cumsum(begins) - 1
    sizes = np.bincount(number[maskable], minlength=len(starts))
    return Words(starts, sizes, np.append(starts[1:], -1) == starts + sizes)

  def _choose_in_row(
    self, texts: Sequence[np.ndarray], chances: Sequence[np.random.Generator]
  ) -> list[np.ndarray]:
    found = [self.words(text) for text in texts]
    # Each text has its own priorities; the number and the lengths are the first one's chance.
    rounding = chances[0].random(1 + (self.config.max_ngram or 1))
    order = [chance.random(len(w.starts)) for chance, w in zip(chances, found, strict=True)]
    row = Words(*(np.concatenate([getattr(w, f) for w in found])
                  for f in ("starts", "sizes", "joined")))  # fmt: skip
    tokens = int(row.sizes.sum())
    wanted = max(1, int((self.config.mask_rate or 0.0) * tokens + rounding[0])) if tokens else 0
    ngram = self.config.max_ngram or 1
    spans = choose_spans(
      row, np.argsort(np.concatenate(order), kind="stable"), wanted,
      ngram if self.config.mask_unit == "ngram" else 1, rounding[1:],
    )  # fmt: skip
    taken = np.zeros(len(row.starts), bool)
    for first, count in spans:
      taken[first : first + count] = True
    parts = np.split(taken, np.cumsum([len(w.starts) for w in found])[:-1])
    return [_places(w, part) for w, part in zip(found, parts, strict=True)]


def most_masked(rate: float, tokens: int) -> int:
  """The largest number of places that a row of so many tokens masks."""
  return min(tokens, int(rate * tokens) + 1)


def choose_spans(
  words: Words, order: Int64[np.ndarray, "w"], wanted: int, longest: int, rounding: np.ndarray
) -> list[tuple[int, int]]:
  """Runs of words that together have `wanted` tokens, or less where no word is short enough.

  Each length from 1 to `longest` gets the same share of the words, so that runs of n words are
  1/n as many as single ones. Longer ones are placed first.

  Args:
    order: words as they are tried.
    rounding: uniform numbers, by which fractions of runs are rounded, for each length.

  Returns:
    (first word, number of words).
  """
  if longest == 1 and (words.sizes == 1).all():
    return [(int(first), 1) for first in order[:wanted]]
  free, sizes = [True] * len(order), words.sizes.tolist()
  joined, tried = words.joined.tolist(), order.tolist()
  share = wanted * len(sizes) / max(1, sum(sizes)) / longest  # Words, for each length.
  spans, left = [], wanted
  for length in range(longest, 0, -1):
    number = int(share / length + rounding[length - 1]) if length > 1 else wanted
    for first in tried:
      if not number or not left:
        break
      run = range(first, first + length)
      if free[first] and all(joined[i] and free[i + 1] for i in run[:-1]):
        size = sum(sizes[i] for i in run)
        if size <= left:
          spans.append((first, length))
          number, left = number - 1, left - size
          for i in run:
            free[i] = False
  return spans


def word_edges(tokenizer: Tokenizer) -> tuple[Bool[np.ndarray, "V"], Bool[np.ndarray, "V"]]:
  """By id: whether a token can go on with a word, and whether a word can go on behind it.

  A token goes on with the word before it where both are so. Of WordPiece `##` says it; elsewhere
  words are letters and digits up to what is none, or to the mark of a beginning (SentencePiece's
  `▁`, the space in byte-level vocabularies). Parts of a
  character count as letters.
  """
  form = json.loads(tokenizer.backend.to_str())
  names = [tokenizer.backend.id_to_token(i) or "" for i in range(tokenizer.vocab_size)]
  if form["model"]["type"] == "WordPiece":
    prefix = form["model"].get("continuing_subword_prefix", _CONTINUES)
    return np.array([n.startswith(prefix) for n in names]), np.ones(len(names), bool)
  if '"ByteLevel"' in json.dumps(form["decoder"]):
    # Bytes that are a part of a character only are shown as U+FFFD.
    texts = [decoders.ByteLevel().decode([n]).replace("\ufffd", "x") for n in names]
  else:
    texts = [n.replace(_WORD_START, " ") if not _is_byte(n) else "x" for n in names]
  inside = lambda text, i: bool(text) and text[i].isalnum()
  return np.array([inside(t, 0) for t in texts]), np.array([inside(t, -1) for t in texts])


def _places(words: Words, taken: Bool[np.ndarray, "w"]) -> Int64[np.ndarray, "m"]:
  starts, sizes = words.starts[taken], words.sizes[taken]
  within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
  return np.repeat(starts, sizes) + within


def _is_byte(name: str) -> bool:
  """Whether a piece of SentencePiece is a byte: <0xE2>."""
  return len(name) == 6 and name.startswith("<0x") and name.endswith(">")
