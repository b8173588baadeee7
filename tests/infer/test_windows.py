"""Windows over long texts: every token counts once, and where it has most context."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import infer
from infer.tasks.tag import _probabilities
from infer.tasks.windows import owners, windows
from model.config import ModelConfig
from model.heads import init_params
from model.tokenizer import Encoded
from model.trained import Model
from model.vocabulary import build_tokenizer

BYTES = build_tokenizer("bytes", None, [])
LOCAL = ModelConfig(
  shape="encoder", vocab_size=260, vocab_multiple=8, num_layers=2, d_model=16, d_ff=24, num_heads=2,
  max_positions=None, layer_pattern=("local",), window=8, init_std=0.5,
)  # fmt: skip
TEXT = "Zoë: naïve 😀 café, and so on — " * 5


def local(**changes) -> Model:
  """Each token is told from the 8 on either side of it (2 layers, 4 to a side), rotary."""
  cfg = dataclasses.replace(LOCAL, **changes)
  return Model(cfg, init_params(cfg, jax.random.key(1)), BYTES)


@settings(max_examples=300, deadline=None)
@given(before=st.integers(0, 5), length=st.integers(0, 80), after=st.integers(0, 2),
       limit=st.integers(1, 90), stride=st.none() | st.integers(0, 20))  # fmt: skip
def test_every_token_counts_once_where_it_has_most_context(before, length, after, limit, stride):
  fixed = before + after
  room = limit - fixed
  assume(fixed + length <= limit or room > (room // 4 if stride is None else stride))
  number = before + length + after
  sequence = [None] * before + [0] * length + [None] * after
  row = Encoded([*range(number)], [0] * number, [(i, i + 1) for i in range(number)], sequence)
  parts = windows(row, limit, text=0, stride=stride)
  owner = owners(parts)
  assert len(owner) == length
  for w in parts:
    cut = [*range(before + w.start, before + w.stop)]
    assert w.encoded.ids == [*range(before), *cut, *range(number - after, number)]
    assert len(w.encoded.ids) <= limit or not length
    assert w.stop == w.start or w.encoded.ids[w.first] == before + w.start
  shared = room // 4 if stride is None else stride
  for a, b in itertools.pairwise(parts):
    assert a.start < b.start and a.stop - b.start >= shared
  for token, i in enumerate(owner):
    context = [
      min(token - w.start if w.start else length, w.stop - 1 - token if w.stop < length else length)
      if w.start <= token < w.stop else -1 for w in parts
    ]  # fmt: skip
    assert context[i] == max(context) >= 0


def test_windows_give_what_an_unbounded_model_gives_where_attention_is_local():
  free = local(head="token", num_labels=3)
  bound = dataclasses.replace(free, config=dataclasses.replace(free.config, max_positions=48))
  row = BYTES.encode_pairs([TEXT])[0]
  assert len(row.ids) > 3 * 48
  # A token next to a cut has 9 tokens of the text between it and that cut's template tokens.
  want, got = (_probabilities(m, [row], 20)[0] for m in (free, bound))
  np.testing.assert_allclose(got, want, atol=1e-5)
  tags = ("O", "B-X", "I-X")
  spans = [
    infer.tag(dataclasses.replace(m, labels=tags), TEXT, stride=20)[0] for m in (free, bound)
  ]
  assert [dataclasses.replace(s, score=0) for s in spans[0]] == [
    dataclasses.replace(s, score=0) for s in spans[1]
  ]
  assert len(spans[0]) > 5 and all(TEXT[s.start : s.end] == s.text for s in spans[0])


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_in_a_long_context_is_the_best_of_its_windows(seed):
  m = local(head="span", max_positions=48)
  m = dataclasses.replace(m, params=init_params(m.config, jax.random.key(seed)))
  got = infer.answer(m, "who?", TEXT, stride=8)[0]
  row = BYTES.encode_pairs(["who?"], [TEXT])[0]
  rows = [w.encoded for w in windows(row, 48, text=1, stride=8)]
  assert len(rows) > 4
  assert TEXT[got.start : got.end] == got.answer
  each = [_alone(m, r) for r in rows]
  best, none = max(e[0] for e in each), min(e[1] for e in each)
  assert got.score == pytest.approx(max(best, none), abs=1e-5)
  assert (got.answer == "") == (none > best)


def _alone(m: Model, row: Encoded) -> tuple[float, float]:
  """(best span, no answer) of one window, by itself."""
  places = [0, *(i for i, s in enumerate(row.sequence) if s == 1)]
  start, end = np.asarray(jax.nn.softmax(m([row.ids])[0][np.array(places)], axis=0)).T
  table = np.triu(start[1:, None] * end[None, 1:])
  return (table - np.triu(table, 30)).max(), start[0] * end[0]
