"""Tagging: one label for each word, told at its first token."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from model.config import ModelConfig
from model.heads import Network, build
from model.template import Template
from model.tokenizer import Tokenizer
from train.config import Config, ObjectiveConfig
from train.data.arrays import Corpus
from train.data.fit import Fitted, fit
from train.objectives.causal_lm import TOKENS, WEIGHTS
from train.objectives.loss import Loss, inputs_of, right_answers, router_penalty, token_loss, work
from train.objectives.objective import Batch, Example, Pieces, Side, place
from train.objectives.texts import two_keys


@dataclasses.dataclass(frozen=True)
class Tagging:
  """Words with spaces between are read as text; other tokens than a word's first weigh nothing."""

  config: ObjectiveConfig
  model: ModelConfig
  seq_len: int
  truncate: bool
  template: Template
  whole: None = None
  overlap: int = 0
  samples: bool = False
  moves: bool = False

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "Tagging":
    """The objective of a config."""
    template = Template.of(tokenizer)
    return cls(config.objective, config.model, config.seq_len, config.data.truncate, template)

  @property
  def sides(self) -> Mapping[str, Side]:
    """Tokens, and the label of each."""
    return {"": Side(self.seq_len, dict(tokens=TOKENS, targets=TOKENS, weights=WEIGHTS))}

  def fit(self, corpus: Corpus) -> Fitted:
    """Texts that fit; the labels of words that are cut off are lost with them."""
    left = self.seq_len - self.template.added(pair=False)
    room = dict(text=np.full_like(corpus.lengths, max(left, 0)))
    return fit(corpus, room, truncate=self.truncate and left > 0, remedy="raise seq_len")

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """A text with its special tokens."""
    return {"": lengths + self.template.added(pair=False)}

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """One piece after the other."""
    examples = (self._example(pieces, i) for i in range(len(pieces.rows)))
    place(batch, self.sides, pieces.rows, examples)

  def _example(self, pieces: Pieces, i: int) -> Example:
    before, after = map(len, self.template.single)
    tags = pieces.corpus.columns["label"].of(pieces.documents[i])[: pieces.lengths[i]]
    tags = np.pad(tags, (before, after), constant_values=-1)
    tokens = self.template.one(pieces.tokens(i))
    return {"": dict(tokens=tokens, targets=np.maximum(tags, 0), weights=tags >= 0)}

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Network:
    """The network alone."""
    return build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Words."""
    return {"loss": jnp.sum(batch["weights"])}

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """Cross-entropy of the labels of words."""
    body, head = two_keys(key)
    inputs, targets, weights = inputs_of(batch), batch["targets"], batch["weights"]
    x, _, stats = net.hidden(inputs, key=body)
    logits = net.logits(x, head)
    minimized, weight, nats = token_loss(
      logits, targets, weights, vocab_size=logits.shape[-1], z_loss=self.config.z_loss,
      label_smoothing=self.config.label_smoothing,
    )  # fmt: skip
    means = {"loss": (nats, weight), "accuracy": right_answers(logits, targets, weights)}
    penalty = router_penalty(stats, self.model).astype(nats.dtype)
    counts = work(self.model, inputs, head=jnp.sum(inputs.pos >= 0))
    return Loss({"loss": minimized}, means, penalty, **counts)
