"""The processes of a run: who we are, joined in bounded time, and what one tells the others.

A process of a run of several has JAX's own variables: JAX_COORDINATOR_ADDRESS (host:port of process
0), JAX_NUM_PROCESSES and JAX_PROCESS_ID; on TPU pods JAX finds them out. Without them a process is
alone.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import NoReturn

from model.errors import PREEMPTED, InputError
from train.group import ALONE, Group, Joined, Place, listen, reach
from train.watch import LINGER, Hub, host_name, post, receive

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_group: Joined | None = None  # The one that this process is in.


def find_place(environment: Mapping[str, str]) -> Place | None:
  """This process' place, from JAX's variables or what JAX finds on a TPU pod; None: it is alone.

  Raises:
    InputError: if only some variables are set, or they do not fit together.
  """
  given = {name: environment.get(name, "") for name in VARIABLES}
  missing = [name for name, value in given.items() if not value]
  if len(missing) == len(VARIABLES):
    return _on_tpu_pod(environment)
  if missing:
    there = next(name for name in VARIABLES if name not in missing)
    raise InputError(
      f"{' and '.join(missing)} is not set, and {there}={given[there]} is: a run of several "
      f"processes needs {', '.join(VARIABLES)}, a process by itself none of them."
    )
  address, count, index = (given[name] for name in VARIABLES)
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise InputError(f"JAX_COORDINATOR_ADDRESS={address} is not HOST:PORT of process 0.")
  if not count.isdecimal() or int(count) < 1:
    raise InputError(f"JAX_NUM_PROCESSES={count} must be a whole number of at least 1.")
  if not index.isdecimal() or int(index) >= int(count):
    raise InputError(f"JAX_PROCESS_ID={index} must be one of 0 to {int(count) - 1}.")
  return Place(address, int(count), int(index)) if int(count) > 1 else None


def _on_tpu_pod(environment: Mapping[str, str]) -> Place | None:
  """What JAX finds out about a TPU pod; None where there is none, or it has one worker."""
  from jax._src import clusters  # It has no public name.
  from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

  platforms = environment.get("JAX_PLATFORMS", "")
  if not running_in_cloud_tpu_vm or (platforms and "tpu" not in platforms):
    return None
  found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 60)
  coordinator, count, index, _ = found
  if coordinator is None or count is None or index is None or count == 1:
    return None
  return Place(coordinator, count, index)


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
