"""Quantization-aware training learns what the quantized model is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import model as models
from model.errors import InputError
from model.heads import abstract, init_params
from model.layers import param_info
from model.quant import Format, quantize, rounded
from model.quant_tree import quantize_params
from model.trained import Model
from tests.train import tiny
from tests.train.test_sharding import MESHES, shape_run, text  # noqa: F401
from tests.train.test_step import close, gradient, params_of, run
from train.aware import Rounding
from train.config import Config, MeshConfig, QuantizeConfig
from train.program import build_program, make_loss, put_batch

WIDE = dataclasses.replace(
  tiny.ROTARY, num_layers=2, d_model=64, d_ff=128, head_dim=16, layer_pattern=("global",),
  window=None,
)  # fmt: skip


def aware(format, model=WIDE, **changes):
  start = changes.pop("start_step", 0)
  return tiny.config(model, quantize=QuantizeConfig(format=format, start_step=start), **changes)


@pytest.mark.parametrize("format", ["int8", "int4", "nf4", "fp8", "int8_dynamic", "fp8_dynamic", "int4:16"])
def test_what_is_trained_says_what_the_quantized_model_says(format):
  params, info = params_of(WIDE), param_info(abstract(WIDE))
  rounding, net = Rounding(Format.parse(format), info), abstract(WIDE)
  rounding.mark(net, params)
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, tiny.VOCAB)
  m = Model(WIDE, quantize_params(params, info, format))
  want = m(tokens)
  graphdef = nnx.split(net, nnx.Param)[0]
  other = Model(WIDE, rounding(params))
  other.__dict__["graphdef"] = graphdef
  np.testing.assert_allclose(other(tokens), want, rtol=0, atol=2e-5)
