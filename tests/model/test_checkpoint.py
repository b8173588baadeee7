"""Checkpoints: what is saved is what is read, and nothing else ever is."""

import dataclasses
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import checkpoint, checkpoint_files
from model.checkpoint import Checkpoints, check_config, describe, resolve, restore_params
from model.errors import InputError
from model.fingerprint import fingerprints

ROOT = Path(__file__).parents[2]
META = {"config": {"model": {"d_model": 4, "layer_pattern": ["global"]}}, "data": {"step": 7}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  step: jax.Array
  params: dict
  opt_state: optax.OptState
  ema: dict


def make_state(seed: int) -> State:
  rng = np.random.default_rng(seed)
  params = {
    "body": {
      "layers": {i: {"w": jnp.asarray(rng.standard_normal((2, 8, 40)), "float32")} for i in (0, 1)},
      "scale": jnp.asarray(rng.standard_normal(9), jnp.bfloat16),
      "none": jnp.zeros((0, 3)),
    },
    "nibbles": jnp.asarray(rng.integers(0, 256, (3, 5)), jnp.uint8),
    "flags": jnp.asarray(rng.integers(0, 2, 11), jnp.bool_),
  }
  floats = params["body"]
  return State(jnp.int32(seed), params, optax.adamw(1e-3).init(floats), {})


ABSTRACT = jax.eval_shape(lambda: make_state(0))


def bits(tree) -> list:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [(str(path), x.shape, str(x.dtype), np.asarray(x).tobytes()) for path, x in leaves]


def save(workdir, *steps, keep=2, **losses):
  checkpoints = Checkpoints(workdir, keep=keep)
  for step in steps:
    loss = losses.get(f"loss{step}")
    checkpoints.save(step, make_state(step), META | {"step": step}, validation_loss=loss)
  checkpoints.close()
  return Path(workdir) / "checkpoints"


def latest(workdir):
  checkpoints = Checkpoints(workdir, keep=2)
  found = checkpoints.restore_latest(ABSTRACT)
  checkpoints.close()
  return found


def test_restored_state_is_the_saved_one_bit_for_bit_with_integer_keys(tmp_path):
  assert latest(tmp_path) is None
  save(tmp_path, 3)
  got = latest(tmp_path)
  assert got.step == 3 and got.meta == META | {"step": 3}
  assert bits(got.state) == bits(make_state(3))
  assert type(got.state) is State and set(got.state.params["body"]["layers"]) == {0, 1}
  seen = describe(tmp_path)
  assert seen.meta == got.meta
  assert jax.tree.map(lambda x: (x.shape, x.dtype), seen.state["params"]) == jax.tree.map(
    lambda x: (x.shape, x.dtype), got.state.params
  )


def test_paths_may_be_relative(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  checkpoints = Checkpoints("run", keep=1)
  checkpoints.save(1, {"params": {"a": jnp.arange(3)}}, {}, blocking=True)
  checkpoints.close()
  found = restore_params("run", {"params": {"a": jax.ShapeDtypeStruct((3,), jnp.int32)}})
  np.testing.assert_array_equal(found.state["params"]["a"], np.arange(3))
  with pytest.raises(InputError, match="missing does not exist"):
    describe("missing")


def test_a_state_that_is_donated_right_after_save_is_saved_as_it_was(tmp_path):
  step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  state = {"params": {"w": jnp.arange(2.0**20)}}
  checkpoints = Checkpoints(tmp_path, keep=9)
  for i in range(3):
    want = bits(state)
    checkpoints.save(i, state, {})
    for _ in range(3):
      state = step(state)
    checkpoints.wait()
    got = restore_params(tmp_path, {"params": {"w": jax.ShapeDtypeStruct((2**20,), jnp.float32)}})
    assert got.step == i and bits(got.state) == want
  checkpoints.close()


def test_the_newest_and_the_best_are_kept(tmp_path):
  losses = {"loss1": 3.0, "loss2": 1.0, "loss3": 2.0, "loss4": float("nan"), "loss5": 2.5}
  folder = save(tmp_path, 1, 2, 3, 4, 5, **losses)
  assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "5", "best.json"]
  assert json.loads((folder / "best.json").read_text()) == {"step": 2, "validation_loss": 1.0}
  assert [resolve(p)[1] for p in (tmp_path, f"{tmp_path}@best", folder / "4")] == [5, 2, 4]
  save(tmp_path, 6, loss6=0.5)
  assert sorted(p.name for p in folder.iterdir()) == ["5", "6", "best.json"]
  assert resolve(f"{tmp_path}@best") == (tmp_path, 6)


@pytest.mark.once
def test_overwritten_bytes_in_any_file_are_found_or_harmless(tmp_path, caplog):
  want = {1: bits(make_state(1)), 2: bits(make_state(2))}
  folder = save(tmp_path / "whole", 1, 2)
  rng, fallbacks = random.Random(0), 0
  files = [p for p in sorted((folder / "2").rglob("*")) if p.is_file() and p.stat().st_size]
  for trial, file in enumerate(files * 3):
    workdir = tmp_path / str(trial)
    shutil.copytree(tmp_path / "whole", workdir)
    damaged = workdir / "checkpoints" / "2" / file.relative_to(folder / "2")
    content = bytearray(damaged.read_bytes())
    start = rng.randrange(len(content))
    size = min(64, len(content) - start)
    content[start : start + size] = rng.randbytes(size)
    damaged.write_bytes(content)
    caplog.clear()
    got = latest(workdir)
    assert bits(got.state) == want[got.step] and got.meta == META | {"step": got.step}
    warnings = [r.getMessage() for r in caplog.records if r.levelname != "INFO"]
    if got.step == 1:
      fallbacks += 1
      assert len(warnings) == 1 and f"{workdir}/checkpoints/2 is damaged" in warnings[0]
    else:
      assert not warnings
  assert len(files) >= 8 and fallbacks >= len(files) // 2, "most overwritten bytes must be found"


def test_what_is_not_a_whole_checkpoint_never_counts_and_its_step_can_be_saved_again(
  tmp_path, caplog
):
  folder = save(tmp_path, 1)
  (folder / "2").mkdir()
  shutil.copytree(folder / "1", folder / "4.orbax-checkpoint-tmp")
  shutil.copytree(folder / "1", folder / "5")  # Not the step that its name says.
  shutil.copytree(folder / "1", folder / "3")
  shutil.rmtree(folder / "3" / "record")
  checkpoints = Checkpoints(tmp_path, keep=5)
  assert checkpoints.restore_latest(ABSTRACT).step == 1 and checkpoints.steps() == [1]
  named = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
  assert [str(folder / s) in m for s, m in zip("532", named, strict=True)] == [True] * 3
  for step in (2, 3, 4, 5):
    checkpoints.save(step, make_state(step), META)
  checkpoints.close()
  assert checkpoints.steps() == [1, 2, 3, 4, 5]
  assert bits(latest(tmp_path).state) == bits(make_state(5))
  assert not list(folder.glob("*tmp*"))


def test_an_array_damaged_behind_an_intact_record_is_saved_again(tmp_path):
  folder = save(tmp_path, 1, 2)
  for file in (folder / "2" / "state").rglob("*"):
    if file.is_file() and file.stat().st_size > 2000:
      file.write_bytes(b"\0" * file.stat().st_size)
  checkpoints = Checkpoints(tmp_path, keep=2)
  assert checkpoints.restore_latest(ABSTRACT).step == 1 and checkpoints.steps() == [1]
  checkpoints.save(2, make_state(2), META | {"step": 2})
  checkpoints.close()
  assert bits(latest(tmp_path).state) == bits(make_state(2))
  before = (folder / "2").stat().st_mtime_ns
  save(tmp_path, 2)  # The same again: nothing is written.
  assert (folder / "2").stat().st_mtime_ns == before


def test_when_no_checkpoint_is_left_the_run_does_not_start_afresh_by_itself(tmp_path):
  folder = save(tmp_path, 1, 2)
  for step in "12":
    (folder / step / "record" / "metadata").write_text("{")
  with pytest.raises(InputError, match=r"no undamaged checkpoint.*checkpoints/2.*checkpoints/1"):
    latest(tmp_path)


def test_parts_are_restored_without_the_others_and_verified(tmp_path):
  state = {
    "params": {"a": {0: jnp.arange(4000.0)}},
    "frozen": {"b": jnp.ones(3)},
    "opt_state": {"a": jnp.full(5000, 2.0)},
    "ema": {"a": {0: jnp.arange(4000.0) + 1}},
  }
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, state, {}, blocking=True)
  checkpoints.close()
  twos = np.full(5000, 2.0, np.float32).tobytes()
  files = (p for p in (tmp_path / "checkpoints" / "1" / "state").rglob("*") if p.is_file())
  data, content = next((p, read) for p in files if twos in (read := p.read_bytes()))
  data.write_bytes(content.replace(twos, b"\1" * len(twos)))
  abstract = jax.eval_shape(lambda: state)
  parts = {k: abstract[k] for k in ("params", "frozen")}
  got = restore_params(tmp_path, parts)
  assert bits(got.state) == bits({k: state[k] for k in ("params", "frozen")})
  got = restore_params(tmp_path, {"ema": abstract["ema"]})
  assert bits(got.state) == bits({"ema": state["ema"]})
  with pytest.raises(InputError, match=r"opt_state\.a differs from its checksum"):
    restore_params(tmp_path, abstract)
  half = {"frozen": {"b": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}}
  with pytest.raises(InputError, match=r"frozen\.b: checkpoint float32, wanted bfloat16"):
    restore_params(tmp_path, half)
  assert restore_params(tmp_path, half, cast=True).state["frozen"]["b"].dtype == jnp.bfloat16


