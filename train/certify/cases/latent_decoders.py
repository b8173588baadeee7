"""Decoders with latent attention."""

DEEPSEEK = dict(
  vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=20,
  num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=20,
  q_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=14,
  max_position_embeddings=640, first_k_dense_replace=1, n_routed_experts=8,
  num_experts_per_tok=3, n_shared_experts=2,
)  # fmt: skip
GROUPS = dict(n_group=4, topk_group=2)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=40.0, mscale=0.8, mscale_all_dim=0.707,
            original_max_position_embeddings=64)  # fmt: skip
CASES = {
  "deepseek_v3": ("DeepseekV3ForCausalLM", {**DEEPSEEK, **GROUPS, "rope_parameters": YARN}),
  "deepseek_v3, no groups, queries of no latent, halves turn": (
    "DeepseekV3ForCausalLM",
    {**DEEPSEEK, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "rope_interleave": False,
     "norm_topk_prob": False, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
  ),
  "deepseek_v3, biases, experts in all layers": (
    "DeepseekV3ForCausalLM",
    {**DEEPSEEK, **GROUPS, "attention_bias": True, "first_k_dense_replace": 0,
     "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
  ),
  "deepseek_v3, labels": (
    "DeepseekV3ForSequenceClassification",
    {**DEEPSEEK, **GROUPS, "num_labels": 3, "pad_token_id": 0},
  ),
  "deepseek_v3, tokens": (
    "DeepseekV3ForTokenClassification", {**DEEPSEEK, **GROUPS, "num_labels": 3},
  ),
  "deepseek_v3, body": ("DeepseekV3Model", {**DEEPSEEK, **GROUPS}),
  "deepseek_v2": (
    "DeepseekV2ForCausalLM",
    {**DEEPSEEK, **GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
     "rope_parameters": {**YARN, "mscale": 0.707}},
  ),
  "deepseek_v2, greedy, queries of no latent": (
    "DeepseekV2ForCausalLM", {**DEEPSEEK, "q_lora_rank": None, "attention_bias": True},
  ),
  "deepseek_v2, all dense": (
    "DeepseekV2ForCausalLM", {**DEEPSEEK, "first_k_dense_replace": 3},
  ),
  "deepseek_v2, labels": (
    "DeepseekV2ForSequenceClassification", {**DEEPSEEK, "num_labels": 3, "pad_token_id": 0},
  ),
  "deepseek_v2, body": ("DeepseekV2Model", DEEPSEEK),
}  # fmt: skip
