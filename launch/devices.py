"""Which accelerators this machine has, without starting JAX, which would take them."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

KINDS = ("cpu", "gpu", "tpu")
_PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}  # JAX's names.
# PCI vendor and devices, TPU v3 to 7x; Google's disks and network cards have the same vendor.
_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


def local_kind(environment: Mapping[str, str]) -> str:
  """cpu, gpu or tpu: what JAX would use on this machine with these variables."""
  asked = environment.get("JAX_PLATFORMS", "").partition(",")[0]
  if asked in _PLATFORMS:
    return _PLATFORMS[asked]
  if _has_tpu():
    return "tpu"
  return "gpu" if local_gpus(environment) else "cpu"


def local_gpus(environment: Mapping[str, str]) -> list[str]:
  """Names of the GPUs that a process may use, as CUDA_VISIBLE_DEVICES takes them."""
  visible = environment.get("CUDA_VISIBLE_DEVICES")
  if visible is not None:
    return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
  program = shutil.which("nvidia-smi")
  if program is None:
    return [str(n) for n in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
  try:
    done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60)
  except (OSError, subprocess.TimeoutExpired):
    return []
  return [str(n) for n in range(sum(line.startswith("GPU ") for line in done.stdout.splitlines()))]


def _has_tpu() -> bool:
  devices = Path("/sys/bus/pci/devices")
  if not devices.is_dir():
    return False
  read = lambda path: path.read_text().strip() if path.is_file() else ""
  return any(
    read(device / "vendor") == _GOOGLE and read(device / "device") in _TPUS
    for device in devices.iterdir()
  )
