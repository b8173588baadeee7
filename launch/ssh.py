"""`--target=ssh`: one or more processes on each host of a file."""

import dataclasses

from launch.job import Job
from launch.options import option

UNREAD: tuple[str, ...] = ()  # Shared flags without effect here.


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags of `--target=ssh`."""

  hosts_file: str | None = option(None, "File with a host a line.")


def submit(job: Job, options: Options, dry_run: bool) -> int:
  """Runs the job to its end; returns its exit status."""
  print(job, options, dry_run)
  return 0
