"""Interleaved timing of two or more ways to do the same thing, and what the machine is.

Each way has a process of its own, as its user would start it, and they take turns.
"""

import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from model.host_memory import with_huge_pages

RESULTS = Path(__file__).parent / "results"
_ANSWER = "answer: "


def machine() -> str:
  """The accelerator, or the processor and its cores, in words."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return f"{jax.device_count()} x {device.device_kind}"
  lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def has_gpu() -> bool:
  """Whether PyTorch sees an NVIDIA GPU; JAX, once asked, would take the memory of the workers."""
  import torch

  return torch.cuda.is_available()


def commit() -> str:
  """The commit that is measured."""
  out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
  return out.stdout.strip() or "unknown"


class Worker:
  """A process that does one way of a benchmark's work when it is told to."""

  def __init__(self, module: str, way: str, *, huge_pages: bool):
    """Starts `python -m MODULE --way=WAY` with the flags of this process, which calls `serve`."""
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4", **os.environ}  # PyTorch needs some.
    self._process = subprocess.Popen(
      [sys.executable, "-m", module, *sys.argv[1:], f"--way={way}"], text=True,
      env=with_huge_pages(environment) if huge_pages else environment,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

  def seconds(self, work: str = "") -> float:
    """Does the work once: seconds."""
    return float(self.ask(work)["seconds"])

  def ask(self, work: str) -> dict:
    """What the process says about a piece of work."""
    print(work, file=self._process.stdin, flush=True)
    for line in self._process.stdout or ():
      if line.startswith(_ANSWER):
        return json.loads(line.removeprefix(_ANSWER))
    raise RuntimeError(f"{self._process.args} ended")

  def close(self) -> None:
    """Ends the process."""
    self._process.communicate()


def serve(run: Callable[[], None] | Callable[[str], dict | None]) -> None:
  """Does the work of a Worker: once for each line of standard input, and tells the seconds.

  A function that takes the line may return what else to tell.
  """
  named = bool(inspect.signature(run).parameters)
  for line in sys.stdin:
    start = time.perf_counter()
    told: Any = run(line.strip()) if named else run()  # pyright: ignore
    seconds = time.perf_counter() - start
    print(_ANSWER + json.dumps({"seconds": seconds} | (told or {})), flush=True)


def interleaved(workers: dict[str, Worker], rounds: int, warmups: int) -> dict[str, list[float]]:
  """Seconds of each way in each round; the ways take turns, after warm-ups. Ends the workers."""
  seconds = in_turns(workers, rounds, warmups)
  for worker in workers.values():
    worker.close()
  return seconds


def in_turns(
  workers: dict[str, Worker], rounds: int, warmups: int, work: str = ""
) -> dict[str, list[float]]:
  """Seconds of each way in each round of some work; the ways take turns, after warm-ups."""
  seconds: dict[str, list[float]] = {name: [] for name in workers}
  for _ in range(warmups + rounds):
    for name, worker in workers.items():
      seconds[name].append(worker.seconds(work))
  return {name: times[warmups:] for name, times in seconds.items()}


def rates(seconds: dict[str, list[float]], amount: float) -> dict[str, dict[str, float]]:
  """Median, least and greatest of `amount` / seconds for each way."""
  out = {}
  for name, times in seconds.items():
    per_second = [amount / t for t in times]
    out[name] = dict(
      median=statistics.median(per_second), least=min(per_second), greatest=max(per_second)
    )
  return out


def report(name: str, rows: list[dict], *, write: bool) -> None:
  """Prints a table and, if asked, writes results/NAME.json."""
  where = machine()
  print(f"{name} on {where}")
  for row in rows:
    print(f"  {row['what']}")
    for way, rate in row["rates"].items():
      print(
        f"    {way:<36}{rate['median']:>12,.1f} {row['unit']}"
        f"  ({rate['least']:,.1f} to {rate['greatest']:,.1f})"
      )
    for pair, ratio in row["ratios"].items():
      print(f"    {pair:<36}{ratio:>12.2f}")
  if write:
    written(name, rows)


def written(name: str, rows: list[dict], **more: Any) -> None:
  """Writes results/NAME_MACHINE.json."""
  RESULTS.mkdir(exist_ok=True)
  where = machine()
  kind = "".join(c if c.isalnum() else "_" for c in where.lower())[:60].strip("_")
  path = RESULTS / f"{name}_{kind}.json"
  result = dict(machine=where, commit=commit(), jax=jax.__version__, **more, rows=rows)
  path.write_text(json.dumps(result, indent=2) + "\n")
  print(f"written: {path}")
