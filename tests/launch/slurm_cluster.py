"""A real Slurm of this test's own: its controller and two nodes, all of them on this machine."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

NODES = ("127.0.0.2", "127.0.0.3")  # Names that every process of this machine can reach.
_COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_CONFIG = """\
ClusterName=triune
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=3
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
MailProg=/bin/true
NodeName=127.0.0.[2-3] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=1
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL State=UP PriorityTier=10
"""


class Cluster:
  """Runs Slurm's commands against the cluster."""

  def __init__(self, config: Path):
    self.environment = {**os.environ, "SLURM_CONF": str(config)}

  def run(self, *words: str) -> str:
    """What a command prints."""
    done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout

  def shows(self, number: str, field: str) -> str:
    """A field of `scontrol show job`."""
    words = self.run("scontrol", "show", "job", "--oneliner", number).split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{field}="))


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
  """Starts the daemons; skips the test where Slurm cannot run."""
  missing = [name for name in _COMMANDS if shutil.which(name) is None]
  if missing or os.geteuid():
    reason = f"{', '.join(missing)} is not installed" if missing else "slurmd needs root"
    pytest.skip(f"{reason} (apt-get install slurmctld slurmd slurm-client munge)")
  (folder / "state").mkdir(parents=True)
  (folder / "munge.key").write_bytes(os.urandom(128))
  (folder / "munge.key").chmod(0o600)
  config = folder / "slurm.conf"
  host = socket.gethostname().partition(".")[0]
  config.write_text(_CONFIG.format(folder=folder, host=host, ports=_ports()))
  munged = ["munged", "-F", "--force", f"--key-file={folder}/munge.key", "--num-threads=2"]
  munged += [f"--{name}={folder}/munge.{name.removesuffix('-file')}"
             for name in ("socket", "pid-file", "log-file", "seed-file")]  # fmt: skip
  daemons = [munged, ["slurmctld", "-D", "-f", str(config)]]
  daemons += [["slurmd", "-D", "-f", str(config), "-N", node] for node in NODES]
  running = []
  slurm = Cluster(config)
  try:
    for words in daemons:
      output = (folder / f"{Path(words[0]).name}-{len(running)}.out").open("w")
      running.append(subprocess.Popen(words, stdout=output, stderr=output, env=slurm.environment))
      time.sleep(0.5)
    wait(lambda: slurm.run("sinfo", "--noheader", "--format=%T %D", "--partition=low"), "idle 2")
    yield slurm
    slurm.run("scancel", "--full", "--signal=KILL", "--user=root")
    wait(lambda: slurm.run("squeue", "--noheader") or "empty", "empty")
  finally:
    for process in reversed(running):
      process.terminate()
    for process in running:
      process.wait(timeout=30)


def wait(what, expected: str, seconds: float = 60.0) -> str:
  """What `what()` returns once `expected` stands in it."""
  end = time.monotonic() + seconds
  while expected not in (seen := what()):
    assert time.monotonic() < end, f"{expected!r} is not in {seen!r} after {seconds} s"
    time.sleep(0.3)
  return seen


def _ports() -> list[int]:
  """A free port, and two neighbours that are free."""
  for first in range(28000, 32000, 3):
    with contextlib.ExitStack() as stack:
      try:
        for port in range(first, first + 3):
          stack.enter_context(socket.socket()).bind(("", port))
      except OSError:
        continue
      return [first, first + 1, first + 2]
  raise RuntimeError("no three free ports in a row")
