"""Constrained output: a text stays within a JSON schema, a regular expression or a Lark grammar.

llguidance says which tokens keep a text within what is asked for. The answer is a bit per token,
computed on the host behind each new token and unpacked on the device, where it rules out the
others. Nothing else is forced: a token is chosen as without a constraint, among those that are
left. A text may end where what is asked for is complete, and must where nothing goes on.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging
from jaxtyping import Int32

from infer.requests import end_ids
from infer.settings import Settings
from infer.text import begins_anew
from model.errors import InputError
from model.tokenizer import Tokenizer
from model.tokenizer_bytes import TokenBytes, token_bytes

if TYPE_CHECKING:
  from model import Model

_BITS = 32  # Of a word of a mask.
_OPTIONS = '%llguidance {"no_forcing": true}'  # It chooses no tokens of its own.


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
  """The tokens of a model as llguidance has them.

  Behind the model's own ids come 256 of single bytes, for what a first token writes, and one that
  ends a text where the model has none.

  Attributes:
    library: llguidance, the module.
    middle, start: its tokenizers, for tokens behind other text and at the beginning of one.
    ends: ids that end a text.
    bytes_from: the id of the first single byte.
    written, ending: masks of the tokens that write something, and of `ends`.
  """

  library: Any
  decode: Callable[[list[int]], str]
  tokens: TokenBytes
  middle: Any
  start: Any
  ends: frozenset[int]
  bytes_from: int
  written: Int32[np.ndarray, "words"]
  ending: Int32[np.ndarray, "words"]
  executor: Any

  def masks(
    self, matchers: Sequence[tuple[Any, int]], rows: int
  ) -> Int32[np.ndarray, "rows words"]:
    """A mask over the model's tokens for each (matcher, row)."""
    filled: Any = np.zeros((rows, -(-self.middle.vocab_size // _BITS)), np.int32)
    if matchers:
      size = filled.shape[1] * filled.itemsize
      self.executor.unsafe_compute_mask_ptr(list(matchers), filled.ctypes.data, size, rows)
    found = np.zeros((rows, len(self.written)), np.int32)
    for matcher, row in matchers:
      legal = self.written | self.ending if matcher.is_accepting() else self.written
      found[row] = filled[row, : len(self.written)] & legal
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Language:
  """What texts are to be, compiled.

  Attributes:
    name: of the setting.
    matcher: before the first token.
    first: a mask of the tokens that a text may have at its very beginning.
    blank: a mask of those that write nothing there.
  """

  name: str
  vocabulary: Vocabulary
  matcher: Any
  first: Int32[np.ndarray, "words"]
  blank: Int32[np.ndarray, "words"]

  def begin(self, prompt: Sequence[int]) -> "Walk":
    """A text before its first token, behind a prompt."""
    known = self.vocabulary
    return Walk(self, anew=known.start is not known.middle and begins_anew(known.decode, prompt))

  def masks(self, walks: "Sequence[Walk | None]") -> Int32[np.ndarray, "rows words"]:
    """A bit for each token that may be next: all for None, none where a text cannot go on."""
    once = {walk: i for i, walk in enumerate(walks) if walk is not None and not walk.anew}
    masks = self.vocabulary.masks([(walk.matcher, i) for walk, i in once.items()], len(walks))
    for i, walk in enumerate(walks):
      if walk is None:
        masks[i] = -1
      elif walk.anew:
        masks[i] = self.first if walk.blank else self.first | self.blank
      else:
        masks[i] = masks[once[walk]]
    return masks


class Walk:
  """A text on its way through a language."""

  def __init__(self, language: Language, *, anew: bool):
    self.language, self.matcher = language, language.matcher.deep_copy()
    self.count = 0  # Tokens.
    self.ended = False
    self.anew, self.blank = anew, False  # At the very beginning of a text, behind a blank token.

  def fork(self) -> "Walk":
    """Another text that is as far."""
    other = copy.copy(self)
    other.matcher = self.matcher.deep_copy()
    return other

  def take(self, token: int) -> None:
    """Goes on by a token that the mask allows."""
    vocabulary = self.language.vocabulary
    self.count += 1
    if token in vocabulary.ends:
      self.ended = True
      return
    if self.anew:
      written = vocabulary.tokens.begins[token]
      self.blank = not written
      self.anew = self.blank and vocabulary.tokens.blanks
      self.matcher.consume_tokens([vocabulary.bytes_from + byte for byte in written])
    else:
      self.matcher.consume_token(token)
    self.ended = not vocabulary.ends and self.matcher.is_stopped() and self.matcher.is_accepting()

  def stuck(self) -> InputError | None:
    """Why a text that no token may follow cannot go on; None if it is complete, and ends."""
    if not self.language.vocabulary.ends and self.count and self.matcher.is_accepting():
      self.ended = True
      return None
    said = _line(self.matcher.get_error())
    return InputError(
      f"after {self.count} new tokens no token of the vocabulary goes on with what "
      f"{self.language.name} asks for{f' ({said})' if said else ''}."
    )


def language_of(m: "Model", settings: Settings) -> Language | None:
  """What the settings say that texts are to be; None where nothing does.

  Raises:
    InputError: if that does not compile, no text of this model's tokens fits it, the model has no
      tokenizer or one that cannot be followed, or llguidance is not installed.
  """
  asked = settings.constraint()
  if asked is None:
    return None
  name, text = asked
  if m.tokenizer is None:
    raise InputError(f"{name} needs a tokenizer, and this model has none: its tokens are no text.")
  own, special = end_ids(m, Settings()), m.tokenizer.special_ids
  ends = frozenset(i for i in end_ids(m, settings) if i in own or i in special)
  searching = settings.num_beams > 1 or settings.penalty_alpha
  if searching and not ends:
    raise InputError(
      f"{name} does not go with a search (num_beams, penalty_alpha) in this model, which has no "
      "token that ends a text: give one as stop."
    )
  return _compiled(_vocabulary(m.tokenizer, m.config.padded_vocab, ends), name, text)


@functools.lru_cache(maxsize=4)  # It takes a second for large vocabularies.
def _vocabulary(tokenizer: Tokenizer, size: int, ends: frozenset[int]) -> Vocabulary:
  try:
    import llguidance
  except ImportError:
    raise InputError(
      "json_schema, regex and grammar need the package llguidance: pip install -e '.[constrain]'."
    ) from None
  tokens = token_bytes(tokenizer)
  words = -(-size // _BITS)
  bytes_from = words * _BITS
  end = bytes_from + 256

  def known(written: list[bytes]) -> Any:
    own = [b"" if i in ends else token for i, token in enumerate(written[:size])]
    own += [b""] * (bytes_from - len(own))
    all_tokens = [*own, *(bytes([byte]) for byte in range(256)), b""]
    wrapped = llguidance.TokenizerWrapper(_Tokens(all_tokens, end))
    return llguidance.LLTokenizer(wrapped, eos_token=sorted(ends) or [end])

  middle = known(tokens.tokens)
  return Vocabulary(
    library=llguidance,
    decode=tokenizer.decode,
    tokens=tokens,
    middle=middle,
    start=middle if tokens.begins is tokens.tokens else known(tokens.begins),
    ends=ends,
    bytes_from=bytes_from,
    written=_mask((i for i, token in enumerate(tokens.tokens[:size]) if token), words),
    ending=_mask((i for i in ends if i < size), words),
    executor=llguidance.LLExecutor(),
  )


class _Tokens:
  """What llguidance asks of a tokenizer. As nothing is forced, no text is ever encoded."""

  bos_token_id = None

  def __init__(self, tokens: list[bytes], end: int):
    self.tokens, self.eos_token_id, self.special_token_ids = tokens, end, [end]

  def __call__(self, text: str | bytes) -> list[int]:
    return []


@functools.lru_cache(maxsize=16)
def _compiled(vocabulary: Vocabulary, name: str, text: str) -> Language:
  source = _source(vocabulary.library, name, text)
  matcher = _matcher(vocabulary, vocabulary.middle, source, name)
  nothing: Any = np.zeros_like(vocabulary.written)
  first, blank = nothing, nothing
  tokens = vocabulary.tokens
  if vocabulary.start is not vocabulary.middle:
    first = vocabulary.masks([(_matcher(vocabulary, vocabulary.start, source, name), 0)], 1)[0]
    blanks = (i for i, pair in enumerate(zip(tokens.tokens, tokens.begins, strict=True))
              if pair[0] and not pair[1])  # fmt: skip
    blank = _mask(blanks, len(vocabulary.written)) & vocabulary.written
  language = Language(name, vocabulary, matcher, first, blank)
  walk = Walk(language, anew=False)
  if not language.masks([walk]).any() and not first.any():
    raise walk.stuck() or InputError(f"{name} allows no text.")
  return language


def _source(library: Any, name: str, text: str) -> str:
  """A grammar of llguidance."""
  if name == "grammar":  # The option comes last, so that errors number lines as the text does.
    return f"{text}\n{_OPTIONS}"
  if name == "regex":
    made = json.loads(library.LLMatcher.grammar_from_regex(text))
    return f"{made['grammars'][0]['lark_grammar']}\n{_OPTIONS}"
  whole = {"name": "whole", "lark_grammar": f"{_OPTIONS}\nstart: @schema"}
  return json.dumps({"grammars": [whole, {"name": "schema", "json_schema": json.loads(text)}]})


def _matcher(vocabulary: Vocabulary, tokenizer: Any, source: str, name: str) -> Any:
  limits = vocabulary.library.LLParserLimits(verbose_errors=False)
  matcher = vocabulary.library.LLMatcher(tokenizer, source, log_level=0, limits=limits)
  if matcher.is_error():
    raise InputError(f"{name} does not compile: {_line(matcher.get_error())}")
  for warning in matcher.get_grammar_warnings():
    logging.warning("%s: %s", name, _line(warning))
  return matcher


def _line(error: str) -> str:
  """A message of llguidance in one line, without what it tells of itself."""
  broke, error = error.startswith("panic"), error.partition("<backtrace>")[0]
  line = " ".join(error.replace("<non-verbose/>", "").replace(_OPTIONS, "").split())
  return f"llguidance broke off, as it does at special tokens ({line})." if broke else line


def _mask(tokens: Any, words: int) -> Int32[np.ndarray, "words"]:
  bits = np.zeros(words * _BITS, np.uint8)
  bits[list(tokens)] = 1
  return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
