"""Masked language models: masked tokens are told from what stands on both sides of them."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.errors import InputError
from model.heads import Network, build, pool
from model.template import Template
from model.tokenizer import Tokenizer
from model.transformer import Inputs
from train.config import Config, ObjectiveConfig
from train.data.arrays import Corpus
from train.objectives.causal_lm import TOKENS, WEIGHTS, word_loss
from train.objectives.loss import Loss, inputs_of, right_answers, token_loss, work
from train.objectives.masking import Masker, most_masked
from train.objectives.objective import Batch, Example, Field, Pieces, Side, place
from train.objectives.pairs import Pair, check_documents, check_first, make_pair
from train.objectives.special_tokens import need_mask

_TEXT = 16  # Tokens of a pair below which rows may have no room for its label.
MASKED = "masked_"
TEXTS = "text_"


@dataclasses.dataclass(frozen=True)
class MaskedLM:
  """Rows of documents in which tokens are masked (BERT, arXiv:1810.04805).

  The side `masked_` lists the masked places, so that the head reads no others. Rows share their
  masked places among the pieces that they hold: no piece takes room there of its own. With `pairs`
  a piece is two texts, and the side `text_` has the label of each.
  """

  config: ObjectiveConfig  # With the objective's own values in it.
  model: ModelConfig
  seq_len: int
  texts: int  # Pairs that a row holds at most.
  tokenizer: Tokenizer | None
  overlap: int = 0
  samples: bool = False

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "MaskedLM":
    """The objective of a config.

    Raises:
      InputError: if the tokenizer has no mask, or does not fit pairs.
    """
    check_settings(config)
    texts = config.data.max_texts or max(1, config.seq_len // _TEXT)
    objective = cls(
      config.objective.resolved(), config.model, config.seq_len,
      texts if config.data.packing else 1, tokenizer,
    )  # fmt: skip
    if tokenizer is not None:
      need_mask(tokenizer, config.objective.name)
      objective.check_pairs()
    return objective

  @property
  def sides(self) -> Mapping[str, Side]:
    """Tokens; masked places with the tokens that were there; labels of pairs."""
    types = dict(types=TOKENS) if self.paired and self.model.token_types > 1 else {}
    places = dict(places=Field(np.int32, place_of=""), targets=TOKENS, weights=WEIGHTS)
    sides = {"": Side(self.seq_len, dict(tokens=TOKENS, **types))}
    sides[MASKED] = Side(most_masked(self.config.mask_rate or 0, self.seq_len), places, read=False)
    if self.paired:
      sides[TEXTS] = Side(self.texts, dict(labels=TOKENS, weights=WEIGHTS), read=False)
    return sides

  @property
  def paired(self) -> bool:
    """Whether a piece is two texts."""
    return self.config.paired

  @property
  def whole(self) -> int:
    """Tokens of the longest piece; pairs get special tokens of their own."""
    return self.seq_len - (self.template.added(pair=True) if self.paired else 0)

  @property
  def moves(self) -> bool:
    """Two pairs need more special tokens than one."""
    return not self.paired

  @functools.cached_property
  def template(self) -> Template:
    """What stands around two texts."""
    return Template.of(self._tokenizer())

  @functools.cached_property
  def masker(self) -> Masker:
    """What chooses the masked places."""
    return Masker(self.config, self._tokenizer())

  def check_pairs(self) -> None:
    """Raises an InputError if the model or a row has no place for pairs."""
    if not self.paired:
      return
    check_first(self.template)
    added = self.template.added(pair=True)
    if self.seq_len < added + 2:
      raise InputError(
        f"seq_len={self.seq_len} has no place for two texts and {added} special tokens: lengthen "
        "the rows."
      )
    types = self.model.token_types
    if 1 < types < self.template.num_types:
      raise InputError(
        f"model.token_types={types}, and the tokenizer's pairs have {self.template.num_types}: set "
        "that many, or 0 for none."
      )

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """A place for each token. Masked places are the row's: see `Masker`."""
    none = np.zeros_like(lengths)
    if not self.paired:
      return {"": lengths, MASKED: none}
    check_documents(self.config.pairs or "", corpus)
    return {"": lengths + self.template.added(pair=True), MASKED: none, TEXTS: none + 1}

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """Chooses the masked places of whole rows, then writes piece by piece."""
    chances = [pieces.chance(i) for i in range(len(pieces.rows))]
    texts = [self._text(pieces, i, chance) for i, chance in enumerate(chances)]
    chosen = self.masker.choose([text.tokens for text in texts], pieces.rows, chances)
    sides = self.sides
    examples = (self._example(*one, sides) for one in zip(texts, chosen, chances, strict=True))
    place(batch, sides, pieces.rows, examples)

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Network:
    """The network alone."""
    return build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Masked tokens, and pairs."""
    pairs = {"pair": jnp.sum(batch["text_weights"])} if self.paired else {}
    return {"loss": jnp.sum(batch["masked_weights"]), **pairs}

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """Cross-entropy of the masked tokens, and of which pairs follow each other."""
    inputs = inputs_of(batch)
    x, _, stats = net.hidden(inputs, key=key)
    masked = at_places(x, batch["masked_places"])
    counted = work(self.model, inputs, head=jnp.sum(batch["masked_weights"] > 0))
    loss = word_loss(
      self.config, self.model, net.logits, masked, batch, stats, side=MASKED, accuracy=True,
      **counted,
    )  # fmt: skip
    return self._with_pairs(loss, net, batch, x, inputs) if self.paired else loss

  def _with_pairs(
    self, loss: Loss, net: Any, batch: Mapping[str, Array], x: Array, inputs: Inputs
  ) -> Loss:
    firsts = pool(x, inputs.pos, inputs.seg, how="first", segments=self.texts)
    scores, labels = net.pair_logits(firsts), batch["text_labels"]
    weights = batch["text_weights"]
    minimized, count, nats = token_loss(
      scores, labels, weights, vocab_size=2, z_loss=self.config.z_loss,
      label_smoothing=self.config.label_smoothing,
    )  # fmt: skip
    means = dict(pair_loss=(nats, count), pair_accuracy=right_answers(scores, labels, weights))
    return dataclasses.replace(
      loss, terms={**loss.terms, "pair": minimized}, means={**loss.means, **means}
    )

  def _text(self, pieces: Pieces, i: int, chance: np.random.Generator) -> Pair:
    if self.paired:
      return make_pair(self.config.pairs or "", self.template, pieces, i, chance)
    tokens = pieces.tokens(i)
    return Pair(tokens, np.zeros_like(tokens), None)

  def _example(
    self, text: Pair, places: np.ndarray, chance: np.random.Generator, sides: Mapping[str, Side]
  ) -> Example:
    targets, read = text.tokens[places], text.tokens.copy()
    read[places] = self.masker.replaced(targets, chance)
    fields = dict(tokens=read, types=text.types)
    example: dict[str, dict[str, Any]] = {
      "": {name: fields[name] for name in sides[""].fields},
      MASKED: dict(places=places, targets=targets, weights=np.ones(len(places))),
    }
    if self.paired:
      known = text.label is not None
      example[TEXTS] = dict(labels=[text.label or 0], weights=[float(known)])
    return example

  def _tokenizer(self) -> Tokenizer:
    if self.tokenizer is None:
      raise ValueError("an objective without a tokenizer has losses and makes no batches.")
    return self.tokenizer


def at_places(x: Float[Array, "B T D"], places: Array) -> Float[Array, "B M D"]:
  """The hidden states at places of each row."""
  return jnp.take_along_axis(x, places[..., None], axis=1)


def check_settings(config: Config) -> None:
  """Raises an InputError for a setting of masks that has no effect."""
  objective = config.objective
  if objective.max_ngram is not None and objective.mask_unit != "ngram":
    raise InputError(
      f"objective.max_ngram={objective.max_ngram} has no effect on objective.mask_unit="
      f"{objective.resolved().mask_unit!r}: set mask_unit='ngram', or leave it out."
    )
