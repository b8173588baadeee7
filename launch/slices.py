"""TPU slices: a topology such as `v5p:4x4x4`, its hosts, and what Google's services call it."""

import dataclasses
import math
import re

from model.errors import InputError, nearest


@dataclasses.dataclass(frozen=True)
class Generation:
  """A generation of TPUs.

  Attributes:
    axes: of its topologies, 2 or 3.
    accelerator: what GKE's node label cloud.google.com/gke-tpu-accelerator says.
    prefix: of Cloud TPU's accelerator types; None: Cloud TPU's VMs do not come with it.
    cores: that an accelerator type counts for each chip.
  """

  axes: int
  accelerator: str
  prefix: str | None
  cores: int


GENERATIONS = {
  "v4": Generation(3, "tpu-v4-podslice", "v4", 2),
  "v5e": Generation(2, "tpu-v5-lite-podslice", "v5litepod", 1),
  "v5p": Generation(3, "tpu-v5p-slice", "v5p", 2),
  "v6e": Generation(2, "tpu-v6e-slice", "v6e", 1),
  "tpu7x": Generation(3, "tpu7x", None, 2),
}
# Sources: Cloud TPU's pages on each generation; GKE's "Plan TPUs in GKE".
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_CHIPS_PER_HOST = 4  # Of a slice of several hosts, in every generation.


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice of a TPU pod.

  Attributes:
    generation: a name of GENERATIONS.
    topology: chips along each axis, as in 4x4x4.
    chips_per_host: chips that a host has.
  """

  generation: str
  topology: str
  chips_per_host: int

  @property
  def chips(self) -> int:
    """Chips of the slice."""
    return math.prod(map(int, self.topology.split("x")))

  @property
  def hosts(self) -> int:
    """Hosts of the slice."""
    return self.chips // self.chips_per_host

  @property
  def accelerator(self) -> str:
    """GKE's name of the kind of TPU."""
    return GENERATIONS[self.generation].accelerator

  @property
  def accelerator_type(self) -> str:
    """Cloud TPU's name of the slice, for example v5p-128.

    Raises:
      InputError: where Cloud TPU has no such name, or gives another topology for it.
    """
    kind = GENERATIONS[self.generation]
    if kind.prefix is None:
      raise InputError(f"{self.generation} comes with GKE only: use --target=kubernetes.")
    usual = _most_compact(self.chips) if kind.axes == 3 and self.chips >= 64 else self.topology
    name = f"{kind.prefix}-{self.chips * kind.cores}"
    if usual != self.topology:
      raise InputError(f"Cloud TPU gives {name} the topology {usual}, not {self.topology}.")
    return name


def parse(text: str, chips_per_host: int | None = None) -> Slice:
  """Reads `GENERATION:AxB` or `GENERATION:AxBxC`.

  Args:
    chips_per_host: 1, 4 or 8; None: 4, or the one chip of the smallest slice.

  Raises:
    InputError: for what is no topology of that generation, or cannot be split that way.
  """
  name, colon, topology = text.partition(":")
  if name not in GENERATIONS or not colon:
    known = ", ".join(GENERATIONS)
    raise InputError(
      f"--topology={text}: GENERATION:SHAPE is needed, for example v5e:4x4 or v5p:2x2x4."
      f"{nearest(name, GENERATIONS)} Generations: {known}."
    )
  if not _exists(topology, GENERATIONS[name].axes):
    shapes = (
      f"{', '.join(_SMALL)}, or multiples of 4 in ascending order such as 4x4x8"
      if GENERATIONS[name].axes == 3
      else ", ".join(_FLAT)
    )
    raise InputError(f"--topology={text}: {name} has {shapes}.")
  chips = math.prod(map(int, topology.split("x")))
  per_host = min(chips, _CHIPS_PER_HOST) if chips_per_host is None else chips_per_host
  if per_host not in _per_host(chips, GENERATIONS[name].axes):
    allowed = " or ".join(map(str, _per_host(chips, GENERATIONS[name].axes)))
    raise InputError(f"--chips_per_host={per_host}: {text} comes with {allowed} on each host.")
  return Slice(name, topology, per_host)


def _exists(topology: str, axes: int) -> bool:
  if axes == 2:
    return topology in _FLAT
  if topology in _SMALL:
    return True
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", topology):
    return False
  sizes = [int(size) for size in topology.split("x")]
  return sizes == sorted(sizes) and all(size % 4 == 0 for size in sizes)


def _per_host(chips: int, axes: int) -> tuple[int, ...]:
  if chips == 1:
    return (1,)
  return (4, 8) if chips == 8 and axes == 2 else (4,)


def _most_compact(chips: int) -> str:
  """The shape in multiples of 4 with the smallest surface."""
  blocks = chips // 64
  shapes = [
    (a, b, blocks // a // b)
    for a in range(1, round(blocks ** (1 / 3)) + 2)
    for b in range(a, blocks + 1)
    if blocks % (a * b) == 0 and blocks // a // b >= b
  ]
  best = min(shapes, key=lambda s: s[0] * s[1] + s[1] * s[2] + s[0] * s[2])
  return "x".join(str(4 * size) for size in best)
