"""`--target=tpu`: Cloud TPU VMs that are made for the run, start it, and are deleted after it."""

import contextlib
import dataclasses
import re
import secrets
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from launch import slices, tree
from launch.gcloud import Gcloud, Lost
from launch.job import Job
from launch.options import option
from launch.tpu_follow import Run
from launch.workdir import check_lasting
from launch.xla_flags import xla_environment
from model.errors import DONE, PREEMPTED, USER_ERROR, InputError

UNREAD = ("processes",)  # A process on each worker.
_READY_SECONDS = 900.0  # Until the nodes of an active request are ready.
_STEP_SECONDS = 1800.0  # Until the tree is copied, or installed.
_TYPE = re.compile(r"[a-z0-9]+-\d+")
_INSTALL = (
  "command -v uv >/dev/null || python3 -m pip install --user --quiet uv; "
  'export PATH="$HOME/.local/bin:$PATH"; '
  "uv venv --quiet --allow-existing --python={python} .venv && "
  "uv pip install --quiet --python=.venv/bin/python --editable '.[tpu]'"
)
_GCSFUSE = """\
if ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc from=https://packages.cloud.google.com/apt
  echo "deb [signed-by=$key] $from gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  curl -sSf $from/doc/apt-key.gpg | sudo tee $key >/dev/null
  sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse
fi
if ! mountpoint -q {mount}; then
  sudo mkdir -p {mount} && sudo chown "$(id -u)" {mount}
  gcsfuse --implicit-dirs {bucket} {mount}
fi
"""


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
  mount: str = option("/runs", "Where the bucket is mounted: --workdir has to be in it.")
  python: str = option("3.12", "Version of Python on the VMs.")
  install: str | None = option(
    None, "Shell command that makes .venv in the copied tree; left out, uv and the extra [tpu]."
  )
  queue_hours: float = option(24.0, "Hours to wait in the queue.", at_least=0)
  poll: float = option(20.0, "Seconds between two looks at the VMs.", at_least=0.01)
  grace: float = option(180.0, "Seconds from SIGTERM to SIGKILL for the run.", at_least=0)
  keep: bool = option(
    False, "Leave the VMs when the run has ended, and use them if they are there."
  )


def submit(job: Job, options: Options, dry_run: bool) -> int:
  """Makes the VMs, runs the job on them, prints its logs, and deletes the VMs.

  A run that fails is started again, on the same VMs if they are still there, else on new ones.

  Returns:
    The exit status: 0, that of the process which failed first, or 75 where the VMs were lost once
    too often or Ctrl-C ended the run.

  Raises:
    InputError: for wrong options, and what Cloud TPU refuses (quota, rights, names).
  """
  pod = Pod(job, options, Path.cwd())
  if dry_run:
    print(pod.shown())
    return DONE
  job.logs.mkdir(parents=True, exist_ok=True)
  with _sigterm_as_interrupt(), tempfile.TemporaryDirectory() as folder:
    pod.pack(Path(folder))
    try:
      return _attempts(pod, job)
    except KeyboardInterrupt:
      print("interrupted: the run is asked to save and stop; again: without waiting.", flush=True)
      with contextlib.suppress(KeyboardInterrupt, Lost):
        pod.stop()
      return PREEMPTED
    finally:
      if pod.made and not options.keep:
        pod.delete()
      elif pod.made:
        print(f"the VMs are kept; to delete them: {shlex.join(pod.cloud.delete())}")


def _attempts(pod: "Pod", job: Job) -> int:
  for number, seconds in enumerate([*job.delays(), None], start=1):
    try:
      status = pod.run()
      reason = f"the run ended with status {status}"
    except Lost as lost:
      status, reason = PREEMPTED, str(lost)
    if status in (DONE, USER_ERROR) or seconds is None:
      print(f"{job.name}: {reason}; log: {pod.log}", flush=True)
      return status
    print(
      f"{job.name}: {reason}; restart {number} of {job.max_restarts} in {seconds:g} s", flush=True
    )
    time.sleep(seconds)
  return status


