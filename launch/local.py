"""`--target=local`: processes on this machine, its devices divided among them."""

import dataclasses
import os
import random
import socket
import sys

from launch.devices import KINDS, share_environment
from launch.job import OF_PROCESSES, Job, process_environment
from launch.options import option
from launch.processes import Process
from launch.supervise import supervise
from model.errors import DONE, InputError

UNREAD: tuple[str, ...] = ()  # Shared flags without effect here.
PORTS = range(20_000, 30_000)  # Below those that systems give to outgoing connections.


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags of `--target=local`."""

  device: str | None = option(
    None, "Kind of device; left out, what the machine has.", choices=KINDS
  )
  devices_per_process: int | None = option(
    None, "Devices of each process: simulated ones of a CPU; left out, one, and all GPUs are "
    "divided evenly.", at_least=1,
  )  # fmt: skip
  port: int | None = option(
    None, "Port at which the processes meet; left out, a free one.", at_least=1, at_most=65_535
  )
  grace: float = option(
    30.0,
    "Seconds that a process has for its end after another one failed.",
    at_least=0,
    at_most=86_400,
  )


def submit(job: Job, options: Options, dry_run: bool) -> int:
  """Runs the job to its end; returns its exit status.

  Raises:
    InputError: where the devices cannot be divided as asked.
  """
  make = lambda: processes_of(job, options)
  if dry_run:
    print("\n".join(process.shell() for process in make()))
    return DONE
  return supervise(job, make, grace=options.grace, alive_every=None)


def processes_of(job: Job, options: Options) -> list[Process]:
  """The processes of one attempt."""
  count = job.processes or 1
  own = {**os.environ, **job.environment}
  coordinator = f"127.0.0.1:{options.port or free_port()}"
  foreign = {name: None for name in OF_PROCESSES if name in os.environ}
  argv = watched(job.argv(sys.executable), sys.executable, options.grace)
  share = lambda rank: share_environment(
    rank,
    count,
    device=options.device,
    each=options.devices_per_process,
    own=own,
    xla_table=job.xla_table,
  )
  return [
    Process(
      rank=rank, label=str(rank), argv=tuple(argv), on_terminal=rank == 0,
      environment={
        **foreign, "PYTHONUNBUFFERED": "1", **job.environment, **share(rank),
        **process_environment(coordinator, count, rank),
      },
    )
    for rank in range(count)
  ]  # fmt: skip


def watched(argv: list[str], python: str, grace: float, *own: str) -> list[str]:
  """The command under a watch, which ends it with its launcher."""
  return [python, "-m", "launch.watch", *own, f"--grace={grace:g}", "--", *argv]


def free_port() -> int:
  """A port of this machine that nothing listens at."""
  for port in random.sample(PORTS, 100):
    with socket.socket() as probe:
      try:
        probe.bind(("127.0.0.1", port))
      except OSError:
        continue
      return port
  raise InputError("no free port was found: give one with --port.")
