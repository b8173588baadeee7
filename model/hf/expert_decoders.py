"""Decoders with mixtures of experts: Mixtral."""

from model.hf.decoders import DOWN, LLAMA_ROWS, UP, kv_heads, llama
from model.hf.engine import Row, under
from model.hf.family import Field
from model.hf.fields import Windows

EXPERT_ROWS = (  # Mixtral.
  *(row for row in LLAMA_ROWS if ".mlp." not in row.theirs),
  *under(
    "model.layers.{i}.block_sparse_moe", "decoder.layers.mlp",
    Row("gate.weight", "router.w", "e d -> d e"),
    Row("experts.{e}.w1.weight", "gate_proj.w", UP),
    Row("experts.{e}.w3.weight", "up_proj.w", UP),
    Row("experts.{e}.w2.weight", "down_proj.w", DOWN),
  ),
)  # fmt: skip
FAMILIES = (
  llama("mixtral", "Mixtral", kv_heads(8), Field("head_dim", "head_dim", None),
        Windows(always=True, default=None, suffix="+experts"),
        Field("rms_norm_eps", "norm_eps", 1e-5), Field("num_local_experts", "num_experts", 8),
        Field("num_experts_per_tok", "experts_per_token", 2),
        Field("router_aux_loss_coef", "balance_loss", 0.001), rows=EXPERT_ROWS,
        unread=("output_router_logits", "router_jitter_noise")),
)  # fmt: skip
