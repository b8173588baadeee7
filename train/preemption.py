"""SIGTERM and SIGINT as a question that the loop asks after each step."""

import os
import signal

from model.errors import PREEMPTED
from train import processes
from train.group import Group

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def leave_at_once() -> None:
  """From now on SIGTERM and SIGINT end the process with status 75: nothing is there to be saved.

  All other processes of its run end so too.
  """

  def leave(number: int, _frame: object) -> None:
    line = f"stopped by {signal.Signals(number).name}: no step was under way."
    processes.stopped(line)
    os.write(2, f"{line}\n".encode())
    os._exit(PREEMPTED)

  for number in SIGNALS:
    signal.signal(number, leave)


class Preemption:
  """While it is entered, the first SIGTERM or SIGINT is noted; a second one kills the process.

  A signal to one process stops all of `group`, after the same step.
  """

  def __init__(self, group: Group):
    self.group = group
    self._received = 0
    self._before: dict[int, object] = {}

  def __enter__(self) -> "Preemption":
    for number in SIGNALS:
      self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

  def asked(self, step: int) -> bool:
    """Whether the run is to stop after `step`; all processes answer the same."""
    return self.group.stop_asked(step, self._received > 0)

  def _note(self, number: int, _frame: object) -> None:
    self._received = number
    for again in SIGNALS:
      signal.signal(again, signal.SIG_DFL)
