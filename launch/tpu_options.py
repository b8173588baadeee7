"""What `--target=tpu` is told, and what of it cannot be."""

import dataclasses
import re

from launch import slices
from launch.job import Job
from launch.options import option
from launch.workdir import check_lasting, check_mount
from model.errors import InputError

_TYPE = re.compile(r"[a-z0-9]+-\d+")


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags of `--target=tpu`."""

  tpu_type: str | None = option(None, "Accelerator type, for example v5p-128 or v5litepod-16.")
  topology: str | None = option(None, "In its place, the slice as in v5p:4x4x4.")
  slices: int = option(1, "TPU slices.", at_least=1)
  zone: str | None = option(None, "Zone, for example us-east5-a.")
  project: str | None = option(None, "Google Cloud project; left out, the one gcloud is set to.")
  runtime_version: str | None = option(None, "Image of the VMs, for example v2-alpha-tpuv5.")
  spot: bool = option(False, "Spot VMs: cheaper, and taken away at any time.")
  gcloud: tuple[str, ...] = option(
    (), "A further flag of `queued-resources create`, as in --gcloud=--reserved; several times."
  )
  internal_ips: bool = option(False, "VMs without external addresses, reached by internal ones.")
  bucket: str | None = option(None, "Cloud Storage bucket that is mounted at --mount (gcsfuse).")
  mount: str | None = option(
    None, "Where the bucket is mounted; left out, /runs. --workdir has to be in it."
  )
  python: str | None = option(None, "Version of Python that uv installs; left out, 3.12.")
  install: str | None = option(
    None, "Shell command that makes .venv in the copied tree; left out, uv and the extra [tpu]."
  )
  queue_hours: float = option(24.0, "Hours to wait in the queue.", at_least=0)
  poll: float = option(20.0, "Seconds between two looks at the VMs.", at_least=0.01)
  grace: float = option(180.0, "Seconds from SIGTERM to SIGKILL for the run.", at_least=0)
  keep: bool = option(
    False, "Leave the VMs when the run has ended, and use them if they are there."
  )


def check(job: Job, options: Options) -> None:
  """Refuses, with an InputError, what could not work, before anything is made."""
  for name in ("zone", "runtime_version"):
    if not getattr(options, name):
      raise InputError(f"--{name} is needed with --target=tpu.")
  if not job.name[0].isalpha():
    raise InputError(f"--name={job.name}: Cloud TPU wants a letter at the start.")
  for word in options.gcloud:
    if not re.match(r"--[a-z]", word):
      raise InputError(f"--gcloud={word}: a flag is needed, as in --gcloud=--reserved.")
  if options.install and options.python:
    raise InputError("--python has no effect with --install, which brings a Python of its own.")
  mount = check_mount(options.mount, options.bucket, options.bucket, "--bucket")
  if job.max_restarts or not options.keep:  # Else the workdir stays where it is.
    check_lasting(job, mount, "--bucket")
  dataclasses.replace(job, processes=2)  # Refuses what is not shared out: pods have many workers.


def accelerator_type(options: Options) -> str:
  """What Cloud TPU calls the slice that was chosen.

  Raises:
    InputError: if none was, or two, or there is none like it.
  """
  if (options.tpu_type is None) == (options.topology is None):
    raise InputError("--tpu_type=v5p-128 or --topology=v5p:4x4x4 is needed, one of them.")
  if options.topology is not None:
    return slices.parse(options.topology).accelerator_type
  if not _TYPE.fullmatch(options.tpu_type or ""):
    raise InputError(f"--tpu_type={options.tpu_type}: a name such as v5p-128 is needed.")
  return options.tpu_type or ""
