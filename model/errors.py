"""The one exception that a user can cause, and how a command reports it."""

import errno
import logging
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

DONE, DEFECT, USER_ERROR, NON_FINITE, PREEMPTED = 0, 1, 2, 3, 75


class InputError(ValueError):
  """Wrong input. The message says what was wrong, what was expected and what to do."""


class Stop(SystemExit):
  """Ends a command with one `error:` line and an exit status of its own."""

  def __init__(self, message: str, status: int):
    super().__init__(status)
    self.message, self.status = message, status


def nearest(name: str, known) -> str:
  """' Did you mean …?' with the names closest to `name`, or ''."""
  close = get_close_matches(name, list(known), n=3, cutoff=0.5)
  return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def users_status(error: BaseException) -> int | None:
  """The exit status of an exception that `run` tells in one line; None for a defect."""
  if isinstance(error, Stop):
    return error.status
  file = isinstance(error, OSError) and error.errno in _USER_ERRNO
  user = isinstance(error, InputError) or file or _lacks_platform(error)
  return USER_ERROR if user else None


def _lacks_platform(error: BaseException) -> bool:
  """Whether JAX found no device of the platform that was asked for."""
  said = ("Unable to initialize backend", "Unknown backend")
  return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def fail(message: object, status: int = USER_ERROR) -> NoReturn:
  """Prints the last line of stderr, `error: …`, and leaves with `status`."""
  sys.stdout.flush()
  line = " ".join(str(message).split())
  print("error: " + line, file=sys.stderr, flush=True)
  raise Stop(line, status)


def _parse(argv: list[str]) -> list[str]:
  app.define_help_flags()
  try:
    return app.parse_flags_with_usage(argv) if _wants_help(argv) else flags.FLAGS(argv)
  except flags.Error as error:
    return fail(error)


def _wants_help(argv: list[str]) -> bool:
  return any(a.split("=")[0].lstrip("-") in ("help", "helpfull", "helpshort") for a in argv[1:])


def run(
  main: Callable[[list[str]], int | None],
  prepare: Callable[[list[str]], list[str]] = lambda argv: argv,
) -> None:
  """Runs a command: parses flags, turns a user's error into one line and status 2.

  A traceback is left for defects only. `prepare` sees the arguments before the flags are parsed.
  """

  def guarded(argv):
    try:
      status = main(argv)
    except Stop as stop:
      fail(stop.message, stop.status)
    except InputError as error:
      fail(error)
    except OSError as error:
      if error.errno not in _USER_ERRNO:
        raise
      if isinstance(error.__context__, InputError):  # The first trouble; this one came with ending.
        fail(error.__context__)
      advice = ": free some space and run again" if error.errno in _DISK_FULL else ""
      place = f" ({error.filename})" if error.filename else ""
      fail(f"{error.strerror}{place}{advice}.")
    except RuntimeError as error:
      if not _lacks_platform(error):
        raise
      fail(f"JAX cannot use the platform that was asked for: {error}")
    else:
      sys.exit(status or DONE)

  def parse(argv):
    _quieten_libraries()
    try:
      return _parse(argv if _wants_help(argv) else prepare(argv))
    except InputError as error:
      fail(error)

  app.run(guarded, flags_parser=parse)


def _quieten_libraries() -> None:
  """Leaves our own messages, as plain lines, and the warnings of others."""
  house = Path(__file__).parents[1]
  folders = [house / name for name in ("model", "infer", "train", "launch")]
  ours = lambda record: any(Path(record.pathname).is_relative_to(f) for f in folders)
  handler = absl_logging.get_absl_handler()
  handler.addFilter(lambda record: record.levelno >= logging.WARNING or ours(record))
  handler.setFormatter(logging.Formatter("%(message)s"))


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_USER_ERRNO = {
  errno.ENOENT,
  errno.EEXIST,
  errno.EACCES,
  errno.EPERM,
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EROFS,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.EADDRINUSE,
}
