"""What is to be run: one of our commands on a number of processes, wherever that is."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from model.errors import NON_FINITE, USER_ERROR, InputError, nearest

# Modules that may be launched, and whether their work is shared out among processes.
SHARED_OUT = {
  "train": True,
  "train.tokenizer": False,
  "train.inspect": False,
  "infer": False,
  "infer.evaluate": False,
  "model.hf": False,
}
FINAL = (USER_ERROR, NON_FINITE)  # Exit statuses of a command that would end the same way again.
LONGEST_BACKOFF = 600.0  # Seconds between two attempts.
OF_PROCESSES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,46}[a-z0-9])?")


@dataclasses.dataclass(frozen=True)
class Job:
  """A run: the same command, given again, goes on from its workdir.

  Attributes:
    command: a module of ours and its arguments, ("train", "--config=…", "--workdir=…").
    name: of the run; lower-case letters, digits and dashes, at most 48; Kubernetes takes fewer.
    processes: how many run the command; None leaves it to the target (hosts of a file, of a slice).
    environment: variables that each process gets beside what its target sets; they win.
    max_restarts: how often a failed run is started again.
    backoff: seconds before the first restart; each further one waits twice as long.
    logs: folder on this machine for what the processes print.
    xla_table: whether processes get the flags of launch.xla_flags.TABLE.
  """

  command: tuple[str, ...]
  name: str
  processes: int | None
  environment: Mapping[str, str]
  max_restarts: int
  backoff: float
  logs: Path
  xla_table: bool = True

  def __post_init__(self):
    _check_command(self.command, self.processes)
    if not _NAME.fullmatch(self.name):
      raise InputError(
        f"--name={self.name}: a run's name is at most 48 lower-case letters, digits and dashes, "
        "with a letter or digit at both ends."
      )
    if not math.isfinite(self.backoff):
      raise InputError(f"--backoff={self.backoff}: a number of seconds is needed.")
    taken = [name for name in OF_PROCESSES if name in self.environment]
    if taken:
      raise InputError(f"--env={taken[0]}=… is set by the launcher, differently for each process.")

  def argv(self, python: str = "python") -> list[str]:
    """The words of the command that every process runs."""
    return [python, "-m", *self.command]

  def delays(self) -> Iterator[float]:
    """Seconds to wait before each restart that is allowed."""
    return (min(self.backoff * 2**n, LONGEST_BACKOFF) for n in range(self.max_restarts))


def process_environment(coordinator: str, processes: int, rank: int) -> dict[str, str]:
  """What tells `python -m train` its place; {} for one process, which needs to meet no other.

  Args:
    coordinator: HOST:PORT of process 0, as every process can reach it.
  """
  if processes == 1:
    return {}
  return dict(zip(OF_PROCESSES, (coordinator, str(processes), str(rank)), strict=True))


def default_name(command: tuple[str, ...]) -> str:
  """A run's name where none is given: of its workdir, else of its config file, else the module."""
  given = {}
  for word, following in zip(command, (*command[1:], ""), strict=True):
    name, equals, value = word.lstrip("-").partition("=")
    if word.startswith("-"):
      given[name] = value if equals else following
  path = given.get("workdir") or given.get("config") or command[0]
  stem = path.partition(":")[0].rstrip("/").rpartition("/")[2].removesuffix(".py")
  return re.sub("[^a-z0-9]+", "-", stem.lower())[:48].strip("-") or command[0].replace(".", "-")


def _check_command(command: tuple[str, ...], processes: int | None) -> None:
  if not command:
    raise InputError("nothing stands behind --: name a command, for example -- train --config=….")
  module = command[0]
  if module not in SHARED_OUT:
    text = f" Modules: {', '.join(SHARED_OUT)}."
    raise InputError(f"{module!r} is no command to launch.{nearest(module, SHARED_OUT)}{text}")
  if processes is not None and processes > 1 and not SHARED_OUT[module]:
    raise InputError(
      f"--processes={processes}: {module} is not shared out among processes, each would do the "
      "same work. Use --processes=1."
    )
