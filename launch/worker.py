"""python3 -m launch.worker ACTION: a run that goes on when the line to its machine is lost.

For a worker of a TPU pod, in the copied tree; needs Python's standard library only, from 3.8 on.
The folder `.launch` has job.json (`argv` and `environment`) and what the actions leave: `attempt`,
`pid`, `log`, `sent` (bytes of the log that were printed) and `status`.

  start ATTEMPT        starts the run, unless this attempt was started before
  follow ATTEMPT HOST  prints the log, from where it was printed before, to the end of the run;
                       every line has HOST's number before it, the last is `ATTEMPT NUMBER STATUS`
  stop SECONDS         SIGTERM, and after so many seconds SIGKILL; returns when the run has ended
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(".launch")
_POLL = 0.5  # Seconds between two looks at the log.
_LOST = 128 + signal.SIGKILL  # The status of a run that ended without one.
_SETTLE = 5.0  # Seconds that a run which has just ended has to leave its status.


def start(attempt: str) -> int:
  """Starts the run in a session of its own."""
  if _alive():
    if _read("attempt") == attempt:
      return 0
    print("error: another run is going on here: stop it first.", file=sys.stderr)
    return 1
  for name in ("status", "sent", "log"):
    if (FOLDER / name).exists():
      (FOLDER / name).unlink()
  _write("attempt", attempt)
  with (FOLDER / "log").open("ab") as log:
    process = subprocess.Popen(
      [sys.executable, "-m", "launch.worker", "run"], stdin=subprocess.DEVNULL, stdout=log,
      stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
  _write("pid", str(process.pid))
  return 0


def run() -> int:
  """The process that `start` leaves behind: waits for the run and keeps its status."""
  signal.signal(signal.SIGTERM, lambda *_: None)  # The run has it too, and ends.
  job = json.loads((FOLDER / "job.json").read_text())
  try:
    status = subprocess.call(job["argv"], env={**os.environ, **job["environment"]})
  except OSError as error:
    print(f"error: {job['argv'][0]} cannot be started: {error.strerror}.", flush=True)
    status = 2
  _write("status", str(128 - status if status < 0 else status))
  return 0


def follow(attempt: str, host: str) -> int:
  """Prints the log to the end of the run."""
  label = host.rpartition("-w-")[2]
  while True:
    status = _status()  # Before the log is read: what was printed before it ended is in there.
    _print_rest(label, whole=status is None)
    if status is not None:
      print(attempt, label, status, flush=True)
      return 0
    time.sleep(_POLL)


def stop(seconds: float) -> int:
  """Ends the run."""
  for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 2 * _SETTLE)):
    if _alive():
      os.killpg(int(_read("pid")), number)
    end = time.monotonic() + patience
    while _alive() and time.monotonic() < end:
      time.sleep(0.1)
  return 0


def _print_rest(label: str, whole: bool) -> None:
  """Prints what is new in the log, up to its last whole line if `whole`."""
  sent = int(_read("sent") or 0)
  with (FOLDER / "log").open("rb") as file:
    file.seek(sent)
    text = file.read()
  if whole:
    text = text[: text.rfind(b"\n") + 1]
  for line in text.splitlines():
    sys.stdout.buffer.write(b"[" + label.encode() + b"] " + line + b"\n")
  sys.stdout.flush()
  _write("sent", str(sent + len(text)))


def _status() -> "int | None":
  """How the run ended; None while it runs."""
  if not (FOLDER / "status").exists() and not _alive():
    time.sleep(_SETTLE)
    if not (FOLDER / "status").exists():
      return _LOST
  return int(_read("status")) if (FOLDER / "status").exists() else None


def _alive() -> bool:
  """Whether anything of the run is left."""
  pid = _read("pid")
  if not pid:
    return False
  try:
    os.killpg(int(pid), 0)
  except ProcessLookupError:
    return False
  return True


def _read(name: str) -> str:
  path = FOLDER / name
  return path.read_text() if path.exists() else ""


def _write(name: str, text: str) -> None:
  part = FOLDER / (name + ".part")
  part.write_text(text)
  part.replace(FOLDER / name)


ACTIONS = {"start": start, "run": run, "follow": follow, "stop": lambda text: stop(float(text))}

if __name__ == "__main__":
  sys.exit(ACTIONS[sys.argv[1]](*sys.argv[2:]))
