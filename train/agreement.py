"""What the processes of a run must have in common before the first step."""

import importlib.metadata
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.checkpoint import check_config
from model.errors import InputError
from train.config import Config
from train.group import Group
from train.workdir import as_dict

_SHOWN = 5.0  # Seconds after which a shared disk shows what another host wrote.


def check_same_config(group: Group, config: Config) -> None:
  """Raises an InputError if a process has other settings, or another JAX, than process 0."""
  values = as_dict(config)
  del values["cache_dir"]  # A folder of each host.
  versions = {"python": platform.python_version(), "jax": importlib.metadata.version("jax")}
  _check_equal(group, "the config", {"config": values, "version": versions})


def check_same_fingerprint(group: Group, fingerprint: Mapping[str, Any]) -> None:
  """Raises an InputError if a process reads other data, or another tokenizer, than process 0."""
  _check_equal(group, "the data", {"data": dict(fingerprint)})


def _check_equal(group: Group, what: str, value: dict[str, Any]) -> None:
  every = group.share(what, value)
  for index, other in enumerate(every):
    try:
      check_config(every[0], other)
    except InputError as error:
      found = str(error).partition(": ")[2].rpartition(". Change")[0]
      found = found.replace("checkpoint ", "").replace(", config ", " and ")
      raise InputError(
        f"{what} of {group.name(0)} and of {group.name(index)} differ: {found}. All processes of a "
        "run need the same command, data and versions."
      ) from None


def check_seen_by_all(group: Group, workdir: Path) -> None:
  """Raises an InputError if some process does not see the workdir that process 0 made."""
  file, deadline = workdir / "config.json", time.monotonic() + _SHOWN
  while not file.exists() and time.monotonic() < deadline:
    time.sleep(0.2)  # Shared disks show what is new after some seconds.
  seen = group.share("the workdir", file.exists())
  if not all(seen):
    raise InputError(
      f"{group.name(seen.index(False))} does not see {file}, which {group.name(0)} wrote: "
      "--workdir must be a folder on a disk that all hosts share."
    )
