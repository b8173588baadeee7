"""Beam search against Transformers, exhaustive search and the diverse search of the paper."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import infer
import model
from tests.infer import tiny
from tests.infer.copies import theirs_and_ours
from train.certify.cases import CASES
from train.certify.theirs import Theirs

END = 2
SETTINGS = {
  "two": dict(num_beams=2),
  "four": dict(num_beams=4, num_return_sequences=4),
  "long": dict(num_beams=4, length_penalty=2.0, num_return_sequences=2),
  "short": dict(num_beams=3, length_penalty=-1.0, num_return_sequences=3),
  "as soon as there are enough": dict(num_beams=4, early_stopping=True, num_return_sequences=3),
  "until nothing can be better": dict(
    num_beams=4, early_stopping="never", length_penalty=0.0, num_return_sequences=2
  ),
  "no pair twice": dict(num_beams=5, no_repeat_ngram_size=2, num_return_sequences=2),
  "penalty and least length": dict(num_beams=3, repetition_penalty=1.4, min_new_tokens=6),
}  # fmt: skip


def on_request(cases, *quick) -> list:
  """Cases of which all but the quick ones are slow."""
  mark = lambda case: case if case in quick else pytest.param(case, marks=pytest.mark.slow)
  return [mark(case) for case in cases]


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder = tmp_path_factory.mktemp("gpt2")
  Theirs(CASES["gpt2"]).save(folder)
  kind = getattr(transformers, CASES["gpt2"][0])
  theirs = kind.from_pretrained(folder, attn_implementation="eager").eval()
  return torch, theirs, dataclasses.replace(model.load(folder), end_ids=(END,))


def equal(torch, theirs, m, settings: dict, start: int) -> None:
  prompts = np.random.default_rng(3).integers(3, 96, (3, 9))
  for prompt in prompts:
    want = theirs.generate(
      torch.tensor(prompt[None]), max_new_tokens=12, do_sample=False, eos_token_id=END,
      pad_token_id=0, output_scores=True, return_dict_in_generate=True, **settings,
    )  # fmt: skip
    got = infer.generate(m, [prompt], max_new_tokens=12, **settings)
    for one, row, score in zip(got, want.sequences, want.sequences_scores, strict=True):
      new = row[start:].tolist()
      assert one.tokens == new[: new.index(END) + 1] if END in new else one.tokens == new[:12]
      assert one.score == pytest.approx(float(score), rel=1e-4, abs=1e-4)
  both = infer.generate(m, prompts, max_new_tokens=12, **settings)
  alone = [c for p in prompts for c in infer.generate(m, [p], max_new_tokens=12, **settings)]
  assert [c.tokens for c in both] == [c.tokens for c in alone]


@pytest.mark.parametrize("name", on_request(SETTINGS, "long", "as soon as there are enough"))
def test_a_search_equals_that_of_transformers(gpt, name):
  torch, theirs, m = gpt
  equal(torch, theirs, m, SETTINGS[name], start=9)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_search_behind_an_encoder_equals_that_of_transformers(name):
  torch = pytest.importorskip("torch")
  theirs, m = theirs_and_ours("T5ForConditionalGeneration", std=0.3)
  # Their cache has as many layers as the encoder, which are not enough here.
  theirs.generation_config.use_cache = False
  equal(torch, theirs, dataclasses.replace(m, end_ids=(END,)), SETTINGS[name], start=1)


@pytest.fixture(scope="module")
def small():
  """Six tokens, of which the third ends a text."""
  m = tiny.model(vocab_size=6, init_std=0.6)
  return dataclasses.replace(m, tokenizer=None, end_ids=(END,))


def next_logprobs(m, text: tuple[int, ...]) -> np.ndarray:
  padded = np.zeros((1, 32), np.int32)
  padded[0, : len(text)] = text
  return np.asarray(jax.nn.log_softmax(m(padded)[0, len(text) - 1]), np.float64)


@pytest.mark.parametrize("length_penalty", on_request([0.0, 1.0, 2.5], 1.0))
def test_enough_beams_find_the_best_of_all_sequences(small, length_penalty):
  prompt, most = (1, 4), 3
  scores = {}
  for n in range(1, most + 1):
    for text in itertools.product(range(6), repeat=n):
      if END in text[:-1] or (n < most and text[-1] != END):
        continue
      logprob = sum(next_logprobs(small, prompt + text[:i])[text[i]] for i in range(n))
      scores[text] = logprob / n**length_penalty
  want = sorted(scores, key=lambda text: -scores[text])[:5]
  got = infer.generate(
    small, [list(prompt)], max_new_tokens=most, num_beams=128, num_return_sequences=5,
    early_stopping="never", length_penalty=length_penalty,
  )  # fmt: skip
  assert [tuple(c.tokens) for c in got] == want
  np.testing.assert_allclose([c.score for c in got], [scores[t] for t in want], atol=1e-4)


def diverse(m, prompt, *, beams: int, groups: int, strength: float, most: int):
  """Algorithm 1 of arXiv:1610.02424 with Hamming diversity, each sequence read anew."""
  size = beams // groups
  running = [[((), 0.0)] for _ in range(groups)]
  ended = [[] for _ in range(groups)]
  for step in range(most):
    said = np.zeros(6)
    for g in range(groups):
      if len(ended[g]) >= size:
        continue
      found = []
      for text, score in running[g]:
        augmented = next_logprobs(m, prompt + text) - strength * said
        found += [((*text, t), score + augmented[t]) for t in range(6)]
      found = sorted(found, key=lambda pair: -pair[1])[: 2 * size]
      last = step + 1 == most
      ends = lambda text: text[-1] == END or last  # noqa: B023
      ended[g] += [(t, s / len(t)) for i, (t, s) in enumerate(found) if ends(t) and i < size]
      ended[g] = sorted(ended[g], key=lambda pair: -pair[1])[:size]
      going = [pair for pair in found if pair[0][-1] != END][:size]
      for text, _ in going:
        said[text[-1]] += 1
      running[g] = going
  return sorted((pair for group in ended for pair in group), key=lambda pair: -pair[1])


@pytest.mark.parametrize("case", on_request([(4, 2, 0.7), (6, 3, 5.0), (3, 3, 1.5)], (4, 2, 0.7)))
def test_diverse_groups_equal_the_algorithm_of_the_paper(small, case):
  beams, groups, strength = case
  for prompt in ((1, 4), (5, 5, 0)):
    want = diverse(small, prompt, beams=beams, groups=groups, strength=strength, most=5)
    got = infer.generate(
      small, [list(prompt)], max_new_tokens=5, num_beams=beams, num_beam_groups=groups,
      diversity_penalty=strength, num_return_sequences=beams, early_stopping=True,
    )  # fmt: skip
    np.testing.assert_allclose([c.score for c in got], [s for _, s in want], atol=1e-4)
    assert [tuple(c.tokens) for c in got] == [t for t, _ in want]


def contrastive(m, prompt, *, alpha: float, among: int, most: int) -> list[int]:
  """Equation 5 of arXiv:2202.06417, each text read anew."""
  text = list(prompt)

  def unit_states(ids):
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(ids)] = ids
    states = np.asarray(m.hidden(padded)[0, : len(ids)], np.float64)
    return states / np.linalg.norm(states, axis=-1, keepdims=True)

  for _ in range(most):
    probs = np.exp(next_logprobs(m, tuple(text)))
    found = {}
    for token in np.argsort(-probs)[:among]:
      states = unit_states([*text, token])
      found[int(token)] = (1 - alpha) * probs[token] - alpha * (states[:-1] @ states[-1]).max()
    text.append(max(found, key=lambda t: found[t]))
    if text[-1] == END:
      break
  return text[len(prompt) :]


@pytest.mark.parametrize("case", on_request([(0.6, 4), (0.3, 6), (0.9, 2)], (0.6, 4)))
def test_contrastive_search_equals_the_equation_of_the_paper(small, case):
  alpha, among = case
  prompts = [(1, 4), (5, 5, 0, 3)]
  want = [contrastive(small, p, alpha=alpha, among=among, most=8) for p in prompts]
  settings = dict(max_new_tokens=8, penalty_alpha=alpha, top_k=among)
  both = infer.generate(small, [list(p) for p in prompts], **settings)
  assert [c.tokens for c in both] == want
  assert [infer.generate(small, [list(p)], **settings)[0].tokens for p in prompts] == want
  plain = infer.generate(small, [list(p) for p in prompts], max_new_tokens=8)
  assert [c.tokens for c in plain] != want


def test_searched_text_begins_with_its_prefix_and_tells_the_model_s_own_log_probabilities(small):
  for settings in (dict(num_beams=3), dict(), dict(temperature=0.7, seed=3)):
    got = infer.generate(small, [[1, 4]], max_new_tokens=6, prefix=[3, 0], **settings)[0]
    assert got.tokens[:2] == [3, 0]
    own = [next_logprobs(small, (1, 4, *got.tokens[:i]))[t] for i, t in enumerate(got.tokens)]
    np.testing.assert_allclose(got.logprobs, own, atol=1e-4)


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    (dict(num_beams=0), "num_beams=0"),
    (dict(length_penalty=2.0), "length_penalty=2.0 has no effect without a search"),
    (dict(early_stopping=True), "early_stopping=True has no effect without a search"),
    (dict(num_beams=4, early_stopping="soon"), "early_stopping='soon'"),
    (dict(num_beams=4, num_beam_groups=3, diversity_penalty=1.0), "is not a multiple"),
    (dict(num_beams=4, num_beam_groups=2), "groups differ from each other by a penalty"),
    (dict(num_beams=4, diversity_penalty=1.0), "groups differ from each other by a penalty"),
    (dict(num_beams=4, num_beam_groups=2, diversity_penalty=-1), "diversity_penalty=-1"),
    (dict(num_beams=2, num_return_sequences=3), "more than num_beams=2"),
    (dict(num_beams=2, temperature=0.5), "temperature=0.5 does not go with num_beams"),
    (dict(num_beams=2, best_of=2), "best_of=2 does not go with num_beams"),
    (dict(num_beams=2, logprobs=2), "logprobs=2 does not go with num_beams"),
    (dict(num_beams=2, stop="x"), "a search ends at token ids"),
    (dict(num_beams=3, num_return_sequences=3, allowed_tokens=[4], max_new_tokens=3),
     "has only 1 sequences"),
    (dict(penalty_alpha=0.6), "penalty_alpha=0.6 chooses among the top_k"),
    (dict(penalty_alpha=1.5, top_k=4), "penalty_alpha=1.5"),
    (dict(penalty_alpha=0.5, top_k=4, num_beams=2), "penalty_alpha=0.5 does not go with"),
    (dict(penalty_alpha=0.5, top_k=4, temperature=1), "temperature=1 does not go with"),
    (dict(penalty_alpha=0.5, top_k=4, bad_words=range(6)), "no token is left"),
    (dict(prefix=[9]), "prefix: token 9"),
    (dict(prefix=[1, 1, 1], max_new_tokens=2), "prefix has 3 tokens"),
  ],
)  # fmt: skip
def test_impossible_searches_are_named(small, settings, said):
  bare = small if "stop" not in settings else tiny.model()
  with pytest.raises(ValueError) as error:
    infer.generate(bare, [[1, 4]], **settings)
  assert said in str(error.value)
