"""`--target=local`: one run of several processes, with the stand-in for training."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import devices as launch_devices
from launch.job import SHARED_OUT, Job, default_name, process_environment
from launch.local import Options, processes_of
from model.errors import InputError
from tests.commands import ROOT
from tests.launch.launched import PYTHON, alive, environment, launch, prepare, start, wait_for

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def folder(tmp_path):
  prepare(tmp_path)
  return tmp_path


def job(*command: str, **changes) -> Job:
  given = dict(
    command=command or ("train",), name="x", processes=2, environment={}, max_restarts=0,
    backoff=1.0, logs=Path("logs"),
  )  # fmt: skip
  return Job(**(given | changes))


def test_lines_of_processes_stay_whole_and_say_whose_they_are(folder):
  text = """
for n in range(300):
  for part in (f'<{rank}', ':', f'{n}', ' x' * 200, '>\\n'):
    os.write(1 + n % 2, part.encode())
os.write(1, b'no newline')
"""
  status, out, err = launch(folder, "--processes=3", "--", "train", f"--run={text}")
  assert status == 0, err
  whole = re.compile(r"\[(\d)\] <\1:(\d+)( x){200}>")
  for stream, rest in ((out, 0), (err, 1)):
    found = [whole.fullmatch(line) for line in stream.splitlines() if "<" in line]
    for rank in "012":
      numbers = [int(m[2]) for m in found if m and m[1] == rank]
      assert numbers == list(range(rest, 300, 2))
    assert all(found)
  assert out.count("no newline\n") == 3
  for rank in range(3):
    log = (folder / "runs" / "train" / "logs" / f"{rank}.log").read_text()
    assert log.count(f"<{rank}:") == 300 and "no newline\n" in log


def test_the_first_failure_stops_the_others_and_is_told_last(folder):
  text = """
if rank == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)
say(f'pid {os.getpid()}')
if rank == 1:
  say('error: the third line is wrong')
  sys.exit(2)
time.sleep(60)
"""
  began = time.monotonic()
  status, _, err = launch(
    folder, "--processes=3", "--grace=1.5", "--max_restarts=3", "--", "train", f"--run={text}"
  )
  assert status == 2 and time.monotonic() - began < 20  # A user's error is not started again.
  assert "[2] saved after SIGTERM" in err and "[0] saved" not in err
  *_, shown, last = err.splitlines()
  assert shown == "[1] error: the third line is wrong"
  assert last.startswith("error: process 1 ") and last.endswith(": the third line is wrong")
  assert not any(alive(int(pid)) for pid in re.findall(r"pid (\d+)", err))
  assert (folder / "attempts1").read_text() == "x"


@pytest.mark.parametrize(
  ("ends", "restarts", "status", "starts"),
  [
    ("[1, 75, 0][attempt]", 2, 0, 3),
    pytest.param("3", 1, 3, 1, marks=pytest.mark.slow),
    pytest.param("[1, 2][attempt]", 5, 2, 2, marks=pytest.mark.slow),
    pytest.param("os.kill(os.getpid(), 9)", 1, 137, 2, marks=pytest.mark.slow),
  ],
)
def test_what_failed_is_started_again_until_it_is_the_users_error(
  folder, ends, restarts, status, starts
):
  got, _, err = launch(
    folder, "--processes=2", f"--max_restarts={restarts}", "--backoff=0.1", "--grace=5", "--",
    "train", f"--run=sys.exit({ends}) if rank == 1 or {ends!r}[0] == '[' else time.sleep(30)",
  )  # fmt: skip
  assert got == status, err
  assert len((folder / "attempts1").read_text()) == starts
  if status == 137:
    assert err.splitlines()[-1].startswith("error: process 1 was killed by SIGKILL")


def test_waits_between_restarts_double_up_to_a_bound():
  assert list(job(max_restarts=4, backoff=5.0).delays()) == [5, 10, 20, 40]
  assert max(job(max_restarts=40, backoff=5.0).delays()) == 600


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_launcher_reaches_all_and_is_no_failure(folder, number):
  process = start(
    folder, "--processes=2", "--max_restarts=2", "--backoff=0.1", "--", "train",
    "--run=Path(f'ready{rank}').touch(); time.sleep(60)",
  )  # fmt: skip
  wait_for(lambda: all((folder / f"ready{rank}").exists() for rank in range(2)))
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 75, err
  assert all(f"[{rank}] saved after {number.name}" in err for rank in range(2))
  assert "the same command goes on" in err.splitlines()[-1]
  assert (folder / "attempts0").read_text() == "x"


def test_a_signal_before_the_processes_can_save_is_no_failure(folder):
  process = start(
    folder, "--processes=2", "--max_restarts=2", "--backoff=0.1", "--", "train",
    "--run=signal.signal(signal.SIGTERM, signal.SIG_DFL); Path(f'ready{rank}').touch(); "
    "time.sleep(60)",
  )  # fmt: skip
  wait_for(lambda: all((folder / f"ready{rank}").exists() for rank in range(2)))
  process.terminate()
  _, err = process.communicate(timeout=60)
  assert process.returncode == 75, err
  assert "the same command goes on" in err.splitlines()[-1]
  assert (folder / "attempts0").read_text() == "x"


@linux
@pytest.mark.slow
def test_a_second_signal_kills(folder):
  process = start(
    folder, "--processes=2", "--", "train",
    "--run=signal.signal(signal.SIGTERM, lambda *_: Path(f'heard{rank}').touch())\n"
    "Path(f'ready{rank}').write_text(str(os.getpid()))\n"
    "while True: time.sleep(1)",
  )  # fmt: skip
  ready, heard = ([folder / f"{name}{rank}" for rank in range(2)] for name in ("ready", "heard"))
  for files in (ready, heard):
    wait_for(lambda files=files: all(f.exists() for f in files))
    process.terminate()
  _, err = process.communicate(timeout=60)
  assert process.returncode == 137, err
  assert not any(alive(int(f.read_text())) for f in ready)


@linux
@pytest.mark.parametrize("killed", ["launcher", pytest.param("watch", marks=pytest.mark.slow)])
def test_a_launcher_that_is_killed_leaves_no_orphan(folder, killed):
  text = """