def test_all_differing_leaves_and_fields_are_listed_at_once(tmp_path):
  save(tmp_path, 1)
  wanted = {
    "flags": jax.ShapeDtypeStruct((12,), jnp.bool_),
    "nibbles": jax.ShapeDtypeStruct((3, 5), jnp.int8),
    "new": jax.ShapeDtypeStruct((1,), jnp.float32),
    "body": {"scale": jax.ShapeDtypeStruct((9,), jnp.bfloat16)},
  }
  with pytest.raises(InputError) as error:
    restore_params(tmp_path, {"params": wanted})
  for part in (
    "1 missing in the checkpoint: params.new;",
    "3 only in the checkpoint: params.body.layers.0.w, params.body.layers.1.w, params.body.none",
    "params.flags: checkpoint (11,), wanted (12,)",
    "params.nibbles: checkpoint uint8, wanted int8",
  ):
    assert part in str(error.value)
  old = {
    "steps": 1,
    "model": {"d_model": 128, "pattern": ("a",), "gone": None},
    "mesh": {"data": 1},
  }
  new = {"steps": 2, "model": {"d_model": 256, "pattern": ["a"]}, "mesh": {"data": 8}}
  with pytest.raises(InputError, match=r"model\.d_model: checkpoint 128, config 256; model\.gone"):
    check_config(old, new, allowed=("steps", "mesh"))
  check_config(new, {**old, "model": new["model"]}, allowed=("steps", "mesh"))


