"""Quantized matrices: what they keep, what is multiplied by them, and whole models of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from model import quant_formats as formats
from model.errors import InputError
from model.heads import abstract
from model.layers import param_info
from model.quant import Quantized, product, quantize, rows
from model.quant_tree import dequantize_params, quantize_params, report, resident_bytes
from tests.infer import tiny


def quantized(m: model.Model, name: str) -> model.Model:
  params = quantize_params(m.params, param_info(abstract(m.config)), name)
  return dataclasses.replace(m, params=params)


def test_nf4_equals_bitsandbytes():
  functional = pytest.importorskip("bitsandbytes.functional")
  torch = pytest.importorskip("torch")
  table = functional.get_4bit_type("nf4", device="cpu")
  np.testing.assert_array_equal(formats.NF4, table.numpy())
  dynamic = functional.create_dynamic_map().numpy()
  np.testing.assert_allclose(formats.dynamic_values(), dynamic, rtol=1e-6)
  for seed, (shape, block) in enumerate([((576, 1536), 64), ((8, 64), 64), ((192, 576), 32)]):
    w = np.random.default_rng(seed).standard_normal(shape, np.float32) * 0.02
    packed, state = functional.quantize_4bit(
      torch.from_numpy(w), blocksize=block, compress_statistics=True, quant_type="nf4"
    )
    want = functional.dequantize_4bit(packed, state).numpy()
    name = "nf4" if block == 64 else f"nf4:{block}"
    kept = quantize(jnp.asarray(w), name, table=True)
    assert kept.format.name == name
    got = np.asarray(kept.dequantize())
    # The mean of scales is summed in another order: few of them go to the value beside.
    same = np.isclose(got, want, rtol=1e-5, atol=1e-8)
    assert same.mean() > 0.997
    np.testing.assert_allclose(got, want, rtol=0.02, atol=1e-8)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "fp8"])
def test_product_is_that_of_the_dequantized_matrix(name):
  w = jax.random.normal(jax.random.key(0), (3, 4, 16, 8))  # Layers, two inputs, an output.
  kept = quantize(w, name, inputs=2, lead=1)
  assert kept.shape == w.shape and kept.dequantize().shape == w.shape
  error = np.abs(kept.dequantize() - w).max(axis=(1, 2))  # Of each layer and output.
  step = {"int8": 0.5 / 127, "fp8": 1 / 16, "int4": 1 / 8, "nf4": 0.16}[name]
  assert (error <= step * np.abs(w).max(axis=(1, 2)) * 1.01).all()
  one, plain = jax.tree.map(lambda a: a[1], kept), kept.dequantize()[1]
  assert one.shape == plain.shape
  for number in (1, 3, 40):
    x = jax.random.normal(jax.random.key(number), (number, 4, 16))
    np.testing.assert_allclose(product(x, one), jnp.tensordot(x, plain, 2), rtol=1e-4, atol=1e-4)
  gradient = jax.grad(lambda x: jnp.sum(jnp.sin(product(x, one))))(x)
  want = jax.grad(lambda x: jnp.sum(jnp.sin(jnp.tensordot(x, plain, 2))))(x)
  np.testing.assert_allclose(gradient, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "most", "error"), [("int8", 127, 0.5), ("fp8", 448, 16)])
def test_dynamic_products_round_each_row_for_itself(name, most, error):
  w = jax.random.normal(jax.random.key(0), (64, 8))
  kept = quantize(w, f"{name}_dynamic")
  x = jax.random.normal(jax.random.key(1), (6, 64)) * 10.0 ** jnp.arange(6)[:, None]
  scale = jnp.max(jnp.abs(x), axis=1, keepdims=True) / most
  small = x / scale
  small = jnp.round(small) if name == "int8" else small.astype(jnp.float8_e4m3fn)
  want = (small.astype(jnp.float32) @ kept.dequantize()) * scale
  np.testing.assert_allclose(product(x, kept) / scale, want / scale, rtol=1e-4, atol=1e-2)
  assert np.abs(small.astype(jnp.float32) - x / scale).max() <= error
  alone = jnp.concatenate([product(row[None], kept) for row in x])
  np.testing.assert_allclose(alone / scale, want / scale, rtol=1e-4, atol=1e-2)


def test_int4_keeps_elements_that_are_far_from_their_group():
  w = 0.02 * np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
  w[3, 5], w[4, 40] = 2, -3
  got = quantize(jnp.asarray(w), "int4", table=True).dequantize()
  np.testing.assert_allclose([got[3, 5], got[4, 40]], [2, -3], rtol=0.03)


def test_int4_follows_groups_that_lie_on_a_grid_of_four_bits():
  """As those of files of llama.cpp's Q4_1 do: code * scale + least, with any least."""
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 16, (64, 18, 32))
  codes[..., :2] = 0, 15
  scale = 0.01 * np.exp2(rng.normal(0, 0.35, (64, 18, 1)))
  least = -scale * np.clip(rng.normal(7.5, 1.4, (64, 18, 1)), 2, 13)
  w = (codes * scale + least).reshape(64, 576).astype(np.float32)
  off = np.asarray(quantize(jnp.asarray(w), "int4", table=True).dequantize()) - w
  steps = np.sqrt(np.mean(np.square(off.reshape(64, 18, 32) / scale)))
  assert steps < 0.08  # Of numbers on no grid 0.29 are lost at least.


