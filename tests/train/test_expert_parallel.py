"""Experts split over devices: training is what one device computes, and each holds its own only."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import infer
import model
from model.errors import InputError
from model.sharding import make_mesh
from model.trained import Model
from tests.train import tiny
from tests.train.test_sharding import shape_run, text  # noqa: F401
from tests.train.test_step import params_of, run
from train.config import MeshConfig, OptimizerConfig
from train.program import build_program

slow = pytest.mark.slow
MESHES = {
  "data expert tensor": MeshConfig(data=2, expert=2, tensor=2),
  "data expert": MeshConfig(data=2, expert=4),
  "fsdp expert": MeshConfig(data=1, fsdp=4, expert=2),
  "expert": MeshConfig(data=1, expert=8),
  "slices expert": MeshConfig(slices=2, data=1, expert=4),
}
MODELS = {name: cfg for name, cfg in tiny.MODELS.items() if cfg.num_experts}
LOSSES = dict(balance_loss=0.1, router_z_loss=0.01)  # A product of sums over the global batch, too.
WIDE = dict(dtype="float64", param_dtype="float64")


def settings(optimizer: str) -> OptimizerConfig:
  return OptimizerConfig(name=optimizer, warmup_steps=1, learning_rate=0.01)


def wide_run(name: str, optimizer: str, mesh: MeshConfig, devices: int, *, parts=1, **changes):
  """(the state after three float64 steps, losses); `changes` are the model's."""
  cfg = dataclasses.replace(MODELS[name], **(LOSSES | WIDE | changes))
  config = tiny.config(
    cfg, mesh=mesh, optimizer=settings(optimizer), accumulation=parts, batch_size=8 * parts
  )
  batches = [tiny.random_batch(seed, rows=8 * parts) for seed in range(3)]
  with jax.enable_x64(True):
    return run(config, batches, devices)


@pytest.fixture(scope="module")
def alone():
  """`wide_run` on one device, each once."""
  done = {}

  def get(name, optimizer, **changes):
    key = (name, optimizer, *sorted(changes.items()))
    if key not in done:
      done[key] = wide_run(name, optimizer, MeshConfig(), 1, **changes)
    return done[key]

  return get


def same(got, want):
  (state, losses), (want_state, want_losses) = got, want
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
  near(losses, want_losses)
  assert {a.dtype for a in jax.tree.leaves(state.params)} == {np.dtype("float64")}
  jax.tree.map(near, state.params, want_state.params)
  jax.tree.map(near, state.opt_state, want_state.opt_state)


def possible(name: str, mesh: str, optimizer: str) -> bool:
  divides = MODELS[name].num_experts % (MESHES[mesh].expert or 1) == 0
  return divides and (optimizer == "adamw" or mesh in ("data expert tensor", "fsdp expert"))


FIRST = ("experts", "data expert tensor", "adamw")
CASES = [FIRST, *(
  pytest.param(*case, marks=slow)
  for case in itertools.product(MODELS, MESHES, ("adamw", "muon", "adafactor"))
  if case != FIRST and possible(*case)
)]  # fmt: skip


@pytest.mark.parametrize(("name", "mesh", "optimizer"), CASES)
def test_eight_devices_with_experts_apart_equal_one_in_float64(alone, name, mesh, optimizer):
  same(wide_run(name, optimizer, MESHES[mesh], 8), alone(name, optimizer))


@slow
@pytest.mark.parametrize(
  "changes",
  [
    dict(parts=2), dict(dropout=0.1), dict(remat="full"), dict(remat="dots", scan_layers=False),
    dict(expert_kernel="dense"), dict(mlp_bias=True, gated=True),
  ],
  ids=str,
)  # fmt: skip
def test_experts_apart_work_with_accumulation_dropout_remat_and_loops(alone, changes):
  got = wide_run("experts", "adamw", MESHES["data expert tensor"], 8, **changes)
  same(got, alone("experts", "adamw", **changes))


@slow
@pytest.mark.parametrize("mesh", ["data expert tensor", "data expert", "fsdp expert"])
@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_encoders_with_experts_apart_equal_one_device_in_float64(text, shape, mesh):  # noqa: F811
  experts = dict(layer_pattern=("global+experts",), num_experts=4)
  each = dict(**experts, **LOSSES, **WIDE, optimizer=settings("adamw"))
  with jax.enable_x64(True):
    want = shape_run(text, shape, 1, 3, **each)
    same(shape_run(text, shape, 8, 3, mesh=MESHES[mesh], **each), want)


