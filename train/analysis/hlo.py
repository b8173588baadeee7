"""The text of a compiled program -> computations of instructions, and how often each runs.

JAX gives compiled programs as text (`Compiled.as_text()`); its objects for them have no attributes
of an instruction but that text. The grammar is XLA's (openxla.org/xla, hlo_parser).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_WIDTHS = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16, "tf32": 4}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_START = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = ")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array on one device. `space` is XLA's memory space: 0 is the device's main memory."""

  dtype: str
  dims: tuple[int, ...]
  layout: str = ""

  @property
  def elements(self) -> int:
    return math.prod(self.dims)

  @property
  def size(self) -> float:
    """Bytes of the elements."""
    return self.elements * element_bytes(self.dtype)

  @property
  def space(self) -> int:
    found = re.search(r"S\((\d+)\)", self.layout)
    return int(found[1]) if found else 0

  @property
  def padded_size(self) -> float:
    """Bytes with the padding of the layout's first tile, such as T(8,128)."""
    found = re.match(r"\{([\d,]+):T\(([\d,]+)\)", self.layout)
    if not found:
      return self.size
    order, tile = (tuple(map(int, part.split(","))) for part in found.groups())
    dims = [self.dims[i] for i in reversed(order)]  # Fastest last, as tiles are written.
    dims = [1] * (len(tile) - len(dims)) + dims
    kept, tiled = dims[: len(dims) - len(tile)], dims[len(dims) - len(tile) :]
    whole = math.prod(kept) * math.prod(-(-d // t) * t for d, t in zip(tiled, tile, strict=True))
    return whole * element_bytes(self.dtype)


def element_bytes(dtype: str) -> float:
  """Bytes of an element of an XLA dtype: f32, bf16, s4, f8e4m3fn, pred."""
  if dtype in _WIDTHS:
    return _WIDTHS[dtype]
  bits = re.search(r"\d+", dtype)
  return int(bits[0]) / 8 if bits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a program: its results, operation, operands by name, and the rest as text."""

  name: str
  shapes: tuple[Shape, ...]  # One, or those of a tuple, nested ones flattened.
  opcode: str
  operands: tuple[str, ...]
  argument: str  # Between the parentheses.
  attributes: str
  root: bool

  @property
  def op_name(self) -> str:
    """Where it comes from: `jit(train_step)/jvp()/while/body/…`; of parameters their path."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return found[1].replace("\\'", "'") if found else ""

  @functools.cached_property
  def structure(self) -> str:
    """The attributes without what describes, which may hold anything."""
    return re.split(r", (?:metadata|backend_config)=", self.attributes, maxsplit=1)[0]

  def attribute(self, name: str) -> str | None:
    """The value of an attribute: a name, a number, or what stands in braces."""
    found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.structure)
    return found[1] if found else None

  def called(self, name: str) -> list[str]:
    """Computations that an attribute names."""
    value = self.attribute(name)
    return [] if value is None else re.findall(r"[\w.\-]+", value.replace("%", ""))

  @property
  def size(self) -> float:
    return sum(s.size for s in self.shapes)


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions in the order in which they run."""

  name: str
  instructions: dict[str, Instruction]

  @functools.cached_property
  def root(self) -> Instruction:
    marked = [i for i in self.instructions.values() if i.root]
    return marked[0] if marked else list(self.instructions.values())[-1]

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    found = [i for i in self.instructions.values() if i.opcode == "parameter"]
    return {int(i.argument): i for i in found}

  def shapes(self, instruction: Instruction) -> list[Shape]:
    """Arrays that an instruction reads."""
    known = (self.instructions.get(name) for name in instruction.operands)
    return [shape for i in known if i is not None for shape in i.shapes]

  def users(self, name: str) -> list[Instruction]:
    return [i for i in self.instructions.values() if name in i.operands]


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program of one device."""

  entry: str
  computations: dict[str, Computation]
  partitions: int  # Devices that it runs on; of TPU slices those of one.


def parse(text: str) -> Module:
  """The module of an HLO text.

  Raises:
    ValueError: if it has no entry computation.
  """
  computations, entry, lines, current = {}, None, [], None
  for line in text.splitlines():
    if current is None:
      head = _HEAD.match(line)
      if head and line.rstrip().endswith("{"):
        current, lines = head[1], []
        entry = current if line.startswith("ENTRY") else entry
    elif line.startswith("}") and not line.startswith("}}"):
      computations[current] = Computation(current, _instructions(lines))
      current = None
    elif _START.match(line):
      lines.append(line.strip())
    elif lines:  # Strings of an instruction may span lines.
      lines[-1] += line
  if entry is None:
    raise ValueError("the compiled program has no entry computation: is it HLO text?")
  counted = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
  return Module(entry, computations, int(counted[1]) if counted else 1)


def _instructions(lines: list[str]) -> dict[str, Instruction]:
  found = map(_instruction, lines)
  return {i.name: i for i in found}


def _instruction(line: str) -> Instruction:
  name, rest = line.removeprefix("ROOT ").split(" = ", 1)
  end = _closing(rest) if rest.startswith("(") else rest.index(" ")
  shapes, rest = rest[:end], rest[end:].lstrip()
  start = rest.index("(")
  stop = _closing(rest[start:]) + start
  argument = rest[start + 1 : stop - 1]
  return Instruction(
    name.lstrip("%"), tuple(shapes_of(shapes)), rest[:start], tuple(_NAME.findall(argument)),
    argument, rest[stop:], line.startswith("ROOT "),
  )  # fmt: skip


def _closing(text: str) -> int:
  """The index behind the parenthesis that closes the first one."""
  depth = 0
  for found in re.finditer(r"[()]", text):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.end()
  return len(text)


def shapes_of(text: str) -> Iterator[Shape]:
  """Arrays of a shape's text, tuples flattened; a bound of a dynamic size counts as the size."""
  for dtype, dims, layout in _ARRAY.findall(text):
    sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
    yield Shape(dtype, sizes, layout)
