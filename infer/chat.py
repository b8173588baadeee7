"""Prompts as messages: what a chat template makes of them, and where an answer ends."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.errors import InputError
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
  from model import Model

_ANSWER = "ANSWER"


def as_messages(m: "Model", texts: Sequence[str]) -> list[list[int]]:
  """Token ids of conversations that begin with these messages, where the assistant is to answer.

  Raises:
    InputError: if the model has no chat template, or that refuses a message.
  """
  tokenizer = _tokenizer(m)
  ask = lambda text: tokenizer.apply_chat_template(
    [{"role": "user", "content": text}], add_generation_prompt=True
  )
  return [list(ask(text)) for text in texts]  # pyright: ignore


def turn_ends(m: "Model") -> list[int]:
  """The special token that the template writes behind an answer, where there is one."""
  tokenizer = _tokenizer(m)
  said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
  try:
    text = str(tokenizer.apply_chat_template(said, tokenize=False))
  except InputError:  # It may want a system's message first.
    return []
  _, found, rest = text.rpartition(_ANSWER)
  ids = tokenizer.encode(rest.lstrip(), add_special_tokens=False) if found else []
  return [i for i in ids[:1] if i in tokenizer.special_ids]


def _tokenizer(m: "Model") -> Tokenizer:
  if m.tokenizer is None:
    raise InputError("a chat needs a tokenizer and this model has none.")
  return m.tokenizer
