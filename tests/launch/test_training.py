"""Real training in several real processes, started by `python -m launch --target=local`."""

import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.commands import ROOT
from tests.launch.launched import PYTHON, alive, environment, wait_for
from tests.quick import xla_flags
from tests.train.test_run import Bench, assert_same_run, leaves, metrics, newest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
  return Bench(tmp_path_factory.mktemp("launched"))


class Launched:
  """`python -m launch` of a run; what it prints goes to files."""

  def __init__(self, bench: Bench, name: str, processes: int, *words: str, own: tuple = ()):
    self.workdir, self._logs = bench.folder / name, bench.folder / f"{name}_logs"
    command = bench.arguments(self.workdir, "--config.barrier_seconds=60", *own)
    flags = xla_flags(4 // processes)
    flags = " ".join(w for w in flags.split() if "device_count" not in w)
    self.err = bench.folder / f"{name}.err"
    with self.err.open("ab") as err:
      self.process = subprocess.Popen(
        [PYTHON, "-m", "launch", f"--processes={processes}", f"--logs={self._logs}",
         f"--devices_per_process={4 // processes}", "--device=cpu", *words, "--", "train",
         *command],
        cwd=ROOT, env=environment(XLA_FLAGS=flags), stderr=err, stdout=subprocess.DEVNULL,
      )  # fmt: skip

  def end(self) -> tuple[int, str]:
    """(status, stderr)"""
    status = self.process.wait(600)
    return status, self.err.read_text()

  def pid(self, rank: int) -> int:
    """The process of a rank, as its first line says."""
    found = re.findall(rf"^\[{rank}\] started as process (\d+)", self.err.read_text(), re.M)
    return int(found[-1])


@pytest.fixture(scope="module")
def one(bench):
  """One process with four devices, that nothing disturbed."""
  run = Launched(bench, "one", 1)
  status, err = run.end()
  assert status == 0, err
  return run.workdir


def assert_near(workdir: Path, reference: Path) -> None:
  got, want = metrics(workdir), metrics(reference)
  assert [line["step"] for line in got] == [line["step"] for line in want]
  for mine, theirs in zip(got, want, strict=True):
    for name in ("loss", "validation_loss"):
      assert abs(mine.get(name, 0.0) - theirs.get(name, 0.0)) < 1e-5
  for a, b in zip(leaves(workdir), leaves(reference), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_give_the_losses_of_one(bench, one, processes):
  run = Launched(bench, f"several{processes}", processes)
  status, err = run.end()
  assert status == 0, err
  assert f"{processes} processes" in err
  assert_near(run.workdir, one)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_named_and_the_restarted_run_is_bit_identical(bench, killed):
  undisturbed = Launched(bench, "undisturbed", 2)
  assert undisturbed.end()[0] == 0
  run = Launched(bench, f"killed{killed}", 2, "--max_restarts=1", "--backoff=0.5")
  wait_for(lambda: newest(run.workdir) >= 3, 300)
  os.kill(run.pid(killed), signal.SIGKILL)
  status, err = run.end()
  assert status == 0, err
  assert re.search(rf"restart 1 of 1 in 0.5 s: process {killed} was killed by SIGKILL", err), err
  other = 1 - killed  # It has said itself whom it missed.
  assert re.search(rf"^\[{other}\] error: .*process {killed} \(", err, re.M), err
  assert_same_run(run.workdir, undisturbed.workdir)


def test_four_processes_are_stopped_and_two_go_on_with_the_same_data(bench, one):
  run = Launched(bench, "moved", 4)
  wait_for(lambda: newest(run.workdir) >= 6, 300)
  run.process.terminate()
  status, err = run.end()
  assert status == 75, err
  stopped = newest(run.workdir)
  assert 6 <= stopped < 30
  assert not any(alive(run.pid(rank)) for rank in range(4))
  status, err = Launched(bench, "moved", 2).end()
  assert status == 0, err
  assert f"{stopped} of 30 done, continuing" in err
  assert_near(run.workdir, one)


def test_wrong_input_is_said_once_more_at_the_end_and_not_started_again(bench):
  run = Launched(bench, "wrong", 2, "--max_restarts=3", own=("--config.model.num_heads=5",))
  status, err = run.end()
  last = err.splitlines()[-1]
  assert status == 2 and "restart 1" not in err
  assert last.startswith("error: process ") and "num_heads=5" in last
