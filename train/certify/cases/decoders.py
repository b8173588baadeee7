"""Llama and its relatives."""

LLAMA = dict(
  vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
  num_key_value_heads=2, max_position_embeddings=640,
)  # fmt: skip
PHI3 = {**LLAMA, "pad_token_id": 0}
GEMMA = {**LLAMA, "head_dim": 16}
GEMMA2 = {**GEMMA, "sliding_window": 16, "query_pre_attn_scalar": 24}
GEMMA3 = {**GEMMA, "num_hidden_layers": 8, "sliding_window": 16, "query_pre_attn_scalar": 16}
LABELS = dict(num_labels=3, pad_token_id=0)
BIASES = dict(attention_bias=True, mlp_bias=True)
MHA, MQA = dict(num_key_value_heads=4), dict(num_key_value_heads=1)
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
WINDOWS = dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)


def turned(kind: str, theta: float = 1e4, **scaling) -> dict:
  """Rotary positions of a type."""
  return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


LINEAR = turned("linear", factor=2.5)
# One of the texts is longer than what dynamic scaling begins behind.
DYNAMIC = {"max_position_embeddings": 320, **turned("dynamic", factor=2.0)}
LLAMA3 = turned("llama3", 5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64)  # fmt: skip
YARN = turned("yarn", factor=4.0, original_max_position_embeddings=64)
YARN_ALL = turned(
  "yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0,
  attention_factor=1.3, truncate=False,
)  # fmt: skip
LONGROPE = turned("longrope", short_factor=[1.0, 1.1, 1.5, 2.0], long_factor=[1.0, 2.0, 5.0, 9.0])
PART = turned(  # Of 16 elements of a head 12 turn, as in Phi-4-mini.
  "longrope", partial_rotary_factor=0.75, short_factor=[1.0, 1.0, 1.1, 1.2, 1.5, 2.0],
  long_factor=[1.0, 1.5, 2.0, 4.0, 7.0, 9.0],
)  # fmt: skip
CASES = {
  "llama": ("LlamaForCausalLM", LLAMA),
  "llama, tied, MHA, biases, scaled": (
    "LlamaForCausalLM", {**LLAMA, **TIED, **MHA, **BIASES, "head_dim": 16, **LLAMA3},
  ),
  "llama, MQA": ("LlamaForCausalLM", {**LLAMA, **MQA, "hidden_act": "gelu"}),
  "llama, linear": ("LlamaForCausalLM", {**LLAMA, **LINEAR}),
  "llama, dynamic": ("LlamaForCausalLM", {**LLAMA, **DYNAMIC}),
  "llama, YaRN": ("LlamaForCausalLM", {**LLAMA, **YARN}),
  "llama, all of YaRN": ("LlamaForCausalLM", {**LLAMA, **YARN_ALL}),
  "llama, LongRoPE": (
    "LlamaForCausalLM",
    {**LLAMA, **turned("longrope", **{**LONGROPE["rope_parameters"], "factor": 3.0,
                                      "original_max_position_embeddings": 64})},
  ),
  "llama, labels": ("LlamaForSequenceClassification", {**LLAMA, **LABELS}),
  "llama, tokens": ("LlamaForTokenClassification", {**LLAMA, **LABELS}),
  "llama, spans": ("LlamaForQuestionAnswering", LLAMA),
  "llama, body": ("LlamaModel", LLAMA),
  "mistral": ("MistralForCausalLM", {**LLAMA, "sliding_window": 16}),
  "mistral, no window": ("MistralForCausalLM", {**LLAMA, "sliding_window": None}),
  "mistral, tied, wide heads": (
    "MistralForCausalLM", {**LLAMA, **TIED, "head_dim": 16, "sliding_window": 16, **YARN},
  ),
  "mistral, labels": ("MistralForSequenceClassification", {**LLAMA, **LABELS}),
  "mistral, tokens": ("MistralForTokenClassification", {**LLAMA, **LABELS}),
  "mistral, spans": ("MistralForQuestionAnswering", LLAMA),
  "mistral, body": ("MistralModel", LLAMA),
  "qwen2": ("Qwen2ForCausalLM", LLAMA),
  "qwen2, windows": ("Qwen2ForCausalLM", {**LLAMA, **WINDOWS}),
  "qwen2, tied, MQA, YaRN": ("Qwen2ForCausalLM", {**LLAMA, **TIED, **MQA, **YARN}),
  "qwen2, labels": ("Qwen2ForSequenceClassification", {**LLAMA, **LABELS}),
  "qwen2, tokens": ("Qwen2ForTokenClassification", {**LLAMA, **LABELS}),
  "qwen2, spans": ("Qwen2ForQuestionAnswering", LLAMA),
  "qwen2, body": ("Qwen2Model", LLAMA),
  "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 16, **TIED}),
  "qwen3, windows, biases": (
    "Qwen3ForCausalLM", {**LLAMA, **MHA, "head_dim": 8, "attention_bias": True, **WINDOWS},
  ),
  "qwen3, YaRN": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 16, **YARN}),
  "qwen3, labels": ("Qwen3ForSequenceClassification", {**LLAMA, **LABELS}),
  "qwen3, tokens": ("Qwen3ForTokenClassification", {**LLAMA, **LABELS}),
  "qwen3, spans": ("Qwen3ForQuestionAnswering", LLAMA),
  "qwen3, body": ("Qwen3Model", LLAMA),
  "phi3": ("Phi3ForCausalLM", {**PHI3, "original_max_position_embeddings": 64, **LONGROPE}),
  "phi3, unscaled": ("Phi3ForCausalLM", {**PHI3, **MHA}),
  "phi3, short": (
    "Phi3ForCausalLM", {**PHI3, "original_max_position_embeddings": 600, **LONGROPE},
  ),
  "phi3, tied, a part turns, LongRoPE": (
    "Phi3ForCausalLM",
    {**PHI3, **TIED, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 600,
     "original_max_position_embeddings": 200, **PART},
  ),
  "phi3, a part turns": (
    "Phi3ForCausalLM",
    {**PHI3, "hidden_size": 64, "sliding_window": 20,
     **turned("default", partial_rotary_factor=0.5)},
  ),
  "phi3, labels": ("Phi3ForSequenceClassification", {**PHI3, **LABELS}),
  "phi3, tokens": ("Phi3ForTokenClassification", {**PHI3, **LABELS}),
  "phi3, body": ("Phi3Model", PHI3),
  "olmo2": ("Olmo2ForCausalLM", LLAMA),
  "olmo2, tied, MHA, biases, scaled": (
    "Olmo2ForCausalLM", {**LLAMA, **TIED, **MHA, "attention_bias": True, **YARN},
  ),
  "olmo2, labels": ("Olmo2ForSequenceClassification", {**LLAMA, **LABELS}),
  "olmo2, body": ("Olmo2Model", LLAMA),
  "smollm3": ("SmolLM3ForCausalLM", {**LLAMA, "num_hidden_layers": 5, "pad_token_id": 0}),
  "smollm3, untied, windows, biases": (
    "SmolLM3ForCausalLM",
    {**LLAMA, **UNTIED, **BIASES, "pad_token_id": 0, "num_hidden_layers": 5,
     "no_rope_layers": [1, 0, 1, 1, 0], "use_sliding_window": True, "sliding_window": 16},
  ),
  "smollm3, all turn, scaled": (
    "SmolLM3ForCausalLM", {**LLAMA, "pad_token_id": 0, "no_rope_layers": [1, 1, 1], **YARN},
  ),
  "smollm3, labels": ("SmolLM3ForSequenceClassification", {**LLAMA, **LABELS}),
  "smollm3, tokens": ("SmolLM3ForTokenClassification", {**LLAMA, **LABELS}),
  "smollm3, spans": ("SmolLM3ForQuestionAnswering", {**LLAMA, "pad_token_id": 0}),
  "smollm3, body": ("SmolLM3Model", {**LLAMA, "pad_token_id": 0}),
  "granite": (
    "GraniteForCausalLM",
    {**LLAMA, **TIED, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
     "attention_multiplier": 0.0625, "logits_scaling": 3.0},
  ),
  "granite, untied, MHA, biases": (
    "GraniteForCausalLM", {**LLAMA, **MHA, **BIASES, "attention_multiplier": 0.25, **LLAMA3},
  ),
  "granite, body": ("GraniteModel", {**LLAMA, "residual_multiplier": 0.5}),
  "gemma": ("GemmaForCausalLM", GEMMA),
  "gemma, untied, MQA, biases": (
    "GemmaForCausalLM", {**GEMMA, **UNTIED, **MQA, "attention_bias": True, **LINEAR},
  ),
  "gemma, labels": ("GemmaForSequenceClassification", {**GEMMA, **LABELS}),
  "gemma, tokens": ("GemmaForTokenClassification", {**GEMMA, **LABELS}),
  "gemma, body": ("GemmaModel", GEMMA),
  "gemma2": (
    "Gemma2ForCausalLM",
    {**GEMMA2, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
  ),
  "gemma2, untied, MHA, no caps": (
    "Gemma2ForCausalLM",
    {**GEMMA2, **UNTIED, **MHA, "attention_bias": True, "attn_logit_softcapping": None,
     "final_logit_softcapping": None},
  ),
  "gemma2, labels": ("Gemma2ForSequenceClassification", {**GEMMA2, **LABELS}),
  "gemma2, tokens": ("Gemma2ForTokenClassification", {**GEMMA2, **LABELS}),
  "gemma2, body": ("Gemma2Model", GEMMA2),
  "gemma3_text": ("Gemma3ForCausalLM", GEMMA3),
  "gemma3_text, untied, MQA, cap, scaled": (
    "Gemma3ForCausalLM",
    {**GEMMA3, **UNTIED, **MQA, "attention_bias": True, "final_logit_softcapping": 3.0,
     "rope_parameters": {
       "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
       "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
  ),
  "gemma3_text, labels": ("Gemma3TextForSequenceClassification", {**GEMMA3, **LABELS}),
  "gemma3_text, body": ("Gemma3TextModel", GEMMA3),
}  # fmt: skip
