"""GPT-2 and those that came before Llama."""

GPT2 = dict(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=640)
GPT_NEO = dict(vocab_size=97, hidden_size=32, num_layers=4, num_heads=4, window_size=16,
               attention_types=[[["global", "local"], 2]], max_position_embeddings=640)  # fmt: skip
GPT_NEOX = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                intermediate_size=48, max_position_embeddings=640)  # fmt: skip
GPTJ = dict(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=640, rotary_dim=8)
OPT = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48,
           max_position_embeddings=640)  # fmt: skip
PHI = dict(vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=3,
           num_attention_heads=4, max_position_embeddings=640)  # fmt: skip
STABLELM = dict(**PHI, num_key_value_heads=2)
BLOOM = dict(vocab_size=97, hidden_size=48, n_layer=3, n_head=6)
FALCON = dict(vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=6,
              max_position_embeddings=640)  # fmt: skip
FALCON_NEW = dict(**FALCON, new_decoder_architecture=True, num_kv_heads=2)
CASES = {
  "gpt2": ("GPT2LMHeadModel", GPT2),
  "gpt2, labels": ("GPT2ForTokenClassification", {**GPT2, "num_labels": 3}),
  "gpt2, spans": ("GPT2ForQuestionAnswering", GPT2),
  "gpt_neox": ("GPTNeoXForCausalLM", GPT_NEOX),
  "gpt_neox, serial, tied, scaled": (
    "GPTNeoXForCausalLM",
    {**GPT_NEOX, "use_parallel_residual": False, "tie_word_embeddings": True,
     "attention_bias": False,
     "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4,
                         "partial_rotary_factor": 0.5}},
  ),
  "gpt_neox, labels": (
    "GPTNeoXForSequenceClassification", {**GPT_NEOX, "num_labels": 3, "pad_token_id": 0},
  ),
  "gpt_neox, tokens": ("GPTNeoXForTokenClassification", {**GPT_NEOX, "num_labels": 3}),
  "gpt_neox, spans": ("GPTNeoXForQuestionAnswering", GPT_NEOX),
  "gpt_neox, body": ("GPTNeoXModel", GPT_NEOX),
  "gpt_neo": ("GPTNeoForCausalLM", GPT_NEO),
  "gpt_neo, all global, own width": (
    "GPTNeoForCausalLM", {**GPT_NEO, "attention_types": [[["global"], 4]], "intermediate_size": 48},
  ),
  "gpt_neo, labels": (
    "GPTNeoForSequenceClassification", {**GPT_NEO, "num_labels": 3, "pad_token_id": 0},
  ),
  "gpt_neo, tokens": ("GPTNeoForTokenClassification", {**GPT_NEO, "num_labels": 3}),
  "gpt_neo, spans": ("GPTNeoForQuestionAnswering", GPT_NEO),
  "gptj": ("GPTJForCausalLM", GPTJ),
  "gptj, an odd share turns": (
    "GPTJForCausalLM",
    {**GPTJ, "n_embd": 40, "rotary_dim": 6, "n_inner": 48, "tie_word_embeddings": True},
  ),
  "gptj, labels": ("GPTJForSequenceClassification", {**GPTJ, "num_labels": 3, "pad_token_id": 0}),
  "gptj, spans": ("GPTJForQuestionAnswering", GPTJ),
  "opt": ("OPTForCausalLM", OPT),
  "opt, norms behind": ("OPTForCausalLM", {**OPT, "do_layer_norm_before": False}),
  "opt, no biases": ("OPTForCausalLM", {**OPT, "enable_bias": False}),
  "opt, labels": ("OPTForSequenceClassification", {**OPT, "num_labels": 3}),
  "opt, spans": ("OPTForQuestionAnswering", OPT),
  "opt, body": ("OPTModel", OPT),
  "phi": ("PhiForCausalLM", {**PHI, "num_key_value_heads": 2, "qk_layernorm": True}),
  "phi, MHA, tied": (
    "PhiForCausalLM",
    {**PHI, "tie_word_embeddings": True,
     "rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.25}},
  ),
  "phi, labels": ("PhiForSequenceClassification", {**PHI, "num_labels": 3, "pad_token_id": 0}),
  "phi, tokens": ("PhiForTokenClassification", {**PHI, "num_labels": 3}),
  "stablelm": ("StableLmForCausalLM", {**STABLELM, "use_qkv_bias": True, "qk_layernorm": True}),
  "stablelm, parallel": ("StableLmForCausalLM", {**STABLELM, "use_parallel_residual": True}),
  "stablelm, all turns, MHA": (
    "StableLmForCausalLM", {**STABLELM, "num_key_value_heads": 4, "partial_rotary_factor": 1.0},
  ),
  "stablelm, labels": (
    "StableLmForSequenceClassification", {**STABLELM, "num_labels": 3, "pad_token_id": 0},
  ),
  "stablelm, tokens": ("StableLmForTokenClassification", {**STABLELM, "num_labels": 3}),
  "bloom": ("BloomForCausalLM", BLOOM),
  "bloom, untied": (
    "BloomForCausalLM", {**BLOOM, "n_head": 4, "tie_word_embeddings": False, "pretraining_tp": 2},
  ),
  "bloom, labels": ("BloomForSequenceClassification", {**BLOOM, "num_labels": 3}),
  "bloom, tokens": ("BloomForTokenClassification", {**BLOOM, "num_labels": 3}),
  "bloom, spans": ("BloomForQuestionAnswering", BLOOM),
  "bloom, body": ("BloomModel", BLOOM),
  "falcon": ("FalconForCausalLM", {**FALCON_NEW, "bias": True}),
  "falcon, MQA": ("FalconForCausalLM", FALCON),
  "falcon, one norm": (
    "FalconForCausalLM",
    {**FALCON_NEW, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 64,
     "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
  ),
  # Their eager attention adds ALiBi twice.
  "falcon, ALiBi, serial, MHA": (
    "FalconForCausalLM",
    {**FALCON, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True,
     "attn_implementation": "sdpa"},
  ),
  "falcon, labels": ("FalconForSequenceClassification", {**FALCON, "num_labels": 3}),
  "falcon, tokens": ("FalconForTokenClassification", {**FALCON_NEW, "num_labels": 3}),
  "falcon, spans": ("FalconForQuestionAnswering", FALCON),
  "falcon, body": ("FalconModel", FALCON_NEW),
}  # fmt: skip
