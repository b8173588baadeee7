"""Settings of a target as fields of a dataclass, and the flags that follow from them."""

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any

from absl import flags

from model.errors import InputError, nearest


def option(
  default: Any,
  text: str,
  *,
  choices: tuple[str, ...] = (),
  at_least: float | None = None,
  at_most: float | None = None,
) -> Any:
  """A field of a target's Options: the flag --NAME with this help text.

  The field is a str, int, float, bool, one of them or None, or a tuple[str, ...] (a flag that may
  be given several times).
  """
  metadata = {"text": text, "choices": choices, "at_least": at_least, "at_most": at_most}
  return dataclasses.field(default=default, metadata=metadata)


def define(targets: Mapping[str, type]) -> None:
  """Defines a flag for each option; targets may have options of the same name and kind."""
  texts: dict[str, list[str]] = {}
  kinds: dict[str, type] = {}
  for target, options in targets.items():
    for field, kind in _fields(options):
      if kinds.setdefault(field.name, kind) is not kind:
        raise TypeError(f"--{field.name} is a {kind.__name__} for {target}, not for the others.")
      texts.setdefault(field.name, []).append(f"{target}: {field.metadata['text']}")
  for name, kind in kinds.items():
    _DEFINE[kind](name, None, " ".join(texts[name]))


def chosen(targets: Mapping[str, type], target: str) -> Any:
  """The options of `target` as given on the command line.

  Raises:
    InputError: for a value that is not allowed, or a flag that only other targets read.
  """
  own = {field.name: field for field, _ in _fields(targets[target])}
  for name in {field.name for options in targets.values() for field, _ in _fields(options)}:
    if _given(name) and name not in own:
      readers = [t for t, options in targets.items() if any(f.name == name for f, _ in
                                                            _fields(options))]  # fmt: skip
      raise InputError(
        f"--{name} has no effect with --target={target}: it is read by {' and '.join(readers)}."
      )
  values = {name: flags.FLAGS[name].value for name in own if _given(name)}
  for name, value in values.items():
    _check(name, value, own[name].metadata)
  return targets[target](**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def refuse_given(names: Iterable[str], target: str) -> None:
  """An InputError if one of these flags, which `target` does not read, was given."""
  for name in names:
    if _given(name):
      raise InputError(f"--{name} has no effect with --target={target}: leave it out.")


def _given(name: str) -> bool:
  return bool(flags.FLAGS[name].present)


def _check(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
  choices, at_least, at_most = (metadata[key] for key in ("choices", "at_least", "at_most"))
  if choices and value not in choices:
    known = f" Known: {', '.join(choices)}."
    raise InputError(f"--{name}={value} is not known.{nearest(value, choices)}{known}")
  if isinstance(value, float) and not math.isfinite(value):
    raise InputError(f"--{name}={value}: a finite number is needed.")
  if at_least is not None and not value >= at_least:
    raise InputError(f"--{name}={value}: at least {at_least} is needed.")
  if at_most is not None and not value <= at_most:
    raise InputError(f"--{name}={value}: at most {at_most} is allowed.")


def _fields(options: type) -> list[tuple[dataclasses.Field, type]]:
  hints = typing.get_type_hints(options)
  return [(field, _kind(hints[field.name])) for field in dataclasses.fields(options)]


def _kind(hint: Any) -> type:
  if isinstance(hint, UnionType):
    hint = next(part for part in hint.__args__ if part is not type(None))
  return typing.get_origin(hint) or hint


_DEFINE = {
  str: flags.DEFINE_string,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  bool: flags.DEFINE_bool,
  tuple: flags.DEFINE_multi_string,
}
