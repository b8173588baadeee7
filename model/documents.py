"""Text to learn from: spelled special tokens are ordinary, long texts are encoded in parts."""

import json
import re
from collections.abc import Callable, Iterator, Sequence

import tokenizers

LONG = 1 << 18  # Characters from which a document is encoded in parts, to bound memory.
GROUP = 1 << 21  # Characters that are encoded at a time.
_WINDOW = 256  # Characters on each side of a cut that must encode alike cut and whole.
_UNSPELLABLE = "\U0010ffff\ufdd0"  # Noncharacters, in place of special tokens in documents.

Encode = Callable[[Sequence[str]], list[list[int]]]


def without_special(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """The same tokenizer, to which special tokens in a text are ordinary characters.

  A unigram or whole-word vocabulary would still find their spelling, so it is changed.
  """
  form = json.loads(backend.to_str())
  special = {t["content"] for t in form["added_tokens"] if t["special"]}
  hide = lambda token: _UNSPELLABLE + token if token in special else token
  model = form["model"]
  if model["type"] == "Unigram":
    model["vocab"] = [[hide(token), score] for token, score in model["vocab"]]
  else:
    model["vocab"] = {hide(token): i for token, i in model["vocab"].items()}
    if model.get("unk_token") is not None:
      model["unk_token"] = hide(model["unk_token"])
  for token in form["added_tokens"]:
    token["content"] = hide(token["content"])
  found = tokenizers.Tokenizer.from_str(json.dumps(form))
  found.encode_special_tokens = True
  return found


def parts_of(text: str, encode: Encode) -> list[str]:
  """`text` cut at line ends, where the whole is known to encode as its parts do."""
  parts, start = [], 0
  while len(text) - start > LONG:
    places = re.compile(r"(?<=\S)\n(?=\S)").finditer(text, start + LONG // 2, start + LONG)
    cut = next((m.end() for m in places if _separable(text, m.end(), encode)), None)
    if cut is None:
      break
    parts.append(text[start:cut])
    start = cut
  return [*parts, text[start:]]


def _separable(text: str, cut: int, encode: Encode) -> bool:
  left, right = text[cut - _WINDOW : cut], text[cut : cut + _WINDOW]
  whole, before, after = encode([left + right, left, right])
  return whole == before + after


def groups_of(parts: Sequence[str]) -> Iterator[list[str]]:
  """Parts in groups that are encoded at a time."""
  group, size = [], 0
  for part in parts:
    group.append(part)
    size += len(part)
    if size >= GROUP:
      yield group
      group, size = [], 0
  if group:
    yield group