def program_of(mesh: MeshConfig, optimizer: str, **changes):
  cfg = dataclasses.replace(MODELS["latent_grouped_experts"], **changes)
  config = tiny.config(cfg, mesh=mesh, optimizer=settings(optimizer), ema_decay=0.9)
  mesh = make_mesh(**dataclasses.asdict(config.mesh))
  with jax.set_mesh(mesh):
    return build_program(config, mesh), mesh


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_experts_and_their_optimizer_state_are_split(optimizer):
  big = dict(d_model=136, d_expert=144, d_ff=152)  # Adafactor factors these matrices.
  program, _ = program_of(MESHES["data expert tensor"], optimizer, **big)
  state, seen = program.state, 0
  for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state, state.ema)):
    where = jax.tree_util.keystr(path)
    if "mlp" in where and "_proj" in where and "shared" not in where and leaf.shape[1:2] == (8,):
      held = leaf.sharding.shard_shape(leaf.shape)
      assert held[1] == 4, f"{where} {leaf.shape} is {held} on a device"
      seen += 1
  assert seen >= 3 * 3 + (3 if optimizer == "adafactor" else 0), "matrices, moments, averages"


@slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("mesh", ["data expert tensor", "data expert", "fsdp expert"])
def test_no_device_holds_all_experts_at_any_time(mesh, optimizer):
  D, F, E = 24, 40, 8
  program, devices = program_of(MESHES[mesh], optimizer, d_model=D, d_expert=F, d_ff=56)
  with jax.set_mesh(devices):
    compiled = program.train_step
  hlo = compiled.as_text()
  parts = MESHES[mesh].expert or 1
  assert f"f32[1,{E // parts}," in hlo.replace("f32[2,", "f32[1,"), "the program has their parts"
  for rows, columns in itertools.product((D, F, D // 4, F // 2), repeat=2):
    assert f"[{E},{rows},{columns}]" not in hlo
    assert f",{E},{rows},{columns}]" not in hlo
  held = lambda a: np.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
  state = sum(held(a) for a in jax.tree.leaves((program.state, program.batch)))
  assert compiled.memory_analysis().argument_size_in_bytes <= 1.1 * state + 4096


@pytest.mark.parametrize(
  ("mesh", "changes", "said"),
  [
    (MeshConfig(data=1, expert=8), dict(num_experts=12, router_groups=4),
     r"model.num_experts=12 is not a multiple of mesh.expert=8"),
    (MeshConfig(data=2, expert=4), dict(layer_pattern=("local",), num_experts=0),
     r"mesh.expert=4 splits experts, and no layer .* mesh.data=4"),
    (MeshConfig(data=1, expert=8), dict(batch_size=4), "4 sequences is not a multiple of the 8"),
  ],
)  # fmt: skip
def test_a_mesh_that_does_not_divide_the_experts_is_refused(mesh, changes, said):
  rows = {k: changes.pop(k) for k in list(changes) if k == "batch_size"}
  plain = tiny.ROTARY if changes.get("num_experts") == 0 else MODELS["latent_grouped_experts"]
  cfg = dataclasses.replace(plain, **changes)
  with pytest.raises(InputError, match=said):
    build_program(tiny.config(cfg, mesh=mesh, **rows), make_mesh(**dataclasses.asdict(mesh)))


@slow
@pytest.mark.parametrize("name", MODELS)
def test_generation_with_experts_apart_says_the_same(tmp_path, name):
  loud = jax.tree.map(lambda a: a * 8, params_of(MODELS[name]))
  model.save(Model(MODELS[name], loud), tmp_path / "m")
  prompts, room = [[1, 2, 3], [4, 5, 6, 7], [9]], dict(max_new_tokens=8)
  want = infer.generate(model.load(tmp_path / "m"), prompts, **room)
  mesh = make_mesh(data=1, expert=4, tensor=2)
  apart = model.load(tmp_path / "m", mesh=mesh)
  matrices = apart.params["decoder"]["layers"][1]["mlp"]["up_proj"]["w"]
  assert matrices.sharding.shard_shape(matrices.shape)[1] == MODELS[name].num_experts // 4
  assert len({tuple(c.tokens) for c in want}) == len(prompts)
  got = infer.generate(apart, prompts, **room)
  assert [c.tokens for c in got] == [c.tokens for c in want]
  with jax.set_mesh(mesh):
    got = infer.generate(apart, prompts, **room)
  assert [c.tokens for c in got] == [c.tokens for c in want]
