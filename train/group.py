"""All processes of a run, as one of them sees them."""

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from model.errors import DEFECT, users_status
from train.place import RETRY, Place, listen, not_reached, reach
from train.watch import LIMIT, Hub, Message, host_name, period, post, receive

_LAST = 5.0  # Seconds that a process which ends waits for what the others have to say.
_UNWINDING = 30.0  # Seconds that a process which failed has for what it does at its end.
_SELDOM = 0.2  # Seconds between reports of places, which steps of milliseconds come to.
_GOES_ON = "The same command goes on from the last checkpoint."


class Group:
  """All processes of a run, as one of them sees them. One that is alone has nobody to wait for.

  Its methods are the main thread's. All processes come to the same places in the same order.

  Attributes:
    index, count: which process this is, of how many.
  """

  index, count = 0, 1

  def at(self, label: str, *, together: bool = False, patient: bool = False) -> None:
    """Says where this process is.

    Args:
      label: the place, in the words of an error.
      together: nobody can leave it before all are there.
      patient: some may take much longer here than others, who have a cache.
    """

  def share(self, label: str, value: Any) -> list[Any]:
    """The plain values that all processes give, by process; waits for them."""
    return [value]

  @contextlib.contextmanager
  def turn(self, label: str) -> Iterator[None]:
    """Lets process 0 through first: the others find what it made."""
    self.at(label, patient=True)
    if self.index > 0:
      self.share(f"what process 0 makes of {label}", None)
    yield
    if self.index == 0:
      self.share(f"what process 0 makes of {label}", None)

  def name(self, index: int) -> str:
    """A process as a person knows it."""
    return f"process {index} ({host_name()})"

  def stop_asked(self, step: int, received: bool) -> bool:
    """Whether all are to stop after `step`; `received`: whether a signal asked this one to."""
    return received

  def telling(self) -> contextlib.AbstractContextManager[None]:
    """Around what others wait for: an exception in it makes them end."""
    return contextlib.nullcontext()

  def tell(self, status: int, message: str) -> None:
    """Makes all others end with this line and status."""


