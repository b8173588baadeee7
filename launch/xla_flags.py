"""Flags of the compiler for each kind of device, in one table; what a user sets wins."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag that runs get unless their user sets it: `NAME=VALUE` in the variable of its kind."""

  name: str
  value: str
  text: str
  source: str


DEVICE_COUNT = "--xla_force_host_platform_device_count"
VARIABLES = {"cpu": "XLA_FLAGS", "gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
_TPU_GUIDE = "the groups CF_FOR_ALL_GATHER and CF_FOR_ALL_REDUCE of MaxText's xla_flags_library.py"
TABLE: dict[str, tuple[Flag, ...]] = {
  "cpu": (
    Flag(
      "--xla_cpu_collective_call_terminate_timeout_seconds", "600",
      "Simulated devices share the cores: one that is late is waited for ten minutes, not 40 s, "
      "before XLA aborts the process.",
      "xla/debug_options_flags.cc",
    ),
  ),
  "gpu": (
    Flag(
      "--xla_gpu_enable_latency_hiding_scheduler", "true",
      "Moves collectives apart from what needs them, so that computation goes on meanwhile.",
      "NVIDIA JAX-Toolbox, rosetta/docs/GPU_performance.md; its images set it",
    ),
  ),
  "tpu": (
    Flag(
      "--xla_enable_async_all_gather", "true",
      "All-gathers start early and end where their result is needed.", _TPU_GUIDE,
    ),
    Flag(
      "--xla_tpu_enable_async_collective_fusion", "true",
      "A collective runs inside the fusions that are computed meanwhile.", _TPU_GUIDE,
    ),
    Flag(
      "--xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true",
      "The same for all-gathers: parameters that are fully sharded.", _TPU_GUIDE,
    ),
    Flag(
      "--xla_enable_async_all_reduce", "true",
      "All-reduces start early and end where their result is needed.", _TPU_GUIDE,
    ),
    Flag(
      "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true",
      "The same fusions for all-reduces: gradients over data, activations over tensor.", _TPU_GUIDE,
    ),
  ),
}  # fmt: skip


def xla_environment(
  kind: str, own: Mapping[str, str], devices: int | None = None, *, table: bool = True
) -> dict[str, str]:
  """The variable that holds the table's flags of a kind of device, joined with the user's own.

  Args:
    kind: cpu, gpu or tpu.
    own: the environment that the processes have otherwise; flags in it win.
    devices: simulated devices of a CPU process; None: one.
    table: False leaves the table out, for a compiler of another version.

  Returns:
    {} where there is nothing to add to what `own` holds.
  """
  variable = VARIABLES[kind]
  mine = own.get(variable, "").split()
  words = [f"{flag.name}={flag.value}" for flag in TABLE[kind]] if table else []
  words += [] if devices is None else [f"{DEVICE_COUNT}={devices}"]
  names = {word.partition("=")[0] for word in mine}
  new = [word for word in words if word.partition("=")[0] not in names]
  return {variable: " ".join(new + mine)} if new else {}


def flag_value(words: str, name: str) -> str | None:
  """The value of a flag in a variable of flags; None where it is not there."""
  found = [word.partition("=")[2] for word in words.split() if word.partition("=")[0] == name]
  return found[-1] if found else None
