"""Devices by name: TPU slices that are not here, simulated CPU devices, those of this machine."""

import contextlib
import importlib.util
import math
import os
import re

from launch.xla_flags import xla_environment
from model.errors import InputError, nearest

# Dimensions of the torus, and chips along each at most in one slice.
TPUS = {"v4": (3, 16), "v5e": (2, 16), "v5p": (3, 24), "v6e": (2, 16), "tpu7x": (3, 24)}
_QUIET = {
  "TPU_SKIP_MDS_QUERY": "1",  # There is no metadata server to ask which machine this is.
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5p-8",  # Of this machine, which has none; asked for, then not used.
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  # libtpu lets one process in at a time because chips can serve one. No chip is used here.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices_of(topology: str, slices: int) -> list:
  """The devices that a topology's name describes; to be called before JAX is used.

  Args:
    topology: `v5p:4x4x4` and the like, `cpu:8`, or `local` for the devices of this machine.
    slices: TPU slices (or groups of simulated devices) of this topology.

  Raises:
    InputError: for a name that is not known, a wrong number of dimensions, or where libtpu is not
      installed.
  """
  kind, _, size = topology.partition(":")
  if slices < 1:
    raise InputError(f"--slices={slices} must be at least 1.")
  if topology == "local":
    return _local(slices)
  if kind == "cpu":
    return _cpu(topology, size, slices)
  if kind not in TPUS:
    known = ", ".join(f"{name}:{'x'.join('4' * rank)}" for name, (rank, _) in TPUS.items())
    raise InputError(
      f"--topology={topology!r} is not known: use cpu:N, local, or a TPU slice such as {known}."
      f"{nearest(kind, TPUS)}"
    )
  return _tpu(kind, size, slices)


def _local(slices: int) -> list:
  if slices != 1:
    raise InputError(f"--slices={slices} has no effect on the devices of this machine: remove it.")
  import jax

  return jax.devices()


def _cpu(topology: str, size: str, slices: int) -> list:
  if not re.fullmatch(r"[1-9]\d{0,3}", size):
    raise InputError(f"--topology={topology!r}: write cpu:N, N simulated devices, such as cpu:8.")
  import jax

  wanted = int(size) * slices
  flag = r"--xla_force_host_platform_device_count=\d+"  # It would win over the number asked for.
  os.environ["XLA_FLAGS"] = re.sub(flag, "", os.environ.get("XLA_FLAGS", ""))
  jax.config.update("jax_platforms", "cpu")
  with contextlib.suppress(RuntimeError):  # JAX has begun: the devices that there are must do.
    jax.config.update("jax_num_cpu_devices", wanted)
  devices = jax.devices()
  if len(devices) < wanted:
    raise InputError(f"--topology={topology!r}: JAX has begun with {len(devices)} devices here.")
  return devices[:wanted]


def _tpu(kind: str, size: str, slices: int) -> list:
  rank, longest = TPUS[kind]
  found = re.fullmatch(r"[1-9]\d*(?:x[1-9]\d*)*", size)
  dims = [int(d) for d in size.split("x")] if found else []
  example = "x".join("4" * rank)
  if len(dims) != rank or max(dims, default=0) > longest:
    raise InputError(
      f"--topology={kind}:{size}: a {kind} slice has {rank} dimensions of at most {longest} chips, "
      f"such as {kind}:{example}."
    )
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      f"--topology={kind}:{size} needs TPU's compiler, which works without a TPU: pip install -e "
      "'.[tpu]'."
    )
  os.environ.update(_QUIET)
  os.environ.update(xla_environment("tpu", os.environ))  # What a launched run compiles with.
  import jax
  from jax.experimental import topologies

  jax.config.update("jax_platforms", "cpu")
  options: dict = {"num_slices": slices} if slices > 1 else {}
  options["wrap"] = _closed(kind, dims)
  if kind == "v4":  # Both cores of a chip are one device, as on a v4 machine.
    options["chip_config_name"] = "megacore"
  if math.prod(dims) < 4:
    options["chips_per_host_bounds"] = (*dims, 1)[:3]
  try:
    return list(topologies.get_topology_desc(
      platform="tpu", topology_name=f"{kind}:{size}", **options
    ).devices)  # fmt: skip
  except jax.errors.JaxRuntimeError as error:
    reason = " ".join(str(error).split())[:300]
    raise InputError(f"--topology={kind}:{size}: TPU's compiler refuses it: {reason}") from error


def _closed(kind: str, dims: list[int]) -> tuple[bool, bool, bool]:
  """Along which dimensions a slice is a ring; its compiler takes it for a line unless it is told.

  Without rings it has no algorithm that gathers over a whole slice, and sums in place of it. Cubes
  of 4 chips are joined by optical switches, which close every dimension; v5e and v6e close those of
  16. Source: docs.cloud.google.com/tpu/docs, the architecture pages of v4, v5e, v5p, v6e and tpu7x.
  """
  if len(dims) == 3:
    cubes = all(d % 4 == 0 for d in dims)
    return cubes, cubes, cubes
  return dims[0] == 16, dims[1] == 16, False