@pytest.mark.parametrize("seed", range(3))
def test_int4_loses_no_more_of_normal_numbers_than_the_widest_scale_without_rounding(seed):
  w = np.random.default_rng(seed).standard_normal((96, 192)).astype(np.float32)
  w *= np.logspace(-6, 1, 96, dtype=np.float32)[:, None]  # Outputs far apart keep a scale each.
  w[5] = 0
  groups = w.reshape(96, 6, 32)
  least, most = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
  size = np.where(most > least, (most - least) / 15, 1)
  widest = np.round((groups - least) / size) * size + least
  got = np.asarray(quantize(jnp.asarray(w), "int4", table=True).dequantize())
  each = np.maximum(np.square(w).mean(1), 1e-30)
  lost = np.square(got - w).mean(1) / each
  assert np.mean(lost) < 0.95 * np.mean(np.square(widest.reshape(w.shape) - w).mean(1) / each)
  assert np.all(lost < 0.012) and np.all(got[5] == 0)


def test_packed_bytes_hold_two_outputs_and_a_table_gives_its_rows():
  codes = np.random.default_rng(0).integers(0, 16, (6, 10)).astype(np.uint8)
  packed = formats.pack(jnp.asarray(codes))
  assert packed.shape == (3, 10) and packed.dtype == np.uint8
  np.testing.assert_array_equal(formats.interleaved(formats.unpack(packed), 0), codes)
  for name in ("fp8", "nf4"):
    table = quantize(jax.random.normal(jax.random.key(0), (12, 64)), name, table=True)
    ids = np.array([[3, 0], [11, 3]])
    np.testing.assert_allclose(rows(table, ids, jnp.float32), table.dequantize()[ids], rtol=1e-6)


def test_a_model_computes_with_its_dequantized_matrices_and_is_restored_with_the_same_bits(
  tmp_path,
):
  m = tiny.model(d_model=64, d_ff=96)
  kept = quantized(m, "nf4")
  formats_ = {w.format.name for w in jax.tree.leaves(kept.params, is_leaf=_is) if _is(w)}
  assert formats_ == {"nf4", "int8"}  # The table of words; 96 inputs are no blocks of 64.
  plain = dataclasses.replace(m, params=dequantize_params(kept.params, jnp.float32))
  tokens = np.arange(24).reshape(2, 12)
  np.testing.assert_allclose(kept(tokens), plain(tokens), atol=2e-3)
  model.save(kept, tmp_path / "kept")
  back = model.load(tmp_path / "kept")
  assert jax.tree.structure(back.params) == jax.tree.structure(kept.params)
  jax.tree.map(np.testing.assert_array_equal, back.params, kept.params)
  with pytest.raises(InputError, match=r"'int8'.*nf4"):
    model.load(tmp_path / "kept", quantize="int8")
  with pytest.raises(InputError, match=r"quantized \(nf4\)"):
    model.save(kept, tmp_path / "theirs", format="hf")
  with pytest.raises(InputError, match="quantized already"):
    quantized(kept, "int8")
  model.save(m, tmp_path / "plain")
  straight = model.load(tmp_path / "plain", quantize="nf4")
  jax.tree.map(np.testing.assert_array_equal, straight.params, kept.params)
  assert resident_bytes(kept.params) == sum(a.nbytes for a in jax.tree.leaves(kept.params))
  assert "in nf4" in report(kept.params)


@pytest.mark.parametrize(
  ("name", "said"),
  [("int3", "int3.*int8, int4"), ("int4:7", "even"), ("int4:40", "40.*64 inputs"),
   ("nf4:3", "even"), ("nf4:40", "40.*64 inputs"), ("fp8:32", "fp8:32.*nf4:GROUP"),
   ("", "not known"), (8, "not known")],
)  # fmt: skip
def test_wrong_formats_are_refused(name, said):
  with pytest.raises(InputError, match=said):
    quantized(tiny.model(d_model=64), name)


def _is(leaf) -> bool:
  return isinstance(leaf, Quantized)
