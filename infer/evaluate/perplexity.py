"""Perplexity of a text: each token scored once, in windows that a protocol says."""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from infer.scores import token_logprobs
from infer.tasks.passes import tokenizer_of
from model.errors import InputError

if TYPE_CHECKING:
  from model import Model

_UNLIMITED = 2048  # Tokens of a window where positions set no limit.
_TOKENS = 4096  # Of a pass, unless a single window is longer.


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """What a model gives a text.

  Attributes:
    perplexity: exp of the mean nats of a scored token.
    word_perplexity: exp of the nats of all tokens over words, which are parted by white space; inf
      where that is more than a float holds, as of a language that parts no words.
    byte_perplexity: exp of the nats of all tokens over bytes of UTF-8.
    bits_per_byte: its logarithm to the base of 2.
    nats: of all scored tokens together.
    tokens, words, bytes: how many of each; `tokens` are those that are scored.
    window, stride: in tokens; see `perplexity`.
    begins: whether a special token stands before the text, so that its first token is scored too.
    windows: (tokens scored, their nats) of each window.
    sampled: whether these windows are some of those that the text has. Figures by word and byte are
      then those of the whole text if its other tokens have as many nats.
  """

  perplexity: float
  word_perplexity: float
  byte_perplexity: float
  bits_per_byte: float
  nats: float
  tokens: int
  words: int
  bytes: int
  window: int
  stride: int
  begins: bool
  windows: tuple[tuple[int, float], ...]
  sampled: bool

  def protocol(self) -> str:
    """How it was measured, in a sentence."""
    first = (
      "a special token begins the text and all its tokens are scored"
      if self.begins
      else "the first token of the text has nothing before it and is not scored"
    )
    seen = self.window - self.stride
    every = (
      f"of them {len(self.windows)}, evenly spaced, are read, and every token that one scores"
      if self.sampled
      else "every token"
    )
    return (
      f"one text of {self.bytes:,} bytes; windows of {self.window} tokens, each begins "
      f"{self.stride} tokens behind the one before; {every} is scored once, beyond the first "
      f"window with at least {seen} tokens before it in its window; {first}"
    )


def rise(found: Perplexity, plain: Perplexity) -> tuple[float, float | None]:
  """(by how many percent the perplexity of one model is above that of another, standard error).

  The error is that of windows as a sample of such text, each compared with itself; None: there is
  one window.

  Raises:
    ValueError: if they did not score the same windows.
  """
  if [n for n, _ in plain.windows] != [n for n, _ in found.windows]:
    raise ValueError("only measures of the same windows can be compared.")
  tokens = np.array([n for n, _ in found.windows], np.float64)
  more = np.array([a - b for (_, a), (_, b) in zip(found.windows, plain.windows, strict=True)])
  mean = more.sum() / tokens.sum()
  percent, number = 100 * (_exp(mean) - 1), len(tokens)
  if number == 1:
    return percent, None
  spread = np.sum(np.square(more - mean * tokens)) * number / (number - 1)
  return percent, 100 * _exp(mean) * math.sqrt(spread) / float(tokens.sum())


def _exp(nats: float) -> float:
  """e to the power of nats; inf where that is more than a float holds."""
  try:
    return math.exp(nats)
  except OverflowError:
    return math.inf


class _Span(NamedTuple):
  """Tokens `start` to `stop` of a text, of which those from `scored` on are scored here."""

  start: int
  scored: int
  stop: int


