"""What settings of generation may be, each by itself and together."""

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from infer.prefix_cache import PrefixCache
from model.errors import InputError

if TYPE_CHECKING:
  from infer.settings import Settings

CACHE_DTYPES = ("auto", "bfloat16", "float32", "int8")
MOST_NGRAM = 1024  # The longest run of tokens that may be kept from coming again.
CONSTRAINTS = ("json_schema", "regex", "grammar")


def check(s: "Settings") -> None:
  """Looks at every value, and at what does not go together.

  Raises:
    InputError: naming the first that is impossible.
  """
  _whole("min_new_tokens", s.min_new_tokens, least=0)
  if s.max_new_tokens is not None:
    _whole("max_new_tokens", s.max_new_tokens, least=1)
  if s.min_new_tokens > s.most_new_tokens():
    raise InputError(
      f"min_new_tokens={s.min_new_tokens} exceeds max_new_tokens={s.most_new_tokens()}."
    )
  _number("temperature", s.temperature, "at least 0 (0 is greedy)", lambda t: t >= 0)
  if s.top_k is not None:
    _whole("top_k", s.top_k, least=1)
  if s.top_p is not None:
    _number("top_p", s.top_p, "above 0 and at most 1 (leave it out for no limit)",
            lambda p: 0 < p <= 1)  # fmt: skip
  if s.min_p is not None:
    _number("min_p", s.min_p, "between 0 and 1", lambda p: 0 <= p <= 1)
  if s.typical_p is not None:
    _number("typical_p", s.typical_p, "above 0 and at most 1 (leave it out for no limit)",
            lambda p: 0 < p <= 1)  # fmt: skip
  if s.epsilon_cutoff is not None:
    _number("epsilon_cutoff", s.epsilon_cutoff, "at least 0 and below 1",
            lambda p: 0 <= p < 1)  # fmt: skip
  _check_shaping(s)
  constraint_of(s)
  _check_sequences(s)
  _check_reading(s)
  if s.logprobs is not None:
    _whole("logprobs", s.logprobs, least=1)
  for name in () if s.adapter is None else listed("adapter", s.adapter):
    if name is not None and not isinstance(name, str):
      raise InputError(f"adapter={name!r} must be the name of an adapter, or None for the base.")
  for seed in listed("seed", s.seed):
    if not _is_whole(seed) or not 0 <= seed < 2**64:
      raise InputError(f"seed={seed!r} must be a whole number from 0 to 2**64 - 1.")
  for stop in listed("stop", s.stop):
    if isinstance(stop, str) and not stop:
      raise InputError("stop='' is an empty string, which is everywhere: leave it out.")
    if not isinstance(stop, str):
      _whole("stop", stop, least=0)


def _check_shaping(s: "Settings") -> None:
  _number("repetition_penalty", s.repetition_penalty, "above 0 (1 changes nothing)",
          lambda p: p > 0)  # fmt: skip
  for name in ("presence_penalty", "frequency_penalty"):
    _number(name, getattr(s, name), "(0 changes nothing)", lambda p: True)
  if s.no_repeat_ngram_size is not None:
    _whole("no_repeat_ngram_size", s.no_repeat_ngram_size, least=1)
    if s.no_repeat_ngram_size > MOST_NGRAM:
      raise InputError(
        f"no_repeat_ngram_size={s.no_repeat_ngram_size} must be at most {MOST_NGRAM}."
      )
  if isinstance(s.bad_words, str | int) or not hasattr(s.bad_words, "__iter__"):
    raise InputError(f"bad_words={s.bad_words!r} must be a list of texts or token ids.")
  for word in s.bad_words:
    _word("bad_words", word)
  if s.logit_bias is not None and not isinstance(s.logit_bias, Mapping):
    raise InputError(f"logit_bias={s.logit_bias!r} must be a dict from tokens to numbers.")
  for word, bias in (s.logit_bias or {}).items():
    _word("logit_bias", word)
    ruled_out = isinstance(bias, Real) and bias == -math.inf
    if not ruled_out:
      _number(f"logit_bias[{word!r}]", bias, "or -inf", lambda b: True)
  if s.allowed_tokens is not None:
    allowed = listed("allowed_tokens", s.allowed_tokens)
    if not allowed:
      raise InputError("allowed_tokens is empty: no token could be chosen. Leave it out.")
    for token in allowed:
      _whole("allowed_tokens", token, least=0)


