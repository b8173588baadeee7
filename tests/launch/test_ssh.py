"""`--target=ssh`: hosts files; and runs on several hosts that the test makes itself."""

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch.hosts import Host, read_hosts
from launch.job import Job
from launch.ssh import Options, processes_of, slots_of
from model.errors import InputError
from tests.commands import ROOT
from tests.launch.launched import PYTHON, environment, prepare, wait_for
from tests.launch.namespaces import Network, sshd_path
from tests.quick import xla_flags
from tests.train.test_run import Bench as Training
from tests.train.test_run import assert_same_run, newest


def hosts_file(folder: Path, text: str) -> str:
  path = folder / "hosts"
  path.write_text(text)
  return str(path)


def job(**changes) -> Job:
  given = dict(
    command=("train", "--a=b c"), name="x", processes=None, environment={}, max_restarts=0,
    backoff=1.0, logs=Path("logs"),
  )  # fmt: skip
  return Job(**(given | changes))


def test_a_hosts_file_is_read_as_it_is_meant(tmp_path):
  text = "# ours\nnode1\n\nme@node2:2222 slots=4  # big\n[fe80::1]:22\n10.0.0.3 slots=2\n"
  assert read_hosts(hosts_file(tmp_path, text)) == [
    Host("node1"), Host("node2", "me", 2222, 4), Host("fe80::1", None, 22),
    Host("10.0.0.3", slots=2),
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("# nothing\n", "names no host"),
    ("node1\nnode1 slots=2\n", "line 2: node1 is there twice"),
    ("node1 slot=2\n", "line 1: 'slot=2' is not known"),
    ("node1 slots=0\n", "'slots=0'; a whole number"),
    ("node1 slots=two\n", "'slots=two'; a whole number"),
    ("node1 4\n", "'4' is not known"),
    ("-oProxyCommand=x\n", "'-oProxyCommand=x' is no host"),
    ("a:b\n", "'a:b' is no host"),
    ("a:70000\n", "70000 is no port"),
    ("localhost\nnode2\n", "which the others cannot reach"),
    ("node1\nnode2 slots=2\n", "--processes=4, but"),
  ],
)
def test_a_wrong_hosts_file_is_refused_with_its_line(tmp_path, text, said):
  with pytest.raises(InputError, match=re.escape(said)):
    slots_of(job(processes=4 if "node2 slots" in text else None),
             Options(hosts_file=hosts_file(tmp_path, text)))  # fmt: skip


def test_a_missing_hosts_file_is_refused(tmp_path):
  with pytest.raises(InputError, match="--hosts_file is missing"):
    slots_of(job(), Options())
  with pytest.raises(InputError, match="there is no such file"):
    slots_of(job(), Options(hosts_file=str(tmp_path / "none")))


def test_what_is_not_shared_out_runs_on_one_host_only(tmp_path):
  options = Options(hosts_file=hosts_file(tmp_path, "a\nb\n"))
  with pytest.raises(InputError, match="--processes=2: infer is not shared out"):
    slots_of(job(command=("infer",)), options)
  assert len(slots_of(job(command=("infer",), processes=1), options)) == 1


def test_processes_fill_the_hosts_in_order_and_meet_at_the_first(tmp_path):
  options = Options(
    hosts_file=hosts_file(tmp_path, "me@a:23 slots=2\nb\n"), port=1234, remote_dir="~/my tree",
    ssh_option=("BatchMode=no",),
  )  # fmt: skip
  made = processes_of(job(environment={"A": "it's"}), options, slots_of(job(), options))
  assert [p.label for p in made] == ["0@a", "1@a", "2@b"]
  for rank, process in enumerate(made):
    words = process.argv
    assert words.index("BatchMode=no") < words.index("BatchMode=yes")  # ssh takes the first.
    assert "me@a" in words and words[words.index("-p") + 1] == "23" if rank < 2 else "b" in words
    assert words[-1].startswith("cd 'my tree' && exec env PYTHONUNBUFFERED=1 'A=it'\"'\"'s' JAX_")
    assert f"JAX_COORDINATOR_ADDRESS=a:1234 JAX_NUM_PROCESSES=3 JAX_PROCESS_ID={rank}" in words[-1]
    assert f"--share={rank % 2}/{2 if rank < 2 else 1} " in words[-1]
    assert words[-1].endswith("-- python3 -m train '--a=b c'")
  fewer = job(processes=2)
  made = processes_of(fewer, options, slots_of(fewer, options))
  assert [p.label for p in made] == ["0@a", "1@a"]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
  folder = tmp_path_factory.mktemp("network")
  with Network(folder, 3, sshd_path()) as made:
    yield made