class Joined(Group):
  """One of several processes. Made by `joined`."""

  handler: Any = None  # Of SIGABRT; C keeps no reference to it.

  def __init__(self, place: Place, bound: float):
    self.index, self.count = place.index, place.count
    self._place, self._bound = place, bound
    self._hosts: list[str] = []
    self._lock = threading.Condition()
    self._started = self._done = self._failing = self._stopping = False
    self._shared: list[list[Any]] = []
    self._asked, self._stop_step = -1, None
    self._count, self._reported, self._label = 0, 0.0, "the start"
    self._place_message = _at(0, self._label)
    self._end: Message | None = None  # What the hub said of an end that this process caused.
    self._heard = time.monotonic()
    self._writer: asyncio.StreamWriter | None = None
    self._loop = asyncio.new_event_loop()
    self._tasks: set[Any] = set()
    threading.Thread(target=self._run, name="processes", daemon=True).start()

  def at(self, label: str, *, together: bool = False, patient: bool = False) -> None:
    self._count, self._label = self._count + 1, label
    self._place_message = _at(self._count, label, together, patient)
    now = time.monotonic()
    if now - self._reported > _SELDOM:
      self._reported = now
      self._send(self._place_message)

  def share(self, label: str, value: Any) -> list[Any]:
    self.at(label)
    self._send(self._place_message)
    self._send(dict(kind="share", value=value))
    self._wait(lambda: self._shared)
    with self._lock:
      return self._shared.pop(0)

  def name(self, index: int) -> str:
    return f"process {index} ({self._hosts[index]})"

  def stop_asked(self, step: int, received: bool) -> bool:
    if received and not self._stopping:
      self._send(dict(kind="stop"))
      self._wait(lambda: self._stopping)
    with self._lock:
      if not self._stopping:
        self._asked = step
        return False
    self._wait(lambda: self._stop_step is not None)
    return step >= (self._stop_step or 0)

  def tell(self, status: int, message: str) -> None:
    self._failing = True
    self._send(dict(kind="end", status=status, message=message, cause=True))
    self._wait(lambda: self._end is not None, _LAST)

  def start(self) -> None:
    """Waits for all processes, then joins them in JAX."""
    self._wait(lambda: self._started)
    outcome: list[Exception | None] = []
    thread = threading.Thread(target=self._initialize, args=(outcome,), daemon=True)
    thread.start()  # In the main thread no signal would be heard.
    while not outcome:
      thread.join(0.1)
    if outcome[0] is not None:
      raise outcome[0]

  def finish(self) -> None:
    """Waits until all have come to the end, and leaves JAX's group."""
    import jax

    self.at("the end")
    self._send(self._place_message)
    self._send(dict(kind="done"))
    self._wait(lambda: self._done)
    jax.distributed.shutdown()
    with contextlib.suppress(RuntimeError):
      self._loop.call_soon_threadsafe(self._loop.stop)

  @contextlib.contextmanager
  def telling(self) -> Iterator[None]:
    """Around what others wait for: an exception in it makes them end.

    Where another process is the cause, this one ends with the others; else the exception goes on,
    for half a minute at most.
    """
    try:
      yield
    except BaseException as error:
      if not self._failing:
        self._fail(error)
      raise

  def _fail(self, error: BaseException) -> None:
    status = users_status(error)
    if status is None:
      end = f"error: {self.name_here()} failed at {self._label}."
      lines = [*traceback.format_exception(error), end]
      said, status = f"{type(error).__name__}: {error}".splitlines()[0][:200], DEFECT
      self._failing = True
      self._send(dict(kind="end", status=status, message=said, cause=False))
      self._wait(lambda: self._end is not None, self._bound + _LAST)
    else:
      lines = ["error: " + " ".join(str(getattr(error, "message", error)).split())]
      self.tell(status, f"{lines[0]} ({self.name_here()})")
    # What the unwinding waits for may never come: the others have ended.
    seconds = max(_LAST, min(_UNWINDING, self._bound))
    timer = threading.Timer(seconds, last_words, ("".join(lines), status))
    timer.daemon = True
    timer.start()

  def name_here(self) -> str:
    """This process as a person knows it."""
    return f"process {self.index} ({host_name()})"

  def aborted(self) -> NoReturn:
    """The end of a process that a library aborts: says who is missing, if anyone is."""
    deadline = time.monotonic() + period(self._bound) + _LAST
    while time.monotonic() < deadline:
      time.sleep(0.05)  # The hub's word ends the process.
    last_words(
      f"error: {self.name_here()} was aborted by a library at {self._label}, whose message is "
      "above. The same command goes on from the last checkpoint.", DEFECT
    )  # fmt: skip

  def _initialize(self, outcome: list[Exception | None]) -> None:
    import jax

    # Signals stay ours: this group agrees on the last step.
    jax.config.update("jax_enable_preemption_service", False)
    wait = max(1, round(self._bound))
    try:
      jax.distributed.initialize(
        self._place.coordinator, self.count, self.index, cluster_detection_method="deactivate",
        initialization_timeout=wait, heartbeat_timeout_seconds=2 * wait + 60,
        shutdown_timeout_seconds=wait,
      )  # fmt: skip
    except Exception as error:  # Raised by `start` in the main thread.
      outcome.append(error)
    else:
      outcome.append(None)

  def _wait(self, done: Callable[[], Any], seconds: float = float("inf")) -> None:
    """Waits for what the other thread hears; in short pieces, so that signals are heard too."""
    deadline = time.monotonic() + seconds
    with self._lock:
      while not done() and time.monotonic() < deadline:
        self._lock.wait(0.1)

  def _send(self, message: Message) -> None:
    def put() -> None:
      if self._writer is not None:
        post(self._writer, message)

    with contextlib.suppress(RuntimeError):  # The loop has ended.
      self._loop.call_soon_threadsafe(put)

  def _run(self) -> None:
    asyncio.set_event_loop(self._loop)
    try:
      self._loop.run_until_complete(self._member())
    except Exception as error:
      if not self._done:  # `finish` stops the loop; anything else leaves nobody on watch.
        line = f"error: {self.name_here()} can watch the others no more."
        last_words("".join([*traceback.format_exception(error), line]), DEFECT)

  async def _member(self) -> None:
    try:
      reader, self._writer = await (
        self._own_hub() if self.index == 0 else reach(self._place, self._bound)
      )
    except OSError as error:
      last_words(f"error: {not_reached(self._place, self._bound, error)}", DEFECT)
    post(self._writer, dict(kind="hello", index=self.index, count=self.count, host=host_name()))
    self._heard = time.monotonic()
    self._tasks.add(asyncio.create_task(self._watch()))
    while (message := await receive(reader)) is not None:
      self._heard = time.monotonic()
      with self._lock:
        self._take(message)
        self._lock.notify_all()
    if not self._done:
      self._lost("is gone")

  async def _own_hub(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    deadline = time.monotonic() + self._bound
    while True:  # The run that was here before may be ending.
      try:
        listener = listen(self._place.address[1])
        break
      except OSError:
        if time.monotonic() > deadline:
          raise
        await asyncio.sleep(RETRY)
    hub = Hub(self.count, self._bound, lambda: server.close())
    server = await asyncio.start_server(hub.serve, sock=listener, limit=LIMIT)
    self._tasks.add(asyncio.create_task(hub.watch()))
    ours, theirs = socket.socketpair()
    ends = await asyncio.open_connection(sock=theirs, limit=LIMIT)
    self._tasks.add(asyncio.create_task(hub.serve(*ends)))
    return await asyncio.open_connection(sock=ours, limit=LIMIT)

  async def _watch(self) -> None:
    last = time.monotonic()
    while not self._done:
      await asyncio.sleep(period(self._bound))
      now = time.monotonic()
      # Time in which this thread did not run is nobody's silence.
      self._heard, last = self._heard + max(0.0, now - last - 2 * period(self._bound)), now
      if self._writer is not None:
        post(self._writer, self._place_message)
      silent = time.monotonic() - self._heard
      if silent > self._bound + _LAST:
        self._lost(f"has been silent for {silent:.0f} s")

  def _take(self, message: Message) -> None:
    kind = message["kind"]
    if kind == "start":
      self._hosts, self._started = message["hosts"], True
    elif kind == "shared":
      self._shared.append(message["values"])
    elif kind == "stopping":
      self._stopping = True
      self._send(dict(kind="asked", step=self._asked))
    elif kind == "stop":
      self._stop_step = message["step"]
    elif kind == "done":
      self._done = True
    elif kind == "end":
      self._end = message
      if not self._failing or message["index"] != self.index:
        last_words(message["message"], message["status"])

  def _lost(self, what: str) -> None:
    """Ends this process because it hears nothing of process 0, where the hub is."""
    host = self._hosts[0] if self._hosts else self._place.coordinator
    if self._failing and self._end is not None:
      return
    last_words(
      f"error: process 0 ({host}) {what}; this is {self.name_here()}, at {self._label}. All others "
      "end; its output and its host say why. The same command goes on from the last checkpoint.",
      DEFECT,
    )


ALONE = Group()


def _at(count: int, label: str, together: bool = False, patient: bool = False) -> Message:
  return dict(kind="at", count=count, label=label, together=together, patient=patient)


def last_words(line: str, status: int) -> NoReturn:
  """Ends this process, whatever its other threads do; nothing is printed after `line`."""
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  own = os.dup(2)
  with contextlib.suppress(OSError):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  os.write(own, f"{line}\n".encode())
  os._exit(status)
