"""Calibration text as rows of tokens: what each stack of a model reads of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from infer.calibrate.layers import Batch
from infer.generate import generate
from infer.tasks.passes import listed, tokenizer_of
from model.errors import InputError
from model.inputs import decoder_start, padded, shifted
from model.transformer import Inputs

if TYPE_CHECKING:
  from model import Model

SAMPLES = 64  # Rows, unless another number is asked for or the text has fewer.
LENGTH = 512  # Tokens of a row, unless another number is asked for or the model has fewer.
_TOKENS = 4096  # That run through a layer at a time.
_WRITTEN = 64  # Tokens that a model writes at most for its own decoder to read.


def rows_of(
  m: "Model", texts: str | Sequence[str], samples: int | None, length: int | None
) -> Int32[np.ndarray, "n T"]:
  """Rows of `length` tokens of the texts, one text behind the other, spread evenly over them; each
  row has the special tokens with which a text begins and, of an encoder, ends.

  Args:
    samples: rows; None: `SAMPLES`, or as many as the texts have.
    length: None: `LENGTH`, or the model's positions.

  Raises:
    InputError: for a model without a tokenizer, no text, too little of it, or an impossible number.
  """
  texts, tokenizer = listed(texts), tokenizer_of(m)
  odd = next((text for text in texts if not isinstance(text, str)), None)
  if odd is not None:
    raise InputError(f"a text to calibrate with is {odd!r}: give strings.")
  texts = [text for text in texts if text.strip()]
  if not texts:
    raise InputError("there is no text to calibrate with: give some (--data).")
  limit = m.config.max_positions
  length = min(LENGTH, limit or LENGTH) if length is None else length
  before, after = tokenizer.affixes
  first, last = len(before), len(after)
  after = [] if m.config.shape == "decoder" else after
  least = len(before) + len(after) + 1
  if length < least or (limit is not None and length > limit):
    most = "" if limit is None else f" and at most the model's {limit} positions"
    raise InputError(f"length={length} must be at least {least}{most}.")
  bodies = [ids[first : len(ids) - last] for ids in tokenizer.encode_documents(texts)]
  ids, body = np.concatenate(bodies), length - len(before) - len(after)
  there = len(ids) // body
  if there < (samples or 1):
    raise InputError(
      f"the text has {len(ids)} tokens, enough for {there} samples of length {length}, and "
      f"{samples or 1} are needed: give more text, fewer samples or a smaller length."
    )
  number = min(SAMPLES, there) if samples is None else samples
  starts = np.arange(number) * there // number * body
  out: Any = np.zeros((number, length), np.int32)
  out[:, : len(before)], out[:, length - len(after) :] = before, after
  for row, start in enumerate(starts):
    out[row, len(before) : len(before) + body] = ids[start : start + body]
  return out


def batches_of(m: "Model", rows: Int32[np.ndarray, "n T"]) -> list[Batch]:
  """The rows as all stacks read them, as many at a time as a layer is given.

  A decoder behind an encoder reads what the model itself writes of each row, greedily, or, where
  its head does not write, the row once more.
  """
  each = max(n for n in range(1, len(rows) + 1) if len(rows) % n == 0 and n <= _most(rows))
  parts = [_inputs(rows[start : start + each]) for start in range(0, len(rows), each)]
  first = m.config.stacks[0]
  # An encoder alone makes embeddings.
  if m.config.shape != "encoder_decoder" or m.config.head_kind == "embedding":
    return [Batch({first: part}) for part in parts]
  start = decoder_start(m.config, m.tokenizer) or 0
  if m.config.head_kind != "language":
    return [Batch({first: part, "decoder": shifted(part, start)}) for part in parts]
  tokens, pos = _written(m, rows, start)
  places = range(0, len(rows), each)
  own = [Inputs(tokens[i : i + each], pos[i : i + each]) for i in places]
  return [Batch({first: a, "decoder": b}) for a, b in zip(parts, own, strict=True)]


def _most(rows: Int32[np.ndarray, "n T"]) -> int:
  return max(1, _TOKENS // rows.shape[1])


def _inputs(tokens: Int32[np.ndarray, "n T"]) -> Inputs:
  pos = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  return Inputs(tokens, pos)  # pyright: ignore


def _written(m: "Model", rows: Int32[np.ndarray, "n T"], start: int) -> tuple[Any, Any]:
  """(tokens, positions) that the decoder reads while it writes, without the last of each."""
  room = _WRITTEN if m.config.max_positions is None else min(_WRITTEN, m.config.max_positions - 1)
  done = generate(m, rows.tolist(), max_new_tokens=room)
  read = [[start, *c.tokens[:-1]] for c in done]
  tokens, pos = padded(read, m.config.max_positions)
  return tokens[: len(rows)], pos[: len(rows)]