child = subprocess.Popen(['sleep', '300'])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(f'part{rank}').write_text(f'{os.getpid()} {child.pid} {os.getppid()}')
os.rename(f'part{rank}', f'pids{rank}')
time.sleep(300)
"""
  process = start(folder, "--processes=2", "--grace=0.5", "--", "train", f"--run={text}")
  files = [folder / f"pids{rank}" for rank in range(2)]
  wait_for(lambda: all(f.exists() for f in files))
  pids = [list(map(int, f.read_text().split())) for f in files]
  if killed == "launcher":
    process.kill()
    expected = [pid for row in pids for pid in row]
  else:
    os.kill(pids[0][2], signal.SIGKILL)
    expected = [pids[0][0], *pids[1]]
  wait_for(lambda: not any(alive(pid) for pid in expected), 15)
  process.communicate(timeout=30)
  if killed == "watch":
    assert process.returncode == 137
    os.kill(pids[0][1], signal.SIGKILL)


def test_a_dry_run_prints_what_a_run_starts(folder):
  text = (
    "Path(f'got{rank}.json').write_text(json.dumps([sys.argv[1:], "
    "{k: v for k, v in os.environ.items() if k[:4] in ('JAX_', 'XLA_', 'PYTH', 'MINE')}]))"
  )
  words = [
    "--processes=2", "--port=23456", "--devices_per_process=3", "--env=MINE=a 'b' $c", "--",
    "train", "--a=it's \"$HOME\"", f"--run={text}",
  ]  # fmt: skip
  changes = dict(XLA_FLAGS="--xla_cpu_enable_fast_min_max=true", JAX_NUM_PROCESSES="7")
  status, out, err = launch(folder, "--dry_run", *words, **changes)
  assert (
    status == 0 and not err and not list(folder.glob("got*")) and not (folder / "runs").exists()
  )
  for line in out.splitlines():
    process = subprocess.Popen(line, shell=True, cwd=folder, env=environment(**changes),
                               stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    wait_for(lambda process=process: process.poll() is not None)
    assert process.returncode == 0
  printed = [json.loads((folder / f"got{rank}.json").read_text()) for rank in range(2)]
  assert launch(folder, *words, **changes)[0] == 0
  assert printed == [json.loads((folder / f"got{rank}.json").read_text()) for rank in range(2)]
  arguments, given = printed[1]
  assert arguments[0] == '--a=it\'s "$HOME"' and given["MINE"] == "a 'b' $c"
  assert process_environment("127.0.0.1:23456", 2, 1).items() <= given.items()
  assert given["XLA_FLAGS"].split()[-1] == "--xla_cpu_enable_fast_min_max=true"
  assert "--xla_force_host_platform_device_count=3" in given["XLA_FLAGS"]


def test_one_process_meets_no_other():
  assert process_environment("h:1", 1, 0) == {}


@linux
def test_the_first_process_draws_its_progress_on_a_terminal(folder):
  text = r"""
if rank == 0:
  for n in range(3):
    sys.stderr.write(f'\r\x1b[Kstep {n} {sys.stderr.isatty()} {os.environ["COLUMNS"]}')
    sys.stderr.flush()
    time.sleep(0.3)
  sys.stderr.write('\n')
else:
  time.sleep(0.4)
  say(f'a line {sys.stderr.isatty()}')
