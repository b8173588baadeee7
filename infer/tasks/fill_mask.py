"""Fill-mask: what could stand where a text has mask tokens."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from infer.heads import check_head
from infer.tasks.passes import checked_length, encoded, listed, passes, tokenizer_of
from model.errors import InputError

if TYPE_CHECKING:
  from model import Model

MASKS = 256  # Places whose vocabulary is scored at a time.


@dataclasses.dataclass(frozen=True)
class Guess:
  """A token for the place of a mask."""

  token: int
  text: str
  probability: float


def fill_mask(m: "Model", texts: str | Sequence[str], *, top: int = 5) -> list[list[list[Guess]]]:
  """For each text and each mask token in it the `top` most probable tokens, best first.

  Raises:
    InputError: if the model scores no masked tokens, `top` is impossible, or a text has no mask
      token or more tokens than the model has positions.
  """
  check_head(m.config, "fill-mask")
  tokenizer, vocab = tokenizer_of(m), m.config.real_vocab
  if not 1 <= top <= vocab:
    raise InputError(f"top={top} must be from 1 to the {vocab} tokens of the vocabulary.")
  if tokenizer.mask_id is None:
    raise InputError("the tokenizer names no mask token: fill-mask needs a model that learned one.")
  rows = checked_length(m, encoded(m, texts))
  for i, (row, text) in enumerate(zip(rows, listed(texts), strict=True)):
    if tokenizer.mask_id not in row.ids:
      raise InputError(f"text {i} ({text[:40]!r}) has no {tokenizer.special['mask']} to fill.")
  out: list[list[list[Guess]]] = [[] for _ in rows]
  for places, arguments in passes(m, rows):
    where = np.argwhere(arguments["tokens"][: len(places)] == tokenizer.mask_id)
    x = m.hidden(**arguments)
    for begin in range(0, len(where), MASKS):
      row, column = where[begin : begin + MASKS].T
      for r, guess in zip(row, _guesses(m, x, row, column, top), strict=True):
        out[places[r]].append(guess)
  return out


def _guesses(m: "Model", x: Array, row: np.ndarray, column: np.ndarray, top: int):
  tokenizer = tokenizer_of(m)
  text = lambda token: tokenizer.backend.decode([token], skip_special_tokens=False)
  padding = (0, (1 << (len(row) - 1).bit_length()) - len(row))
  places = (np.pad(a.astype(np.int32), padding) for a in (row, column))
  values, ids = jax.device_get(_top(m.graphdef, m.params, x, *places, top=top))
  for chosen, probabilities in zip(ids[: len(row)].tolist(), values.tolist(), strict=False):
    pairs = zip(chosen, probabilities, strict=True)
    yield [Guess(token, text(token), p) for token, p in pairs]


@functools.partial(jax.jit, static_argnames=("graphdef", "top"))
def _top(
  graphdef: nnx.GraphDef, params: dict, x: Float[Array, "B T D"], row: Int[Array, "n"],
  column: Int[Array, "n"], *, top: int,
) -> tuple[Float[Array, "n top"], Int[Array, "n top"]]:  # fmt: skip
  logits = nnx.merge(graphdef, params).logits(x[row, column])
  return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), top)
