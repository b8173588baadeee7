"""A run of several processes: joined in bounded time, and left."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from model.errors import PREEMPTED, InputError
from train.group import ALONE, Group, Joined
from train.place import Place, find_place, listen, reach
from train.watch import LINGER, Hub, host_name, post, receive

_group: Joined | None = None  # The one that this process is in.


@contextlib.contextmanager
def joined(bound: float) -> Iterator[Group]:
  """The processes of this run, joined; to be entered before anything touches a device.

  Args:
    bound: seconds that processes wait for one another, here and later.

  Raises:
    InputError: for variables that do not say who this process is.
  """
  global _group
  place = find_place(os.environ)
  if place is None:
    yield ALONE
    return
  _keep_stdout()
  _group = group = Joined(place, bound)
  _hear_aborts(group)
  with group.telling():
    group.start()
    yield group
    group.finish()


async def refuse(place: Place, status: int, line: str) -> None:
  """Tells the others of a run that this process ends before it joined them."""
  message = f"error: {line} (process {place.index}, {host_name()})"
  told = dict(kind="refuse", index=place.index, status=status, message=message)
  if place.index == 0:
    hub = Hub(place.count, LINGER, lambda: None)
    hub.refuse(told)
    server = await asyncio.start_server(hub.serve, sock=listen(place.address[1]))
    await hub.refused()
    server.close()
  else:
    reader, writer = await reach(place, LINGER)
    post(writer, told)
    await asyncio.wait_for(receive(reader), LINGER)


def _keep_stdout() -> None:
  """Leaves stdout to Python: what libraries in C print (Gloo does) goes to stderr."""
  sys.stdout.flush()
  own = os.dup(1)
  os.dup2(2, 1)
  sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: PTH123, SIM115


def leave(status: int, line: str | None = None) -> NoReturn:
  """Ends this process; one of several does not wait for others at its exit, as JAX would.

  Args:
    line: what was wrong, where a user can put it right: told to those that wait to be joined.
  """
  if _group is None:
    place = None
    with contextlib.suppress(InputError):
      place = find_place(os.environ)
    if place is not None and line is not None:
      with contextlib.suppress(OSError):
        asyncio.run(refuse(place, status, line))
    sys.exit(status)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(status)


def stopped(line: str) -> None:
  """Tells the others that this process was stopped by a signal, and ends."""
  if _group is not None:
    _group.tell(PREEMPTED, f"{line} ({_group.name_here()})")


def _hear_aborts(group: Joined) -> None:
  """Lets the last line of a process that JAX aborts say who is missing.

  JAX's client aborts the process when it loses the coordinator, after pages of text of its own; it
  takes no Python function to call instead. A handler of Python's would never run.
  """
  kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
  group.handler = kind(lambda _: group.aborted())
  libc = ctypes.CDLL(None)
  libc.signal.argtypes = [ctypes.c_int, kind]
  libc.signal.restype = ctypes.c_void_p
  libc.signal(int(signal.SIGABRT), group.handler)
