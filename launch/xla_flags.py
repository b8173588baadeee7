"""Flags of the compiler for each kind of device, in one table; what a user sets wins."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag that runs get unless their user sets it: `--NAME=VALUE` in the variable of its kind."""

  name: str
  value: str
  text: str
  source: str


VARIABLES = {"cpu": "XLA_FLAGS", "gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
TABLE: dict[str, tuple[Flag, ...]] = {"cpu": (), "gpu": (), "tpu": ()}


def xla_environment(
  kind: str, own: Mapping[str, str], devices: int | None = None
) -> dict[str, str]:
  """The variable that holds the table's flags of a kind of device, joined with the user's own.

  Args:
    kind: cpu, gpu or tpu.
    own: the environment that the processes have otherwise; flags in it win.
    devices: simulated devices of a CPU process; None: one.
  """
  variable = VARIABLES[kind]
  flags = [f"--{flag.name}={flag.value}" for flag in TABLE[kind]]
  if devices is not None:
    flags.append(f"--xla_force_host_platform_device_count={devices}")
  mine = own.get(variable, "").split()
  names = {word.partition("=")[0] for word in mine}
  words = [word for word in flags if word.partition("=")[0] not in names] + mine
  return {variable: " ".join(words)} if words else {}
