"""`python -m train` as a user runs it: to the end, killed, stopped, continued, and refused."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from model.errors import InputError
from tests.commands import ROOT, Command
from tests.quick import xla_flags

CONFIG = ROOT / "tests" / "train" / "run_config.py"
TIMING = ("tokens_per_second", "mfu")
SHAPES = {
  "decoder": (),
  "encoder": (
    "--config.model.shape=encoder", "--config.objective.name=masked_lm",
    "--config.objective.pairs=next_sentence", "--config.model.positions=learned",
    "--config.model.token_types=2", "--config.model.norm_placement=post",
    "--config.model.final_norm=False",
  ),
  "encoder_decoder": (
    "--config.model.shape=encoder_decoder", "--config.objective.name=span_corruption",
    "--config.target_len=24", "--config.model.positions=t5_bias",
  ),
}  # fmt: skip
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")


class Bench:
  """A text, a cache, and the command that trains on them."""

  def __init__(self, folder: Path):
    self.folder, self.text = folder, folder / "text.txt"
    rng = random.Random(0)
    words = ["def", "return", "self", "import", "for", "in", "while", "(x)", "= 1", "None"]
    lines = [" ".join(rng.choices(words, k=rng.randint(1, 20))) for _ in range(400)]
    self.text.write_text("\n".join(lines))

  def arguments(self, workdir: Path, *overrides: str) -> list[str]:
    return [
      f"--config={CONFIG}", f"--workdir={workdir}", f"--config.data.source={self.text}",
      f"--config.cache_dir={self.folder / 'cache'}", *overrides,
    ]  # fmt: skip

  def typed(self, workdir: Path, *overrides: str, **environment: str):
    """The command as a user types it, in a process of its own."""
    return subprocess.run(
      [sys.executable, "-m", "train", *self.arguments(workdir, *overrides)], cwd=ROOT,
      env={**os.environ, "XLA_FLAGS": xla_flags(1)} | environment, capture_output=True, text=True,
    )  # fmt: skip

  def start(self, workdir: Path, *overrides: str, devices: int = 1) -> Command:
    environment = {"XLA_FLAGS": xla_flags(devices)}
    return Command("train", self.arguments(workdir, *overrides), environment)

  def run(self, workdir: Path, *overrides: str, devices: int = 1):
    process = self.start(workdir, *overrides, devices=devices)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
  return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def reference(bench):
  """A run that nothing disturbed: (workdir, stdout, stderr, seconds)."""
  workdir, began = bench.folder / "reference", time.monotonic()
  status, out, err = bench.run(workdir)
  assert status == 0, err
  return workdir, out, err, time.monotonic() - began


def metrics(workdir: Path) -> list[dict]:
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def leaves(workdir: Path) -> list[np.ndarray]:
  import jax

  import model

  arrays = [model.load(workdir, ema=ema).params for ema in (False, True)]
  return [np.asarray(a) for a in jax.tree.leaves(arrays)]


def assert_same_run(workdir: Path, reference: Path) -> None:
  assert metrics(workdir) == metrics(reference)
  for got, want in zip(leaves(workdir), leaves(reference), strict=True):
    np.testing.assert_array_equal(got, want)


def kill_and_continue(bench, workdir, reference_dir, seconds, kills, seed, *overrides, devices=1):
  rng, done = random.Random(seed), 0
  while done < kills:
    process = bench.start(workdir, *overrides, devices=devices)
    time.sleep(rng.uniform(0.35, 1.0) * seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done += 1
  status, _, err = bench.run(workdir, *overrides, devices=devices)
  assert status == 0, err
  assert_same_run(workdir, reference_dir)


def test_a_run_leaves_what_was_promised(reference):
  workdir, out, err, _ = reference
  config = json.loads((workdir / "config.json").read_text())
  assert config["model"]["vocab_size"] == 260
  steps = [line for line in metrics(workdir) if "loss" in line]
  assert [line["step"] for line in steps] == list(range(1, 31))
  assert {"loss", "learning_rate", "grad_norm"} <= steps[0].keys()
  assert [m["step"] for m in metrics(workdir) if "validation_loss" in m] == [10, 20, 30]
  assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
  assert sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*"))[-2:] == [27, 30]
  assert json.loads((workdir / "checkpoints" / "best.json").read_text())["step"] == 30
  assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
  assert (workdir / "tokenizer" / "tokenizer.json").exists()
  assert list(workdir.glob("events.*"))
  assert out.startswith("sample: ")
  for shown in ("config.model", "parameters", "mesh", "memory", "unknown device", "curves.png"):
    assert shown in err
  assert "Traceback" not in err and "orbax" not in err.lower()


def test_killed_runs_continue_bit_for_bit(bench, reference):
  workdir, _, _, seconds = reference
  kill_and_continue(bench, bench.folder / "killed", workdir, seconds, kills=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["encoder", "encoder_decoder"])
def test_a_killed_run_with_an_encoder_continues_bit_for_bit(bench, shape):
  undisturbed, began = bench.folder / shape, time.monotonic()
  status, _, err = bench.run(undisturbed, *SHAPES[shape])
  assert status == 0, err
  seconds, workdir = time.monotonic() - began, bench.folder / f"killed_{shape}"
  kill_and_continue(bench, workdir, undisturbed, seconds, 1, 0, *SHAPES[shape])


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("devices", [1, 8])
def test_twenty_kills_at_random_moments_change_nothing(bench, devices, shape):
  overrides = (*SHAPES[shape], *(MESH if devices == 8 else ()))
  undisturbed, began = bench.folder / f"undisturbed_{shape}{devices}", time.monotonic()
  status, _, err = bench.run(undisturbed, *overrides, devices=devices)
  assert status == 0, err
  seconds, workdir = time.monotonic() - began, bench.folder / f"killed_{shape}{devices}"
  kill_and_continue(
    bench, workdir, undisturbed, seconds, 20, devices, *overrides, devices=devices
  )  # fmt: skip


@pytest.mark.once
def test_a_signal_saves_the_last_finished_step_and_ends_with_75(bench, reference):
  workdir = bench.folder / "stopped"
  for number in (signal.SIGTERM, signal.SIGINT):
    process = bench.start(workdir, "--config.checkpoint_every=1000")
    at_start = newest(workdir)
    deadline = time.monotonic() + 300
    while last_step(workdir) < at_start + 2 and time.monotonic() < deadline:
      time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert newest(workdir) == last_step(workdir) > at_start
  status, _, err = bench.run(workdir)
  assert status == 0, err
  assert_same_run(workdir, reference[0])


def test_a_signal_before_the_first_step_ends_with_75_too(bench):
  workdir = bench.folder / "early"
  process, deadline = bench.start(workdir), time.monotonic() + 300
  while not (workdir / "config.json").exists() and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 75, err
  assert err.splitlines()[-1] == "stopped by SIGTERM: no step was under way."


def newest(workdir: Path) -> int:
  names = [p.name for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()]
  return max(map(int, names), default=0)


def last_step(workdir: Path) -> int:
  path = workdir / "metrics.jsonl"
  found = re.findall(r'"step": (\d+)', path.read_text()) if path.exists() else []
  return int(found[-1]) if found else 0


@pytest.mark.slow
def test_another_mesh_continues_and_another_model_is_refused(bench, reference):
  workdir = bench.folder / "moved"
  done = bench.typed(Path(os.path.relpath(workdir, ROOT)), "--config.steps=10")
  assert done.returncode == 0, done.stderr
  status, _, err = bench.run(workdir, "--config.model.d_model=64", "--config.seed=1")
  assert status == 2
  last = err.splitlines()[-1]
  assert last.startswith("error: ") and "model.d_model" in last and "seed" in last
  status, _, err = bench.run(
    workdir, "--config.steps=12", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", devices=4
  )
  assert status == 0, err
  assert "10 of 12 done" in err


def test_parameters_of_another_vocabulary_are_not_started_from(bench, reference):
  status, _, err = bench.run(
    bench.folder / "other", f"--config.init_from={reference[0]}", "--config.data.tokenizer=bpe:260"
  )
  assert status == 2 and "another tokenizer" in err.splitlines()[-1], err


@pytest.mark.parametrize(
  ("override", "said"),
  [
    ("--config.modell.d_model=3", "modell"),
    ("--config.model.dmodel=3", "d_model"),
    ("--config.steps=many", "many"),
    ("--config.data.source=nowhere.txt", "nowhere.txt"),
    ("--config.seq_len=100", "max_positions=64"),
    ("--config.mesh.tensor=3", "does not fit 1 devices"),
    ("--config.model.num_heads=5", "num_heads=5"),
    ("--config.optimizer.name=adam", "adamw"),
    ("--config.seed=-1", "seed=-1"),
    ("--config.profile_steps=3", "profile_steps=(3,)"),
    ("--config.sample_prompt=" + "a" * 64, "sample_prompt has 65 tokens"),
  ],
)
def test_wrong_input_ends_with_one_line_and_status_2(bench, override, said):
  status, out, err = bench.run(bench.folder / "wrong", override)
  last = err.splitlines()[-1]
  assert status == 2 and not out, err
  assert last.startswith("error: ") and said in last
  assert "Traceback" not in err


def test_a_value_of_another_type_than_its_fields_is_refused():
  from train.config import Config, ModelConfig, checked

  for config, said in (
    (Config(steps=1e4), "steps=10000.0 is a float; int is needed"),  # pyright: ignore[reportArgumentType]
    (Config(seed=True), "seed=True is a bool"),
    (Config(model=ModelConfig(dtype="float32", rope_theta=10)), None),
  ):
    if said is None:
      assert checked(config) == config
      continue
    with pytest.raises(ValueError, match=re.escape(said)):
      checked(config)


def test_a_start_that_failed_leaves_nothing_that_the_next_one_takes(bench):
  workdir, table = bench.folder / "failed", bench.folder / "table.jsonl"
  table.write_text('{"text": 3}\n')
  for tokenizer in ("bytes", "char"):
    status, _, err = bench.run(
      workdir, f"--config.data.source={table}", f"--config.data.tokenizer={tokenizer}"
    )
    assert status == 2 and "holds int, not text" in err.splitlines()[-1], err


@pytest.mark.parametrize("method", ["full", "lora"])
def test_without_config_json_a_run_goes_on_as_its_checkpoint_says_only(tmp_path, method):
  from model.checkpoint import Checkpoints
  from train.config import Config, PeftConfig
  from train.group import ALONE
  from train.loop import prepared
  from train.workdir import as_dict

  config = Config(peft=PeftConfig(method=method), seed=3)
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(2, {}, {"config": as_dict(config)}, blocking=True)
  checkpoints.close()
  for _ in range(2):
    with pytest.raises(InputError, match=r"configuration: seed: checkpoint 3, config 0\."):
      prepared(dataclasses.replace(config, seed=0), tmp_path, ALONE)
    prepared(dataclasses.replace(config, steps=5), tmp_path, ALONE)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3


def test_a_save_that_did_not_end_is_no_checkpoint_of_a_workdir(tmp_path):
  from train.config import Config
  from train.workdir import check_workdir, write_config

  write_config(tmp_path, Config(seed=3))
  (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
  check_workdir(tmp_path, Config(seed=0))
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
  "text", ['{"model_type": "llama"}', "[1]", "null", '{"model": {}, "data": {}, "init_from": null}']
)
def test_a_workdir_with_the_config_of_something_else_is_refused_and_left_alone(tmp_path, text):
  from train.config import Config
  from train.workdir import check_workdir

  (tmp_path / "config.json").write_text(text)
  (tmp_path / "tokenizer").mkdir()
  with pytest.raises(InputError, match=r"config\.json is not that of a run: name another folder"):
    check_workdir(tmp_path, Config())
  assert (tmp_path / "config.json").read_text() == text and (tmp_path / "tokenizer").is_dir()


@pytest.mark.once
def test_an_empty_corpus_an_unknown_platform_and_lost_precision_are_refused(bench):
  empty = bench.folder / "empty.txt"
  empty.write_text("")
  status, _, err = bench.run(bench.folder / "wrong", f"--config.data.source={empty}")
  assert status == 2 and "empty.txt" in err.splitlines()[-1]
  done = bench.typed(bench.folder / "wrong", JAX_PLATFORMS="abacus")
  assert done.returncode == 2 and "abacus" in done.stderr.splitlines()[-1], done.stderr
  status, _, err = bench.run(bench.folder / "wrong", "--config.model.param_dtype=float64")
  assert status == 2 and "JAX_ENABLE_X64" in err.splitlines()[-1]


@pytest.mark.once
def test_a_loss_that_stays_non_finite_ends_with_3_and_says_where(bench):
  status, _, err = bench.run(
    bench.folder / "diverged", "--config.optimizer.learning_rate=1e30",
    "--config.optimizer.clip_norm=None", "--config.max_bad_steps=4", "--config.optimizer.name=sgd",
  )  # fmt: skip
  last = err.splitlines()[-1]
  assert status == 3 and last.startswith("error: "), err
  assert "4 steps in a row" in last and "last finite metrics" in last
  told = re.search(r"the last of them step (\d+), rows (\d+) to (\d+) of", last)
  assert told is not None, last
  step, *rows = map(int, told.groups())
  assert rows == [(step - 4) * 8, step * 8 - 1]
  assert {m["step"]: m["bad_steps"] for m in metrics(bench.folder / "diverged")}[step] >= 4
