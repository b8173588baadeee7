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
    word_perplexity: exp of the nats of all tokens over words, which are parted by white space.
    byte_perplexity: exp of the nats of all tokens over bytes of UTF-8.
    bits_per_byte: its logarithm to the base of 2.
    nats: of all scored tokens together.
    tokens, words, bytes: how many of each; `tokens` are those that are scored.
    window, stride: in tokens; see `perplexity`.
    begins: whether a special token stands before the text, so that its first token is scored too.
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

  def protocol(self) -> str:
    """How it was measured, in a sentence."""
    first = (
      "a special token begins the text and all its tokens are scored"
      if self.begins
      else "the first token of the text has nothing before it and is not scored"
    )
    seen = self.window - self.stride
    return (
      f"one text of {self.bytes:,} bytes; windows of {self.window} tokens, each begins "
      f"{self.stride} tokens behind the one before; every token is scored once, beyond the first "
      f"window with at least {seen} tokens before it in its window; {first}"
    )


class _Span(NamedTuple):
  """Tokens `start` to `stop` of a text, of which those from `scored` on are scored here."""

  start: int
  scored: int
  stop: int


def perplexity(
  m: "Model", text: str, *, window: int | None = None, stride: int | None = None
) -> Perplexity:
  """Perplexity of a text, read in windows as Transformers' guide has it.

  Args:
    m: a decoder that scores the next token.
    window: tokens that are read at a time; None: the model's positions.
    stride: tokens between the beginnings of two windows: each scores those that the window before
      has not scored. None: all but one of a window; fewer give tokens more context, and take more
      time.

  Raises:
    InputError: for a model that does not score the next token or has no tokenizer, a text with
      nothing to score, a window beyond the model's positions, or a stride that leaves windows
      nothing to share.
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
  nats = 0.0
  spans = list(_spans(len(ids), first, window, stride))
  rows = max(1, _TOKENS // min(window, len(ids)))
  for begin in tqdm(range(0, len(spans), rows), unit="pass", disable=None, leave=False):
    nats += _nats(m, ids, spans[begin : begin + rows], rows)
  tokens, words, size = len(ids) - first, len(text.split()), len(text.encode())
  return Perplexity(
    math.exp(nats / tokens), math.exp(nats / max(1, words)), math.exp(nats / size),
    nats / size / math.log(2), nats, tokens, words, size, window, stride, bool(before),
  )  # fmt: skip


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


def _nats(m: "Model", ids: np.ndarray, spans: list[_Span], rows: int) -> float:
  """Nats of the tokens that some windows score; `rows` of equal length are read in any case."""
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
  return -float(told[weights].sum())
