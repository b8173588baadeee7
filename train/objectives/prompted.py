"""Any objective with virtual tokens before each text that the first stack reads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from model.config import ModelConfig
from train.config import Config
from train.data.arrays import Corpus
from train.data.fit import Fitted
from train.objectives.loss import Loss
from train.objectives.objective import Batch, Objective, Pieces, Side, TaskObjective, empty_batch
from train.objectives.to_decoder import DECODER


def shortened(config: Config) -> Config:
  """The config whose rows have room for one text and no virtual tokens."""
  count = config.peft.before_texts
  return dataclasses.replace(config, seq_len=config.seq_len - count) if count else config


@dataclasses.dataclass(frozen=True)
class Prompted:
  """An objective whose texts each have `count` places more, in front, on the sides that the first
  stack reads. Nothing is learned there: all fields but segments and positions are empty.

  Rows that the objective fills are spread: what lies in segment s moves on by s · count places.
  """

  objective: Objective
  count: int
  seq_len: int

  @property
  def whole(self) -> int | None:
    """Tokens of the longest piece that fits."""
    return self.objective.whole

  @property
  def overlap(self) -> int:
    """As the objective's."""
    return self.objective.overlap

  @property
  def samples(self) -> bool:
    """As the objective's."""
    return self.objective.samples

  @property
  def moves(self) -> bool:
    """Never: two pieces take the virtual tokens' room twice."""
    return False

  @property
  def _wider(self) -> tuple[str, ...]:
    sides = self.objective.sides
    return tuple(name for name, side in sides.items() if side.read and name != DECODER)

  @property
  def sides(self) -> Mapping[str, Side]:
    """The objective's, those with virtual tokens longer by what a row of one text has of them."""
    return {
      name: dataclasses.replace(side, length=self.seq_len) if name in self._wider else side
      for name, side in self.objective.sides.items()
    }

  def room(
    self, corpus: Corpus, documents: np.ndarray, lengths: np.ndarray, salts: np.ndarray
  ) -> Mapping[str, np.ndarray]:
    """The objective's, and that of the virtual tokens."""
    taken = self.objective.room(corpus, documents, lengths, salts)
    return {n: size + self.count if n in self._wider else size for n, size in taken.items()}

  def fill(self, batch: Batch, pieces: Pieces) -> None:
    """Fills narrow rows as the objective does, and spreads them."""
    rows = len(next(iter(batch.values())))
    narrow = empty_batch(self.objective.sides, rows)
    self.objective.fill(narrow, pieces)
    for name, side in self.objective.sides.items():
      for field, what in side.fields.items():
        values = narrow[name + field]
        if what.place_of in self._wider:
          values = self._moved(narrow, what.place_of or "", values)
        if name in self._wider:
          row, place = np.nonzero(narrow[f"{name}segments"])
          to = place + self.count * narrow[f"{name}segments"][row, place]
          batch[name + field][row, to] = values[row, place]
        else:
          batch[name + field][...] = values
      if side.read:
        self._place(batch, narrow, name)

  def _moved(self, narrow: Batch, side: str, places: np.ndarray) -> np.ndarray:
    """Places in narrow rows -> in spread ones; what points at nothing stays."""
    segments = np.take_along_axis(narrow[f"{side}segments"], places.astype(np.int64), axis=1)
    return places + self.count * segments

  def _place(self, batch: Batch, narrow: Batch, name: str) -> None:
    """Segments and positions of a side that is read."""
    segments, positions = narrow[f"{name}segments"], narrow[f"{name}positions"]
    if name not in self._wider:
      batch[f"{name}segments"][...], batch[f"{name}positions"][...] = segments, positions
      return
    row, place = np.nonzero(segments)
    number = segments[row, place]
    to = place + self.count * number
    batch[f"{name}segments"][row, to] = number
    batch[f"{name}positions"][row, to] = positions[row, place] + self.count
    first = positions[row, place] == 0
    row, to, number = row[first], to[first], number[first]
    for i in range(self.count):
      batch[f"{name}segments"][row, to - self.count + i] = number
      batch[f"{name}positions"][row, to - self.count + i] = i

  def build(self, cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """As the objective does."""
    return self.objective.build(cfg, rngs)

  def weights(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """As the objective does."""
    return self.objective.weights(batch)

  def loss(self, net: Any, batch: Mapping[str, Array], key: jax.Array | None) -> Loss:
    """As the objective does."""
    return self.objective.loss(net, batch, key)


@dataclasses.dataclass(frozen=True)
class PromptedTask(Prompted):
  """`Prompted` for an objective on examples of a task."""

  objective: TaskObjective

  def fit(self, corpus: Corpus) -> Fitted:
    """As the objective does."""
    return self.objective.fit(corpus)


def prompted(objective: Objective, config: Config) -> Objective:
  """An objective of the shortened config with the virtual tokens of `config`."""
  # A protocol would ask for all properties, some of which need a tokenizer.
  kind: Any = PromptedTask if hasattr(objective, "fit") else Prompted
  return kind(objective, config.peft.before_texts, config.seq_len)
