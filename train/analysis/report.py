"""One report of a compiled step: as a table for a person, as values for a program."""

import dataclasses
import os
import re
from typing import Any

import jax
from jax.sharding import Mesh

from model.hardware import hardware
from train.analysis.attention_masks import visited
from train.analysis.collectives import Collective, collectives
from train.analysis.frames import Frames
from train.analysis.hlo import parse
from train.analysis.loops import runs
from train.analysis.memory import Buffer, StateBytes, program_buffers, state_buffers, state_bytes
from train.analysis.model_work import FULL_ROWS, model_flops, step_tokens, used_rows
from train.analysis.roofline import Estimate, estimate
from train.analysis.work import Work, work
from train.config import Config
from train.program import Program
from train.report import byte_text, mesh_text, program_bytes

LARGEST = 5  # Buffers that are named.


@dataclasses.dataclass(frozen=True)
class Report:
  """What a step needs, per device. `flops` and what follows from it are None where the compiler
  stopped for want of memory, before there was a program.
  """

  title: str
  devices: int
  state: StateBytes
  peak_bytes: int | None
  memory_bytes: int | None
  parameters_total: int
  model_flops_total: float
  tokens_per_step: int
  done: Work | None
  crossing: list[Collective]
  buffers: list[Buffer]
  estimate: Estimate
  notes: tuple[str, ...]
  suggestions: tuple[str, ...] = ()

  @property
  def fits(self) -> bool | None:
    """None where the memory of a device is not known."""
    if self.memory_bytes is None or self.peak_bytes is None:
      return None
    return self.peak_bytes <= self.memory_bytes

  @property
  def activation_bytes(self) -> int | None:
    """What is held at the fullest moment beside the state and the batch."""
    return None if self.peak_bytes is None else max(0, self.peak_bytes - self.state.total)

  def values(self) -> dict[str, Any]:
    """For JSON: bytes and counts of a device, except where a name says total."""
    done = self.done
    return {
      "fits": self.fits, "peak_bytes": self.peak_bytes, "memory_bytes": self.memory_bytes,
      "parameter_bytes": self.state.parameters, "optimizer_bytes": self.state.optimizer,
      "activation_bytes": self.activation_bytes, "parameters_total": self.parameters_total,
      "flops_total": None if done is None else done.flops * self.devices,
      "remat_flops_total": None if done is None else done.remat_flops * self.devices,
      "model_flops_total": self.model_flops_total, "tokens_per_step": self.tokens_per_step,
      "bytes_accessed": None if done is None else done.bytes,
      "collectives": [dataclasses.asdict(c) for c in self.crossing],
      "buffers": [dataclasses.asdict(b) for b in self.buffers[:LARGEST]],
      "kernels": {} if done is None else done.kernels,
      "estimate": {
        "step_seconds": self.estimate.step_seconds, "mfu": self.estimate.mfu,
        "assumptions": list(self.estimate.assumptions),
      },
      "notes": list(self.notes), "suggestions": list(self.suggestions),
    }  # fmt: skip

  def lines(self) -> list[str]:
    """A table."""
    return [
      self.title, *self._memory_lines(), *self._work_lines(), *self._collective_lines(),
      *self._estimate_lines(), *[f"  note: {note}" for note in self.notes], *self._end_lines(),
    ]  # fmt: skip

  def _memory_lines(self) -> list[str]:
    state, text = self.state, byte_text
    rows = [("parameters", state.parameters), ("optimizer", state.optimizer)]
    rows += [("moving average", state.average)] if state.average else []
    rows += [("batch", state.rest), ("activations", self.activation_bytes)]
    rows += [("peak", self.peak_bytes), ("memory", self.memory_bytes)]
    lines = ["memory of a device"]
    lines += [f"  {n:<20}{'not known' if v is None else text(v):>12}" for n, v in rows]
    held = text(sum(b.bytes for b in self.buffers))
    lines += [f"  the largest buffers at the fullest moment, by an estimate that adds up to {held}"]
    return lines + [f"  {text(b.bytes):>12}  {b.name}" for b in self.buffers[:LARGEST]]

  def _work_lines(self) -> list[str]:
    model = self.model_flops_total
    lines = ["a step, all devices", f"  {'tokens':<20}{self.tokens_per_step:>12,}"]
    lines += [f"  {'parameters':<20}{self.parameters_total:>12,}"]
    lines += [f"  {'model FLOPs':<20}{model:>12.4g}"]
    if self.done is None:
      return lines
    flops, again = self.done.flops * self.devices, self.done.remat_flops * self.devices
    lines += [f"  {'compiled FLOPs':<20}{flops:>12.4g}  {flops / model:.3f} of the model's"]
    share = again / (flops - again) if flops > again else 0.0
    lines += [f"  {'recomputed':<20}{again:>12.4g}  remat adds {share:.1%}"]
    for name, done in self.done.kernels.items():
      lines += [f"  kernel {name}: {done * self.devices:.4g} FLOPs"]
    moved = byte_text(self.done.bytes)
    return [*lines, "a step, each device", f"  {'memory traffic':<20}{moved:>12}"]

  def _collective_lines(self) -> list[str]:
    if not self.crossing:
      return []
    head = f"  {'collective':<20}{'mesh axis':<24}{'count':>8}{'sent':>12}"
    row = lambda c: f"  {c.kind:<20}{c.axis:<24}{c.count:>8,.0f}{byte_text(c.bytes):>12}"
    return [head, *map(row, self.crossing)]

  def _estimate_lines(self) -> list[str]:
    e = self.estimate
    if e.step_seconds is None or e.mfu is None:
      return [f"estimate: none, {e.assumptions[0]}"]
    parts = (e.compute_seconds, e.memory_seconds, e.network_seconds)
    named = zip(("products", "memory", "network"), parts, strict=True)
    each = ", ".join(f"{name} {(s or 0) * 1e3:,.1f} ms" for name, s in named)
    lines = [f"estimate: a step in {e.step_seconds * 1e3:,.1f} ms, MFU {e.mfu:.1%} ({each})"]
    return lines + [f"  assumed: {text}" for text in e.assumptions]

  def _end_lines(self) -> list[str]:
    peak, memory = self.peak_bytes, self.memory_bytes
    tried = [f"  try {text}" for text in self.suggestions]
    if peak is None or memory is None:
      return ["it is not known whether this fits: --memory_gib=N gives the memory", *tried]
    if peak <= memory:
      return [f"fits: {peak / memory:.1%} of the memory", *tried]
    return [f"does not fit: {byte_text(peak)} of {byte_text(memory)}", *tried]