def test_wrong_paths_versions_and_dtypes_are_refused(tmp_path, monkeypatch):
  folder = save(tmp_path / "run", 1)
  for path, message in (
    (tmp_path / "nothing", "does not exist"),
    (tmp_path, "has no checkpoints"),
    (folder / "9", "does not exist"),
    (f"{tmp_path}/run@best", "no checkpoint was saved with a validation loss"),
    (f"{folder}/1@best", "goes after a workdir"),
  ):
    with pytest.raises(InputError, match=message):
      resolve(path)
  (folder / "9").mkdir()
  with pytest.raises(InputError, match="it is empty"):
    restore_params(folder / "9", {"params": ABSTRACT.params})
  with pytest.raises(InputError, match="holds no ema"):
    restore_params(tmp_path / "run", {"ema": {"a": jax.ShapeDtypeStruct((1,), jnp.float32)}})
  checkpoints = Checkpoints(tmp_path / "other", keep=1)
  with pytest.raises(InputError, match=r"params\.q has dtype uint4.*pack"):
    checkpoints.save(1, {"params": {"q": jnp.zeros(4, jnp.uint4)}}, {})
  monkeypatch.setattr("model.checkpoint_record.LAYOUT_VERSION", checkpoint.LAYOUT_VERSION + 1)
  checkpoints.save(1, {"params": {"q": jnp.zeros(4)}}, {}, blocking=True)
  checkpoints.close()
  monkeypatch.undo()
  ours = checkpoint.LAYOUT_VERSION
  with pytest.raises(InputError, match=f"version {ours + 1}; this program reads up to {ours}"):
    resolve(tmp_path / "other")


