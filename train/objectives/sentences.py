"""Where sentences end in a text of token ids."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int64
from tokenizers import models

from model.tokenizer import Tokenizer

_STOPS = (".", "!", "?", "…")  # They end a sentence where a space or a new word follows.
_HARD_STOPS = ("。", "！", "？", "।")  # They end one whatever follows.
_MARKS = "\"'”’»)]}"
_NEWLINES = ("\n", "Ċ", "<0x0A>")  # The last two: in byte-level and SentencePiece vocabularies.
_SPACES = (" ", "\t", "▁", "Ġ", "ĉ", *_NEWLINES)


@dataclasses.dataclass(frozen=True)
class Sentences:
  """Whether tokens end sentences, by id."""

  stops: Bool[np.ndarray, "V"]
  hard_stops: Bool[np.ndarray, "V"]
  closes: Bool[np.ndarray, "V"]  # A quotation mark or bracket that may follow a stop.
  opens: Bool[np.ndarray, "V"]  # Begins with a space, or begins a word.

  @classmethod
  def of(cls, tokenizer: Tokenizer) -> "Sentences":
    """The table of a vocabulary."""
    find, size = tokenizer.backend.id_to_token, tokenizer.vocab_size
    tokens = [find(i) or "" for i in range(size)]
    ends = [token.rstrip(_MARKS + "▁Ġ ") for token in tokens]
    newline = [any(mark in token for mark in _NEWLINES) for token in tokens]
    if isinstance(tokenizer.backend.model, models.WordPiece):
      opens = [not token.startswith("##") for token in tokens]
    else:
      opens = [token.startswith(_SPACES) for token in tokens]
    hard = [n or end.endswith(_HARD_STOPS) for n, end in zip(newline, ends, strict=True)]
    stops = [end.endswith(_STOPS) for end in ends]
    closes = [bool(token) and not token.strip(_MARKS) for token in tokens]
    return cls(np.array(stops), np.array(hard), np.array(closes), np.array(opens))

  def sizes(self, tokens: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "s"]:
    """Tokens of each sentence; stops and line ends in a row end one sentence together."""
    now, then = tokens[:-1], tokens[1:]
    stops = self.stops[now]
    stops[1:] |= self.closes[now[1:]] & stops[:-1]
    ends = stops & self.opens[then] | self.hard_stops[now]
    ends &= ~(self.stops | self.hard_stops)[then]
    return np.diff(np.flatnonzero(ends) + 1, prepend=0, append=len(tokens))
