"""Where a run keeps what it needs to go on: that has to outlive the machine it runs on."""

import re
from pathlib import PurePosixPath

from launch.job import Job
from model.errors import InputError

MOUNT = "/runs"  # Where a volume is mounted, unless the user says otherwise.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


def check_mount(mount: str | None, bucket: str | None, volume: str | None, flag: str) -> str | None:
  """Where what lasts is mounted; None: nothing is.

  Args:
    mount: what the user said; None: nothing.
    bucket: name of a Cloud Storage bucket, if one is mounted.
    volume: what is mounted, a bucket or something else, if anything is.
    flag: the flag or flags that mount something.

  Raises:
    InputError: for no name of a bucket, a relative path, or a path and nothing to mount.
  """
  if bucket is not None and not _BUCKET.fullmatch(bucket):
    raise InputError(
      f"--bucket={bucket}: the name of a bucket is needed, without gs:// and folders."
    )
  if mount is not None and volume is None:
    raise InputError(f"--mount={mount} has no effect without {flag}.")
  if mount is not None and not PurePosixPath(mount).is_absolute():
    raise InputError(f"--mount={mount}: an absolute path is needed.")
  return None if volume is None else mount or MOUNT


def workdir(command: tuple[str, ...]) -> str | None:
  """The value of --workdir in a command; of several the last, as absl has it."""
  found = None
  for word, following in zip(command, (*command[1:], ""), strict=True):
    name, equals, value = word.partition("=")
    if name in ("--workdir", "-workdir"):
      found = value if equals else following
  return found


def check_lasting(job: Job, mount: str | None, flag: str) -> None:
  """Refuses to train into a workdir that is lost with its machine.

  Args:
    mount: absolute path at which what lasts is mounted; None: nothing is.
    flag: the flag or flags that mount something.

  Raises:
    InputError: if the command trains, and its workdir is not in `mount`.
  """
  if job.command[0] != "train":
    return
  place = workdir(job.command)
  here = "a run without --workdir" if place is None else f"--workdir={place}"
  if mount is None:
    raise InputError(f"{here} is lost with the machine: {flag} mounts what lasts.")
  path = PurePosixPath(place or ".")
  if ".." in path.parts or not path.is_relative_to(PurePosixPath(mount)):
    example = f"--workdir={mount.rstrip('/')}/{job.name}"
    raise InputError(f"{here} is lost with the machine, {mount} is not: use {example}.")
