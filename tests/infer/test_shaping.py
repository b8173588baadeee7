"""What changes scores before a draw, against Transformers' processors on random rows."""

import itertools

import jax
import numpy as np
import pytest

import infer
from infer.requests import request_of
from infer.settings import Settings
from infer.shaping import History, Shaping
from tests.infer import tiny
from tests.infer.test_sampling import kept_alike, logits_of

ROWS, LENGTH = 1000, 24
SETTINGS = {
  "repetition": dict(repetition_penalty=1.7),
  "repetition below one": dict(repetition_penalty=0.6),
  "bigrams": dict(no_repeat_ngram_size=2),
  "unigrams": dict(no_repeat_ngram_size=1),
  "trigrams": dict(no_repeat_ngram_size=3),
  "biases": dict(logit_bias={3: 2.5, (1, 2): -4.0, (2, 1, 0): 30.0, (0, 1): -np.inf, 5: -np.inf}),
  "bad words": dict(bad_words=[7, (1, 1), (0, 2, 1), (3,) * 30]),
  "all of them": dict(
    repetition_penalty=1.3, no_repeat_ngram_size=2, logit_bias={(1, 0): 9.0, 4: -1.0},
    bad_words=[(2, 2), 6],
  ),
}  # fmt: skip


def histories(seed: int = 0) -> np.ndarray:
  """Rows of few different tokens, so that runs of them come again."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, rng.choice([2, 4, 8], (ROWS, 1)), (ROWS, LENGTH)).astype(np.int32)


def shaped(settings: dict, logits: np.ndarray, said: np.ndarray, count: np.ndarray) -> np.ndarray:
  m = tiny.model()
  request = request_of(m, Settings(**settings), [0] * ROWS, None, ROWS, frozenset())
  history = History(said, np.minimum(count, 5), count)
  return np.asarray(jax.jit(Shaping.__call__)(request.shaping, logits, history))


@pytest.mark.parametrize("name", SETTINGS)
def test_shaped_scores_equal_those_of_transformers(name):
  torch = pytest.importorskip("torch")
  theirs = pytest.importorskip("transformers.generation.logits_process")
  settings, logits, said = SETTINGS[name], logits_of(), histories()
  words = lambda pairs: [list(w) if isinstance(w, tuple) else [w] for w in pairs]
  kinds = dict(
    logit_bias=lambda d: theirs.SequenceBiasLogitsProcessor(
      {tuple(w): float(b) for w, b in zip(words(d), d.values(), strict=True)}
    ),
    repetition_penalty=theirs.RepetitionPenaltyLogitsProcessor,
    no_repeat_ngram_size=theirs.NoRepeatNGramLogitsProcessor,
    bad_words=lambda bad: theirs.NoBadWordsLogitsProcessor(words(bad)),
  )
  for length in (1, 2, LENGTH):
    want = torch.tensor(logits)
    for kind, build in kinds.items():
      if kind in settings:
        want = build(settings[kind])(torch.tensor(said[:, :length]).long(), want)
    count = np.full(ROWS, length, np.int32)
    got = shaped(settings, logits, said, count)  # What lies behind `count` says nothing.
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want.numpy()))
    finite = np.isfinite(got)
    np.testing.assert_allclose(got[finite], want.numpy()[finite], rtol=1e-6, atol=1e-6)
    kept_alike(got, want.numpy())


def test_count_penalties_are_those_of_their_formula_and_leave_the_prompt_out():
  logits, said = logits_of(rows=ROWS), histories()
  count = np.random.default_rng(1).integers(6, LENGTH, ROWS).astype(np.int32)
  got = shaped(dict(presence_penalty=0.75, frequency_penalty=-0.5), logits, said, count)
  want = logits.copy()
  for row in range(ROWS):
    tokens, times = np.unique(said[row, 5 : count[row]], return_counts=True)
    want[row, tokens] -= 0.75 - 0.5 * times
  finite = np.isfinite(want)
  np.testing.assert_array_equal(np.isfinite(got), finite)
  np.testing.assert_allclose(got[finite], want[finite], rtol=1e-6, atol=1e-6)


def test_tokens_that_may_be_or_must_come_equal_transformers_processors():
  torch = pytest.importorskip("torch")
  theirs = pytest.importorskip("transformers.generation.logits_process")
  logits, said = logits_of(), histories()
  scores, count = torch.tensor(logits), np.random.default_rng(2).integers(5, 12, ROWS)
  count = count.astype(np.int32)  # The prompts have five tokens.
  allowed = [9, 2, 50, 111]
  others = [token for token in range(logits.shape[1]) if token not in allowed]
  want = theirs.SuppressTokensLogitsProcessor(others)(None, scores)
  kept_alike(shaped(dict(allowed_tokens=allowed), logits, said, count), want.numpy())
  forced = [7, 150, 3]

  def may_follow(row, ids):
    new = count[row] - 5
    return [forced[new]] if new < len(forced) else list(range(logits.shape[1]))

  rows = torch.arange(ROWS)[:, None]
  want = theirs.PrefixConstrainedLogitsProcessor(may_follow, 1)(rows, scores)
  kept_alike(shaped(dict(prefix=forced), logits, said, count), want.numpy())


def test_no_end_comes_before_the_least_number_of_new_tokens():
  torch = pytest.importorskip("torch")
  theirs = pytest.importorskip("transformers.generation.logits_process")
  logits, new = logits_of(), np.random.default_rng(3).integers(0, 9, ROWS).astype(np.int32)
  settings, ends = Settings(min_new_tokens=5), [3, 17]
  request = request_of(tiny.model(), settings, [0] * ROWS, None, ROWS, frozenset(ends))
  got = np.asarray(request.shaped(logits, History(histories(), new * 0 + 5, new + 5), new))
  for count in range(9):
    ids = torch.zeros(1, 5 + count).long()
    processor = theirs.MinNewTokensLengthLogitsProcessor(5, 5, ends, device="cpu")
    want = processor(ids, torch.tensor(logits[new == count])).numpy()
    np.testing.assert_array_equal(got[new == count], want)


def test_only_allowed_tokens_are_chosen():
  got = shaped(dict(allowed_tokens=[9, 2, 205]), logits_of(), histories(), np.full(ROWS, 3))
  assert np.flatnonzero(np.isfinite(got).any(axis=0)).tolist() == [2, 9], "205 is padding"


def test_each_shaping_setting_changes_the_outcome_and_does_what_it_says():
  m = tiny.model()
  base = dict(max_new_tokens=30, min_new_tokens=30)
  tokens = lambda **s: infer.generate(m, "abcabcabc", **base | s)[0].tokens
  plain = tokens()
  often = max(set(plain), key=plain.count)
  for changed in (
    dict(repetition_penalty=5.0), dict(presence_penalty=50.0), dict(frequency_penalty=50.0),
    dict(no_repeat_ngram_size=1), dict(logit_bias={often: -60.0}), dict(bad_words=[often]),
    dict(allowed_tokens=[5, 6, 7]),
  ):  # fmt: skip
    assert tokens(**changed) != plain, changed
  assert often not in tokens(bad_words=[often]) and set(tokens(allowed_tokens=[5, 6])) <= {5, 6}
  free = tokens(no_repeat_ngram_size=2)
  pairs = list(itertools.pairwise(free))
  assert len(set(pairs)) == len(pairs)
  assert tokens(temperature=2.0, typical_p=0.1) != tokens(temperature=2.0)
  assert tokens(temperature=2.0, epsilon_cutoff=0.3) != tokens(temperature=2.0)


def test_words_given_as_text_are_not_said():
  m = tiny.model()
  letters = m.tokenizer.encode("abcdefghijklmnopq ", add_special_tokens=False)
  settings = dict(max_new_tokens=30, allowed_tokens=letters)
  free = infer.generate(m, "Hi", **settings)[0]
  word = free.text[3:5]
  bound = infer.generate(m, "Hi", bad_words=[word], **settings)[0]
  assert word in free.text and word not in bound.text
  # Bytes of a word are those behind a space too: its bias is added once.
  score = lambda word: infer.generate(m, "Hi", logit_bias={word: 1.5}, num_beams=2, **settings)[0]
  assert score("ab").score == score(tuple(b"ab")).score


def test_a_prompt_gives_the_same_alone_and_in_a_batch_with_penalties():
  m = tiny.model()
  settings = dict(
    max_new_tokens=20, temperature=0.9, seed=3, repetition_penalty=1.2, presence_penalty=0.5,
    no_repeat_ngram_size=3, typical_p=0.9,
  )  # fmt: skip
  alone = [infer.generate(m, p, **settings)[0].tokens for p in tiny.PROMPTS]
  assert [c.tokens for c in infer.generate(m, tiny.PROMPTS, **settings)] == alone


def test_sequences_of_a_prompt_differ_and_the_best_of_them_is_returned():
  m = tiny.model()
  settings = dict(max_new_tokens=12, temperature=1.5, seed=5)
  many = infer.generate(m, ["Hi", "x"], num_return_sequences=4, **settings)
  assert len(many) == 8 and len({tuple(c.tokens) for c in many[:4]}) == 4
  assert many[0].tokens == infer.generate(m, "Hi", **settings)[0].tokens
  mean = lambda c: np.mean(c.logprobs)
  best = infer.generate(m, ["Hi", "x"], best_of=4, num_return_sequences=2, **settings)
  want = [c for i in (0, 4) for c in sorted(many[i : i + 4], key=mean, reverse=True)[:2]]
  assert [c.tokens for c in best] == [c.tokens for c in want]
  shortest = infer.generate(m, "Hi", best_of=4, scorer=lambda p, c: -len(c.text), **settings)
  assert len(shortest[0].text) == min(len(c.text) for c in many[:4])
  plain = settings | dict(allowed_tokens=m.tokenizer.encode("abcdefgh", add_special_tokens=False))
  texts = [c.text for c in infer.generate(m, "Hi", num_return_sequences=4, **plain)]
  stop = {text[0] for text in texts[:3]}  # They end before they have said anything.
  kept = infer.generate(m, "Hi", best_of=4, stop=stop, **plain)[0].text
  assert kept and texts[3].startswith(kept)
  judge = tiny.model(seed=4, head="sequence", num_labels=1, problem="regression")
  told = lambda text: float(judge([judge.tokenizer.encode(text)])[0, 0])
  chosen = infer.generate(m, "Hi", best_of=4, scorer=judge, **settings)[0]
  assert told("Hi" + chosen.text) == max(told("Hi" + c.text) for c in many[:4])


def test_most_votes_win():
  said = [infer.Completion(text, [], [], "stop") for text in ("so 4", "4", "5", "?", "so 5!", "4")]
  digit = lambda text: next((c for c in text if c.isdigit()), None)
  assert infer.vote(said, digit) == ("4", 3 / 5)
  with pytest.raises(ValueError, match="none of the 6 completions"):
    infer.vote(said, lambda text: None)


def test_echo_tells_the_log_probabilities_of_the_prompt():
  m = tiny.model()
  got = infer.generate(m, tiny.PROMPTS, max_new_tokens=3, echo=True, logprobs=2)
  for prompt, one in zip(tiny.PROMPTS, got, strict=True):
    ids = m.tokenizer.encode_prompt(prompt)
    own = np.asarray(jax.nn.log_softmax(m([ids])[0, :-1]))
    assert one.prompt_tokens == ids
    np.testing.assert_allclose(
      one.prompt_logprobs, own[np.arange(len(ids) - 1), ids[1:]], atol=1e-4
    )
    best = [[t for t, _ in place] for place in one.prompt_top_logprobs]
    assert best == np.argsort(-own)[:, :2].tolist()


@pytest.mark.parametrize("of", [iter, np.array, tuple])
def test_several_values_may_be_anything_that_is_read_in_order(of):
  m = tiny.model()
  ask = lambda **s: infer.generate(m, "Hi", max_new_tokens=9, **s)[0].tokens
  plain = ask()
  for name, value in (
    ("stop", [plain[2]]), ("bad_words", [plain[0]]), ("prefix", [5, 6]), ("allowed_tokens", [7, 8]),
  ):  # fmt: skip
    assert ask(**{name: of(value)}) == ask(**{name: value}) != plain, name
  assert ask(prefix=5) == ask(prefix=[5]) and ask(allowed_tokens=5) == [5] * 9


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    (dict(repetition_penalty=0), "repetition_penalty=0"),
    (dict(repetition_penalty=float("nan")), "repetition_penalty=nan"),
    (dict(presence_penalty=float("inf")), "presence_penalty=inf"),
    (dict(frequency_penalty="much"), "frequency_penalty='much'"),
    (dict(no_repeat_ngram_size=0), "no_repeat_ngram_size=0"),
    (dict(no_repeat_ngram_size=5000), "no_repeat_ngram_size=5000"),
    (dict(typical_p=0), "typical_p=0"),
    (dict(typical_p=1.5), "typical_p=1.5"),
    (dict(epsilon_cutoff=1.0), "epsilon_cutoff=1.0"),
    (dict(epsilon_cutoff=-0.1), "epsilon_cutoff=-0.1"),
    (dict(bad_words="word"), "bad_words='word'"),
    (dict(bad_words=[""]), "bad_words: ''"),
    (dict(bad_words=[[]]), "bad_words: []"),
    (dict(bad_words=[(1, 999)]), "bad_words: token 999"),
    (dict(logit_bias=[1, 2]), "logit_bias=[1, 2]"),
    (dict(logit_bias={5: float("nan")}), "logit_bias[5]=nan"),
    (dict(logit_bias={-5: 1.0}), "logit_bias=-5"),
    (dict(logit_bias={999: 1.0}), "logit_bias: token 999"),
    (dict(allowed_tokens=[]), "allowed_tokens is empty"),
    (dict(allowed_tokens=[260]), "allowed_tokens: token 260"),
    (dict(allowed_tokens=[5], bad_words=[5]), "no token is left"),
    (dict(num_return_sequences=2), "num_return_sequences=2 of greedy decoding"),
    (dict(num_return_sequences=0, temperature=1), "num_return_sequences=0"),
    (dict(best_of=2), "best_of=2 of greedy decoding"),
    (dict(best_of=2, num_return_sequences=3, temperature=1), "best_of=2 is less"),
    (dict(scorer=len), "scorer has no effect without best_of"),
    (dict(scorer="best", best_of=2, temperature=1), "scorer='best'"),
    (dict(best_of=2, temperature=1, scorer=lambda p, c: "good"), "scorer returned 'good'"),
    (dict(echo="yes"), "echo='yes'"),
  ],
)
def test_impossible_settings_are_named(settings, said):
  with pytest.raises(ValueError) as error:
    infer.generate(tiny.model(), "abc", max_new_tokens=4, **settings)
  assert said in str(error.value)
