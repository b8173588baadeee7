"""Span corruption, denoising and UL2 take out of texts what papers say, and nothing is lost."""

import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.train.objectives.pieces import (
  KINDS,
  config,
  corpus_of,
  make,
  objective_of,
  parts_of,
  refilled,
)
from train.objectives.denoising import _span_sizes, infilled, permuted, poisson
from train.objectives.sentences import Sentences
from train.objectives.spans import Spans, take_out


def _documents(number: int, least: int, most: int) -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, n) for n in rng.integers(least, most, number)]


def _seqio_noise_mask(length: int, density: float, mean: float, chance) -> np.ndarray:
  """seqio's random_spans_noise_mask, step by step, in float32 as there."""
  original, length = length, max(length, 2)
  noise = int(np.round(np.float32(length) * np.float32(density)))
  noise = min(max(noise, 1), length - 1)
  spans = max(int(np.round(np.float32(noise) / np.float32(mean))), 1)

  def random_segmentation(items: int, segments: int) -> np.ndarray:
    first = np.arange(items - 1) < segments - 1
    shuffled = first[np.argsort(chance.random(items - 1), kind="stable")]
    return np.bincount(np.cumsum(np.pad(shuffled, (1, 0)).astype(int)))

  noise_lengths = random_segmentation(noise, spans)
  nonnoise_lengths = random_segmentation(length - noise, spans)
  interleaved = np.stack([nonnoise_lengths, noise_lengths], axis=1).reshape(2 * spans)
  starts = np.cumsum(interleaved)[:-1]
  span_number = np.cumsum(np.bincount(starts, minlength=length))
  return (span_number % 2 == 1)[:original]


@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.5, 3.0), (0.15, 64.0), (0.5, 8.0)])
def test_noise_masks_equal_seqio_for_every_length(density, mean):
  spans = Spans(density, mean)
  for length in [*range(1, 300), 568, 1024, 2048]:
    chance, same = (np.random.Generator(np.random.Philox(length)) for _ in range(2))
    if length == 1:
      assert not spans.noise(1, chance).any()
      continue
    want = _seqio_noise_mask(length, density, mean, same)
    got = spans.noise(length, chance)
    assert (got == want).all(), length
    noise, number = spans.counts(np.array(length))
    assert got.sum() == noise and (np.diff(got.astype(int)) == 1).sum() == number


def test_512_tokens_in_and_114_out_hold_568_tokens():
  """T5's own numbers: with one end of text on each side both are exactly full."""
  one = config("span_corruption", "encoder_decoder", 513, 114)  # Our bytes also have a beginning.
  objective, tokenizer = objective_of(one)
  assert objective.whole == 568
  room = objective.room(None, None, np.array([568]), None)  # pyright: ignore
  assert {name: int(n[0]) for name, n in room.items()} == {"": 513, "decoder_": 114}
  piece = next(iter(make(objective, corpus_of([np.arange(568) % 256]), seed=0)))
  assert len(piece.arrays["tokens"]) == 513 and len(piece.arrays["decoder_tokens"]) == 114
  used = [t for t in piece.arrays["decoder_targets"] if t in tokenizer.sentinel_ids]
  assert used == list(tokenizer.sentinel_ids[:28])
  assert piece.arrays["decoder_targets"][-1] == tokenizer.eos_id  # No sentinel before the end.
  assert piece.arrays["decoder_targets"][-2] not in tokenizer.sentinel_ids


def test_span_corruption_has_the_papers_rates():
  objective, tokenizer = objective_of(config("span_corruption", "encoder_decoder", 513, 114))
  sentinel_ids = frozenset(tokenizer.sentinel_ids)
  total = noise = sentinels = expected = 0
  for piece in make(objective, corpus_of(_documents(10_000, 30, 250)), seed=3):
    read, written = parts_of(objective, piece)
    own = sum(t in sentinel_ids for t in written)
    assert own == sum(t in sentinel_ids for t in read)
    total, noise = total + piece.length, noise + len(written) - own
    sentinels, expected = sentinels + own, expected + piece.length * 0.15 / 3
  assert noise / total == pytest.approx(0.15, rel=0.01)
  assert noise / sentinels == pytest.approx(3.0, rel=0.01)
  assert sentinels == pytest.approx(expected, rel=0.01)


def test_denoising_has_the_papers_rates_and_poisson_lengths():
  one = config("denoising", "encoder_decoder", 512, 512)
  objective, tokenizer = objective_of(one)
  total = kept = masks = 0
  for piece in make(objective, corpus_of(_documents(10_000, 30, 250)), seed=3):
    read, written = parts_of(objective, piece)
    own = read.count(tokenizer.mask_id)
    assert len(written) == piece.length
    total, kept, masks = total + piece.length, kept + len(read) - own, masks + own
  assert 1 - kept / total == pytest.approx(0.3, rel=0.01)
  table, chance = poisson(3.0), np.random.Generator(np.random.Philox(0))
  drawn = [_span_sizes(154, table, chance) for _ in range(10_000)]
  assert all(sizes.sum() == 154 and len(sizes) <= 154 for sizes in drawn)
  lengths = np.concatenate([sizes[:-1] for sizes in drawn])  # The last one takes what is left.
  assert lengths.mean() == pytest.approx(3.0, rel=0.01)
  want = np.exp(-3.0) * np.cumprod([1.0, *(3.0 / k for k in range(1, 10))])
  got = np.bincount(lengths, minlength=10)[:10] / len(lengths)
  np.testing.assert_allclose(got, want, atol=0.01)
  # The last span is cut: by renewal theory E[X(X-1)] / 2E[X] = 1.5 of its tokens, half a span.
  assert masks == pytest.approx(total * 0.3 / 3 + 10_000 / 2, rel=0.01)


