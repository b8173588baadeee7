"""The settings of generation: declared once, checked once, each impossible value named."""
# ruff: noqa: RUF009

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from infer.prefix_cache import PrefixCache
from infer.text import text_or_file
from model.errors import InputError, nearest

DEFAULT_NEW_TOKENS = 64
DEFAULT_GUESSES = 4
CACHE_DTYPES = ("auto", "bfloat16", "float32", "int8")
MOST_NGRAM = 1024  # The longest run of tokens that may be kept from coming again.

CONSTRAINTS = ("json_schema", "regex", "grammar")

Word = str | int | Sequence[int]  # A text, a token or several.
Biases = Mapping[Word, float]  # Several tokens are a tuple.


def _names(_: str, written: list[str]) -> str | list[str | None]:
  """One name for all, or one each; `none` is None."""
  names = [None if text == "none" else text for text in written]
  return names if len(names) > 1 or names[0] is None else names[0]


def told(
  default: Any, text: str, *, written: Any = None, choices: Sequence[str] = (), read: Any = None,
  flag: str | None = None,
) -> Any:  # fmt: skip
  """A setting: its default, and how `python -m infer` has it as a flag (see infer.setting_flags).

  Args:
    text: what --help says.
    written: the type of what is written on the command line; None: that of the field.
    choices: the texts that may be written; (): any.
    read: makes the value of (name, text).
    flag: its name as a flag; None: that of the field.
  """
  how = dict(help=text, written=written, choices=choices, read=read, flag=flag)
  return dataclasses.field(default=default, metadata=how)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What `infer.generate` takes, with Transformers' meaning where it has the same thing."""

  max_new_tokens: int | None = told(None, "The most tokens to add; none: 64, if there is room.")
  min_new_tokens: int = told(0, "No end token, stop token or stop string counts before so many.")
  stop: Sequence[str | int] | str | int = told((), "End before this text, or at this token id.")
  temperature: float = told(0.0, "Spread of the draw; 0 is greedy.")
  top_k: int | None = told(None, "Draw from the k most probable tokens.")
  top_p: float | None = told(None, "Draw from the most probable tokens that sum to p.")
  min_p: float | None = told(None, "Draw from tokens at least p times as probable as the best.")
  typical_p: float | None = told(
    None, "Draw from tokens of about the expected surprise that sum to p."
  )
  epsilon_cutoff: float | None = told(None, "Draw from tokens of at least this probability.")
  adapter: str | Sequence[str | None] | None = told(
    None, "Of the adapters that the model has by name: one for every prompt, or one each; none: "
    "the base.", read=_names, flag="prompt_adapter",
  )  # fmt: skip
  seed: int | Sequence[int] = told(0, "Of the draws: one for every prompt, or one each.")
  repetition_penalty: float = told(1.0, "Above 1: against tokens of prompt and text (CTRL).")
  presence_penalty: float = told(0.0, "Taken off the scores of tokens that the text has.")
  frequency_penalty: float = told(0.0, "Taken off as often as the text has them.")
  no_repeat_ngram_size: int | None = told(None, "No run of so many tokens is there twice.")
  logit_bias: Biases | None = told(
    None, "Added to a token's score; of several tokens, to the last one's."
  )
  bad_words: Sequence[Word] = told((), "Never said; a text is meant with a space before it too.")
  allowed_tokens: Sequence[int] | None = told(None, "Token ids besides which none is chosen.")
  num_return_sequences: int = told(1, "Sequences of each prompt, which follow each other.")
  best_of: int | None = told(None, "Draw so many of each prompt and keep the scorer's best.")
  scorer: Any = told("mean_logprob", "What is best: 'mean_logprob', or a reward model.")
  prefix: str | Sequence[int] = told((), "What each completion begins with.")
  json_schema: str | Mapping[str, Any] | None = told(
    None, "Each text is JSON of this schema; or a file of it.", written=str, read=text_or_file
  )
  regex: str | None = told(None, "All of each text is what this regular expression matches.")
  grammar: str | None = told(
    None, "Each text is what this Lark grammar makes; or a file of it.", read=text_or_file
  )
  penalty_alpha: float = told(0.0, "Contrastive search among top_k tokens: against likeness.")
  num_beams: int = told(1, "Sequences that a search goes on with; 1: no search.")
  num_beam_groups: int = told(1, "Groups of beams that are to differ from each other.")
  diversity_penalty: float = told(0.0, "For each time that groups before just chose a token.")
  length_penalty: float = told(1.0, "Power of the length that a sequence's score is divided by.")
  early_stopping: bool | str = told(
    False, "When a search ends: true: num_beams have ended; never: proven best; false: about so."
  )
  draft: Any = told(
    None, "What guesses tokens ahead: a model, 'lookup' or 'layers:N' (early layers)."
  )
  speculate: int | None = told(None, "Tokens that draft guesses at a time; none: 4.")
  prefill_chunk: int | None = told(None, "Tokens of a prompt that are read at a time; none: 256.")
  cache_dtype: str = told(
    "auto", "Of keys and values that are kept; auto: what is computed in.",
    choices=tuple(CACHE_DTYPES),
  )  # fmt: skip
  prefix_cache: Any = told(
    None, "Beginnings that prompts share are read once (a PrefixCache).", written=bool
  )
  logprobs: int | None = told(None, "Also report so many of the most probable tokens.")
  echo: bool = told(False, "Also report the log-probabilities of the prompt's tokens.")

  def __post_init__(self):
    _whole("min_new_tokens", self.min_new_tokens, least=0)
    if self.max_new_tokens is not None:
      _whole("max_new_tokens", self.max_new_tokens, least=1)
    if self.min_new_tokens > self.most_new_tokens():
      raise InputError(
        f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.most_new_tokens()}."
      )
    _number("temperature", self.temperature, "at least 0 (0 is greedy)", lambda t: t >= 0)
    if self.top_k is not None:
      _whole("top_k", self.top_k, least=1)
    if self.top_p is not None:
      _number("top_p", self.top_p, "above 0 and at most 1 (leave it out for no limit)",
              lambda p: 0 < p <= 1)  # fmt: skip
    if self.min_p is not None:
      _number("min_p", self.min_p, "between 0 and 1", lambda p: 0 <= p <= 1)
    if self.typical_p is not None:
      _number("typical_p", self.typical_p, "above 0 and at most 1 (leave it out for no limit)",
              lambda p: 0 < p <= 1)  # fmt: skip
    if self.epsilon_cutoff is not None:
      _number("epsilon_cutoff", self.epsilon_cutoff, "at least 0 and below 1",
              lambda p: 0 <= p < 1)  # fmt: skip
    self._check_shaping()
    self.constraint()
    self._check_sequences()
    self._check_reading()
    if self.logprobs is not None:
      _whole("logprobs", self.logprobs, least=1)
    for name in [] if self.adapter is None else self._adapters():
      if name is not None and not isinstance(name, str):
        raise InputError(f"adapter={name!r} must be the name of an adapter, or None for the base.")
    for seed in self._seeds():
      if not _is_whole(seed) or not 0 <= seed < 2**64:
        raise InputError(f"seed={seed!r} must be a whole number from 0 to 2**64 - 1.")
    for stop in self._stops():
      if isinstance(stop, str) and not stop:
        raise InputError("stop='' is an empty string, which is everywhere: leave it out.")
      if not isinstance(stop, str):
        _whole("stop", stop, least=0)

  def _check_shaping(self) -> None:
    _number("repetition_penalty", self.repetition_penalty, "above 0 (1 changes nothing)",
            lambda p: p > 0)  # fmt: skip
    for name in ("presence_penalty", "frequency_penalty"):
      _number(name, getattr(self, name), "(0 changes nothing)", lambda p: True)
    if self.no_repeat_ngram_size is not None:
      _whole("no_repeat_ngram_size", self.no_repeat_ngram_size, least=1)
      if self.no_repeat_ngram_size > MOST_NGRAM:
        raise InputError(
          f"no_repeat_ngram_size={self.no_repeat_ngram_size} must be at most {MOST_NGRAM}."
        )
    if isinstance(self.bad_words, str | int) or not hasattr(self.bad_words, "__iter__"):
      raise InputError(f"bad_words={self.bad_words!r} must be a list of texts or token ids.")
    for word in self.bad_words:
      _word("bad_words", word)
    if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
      raise InputError(f"logit_bias={self.logit_bias!r} must be a dict from tokens to numbers.")
    for word, bias in (self.logit_bias or {}).items():
      _word("logit_bias", word)
      ruled_out = isinstance(bias, Real) and bias == -math.inf
      if not ruled_out:
        _number(f"logit_bias[{word!r}]", bias, "or -inf", lambda b: True)
    if self.allowed_tokens is not None:
      allowed = _items("allowed_tokens", self.allowed_tokens)
      if not allowed:
        raise InputError("allowed_tokens is empty: no token could be chosen. Leave it out.")
      for token in allowed:
        _whole("allowed_tokens", token, least=0)

  def _check_sequences(self) -> None:
    _whole("num_return_sequences", self.num_return_sequences, least=1)
    drawn = self.num_return_sequences
    if self.best_of is not None:
      _whole("best_of", self.best_of, least=1)
      if self.best_of < self.num_return_sequences:
        raise InputError(
          f"best_of={self.best_of} is less than num_return_sequences={self.num_return_sequences}."
        )
      drawn = self.best_of
    elif self.scorer != "mean_logprob":
      raise InputError("scorer has no effect without best_of: set how many are drawn.")
    self._check_search(drawn)
    if drawn > 1 and self.temperature == 0 and self.num_beams == 1:
      name = "num_return_sequences" if self.best_of is None else "best_of"
      raise InputError(f"{name}={drawn} of greedy decoding would all be the same: set temperature.")
    for token in () if isinstance(self.prefix, str) else _items("prefix", self.prefix):
      _whole("prefix", token, least=0)
    if not isinstance(self.echo, bool):
      raise InputError(f"echo={self.echo!r} must be True or False.")

  def _check_reading(self) -> None:
    """How prompts are read and kept."""
    chunk, prefixes = self.prefill_chunk, self.prefix_cache
    if chunk is not None:
      _whole("prefill_chunk", chunk, least=1)
      if chunk & (chunk - 1):
        raise InputError(f"prefill_chunk={chunk} must be a power of two.")
    if self.cache_dtype not in CACHE_DTYPES:
      raise InputError(
        f"cache_dtype={self.cache_dtype!r} must be one of {', '.join(CACHE_DTYPES)}."
      )
    if prefixes is None:
      return
    if not isinstance(prefixes, PrefixCache):
      raise InputError(f"prefix_cache={prefixes!r} must be an infer.PrefixCache of the model.")
    if chunk is not None and chunk < prefixes.block:
      raise InputError(
        f"prefill_chunk={chunk} is less than the prefix_cache's block={prefixes.block}, which is "
        "kept from one pass: set one of them to the other."
      )
    if self.penalty_alpha:
      raise InputError(
        f"prefix_cache does not go with penalty_alpha={self.penalty_alpha}: contrastive search "
        "compares with the hidden states of the whole prompt, which are not kept. Leave it out."
      )

  def _check_search(self, sequences: int) -> None:
    _whole("num_beams", self.num_beams, least=1)
    _whole("num_beam_groups", self.num_beam_groups, least=1)
    _number("diversity_penalty", self.diversity_penalty, "at least 0", lambda p: p >= 0)
    _number("length_penalty", self.length_penalty, "(0: none)", lambda p: True)
    if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
      raise InputError(f"early_stopping={self.early_stopping!r} must be True, False or 'never'.")
    _number("penalty_alpha", self.penalty_alpha, "from 0 to 1 (0 is off)", lambda a: 0 <= a <= 1)
    if self.penalty_alpha and (self.top_k or 1) < 2:
      raise InputError(
        f"penalty_alpha={self.penalty_alpha} chooses among the top_k most probable tokens, and "
        f"top_k={self.top_k}: set it to 2 or more."
      )
    self._check_alone()
    if self.speculate is not None:
      _whole("speculate", self.speculate, least=1)
      if self.draft is None:
        raise InputError("speculate has no effect without a draft: name what guesses.")
    model = hasattr(self.draft, "config")
    named = isinstance(self.draft, str) and self.draft.partition(":")[0] in ("lookup", "layers")
    if self.draft is not None and not model and not named:
      raise InputError(
        f"draft={self.draft!r} must be a loaded model, 'lookup', or 'layers:N' (the first N)."
      )
    if self.num_beams == 1:
      searching = dict(
        num_beam_groups=1, diversity_penalty=0.0, length_penalty=1.0, early_stopping=False
      )
      for name, neutral in searching.items():
        if getattr(self, name) != neutral:
          raise InputError(
            f"{name}={getattr(self, name)!r} has no effect without a search: set num_beams."
          )
      return
    if self.num_beams % self.num_beam_groups:
      raise InputError(
        f"num_beams={self.num_beams} is not a multiple of num_beam_groups={self.num_beam_groups}."
      )
    if (self.num_beam_groups > 1) != (self.diversity_penalty > 0):
      raise InputError(
        f"num_beam_groups={self.num_beam_groups} and diversity_penalty={self.diversity_penalty}: "
        "groups differ from each other by a penalty above 0, which one group has no use for."
      )
    if sequences > self.num_beams:
      raise InputError(
        f"num_return_sequences={sequences} is more than num_beams={self.num_beams} find."
      )

  def _check_alone(self) -> None:
    """What does not go with beam search, nor with contrastive search."""
    if self.num_beams == 1 and not self.penalty_alpha:
      return
    beams = self.num_beams > 1
    search = f"num_beams={self.num_beams}" if beams else f"penalty_alpha={self.penalty_alpha}"
    refused: dict[str, Any] = dict(
      temperature=0.0, top_p=None, min_p=None, typical_p=None, epsilon_cutoff=None, best_of=None,
      logprobs=None, draft=None,
    )  # fmt: skip
    refused |= dict(penalty_alpha=0.0, top_k=None) if beams else {}
    for name, neutral in refused.items():
      if getattr(self, name) != neutral:
        raise InputError(
          f"{name}={getattr(self, name)} does not go with {search}, which searches for sequences "
          "by its own rule: leave one of them out."
        )
    if self.stop_strings():
      raise InputError(
        f"stop={self.stop_strings()[0]!r} does not go with {search}: a search ends at token ids; "
        "give these."
      )

  def constraint(self) -> tuple[str, str] | None:
    """(the setting that says what texts are to be, its text), if one does.

    Raises:
      InputError: for more than one, an empty text, or a schema that is no JSON.
    """
    asked = [name for name in CONSTRAINTS if getattr(self, name) is not None]
    if not asked:
      return None
    if len(asked) > 1:
      raise InputError(f"{' and '.join(asked)} exclude each other: say one thing of a text.")
    name, value = asked[0], getattr(self, asked[0])
    if name == "json_schema":
      return name, _schema(value)
    if not isinstance(value, str) or not value:
      raise InputError(f"{name}={value!r} must be a text, and not an empty one.")
    return name, value

  def most_new_tokens(self) -> int:
    """`max_new_tokens`, the default resolved; a model may have room for fewer."""
    return DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

  @property
  def guesses(self) -> int:
    """Tokens that are guessed ahead; 0 without a draft."""
    return 0 if self.draft is None else self.speculate or DEFAULT_GUESSES

  def _stops(self) -> list[str | int]:
    return [self.stop] if isinstance(self.stop, str | int) else _items("stop", self.stop)

  def _seeds(self) -> list[int]:
    return [self.seed] if isinstance(self.seed, int) else _items("seed", self.seed)

  def _adapters(self) -> list[str | None]:
    return [self.adapter] if isinstance(self.adapter, str) else _items("adapter", self.adapter)

  def adapters(self, prompts: int) -> list[str | None] | None:
    """The adapter of each prompt; None: nothing was said of them.

    Raises:
      InputError: if `adapter` is a list of another length.
    """
    if self.adapter is None:
      return None
    names = self._adapters()
    if isinstance(self.adapter, str):
      return names * prompts
    if len(names) != prompts:
      raise InputError(
        f"adapter has {len(names)} names for {prompts} prompts: give one, or one per prompt."
      )
    return names

  def stop_strings(self) -> tuple[str, ...]:
    """The stop strings among `stop`."""
    return tuple(s for s in self._stops() if isinstance(s, str))

  def stop_ids(self) -> tuple[int, ...]:
    """The token ids among `stop`."""
    return tuple(int(s) for s in self._stops() if not isinstance(s, str))

  def seeds(self, prompts: int) -> list[int]:
    """The seed of each prompt.

    Raises:
      InputError: if `seed` is a list of another length.
    """
    seeds = [int(s) for s in self._seeds()]
    if isinstance(self.seed, Integral):
      return seeds * prompts
    if len(seeds) != prompts:
      raise InputError(
        f"seed has {len(seeds)} values for {prompts} prompts: give one number, or one per prompt."
      )
    return seeds


def settings_of(values: dict[str, Any]) -> Settings:
  """The settings of keyword arguments.

  Raises:
    InputError: for an unknown name, with the nearest ones, or an impossible value.
  """
  known = [f.name for f in dataclasses.fields(Settings)]
  for name in values:
    if name not in known:
      raise InputError(
        f"unknown setting {name!r} of generate.{nearest(name, known)} Known: {', '.join(known)}."
      )
  return Settings(**values)


def _is_whole(value: Any) -> bool:
  return isinstance(value, Integral) and not isinstance(value, bool)


def _whole(name: str, value: Any, *, least: int) -> None:
  if not _is_whole(value) or not least <= value < 2**31:
    raise InputError(f"{name}={value!r} must be a whole number of at least {least}.")


def _number(name: str, value: Any, wanted: str, allowed) -> None:
  number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
  if not number or not allowed(value):
    raise InputError(f"{name}={value!r} must be a number {wanted}.")


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


def _items(name: str, value: Any) -> list:
  if isinstance(value, Integral):  # NumPy's.
    return [value]
  if isinstance(value, str | bytes | dict) or not hasattr(value, "__iter__"):
    raise InputError(f"{name}={value!r} must be one value or a list of them.")
  return list(value)
