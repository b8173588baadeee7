"""The bytes that each token stands for in a text, as the tokenizer's decoder writes them."""

import dataclasses
import json
import re
from typing import Any

from model.errors import InputError
from model.tokenizer import Tokenizer
from model.vocabulary import byte_characters

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # A token of one byte beside pieces of text.
_WRITES = ("ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip", "Metaspace")
_VALUES = {c: b for b, c in enumerate(byte_characters())}
_ENDLESS = 1 << 20  # So many spaces or more are all that a text begins with.


@dataclasses.dataclass(frozen=True)
class TokenBytes:
  """What tokens write, by id; b"" for special tokens, which are never part of a text.

  Attributes:
    tokens: behind other text.
    begins: at the very beginning of a text, where decoders drop the space in front of a word.
    blanks: whether more spaces are dropped behind a first token that writes nothing.
  """

  tokens: list[bytes]
  begins: list[bytes]
  blanks: bool


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
  """The bytes of all tokens: of a text they are those of its tokens in a row.

  Raises:
    InputError: for a decoder that writes a token otherwise beside another, as WordPiece's does.
  """
  form = json.loads(tokenizer.backend.to_str())
  steps = _steps(form["decoder"])
  size = tokenizer.vocab_size
  names: list[str | None] = [None] * size
  for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items():
    names[i] = None if i in tokenizer.special_ids else token
  tokens = [b"" if name is None else _written(name, steps) for name in names]
  dropped = next((s["start"] for s in steps if s["type"] == "Strip"), 0)
  begins, blanks = tokens, dropped >= _ENDLESS
  if dropped:
    begins = [token[min(dropped, len(token) - len(token.lstrip(b" "))) :] for token in tokens]
  mark = next((_dropped_mark(s) for s in steps if s["type"] == "Metaspace"), None)
  if mark is not None:  # All of them in a first token, and none behind it.
    names = [name and name.replace(mark, "") for name in names]
    begins = [b"" if name is None else _written(name, steps) for name in names]
  return TokenBytes(tokens, begins, blanks)


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
  """The decoders that follow each other, all known to write a token alike wherever it is."""
  if decoder is None:
    raise _unknown("none, which puts spaces between tokens")
  steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
  if any(step["type"] == "Sequence" for step in steps):
    steps = [inner for step in steps for inner in _steps(step)]
  for i, step in enumerate(steps):
    if step["type"] not in _WRITES:
      raise _unknown(step["type"])
    if step["type"] == "Replace" and "String" not in step["pattern"]:
      raise _unknown("Replace with a pattern")
    fused = any(before["type"] == "Fuse" for before in steps[:i])
    if step["type"] == "Strip":
      spaces = step["content"] == " " and (step["start"] in (0, 1) or step["start"] >= _ENDLESS)
      if not spaces or step["stop"] or not fused:
        raise _unknown("Strip of other than one or all spaces before a text")
  return steps


def _unknown(what: str) -> InputError:
  return InputError(
    f"the tokenizer's decoder is {what}: what a token writes depends on those beside it, so that "
    "a text cannot be constrained token by token. Byte-level BPE and SentencePiece can."
  )


def _dropped_mark(step: dict[str, Any]) -> str | None:
  return step["replacement"] if step["prepend_scheme"] != "never" else None


def _written(token: str, steps: list[dict[str, Any]]) -> bytes:
  for step in steps:
    if step["type"] == "Replace":
      token = token.replace(step["pattern"]["String"], step["content"])
    elif step["type"] == "Metaspace":
      token = token.replace(step["replacement"], " ")
    elif step["type"] == "ByteFallback" and (found := _BYTE.fullmatch(token)):
      return bytes.fromhex(found[1])
    elif step["type"] == "ByteLevel" and all(c in _VALUES for c in token):
      return bytes(_VALUES[c] for c in token)
  return token.encode()
