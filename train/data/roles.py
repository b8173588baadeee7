"""Which columns of a table each objective learns from, and what they hold."""

import dataclasses

from model.errors import InputError
from train.config import Config
from train.data.conversations import COLUMNS as CONVERSATION

# By objective the fields of `data` that name its columns, and what these hold.
TASKS: dict[str, dict[str, str]] = {
  "seq2seq": dict(text="text", target="text"),
  "classification": dict(text="text", text_pair="text", label="label"),
  "tagging": dict(text="words", label="tags"),
  "span_qa": dict(text="text", text_pair="context", label="answers"),
  "contrastive": dict(text="text", text_pair="text", negative="text"),
  "sft": {},
}  # fmt: skip
_MAY_BE_NONE = (("classification", "text_pair"), ("contrastive", "negative"))
_COLUMNS = ("text_pair", "target", "validation_target", "negative", "label")
_NAMED = ("classification", "tagging")  # Objectives whose labels have names.
_TEXTS = ("classification", "span_qa", "contrastive")  # That have one answer for a text.
_LABEL_OF = {"single_label": "label", "multi_label": "labels", "regression": "number"}
ANSWER_START = "answer_start"  # Of an answer that is plain text: its first character.


@dataclasses.dataclass(frozen=True)
class Role:
  """A column: the field that names it, its name, and what it holds.

  Kinds: `text`; `context`, a text with answers in it; `words`, a list of them or text with white
  space between; `label`, text or a number; `labels`, a list of them or text with `|` or `,`
  between; `number`; `tags`, as many as there are words; `answers`, text or SQuAD's object; `said`,
  a part of a conversation (`train.data.conversations`).
  """

  name: str
  column: str
  kind: str
  optional: bool = False

  def __str__(self) -> str:
    return self.field if self.column == self.name else f"{self.field}={self.column!r}"

  @property
  def field(self) -> str:
    """As a user writes it."""
    return f"data.{self.name}"


def is_task(config: Config) -> bool:
  """Whether the objective learns from examples, not from running text."""
  return config.objective.name in TASKS


def roles_of(config: Config) -> tuple[Role, ...]:
  """The columns that the objective reads.

  Raises:
    InputError: as `check_columns`.
  """
  check_columns(config)
  if config.objective.name == "sft":
    return tuple(Role(name, name, "said", optional=True) for name in CONVERSATION)
  kinds = dict(TASKS[config.objective.name])
  if kinds.get("label") == "label":
    kinds["label"] = _LABEL_OF[config.model.problem]
  named = {name: getattr(config.data, name) for name in kinds}
  roles = [Role(n, column, kinds[n]) for n, column in named.items() if column is not None]
  if "answers" in kinds.values():
    roles.append(Role(ANSWER_START, ANSWER_START, "offset", optional=True))
  return tuple(roles)


def check_columns(config: Config) -> None:
  """Raises an InputError for a column that the objective needs and the config does not name, or
  one that it names and the objective does not read.
  """
  name, data = config.objective.name, config.data
  read = TASKS.get(name, {})
  for field in read:
    if getattr(data, field) is None and (name, field) not in _MAY_BE_NONE:
      raise InputError(f"data.{field} is not set: {name} learns from that column, name it.")
  for field in _COLUMNS:
    column = "target" if field == "validation_target" else field
    if getattr(data, field) is not None and column not in read:
      readers = [task for task, columns in TASKS.items() if column in columns]
      raise InputError(
        f"data.{field}={getattr(data, field)!r} has no effect on {name}: remove it, or use "
        f"objective.name={' or '.join(readers)}."
      )
  if data.validation_target is not None and data.validation_source is None:
    raise InputError("data.validation_target has no effect without data.validation_source.")
  numbers = name == "classification" and config.model.problem == "regression"
  if data.labels is not None and (name not in _NAMED or numbers):
    what = "a regression" if numbers else name
    raise InputError(f"data.labels has no effect on {what}: remove it.")
  if name != "sft" and data.chat_template is not None:
    raise InputError(
      f"data.chat_template={data.chat_template!r} has no effect on {name}: remove it, or use "
      "objective.name=sft."
    )
  if name == "sft" and data.text != "text":
    raise InputError(
      f"data.text={data.text!r} has no effect on sft, which reads the columns "
      f"{', '.join(CONVERSATION)}: remove it."
    )
  if name == "sft" and data.truncate:
    raise InputError("data.truncate has no effect on sft: set objective.too_long='truncate'.")
  if data.max_texts is not None and name not in _TEXTS and not config.objective.paired:
    raise InputError(f"data.max_texts={data.max_texts} has no effect on {name}: remove it.")
