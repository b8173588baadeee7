"""Several real processes: the losses of one, deaths that are named in time, exact restarts."""

import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import model
from model.errors import InputError
from tests.commands import Command, Done
from tests.quick import xla_flags
from tests.train.test_run import SHAPES, Bench, assert_same_run, last_step, leaves, metrics, newest
from train.place import VARIABLES, find_place

BOUND = 120  # barrier_seconds; a machine whose cores are busy starts slowly.
slow = pytest.mark.slow
MESHES = {
  "fsdp": ("--config.mesh.data=1", "--config.mesh.fsdp=None"),
  "tensor": ("--config.mesh.data=1", "--config.mesh.tensor=None"),
  "fsdp_tensor": ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
  "data_tensor": ("--config.mesh.data=2", "--config.mesh.tensor=2"),
}


class Processes:
  """`python -m train` in `count` processes, started as a launcher starts them."""

  def __init__(
    self, bench: Bench, workdir: Path, count: int, *overrides: str, devices: int = 1,
    own: dict[int, tuple[str, ...]] | None = None, bound: float = BOUND,
    started: Sequence[int] | None = None,
  ):  # fmt: skip
    port = free_port()
    self.all: list[Command] = []
    for index in range(count) if started is None else started:
      values = dict(zip(VARIABLES, (f"localhost:{port}", str(count), str(index)), strict=True))
      arguments = bench.arguments(
        workdir, f"--config.barrier_seconds={bound}", *overrides, *(own or {}).get(index, ())
      )
      self.all.append(Command("train", arguments, {"XLA_FLAGS": xla_flags(devices), **values}))

  def ends(self, timeout: float = 600) -> list[Done]:
    ends = []
    for command in self.all:
      try:
        out, err = command.communicate(timeout)
      except subprocess.TimeoutExpired:
        for other in self.all:
          other.send_signal(signal.SIGKILL)
        raise
      ends.append(Done(command.returncode, out, err))
    return ends

  def wait_for(self, met, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not met():
      assert time.monotonic() < deadline and self.all[0].returncode is None
      time.sleep(0.02)


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("", 0))
    return s.getsockname()[1]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
  return Bench(tmp_path_factory.mktemp("processes"))


def alone(bench: Bench, name: str, *overrides: str, devices: int = 1) -> Path:
  workdir = bench.folder / name
  status, _, err = bench.run(workdir, *overrides, devices=devices)
  assert status == 0, err
  return workdir


def together(bench: Bench, name: str, count: int, *overrides: str, devices: int = 1) -> Path:
  workdir = bench.folder / name
  for done in Processes(bench, workdir, count, *overrides, devices=devices).ends():
    assert done.returncode == 0, done.stderr
  return workdir


def assert_near(workdir: Path, reference: Path, atol: float = 1e-5) -> None:
  """Equal losses and parameters, but for the order of sums."""
  got, want = metrics(workdir), metrics(reference)
  assert [line["step"] for line in got] == [line["step"] for line in want]
  for mine, theirs in zip(got, want, strict=True):
    for name in ("loss", "validation_loss"):
      assert abs(mine.get(name, 0.0) - theirs.get(name, 0.0)) < atol, (mine, theirs)
  for a, b in zip(leaves(workdir), leaves(reference), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=100 * atol)


@pytest.fixture(scope="module")
def one(bench):
  """A run of one process on one device."""
  return alone(bench, "one")


@pytest.fixture(scope="module")
def two(bench):
  """A run of two processes that nothing disturbed, and what they printed."""
  workdir = bench.folder / "two"
  return workdir, Processes(bench, workdir, 2).ends()


def test_two_processes_give_the_losses_of_one_and_the_first_alone_writes(one, two):
  workdir, ends = two
  assert [done.returncode for done in ends] == [0, 0], ends[1].stderr
  assert_near(workdir, one)
  assert ends[0].stdout.startswith("sample: ") and "2 processes" in ends[0].stderr
  assert not ends[1].stdout and "step" not in ends[1].stderr and "config" not in ends[1].stderr
  assert len(list(workdir.glob("events.*"))) == 1


@slow
def test_a_killed_process_is_named_and_the_next_run_is_bit_identical(bench, two):
  workdir = bench.folder / "killed"
  run = Processes(bench, workdir, 2)
  run.wait_for(lambda: newest(workdir) >= 3)
  first, second = ended_after(run, 1, signal.SIGKILL)
  assert second.returncode == -signal.SIGKILL
  assert_named(first, 1)
  assert [done.returncode for done in Processes(bench, workdir, 2).ends()] == [0, 0]
  assert_same_run(workdir, two[0])


def ended_after(run: Processes, which: int, number: signal.Signals) -> list[Done]:
  """What is left within the bound after a signal to one process."""
  run.all[which].send_signal(number)
  return run.ends(timeout=BOUND + 30)


