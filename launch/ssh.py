"""`--target=ssh`: one or more processes on each host of a file, through the system's ssh client."""

import dataclasses
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch import tree
from launch.devices import KINDS
from launch.hosts import Host, read_hosts
from launch.job import Job, process_environment
from launch.local import PORTS, watched
from launch.options import option
from launch.processes import Ended, Process
from launch.supervise import supervise
from model.errors import DONE, InputError

UNREAD: tuple[str, ...] = ()  # Shared flags without effect here.
CONNECT_SECONDS = 15
ALIVE_SECONDS, ALIVE_COUNT = 5, 3  # A connection is given up after 20 s without an answer.
SILENCE_SECONDS = 30.0  # After which the watch of a host takes the launcher for gone.
COPIES_AT_ONCE = 8
_BROKEN = 255  # The ssh client's own status.


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags of `--target=ssh`."""

  hosts_file: str | None = option(None, "File with a host a line: user@host:port slots=N.")
  device: str | None = option(None, "Kind of device; left out, what each host has.", choices=KINDS)
  devices_per_process: int | None = option(
    None, "Devices of each process: simulated ones of a CPU; left out, one, and the GPUs of a host "
    "are divided evenly among its slots.", at_least=1,
  )  # fmt: skip
  remote_dir: str | None = option(
    None, "Folder of this tree on the hosts, below the home folder if relative; left out, the same "
    "as here.",
  )  # fmt: skip
  python: str = option("python3", "Python on the hosts; left out, python3.")
  copy: bool = option(False, "First copy the files that git tracks here into --remote_dir.")
  coordinator_host: str | None = option(
    None, "The first host as the others reach it; left out, its name in the file."
  )
  port: int | None = option(
    None,
    "Port at which the processes meet; left out, drawn for each attempt.",
    at_least=1,
    at_most=65_535,
  )
  ssh_option: tuple[str, ...] = option(
    (), "NAME=VALUE for the ssh client's -o, before our own; may be given several times."
  )
  grace: float = option(
    30.0,
    "Seconds that a process has for its end after another one failed.",
    at_least=0,
    at_most=86_400,
  )

  @property
  def folder(self) -> str:
    """The tree on the hosts."""
    folder = self.remote_dir or str(Path.cwd())
    return folder.removeprefix("~/")  # A shell of ssh starts in the home folder.


def submit(job: Job, options: Options, dry_run: bool) -> int:
  """Runs the job to its end; returns its exit status.

  Raises:
    InputError: for a wrong hosts file, or options that do not fit it.
  """
  slots = slots_of(job, options)
  hosts = list(dict.fromkeys(host for host, _ in slots))
  make = lambda: processes_of(job, options, slots)
  names = tree.tracked(Path.cwd()) if options.copy else []
  if options.copy:
    tree.check_command(job, Path.cwd(), names)
  if dry_run:
    if options.copy:
      print(f"# tree.tar.gz: the {len(names)} files that git tracks here")
      print("\n".join(f"{shlex.join(_unpacking(h, options))} < tree.tar.gz" for h in hosts))
    print("\n".join(process.shell() for process in make()))
    return DONE
  if options.copy:
    _copy(hosts, options, names)
  return supervise(job, make, grace=options.grace, alive_every=ALIVE_SECONDS, explain=_explain)


def slots_of(job: Job, options: Options) -> list[tuple[Host, int]]:
  """(host, which process there) of each process, in the order of the file."""
  if options.hosts_file is None:
    raise InputError("--hosts_file is missing: --target=ssh needs a file with one host a line.")
  hosts = read_hosts(options.hosts_file)
  slots = [(host, slot) for host in hosts for slot in range(host.slots)]
  count = job.processes or len(slots)
  if count > len(slots):
    raise InputError(
      f"--processes={count}, but {options.hosts_file} has {len(slots)} slots: add hosts or slots=N."
    )
  dataclasses.replace(job, processes=count)  # Refuses several for what is not shared out.
  used, left = slots[:count], slots[count:]
  if left:
    names = ", ".join(dict.fromkeys(host.name for host, _ in left))
    print(f"--processes={count} leaves {len(left)} slots of {names} unused.", file=sys.stderr)
  if options.coordinator_host is None and used[-1][0] != used[0][0] and used[0][0].is_loopback:
    raise InputError(
      f"{options.hosts_file}: all meet at the first host, {used[0][0].name}, which the others "
      "cannot reach by this name. Write its name in the network, or give --coordinator_host."
    )
  return used


def processes_of(job: Job, options: Options, slots: Sequence[tuple[Host, int]]) -> list[Process]:
  """The processes of one attempt, each an ssh client here."""
  name = options.coordinator_host or slots[0][0].name
  port = options.port or random.choice(PORTS)
  coordinator = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
  return [
    Process(
      rank=rank, label=f"{rank}@{host.name}", environment={},
      argv=(
        *client(host, options.ssh_option),
        _command(job, options, f"{slot}/{sum(host == other for other, _ in slots)}",
                 process_environment(coordinator, len(slots), rank)),
      ),
    )
    for rank, (host, slot) in enumerate(slots)
  ]  # fmt: skip


def client(host: Host, own: Sequence[str] = ()) -> list[str]:
  """The ssh client up to the command: no questions, no terminal, every wait bounded."""
  settings = [
    *own, "BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}",
    f"ServerAliveInterval={ALIVE_SECONDS}", f"ServerAliveCountMax={ALIVE_COUNT}",
    "ControlPath=none", "ClearAllForwardings=yes",
  ]  # fmt: skip
  words = [word for setting in settings for word in ("-o", setting)]
  port = [] if host.port is None else ["-p", str(host.port)]
  return ["ssh", "-T", *words, *port, host.destination]


def _command(job: Job, options: Options, share: str, place: dict[str, str]) -> str:
  """What the shell of a host is given."""
  given = {"PYTHONUNBUFFERED": "1", **job.environment, **place}
  own = [f"--share={share}"]
  own += [] if options.device is None else [f"--device={options.device}"]
  each = options.devices_per_process
  own += [] if each is None else [f"--devices_per_process={each}"]
  own += [] if job.xla_table else ["--no_xla_table"]
  words = watched(
    job.argv(options.python), options.python, options.grace, f"--silence={SILENCE_SECONDS:g}", *own
  )
  environment = [f"{name}={value}" for name, value in given.items()]
  return f"cd {shlex.quote(options.folder)} && exec {shlex.join(['env', *environment, *words])}"


def _unpacking(host: Host, options: Options) -> list[str]:
  folder = shlex.quote(options.folder)
  unpack = f"mkdir -p {folder} && tar --extract --gzip --directory={folder}"
  return [*client(host, options.ssh_option), unpack]


def _copy(hosts: Sequence[Host], options: Options, names: list[str]) -> None:
  """Copies the tree to all hosts, several at once."""

  def send(host: Host) -> None:
    with archive.open("rb") as packed:
      done = subprocess.run(_unpacking(host, options), stdin=packed, capture_output=True)
    if done.returncode:
      said = _last_line(done.stderr.decode(errors="replace"))
      raise InputError(f"the tree was not copied to {host.name}: {said}")

  with tempfile.TemporaryDirectory() as folder:
    archive = Path(folder) / "tree.tar.gz"
    tree.pack(archive, Path.cwd(), names, {})
    with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
      list(pool.map(send, hosts))


def _explain(ended: Ended) -> str | None:
  """What it means that an ssh client ended so, where its host or the connection is to blame."""
  process, output = ended.running.process, ended.running.output
  host = process.label.partition("@")[2]
  if ended.status == _BROKEN:
    said = _last_line("\n".join(output.last))
    if output.started:
      return f"host {host}, process {process.rank}, was cut off: {said}"
    return f"host {host} cannot be reached: {said}"
  if not output.started and not output.error:
    return (
      f"process {process.label} did not start (status {ended.status}): "
      + _last_line("\n".join(output.last))
      + " --remote_dir and --python say where tree and Python are there; --copy copies the tree."
    )
  return None


def _last_line(text: str) -> str:
  lines = text.split("\n")
  return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing.")
