"""FLOPs and memory traffic of a compiled program, each loop counted as often as it runs."""

import dataclasses
import math
import re

from train.analysis.hlo import Computation, Instruction, Module, Shape
from train.analysis.loops import Run

_FREE = {  # Move no bytes of their own: names, waits, and what the called computations count.
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
  "after-all", "partition-id", "replica-id", "optimization-barrier", "async-start", "async-update",
  "async-done", "copy-done", "slice-done", "all-gather-done", "all-reduce-done",
  "collective-permute-done", "add-dependency", "domain",
}  # fmt: skip
_REMAT = re.compile(r"rematted_computation|\.remat")
# Products of [queries, keys] and head width that a fused attention kernel computes.
_SPLASH = {"fwd": 2, "dkv": 4, "dq": 3, "fused": 5}
_CUDNN_FORWARD, _CUDNN_BACKWARD = 2, 5


@dataclasses.dataclass(frozen=True)
class Work:
  """What one device does in a step. `kernels` counts FLOPs of hand-written kernels by name."""

  flops: float  # Of matrix products, convolutions and kernels; 2 for a multiplication and addition.
  remat_flops: float  # Those that compute again what the forward pass computed.
  bytes: float  # Read from and written to main memory.
  kernels: dict[str, float]
  notes: tuple[str, ...]  # What could not be known.


def work(module: Module, found: list[Run], masks: dict[str, float], *, ragged: float = 1.0) -> Work:
  """The work of computations that run as often as `found` says.

  Args:
    masks: by the name of a splash kernel's instruction the share of its blocks that it visits
      (`visited`); all of them where it is not known.
    ragged: the share of the rows of a ragged product that belong to a group.
  """
  # Splash attention without a kernel for queries of its own computes their gradient with the keys'.
  fused = not any("splash_mha_dq" in n for run in found for n in run.computation.instructions)
  flops = remat = moved = 0.0
  kernels: dict[str, float] = {}
  notes: list[str] = []
  for run in found:
    for i in run.computation.instructions.values():
      done = instruction_flops(run.computation, i)
      if i.opcode == "ragged-dot":
        done *= ragged
      if i.opcode == "custom-call":
        name, kernel = kernel_flops(run.computation, i, masks.get(i.name, 1.0), fused=fused)
        if name is not None:
          if kernel is None:
            notes.append(f"FLOPs of the kernel {name} are not known and not counted")
          kernels[name] = kernels.get(name, 0.0) + (kernel or 0.0) * run.times
          done += kernel or 0.0
      flops += done * run.times
      if done and (_REMAT.search(i.op_name) or ".remat" in i.name):
        remat += done * run.times
      if not run.fused:
        moved += traffic(module, run.computation, i) * run.times
  return Work(flops, remat, moved, kernels, tuple(dict.fromkeys(notes)))


def instruction_flops(computation: Computation, i: Instruction) -> float:
  """FLOPs of a product or convolution; 0 for anything else."""
  if i.opcode == "dot":
    lhs = computation.shapes(i)[0]
    return 2.0 * i.shapes[0].elements * _sizes(lhs, i.attribute("lhs_contracting_dims"))
  if i.opcode == "convolution":
    return _convolution_flops(computation, i)
  if i.opcode == "ragged-dot":
    lhs = computation.shapes(i)[0]
    return 2.0 * i.shapes[0].elements * lhs.dims[-1]
  return 0.0


def _sizes(shape: Shape, dims: str | None) -> int:
  return math.prod(shape.dims[int(d)] for d in re.findall(r"\d+", dims or ""))


def _convolution_flops(computation: Computation, i: Instruction) -> float:
  """TPU programs write matrix products as convolutions; padding is multiplied with nothing."""
  lhs, rhs = computation.shapes(i)[:2]
  left, right, out = re.split(r"_|->", i.attribute("dim_labels") or "")
  places = 1.0
  windows = _windows(i, sum(c.isdigit() for c in out))
  for axis, window in enumerate(windows):
    base = lhs.dims[left.index(str(axis))]
    kernel = rhs.dims[right.index(str(axis))]
    made = i.shapes[0].dims[out.index(str(axis))]
    places *= _valid_places(base, kernel, made, **window)
  groups = int(i.attribute("feature_group_count") or 1)
  batch_groups = int(i.attribute("batch_group_count") or 1)
  rows = lhs.dims[left.index("b")] // batch_groups
  inputs = lhs.dims[left.index("f")] // groups
  return 2.0 * rows * inputs * i.shapes[0].dims[out.index("f")] * places


def _windows(i: Instruction, axes: int) -> list[dict[str, int]]:
  found = re.search(r"window=\{([^}]*)\}", i.structure)
  fields = dict(f.split("=") for f in found[1].split()) if found else {}

  def numbers(name: str, default: str) -> list[int]:
    return [int(n) for n in fields.get(name, "x".join([default] * axes)).split("x")]

  pads = fields.get("pad", "x".join(["0_0"] * axes)).split("x") if axes else []
  names = {"stride": "stride", "lhs_dilate": "spread", "rhs_dilate": "reach"}
  each = {new: numbers(old, "1") for old, new in names.items()} if axes else {}
  return [
    {"low": int(pads[a].split("_")[0])} | {name: values[a] for name, values in each.items()}
    for a in range(axes)
  ]


