"""Span corruption: the decoder writes the spans that are missing in what the encoder reads."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from model.config import ModelConfig
from model.heads import Network, build
from model.tokenizer import Tokenizer
from train.config import Config, ObjectiveConfig
from train.data.arrays import Corpus
from train.objectives.causal_lm import word_weights
from train.objectives.loss import Loss
from train.objectives.objective import Batch, Example, Pieces, Side, place
from train.objectives.spans import Spans, check_sentinels
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
class SpanCorruption:
  """T5's objective (arXiv:1910.10683, section 3.1.4).

  Each span that is left out is a sentinel to the encoder; the decoder writes sentinel, span,
  sentinel, span … As T5 has it, no sentinel follows the last span.
  """

  config: ObjectiveConfig
  model: ModelConfig
  sides: Mapping[str, Side]
  spans: Spans
  ends: Ends
  sentinels: tuple[int, ...]
  overlap: int = 0
  samples: bool = False
  moves: bool = False  # Each piece has special tokens of its own.

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "SpanCorruption":
    """The objective of a config.

    Raises:
      InputError: if lengths or the number of sentinels do not suffice.
    """
    own = config.objective.resolved()
    spans = Spans(own.mask_rate or 0, own.mean_span or 1)
    ends = Ends.of(config, tokenizer)
    sentinels = () if tokenizer is None else tokenizer.sentinel_ids
    objective = cls(
      own, config.model, two_sides(config.seq_len, config.target_len), spans, ends, sentinels
    )
    check_longest(config, objective.whole)
    if tokenizer is not None:
      check_sentinels(config, tokenizer, int(spans.counts(np.array(objective.whole))[1]))
    return objective

  @functools.cached_property
  def whole(self) -> int:
    """Tokens of the longest piece that both sides have room for."""
    return longest(self._room, self.sides)

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """What is kept and what is left out, with sentinels and special tokens."""
    return self._room(lengths)

  def _room(self, lengths: np.ndarray) -> Mapping[str, np.ndarray]:
    kept, left_out = self.spans.sizes(lengths)
    return {"": kept + self.ends.around, DECODER: left_out + len(self.ends.end)}

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """Piece by piece."""
    sentinels = np.array(self.sentinels)
    examples = (self._example(pieces, i, sentinels) for i in range(len(pieces.rows)))
    place(batch, self.sides, pieces.rows, examples)

  def _example(self, pieces: Pieces, i: int, sentinels: np.ndarray) -> Example:
    kept, left_out = self.spans.split(pieces.tokens(i), sentinels, pieces.chance(i))
    return two_sided(self.ends.read(kept), self.ends.written(left_out), self.ends.start)

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Network:
    """The network alone."""
    return build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Tokens that the decoder writes."""
    return word_weights(batch, DECODER)

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """Cross-entropy of what the decoder writes."""
    return written_loss(self.config, self.model, net, batch, key)
