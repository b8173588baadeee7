"""Embeddings of texts that lie near those of texts like them, and far from all others."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.heads import Network, build
from model.template import Template
from model.tokenizer import Tokenizer
from model.transformer import Aux, Inputs
from train.config import Config, ObjectiveConfig
from train.data.arrays import Corpus
from train.data.fit import Fitted, fit, lengths_of
from train.objectives.loss import Loss, Work, inputs_of, router_penalty, token_loss, work
from train.objectives.objective import Batch, Example, Field, Pieces, Side, place
from train.objectives.texts import TEXTS, WEIGHT, most_texts, pooled, text_weights, two_keys

# Sides, and the column of a corpus that each holds.
READ = {"": "text", "pair_": "text_pair", "negative_": "negative"}
_ID = Field(np.int32)


@dataclasses.dataclass(frozen=True)
class Contrastive:
  """Each text's pair is to be the likeliest among the pairs, and negatives, of the whole batch.

  Logits are cosines divided by `temperature` (supervised SimCSE, arXiv:2104.08821, eq. 5; without
  negatives the in-batch loss of Sentence-BERT). Two texts that are the same count once: the pair of
  the same text elsewhere in the batch, and what equals the own pair, are no negatives. Of an
  encoder–decoder the encoder learns, since it alone embeds texts (`Model.embed`). Reported besides:
  `accuracy`, texts whose pair is the nearest.
  """

  config: ObjectiveConfig
  model: ModelConfig
  seq_len: int
  texts: int
  temperature: float
  negatives: bool
  truncate: bool
  template: Template
  whole: None = None
  overlap: int = 0
  samples: bool = False
  moves: bool = False

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "Contrastive":
    """The objective of a config."""
    return cls(
      config.objective, config.model, config.seq_len, most_texts(config),
      config.objective.resolved().temperature or 1.0, config.data.negative is not None,
      config.data.truncate, Template.of(tokenizer),
    )  # fmt: skip

  @property
  def columns(self) -> dict[str, str]:
    """Column by side."""
    return {s: column for s, column in READ.items() if self.negatives or column != "negative"}

  @property
  def sides(self) -> Mapping[str, Side]:
    """Texts, their pairs and negatives, and what tells equal ones."""
    ids = {f"{column}_id": _ID for column in self.columns.values()}
    tokens = {side: Side(self.seq_len, dict(tokens=Field(np.int32))) for side in self.columns}
    return {**tokens, TEXTS: Side(self.texts, dict(weights=WEIGHT, **ids), read=False)}

  def fit(self, corpus: Corpus) -> Fitted:
    """Texts that fit, each into a row of its side."""
    left = self.seq_len - self.template.added(pair=False)
    most = np.full_like(corpus.lengths, max(left, 0))
    room = dict.fromkeys(self.columns.values(), most)
    return fit(corpus, room, truncate=self.truncate and left > 0, remedy="raise seq_len")

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """Each text with its special tokens."""
    added = self.template.added(pair=False)
    sizes = {s: lengths_of(corpus, c)[documents] + added for s, c in self.columns.items()}
    return {**sizes, TEXTS: np.ones_like(lengths)}

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """One piece after the other."""
    examples = (self._example(pieces, i) for i in range(len(pieces.rows)))
    place(batch, self.sides, pieces.rows, examples)

  def _example(self, pieces: Pieces, i: int) -> Example:
    example: dict[str, dict[str, np.ndarray]] = {TEXTS: dict(weights=np.ones(1))}
    for side, column in self.columns.items():
      ids = pieces.tokens(i)
      if column != "text":
        ids = pieces.corpus.columns[column].of(pieces.documents[i]).astype(np.int64)
      example[side] = dict(tokens=self.template.one(ids))
      example[TEXTS][f"{column}_id"] = np.array([text_id(ids)])
    return example

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Network:
    """The network alone."""
    return build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Texts."""
    return {"loss": text_weights(batch)}

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """Cross-entropy of each text's pair over all of the batch."""
    vectors, penalty = {}, jnp.zeros(())
    tokens, pairs = {}, {}
    for i, (side, column) in enumerate(self.columns.items()):
      side_key = None if key is None else jax.random.fold_in(key, i)
      vectors[column], stats, counts = self._embedded(net, batch, side, side_key)
      penalty += router_penalty(stats, self.model) / len(self.columns)
      tokens = _added(tokens, counts["tokens"])
      pairs = _added(pairs, counts["pairs"])
    ids = {column: batch[f"{TEXTS}{column}_id"].reshape(-1) for column in self.columns.values()}
    weights = batch[f"{TEXTS}weights"].reshape(-1)
    logits = similarities(vectors, ids, weights, temperature=self.temperature)
    own = jnp.arange(len(weights))
    minimized, weight, nats = token_loss(
      logits, own, weights, vocab_size=logits.shape[-1], z_loss=self.config.z_loss,
      label_smoothing=0.0,
    )  # fmt: skip
    right = jnp.sum((jnp.argmax(logits, axis=-1) == own) * weights)
    means = {"loss": (nats, weight), "accuracy": (right, weight)}
    return Loss({"loss": minimized}, means, penalty.astype(nats.dtype), tokens, pairs)

  def _embedded(
    self, net: Any, batch: Mapping[str, Array], side: str, key: jax.Array | None
  ) -> tuple[Float[Array, "n D"], Aux, Work]:
    """(vectors of all places for texts of the batch, sums for routers, work) of a side."""
    body, head = two_keys(key)
    inputs, texts = inputs_of(batch, side), text_weights(batch)
    if self.model.shape == "encoder_decoder":
      x, stats = net.encode(inputs, key=body)
      counts = _encoder_work(self.model, inputs, texts)
    else:
      x, _, stats = net.hidden(inputs, key=body)
      counts = work(self.model, inputs, head=texts)
    vectors = net.logits(pooled(self.model, x, inputs, self.texts), head)
    vectors = vectors.reshape(-1, vectors.shape[-1])
    # The root of 0, the length of an empty place, has no gradient.
    square = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors / jnp.sqrt(jnp.maximum(square, 1e-24)), stats, counts