class Pod:
  """The VMs of one run."""

  def __init__(self, job: Job, options: Options, folder: Path):
    self._job, self._options, self._folder = job, options, folder
    _check(job, options)
    self._type = _accelerator_type(options)
    zone = options.zone or ""
    self.cloud = Gcloud(
      job.name, options.slices, zone, options.project, options.internal_ips, options.poll
    )
    self.made = False  # Whether there may be something to delete.
    self.log = job.logs.absolute() / f"{job.name}.log"
    self._names = tree.tracked(folder)
    tree.check_command(job, folder, self._names)
    self._archive = Path(f"{job.name}.tar.gz")
    self._workers: dict[str, int] = {}  # Of each node.

  def pack(self, folder: Path) -> None:
    """Writes what is copied to the workers into `folder`."""
    self._archive = folder / self._archive.name
    tree.pack(self._archive, self._folder, self._names, self._further())

  def run(self) -> int:
    """One attempt.

    Raises:
      Lost, InputError: as the commands do.
    """
    if not self._is_whole():
      self._make()
    attempt = secrets.token_hex(8)
    self.cloud.each(self._copied, _STEP_SECONDS)
    self.cloud.each(self._installed, _STEP_SECONDS)
    self.cloud.each(lambda node: self._started(node, attempt), _STEP_SECONDS)
    print(f"{self._job.name}: started on {sum(self._workers.values())} workers", flush=True)
    followed = lambda node: self._followed(node, attempt)
    return Run(self.cloud, self._workers, attempt, followed, self.log, self.stop).wait()

  def stop(self) -> None:
    """Asks the run to save and stop, on all workers, and waits for that."""
    if self._workers:
      self.cloud.each(self._stopped, self._options.grace + 60)

  def delete(self) -> None:
    """Deletes the VMs; says so where that does not succeed."""
    for _ in range(3):
      with contextlib.suppress(Lost, InputError):
        if self.cloud.ask(self.cloud.describe()) is not None:
          self.cloud.request(self.cloud.delete())
        self.made = False
        print(f"{self._job.name}: the VMs are deleted", flush=True)
        return
      time.sleep(self._options.poll)
    command = shlex.join(self.cloud.delete())
    print(f"error: the VMs could not be deleted and COST MONEY: {command}", file=sys.stderr)

  def shown(self) -> str:
    """All commands in the order in which they run, and the files that they copy."""
    cloud, first = self.cloud, self.cloud.node_names[0]
    steps = [
      self._create(), cloud.describe(), cloud.describe_node(first), self._copied(first),
      self._installed(first), self._started(first, "ATTEMPT"), self._followed(first, "ATTEMPT"),
      cloud.delete(),
    ]  # fmt: skip
    files = "".join(f"# {name}\n{text}\n" for name, text in self._further().items())
    others = f"# those of {first} for {', '.join(cloud.node_names[1:])} too\n"
    return (
      f"# {self._archive}: {len(self._names)} files that git tracks, and\n{files}"
      + "".join(f"{shlex.join(words)}\n" for words in steps)
      + (others if cloud.nodes > 1 else "")
    )

  def _make(self) -> None:
    """Requests the VMs and waits until all of them are ready."""
    if self.made:
      self.delete()
    elif self.cloud.ask(self.cloud.describe()) is not None:
      raise InputError(
        f"there is a queued resource {self._job.name} already: --keep uses it when it is ACTIVE; "
        f"to delete it: {shlex.join(self.cloud.delete())}."
      )
    self.made = True  # Also where only the answer gets lost.
    self.cloud.request(self._create())
    self._wait_in_queue()
    end = time.monotonic() + _READY_SECONDS
    while not self._is_ready():
      if time.monotonic() > end:
        raise Lost("the VMs are not ready in time")
      time.sleep(self._options.poll)

  def _wait_in_queue(self) -> None:
    end, before = time.monotonic() + 3600 * self._options.queue_hours, ""
    while True:
      found = self.cloud.ask(self.cloud.describe())
      state = (found or {}).get("state", {}).get("state", "gone")
      if state != before:
        print(f"{self._job.name}: {state}", flush=True)
      if state == "ACTIVE":
        return
      if state in ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING", "gone"):
        text = (found or {}).get("state", {}).get("failedData", {}).get("error", {})
        reason = f"the request is {state}: {text.get('message', 'no reason is given')}"
        raise (InputError if "quota" in reason.lower() else Lost)(reason)
      if time.monotonic() > end:
        raise InputError(f"the request is {state} after --queue_hours={self._options.queue_hours}.")
      before = state
      time.sleep(self._options.poll)

  def _is_whole(self) -> bool:
    """Whether all VMs are there and of use, from an attempt before or kept."""
    if not self.made and not self._options.keep:
      return False
    found = self.cloud.ask(self.cloud.describe())
    self.made = self.made or found is not None
    active = found is not None and found.get("state", {}).get("state") == "ACTIVE"
    with contextlib.suppress(Lost):
      return active and self._is_ready()
    return False

  def _is_ready(self) -> bool:
    """Whether every node is ready; counts their workers.

    Raises:
      Lost: if one never will be.
    """
    self._workers = {}
    for node in self.cloud.node_names:
      found = self.cloud.ask(self.cloud.describe_node(node))
      state = "missing" if found is None else found.get("state", "")
      if state in ("missing", "PREEMPTED", "TERMINATED", "STOPPED", "DELETING"):
        raise Lost(f"node {node} is {state}")
      if found is None or state != "READY":
        return False
      self._workers[node] = len(found.get("networkEndpoints", []))
    return all(self._workers.values())

  def _create(self) -> list[str]:
    options = self._options
    further = ["--spot"] if options.spot else []
    version = options.runtime_version or ""
    return self.cloud.create(self._type, version, [*further, *options.gcloud])

  def _copied(self, node: str) -> list[str]:
    return self.cloud.copy(str(self._archive), node, f"{self._job.name}.tar.gz")

  def _installed(self, node: str) -> list[str]:
    name = self._job.name
    unpacked = f"mkdir -p {name} && tar -xzf {name}.tar.gz -C {name}"
    return self.cloud.ssh(node, f"{unpacked} && cd {name} && bash .launch/install.sh")

  def _started(self, node: str, attempt: str) -> list[str]:
    return self._worker(node, f"start {attempt}")

  def _followed(self, node: str, attempt: str) -> list[str]:
    return self._worker(node, f'follow {attempt} "$(hostname)"')

  def _stopped(self, node: str) -> list[str]:
    return self._worker(node, f"stop {self._options.grace:g}")

  def _worker(self, node: str, action: str) -> list[str]:
    return self.cloud.ssh(node, f"cd {self._job.name} && python3 -m launch.worker {action}")

  def _further(self) -> dict[str, str]:
    """Texts beside the tree: what is installed, and what is run."""
    options, environment = self._options, dict(self._job.environment)
    install = options.install or _INSTALL.format(python=shlex.quote(options.python))
    mount = ""
    if options.bucket:
      quoted = shlex.quote(options.mount), shlex.quote(options.bucket)
      mount = _GCSFUSE.format(mount=quoted[0], bucket=quoted[1])
    values = environment | xla_environment("tpu", environment, table=self._job.xla_table)
    orders = tree.orders(self._job, values)
    return {".launch/install.sh": f"set -e\n{mount}{install}\n", ".launch/job.json": orders}


