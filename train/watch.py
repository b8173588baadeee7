"""Processes of one run that watch one another: a hub in process 0, a member in each.

Members hold a connection to the hub, on the address where JAX's coordinator listens afterwards, and
say where they are. So a process that was killed is known at once, one that hangs or is cut off
within the bound, and all others end with the same line, which names it. Messages are JSON, one a
line.
"""

import asyncio
import dataclasses
import json
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

from model.errors import DEFECT

_GRACE = 1.0  # Seconds in which further symptoms of one cause are collected.
_SILENT = 10.0  # Seconds without a sign of life that make one suspect when another one fails.
_PATIENCE = 10  # Times the bound where a cache that only some have saves much time.
LINGER = 20.0  # Seconds in which all processes of a run are expected to have started.
LIMIT = 1 << 26  # Bytes of a message at most.
_GOES_ON = "The same command goes on from the last checkpoint."

Message = dict[str, Any]


def period(bound: float) -> float:
  """Seconds between two signs of life."""
  return min(1.0, bound / 10)


async def receive(reader: asyncio.StreamReader) -> Message | None:
  """The next message; None when the connection has ended."""
  try:
    line = await reader.readline()
    message = json.loads(line) if line.endswith(b"\n") else None
    return message if isinstance(message, dict) else None
  except (OSError, ValueError):
    return None


def post(writer: asyncio.StreamWriter, message: Message) -> None:
  """Puts a message on its way."""
  if not writer.is_closing():
    writer.write(json.dumps(message).encode() + b"\n")


@dataclasses.dataclass
class _Member:
  """What the hub knows of a process."""

  host: str
  writer: asyncio.StreamWriter
  heard: float  # When it last gave a sign of life.
  count: int = 0  # Places that it has come to.
  label: str = "the start"
  together: bool = False  # Whether nobody leaves this place before all have come to it.
  patient: bool = False  # Whether one may be here for much longer than the others.
  since: float = 0.0  # When it came there.
  gone: bool = False
  done: bool = False
  values: list[Any] = dataclasses.field(default_factory=list)  # Not yet shared.
  asked: int | None = None  # The last step after which it went on, once a stop was asked for.