"""
  main, side = pty.openpty()
  process = subprocess.Popen(
    [PYTHON, "-m", "launch", "--processes=2", "--", "train", f"--run={text}"], cwd=folder,
    env=environment(), stdout=subprocess.DEVNULL, stderr=side,
  )  # fmt: skip
  os.close(side)
  shown = b""
  try:
    while chunk := os.read(main, 4096):
      shown += chunk
  except OSError:  # Its other side is closed.
    pass
  os.close(main)
  assert process.wait() == 0
  screen = [line.rpartition("\r\x1b[K")[2] for line in shown.decode().split("\r\n")]
  assert screen.count("[0] step 2 True 76") == 1 and "[1] a line False" in screen
  assert not [line for line in screen if "step 0" in line or "step 1" in line]
  assert b"\r\x1b[K[0] step 1 True 76" in shown
  assert "step 1" not in (folder / "runs" / "train" / "logs" / "0.log").read_text()


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["train", "--config=x"], "stands behind --"),
    (["--hosts_file=x", "--", "train"], "--hosts_file has no effect with --target=local"),
    (["--env=3=x", "--", "train"], "NAME=VALUE"),
    (["--port=70000", "--", "train"], "--port=70000: at most 65535"),
    (["--procesess=2", "--", "train"], "procesess"),
    (["--logs=train/__main__.py", "--", "train"], "File exists (train/__main__.py)"),
    (["--target=tpu", "--poll=inf", "--", "train"], "--poll=inf: a finite number"),
  ],
)
def test_wrong_flags_are_one_line_and_status_2(folder, words, said):
  status, out, err = launch(folder, *words)
  assert status == 2 and not out
  assert err.startswith("error: ") and err.count("\n") == 1 and said in err


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(command=()), "nothing stands behind --"),
    (dict(command=("trian",)), "Did you mean 'train'"),
    (dict(command=("infer.evaluate",)), "--processes=2: infer.evaluate is not shared out"),
    (dict(name="Two Words"), "--name=Two Words"),
    (dict(name="-x"), "--name=-x"),
    (dict(backoff=float("nan")), "--backoff=nan"),
    (dict(environment={"JAX_PROCESS_ID": "1"}), "set by the launcher"),
  ],
)
def test_a_wrong_job_is_refused(changes, said):
  with pytest.raises(InputError, match=re.escape(said)):
    job(**changes)


def test_what_may_be_launched_is_there():
  for module in SHARED_OUT:
    path = ROOT / module.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    assert 'if __name__ == "__main__"' in file.read_text()


@pytest.mark.parametrize(
  ("command", "name"),
  [
    (("train", "--config=configs/gpt_small.py"), "gpt-small"),
    (("train", "--config=a.py:x", "--workdir=runs/My_Run.2/"), "my-run-2"),
    (("train", "--workdir", "/"), "train"),
    (("train.tokenizer",), "train-tokenizer"),
    (("train", f"--workdir={'a' * 47}_b"), "a" * 47),
  ],
)
def test_a_run_has_the_name_of_its_workdir(command, name):
  assert default_name(command) == name
  assert job(*command, name=default_name(command), processes=1)


def devices(monkeypatch, options: Options, processes: int, **own: str):
  for name in ("CUDA_VISIBLE_DEVICES", "XLA_FLAGS", "JAX_PLATFORMS"):
    monkeypatch.delenv(name, raising=False)
  for name, value in own.items():
    monkeypatch.setenv(name, value)
  return [p.environment for p in processes_of(job(processes=processes), options)]


def test_gpus_are_divided_evenly_or_refused(monkeypatch):
  split = lambda options, processes, visible="0,1,2,GPU-3": [
    e.get("CUDA_VISIBLE_DEVICES")
    for e in devices(monkeypatch, options, processes, CUDA_VISIBLE_DEVICES=visible)
  ]
  assert split(Options(), 2) == ["0,1", "2,GPU-3"]
  assert split(Options(), 1) == ["0,1,2,GPU-3"]
  assert split(Options(devices_per_process=1), 3) == ["0", "1", "2"]
  assert split(Options(device="cpu"), 3) == [None] * 3
  for options, processes, visible, said in (
    (Options(), 3, "0,1,2,3", "evenly, there are 4"),
    (Options(devices_per_process=2), 3, "0,1,2,3", "need 6 GPUs; this machine has 4"),
    (Options(device="gpu"), 2, "", "evenly, there are 0"),
  ):
    with pytest.raises(InputError, match=said):
      split(options, processes, visible)


def test_devices_of_other_kinds(monkeypatch):
  given = devices(monkeypatch, Options(device="cpu", devices_per_process=4), 2)
  assert given[1]["JAX_PLATFORMS"] == "cpu"
  assert "--xla_force_host_platform_device_count=4" in given[1]["XLA_FLAGS"].split()
  two = "--xla_force_host_platform_device_count=2"
  with pytest.raises(InputError, match="leave one of them out"):
    devices(monkeypatch, Options(device="cpu", devices_per_process=4), 2, XLA_FLAGS=two)
  with pytest.raises(InputError, match="driven by one process"):
    devices(monkeypatch, Options(device="tpu"), 2)
  monkeypatch.setattr(launch_devices, "local_kind", lambda own: "tpu")
  with pytest.raises(InputError, match="--devices_per_process=2"):
    devices(monkeypatch, Options(devices_per_process=2), 1)
