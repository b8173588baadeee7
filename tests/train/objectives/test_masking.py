"""Masks: how many, of what, and what stands in their places."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.vocabulary import build_tokenizer
from tests.train.objectives.rows import corpus_of, filled, rebuilt
from train.config import Config, DataConfig, ObjectiveConfig
from train.data.pipeline import make_rows
from train.objectives.masked_lm import MaskedLM
from train.objectives.masking import Words, choose_spans, most_masked, word_edges
from train.objectives.objective import Pieces, empty_batch

ENCODER = ModelConfig(shape="encoder", token_types=2, max_positions=None)
BYTES = build_tokenizer("bytes", None, ())
TEXT = "unbelievable words, unwordly beliefs (self.wordless) 42 times: disbelieving_words!"


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
  return build_tokenizer("wordpiece", 68, [TEXT] * 3)


def objective(tokenizer: Tokenizer = BYTES, seq_len: int = 256, **settings) -> MaskedLM:
  masked = ObjectiveConfig(name="masked_lm", **settings)
  config = Config(seq_len=seq_len, model=ENCODER, objective=masked, data=DataConfig())
  return MaskedLM.of(config, tokenizer)


def documents(seed: int, lengths) -> list[np.ndarray]:
  """Random bytes between the template's special tokens."""
  rng = np.random.default_rng(seed)
  return [np.concatenate([[257], rng.integers(0, 256, n), [258]]) for n in lengths]


def test_ten_thousand_documents_are_masked_at_the_rates_of_the_paper():
  rng = np.random.default_rng(0)
  texts = documents(1, rng.integers(1, 250, 10_000))
  rows = np.cumsum([len(t) for t in texts]) // 800  # Several in a row.
  masked = objective(seq_len=1100)
  batch = filled(masked, corpus_of(texts), rows.tolist())
  real = batch["masked_weights"] > 0
  maskable = sum(len(t) - 2 for t in texts)
  assert real.sum() / maskable == pytest.approx(0.15, rel=0.01)
  read = np.take_along_axis(batch["tokens"], batch["masked_places"], 1)[real]
  targets = batch["masked_targets"][real]
  assert targets.max() < 256, "a special token was masked"
  share = {"mask": np.mean(read == 259), "same": np.mean(read == targets)}
  share["random"] = 1 - sum(share.values())
  by_chance = 0.1 / 256  # A random token may be the same.
  assert share["mask"] == pytest.approx(0.8, rel=0.01)
  assert share["random"] == pytest.approx(0.1 - by_chance, abs=0.001)
  assert share["same"] == pytest.approx(0.1 + by_chance, abs=0.001)
  others = np.bincount(read[(read != 259) & (read != targets)], minlength=260)
  assert (others[:256] > 0).all() and not others[256:].any()


