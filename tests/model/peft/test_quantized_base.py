"""Adapters over quantized matrices: what they compute, how they are loaded, saved and refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from infer import generate
from infer.calibrate import calibrated
from model.errors import InputError
from model.heads import abstract
from model.hf.safetensors_files import open_file
from model.layers import param_info
from model.peft.attach import apart, together
from model.peft.config import PeftConfig
from model.peft.create import new_adapters, sites
from model.peft.files import CONFIG, WEIGHTS, with_adapter
from model.quant_tree import dequantize_params, quantize_params, quantized_leaves
from model.sharding import make_mesh
from tests.infer import tiny

SIZES = dict(d_model=64, d_ff=128, head_dim=16, layer_pattern=("global",), window=None)
BODIES = {
  "decoder": SIZES,
  "experts": SIZES | dict(layer_pattern=("global+experts",), num_experts=4),
  "latent": dict(
    d_model=64, d_ff=128, head_dim=None, num_kv_heads=None, kv_latent_dim=16, q_latent_dim=16,
    rope_head_dim=4, v_head_dim=8,
  ),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 12))
slow = pytest.mark.slow


def adapted(base: model.Model, seed=1, **settings) -> model.Model:
  """The model with a random adapter that does something everywhere."""
  config, net = PeftConfig(**settings), abstract(base.config)
  new = new_adapters(config, sites(config, base.config, net), base.params, jax.random.key(seed))
  noise = lambda a: a + 0.2 * jax.random.normal(jax.random.key(seed), a.shape)
  fixed = ("scale", "start_a", "start_b")
  new = jax.tree_util.tree_map_with_path(lambda p, a: a if p[-1].key in fixed else noise(a), new)
  return dataclasses.replace(base, params=together(base.params, new))


def quantized(m: model.Model, name: str) -> model.Model:
  params = quantize_params(m.params, param_info(abstract(m.config)), name)
  return dataclasses.replace(m, params=params)


def plain(m: model.Model) -> model.Model:
  """The same with the values that its quantized matrices stand for."""
  return dataclasses.replace(m, params=dequantize_params(m.params, jnp.float32))


CASES = [
  ("decoder", dict(method="lora", rank=2, targets=("attn", "mlp", "embed")), "nf4"),
  *(pytest.param(*case, marks=slow) for case in (
    ("decoder", dict(method="dora", rank=2), "int4"),
    ("decoder", dict(method="ia3"), "int8"),
    ("decoder", dict(method="lora", rank=2), "fp8"),
    ("decoder", dict(method="lora", rank=2, init="pissa"), "nf4"),
    ("experts", dict(method="lora", rank=2), "int4"),
    ("latent", dict(method="lora", rank=2), "int8"),
    ("latent", dict(method="dora", rank=2), "nf4"),
  )),
]  # fmt: skip


@pytest.mark.parametrize(("body", "peft", "name"), CASES)
def test_an_adapter_over_quantized_matrices_computes_as_over_the_values_they_stand_for(
  body, peft, name
):
  base = tiny.model(**BODIES[body])
  m = adapted(quantized(base, name), **peft)
  assert name in {w.format.name for w in quantized_leaves(m.params).values()}
  got, want = m(TOKENS), plain(m)(TOKENS)
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
  assert np.abs(got - quantized(base, name)(TOKENS)).max() > 1e-2


@slow
@pytest.mark.parametrize(("body", "peft", "name"), CASES)
def test_generation_with_an_adapter_over_quantized_matrices_is_that_over_their_values(
  body, peft, name
):
  m = adapted(quantized(tiny.model(**BODIES[body]), name), **peft)
  for more in ({}, dict(num_beams=3)) if body == "decoder" else ({},):
    got, want = (
      [c.tokens for c in generate(one, list(tiny.PROMPTS), max_new_tokens=8, **more)]
      for one in (m, plain(m))
    )
    assert got == want


@slow
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_the_base_is_quantized_while_it_is_read_and_the_adapter_is_written_as_over_a_float_one(
  tmp_path, method
):
  base = tiny.model(**BODIES["decoder"])
  model.save(base, tmp_path / "base", format="hf")
  rank = {} if method == "ia3" else dict(rank=2)
  model.save(adapted(base, method=method, **rank), tmp_path / "adapter", format="peft")
  config = tmp_path / "adapter" / CONFIG
  told = json.loads(config.read_text())
  config.write_text(json.dumps(told | {"base_model_name_or_path": str(tmp_path / "base")}))
  m = model.load(tmp_path / "base", quantize="int4", adapter=tmp_path / "adapter")
  kept = model.load(tmp_path / "base", quantize="int4")
  want = with_adapter(kept, tmp_path / "adapter")
  same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
  same(apart(m.params)[0], kept.params)
  same(m.params, want.params)
  same(m.params, model.load(tmp_path / "adapter", quantize="int4").params)
  model.save(m, tmp_path / "again", format="peft")
  first, again = (open_file(tmp_path / name / WEIGHTS) for name in ("adapter", "again"))
  assert first.keys() == again.keys()
  for name, array in first.items():
    np.testing.assert_allclose(again[name], array, rtol=1e-6, atol=1e-7)
  grid = make_mesh(data=2, fsdp=2, tensor=2)
  many = model.load(tmp_path / "base", quantize="int4", adapter=tmp_path / "adapter", mesh=grid)
  alone = m(TOKENS)
  with jax.set_mesh(grid):
    np.testing.assert_allclose(many(TOKENS), alone, atol=1e-4 * np.abs(alone).max())


def test_what_quantized_matrices_do_not_allow_is_refused(tmp_path):
  m = adapted(quantized(tiny.model(**BODIES["decoder"]), "int8"), method="lora", rank=2)
  cases = {
    "has an adapter": lambda: model.save(m, tmp_path / "whole"),
    "quantize m.merged()": lambda: calibrated(m, None, format="int8", method="plain"),
  }
  for words, call in cases.items():
    with pytest.raises(InputError) as error:
      call()
    assert words in str(error.value) and "\n" not in str(error.value)
