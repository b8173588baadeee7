"""Causal language models: each token of a document predicts the next one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from model.config import ModelConfig
from model.heads import Network, build
from model.tokenizer import Tokenizer
from train.config import Config, ObjectiveConfig
from train.data.arrays import Corpus
from train.objectives.loss import (
  Loss,
  Mean,
  in_parts,
  inputs_of,
  right_answers,
  router_penalty,
  token_loss,
  work,
)  # fmt: skip
from train.objectives.objective import Batch, Field, Pieces, Side

TOKENS = Field(np.int32)
WEIGHTS = Field(np.float32)


@dataclasses.dataclass(frozen=True)
class CausalLM:
  """Rows of `seq_len` predictions; a piece's last token is the next piece's first."""

  config: ObjectiveConfig
  model: ModelConfig
  seq_len: int
  overlap: int = 1
  samples: bool = False
  moves: bool = True

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "CausalLM":
    """The objective of a config."""
    return cls(config.objective, config.model, config.seq_len)

  @property
  def sides(self) -> Mapping[str, Side]:
    """Tokens, and the token behind each."""
    return {"": Side(self.seq_len, dict(tokens=TOKENS, targets=TOKENS, weights=WEIGHTS))}

  @property
  def whole(self) -> int:
    """Tokens of the longest piece: a row and the one behind it."""
    return self.seq_len + 1

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """One place for each prediction."""
    return {"": lengths - 1}

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """All pieces at once, without a loop."""
    rows, lengths = pieces.rows, pieces.lengths - 1
    first = np.flatnonzero(np.diff(rows, prepend=-1))  # Piece that begins each row.
    index = np.arange(len(rows)) - np.repeat(first, np.diff(first, append=len(rows)))
    before = np.cumsum(lengths) - lengths
    offset = before - before[np.arange(len(rows)) - index]  # Column of each piece.
    pos = np.arange(lengths.sum()) - np.repeat(before, lengths)
    place = np.repeat(rows, lengths), np.repeat(offset, lengths) + pos
    source = np.repeat(pieces.starts, lengths) + pos
    batch["tokens"][place] = pieces.corpus.tokens[source]
    batch["targets"][place] = pieces.corpus.tokens[source + 1]
    batch["weights"][place] = 1
    batch["segments"][place] = np.repeat(index + 1, lengths)
    batch["positions"][place] = pos

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Network:
    """The network alone."""
    return build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Target tokens."""
    return word_weights(batch)

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """Cross-entropy of the next token."""
    return next_token_loss(self.config, self.model, net, batch, key)


def next_token_loss(
  objective: ObjectiveConfig, cfg: ModelConfig, net: Any, batch: Mapping[str, Array],
  key: jax.Array | None, *, noise: float = 0.0, few: bool = False,
) -> Loss:  # fmt: skip
  """Cross-entropy of the next token of what a decoder reads; `noise` is that of its embeddings.

  `few`: many tokens weigh nothing.
  """
  inputs = inputs_of(batch, noise=noise)
  x, _, stats = net.hidden(inputs, key=key)
  done = work(cfg, inputs, head=jnp.sum(inputs.pos >= 0))
  return word_loss(objective, cfg, net.logits, x, batch, stats, few=few, **done)


def word_weights(batch: Mapping[str, Array], side: str = "") -> dict[str, Array]:
  """What `word_loss` is divided by: the target tokens of a side."""
  return {"loss": jnp.sum(batch[f"{side}weights"])}


def word_loss(
  objective: ObjectiveConfig, cfg: ModelConfig, score: Callable[[Array], Array], x: Array,
  batch: Mapping[str, Array], stats: dict[str, Array], *, tokens: dict[str, Array],
  pairs: dict[str, Array], side: str = "", accuracy: bool = False,
  few: bool = False,
) -> Loss:  # fmt: skip
  """The loss of an objective whose targets are tokens: `targets` and `weights` of a side.

  Args:
    score: hidden states (B, T, D) -> scores of words.
    x: hidden states at the places of the side.
    accuracy: also report the share of targets that score highest.
    few: see `in_parts`.
  """

  def sums(x: Array, targets: Array, weights: Array) -> tuple[Array, ...]:
    logits = score(x)
    found = token_loss(
      logits, targets, weights, vocab_size=cfg.real_vocab, z_loss=objective.z_loss,
      label_smoothing=objective.label_smoothing,
    )  # fmt: skip
    return (*found, *right_answers(logits, targets, weights)) if accuracy else found

  read = batch[f"{side}targets"], batch[f"{side}weights"]
  minimized, weight, nats, *right = in_parts(sums, x, *read, objective.loss_parts, few=few)
  penalty = router_penalty(stats, cfg).astype(nats.dtype)
  means: dict[str, Mean] = {"loss": (nats, weight)}
  if accuracy:
    means["accuracy"] = right[0], right[1]
  return Loss({"loss": minimized}, means, penalty, tokens, pairs)
