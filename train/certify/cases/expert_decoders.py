"""Decoders with mixtures of experts."""

from train.certify.cases.decoders import LABELS, LLAMA, MHA, TIED, YARN

MIXTRAL = {**LLAMA, "num_local_experts": 4}
QWEN2 = {**LLAMA, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
         "shared_expert_intermediate_size": 40}  # fmt: skip
QWEN3 = {**LLAMA, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
         "head_dim": 16}  # fmt: skip
GPT_OSS = {**LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 16,
           "head_dim": 16, "swiglu_limit": 2.0}  # fmt: skip
CASES = {
  "mixtral": ("MixtralForCausalLM", MIXTRAL),
  "mixtral, tied, windows": (
    "MixtralForCausalLM",
    {**MIXTRAL, **TIED, **MHA, "sliding_window": 16, "head_dim": 16, "num_experts_per_tok": 3},
  ),
  "mixtral, labels": ("MixtralForSequenceClassification", {**MIXTRAL, **LABELS}),
  "mixtral, tokens": ("MixtralForTokenClassification", {**MIXTRAL, **LABELS}),
  "mixtral, spans": ("MixtralForQuestionAnswering", MIXTRAL),
  "mixtral, body": ("MixtralModel", MIXTRAL),
  "qwen2_moe": ("Qwen2MoeForCausalLM", {**QWEN2, "num_hidden_layers": 4, "mlp_only_layers": [1]}),
  "qwen2_moe, tied, windows, no biases": (
    "Qwen2MoeForCausalLM",
    {**QWEN2, **TIED, **MHA, "norm_topk_prob": True, "num_experts_per_tok": 3, "qkv_bias": False,
     "decoder_sparse_step": 2,
     "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 16,
     "max_window_layers": 3},
  ),
  "qwen2_moe, labels": ("Qwen2MoeForSequenceClassification", {**QWEN2, **LABELS}),
  "qwen2_moe, tokens": ("Qwen2MoeForTokenClassification", {**QWEN2, **LABELS}),
  "qwen2_moe, spans": ("Qwen2MoeForQuestionAnswering", QWEN2),
  "qwen2_moe, body": ("Qwen2MoeModel", QWEN2),
  "qwen3_moe": (
    "Qwen3MoeForCausalLM",
    {**QWEN3, "norm_topk_prob": True, "num_hidden_layers": 4, "mlp_only_layers": [0]},
  ),
  "qwen3_moe, tied, windows, biases": (
    "Qwen3MoeForCausalLM",
    {**QWEN3, **TIED, **MHA, "decoder_sparse_step": 2, "attention_bias": True,
     "use_sliding_window": True, "sliding_window": 16, **YARN},
  ),
  "qwen3_moe, labels": ("Qwen3MoeForSequenceClassification", {**QWEN3, **LABELS}),
  "qwen3_moe, tokens": ("Qwen3MoeForTokenClassification", {**QWEN3, **LABELS}),
  "qwen3_moe, spans": ("Qwen3MoeForQuestionAnswering", QWEN3),
  "qwen3_moe, body": ("Qwen3MoeModel", QWEN3),
  "gpt_oss": ("GptOssForCausalLM", GPT_OSS),
  "gpt_oss, tied, unscaled, no biases": (
    "GptOssForCausalLM",
    {**GPT_OSS, **TIED, **MHA, "attention_bias": False, "num_experts_per_tok": 3,
     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
  ),
  "gpt_oss, labels": ("GptOssForSequenceClassification", {**GPT_OSS, **LABELS}),
  "gpt_oss, tokens": ("GptOssForTokenClassification", {**GPT_OSS, **LABELS}),
  "gpt_oss, body": ("GptOssModel", GPT_OSS),
}  # fmt: skip
