"""Decoders with mixtures of experts: Mixtral, Qwen's and GPT-OSS."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.errors import InputError
from model.hf.decoders import (
  BIASES,
  DOWN,
  HEAD_DIM,
  LLAMA_ROWS,
  UP,
  answering,
  kv_heads,
  llama,
)
from model.hf.engine import Row, under
from model.hf.family import Always, Field
from model.hf.fields import Experts, LayerTypes, Windows
from model.hf.rotary_fields import Rotary


@dataclasses.dataclass(frozen=True)
class SharedWidth:
  """Width of a shared expert: a multiple of the others' (Qwen2-MoE)."""

  names = ("shared_expert_intermediate_size",)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    width, one = values.get(self.names[0], 5632), values.get("moe_intermediate_size") or 1408
    if width % one:
      raise InputError(
        f"config.json: {self.names[0]}={width} is no multiple of moe_intermediate_size={one}: "
        "such a shared expert is not supported."
      )
    return {"shared_experts": width // one}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return {self.names[0]: cfg.shared_experts * cfg.expert_width}


@dataclasses.dataclass(frozen=True)
class Packing:
  """How weights are packed: in MXFP4, which is read, or not at all, which is also written."""

  names = ("quantization_config",)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    method = (values.get(self.names[0]) or {}).get("quant_method", "mxfp4")
    if method != "mxfp4":
      raise InputError(f"config.json: weights in {method!r} are not read, only in 'mxfp4'.")
    return {}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return {}


COEFFICIENT = Field("router_aux_loss_coef", "balance_loss", 0.001)
UNREAD = ("output_router_logits", "router_jitter_noise")
NO_MLP = tuple(row for row in LLAMA_ROWS if ".mlp." not in row.theirs)
MIXTRAL_ROWS = (
  *NO_MLP,
  *under(
    "model.layers.{i}.block_sparse_moe", "decoder.layers.mlp",
    Row("gate.weight", "router.w", "e d -> d e"),
    Row("experts.{e}.w1.weight", "gate_proj.w", UP),
    Row("experts.{e}.w3.weight", "up_proj.w", UP),
    Row("experts.{e}.w2.weight", "down_proj.w", DOWN),
  ),
)  # fmt: skip
QWEN_ROWS = (  # Some layers have an MLP.
  *LLAMA_ROWS,
  *under(
    "model.layers.{i}.mlp", "decoder.layers.mlp",
    Row("gate.weight", "router.w", "e d -> d e"),
    Row("experts.{e}.gate_proj.weight", "gate_proj.w", UP),
    Row("experts.{e}.up_proj.weight", "up_proj.w", UP),
    Row("experts.{e}.down_proj.weight", "down_proj.w", DOWN),
    Row("shared_expert.gate_proj.weight", "shared.gate_proj.w", UP),
    Row("shared_expert.up_proj.weight", "shared.up_proj.w", UP),
    Row("shared_expert.down_proj.weight", "shared.down_proj.w", DOWN),
    Row("shared_expert_gate.weight", "shared_gate.w", "o d -> d o"),
  ),
)  # fmt: skip
GPT_OSS_ROWS = (  # A gate's columns and those of what it multiplies take turns.
  *NO_MLP,
  *under(
    "model.layers.{i}", "decoder.layers",
    Row("self_attn.sinks", "attn.sinks", "n -> n"),
    Row("mlp.router.weight", "mlp.router.w", "e d -> d e"),
    Row("mlp.router.bias", "mlp.router.b", "e -> e"),
    Row("mlp.experts.gate_up_proj", "mlp.{gate,up}_proj.w", "e d (f c) -> c e d f"),
    Row("mlp.experts.gate_up_proj_bias", "mlp.{gate,up}_proj.b", "e (f c) -> c e f"),
    Row("mlp.experts.down_proj", "mlp.down_proj.w", "e f d -> e f d"),
    Row("mlp.experts.down_proj_bias", "mlp.down_proj.b", "e d -> e d"),
  ),
)  # fmt: skip
# Files of Transformers 5 may hold the experts of a layer in one tensor.
MIXTRAL_STACKED = {
  "block_sparse_moe.experts.gate_up_proj": (
    "block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight",
  ),
  "block_sparse_moe.experts.down_proj": ("block_sparse_moe.experts.{e}.w2.weight",),
}  # fmt: skip
QWEN_STACKED = {
  "mlp.experts.gate_up_proj": (
    "mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight",
  ),
  "mlp.experts.down_proj": ("mlp.experts.{e}.down_proj.weight",),
}  # fmt: skip
QWEN = (
  Field("moe_intermediate_size", "d_expert"), Field("norm_topk_prob", "router_renormalize", False),
  COEFFICIENT,
)  # fmt: skip
YARN = dict(rope_type="yarn", factor=32.0, truncate=False, original_max_position_embeddings=4096)
FAMILIES = (
  llama("mixtral", answering("Mixtral", "model."), kv_heads(8), HEAD_DIM,
        Experts(Windows(always=True, default=None)), Field("rms_norm_eps", "norm_eps", 1e-5),
        Field("num_local_experts", "num_experts", 8, older="num_experts"),
        Field("num_experts_per_tok", "experts_per_token", 2), COEFFICIENT, rows=MIXTRAL_ROWS,
        unread=UNREAD, stacked=MIXTRAL_STACKED,
        renamed=((r"\.mlp\.(gate|experts)\.", r".block_sparse_moe.\1."),)),
  llama("qwen2_moe", answering("Qwen2Moe", "model."), kv_heads(16), HEAD_DIM,
        Field("qkv_bias", "attention_bias", True),
        Experts(Windows(always=False, local=lambda i, first: i % 2 == 0 and i < first),
                sparse=True),
        Field("num_experts", "num_experts", 60),
        Field("num_experts_per_tok", "experts_per_token", 4), SharedWidth(), *QWEN, rows=QWEN_ROWS,
        unread=UNREAD, stacked=QWEN_STACKED, shared_gate=True),
  llama("qwen3_moe", answering("Qwen3Moe"), kv_heads(4), HEAD_DIM, *BIASES,
        Experts(Windows(always=True, switch=True), sparse=True),
        Field("num_experts", "num_experts", 128, older="num_local_experts"),
        Field("num_experts_per_tok", "experts_per_token", 8), *QWEN, rows=QWEN_ROWS,
        unread=UNREAD, stacked=QWEN_STACKED, qk_norm="head"),
  llama("gpt_oss", "GptOss", kv_heads(8), Field("head_dim", "head_dim", 64),
        Field("attention_bias", "attention_bias", True),
        Field("attention_bias", "attention_out_bias", True), Always("hidden_act", "silu"),
        Rotary(theta=150_000.0, assumed=YARN), Field("rms_norm_eps", "norm_eps", 1e-5),
        Experts(LayerTypes(("sliding_window", 128), ("sliding_window_pattern", 2), 1)),
        Field("num_local_experts", "num_experts", 128, older="num_experts"),
        Field("num_experts_per_tok", "experts_per_token", 4), Always("swiglu_alpha", 1.702),
        Field("swiglu_limit", "gate_limit", 7.0), COEFFICIENT, Packing(), rows=GPT_OSS_ROWS,
        unread=(*UNREAD, "experts_per_token", "initial_context_length"), activation="quick_gelu",
        gate_offset=1.0, mlp_bias=True, router_bias=True, attention_sinks=True),
)  # fmt: skip
