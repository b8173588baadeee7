"""Encoders and encoder–decoders learn with adapters, packed, as on eight devices."""

import dataclasses

import jax
import numpy as np
import pytest

from model.sharding import make_mesh
from tests.train import tiny
from train.config import MeshConfig, OptimizerConfig, PeftConfig
from train.data.pipeline import load_data
from train.program import build_program, put_batch
from train.resolve import resolved


def run(folder, shape, peft, devices, mesh):
  settings = OptimizerConfig(warmup_steps=1, learning_rate=0.02)
  config = tiny.shape_config(
    shape, str(folder / "text.txt"), str(folder / "cache"), dtype="float64", param_dtype="float64",
    optimizer=settings, peft=PeftConfig(**peft), mesh=mesh,
  )  # fmt: skip
  data = load_data(config)
  config = resolved(config, data)
  grid = make_mesh(**dataclasses.asdict(mesh), devices=jax.devices()[:devices])
  with jax.set_mesh(grid):
    program = build_program(config, grid)
    state, losses = program.init(), []
    before = jax.device_get(state)
    for step in range(3):
      state, metrics = program.train_step(state, put_batch(program, data.batch(step)))
      losses.append(float(metrics["loss"]))
    return before, jax.device_get(state), losses


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["encoder", "encoder_decoder"])
def test_lora_with_an_encoder_freezes_the_rest_and_equals_eight_devices(tmp_path, shape):
  rng, words = np.random.default_rng(0), ["def", "return", "self", "in", "(x)", "= 1"]
  lines = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(200)]
  (tmp_path / "text.txt").write_text("\n".join(lines))
  peft = dict(method="lora", rank=2, dtype="float64", also=("head",) if shape == "encoder" else ())
  with jax.enable_x64(True):
    before, want, want_losses = run(tmp_path, shape, peft, 1, MeshConfig())
    _, got, losses = run(tmp_path, shape, peft, 8, MeshConfig(data=2, fsdp=2, tensor=2))
  same = jax.tree.map(np.array_equal, before.frozen, want.frozen)
  assert all(jax.tree.leaves(same)) and want_losses[-1] != want_losses[0]
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
  jax.tree.map(near, got.params, want.params)
