"""What accelerators can do at best: the one table that MFU and roofline estimates divide by.

Sources. TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, peak compute, HBM capacity and
bandwidth per chip; a TPU7x chip shows itself to JAX as two devices, each with half of them. NVIDIA:
the data sheets of A100 (2021), H100 (2023), H200 (2024) and L4 (2023) and of HGX B200 (2024),
without structured sparsity: half of the figures that are starred there.

Networks of TPUs, from the same pages: "bidirectional inter-chip interconnect bandwidth per chip" is
the sum of both directions of all ports, so a port sends bandwidth / (2 * ports); "data center
network bandwidth" per pod or chip, by chip. Of v4, whose page has neither: 50 GB/s and direction
for each of six links (Jouppi et al., arXiv:2304.01433, table 4), and one 100 Gbit/s card for a host
of four chips (an assumption). GPUs: NVLink of the data sheets, one direction, and one 400 Gbit/s
card for each (DGX H100); where a card has no NVLink, PCIe.

Memory that programs can use is what TPU's compiler says when it runs out ("exceeds available HBM"
of libtpu 0.0.42): the rest of HBM is the runtime's. Of GPUs it is JAX's default share of 75 %
(XLA_PYTHON_CLIENT_MEM_FRACTION).
"""

import dataclasses

import jax.numpy as jnp

TERA, GIGA, GIB = 1e12, 1e9, 2.0**30


@dataclasses.dataclass(frozen=True)
class Hardware:
  """One device as JAX counts them: peak FLOP/s of matrix products, memory in bytes and bytes/s.

  `f32` is the rate at JAX's default precision: TF32 on NVIDIA, bfloat16 passes on TPU. `fp8` is
  the rate of bfloat16 where the hardware has no faster 8-bit float product.
  """

  bf16: float
  fp8: float
  f32: float
  memory_bytes: float
  memory_bandwidth: float
  usable_bytes: float  # Of the memory, what a program can have.
  link: float  # Bytes/s that leave a device over one link to a neighbour.
  links: int  # Links of a device that a collective can use at once.
  network: float  # Bytes/s a device of the network between slices or hosts.


def _tpu(
  bf16: float, memory: float, bandwidth: float, *, usable: float, link: float, links: int,
  network: float, fp8: float | None = None,
) -> Hardware:  # fmt: skip
  fp8 = bf16 if fp8 is None else fp8
  return Hardware(
    bf16 * TERA, fp8 * TERA, bf16 * TERA, memory * GIB, bandwidth * GIGA, usable * GIB,
    link * GIGA, links, network * GIGA / 8,
  )  # fmt: skip


def _nvidia(
  bf16: float, fp8: float, tf32: float, memory: float, bandwidth: float, link: float = 450,
  network: float = 400,
) -> Hardware:  # fmt: skip
  return Hardware(
    bf16 * TERA, fp8 * TERA, tf32 * TERA, memory * GIGA, bandwidth * GIGA, 0.75 * memory * GIGA,
    link * GIGA, 1, network * GIGA / 8,
  )  # fmt: skip


# `link` in GB/s and direction, `network` in Gbit/s and device.
_V4 = _tpu(275, 32, 1228, usable=30.75, link=50, links=6, network=25)
_V5E = _tpu(197, 16, 819, usable=15.75, link=50, links=4, network=25)
_V5P = _tpu(459, 95, 2765, usable=95.74, link=100, links=6, network=50)
_V6E = _tpu(918, 32, 1638, usable=31.25, link=100, links=4, network=100)
_V7X = _tpu(
  2307 / 2, 192 / 2, 7380 / 2, fp8=4614 / 2, usable=94.75, link=50, links=6, network=50
)  # fmt: skip

# By the string that `jax.Device.device_kind` reports.
DEVICES = {
  "TPU v4": _V4,
  "TPU v5 lite": _V5E,
  "TPU v5e": _V5E,
  "TPU v5": _V5P,
  "TPU v5p": _V5P,
  "TPU v6 lite": _V6E,
  "TPU v6e": _V6E,
  "TPU7x": _V7X,
  "TPU v7x": _V7X,
  "NVIDIA A100-SXM4-40GB": _nvidia(312, 312, 156, 40, 1555, 300, 200),
  "NVIDIA A100-PCIE-40GB": _nvidia(312, 312, 156, 40, 1555, 32, 200),
  "NVIDIA A100-SXM4-80GB": _nvidia(312, 312, 156, 80, 2039, 300, 200),
  "NVIDIA A100 80GB PCIe": _nvidia(312, 312, 156, 80, 1935, 32, 200),
  "NVIDIA H100 80GB HBM3": _nvidia(989.4, 1978.9, 494.7, 80, 3350),
  "NVIDIA H100 PCIe": _nvidia(756, 1513, 378, 80, 2000, 64),
  "NVIDIA H100 NVL": _nvidia(835.5, 1671, 417.5, 94, 3900, 300),
  "NVIDIA H200": _nvidia(989.4, 1978.9, 494.7, 141, 4800),
  "NVIDIA H200 NVL": _nvidia(835.5, 1671, 417.5, 141, 4800, 450),
  "NVIDIA L4": _nvidia(121, 242, 60, 24, 300, 32, 100),
  "NVIDIA B200": _nvidia(2250, 4500, 1125, 180, 8000, 900),
}


def hardware(device_kind: str) -> Hardware | None:
  """The entry of a device; None for one that is not in the table (a CPU, a slice of a GPU)."""
  return DEVICES.get(device_kind)


def peak_flops(device_kind: str, dtype: str | jnp.dtype) -> float | None:
  """Peak FLOP/s of one device for matrix products of `dtype`.

  Returns:
    None if the device is not in the table, or its rate for the dtype is not (float64).
  """
  entry, name = hardware(device_kind), jnp.dtype(dtype).name
  if entry is None:
    return None
  if name.startswith("float8"):
    return entry.fp8
  return {"bfloat16": entry.bf16, "float16": entry.bf16, "float32": entry.f32}.get(name)