def assert_named(done: Done, *missing: int) -> None:
  """One last line that names processes, with host and step, and status 1."""
  last = done.stderr.splitlines()[-1]
  assert done.returncode == 1 and last.startswith("error: "), done.stderr
  for index in missing:
    assert f"process {index} ({socket.gethostname()})" in last
  assert re.search(r"step \d+", last), last


def test_variables_say_who_a_process_is_or_what_is_missing():
  values = ("host:1234", "4", "2")
  full = dict(zip(VARIABLES, values, strict=True))
  place = find_place(full)
  assert place is not None and (place.address, place.count, place.index) == (("host", 1234), 4, 2)
  assert find_place({}) is None
  for name in VARIABLES:
    with pytest.raises(InputError, match=f"{name} is not set"):
      find_place({k: v for k, v in full.items() if k != name})
  for name, value in zip(VARIABLES, ("host", "none", "4"), strict=True):
    with pytest.raises(InputError, match=f"{name}={value}"):
      find_place(full | {name: value})


@slow
def test_one_that_never_comes_is_named_within_the_bound(bench):
  run = Processes(bench, bench.folder / "never", 3, bound=8, started=[0, 1])
  ends = run.ends(timeout=60)
  assert [done.returncode for done in ends] == [1, 1], ends[0].stderr
  for done in ends:
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: process 2 of 3 has not come within 8 s (barrier_seconds)"), last
    assert f"0 ({socket.gethostname()}), 1 (" in last
  (lonely,) = Processes(bench, bench.folder / "never", 2, bound=5, started=[1]).ends(timeout=60)
  last = lonely.stderr.splitlines()[-1]
  assert last.startswith("error: process 0 at localhost:") and "process 1" in last, last


@slow
@pytest.mark.parametrize("which", [0, 1, 3])
def test_four_processes_end_when_one_dies_or_hangs(bench, which):
  for number in (signal.SIGKILL, signal.SIGSTOP):
    workdir = bench.folder / f"dies{which}{number}"
    run = Processes(bench, workdir, 4, "--config.steps=100000", bound=10)
    run.wait_for(lambda workdir=workdir: last_step(workdir) >= 4)
    run.all[which].send_signal(number)
    began = time.monotonic()
    others = [command for i, command in enumerate(run.all) if i != which]
    while any(command.returncode is None for command in others):
      assert time.monotonic() - began < 10 + 15
      time.sleep(0.1)
    run.all[which].send_signal(signal.SIGKILL)
    for i, done in enumerate(run.ends()):
      if i != which:
        assert_named(done, which)


@slow
@pytest.mark.parametrize("shape", SHAPES)
def test_four_processes_killed_at_random_moments_continue_bit_for_bit(bench, shape):
  whole, rng = together(bench, f"whole_{shape}", 4, *SHAPES[shape]), random.Random(0)
  workdir = bench.folder / f"cut_{shape}"
  for first in (1, 8, 15, 22):
    run, step = Processes(bench, workdir, 4, *SHAPES[shape]), first + rng.randrange(5)
    run.wait_for(lambda step=step: last_step(workdir) >= step)
    time.sleep(rng.uniform(0, 0.1))
    run.all[rng.randrange(4)].send_signal(signal.SIGKILL)
    assert {done.returncode for done in run.ends()} <= {0, 1, -signal.SIGKILL}
  assert together(bench, f"cut_{shape}", 4, *SHAPES[shape]) == workdir
  assert_same_run(workdir, whole)


@slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_process_killed_in_a_save_leaves_the_checkpoints_before(bench, two, which):
  workdir = bench.folder / f"saving{which}"
  for kill in range(3):
    run = Processes(bench, workdir, 2, "--config.checkpoint_every=1")
    at, saving = newest(workdir), (workdir / "checkpoints").glob
    run.wait_for(lambda at=at, saving=saving: newest(workdir) > at and any(saving("*tmp*")), 200)
    ended_after(run, which, signal.SIGKILL)
    assert newest(workdir) > kill
  assert [done.returncode for done in Processes(bench, workdir, 2).ends()] == [0, 0]
  assert_same_run(workdir, two[0])


@slow
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (4, 1)])
def test_other_numbers_of_processes_continue_with_the_same_data(bench, one, before, after):
  workdir = bench.folder / f"from{before}to{after}"
  mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2") if before == 4 else ()
  run = Processes(bench, workdir, before, *mesh, "--config.checkpoint_every=1000")
  run.wait_for(lambda: last_step(workdir) >= 4)
  assert {done.returncode for done in ended_after(run, 1, signal.SIGTERM)} == {75}
  assert 4 <= newest(workdir) < 30
  if after == 1:
    assert alone(bench, workdir.name) == workdir
  else:
    together(bench, workdir.name, after)
  assert_near(workdir, one)


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("which", [0, 1, "all"])
def test_a_signal_saves_the_last_step_on_all_processes(bench, two, which, number):
  workdir = bench.folder / f"stopped_{which}_{number}"
  run = Processes(bench, workdir, 2, "--config.checkpoint_every=1000")
  run.wait_for(lambda: last_step(workdir) >= 3)
  for command in run.all if which == "all" else [run.all[which]]:
    command.send_signal(number)
  ends = run.ends(timeout=120)
  assert [done.returncode for done in ends] == [75, 75], ends[0].stderr + ends[1].stderr
  assert newest(workdir) == last_step(workdir) >= 3
  assert f"stopped: step {newest(workdir)} is saved" in ends[0].stderr
  together(bench, workdir.name, 2)
  assert_same_run(workdir, two[0])


@slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_signal_before_the_first_step_ends_all_with_75(bench, which):
  workdir = bench.folder / f"early{which}"
  run = Processes(bench, workdir, 2)
  run.wait_for(lambda: (workdir / "config.json").exists())
  ends = ended_after(run, which, signal.SIGTERM)
  assert [done.returncode for done in ends] == [75, 75], ends[0].stderr + ends[1].stderr
  for done in ends:
    assert done.stderr.splitlines()[-1].startswith("stopped by SIGTERM: no step was under way.")


@slow
@pytest.mark.parametrize(
  ("own", "said"),
  [
    ("--config.seed=1", "seed"),
    ("--config.data.source=nowhere.txt", "nowhere.txt"),
    ("--config.data.source={folder}/other.txt", "data"),
    ("--config.model.num_heads=5", "num_heads=5"),
    ("--config.nonsense=1", "nonsense"),
  ],
)
def test_an_error_of_one_process_ends_all_with_its_line(bench, own, said):
  (bench.folder / "other.txt").write_text("another text\n" * 400)
  own = own.format(folder=bench.folder)
  for which in (0, 1):
    run = Processes(bench, bench.folder / f"wrong{which}", 2, own={which: (own,)})
    for done in run.ends(timeout=BOUND + 60):
      last = done.stderr.splitlines()[-1]
      assert done.returncode == 2 and last.startswith("error: ") and said in last, done.stderr
      assert "Traceback" not in done.stderr


@slow
def test_data_that_one_host_has_differently_is_an_error_that_names_it(bench, tmp_path):
  workdir, folders = bench.folder / "differs", [tmp_path / "a", tmp_path / "b"]
  for folder, text in zip(folders, ("one text\n", "another\n"), strict=True):
    folder.mkdir()
    (folder / "text.txt").write_text(text * 300)
  port, commands = free_port(), []
  for index, folder in enumerate(folders):
    values = dict(zip(VARIABLES, (f"localhost:{port}", "2", str(index)), strict=True))
    # The same relative path on two hosts: here a link in a home folder of each.
    arguments = bench.arguments(workdir, "--config.data.source=~/text.txt")
    environment = {"XLA_FLAGS": xla_flags(1), "HOME": str(folder), **values}
    commands.append(Command("train", arguments, environment))
  for command in commands:
    err = command.communicate(timeout=300)[1]
    last = err.splitlines()[-1]
    assert command.returncode == 2 and "data.corpus" in last and "process 1 (" in last, err


@slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mesh", MESHES)
def test_meshes_across_processes_equal_one_device(bench, shape, mesh):
  reference = bench.folder / f"one_{shape}"
  if not reference.exists():
    alone(bench, reference.name, *SHAPES[shape])
  workdir = together(bench, f"mesh_{mesh}_{shape}", 4, *SHAPES[shape], *MESHES[mesh])
  assert_near(workdir, reference)


@slow
def test_two_devices_in_each_process_equal_one_device(bench, one):
  workdir = together(bench, "two_each", 2, *MESHES["fsdp_tensor"], devices=2)
  assert_near(workdir, one)


@slow
@pytest.mark.parametrize("form", ["orbax", "hf"])
def test_a_run_begins_from_other_parameters_on_two_processes_too(bench, one, form):
  source = one
  if form == "hf":
    source = bench.folder / "hf"
    model.save(model.load(one), source, format="hf")
  begun = ("--config.steps=6", f"--config.init_from={source}", *MESHES["fsdp"])
  reference = alone(bench, f"begun_{form}", *begun)
  assert metrics(reference)[0]["loss"] < metrics(one)[0]["loss"] - 0.5
  assert_near(together(bench, f"begun_two_{form}", 2, *begun), reference)


@slow
def test_rows_that_lie_apart_come_to_their_devices(bench):
  port, commands = free_port(), []
  for index in range(2):
    values = dict(zip(VARIABLES, (f"localhost:{port}", "2", str(index)), strict=True))
    environment = {"XLA_FLAGS": xla_flags(4), **values}
    arguments = [str(bench.text), str(bench.folder / "cache")]
    commands.append(Command("tests.train.rows_apart", arguments, environment))
  for index, command in enumerate(commands):
    out, err = command.communicate(timeout=300)
    assert command.returncode == 0, err
    assert out.splitlines()[-1] == f"process {index} built rows {[0, 2] if index == 0 else [1, 3]}"
