"""From tokens to text while they come: whole characters only, an end at the first stop string.

Tokens are decoded after the last ones of the prompt, so that a word keeps the space in front of it
and prompt + text reads as the whole would.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from model.errors import InputError

BROKEN = "\N{REPLACEMENT CHARACTER}"  # What decoders give for bytes that are no character (yet).
CONTEXT = 8  # Tokens of the prompt that the text of the first new token is decoded with.


class Transcript:
  """The text of one growing sequence.

  `text` holds the characters that are complete. A stop string ends the sequence when its last
  character is there; what comes first in the text wins among those that one token completes. Stop
  strings are looked for behind the first `min_tokens` tokens.
  """

  def __init__(
    self, decode: Callable[[list[int]], str], prompt: Sequence[int], *,
    stop: tuple[str, ...] = (), min_tokens: int = 0,
  ):  # fmt: skip
    context = _context(decode, prompt)
    self.text = ""
    self.cut: int | None = None  # Where in `text` the stop string begins.
    self._decode, self._stop, self._min_tokens = decode, stop, min_tokens
    self._window, self._known = list(context), decode(context)
    self._read = len(context)  # Tokens of the window whose text is in `text` or before it.
    self._ends: list[int] = []  # Length of the text after each token, a begun character included.

  def push(self, token: int) -> bool:
    """Adds a token; True when a stop string is complete."""
    self._window.append(token)
    old, text = len(self.text), self._decode(self._window)
    if not text.endswith(BROKEN):
      self.text += text[len(self._known) :]
      self._window = self._window[self._read :]
      self._read, self._known = len(self._window), self._decode(self._window)
    elif len(self._window) - self._read > 3:
      # A character has at most four bytes: what lies further back will not become one any more.
      self._read = len(self._window) - 3
      known = self._decode(self._window[: self._read])
      self.text += known[len(self._known) :]
      self._known = known
    self._ends.append(len(self.text) + (self._read < len(self._window)))
    return self._find_stop(old)

  def shown(self) -> str:
    """The text that nothing can take back: without a tail that may begin a stop string."""
    if self.cut is not None:
      return self.text[: self.cut]
    held = max((_overlap(self.text, s) for s in self._stop), default=0)
    return self.text[: len(self.text) - held]

  def close(self) -> tuple[str, int]:
    """The text before the stop string, and how many of the tokens lie wholly in it.

    The token that the stop string begins in is not among them.
    """
    return self.text[: self.cut], sum(end <= (self.cut or 0) for end in self._ends)

  def _find_stop(self, old: int) -> bool:
    if len(self._ends) <= self._min_tokens or self.cut is not None:
      return self.cut is not None
    least = self._ends[self._min_tokens - 1] if self._min_tokens else 0
    begins = [self.text.find(s, max(least, old - len(s) + 1)) for s in self._stop]
    self.cut = min((b for b in begins if b >= 0), default=None)
    return self.cut is not None


def continuation(
  decode: Callable[[list[int]], str], prompt: Sequence[int], tokens: Sequence[int]
) -> str:
  """The text that `tokens` add to that of `prompt`."""
  context = _context(decode, prompt)
  return decode([*context, *tokens])[len(decode(context)) :]


def begins_anew(decode: Callable[[list[int]], str], prompt: Sequence[int]) -> bool:
  """Whether nothing is written before the text of new tokens, from which decoders may then drop a
  space."""
  return not decode(_context(decode, prompt))


def _context(decode: Callable[[list[int]], str], prompt: Sequence[int]) -> list[int]:
  """The end of the prompt that new tokens are decoded with; none if it breaks a character."""
  context = list(prompt[-CONTEXT:])
  return [] if decode(context).endswith(BROKEN) else context


def _overlap(text: str, stop: str) -> int:
  """Characters at the end of `text` that begin `stop`."""
  longest = min(len(stop) - 1, len(text))
  return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def text_or_file(name: str, value: str | None) -> str | None:
  """What a flag says: a schema or a grammar itself, or the path of a file that holds it.

  Raises:
    InputError: for what is neither, or a file that is no text.
  """
  if value is None or value.lstrip()[:1] == "{" or "\n" in value:
    return value
  try:
    if Path(value).is_file():
      return Path(value).read_text(encoding="utf-8")
  except (OSError, ValueError) as error:
    raise InputError(f"--{name}={value} cannot be read: {error}.") from None
  if name == "grammar" and ":" not in value:
    raise InputError(f"--grammar={value} is no file, and no Lark grammar such as 'start: \"yes\"'.")
  if name == "json_schema" and value not in ("true", "false"):
    raise InputError(f"--json_schema={value} is no file, and no JSON object.")
  return value


def text_of_file(path: str) -> str:
  """The text that a command is given as --data.

  Raises:
    InputError: for a file that cannot be read, or is not UTF-8.
  """
  try:
    return Path(path).expanduser().read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"--data={path!r} is no text in UTF-8 that can be read: {error}.") from None
