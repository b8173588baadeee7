"""Folders as they are published: fields of older and newer versions, experts in one tensor, packed
weights, and texts that outgrow a length at which positions turn otherwise.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

import infer
import model
from model import hf
from model.config import ModelConfig
from model.errors import InputError
from model.heads import init_params
from model.hf.safetensors_files import SINGLE, open_folder, write_folder
from train.certify.cases import CASES

# config.json of each, and how many parameters it has.
PUBLISHED = {
  "Llama-3.1-8B": (
    dict(
      architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
      bos_token_id=128000, eos_token_id=128001, hidden_act="silu", hidden_size=4096,
      initializer_range=0.02, intermediate_size=14336, max_position_embeddings=131072,
      mlp_bias=False, model_type="llama", num_attention_heads=32, num_hidden_layers=32,
      num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05,
      rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                        original_max_position_embeddings=8192, rope_type="llama3"),
      rope_theta=500000.0, tie_word_embeddings=False, torch_dtype="bfloat16",
      transformers_version="4.43.0.dev0", use_cache=True, vocab_size=128256,
    ),
    8_030_261_248,
  ),
  "SmolLM2-135M-Instruct": (
    {
      "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
      "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
      "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
      "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
      "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
      "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    134_515_008,
  ),
  "Phi-4-mini-instruct": (
    dict(
      architectures=["Phi3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
      embd_pdrop=0.0, full_attn_mod=1, hidden_act="silu", hidden_size=3072,
      auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, intermediate_size=8192,
      interpolate_factor=1, lm_head_bias=False, max_position_embeddings=131072, mlp_bias=False,
      model_type="phi3", num_attention_heads=24, num_hidden_layers=32, num_key_value_heads=8,
      original_max_position_embeddings=4096, partial_rotary_factor=0.75, resid_pdrop=0.0,
      rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=262144, tie_word_embeddings=True,
      rope_scaling=dict(type="longrope", short_factor=[1.0] * 48, long_factor=[2.0] * 48),
      torch_dtype="bfloat16", vocab_size=200064,
    ),
    3_836_021_760,
  ),
  "SmolLM3-3B": (
    dict(
      architectures=["SmolLM3ForCausalLM"], attention_bias=False, hidden_act="silu",
      hidden_size=2048, intermediate_size=11008, layer_types=["full_attention"] * 36,
      max_position_embeddings=65536, max_window_layers=28, mlp_bias=False, model_type="smollm3",
      no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, num_attention_heads=16,
      num_hidden_layers=36, num_key_value_heads=4, pretraining_tp=2, rms_norm_eps=1e-06,
      rope_scaling=None, rope_theta=5000000.0, sliding_window=None, use_sliding_window=False,
      vocab_size=128256,
    ),
    3_075_098_624,
  ),
  "gemma-3-1b-it": (
    dict(
      architectures=["Gemma3ForCausalLM"], attention_bias=False, attn_logit_softcapping=None,
      cache_implementation="hybrid", eos_token_id=[1, 106], final_logit_softcapping=None,
      head_dim=256, hidden_activation="gelu_pytorch_tanh", hidden_size=1152,
      intermediate_size=6912, max_position_embeddings=32768, model_type="gemma3_text",
      num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1,
      query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_local_base_freq=10000,
      rope_scaling=None, rope_theta=1000000, sliding_window=512, sliding_window_pattern=6,
      vocab_size=262144,
    ),
    999_885_952,
  ),
  "Qwen3-30B-A3B": (
    dict(
      architectures=["Qwen3MoeForCausalLM"], attention_bias=False, decoder_sparse_step=1,
      head_dim=128, hidden_act="silu", hidden_size=2048, intermediate_size=6144,
      max_position_embeddings=40960, max_window_layers=48, mlp_only_layers=[],
      model_type="qwen3_moe", moe_intermediate_size=768, norm_topk_prob=True,
      num_attention_heads=32, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48,
      num_key_value_heads=4, output_router_logits=False, rms_norm_eps=1e-06, rope_scaling=None,
      rope_theta=1000000.0, router_aux_loss_coef=0.001, sliding_window=None,
      tie_word_embeddings=False, use_sliding_window=False, vocab_size=151936,
    ),
    30_532_122_624,
  ),
  "Qwen1.5-MoE-A2.7B": (
    dict(
      architectures=["Qwen2MoeForCausalLM"], decoder_sparse_step=1, hidden_act="silu",
      hidden_size=2048, intermediate_size=5632, max_position_embeddings=8192,
      max_window_layers=21, model_type="qwen2_moe", moe_intermediate_size=1408,
      norm_topk_prob=False, num_attention_heads=16, num_experts=60, num_experts_per_tok=4,
      num_hidden_layers=24, num_key_value_heads=16, output_router_logits=False, rms_norm_eps=1e-06,
      rope_theta=1000000.0, router_aux_loss_coef=0.001, shared_expert_intermediate_size=5632,
      sliding_window=32768, tie_word_embeddings=False, use_sliding_window=False,
      vocab_size=151936,
    ),
    14_315_784_192,
  ),
  "gpt-oss-20b": (
    dict(
      architectures=["GptOssForCausalLM"], attention_bias=True, experts_per_token=4, head_dim=64,
      hidden_act="silu", hidden_size=2880, initial_context_length=4096, intermediate_size=2880,
      layer_types=["sliding_attention", "full_attention"] * 12, max_position_embeddings=131072,
      model_type="gpt_oss", num_attention_heads=64, num_experts_per_tok=4, num_hidden_layers=24,
      num_key_value_heads=8, num_local_experts=32, output_router_logits=False,
      quantization_config=dict(modules_to_not_convert=["lm_head"], quant_method="mxfp4"),
      rms_norm_eps=1e-05, rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=128,
      rope_scaling=dict(beta_fast=32.0, beta_slow=1.0, factor=32.0, rope_type="yarn",
                        original_max_position_embeddings=4096, truncate=False),
      swiglu_limit=7.0, tie_word_embeddings=False, vocab_size=201088,
    ),
    20_914_757_184,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_whole_and_has_the_published_parameter_count(name):
  values, count = PUBLISHED[name]
  family = hf.FAMILIES[values["model_type"]]
  kind, cfg = family.read(values)
  assert cfg.num_params() == count
  again, written = family.write(cfg)
  assert again == kind
  same = family.read(json.loads(json.dumps(written)))[1]
  assert dataclasses.replace(same, head_dim=cfg.head_dim) == cfg
  assert same.head_width == cfg.head_width


def test_scalings_of_published_folders_are_read_by_their_older_names():
  read = lambda family, **fields: hf.FAMILIES[family].read(
    {**SIZES, "model_type": family, **fields}
  )[1]
  linear = read("llama", rope_scaling=dict(type="linear", factor=2.0))
  assert (linear.rope_scaling, linear.rope_factor) == ("linear", 2.0)
  dynamic = read("llama", rope_scaling=dict(type="dynamic", factor=4.0))
  assert (dynamic.rope_original_positions, dynamic.max_positions) == (64, 256)
  factors = dict(short_factor=[1.0, 1, 1, 1], long_factor=[1.0, 2, 3, 4])
  for kind in ("su", "longrope", "yarn"):  # Phi-3 had one scaling under three names.
    long = read(
      "phi3", rope_scaling=dict(type=kind, **factors), original_max_position_embeddings=16,
      max_position_embeddings=64,
    )  # fmt: skip
    assert (long.rope_scaling, long.rope_factor, long.rope_original_positions) == (
      "longrope", 4.0, 16,
    )  # fmt: skip
  with pytest.raises(InputError, match="has no effect"):
    read("llama", rope_scaling=dict(
      type="dynamic", factor=4.0, original_max_position_embeddings=32))  # fmt: skip
  with pytest.raises(InputError, match="quant"):
    read("llama", quantization_config=dict(quant_method="mxfp4"))
  with pytest.raises(InputError, match="'awq'"):
    read("gpt_oss", quantization_config=dict(quant_method="awq"))


@pytest.mark.parametrize(
  ("family", "fields"),
  [
    ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))),
    ("llama", dict(rope_theta=5e4, rope_parameters=dict(rope_type="default", rope_theta=5e4))),
    ("llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0))),
    ("gemma3_text", dict(rope_parameters=dict(
      full_attention=dict(rope_type="default", rope_theta=3e6),
      sliding_attention=dict(rope_type="default", rope_theta=1e4)))),
  ],
)  # fmt: skip
def test_of_two_scalings_the_one_counts_that_counts_in_transformers(family, fields):
  transformers = pytest.importorskip("transformers")
  both = {**fields, "rope_scaling": dict(rope_type="linear", factor=4.0)}
  theirs = transformers.AutoConfig.for_model(family, **SIZES, **json.loads(json.dumps(both)))
  read = lambda **told: hf.FAMILIES[family].read({**SIZES, "model_type": family, **told})[1]
  assert read(**both).rope_factor == 4.0
  assert read(**both) == read(rope_parameters=theirs.rope_parameters)


def test_a_base_that_transformers_would_not_see_is_refused():
  lost = dict(rope_parameters=dict(rope_theta=5e4), rope_scaling=dict(type="linear", factor=4.0))
  with pytest.raises(InputError, match=r"rope_theta=50000.0, and with rope_scaling"):
    hf.FAMILIES["llama"].read({**SIZES, "model_type": "llama", **lost})


def test_modernbert_scales_both_kinds_of_layers_or_global_ones_by_type():
  family, scaled = hf.FAMILIES["modernbert"], dict(rope_type="linear", factor=4.0)
  sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
  with pytest.raises(InputError, match="local layers can have no scaling"):
    family.read({**sizes, "rope_scaling": scaled})
  cfg = family.read({**sizes, "rope_parameters": {"full_attention": scaled}})[1]
  assert family.read(family.write(cfg)[1])[1] == cfg


SIZES = dict(
  vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def random_model(case: str):
  """A model of Transformers with norms that are not one."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  name, settings = CASES[case]
  kind = getattr(transformers, name)
  torch.manual_seed(0)
  theirs = kind(kind.config_class(**settings, attn_implementation="eager")).eval()
  with torch.no_grad():
    for p in theirs.parameters():
      torch.nn.init.normal_(p, std=0.2)
  return theirs


