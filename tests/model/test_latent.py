"""Latent attention: its absorbed form, its costs, its shards, and what it does not go with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import hf
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


@pytest.mark.parametrize(("tokens", "absorbed"), [(9, True), (20, False)])
def test_a_cache_of_latents_gives_what_expanded_heads_give_and_holds_less(tokens, absorbed):
  attn = Attention(CFG, CFG.layers("decoder")[0], rngs=nnx.Rngs(0))
  assert attn.kv_proj.absorbs(tokens) == absorbed
  pos = jnp.broadcast_to(jnp.arange(tokens), (2, tokens))
  x = jax.random.normal(jax.random.key(1), (2, tokens, 16))
  where = Where(pos, None, rotary_angles(pos, CFG, local=False))
  want, _ = attn(x, where)
  cache = new_cache(CFG, 2, tokens, stacked=False)[0].own
  got, cache = attn(x, where, cache=cache)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
  assert cache is not None and cache.k.shape == (2, 1, tokens, 12 + 4) and not cache.v.size


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


@pytest.mark.slow
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


YARN = dict(
  type="yarn", beta_fast=32, beta_slow=1, factor=40, original_max_position_embeddings=4096
)
PUBLISHED = {
  "V2-Lite": (
    dict(
      model_type="deepseek_v2", vocab_size=102_400, hidden_size=2048, intermediate_size=10_944,
      moe_intermediate_size=1408, num_hidden_layers=27, num_attention_heads=16,
      num_key_value_heads=16, first_k_dense_replace=1, n_routed_experts=64, n_shared_experts=2,
      num_experts_per_tok=6, n_group=1, topk_group=1, topk_method="greedy", norm_topk_prob=False,
      q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
      v_head_dim=128, max_position_embeddings=163_840, aux_loss_alpha=0.001, seq_aux=True,
      scoring_func="softmax", rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    15_706_484_224, 2.45e9,
  ),
  "V3": (
    dict(
      model_type="deepseek_v3", vocab_size=129_280, hidden_size=7168, intermediate_size=18_432,
      moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=128,
      num_key_value_heads=128, first_k_dense_replace=3, n_routed_experts=256, n_shared_experts=1,
      num_experts_per_tok=8, n_group=8, topk_group=4, topk_method="noaux_tc", norm_topk_prob=True,
      q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
      v_head_dim=128, max_position_embeddings=163_840, routed_scaling_factor=2.5, ep_size=1,
      moe_layer_freq=1, num_nextn_predict_layers=1, scoring_func="sigmoid",
      rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    671_026_419_200, 36.6e9,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_the_published_counts_and_survive(name):
  """Parameters, and those that a token is multiplied with; YaRN's factors cancel in the angles."""
  values, parameters, active = PUBLISHED[name]
  family = hf.FAMILIES[values["model_type"]]
  cfg = family.read(values)[1]
  assert cfg.num_params() == parameters
  assert sum(matmul_params(cfg).values()) == pytest.approx(active, rel=2e-3)
  power = 0.1 * values["rope_scaling"]["mscale"] * np.log(40) + 1
  assert cfg.attention_scale == pytest.approx(192**-0.5 * power**2)
  assert cfg.rope_attention_factor == 1.0
  assert family.read(family.write(cfg)[1])[1] == cfg
