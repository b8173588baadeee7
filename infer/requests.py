"""Settings as arrays on the device: a value for each row, neutral where something is off."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from infer.decode import Request
from infer.sampling import (
  OFF_TOP_K,
  Epsilon,
  MinP,
  Sampler,
  Temperature,
  TopK,
  TopP,
  TypicalP,
  seed_words,
)
from infer.settings import Settings, Word
from infer.shaping import (
  AllowedTokens,
  CountPenalty,
  NoRepeatNGram,
  Prefix,
  RepetitionPenalty,
  SequenceBias,
  Shaping,
)
from model.errors import InputError
from model.peft.named import numbers

if TYPE_CHECKING:
  from model import Model

SHAPING = (
  "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size",
  "logit_bias", "bad_words", "allowed_tokens", "prefix",
)  # fmt: skip
LEAST_IDS, LEAST_WORDS, LEAST_WORD = 8, 8, 4  # The smallest sizes of tables.


def request_of(
  m: "Model", settings: Settings, seeds: list[int], sequences: list[int] | None, size: int,
  ends: frozenset[int],
) -> Request:  # fmt: skip
  """What `size` rows ask for, of which the first have seeds.

  Args:
    sequences: the number of each row among the sequences of its prompt; None: each is the first.
    ends: tokens that end a row.
  """
  words: Any = np.zeros((size, 2), np.uint32)
  words[: len(seeds)] = [seed_words(s) for s in seeds]
  number: Any = np.zeros(size, np.int32)
  number[: len(seeds)] = 0 if sequences is None else sequences
  least: Any = np.int32(settings.min_new_tokens)
  vocab = m.config.padded_vocab
  sampler = _sampler(settings, size, words, number)
  return Request(_shaping(m, settings, size), sampler, _ids(ends, vocab), least)


def end_ids(m: "Model", settings: Settings) -> frozenset[int]:
  """Tokens that end a sequence: the settings' stop ids, and the model's, or where it has none the
  tokenizer's end token, or where that names none what its template closes a text with.
  """
  if m.end_ids:
    return frozenset([*settings.stop_ids(), *m.end_ids])
  if m.tokenizer is None:
    return frozenset(settings.stop_ids())
  eos = m.tokenizer.eos_id
  closing = m.tokenizer.affixes[1][-1:] if eos is None else [eos]
  return frozenset([*settings.stop_ids(), *closing])


def adapters_of(m: "Model", settings: Settings, prompts: int) -> list[int] | None:
  """The number of each prompt's adapter among the model's; None: as the model is.

  Raises:
    InputError: for names that the model does not have, or another number of them than of prompts.
  """
  names = settings.adapters(prompts)
  if names is not None:
    return numbers(m, names)
  if m.rows > 1:
    raise InputError(
      f"the model is for batches of {m.rows} rows with an adapter each, and generate makes batches "
      "of its own: name adapters with adapter=."
    )
  return None


def _sampler(settings: Settings, size: int, seed: Any, sequence: Any) -> Sampler:
  tiny, huge = np.finfo(np.float32).tiny, np.finfo(np.float32).max
  rows = lambda value: _rows(size, value, np.float32)
  # What float32 cannot tell from 0 is 0 for a temperature and the least number for a probability.
  share = lambda p: rows(1.0 if p is None else max(p, tiny))
  temperature = 0.0 if settings.temperature < tiny else min(settings.temperature, huge)
  return Sampler(
    temperature=Temperature(rows(temperature)),
    top_k=TopK(_rows(size, OFF_TOP_K if settings.top_k is None else settings.top_k, np.int32)),
    top_p=TopP(share(settings.top_p)),
    min_p=MinP(rows(settings.min_p or 0.0)),
    typical_p=TypicalP(share(settings.typical_p)),
    epsilon=Epsilon(rows(settings.epsilon_cutoff or 0.0)),
    seed=seed,
    sequence=sequence,
  )


def _shaping(m: "Model", settings: Settings, size: int) -> Shaping | None:
  neutral = Settings()
  asked = {name: getattr(settings, name) for name in SHAPING}
  if all(not value or value == getattr(neutral, name) for name, value in asked.items()):
    return None
  rows = lambda value: _rows(size, value, np.float32)
  biases = [(t, b) for word, b in (settings.logit_bias or {}).items() for t in spellings(m, word)]
  bad = [(tokens, -np.inf) for word in settings.bad_words for tokens in spellings(m, word)]
  ngram = settings.no_repeat_ngram_size or 0
  return Shaping(
    bias=_sequence_bias(biases),
    repetition=RepetitionPenalty(rows(settings.repetition_penalty)),
    counts=CountPenalty(rows(settings.presence_penalty), rows(settings.frequency_penalty)),
    ngrams=NoRepeatNGram(_rows(size, ngram, np.int32)),
    bad_words=_sequence_bias(bad),
    allowed=AllowedTokens(_ids(settings.allowed_tokens or (), m.config.padded_vocab)),
    prefix=_prefix(prefix_tokens(m, settings)),
  )


def spellings(m: "Model", word: Word) -> list[tuple[int, ...]]:
  """The tokens of a word: of a text those at the beginning of a text and behind a space.

  Where the latter end with the former, as letter by letter, the former are found in both places.
  """
  if isinstance(word, str):
    tokenizer = m.tokenizer
    if tokenizer is None:
      return []
    encode = lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
    first, behind = encode(word), encode(f" {word}")
    same = behind[-len(first) :] == first
    return [tokens for tokens in ((first,) if same else (first, behind)) if tokens]
  return [tuple(word)] if isinstance(word, Sequence) else [(word,)]


def prefix_tokens(m: "Model", settings: Settings) -> list[int]:
  """The tokens that each completion begins with."""
  if not isinstance(settings.prefix, str):
    return [int(token) for token in settings.prefix]
  return m.tokenizer.encode(settings.prefix, add_special_tokens=False) if m.tokenizer else []


def _prefix(tokens: list[int]) -> Prefix:
  ids: Any = np.zeros(bucket(max(1, len(tokens)), LEAST_IDS), np.int32)
  ids[: len(tokens)] = tokens
  length: Any = np.int32(len(tokens))
  return Prefix(ids, length)


def _sequence_bias(pairs: list[tuple[tuple[int, ...], float]]) -> SequenceBias:
  count = bucket(max(1, len(pairs)), LEAST_WORDS)
  longest = bucket(max([len(tokens) for tokens, _ in pairs], default=1), LEAST_WORD)
  words: Any = np.zeros((count, longest), np.int32)
  lengths: Any = np.zeros(count, np.int32)
  bias: Any = np.zeros(count, np.float32)
  for i, (tokens, value) in enumerate(pairs):
    words[i, : len(tokens)], lengths[i], bias[i] = tokens, len(tokens), value
  return SequenceBias(words, lengths, bias)


def _ids(tokens: Iterable[int], vocab: int) -> Any:
  """Token ids and padding beyond the vocabulary."""
  known = sorted(set(tokens))
  ids: Any = np.full(bucket(max(1, len(known)), LEAST_IDS), vocab, np.int32)
  ids[: len(known)] = known
  return ids


def _rows(size: int, value: Any, dtype: Any) -> Any:
  return np.full(size, value, dtype)


def bucket(size: int, least: int, most: int | None = None) -> int:
  """The power of two, of at least `least` and at most `most`, that has room for `size`."""
  rounded = max(least, 1 << (size - 1).bit_length())
  return rounded if most is None else min(rounded, most)
