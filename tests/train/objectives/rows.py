"""Rows of whole documents, and rows taken apart again, that the tests of objectives share."""

import numpy as np

from train.data.arrays import Corpus
from train.objectives.objective import Batch, Objective, Pieces, Side, empty_batch


def corpus_of(documents: list[np.ndarray]) -> Corpus:
  lengths = np.array([len(d) for d in documents], np.int64)
  return Corpus(np.concatenate(documents), np.cumsum(lengths) - lengths, lengths)


def filled(
  objective: Objective, corpus: Corpus, rows: list[int], seed: int = 0, count: int | None = None
) -> Batch:
  """A batch in which document i lies, whole, in row `rows[i]`, ascending."""
  batch = empty_batch(objective.sides, count or max(rows) + 1)
  numbers = np.arange(len(rows))
  chance = lambda i: np.random.Generator(np.random.Philox(key=np.array([seed, i], np.uint64)))
  objective.fill(batch, Pieces(corpus, np.array(rows), numbers, corpus.starts, corpus.lengths,
                               numbers.astype(np.uint64), chance))  # fmt: skip
  return batch


def separate(batch: Batch, sides: dict[str, Side]) -> Batch:
  """The same pieces, each in a row of its own: written without the code under test."""
  pieces = [(r, s) for r, row in enumerate(batch["segments"]) for s in range(1, row.max() + 1)]
  out = empty_batch(sides, len(pieces))
  for i, (row, segment) in enumerate(pieces):
    columns = np.flatnonzero(batch["segments"][row] == segment)
    for name in ("positions", *sides[""].fields):
      out[name][i, : len(columns)] = batch[name][row, columns]
    out["segments"][i, : len(columns)] = 1
    places = batch["masked_places"][row]
    here = np.isin(places, columns) & (batch["masked_weights"][row] > 0)
    for name in sides["masked_"].fields:
      shift = columns[0] if name == "places" else 0
      out["masked_" + name][i, : here.sum()] = batch["masked_" + name][row, here] - shift
    for name in sides["text_"].fields if "text_" in sides else ():
      out["text_" + name][i, 0] = batch["text_" + name][row, segment - 1]
  return out


def rebuilt(batch: Batch) -> list[np.ndarray]:
  """The tokens of each segment with the targets back at their places."""
  found = []
  for row in range(len(batch["tokens"])):
    tokens, real = batch["tokens"][row].copy(), batch["masked_weights"][row] > 0
    tokens[batch["masked_places"][row][real]] = batch["masked_targets"][row][real]
    segments = batch["segments"][row]
    found += [tokens[segments == s] for s in range(1, segments.max() + 1)]
  return found
