"""Processes of one attempt: started, listened to, asked to stop, killed."""

import contextlib
import dataclasses
import os
import queue
import shlex
import subprocess
import threading
import time
import tty
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from launch.console import Console, Output

_READERS_SECONDS = 2.0  # For output that is still on its way when its process has ended.


@dataclasses.dataclass(frozen=True)
class Process:
  """One process as it is started.

  Attributes:
    label: what stands before each line of its output.
    argv: the words that start it here.
    environment: what it gets beside the launcher's own environment; None takes a variable away.
    on_terminal: its standard error is a terminal where the launcher's is one.
  """

  rank: int
  label: str
  argv: tuple[str, ...]
  environment: Mapping[str, str | None]
  on_terminal: bool = False

  def shell(self) -> str:
    """The same as a line for a shell."""
    taken = [word for name, v in self.environment.items() if v is None for word in ("-u", name)]
    given = [f"{name}={v}" for name, v in self.environment.items() if v is not None]
    front = ["env", *taken, *given] if taken or given else []
    return shlex.join([*front, *self.argv])


@dataclasses.dataclass(frozen=True)
class Ended:
  """A process that has ended: with which status and when, by the monotonic clock."""

  running: "Running"
  status: int
  when: float


class Running:
  """A started process. When it has ended and its output is read, `events` gets an Ended."""

  def __init__(self, process: Process, log: Path, console: Console, events: queue.SimpleQueue):
    self.process, self.ended = process, False
    self.output = Output(process.label, log, console, process.shell())
    own = {**os.environ, **process.environment}
    screen, error = None, subprocess.PIPE
    if process.on_terminal and console.terminal:
      screen, error = os.openpty()
      tty.setraw(error)
      own["COLUMNS"] = str(console.columns - len(process.label) - 3)
    self._popen = subprocess.Popen(
      process.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=error,
      env={name: value for name, value in own.items() if value is not None},
      start_new_session=True,
    )  # fmt: skip
    if screen is None:
      screen = _taken(self._popen.stderr)
    else:
      os.close(error)
    files = {"out": _taken(self._popen.stdout), "err": screen}
    self._readers = [
      threading.Thread(target=self.output.read, args=(file, stream), daemon=True)
      for stream, file in files.items()
    ]
    for thread in self._readers:
      thread.start()
    threading.Thread(target=self._wait, args=(events,), daemon=True).start()

  def tell(self, word: str) -> None:
    """Sends a line to its watch: TERM, INT, KILL, or nothing but a sign of life."""
    with contextlib.suppress(OSError, ValueError):
      os.write(self._popen.stdin.fileno(), f"{word}\n".encode())  # pyright: ignore[reportOptionalMemberAccess]

  def kill(self) -> None:
    """Kills what runs here: the watch, with it the command; or the ssh client."""
    self._popen.kill()

  def _wait(self, events: queue.SimpleQueue) -> None:
    status = self._popen.wait()
    when = time.monotonic()
    for thread in self._readers:
      thread.join(_READERS_SECONDS)
    self.output.close()
    events.put(Ended(self, 128 - status if status < 0 else status, when))


def _taken(file: IO[Any] | None) -> int:
  """The descriptor of a pipe, which its reader will close."""
  if file is None:
    raise TypeError("the process was started without this pipe.")
  with file:
    return os.dup(file.fileno())
