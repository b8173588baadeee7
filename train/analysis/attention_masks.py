"""Which blocks of scores the splash kernels of a program compute: read from their masks."""

import re

import jax

from train.analysis.hlo import Computation, Instruction, Module
from train.analysis.loops import definition


def visited(compiled: jax.stages.Compiled, module: Module) -> dict[str, float]:
  """By splash kernel the share of all blocks of queries and keys that it computes.

  A kernel is given the numbers of its blocks as two arrays of small integers (jax.experimental.
  pallas.ops.tpu.splash_attention); the second is 0 where a block is skipped. Kernels whose array
  cannot be found in the program are left out.
  """
  kernels = [
    (computation, i)
    for computation in module.computations.values()
    for i in computation.instructions.values()
    if i.opcode == "custom-call" and "splash" in i.name
  ]
  if not kernels:
    return {}
  values = _small_integers(compiled)
  found = {}
  for computation, i in kernels:
    integers = [
      name for name in i.operands
      if computation.instructions[name].shapes[0].dtype in ("s8", "s16", "s32")
    ][:2]  # fmt: skip
    source = _origin(module, computation, integers[-1]) if len(integers) == 2 else None
    blocks = values.get(source.name) if source is not None else None
    total = _blocks(computation, i)
    if blocks and total:
      heads = computation.instructions[integers[-1]].shapes[0].dims[0]
      found[i.name] = sum(b != 0 for b in blocks) / heads / total
  return found


def _small_integers(compiled: jax.stages.Compiled) -> dict[str, list[int]]:
  """The values of integer constants by name; the usual text leaves long ones out."""
  from jaxlib import _hlo

  options = _hlo.HloPrintOptions()
  options.print_large_constants = True
  options.print_metadata = options.print_backend_config = False
  executable = compiled.runtime_executable()
  text = executable.hlo_modules()[0].to_string(options) if executable is not None else ""
  pattern = re.compile(r"%?([\w.\-]+) = s(?:8|16|32)\[[\d,]+\]\S* constant\((.*)\)")
  return {name: list(map(int, re.findall(r"-?\d+", value))) for name, value in pattern.findall(text)}


def _origin(module: Module, computation: Computation, name: str) -> Instruction | None:
  """The constant that a value is, seen through copies and the state of loops."""
  where, i, outer = definition(module, computation, computation.instructions[name])
  if i.opcode == "constant":
    return i
  if i.opcode != "get-tuple-element" or outer is not None:
    return None
  if where.instructions[i.operands[0]].opcode != "parameter":
    return None
  index = int(i.attribute("index") or 0)
  for caller in module.computations.values():
    for loop in caller.instructions.values():
      if loop.opcode == "while" and loop.called("body") == [where.name]:
        state = caller.instructions[loop.operands[0]]
        return _origin(module, caller, state.operands[index]) if state.operands else None
  return None


def _blocks(computation: Computation, i: Instruction) -> float:
  """Blocks of queries times blocks of keys, from the sizes that the kernel notes."""
  suffix = "_dkv" if "dkv" in i.name else "_dq" if "dq" in i.name else ""
  sizes = [re.search(rf'block_{side}{suffix}\\?": (\d+)', i.attributes) for side in ("q", "kv")]
  arrays = [s.dims for s in computation.shapes(i) if s.dtype in ("bf16", "f32", "f16")]
  if sizes[0] is None or sizes[1] is None or len(arrays) < 2:
    return 0.0
  return (arrays[0][-2] / int(sizes[0][1])) * (arrays[1][-2] / int(sizes[1][1]))
