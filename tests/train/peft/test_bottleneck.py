"""A run of bottleneck adapters, from a base to a model that writes, goes on, and is kept."""

import dataclasses
import shutil
import warnings

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import model
from infer import generate
from model.checkpoint import describe
from model.peft.attach import KEY, apart
from tests.train.peft.test_run import TOKENS, config, same, world  # noqa: F401
from train.config import MeshConfig, PeftConfig
from train.loop import train

CASES = {
  "houlsby": dict(method="houlsby", bottleneck=4, activation="gelu"),
  "parallel_over_nf4": dict(method="parallel", bottleneck=4, base_format="nf4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bottlenecks_are_trained_resumed_loaded_kept_and_write(world, tmp_path, name):  # noqa: F811
  settings = config(world, peft=PeftConfig(**CASES[name]))
  assert train(settings, tmp_path / "run") == 0
  saved = describe(tmp_path / "run" / "checkpoints" / "4")
  assert all(
    KEY in path for part in ("params", "frozen") for path in flatten_dict(saved.state[part])
  )
  shutil.copytree(tmp_path / "run", tmp_path / "again")
  for step in ("3", "4"):
    shutil.rmtree(tmp_path / "again" / "checkpoints" / step, ignore_errors=True)
  other = dataclasses.replace(settings, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
  assert train(other, tmp_path / "again") == 0
  m, again = model.load(tmp_path / "run"), model.load(tmp_path / "again")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), m.params, again.params)
  base = model.load(world / "base", quantize=CASES[name].get("base_format"))
  assert same(apart(m.params)[0], base.params)
  assert np.abs(m(TOKENS) - base(TOKENS)).max() > 1e-3
  model.save(m, tmp_path / "kept")
  kept = model.load(tmp_path / "kept")
  assert same(kept.params, m.params)
  prompts = ["1 is 7", "33 is"]
  made = [[c.tokens for c in generate(one, prompts, max_new_tokens=8)] for one in (m, kept)]
  assert made[0] == made[1]


@pytest.mark.slow
def test_runs_that_train_some_layers_waste_no_donated_buffer(world, tmp_path):  # noqa: F811
  cases = {
    "freeze": dict(method="full", freeze=("embed", "layers.0")),
    "targets": dict(method="full", targets=("layers.1.mlp", "final_norm")),
    "lora": dict(method="lora", rank=2, targets=("layers.2.attn",)),
  }
  with warnings.catch_warnings():
    warnings.filterwarnings("error", message="Some donated buffers")
    for name, peft in cases.items():
      settings = config(world, peft=PeftConfig(**peft), steps=2)
      assert train(settings, tmp_path / name) == 0
      assert train(dataclasses.replace(settings, steps=3), tmp_path / name) == 0
