"""Reading along on all workers of a pod, until each of them has said how its run ended."""

import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from launch.gcloud import Gcloud, Lost
from model.errors import DONE

_LINES_LOST = 10  # How often in a row a line may be lost without any news.
_SETTLE_SECONDS = 120.0  # For the others once one has failed: they wait for it, then name it.


class Run:
  """A run that was started on all workers."""

  def __init__(
    self, cloud: Gcloud, workers: dict[str, int], attempt: str,
    followed: Callable[[str], list[str]], log: Path, stop: Callable[[], None],
  ):  # fmt: skip
    self._cloud, self._workers, self._attempt = cloud, workers, attempt
    self._followed, self._log, self._stop = followed, log, stop
    self._events: queue.SimpleQueue[tuple[str, bytes | None]] = queue.SimpleQueue()
    self._lines: dict[str, subprocess.Popen] = {}  # To each node that has not ended.
    self._statuses: dict[tuple[str, str], int] = {}  # Of node and worker, in order of their end.
    self._lost = dict.fromkeys(workers, 0)

  def wait(self) -> int:
    """Prints what the workers print to the end.

    Returns:
      0, or the status of the process that failed first.

    Raises:
      Lost: if the VMs are gone, or cannot be reached any more.
    """
    for node in self._workers:
      self._connect(node)
    look = time.monotonic() + 3 * self._cloud.poll
    settle = None  # When the rest is stopped.
    try:
      with self._log.open("ab") as log:
        while self._lines:
          try:
            node, line = self._events.get(timeout=self._cloud.poll)
          except queue.Empty:
            node, line = "", b""
          if line is None:
            self._disconnected(node)
          elif node:
            self._take(node, line, log)
          if settle is None and any(self._statuses.values()):
            settle = time.monotonic() + _SETTLE_SECONDS
          if settle is not None and time.monotonic() > settle:
            settle = float("inf")
            threading.Thread(target=self._stop_others, daemon=True).start()
          if time.monotonic() > look:
            self._check_there()
            look = time.monotonic() + 3 * self._cloud.poll
    finally:
      for process in self._lines.values():
        process.kill()
    return next(filter(None, self._statuses.values()), DONE)

  def _connect(self, node: str) -> None:
    process = subprocess.Popen(
      self._followed(node), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    self._lines[node] = process
    threading.Thread(target=self._read, args=(node, process), daemon=True).start()

  def _read(self, node: str, process: subprocess.Popen) -> None:
    for line in process.stdout or ():
      self._events.put((node, line))
    self._events.put((node, None))

  def _take(self, node: str, line: bytes, log) -> None:
    ended = re.fullmatch(rf"{self._attempt} (\S+) (\d+)\s*", line.decode("utf-8", "replace"))
    self._lost[node] = 0
    if ended:
      self._statuses[node, ended[1]] = int(ended[2])
      line = f"[{ended[1]}] ended with status {ended[2]}\n".encode()
    if len(self._workers) > 1:
      line = f"{node} ".encode() + line
    log.write(line)
    log.flush()
    sys.stdout.write(line.decode("utf-8", "replace"))
    sys.stdout.flush()

  def _disconnected(self, node: str) -> None:
    """Connects again unless all workers of the node have ended."""
    self._lines.pop(node).wait()
    if sum(place[0] == node for place in self._statuses) >= self._workers[node]:
      return
    self._check_there()
    self._lost[node] += 1
    if self._lost[node] > _LINES_LOST:
      raise Lost(f"the line to {node} is lost")
    time.sleep(self._cloud.poll)
    self._connect(node)

  def _check_there(self) -> None:
    """Raises Lost if the request or a node is not there any more."""
    found = self._cloud.ask(self._cloud.describe())
    state = (found or {}).get("state", {}).get("state", "gone")
    if state != "ACTIVE":
      raise Lost(f"the VMs are {state}")
    for node in self._lines:
      seen = self._cloud.ask(self._cloud.describe_node(node))
      state = "gone" if seen is None else seen.get("state", "")
      if state in ("gone", "PREEMPTED", "TERMINATED", "STOPPED"):
        raise Lost(f"node {node} is {state}")

  def _stop_others(self) -> None:
    try:
      self._stop()
    except Lost as lost:
      print(f"the others could not be stopped: {lost}", flush=True)
