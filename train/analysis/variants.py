"""Configs that compute the same with less memory, and the flags that give them."""

import dataclasses
from collections.abc import Callable, Iterator

from jax.sharding import Mesh

from model.errors import InputError
from model.pipeline import check_pipeline
from model.sharding import make_mesh
from train.analysis.memory import state_bytes
from train.analysis.report import Report
from train.config import Config, MeshConfig
from train.program import build_program, check_batch
from train.report import byte_text
from train.resolve import check_fit

REMAT = ("none", "attention", "dots", "full")  # What is kept for the backward pass falls.
_TRIES = 8  # Programs compiled at most for one suggestion: they take minutes each.
_FAR = 3  # Times the room, what activations take where keeping products will not do.
_ROOM = 0.95  # Of the memory, what the state may take to leave any for a step.


def flags(old: Config, new: Config) -> str:
  """The command-line flags that turn one config into another."""
  changed = []
  for section in ("mesh", "model", None):
    a, b = (getattr(c, section) if section else c for c in (old, new))
    for field in dataclasses.fields(a):
      was, now = getattr(a, field.name), getattr(b, field.name)
      if was != now and not dataclasses.is_dataclass(now):
        changed.append(f"--config.{f'{section}.' if section else ''}{field.name}={now}")
  return " ".join(changed)


def fitting(
  config: Config, devices: list, memory: int, first: Report, attempt: Callable[[Config], Report]
) -> tuple[str, Report | None]:
  """A suggestion for a step that does not fit, and its report: it has been compiled, and fits.

  Where nothing that was tried fits, the suggestion says what else is needed; it has no report.

  Tried in the order of what they cost: stronger remat, smaller parts of a batch, then meshes that
  split the state further.

  Args:
    first: the report of `config` itself.
    attempt: compiles a config and reports on it.
  """
  tries = 0
  for mesh, held in _meshes(config, devices):
    if held > _ROOM * memory:
      continue
    report = first if mesh == config.mesh else None
    current = dataclasses.replace(config, mesh=mesh)
    if report is None:
      report, tries = attempt(current), tries + 1
    while not report.fits and tries < _TRIES:
      smaller = _smaller(current, devices, report, memory)
      if smaller is None:
        break
      current, report, tries = smaller, attempt(smaller), tries + 1
    if report.fits and report.peak_bytes is not None:
      seconds = report.estimate.step_seconds
      pace = "" if seconds is None else f", a step in {seconds:.3g} s at best"
      size = f"compiled: {byte_text(report.peak_bytes)} of {byte_text(memory)}"
      return f"{flags(config, current)} ({size}{pace})", report
    if tries >= _TRIES:
      break
  return _more_devices(config, devices, memory), None


def _smaller(config: Config, devices: list, report: Report, memory: int) -> Config | None:
  """The next cheaper config on the same mesh: all remat first, then parts as small as needed."""
  remat, spare = config.model.remat, memory - report.state.total
  wants = report.activation_bytes or 2 * spare
  if remat in REMAT and remat != "full":
    weak, near = REMAT.index(remat) < REMAT.index("dots"), wants < _FAR * spare
    better = "dots" if weak and near else "full"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=better))
  least = parts_of(config, devices)
  possible = [n for n in least if n > config.accumulation]
  if not possible or spare <= 0:
    return None
  wanted = config.accumulation * wants / spare
  enough = next((n for n in possible if n >= wanted), possible[-1])
  return dataclasses.replace(config, accumulation=enough)


def parts_of(config: Config, devices: list) -> list[int]:
  """Numbers of parts that training would compute a batch in on the config's mesh, ascending."""
  mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
  rows = config.batch_size
  divisors = [n for n in range(1, rows + 1) if rows % n == 0]
  return [n for n in divisors if _trains(dataclasses.replace(config, accumulation=n), mesh)]


def _trains(config: Config, mesh: Mesh) -> bool:
  """Whether training takes the parts of the config's batch."""
  try:
    check_fit(config)
    check_batch(config, mesh)
    check_pipeline(config.model, mesh, config.batch_size // config.accumulation)
  except InputError:
    return False
  return True


def _meshes(config: Config, devices: list) -> Iterator[tuple[MeshConfig, int]]:
  """The config's mesh, then those that split more, with the bytes of state a device holds."""
  for mesh in [config.mesh, *meshes(config.mesh, len(devices))]:
    held = state_of(dataclasses.replace(config, mesh=mesh), devices)
    if held is not None and (mesh is config.mesh or mesh != config.mesh):
      yield mesh, held


def meshes(given: MeshConfig, devices: int) -> list[MeshConfig]:
  """Meshes of data, fsdp and tensor, the other axes as given: fully sharded first, then tensor."""
  fixed = {name: getattr(given, name) or 1 for name in ("slices", "stage", "expert", "seq")}
  rest = devices
  for size in fixed.values():
    rest //= size
  sizes = [2**n for n in range(rest.bit_length()) if rest % 2**n == 0]
  found = [
    MeshConfig(**fixed, data=rest // (fsdp * tensor), fsdp=fsdp, tensor=tensor)
    for tensor in sizes if tensor <= 16
    for fsdp in reversed(sizes) if rest % (fsdp * tensor) == 0
  ]  # fmt: skip
  return sorted(found, key=lambda m: (m.tensor or 1, m.data or 1))


def state_of(config: Config, devices: list) -> int | None:
  """Bytes of state and batch a device; None if the mesh does not divide the model or the batch."""
  try:
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    return state_bytes(build_program(config, mesh)).total
  except InputError:
    return None


def _more_devices(config: Config, devices: list, memory: int) -> str:
  held = [size for _, size in _meshes(config, devices)]
  least = min(held, default=0)
  if least > _ROOM * memory:
    wanted = -(-least * len(devices) // int(_ROOM * memory))
    return (
      f"more devices: the state alone takes {byte_text(least)} of a device's {byte_text(memory)} "
      f"on the best mesh of {len(devices)}; {wanted} or more, or optimizer.name=adafactor"
    )
  return f"a smaller --config.batch_size or --config.seq_len, or more than {len(devices)} devices"
