"""The words that tokens are pieces of, found in the characters of the text alone."""

import unicodedata
from collections.abc import Sequence


def word_pieces(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
  """(index of the first piece, start, end) of each word, in order.

  A word is a run of letters, digits and marks, or any other single character; ideographs and kana
  stand alone, as their pieces say. A piece belongs to the word of its first character, white space
  aside; pieces of white space belong to none. Pieces that share a character belong together.
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
  return place > 0 and _joins(text[place - 1]) and _joins(text[place])


def _joins(character: str) -> bool:
  if not character.isalnum() and not _marks(character):
    return False
  return not unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA"))


def _marks(character: str) -> bool:
  return unicodedata.category(character)[0] == "M"
