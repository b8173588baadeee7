"""Llama and its relatives."""

LLAMA = dict(
  vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
  num_key_value_heads=2, max_position_embeddings=640,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
CASES = {
  "llama": ("LlamaForCausalLM", LLAMA),
  "llama, tied, MHA, biases, scaled": (
    "LlamaForCausalLM",
    {**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 4, "attention_bias": True,
     "mlp_bias": True, "head_dim": 16, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
  ),
  "llama, YaRN": ("LlamaForCausalLM", {**LLAMA, "rope_parameters": {"rope_theta": 1e4, **YARN}}),
  "llama, labels": (
    "LlamaForSequenceClassification", {**LLAMA, "num_labels": 3, "pad_token_id": 0},
  ),
  "llama, body": ("LlamaModel", LLAMA),
  "mistral": ("MistralForCausalLM", {**LLAMA, "sliding_window": 16}),
  "mistral, no window": ("MistralForCausalLM", {**LLAMA, "sliding_window": None}),
  "qwen2": ("Qwen2ForCausalLM", LLAMA),
  "qwen2, windows": (
    "Qwen2ForCausalLM",
    {**LLAMA, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
  ),
  "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
  "phi3": ("Phi3ForCausalLM", {**LLAMA, "pad_token_id": 0}),
  "phi3, a part turns": (
    "Phi3ForCausalLM",
    {**LLAMA, "hidden_size": 64, "pad_token_id": 0, "sliding_window": 20,
     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
  ),
  "gemma": ("GemmaForCausalLM", {**LLAMA, "head_dim": 16}),
  "gemma2": (
    "Gemma2ForCausalLM",
    {**LLAMA, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 24,
     "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
  ),
  "gemma3_text": (
    "Gemma3ForCausalLM",
    {**LLAMA, "num_hidden_layers": 8, "head_dim": 16, "sliding_window": 16,
     "query_pre_attn_scalar": 16},
  ),
}  # fmt: skip
