"""Chat templates: Jinja that comes with a checkpoint, and is trusted with nothing.

A template sees plain values only, in Jinja's sandbox. Its loops and calls are counted and what it
builds is measured, so that none runs or grows without end. Settings, functions and the tag
`generation` are those of Transformers.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from model.errors import InputError

MOST_CHARACTERS = 4_000_000  # Of a rendered conversation, and of any text on the way to it.
MOST_STEPS = 200_000  # Turns of loops, calls and filters of one rendering.
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # Its space shows whether a template strips messages.


def choose(templates: Any, asked: str | None, tools: bool) -> str:
  """The template to use.

  Args:
    templates: what tokenizer_config.json has: a text, several by name, or None.
    asked: a template, or the name of one of several; None: the usual one.
    tools: whether tools are offered.

  Raises:
    InputError: if there is none, or no usual one among several.
  """
  if isinstance(templates, list):
    templates = {one.get("name"): one.get("template") for one in templates}
  if isinstance(templates, dict):
    usual = ("tool_use", "default") if tools else ("default",)
    names = [n for n in (usual if asked is None else (asked,)) if n in templates]
    if not names and asked is None:
      raise InputError(
        f"there are several chat templates and no default: name one of {', '.join(templates)}."
      )
    templates, asked = (templates[names[0]], None) if names else (None, asked)
  found = asked if asked is not None else templates
  if not isinstance(found, str):
    raise InputError(
      "the tokenizer has no chat template: give chat_template=…, or a checkpoint whose "
      "tokenizer_config.json or chat_template.jinja has one."
    )
  return found


def render(
  template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *,
  unfinished: bool = False, marked: bool = False,
) -> tuple[str, list[tuple[int, int]]]:  # fmt: skip
  """The text of a conversation, and the characters [start, end) that the assistant wrote.

  Args:
    variables: what the template may read besides `messages`.
    unfinished: the text ends with the content of the last message.
    marked: the template must mark what the assistant writes with the tag `generation`.

  Raises:
    InputError: if the template fails, or does what it may not.
  """
  chat = _conversation(messages)
  if unfinished:
    _check_unfinished(chat, variables)
    chat[-1]["content"] += _TAG
  compiled = _compiled(template)
  if marked and not compiled.environment.marks:
    raise InputError(
      "the chat template does not mark what the assistant writes ({% generation %})."
    )
  values = _plain(dict(variables), "variables")
  with compiled.environment.lock:
    text, written = _rendered(compiled, {"messages": chat, **values})
  return (_cut(text) if unfinished else text), written


def _rendered(compiled: Any, values: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
  pieces, size = [], 0
  compiled.environment.begin(pieces)
  try:
    for piece in compiled.generate(**values):
      size += len(piece)
      compiled.environment.measure(size)
      pieces.append(piece)
  except Exception as error:  # A template can raise anything.
    raise InputError(f"the chat template fails: {_said(error)}") from None
  return "".join(pieces), compiled.environment.written


def overlapping(offsets: Iterable[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
  """1 for each token that shares a character with a span; both are in order."""
  found, at = [], 0
  for begin, end in offsets:
    while at < len(spans) and begin >= spans[at][1]:
      at += 1
    found.append(int(at < len(spans) and end > spans[at][0]))
  return found


def _conversation(messages: Any) -> list[dict[str, Any]]:
  """Messages as plain values; fields that are None are as if they were not there.

  Raises:
    InputError: if they are no messages.
  """
  if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
    raise InputError("a conversation is a list of messages, each with a role and its content.")
  if not messages:
    raise InputError("the conversation is empty: give at least one message.")
  chat = []
  for i, message in enumerate(messages):
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not role:
      raise InputError(
        f"message {i} is {str(message)[:60]!r}: an object with a text 'role' and 'content' is "
        "needed."
      )
    chat.append(_plain({k: v for k, v in message.items() if v is not None}, f"message {i}"))
  return chat


def _plain(value: Any, name: str) -> Any:
  """The value in the types of JSON, whose methods are known to do no harm."""
  if value is None or isinstance(value, bool):
    return value
  if isinstance(value, str):
    return str(value)
  if isinstance(value, Integral):
    return int(value)
  if isinstance(value, Real):
    return float(value)
  if isinstance(value, Mapping):
    return {str(k): _plain(v, name) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v, name) for v in value]
  raise InputError(
    f"{name} holds a {type(value).__name__}: templates read text, numbers and lists."
  )


def _check_unfinished(chat: list[dict[str, Any]], variables: Mapping[str, Any]) -> None:
  if variables.get("add_generation_prompt"):
    raise InputError(
      "continue_final_message and add_generation_prompt exclude each other: the last message goes "
      "on, or a new one begins."
    )
  if not isinstance(chat[-1].get("content"), str):
    raise InputError("continue_final_message needs a last message whose content is a text.")


def _cut(text: str) -> str:
  """`text` up to the tag at the end of the last message's content."""
  at = text.rfind(_TAG.strip())
  if at < 0:
    raise InputError("the chat template leaves out the end of the last message: it cannot go on.")
  kept = text[:at]
  return kept if text.startswith(_TAG, at) else kept.rstrip()


def _said(error: Exception) -> str:
  if isinstance(error, RecursionError):
    return "it calls itself without end."
  return " ".join(str(error).split())[:300] or type(error).__name__


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
  from jinja2 import TemplateError

  from model.chat_sandbox import Sandbox

  if len(template) > MOST_CHARACTERS:
    raise InputError(
      f"the chat template has {len(template)} characters: at most {MOST_CHARACTERS}."
    )
  try:
    return Sandbox().from_string(template)
  except (TemplateError, RecursionError) as error:
    raise InputError(f"the chat template cannot be read: {_said(error)}") from None
