"""The Cloud TPU VMs of one run: requested, filled, started, asked to stop, deleted."""

import contextlib
import secrets
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from launch import tree
from launch.gcloud import Gcloud, Lost
from launch.job import Job
from launch.tpu_follow import Run
from launch.tpu_options import Options, accelerator_type, check
from launch.workdir import MOUNT
from launch.xla_flags import xla_environment
from model.errors import InputError

_READY_SECONDS = 900.0  # Until the nodes of an active request are ready.
_STEP_SECONDS = 1800.0  # Until the tree is copied, or installed.
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
_QUEUED = ("STATE_UNSPECIFIED", "CREATING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES")


class Pod:
  """The VMs of one run."""

  def __init__(self, job: Job, options: Options, folder: Path):
    self._job, self._options, self._folder = job, options, folder
    check(job, options)
    self._type = accelerator_type(options)
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
    try:
      for _ in range(3):
        if self._deleted():
          print(f"{self._job.name}: the VMs are deleted", flush=True)
          self.made = False
          return
        time.sleep(self._options.poll)
    finally:
      if self.made:
        command = shlex.join(self.cloud.delete())
        print(f"error: VMs that COST MONEY may be left; delete them: {command}", file=sys.stderr)

  def _deleted(self) -> bool:
    with contextlib.suppress(Lost, InputError):
      if self.cloud.ask(self.cloud.describe()) is not None:
        self.cloud.request(self.cloud.delete())
      return True
    return False

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
    """Requests the VMs, or finds the request of a run before, and waits until all are ready."""
    found = self.cloud.ask(self.cloud.describe())
    queued = found is not None and not self.made and _state(found) in _QUEUED
    if found is not None and not self.made and not self._options.keep:
      raise InputError(
        f"there is a queued resource {self._job.name} already: --keep uses it; "
        f"to delete it: {shlex.join(self.cloud.delete())}."
      )
    if found is not None and not queued:
      self.made = True
      self.delete()
    self.made = True  # Also where only the answer gets lost.
    if not queued:
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
      state = _state(found)
      if state != before:
        print(f"{self._job.name}: {state}", flush=True)
      if state == "ACTIVE":
        return
      if state not in _QUEUED:
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
    with contextlib.suppress(Lost):
      if _state(self.cloud.ask(self.cloud.describe())) == "ACTIVE" and self._is_ready():
        self.made = True
        return True
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
    options, environment = self._options, self._job.environment
    install = options.install or _INSTALL.format(python=shlex.quote(options.python or "3.12"))
    mount = ""
    if options.bucket:
      quoted = shlex.quote(options.mount or MOUNT), shlex.quote(options.bucket)
      mount = _GCSFUSE.format(mount=quoted[0], bucket=quoted[1])
    flags = xla_environment("tpu", environment, table=self._job.xla_table)
    values = {**environment, **flags}
    orders = tree.orders(self._job, values)
    return {".launch/install.sh": f"set -e\n{mount}{install}\n", ".launch/job.json": orders}


def _state(request: dict[str, Any] | None) -> str:
  """Of a queued resource."""
  return "gone" if request is None else request.get("state", {}).get("state", "STATE_UNSPECIFIED")
