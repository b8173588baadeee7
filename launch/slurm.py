"""`--target=slurm`: a batch script that runs on all nodes and puts itself back into the queue."""

import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch.job import FINAL, Job
from launch.options import option
from launch.xla_flags import xla_environment
from model.errors import DEFECT, DONE, InputError

UNREAD: tuple[str, ...] = ()  # Shared flags without effect here.
_OWN = {
  "job-name", "J", "nodes", "N", "ntasks", "n", "ntasks-per-node", "cpus-per-task", "c",
  "gpus-per-node", "time", "t", "partition", "p", "account", "A", "signal", "requeue",
  "no-requeue", "open-mode", "output", "o", "error", "e", "chdir", "D", "array", "a", "parsable",
  "wait", "W", "wrap", "test-only",
}  # fmt: skip
_VALUE = re.compile(r"[\w:.,@+=/-]+")
_POLL = 2.0  # Seconds between two looks at the queue.
_PATIENCE = 30  # Looks in a row that the controller may leave without an answer.


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags of `--target=slurm`."""

  nodes: int | None = option(
    None, "Nodes; left out, as many as --processes fill, else 1.", at_least=1
  )
  ntasks_per_node: int = option(1, "Processes on each node.", at_least=1)
  cpus_per_task: int | None = option(None, "CPU cores of each process.", at_least=1)
  gpus_per_node: int | None = option(
    None, "GPUs of each node, shared out evenly among its processes.", at_least=1
  )
  time: str | None = option(None, "Time limit as sbatch has it, for example 12:00:00.")
  signal_before: int = option(
    120, "Seconds before the time limit at which the processes get SIGTERM.", at_least=1
  )
  partition: str | None = option(None, "Partition.")
  account: str | None = option(None, "Account.")
  sbatch: tuple[str, ...] = option(
    (), "A further option of sbatch, as in --sbatch=--exclusive; may be given several times."
  )
  python: str | None = option(
    None, "Python on the nodes; left out, the path of the one that runs this command."
  )
  exit_wait: int = option(
    300, "Seconds that the other processes have to end once one has ended.", at_least=1
  )
  follow: bool = option(False, "Print the log until the job has ended, with its exit status.")


def submit(job: Job, options: Options, dry_run: bool) -> int:
  """Writes the script into the log folder and gives it to sbatch.

  Returns:
    0 once it is queued; with `follow` the exit status of the job.

  Raises:
    InputError: for options that contradict each other, where sbatch is missing, and in sbatch's
      own words where it refuses the job.
  """
  script = batch_script(job, options, Path.cwd())
  path = job.logs.absolute() / f"{job.name}.sbatch"
  command = ["sbatch", "--parsable", str(path)]
  if dry_run:
    print(f"# {path}\n{script}\n# submitted by\n{shlex.join(command)}")
    return DONE
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(script, encoding="utf-8")
  number = _run(command).partition(";")[0].strip()
  log = path.with_name(f"{job.name}-{number}.log")
  print(f"job {number} is queued; script: {path}; log: {log}; to end it: scancel {number}")
  if not options.follow:
    return DONE
  try:
    return follow(number, log)
  except KeyboardInterrupt:
    print(f"job {number} goes on", flush=True)
    return 128 + signal.SIGINT


def batch_script(job: Job, options: Options, folder: Path) -> str:
  """The text of the script, which sbatch may be given again at any time.

  Args:
    folder: where the command runs, on every node.
  """
  nodes = _nodes(job, options)
  processes = nodes * options.ntasks_per_node
  job = dataclasses.replace(job, processes=processes)  # Refuses several for what is not shared out.
  python = options.python or sys.executable
  kind = "cpu" if options.gpus_per_node is None else "gpu"
  own = {**os.environ, **job.environment}
  values = {**job.environment, **xla_environment(kind, own, table=job.xla_table)}
  delays = " ".join(str(round(delay)) for delay in job.delays())
  # --wait, and not --kill-on-bad-exit: those left by a lost one end by themselves and name it.
  words = ["srun", "--label", "--export=ALL", "--kill-on-bad-exit=0", f"--wait={options.exit_wait}"]
  if options.cpus_per_task is not None:
    words.append(f"--cpus-per-task={options.cpus_per_task}")  # Not handed on by sbatch.
  words += ["bash", "-c", _place(options, processes), job.name, *job.argv(python)]
  return _SCRIPT.format(
    directives="\n".join(f"#SBATCH {d}" for d in _directives(job, options, nodes, folder)),
    delays=delays,
    exports="".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items()),
    meeting=_MEETING if processes > 1 else "",
    command=shlex.join(words),
    final="|".join(str(status) for status in (DONE, *FINAL)),
  )


def follow(number: str, log: Path) -> int:
  """Prints what is added to `log` until job `number` has ended.

  Returns:
    Its exit status: 128 + N where signal N ended it, 1 where Slurm did (time limit, scancel).

  Raises:
    InputError: where Slurm does not answer any more, or has forgotten the job.
  """
  place, ended = 0, False
  while not ended:
    ended = not _in_queue(number)
    if log.exists():
      with log.open("rb") as file:
        file.seek(place)
        text = file.read()
      place += len(text)
      sys.stdout.write(text.decode("utf-8", "replace"))
      sys.stdout.flush()
    if not ended:
      time.sleep(_POLL)
  return _exit_status(number)


def _nodes(job: Job, options: Options) -> int:
  tasks = options.ntasks_per_node
  if job.processes is None:
    return options.nodes or 1
  if job.processes % tasks:
    raise InputError(f"--processes={job.processes} is no multiple of --ntasks_per_node={tasks}.")
  if options.nodes not in (None, job.processes // tasks):
    raise InputError(
      f"--processes={job.processes} is not --nodes={options.nodes} x --ntasks_per_node={tasks}: "
      "leave one of them out."
    )
  return job.processes // tasks


def _directives(job: Job, options: Options, nodes: int, folder: Path) -> list[str]:
  output = str(job.logs.absolute()).replace("%", "%%")
  chosen = {
    "job-name": job.name,
    "nodes": nodes,
    "ntasks-per-node": options.ntasks_per_node,
    "cpus-per-task": options.cpus_per_task,
    "gpus-per-node": options.gpus_per_node,
    "time": _plain("time", options.time),
    "partition": _plain("partition", options.partition),
    "account": _plain("account", options.account),
    "signal": f"TERM@{options.signal_before}",
    "output": f"{output}/{job.name}-%j.log",
    "chdir": str(folder),
  }
  words = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
  words += ["--open-mode=append", "--requeue" if job.max_restarts else "--no-requeue"]
  for word in options.sbatch:
    name = re.match(r"--([a-z-]+)(=.+)?$|-([A-Za-z]).*$", word)
    if name is None:
      raise InputError(f"--sbatch={word}: an option of sbatch is needed, as --sbatch=--exclusive.")
    if (name[1] or name[3]) in _OWN:
      raise InputError(f"--sbatch={word}: the launcher sets this option itself.")
    words.append(word)
  for word in words:
    if not word.isprintable():
      raise InputError(f"{word!r} cannot stand in a line of a batch script.")
  return [_quoted(word) for word in words]


def _quoted(word: str) -> str:
  """A word for a line of #SBATCH: a backslash escapes there in either kind of quotes."""
  escaped = re.sub(r'(["\\\\])', r"\\\1", word)
  return word if re.fullmatch(r"[\w:.,@+=/%-]+", word) else f'"{escaped}"'


