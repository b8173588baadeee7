"""Batches of objectives with one answer for a text: a place for each text beside its tokens."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.heads import pool
from model.inputs import shifted
from model.peft.virtual import own_tokens
from model.template import Template
from model.transformer import Aux, Inputs
from train.config import Config
from train.data.arrays import Corpus
from train.data.fit import Fitted, fit, shares
from train.objectives.loss import inputs_of
from train.objectives.objective import Field, Pieces, Side

TEXTS = "text_"  # The side with one place for each text of a row.
WEIGHT = Field(np.float32)
_TOKENS_PER_TEXT = 8  # That a row has room for, where the config does not say how many texts.


def most_texts(config: Config) -> int:
  """Texts that a row has room for: `data.max_texts`, else one for each 8 tokens; without packing
  one.
  """
  if not config.data.packing:
    return 1
  return config.data.max_texts or max(1, config.seq_len // _TOKENS_PER_TEXT)


def text_side(length: int, model: ModelConfig) -> Side:
  """Tokens, with their types where the model tells them apart."""
  fields = dict(tokens=Field(np.int32))
  if model.token_types > 1:
    fields["types"] = Field(np.int32)
  return Side(length, fields)


def text_fields(
  template: Template, model: ModelConfig, pieces: Pieces, i: int
) -> dict[str, np.ndarray]:
  """A text, or the pair of it and `text_pair` where the corpus has that, with special tokens."""
  pair = pieces.corpus.columns.get("text_pair")
  if pair is None:
    ids = template.one(pieces.tokens(i))
    types = np.zeros_like(ids)
  else:
    ids, types = template.two(pieces.tokens(i), pair.of(pieces.documents[i]))
  return dict(tokens=ids, types=types) if model.token_types > 1 else dict(tokens=ids)


def text_room(template: Template, corpus: Corpus, documents: np.ndarray) -> np.ndarray:
  """Places of texts, or pairs, with their special tokens."""
  pair = corpus.columns.get("text_pair")
  further = 0 if pair is None else pair.lengths[documents]
  return corpus.lengths[documents] + further + template.added(pair=pair is not None)


def fit_texts(template: Template, corpus: Corpus, seq_len: int, *, truncate: bool) -> Fitted:
  """Texts, or pairs, that fit into a row; of a pair the longer text is cut first."""
  pair = corpus.columns.get("text_pair")
  left = seq_len - template.added(pair=pair is not None)
  room = dict(text=np.full_like(corpus.lengths, max(left, 0)))
  if pair is not None:
    room["text"], room["text_pair"] = shares(corpus.lengths, pair.lengths, max(left, 0))
  return fit(corpus, room, truncate=truncate and left > 1, remedy="raise seq_len")


def read_texts(
  model: ModelConfig, net: Any, batch: Mapping[str, Array], key: jax.Array | None
) -> tuple[Float[Array, "B T D"], Inputs, Inputs | None, Aux]:
  """(hidden states of the last stack, what it reads, what an encoder before it reads, sums for
  router losses). The decoder of an encoder–decoder reads the text again, one place later.
  """
  inputs, source = inputs_of(batch), None
  if model.shape == "encoder_decoder":
    own = own_tokens(inputs, net.prompt_tokens)
    source, inputs = inputs, shifted(own, model.decoder_start_id or 0)
  x, _, stats = net.hidden(inputs, source=source, key=key)
  return x, inputs, source, stats


def pooled(
  model: ModelConfig, x: Float[Array, "B T D"], inputs: Inputs, texts: int
) -> Float[Array, "B S D"]:
  """One vector for each text of each row, as `model.pooling` has it."""
  how = model.pooling_of(model.text_stack)
  return pool(x, inputs.pos, inputs.seg, how=how, segments=texts)


def text_weights(batch: Mapping[str, Array]) -> Float[Array, ""]:
  """Texts of a batch."""
  return jnp.sum(batch[f"{TEXTS}weights"])


def two_keys(key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
  """Keys of the dropout in the stacks and in the head."""
  if key is None:
    return None, None
  first, second = jax.random.split(key)
  return first, second
