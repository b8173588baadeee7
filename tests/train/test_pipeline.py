"""A pipeline over stages computes what one device computes, and holds a share of it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.errors import InputError
from model.heads import build
from model.pipeline import Plan, pipelined
from model.sharding import make_mesh
from model.transformer import Inputs
from tests.train import tiny
from tests.train.test_sharding import shape_run, text  # noqa: F401 (a fixture)
from tests.train.test_step import run
from train.config import MeshConfig, OptimizerConfig
from train.program import build_program

slow = pytest.mark.slow
EXACT = dict(dtype="float64", param_dtype="float64")
MESHES = {
  "stage2 fsdp2 tensor2": MeshConfig(data=1, stage=2, fsdp=2, tensor=2),
  "stage2 data4": MeshConfig(data=4, stage=2),
  "stage4 data2": MeshConfig(data=2, stage=4),
  "stage4 tensor2": MeshConfig(data=1, stage=4, tensor=2),
  "stage4 fsdp2": MeshConfig(data=1, stage=4, fsdp=2),
  "stage8": MeshConfig(data=1, stage=8),
  "slices2 data4": MeshConfig(data=4, slices=2),
  "slices2 fsdp2 tensor2": MeshConfig(data=1, slices=2, fsdp=2, tensor=2),
  "slices2 stage2 fsdp2": MeshConfig(data=1, slices=2, stage=2, fsdp=2),
}


def deep(model: ModelConfig, mesh: MeshConfig, rounds: int = 1) -> ModelConfig:
  """The model with as many layers as the stages can share."""
  layers = len(model.layer_pattern) * (mesh.stage or 1) * rounds
  return dataclasses.replace(
    model, num_layers=max(layers, 2), layer_prefix=(), layer_sets=None, **EXACT
  )


def compared(model: ModelConfig, mesh: MeshConfig, *, steps=3, optimizer="adamw", rows=8, **only):
  """Runs `model` on one device, and with the settings `only` on eight; compares all of the state.

  The first moments of AdamW are the gradients of the steps, weighted.
  """
  settings = OptimizerConfig(name=optimizer, warmup_steps=1, learning_rate=0.01)
  batches = [tiny.random_batch(seed, rows=rows) for seed in range(steps)]
  shared = {k: only.pop(k) for k in ("accumulation", "ema_decay") if k in only}
  shared |= dict(optimizer=settings, batch_size=rows)
  piped = dataclasses.replace(model, **only)
  with jax.enable_x64(True):
    want, want_losses = run(tiny.config(model, **shared), batches)
    got, losses = run(tiny.config(piped, mesh=mesh, **shared), batches, 8)
  same(got, want, losses, want_losses)


def same(got, want, losses, want_losses):
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
  jax.tree.map(near, got.params, want.params)
  jax.tree.map(near, got.opt_state, want.opt_state)
  jax.tree.map(near, got.ema, want.ema)


def test_stages_in_rounds_equal_one_device_in_float64():
  mesh = MESHES["stage2 fsdp2 tensor2"]
  compared(deep(tiny.ROTARY, mesh, 2), mesh, stage_rounds=2, micro_batches=4, ema_decay=0.9)


@slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_equals_one_device_in_float64(mesh):
  compared(deep(tiny.ROTARY, MESHES[mesh]), MESHES[mesh])


@slow
@pytest.mark.parametrize("mesh", ["stage2 fsdp2 tensor2", "stage4 data2"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_model_equals_one_device_in_float64(name, mesh):
  model = tiny.MODELS[name]
  if model.num_experts:  # Sums for the routers' losses are those of the whole batch.
    model = dataclasses.replace(model, balance_loss=0.1, router_z_loss=0.01)
  compared(deep(model, MESHES[mesh]), MESHES[mesh])


@slow
@pytest.mark.parametrize("optimizer", ["adafactor", "lion", "muon", "sgd"])
@pytest.mark.parametrize("mesh", ["stage2 fsdp2 tensor2", "stage4 data2"])
def test_every_optimizer_equals_one_device_in_float64(optimizer, mesh):
  compared(deep(tiny.ROTARY, MESHES[mesh]), MESHES[mesh], optimizer=optimizer)


CHANGES = {
  "loop": dict(scan_layers=False),
  "remat": dict(remat="full"),
  "remat dots": dict(remat="dots"),
  "remat attention": dict(remat="attention"),
  "remat loop in rounds": dict(remat="full", scan_layers=False, stage_rounds=2),
  "rounds": dict(stage_rounds=2),
  "four rounds": dict(stage_rounds=4),
  "few": dict(micro_batches=2),
  "accumulation": dict(accumulation=2, rows=16),
}


@slow
@pytest.mark.parametrize("change", CHANGES)
def test_every_setting_equals_one_device_in_float64(change):
  mesh, only = MESHES["stage2 fsdp2 tensor2"], CHANGES[change]
  compared(deep(tiny.ROTARY, mesh, 4), mesh, **only)


SHAPE_CASES = [
  ("encoder_decoder", "stage2 fsdp2 tensor2", 1),
  *(pytest.param(*case, marks=slow) for case in (
    ("encoder_decoder", "stage4 data2", 1), ("encoder_decoder", "stage2 data4", 2),
    ("encoder", "stage2 fsdp2 tensor2", 1), ("encoder", "stage4 data2", 1),
    ("encoder", "slices2 stage2 fsdp2", 2),
  )),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "mesh", "rounds"), SHAPE_CASES)
def test_shapes_with_an_encoder_equal_one_device_in_float64(text, shape, mesh, rounds):  # noqa: F811
  layers = MESHES[mesh].stage * rounds
  shared = dict(num_layers=layers, layer_sets=None, batch_size=8, **EXACT)
  if shape == "encoder_decoder":
    shared["num_decoder_layers"] = 2 * layers
  with jax.enable_x64(True):
    want, want_losses = shape_run(text, shape, 1, 3, **shared)
    got, losses = shape_run(
      text, shape, 8, 3, mesh=MESHES[mesh], stage_rounds=rounds, **shared
    )  # fmt: skip
  same(got, want, losses, want_losses)


@slow
@pytest.mark.parametrize("mesh", ["stage2 fsdp2 tensor2", "stage4 data2", "slices2 stage2 fsdp2"])
def test_twenty_losses_in_float32_equal_those_of_one_device(mesh):
  batches = [tiny.random_batch(seed) for seed in range(20)]
  settings = OptimizerConfig(warmup_steps=1, learning_rate=1e-3)
  model = dataclasses.replace(
    deep(tiny.ROTARY, MESHES[mesh]), dtype="float32", param_dtype="float32"
  )
  want = run(tiny.config(model, optimizer=settings), batches)[1]
  got = run(tiny.config(model, optimizer=settings, mesh=MESHES[mesh]), batches, 8)[1]
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("plan", [
  Plan(2, 1, 2), Plan(2, 3, 4), Plan(4, 1, 8), Plan(4, 2, 4), Plan(4, 2, 12), Plan(8, 2, 8),
], ids=str)  # fmt: skip
def test_each_micro_batch_goes_through_all_layers_in_order_once(plan):
  mesh = make_mesh(stage=plan.stages, data=8 // plan.stages)
  rows, depth = 2 * plan.parts * 8 // plan.stages, 3 * plan.stages * plan.rounds
  x = jnp.arange(rows * 2.0).reshape(rows, 2, 1)

  def stage(layers, x, where, part):
    step = lambda x, layer: ((1.5 * x + layer) % 101.0, jnp.sum(x))
    x, sums = jax.lax.scan(step, x, layers)
    return x + 0 * where[..., None], (sums, jnp.ones_like(layers) * 2.0**part)

  layers = jnp.arange(1.0, depth + 1)
  with jax.set_mesh(mesh):
    got, (sums, parts) = jax.jit(functools.partial(pipelined, stage, plan=plan))(
      layers, x, x[..., 0]
    )
  want = []
  for layer in layers:
    want.append(jnp.sum(x))
    x = (1.5 * x + layer) % 101.0
  np.testing.assert_allclose(got, x, rtol=1e-5)
  np.testing.assert_allclose(sums, jnp.stack(want), rtol=1e-5)
  np.testing.assert_array_equal(parts, 2.0**plan.parts - 1)  # Each layer: every part once.
