"""What accelerators can do at best: the one table that MFU and roofline estimates divide by.

Sources. TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, peak compute, HBM capacity and
bandwidth per chip; a TPU7x chip shows itself to JAX as two devices, each with half of them. NVIDIA:
the data sheets of A100 (2021), H100 (2023), H200 (2024) and L4 (2023) and of HGX B200 (2024),
without structured sparsity: half of the figures that are starred there.
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


def _tpu(bf16: float, memory: float, bandwidth: float, fp8: float | None = None) -> Hardware:
  fp8 = bf16 if fp8 is None else fp8
  return Hardware(bf16 * TERA, fp8 * TERA, bf16 * TERA, memory * GIB, bandwidth * GIGA)


def _nvidia(bf16: float, fp8: float, tf32: float, memory: float, bandwidth: float) -> Hardware:
  return Hardware(bf16 * TERA, fp8 * TERA, tf32 * TERA, memory * GIGA, bandwidth * GIGA)


_V5E, _V5P = _tpu(197, 16, 819), _tpu(459, 95, 2765)
_V6E, _V7X = _tpu(918, 32, 1638), _tpu(2307 / 2, 192 / 2, 7380 / 2, fp8=4614 / 2)

# By the string that `jax.Device.device_kind` reports.
DEVICES = {
  "TPU v4": _tpu(275, 32, 1228),
  "TPU v5 lite": _V5E,
  "TPU v5e": _V5E,
  "TPU v5": _V5P,
  "TPU v5p": _V5P,
  "TPU v6 lite": _V6E,
  "TPU v6e": _V6E,
  "TPU7x": _V7X,
  "TPU v7x": _V7X,
  "NVIDIA A100-SXM4-40GB": _nvidia(312, 312, 156, 40, 1555),
  "NVIDIA A100-PCIE-40GB": _nvidia(312, 312, 156, 40, 1555),
  "NVIDIA A100-SXM4-80GB": _nvidia(312, 312, 156, 80, 2039),
  "NVIDIA A100 80GB PCIe": _nvidia(312, 312, 156, 80, 1935),
  "NVIDIA H100 80GB HBM3": _nvidia(989.4, 1978.9, 494.7, 80, 3350),
  "NVIDIA H100 PCIe": _nvidia(756, 1513, 378, 80, 2000),
  "NVIDIA H100 NVL": _nvidia(835.5, 1671, 417.5, 94, 3900),
  "NVIDIA H200": _nvidia(989.4, 1978.9, 494.7, 141, 4800),
  "NVIDIA H200 NVL": _nvidia(835.5, 1671, 417.5, 141, 4800),
  "NVIDIA L4": _nvidia(121, 242, 60, 24, 300),
  "NVIDIA B200": _nvidia(2250, 4500, 1125, 180, 8000),
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
