"""The gcloud commands that make TPU VMs, reach all their workers and delete them."""

import dataclasses
import json
import shlex
import subprocess
import time
from collections.abc import Callable
from typing import Any

from model.errors import InputError

# What is no fault of the request; gRPC's names of these states, and Google's words.
_PASSING = (
  "UNAVAILABLE",
  "INTERNAL",
  "DEADLINE_EXCEEDED",
  "ABORTED",
  "internal error",
  "HttpError 50",
)
_PATIENCE = 5  # How often a question is asked again.
_ALIVE = ("ServerAliveInterval=15", "ServerAliveCountMax=4")  # A dead line ends in a minute.


class Lost(Exception):
  """The machines, or the way to them, were lost; a new attempt may succeed."""


@dataclasses.dataclass(frozen=True)
class Gcloud:
  """gcloud's commands for one queued resource and its nodes.

  Attributes:
    name: of the queued resource; nodes have it too.
    nodes: TPU VMs (slices).
    zone, project: where; no project: gcloud's own setting.
    internal_ips: machines without external addresses.
    poll: seconds between two looks.
  """

  name: str
  nodes: int
  zone: str
  project: str | None
  internal_ips: bool
  poll: float

  @property
  def node_names(self) -> list[str]:
    """Names of the nodes, as gcloud makes them from a prefix."""
    return [f"{self.name}-{i}" for i in range(self.nodes)] if self.nodes > 1 else [self.name]

  def create(self, accelerator_type: str, runtime_version: str, further: list[str]) -> list[str]:
    """The words that put the request into the queue."""
    which = [f"--node-id={self.name}"]
    if self.nodes > 1:
      which = [f"--node-count={self.nodes}", f"--node-prefix={self.name}"]
    kind = [f"--accelerator-type={accelerator_type}", f"--runtime-version={runtime_version}"]
    internal = ["--internal-ips"] if self.internal_ips else []
    return self._queued("create", *kind, *which, *internal, *further, "--async")

  def describe(self) -> list[str]:
    """The words that ask for the state of the request."""
    return self._queued("describe", "--format=json")

  def delete(self) -> list[str]:
    """The words that delete the request and its nodes."""
    return self._queued("delete", "--force")

  def describe_node(self, node: str) -> list[str]:
    """The words that ask for the state and the workers of a node."""
    return self._vm("describe", node, "--format=json")

  def copy(self, path: str, node: str, target: str) -> list[str]:
    """The words that copy a file to all workers."""
    return self._vm("scp", path, f"{node}:{target}", "--worker=all", *self._internal())

  def ssh(self, node: str, command: str) -> list[str]:
    """The words that run a command on all workers."""
    flags = [f"--ssh-flag=-o {word}" for word in _ALIVE]
    return self._vm("ssh", node, "--worker=all", f"--command={command}", *flags, *self._internal())

  def request(self, words: list[str]) -> None:
    """Runs what changes something.

    Raises:
      InputError: if it is refused, in gcloud's words.
      Lost: if the service has trouble of its own.
    """
    done = _run(words)
    if not done.returncode:
      return
    text = done.stderr.strip()
    if any(word in text for word in _PASSING) and "quota" not in text.lower():
      raise Lost(f"Cloud TPU has trouble: {text}")
    raise InputError(f"gcloud {words[4]} failed: {text}")

  def ask(self, words: list[str]) -> dict[str, Any] | None:
    """What a describe command says; None if there is no such thing.

    Raises:
      Lost: if there is no answer, asked again and again.
    """
    text = ""
    for _ in range(_PATIENCE):
      done = _run(words)
      if not done.returncode:
        return json.loads(done.stdout)
      text = done.stderr.strip()
      if "NOT_FOUND" in text or "not found" in text:
        return None
      time.sleep(self.poll)
    raise Lost(f"gcloud does not say what became of {self.name}: {text}")

  def each(self, what: Callable[[str], list[str]], seconds: float) -> None:
    """Runs a command for each node, at the same time, on all workers.

    Raises:
      Lost: if it fails on a worker, several times, or takes too long.
    """
    left = self.node_names
    for _ in range(_PATIENCE):
      running = {node: _start(what(node)) for node in left}
      errors = {node: _ended(process, seconds) for node, process in running.items()}
      left = [node for node in left if errors[node] is not None]
      if not left:
        return
      time.sleep(self.poll)
    raise Lost(f"{shlex.join(what(left[0]))} failed: {errors[left[0]]}")

  def _queued(self, action: str, *words: str) -> list[str]:
    start = ["gcloud", "compute", "tpus", "queued-resources", action, self.name]
    return [*start, *words, *self._where()]

  def _vm(self, action: str, *words: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", action, *words, *self._where()]

  def _where(self) -> list[str]:
    project = [f"--project={self.project}"] if self.project else []
    return [f"--zone={self.zone}", *project, "--quiet"]

  def _internal(self) -> list[str]:
    return ["--internal-ip"] if self.internal_ips else []


def _run(words: list[str]) -> subprocess.CompletedProcess:
  process = _start(words)
  out, err = process.communicate()
  return subprocess.CompletedProcess(words, process.returncode, out, err)


def _start(words: list[str]) -> subprocess.Popen:
  # In a group of its own: Ctrl-C is for us, and a half-done create or delete would be worse.
  try:
    return subprocess.Popen(
      words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      start_new_session=True,
    )  # fmt: skip
  except FileNotFoundError:
    raise InputError(
      "gcloud is not installed here: install the Google Cloud CLI, or use --dry_run."
    ) from None


def _ended(process: subprocess.Popen, seconds: float) -> str | None:
  """Why a process failed; None: it did not."""
  try:
    out, err = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    process.communicate()
    return f"it took more than {seconds:g} s"
  if not process.returncode:
    return None
  lines = (out + err).strip().splitlines()[-5:]
  return f"status {process.returncode}: {' / '.join(lines)}"
