"""The settings of generation: declared once, checked once, each impossible value named."""
# ruff: noqa: RUF009

import dataclasses
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from infer.settings_checks import CACHE_DTYPES, check, constraint_of, listed
from infer.text import text_or_file
from model.errors import InputError, nearest

DEFAULT_NEW_TOKENS = 64
# Settings of several values, in anything that can be read from its first to its last.
_LISTS = ("stop", "bad_words", "allowed_tokens", "prefix")
_EACH = ("adapter", "seed")  # One value for every prompt, or one each.
DEFAULT_GUESSES = 4

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
    for name in (*_LISTS, *_EACH):
      value = getattr(self, name)
      one = isinstance(value, str) or (name in _EACH and isinstance(value, Integral))
      if value is not None and not one:  # An iterator could be read only once.
        object.__setattr__(self, name, tuple(listed(name, value)))
    check(self)

  def constraint(self) -> tuple[str, str] | None:
    """(the setting that says what texts are to be, its text), if one does."""
    return constraint_of(self)

  def most_new_tokens(self) -> int:
    """`max_new_tokens`, the default resolved; a model may have room for fewer."""
    return DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

  @property
  def guesses(self) -> int:
    """Tokens that are guessed ahead; 0 without a draft."""
    return 0 if self.draft is None else self.speculate or DEFAULT_GUESSES

  def adapters(self, prompts: int) -> list[str | None] | None:
    """The adapter of each prompt; None: nothing was said of them.

    Raises:
      InputError: if `adapter` is a list of another length.
    """
    return None if self.adapter is None else _for_each("adapter", self.adapter, prompts)

  def stop_strings(self) -> tuple[str, ...]:
    """The stop strings among `stop`."""
    return tuple(s for s in listed("stop", self.stop) if isinstance(s, str))

  def stop_ids(self) -> tuple[int, ...]:
    """The token ids among `stop`."""
    return tuple(int(s) for s in listed("stop", self.stop) if not isinstance(s, str))

  def seeds(self, prompts: int) -> list[int]:
    """The seed of each prompt.

    Raises:
      InputError: if `seed` is a list of another length.
    """
    return [int(seed) for seed in _for_each("seed", self.seed, prompts)]


def _for_each(name: str, value: Any, prompts: int) -> list:
  """One value for all prompts, or those that were given, one each."""
  values = listed(name, value)
  if isinstance(value, str | Integral):
    return values * prompts
  if len(values) != prompts:
    raise InputError(
      f"{name} has {len(values)} values for {prompts} prompts: give one, or one per prompt."
    )
  return values


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