def _check_sequences(s: "Settings") -> None:
  _whole("num_return_sequences", s.num_return_sequences, least=1)
  drawn = s.num_return_sequences
  if s.best_of is not None:
    _whole("best_of", s.best_of, least=1)
    if s.best_of < s.num_return_sequences:
      raise InputError(
        f"best_of={s.best_of} is less than num_return_sequences={s.num_return_sequences}."
      )
    drawn = s.best_of
  elif s.scorer != "mean_logprob":
    raise InputError("scorer has no effect without best_of: set how many are drawn.")
  _check_search(s, drawn)
  if drawn > 1 and s.temperature == 0 and s.num_beams == 1:
    name = "num_return_sequences" if s.best_of is None else "best_of"
    raise InputError(f"{name}={drawn} of greedy decoding would all be the same: set temperature.")
  for token in () if isinstance(s.prefix, str) else listed("prefix", s.prefix):
    _whole("prefix", token, least=0)
  if not isinstance(s.echo, bool):
    raise InputError(f"echo={s.echo!r} must be True or False.")


def _check_reading(s: "Settings") -> None:
  """How prompts are read and kept."""
  chunk, prefixes = s.prefill_chunk, s.prefix_cache
  if chunk is not None:
    _whole("prefill_chunk", chunk, least=1)
    if chunk & (chunk - 1):
      raise InputError(f"prefill_chunk={chunk} must be a power of two.")
  if s.cache_dtype not in CACHE_DTYPES:
    raise InputError(f"cache_dtype={s.cache_dtype!r} must be one of {', '.join(CACHE_DTYPES)}.")
  if prefixes is None:
    return
  if not isinstance(prefixes, PrefixCache):
    raise InputError(f"prefix_cache={prefixes!r} must be an infer.PrefixCache of the model.")
  if chunk is not None and chunk < prefixes.block:
    raise InputError(
      f"prefill_chunk={chunk} is less than the prefix_cache's block={prefixes.block}, which is "
      "kept from one pass: set one of them to the other."
    )
  if s.penalty_alpha:
    raise InputError(
      f"prefix_cache does not go with penalty_alpha={s.penalty_alpha}: contrastive search "
      "compares with the hidden states of the whole prompt, which are not kept. Leave it out."
    )


def _check_search(s: "Settings", sequences: int) -> None:
  _whole("num_beams", s.num_beams, least=1)
  _whole("num_beam_groups", s.num_beam_groups, least=1)
  _number("diversity_penalty", s.diversity_penalty, "at least 0", lambda p: p >= 0)
  _number("length_penalty", s.length_penalty, "(0: none)", lambda p: True)
  if not (isinstance(s.early_stopping, bool) or s.early_stopping == "never"):
    raise InputError(f"early_stopping={s.early_stopping!r} must be True, False or 'never'.")
  _number("penalty_alpha", s.penalty_alpha, "from 0 to 1 (0 is off)", lambda a: 0 <= a <= 1)
  if s.penalty_alpha and (s.top_k or 1) < 2:
    raise InputError(
      f"penalty_alpha={s.penalty_alpha} chooses among the top_k most probable tokens, and "
      f"top_k={s.top_k}: set it to 2 or more."
    )
  _check_alone(s)
  if s.speculate is not None:
    _whole("speculate", s.speculate, least=1)
    if s.draft is None:
      raise InputError("speculate has no effect without a draft: name what guesses.")
  model = hasattr(s.draft, "config")
  named = isinstance(s.draft, str) and s.draft.partition(":")[0] in ("lookup", "layers")
  if s.draft is not None and not model and not named:
    raise InputError(
      f"draft={s.draft!r} must be a loaded model, 'lookup', or 'layers:N' (the first N)."
    )
  if s.num_beams == 1:
    searching = dict(
      num_beam_groups=1, diversity_penalty=0.0, length_penalty=1.0, early_stopping=False
    )
    for name, neutral in searching.items():
      if getattr(s, name) != neutral:
        raise InputError(
          f"{name}={getattr(s, name)!r} has no effect without a search: set num_beams."
        )
    return
  if s.num_beams % s.num_beam_groups:
    raise InputError(
      f"num_beams={s.num_beams} is not a multiple of num_beam_groups={s.num_beam_groups}."
    )
  if (s.num_beam_groups > 1) != (s.diversity_penalty > 0):
    raise InputError(
      f"num_beam_groups={s.num_beam_groups} and diversity_penalty={s.diversity_penalty}: "
      "groups differ from each other by a penalty above 0, which one group has no use for."
    )
  if sequences > s.num_beams:
    raise InputError(f"num_return_sequences={sequences} is more than num_beams={s.num_beams} find.")


