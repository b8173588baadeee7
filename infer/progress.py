"""How far a file of prompts is: a bar on a terminal, else a line now and then, on stderr."""

import contextlib
import sys
import time
from collections.abc import Iterator

LINE_SECONDS = 30.0  # Between two lines, where stderr is no terminal.


class Progress:
  """Counts prompts that are done."""

  def __init__(self, total: int):
    self._total, self._done = total, 0
    self._begun = self._told = time.monotonic()
    self._bar = None
    if sys.stderr.isatty():
      from tqdm import tqdm

      self._bar = tqdm(total=total, unit=" prompts", file=sys.stderr, dynamic_ncols=True)

  @contextlib.contextmanager
  def one(self) -> Iterator[None]:
    """Around what is printed of a prompt that is done."""
    self._done += 1
    if self._bar is not None:
      with self._bar.external_write_mode(file=sys.stdout):
        yield
        sys.stdout.flush()
      self._bar.update()
      return
    yield
    now = time.monotonic()
    if now - self._told >= LINE_SECONDS or (self._done == self._total and self._told > self._begun):
      self._told = now
      print(
        f"{self._done:,} of {self._total:,} prompts in {now - self._begun:.0f} s",
        file=sys.stderr, flush=True,
      )  # fmt: skip

  def close(self) -> None:
    """Leaves the bar as it is."""
    if self._bar is not None:
      self._bar.close()
