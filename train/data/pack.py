"""Which pieces of documents share a row: a plan made from lengths, once an epoch."""

import dataclasses
import threading
from collections.abc import Callable

import numpy as np
from jaxtyping import Int64, Integer, UInt64

_KEPT = 2  # Epochs whose plan is kept: a batch may lie on the border of two.
_EMPTY = np.zeros(0, np.int64)
_WORDS = 1 << 64
_HELD_OUT = _WORDS - 1  # In the place of a seed: the same chance in every validation.

# (documents, lengths in tokens, salts) of pieces -> places that they take in a row.
Room = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


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


@dataclasses.dataclass(frozen=True)
class Cuts:
  """Pieces that rows hold, row by row."""

  which: Int64[np.ndarray, "s"]  # Index into the rows that were asked for, ascending.
  document: Int64[np.ndarray, "s"]
  begin: Int64[np.ndarray, "s"]  # First token, counted from that of the document.
  length: Int64[np.ndarray, "s"]  # Tokens.
  salt: UInt64[np.ndarray, "s"]  # A number of each piece's own, the same in every epoch.
  epoch: Int64[np.ndarray, "s"]


class Rows:
  """Random access to rows of pieces of documents; epochs follow one another without a gap.

  Documents longer than `whole` tokens are cut into pieces of that length and one for the rest. The
  last `overlap` tokens of a piece are the first of the next. Where cuts move, each epoch moves
  those of a document by another number of places a; what this leaves at its two ends, a and
  `whole` - a places, shares one row as two pieces. So the lengths that are packed, and with
  them the number of rows, are the same in every epoch.

  Args:
    starts: place of each document's first token.
    lengths: tokens of each document.
    whole, overlap: see above; without `whole` documents are not cut.
    room: places that pieces take in a row: (documents, lengths, salts) -> sizes, from 1.
    capacity: places of a row.
    packing: whether rows hold several pieces; else one piece each.
    moves: whether cuts move; never without `packing` and a `seed`.
    seed: decides the order of rows and which pieces meet; None keeps the order of the corpus.
  """

  def __init__(
    self, starts: Int64[np.ndarray, "d"], lengths: Int64[np.ndarray, "d"], *,
    whole: int | None, overlap: int, room: Room, capacity: int, packing: bool, moves: bool,
    seed: int | None,
  ):  # fmt: skip
    self._starts, self._overlap, self._seed = starts, overlap, seed
    self._steps = np.maximum(lengths - overlap, 0)  # Of each document; pieces share none of them.
    self._size = int(self._steps.max(initial=1)) if whole is None else whole - overlap
    self._moves = moves and packing and seed is not None
    pieces = -(-self._steps // self._size)
    self._document = np.repeat(np.arange(len(starts)), pieces)
    self._index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    steps = np.minimum(self._size, self._steps[self._document] - self._index * self._size)
    sizes = room(self._document, steps + overlap, self._salt(self._document, self._index))
    self._by_size = np.argsort(-sizes, kind="stable")
    self._sorted = sizes[self._by_size]
    if packing:
      groups = best_fit(np.bincount(sizes, minlength=capacity + 1))
      contents = [np.tile(np.array(content), rows) for rows, content in groups]
      counts = [np.full(rows, len(content)) for rows, content in groups]
      order = np.argsort(-np.concatenate([_EMPTY, *contents]), kind="stable")
      self._sizes = np.concatenate([_EMPTY, *counts])
    else:
      order = np.arange(len(sizes))
      self._sizes = np.ones(len(sizes), np.int64)
    # The k-th largest place of the plan takes the k-th largest piece.
    self._rank = np.empty_like(order)
    self._rank[order] = np.arange(len(order))
    self._first = np.cumsum(self._sizes) - self._sizes
    self._epochs: dict[int, _Epoch] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    """Rows of an epoch."""
    return len(self._sizes)

  def cuts(self, rows: Int64[np.ndarray, "n"]) -> Cuts:
    """What the given rows hold, counted on over epochs."""
    epoch, row = np.divmod(rows, len(self))
    found = []
    for e in np.unique(epoch):
      here = np.flatnonzero(epoch == e)
      cuts = self._of_epoch(int(e), row[here])
      found.append(dataclasses.replace(cuts, which=here[cuts.which]))
    joined = [np.concatenate(arrays) for arrays in zip(*map(_arrays, found), strict=True)]
    order = np.argsort(joined[0], kind="stable")
    return Cuts(*(array[order] for array in joined))

  def chance(self, cuts: Cuts, i: int) -> np.random.Generator:
    """Random numbers of the i-th piece: of the seed, the epoch and where the piece lies."""
    seed, epoch = (_HELD_OUT, 0) if self._seed is None else (self._seed % _WORDS, cuts.epoch[i])
    counter = [0, 0, cuts.begin[i], cuts.document[i]]
    key = np.array([seed, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array(counter, np.uint64)))

  def _salt(self, document: np.ndarray, index: np.ndarray) -> UInt64[np.ndarray, "p"]:
    seed = np.uint64(_HELD_OUT if self._seed is None else self._seed % _WORDS)
    return _hash(_hash(document.astype(np.uint64) ^ _hash(seed + index.astype(np.uint64))))

  def _of_epoch(self, epoch: int, rows: np.ndarray) -> Cuts:
    plan = self._plan(epoch)
    rows = plan.row[rows]
    sizes = self._sizes[rows]
    which = np.repeat(np.arange(len(rows)), sizes)
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    piece = plan.piece[self._first[rows][which] + place]
    begin, steps, more = self._cut(piece, plan)
    piece, which = np.concatenate([piece, piece[more]]), np.concatenate([which, which[more]])
    document = self._document[piece]
    salt = self._salt(document, self._index[piece])
    kept = steps > 0
    which, document, begin, steps, salt = (
      array[kept] for array in (which, document, begin, steps, salt)
    )
    if self._seed is None:
      order = np.argsort(which, kind="stable")
    else:
      place = (self._starts[document] + begin).astype(np.uint64)
      order = np.lexsort((_hash(place ^ plan.salt), which))
    cuts = which, document, begin, steps + self._overlap, salt
    return Cuts(*[array[order] for array in cuts], epoch=np.full(len(order), epoch))

  def _cut(self, piece: np.ndarray, plan: _Epoch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Begins and steps of pieces, and which of them have a second piece (at the end)."""
    size = self._size
    document, index = self._document[piece], self._index[piece]
    total = self._steps[document]
    whole, rest = np.divmod(total, size)
    if not self._moves:
      return index * size, np.minimum(size, total - index * size), _EMPTY
    move = (_hash(document.astype(np.uint64) ^ plan.salt) % np.uint64(size)).astype(np.int64)
    move = np.where(total > size, move, 0)
    ends = (index == whole - 1) & (total > size)  # The row of both ends.
    last = (index == whole) & (total > size)
    begin = np.where(ends, 0, move + (index - last) * size)
    steps = np.where(ends, move, np.where(index == whole, rest, size))
    more = np.flatnonzero(ends)
    begin_more = move[more] + (whole[more] - 1) * size + rest[more]
    return np.concatenate([begin, begin_more]), np.concatenate([steps, size - move[more]]), more

  def _plan(self, epoch: int) -> _Epoch:
    with self._lock:
      if epoch not in self._epochs:
        for old in sorted(self._epochs)[: max(0, len(self._epochs) - _KEPT + 1)]:
          del self._epochs[old]
        self._epochs[epoch] = self._make_plan(epoch)
      return self._epochs[epoch]

  def _make_plan(self, epoch: int) -> _Epoch:
    if self._seed is None:
      return _Epoch(self._by_size[self._rank], np.arange(len(self)), np.uint64(0))
    bits = np.random.Philox(key=np.array([self._seed % (1 << 64), epoch], np.uint64))
    # Raw bits and a stable sort: NumPy may change its own shuffling between versions.
    salt = bits.random_raw(1)[0]
    chance = bits.random_raw(len(self._sorted))
    within_size = np.lexsort((chance, -self._sorted))
    row = np.argsort(bits.random_raw(len(self)), kind="stable")
    return _Epoch(self._by_size[within_size][self._rank], row, salt)


def _arrays(cuts: Cuts) -> list[np.ndarray]:
  return [getattr(cuts, field.name) for field in dataclasses.fields(cuts)]


def _hash(x: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
  """Scrambles 64-bit numbers (the finalizer of SplitMix64)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
