"""Quantized matrices: what they keep, what is multiplied by them, and whole models of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import quant_formats as formats
from model.quant import product, quantize


def test_nf4_equals_bitsandbytes():
  functional = pytest.importorskip("bitsandbytes.functional")
  torch = pytest.importorskip("torch")
  table = functional.get_4bit_type("nf4", device="cpu")
  np.testing.assert_array_equal(formats.NF4, table.numpy())
  dynamic = functional.create_dynamic_map().numpy()
  np.testing.assert_allclose(formats.dynamic_values(), dynamic, rtol=1e-6)
  for seed, shape in enumerate([(96, 128), (576, 1536), (7, 64)]):
    w = np.random.default_rng(seed).standard_normal(shape, np.float32) * 0.02
    packed, state = functional.quantize_4bit(
      torch.from_numpy(w), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    want = functional.dequantize_4bit(packed, state).numpy()
    got = quantize(jnp.asarray(w), "nf4", table=True).dequantize()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "fp8"])
def test_product_is_that_of_the_dequantized_matrix(name):
  w = jax.random.normal(jax.random.key(0), (3, 4, 16, 8))  # Layers, two inputs, an output.
  kept = quantize(w, name, inputs=2, lead=1)
  assert kept.shape == w.shape and kept.dequantize().shape == w.shape
  one = jax.tree.map(lambda a: a[1], kept)
  for number in (1, 3, 40):
    x = jax.random.normal(jax.random.key(number), (number, 4, 16))
    want = jnp.tensordot(x, kept.dequantize()[1], 2)
    np.testing.assert_allclose(product(x, one), want, rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(product(x, one))))(x)
    plain = jax.grad(lambda x: jnp.sum(jnp.sin(jnp.tensordot(x, kept.dequantize()[1], 2))))(x)
    np.testing.assert_allclose(gradient, plain, rtol=1e-3, atol=1e-3)