def analyse(config: Config, mesh: Mesh, program: Program, memory: int | None) -> Report:
  """The report of a run's train step, compiled if it has not been.

  Args:
    config: resolved, as the program was built from.
    memory: bytes of a device that a program can have (`device_memory`).

  Raises:
    jax.errors.JaxRuntimeError: if the compiler runs out of the device's memory.
  """
  compiled = program.train_step
  text = compiled.as_text() or ""
  module = parse(text)
  found, unknown = runs(module)
  ragged = used_rows(config.model, mesh)
  done = work(module, found, visited(compiled, module), ragged=ragged)
  crossing = collectives(module, found, mesh)
  needed = model_flops(config)
  loops = (f"loop {name}: its length is not known, counted once" for name in unknown)
  notes = [*done.notes, *loops, f"model FLOPs: {FULL_ROWS}"]
  if ragged < 1:
    notes.append(f"experts are used evenly: {ragged:.1%} of the rows that they have room for")
  return Report(
    title(config, mesh), mesh.size, state_bytes(program), peak_bytes(compiled, mesh), memory,
    config.model.num_params(), needed, step_tokens(config), done, crossing,
    program_buffers(module, Frames.of(text)),
    estimate(mesh, config.model.compute_dtype, done.flops, done.bytes, crossing, needed),
    tuple(notes),
  )  # fmt: skip


def unfinished(
  config: Config, mesh: Mesh, program: Program, memory: int | None, message: str
) -> Report:
  """The report of a step for which the compiler ran out of memory: `message` is what it said."""
  state = state_bytes(program)
  temporary = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
  peak = None
  if temporary:
    peak = round(float(temporary[1]) * 1024 ** " KMGT".index(temporary[2] or " ")) + state.total
  kind = mesh.devices.flat[0].device_kind
  named = sorted(state_buffers(program) + allocations(message), key=lambda b: -b.bytes)
  return Report(
    title(config, mesh), mesh.size, state, peak, memory, config.model.num_params(),
    model_flops(config), step_tokens(config), None, [], named,
    Estimate(None, None, (f"the compiler for {kind} ran out of memory: there is no program",)),
    ("the compiler stopped: of its buffers only those that it named are known",),
  )  # fmt: skip


def allocations(message: str) -> list[Buffer]:
  """The largest arrays that XLA lists when it runs out of memory."""
  found = []
  for part in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
    size = re.match(r"([\d.]+)([KMGT]?)", part)
    name, shape = re.search(r'op_name="([^"]*)"', part), re.search(r"Shape: (\w+\[[\d,]*\])", part)
    if size:
      words = " ".join(m[1] for m in (name, shape) if m) or "unnamed"
      scale = 1024 ** " KMGT".index(size[2] or " ")
      found.append(Buffer(words, round(float(size[1]) * scale)))
  return found


def peak_bytes(compiled: jax.stages.Compiled, mesh: Mesh) -> int | None:
  """The most that a device holds during a step, by the compiler's own account."""
  sizes = program_bytes(compiled, mesh.devices.flat[0].device_kind)
  return None if sizes is None else sum(sizes)


def device_memory(mesh: Mesh) -> int | None:
  """Bytes of a device's memory that a program can have; CPU devices share the host's."""
  device = mesh.devices.flat[0]
  if device.platform == "cpu":
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // mesh.size
  entry = hardware(device.device_kind)
  stats = device.memory_stats() if device.platform == "gpu" else None
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  return None if entry is None else round(entry.usable_bytes)


def title(config: Config, mesh: Mesh) -> str:
  """Device, mesh and batch in a line."""
  axes = mesh_text(mesh)
  kind = mesh.devices.flat[0].device_kind
  lengths = " + ".join(str(n) for n in (config.seq_len, config.target_len) if n is not None)
  parts = f" in {config.accumulation} parts" if config.accumulation > 1 else ""
  return (
    f"{mesh.size:,} x {kind}, mesh {axes}, batch {config.batch_size} x {lengths}{parts}, "
    f"{config.model.compute_dtype}, remat {config.model.remat}"
  )
