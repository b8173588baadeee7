"""What a model is called with: checked, shifted and padded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from model.config import ModelConfig
from model.errors import InputError
from model.mask import positions_of
from model.tokenizer import Tokenizer
from model.transformer import Inputs

_LEAST_LENGTH = 16  # Lengths are rounded up to powers of two from here, so that few are compiled.


def whole_numbers(name: str, values: Any, *, least: int) -> Any:
  """int32 (B, T); of a tracer only the shape and dtype are checked.

  Raises:
    InputError: for another shape or dtype, or a number below `least`.
  """
  array = values if isinstance(values, Tracer) else np.asarray(values)
  if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or not array.size:
    raise InputError(
      f"{name} have shape {array.shape} and dtype {array.dtype}: whole numbers of shape (B, T), "
      "neither of them 0, are needed."
    )
  if not isinstance(array, Tracer) and array.min() < least:
    raise InputError(f"{name} hold {array.min()}, the least that they may hold is {least}.")
  return array.astype(np.int32)


def check_ids(name: str, ids: Any, size: int) -> None:
  """Raises an InputError for an id that is not below `size`."""
  if not isinstance(ids, Tracer) and np.max(ids) >= size:
    raise InputError(f"{name} {np.max(ids)} is outside of the vocabulary of {size}.")


def check_positions(
  limit: int | None, length: int, segments: Any, positions: Any, cfg: ModelConfig
) -> None:
  """Raises an InputError for a position beyond the `limit` of a text."""
  if limit is None or isinstance(positions, Tracer) or isinstance(segments, Tracer):
    return
  last = length - 1
  if positions is not None:
    last = int(np.max(positions))
  elif segments is not None:
    with jax.ensure_compile_time_eval():  # Also where only the parameters are traced.
      last = int(np.max(positions_of(jnp.asarray(segments))))
  if last >= limit:
    raise InputError(
      f"position {last} is beyond the {limit} that the model has for a text "
      f"(max_positions={cfg.max_positions}): shorten the input."
    )


def most_segments(segments: Any) -> int:
  """The most segments of a row.

  Raises:
    InputError: if they are traced.
  """
  if isinstance(segments, Tracer):
    raise InputError(
      "segments must be known when they are traced: a head on whole texts, or a prompt, has "
      "something for each."
    )
  return max(1, int(np.max(np.asarray(segments))))


def check_decoder(tokens: Any, segments: Any, positions: Any) -> None:
  """Raises an InputError for what says where decoder tokens stand that are not there."""
  if tokens is None and (segments is not None or positions is not None):
    raise InputError("decoder_segments or decoder_positions were given without decoder_tokens.")


def decoder_start(model: ModelConfig, tokenizer: Tokenizer | None) -> int | None:
  """What the decoder of an encoder–decoder reads first: the config's id, else the tokenizer's
  padding (as T5 has it), beginning or end of a text; None for other shapes.

  Raises:
    InputError: if there is none.
  """
  if model.shape != "encoder_decoder":
    return None
  if model.decoder_start_id is not None:
    return model.decoder_start_id
  found = () if tokenizer is None else (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
  start = next((i for i in found if i is not None), None)
  if start is None:
    raise InputError("there is no token that could start a decoder: set model.decoder_start_id.")
  return start


def shifted(inputs: Inputs, start: int) -> Inputs:
  """What a decoder reads that says the encoder's tokens again: each one place later, `start` first.

  Tokens of a segment must lie next to each other, in order.
  """
  tokens = jnp.where(inputs.pos == 0, start, jnp.roll(jnp.asarray(inputs.tokens), 1, axis=1))
  return dataclasses.replace(inputs, tokens=tokens, types=None)


def padded(rows: list[list[int]], limit: int | None) -> tuple[np.ndarray, np.ndarray]:
  """Token ids as (tokens, positions) int32, padded on the right to a power of two in length and
  number, at most `limit` long.
  """
  longest = max(map(len, rows))
  length = max(_LEAST_LENGTH, 1 << (longest - 1).bit_length())
  length = length if limit is None else min(length, limit)
  tokens: Any = np.zeros((1 << (len(rows) - 1).bit_length(), length), np.int32)
  pos: Any = np.full(tokens.shape, -1, np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], pos[i, : len(row)] = row, np.arange(len(row))
  return tokens, pos
