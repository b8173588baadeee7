"""The settings of `infer.generate` as flags of the same names, derived from their declaration.

A setting that is declared in `infer.settings.Settings` is a flag: its type says how it is written
on the command line, unless its declaration does, and its text is the help.
"""

import collections.abc
import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable
from typing import Any

from absl import flags

from infer.settings import Settings
from model.errors import InputError

_FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
# Settings that may be models, and what their values are called when they are none.
_MODELS = {"draft": ("lookup", "layers"), "scorer": ("mean_logprob",)}
_IDS = "Token ids are written id:13, several in a row id:13,7."
_SWITCHES = ("prefix_cache",)  # Objects that a command makes where it is asked to.


def _parts(annotation: Any) -> tuple[set[Any], set[Any]]:
  """(types that a value may have, types that the items of a sequence may have)."""
  union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
  whole, items = set(), set()
  for part in typing.get_args(annotation) if union else (annotation,):
    origin = typing.get_origin(part)
    if origin is collections.abc.Sequence:
      items |= set().union(*_parts(typing.get_args(part)[0]))
    else:
      whole.add(origin or part)
  return whole - {types.NoneType}, items


def _read_words(text: str) -> dict[str | int, float]:
  """JSON whose keys are texts, or token ids where they are digits."""
  try:
    pairs = json.loads(text)
  except ValueError as error:
    raise InputError(f"--logit_bias={text} is not JSON ({error}).") from error
  if not isinstance(pairs, dict):
    raise InputError(f'--logit_bias={text} must be an object such as {{"50256": -5}}.')
  return {int(key) if key.isdecimal() else key: value for key, value in pairs.items()}


def _read_tokens(text: str) -> str | int | tuple[int, ...]:
  """A text as it is, or the token ids that it names."""
  named, _, ids = text.partition("id:")
  if named or not all(part.isdecimal() for part in ids.split(",")):
    return text
  tokens = tuple(int(part) for part in ids.split(","))
  return tokens[0] if len(tokens) == 1 else tokens


def _read_switch(text: str) -> bool | str:
  return {"true": True, "false": False}.get(text, text)


def _one_or_many(values: list) -> Any:
  return values[0] if len(values) == 1 else values


@dataclasses.dataclass(frozen=True)
class _Kind:
  """How a setting is written as a flag."""

  define: Callable[..., flags.FlagHolder]
  read: Callable[[Any], Any] = lambda value: value
  hint: str = ""


def _kind(annotation: Any) -> _Kind:
  whole, items = _parts(annotation)
  if collections.abc.Mapping in whole and str not in whole:
    return _Kind(flags.DEFINE_string, _read_words, 'JSON: {"50256": -5, "very": 2}.')
  if str in items:
    ids = int in items
    read = (lambda texts: [_read_tokens(text) for text in texts]) if ids else list
    return _Kind(flags.DEFINE_multi_string, read, _IDS if ids else "")
  if str in whole and items == {int}:
    return _Kind(flags.DEFINE_string, _read_tokens, _IDS)
  if items and str not in whole:
    return _Kind(flags.DEFINE_multi_integer, _one_or_many if int in whole else list)
  if whole == {bool}:
    return _Kind(flags.DEFINE_bool)
  if bool in whole:
    return _Kind(flags.DEFINE_string, _read_switch)
  if whole in ({int}, {float}):
    return _Kind(flags.DEFINE_integer if whole == {int} else flags.DEFINE_float)
  return _Kind(flags.DEFINE_string)


def _define() -> dict[str, _Kind]:
  kinds = {}
  for name, annotation in typing.get_type_hints(Settings).items():
    field = _FIELDS[name]
    how = field.metadata
    kind = _kind(how["written"] or annotation)
    if how["choices"]:
      choices = list(how["choices"])
      kind = _Kind(lambda name, *rest, of=choices: flags.DEFINE_enum(name, rest[0], of, rest[1]))
    if how["read"] is not None:
      kind = dataclasses.replace(kind, read=functools.partial(how["read"], name))
    default = "" if field.default in (None, ()) else f"(default: {field.default})"
    text = " ".join(part for part in (how["help"], kind.hint, default) if part)
    kind.define(how["flag"] or name, None, text)
    kinds[name] = kind
  return kinds


_KINDS = _define()


def flag_of(name: str) -> str:
  """The name of a setting's flag."""
  return _FIELDS[name].metadata["flag"] or name


def given_settings() -> dict[str, Any]:
  """The settings that the command line names, as keyword arguments of `infer.generate`.

  Models are still the names of their checkpoints: see `models_of`.

  Raises:
    InputError: for what cannot be read.
  """
  values = {name: flags.FLAGS[flag_of(name)].value for name in _KINDS}
  return {name: _KINDS[name].read(v) for name, v in values.items() if v is not None}


def models_of(settings: dict[str, Any]) -> dict[str, str]:
  """The settings that name checkpoints of models."""
  return {
    name: settings[name]
    for name, others in _MODELS.items()
    if name in settings and settings[name].partition(":")[0] not in others
  }


def checked_settings(settings: dict[str, Any], prompts: int) -> Settings:
  """The settings before any model is loaded, with a stand-in for a draft that is one.

  Raises:
    InputError: for an impossible value, or seeds or adapters for another number of prompts.
  """
  stand_in: dict[str, Any] = {"draft": "lookup"} if "draft" in models_of(settings) else {}
  values: dict[str, Any] = settings | stand_in | dict.fromkeys(_SWITCHES)
  checked = Settings(**values)
  checked.seeds(prompts)
  checked.adapters(prompts)
  return checked
