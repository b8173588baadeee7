"""The words that tokens are pieces of, found in the characters of the text alone."""

import unicodedata
from collections.abc import Sequence

_IN_WORDS, _IN_NUMBERS = "-‐‑._/&@+", ",:"  # Symbols that do not end a word.


def word_pieces(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
  """(index of the first piece, start, end) of each word, in order.

  A word is a run of letters, digits and marks, or any other single character; hyphens, points and
  the like between two of them belong to the run (`e-mail`, `U.N.`, `1,000`), as in tagged corpora.
  Ideographs and kana stand alone, as their pieces say. A piece belongs to the word of its first
  character, white space aside; pieces of white space belong to none. Pieces that share a character
  belong together.
  """
  words: list[tuple[int, int, int]] = []
  for i, (start, end) in enumerate(offsets):
    start, end = trimmed(text, start, end)
    if start >= end:
      continue
    last = words[-1] if words else None
    if last and (start < last[2] or (start == last[2] and _continues(text, start))):
      words[-1] = (last[0], last[1], max(end, last[2]))
    else:
      words.append((i, start, end))
  return words


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
  """The same stretch of `text` without white space at its ends, with the marks of its last
  character, which normalization may have left out.
  """
  piece = text[start:end]
  start += len(piece) - len(piece.lstrip())
  end = max(start, end - len(piece) + len(piece.rstrip()))
  while start < end < len(text) and _marks(text[end]):
    end += 1
  return start, end


def _continues(text: str, place: int) -> bool:
  """Whether the word before `place` goes on there."""
  if place == 0 or _links(text, place) or _links(text, place - 1):
    return place > 0
  if text[place] == ".":  # Of an abbreviation.
    return place > 1 and text[place - 2] == "." and _joins(text[place - 1])
  return _joins(text[place - 1]) and _joins(text[place])


def _links(text: str, place: int) -> bool:
  """Whether a symbol stands inside a word."""
  if not 0 < place < len(text) - 1:
    return False
  before, symbol, after = text[place - 1 : place + 2]
  if symbol in _IN_NUMBERS:
    return before.isdigit() and after.isdigit()
  return symbol in _IN_WORDS and _joins(before) and _joins(after)


def _joins(character: str) -> bool:
  if not character.isalnum() and not _marks(character):
    return False
  return not unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA"))


def _marks(character: str) -> bool:
  return unicodedata.category(character)[0] == "M"
