"""Encoders and encoder–decoders learn with adapters, packed, as on eight devices."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from model.sharding import make_mesh
from tests.train import tiny
from train.config import MeshConfig, OptimizerConfig, PeftConfig
from train.data.pipeline import load_data
from train.program import build_program, put_batch
from train.resolve import resolved

WIDE = dict(dtype="float64")
METHODS = {
  "lora": WIDE | dict(method="lora", rank=2),
  "houlsby": WIDE | dict(method="houlsby", bottleneck=3),
  "parallel": WIDE | dict(method="parallel", bottleneck=3),
  "freeze": dict(method="full", freeze=("embed", "encoder.layers.0", "attn", "*_norm")),
  "bitfit": dict(method="bitfit", targets=("decoder", "encoder.layers.1.mlp")),
}  # fmt: skip
CASES = [
  *(("encoder", name) for name in ("lora", "houlsby", "parallel")),
  *(("encoder_decoder", name) for name in METHODS),
]
# Of the encoder–decoder: (stack, part) of its layers that have something trained.
EVERY = {("encoder", "attn"), ("encoder", "mlp"), ("decoder", "attn"), ("decoder", "mlp"),
         ("decoder", "cross_attn")}  # fmt: skip
MLPS = {("encoder", "mlp"), ("decoder", "mlp")}
TRAINED = {
  "lora": EVERY, "houlsby": EVERY, "parallel": MLPS, "freeze": MLPS | {("decoder", "cross_attn")},
  "bitfit": EVERY - {("encoder", "attn")},
}  # fmt: skip


def three_steps(config, data, mesh, devices):
  """The states before and after three steps on so many devices, and their losses."""
  grid = make_mesh(**dataclasses.asdict(mesh), devices=jax.devices()[:devices])
  with jax.set_mesh(grid):
    program = build_program(config, grid)
    state, losses = program.init(), []
    before = jax.device_get(state)
    for step in range(3):
      state, metrics = program.train_step(state, put_batch(program, data.batch(step)))
      losses.append(float(metrics["loss"]))
    return before, jax.device_get(state), losses


def run(folder, shape, peft, devices, mesh):
  settings = OptimizerConfig(warmup_steps=1, learning_rate=0.02)
  more = dict(mlp_bias=True, attention_bias=True) if peft["method"] == "bitfit" else {}
  config = tiny.shape_config(
    shape, str(folder / "text.txt"), str(folder / "cache"), dtype="float64", param_dtype="float64",
    optimizer=settings, peft=PeftConfig(**peft), mesh=mesh, **more,
  )  # fmt: skip
  data = load_data(config)
  config = resolved(config, data)
  return three_steps(config, data, mesh, devices)


def text(folder):
  rng, words = np.random.default_rng(0), ["def", "return", "self", "in", "(x)", "= 1"]
  lines = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(200)]
  (folder / "text.txt").write_text("\n".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "name"), CASES)
def test_a_part_is_trained_with_the_rest_frozen_as_on_eight_devices(tmp_path, shape, name):
  text(tmp_path)
  peft = METHODS[name] | (dict(also=("head",)) if shape == "encoder" else {})
  with jax.enable_x64(True):
    before, want, want_losses = run(tmp_path, shape, peft, 1, MeshConfig())
    _, got, losses = run(tmp_path, shape, peft, 8, MeshConfig(data=2, fsdp=2, tensor=2))
  same = jax.tree.map(np.array_equal, before.frozen, want.frozen)
  assert all(jax.tree.leaves(same)) and want_losses[-1] != want_losses[0]
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-9)
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
  jax.tree.map(near, got.params, want.params)
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, want.params)
  # What is added to all keys of a query alike, as their bias is, has no effect.
  assert all(jax.tree.leaves({p: m for p, m in flatten_dict(moved).items() if "k_proj" not in p}))
  if shape == "encoder_decoder":
    paths = [path for path in flatten_dict(want.params) if path[1:2] == ("layers",)]
    assert {(path[0], path[3]) for path in paths} == TRAINED[name]
    assert name != "bitfit" or {path[-1] for path in flatten_dict(want.params)} == {"b"}
    if name in ("freeze", "bitfit"):  # One of two layers of the encoder.
      up = "w" if name == "freeze" else "b"
      part = lambda tree: tree["encoder"]["layers"][0]["mlp"]["up_proj"][up]
      assert part(want.params).shape[0] == part(want.frozen).shape[0] == 1
