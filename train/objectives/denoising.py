"""Denoising: the decoder writes the text that the encoder reads in a damaged form."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int64

from model.config import ModelConfig
from model.heads import Network, build
from model.tokenizer import Tokenizer
from train.config import Config, ObjectiveConfig
from train.data.arrays import Corpus
from train.objectives.causal_lm import word_weights
from train.objectives.loss import Loss
from train.objectives.objective import Batch, Example, Pieces, Side, place
from train.objectives.sentences import Sentences
from train.objectives.special_tokens import need_mask
from train.objectives.to_decoder import (
  DECODER,
  Ends,
  check_longest,
  longest,
  two_sided,
  two_sides,
  written_loss,
)


@dataclasses.dataclass(frozen=True)
class Denoising:
  """BART's objective (arXiv:1910.13461, section 2.2): sentences in random order, then spans of
  Poisson length with one mask in the place of each; one of length 0 is a mask put in between.
  """

  config: ObjectiveConfig
  model: ModelConfig
  sides: Mapping[str, Side]
  ends: Ends
  mask: int
  sentences: Sentences | None  # None: they keep their order.
  overlap: int = 0
  samples: bool = False
  moves: bool = False  # Each piece has special tokens of its own.

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "Denoising":
    """The objective of a config.

    Raises:
      InputError: if a side has no room, or the tokenizer no mask.
    """
    own, name = config.objective.resolved(), config.objective.name
    mask = 0 if tokenizer is None else need_mask(tokenizer, name)
    sentences = None
    if tokenizer is not None and own.permute_sentences:
      sentences = Sentences.of(tokenizer)
    ends = Ends.of(config, tokenizer)
    objective = cls(
      own, config.model, two_sides(config.seq_len, config.target_len), ends, mask, sentences
    )
    check_longest(config, objective.whole)
    return objective

  @functools.cached_property
  def whole(self) -> int:
    """Tokens of the longest piece that both sides have room for."""
    return longest(self._room, self.sides)

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """The piece and its special tokens on both sides: damaged it is never longer."""
    return self._room(lengths)

  def _room(self, lengths: np.ndarray) -> Mapping[str, np.ndarray]:
    return dict.fromkeys(("", DECODER), lengths + self.ends.around)

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """Piece by piece."""
    examples = (self._example(pieces, i) for i in range(len(pieces.rows)))
    place(batch, self.sides, pieces.rows, examples)

  def _example(self, pieces: Pieces, i: int) -> Example:
    tokens, chance = pieces.tokens(i), pieces.chance(i)
    damaged = tokens if self.sentences is None else permuted(tokens, self.sentences, chance)
    damaged = infilled(
      damaged, self.mask, self.config.mask_rate or 0, poisson(self.config.mean_span or 0), chance
    )
    return two_sided(self.ends.read(damaged), self.ends.read(tokens), self.ends.start)

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Network:
    """The network alone."""
    return build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Tokens that the decoder writes."""
    return word_weights(batch, DECODER)

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """Cross-entropy of what the decoder writes."""
    return written_loss(self.config, self.model, net, batch, key)


def permuted(
  tokens: Int64[np.ndarray, "n"], sentences: Sentences, chance: np.random.Generator
) -> Int64[np.ndarray, "n"]:
  """The sentences of a text in random order."""
  ends = np.cumsum(sentences.sizes(tokens))[:-1]
  parts = np.split(tokens, ends)
  order = np.argsort(chance.random(len(parts)), kind="stable")
  return np.concatenate([parts[i] for i in order])


def infilled(
  tokens: Int64[np.ndarray, "n"], mask: int, rate: float, distribution: Float[np.ndarray, "k"],
  chance: np.random.Generator,
) -> Int64[np.ndarray, "m"]:  # fmt: skip
  """A text in which one mask stands for each of some spans; m is at most n.

  Args:
    rate: share of the tokens that spans hold together, rounded to a token.
    distribution: of the spans' lengths, cumulative, from 0; the last span takes what is left.
  """
  spans = _span_sizes(round(rate * len(tokens)), distribution, chance)
  items = len(tokens) - int(spans.sum()) + len(spans)
  is_span = np.argsort(chance.random(items), kind="stable") < len(spans)
  sizes = np.ones(items, np.int64)
  sizes[is_span] = spans
  begins = np.cumsum(sizes) - sizes
  out = np.full(items, mask)
  out[~is_span] = tokens[begins[~is_span]]
  return out


@functools.cache
def poisson(mean: float) -> Float[np.ndarray, "k"]:
  """Cumulative Poisson distribution from 0 on, to where it is 1."""
  numbers = np.arange(1, int(mean + 40 * mean**0.5) + 40)
  log = np.concatenate([[0], np.cumsum(np.log(mean) - np.log(numbers))]) - mean
  return np.minimum(np.cumsum(np.exp(log)), 1.0)


def _span_sizes(
  total: int, distribution: Float[np.ndarray, "k"], chance: np.random.Generator
) -> Int64[np.ndarray, "s"]:
  """Lengths of spans, `total` together; never more spans than that."""
  if not total:
    return np.zeros(0, np.int64)
  drawn = chance.random(total)
  sizes = np.minimum(np.searchsorted(distribution, drawn, side="right"), len(distribution) - 1)
  sums = np.cumsum(sizes)
  last = min(int(np.searchsorted(sums, total)), total - 1)  # The first to reach the total.
  sizes[last] += total - sums[last]
  return sizes[: last + 1]
