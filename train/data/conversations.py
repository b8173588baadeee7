"""Rows of instruction data as conversations, in the forms that are common, and as tokens."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from model.errors import InputError
from model.tokenizer import Tokenizer
from train.data.turns import Message, rendered, token_turns

# Columns that are read where they are there, by form.
FORMS = {
  "messages": ("messages",),
  "conversations": ("conversations",),
  "prompt and completion": ("prompt", "completion"),
  "instruction, input (may be missing) and output": ("instruction", "output"),
}
COLUMNS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output")
# Of ShareGPT's form.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
          "system": "system", "tool": "tool"}  # fmt: skip
# What Stanford Alpaca's models read; used where there is no chat template.
_ALPACA = (
  "Below is an instruction that describes a task{also}. Write a response that appropriately "
  "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_ALPACA_ALSO = ", paired with an input that provides further context"


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Messages, and of each whether it is learned (those of the assistant alone can be)."""

  messages: list[Message]
  learned: list[bool]


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Tokens of a conversation.

  `turns` says of each token which learned message of the assistant it is of, from 1; 0: it is not
  learned. `ends` are the numbers of tokens up to the end of each message of the assistant.
  """

  ids: list[int]
  turns: list[int]
  ends: list[int]


def texts_of(values: Mapping[str, Any]) -> Iterator[str]:
  """What is said in a row, for a vocabulary to be trained on."""
  for value in values.values():
    for part in value if isinstance(value, list) else [value]:
      said = part.get("content", part.get("value")) if isinstance(part, Mapping) else part
      if isinstance(said, str):
        yield said


def conversation(values: Mapping[str, Any], place: str) -> Conversation:
  """What a row holds, as messages.

  Args:
    values: those of COLUMNS, None where the row has none.

  Raises:
    InputError: if a row has none of FORMS, or several, or something else in them.
  """
  form = _form(values, place)
  if form[0] == "messages":
    messages = _messages(values["messages"], f"{place}: messages")
    return Conversation([_plain(m) for m in messages], [_learned(m, place) for m in messages])
  if form[0] == "conversations":
    messages = [_from_sharegpt(m, place) for m in _list(values["conversations"], place)]
    return _answers(messages)
  if form[0] == "prompt":
    return _prompted(values["prompt"], values["completion"], place)
  said = [_text(values[name], f"{place}: {name}") for name in form]
  more = values["input"] or ""
  asked = said[0] if not more else f"{said[0]}\n\n{_text(more, f'{place}: input')}"
  return _answers([dict(role="user", content=asked), dict(role="assistant", content=said[1])])


def encode(values: Mapping[str, Any], tokenizer: Tokenizer, place: str) -> Encoded:
  """A row as tokens, in the tokenizer's chat template; without one, prompt and answer behind each
  other.

  Raises:
    InputError: as `conversation` and `rendered`, or if nothing in it is learned.
  """
  chat = conversation(values, place)
  if tokenizer.config.get("chat_template") is None:
    return _plainly(values, tokenizer, place)
  try:
    text, spans = rendered(tokenizer, chat.messages)
  except InputError as error:
    raise InputError(f"{place}: {error}") from None
  found = tokenizer.backend.encode(text, add_special_tokens=False)
  turns = np.array(token_turns(found.offsets, spans), np.int64)
  told = zip(chat.messages, chat.learned, strict=True)
  answers = [learned for message, learned in told if message["role"] == "assistant"]
  ends = [int(np.flatnonzero(turns == i)[-1]) + 1 if (turns == i).any() else 0
          for i in range(1, len(spans) + 1)]  # fmt: skip
  kept = np.array([0, *(i * learned for i, learned in enumerate(answers, 1))])[turns]
  if not kept.any():
    raise _nothing(place)
  return Encoded(found.ids, kept.tolist(), ends)


def _plainly(values: Mapping[str, Any], tokenizer: Tokenizer, place: str) -> Encoded:
  """Prompt and completion as generation reads and writes them, and the end of a text."""
  form = _form(values, place)
  if form[0] in ("messages", "conversations") or isinstance(values["prompt"], list):
    raise InputError(
      f"{place}: messages need a chat template, and the tokenizer has none: name a file with one "
      "as data.chat_template, or give prompt and completion as texts."
    )
  prompt, answer = values[form[0]], values[form[1]]
  if form[0] == "instruction":
    more = values["input"] or ""
    prompt = _ALPACA.format(
      also=_ALPACA_ALSO if more else "", instruction=prompt,
      input=f"### Input:\n{more}\n\n" if more else "",
    )  # fmt: skip
  before, after = tokenizer.affixes
  if not after and tokenizer.eos_id is not None:
    after = [tokenizer.eos_id]
  if not after:
    raise InputError(
      "an answer ends with the end of text, and the tokenizer has none: name it as eos_token in "
      "its tokenizer_config.json."
    )
  read = [*before, *tokenizer.encode(prompt, add_special_tokens=False)]
  written = [*tokenizer.encode(answer, add_special_tokens=False), *after]
  ids = [*read, *written]
  return Encoded(ids, [0] * len(read) + [1] * len(written), [len(ids)])


def _form(values: Mapping[str, Any], place: str) -> tuple[str, ...]:
  found = [f for f in FORMS.values() if all(values.get(name) is not None for name in f)]
  if len(found) != 1:
    have = [name for name in COLUMNS if values.get(name) is not None]
    raise InputError(
      f"{place} has {', '.join(have) or 'no column of a conversation'}: give one of "
      f"{'; '.join(FORMS)}."
    )
  return found[0]


def _prompted(prompt: Any, completion: Any, place: str) -> Conversation:
  if isinstance(prompt, list) != isinstance(completion, list):
    raise InputError(f"{place}: prompt and completion must both be texts, or lists of messages.")
  if isinstance(prompt, list):
    asked = [_plain(m) for m in _messages(prompt, f"{place}: prompt")]
    said = _messages(completion, f"{place}: completion")
    learned = [False] * len(asked) + [_learned(m, place) for m in said]
    return Conversation([*asked, *map(_plain, said)], learned)
  asked, said = _text(prompt, f"{place}: prompt"), _text(completion, f"{place}: completion")
  return _answers([dict(role="user", content=asked), dict(role="assistant", content=said)])


def _answers(messages: list[Message]) -> Conversation:
  return Conversation(messages, [m["role"] == "assistant" for m in messages])


def _messages(value: Any, place: str) -> list[Message]:
  messages = _list(value, place)
  for i, message in enumerate(messages):
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not role:
      raise InputError(f"{place}: message {i} is {str(message)[:60]!r}: an object with 'role' and "
                       "'content' is needed.")  # fmt: skip
  return messages


def _list(value: Any, place: str) -> list[Any]:
  if not isinstance(value, Sequence) or isinstance(value, str) or not value:
    raise InputError(f"{place} holds {str(value)[:60]!r}: a list of messages is needed.")
  return list(value)


def _from_sharegpt(message: Any, place: str) -> Message:
  said = message if isinstance(message, Mapping) else {}
  role, text = _ROLES.get(said.get("from", "")), said.get("value")
  if role is None or not isinstance(text, str):
    raise InputError(f"{place}: conversations hold {str(message)[:60]!r}: an object with 'from' "
                     f"({', '.join(_ROLES)}) and 'value' is needed.")  # fmt: skip
  return dict(role=role, content=text)


def _learned(message: Message, place: str) -> bool:
  """Whether a message is learned: one of the assistant, whose `weight` is not 0; tables fill it up
  with None where other messages have it.
  """
  weight = message.get("weight")
  if weight not in (None, 0, 1):
    raise InputError(f"{place}: a message has the weight {weight!r}: 0 (not learned) or 1.")
  return message["role"] == "assistant" and weight != 0


def _plain(message: Message) -> Message:
  """A message without what is ours."""
  return {k: v for k, v in message.items() if k != "weight"}


def _text(value: Any, place: str) -> str:
  if not isinstance(value, str):
    raise InputError(f"{place} holds {type(value).__name__}, not text.")
  if not value.strip():
    raise InputError(f"{place} is empty: fill it in, or leave the example out.")
  return value


def _nothing(place: str) -> InputError:
  return InputError(
    f"{place}: nothing in this conversation is learned: it has no message of the assistant whose "
    "weight is not 0. Leave it out."
  )
