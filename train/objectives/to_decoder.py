"""What encoder–decoders learn from: what the encoder reads and what the decoder writes of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int64

from model.config import ModelConfig
from model.errors import InputError
from model.inputs import decoder_start
from model.tokenizer import Tokenizer
from train.config import Config, ObjectiveConfig
from train.objectives.causal_lm import TOKENS, WEIGHTS, word_loss
from train.objectives.loss import Loss, inputs_of, work
from train.objectives.objective import Example, Side

DECODER = "decoder_"


@dataclasses.dataclass(frozen=True)
class Ends:
  """Special tokens that a piece gets: around what is read, behind what is written, and the one that
  starts a decoder.
  """

  begin: tuple[int, ...] = ()
  end: tuple[int, ...] = ()
  start: int = 0

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "Ends":
    """Those of the tokenizer's template; none without a tokenizer.

    Raises:
      InputError: if no token ends a text, or none could start the decoder.
    """
    if tokenizer is None:
      return cls()
    begin, end = tokenizer.affixes
    if not end and tokenizer.eos_id is not None:
      end = [tokenizer.eos_id]
    if not end:
      raise InputError(
        f"objective.name={config.objective.name!r} ends what is written with the end of text, and "
        "the tokenizer has none: name it as eos_token in its tokenizer_config.json, or use another "
        "kind: 'bytes', 'bpe:N', 'unigram:N' or 'wordpiece:N'."
      )
    return cls(tuple(begin), tuple(end), decoder_start(config.model, tokenizer) or 0)

  @property
  def around(self) -> int:
    """Special tokens of what is read."""
    return len(self.begin) + len(self.end)

  def read(self, tokens: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "m"]:
    """Tokens with what stands around them."""
    return np.concatenate([np.array(self.begin, np.int64), self.written(tokens)])

  def written(self, tokens: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "m"]:
    """Tokens with what stands behind them."""
    return np.concatenate([tokens, np.array(self.end, np.int64)])


def two_sides(seq_len: int, target_len: int | None) -> dict[str, Side]:
  """What the encoder reads; what the decoder reads, with the token that it writes at each place."""
  written = dict(tokens=TOKENS, targets=TOKENS, weights=WEIGHTS)
  return {
    "": Side(seq_len, dict(tokens=TOKENS)),
    DECODER: Side(target_len or seq_len, written),
  }


def two_sided(read: np.ndarray, written: np.ndarray, start: int) -> Example:
  """An example: the decoder reads what it has written, `start` first."""
  shifted = np.concatenate([[start], written[:-1]])
  weights = np.ones(len(written), np.float32)
  return {
    "": dict(tokens=read),
    DECODER: dict(tokens=shifted, targets=written, weights=weights),
  }


def written_loss(
  objective: ObjectiveConfig, cfg: ModelConfig, net: Any, batch: Mapping[str, Array],
  key: Array | None,
) -> Loss:  # fmt: skip
  """Cross-entropy of what the decoder writes."""
  source, inputs = inputs_of(batch), inputs_of(batch, DECODER)
  x, _, stats = net.hidden(inputs, source=source, key=key)
  done = work(cfg, inputs, source, head=jnp.sum(inputs.pos >= 0))
  return word_loss(objective, cfg, net.logits, x, batch, stats, side=DECODER, **done)


def longest(
  room: Callable[[Int64[np.ndarray, "n"]], Mapping[str, np.ndarray]], sides: Mapping[str, Side]
) -> int:
  """Tokens of the longest piece such that it, and all shorter ones, have room on each side; 0 if
  there is none. No piece is taken to be longer than the sides together.
  """
  lengths = np.arange(1, sum(side.length for side in sides.values()) + 1)
  taken = room(lengths)
  fits = np.all([taken[name] <= side.length for name, side in sides.items()], axis=0)
  return int(np.argmin(np.append(fits, False)))


def check_longest(config: Config, whole: int) -> None:
  """Raises an InputError if rows have no room for pieces of two tokens."""
  if whole < 2:
    target = "" if config.target_len is None else f" and target_len={config.target_len}"
    raise InputError(
      f"seq_len={config.seq_len}{target} leave no room for two tokens of a text and the special "
      f"tokens of objective.name={config.objective.name!r}: lengthen them."
    )
