"""python -m launch.watch --grace=S -- COMMAND…: a command that ends with its launcher.

Stands between a launcher and one process of a run, on the process's machine, and needs Python's
standard library only. Standard input is the line to the launcher: a line names a signal for the
command (TERM, INT) or says KILL, an empty one says that the launcher is there. When the input ends,
or is silent for longer than --silence seconds, the launcher is gone: the command gets SIGTERM, so
that it saves, and SIGKILL after the grace period. Only a pipe or a socket is such a line: from a
terminal or /dev/null, as where a shell runs this command, nothing is read. What the command leaves
behind in its process group ends with it. On Linux the command dies with this process too, whatever
kills it.

With --share=I/N it also leaves the command the I-th of N shares of this machine's devices.

Exit status: the command's own; 128 + N if signal N ended it; 254 for 255, which is ssh's own.
"""

import argparse
import contextlib
import ctypes
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading

STARTED = "started as process"  # How the first line on stderr begins.
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Watch:
  """The command, and the signals that it has been sent."""

  def __init__(self, command: list[str], grace: float, environment: dict[str, str]):
    self._grace, self._asked, self._lock = grace, False, threading.Lock()
    dies_with_parent = _dies_with_parent(os.getpid()) if sys.platform == "linux" else None
    self.process = subprocess.Popen(
      command, stdin=subprocess.DEVNULL, env={**os.environ, **environment},
      start_new_session=True, preexec_fn=dies_with_parent,
    )  # fmt: skip

  def ask(self, number: int) -> None:
    """Sends the signal, once: a second one would end a trainer that is saving."""
    with self._lock:
      if not self._asked and self.process.poll() is None:
        self.process.send_signal(number)
      self._asked = True

  def kill(self) -> None:
    """Kills the command and what it started, if anything of it is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self.process.pid, signal.SIGKILL)

  def end(self, why: str) -> None:
    """Asks, waits for the grace period and kills."""
    with contextlib.suppress(OSError):
      print(f"{why}: stopping.", file=sys.stderr, flush=True)
    self.ask(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(self._grace)
    self.kill()

  def listen(self, silence: float | None) -> None:
    """Does what the launcher says, to the end of the command."""
    waiting = b""
    while self.process.poll() is None:
      ready, _, _ = select.select([0], [], [], silence)
      if not ready:
        return self.end(f"the launcher was silent for {silence:g} s")
      words = os.read(0, 4096)
      if not words:
        return self.end("the launcher is gone")
      *lines, waiting = (waiting + words).split(b"\n")
      for line in lines:
        self._obey(line)
    return None

  def _obey(self, line: bytes) -> None:
    if line == b"KILL":
      self.kill()
    elif line in (b"TERM", b"INT"):
      self.ask(signal.Signals[f"SIG{line.decode()}"])


def main() -> int:
  """Runs the command to its end; returns the exit status."""
  given = _arguments()
  try:
    environment = _share(given) if given.share else {}
    watch = Watch(given.command, given.grace, environment)
  except OSError as error:
    return _refuse(f"{given.command[0]} cannot be started: {error.strerror}.")
  except ValueError as error:  # InputError is one.
    return _refuse(str(error))
  print(f"{STARTED} {watch.process.pid} on {socket.gethostname()}", file=sys.stderr, flush=True)
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda received, _: watch.ask(signal.SIGTERM))
  if _has_launcher():
    threading.Thread(target=watch.listen, args=(given.silence,), daemon=True).start()
  status = watch.process.wait()
  watch.kill()
  return 128 - status if status < 0 else min(status, 254)


def _has_launcher() -> bool:
  """Whether standard input is what a launcher, or sshd, gives."""
  try:
    mode = os.fstat(0).st_mode
  except OSError:  # It is closed.
    return False
  return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="launch.watch", allow_abbrev=False)
  parser.add_argument("--silence", type=float, help="Seconds after which the launcher is gone.")
  parser.add_argument("--grace", type=float, required=True, help="Seconds from SIGTERM to SIGKILL.")
  parser.add_argument("--share", help="I/N: which share of the devices.")
  parser.add_argument("--device", help="Kind of device; left out, what the machine has.")
  parser.add_argument("--devices_per_process", type=int, help="Devices of each share.")
  parser.add_argument("--no_xla_table", action="store_true", help="No flags for the compiler.")
  parser.add_argument("command", nargs="+")
  return parser.parse_args()


def _share(given: argparse.Namespace) -> dict[str, str]:
  from launch.devices import share_environment

  slot, slots = map(int, given.share.split("/"))
  return share_environment(
    slot,
    slots,
    device=given.device,
    each=given.devices_per_process,
    own=os.environ,
    xla_table=not given.no_xla_table,
  )


def _refuse(text: str) -> int:
  print(f"error: {text}", file=sys.stderr, flush=True)
  return 2


def _dies_with_parent(parent: int):
  """For a new process: it is killed when the process that started it has ended."""
  prctl = ctypes.CDLL(None, use_errno=True).prctl

  def prepare() -> None:
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # It ended meanwhile.
      os._exit(128 + signal.SIGKILL)

  return prepare


if __name__ == "__main__":
  sys.exit(main())
