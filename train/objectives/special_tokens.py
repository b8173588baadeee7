"""Special tokens that objectives need: which a vocabulary is built with, and where they are."""

from collections.abc import Sequence

from model.errors import InputError
from model.tokenizer import Tokenizer
from model.vocabulary import parse_spec
from train.config import Config

MASKED = ("masked_lm", "replaced_token", "denoising")
SENTINELS = 100  # T5's number.
# Of UL2's modes; the second names are those of the paper (arXiv:2205.05131, section 3.1.2).
MODES = {"R": ("[R]", "[NLU]"), "S": ("[S]", "[S2S]"), "X": ("[X]", "[NLG]")}
_HAVE_A_MASK = ("bytes", "wordpiece")


def extra_tokens(config: Config) -> tuple[str, ...]:
  """Special tokens that the objective needs and the kind of `data.tokenizer` does not have.

  Sentinels are in T5's order, in which the first one has the largest id.
  """
  name, parsed = config.objective.name, parse_spec(config.data.tokenizer)
  if parsed is None:
    return ()
  if name in MASKED:
    return () if parsed[0] in _HAVE_A_MASK else ("<mask>",)
  sentinels = tuple(f"<extra_id_{i}>" for i in reversed(range(SENTINELS)))
  if name == "ul2":
    return tuple(names[0] for names in MODES.values()) + sentinels
  return sentinels if name == "span_corruption" else ()


def bare(config: Config) -> bool:
  """Whether documents come without special tokens, because the objective gives them to pieces."""
  to_decoder = config.model.shape == "encoder_decoder" and config.objective.name == "prefix_lm"
  written = config.objective.name in ("span_corruption", "denoising", "ul2")
  return config.objective.paired or to_decoder or written


def need_mask(tokenizer: Tokenizer, objective: str) -> int:
  """Id of the mask.

  Raises:
    InputError: if there is none.
  """
  if tokenizer.mask_id is None:
    raise InputError(
      f"objective.name={objective!r} needs a mask token and the tokenizer has none: name it as "
      "mask_token in its tokenizer_config.json, or let data.tokenizer='bpe:N' build one."
    )
  return tokenizer.mask_id


def mode_ids(tokenizer: Tokenizer, modes: Sequence[str]) -> tuple[int, ...]:
  """Id of the token of each of UL2's modes.

  Raises:
    InputError: for one that the tokenizer does not have.
  """
  return tuple(_mode_id(tokenizer, mode) for mode in modes)


def _mode_id(tokenizer: Tokenizer, mode: str) -> int:
  for name in MODES[mode]:
    found = tokenizer.backend.token_to_id(name)
    if found is not None:
      return found
  raise InputError(
    f"objective.name='ul2' needs a token for its mode {mode} and the tokenizer has none: add the "
    f"special token {' or '.join(MODES[mode])}, or let data.tokenizer='unigram:N' build one."
  )
