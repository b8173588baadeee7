"""A run of several processes, started again when it failed, ended as a whole."""

import contextlib
import dataclasses
import math
import queue
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.console import Console
from launch.job import FINAL, Job
from launch.processes import Ended, Process, Running
from model.errors import DEFECT, DONE, NON_FINITE, PREEMPTED, USER_ERROR

SETTLE_SECONDS = 1.0  # After the first failure: most of the others end by themselves and say why.
KILL_SECONDS = 2.0  # Between the word KILL and the end of the process that should have heard it.
# Statuses of who is asked to stop before it can save anything.
_UNREADY = (128 + signal.SIGTERM, 128 + signal.SIGINT)
_MEANING = {
  DEFECT: "a defect", USER_ERROR: "wrong input", NON_FINITE: "a loss that stays non-finite",
}  # fmt: skip


def supervise(
  job: Job, attempt: Callable[[], Sequence[Process]], *, grace: float, alive_every: float | None,
  explain: Callable[[Ended], str | None] = lambda ended: None,
) -> int:  # fmt: skip
  """Runs a job to its end, with restarts.

  Args:
    attempt: makes the processes of one attempt: ports may differ each time.
    grace: seconds from asking a process to stop until it is killed, after another one failed.
    alive_every: seconds between signs of life to the processes; None: they need none.
    explain: what a process's end means, where its status does not tell.

  Returns:
    The exit status: DONE, or that of the process which failed first.
  """
  console = Console(sys.stdout, sys.stderr)
  job.logs.mkdir(parents=True, exist_ok=True)
  with Signals() as signals:
    for number, seconds in enumerate([*job.delays(), None], start=1):
      first = Attempt(attempt(), job.logs, console, signals, grace, alive_every).run()
      if first is None:
        return DONE
      text = explain(first) or ending(first, job.logs)
      if first.status != PREEMPTED:
        _show_again(console, first)
      if first.status in FINAL or signals.received or seconds is None:
        break
      console.say(f"restart {number} of {job.max_restarts} in {seconds:g} s: {text}")
      if signals.wait(seconds):
        console.say("stopped before it was started again: the same command goes on.")
        return PREEMPTED
  console.say(text if first.status == PREEMPTED else f"error: {text}")
  return first.status


def ending(ended: Ended, logs: Path) -> str:
  """A sentence about how a process ended."""
  process, output = ended.running.process, ended.running.output
  name, log = f"process {process.label}", logs / f"{process.rank}.log"
  if ended.status == PREEMPTED:
    return f"{name} was stopped with what it had done saved: the same command goes on."
  if ended.status > 128:
    number = ended.status - 128
    known = number in set(signal.Signals)
    how = f"was killed by {signal.Signals(number).name if known else f'signal {number}'}"
    memory = ", as it happens where memory runs out" if number == signal.SIGKILL else ""
    return f"{name} {how}{memory}; its output: {log}."
  meaning = _MEANING.get(ended.status)
  how = f"{name} ended with status {ended.status}" + (f" ({meaning})" if meaning else "")
  return f"{how}: {output.error}" if output.error else f"{how}; its output: {log}."


def _show_again(console: Console, ended: Ended) -> None:
  label, lines = ended.running.process.label, list(ended.running.output.last)
  console.say(f"process {label} failed first; its last lines:")
  for line in lines:
    console.say(f"[{label}] {line}")


class Signals:
  """While it is entered, SIGTERM, SIGINT and SIGHUP are events."""

  def __init__(self):
    self.events: queue.SimpleQueue = queue.SimpleQueue()
    self.received = 0  # How many came.
    self._before: dict[signal.Signals, object] = {}

  def __enter__(self) -> "Signals":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      if signal.getsignal(number) != signal.SIG_IGN:  # As nohup has it.
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

  def wait(self, seconds: float) -> bool:
    """Whether a signal came within this time."""
    with contextlib.suppress(queue.Empty):
      self.events.get(timeout=seconds)
    return self.received > 0

  def _note(self, number: int, _frame: object) -> None:
    self.received += 1
    self.events.put(signal.Signals(number))


class Attempt:
  """All processes from their start until the last of them has ended."""

  def __init__(
    self, processes: Sequence[Process], logs: Path, console: Console, signals: Signals,
    grace: float, alive_every: float | None,
  ):  # fmt: skip
    self._console, self._signals, self._grace = console, signals, grace
    self._alive_every, self._last_sign = alive_every, time.monotonic()
    self._failed: list[Ended] = []
    self._plan: list[tuple[float, Callable[[], None]]] = []  # What is done when, in order.
    self._asked_at = math.inf  # When the others were asked to stop.
    self._left: list[Running] = []
    for process in processes:
      log = logs / f"{process.rank}.log"
      self._left.append(Running(process, log, console, signals.events))

  def run(self) -> Ended | None:
    """Waits for the end of all; returns the failure that came first, if there was one."""
    try:
      while self._left:
        with contextlib.suppress(queue.Empty):
          self._take(self._signals.events.get(timeout=self._keep_time()))
    finally:
      for running in self._left:
        running.kill()
    return min(self._failed, key=self._order, default=None)

  def _take(self, event: Ended | signal.Signals) -> None:
    if isinstance(event, Ended):
      self._left.remove(event.running)
      if self._signals.received and event.status in _UNREADY:  # Nothing was there to save.
        event = dataclasses.replace(event, status=PREEMPTED)
      if event.status != DONE:
        self._failed.append(event)
        self._stop_after(self._grace if event.status == PREEMPTED else SETTLE_SECONDS)
    elif self._signals.received > 1:
      self._console.say("killed: a second signal came.")
      now = time.monotonic()
      self._plan = [(now, lambda: self._tell("KILL")), (now + KILL_SECONDS, self._end)]
    else:
      self._console.say(
        f"{event.name}: the run is asked to save and stop; a second signal kills it."
      )
      self._tell("INT" if event == signal.SIGINT else "TERM")

  def _stop_after(self, seconds: float) -> None:
    """Plans the end of those that are left, unless it is planned for a time before that."""
    ask = time.monotonic() + seconds
    kill = ask + self._grace
    if not self._plan or kill < self._plan[-1][0] - KILL_SECONDS:
      self._plan = [
        (ask, self._ask), (kill, lambda: self._tell("KILL")),
        (kill + KILL_SECONDS, self._end),
      ]  # fmt: skip

  def _keep_time(self) -> float | None:
    """Does what is due; returns the seconds until something is due again."""
    now, due = time.monotonic(), []
    while self._plan and self._plan[0][0] <= now:
      self._plan.pop(0)[1]()
    if self._plan:
      due.append(self._plan[0][0])
    if self._alive_every is not None:
      if now >= self._last_sign + self._alive_every:
        self._tell("")
        self._last_sign = now
      due.append(self._last_sign + self._alive_every)
    return max(0.0, min(due) - now) if due else None

  def _order(self, ended: Ended) -> tuple[bool, float]:
    """What was killed comes before what missed it; else who said an error, or ended, first.

    SIGABRT is JAX's own way to end where another process is gone.
    """
    killed = ended.status > 128 and ended.status - 128 != signal.SIGABRT
    output = ended.running.output
    when = output.last_at if output.error else ended.when  # Ending may take a while.
    return not (killed and ended.when < self._asked_at), when

  def _ask(self) -> None:
    self._asked_at = min(self._asked_at, time.monotonic())
    self._tell("TERM")

  def _tell(self, word: str) -> None:
    for running in self._left:
      running.tell(word)

  def _end(self) -> None:
    for running in self._left:
      running.kill()