def similarities(
  vectors: Mapping[str, Float[Array, "n D"]], ids: Mapping[str, Int[Array, "n"]],
  weights: Float[Array, "n"], *, temperature: float,
) -> Float[Array, "n m"]:  # fmt: skip
  """Logits of each text (row) for all pairs and then all negatives; -inf where there is none.

  Args:
    vectors: of length 1, by column.
    ids: equal where texts are.
    weights: 0 where there is nothing.
  """
  text, n = vectors["text"], len(weights)
  others = [column for column in ("text_pair", "negative") if column in vectors]
  product = functools.partial(jnp.einsum, "nd,md->nm", precision="highest")
  logits = jnp.concatenate([product(text, vectors[c]) for c in others], axis=1) / temperature
  other_ids = jnp.concatenate([ids[c] for c in others])
  there = jnp.tile(weights > 0, len(others))
  same = other_ids == ids["text_pair"][:, None]
  same = same.at[:, :n].set(same[:, :n] | (ids["text"] == ids["text"][:, None]))
  own = jnp.arange(len(other_ids)) == jnp.arange(n)[:, None]
  return jnp.where(own | (there & ~same), logits, -jnp.inf)


def text_id(ids: Int[np.ndarray, "n"]) -> int:
  """A number from 0 below 2**31 that equal texts share, and others all but never."""
  digest = hashlib.blake2b(np.ascontiguousarray(ids, np.int64).tobytes(), digest_size=4).digest()
  return int.from_bytes(digest, "little") >> 1


def _added(sums: Mapping[str, Array], more: Mapping[str, Array]) -> dict[str, Array]:
  return {name: value + sums.get(name, 0) for name, value in more.items()}


def _encoder_work(cfg: ModelConfig, inputs: Inputs, texts: Array) -> Work:
  """Work of a pass in which the decoder rests."""
  both = work(cfg, inputs, inputs, head=texts)
  rests = lambda name: name.partition(".")[0] in ("decoder", "cross")
  still = lambda counts: {name: v * (0 if rests(name) else 1) for name, v in counts.items()}
  return Work(tokens=still(both["tokens"]), pairs=still(both["pairs"]))
