"""The --config flag of commands: a Python file, overridden by --config.a.b=value."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model import errors
from model.errors import InputError, nearest
from train.config import Config, checked


class ConfigFlag:
  """What `config_flag` returns: `.value` is the checked Config, once flags are parsed."""

  def __init__(self, holder: Any):
    self._holder = holder

  @property
  def value(self) -> Config:
    config = self._holder.value
    for path in _NONE:
      *sections, name = path.split(".")
      section = config
      for part in sections:
        section = getattr(section, part)
      setattr(section, name, None)
    return checked(config)


_NONE: list[str] = []  # Overrides that set an optional field back to None.


def config_flag() -> ConfigFlag:
  """Defines --config; call it once, at the top of a command's module."""
  from ml_collections import config_flags

  holder = config_flags.DEFINE_config_file("config", None, "Python file of the experiment.")
  return ConfigFlag(holder)


def run(main: Callable[[list[str]], int | None]) -> None:
  """`errors.run` for a command with --config: unknown keys are named with the nearest ones."""
  errors.run(main, prepare=_prepare)


def _prepare(argv: list[str]) -> list[str]:
  kept = []
  files = [a for a in argv[1:] if a.lstrip("-") == "config" or a.lstrip("-").startswith("config=")]
  if not files:
    raise InputError("--config is missing: name a file, for example --config=configs/gpt_tiny.py.")
  for arg in argv:
    name, _, value = arg.lstrip("-").partition("=")
    if arg.startswith("-") and name.startswith("config."):
      optional = _check_key(name.removeprefix("config."))
      if value == "None" and optional:
        _NONE.append(name.removeprefix("config."))
        continue
    kept.append(arg)
  _check_file(argv)
  return kept


def _check_key(path: str) -> bool:
  """Whether the field at `path` may be None; an InputError if there is no such field."""
  kind: Any = Config
  walked: list[str] = []
  for part in path.split("."):
    if not dataclasses.is_dataclass(kind):
      raise InputError(f"--config.{path}: {'.'.join(walked)!r} is a value, it has no fields.")
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    if part not in fields:
      section = f"in {'.'.join(walked)}" if walked else "in the config"
      raise InputError(
        f"--config.{path}: there is no {part!r} {section}."
        f"{nearest(part, fields) or ' Known: ' + ', '.join(fields) + '.'}"
      )
    kind = fields[part]
    walked.append(part)
  if dataclasses.is_dataclass(kind):
    raise InputError(f"--config.{path} is a section: set one of its fields.")
  return type(None) in getattr(kind, "__args__", ())


def _check_file(argv: list[str]) -> None:
  for arg, following in zip(argv, [*argv[1:], ""], strict=True):
    name, equals, value = arg.lstrip("-").partition("=")
    if arg.startswith("-") and name == "config":
      path = (value if equals else following).partition(":")[0]
      if not Path(path).is_file():
        raise InputError(f"--config={path}: there is no such file.")
      _load_once(path)


def _load_once(path: str) -> None:
  """Runs the file, so that what is wrong in it is told with its place before flags are parsed."""
  space: dict[str, Any] = {"__name__": "config_check", "__file__": path}
  try:
    exec(compile(Path(path).read_text(), path, "exec"), space)
    if "get_config" not in space:
      raise InputError("it has no function get_config().")
    config = space["get_config"]()
  except Exception as error:  # Whatever it is, it is in the user's file.
    line = getattr(getattr(error.__traceback__, "tb_next", None), "tb_lineno", None)
    kind = "" if isinstance(error, InputError | SyntaxError) else f"{type(error).__name__}: "
    raise InputError(f"{path}{f', line {line}' if line else ''}: {kind}{error}") from error
  if not isinstance(config, Config):
    found = type(config).__name__
    raise InputError(f"{path}: get_config() returned {found}, not train.config.Config.")
