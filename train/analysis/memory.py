"""What a device holds: state by parameter, and the largest buffers of a compiled step."""

import dataclasses
import math
import re
from typing import Any

import jax

from train.analysis.frames import Frames
from train.analysis.hlo import Computation, Instruction, Module
from train.analysis.loops import definition
from train.program import Program

_SMALL = 2**10  # Buffers below are not counted.
_ALIASES = {
  "parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "constant",
  "dynamic-update-slice", "optimization-barrier", "copy-start", "async-start", "async-done",
  "async-update", "slice-start",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Buffer:
  """A named array of one device, in bytes with the padding of its layout."""

  name: str
  bytes: int


@dataclasses.dataclass(frozen=True)
class StateBytes:
  """Bytes a device of what training keeps between steps, and of a batch; without padding."""

  parameters: int
  optimizer: int
  average: int  # The moving average of the parameters.
  rest: int  # The batch, counters.

  @property
  def total(self) -> int:
    return self.parameters + self.optimizer + self.average + self.rest


def state_bytes(program: Program) -> StateBytes:
  """From shapes and shardings alone: what the compiled step must be given."""
  state = program.state
  own = lambda tree: sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))
  return StateBytes(
    parameters=own((state.params, state.frozen)), optimizer=own(state.opt_state),
    average=own(state.ema), rest=own((state.step, state.bad_steps, program.batch)),
  )  # fmt: skip


def leaf_bytes(leaf: Any) -> int:
  """Bytes of one device's part of an abstract array."""
  shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
  return math.prod(shape) * leaf.dtype.itemsize


def state_buffers(program: Program) -> list[Buffer]:
  """Every array of the state and of a batch, by its path."""
  flat = jax.tree_util.tree_flatten_with_path((program.state, program.batch))[0]
  return [Buffer(_path(jax.tree_util.keystr(path[1:])), leaf_bytes(leaf)) for path, leaf in flat]


def _path(text: str) -> str:
  """`.params['decoder']['embed']` -> `params.decoder.embed`."""
  return re.sub(r"\[(?:'([^']*)'|(\d+))\]", r".\1\2", text).lstrip(".").removeprefix("state.")


def program_buffers(module: Module, frames: Frames) -> list[Buffer]:
  """The arrays of a compiled step that live at the same time when most is held, largest first.

  An estimate: the compiler shares memory among buffers in ways that its program does not tell. An
  array lives from the instruction that makes it to the last that reads it, in the order of the
  program; loops hold what they carry, and the most of what a round makes.
  """
  entry = module.computations[module.entry]
  state = [
    Buffer(_path(i.op_name) or i.name, round(sum(s.padded_size for s in i.shapes if not s.space)))
    for i in entry.parameters.values()
  ]
  live = _peak(module, entry, frames)
  return sorted(state + live, key=lambda b: -b.bytes)


def _peak(module: Module, computation: Computation, frames: Frames) -> list[Buffer]:
  """Buffers that a computation makes and that live at its fullest moment."""
  order = list(computation.instructions.values())
  place = {i.name: n for n, i in enumerate(order)}
  sources = _sources(computation, order)
  last: dict[str, int] = {}
  for n, i in enumerate(order):
    for name in i.operands:
      for source in sources.get(name, ()):
        last[source] = n
  for source in sources.get(computation.root.name, ()):
    last[source] = len(order)
  made = {
    i.name: size for i in order
    if i.opcode not in _ALIASES and (size := _own_bytes(module, i)) >= _SMALL
  }  # fmt: skip
  changes = [0.0] * (len(order) + 2)
  for name, size in made.items():
    changes[place[name]] += size
    changes[last.get(name, place[name]) + 1] -= size
  inner = {
    i.name: _inside(module, i, frames)
    for i in order
    if i.opcode in ("while", "conditional", "call")
  }
  best, held, at = -1.0, 0.0, 0
  for n, i in enumerate(order):
    held += changes[n]
    total = held + sum(b.bytes for b in inner.get(i.name, ()))
    if total > best:
      best, at = total, n
  lives = [name for name in made if place[name] <= at <= last.get(name, place[name])]
  named = [
    Buffer(_name(module, computation, computation.instructions[n], frames), round(made[n]))
    for n in lives
  ]
  return named + list(inner.get(order[at].name, ()))


