"""What the assistant wrote in a rendered conversation, found from the chat template itself."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from model.chat import overlapping
from model.errors import InputError
from model.tokenizer import Tokenizer

Message = dict[str, Any]
Span = tuple[int, int]  # Characters [begin, end).
Render = Callable[..., str]

_HOW = (
  "Mark what it writes in the template, for example {% generation %}{{ message['content'] }}"
  "{{ eos_token }}{% endgeneration %}, and name that file as data.chat_template."
)


def rendered(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, list[Span]]:
  """The text of a conversation, and the characters of each message of the assistant, in order.

  A message is what the model has to write: what the template makes of its content, and what ends
  the turn, such as `<|im_end|>`. Where the template has the tag `generation`, that says it.
  Elsewhere the content is replaced by a word that stands nowhere else, and what changes is the
  content.

  Raises:
    InputError: if the template fails, or does not tell which characters are a message's.
  """
  text, written = tokenizer.render_chat(messages)
  places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
  if written:
    if len(written) != len(places):
      raise InputError(
        f"the chat template marks {len(written)} answers ({{% generation %}}) of a conversation "
        f"with {len(places)}: each message of the assistant needs one."
      )
    return text, written
  render = lambda chat, **variables: tokenizer.render_chat(chat, **variables)[0]
  special = [tokenizer.backend.id_to_token(i) or "" for i in tokenizer.special_ids]
  spans = [_turn(render, text, messages, i, special) for i in places]
  ends = [0, *(end for _, end in spans)]
  if any(begin < end for (begin, _), end in zip(spans, ends, strict=False)):
    raise _unclear(text, "they overlap")
  return text, spans


def token_turns(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
  """The number of the span, from 1, that each token shares a character with; 0: of none."""
  turns = [0] * len(offsets)
  for number, span in enumerate(spans, 1):
    for i, shared in enumerate(overlapping(offsets, [span])):
      turns[i] = turns[i] or number * shared
  return turns


def _turn(
  render: Render, text: str, messages: Sequence[Message], i: int, special: list[str]
) -> Span:
  """The characters of message i."""
  content = messages[i].get("content")
  if isinstance(content, str) and content.strip():
    begin, end = _content(render, text, messages, i)
    return begin, end + _closing(render, text, messages, i, end, special)
  before, whole = _asked(render, messages, i), _rendered_or_empty(render, messages[: i + 1])
  # Calls of tools, or a list of parts: what the message adds to the text.
  if not before or not (text.startswith(whole) and whole.startswith(before) and whole != before):
    raise _unclear(text, f"message {i} has no text that could be looked for")
  kept = whole.rstrip()
  return len(before), max(len(kept), len(before))


def _asked(render: Render, messages: Sequence[Message], i: int) -> str:
  """What the model reads when it is to write message i."""
  return _rendered_or_empty(render, messages[:i], add_generation_prompt=True) if i else ""


def _content(render: Render, text: str, messages: Sequence[Message], i: int) -> Span:
  """The characters that the template makes of the content of message i."""
  word = _word(text)
  parts = render([*messages[:i], messages[i] | {"content": word}, *messages[i + 1 :]]).split(word)
  if len(parts) != 2:
    raise _unclear(text, f"message {i} stands in it {len(parts) - 1} times")
  before, after = parts
  begin, end = _shared(before, text), len(text) - len(after)
  alike = begin == len(before) or _led(render, text, messages, i, begin)
  if not alike or not text.endswith(after) or begin > end:
    raise _unclear(text, f"message {i} changes what stands around it")
  return begin, end


def _led(render: Render, text: str, messages: Sequence[Message], i: int, begin: int) -> bool:
  """Whether a place lies behind where the template says that the assistant begins to write.

  A template may write thoughts before a content that has none: then less of the text is common.
  """
  asked = _asked(render, messages, i)
  led = asked != (_rendered_or_empty(render, messages[:i]) if i else "")
  return led and begin >= _shared(text, asked)


def _shared(first: str, second: str) -> int:
  """Characters that two texts begin with alike."""
  pairs = enumerate(zip(first, second, strict=False))
  return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _word(text: str) -> str:
  """A word that does not stand in `text`."""
  word = "ANSWER"
  while word in text:
    word += "Q"
  return word


def _closing(
  render: Render, text: str, messages: Sequence[Message], i: int, end: int, special: list[str]
) -> int:  # fmt: skip
  """Characters behind the content of message i that end its turn: a special token or a word, which
  the template writes without any message after it too, and white space before that.
  """
  word = _word(text)
  last = _rendered_or_empty(render, [*messages[:i], messages[i] | {"content": word}])
  found = re.match(r"\s*\S+", last.rpartition(word)[2]) if word in last else None
  if found is None:
    return 0
  mark = found[0].lstrip()
  token = max((len(s) for s in special if mark.startswith(s)), default=len(mark))
  closing = found[0][: len(found[0]) - len(mark) + token]
  return len(closing) if text.startswith(closing, end) else 0


def _rendered_or_empty(render: Render, messages: Sequence[Message], **variables: Any) -> str:
  """A part of a conversation; a template may refuse one that does not end with an answer."""
  try:
    return render(messages, **variables)
  except InputError:
    return ""


def _unclear(text: str, why: str) -> InputError:
  return InputError(
    f"the chat template does not tell what the assistant wrote: {why}, in {text[:200]!r}. {_HOW}"
  )
