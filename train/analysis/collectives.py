"""Collectives of a compiled program: kind, mesh axis, how often, and what leaves a device."""

import dataclasses
import re

import numpy as np
from jax.sharding import Mesh

from train.analysis.hlo import Computation, Instruction, Module, Shape
from train.analysis.loops import Run

KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
  "collective-permute", "collective-broadcast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind over one set of mesh axes.

  `axis` names what the devices of a group differ in, joined by `+`. `bytes` leave each device in
  a step where rings are used: of n devices an all-gather sends n - 1 times what each holds, a
  reduce-scatter and an all-to-all (n - 1) / n of what goes in, an all-reduce twice that.
  """

  kind: str
  axis: str
  count: int
  bytes: int


def collectives(module: Module, found: list[Run], mesh: Mesh) -> list[Collective]:
  """All that run in a step, most bytes first.

  A program for several TPU slices is that of one of them, whose devices are numbered from 0, as the
  first of the mesh are. What it exchanges with other slices are sends to the host.
  """
  totals: dict[tuple[str, str], list[float]] = {}
  devices = module.partitions
  for run in found:
    for i in run.computation.instructions.values():
      between = _between_slices(i)
      if between is not None:
        kind, sent = between
        entry = totals.setdefault((kind, "slices"), [0.0, 0.0])
        entry[0] += run.times
        entry[1] += sent * run.times
        continue
      kind = i.opcode.removesuffix("-start")
      if kind not in KINDS or _continued(run, i):
        continue
      groups = device_groups(i, devices)
      if len(groups) and max(map(len, groups)) < 2:
        continue
      if run.fused and kind == "all-reduce" and _keeps_a_part(run.computation, i):
        kind = "reduce-scatter"  # TPU programs write them so.
      sent = bytes_sent(kind, run.computation.shapes(i), groups, devices)
      entry = totals.setdefault((kind, axis_name(groups, mesh)), [0.0, 0.0])
      entry[0] += run.times
      entry[1] += sent * run.times
  made = [
    Collective(kind, axis, round(n), round(size)) for (kind, axis), (n, size) in totals.items()
  ]
  return sorted(made, key=lambda c: -c.bytes)


def _between_slices(i: Instruction) -> tuple[str, float] | None:
  """(kind, bytes that leave a device) of what is exchanged over the data-center network."""
  found = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.structure)
  if i.opcode != "send" or not found:
    return None
  kind = {"ONE_TO_ONE": "collective-permute"}.get(found[1], found[1].lower().replace("_", "-"))
  slices = re.search(r'_xla_megascale_target="\{([^}]*)\}', i.structure)
  ranges = [part.split(":") for part in slices[1].split(",")] if slices else [["1", "2"]]
  n = sum(int(r[-1]) - int(r[0]) + 1 for r in ranges)  # {1,2,5:8}: six slices.
  factor = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "collective-permute": 1}
  return kind, i.shapes[0].size * factor.get(kind, (n - 1) / n)


def _continued(run: Run, i: Instruction) -> bool:
  """Whether this is a later part of a collective that a fusion before it has begun.

  TPU programs that overlap a collective with computation show it in each fusion that it lasts for.
  """
  if not run.fused or "chain_id=" not in i.attributes:
    return False
  inside = run.computation.instructions.values()
  return not any("AsyncCollectiveStart" in other.structure for other in inside)


def _keeps_a_part(inside: Computation, i: Instruction) -> bool:
  users = inside.users(i.name)
  while len(users) == 1 and users[0].opcode in ("bitcast", "reshape", "copy", "convert"):
    users = inside.users(users[0].name)
  return bool(users) and all(u.opcode == "dynamic-slice" for u in users)


def bytes_sent(kind: str, read: list[Shape], groups: list[tuple[int, ...]], devices: int) -> float:
  """Bytes that leave a device (of permutes: on average) when each sends around a ring."""
  held = sum(shape.size for shape in read if shape.dtype not in ("token", "u32") or shape.dims)
  if kind == "collective-permute":
    return held * sum(source != target for source, target in groups) / devices
  n = max(map(len, groups)) if groups else devices
  factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)
  return held * factor


def axis_name(groups: list[tuple[int, ...]], mesh: Mesh) -> str:
  """The mesh axes that the members of a group differ in, `none` for a group of one."""
  shape = mesh.devices.shape
  differing: set[int] = set()
  for group in groups:
    places = np.array(np.unravel_index(np.array(group), shape))
    differing |= set(np.nonzero((places != places[:, :1]).any(axis=1))[0].tolist())
  return "+".join(mesh.axis_names[a] for a in sorted(differing)) or "none"


def device_groups(i: Instruction, devices: int) -> list[tuple[int, ...]]:
  """Groups (of permutes: pairs) of devices, by their place in the mesh.

  Raises:
    ValueError: for a notation that is not known.
  """
  text = i.structure
  pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?\s*)*)\}", text)
  if pairs:
    return [(int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs[1])]
  found = re.search(r"replica_groups=", text)
  if not found:
    return [tuple(range(devices))]
  rest = text[found.end() :]
  if rest.startswith("{"):
    listed = re.match(r"\{((?:\{[\d,\s]*\},?\s*)*)\}", rest)
    groups = re.findall(r"\{([\d,\s]+)\}", listed[1]) if listed else []
    return [tuple(map(int, g.split(","))) for g in groups] or [tuple(range(devices))]
  if rest.startswith("["):
    return _iota_groups(rest)
  if rest.startswith("mesh["):
    return _mesh_groups(rest)
  raise ValueError(f"replica groups of {i.name} are written in an unknown way: {rest[:80]!r}.")


def _iota_groups(text: str) -> list[tuple[int, ...]]:
  """[groups,members]<=[dims]T(order): numbers in the shape `dims`, turned, then cut."""
  found = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
  if not found:
    raise ValueError(f"replica groups are written in an unknown way: {text[:80]!r}.")
  shape = tuple(map(int, found[1].split(",")))
  return [tuple(row) for row in _iota(found[2]).reshape(shape[0], -1).tolist()]


def _iota(text: str) -> np.ndarray:
  dims = tuple(map(int, re.findall(r"\d+", text.split("]")[0])))
  numbers = np.arange(np.prod(dims)).reshape(dims)
  order = re.search(r"T\(([\d,]+)\)", text)
  return numbers.transpose(tuple(map(int, order[1].split(",")))) if order else numbers


def _mesh_groups(text: str) -> list[tuple[int, ...]]:
  """mesh['a'=2,'b'=4], device_ids=(…) {'b'}: groups along named axes, or parts of them."""
  axes = re.match(r"mesh\[([^\]]*)\]", text)
  if not axes:
    raise ValueError(f"replica groups are written in an unknown way: {text[:80]!r}.")
  sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes[1])}
  rest = text[axes.end() :]
  numbers = np.arange(int(np.prod(list(sizes.values()))))
  ids = re.match(r",\s*device_ids=\(([^()]*(?:\([^)]*\))?[^()]*)\)", rest)
  if ids:
    rest = rest[ids.end() :]
    listed = ids[1].strip()
    numbers = (
      _iota(listed) if listed.startswith("[") else np.array(list(map(int, listed.split(","))))
    )
  named = re.match(r"\s*\{([^}]*)\}", rest)
  if not named:
    raise ValueError(f"replica groups are written in an unknown way: {text[:80]!r}.")
  shape, chosen = [], []
  wanted = re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", named[1])
  for name, size in sizes.items():
    parts = sorted((int(pre), int(own)) for n, pre, own in wanted if n == name and own)
    done = 1
    for pre, own in parts:
      shape += [pre // done, own]
      chosen.append(len(shape) - 1)
      done = pre * own
    shape.append(size // done)
    if any(n == name and not own for n, _, own in wanted):
      chosen.append(len(shape) - 1)
  grid = numbers.reshape(shape)
  kept = [a for a in range(grid.ndim) if a not in chosen]
  members = int(np.prod([shape[a] for a in chosen]))
  return [tuple(row) for row in grid.transpose(kept + chosen).reshape(-1, members).tolist()]
