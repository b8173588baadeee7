"""What a CPU does otherwise: few rows times a quantized matrix, layers as views of their stack."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.compilation import FewRows
from model.heads import abstract
from model.layers import param_info
from model.quant import product, quantize
from model.quant_tree import quantize_params
from tests.infer import tiny


@pytest.mark.parametrize(
  "name, rows", [("int8", 1), ("int4", 1), ("nf4", 1), ("fp8", 1), ("int8", 16), ("int4", 8)]
)
def test_few_rows_are_multiplied_by_the_dequantized_matrix_in_a_compiled_loop(name, rows):
  w = quantize(jax.random.normal(jax.random.key(0), (64, 48)), name)
  x = jax.random.normal(jax.random.key(1), (rows, 64)).at[0, 3].set(0.0)

  @FewRows
  def steps(x, w):
    return jax.lax.fori_loop(0, 3, lambda i, x: product(x, w)[:, :1] * 0.1 + x, x)

  want = np.asarray(x, np.float64)
  for _ in range(3):
    want = (want @ np.asarray(w.dequantize(), np.float64))[:, :1] * 0.1 + want
  np.testing.assert_allclose(steps(x, w), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_few_rows_in_float8_are_those_of_the_rounded_matrix_and_rows(rows):
  w = quantize(jax.random.normal(jax.random.key(0), (64, 16)), "fp8_dynamic")
  x = jax.random.normal(jax.random.key(1), (rows, 64)) * 7
  scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(448)
  small = np.asarray((x / scale).astype(jnp.float8_e4m3fn), np.float64)
  want = small @ np.asarray(w.values, np.float64).T * scale * np.asarray(w.scales, np.float64)
  np.testing.assert_allclose(FewRows(product)(x, w), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_rounded_rows_are_multiplied_exactly_as_whole_numbers(rows):
  w = quantize(jax.random.normal(jax.random.key(0), (3072, 16)), "int8_dynamic")
  x = jax.random.normal(jax.random.key(1), (rows, 3072)) * 7
  x = x.at[0].set(127.0).at[rows - 1, 5].set(0.0)
  scale = (np.abs(x).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float32)
  whole = np.round(np.asarray(x / scale)).astype(np.int64) @ np.asarray(w.values, np.int64).T
  want = whole.astype(np.float32) * scale * np.asarray(w.scales)
  np.testing.assert_allclose(FewRows(product)(x, w), want, rtol=1e-6)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_what_is_no_number_and_rows_of_zeros_pass_through_few_rows(name):
  w = quantize(jax.random.normal(jax.random.key(0), (64, 8)), name)
  x = jnp.zeros((3, 64)).at[1, 2].set(jnp.nan).at[2, 2].set(jnp.inf)
  y = np.asarray(product(x, w))
  assert (y[0] == 0).all() and np.isnan(y[1]).all() and not np.isfinite(y[2]).any()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_layers_of_quantized_stacks_are_views(name):
  m = tiny.model(num_layers=4, d_model=64, d_ff=128, head_dim=16)
  params = quantize_params(m.params, param_info(abstract(m.config)), name)
  layers = dataclasses.replace(m, params=params).unstacked()[1]["decoder"]["layers"]
  stacks = params["decoder"]["layers"]
  for i in range(4):  # A window and none in turns: two stacks.
    whole = stacks[i % 2]["mlp"]["up_proj"]["w"].values
    own = layers[i]["mlp"]["up_proj"]["w"].values
    assert own.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer() + i // 2 * own.nbytes
    np.testing.assert_array_equal(own, whole[i // 2])
