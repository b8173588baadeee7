"""Tokens coloured by their probability, in a terminal; as numbers where NO_COLOR is set."""

import math
import os
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from infer.batch import text_of
from infer.prompts import prefix
from infer.text import BROKEN, CONTEXT

if TYPE_CHECKING:
  from infer.generate import Completion
  from model import Model

# The least probability of a colour, and its background among the 256 of a terminal.
_COLOURS = ((0.9, 151), (0.5, 193), (0.1, 229), (0.01, 216), (0.0, 203))
_BLACK, _RESET = 16, "\x1b[0m"
_SHOWN = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
_LONGEST_CHARACTER = 4  # Bytes, so tokens, of a character.


def colourful() -> bool:
  """Whether colours are wanted: NO_COLOR is not set (no-color.org)."""
  return not os.environ.get("NO_COLOR")


def legend() -> str:
  """What the colours, or the numbers, mean."""
  if not colourful():
    return "⟨…⟩ behind a token: its probability in per cent"
  bounds = [least for least, _ in _COLOURS]
  names = [f"{least:.0%} or more" for least in bounds[:-1]] + [f"less than {bounds[-2]:.0%}"]
  parts = (_coloured(f" {name} ", p) for name, p in zip(names, bounds, strict=True))
  return f"probability: {' '.join(parts)}"


def shown(m: "Model", prompt: str | Sequence[int], completion: "Completion") -> str:
  """The completion's tokens with their probabilities, its line breaks kept.

  A character that several tokens make is shown once, with the product of their probabilities; an
  end token by its name. What a stop string left of a token follows without a probability.
  """
  decode, parts, text = text_of(m), [], ""
  probability = lambda places: math.exp(math.fsum(completion.logprobs[i] for i in places))
  for piece, places in pieces(decode, _context(m, prompt), completion.tokens):
    text += piece
    parts.append(_marked(piece or _name(m, completion.tokens[places[-1]]), probability(places)))
  rest = completion.text.removeprefix(text) if completion.text.startswith(text) else ""
  return "".join(parts) + "".join(map(_visible, rest))


def pieces(
  decode: Callable[[list[int]], str], context: Sequence[int], tokens: Sequence[int]
) -> list[tuple[str, list[int]]]:
  """(text, places of its tokens) of each run of tokens that ends where a character does."""
  window = list(context)
  known, run, out = decode(window), [], []
  for i, token in enumerate(tokens):
    window.append(token)
    run.append(i)
    text = decode(window)
    open_ = text.endswith(BROKEN) and len(run) < _LONGEST_CHARACTER
    if open_ and i + 1 < len(tokens):
      continue
    out.append((text[len(known) :], run))
    window, run = window[-CONTEXT:], []
    known = decode(window)
  return out


def _context(m: "Model", prompt: str | Sequence[int]) -> list[int]:
  if isinstance(prompt, str) and m.tokenizer is not None:
    prompt = m.tokenizer.encode_prompt(prompt)
  context = prefix(m, list(prompt))[-CONTEXT:]  # pyright: ignore
  return [] if text_of(m)(context).endswith(BROKEN) else context


def _name(m: "Model", token: int) -> str:
  named = None if m.tokenizer is None else m.tokenizer.backend.id_to_token(token)
  return f"[{token}]" if named is None else named


def _visible(character: str) -> str:
  """A character that cannot be seen, or that would steer the terminal, as one that can be."""
  if character in _SHOWN:
    return _SHOWN[character] + ("\n" if character == "\n" else "")
  if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
    return f"\\u{ord(character):04x}"
  return character


def _marked(text: str, probability: float) -> str:
  text = "".join(map(_visible, text))
  if not colourful():
    body, breaks = text.rstrip("\n"), len(text) - len(text.rstrip("\n"))
    return f"{body}⟨{100 * probability:.0f}⟩" + "\n" * breaks
  return "\n".join(_coloured(line, probability) if line else "" for line in text.split("\n"))


def _coloured(text: str, probability: float) -> str:
  colour = next(colour for least, colour in _COLOURS if probability >= least)
  return f"\x1b[48;5;{colour}m\x1b[38;5;{_BLACK}m{text}{_RESET}"
