"""What a masked language model puts in the place of masks, as a person reads it."""

import re
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from model.errors import InputError
from model.peft.virtual import PROMPT, virtual_tokens
from model.tokenizer import Tokenizer
from model.trained import Model
from train.data.pipeline import Data

_TOKENS = 128  # Of the text that is shown, at most.


def check_masked(prompt: str, tokenizer: Tokenizer, limit: int | None) -> None:
  """Raises an InputError if a text has no mask to fill, or is longer than `limit` tokens."""
  if not prompt:
    return
  ids, mask = tokenizer.encode(prompt), tokenizer.mask_id
  if mask not in ids:
    raise InputError(
      f"sample_prompt={prompt!r} has nothing to fill: write {tokenizer.special.get('mask')} in "
      "the place of a token, or leave it out for a text of the validation set."
    )
  if limit is not None and len(ids) > limit:
    raise InputError(
      f"sample_prompt has {len(ids)} tokens and the model room for {limit}: shorten it."
    )


def filled_masks(m: Model, data: Data, prompt: str) -> str:
  """A text in which each mask is what the model holds most probable: [guess], or [guess|truth].

  Args:
    prompt: the text; empty: the beginning of the first one of the validation set, masked as there.
  """
  before = virtual_tokens(m.params, "encoder", (PROMPT,))
  ids, truth = _masked_text(data, before) if not prompt else (data.tokenizer.encode(prompt), [])
  places = [i for i, token in enumerate(ids) if token == data.tokenizer.mask_id]
  scores = np.asarray(m(jnp.array([ids])))[0, places]
  guesses = _shown(data.tokenizer, scores.argmax(-1).tolist(), truth)
  text = data.tokenizer.backend.decode(ids, skip_special_tokens=False)
  return re.sub(re.escape(data.tokenizer.special["mask"]), lambda _: next(guesses, "[]"), text)


def _shown(tokenizer: Tokenizer, guesses: list[int], truth: list[int]) -> Iterator[str]:
  name = lambda token: tokenizer.backend.decode([token], skip_special_tokens=False)
  for i, guess in enumerate(guesses):
    wrong = bool(truth) and truth[i] != guess
    yield f"[{name(guess)}|{name(truth[i])}]" if wrong else f"[{name(guess)}]"


def _masked_text(data: Data, before: int) -> tuple[list[int], list[int]]:
  """(ids with masks at all chosen places, the tokens that were there).

  Args:
    before: places before the text.
  """
  row = {name: values[0] for name, values in data.first().items()}
  ids = row["tokens"][row["segments"] == 1][before:][:_TOKENS].tolist()
  chosen = (row["masked_weights"] > 0) & (row["masked_places"] - before < len(ids))
  places = row["masked_places"][chosen] - before
  for place in places:
    ids[place] = data.tokenizer.mask_id
  return ids, row["masked_targets"][chosen].tolist()
