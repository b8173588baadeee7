"""Spans of a text that are left out, each behind a sentinel of its own (T5, arXiv:1910.10683)."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int64

from model.errors import InputError
from model.tokenizer import Tokenizer
from train.config import Config


@dataclasses.dataclass(frozen=True)
class Spans:
  """T5's noise: how much of a text is left out follows from its length, only where from chance.

  Texts begin with a token that is kept and end with a span, so that sentinels alone show the order.
  Source: seqio's `random_spans_noise_mask`.
  """

  rate: float  # Share of the tokens that are left out.
  mean: float  # Length of a span, in tokens.

  def counts(self, lengths: Int64[np.ndarray, "n"]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens that are left out, spans); none of a text of one token."""
    most = np.maximum(lengths - 1, 0)
    # In float32, so that ties fall as seqio's do.
    wanted = np.round(lengths.astype(np.float32) * np.float32(self.rate))
    noise = np.clip(wanted.astype(np.int64), np.minimum(1, most), most)
    spans = np.round(noise.astype(np.float32) / np.float32(self.mean)).astype(np.int64)
    return noise, np.clip(spans, np.minimum(1, noise), np.minimum(noise, lengths - noise))

  def sizes(self, lengths: Int64[np.ndarray, "n"]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the two parts that `split` gives."""
    noise, spans = self.counts(lengths)
    return lengths - noise + spans, noise + spans

  def split(
    self, tokens: np.ndarray, sentinels: np.ndarray, chance: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    """(tokens with a sentinel in the place of each span; sentinels, each before its span)."""
    return take_out(tokens, self.noise(len(tokens), chance), sentinels)

  def noise(self, length: int, chance: np.random.Generator) -> Bool[np.ndarray, "length"]:
    """Which tokens are left out."""
    noise, spans = (int(count) for count in self.counts(np.array(length)))
    if not spans:
      return np.zeros(length, bool)
    sizes = np.empty((spans, 2), np.int64)
    sizes[:, 1] = _parts(noise, spans, chance)
    sizes[:, 0] = _parts(length - noise, spans, chance)
    return np.repeat(np.arange(2 * spans) % 2 == 1, sizes.reshape(-1))


def take_out(
  tokens: np.ndarray, noise: Bool[np.ndarray, "n"], sentinels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Takes the spans where `noise` is true out of a text: see `Spans.split`."""
  first = noise & ~np.concatenate([[False], noise[:-1]])
  number = np.cumsum(first) - 1
  kept = np.where(first, sentinels[number], tokens)[~noise | first]
  begins = np.flatnonzero(first[noise])
  return kept, np.insert(tokens[noise], begins, sentinels[: len(begins)])


def check_sentinels(config: Config, tokenizer: Tokenizer, spans: int) -> None:
  """Raises an InputError if the tokenizer has fewer sentinels than the longest piece has spans."""
  found, name = len(tokenizer.sentinel_ids), config.objective.name
  if not found:
    raise InputError(
      f"objective.name={name!r} needs sentinels and the tokenizer has none: use T5's, add the "
      "special tokens <extra_id_0>, <extra_id_1> …, or let data.tokenizer='unigram:N' build one."
    )
  if found < spans:
    raise InputError(
      f"objective.name={name!r}: the longest piece has {spans} spans and the tokenizer {found} "
      "sentinels: shorten seq_len, lengthen the spans or leave out less."
    )


def _parts(items: int, parts: int, chance: np.random.Generator) -> Int64[np.ndarray, "parts"]:
  """Sizes of that many parts of a row of items, none of them empty, all ways alike likely."""
  order = np.argsort(chance.random(items - 1), kind="stable")
  begins = np.concatenate([[True], order < parts - 1])
  return np.diff(np.flatnonzero(begins), append=items)
