"""Plans of rows: nothing lost, nothing twice, hardly any padding, the same size in every epoch."""

import sysconfig
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.mix import mix
from train.data.pack import Rows, best_fit

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


class NextTokens:
  """Rows of next-token predictions: a piece holds one token more than it predicts."""

  def __init__(self, predictions: list[int], *, seq_len: int, packing: bool, seed: int | None):
    lengths = np.array(predictions) + 1
    self.starts = np.cumsum(lengths) - lengths
    self.rows = Rows(
      self.starts, lengths, whole=seq_len + 1, overlap=1, room=lambda d, n, salt: n - 1,
      capacity=seq_len, packing=packing, moves=True, seed=seed,
    )  # fmt: skip

  def __len__(self) -> int:
    return len(self.rows)

  def segments(self, wanted: np.ndarray):
    """(index into `wanted`, place of the first token, predictions) of each piece."""
    cuts = self.rows.cuts(wanted)
    return cuts.which, self.starts[cuts.document] + cuts.begin, cuts.length - 1


def _rows(predictions: list[int], **settings) -> NextTokens:
  return NextTokens(predictions, **settings)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.booleans(), st.one_of(st.none(), st.integers(-3, 3)))
def test_every_next_token_is_predicted_exactly_once_in_every_epoch(pieces, size, packing, seed):
  rows = _rows(pieces, seq_len=size, packing=packing, seed=seed)
  tokens = np.array(pieces) + 1
  document_of = np.repeat(np.arange(len(pieces)), tokens)
  has_next = np.concatenate([np.arange(n) < n - 1 for n in tokens])
  for epoch in range(3):
    which, starts, lengths = rows.segments(np.arange(len(rows)) + epoch * len(rows))
    assert (lengths > 0).all()
    assert (np.bincount(which, lengths, len(rows)) <= size).all()
    assert (np.bincount(which, minlength=len(rows)) > 0).all()
    assert packing or len(which) == len(rows)
    assert (document_of[starts] == document_of[starts + lengths]).all()
    seen = np.zeros(len(document_of), int)
    for s, m in zip(starts, lengths, strict=True):
      seen[s : s + m] += 1
    assert (seen == has_next).all()


def test_a_row_is_the_same_alone_and_among_others_and_across_epochs():
  rows = _rows([3, 17, 40, 8, 8, 1, 25], seq_len=8, packing=True, seed=5)
  wanted = np.array([4, 0, 3 * len(rows) - 1, 3 * len(rows), 9, 2 * len(rows) + 1])
  which, starts, lengths = rows.segments(wanted)
  for i in range(len(wanted)):
    _, start, length = rows.segments(wanted[[i]])
    assert (starts[which == i] == start).all()
    assert (lengths[which == i] == length).all()


def test_epochs_and_seeds_differ_and_move_the_cuts_of_long_documents():
  starts = lambda seed, epoch: set(
    (rows := _rows([1000], seq_len=10, packing=True, seed=seed))
    .segments(np.arange(len(rows)) + epoch * len(rows))[1] % 10
  )  # fmt: skip
  assert len(starts(0, 0)) <= 3
  assert len(set.union(*(starts(0, e) for e in range(40)))) == 10
  order = lambda seed: _rows([5] * 50, seq_len=10, packing=True, seed=seed).segments(np.arange(9))
  assert (order(0)[1] == order(0)[1]).all()
  assert (order(0)[1] != order(1)[1]).any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_histogram_packing_is_best_fit_decreasing_piece_by_piece(pieces):
  spaces: list[int] = []
  for length in sorted(pieces, reverse=True):
    fits = [s for s in spaces if s >= length]
    if fits:
      spaces.remove(min(fits))
    spaces.append((min(fits) if fits else 20) - length)
  groups = best_fit(np.bincount(pieces, minlength=21))
  assert sorted(20 - sum(content) for n, content in groups for _ in range(n)) == sorted(spaces)
  assert sorted(x for n, content in groups for _ in range(n) for x in content) == sorted(pieces)


def test_the_standard_library_fills_more_than_99_percent_of_its_rows():
  root = Path(sysconfig.get_path("stdlib"))
  sizes = [f.stat().st_size // 3 for f in sorted(root.glob("*.py")) + sorted(root.glob("*/*.py"))]
  for seq_len in (128, 1024, 4096):
    rows = _rows(sizes, seq_len=seq_len, packing=True, seed=0)
    assert sum(sizes) / (len(rows) * seq_len) >= 0.99


def test_ten_million_documents_are_packed_in_seconds_and_by_length_alone():
  counts = np.random.default_rng(0).multinomial(10_000_000, np.ones(4096) / 4096)
  groups = best_fit(np.concatenate([[0], counts]))
  held = sum(n * sum(content) for n, content in groups)
  assert held == (counts * np.arange(1, 4097)).sum()
  assert held / (4096 * sum(n for n, _ in groups)) > 0.999


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.integers(0, 10**9))
def test_sources_take_turns_by_their_weights_and_none_skips_a_row(weights, start):
  order = mix(weights)
  source, row = order.place(np.arange(start, start + 5000))
  share = np.bincount(source, minlength=len(weights)) / 5000
  assert np.abs(share - np.array(weights) / sum(weights)).max() < 0.01
  for i in range(len(weights)):
    assert (np.diff(row[source == i]) == 1).all()
  first, turn = order.place(np.arange(3000))
  assert all((turn[first == i] == np.arange((first == i).sum())).all() for i in range(len(weights)))
