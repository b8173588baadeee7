"""UL2: each piece is damaged by one denoiser of a mixture, and a mode token says by which kind."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from model.config import ModelConfig
from model.heads import Network, build
from model.tokenizer import Tokenizer
from train.config import Config, ObjectiveConfig
from train.data.arrays import Corpus
from train.denoisers import parse_denoisers
from train.objectives.causal_lm import next_token_loss, word_weights
from train.objectives.loss import Loss
from train.objectives.objective import Batch, Example, Pieces, Side, place
from train.objectives.prefix_lm import continued, prefix_sides
from train.objectives.spans import Spans, check_sentinels
from train.objectives.special_tokens import mode_ids
from train.objectives.to_decoder import (
  DECODER,
  Ends,
  check_longest,
  longest,
  two_sided,
  two_sides,
  written_loss,
)


@dataclasses.dataclass(frozen=True)
class Rest:
  """The end of a text is left out, and is written behind the beginning (UL2's S)."""

  rate: float

  def sizes(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the beginning and of the end, which is never empty."""
    end = np.clip(np.round(lengths * self.rate).astype(np.int64), 1, np.maximum(lengths - 1, 1))
    return lengths - end, end

  def split(
    self, tokens: np.ndarray, sentinels: np.ndarray, chance: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    """(beginning, end); no sentinel stands for the end."""
    begin = int(self.sizes(np.array(len(tokens)))[0])
    return tokens[:begin], tokens[begin:]


@dataclasses.dataclass(frozen=True)
class UL2:
  """A mixture of denoisers, equally likely (arXiv:2205.05131, section 3.1).

  Which one a piece gets is decided once for all epochs, since its room depends on it. The mode
  token comes before the text. A decoder alone reads what an encoder would, in both directions, and
  behind it what is to be written.
  """

  config: ObjectiveConfig
  model: ModelConfig
  sides: Mapping[str, Side]
  denoisers: tuple[Spans | Rest, ...]
  ends: Ends
  modes: tuple[int, ...]  # Of each denoiser.
  sentinels: tuple[int, ...]
  overlap: int = 0
  samples: bool = False
  moves: bool = False  # Each piece has special tokens of its own.

  @classmethod
  def of(cls, config: Config, tokenizer: Tokenizer | None) -> "UL2":
    """The objective of a config.

    Raises:
      InputError: if lengths, sentinels or mode tokens do not suffice.
    """
    own = config.objective.resolved()
    parsed = parse_denoisers(own.denoisers or ())
    kinds = tuple(Rest(d.rate) if d.mean is None else Spans(d.rate, d.mean) for d in parsed)
    sides = two_sides(config.seq_len, config.target_len)
    if config.model.shape == "decoder":
      sides = prefix_sides(config.seq_len)
    modes, sentinels = (0,) * len(parsed), ()
    if tokenizer is not None:
      modes, sentinels = mode_ids(tokenizer, [d.mode for d in parsed]), tokenizer.sentinel_ids
    objective = cls(own, config.model, sides, kinds, Ends.of(config, tokenizer), modes, sentinels)
    check_longest(config, objective.whole)
    spans = [int(d.counts(np.array(objective.whole))[1]) for d in kinds if isinstance(d, Spans)]
    if tokenizer is not None and spans:
      check_sentinels(config, tokenizer, max(spans))
    return objective

  @functools.cached_property
  def whole(self) -> int:
    """Tokens of the longest piece that rows have room for, whatever denoiser it gets."""
    rooms = (functools.partial(self._room, denoiser) for denoiser in self.denoisers)
    return min(longest(room, self.sides) for room in rooms)

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """What each piece's denoiser keeps and leaves out, with mode and special tokens."""
    which = self._which(salts)
    rooms = [self._room(denoiser, lengths) for denoiser in self.denoisers]
    return {
      name: np.choose(which, [room[name] for room in rooms]) if len(rooms) > 1 else rooms[0][name]
      for name in self.sides
    }

  def _which(self, salts: np.ndarray) -> np.ndarray:
    return (salts % np.uint64(len(self.denoisers))).astype(np.int64)

  def _room(self, denoiser: Spans | Rest, lengths: np.ndarray) -> Mapping[str, np.ndarray]:
    kept, left_out = denoiser.sizes(lengths)
    if DECODER in self.sides:
      return {"": 1 + kept + self.ends.around, DECODER: left_out + len(self.ends.end)}
    return {"": kept + self.ends.around + left_out}  # The last token is not read.

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """Piece by piece."""
    sentinels, which = np.array(self.sentinels), self._which(pieces.salts)
    examples = (self._example(pieces, i, which[i], sentinels) for i in range(len(which)))
    place(batch, self.sides, pieces.rows, examples)

  def _example(self, pieces: Pieces, i: int, which: int, sentinels: np.ndarray) -> Example:
    split = self.denoisers[which].split
    kept, left_out = split(pieces.tokens(i), sentinels, pieces.chance(i))
    kept = np.concatenate([[self.modes[which]], kept])
    if DECODER in self.sides:
      return two_sided(self.ends.read(kept), self.ends.written(left_out), self.ends.start)
    tokens = self.ends.read(np.concatenate([kept, left_out]))
    return continued(tokens, len(self.ends.begin) + len(kept))

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Network:
    """The network alone."""
    return build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Tokens that are written."""
    return word_weights(batch, DECODER if DECODER in self.sides else "")

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """Cross-entropy of what is written."""
    loss = written_loss if DECODER in self.sides else next_token_loss
    return loss(self.config, self.model, net, batch, key)
