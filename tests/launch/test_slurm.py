"""`--target=slurm`: what is written, and what a real Slurm makes of it."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm
from launch.job import Job
from model.errors import InputError
from tests.commands import ROOT
from tests.launch.slurm_cluster import NODES, Cluster, cluster, wait

# In the place of our `train`: meets the others as JAX does, then does what its argument says.
STAND_IN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
import jax
address = os.environ.get("JAX_COORDINATOR_ADDRESS")
if address:
  count, rank = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
  jax.distributed.initialize(address, count, rank)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # JAX took it.
rank = f"{jax.process_index()} of {jax.process_count()}"
print(f"process {rank} on {os.environ['SLURMD_NODENAME']}: {sys.argv[1:]}", flush=True)
print(f"restarts: {os.environ.get('SLURM_RESTART_COUNT', 0)}, {os.environ.get('WORD')}", flush=True)
what = sys.argv[1].partition("=")[2]
if what == "wait":
  time.sleep(120)
if address:
  jax.distributed.shutdown()
os._exit(int(what))
"""


def a_job(*arguments: str, **changes) -> Job:
  settings = dict(command=("train", *arguments), name="run", processes=None, environment={})
  settings |= dict(max_restarts=0, backoff=1.0, logs=Path("logs"))
  return Job(**{**settings, **changes})


def script(job: Job, **options) -> str:
  return slurm.batch_script(job, slurm.Options(**options), Path("/work dir"))


def test_the_script_is_one_that_bash_reads_and_asks_for_what_was_chosen():
  job = a_job("--workdir=a b", "--x=$(c)", processes=16, max_restarts=2, environment={"A": "it's"})
  text = script(job, ntasks_per_node=4, gpus_per_node=8, cpus_per_task=6, time="1-0", account="me")
  subprocess.run(["bash", "-n"], input=text, text=True, check=True)
  asked = {"--nodes=4", "--ntasks-per-node=4", "--gpus-per-node=8", "--cpus-per-task=6"}
  asked |= {"--time=1-0", "--account=me", "--signal=TERM@120", "--requeue", '"--chdir=/work dir"'}
  assert asked <= {line.removeprefix("#SBATCH ") for line in text.splitlines()}
  assert "delays=(1 2)" in text
  assert "'--workdir=a b' '--x=$(c)'" in text


@pytest.mark.parametrize(
  ("options", "job", "message"),
  [
    (dict(nodes=3), dict(processes=4), "leave one of them out"),
    (dict(ntasks_per_node=3), dict(processes=4), "no multiple of --ntasks_per_node"),
    (dict(gpus_per_node=3, ntasks_per_node=2), {}, "no multiple of --ntasks_per_node"),
    (dict(sbatch=("--nodes=7",)), {}, "the launcher sets this option itself"),
    (dict(sbatch=("-N7",)), {}, "the launcher sets this option itself"),
    (dict(sbatch=("exclusive",)), {}, "an option of sbatch is needed"),
    (dict(sbatch=("--comment=a\n#SBATCH --wrap=b",)), {}, "an option of sbatch is needed"),
    (dict(sbatch=("-Ca\nb",)), {}, "an option of sbatch is needed"),
    (dict(time="1\nrm"), {}, "are allowed"),
    (dict(nodes=2), dict(command=("infer",)), "not shared out"),
  ],
)
def test_options_that_cannot_be_are_refused(options, job, message):
  with pytest.raises(InputError, match=message):
    script(a_job(**job), **options)