def perplexity(
  m: "Model", text: str, *, window: int | None = None, stride: int | None = None,
  windows: int | None = None,
) -> Perplexity:  # fmt: skip
  """Perplexity of a text, read in windows as Transformers' guide has it.

  Args:
    m: a decoder that scores the next token.
    window: tokens that are read at a time; None: the model's positions.
    stride: tokens between the beginnings of two windows: each scores those that the window before
      has not scored. None: all but one of a window; fewer give tokens more context, and take more
      time.
    windows: how many windows are read, evenly spaced from the first to the last; None: all.

  Raises:
    InputError: for a model that does not score the next token or has no tokenizer, a text with
      nothing to score, a window beyond the model's positions, a stride that leaves windows nothing
      to share, or more windows than the text has.
  """
  if m.config.shape != "decoder" or m.config.head_kind != "language":
    raise InputError(
      f"this model ({m.config.shape}, head {m.config.head_kind!r}) does not score a text token by "
      "token: perplexity needs a decoder with a language head."
    )
  limit = m.room(m.config.stacks[0])
  window = (limit or _UNLIMITED) if window is None else window
  stride = window - 1 if stride is None else stride
  if window < 2 or (limit is not None and window > limit):
    raise InputError(f"window={window} must be between 2 and the model's {limit} positions.")
  if not 1 <= stride < window:
    raise InputError(
      f"stride={stride} must be between 1 and {window - 1}: windows of {window} tokens share at "
      "least one, so that the first new one has something before it."
    )
  tokenizer = tokenizer_of(m)
  before = tokenizer.affixes[0]
  whole, after = tokenizer.encode_documents([text])[0], tokenizer.affixes[1]
  ids = whole[: len(whole) - len(after)]
  first = max(1, len(before))
  if len(ids) <= first:
    raise InputError("the text has no token that could be scored: give a longer one.")
  spans = list(_spans(len(ids), first, window, stride))
  chosen = spans if windows is None else _evenly(spans, windows)
  rows, each = max(1, _TOKENS // min(window, len(ids))), []
  for begin in tqdm(range(0, len(chosen), rows), unit="pass", disable=None, leave=False):
    each += _nats(m, ids, chosen[begin : begin + rows], rows)
  scored = [span.stop - span.scored for span in chosen]
  nats, tokens = sum(each), sum(scored)
  words, size = len(text.split()), len(text.encode())
  whole = nats / tokens * (len(ids) - first)
  return Perplexity(
    _exp(nats / tokens), _exp(whole / max(1, words)), _exp(whole / size),
    whole / size / math.log(2), nats, tokens, words, size, window, stride, bool(before),
    tuple(zip(scored, each, strict=True)), len(chosen) < len(spans),
  )  # fmt: skip


def _evenly(spans: list[_Span], number: int) -> list[_Span]:
  """So many of them, from the first to the last; of one the middle."""
  if not 1 <= number <= len(spans):
    raise InputError(
      f"windows={number} must be between 1 and the {len(spans)} windows that the text has."
    )
  places = np.linspace(0, len(spans) - 1, number) if number > 1 else [(len(spans) - 1) / 2]
  return [spans[round(place)] for place in places]


def _spans(length: int, first: int, window: int, stride: int) -> Iterator[_Span]:
  """Windows over `length` tokens, of which those from `first` on are scored."""
  start, scored = 0, first
  while True:
    stop = min(start + window, length)
    if stop > scored:
      yield _Span(start, scored, stop)
      scored = stop
    if stop == length:
      return
    start += stride


def _nats(m: "Model", ids: np.ndarray, spans: list[_Span], rows: int) -> list[float]:
  """Nats of the tokens that each window scores; `rows` of equal length are read in any case."""
  length = max(span.stop - span.start for span in spans)
  tokens: Any = np.zeros((rows, length), np.int32)
  pos, targets, weights = tokens - 1, tokens.copy(), np.zeros(tokens.shape, bool)
  for row, (start, scored, stop) in enumerate(spans):
    n = stop - start
    tokens[row, :n], pos[row, :n] = ids[start:stop], np.arange(n)
    targets[row, : n - 1] = ids[start + 1 : stop]
    weights[row, scored - 1 - start : n - 1] = True
  graphdef, params = m.graphdef, m.params
  told = np.asarray(token_logprobs(graphdef, params, tokens, pos, targets)[0], np.float64)
  return [-float(told[row][weights[row]].sum()) for row in range(len(spans))]
