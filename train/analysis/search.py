"""The fastest configs that fit, among meshes, remat and parts of a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

from train.analysis.report import Report
from train.analysis.variants import flags, meshes, parts_of, state_of
from train.config import Config
from train.report import byte_text

SHOWN = 5
_REMAT = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Found:
  """A config that fits, by the flags that give it."""

  flags: str
  peak_bytes: int
  step_seconds: float | None
  mfu: float | None

  def values(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def line(self) -> str:
    pace = "not known"
    if self.step_seconds is not None and self.mfu is not None:
      pace = f"{self.step_seconds * 1e3:,.1f} ms, MFU {self.mfu:.1%}"
    return f"{pace:<26}{byte_text(self.peak_bytes):>10}  {self.flags}"


def best(
  config: Config, devices: list, memory: int | None, attempt: Callable[[Config], Report], tries: int
) -> list[Found]:
  """Up to five configs that fit, the fastest by their rooflines first.

  Meshes whose state does not fit are not compiled. On a mesh, remat grows and parts shrink until a
  step fits: what is stronger or smaller than that would fit too, and be slower.

  Args:
    tries: programs compiled at most; meshes take turns, those with least tensor parallelism first.
  """
  lines = [_line(config, mesh, devices, memory) for mesh in meshes(config.mesh, len(devices))]
  lines = [line for line in lines if line]
  found: list[Found] = []
  while lines and tries > 0:
    for line in list(lines):
      if tries <= 0:
        break
      candidate, tries = line.pop(0), tries - 1
      report = attempt(candidate)
      if report.fits is not False and report.peak_bytes is not None:
        found.append(_found(config, candidate, report))
        line.clear()
    lines = [line for line in lines if line]
  slowest = float("inf")
  found.sort(key=lambda f: (slowest if f.step_seconds is None else f.step_seconds, f.peak_bytes))
  return found[:SHOWN]


def _line(config: Config, mesh, devices: list, memory: int | None) -> list[Config]:
  """Candidates on a mesh, the ones that cost least time first."""
  placed = dataclasses.replace(config, mesh=mesh)
  held = state_of(dataclasses.replace(placed, accumulation=1), devices)
  if held is None or (memory is not None and held > memory):
    return []
  parts = [n for n in parts_of(placed, devices) if n & (n - 1) == 0]
  remat = lambda name: dataclasses.replace(placed.model, remat=name)
  at_once = [dataclasses.replace(placed, model=remat(name), accumulation=1) for name in _REMAT]
  split = [
    dataclasses.replace(placed, model=remat("full"), accumulation=n) for n in parts if n > 1
  ]
  return at_once + split


def _found(config: Config, candidate: Config, report: Report) -> Found:
  e = report.estimate
  changed = flags(config, candidate) or "(as it is)"
  return Found(changed, report.peak_bytes or 0, e.step_seconds, e.mfu)