def _check(job: Job, options: Options) -> None:
  for name in ("zone", "runtime_version"):
    if not getattr(options, name):
      raise InputError(f"--{name} is needed with --target=tpu.")
  if not job.name[0].isalpha():
    raise InputError(f"--name={job.name}: Cloud TPU wants a letter at the start.")
  for word in options.gcloud:
    if not re.match(r"--[a-z]", word):
      raise InputError(f"--gcloud={word}: a flag is needed, as in --gcloud=--reserved.")
  if not Path(options.mount).is_absolute():
    raise InputError(f"--mount={options.mount}: an absolute path is needed.")
  if job.max_restarts or not options.keep:  # Else the workdir stays where it is.
    check_lasting(job, options.mount if options.bucket else None, "--bucket")
  dataclasses.replace(job, processes=2)  # Refuses what is not shared out: pods have many workers.


def _accelerator_type(options: Options) -> str:
  if (options.tpu_type is None) == (options.topology is None):
    raise InputError("--tpu_type=v5p-128 or --topology=v5p:4x4x4 is needed, one of them.")
  if options.topology is not None:
    return slices.parse(options.topology).accelerator_type
  if not _TYPE.fullmatch(options.tpu_type or ""):
    raise InputError(f"--tpu_type={options.tpu_type}: a name such as v5p-128 is needed.")
  return options.tpu_type or ""


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
  """SIGTERM ends the launcher as Ctrl-C does: the VMs are deleted."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
