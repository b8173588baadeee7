"""`--target=local`: processes on this machine, its devices divided among them."""

import dataclasses
import os
import random
import socket
import sys
from collections.abc import Mapping

from launch.devices import KINDS, local_gpus, local_kind
from launch.job import OF_PROCESSES, Job, process_environment
from launch.options import option
from launch.processes import Process
from launch.supervise import supervise
from launch.xla_flags import DEVICE_COUNT, flag_value, xla_environment
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
    None, "Port at which the processes meet; left out, a free one.", at_least=1
  )
  grace: float = option(
    30.0, "Seconds that a process has for its end after another one failed.", at_least=0
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
  kind = options.device or local_kind(own)
  port = options.port or free_port()
  devices = _devices(kind, count, options.devices_per_process, own)
  taken = {name: None for name in OF_PROCESSES if name in os.environ}
  common = {**job.environment, "PYTHONUNBUFFERED": "1"}
  if options.device is not None:
    common["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(options.device, options.device)
  common |= xla_environment(
    kind, own, options.devices_per_process if kind == "cpu" else None
  )  # fmt: skip
  argv = watched([sys.executable, *job.argv()[1:]], sys.executable, options.grace)
  return [
    Process(
      rank=rank, label=str(rank), argv=tuple(argv), on_terminal=rank == 0,
      environment=taken | common | devices[rank]
      | process_environment(f"127.0.0.1:{port}", count, rank),
    )
    for rank in range(count)
  ]  # fmt: skip


def watched(argv: list[str], python: str, grace: float, silence: float | None = None) -> list[str]:
  """The command under a watch, which ends it with its launcher."""
  limit = [] if silence is None else [f"--silence={silence:g}"]
  return [python, "-m", "launch.watch", *limit, f"--grace={grace:g}", "--", *argv]


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


def _devices(
  kind: str, count: int, each: int | None, own: Mapping[str, str]
) -> list[dict[str, str]]:
  """For each process the variables that leave it its share of the devices."""
  if kind == "tpu":
    if count > 1 or each is not None:
      given = f"--processes={count}" if count > 1 else f"--devices_per_process={each}"
      raise InputError(
        f"{given}: the chips of a TPU VM are driven by one process. Use --processes=1 here, "
        "--target=tpu for the VMs of a slice, or --device=cpu."
      )
    return [{}]
  if kind == "cpu":
    _check_simulated(each, own)
    return [{}] * count
  gpus = local_gpus(own)
  if each is None and (len(gpus) % count or not gpus):
    raise InputError(
      f"--processes={count} does not divide the {len(gpus)} GPUs of this machine evenly: use a "
      "divisor, or say how many each gets with --devices_per_process."
    )
  each = each or len(gpus) // count
  if count * each > len(gpus):
    raise InputError(
      f"--processes={count} with --devices_per_process={each} needs {count * each} GPUs; this "
      f"machine has {len(gpus)}."
    )
  share = lambda rank: ",".join(gpus[rank * each : (rank + 1) * each])
  return [{"CUDA_VISIBLE_DEVICES": share(rank)} for rank in range(count)]


def _check_simulated(each: int | None, own: Mapping[str, str]) -> None:
  set_already = flag_value(own.get("XLA_FLAGS", ""), DEVICE_COUNT)
  if each is not None and set_already not in (None, str(each)):
    raise InputError(
      f"--devices_per_process={each}, but XLA_FLAGS has {DEVICE_COUNT}={set_already}: leave one "
      "of them out."
    )
