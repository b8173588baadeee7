"""XLA flags with which small programs compile quickly: compilation is most of the suite's time."""

import importlib.metadata


def xla_flags(devices: int) -> str:
  """XLA_FLAGS of a process that simulates `devices` devices; to be set before JAX starts."""
  flags = [
    f"--xla_force_host_platform_device_count={devices}", "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",  # Parts would be linked one by one.
  ]  # fmt: skip
  if importlib.metadata.version("jaxlib").startswith("0.10."):  # Later ones have it no more.
    flags.append("--xla_cpu_use_fusion_emitters=false")
  return " ".join(flags)
