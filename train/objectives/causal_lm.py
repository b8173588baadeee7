"""Causal language models: each token of a document predicts the next one."""

import numpy as np
from jaxtyping import Int64, Integer


def predictions(lengths: Int64[np.ndarray, "d"]) -> Int64[np.ndarray, "d"]:
  """Number of next-token pairs in documents of `lengths` tokens."""
  return np.maximum(lengths - 1, 0)


def fill_rows(
  batch: dict[str, np.ndarray],
  tokens: Integer[np.ndarray, "n"],
  rows: Int64[np.ndarray, "s"],
  starts: Int64[np.ndarray, "s"],
  lengths: Int64[np.ndarray, "s"],
) -> None:
  """Writes segments into `batch`, one after the other from the left of each row.

  Args:
    batch: what `empty_rows` gives.
    tokens: ids of the corpus.
    rows: row of each segment, ascending.
    starts: place in `tokens` of its first input.
    lengths: number of its inputs; its targets are as many, one place later.
  """
  first = np.flatnonzero(np.diff(rows, prepend=-1))  # Segment that begins each row.
  index = np.arange(len(rows)) - np.repeat(first, np.diff(first, append=len(rows)))
  before = np.cumsum(lengths) - lengths
  offset = before - before[np.arange(len(rows)) - index]  # Column of each segment.
  pos = np.arange(lengths.sum()) - np.repeat(before, lengths)
  place = np.repeat(rows, lengths), np.repeat(offset, lengths) + pos
  source = np.repeat(starts, lengths) + pos
  batch["tokens"][place] = tokens[source]
  batch["targets"][place] = tokens[source + 1]
  batch["weights"][place] = 1
  batch["segments"][place] = np.repeat(index + 1, lengths)
  batch["positions"][place] = pos


def empty_rows(count: int, seq_len: int) -> dict[str, np.ndarray]:
  """Rows (count, seq_len) without anything in them.

  Returns:
    int32 `tokens`, `targets`, `segments` (from 1; 0 is nothing), `positions` (-1 is nothing) and
    float32 `weights` (1 where a target counts).
  """
  shape = (count, seq_len)
  return {
    "tokens": np.zeros(shape, np.int32),
    "targets": np.zeros(shape, np.int32),
    "weights": np.zeros(shape, np.float32),
    "segments": np.zeros(shape, np.int32),
    "positions": np.full(shape, -1, np.int32),
  }
