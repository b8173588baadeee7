"""Texts through a model that reads each of them once: padded to few sizes, as many as fit."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from model.errors import InputError
from model.inputs import padded
from model.tokenizer import Encoded, Tokenizer

if TYPE_CHECKING:
  from model import Model

TOKENS = 16_384  # The most tokens of a pass, what is padded included.

# (places of the texts of its rows, the model's arguments, int32 (B, T)).
Pass = tuple[list[int], dict[str, Any]]


def passes(m: "Model", texts: Sequence[Encoded]) -> Iterator[Pass]:
  """Texts of similar length together; rows beyond the places are padding."""
  order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
  while order:
    longest = len(texts[order[-1]].ids)
    rows = max(1, TOKENS // (1 << (longest - 1).bit_length()))
    order, places = order[:-rows], order[-rows:]
    tokens, positions = padded([texts[i].ids for i in places], m.room(m.config.stacks[0]))
    arguments: dict[str, Any] = dict(tokens=tokens, positions=positions)
    if m.config.token_types > 1:
      types: Any = np.zeros_like(tokens)
      for row, i in enumerate(places):
        types[row, : len(texts[i].types)] = texts[i].types
      arguments["token_types"] = types
    yield places, arguments


def scores(m: "Model", texts: Sequence[Encoded]) -> list[np.ndarray]:
  """What the head says of each text, float32: (labels,), or (T, labels) where it tells tokens."""
  out: list[np.ndarray] = [np.zeros(0)] * len(texts)
  for places, arguments in passes(m, texts):
    said = np.asarray(m(**arguments), np.float32)
    for row, i in enumerate(places):
      out[i] = said[row] if said.ndim == 2 else said[row, : len(texts[i].ids)]
  return out


def encoded(
  m: "Model", texts: str | Sequence[str], pairs: str | Sequence[str] | None = None
) -> list[Encoded]:
  """Token ids of texts, or of pairs of texts, and where they come from.

  Raises:
    InputError: for no text, a model without a tokenizer, or another number of second texts.
  """
  texts = listed(texts)
  if not texts:
    raise InputError("there is no text: give at least one.")
  return tokenizer_of(m).encode_pairs(texts, None if pairs is None else listed(pairs))


def checked_length(m: "Model", texts: list[Encoded]) -> list[Encoded]:
  """The same texts.

  Raises:
    InputError: if one of them has no token, or more than the model has positions.
  """
  limit = m.room(m.config.stacks[0])
  for i, text in enumerate(texts):
    if not text.ids:
      raise InputError(f"text {i} holds no token: give some text.")
    if limit is not None and len(text.ids) > limit:
      raise InputError(
        f"text {i} has {len(text.ids)} tokens, and the model has {limit} positions: shorten it."
      )
  return texts


def tokenizer_of(m: "Model") -> Tokenizer:
  """The model's tokenizer.

  Raises:
    InputError: if it has none.
  """
  if m.tokenizer is None:
    raise InputError("this model has no tokenizer, which reads texts: load it with one.")
  return m.tokenizer


def listed(texts: str | Sequence[str]) -> list[str]:
  """One text or several, as a list."""
  return [texts] if isinstance(texts, str) else list(texts)
