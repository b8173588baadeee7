"""Interleaved timing of two or more ways to do the same thing, and what the machine is."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
  """The accelerator, or the processor and its cores, in words."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return f"{jax.device_count()} x {device.device_kind}"
  lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def commit() -> str:
  """The commit that is measured."""
  out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
  return out.stdout.strip() or "unknown"


def interleaved(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
  """Seconds of each way in each round; the ways take turns, after one warm-up each."""
  for run in ways.values():
    run()
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(rounds):
    for name, run in ways.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  return seconds


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
        f"    {way:<28}{rate['median']:>12,.1f} {row['unit']}"
        f"  ({rate['least']:,.1f} to {rate['greatest']:,.1f})"
      )
    for pair, ratio in row["ratios"].items():
      print(f"    {pair:<28}{ratio:>12.2f}")
  if write:
    RESULTS.mkdir(exist_ok=True)
    kind = "".join(c if c.isalnum() else "_" for c in where.lower())[:60].strip("_")
    path = RESULTS / f"{name}_{kind}.json"
    result = dict(machine=where, commit=commit(), jax=jax.__version__, rows=rows)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {path}")