def _sources(computation: Computation, order: list[Instruction]) -> dict[str, set[str]]:
  """By value the instructions whose memory it is: its own, or those of what it stands for."""
  sources: dict[str, set[str]] = {}
  for i in order:
    if i.opcode in _ALIASES:
      fed = i.operands[:1] if i.opcode == "dynamic-update-slice" else i.operands
      sources[i.name] = set().union(*(sources.get(name, set()) for name in fed))
    else:
      sources[i.name] = {i.name}
      if _updates_in_place(computation, i):
        sources[i.name] |= set().union(*(sources.get(name, set()) for name in i.operands[:1]))
  return sources


def _updates_in_place(computation: Computation, i: Instruction) -> bool:
  return i.opcode == "fusion" and "dynamic-update-slice" in i.name


def _own_bytes(module: Module, i: Instruction) -> float:
  """Bytes of main memory that an instruction's results need beyond what it was given."""
  if i.opcode == "fusion":
    inside = module.computations[i.called("calls")[0]]
    outputs = inside.root.operands if inside.root.opcode == "tuple" else (inside.root.name,)
    fresh = [inside.instructions[n].opcode != "dynamic-update-slice" for n in outputs]
    pairs = zip(i.shapes, fresh, strict=False)
    return sum(s.padded_size for s, new in pairs if new and not s.space)
  shapes = i.shapes[1:2] if i.opcode.endswith("-start") and len(i.shapes) > 1 else i.shapes
  return sum(s.padded_size for s in shapes if not s.space)


def _inside(module: Module, i: Instruction, frames: Frames) -> list[Buffer]:
  names = i.called("body") or i.called("branch_computations") or i.called("to_apply")
  names += i.called("true_computation") + i.called("false_computation")
  each = [_peak(module, module.computations[name], frames) for name in names]
  return max(each, key=lambda buffers: sum(b.bytes for b in buffers), default=[])


def _name(module: Module, computation: Computation, i: Instruction, frames: Frames) -> str:
  """What a buffer is: the module that made it, forward or backward, and its shape."""
  shape = max(i.shapes, key=lambda s: s.padded_size)
  maker = _writer(module, computation, i) or i
  where = frames.module(maker) or frames.module(i) or i.op_name.rsplit("/", 1)[-1] or i.opcode
  backward = "transpose(" in maker.op_name
  remat = "rematted_computation" in maker.op_name
  phase = "recomputed" if remat else "backward" if backward else "forward"
  phase = phase if "jvp(" in i.op_name or "jvp(" in maker.op_name else "update"
  return f"{where}, {phase}: {shape.dtype}[{','.join(map(str, shape.dims))}]"


def _writer(module: Module, computation: Computation, i: Instruction) -> Instruction | None:
  """Of an array that a loop fills piece by piece, what computes a piece."""
  for loop in computation.instructions.values():
    if loop.opcode != "while":
      continue
    state = computation.instructions.get(loop.operands[0])
    if state is None or i.name not in state.operands:
      continue
    body = module.computations[loop.called("body")[0]]
    if body.root.opcode != "tuple":
      return None
    made = body.instructions[body.root.operands[state.operands.index(i.name)]]
    where, update, outer = definition(module, body, made)
    for _ in range(12):
      if update.opcode == "dynamic-update-slice":
        source = update.operands[1]
      elif len(update.operands) == 1 and update.opcode != "parameter":
        source = update.operands[0]
      else:
        return update
      where, update, outer = definition(module, where, where.instructions[source], outer)
    return update
  return None