def test_ul2_mixes_its_denoisers_evenly_and_each_has_its_rates():
  one = config("ul2", "encoder_decoder", 512, 512)
  objective, tokenizer = objective_of(one)
  documents = corpus_of(_documents(10_000, 120, 280))
  sentinel_ids = frozenset(tokenizer.sentinel_ids)
  modes = {tokenizer.backend.token_to_id(f"[{m}]"): m for m in "RSX"}
  found: dict[str, list[float]] = {m: [] for m in "RSX"}
  for piece in make(objective, documents, seed=5):
    read, written = parts_of(objective, piece)
    left_out = sum(t not in sentinel_ids for t in written)
    found[modes[read[0]]].append(left_out / piece.length)
  shares = {m: len(rates) / 10_000 for m, rates in found.items()}
  for mode, parts in {"R": 2, "X": 4, "S": 1}.items():
    assert shares[mode] == pytest.approx(parts / 7, abs=0.01)
  assert np.mean(found["R"]) == pytest.approx(0.15, rel=0.01)
  assert np.mean(found["S"]) == pytest.approx(0.25, rel=0.01)
  high = np.array(found["X"]) > 0.3  # Three of the four leave out half.
  assert high.mean() == pytest.approx(0.75, abs=0.02)
  assert np.array(found["X"])[high].mean() == pytest.approx(0.5, rel=0.01)


def test_prefixes_have_every_length_alike():
  for shape in ("decoder", "encoder_decoder"):
    objective, _ = objective_of(config("prefix_lm", shape, 64, 64))
    documents = corpus_of([np.zeros(11, int)] * 10_000)
    read = [len(parts_of(objective, piece)[0]) for piece in make(objective, documents, seed=1)]
    np.testing.assert_allclose(np.bincount(read, minlength=12)[1:11] / len(read), 0.1, atol=0.01)


DOCUMENTS = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=90), min_size=1, max_size=6)


@pytest.mark.parametrize("name, shape", KINDS)
@settings(max_examples=30, deadline=None)
@given(documents=DOCUMENTS, seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 2))
def test_what_is_read_and_written_is_each_document_once(name, shape, documents, seed, epoch):
  objective, tokenizer = objective_of(config(name, shape, 48, 40))
  assume(any(len(document) > objective.overlap for document in documents))
  seen = [np.zeros(len(d), int) for d in documents]
  for piece in make(objective, corpus_of(documents), seed, epoch):
    read, written = parts_of(objective, piece)
    if name == "ul2":
      mode, read = read[0], read[1:]
      rest = mode == tokenizer.backend.token_to_id("[S]")
      text = read + written if rest else refilled(read, written, tokenizer.sentinel_ids)
    elif name == "span_corruption":
      text = refilled(read, written, tokenizer.sentinel_ids)
    elif name == "denoising":
      text = written
    else:
      text = read + written
    end = piece.begin + piece.length
    assert text == documents[piece.document][piece.begin : end]
    seen[piece.document][piece.begin : end - objective.overlap] += 1
  for counts in seen:
    assert (counts[: len(counts) - objective.overlap] == 1).all()


TOKENS = st.lists(st.integers(0, 255), max_size=60)
SEEDS = st.integers(0, 2**60)


@settings(max_examples=100, deadline=None)
@given(tokens=TOKENS, seed=SEEDS, mean=st.sampled_from([1.0, 3.0, 9.5]), rate=st.floats(0.01, 0.99))
def test_masks_of_infilling_stand_for_the_tokens_between(tokens, seed, mean, rate):
  chance = np.random.Generator(np.random.Philox(seed))
  out = infilled(np.array(tokens, int), 999, rate, poisson(mean), chance)
  assert len(out) <= len(tokens)
  assert (out != 999).sum() == len(tokens) - round(rate * len(tokens))
  pattern = "".join("(?s:.*)" if t == 999 else re.escape(chr(t + 0x4E00)) for t in out)
  assert re.fullmatch(pattern, "".join(chr(t + 0x4E00) for t in tokens))


@settings(max_examples=60, deadline=None)
@given(tokens=TOKENS, seed=SEEDS)
def test_taking_out_any_spans_can_be_undone(tokens, seed):
  noise = np.random.default_rng(seed).random(len(tokens)) < 0.4
  sentinels = tuple(range(1000, 1060))
  read, written = take_out(np.array(tokens, int), noise, np.array(sentinels))
  assert refilled(read.tolist(), written.tolist(), sentinels) == tokens


def test_sentences_end_at_stops_before_a_space_and_at_line_ends():
  _, tokenizer = objective_of(config("denoising", "encoder_decoder"))
  sentences = Sentences.of(tokenizer)
  text = 'One is 3.14. "Two?" three... four!\n\nfive\nsix: e.g.x'
  parts = ["One is 3.14.", ' "Two?"', " three...", " four!\n\n", "five\n", "six: e.g.x"]
  tokens = np.array(list(text.encode()))
  ends = np.cumsum(sentences.sizes(tokens))
  assert [text[a:b] for a, b in zip([0, *ends], ends, strict=False)] == parts
  chance = np.random.Generator(np.random.Philox(3))
  orders = {bytes(permuted(tokens, sentences, chance).tolist()).decode() for _ in range(200)}
  assert len(orders) > 150
  assert all(sorted(order) == sorted(text) for order in orders)
  assert all(part in order for order in orders for part in parts)
