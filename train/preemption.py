"""SIGTERM and SIGINT as a question that the loop asks after each step."""

import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
  """While it is entered, the first SIGTERM or SIGINT is noted; a second one acts as usual."""

  def __init__(self):
    self._received = 0
    self._before: dict[int, object] = {}

  def __enter__(self) -> "Preemption":
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    self._restore()

  def asked(self, step: int) -> bool:
    """Whether the run is to stop after `step`; all processes answer the same."""
    if jax.process_count() > 1:
      return bool(multihost_utils.reached_preemption_sync_point(step)) or bool(
        multihost_utils.process_allgather(self._received).any()
      )
    return self._received > 0

  def _note(self, number: int, _frame: object) -> None:
    self._received = number
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
