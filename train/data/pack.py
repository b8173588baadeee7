"""Which pieces of documents share a row: a plan made from lengths, once an epoch."""

import dataclasses
import threading

import numpy as np
from jaxtyping import Int64, Integer, UInt64

_KEPT = 2  # Epochs whose plan is kept: a batch may lie on the border of two.
_EMPTY = np.zeros(0, np.int64)


def best_fit(counts: Int64[np.ndarray, "L+1"]) -> list[tuple[int, list[int]]]:
  """Packs pieces into rows by best fit, longest first (Krell et al., arXiv:2107.02027).

  Equal rows are handled together, so that the work depends on the capacity L and hardly on the
  number of pieces.

  Args:
    counts: number of pieces of each length, from 0 to the capacity of a row, L.

  Returns:
    (number of such rows, lengths of the pieces in one of them, falling).
  """
  capacity = len(counts) - 1
  open_rows: list[list[tuple[int, list[int]]]] = [[] for _ in range(capacity + 1)]  # By space.
  filled = np.zeros(capacity + 1, bool)  # Spaces that some row has.
  for length in range(capacity, 0, -1):
    left = int(counts[length])
    while left:
      fits = int(np.argmax(filled[length:])) + length
      if filled[fits]:
        rows, content = open_rows[fits].pop()
        filled[fits] = bool(open_rows[fits])
      else:
        fits, rows, content = capacity, left, []  # Rows that turn out unused are not kept.
      most = fits // length
      full = min(rows, left // most)
      rest = left - full * most if full < rows else 0
      parts = [(full, most), (1 if rest else 0, rest)]
      if content:
        parts.append((rows - full - (1 if rest else 0), 0))
      for number, times in parts:
        if number:
          space = fits - times * length
          open_rows[space].append((number, content + [length] * times))
          filled[space] = True
      left -= full * most + rest
  return [group for groups in open_rows for group in groups]


@dataclasses.dataclass(frozen=True)
class _Epoch:
  """The chance in one epoch."""

  piece: Integer[np.ndarray, "p"]  # Piece at each place of the plan.
  row: Integer[np.ndarray, "r"]  # Row of the plan that comes as the i-th.
  salt: np.uint64


class Rows:
  """Random access to rows of pieces of documents; epochs follow one another without a gap.

  Predictions 0 … n−1 of a document longer than a row are cut into pieces of a whole row and one
  for the rest. In each epoch its cuts are moved by another number of places a; what this leaves at
  its two ends, a and L − a predictions, shares one row as two segments. So the lengths that
  are packed, and with them the number of rows, are the same in every epoch.

  Args:
    starts: place of each document's first token.
    predictions: how many predictions each document holds.
    seq_len: L, predictions in a row.
    packing: whether rows hold several pieces; else one piece each, cut without moving.
    seed: decides the order of rows and which pieces meet; None keeps the order of the corpus and
      moves no cuts.
  """

  def __init__(
    self,
    starts: Int64[np.ndarray, "d"],
    predictions: Int64[np.ndarray, "d"],
    *,
    seq_len: int,
    packing: bool,
    seed: int | None,
  ):
    self._starts, self._predictions, self._seq_len = starts, predictions, seq_len
    self._seed, self._moves = seed, packing and seed is not None
    pieces = -(-predictions // seq_len)
    self._document = np.repeat(np.arange(len(starts)), pieces)
    self._index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    length = np.minimum(seq_len, predictions[self._document] - self._index * seq_len)
    self._by_length = np.argsort(-length, kind="stable")
    self._sorted = length[self._by_length]
    if packing:
      groups = best_fit(np.bincount(length, minlength=seq_len + 1))
      lengths = [np.tile(np.array(content), rows) for rows, content in groups]
      sizes = [np.full(rows, len(content)) for rows, content in groups]
      order = np.argsort(-np.concatenate([_EMPTY, *lengths]), kind="stable")
      self._sizes = np.concatenate([_EMPTY, *sizes])
    else:
      order = np.arange(len(length))
      self._sizes = np.ones(len(length), np.int64)
    # The k-th longest place of the plan takes the k-th longest piece.
    self._rank = np.empty_like(order)
    self._rank[order] = np.arange(len(order))
    self._first = np.cumsum(self._sizes) - self._sizes
    self._epochs: dict[int, _Epoch] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    """Rows of an epoch."""
    return len(self._sizes)

  def segments(
    self, rows: Int64[np.ndarray, "n"]
  ) -> tuple[Int64[np.ndarray, "s"], Int64[np.ndarray, "s"], Int64[np.ndarray, "s"]]:
    """What the given rows hold, counted on over epochs.

    Returns:
      For each segment: index into `rows` (ascending), place of its first token, its length.
    """
    epoch, row = np.divmod(rows, len(self))
    found = []
    for e in np.unique(epoch):
      here = np.flatnonzero(epoch == e)
      which, starts, lengths = self._of_epoch(int(e), row[here])
      found.append((here[which], starts, lengths))
    which, starts, lengths = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    order = np.argsort(which, kind="stable")
    return which[order], starts[order], lengths[order]

  def _of_epoch(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    plan = self._plan(epoch)
    rows = plan.row[rows]
    sizes = self._sizes[rows]
    which = np.repeat(np.arange(len(rows)), sizes)
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    piece = plan.piece[self._first[rows][which] + place]
    starts, lengths, more = self._cut(piece, plan)
    which = np.concatenate([which, which[more]])
    kept = lengths > 0
    which, starts, lengths = which[kept], starts[kept], lengths[kept]
    if self._seed is None:
      order = np.argsort(which, kind="stable")
    else:
      order = np.lexsort((_hash(starts.astype(np.uint64) ^ plan.salt), which))
    return which[order], starts[order], lengths[order]

  def _cut(self, piece: np.ndarray, plan: _Epoch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts and lengths of pieces, and which of them have a second segment (at the end)."""
    size = self._seq_len
    document, index = self._document[piece], self._index[piece]
    start, total = self._starts[document], self._predictions[document]
    whole, rest = np.divmod(total, size)
    if not self._moves:
      return start + index * size, np.minimum(size, total - index * size), _EMPTY
    move = (_hash(document.astype(np.uint64) ^ plan.salt) % np.uint64(size)).astype(np.int64)
    move = np.where(total > size, move, 0)
    ends = (index == whole - 1) & (total > size)  # The row of both ends.
    last = (index == whole) & (total > size)
    begin = np.where(ends, 0, move + (index - last) * size)
    length = np.where(ends, move, np.where(index == whole, rest, size))
    more = np.flatnonzero(ends)
    begin_more = move[more] + (whole[more] - 1) * size + rest[more]
    starts = np.concatenate([start + begin, start[more] + begin_more])
    return starts, np.concatenate([length, size - move[more]]), more

  def _plan(self, epoch: int) -> _Epoch:
    with self._lock:
      if epoch not in self._epochs:
        for old in sorted(self._epochs)[: max(0, len(self._epochs) - _KEPT + 1)]:
          del self._epochs[old]
        self._epochs[epoch] = self._make_plan(epoch)
      return self._epochs[epoch]

  def _make_plan(self, epoch: int) -> _Epoch:
    if self._seed is None:
      return _Epoch(self._by_length[self._rank], np.arange(len(self)), np.uint64(0))
    bits = np.random.Philox(key=np.array([self._seed % (1 << 64), epoch], np.uint64))
    # Raw bits and a stable sort: NumPy may change its own shuffling between versions.
    salt = bits.random_raw(1)[0]
    chance = bits.random_raw(len(self._sorted))
    within_length = np.lexsort((chance, -self._sorted))
    row = np.argsort(bits.random_raw(len(self)), kind="stable")
    return _Epoch(self._by_length[within_length][self._rank], row, salt)


def _hash(x: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
  """Scrambles 64-bit numbers (the finalizer of SplitMix64)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
