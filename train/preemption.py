"""SIGTERM and SIGINT as a question that the loop asks after each step."""

import os
import signal

from model.errors import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def leave_at_once() -> None:
  """From now on SIGTERM and SIGINT end the process with status 75: nothing is there to be saved."""

  def leave(number: int, _frame: object) -> None:
    os.write(2, f"stopped by {signal.Signals(number).name}: no step was under way.\n".encode())
    os._exit(PREEMPTED)

  for number in SIGNALS:
    signal.signal(number, leave)


class Preemption:
  """While it is entered, the first SIGTERM or SIGINT is noted; a second one kills the process."""

  def __init__(self):
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
    import jax  # Takes seconds, in which `leave_at_once` already holds.
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
      return bool(multihost_utils.reached_preemption_sync_point(step)) or bool(
        multihost_utils.process_allgather(self._received).any()
      )
    return self._received > 0

  def _note(self, number: int, _frame: object) -> None:
    self._received = number
    for again in SIGNALS:
      signal.signal(again, signal.SIG_DFL)
