"""How often each computation of a program runs: loops, branches, calls."""

import dataclasses
import re

from train.analysis.hlo import Computation, Instruction, Module

_THROUGH = {"copy", "bitcast", "convert", "copy-start", "copy-done", "optimization-barrier"}


@dataclasses.dataclass(frozen=True)
class Run:
  """A computation, how often it runs in a step, and whether it is the inside of a fusion."""

  computation: Computation
  times: float
  fused: bool


def runs(module: Module) -> tuple[list[Run], list[str]]:
  """All computations that run, callers first, and the loops whose length is not known.

  Of a conditional the branch that writes most is taken: the step that updates.
  """
  weigh = lambda name: sum(
    i.size for i in module.computations[name].instructions.values() if i.opcode == "fusion"
  )
  found: list[Run] = []
  unknown: list[str] = []

  def visit(name: str, times: float, fused: bool) -> None:
    computation = module.computations[name]
    found.append(Run(computation, times, fused))
    for i in computation.instructions.values():
      if i.opcode == "while":
        trips = trip_count(module, computation, i)
        if trips is None:
          unknown.append(i.name)
        visit(i.called("body")[0], times * (1 if trips is None else trips), fused)
      elif i.opcode == "conditional":
        branches = i.called("branch_computations") or (
          i.called("true_computation") + i.called("false_computation")
        )
        visit(max(branches, key=weigh), times, fused)
      elif i.opcode == "fusion":
        visit(i.called("calls")[0], times, True)
      elif i.opcode in ("call", "async-start"):
        for called in i.called("to_apply") + i.called("calls") + i.called("called_computations"):
          visit(called, times, fused)

  visit(module.entry, 1.0, False)
  return found, unknown


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
  """How often the body of a `while` runs; None if the program does not say.

  XLA notes it where it knows it. Otherwise it follows from the condition, a comparison of a counter
  with a constant, from where the counter starts, and from what the body adds to it.
  """
  noted = re.search(r'known_trip_count"?[:=]\s*\{"?n"?[:=]\s*"?(\d+)', loop.attributes)
  if noted:
    return int(noted[1])
  condition = module.computations[loop.called("condition")[0]]
  body = module.computations[loop.called("body")[0]]
  compared = definition(module, condition, condition.root)
  if compared is None:
    return None
  inner, compare, outer = compared
  if compare.opcode != "compare":
    return None
  sides = [_element(module, inner, name, outer) for name in compare.operands]
  direction = compare.attribute("direction")
  if sides[0] is None or sides[1] is None:
    return None
  if sides[0][0] != "element":
    sides.reverse()
    direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction or "", direction)
  (kind, index), limit = sides
  if kind != "element":
    return None
  last = limit[1] if limit[0] == "constant" else _start(module, caller, loop, limit[1])
  first, step = _start(module, caller, loop, index), _step(module, body, index)
  if first is None or last is None or not step:
    return None
  span = {"LT": last - first, "LE": last - first + 1, "GT": first - last, "GE": first - last + 1,
          "NE": abs(last - first)}  # fmt: skip
  if direction not in span:
    return None
  return max(0, -(-span[direction] // abs(step)))


# What stands around a computation inside a fusion: the computation of the fusion, and the fusion.
_Outer = tuple[Computation, Instruction, "_Outer"] | None


def definition(module: Module, computation: Computation, i: Instruction, outer: _Outer = None):
  """(computation, instruction, outer) that makes a value, seen through copies and fusions."""
  if i.opcode in _THROUGH and i.operands:
    return definition(module, computation, computation.instructions[i.operands[0]], outer)
  if i.opcode == "fusion":
    inside = module.computations[i.called("calls")[0]]
    return definition(module, inside, inside.root, (computation, i, outer))
  if i.opcode == "parameter" and outer is not None:
    around, fusion, further = outer
    fed = around.instructions[fusion.operands[int(i.argument)]]
    return definition(module, around, fed, further)
  if i.opcode == "get-tuple-element":
    index = int(i.attribute("index") or 0)
    source = computation.instructions[i.operands[0]]
    if source.opcode == "tuple":
      chosen = computation.instructions[source.operands[index]]
      return definition(module, computation, chosen, outer)
    if source.opcode == "fusion":
      inside = module.computations[source.called("calls")[0]]
      if inside.root.opcode == "tuple":
        chosen = inside.instructions[inside.root.operands[index]]
        return definition(module, inside, chosen, (computation, source, outer))
  return computation, i, outer


def _element(module: Module, computation: Computation, name: str, outer: _Outer):
  """("constant", value), or ("element", index) of what a loop carries; None: neither."""
  where, i, around = definition(module, computation, computation.instructions[name], outer)
  if i.opcode == "constant":
    return ("constant", int(i.argument)) if re.fullmatch(r"-?\d+", i.argument) else None
  if i.opcode == "get-tuple-element" and around is None:
    if where.instructions[i.operands[0]].opcode == "parameter":
      return "element", int(i.attribute("index") or 0)
  return None


def _start(module: Module, caller: Computation, loop: Instruction, index: int) -> int | None:
  """What an element of a loop's state is before the first round, if that is a constant."""
  state = caller.instructions[loop.operands[0]]
  if state.opcode != "tuple":
    return None
  value = _element(module, caller, state.operands[index], None)
  return value[1] if value is not None and value[0] == "constant" else None


def _step(module: Module, body: Computation, index: int) -> int | None:
  """What a round adds to an element of the state."""
  if body.root.opcode != "tuple":
    return None
  made = body.instructions[body.root.operands[index]]
  where, i, outer = definition(module, body, made)
  if i.opcode not in ("add", "subtract"):
    return None
  sides = [_element(module, where, name, outer) for name in i.operands]
  if ("element", index) not in sides:
    return None
  added = [side[1] for side in sides if side is not None and side[0] == "constant"]
  sign = 1 if i.opcode == "add" else -1
  return sign * added[0] if added else None
