"""Latent attention: its absorbed form, its costs, its shards, and what it does not go with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.attention import Attention, Where
from model.cache import new_cache
from model.config import ModelConfig
from model.flops import matmul_params, model_flops
from model.heads import abstract, init_params
from model.layers import param_info
from model.positions import rotary_angles
from model.sharding import batch_sharding, make_mesh, shardings
from model.transformer import Inputs

CFG = ModelConfig(
  vocab_size=61, vocab_multiple=8, num_layers=2, d_model=16, d_ff=32, num_heads=4, head_dim=10,
  max_positions=32, kv_latent_dim=12, q_latent_dim=6, rope_head_dim=4, v_head_dim=8,
)  # fmt: skip


def test_a_cache_of_latents_gives_what_expanded_heads_give_and_holds_less():
  attn = Attention(CFG, CFG.layers("decoder")[0], rngs=nnx.Rngs(0))
  pos = jnp.broadcast_to(jnp.arange(9), (2, 9))
  x = jax.random.normal(jax.random.key(1), (2, 9, 16))
  where = Where(pos, None, rotary_angles(pos, CFG, local=False))
  want, _ = attn(x, where)
  cache = new_cache(CFG, 2, 9, stacked=False)[0].own
  got, cache = attn(x, where, cache=cache)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
  assert cache.k.shape == (2, 1, 9, 12 + 4) and not cache.v.size


def test_values_may_be_of_another_width_without_latents():
  plain = dict(kv_latent_dim=None, q_latent_dim=None, rope_head_dim=None, num_kv_heads=2)
  cfg = dataclasses.replace(CFG, **plain)
  net = abstract(cfg)
  shapes = nnx.to_pure_dict(nnx.state(net, nnx.Param))["decoder"]["layers"][0]["attn"]
  assert shapes["v_proj"]["w"].shape == (2, 16, 2, 8)
  assert shapes["o_proj"]["w"].shape == (2, 4, 8, 16)
  cache = new_cache(cfg, 3, 5, stacked=False)[0].own
  assert cache.k.shape == (3, 2, 5, 10) and cache.v.shape == (3, 2, 5, 8)


def test_flops_count_the_projections_and_both_widths():
  queries = 16 * 6 + 6 * 4 * 10
  keys_values = 16 * (12 + 4) + 12 * 4 * (6 + 8)
  layer = queries + keys_values + 4 * 8 * 16 + 3 * 16 * 32
  assert sum(matmul_params(CFG).values()) == 2 * layer + 16 * 61
  one = model_flops(CFG, dict(decoder=1, head=1), {"decoder.None": 1})
  assert one == 6 * (2 * layer + 16 * 61) + 2 * 6 * 4 * (10 + 8)


def test_eight_devices_equal_one():
  params = init_params(CFG, jax.random.key(0))
  graphdef = nnx.split(abstract(CFG), nnx.Param)[0]
  tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, 61)
  pos = jnp.broadcast_to(jnp.arange(12), (8, 12))

  @jax.jit
  def gradient(params, tokens, pos):
    total = lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p).hidden(Inputs(tokens, pos))[0]))
    return jax.value_and_grad(total)(params)

  want = gradient(params, tokens, pos)
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  axes = jax.tree.map(lambda info: info.axes, param_info(abstract(CFG)))
  placed = jax.device_put(params, shardings(params, axes, mesh))
  with jax.set_mesh(mesh):
    got = gradient(placed, *jax.device_put((tokens, pos), batch_sharding(mesh)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(kv_latent_dim=None), "q_latent_dim=6 has no effect"),
    (dict(rope_head_dim=None), "rope_head_dim=None"),
    (dict(rope_head_dim=10), "rope_head_dim=10"),
    (dict(rope_head_dim=3), "rotates 3"),
    (dict(rope_fraction=0.5), "rope_fraction=0.5"),
    (dict(positions="alibi"), "positions='alibi'"),
    (dict(qk_norm="head"), "qk_norm='head'"),
    (dict(num_kv_heads=2), "num_kv_heads=2"),
    (dict(shape="encoder_decoder"), "shape='encoder_decoder'"),
    (dict(v_head_dim=0), "v_head_dim=0"),
  ],
  ids=str,
)
def test_what_does_not_go_with_latents_is_refused_by_name(changes, said):
  with pytest.raises(ValueError, match=said):
    dataclasses.replace(CFG, **changes)
