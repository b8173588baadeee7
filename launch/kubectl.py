"""The part of kubectl that a JobSet needs: create it, print its logs, wait for its end."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from model.errors import DEFECT, DONE, InputError

_SET = "jobset.sigs.k8s.io/jobset-name"
_ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"
_POLL = 5.0  # Seconds between two looks.
_PATIENCE = 24  # Looks in a row that the cluster may leave without an answer.


class Client:
  """kubectl for one JobSet."""

  def __init__(self, name: str, namespace: str, context: str | None):
    self.name = name
    self._words = ["kubectl", f"--namespace={namespace}"]
    self._words += [f"--context={context}"] if context else []

  def shown(self, *words: str) -> str:
    """A command as a person would type it."""
    return shlex.join([*self._words, *words])

  def logs(self, attempt: int | None = None) -> list[str]:
    """The words that print what all pods (of an attempt) say, and what they go on to say."""
    which = f"{_SET}={self.name}" + (f",{_ATTEMPT}={attempt}" if attempt is not None else "")
    follow = ["logs", "--follow", "--prefix", "--tail=-1", "--max-log-requests=10000"]
    return [*follow, f"--selector={which}"]

  def create(self, manifest: str) -> None:
    """Creates the JobSet.

    Raises:
      InputError: if there is one of that name, or the cluster refuses it.
    """
    done = self._run(["create", "--filename=-"], manifest)
    if "AlreadyExists" in done.stderr or "already exists" in done.stderr:
      raise InputError(
        f"there is a jobset {self.name} already: wait for its end, or end it with "
        f"{self.shown('delete', 'jobset', self.name)}, and start again: the run goes on from its "
        "workdir."
      )
    if done.returncode:
      raise InputError(f"kubectl create failed: {done.stderr.strip()}")

  def read(self, *words: str) -> dict[str, Any]:
    """What `kubectl get … --output=json` says, asked for again while the cluster is silent."""
    for _ in range(_PATIENCE):
      done = self._run(["get", *words, "--output=json"])
      if not done.returncode:
        return json.loads(done.stdout)
      if "NotFound" in done.stderr:
        break
      time.sleep(_POLL)
    raise InputError(f"kubectl get {' '.join(words)} failed: {done.stderr.strip()}")

  def pods(self, attempt: int) -> list[dict[str, Any]]:
    """The pods of an attempt."""
    return self.read("pods", f"--selector={_SET}={self.name},{_ATTEMPT}={attempt}")["items"]

  def stream(self, words: list[str], log: Path) -> None:
    """Runs kubectl and adds what it prints to `log`, and to our output."""
    with (
      log.open("ab") as file,
      subprocess.Popen([*self._words, *words], stdout=subprocess.PIPE) as process,
    ):
      for line in process.stdout or ():
        file.write(line)
        file.flush()
        sys.stdout.write(line.decode("utf-8", "replace"))
        sys.stdout.flush()

  def _run(self, words: list[str], text: str = "") -> subprocess.CompletedProcess:
    try:
      return subprocess.run(
        [*self._words, *words], input=text, capture_output=True, text=True, check=False
      )
    except FileNotFoundError:
      raise InputError(
        "kubectl is not installed here: install it, or use --dry_run and take the manifest."
      ) from None


def follow(client: Client, log: Path, count: int) -> int:
  """Prints the logs of each attempt until the JobSet has ended.

  Args:
    count: pods of an attempt: kubectl reads along with those that are there, not with later ones.

  Returns:
    0 if it completed, else the exit status of a process that failed, or 1 if none is known.

  Raises:
    InputError: where the cluster does not answer any more, or the JobSet is gone.
  """
  printed = -1  # The last attempt whose logs were printed to the end.
  pods: list[dict[str, Any]] = []
  while True:
    status = client.read("jobset", client.name).get("status", {})
    attempt, end = int(status.get("restarts", 0)), status.get("terminalState")
    pods = client.pods(attempt) or pods
    started = sum(map(_has_started, pods))
    if attempt > printed and (started >= count or (end and started)):
      client.stream(client.logs(attempt), log)
      printed = attempt
      continue
    if end:
      print(f"jobset {client.name}: {end} after {attempt} restarts; log: {log}")
      return DONE if end == "Completed" else next(filter(None, map(_exit_code, pods)), DEFECT)
    time.sleep(_POLL)


def _has_started(pod: dict[str, Any]) -> bool:
  return pod.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed")


def _exit_code(pod: dict[str, Any]) -> int:
  states = [c.get("state", {}) for c in pod.get("status", {}).get("containerStatuses", [])]
  return max((s.get("terminated", {}).get("exitCode", 0) for s in states), default=0)