def _plain(name: str, value: str | None) -> str | None:
  if value is not None and not _VALUE.fullmatch(value):
    raise InputError(f"--{name}={value}: letters, digits and :.,@+=/_- are allowed.")
  return value


def _place(options: Options, processes: int) -> str:
  """Shell words that tell a process its place and become the command."""
  if processes == 1:
    return 'exec "$@"'
  lines = ["export JAX_PROCESS_ID=$SLURM_PROCID"]
  gpus, tasks = options.gpus_per_node, options.ntasks_per_node
  if gpus is not None and tasks > 1:
    if gpus % tasks:
      raise InputError(f"--gpus_per_node={gpus} is no multiple of --ntasks_per_node={tasks}.")
    share = gpus // tasks
    lines += [
      f"first=$((SLURM_LOCALID * {share}))",
      f"export JAX_LOCAL_DEVICE_IDS=$(seq -s, $first $((first + {share - 1})))",
    ]
  return "; ".join([*lines, 'exec "$@"'])


def _run(command: list[str]) -> str:
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
  except FileNotFoundError:
    raise InputError(
      f"{command[0]} is not installed here: run this on a login node of a Slurm cluster, or use "
      "--dry_run and take the script there."
    ) from None
  if done.returncode:
    raise InputError(f"{command[0]} refused: {done.stderr.strip() or done.stdout.strip()}")
  return done.stdout


def _in_queue(number: str) -> bool:
  for _ in range(_PATIENCE):
    command = ["squeue", "--noheader", f"--jobs={number}", "--format=%T"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Invalid job id" in done.stderr:
      return False
    if not done.returncode:
      return bool(done.stdout.strip())
    time.sleep(_POLL)
  raise InputError(f"squeue does not answer: {done.stderr.strip()}; job {number} may go on.")


def _exit_status(number: str) -> int:
  text = _run(["scontrol", "show", "job", "--oneliner", number])
  state = re.search(r"\bJobState=(\S+)", text)
  code = re.search(r"\bExitCode=(\d+):(\d+)", text)
  if state is None or code is None:
    raise InputError(f"Slurm does not know any more how job {number} ended: {text.strip()}")
  status, signal = int(code[1]), int(code[2])
  print(
    f"job {number}: {state[1]}, exit status {status}" + (f", signal {signal}" if signal else "")
  )
  if state[1] == "COMPLETED":
    return DONE
  return status or (128 + signal if signal else DEFECT)


_MEETING = """\
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export JAX_COORDINATOR_ADDRESS="$first:$((61440 + SLURM_JOB_ID % 4096))"
export JAX_NUM_PROCESSES="$SLURM_NTASKS"
"""

_SCRIPT = """\
#!/bin/bash
{directives}
delays=({delays})  # Seconds before each restart that is allowed.
restarts=${{SLURM_RESTART_COUNT:-0}}
if [ "$restarts" -gt "${{#delays[@]}}" ]; then
  echo "launch: job $SLURM_JOB_ID was put back $restarts times, ${{#delays[@]}} are allowed."
  exit 75
fi
trap : TERM  # The run gets the signal too, and what follows it here has to run.
{exports}{meeting}{command}
status=$?
echo "launch: the run ended with status $status."
case $status in {final}) exit "$status" ;; esac
# A job that was cancelled, timed out or preempted is not RUNNING: Slurm decides about it.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$state" = RUNNING ] && [ "$restarts" -lt "${{#delays[@]}}" ]; then
  delay=${{delays[$restarts]}}
  echo "launch: restart $((restarts + 1)) of ${{#delays[@]}}, not before $delay seconds."
  scontrol requeue "$SLURM_JOB_ID" &&
    scontrol update JobId="$SLURM_JOB_ID" StartTime="now+$delay"
fi
exit "$status"
"""
