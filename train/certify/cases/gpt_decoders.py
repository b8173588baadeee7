"""GPT-2 and those that came before Llama."""

GPT2 = dict(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=640)
GPT_NEO = dict(vocab_size=97, hidden_size=32, num_layers=4, num_heads=4, window_size=16,
               attention_types=[[["global", "local"], 2]], max_position_embeddings=640)  # fmt: skip
GPT_NEOX = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                intermediate_size=48, max_position_embeddings=640)  # fmt: skip
GPTJ = dict(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=640, rotary_dim=8)
OPT = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48,
           max_position_embeddings=640)  # fmt: skip
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
}  # fmt: skip
