"""Commands of this project as processes that start quickly: forks of one that has imported JAX."""

import atexit
import dataclasses
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["train.loop", "train.flags", "infer", "ml_collections"])
_SAME_PROCESS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}  # Commands start again without it.


class Command:
  """A running `python -m MODULE ARGUMENTS…`, as subprocess.Popen has it."""

  def __init__(
    self, module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
  ):
    self._folder = tempfile.TemporaryDirectory()
    self._outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
    values = {**os.environ, **(environment or {}), **_SAME_PROCESS}
    self._process = _CONTEXT.Process(
      target=_run, args=(module, list(arguments), values, list(map(str, self._outputs)))
    )
    self._process.start()

  @property
  def returncode(self) -> int | None:
    """The exit status, or None while it runs; negative: the signal that ended it."""
    return self._process.exitcode

  def send_signal(self, number: signal.Signals) -> None:
    """Sends a signal, unless the process has ended."""
    if self._process.pid is not None and self._process.is_alive():
      os.kill(self._process.pid, number)

  def communicate(self, timeout: float | None = None) -> tuple[str, str]:
    """(stdout, stderr) once the process has ended.

    Raises:
      subprocess.TimeoutExpired: if it does not end in time; it is killed.
    """
    self._process.join(timeout)
    if self._process.is_alive():
      self._process.kill()
      raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
    texts = [path.read_text(encoding="utf-8") for path in self._outputs]
    self._folder.cleanup()
    return texts[0], texts[1]


@dataclasses.dataclass(frozen=True)
class Done:
  """What an ended command left."""

  returncode: int | None
  stdout: str
  stderr: str


def run(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Done:
  """Runs a command to its end."""
  command = Command(module, arguments, environment)
  out, err = command.communicate(timeout=600)
  return Done(command.returncode, out, err)


def _run(module: str, arguments: list[str], environment: dict[str, str], outputs: list[str]):
  """What the fork does."""
  for number, path in enumerate(outputs, start=1):
    target = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(target, number)
    os.close(target)
  os.chdir(ROOT)
  os.environ.clear()
  os.environ.update(environment)
  sys.argv = [module, *arguments]
  try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  finally:
    atexit._run_exitfuncs()  # Forks of multiprocessing leave without them.
