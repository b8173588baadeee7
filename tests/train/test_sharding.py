"""Eight simulated devices compute what one computes."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.train import tiny
from tests.train.test_step import run
from train.config import MeshConfig, OptimizerConfig
from train.data.pipeline import load_data
from train.resolve import resolved

MESHES = {
  "data": MeshConfig(data=8),
  "fsdp": MeshConfig(data=1, fsdp=8),
  "tensor": MeshConfig(data=2, tensor=4),
  "mix": MeshConfig(data=2, fsdp=2, tensor=2),
  "seq": MeshConfig(data=1, seq=8),
  "seq_tensor": MeshConfig(data=1, seq=4, tensor=2),
  "fsdp_seq": MeshConfig(data=1, fsdp=4, seq=2),
  "data_seq_tensor": MeshConfig(data=2, seq=2, tensor=2),
}
SPLIT = [name for name, mesh in MESHES.items() if (mesh.seq or 1) > 1]  # Texts, along their length.
MODEL = dataclasses.replace(tiny.ROTARY, dtype="float64", param_dtype="float64")


def wide_run(mesh: MeshConfig, optimizer: str, devices: int, steps: int = 3, **changes):
  settings = OptimizerConfig(name=optimizer, warmup_steps=1, learning_rate=0.01)
  model = dataclasses.replace(MODEL, **changes)
  config = tiny.config(model, mesh=mesh, optimizer=settings)
  with jax.enable_x64(True):
    return run(config, [tiny.random_batch(seed) for seed in range(steps)], devices)


@pytest.fixture(scope="module")
def alone():
  """The states after three float64 steps on one device, by optimizer."""
  states = {}

  def get(optimizer):
    if optimizer not in states:
      states[optimizer] = wide_run(MeshConfig(), optimizer, 1)
    return states[optimizer]

  return get


slow = pytest.mark.slow
CASES = [
  ("adamw", "mix"), pytest.param("muon", "mix", marks=slow),
  *(pytest.param("adamw", mesh, marks=slow) for mesh in ("data", "fsdp", "tensor", *SPLIT)),
  *(pytest.param(optimizer, "mix", marks=slow) for optimizer in ("adafactor", "lion", "sgd")),
]  # fmt: skip


@pytest.mark.parametrize(("optimizer", "mesh"), CASES)
def test_eight_devices_equal_one_in_float64(alone, optimizer, mesh):
  state, losses = wide_run(MESHES[mesh], optimizer, 8)
  want, want_losses = alone(optimizer)
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  assert {a.dtype for a in jax.tree.leaves(state.params)} == {np.dtype("float64")}
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
  jax.tree.map(near, state.params, want.params)
  jax.tree.map(near, state.opt_state, want.opt_state)


RINGS = [pytest.param(name, marks=() if name == "seq_tensor" else slow) for name in SPLIT]


@pytest.mark.parametrize("mesh", RINGS)
def test_a_ring_of_devices_equals_one_in_float64(alone, mesh):
  state, losses = wide_run(MESHES[mesh], "adamw", 8, context_attention="ring")
  want, want_losses = alone("adamw")
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
  jax.tree.map(near, state.params, want.params)
  jax.tree.map(near, state.opt_state, want.opt_state)


@slow
@pytest.mark.parametrize("name", [n for n in tiny.MODELS if "expert" not in n])
@pytest.mark.parametrize("variant", ["gather", "ring"])
def test_every_kind_of_model_is_the_same_with_texts_split(name, variant):
  model = dataclasses.replace(tiny.MODELS[name], dtype="float64", param_dtype="float64")
  biased = model.bucketed or model.positions == "alibi"
  if biased and variant == "ring":
    pytest.skip("a ring knows no biases on scores, and refuses them")
  batches = [tiny.random_batch(seed) for seed in range(2)]
  with jax.enable_x64(True):
    want, want_losses = run(tiny.config(model), batches, 1)
    model = dataclasses.replace(model, context_attention=variant, remat="attention")
    split = tiny.config(model, mesh=MESHES["data_seq_tensor"], accumulation=2)
    state, losses = run(split, batches, 8)
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
  jax.tree.map(near, state.params, want.params)


TWENTY = [("mix", "gather"), *((mesh, how) for mesh in SPLIT for how in ("gather", "ring"))]


@slow
@pytest.mark.parametrize(("mesh", "variant"), TWENTY)
def test_eight_devices_equal_one_over_twenty_losses_in_float32(mesh, variant):
  batches = [tiny.random_batch(seed) for seed in range(20)]
  settings = OptimizerConfig(warmup_steps=1, learning_rate=1e-3)
  model = dataclasses.replace(tiny.ROTARY, dropout=0.1)
  one = run(tiny.config(model, optimizer=settings), batches, 1)[1]
  model = dataclasses.replace(model, context_attention=variant)
  mixed = run(tiny.config(model, optimizer=settings, mesh=MESHES[mesh]), batches, 8)[1]
  np.testing.assert_allclose(mixed, one, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A file of short lines, and a folder for caches."""
  folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
  words = ["def", "return", "self", "in", "(x)", "= 1", "None"]
  lines = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(200)]
  (folder / "text.txt").write_text("\n".join(lines))
  return folder


