"""`--target=tpu`: Cloud TPU VMs that are made for the run, start it, and are deleted after it."""

import contextlib
import shlex
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from launch.gcloud import Lost
from launch.job import FINAL, Job
from launch.tpu_options import Options
from launch.tpu_pod import Pod
from model.errors import DONE, PREEMPTED

UNREAD = ("processes",)  # A process on each worker.


def submit(job: Job, options: Options, dry_run: bool) -> int:
  """Makes the VMs, runs the job on them, prints its logs, and deletes the VMs.

  A run that fails is started again, on the same VMs if they are still there, else on new ones.

  Returns:
    The exit status: 0, that of the process which failed first, or 75 where the VMs were lost once
    too often or Ctrl-C ended the run.

  Raises:
    InputError: for wrong options, and what Cloud TPU refuses (quota, rights, names).
  """
  pod = Pod(job, options, Path.cwd())
  if dry_run:
    print(pod.shown())
    return DONE
  job.logs.mkdir(parents=True, exist_ok=True)
  with _ended_like_ctrl_c(), tempfile.TemporaryDirectory() as folder:
    pod.pack(Path(folder))
    try:
      return _attempts(pod, job)
    except KeyboardInterrupt:
      print("interrupted: the run is asked to save and stop; again: without waiting.", flush=True)
      with contextlib.suppress(KeyboardInterrupt, Lost):
        pod.stop()
      return PREEMPTED
    finally:
      if pod.made and not options.keep:
        pod.delete()
      elif pod.made:
        print(f"the VMs are kept; to delete them: {shlex.join(pod.cloud.delete())}")


def _attempts(pod: Pod, job: Job) -> int:
  for number, seconds in enumerate([*job.delays(), None], start=1):
    try:
      status = pod.run()
      reason = f"the run ended with status {status}"
    except Lost as lost:
      status, reason = PREEMPTED, str(lost)
    if status in (DONE, *FINAL) or seconds is None:
      print(f"{job.name}: {reason}; log: {pod.log}", flush=True)
      return status
    print(
      f"{job.name}: {reason}; restart {number} of {job.max_restarts} in {seconds:g} s", flush=True
    )
    time.sleep(seconds)
  return status


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
  """SIGTERM, and a terminal that is closed, end the launcher as Ctrl-C does: VMs are deleted."""
  before = {}
  if threading.current_thread() is threading.main_thread():
    for number in (signal.SIGTERM, signal.SIGHUP):
      if signal.getsignal(number) != signal.SIG_IGN:  # As nohup has it.
        before[number] = signal.signal(number, signal.default_int_handler)
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
