"""Processes that do one piece of a comparison each, with their time and their memory."""

import os
import subprocess
import sys
import time
from pathlib import Path

from train.config import Config, checked


def finished(arguments: list[str]) -> tuple[float, float]:
  """Runs `python ARGUMENTS` to its end: (seconds, MiB that were resident at most).

  Raises:
    RuntimeError: if it fails.
  """
  began = time.perf_counter()
  process = subprocess.Popen([sys.executable, *arguments])
  _, status, used = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise RuntimeError(f"python {' '.join(arguments)} ended with {process.returncode}")
  return time.perf_counter() - began, used.ru_maxrss / 1024


def train(config: str, workdir: Path, values: dict[str, object]) -> tuple[float, float]:
  """`python -m train`, as a user starts it: see `finished`."""
  settings = [f"--config.{name}={value}" for name, value in values.items()]
  return finished(["-m", "train", f"--config={config}", f"--workdir={workdir}", *settings])


def set_all(config: Config, values: dict[str, object]) -> Config:
  """The config with values by dotted names, as --config.NAME=VALUE sets them."""
  for path, value in values.items():
    section, _, name = path.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)
  return checked(config)
