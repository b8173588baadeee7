"""What a search found, and what it says when nothing is left to choose."""

import dataclasses

from model.errors import InputError


@dataclasses.dataclass(frozen=True)
class Found:
  """A sequence of new tokens.

  Attributes:
    logprobs: the model's own, of each token, in nats.
    score: of beam search: the summed log-probability after shaping, over the length to the power of
      the length penalty.
    ended: whether its last token ends it.
    cached: tokens of its prompt that a cache of prefixes had; None without one.
  """

  tokens: list[int]
  logprobs: list[float]
  score: float | None
  ended: bool
  cached: int | None = None


def nothing_left(count: int) -> InputError:
  """The error of a text of `count` new tokens that no token may follow."""
  return InputError(
    f"after {count} new tokens no token is left that logit_bias, bad_words, allowed_tokens, "
    "no_repeat_ngram_size, prefix, min_new_tokens and json_schema, regex or grammar allow: loosen "
    "one of them."
  )
