"""A run that dies for want of memory says what the memory was needed for, and what to change."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from model.errors import DEFECT, Stop
from train.analysis.attempt import out_of_memory
from train.analysis.report import Report, analyse, device_memory, unfinished
from train.analysis.variants import REMAT, flags, meshes, parts_of, state_of
from train.config import Config
from train.program import Program


@contextlib.contextmanager
def explained(config: Config, mesh: Mesh, program: Program) -> Iterator[None]:
  """Around the compilation and the steps of a run: turns running out of memory into a report.

  Raises:
    Stop: with status 1 and the flag to change, where the device or the compiler runs out of memory.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not out_of_memory(error):
      raise
    report = _report(config, mesh, program, str(error))
    changes = cheaper(config, list(mesh.devices.flat), report)
    report = dataclasses.replace(report, suggestions=changes)
    if jax.process_index() == 0:
      print("\n".join(report.lines()), file=sys.stderr, flush=True)
    raise Stop(
      f"out of memory on {mesh.devices.flat[0].device_kind}: try {changes[0]}; the report above "
      "says what was held.", DEFECT,
    ) from error  # fmt: skip


def _report(config: Config, mesh: Mesh, program: Program, message: str) -> Report:
  memory = device_memory(mesh)
  if "HLO temporaries" in message or "program allocations" in message:  # The compiler gave up.
    return unfinished(config, mesh, program, memory, message)
  try:
    return analyse(config, mesh, program, memory)
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    return unfinished(config, mesh, program, memory, str(error))


def cheaper(config: Config, devices: list, report: Report) -> tuple[str, ...]:
  """Flags that make a step need less memory, the one that gives most first; none is compiled."""
  found: list[str] = []
  state, memory = report.state.total, report.memory_bytes
  mostly_state = memory is not None and state > memory / 2
  split = _split_further(config, devices, state)
  if mostly_state and split is not None:
    found.append(flags(config, split))
  if config.model.remat in REMAT and config.model.remat != "full":
    full = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    found.append(flags(config, full))
  more = [n for n in parts_of(config, devices) if n >= 2 * config.accumulation]
  if more:
    found.append(flags(config, dataclasses.replace(config, accumulation=more[0])))
  if split is not None and not mostly_state:
    found.append(flags(config, split))
  least = f"a smaller --config.batch_size (now {config.batch_size}), or more devices"
  return (*found, least)


def _split_further(config: Config, devices: list, held: int) -> Config | None:
  """The config on the mesh that leaves the least of the state on a device."""
  best = None
  for mesh in meshes(config.mesh, len(devices)):
    placed = dataclasses.replace(config, mesh=mesh)
    size = state_of(placed, devices)
    if size is not None and size < 0.9 * held:
      best, held = placed, size
  return best