def test_without_slurm_one_line_says_so(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(InputError, match="sbatch is not installed here"):
    slurm.submit(a_job(logs=tmp_path), slurm.Options(), dry_run=False)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
  with cluster(tmp_path_factory.mktemp("slurm")) as started:
    yield started


@pytest.fixture
def place(tmp_path) -> Path:
  """A folder in which `train` is the stand-in."""
  folder = tmp_path / "it's a 100% folder"
  (folder / "train").mkdir(parents=True)
  (folder / "train" / "__init__.py").touch()
  (folder / "train" / "__main__.py").write_text(STAND_IN)
  return folder


def launch(real: Cluster, folder: Path, *words: str) -> subprocess.Popen:
  """`python -m launch --target=slurm` in `folder`."""
  values = {**real.environment, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  command = [sys.executable, "-m", "launch", "--target=slurm", *words]
  return subprocess.Popen(
    command, cwd=folder, env=values, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )


def ended(process: subprocess.Popen, seconds: float) -> int:
  process.communicate(timeout=seconds)
  return process.returncode


def number_and_log(process: subprocess.Popen) -> tuple[str, Path]:
  assert process.stdout is not None
  found = re.match(r"job (\d+) is queued; .* log: (.*); to end it", process.stdout.readline())
  assert found
  return found[1], Path(found[2])


@pytest.mark.slow
def test_two_nodes_meet_and_every_word_arrives_as_it_was(real, place):
  odd = "a 'b' \"c\" $(d) `e` \\ #f *"
  words = ("--processes=2", "--follow", f"--env=WORD={odd}", f"--sbatch=--comment={odd}")
  process = launch(real, place, *words, "--", "train", "--end=0", odd)
  number, log = number_and_log(process)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 0, out
  for rank, node in enumerate(NODES):
    assert f"{rank}: process {rank} of 2 on {node}: {['--end=0', odd]}" in out.splitlines()
    assert f"{rank}: restarts: 0, {odd}" in out.splitlines()
  assert log.read_text() in out
  assert odd in real.run("scontrol", "show", "job", number)


@pytest.mark.slow
@pytest.mark.parametrize(("status", "starts"), [(1, 3), (2, 1)])
def test_a_failure_is_repeated_as_often_as_allowed_and_wrong_input_never(
  real, place, status, starts
):
  words = ("--max_restarts=2", "--backoff=1", "--follow", "--", "train", f"--end={status}")
  process = launch(real, place, *words)
  _, log = number_and_log(process)
  assert ended(process, 180) == status
  restarts = re.findall(r"0: restarts: (\d)", log.read_text())
  assert restarts == ["0", "1", "2"][:starts]


@pytest.mark.slow
def test_what_slurm_refuses_is_told_in_its_words(real, place):
  process = launch(real, place, "--partition=fast", "--", "train")
  _, error = process.communicate(timeout=60)
  assert process.returncode == 2
  assert error.startswith("error: sbatch refused: ")
  assert "invalid partition" in error


@pytest.mark.slow
def test_who_stops_reading_along_does_not_stop_the_job(real, place):
  process = launch(real, place, "--follow", "--", "train", "--end=wait")
  number, log = number_and_log(process)
  wait(lambda: log.read_text() if log.exists() else "", "restarts: 0")
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 130
  assert f"job {number} goes on" in out
  assert real.shows(number, "JobState") == "RUNNING"
  real.run("scancel", number)


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled(real, place):
  process = launch(real, place, "--max_restarts=2", "--follow", "--", "train", "--end=wait")
  number, log = number_and_log(process)
  wait(lambda: log.read_text() if log.exists() else "", "restarts: 0")
  real.run("scancel", number)
  assert ended(process, 120) == 75
  assert real.shows(number, "JobState") == "CANCELLED"
  assert log.read_text().count("process 0 of 1") == 1


@pytest.mark.slow
def test_sigterm_comes_before_the_time_limit_and_the_job_goes_on(real, place):
  words = ("--time=1", "--signal_before=40", "--max_restarts=1", "--backoff=1", "--follow")
  process = launch(real, place, *words, "--", "train", "--end=wait")
  _, log = number_and_log(process)
  assert ended(process, 300) == 75
  text = log.read_text()
  assert re.findall(r"0: restarts: (\d)", text) == ["0", "1"]
  assert text.count("the run ended with status 75") == 2
  assert "TIME LIMIT" not in text


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_preempted_run_goes_on_and_gives_the_losses_of_an_undisturbed_one(
  real, tmp_path, processes
):
  config = ["--config=configs/gpt_tiny.py", "--config.steps=30", "--config.checkpoint_every=1000"]
  config += ["--config.log_every=1", "--config.eval_every=1000", "--config.model.num_layers=1"]
  losses = {}
  for name in ("alone", "preempted"):
    command = ["train", *config, f"--workdir={tmp_path / name}"]
    words = [f"--processes={processes}", "--max_restarts=3", "--backoff=1", "--follow"]
    words += [f"--logs={tmp_path}", f"--name={name}"]
    process = launch(real, ROOT, *words, "--", *command)
    _, log = number_and_log(process)
    metrics = tmp_path / name / "metrics.jsonl"
    if name == "preempted":
      wait(lambda path=metrics: path.read_text() if path.exists() else "", '"step": 5,', 300)
      real.run("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 5")
    assert ended(process, 600) == 0, log.read_text()
    assert ("restart 1 of 3" in log.read_text()) == (name == "preempted")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses[name] = {row["step"]: row["loss"] for row in rows if "loss" in row}
  assert len(losses["alone"]) == 30
  assert losses["preempted"] == losses["alone"]


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path, capsys):
  job = a_job("--workdir=w", logs=tmp_path / "logs")
  assert slurm.submit(job, slurm.Options(), dry_run=True) == 0
  out = capsys.readouterr().out
  assert slurm.batch_script(job, slurm.Options(), Path.cwd()) in out
  assert f"sbatch --parsable {tmp_path}/logs/run.sbatch" in out
  assert not list(tmp_path.iterdir())
