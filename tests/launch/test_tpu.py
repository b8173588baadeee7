"""`--target=tpu` against a stand-in of gcloud (gcloud_stand_in.py): Google is not asked."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import tpu
from launch.job import Job
from model.errors import InputError
from tests import commands
from tests.commands import ROOT
from tests.launch import gcloud_stand_in

# In the place of `train`: counts steps and keeps the count in its workdir, one for each machine.
COUNTER = """
import os, pathlib, signal, sys, time
given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
me = pathlib.Path(os.environ["HOME"])
kept = pathlib.Path(given["workdir"]) / f"{me.parent.name}-{me.name}"
kept.parent.mkdir(parents=True, exist_ok=True)
step = int(kept.read_text()) if kept.exists() else 0
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(75)))
print("words:", sys.argv[1:], os.environ.get("ODD"), flush=True)
while step < int(given.get("steps", 6)):
  step += 1
  part = kept.with_suffix(".part")
  part.write_text(str(step))
  part.replace(kept)
  print("step", step, flush=True)
  if given.get("fail", "").startswith(f"{me.name}:{step}:"):
    os._exit(int(given["fail"].split(":")[2]))
  time.sleep(float(given.get("pause", 0.05)))
"""
PROGRAMS = {
  "gcloud": f'exec {sys.executable} {gcloud_stand_in.__file__} "$@"',
  "sudo": 'exec "$@"', "mountpoint": "exit 1", "gcsfuse": "exit 0",
}  # fmt: skip
INSTALL = (
  "mkdir -p .venv/bin && printf '#!/bin/sh\\nexec %s \"$@\"\\n' "
  f"{sys.executable} > .venv/bin/python && chmod +x .venv/bin/python"
)


class Cloud:
  """The stand-in, and a tree to be sent to its machines."""

  def __init__(self, folder: Path):
    self.folder, self.tree, self.mount = folder, folder / "tree", folder / "bucket"
    self.stand_in = folder / "cloud"
    for place in (folder / "bin", self.tree / "launch", self.tree / "train", self.stand_in):
      place.mkdir(parents=True)
    for name, text in PROGRAMS.items():
      (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
      (folder / "bin" / name).chmod(0o755)
    for name in ("__init__.py", "worker.py"):
      shutil.copy(ROOT / "launch" / name, self.tree / "launch")
    (self.tree / "train" / "__init__.py").touch()
    (self.tree / "train" / "__main__.py").write_text(COUNTER)
    for words in (["init", "-q"], ["add", "launch", "train"]):
      subprocess.run(["git", "-C", str(self.tree), *words], check=True)
    self.environment = {
      "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "GCLOUD_STAND_IN": str(self.stand_in),
      "PYTHONPATH": "",
    }  # fmt: skip
    self.plays({})

  def plays(self, *scenarios: dict) -> None:
    """Says what happens to each request, in their order."""
    (self.stand_in / "scenario.json").write_text(json.dumps(scenarios))

  def job(self, *words: str, **changes) -> Job:
    command = ("train", f"--workdir={self.mount}/run", *words)
    settings = dict(command=command, name="run", processes=None, environment={}, max_restarts=0)
    return Job(**{**settings, "backoff": 0.01, "logs": self.folder / "logs", **changes})

  def options(self, **changes) -> tpu.Options:
    settings = dict(tpu_type="v5litepod-8", zone="us-a", runtime_version="v2", install=INSTALL)
    settings |= dict(bucket="ours", mount=str(self.mount), poll=0.05, grace=5.0)
    return tpu.Options(**{**settings, **changes})

  def calls(self) -> list[str]:
    """What was asked of gcloud: the action, for ssh what it does there."""
    path = self.stand_in / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [self._short(json.loads(line)) for line in lines]

  def left(self) -> bool:
    """Whether VMs are left."""
    return json.loads((self.stand_in / "state.json").read_text())["exists"]

  @staticmethod
  def _short(words: list[str]) -> str:
    command = next((w for w in words if w.startswith("--command=")), "")
    action = re.search(r"launch\.worker (\w+)|(install)", command)
    return action[1] or action[2] if action else f"{words[2].removesuffix('s')} {words[3]}"


@pytest.fixture
def cloud(tmp_path, monkeypatch) -> Cloud:
  made = Cloud(tmp_path)
  monkeypatch.chdir(made.tree)
  for name, value in made.environment.items():
    monkeypatch.setenv(name, value)
  return made


def without_looks(calls: list[str]) -> list[str]:
  return [call for call in calls if "describe" not in call]


def test_a_run_from_the_request_to_the_end_of_its_machines(cloud, capsys):
  odd = "--odd=a 'b' \"c\" $(d) `e` \\ *"
  cloud.plays({"states": ["ACCEPTED", "PROVISIONING", "ACTIVE"], "hosts": 2})
  job = cloud.job(odd, environment={"ODD": "$(x) 'y'"})
  assert tpu.submit(job, cloud.options(spot=True), dry_run=False) == 0
  out = capsys.readouterr().out
  for worker in range(2):
    words = [f"--workdir={cloud.mount}/run", odd]
    assert f"[{worker}] words: {words} $(x) 'y'" in out.splitlines()
    steps = re.findall(rf"^\[{worker}\] step (\d)$", out, re.MULTILINE)
    assert steps == list("123456")
  assert re.findall("run: ([A-Z]+)$", out, re.MULTILINE) == ["ACCEPTED", "PROVISIONING", "ACTIVE"]
  steps = ["queued-resource create", "tpu-vm scp", "install", "start", "follow"]
  assert without_looks(cloud.calls()) == [*steps, "queued-resource delete"]
  assert not cloud.left()
  assert "[1] step 6" in (cloud.folder / "logs" / "run.log").read_text()


def test_machines_that_are_taken_away_are_made_anew_and_the_run_goes_on(cloud, capsys):
  cloud.plays({"hosts": 2, "preempt": "step 4"}, {"hosts": 2})
  job = cloud.job("--steps=8", "--pause=0.3", max_restarts=2)
  assert tpu.submit(job, cloud.options(spot=True), dry_run=False) == 0
  out = capsys.readouterr().out
  assert re.search("(the VMs are SUSPENDED|node run is PREEMPTED); restart 1 of 2", out)
  calls = without_looks(cloud.calls())
  assert [c for c in calls if "queued" in c] == [
    "queued-resource create", "queued-resource delete", "queued-resource create",
    "queued-resource delete",
  ]  # fmt: skip
  for worker in range(2):
    steps = [int(s) for s in re.findall(rf"^\[{worker}\] step (\d)$", out, re.MULTILINE)]
    assert steps[-1] == 8
    assert len(steps) == len(set(steps))  # None is done twice.
  assert not cloud.left()


@pytest.mark.parametrize(
  "scenario",
  [
    {"create": "RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded. Limit: 0 in us-a"},
    {"states": ["CREATING", "FAILED"], "failure": "Quota limit 'TPUV5s' has been exceeded."},
  ],
)
def test_what_quota_refuses_is_told_and_not_tried_again(cloud, scenario):
  cloud.plays(scenario)
  with pytest.raises(InputError, match="Quota limit 'TPUV5s' has been exceeded"):
    tpu.submit(cloud.job(max_restarts=5), cloud.options(), dry_run=False)
  assert cloud.calls().count("queued-resource create") == 1
  assert not cloud.left()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("first", "reason"),
  [
    ({"states": ["FAILED"], "failure": "no capacity"}, "the request is FAILED: no capacity"),
    ({"missing": "run-1"}, "node run-1 is missing"),
    ({"states": ["ACTIVE", "SUSPENDING"], "unreachable": 99}, "failed: status 255"),
    ({"create": "UNAVAILABLE: The service is currently unavailable."}, "Cloud TPU has trouble"),
  ],
)
def test_what_was_not_made_whole_is_deleted_and_made_again(cloud, capsys, first, reason):
  cloud.plays(first, {})
  job = cloud.job(max_restarts=1)
  assert tpu.submit(job, cloud.options(slices=2), dry_run=False) == 0
  out = capsys.readouterr().out
  assert reason in out
  assert "run-1 [0] step 6" in out.splitlines()
  assert cloud.calls().count("queued-resource create") == 2
  assert not cloud.left()


@pytest.mark.slow
def test_restarts_end_when_there_are_none_left(cloud, capsys):
  cloud.plays({"preempt": "step"})
  job = cloud.job("--steps=900", max_restarts=2)
  assert tpu.submit(job, cloud.options(), dry_run=False) == 75
  assert cloud.calls().count("queued-resource create") == 3
  assert not cloud.left()


@pytest.mark.slow
def test_a_worker_that_cannot_be_reached_at_first_is_asked_again(cloud):
  cloud.plays({"hosts": 3, "unreachable": 2})
  assert tpu.submit(cloud.job(), cloud.options(), dry_run=False) == 0
  assert without_looks(cloud.calls()).count("tpu-vm scp") == 3


@pytest.mark.slow
def test_a_line_that_breaks_loses_and_repeats_nothing_that_had_arrived(cloud, capsys):
  cloud.plays({"hosts": 2, "cut": "step 3"})
  assert tpu.submit(cloud.job("--pause=0.4"), cloud.options(), dry_run=False) == 0
  out = capsys.readouterr().out
  assert cloud.calls().count("start") == 1
  assert cloud.calls().count("follow") == 2
  seen = [re.findall(rf"^\[{worker}\] step (\d)$", out, re.MULTILINE) for worker in range(2)]
  assert list("123456") in seen
  assert all(steps[-1] == "6" and len(steps) == len(set(steps)) for steps in seen)


@pytest.mark.slow
def test_wrong_input_is_not_tried_again(cloud):
  cloud.plays({"hosts": 2})
  assert tpu.submit(cloud.job("--fail=1:2:2", max_restarts=3), cloud.options(), dry_run=False) == 2
  assert cloud.calls().count("start") == 1
  assert not cloud.left()


@pytest.mark.slow
def test_a_failed_worker_ends_the_others_and_the_machines_are_used_again(
  cloud, capsys, monkeypatch
):
  monkeypatch.setattr("launch.tpu_follow._SETTLE_SECONDS", 0.2)
  cloud.plays({"hosts": 2})
  job = cloud.job("--fail=1:2:1", "--pause=0.3", "--steps=30", max_restarts=1)
  assert tpu.submit(job, cloud.options(), dry_run=False) == 0
  out = capsys.readouterr().out
  assert "[0] saved" in out
  assert "the run ended with status 1; restart 1 of 1" in out
  assert cloud.calls().count("queued-resource create") == 1
  # A worker whose last run is just ending is asked again: two attempts, each begun once.
  lines = (cloud.stand_in / "calls.jsonl").read_text()
  assert len(set(re.findall(r"launch\.worker start (\w+)", lines))) == 2
  assert re.findall(r"^\[1\] step (\d+)$", out, re.MULTILINE) == [str(n) for n in range(1, 31)]


@pytest.mark.slow
def test_kept_machines_serve_the_next_run_and_others_are_not_touched(cloud, capsys):
  kept = cloud.options(keep=True)
  assert tpu.submit(cloud.job(), kept, dry_run=False) == 0
  assert cloud.left()
  assert "the VMs are kept; to delete them: gcloud" in capsys.readouterr().out
  with pytest.raises(InputError, match="there is a queued resource run already"):
    tpu.submit(cloud.job(), cloud.options(), dry_run=False)
  assert cloud.left()
  assert tpu.submit(cloud.job("--steps=9"), kept, dry_run=False) == 0
  assert "[0] step 9" in capsys.readouterr().out
  assert cloud.calls().count("queued-resource create") == 1


def launched(
  cloud: Cloud, options: tpu.Options, *words: str, shared: tuple[str, ...] = ()
) -> subprocess.Popen:
  """`python -m launch --target=tpu` as a process of its own; the tree has a `launch` too."""
  ours = f"import runpy, sys; sys.path[0] = {str(ROOT)!r}; "
  ours += "runpy.run_module('launch', None, '__main__')"
  given = {name: value for name, value in vars(options).items() if value not in (None, ())}
  flags = [f"--{name}={value}" for name, value in given.items()]
  command = [sys.executable, "-c", ours, "--target=tpu", "--name=run", *flags, *shared]
  command += ["--", "train"]
  return subprocess.Popen(
    [*command, f"--workdir={cloud.mount}/run", *words], stdout=subprocess.PIPE, text=True
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("number", "keep"), [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGHUP, False)]
)
def test_an_interrupted_run_is_saved_and_its_machines_deleted_unless_kept(cloud, keep, number):
  process = launched(cloud, cloud.options(keep=keep), "--steps=900")
  lines = []
  for line in process.stdout or ():
    lines.append(line)
    if "step 3" in line:
      process.send_signal(number)
      break
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 75, "".join(lines) + out
  assert "stop" in cloud.calls()
  assert 3 <= int((cloud.mount / "run" / "run-0").read_text()) < 900
  assert cloud.left() == keep
  time.sleep(0.5)
  pids = [path.read_text() for path in cloud.stand_in.glob("vms/*/*/*/.launch/pid")]
  assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_our_own_training_goes_on_from_the_bucket_with_the_losses_of_an_undisturbed_run(
  cloud, monkeypatch
):
  """The whole tree is copied, and the run killed between two checkpoints."""
  monkeypatch.chdir(ROOT)
  monkeypatch.delenv("PYTHONPATH")
  config = ["--config=configs/gpt_tiny.py", "--config.steps=30", "--config.checkpoint_every=10"]
  config += ["--config.log_every=1", "--config.eval_every=1000", "--config.model.num_layers=1"]
  alone = commands.run("train", *config, f"--workdir={cloud.folder / 'alone'}")
  assert alone.returncode == 0, alone.stderr
  shared = ("--max_restarts=1", "--backoff=0.1", f"--logs={cloud.folder / 'logs'}")
  process = launched(cloud, cloud.options(), *config, shared=shared)
  metrics = cloud.mount / "run" / "metrics.jsonl"
  end = time.monotonic() + 300
  while not (metrics.exists() and '"step": 13,' in metrics.read_text()):
    assert time.monotonic() < end
    assert process.poll() is None
    time.sleep(0.05)
  subprocess.run([sys.executable, gcloud_stand_in.__file__, "take-away"], check=True)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0, out
  assert "restart 1 of 1" in out
  assert cloud.calls().count("queued-resource create") == 2
  assert losses(metrics) == losses(cloud.folder / "alone" / "metrics.jsonl")


def losses(path: Path) -> dict[int, float]:
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  found = {row["step"]: row["loss"] for row in rows if "loss" in row}
  assert sorted(found) == list(range(1, 31))
  return found


@pytest.mark.slow
def test_a_request_that_waits_in_the_queue_keeps_its_place(cloud, capsys):
  cloud.plays({"states": ["WAITING_FOR_RESOURCES"]})
  process = launched(cloud, cloud.options(keep=True))
  assert process.stdout is not None
  assert "WAITING_FOR_RESOURCES" in process.stdout.readline()
  process.kill()
  process.wait()
  cloud.plays({"states": ["WAITING_FOR_RESOURCES", "ACTIVE"]})
  assert tpu.submit(cloud.job(), cloud.options(keep=True), dry_run=False) == 0
  assert cloud.calls().count("queued-resource create") == 1
  assert "queued-resource delete" not in cloud.calls()


@pytest.mark.slow
def test_a_request_that_is_interrupted_in_the_queue_is_taken_back(cloud):
  cloud.plays({"states": ["WAITING_FOR_RESOURCES"]})
  process = launched(cloud, cloud.options())
  assert process.stdout is not None
  assert "WAITING_FOR_RESOURCES" in process.stdout.readline()
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=60)
  assert process.returncode == 75
  assert not cloud.left()


@pytest.mark.parametrize(
  ("options", "job", "message"),
  [
    (dict(zone=None), {}, "--zone is needed"),
    (dict(runtime_version=None), {}, "--runtime_version is needed"),
    (dict(tpu_type=None), {}, "one of them"),
    (dict(topology="v5e:4x4"), {}, "one of them"),
    (dict(tpu_type="v5p-128 --spot"), {}, "a name such as v5p-128"),
    (dict(tpu_type=None, topology="tpu7x:4x4x4"), {}, "comes with GKE only"),
    (dict(gcloud=("delete",)), {}, "a flag is needed"),
    (dict(bucket=None, mount=None), {}, "is lost with the machine: --bucket"),
    (dict(mount="runs"), {}, "an absolute path"),
    (dict(bucket=None, keep=True), {}, "--mount=.* has no effect without --bucket"),
    (dict(bucket="gs://ours"), {}, "without gs://"),
    (dict(python="3.13"), {}, "no effect with --install"),
    ({}, dict(command=("train", "--workdir=/tmp/run")), "is lost with the machine"),
    ({}, dict(command=("infer",)), "not shared out"),
    ({}, dict(name="1st"), "letter at the start"),
  ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(cloud, options, job, message):
  with pytest.raises(InputError, match=message):
    tpu.submit(cloud.job(**job), cloud.options(**options), dry_run=False)
  assert cloud.calls() == []


def test_a_config_that_would_not_be_copied_is_refused(cloud):
  (cloud.tree / "mine.py").touch()
  with pytest.raises(InputError, match=r"git add mine\.py"):
    tpu.submit(cloud.job("--config=mine.py"), cloud.options(), dry_run=False)
  assert cloud.calls() == []


def test_a_dry_run_prints_what_would_run_and_runs_nothing(cloud, capsys):
  options = cloud.options(tpu_type=None, topology="v5p:4x4x4", slices=3, gcloud=("--reserved",))
  assert tpu.submit(cloud.job(environment={"A": "b"}), options, dry_run=True) == 0
  out = capsys.readouterr().out
  assert (
    "gcloud compute tpus queued-resources create run --accelerator-type=v5p-128 "
    "--runtime-version=v2 --node-count=3 --node-prefix=run --reserved --async --zone=us-a --quiet"
  ) in out
  assert '"A": "b"' in out
  assert cloud.calls() == []


def test_without_gcloud_one_line_says_so(cloud, monkeypatch, tmp_path):
  (tmp_path / "only").mkdir()
  (tmp_path / "only" / "git").symlink_to(shutil.which("git") or "")
  monkeypatch.setenv("PATH", str(tmp_path / "only"))
  with pytest.raises(InputError, match="gcloud is not installed here"):
    tpu.submit(cloud.job(), cloud.options(), dry_run=False)
