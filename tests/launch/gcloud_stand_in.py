"""A stand-in of gcloud, NOT Google's: folders in the place of TPU VMs, failures as a test asks.

It knows the flags that `gcloud … --help` (Google Cloud SDK 528) lists for the commands we use,
refuses all others as gcloud does, records every call, and answers as a scenario says:

  hosts         workers of each node
  create        what creating fails with
  states        of the request, one for each look, the last one again and again
  failure       message of a FAILED request
  missing       a node that was not made
  unreachable   how many times one worker cannot be reached
  cut           text at which the line breaks, once
  preempt       text at which all machines are taken away

One scenario for each creation; the last one again and again.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

STATE = Path(os.environ.get("GCLOUD_STAND_IN", "."))
WHERE = {"--zone", "--project", "--quiet"}
SSH = {"--worker", "--ssh-flag", "--internal-ip", "--command"}
KNOWN = {  # Of each command: the flags it must have, those it may have, and its words.
  ("queued-resources", "create"): (
    {"--zone", "--accelerator-type", "--runtime-version"},
    {"--node-id", "--node-count", "--node-prefix", "--spot", "--reserved", "--guaranteed",
     "--async", "--internal-ips", "--network", "--subnetwork", "--service-account", "--labels",
     "--metadata", "--valid-until-duration"}, 1,
  ),
  ("queued-resources", "describe"): ({"--zone"}, {"--format"}, 1),
  ("queued-resources", "delete"): ({"--zone"}, {"--force", "--async"}, 1),
  ("tpu-vm", "describe"): ({"--zone"}, {"--format"}, 1),
  ("tpu-vm", "scp"): ({"--zone", "--worker"}, {"--internal-ip", "--scp-flag", "--recurse"}, 2),
  ("tpu-vm", "ssh"): ({"--zone", "--worker", "--command"}, SSH, 1),
}  # fmt: skip


@contextlib.contextmanager
def state():
  """What is known of the request; changes are kept."""
  path = STATE / "state.json"
  with (STATE / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    seen = json.loads(path.read_text()) if path.exists() else {"made": 0, "exists": False}
    yield seen
    part = path.with_suffix(".part")
    part.write_text(json.dumps(seen))
    part.replace(path)  # Whenever it is killed, the file is whole.


def scenario(seen: dict) -> dict:
  all_of_them = json.loads((STATE / "scenario.json").read_text())
  return all_of_them[min(max(seen["made"] - 1, 0), len(all_of_them) - 1)]


def main(words: list[str]) -> int:
  if words == ["take-away"]:  # A test's own word.
    with state() as seen:
      seen["gone"] = True
      take_away()
    return 0
  with state(), (STATE / "calls.jsonl").open("a") as file:
    file.write(json.dumps(words) + "\n")
  assert words[:2] == ["compute", "tpus"], words
  command, rest = tuple(words[2:4]), words[4:]
  flags = {w.partition("=")[0]: w.partition("=")[2] for w in rest if w.startswith("--")}
  plain = [w for w in rest if not w.startswith("--")]
  must, may, count = KNOWN[command]
  if unknown := set(flags) - must - may - WHERE:
    return refuse(f"unrecognized arguments: {' '.join(sorted(unknown))}", 2)
  if missing := must - set(flags):
    return refuse(f"argument {' '.join(sorted(missing))}: Must be specified.", 2)
  if len(plain) != count:
    return refuse(f"unrecognized arguments or too few: {plain}", 2)
  return COMMANDS[command](plain, flags)


def refuse(text: str, status: int = 1) -> int:
  print(f"ERROR: (gcloud.compute.tpus) {text}", file=sys.stderr)
  return status


def create(plain: list[str], flags: dict) -> int:
  single, several = "--node-id" in flags, "--node-count" in flags
  if single == several or (several and int(flags["--node-count"]) < 2):
    return refuse("Exactly one of (--node-id | --node-count : --node-prefix) must be specified.", 2)
  with state() as seen:
    if seen["exists"]:
      return refuse("ALREADY_EXISTS: Resource already exists")
    seen["made"] += 1
    asked = scenario(seen)
    if asked.get("create"):
      return refuse(asked["create"])
    prefix = flags.get("--node-prefix", plain[0])
    nodes = [f"{prefix}-{i}" for i in range(int(flags["--node-count"]))] if several else []
    nodes = nodes or [flags["--node-id"]]
    seen.update(
      exists=True, name=plain[0], nodes=nodes, looks=0, unreachable=asked.get("unreachable", 0)
    )
    seen.update(gone=False, cut=False)
  for node in nodes:
    for worker in range(asked.get("hosts", 1)):
      make_worker(STATE / "vms" / node / str(worker), worker)
  return 0


def make_worker(home: Path, worker: int) -> None:
  (home / "bin").mkdir(parents=True)
  program = home / "bin" / "hostname"
  program.write_text(f"#!/bin/sh\necho t1v-n-0123abcd-w-{worker}\n")
  program.chmod(0o755)


def describe(plain: list[str], flags: dict) -> int:
  assert flags["--format"] == "json"
  with state() as seen:
    if not seen["exists"] or seen["name"] != plain[0]:
      return refuse("NOT_FOUND: Resource was not found")
    asked = scenario(seen)
    states = asked.get("states", ["ACTIVE"])
    now = "SUSPENDED" if seen["gone"] else states[min(seen["looks"], len(states) - 1)]
    seen["looks"] += 1
  answer = {"name": plain[0], "state": {"state": now}}
  if now == "FAILED":
    answer["state"]["failedData"] = {"error": {"code": 8, "message": asked.get("failure", "")}}
  print(json.dumps(answer))
  return 0


def describe_node(plain: list[str], flags: dict) -> int:
  with state() as seen:
    asked = scenario(seen)
    if not seen["exists"] or plain[0] not in seen["nodes"] or plain[0] == asked.get("missing"):
      return refuse("NOT_FOUND: Resource was not found")
    now = "PREEMPTED" if seen["gone"] else "READY"
  ends = [{"ipAddress": f"10.0.0.{i}"} for i in range(asked.get("hosts", 1))]
  print(json.dumps({"name": plain[0], "state": now, "networkEndpoints": ends}))
  return 0


def delete(plain: list[str], flags: dict) -> int:
  with state() as seen:
    if not seen["exists"]:
      return refuse("NOT_FOUND: Resource was not found")
    if "--force" not in flags:
      return refuse("FAILED_PRECONDITION: the queued resource has nodes")
    take_away()
    shutil.rmtree(STATE / "vms", ignore_errors=True)
    seen["exists"] = False
  return 0


def take_away() -> None:
  """Ends all that runs on the workers, as it is when machines go."""
  for path in (STATE / "vms").glob("*/*/*/.launch/pid"):
    with contextlib.suppress(ProcessLookupError):
      os.killpg(int(path.read_text()), signal.SIGKILL)


def reachable() -> bool:
  with state() as seen:
    if seen["gone"]:
      return False
    seen["unreachable"] -= 1
    return seen["unreachable"] < 0


def copy(plain: list[str], flags: dict) -> int:
  source, (node, _, target) = plain[0], plain[1].partition(":")
  assert flags["--worker"] == "all"
  homes = sorted((STATE / "vms" / node).iterdir(), key=lambda home: int(home.name))
  fine = reachable()
  for home in homes if fine else homes[:-1]:
    shutil.copy(source, home / target)
  return 0 if fine else 255


def ssh(plain: list[str], flags: dict) -> int:
  assert flags["--worker"] == "all"
  node, command = plain[0], flags["--command"]
  homes = sorted((STATE / "vms" / node).iterdir(), key=lambda home: int(home.name))
  fine = reachable()
  running = [start(home, command) for home in (homes if fine else homes[:-1])]
  with state() as seen:
    asked = scenario(seen)
  threads = [threading.Thread(target=show, args=(process, asked)) for process in running]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  statuses = [process.wait() for process in running] + ([] if fine else [255])
  return next((status for status in statuses if status), 0)


def start(home: Path, command: str) -> subprocess.Popen:
  values = {**os.environ, "HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
  return subprocess.Popen(
    ["bash", "-c", command], cwd=home, env=values, stdout=subprocess.PIPE, start_new_session=True
  )


def show(process: subprocess.Popen, asked: dict) -> None:
  for line in process.stdout or ():
    os.write(1, line)
    text = line.decode()
    if asked.get("preempt") and re.search(asked["preempt"], text):
      with state() as seen:
        seen["gone"] = True
        take_away()
      os._exit(255)
    with state() as seen:
      again = seen["cut"]
      seen["cut"] = seen["cut"] or bool(asked.get("cut") and re.search(asked["cut"], text))
      cut = seen["cut"] and not again
    if cut:
      os._exit(255)


COMMANDS = {
  ("queued-resources", "create"): create,
  ("queued-resources", "describe"): describe,
  ("queued-resources", "delete"): delete,
  ("tpu-vm", "describe"): describe_node,
  ("tpu-vm", "scp"): copy,
  ("tpu-vm", "ssh"): ssh,
}

if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
