"""`python -m launch` in a folder of its own, where `train` is the stand-in."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.commands import ROOT

STAND_IN = Path(__file__).parent / "stand_in.py"
PYTHON = sys.executable


def prepare(folder: Path) -> None:
  """Makes `python -m train` in this folder the stand-in."""
  package = folder / "train"
  package.mkdir()
  (package / "__init__.py").touch()
  (package / "__main__.py").write_text(STAND_IN.read_text())


def environment(**changes: str) -> dict[str, str]:
  """That of a shell in which this tree is installed."""
  own = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "CUDA_"))}
  return own | {"PYTHONPATH": str(ROOT)} | changes


def start(folder: Path, *words: str, **changes: str) -> subprocess.Popen:
  """`python -m launch WORDS…` in `folder`, with text pipes."""
  return subprocess.Popen(
    [PYTHON, "-m", "launch", *words], cwd=folder, env=environment(**changes), text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def launch(folder: Path, *words: str, **changes: str) -> tuple[int, str, str]:
  """The same to its end: (status, stdout, stderr)."""
  process = start(folder, *words, **changes)
  out, err = process.communicate(timeout=120)
  return process.returncode, out, err


def wait_for(what: Callable[[], bool], seconds: float = 30.0) -> None:
  """Until `what` is true.

  Raises:
    TimeoutError: if it does not become so in time.
  """
  deadline = time.monotonic() + seconds
  while not what():
    if time.monotonic() > deadline:
      raise TimeoutError("it did not happen")
    time.sleep(0.02)


def alive(pid: int) -> bool:
  """Whether the process runs (a zombie does not)."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False
