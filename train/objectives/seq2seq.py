"""Sequence to sequence: a text and what is to be written for it, in columns or parallel files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from model.config import ModelConfig
from model.errors import InputError
from model.heads import Network, build
from model.template import Template
from model.tokenizer import Tokenizer
from train.config import Config, ObjectiveConfig
from train.data.arrays import Corpus
from train.data.fit import Fitted, fit, shares
from train.objectives.causal_lm import TOKENS, WEIGHTS, word_loss, word_weights
from train.objectives.loss import Loss, inputs_of, work
from train.objectives.objective import Batch, Example, Pieces, Side, place
from train.objectives.to_decoder import (
  DECODER,
  Ends,
  two_sided,
  two_sides,
  written_loss,
)


def after_prompt(prompt: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
  """The fields of one sequence of which only what follows the prompt is learned."""
  both = np.concatenate([prompt, target])
  weights = np.arange(1, len(both)) >= len(prompt)
  return dict(tokens=both[:-1], targets=both[1:], weights=weights)


@dataclasses.dataclass(frozen=True)
class Seq2Seq:
  """An encoder–decoder reads the text with its special tokens and writes the target and its end.

  A decoder reads text and target as one sequence, the template's special tokens before the text and
  none between: what separates them belongs to the text, as in a prompt. It reads the text causally,
  because generation does, and only the target and its end are learned.
  """

  config: ObjectiveConfig
  model: ModelConfig
  seq_len: int
  target_len: int | None
  truncate: bool
  template: Template
  ends: Ends
  whole: None = None
  overlap: int = 0
  samples: bool = False
  moves: bool = False

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "Seq2Seq":
    """The objective of a config."""
    return cls(
      config.objective, config.model, config.seq_len, config.target_len, config.data.truncate,
      Template.of(tokenizer), Ends.of(config, tokenizer),
    )  # fmt: skip

  @property
  def sides(self) -> Mapping[str, Side]:
    """Encoder and decoder, or the one sequence of a decoder."""
    if self.target_len is None:
      return {"": Side(self.seq_len, dict(tokens=TOKENS, targets=TOKENS, weights=WEIGHTS))}
    return two_sides(self.seq_len, self.target_len)

  def fit(self, corpus: Corpus) -> Fitted:
    """Examples that fit. In one sequence, text and target are cut where they are longer."""
    text, target = corpus.lengths, corpus.columns["target"].lengths
    if self.target_len is None:
      most = shares(text, target, self.seq_len - len(self.template.single[0]))
    else:
      most = (np.full_like(text, self.seq_len - self.template.added(pair=False)),
              np.full_like(target, self.target_len - len(self.ends.end)))  # fmt: skip
    if min(int(n.min()) for n in most) < 1:
      raise InputError(
        f"seq_len={self.seq_len}, target_len={self.target_len} leave no room beside special "
        "tokens: raise them."
      )
    remedy = "raise seq_len" if self.target_len is None else "raise seq_len or target_len"
    room = dict(text=most[0], target=most[1])
    return fit(corpus, room, truncate=self.truncate, remedy=remedy)

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """Texts with their special tokens, and a place for each token that is predicted."""
    target = corpus.columns["target"].lengths[documents]
    if self.target_len is None:
      return {"": len(self.template.single[0]) + lengths + target + len(self.ends.end) - 1}
    read = lengths + self.template.added(pair=False)
    return {"": read, DECODER: target + len(self.ends.end)}

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """One piece after the other."""
    examples = (self._example(pieces, i) for i in range(len(pieces.rows)))
    place(batch, self.sides, pieces.rows, examples)

  def _example(self, pieces: Pieces, i: int) -> Example:
    text = pieces.tokens(i)
    target = self.ends.written(pieces.corpus.columns["target"].of(pieces.documents[i]))
    if self.target_len is None:
      prompt = np.concatenate([self.template.single[0], text]).astype(np.int64)
      return {"": after_prompt(prompt, target)}
    return two_sided(self.template.one(text), target, self.ends.start)

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Network:
    """The network alone."""
    return build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Target tokens."""
    return word_weights(batch, "" if self.target_len is None else DECODER)

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """Cross-entropy of the targets."""
    if self.target_len is not None:
      return written_loss(self.config, self.model, net, batch, key)
    inputs = inputs_of(batch)
    x, _, stats = net.hidden(inputs, key=key)
    return word_loss(self.config, self.model, net.logits, x, batch, stats, **work(
      self.model, inputs, head=jnp.sum(inputs.pos >= 0)
    ))  # fmt: skip