class Bench:
  """A launcher at the hub of a network, and the stand-in's tree that all hosts see."""

  def __init__(self, folder: Path, network: Network):
    self.folder, self.network = folder, network
    prepare(folder)
    self.hosts(*network.names)

  def hosts(self, *lines: str) -> None:
    (self.folder / "hosts").write_text("\n".join(lines))

  def words(self, *words: str) -> list[str]:
    return [
      *self.network.inside("hub"), PYTHON, "-m", "launch", "--target=ssh", "--hosts_file=hosts",
      f"--python={PYTHON}", *self.network.client_options, *words,
    ]  # fmt: skip

  def start(self, text: str, *words: str) -> subprocess.Popen:
    """Starts a run of the stand-in; its output goes to pipes."""
    own = [f"--env=PYTHONPATH={ROOT}", *words, "--", "train", f"--run={text}"]
    return subprocess.Popen(
      self.words(*own), cwd=self.folder, env=environment(), text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )  # fmt: skip

  def run(self, text: str, *words: str) -> tuple[int, str, str]:
    process = self.start(text, *words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err

  def left(self) -> list[int]:
    """Processes of runs on all hosts."""
    return [pid for name in self.network.names for pid in self.network.pids(name, "-m train")]


@pytest.fixture
def bench(tmp_path, network):
  yield Bench(tmp_path, network)
  for name in network.names:
    network.link(name, "up")


@pytest.mark.slow
def test_each_process_runs_on_its_host_with_its_place(bench):
  bench.hosts("root@node1 slots=2", "node2:22", "node3  # the last")
  text = """
print(os.uname().nodename, Path.cwd(), sys.argv[1:-1], os.environ["MINE"])
print(*(os.environ[name] for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")))
say('x' * 1000)
"""
  status, out, err = bench.run(text, '--env=MINE=it\'s "$HOME"', "--port=21212")
  assert status == 0, err
  for rank, host in enumerate(("node1", "node1", "node2", "node3")):
    assert f'[{rank}@{host}] {host} {bench.folder} [] it\'s "$HOME"\n' in out
    assert f"[{rank}@{host}] node1:21212 4\n" in out
    assert f"[{rank}@{host}] {'x' * 1000}\n" in err
    log = (bench.folder / "runs" / "train" / "logs" / f"{rank}.log").read_text()
    assert "node1:21212 4\n" in log and "x" * 1000 in log


@pytest.mark.slow
def test_a_dry_run_prints_commands_that_do_the_same(bench):
  words = bench.words(
    "--dry_run", f"--env=PYTHONPATH={ROOT}", "--", "train", "--run=say(f'rank {rank}')", "--x='"
  )
  done = subprocess.run(words, cwd=bench.folder, env=environment(), capture_output=True, text=True)
  lines = done.stdout.splitlines()
  assert done.returncode == 0 and len(lines) == 3 and not (bench.folder / "runs").exists()
  for rank, line in enumerate(lines):
    process = subprocess.Popen(
      [*bench.network.inside("hub"), "sh", "-c", line], stdin=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda process=process: process.poll() is not None)
    assert f"rank {rank}\n" in process.communicate()[1] and process.returncode == 0


@pytest.mark.slow
def test_a_status_comes_back_and_the_others_are_stopped(bench):
  text = "say('error: no such file') or sys.exit(2) if rank == 1 else time.sleep(120)"
  status, _, err = bench.run(text, "--max_restarts=2")
  assert status == 2, err
  last = err.splitlines()[-1]
  assert last.startswith("error: process 1@node2 ended with status 2") and "no such file" in last
  assert "[2@node3] saved after SIGTERM" in err
  wait_for(lambda: not bench.left())


@pytest.mark.slow
def test_a_host_that_cannot_be_reached_is_named(bench):
  bench.network.link("node3", "down")
  began = time.monotonic()
  status, _, err = bench.run("time.sleep(120)", "--ssh_option=ConnectTimeout=5")
  assert status == 255 and time.monotonic() - began < 40
  assert err.splitlines()[-1].startswith("error: host node3 cannot be reached: ssh: connect to")
  wait_for(lambda: not bench.left())


@pytest.mark.slow
def test_a_folder_that_is_not_there_is_said(bench):
  status, _, err = bench.run("0", "--remote_dir=/nowhere at all")
  last = err.splitlines()[-1]
  assert status != 0 and last.startswith("error: process ") and "/nowhere at all" in last
  assert "--remote_dir" in last


@pytest.mark.slow
def test_a_host_that_is_cut_off_is_named_and_all_are_stopped(bench):
  process = bench.start("Path(f'up{rank}').touch(); time.sleep(600)", "--grace=3")
  wait_for(lambda: all((bench.folder / f"up{rank}").exists() for rank in range(3)))
  bench.network.link("node2", "down")
  began = time.monotonic()
  _, err = process.communicate(timeout=120)
  assert process.returncode == 255 and time.monotonic() - began < 40, err
  assert err.splitlines()[-1].startswith("error: host node2, process 1, was cut off: "), err
  assert "[0@node1] saved" in err and "[2@node3] saved" in err
  wait_for(lambda: not bench.left(), 60)  # Where nobody could be asked it ends by itself.


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_hosts(bench, number):
  process = bench.start("Path(f'up{rank}').touch(); time.sleep(600)", "--max_restarts=3")
  wait_for(lambda: all((bench.folder / f"up{rank}").exists() for rank in range(3)))
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 75, err
  assert all(f"[{rank}@node{rank + 1}] saved after {number.name}" in err for rank in range(3))


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_nothing_on_the_hosts(bench):
  text = "signal.signal(15, signal.SIG_IGN); Path(f'up{rank}').touch(); time.sleep(600)"
  process = bench.start(text, "--grace=1")
  wait_for(lambda: all((bench.folder / f"up{rank}").exists() for rank in range(3)))
  assert len(bench.left()) >= 3
  process.kill()
  wait_for(lambda: not bench.left(), 30)
  process.communicate(timeout=30)


@pytest.mark.slow
def test_the_tree_that_git_tracks_is_copied(bench, tmp_path):
  tree = tmp_path / "tree"
  tree.mkdir()
  prepare(tree)
  shutil.copytree(ROOT / "launch", tree / "launch", ignore=shutil.ignore_patterns("__pycache__"))
  (tree / "model").mkdir()
  for name in ("errors.py", "__init__.py"):
    (tree / "model" / name).write_text((ROOT / "model" / name).read_text())
  (tree / ".gitignore").write_text("ignored*\n")
  for name in ("ignored.txt", "spaced name.txt", "gone.txt"):
    (tree / name).write_text(name)
  git = ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b"]
  subprocess.run([*git, "init", "-q"], check=True)
  subprocess.run([*git, "add", "."], check=True)
  (tree / "untracked.txt").touch()
  (tree / "gone.txt").unlink()
  target = tmp_path / "copied to"
  shutil.copy(bench.folder / "hosts", tree / "hosts")
  words = ["--copy", f"--remote_dir={target}", "--", "train", "--run=print(Path.cwd())"]
  dry = subprocess.run(
    bench.words("--dry_run", *words), cwd=tree, env=environment(), capture_output=True, text=True
  )
  assert dry.stdout.count("< tree.tar.gz\n") == 3 and not target.exists()
  done = subprocess.run(
    bench.words(*words), cwd=tree, env=environment(), capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
  assert f"[2@node3] {target}\n" in done.stdout
  names = {path.name for path in target.iterdir()}
  assert {"train", "launch", "spaced name.txt"} <= names
  assert not names & {"ignored.txt", "gone.txt", "untracked.txt"}


@pytest.mark.slow
def test_training_goes_on_bit_for_bit_after_a_host_was_cut_off(bench, tmp_path):
  training = Training(tmp_path)
  bench.hosts("node1", "node2")

  def start(name: str) -> subprocess.Popen:
    own = [f"--remote_dir={ROOT}", f"--env=XLA_FLAGS={xla_flags(1)}", f"--logs={tmp_path / 'logs'}",
           "--device=cpu", "--grace=5", "--", "train"]  # fmt: skip
    command = training.arguments(tmp_path / name, "--config.barrier_seconds=120")
    return subprocess.Popen(
      bench.words(f"--env=PYTHONPATH={ROOT}", *own, *command), cwd=tmp_path, env=environment(),
      stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

  def finish(process: subprocess.Popen) -> str:
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return err

  assert "2 processes" in finish(start("undisturbed"))
  process = start("cut")
  wait_for(lambda: newest(tmp_path / "cut") >= 3, 300)
  bench.network.link("node2", "down")
  began = time.monotonic()
  _, err = process.communicate(timeout=300)
  assert process.returncode == 255 and time.monotonic() - began < 60, err
  assert err.splitlines()[-1].startswith("error: host node2, process 1, was cut off: "), err
  wait_for(lambda: not bench.left(), 90)
  bench.network.link("node2", "up")
  assert " of 30 done, continuing" in finish(start("cut"))
  assert_same_run(tmp_path / "cut", tmp_path / "undisturbed")