def test_ngrams_of_n_words_are_a_share_of_one_in_n():
  rng, counts, tokens, wanted_tokens = np.random.default_rng(0), Counter(), 0, 0
  for _ in range(10_000):  # Rows of some 400 tokens.
    sizes = rng.choice([1, 1, 2, 3], rng.integers(200, 300))
    joined = np.append(rng.random(len(sizes) - 1) < 0.95, False)
    words = Words(np.cumsum(sizes) - sizes, sizes, joined)
    wanted = int(0.15 * sizes.sum() + rng.random())
    spans = choose_spans(words, rng.permutation(len(sizes)), wanted, 3, rng.random(3))
    counts.update(n for _, n in spans)
    chosen = np.concatenate([np.arange(first, first + n) for first, n in spans])
    assert len(set(chosen)) == len(chosen)
    assert all(joined[first : first + n - 1].all() for first, n in spans)
    assert sizes[chosen].sum() <= wanted
    tokens, wanted_tokens = tokens + sizes[chosen].sum(), wanted_tokens + wanted
  assert tokens == pytest.approx(wanted_tokens, rel=0.001)
  for n in (1, 2, 3):
    assert counts[n] / counts.total() == pytest.approx((1 / n) / (11 / 6), abs=0.01)


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.integers(0, 70), min_size=1, max_size=12),
  st.sampled_from(["token", "word", "ngram"]), st.sampled_from([0.05, 0.15, 0.5, 0.9]),
  st.booleans(), st.integers(0, 3),
)  # fmt: skip
def test_targets_put_back_rebuild_the_documents(lengths, unit, rate, packing, epoch):
  texts = documents(len(lengths), lengths)
  corpus, masked = corpus_of(texts), objective(seq_len=32, mask_unit=unit, mask_rate=rate)
  rows = make_rows(masked, corpus, packing, seed=3)
  cuts = rows.cuts(np.arange(len(rows)) + epoch * len(rows))
  pieces = Pieces(corpus, cuts.which, cuts.document, corpus.starts[cuts.document] + cuts.begin,
                  cuts.length, cuts.salt, lambda i: rows.chance(cuts, i))  # fmt: skip
  batch = empty_batch(masked.sides, len(rows))
  masked.fill(batch, pieces)
  found = rebuilt(batch)
  assert len(found) == len(pieces.rows)
  for i, tokens in enumerate(found):
    assert (tokens == pieces.tokens(i)).all()
  assert sum(map(len, found)) == corpus.lengths.sum()
  counts = (batch["masked_weights"] > 0).sum(1)
  assert (counts <= most_masked(rate, 32)).all()
  if unit == "token":
    maskable = [np.isin(t, (257, 258), invert=True).sum() for t in found]
    per_row = np.bincount(cuts.which, maskable, len(rows))
    assert (np.abs(counts - rate * per_row) < 1.0 + (per_row * rate < 1)).all()
    assert ((counts > 0) == (per_row > 0)).all()


def test_words_are_masked_whole_and_any_token_can_be(wordpiece):
  masked = objective(wordpiece, seq_len=64, mask_unit="word", mask_rate=0.3)
  ids = np.array(wordpiece.encode(TEXT))
  names = [wordpiece.backend.id_to_token(i) for i in ids]
  word = np.cumsum([not name.startswith("##") for name in names])
  assert len(set(word)) < len(ids) - 10, "words must have several tokens"
  hit = np.zeros(len(ids), int)
  for seed in range(200):
    batch = filled(masked, corpus_of([ids]), [0], seed)
    places = batch["masked_places"][0][batch["masked_weights"][0] > 0]
    for w in set(word[places]):
      assert set(np.flatnonzero(word == w)) <= set(places)
    hit[places] += 1
  assert (hit[1:-1] > 0).all() and hit[0] == hit[-1] == 0


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram", "bytes", "char"])
def test_words_are_those_of_the_text_for_every_kind_of_vocabulary(kind):
  sizes = {"wordpiece": 90, "bpe": 280, "unigram": 60}
  tokenizer = build_tokenizer(kind, sizes.get(kind), [TEXT, TEXT.replace("w", "v")] * 3)
  ids = tokenizer.encode(TEXT, add_special_tokens=False)
  first, last = word_edges(tokenizer)
  groups: list[list[int]] = []
  for i, token in enumerate(ids):
    if i and first[token] and last[ids[i - 1]]:
      groups[-1].append(token)
    else:
      groups.append([token])
  found = [tokenizer.backend.decode(g).replace(" ##", "").removeprefix("##").strip()
           for g in groups]  # fmt: skip
  for word in ("unbelievable", "words", "unwordly", "beliefs", "self", "wordless", "42", "times"):
    assert word in found


def test_masks_differ_in_each_epoch_and_not_in_each_reading():
  texts = documents(0, [60])
  read = lambda seed: filled(objective(), corpus_of(texts), [0], seed)["masked_places"]
  assert (read(0) == read(0)).all()
  assert (read(0) != read(1)).any()