def shape_run(folder, shape, devices, steps, **changes):
  """(final state, losses) on the batches that a user's run has."""
  one = tiny.shape_config(shape, str(folder / "text.txt"), str(folder / "cache"), **changes)
  data = load_data(one)
  return run(resolved(one, data), [data.batch(step) for step in range(steps)], devices)


ENCODER_CASES = [
  ("adamw", "mix"), ("adamw", "fsdp"), ("adamw", "tensor"), ("adafactor", "mix"), ("muon", "mix"),
  *(("adamw", name) for name in SPLIT),
]  # fmt: skip


@slow
@pytest.mark.parametrize(("optimizer", "mesh"), ENCODER_CASES)
@pytest.mark.parametrize("shape", ["encoder", "encoder_decoder"])
def test_eight_devices_equal_one_in_float64_with_an_encoder(text, shape, optimizer, mesh):
  same = dict(
    dtype="float64", param_dtype="float64",
    optimizer=OptimizerConfig(name=optimizer, warmup_steps=1, learning_rate=0.01),
  )  # fmt: skip
  with jax.enable_x64(True):
    want, want_losses = shape_run(text, shape, 1, 3, **same)
    state, losses = shape_run(text, shape, 8, 3, mesh=MESHES[mesh], **same)
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
  jax.tree.map(near, state.params, want.params)
  jax.tree.map(near, state.opt_state, want.opt_state)


@slow
@pytest.mark.parametrize("mesh", SPLIT)
@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_a_ring_of_devices_equals_one_in_float64_with_an_encoder(text, shape, mesh):
  unbiased = dict(relative_bias=False) if shape == "encoder" else dict(positions="rotary")
  same = dict(dtype="float64", param_dtype="float64", **unbiased)
  with jax.enable_x64(True):
    want, want_losses = shape_run(text, shape, 1, 3, **same)
    ring = dict(mesh=MESHES[mesh], context_attention="ring")
    state, losses = shape_run(text, shape, 8, 3, **ring, **same)
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
  jax.tree.map(near, state.params, want.params)
  jax.tree.map(near, state.opt_state, want.opt_state)


@slow
@pytest.mark.parametrize("mesh", ["mix", *SPLIT])
@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_eight_devices_equal_one_over_twenty_losses_with_an_encoder(text, shape, mesh):
  settings = OptimizerConfig(warmup_steps=1, learning_rate=1e-3)
  same = dict(optimizer=settings, dropout=0.1)
  one = shape_run(text, shape, 1, 20, **same)[1]
  mixed = shape_run(text, shape, 8, 20, mesh=MESHES[mesh], **same)[1]
  np.testing.assert_allclose(mixed, one, rtol=0, atol=1e-5)


def test_parameters_and_moments_are_split_and_born_so():
  from model.sharding import make_mesh
  from train.program import build_program

  config = tiny.config(mesh=MESHES["mix"])
  mesh = make_mesh(**dataclasses.asdict(config.mesh))
  with jax.set_mesh(mesh):
    program = build_program(config, mesh)
    state = program.init()
  whole = sum(a.nbytes for a in jax.tree.leaves((state.params, state.opt_state)))
  held = lambda a: a.addressable_shards[0].data.nbytes
  here = sum(held(a) for a in jax.tree.leaves((state.params, state.opt_state)))
  assert here < whole / 3.5, "fsdp=2 x tensor=2 should leave about a quarter on each device"
  q = state.params["decoder"]["layers"][0]["attn"]["q_proj"]["w"]
  moments = [a for a in jax.tree.leaves(state.opt_state) if a.shape == q.shape]
  assert len(moments) >= 2 and all(m.sharding == q.sharding for m in moments)


@pytest.mark.parametrize(
  ("mesh", "change", "said"),
  [
    (MeshConfig(data=3), {}, "does not fit 8 devices"),
    (MeshConfig(data=1, tensor=8), {}, "kv_heads|heads=4"),
    (MeshConfig(data=8), dict(batch_size=4), "not a multiple of the 8 parts that mesh.data=8"),
  ],
)
def test_a_mesh_that_does_not_divide_is_refused(mesh, change, said):
  from model.errors import InputError

  with pytest.raises(InputError, match=said):
    run(tiny.config(mesh=mesh, **change), [], 8)
