"""Prefix language models: a text's beginning is read in both directions, the rest is written."""

import dataclasses
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
from train.objectives.causal_lm import TOKENS, WEIGHTS, next_token_loss, word_weights
from train.objectives.loss import Loss
from train.objectives.objective import Batch, Example, Field, Pieces, Side, place
from train.objectives.to_decoder import (
  DECODER,
  Ends,
  check_longest,
  two_sided,
  two_sides,
  written_loss,
)

PREFIX = Field(np.bool_)


@dataclasses.dataclass(frozen=True)
class DecoderPrefixLM:
  """Rows of `seq_len` tokens; the beginning of each piece, of any length, is its prefix.

  A piece's last token is the next piece's first, and the next token is predicted from the last one
  of the prefix on.
  """

  config: ObjectiveConfig
  model: ModelConfig
  seq_len: int
  overlap: int = 1
  samples: bool = False
  moves: bool = True

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "DecoderPrefixLM":
    """The objective of a config."""
    return cls(config.objective, config.model, config.seq_len)

  @property
  def sides(self) -> Mapping[str, Side]:
    """Tokens, the token behind each, and which lie in a prefix."""
    return prefix_sides(self.seq_len)

  @property
  def whole(self) -> int:
    """Tokens of the longest piece: a row and the one behind it."""
    return self.seq_len + 1

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """One place for each token that has a next one."""
    return {"": lengths - 1}

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """Piece by piece."""
    examples = (self._example(pieces, i) for i in range(len(pieces.rows)))
    place(batch, self.sides, pieces.rows, examples)

  def _example(self, pieces: Pieces, i: int) -> Example:
    share = float(pieces.chance(i).random(1)[0])
    return continued(pieces.tokens(i), prefix_length(int(pieces.lengths[i]), share))

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Network:
    """The network alone."""
    return build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Target tokens."""
    return word_weights(batch)

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """Cross-entropy of the next token behind prefixes."""
    return next_token_loss(self.config, self.model, net, batch, key)


@dataclasses.dataclass(frozen=True)
class EncoderPrefixLM:
  """The encoder reads the beginning of a piece, the decoder writes the rest (T5, section 3.3.1).

  Where a piece is divided is decided once for all epochs, since its room depends on it.
  """

  config: ObjectiveConfig
  model: ModelConfig
  sides: Mapping[str, Side]
  ends: Ends
  overlap: int = 0
  samples: bool = False
  moves: bool = False  # Each piece has special tokens of its own.

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "EncoderPrefixLM":
    """The objective of a config.

    Raises:
      InputError: if a side has no room.
    """
    ends = Ends.of(config, tokenizer)
    objective = cls(
      config.objective, config.model, two_sides(config.seq_len, config.target_len), ends
    )
    check_longest(config, objective.whole)
    return objective

  @property
  def whole(self) -> int:
    """Tokens of the longest piece: all but one may lie on either side."""
    read, written = (side.length for side in self.sides.values())
    return 1 + min(read - self.ends.around, written - len(self.ends.end))

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """The prefix, and the rest, with special tokens."""
    prefix = prefix_length(lengths, share_of(salts))
    return {"": prefix + self.ends.around, DECODER: lengths - prefix + len(self.ends.end)}

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """Piece by piece."""
    prefixes = prefix_length(pieces.lengths, share_of(pieces.salts))
    examples = (self._example(pieces.tokens(i), n) for i, n in enumerate(prefixes))
    place(batch, self.sides, pieces.rows, examples)

  def _example(self, tokens: np.ndarray, prefix: int) -> Example:
    read, written = self.ends.read(tokens[:prefix]), self.ends.written(tokens[prefix:])
    return two_sided(read, written, self.ends.start)

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Network:
    """The network alone."""
    return build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Tokens that the decoder writes."""
    return word_weights(batch, DECODER)

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """Cross-entropy of what the decoder writes."""
    return written_loss(self.config, self.model, net, batch, key)


def prefix_sides(seq_len: int) -> dict[str, Side]:
  """The side of a decoder that reads prefixes in both directions."""
  fields = dict(tokens=TOKENS, targets=TOKENS, weights=WEIGHTS, prefix=PREFIX)
  return {"": Side(seq_len, fields)}


def continued(tokens: np.ndarray, prefix: int) -> Example:
  """An example of a decoder: what stands behind the first `prefix` tokens, at least one, is
  predicted.
  """
  place_of = np.arange(len(tokens) - 1)
  weights = (place_of >= prefix - 1).astype(np.float32)
  side = dict(tokens=tokens[:-1], targets=tokens[1:], weights=weights, prefix=place_of < prefix)
  return {"": side}


def prefix_length(length: Any, share: Any) -> Any:
  """Tokens of the prefix: any number from 1 to all but one; 0 of a single token.

  Args:
    length: tokens of a piece, or of several.
    share: a number at least 0 and below 1 for each.
  """
  return np.minimum(1 + np.floor(share * (length - 1)).astype(np.int64), length - 1)


def share_of(salts: np.ndarray) -> np.ndarray:
  """A number at least 0 and below 1 for each salt."""
  return (salts >> np.uint64(11)) * 2.0**-53
