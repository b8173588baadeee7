"""Classification and regression of texts and pairs of texts, on all three shapes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.heads import Network, build
from model.template import Template
from model.tokenizer import Tokenizer
from train.config import Config, ObjectiveConfig
from train.data.arrays import Corpus
from train.data.fit import Fitted
from train.objectives.loss import Loss, Mean, right_answers, router_penalty, token_loss, work
from train.objectives.objective import Batch, Example, Field, Pieces, Side, place
from train.objectives.texts import (
  TEXTS,
  WEIGHT,
  fit_texts,
  most_texts,
  pooled,
  read_texts,
  text_fields,
  text_room,
  text_side,
  text_weights,
  two_keys,
)


@dataclasses.dataclass(frozen=True)
class Classification:
  """One label for a text (`single_label`), any number of them (`multi_label`), or a number.

  A text is read with its special tokens, a pair through the tokenizer's template for two. The
  loss is a mean over texts: nats of the label, or squared errors; of several labels nats of each
  yes or no, over texts and labels. Reported besides: `accuracy` (all labels of a text right) and,
  for several labels, `f1` over all of them (micro-averaged).
  """

  config: ObjectiveConfig
  model: ModelConfig
  seq_len: int
  texts: int
  labels: int
  truncate: bool
  template: Template
  whole: None = None
  overlap: int = 0
  samples: bool = False
  moves: bool = False

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "Classification":
    """The objective of a config."""
    return cls(
      config.objective, config.model, config.seq_len, most_texts(config),
      len(config.data.labels or ()), config.data.truncate, Template.of(tokenizer),
    )  # fmt: skip

  @property
  def sides(self) -> Mapping[str, Side]:
    """Tokens, and the label of each text."""
    label = {
      "single_label": Field(np.int32),
      "multi_label": Field(np.float32, shape=(self.labels,)),
      "regression": Field(np.float32),
    }[self.model.problem]
    answers = Side(self.texts, dict(labels=label, weights=WEIGHT), read=False)
    return {"": text_side(self.seq_len, self.model), TEXTS: answers}

  def fit(self, corpus: Corpus) -> Fitted:
    """Texts that fit."""
    return fit_texts(self.template, corpus, self.seq_len, truncate=self.truncate)

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """A text with its special tokens, and one label."""
    return {"": text_room(self.template, corpus, documents), TEXTS: np.ones_like(lengths)}

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """One piece after the other."""
    examples = (self._example(pieces, i) for i in range(len(pieces.rows)))
    place(batch, self.sides, pieces.rows, examples)

  def _example(self, pieces: Pieces, i: int) -> Example:
    label = pieces.corpus.columns["label"].of(pieces.documents[i])
    if self.model.problem == "multi_label":
      label = np.isin(np.arange(self.labels), label)[None]
    answer = dict(labels=label, weights=np.ones(1))
    return {"": text_fields(self.template, self.model, pieces, i), TEXTS: answer}

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Network:
    """The network alone."""
    return build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Texts; where they have several labels, times their number."""
    several = self.model.problem == "multi_label"
    return {"loss": text_weights(batch) * (self.labels if several else 1)}

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """The loss of the labels of all texts."""
    body, head = two_keys(key)
    x, inputs, source, stats = read_texts(self.model, net, batch, body)
    logits = net.logits(pooled(self.model, x, inputs, self.texts), head)
    labels, weights = batch[f"{TEXTS}labels"], batch[f"{TEXTS}weights"].astype(logits.dtype)
    term, means = self.compare(logits, labels, weights)
    penalty = router_penalty(stats, self.model).astype(term.dtype)
    counts = work(self.model, inputs, source, head=text_weights(batch))
    return Loss({"loss": term}, means, penalty, **counts)

  def compare(
    self, logits: Float[Array, "B S C"], labels: Array, weights: Float[Array, "B S"]
  ) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """(sum of what is minimized, means to report) of scores and labels of texts."""
    if self.model.problem == "regression":
      return _squared_errors(logits[..., 0], labels, weights)
    if self.model.problem == "multi_label":
      return _yes_or_no(logits, labels, weights)
    minimized, weight, nats = token_loss(
      logits, labels, weights, vocab_size=logits.shape[-1], z_loss=self.config.z_loss,
      label_smoothing=self.config.label_smoothing,
    )  # fmt: skip
    return minimized, {"loss": (nats, weight), "accuracy": right_answers(logits, labels, weights)}


def _squared_errors(values, wanted, weights) -> tuple[Array, dict[str, Mean]]:
  total = jnp.sum(jnp.square(values - wanted) * weights)
  return total, {"loss": (total, jnp.sum(weights))}


def _yes_or_no(logits, labels, weights) -> tuple[Array, dict[str, Mean]]:
  """Cross-entropy of each label with its sigmoid; F1 = 2 TP / (2 TP + FP + FN)."""
  nats = jax.nn.softplus(jnp.where(labels > 0, -logits, logits))
  total = jnp.sum(nats * weights[..., None])
  said, true = logits > 0, labels > 0
  count = lambda which: jnp.sum(which * weights[..., None])
  right = jnp.sum(jnp.all(said == true, axis=-1) * weights)
  texts = jnp.sum(weights)
  means = {
    "loss": (total, texts * logits.shape[-1]), "accuracy": (right, texts),
    "f1": (2 * count(said & true), count(said) + count(true)),
  }  # fmt: skip
  return total, means
