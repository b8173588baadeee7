"""Guessing ahead changes nothing but the speed."""

import dataclasses
import itertools

import numpy as np
import pytest

import infer
from infer.shaping import History
from infer.speculative import lookup
from tests.infer import tiny
from tests.infer.copies import theirs_and_ours
from tests.infer.test_beam import END, next_logprobs, on_request
from tests.infer.test_sampling import exact_distribution, fits

SETTINGS = {
  "greedy": dict(),
  "sampled": dict(temperature=0.9, top_k=50, top_p=0.95, seed=4),
  "shaped": dict(
    temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, no_repeat_ngram_size=3,
    bad_words=["ab"], min_new_tokens=9, seed=1, logprobs=2,
  ),
}  # fmt: skip


@pytest.fixture(scope="module")
def m():
  return tiny.model()


@pytest.fixture(scope="module")
def drafts(m):
  other = tiny.model(seed=9, num_layers=1)
  return {"itself": m, "other": other, "lookup": "lookup", "layers": "layers:1"}


def prompts(count: int) -> list[str]:
  rng = np.random.default_rng(0)
  words = ["ab", "cd ", "return", "x", " é", "\n"]
  return ["".join(rng.choice(words, rng.integers(1, 9))) for _ in range(count)]


QUICK = [("lookup", "shaped")]
ALL = list(itertools.product(["itself", "other", "lookup", "layers"], SETTINGS))


@pytest.mark.parametrize("case", on_request(ALL, *QUICK))
def test_speculative_decoding_equals_plain_decoding(m, drafts, case):
  name, kind = case
  settings = dict(max_new_tokens=24, **SETTINGS[kind])
  texts = prompts(8)
  want = infer.generate(m, texts, **settings)
  got = infer.generate(m, texts, draft=drafts[name], speculate=3, **settings)
  for one, other in zip(got, want, strict=True):
    assert one.tokens == other.tokens and one.text == other.text
    assert one.finish_reason == other.finish_reason
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
  shares = [one.acceptance for one in got if one.acceptance is not None]
  if name == "itself":
    assert min(shares) >= 0.99
  alone = infer.generate(m, texts[2], draft=drafts[name], speculate=3, **settings)[0]
  assert alone.tokens == want[2].tokens


@pytest.mark.slow
def test_two_hundred_prompts_are_continued_alike(m, drafts):
  texts = prompts(200)
  want = [c.tokens for c in infer.generate(m, texts, max_new_tokens=20)]
  for name, draft in drafts.items():
    got = infer.generate(m, texts, max_new_tokens=20, draft=draft, speculate=5)
    assert [c.tokens for c in got] == want, name


@pytest.mark.slow
def test_speculated_draws_have_the_exact_distribution():
  """All texts of three tokens of a vocabulary of six, against the product of exact steps."""
  small = dataclasses.replace(tiny.model(vocab_size=6, init_std=0.6), tokenizer=None)
  other = dataclasses.replace(
    tiny.model(vocab_size=6, init_std=0.6, seed=9, num_layers=1), tokenizer=None
  )
  settings, draws = dict(temperature=0.9, top_k=5, top_p=0.95), 30_000
  got = infer.generate(
    small, [[1, 4]], max_new_tokens=3, num_return_sequences=draws, draft=other, speculate=2, seed=3,
    **settings,
  )  # fmt: skip
  exact = np.zeros((6, 6, 6))
  step = lambda text: exact_distribution(next_logprobs(small, text), **settings)
  first = step((1, 4))
  for a in range(6):
    second = step((1, 4, a))
    for b in range(6):
      exact[a, b] = first[a] * second[b] * step((1, 4, a, b))
  places = [c.tokens[0] * 36 + c.tokens[1] * 6 + c.tokens[2] for c in got]
  counts, exact = np.bincount(places, minlength=216), exact.reshape(-1)
  shares = [c.acceptance for c in got if c.acceptance is not None]
  assert 0.2 < np.mean(shares) < 0.95, "some guesses are right and some are wrong"
  assert counts[exact == 0].sum() == 0
  rare = exact * draws < 5  # Together they are one.
  pool = lambda a: np.append(a[~rare], a[rare].sum())
  fits(pool(counts), pool(exact))


def test_stop_strings_end_speculated_texts_where_they_end_others(m):
  free = infer.generate(m, tiny.PROMPTS, max_new_tokens=40, temperature=0.9)
  cuts = [c.text[len(c.text) // 2 :][:2] for c in free]
  settings = dict(max_new_tokens=40, temperature=0.9, stop=cuts)
  want = infer.generate(m, tiny.PROMPTS, **settings)
  got = infer.generate(m, tiny.PROMPTS, draft=m, **settings)
  assert [(c.text, c.tokens) for c in got] == [(c.text, c.tokens) for c in want]
  streamed = "".join(infer.stream(m, tiny.PROMPTS[1], draft="lookup", **settings))
  assert streamed == want[1].text


@pytest.mark.parametrize("draft", on_request(["layers:2", "lookup"], "layers:2"))
def test_a_decoder_behind_an_encoder_is_speculated_alike(draft):
  _, m = theirs_and_ours("T5ForConditionalGeneration", std=0.3)
  m = dataclasses.replace(m, end_ids=(END,))
  ids = np.random.default_rng(3).integers(3, 96, (4, 9)).tolist()
  want = infer.generate(m, ids, max_new_tokens=16)
  got = infer.generate(m, ids, max_new_tokens=16, draft=draft)
  assert [c.tokens for c in got] == [c.tokens for c in want]


def test_what_followed_the_longest_and_latest_match_is_guessed():
  text = [1, 2, 3, 4, 5, 2, 3, 9, 1, 2, 3]
  rows = np.zeros((3, 16), np.int32)
  rows[0, : len(text)] = text
  rows[1, :4] = [7, 8, 7, 6]
  rows[2, :3] = [5, 5, 5]
  said = History(rows, np.array([1, 1, 1]), np.array([len(text), 4, 3]))
  got = np.asarray(lookup(said, 4))
  assert got.tolist() == [[4, 5, 2, 3], [-1] * 4, [5, -1, -1, -1]]


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    (dict(draft="loopup"), "draft='loopup'"),
    (dict(draft="layers:2"), "name from 1 to 1"),
    (dict(draft="layers:x"), "draft='layers:x'"),
    (dict(speculate=3), "speculate has no effect without a draft"),
    (dict(draft="lookup", speculate=0), "speculate=0"),
    (dict(draft="lookup", num_beams=2), "draft='lookup' does not go with num_beams"),
    (dict(draft=3), "draft=3"),
  ],
)
def test_impossible_drafts_are_named(m, settings, said):
  with pytest.raises(ValueError) as error:
    infer.generate(m, "abc", max_new_tokens=4, **settings)
  assert said in str(error.value).replace("=lookup", "='lookup'")


def test_a_draft_of_another_vocabulary_is_refused(m):
  with pytest.raises(ValueError, match="draft has another vocabulary"):
    infer.generate(m, "abc", draft=tiny.model(vocab_size=300))
