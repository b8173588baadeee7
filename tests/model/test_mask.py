"""Masks against a loop over tokens that applies the rules one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from model.mask import attention_mask, positions_of


def _allowed(q, k, causal, window, marked, prefix_end):
  """The rules for one pair of real tokens of the same segment."""
  if not causal:
    return window is None or abs(q - k) <= window // 2
  if k <= q and (window is None or k > q - window):
    return True
  in_prefix = marked and q <= prefix_end
  return in_prefix and (window is None or abs(q - k) < window)


def _loop(q_pos, kv_pos, q_seg, kv_seg, causal, window, marks):
  B, T, S = *q_pos.shape, kv_pos.shape[1]
  out = np.zeros((B, 1, T, S), bool)
  for b in range(B):
    for t in range(T):
      own = [s for s in range(S) if kv_pos[b, s] >= 0 and kv_seg[b, s] == q_seg[b, t] > 0]
      end = max((kv_pos[b, s] for s in own if marks[b, s]), default=-1)
      for s in own:
        if q_pos[b, t] >= 0:
          pair = q_pos[b, t], kv_pos[b, s]
          out[b, 0, t, s] = _allowed(*pair, causal, window, marks[b, s], end)
  return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mask_equals_the_rules_applied_pair_by_pair(data):
  draw = lambda s: data.draw(s)
  row = st.lists(st.integers(0, 3), min_size=7, max_size=7)
  seg = np.array([draw(row), draw(row)], np.int32)
  kv_pos = np.asarray(positions_of(seg))
  marks = np.array([draw(st.lists(st.booleans(), min_size=7, max_size=7)) for _ in range(2)])
  start = draw(st.integers(0, 6))  # Queries may be the last tokens only, as with a cache.
  q_pos, q_seg = kv_pos[:, start:], seg[:, start:]
  causal, window = draw(st.booleans()), draw(st.sampled_from([None, 1, 2, 3, 5]))
  got = attention_mask(q_pos, kv_pos, q_seg, seg, causal=causal, window=window, bidirectional=marks)
  np.testing.assert_array_equal(got, _loop(q_pos, kv_pos, q_seg, seg, causal, window, marks))


def test_positions_alone_mask_a_cache_whose_slots_are_in_any_order():
  q_pos = np.array([[4], [-1]], np.int32)
  kv_pos = np.array([[4, 1, -1, 3], [0, 1, 2, 3]], np.int32)
  got = np.asarray(attention_mask(q_pos, kv_pos, causal=True, window=2))[:, 0, 0]
  np.testing.assert_array_equal(got, [[True, False, False, True], [False] * 4])


def test_window_counts_its_own_token_when_causal_and_both_sides_when_not():
  pos = np.arange(9, dtype=np.int32)[None]
  causal = np.asarray(attention_mask(pos, pos, causal=True, window=4))[0, 0]
  both = np.asarray(attention_mask(pos, pos, causal=False, window=4))[0, 0]
  assert causal[5].nonzero()[0].tolist() == [2, 3, 4, 5]
  assert both[5].nonzero()[0].tolist() == [3, 4, 5, 6, 7]


def test_a_prefix_sees_itself_both_ways_and_the_rest_stays_causal():
  pos = np.arange(5, dtype=np.int32)[None]
  marks = pos < 3
  got = np.asarray(attention_mask(pos, pos, causal=True, bidirectional=marks))[0, 0]
  expected = np.tril(np.ones((5, 5), bool))
  expected[:3, :3] = True
  np.testing.assert_array_equal(got, expected)


def test_positions_restart_in_each_segment_and_are_absent_from_padding():
  seg = np.array([[1, 1, 1, 2, 2, 0, 0], [0, 0, 5, 5, 5, 7, 7], [1, 1, 0, 1, 2, 2, 0]], np.int32)
  expected = [[0, 1, 2, 0, 1, -1, -1], [-1, -1, 0, 1, 2, 0, 1], [0, 1, -1, 2, 0, 1, -1]]
  np.testing.assert_array_equal(positions_of(seg), expected)


def test_segments_of_one_side_only_are_refused():
  pos = np.zeros((1, 2), np.int32)
  with pytest.raises(InputError, match="both"):
    attention_mask(pos, pos, pos + 1, None, causal=True)
