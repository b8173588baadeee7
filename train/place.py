"""Where a process stands in its run, and the way to process 0.

A process of a run of several has JAX's own variables: JAX_COORDINATOR_ADDRESS (host:port of process
0), JAX_NUM_PROCESSES and JAX_PROCESS_ID; on TPU pods JAX finds them out. Without them a process is
alone.
"""

import asyncio
import dataclasses
import os
import socket
import time
from collections.abc import Mapping

from model.errors import InputError
from train.watch import LIMIT, host_name

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
RETRY = 0.2  # Seconds between attempts to reach process 0.


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a process stands in its run."""

  coordinator: str  # host:port of process 0.
  count: int
  index: int

  @property
  def address(self) -> tuple[str, int]:
    """Host and port of process 0."""
    host, _, port = self.coordinator.rpartition(":")
    return host.strip("[]"), int(port)


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


async def reach(place: Place, seconds: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
  """A connection to process 0, which may start later.

  Raises:
    OSError: if it does not answer in time.
  """
  deadline = time.monotonic() + seconds
  while True:
    try:
      connect = asyncio.open_connection(*place.address, limit=LIMIT)
      return await asyncio.wait_for(connect, max(0.1, deadline - time.monotonic()))
    except OSError:  # Also the end of the time.
      if time.monotonic() > deadline:
        raise
      await asyncio.sleep(RETRY)


def listen(port: int) -> socket.socket:
  """A socket whose port JAX's coordinator can listen on once this one is closed."""
  host = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
  both = socket.has_dualstack_ipv6() and not host
  kind = socket.AF_INET6 if both or ":" in host else socket.AF_INET
  listener = socket.socket(kind, socket.SOCK_STREAM)
  try:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if both:
      listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind((host, port))
    listener.listen(1024)
  except OSError:
    listener.close()
    raise
  return listener


def not_reached(place: Place, bound: float, error: OSError) -> str:
  """Why a process cannot reach the others, in the words of an error."""
  if place.index == 0:
    port = place.address[1]
    return f"process 0 cannot listen on port {port} ({error.strerror}): name another port."
  why = f" ({error.strerror})" if error.strerror else ""
  return (
    f"process 0 at {place.coordinator} has not answered process {place.index} ({host_name()}) for "
    f"{bound:g} s (barrier_seconds){why}: see whether it is running, JAX_COORDINATOR_ADDRESS names "
    "its host, and its port is open."
  )
