"""`--target=local`: processes on this machine."""

import dataclasses

from launch.job import Job
from launch.options import option

UNREAD: tuple[str, ...] = ()  # Shared flags without effect here.


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags of `--target=local`."""

  devices_per_process: int | None = option(None, "Devices of each process.", at_least=1)


def submit(job: Job, options: Options, dry_run: bool) -> int:
  """Runs the job to its end; returns its exit status."""
  print(job, options, dry_run)
  return 0
