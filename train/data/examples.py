"""Where examples come from: rows of tables, lines of parallel text files, and TFDS."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from model.errors import InputError
from train.config import Config
from train.data.conversations import texts_of
from train.data.roles import Role, roles_of
from train.data.sources import ARRAYS, TextSource, find_files, fingerprint, kind_of, parse_mixture
from train.data.tables import LIST, open_text, read_rows, suffix_of, unit_of

_TEXTS = ("text", "context", "words", "said")  # Kinds of columns that hold text.


@dataclasses.dataclass(frozen=True)
class Example:
  """One row: where it is (`ExampleSource.files`, number), and its values by role."""

  file: int
  number: int
  values: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ExampleSource:
  """Examples of a task. Reading `examples()` again gives the same ones in the same order."""

  name: str  # As the config has it.
  fingerprint: str  # SHA-256, in hex, of what decides the examples.
  roles: tuple[Role, ...]
  files: tuple[str, ...]  # Begins of messages: "train.tsv, line".
  examples: Callable[[], Iterator[Example]]

  def place(self, example: Example) -> str:
    """Where a person finds an example."""
    return f"{self.files[example.file]} {example.number}"

  def texts(self) -> TextSource:
    """All texts as documents: what a vocabulary is trained on."""
    names = [role.name for role in self.roles if role.kind in _TEXTS]

    def documents() -> Iterator[str]:
      for example in self.examples():
        if self.roles[0].kind == "said":
          yield from texts_of(example.values)
          continue
        for name in names:
          value = example.values[name]
          yield " ".join(map(str, value)) if isinstance(value, list) else str(value)

    return TextSource(self.name, self.fingerprint, documents)


def open_training(config: Config) -> list[ExampleSource]:
  """The parts of `data.source`.

  Raises:
    InputError: for a source that does not exist or fit, or a missing column.
  """
  return _open_all(config, config.data.source, config.data.target, "data.target")


def open_validation(config: Config) -> list[ExampleSource]:
  """The parts of `data.validation_source`; none without one."""
  data = config.data
  if data.validation_source is None:
    return []
  target = data.target if data.validation_target is None else data.validation_target
  return _open_all(config, data.validation_source, target, "data.validation_target")


def _open_all(config: Config, spec: str, target: str | None, field: str) -> list[ExampleSource]:
  roles = tuple(
    dataclasses.replace(r, column=target) if r.name == "target" and target is not None else r
    for r in roles_of(config)
  )
  parts = [part for _, part in parse_mixture(spec)]
  return [_open(part, config, roles, field, alone=len(parts) == 1) for part in parts]


def _open(
  spec: str, config: Config, roles: tuple[Role, ...], field: str, *, alone: bool
) -> ExampleSource:
  wanted = {role.field: role.column for role in roles}
  optional = [role.field for role in roles if role.optional]
  if spec == "python_stdlib":
    raise InputError(
      f"data.source={spec!r} has no columns: {config.objective.name} learns from a table."
    )
  if spec.startswith("tfds:"):
    from train.data.tfds import open_tfds_rows  # Imports a large library.

    content, rows = open_tfds_rows(spec, config.data, wanted, optional)
    examples = lambda: (_example(0, row, roles) for row in rows())
    return ExampleSource(spec, _decides(roles, content), roles, (f"{spec}, example",), examples)
  files = find_files(spec)
  kinds = {LIST if suffix_of(file) == LIST else kind_of(file) for file in files}
  if kinds & set(ARRAYS):
    raise InputError(f"data.source={spec!r} holds token ids: {config.objective.name} learns from "
                     "columns of a table.")  # fmt: skip
  if kinds == {"text"}:
    return _parallel(spec, files, config, roles, field, alone=alone)
  if "text" in kinds:
    raise InputError(f"data.source={spec!r} mixes tables with text: give them one by one.")
  names = tuple(f"{file}, {unit_of(file)}" for file in files)
  return ExampleSource(
    spec, _decides(roles, fingerprint(sorted(kinds), files)), roles, names,
    lambda: (
      _example(i, row, roles)
      for i, file in enumerate(files)
      for row in read_rows(file, wanted, optional)
    ),
  )  # fmt: skip


def _parallel(
  spec: str, files: list[Path], config: Config, roles: tuple[Role, ...], field: str, *, alone: bool
) -> ExampleSource:
  """Text files of which line n of one is to become line n of the other."""
  if config.objective.name != "seq2seq":
    raise InputError(
      f"data.source={spec!r} is text: {config.objective.name} learns from columns of a table "
      "(.jsonl, .json, .csv, .tsv, .parquet)."
    )
  if not alone:
    raise InputError(f"{spec!r}: parallel text files cannot be mixed; put them into tables.")
  if field == "data.validation_target" and config.data.validation_target is None:
    raise InputError(
      f"data.validation_source={spec!r} is a text file: set {field} to the file that holds what is "
      "to be written."
    )
  spec_target = next(role.column for role in roles if role.name == "target")
  if not Path(spec_target).expanduser().is_file() and not any(c in spec_target for c in "*?["):
    raise InputError(
      f"data.source={spec!r} is a text file, so {field}={spec_target!r} must be another one, with "
      "as many lines."
    )
  targets = find_files(spec_target)
  if {kind_of(file) for file in targets} != {"text"} or len(targets) != len(files):
    raise InputError(
      f"data.source={spec!r} names {len(files)} text files and {field}={spec_target!r} "
      f"{len(targets)} files: each needs one text file of the other language."
    )
  pairs = list(zip(files, targets, strict=True))
  return ExampleSource(
    spec, _decides(roles[:0], fingerprint(["parallel"], [*files, *targets])), roles,
    tuple(f"{file}, line" for file in files),
    lambda: (e for i, (source, target) in enumerate(pairs) for e in _lines(i, source, target)),
  )  # fmt: skip


def _lines(file: int, source: Path, target: Path) -> Iterator[Example]:
  with open_text(source) as texts, open_text(target) as targets:
    number = 0
    for number, text in enumerate(texts, 1):
      goal = next(targets, None)
      if goal is None:
        raise _unequal(source, target, number, number + sum(1 for _ in texts), number - 1)
      yield Example(file, number, dict(text=text.rstrip("\r\n"), target=goal.rstrip("\r\n")))
    more = sum(1 for _ in targets)
    if more:
      raise _unequal(source, target, number + 1, number, number + more)


def _unequal(source: Path, target: Path, line: int, lines: int, target_lines: int) -> InputError:
  return InputError(
    f"{source} has {lines} lines and {target} has {target_lines}: from line {line} on there are no "
    "pairs. Line n of one file must be the translation of line n of the other."
  )


def _example(file: int, row: tuple[int, tuple[Any, ...]], roles: tuple[Role, ...]) -> Example:
  number, values = row
  return Example(file, number, dict(zip((r.name for r in roles), values, strict=True)))


def _decides(roles: tuple[Role, ...], content: str) -> str:
  lines = [content, *(f"{role.name} {role.column} {role.kind}" for role in roles)]
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()