class Hub:
  """What process 0 does for all: it gathers them, passes values on, and finds who is missing.

  Args:
    count: processes of the run.
    bound: seconds that processes wait for one another.
    ready: called when all have come, before they hear of it.
  """

  def __init__(self, count: int, bound: float, ready: Callable[[], None]):
    self._count, self._bound, self._ready = count, bound, ready
    self._members: dict[int, _Member] = {}
    self._started = self._stopping = self._ended = False
    self._refusal: Message | None = None  # Why the run does not begin.
    self._refused: set[int] = set()  # Who has heard of it.
    self._symptoms: list[tuple[int, int, str, str]] = []  # (rank, index, sentence, short form)

  async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Listens to one process until its connection ends."""
    hello = await receive(reader)
    if hello is None or hello.get("kind") not in ("hello", "refuse"):
      writer.close()  # It is none of ours.
      return
    if hello["kind"] == "refuse":
      self.refuse(hello)
    if self._refusal is not None:
      self._refused.add(hello["index"])
      post(writer, self._refusal)
      return
    index, host = hello["index"], hello["host"]
    problem = self._problem(hello)
    if problem:
      post(writer, dict(kind="end", status=DEFECT, message=f"error: {problem}", index=index))
      return
    now = time.monotonic()
    member = self._members[index] = _Member(host, writer, now, since=now)
    if len(self._members) == self._count:
      self._started = True
      self._ready()
      self._to_all(dict(kind="start", hosts=[self._members[i].host for i in range(self._count)]))
    while (message := await receive(reader)) is not None:
      member.heard = time.monotonic()
      self._take(index, member, message)
    member.gone = True
    if not member.done and self._started:
      self._symptom(0, index, f"is gone, last heard of at {member.label}")
    elif not self._started:
      del self._members[index]

  def refuse(self, told: Message) -> None:
    """Notes that a process ends before it joined: all others end with its line."""
    if self._refusal is None and not self._started:
      self._refusal = {**told, "kind": "end"}
      for index, member in self._members.items():
        if index > 0:
          self._refused.add(index)
          post(member.writer, self._refusal)

  async def refused(self) -> None:
    """Returns when all others have heard of a refusal, or are not to be expected any more."""
    deadline = time.monotonic() + min(LINGER, self._bound)
    while len(self._refused - {0}) < self._count - 1 and time.monotonic() < deadline:
      await asyncio.sleep(0.05)

  async def watch(self) -> None:
    """Gives signs of life and looks for members that are missing, until the run has ended."""
    began = last = time.monotonic()
    while not self._ended:
      await asyncio.sleep(period(self._bound))
      now = time.monotonic()
      self._forgive(now - last - 2 * period(self._bound))
      last = now
      if self._refusal is not None:
        await self.refused()
        self._ended = True
        self._to_all(self._refusal)
        return
      self._to_all(dict(kind="beat"))
      if self._started:
        self._look(time.monotonic())
      elif time.monotonic() - began > self._bound:
        self._not_joined()

  def _forgive(self, seconds: float) -> None:
    """Counts no time in which the hub itself did not run, and so heard nobody."""
    if seconds > 0:
      for member in self._members.values():
        member.heard += seconds
        member.since += seconds

  def _problem(self, hello: Message) -> str:
    index, count = hello["index"], hello["count"]
    if count != self._count:
      return (
        f"process {index} ({hello['host']}) belongs to a run of {count} processes and process 0 to "
        f"one of {self._count}: JAX_NUM_PROCESSES must be the same."
      )
    if index in self._members:
      return (
        f"two processes say that they are process {index} ({self._members[index].host} and "
        f"{hello['host']}): give each a JAX_PROCESS_ID of its own."
      )
    return ""

  def _take(self, index: int, member: _Member, message: Message) -> None:
    kind = message["kind"]
    if kind == "at":
      if message["count"] != member.count:
        member.since = member.heard
      member.count, member.label = message["count"], message["label"]
      member.together, member.patient = message["together"], message["patient"]
    elif kind == "share":
      member.values.append(message["value"])
      if all(m.values for m in self._members.values()):
        values = [self._members[i].values.pop(0) for i in range(self._count)]
        self._to_all(dict(kind="shared", values=values))
    elif kind == "stop" and not self._stopping:
      self._stopping = True
      self._to_all(dict(kind="stopping"))
    elif kind == "asked":
      member.asked = message["step"]
      steps = [m.asked for m in self._members.values()]
      if None not in steps:
        self._to_all(dict(kind="stop", step=max(s for s in steps if s is not None) + 1))
    elif kind == "done":
      member.done = True
      if all(m.done for m in self._members.values()):
        self._to_all(dict(kind="done"))
    elif kind == "end" and message["cause"]:
      self._end(message["status"], message["message"], index)
    elif kind == "end":  # Perhaps what another one's end brought about.
      self._symptom(1, index, f"failed at {member.label}: {message['message']}")

  def _look(self, now: float) -> None:
    """Finds who has been silent, or behind the others, for longer than the bound."""
    living = {i: m for i, m in self._members.items() if not m.done}
    for index, member in living.items():
      silent = now - member.heard
      if silent > self._bound and not member.gone:
        self._symptom(0, index, f"has been silent for {silent:.0f} s, since {member.label}")
    if len(living) < self._count and living:
      first, label = max(m.count for m in self._members.values()) + 1, "the end"
    else:
      first = max((m.count for m in living.values()), default=0)
      label = next((m.label for m in living.values() if m.count == first), "")
    arrived = [m.since for m in self._members.values() if m.count == first or m.done]
    waiting = now - min(arrived, default=now)
    behind = [(i, m) for i, m in living.items() if m.count < first]
    for index, member in behind:
      bound = self._bound * (_PATIENCE if member.patient else 1)
      if min(waiting, now - member.since) > bound:
        self._symptom(
          0, index, f"has not come to {label} in {bound:g} s, it is still at {member.label}"
        )
    stuck = not behind and living and all(m.together for m in living.values())
    if stuck and now - max(m.since for m in living.values()) > self._bound:
      self._end(DEFECT, _stuck(label, self._bound, self._members), None)

  def _not_joined(self) -> None:
    missing = [i for i in range(self._count) if i not in self._members]
    here = ", ".join(f"{i} ({m.host})" for i, m in sorted(self._members.items()))
    have, are = ("has", "it is") if len(missing) == 1 else ("have", "they are")
    self._end(
      DEFECT, f"error: {_processes(missing)} of {self._count} {have} not come within "
      f"{self._bound:g} s (barrier_seconds); here: {here}. Look at the output on the missing "
      f"hosts: whether {are} running, with the same JAX_COORDINATOR_ADDRESS, and can reach it.",
      None,
    )  # fmt: skip

  def _symptom(self, rank: int, index: int, what: str) -> None:
    """Notes what is wrong with a member; the verdict falls when all symptoms are in."""
    if self._ended or any(index == i and rank >= r for r, i, *_ in self._symptoms):
      return
    if not self._symptoms:
      asyncio.get_running_loop().call_later(_GRACE, self._judge)
    self._symptoms.append((rank, index, what, self._members[index].host))

  def _judge(self) -> None:
    now, silent = time.monotonic(), min(_SILENT, self._bound / 2)
    for index, m in self._members.items():  # Who fails may only have waited for one that hangs.
      if now - m.heard > silent and not m.gone and not m.done:
        self._symptom(0, index, f"is silent since {m.label}")
    first = min(rank for rank, *_ in self._symptoms)
    found = sorted(s[1:] for s in self._symptoms if s[0] == first)
    text = "; ".join(f"process {index} ({host}) {what}" for index, what, host in found)
    told = text.rstrip(".")
    self._end(
      DEFECT, f"error: {told}. All others end; its output and its host say why. {_GOES_ON}",
      found[0][0],
    )  # fmt: skip

  def _end(self, status: int, message: str, cause: int | None) -> None:
    if not self._ended:
      self._ended = True
      self._to_all(dict(kind="end", status=status, message=message, index=cause))

  def _to_all(self, message: Message) -> None:
    for member in self._members.values():
      if not member.gone:
        post(member.writer, message)


def _processes(which: Iterable[int]) -> str:
  """`process 1`, `processes 1 and 2`."""
  names = [str(i) for i in which]
  if len(names) == 1:
    return f"process {names[0]}"
  return f"processes {', '.join(names[:-1])} and {names[-1]}"


def _stuck(label: str, bound: float, members: dict[int, _Member]) -> str:
  hosts = ", ".join(f"{i} ({m.host})" for i, m in sorted(members.items()))
  return (
    f"error: no process has left {label} for {bound:g} s (barrier_seconds), though all came to it: "
    f"{hosts}. Look at the network between their devices, or raise barrier_seconds if a step takes "
    f"longer. {_GOES_ON}"
  )


def host_name() -> str:
  """What this machine calls itself."""
  return socket.gethostname()
