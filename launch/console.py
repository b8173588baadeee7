"""What many processes print, as whole lines of one output, each with its process before it."""

import collections
import contextlib
import datetime
import os
import threading
import time
from pathlib import Path
from typing import TextIO

from launch.watch import STARTED

LONGEST_LINE = 1 << 20  # Bytes; what is longer is shown in parts.
KEPT_LINES = 20  # Of each process, to be shown again if it fails.
_ERASE = b"\r\x1b[K"


class Console:
  """Standard output and error of the launcher, shared by its threads.

  On a terminal the lowest line may be a progress line, which is drawn again below other lines.
  """

  def __init__(self, out: TextIO, err: TextIO):
    self._files = {"out": out.buffer, "err": err.buffer}
    self._lock, self._progress = threading.Lock(), b""
    self.terminal = err.isatty()

  def line(self, text: bytes, stream: str) -> None:
    """Writes a whole line to `stream`, "out" or "err"."""
    with self._lock:
      self._erase()
      self._write(stream, text + b"\n")
      self._draw()

  def say(self, text: str) -> None:
    """A line of the launcher's own."""
    self.line(text.encode(), "err")

  def progress(self, text: bytes) -> None:
    """Draws the progress line anew, b"" takes it away; nothing where there is no terminal."""
    if self.terminal:
      with self._lock:
        self._erase()
        self._progress = text.decode(errors="replace")[: self.columns - 1].encode()
        self._draw()

  @property
  def columns(self) -> int:
    """Characters in a row of the terminal."""
    with contextlib.suppress(OSError, ValueError):
      return os.get_terminal_size(self._files["err"].fileno()).columns or 80
    return 80

  def _erase(self) -> None:
    if self._progress:
      self._write("err", _ERASE)

  def _draw(self) -> None:
    if self._progress:
      self._write("err", self._progress)

  def _write(self, stream: str, text: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # Nobody reads any more; the logs have it.
      self._files[stream].write(text)
      self._files[stream].flush()


class Output:
  """What one process prints: to the console with a prefix, to its log, and the last lines kept."""

  def __init__(self, label: str, log: Path, console: Console, title: str):
    self._prefix, self._console = f"[{label}] ".encode(), console
    self._log = log.open("ab")
    self._lock, self._drew = threading.Lock(), False
    self.last: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
    self.started = False  # Whether its watch has said so.
    self.last_at = 0.0  # When the last of them came, by the monotonic clock.
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    self._log.write(f"=== {now} {title}\n".encode())
    self._log.flush()

  @property
  def error(self) -> str | None:
    """What follows "error: " in the last line on stderr, if that begins so."""
    line = self.last[-1] if self.last else ""
    return line.removeprefix("error: ") if line.startswith("error: ") else None

  def read(self, file: int, stream: str) -> None:
    """Takes what comes from a file descriptor to its end; to be run in a thread."""
    waiting = b""
    with contextlib.suppress(OSError):  # A pseudo-terminal whose other side was closed.
      while chunk := os.read(file, 1 << 16):
        *lines, waiting = (waiting + chunk).split(b"\n")
        for line in lines:
          self._line(line, stream)
        waiting = self._drawn(waiting)
        if len(waiting) > LONGEST_LINE:
          self._line(waiting, stream)
          waiting = b""
    if _visible(waiting):
      self._line(waiting, stream)
    os.close(file)

  def close(self) -> None:
    """Ends the log."""
    with self._lock:
      self._log.close()

  def _line(self, drawn: bytes, stream: str) -> None:
    line = _visible(drawn)
    if self._drew and b"\r" in drawn:
      self._drew = False
      self._console.progress(b"")
    with self._lock:
      if not self._log.closed:
        self._log.write(line + b"\n")
        self._log.flush()
      if stream == "err":
        self._remember(line.decode(errors="replace"))
    self._console.line(self._prefix + line, stream)

  def _remember(self, line: str) -> None:
    self.last.append(line)
    self.started |= line.startswith(STARTED)
    self.last_at = time.monotonic()

  def _drawn(self, waiting: bytes) -> bytes:
    """Shows an unfinished line that is being redrawn, and returns what of it matters."""
    if b"\r" not in waiting:
      return waiting
    before, _, now = waiting.rpartition(b"\r")
    drawn = b"\r" + now if now else b"\r" + before.rpartition(b"\r")[2] + b"\r"
    self._drew = True
    self._console.progress(self._prefix + _visible(drawn))
    return drawn


def _visible(line: bytes) -> bytes:
  """What stands in a line after all that was drawn over."""
  return line.rstrip(b"\r").rpartition(b"\r")[2].removeprefix(b"\x1b[K")