def reference_fingerprint(x: np.ndarray) -> str:
  raw = x.astype(np.uint8) if x.dtype == np.bool_ else x
  size = min(raw.dtype.itemsize, 4)
  word = raw.reshape(-1).view(f"u{size}").astype(np.uint64)
  index = np.arange(1, word.size + 1, dtype=np.uint64)
  low = np.uint64(2**32 - 1)
  word ^= index * np.uint64(0x9E3779B1) & low
  word = (word ^ word >> np.uint64(16)) * np.uint64(0x85EBCA6B) & low
  word = (word ^ word >> np.uint64(13)) * np.uint64(0xC2B2AE35) & low
  word ^= word >> np.uint64(16)
  more = word * np.uint64(0x27D4EB2F) & low
  more ^= more >> np.uint64(15)
  return f"{int(word.sum()) % 2**32:08x}{int(more.sum()) % 2**32:08x}"


def test_fingerprints_equal_a_numpy_reference_for_every_dtype():
  rng = np.random.default_rng(0)
  names = "bool uint8 int8 int16 uint16 float16 bfloat16 int32 uint32 float32 float8_e4m3fn"
  with jax.enable_x64(True):
    arrays = [
      jnp.asarray(rng.integers(0, 2 if name == "bool" else 256, shape), name)
      for name in (names + " float64 int64 uint64").split()
      for shape in ((), (2, 3, 5), (0, 2))
      if name == "float32" or shape == (2, 3, 5)
    ]
    assert fingerprints(arrays) == [reference_fingerprint(np.asarray(x)) for x in arrays]
  flipped = -jnp.arange(1.0, 6).at[jnp.array([1, 3])].multiply(-1)  # Two sign bits.
  pair = fingerprints([-jnp.arange(1.0, 6), flipped])
  assert pair[0] != pair[1]


MESHES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from model.checkpoint import Checkpoints
from model.fingerprint import fingerprints
w = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16, 6)), jnp.float32)
host = {"params": {"w": w, "b": w[0, 0].astype(jnp.bfloat16)}, "step": jnp.int32(5)}
def place(shape, names, specs):
  mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
  return {"params": {k: NamedSharding(mesh, s) for k, s in specs.items()},
          "step": NamedSharding(mesh, P())}
places = [
  place((4, 2), ("fsdp", "tensor"), {"w": P("fsdp", "tensor"), "b": P("tensor")}),
  place((2, 2, 2), ("data", "fsdp", "tensor"),
        {"w": P(("data", "tensor"), None, "fsdp"), "b": P()}),
  place((8,), ("data",), {"w": P(), "b": P()}),
  jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[3]), host),
]
for i, here in enumerate(places):
  state = jax.device_put(host, here)
  assert fingerprints(jax.tree.leaves(state)) == fingerprints(jax.tree.leaves(host))
  checkpoints = Checkpoints(f"{sys.argv[1]}/{i}", keep=1)
  checkpoints.save(1, state, {}, blocking=True)
  for there in places:
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), host, there)
    got = checkpoints.restore_latest(abstract).state
    for x, want, s in zip(*map(jax.tree.leaves, (got, host, there))):
      assert np.asarray(x).tobytes() == np.asarray(want).tobytes() and x.dtype == want.dtype
      assert x.sharding == s, (x.sharding, s)
  checkpoints.close()
print("equal")
"""


def run(code: str, *argv, **env) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code), *map(str, argv)],
    cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | env,
    capture_output=True, text=True, timeout=240,
  )  # fmt: skip


def test_a_checkpoint_of_any_mesh_is_restored_onto_any_other(tmp_path):
  done = run(MESHES, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
  assert done.stdout == "equal\n" and "Traceback" not in done.stderr, done.stderr[-3000:]


KILLED = """
import os, random, signal, sys, time
import numpy as np
import jax, jax.numpy as jnp
from model.checkpoint import Checkpoints
from model.fingerprint import fingerprints