def _check_alone(s: "Settings") -> None:
  """What does not go with beam search, nor with contrastive search."""
  if s.num_beams == 1 and not s.penalty_alpha:
    return
  beams = s.num_beams > 1
  search = f"num_beams={s.num_beams}" if beams else f"penalty_alpha={s.penalty_alpha}"
  refused: dict[str, Any] = dict(
    temperature=0.0, top_p=None, min_p=None, typical_p=None, epsilon_cutoff=None, best_of=None,
    logprobs=None, draft=None,
  )  # fmt: skip
  refused |= dict(penalty_alpha=0.0, top_k=None) if beams else {}
  for name, neutral in refused.items():
    if getattr(s, name) != neutral:
      raise InputError(
        f"{name}={getattr(s, name)} does not go with {search}, which searches for sequences "
        "by its own rule: leave one of them out."
      )
  if s.stop_strings():
    raise InputError(
      f"stop={s.stop_strings()[0]!r} does not go with {search}: a search ends at token ids; "
      "give these."
    )


def _is_whole(value: Any) -> bool:
  return isinstance(value, Integral) and not isinstance(value, bool)


def _whole(name: str, value: Any, *, least: int) -> None:
  if not _is_whole(value) or not least <= value < 2**31:
    raise InputError(f"{name}={value!r} must be a whole number of at least {least}.")


def _number(name: str, value: Any, wanted: str, allowed) -> None:
  number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
  if not number or not allowed(value):
    raise InputError(f"{name}={value!r} must be a number {wanted}.")


def constraint_of(s: "Settings") -> tuple[str, str] | None:
  """(the setting that says what texts are to be, its text), if one does.

  Raises:
    InputError: for more than one, an empty text, or a schema that is no JSON.
  """
  asked = [name for name in CONSTRAINTS if getattr(s, name) is not None]
  if not asked:
    return None
  if len(asked) > 1:
    raise InputError(f"{' and '.join(asked)} exclude each other: say one thing of a text.")
  name, value = asked[0], getattr(s, asked[0])
  if name == "json_schema":
    return name, _schema(value)
  if not isinstance(value, str) or not value:
    raise InputError(f"{name}={value!r} must be a text, and not an empty one.")
  return name, value


def _schema(value: Any) -> str:
  """A JSON schema as text."""
  if not isinstance(value, str | Mapping):
    raise InputError(f"json_schema={value!r} must be a dict, or JSON as a text.")
  try:
    parsed = json.loads(value) if isinstance(value, str) else value
    return json.dumps(parsed, allow_nan=False)
  except (TypeError, ValueError, RecursionError) as error:
    raise InputError(f"json_schema={value!r} is not JSON ({error}).") from None


def _word(name: str, word: Any) -> None:
  tokens = [word] if isinstance(word, str) or _is_whole(word) else word
  if not isinstance(tokens, Sequence) or not tokens or word == "":
    raise InputError(f"{name}: {word!r} must be a text, a token id or several, and not empty.")
  for token in tokens:
    if not isinstance(word, str):
      _whole(name, token, least=0)


def listed(name: str, value: Any) -> list:
  """One value or several as a list."""
  if isinstance(value, str | Integral):
    return [value]
  if isinstance(value, bytes | dict) or not hasattr(value, "__iter__"):
    raise InputError(f"{name}={value!r} must be one value or a list of them.")
  return list(value)
