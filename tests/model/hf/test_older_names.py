"""Folders as they were published, with older names of fields and tensors."""

import json
import re

import jax
import numpy as np
import pytest

import model
from model.config import ModelConfig
from model.errors import InputError
from model.heads import init_params
from model.hf import FAMILIES
from model.hf.engine import Layout
from model.hf.safetensors_files import open_folder, write_folder

SUMMARY = dict(summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True,
               summary_type="cls_index", summary_use_proj=True)  # fmt: skip
FALCON = dict(
  model_type="falcon", apply_residual_connection_post_layernorm=False, attention_dropout=0.0,
  bos_token_id=11, hidden_dropout=0.0, initializer_range=0.02, layer_norm_epsilon=1e-5,
  torch_dtype="bfloat16", vocab_size=65_024,
)  # fmt: skip
STABLELM = dict(
  model_type="stablelm", hidden_act="silu", initializer_range=0.02, layer_norm_eps=1e-5,
  max_position_embeddings=4096, num_attention_heads=32, partial_rotary_factor=0.25,
  rope_theta=10_000, tie_word_embeddings=False, use_cache=True, use_qkv_bias=False,
)  # fmt: skip
PUBLISHED = {  # config.json, and how many parameters such a model has.
  "pythia-70m": (
    dict(model_type="gpt_neox", hidden_act="gelu", hidden_size=512, intermediate_size=2048,
         layer_norm_eps=1e-5, max_position_embeddings=2048, num_attention_heads=8,
         num_hidden_layers=6, rotary_emb_base=10_000, rotary_pct=0.25, tie_word_embeddings=False,
         use_parallel_residual=True, vocab_size=50_304),
    70_426_624,
  ),
  "opt-125m": (
    dict(model_type="opt", _remove_final_layer_norm=False, activation_dropout=0.0,
         activation_function="relu", attention_dropout=0.0, do_layer_norm_before=True, dropout=0.1,
         ffn_dim=3072, hidden_size=768, init_std=0.02, layerdrop=0.0, max_position_embeddings=2048,
         num_attention_heads=12, num_hidden_layers=12, pad_token_id=1, prefix="</s>",
         vocab_size=50_272, word_embed_proj_dim=768),
    125_239_296,
  ),
  "gpt-j-6b": (
    dict(model_type="gptj", activation_function="gelu_new", attn_pdrop=0.0, embd_pdrop=0.0,
         gradient_checkpointing=False, layer_norm_epsilon=1e-5, n_embd=4096, n_head=16,
         n_inner=None, n_layer=28, n_positions=2048, resid_pdrop=0.0, rotary=True, rotary_dim=64,
         scale_attn_weights=True, tie_word_embeddings=False, vocab_size=50_400, **SUMMARY),
    6_050_882_784,
  ),
  "gpt-neo-125m": (
    dict(model_type="gpt_neo", activation_function="gelu_new", attention_dropout=0,
         attention_layers=["global", "local"] * 6, attention_types=[[["global", "local"], 6]],
         embed_dropout=0, hidden_size=768, intermediate_size=None, layer_norm_epsilon=1e-5,
         max_position_embeddings=2048, num_heads=12, num_layers=12, resid_dropout=0,
         vocab_size=50_257, window_size=256, **SUMMARY),
    125_198_592,
  ),
  "phi-2": (
    dict(model_type="phi", attention_dropout=0.0, embd_pdrop=0.0, hidden_act="gelu_new",
         hidden_size=2560, intermediate_size=10_240, layer_norm_eps=1e-5, num_attention_heads=32,
         max_position_embeddings=2048, num_hidden_layers=32, num_key_value_heads=32,
         partial_rotary_factor=0.4, qk_layernorm=False, resid_pdrop=0.1, rope_scaling=None,
         rope_theta=10_000.0, tie_word_embeddings=False, vocab_size=51_200),
    2_779_683_840,
  ),
  "stablelm-3b": (
    dict(**STABLELM, hidden_size=2560, intermediate_size=6912, num_hidden_layers=32,
         num_key_value_heads=32, vocab_size=50_304),
    2_795_443_200,
  ),
  "stablelm-2-12b": (
    dict(**STABLELM, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40,
         num_key_value_heads=8, qk_layernorm=True, use_parallel_residual=True, rope_scaling=None,
         vocab_size=100_352),
    12_143_185_920,
  ),
  "bloom-560m": (
    dict(model_type="bloom", apply_residual_connection_post_layernorm=False, n_embed=1024,
         attention_dropout=0.0, attention_softmax_in_fp32=True, bias_dropout_fusion=True,
         hidden_dropout=0.0, layer_norm_epsilon=1e-5, masked_softmax_fusion=True, n_inner=None,
         n_layer=24, num_attention_heads=16, offset_alibi=100, pretraining_tp=1, seq_length=2048,
         skip_bias_add=True, skip_bias_add_qkv=False, vocab_size=250_880),
    559_214_592,
  ),
  "falcon-7b": (
    dict(**FALCON, alibi=False, bias=False, hidden_size=4544, multi_query=True, parallel_attn=True,
         new_decoder_architecture=False, num_attention_heads=71, num_hidden_layers=32),
    6_921_720_704,
  ),
  "falcon-40b": (
    dict(**FALCON, alibi=False, bias=False, hidden_size=8192, new_decoder_architecture=True,
         num_attention_heads=128, num_hidden_layers=60, num_kv_heads=8, parallel_attn=True),
    41_303_293_952,
  ),
  "falcon-rw-1b": (
    {**FALCON, "alibi": True, "bias": True, "hidden_size": 2048, "multi_query": False,
     "new_decoder_architecture": False, "num_attention_heads": 32, "num_hidden_layers": 24,
     "parallel_attn": False, "vocab_size": 50_304},
    1_311_625_216,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_and_has_its_parameters(name):
  values, parameters = PUBLISHED[name]
  family = FAMILIES[values["model_type"]]
  kind, cfg = family.read(values)
  assert cfg.num_params() == parameters
  Layout(cfg, family.table(kind), kind)
  assert family.read(family.write(cfg)[1]) == (kind, cfg)


REFUSED = {
  "factored embeddings": ("opt-125m", dict(word_embed_proj_dim=512), "word_embed_proj_dim"),
  "no width": ("gpt-j-6b", dict(rotary_dim=512), "rotary_dim=512 must be"),
  "other layers": ("gpt-neo-125m", dict(num_layers=24), "name 12 layers"),
  "no runs": ("gpt-neo-125m", dict(attention_types="local"), "must be"),
  "an odd kind": ("gpt-neo-125m", dict(attention_types=[[["far"], 12]], attention_layers=None),
                  "'far' are not known"),
  "two names": ("bloom-560m", dict(hidden_size=512), "differ, and mean the same"),
  "two bases": ("pythia-70m", dict(rope_theta=5e4), "differ, and mean the same"),
  "old and serial": ("falcon-40b", dict(parallel_attn=False), "is no Falcon"),
  "shared in groups": ("falcon-rw-1b", dict(num_kv_heads=4), "needs new_decoder_architecture"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_contradicts_itself_is_refused(name):
  published, changes, said = REFUSED[name]
  values = PUBLISHED[published][0] | changes
  with pytest.raises(InputError, match=re.escape(said)):
    FAMILIES[values["model_type"]].read(values)


SMALL = ModelConfig(
  vocab_size=128, num_layers=2, d_model=16, d_ff=64, num_heads=2, max_positions=64, norm="layer",
  gated=False, mlp_bias=True, attention_bias=True, attention_out_bias=True, activation="gelu_tanh",
)  # fmt: skip
OLD_NAMES = {  # Settings of a model, what its tensors are called now and then, and more of them.
  "bloom": (dict(positions="alibi", max_positions=None, embed_norm=True), (r"^transformer\.", ""),
            {}),
  "gpt_neox": (
    dict(tie_embeddings=False), (r"^lm_head\.", "embed_out."),
    {"gpt_neox.layers.0.attention.masked_bias": (),
     "gpt_neox.layers.1.attention.bias": (1, 1, 9, 9),
     "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (4,)},
  ),
  "gpt2": (dict(positions="learned"), (r"^transformer\.", ""), {"h.0.attn.bias": (1, 1, 9, 9)}),
  "opt": (dict(positions="learned", position_offset=2), (r"^model\.", ""),
          {"decoder.version": (1,)}),
}  # fmt: skip


@pytest.mark.parametrize("family", OLD_NAMES)
def test_tensors_are_read_under_the_names_that_they_had(family, tmp_path):
  settings, (now, then), more = OLD_NAMES[family]
  cfg = ModelConfig(**{**SMALL.to_dict(), **settings})
  m = model.Model(cfg, init_params(cfg, jax.random.key(0)))
  model.save(m, tmp_path, format="hf", family=family)
  tensors = {re.sub(now, then, n): np.array(a) for n, a in open_folder(tmp_path).items()}
  tensors |= {name: np.ones(shape, np.float32) for name, shape in more.items()}
  write_folder(tmp_path, {n: (a.dtype, a.shape) for n, a in tensors.items()}, tensors.items())
  again = model.load(tmp_path)
  assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
  for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(m.params), strict=True):
    np.testing.assert_array_equal(a, b)
