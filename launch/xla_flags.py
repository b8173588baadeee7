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
TABLE: dict[str, tuple[Flag, ...]] = {"cpu": (), "gpu": (), "tpu": ()}


def xla_environment(
  kind: str, own: Mapping[str, str], devices: int | None = None
) -> dict[str, str]:
  """The variable that holds the table's flags of a kind of device, joined with the user's own.

  Args:
    kind: cpu, gpu or tpu.
    own: the environment that the processes have otherwise; flags in it win.
    devices: simulated devices of a CPU process; None: one.

  Returns:
    {} where there is nothing to add to what `own` holds.
  """
  variable = VARIABLES[kind]
  mine = own.get(variable, "").split()
  words = [f"{flag.name}={flag.value}" for flag in TABLE[kind]]
  words += [] if devices is None else [f"{DEVICE_COUNT}={devices}"]
  names = {word.partition("=")[0] for word in mine}
  new = [word for word in words if word.partition("=")[0] not in names]
  return {variable: " ".join(new + mine)} if new else {}


def flag_value(words: str, name: str) -> str | None:
  """The value of a flag in a variable of flags; None where it is not there."""
  found = [word.partition("=")[2] for word in words.split() if word.partition("=")[0] == name]
  return found[-1] if found else None
