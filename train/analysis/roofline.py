"""How long a step takes at best, from its work and the table of devices."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from model.hardware import Hardware, hardware, peak_flops
from train.analysis.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a step, its MFU, and what they rest on; None for a device that is not known."""

  step_seconds: float | None
  mfu: float | None
  assumptions: tuple[str, ...]
  compute_seconds: float | None = None
  memory_seconds: float | None = None
  network_seconds: float | None = None


def estimate(
  mesh: Mesh, dtype, flops: float, moved: float, crossing: list[Collective], model_flops: float
) -> Estimate:
  """The roofline of a step: the slowest of products, memory and network, each at its peak.

  Args:
    dtype: of matrix products.
    flops, moved: FLOPs and bytes of memory traffic of one device.
    crossing: collectives, with what leaves a device.
    model_flops: of the step on all devices.
  """
  kind = mesh.devices.flat[0].device_kind
  entry, peak = hardware(kind), peak_flops(kind, dtype)
  if entry is None or peak is None:
    return Estimate(None, None, (f"{kind} in {dtype} is not in model/hardware.py",))
  network, told = 0.0, []
  for axes in dict.fromkeys(c.axis for c in crossing):
    rate, words = bandwidth(axes, mesh, entry)
    seconds = sum(c.bytes for c in crossing if c.axis == axes) / rate
    network += seconds
    told.append(f"{axes}: {words}, {seconds * 1e3:.1f} ms")
  compute, memory = flops / peak, moved / entry.memory_bandwidth
  slowest = max(compute, memory, network)
  assumptions = (
    f"matrix products at the peak of {kind} in {dtype}, {peak / 1e12:,.0f} TFLOP/s",
    f"memory at {entry.memory_bandwidth / 1e9:,.0f} GB/s",
    *told,
    "products, memory and network overlap wholly; collectives of one axis after those of another",
    "no time for starting programs, for input, or for stragglers: a lower bound",
  )
  mfu = model_flops / slowest / (peak * mesh.size) if slowest else None
  return Estimate(slowest, mfu, assumptions, compute, memory, network)


def bandwidth(axes: str, mesh: Mesh, entry: Hardware) -> tuple[float, str]:
  """(bytes/s that a device sends along mesh axes, in words over what).

  Where devices say where they are in a torus, each of its dimensions that a group spans gives two
  links, one where it is two devices long.
  """
  chosen = [mesh.axis_names.index(name) for name in axes.split("+") if name in mesh.axis_names]
  index = tuple(slice(None) if a in chosen else 0 for a in range(mesh.devices.ndim))
  group = list(np.asarray(mesh.devices[index]).flat)
  away = len({getattr(d, "slice_index", 0) for d in group}) > 1
  gpus = group[0].platform != "tpu"
  if away or (gpus and len({d.process_index for d in group}) > 1):
    return entry.network, f"{entry.network / 1e9:,.1f} GB/s of the network between hosts"
  coords = [getattr(d, "coords", None) for d in group]
  if None in coords:
    return entry.link * entry.links, f"{entry.link * entry.links / 1e9:,.0f} GB/s of links"
  spans = [len(set(values)) for values in zip(*coords, strict=True)]
  links = min(entry.links, max(1, sum(min(2, span - 1) for span in spans)))
  rate = entry.link * links
  return rate, f"{links} links of {entry.link / 1e9:,.0f} GB/s"
