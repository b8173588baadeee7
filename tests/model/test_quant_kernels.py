"""The TPU kernel of few rows times four bits is the product with the dequantized matrix."""

import dataclasses
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import quant
from model import quant_formats as formats
from model import quant_kernels as kernels
from model.config import ModelConfig
from model.heads import abstract, init_params
from model.layers import param_info
from model.quant_tree import quantize_params
from model.sharding import make_mesh
from model.trained import Model
from tests.model.test_context import _run_with_libtpu

slow = pytest.mark.slow


def matrix(name, outputs, inputs, seed=0):
  """A quantized matrix of very different rows, and what it stands for (outputs, inputs)."""
  spread = jnp.logspace(-3, 1, outputs)[:, None]
  w = quant.quantize(jax.random.normal(jax.random.key(seed), (outputs, inputs)) * spread, name,
                     table=True)  # fmt: skip
  return w, np.asarray(w.dequantize(jnp.float32), np.float64)


def by_kernel(x, w):
  return kernels.product(x, w.arrays(), w.format.kind, w.format.group, interpret=True)


CASES = [
  ("int4", 3, 256, 512, "float32"),
  *(pytest.param(name, rows, outputs, inputs, dtype, marks=slow)
    for name in ("int4", "nf4", "int4:64")
    for rows, outputs, inputs in ((1, 512, 512), (7, 768, 1536), (32, 256, 1024))
    for dtype in ("float32", "bfloat16")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "outputs", "inputs", "dtype"), CASES)
def test_the_kernel_multiplies_by_the_dequantized_matrix(name, rows, outputs, inputs, dtype):
  w, dense = matrix(name, outputs, inputs)
  x = jax.random.normal(jax.random.key(1), (1, rows, inputs), dtype)
  want = np.asarray(x, np.float64) @ dense.T
  got = np.asarray(by_kernel(x, w))
  assert got.dtype == np.float32 and got.shape == (1, rows, outputs)
  # Codes of int4 are exact in bfloat16; those of nf4 are rounded to it, as the matrix would be.
  exact = dtype == "float32" or w.format.kind == "int4"
  bound = np.abs(np.asarray(x, np.float64)) @ np.abs(dense).T * (3e-7 if exact else 2**-8)
  assert np.all(np.abs(got - want) <= bound)
  assert kernels.tiles(outputs // 2, inputs, w.format.group or 0)


@slow
def test_scales_of_nf4_are_those_of_its_table():
  kept = np.arange(256, dtype=np.uint8).reshape(2, 128)
  arrays = dict(scales=jnp.asarray(kept), steps=jnp.array([3.0]), offset=jnp.array(0.25))
  want = formats.dynamic_values()[kept] * 3.0 + 0.25
  np.testing.assert_allclose(kernels.nf4_scales(arrays), want, rtol=0, atol=4e-7)


@slow
def test_a_model_on_a_tpu_says_the_same_through_the_kernel(monkeypatch):
  """Stacked layers, a batch of two, multi-axis matrices; some shapes tile and some do not."""
  cfg = ModelConfig(
    vocab_size=64, num_layers=2, d_model=256, d_ff=768, num_heads=4, num_kv_heads=1, head_dim=64,
    max_positions=16, dtype="float32",
  )  # fmt: skip
  params = init_params(cfg, jax.random.key(0))
  m = Model(cfg, quantize_params(params, param_info(abstract(cfg)), "int4"))
  tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 64)
  want, called = m(tokens), []

  def seen(x, arrays, kind, group):
    called.append((x.shape[-1], 2 * len(arrays["values"])))
    return kernels_product(x, arrays, kind, group, interpret=True)

  kernels_product = kernels.product
  monkeypatch.setattr(kernels, "platform", lambda: "tpu")
  monkeypatch.setattr(kernels, "product", seen)
  fresh = dataclasses.replace(cfg, init_std=0.03)  # What was compiled before is not used again.
  got = Model(fresh, m.params)(tokens)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  # All but k and v, which have 64 outputs.
  assert set(called) == {(256, 256), (256, 768), (768, 256)}


def test_what_the_kernel_does_not_take_is_left_to_xla(monkeypatch):
  w, _ = matrix("int4", 256, 512)
  x = jnp.ones((8, 512))
  fits = lambda x, w: kernels.fits(x, w.arrays(), w.format.kind, w.format.group)
  assert not fits(x, w), "this is no TPU"
  monkeypatch.setattr(kernels, "platform", lambda: "tpu")
  assert fits(x, w)
  assert not fits(jnp.ones((33, 512)), w) and not fits(x.astype(jnp.float16), w)
  assert not fits(jnp.ones((8, 608)), matrix("int4", 256, 608)[0])
  assert not fits(x, matrix("int4", 100, 512)[0])
  assert not fits(x, matrix("int8", 256, 512)[0])
  more = w.arrays() | {"order": jnp.arange(512)}
  assert not kernels.fits(x, more, "int4", 32), "an array that it does not know"
  mesh = make_mesh(data=8)
  with jax.set_mesh(mesh):
    assert not fits(x, w)
  spread = jax.device_put(w, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
  found = []
  jax.jit(lambda x, w: found.append(fits(x, w)))(x, spread)
  assert found == [False], "matrices on several devices are known as such where no mesh is set"


FOR_TPUS = r"""
import re, jax, jax.numpy as jnp
from launch.topologies import devices_of
devices = devices_of(TOPOLOGY, 1)
from model import quant
from model.sharding import make_mesh
mesh = make_mesh(data=1, devices=devices[:1])
where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
for name in ("int8", "fp8", "int4", "nf4"):
  for rows in (1, 32):
    w = jax.tree.map(place, jax.eval_shape(lambda: quant.quantize(jnp.zeros((4096, 8192)), name)))
    x = place(jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16))
    with jax.set_mesh(mesh):
      done = jax.jit(quant.product).trace(x, w).lower(lowering_platforms=("tpu",)).compile()
    entry = done.as_text()[done.as_text().index("ENTRY"):]
    wide = [n for kind, dims in re.findall(r"(bf16|f32|s8|u8|f8e4m3fn)\[([\d,]+)\]", entry)
            if kind in ("bf16", "f32") for n in [eval(dims.replace(",", "*"))] if n >= 4096 * 8192]
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(w))
    few = done.memory_analysis().temp_size_in_bytes < held / 4
    print(name, rows, "kernels", entry.count('custom_call_target="tpu_custom_call"'),
          "float matrices", len(wide), "few temporary bytes", few)
    if name == "int4":
      print("read once", rows, done.cost_analysis()["bytes accessed"] < 1.2 * held)
"""


@slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is missing"
)
@pytest.mark.skipif(
  os.environ.get("JAX_PLATFORMS") != "cpu", reason="JAX_PLATFORMS=cpu keeps libtpu free for this"
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_no_float_matrix_is_written_on_a_tpu(topology):
  said = _run_with_libtpu(FOR_TPUS.replace("TOPOLOGY", repr(topology)))
  for name in ("int8", "fp8", "int4", "nf4"):
    for rows in (1, 32):
      own = 1 if name in ("int4", "nf4") else 0
      assert f"{name} {rows} kernels {own} float matrices 0 few temporary bytes True" in said
  assert "read once 1 True" in said and "read once 32 True" in said
