"""Instruction tuning: conversations of which the assistant's messages alone are learned."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from model.config import ModelConfig
from model.errors import InputError
from model.heads import Network, build
from model.tokenizer import Tokenizer
from train.config import Config, ObjectiveConfig
from train.data.arrays import Corpus
from train.data.fit import Fitted
from train.data.labels import place_of
from train.objectives.causal_lm import TOKENS, WEIGHTS, next_token_loss, word_weights
from train.objectives.loss import Loss
from train.objectives.objective import Batch, Example, Pieces, Side, place


@dataclasses.dataclass(frozen=True)
class SFT:
  """A decoder reads a whole conversation and learns the tokens of answers, each weighing the same.

  What is too long is an error, dropped, or cut behind the last answer that fits; a conversation
  none of whose learned answers fits is dropped then.
  """

  config: ObjectiveConfig
  model: ModelConfig
  seq_len: int
  whole: None = None
  overlap: int = 0
  moves: bool = False

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "SFT":
    """The objective of a config."""
    return cls(config.objective.resolved(), config.model, config.seq_len)

  @property
  def samples(self) -> bool:
    """Whether embeddings get noise."""
    return self.config.noise > 0  # pyright: ignore[reportOptionalOperand]

  @property
  def sides(self) -> Mapping[str, Side]:
    """Tokens, and the token behind each."""
    return {"": Side(self.seq_len, dict(tokens=TOKENS, targets=TOKENS, weights=WEIGHTS))}

  def fit(self, corpus: Corpus) -> Fitted:
    """Conversations of at most `seq_len` predictions."""
    most = self.seq_len + 1
    if self.config.too_long == "error":
      _check_lengths(corpus, most)
      return Fitted(corpus)
    if self.config.too_long == "drop":
      kept = corpus.lengths <= most
      return _some(corpus, kept, corpus.lengths)
    ends, lengths = corpus.columns["ends"], corpus.lengths.copy()
    for i in np.flatnonzero(lengths > most):
      fitting = ends.of(int(i))[ends.of(int(i)) <= most]
      lengths[i] = fitting.max(initial=0)
    learned = np.array([corpus.columns["turns"].of(i)[:n].any() for i, n in enumerate(lengths)])
    return _some(corpus, learned, lengths)

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """One place for each prediction."""
    return {"": lengths - 1}

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """One conversation after the other."""
    examples = (self._example(pieces, i) for i in range(len(pieces.rows)))
    place(batch, self.sides, pieces.rows, examples)

  def _example(self, pieces: Pieces, i: int) -> Example:
    tokens = pieces.tokens(i)
    turns = np.asarray(pieces.corpus.columns["turns"].of(pieces.documents[i]))[: len(tokens)]
    learned = turns == turns.max() if self.config.turns == "last" else turns > 0
    return {"": dict(tokens=tokens[:-1], targets=tokens[1:], weights=learned[1:])}

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Network:
    """The network alone."""
    return build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Tokens of answers."""
    return word_weights(batch)

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """Cross-entropy of the tokens of answers."""
    noise = self.config.noise or 0.0
    return next_token_loss(self.config, self.model, net, batch, key, noise=noise, few=True)


def _check_lengths(corpus: Corpus, most: int) -> None:
  over = corpus.lengths > most
  if over.any():
    first = int(np.argmax(over))
    raise InputError(
      f"{place_of(corpus, first)}: the conversation has {corpus.lengths[first]} tokens and room "
      f"for {most} ({over.sum()} of {len(over)} are too long): raise seq_len, or set "
      "objective.too_long to 'drop' or 'truncate'."
    )


def _some(corpus: Corpus, kept: np.ndarray, lengths: np.ndarray) -> Fitted:
  """The conversations that are kept, and how much of each."""
  if not kept.any():
    raise InputError(
      f"all {len(kept)} conversations are too long: raise seq_len, or leave objective.too_long out."
    )
  less = (corpus.lengths - lengths) * kept
  cut = dataclasses.replace(corpus, lengths=lengths).take(np.flatnonzero(kept))
  return Fitted(cut, int(less.sum()), int((less > 0).sum()), int((~kept).sum()))
