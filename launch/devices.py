"""This machine's accelerators and each process's share, without JAX, which would take them."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from launch.xla_flags import DEVICE_COUNT, flag_value, xla_environment
from model.errors import InputError

KINDS = ("cpu", "gpu", "tpu")
_PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}  # JAX's names of them.
# PCI vendor and devices, TPU v3 to 7x; Google's disks and network cards have the same vendor.
_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


def share_environment(
  slot: int,
  slots: int,
  *,
  device: str | None,
  each: int | None,
  own: Mapping[str, str],
  xla_table: bool,
) -> dict[str, str]:
  """The variables that leave a process its share of this machine's devices.

  Args:
    slot, slots: which process of how many on this machine.
    device: the kind asked for; None: what the machine has.
    each: devices of each process; None: all GPUs are divided evenly, a CPU is one device.
    own: the environment that the process has otherwise.
    xla_table: whether it gets the compiler flags of launch.xla_flags.TABLE.

  Raises:
    InputError: where the devices cannot be divided so.
  """
  kind = device or local_kind(own)
  chosen = {} if device is None else {"JAX_PLATFORMS": "cuda" if device == "gpu" else device}
  if kind == "gpu":
    visible = {"CUDA_VISIBLE_DEVICES": _gpu_share(local_gpus(own), slot, slots, each)}
    return chosen | visible | xla_environment(kind, own, table=xla_table)
  if kind == "tpu" and (slots > 1 or each is not None):
    given = f"{slots} processes" if slots > 1 else f"--devices_per_process={each}"
    raise InputError(
      f"{given}: the chips of a TPU VM are driven by one process. Use one here, --target=tpu for "
      "the VMs of a slice, or --device=cpu."
    )
  set_already = flag_value(own.get("XLA_FLAGS", ""), DEVICE_COUNT)
  if kind == "cpu" and each is not None and set_already not in (None, str(each)):
    raise InputError(
      f"--devices_per_process={each}, but XLA_FLAGS has {DEVICE_COUNT}={set_already}: leave one "
      "of them out."
    )
  return chosen | xla_environment(kind, own, each, table=xla_table)


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


def _gpu_share(gpus: list[str], slot: int, slots: int, each: int | None) -> str:
  if each is None and (len(gpus) % slots or not gpus):
    raise InputError(
      f"{slots} processes cannot share this machine's GPUs evenly, there are {len(gpus)}: use a "
      "divisor, or say how many each gets with --devices_per_process."
    )
  each = each or len(gpus) // slots
  if slots * each > len(gpus):
    raise InputError(
      f"{slots} processes with --devices_per_process={each} need {slots * each} GPUs; this "
      f"machine has {len(gpus)}."
    )
  return ",".join(gpus[slot * each : (slot + 1) * each])


def _has_tpu() -> bool:
  devices = Path("/sys/bus/pci/devices")
  if not devices.is_dir():
    return False
  read = lambda path: path.read_text().strip() if path.is_file() else ""
  return any(
    read(device / "vendor") == _GOOGLE and read(device / "device") in _TPUS
    for device in devices.iterdir()
  )