def _valid_places(
  base: int, kernel: int, made: int, *, low: int, stride: int, spread: int, reach: int
) -> int:
  """Pairs of an output place and a kernel place that meet an input element."""
  extent = (base - 1) * spread + 1
  if spread == 1:
    total = 0
    for k in range(kernel):  # Output places o with 0 <= o * stride + k * reach - low < extent.
      first = max(0, -(-(low - k * reach) // stride))
      last = min(made - 1, (extent - 1 + low - k * reach) // stride)
      total += max(0, last - first + 1)
    return total
  return sum(
    0 <= at < extent and at % spread == 0
    for k in range(kernel)
    for at in (o * stride + k * reach - low for o in range(made))
  )


def kernel_flops(
  computation: Computation, i: Instruction, share: float, *, fused: bool
) -> tuple[str | None, float | None]:
  """(name, FLOPs) of a kernel; (None, 0) for a call that multiplies nothing, FLOPs None: unknown.

  A kernel's own estimate is taken where the program has one. Attention is counted from its shapes
  and, of splash attention, from the blocks that its mask does not skip.
  """
  target = i.attribute("custom_call_target") or ""
  target = target.strip('"')
  estimate = re.search(r'cost_estimate"?\s*[:=]\s*\{[^}]*?"?flops"?\s*[:=]\s*"?(\d+)', i.attributes)
  if target in ("tpu_custom_call", "mosaic_gpu"):
    name = re.sub(r"[.\d]+$", "", i.name)
    if not any(s.dtype[0] in "bf" for s in computation.shapes(i)):
      return None, 0.0  # It works on indices.
    if "splash" in name:
      return name, _splash_flops(computation, i, share, fused=fused)
    return name, float(estimate[1]) if estimate else None
  if target.startswith(("__cublas", "__onednn$matmul", "__triton_gemm")):
    return target, _library_product(computation, i)
  if target.startswith("__cudnn$fmha"):
    return target, _cudnn_attention(computation, i, target)
  return None, 0.0


def _splash_flops(computation: Computation, i: Instruction, share: float, *, fused: bool) -> float:
  backward = "dkv" in i.name or "dq" in i.name
  products = _SPLASH["fwd"]
  if backward:
    products = _SPLASH["dq" if "dq" in i.name else "fused" if fused else "dkv"]
  arrays = [s for s in computation.shapes(i) if s.dtype in ("bf16", "f32", "f16")]
  q, k = arrays[0].dims, arrays[1].dims
  return 2.0 * products * math.prod(q) * k[-2] * share


def _library_product(computation: Computation, i: Instruction) -> float | None:
  found = re.search(r'lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
  if not found:
    return None
  return 2.0 * i.shapes[0].elements * _sizes(computation.shapes(i)[0], found[1])


def _cudnn_attention(computation: Computation, i: Instruction, target: str) -> float:
  """Of all pairs of queries and keys: the kernel's mask is not known."""
  q, k = computation.shapes(i)[:2]
  backward = "Backward" in target
  products = _CUDNN_BACKWARD if backward else _CUDNN_FORWARD
  return 2.0 * products * q.elements * max(k.dims[1], 1)


def traffic(module: Module, computation: Computation, i: Instruction) -> float:
  """Bytes that an instruction reads from and writes to the main memory of its device.

  What lies in the fast memory of a TPU costs nothing here. A slice of an array reads the slice, an
  update in place writes the update.
  """
  if i.opcode in _FREE:
    return 0.0
  if i.opcode == "fusion":
    return _fusion_traffic(module, computation, i)
  read = [s for s in computation.shapes(i) if s.space == 0]
  written = [s for s in i.shapes if s.space == 0]
  if i.opcode in ("slice", "dynamic-slice", "gather"):
    return 2 * sum(s.size for s in written)
  if i.opcode in ("dynamic-update-slice", "scatter"):
    update = computation.shapes(i)[1 if i.opcode == "dynamic-update-slice" else -1]
    return 2 * update.size
  if i.opcode in ("copy-start", "slice-start") or i.opcode.endswith("-start"):
    moved = min(i.shapes[0].size, i.shapes[-2].size) if len(i.shapes) > 2 else i.size / 2
    return moved * sum(s.space == 0 for s in i.shapes[:2])
  return sum(s.size for s in read) + sum(s.size for s in written)


def _fusion_traffic(module: Module, computation: Computation, i: Instruction) -> float:
  inside = module.computations[i.called("calls")[0]]
  total = 0.0
  for number, parameter in inside.parameters.items():
    source = computation.instructions.get(i.operands[number])
    if source is None or any(s.space for s in source.shapes[:1]):
      continue
    total += _read(inside, parameter)
  outputs = inside.root.operands if inside.root.opcode == "tuple" else (inside.root.name,)
  for shape, name in zip(i.shapes, outputs, strict=False):
    made = inside.instructions[name]
    if shape.space:
      continue
    if made.opcode == "dynamic-update-slice":
      total += inside.shapes(made)[1].size
    else:
      total += shape.size
  return total


def _read(inside: Computation, parameter: Instruction) -> float:
  """Bytes of a fusion's input that it needs."""
  users = inside.users(parameter.name)
  needed = 0.0
  for user in users:
    if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter.name:
      needed += user.size
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
      continue  # Updated in place.
    else:
      return parameter.size
  return min(needed, parameter.size)
