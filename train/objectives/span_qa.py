"""Extractive question answering: where in a text the answer to a question begins and ends."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from model.config import ModelConfig
from model.errors import InputError
from model.heads import Network, build
from model.template import Template
from model.tokenizer import Tokenizer
from train.config import Config, ObjectiveConfig
from train.data.arrays import Corpus
from train.data.fit import Fitted, fit
from train.data.windows import windows
from train.objectives.loss import Loss, inputs_of, router_penalty, work
from train.objectives.objective import Batch, Example, Field, Pieces, Side, place
from train.objectives.texts import (
  TEXTS,
  WEIGHT,
  most_texts,
  text_fields,
  text_room,
  text_side,
  text_weights,
  two_keys,
)

ENDS = ("start", "end")


@dataclasses.dataclass(frozen=True)
class SpanQA:
  """Question and context are read as a pair; long contexts in windows (BERT, arXiv:1810.04805,
  section 4.2).

  Where a window holds no answer, both ends are its first token, a special one. The loss is the mean
  of start and end, each a cross-entropy over the tokens of the segment. Reported besides:
  `accuracy`, both ends right, of windows.
  """

  config: ObjectiveConfig
  model: ModelConfig
  seq_len: int
  texts: int
  stride: int
  truncate: bool
  template: Template
  whole: None = None
  overlap: int = 0
  samples: bool = False
  moves: bool = False

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "SpanQA":
    """The objective of a config.

    Raises:
      InputError: if the tokenizer puts no special token before a pair.
    """
    template = Template.of(tokenizer)
    if tokenizer is not None and not template.pair[0][0]:
      raise InputError(
        "the tokenizer puts no special token before a pair of texts, and span_qa says 'no answer' "
        "with it: use wordpiece, bpe or bytes."
      )
    return cls(
      config.objective, config.model, config.seq_len, most_texts(config),
      config.objective.resolved().stride or 0, config.data.truncate, template,
    )  # fmt: skip

  @property
  def sides(self) -> Mapping[str, Side]:
    """Tokens, and the ends of each answer as places in the row."""
    place_in_row = Field(np.int32, place_of="")
    answers = Side(self.texts, dict(start=place_in_row, end=place_in_row, weights=WEIGHT), False)
    return {"": text_side(self.seq_len, self.model), TEXTS: answers}

  def fit(self, corpus: Corpus) -> Fitted:
    """Windows on contexts. A question that leaves no room for them may be cut."""
    left = self.seq_len - self.template.added(pair=True)
    fitted = Fitted(corpus)
    if self.truncate:
      room = dict(text=np.full_like(corpus.lengths, max(left - self.stride - 1, 0)))
      fitted = fit(corpus, room, truncate=left - self.stride > 1, remedy="raise seq_len")
    cut = windows(fitted.corpus, left - fitted.corpus.lengths, self.stride)
    return dataclasses.replace(fitted, corpus=cut)

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """Question and window with their special tokens, and one answer."""
    return {"": text_room(self.template, corpus, documents), TEXTS: np.ones_like(lengths)}

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """One piece after the other."""
    examples = (self._example(pieces, i) for i in range(len(pieces.rows)))
    place(batch, self.sides, pieces.rows, examples)

  def _example(self, pieces: Pieces, i: int) -> Example:
    answer = pieces.corpus.columns["label"].of(pieces.documents[i])
    before = self.template.second + int(pieces.lengths[i])
    ends = answer + before if len(answer) else np.zeros(2, np.int32)
    answers = dict(start=ends[:1], end=ends[1:], weights=np.ones(1))
    return {"": text_fields(self.template, self.model, pieces, i), TEXTS: answers}

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Network:
    """The network alone."""
    return build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Ends of answers: two for each window."""
    return {"loss": 2 * text_weights(batch)}

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """Cross-entropy of both ends of all answers."""
    body, head = two_keys(key)
    inputs = inputs_of(batch)
    x, _, stats = net.hidden(inputs, key=body)
    logits = net.logits(x, head)
    number = jnp.arange(1, self.texts + 1)[:, None]
    own = batch["segments"][:, None] == number  # (B, S, T)
    own &= (batch["positions"] >= net.prompt_tokens)[:, None]
    weights = batch[f"{TEXTS}weights"].astype(logits.dtype)
    minimized = nats = jnp.zeros((), logits.dtype)
    right = jnp.ones_like(weights, bool)
    for i, end in enumerate(ENDS):
      goal = batch[f"{TEXTS}{end}"]
      terms, said, best = self._end(logits[..., i], goal, own)
      minimized += jnp.sum(terms * weights)
      nats += jnp.sum(said * weights)
      right &= best == goal
    texts = jnp.sum(weights)
    means = {"loss": (nats, 2 * texts), "accuracy": (jnp.sum(right * weights), texts)}
    penalty = router_penalty(stats, self.model).astype(nats.dtype)
    counts = work(self.model, inputs, head=jnp.sum(inputs.pos >= 0))
    return Loss({"loss": minimized}, means, penalty, **counts)

  def _end(
    self, logits: Float[Array, "B T"], goal: Int[Array, "B S"], own: Bool[Array, "B S T"]
  ) -> tuple[Array, Array, Array]:
    """(what is minimized, nats, the likeliest place), each (B, S); 0 of what is empty."""
    some = jnp.any(own, axis=-1)
    seen = own | ~some[..., None]  # An empty place has no softmax: it takes any, and weighs 0.
    log_z = jax.nn.logsumexp(jnp.where(seen, logits[:, None], -jnp.inf), axis=-1)
    nats = log_z - jnp.take_along_axis(logits, goal, axis=1)
    best = jnp.argmax(jnp.where(seen, logits[:, None], -jnp.inf), axis=-1)
    minimized = nats
    if self.config.label_smoothing:
      mean = jnp.sum(jnp.where(seen, logits[:, None], 0), axis=-1) / jnp.sum(seen, axis=-1)
      share = self.config.label_smoothing
      minimized = (1 - share) * nats + share * (log_z - mean)
    if self.config.z_loss:
      minimized = minimized + self.config.z_loss * jnp.square(log_z)
    return minimized, nats, best