workdir, log = sys.argv[1], os.open(sys.argv[1] + "/done", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def state(step):
  params = {str(i): jnp.full(3000, step * 10.0 + i) for i in range(8)}
  return {"params": params, "step": jnp.int32(step)}

def last_done():
  return max([0, *map(int, open(workdir + "/done").read().split())])

def train(ready, until):
  checkpoints = Checkpoints(workdir, keep=2)
  found = checkpoints.restore_latest(jax.eval_shape(lambda: state(0)))
  first = found.step if found else 0
  assert first >= last_done(), (first, last_done())
  if found:
    want = jax.tree.leaves(state(first))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found.state), want))
    assert found.meta == {"data": first}
  fingerprints(jax.tree.leaves(state(0)))
  os.write(ready, b"x")
  step = first
  while step < until:
    step += 1
    checkpoints.save(step, state(step), {"data": step}, validation_loss=100 / step)
    if step % 2:
      checkpoints.wait()
      os.write(log, f"{step}\\n".encode())
  checkpoints.close()
  os.write(log, f"{step}\\n".encode())

rng = random.Random(0)
for trial in range(8):
  read, write = os.pipe()
  child = os.fork()
  if child == 0:
    status = 1
    try:
      train(write, 10**9)
    except BaseException:
      import traceback; traceback.print_exc()
    os._exit(status)
  assert os.read(read, 1) == b"x"
  time.sleep(rng.uniform(0.05, 0.6))
  os.kill(child, signal.SIGKILL)
  assert os.waitpid(child, 0)[1] == signal.SIGKILL
before = last_done()
train(os.pipe()[1], before + 3)
kept = sorted(os.listdir(workdir + "/checkpoints"))
print("resumed", kept == sorted(["best.json", str(before + 2), str(before + 3)]), before > 3)
"""


def test_a_run_killed_at_any_moment_of_a_save_continues_from_the_last_whole_one(tmp_path):
  done = run(KILLED, tmp_path)
  assert done.stdout == "resumed True True\n", done.stdout + done.stderr[-3000:]


@pytest.fixture
def small_disk(tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
  if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting a small file system needs root")
  yield disk
  subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_clear_error_and_earlier_checkpoints_stay(
  small_disk, monkeypatch, caplog, capfd
):
  rng = np.random.default_rng(0)
  state = {"params": {"w": jnp.asarray(rng.standard_normal(80_000), "float32")}}
  checkpoints = Checkpoints(small_disk, keep=5)
  checkpoints.save(1, state, {}, blocking=True)
  checkpoints.save(2, state, {}, blocking=True)
  message = (
    r"step 3 could not be saved in .*: the disk has .* free and the checkpoint needs 3.* KiB"
  )
  with pytest.raises(InputError, match=message):
    checkpoints.save(3, state, {})
  monkeypatch.setattr(
    checkpoint_files, "needed_bytes", lambda record: 400 * 1024 * record.step // 9
  )
  with pytest.raises(InputError, match=r"step 3 could not be saved"):
    checkpoints.save(3, state, {})  # Seems to fit; the disk is full while it is written.
    checkpoints.wait()
  assert checkpoints.steps() == [1, 2]
  assert sorted(p.name for p in (small_disk / "checkpoints").iterdir()) == ["1", "2"]
  assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
  assert capfd.readouterr().err == ""
  shutil.rmtree(small_disk / "checkpoints" / "1")
  checkpoints.save(3, state, {}, blocking=True)
  checkpoints.close()
  got = restore_params(small_disk, jax.eval_shape(lambda: state))
  assert got.step == 3 and bits(got.state) == bits(state)


def test_disk_full_is_recognized_however_it_is_wrapped():
  outer = ValueError("save failed")
  outer.__cause__ = ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [x]")
  assert checkpoint_files.is_disk_full(outer)
  assert checkpoint_files.is_disk_full(OSError(errno.EDQUOT, "quota"))
  assert not checkpoint_files.is_disk_full(ValueError("RESOURCE_EXHAUSTED: out of memory"))