def equal_params(one, other) -> None:
  a, b = jax.tree.leaves_with_path(one.params), jax.tree.leaves(other.params)
  for (path, x), y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
def test_experts_are_read_from_one_tensor_or_from_many(case, tmp_path):
  theirs = random_model(case)
  theirs.save_pretrained(tmp_path / "many")
  theirs.save_pretrained(tmp_path / "one", save_original_format=False)
  names = [set(open_folder(tmp_path / folder)) for folder in ("many", "one")]
  assert any("experts.gate_up_proj" in name for name in names[1] - names[0])
  equal_params(model.load(tmp_path / "one"), model.load(tmp_path / "many"))


def test_packed_weights_of_gpt_oss_are_those_that_transformers_unpacks(tmp_path):
  torch = pytest.importorskip("torch")
  packing = pytest.importorskip("transformers.integrations.mxfp4")
  family = hf.FAMILIES["gpt_oss"]
  cfg = family.read({**SIZES, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2})[1]
  plain = model.Model(cfg, init_params(cfg, jax.random.key(0)))
  model.save(plain, tmp_path / "packed", format="hf", family="gpt_oss")
  rng, tensors, want = np.random.default_rng(0), {}, {}
  for name, array in open_folder(tmp_path / "packed").items():
    tensors[name] = np.array(array)
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
      E, I, O = tensors.pop(name).shape  # noqa: E741
      blocks = rng.integers(0, 256, (E, O, I // 32, 16)).astype(np.uint8)
      scales = rng.integers(110, 130, (E, O, I // 32)).astype(np.uint8)
      tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
      want[name] = packing.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
  shapes = {name: (array.dtype, array.shape) for name, array in tensors.items()}
  write_folder(tmp_path / "packed", shapes, tensors.items())
  path = tmp_path / "packed" / "config.json"
  values = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
  path.write_text(json.dumps(values))
  model.save(model.load(tmp_path / "packed"), tmp_path / "back", format="hf")
  assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
  back = open_folder(tmp_path / "back")
  for name, tensor in want.items():
    np.testing.assert_array_equal(back[name].astype(np.float32), tensor.float().numpy())
  whole = next(name for name in tensors if name.endswith("_scales"))
  del tensors[whole]
  (tmp_path / "packed" / SINGLE).unlink()
  write_folder(tmp_path / "packed", {n: shapes[n] for n in tensors}, tensors.items())
  with pytest.raises(InputError, match="in MXFP4 needs bytes"):
    model.load(tmp_path / "packed")


@pytest.mark.parametrize("case", ["phi3", "gpt_oss"])
def test_greedy_decoding_equals_theirs_also_past_the_length_of_longrope(case, tmp_path):
  theirs = random_model(case)
  import torch

  theirs.save_pretrained(tmp_path)
  theirs.generation_config.eos_token_id = None
  rng = np.random.default_rng(0)
  prompts = [rng.integers(5, 97, n).tolist() for n in (58, 20, 64, 70)]  # Phi-3's length is 64.
  got = infer.generate(model.load(tmp_path), prompts, max_new_tokens=12)
  for prompt, ours in zip(prompts, got, strict=True):
    tokens = torch.tensor([prompt])
    want = theirs.generate(tokens, attention_mask=tokens * 0 + 1, do_sample=False,
                           max_new_tokens=12)[0, len(prompt) :].tolist()  # fmt: skip
    assert ours.tokens == want, len(prompt)


@pytest.mark.slow
def test_what_longrope_computes_of_a_growing_text_is_what_a_whole_pass_does():
  cfg = ModelConfig(
    vocab_size=97, num_layers=2, d_model=16, d_ff=16, num_heads=2, max_positions=64,
    layer_pattern=("local", "global"), window=6, rope_scaling="longrope",
    rope_original_positions=12, rope_factor=2.0, rope_short_factors=(1.0, 1.1, 1.2, 1.3),
    rope_long_factors=(2.0, 3.0, 4.0, 5.0), init_std=0.3,
  )  # fmt: skip
  m = model.Model(cfg, init_params(cfg, jax.random.key(0)))
  prompts = [list(range(5, 14)), list(range(20, 23)), list(range(40, 60))]
  for prompt, ours in zip(prompts, infer.generate(m, prompts, max_new_tokens=10), strict=True):
    text = list(prompt)
    for token in ours.tokens:
      padded, n = np.zeros((1, 32), np.int32), len(text)
      padded[0, :n] = text
      scores = m(padded, segments=(np.arange(32) < n)[None].astype(np.int32))
      assert int(np.argmax(scores[0, n - 1])) == token, n
      text.append(token)
