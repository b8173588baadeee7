"""Encoder–decoders."""

T5 = dict(vocab_size=97, d_model=32, d_kv=12, d_ff=48, num_layers=2, num_decoder_layers=3,
          num_heads=4)  # fmt: skip
BART = dict(
  vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
  decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=640,
)  # fmt: skip
LABELS = dict(num_labels=3, eos_token_id=4, decoder_start_token_id=0)
PEGASUS = {**BART, "activation_function": "relu", "scale_embedding": True}
GEMMA = dict(
  vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, head_dim=12, query_pre_attn_scalar=20, max_position_embeddings=640,
  sliding_window=24,
)  # fmt: skip
T5GEMMA = dict(encoder=GEMMA, decoder={**GEMMA, "num_hidden_layers": 3}, vocab_size=97)
WIDE = {**GEMMA, "num_key_value_heads": 4, "attn_logit_softcapping": None, "attention_bias": True,
        "final_logit_softcapping": None}  # fmt: skip
CASES = {
  "t5": ("T5ForConditionalGeneration", T5),
  "t5, v1.1": (
    "T5ForConditionalGeneration",
    {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
  ),
  "bart": ("BartForConditionalGeneration", BART),
  "marian": (
    "MarianMTModel",
    {**BART, "scale_embedding": True, "activation_function": "swish", "pad_token_id": 0,
     "decoder_start_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": 1},
  ),
  "mt5": ("MT5ForConditionalGeneration", T5),
  "umt5": ("UMT5ForConditionalGeneration", {**T5, "tie_word_embeddings": False}),
  "longt5": ("LongT5ForConditionalGeneration", {**T5, "local_radius": 7}),
  "mbart": ("MBartForConditionalGeneration", {**BART, "scale_embedding": True}),
  "pegasus": ("PegasusForConditionalGeneration", PEGASUS),
  "m2m_100": ("M2M100ForConditionalGeneration", BART),
  "t5gemma": ("T5GemmaForConditionalGeneration", T5GEMMA),
  "t5gemma, uncapped, biased, untied": (
    "T5GemmaForConditionalGeneration",
    dict(
      encoder={**WIDE, "layer_types": ["full_attention"] * 2},
      decoder={**WIDE, "layer_types": ["full_attention", "sliding_attention"]},
      vocab_size=97, tie_word_embeddings=False,
    ),
  ),
  "t5gemma, whole attention": (
    "T5GemmaForConditionalGeneration",
    {**T5GEMMA, "decoder": {**GEMMA, "layer_types": ["full_attention"] * 2}},
  ),
  "t5gemma, labels": ("T5GemmaForSequenceClassification", {**T5GEMMA, "num_labels": 3}),
  "t5gemma, tags": ("T5GemmaForTokenClassification", {**T5GEMMA, "num_labels": 5}),
  "t5, gated silu": (
    "T5ForConditionalGeneration",
    {**T5, "feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 16,
     "relative_attention_max_distance": 40, "tie_word_embeddings": False},
  ),
  "t5, gelu": (
    "T5ForConditionalGeneration",
    {**T5, "feed_forward_proj": "gelu", "num_decoder_layers": None, "layer_norm_epsilon": 1e-5},
  ),
  "t5, labels": ("T5ForSequenceClassification", {**T5, **LABELS}),
  "t5, tags": ("T5ForTokenClassification", {**T5, "num_labels": 5}),
  "t5, spans": ("T5ForQuestionAnswering", {**T5, "decoder_start_token_id": 0}),
  "t5, encoder": ("T5EncoderModel", T5),
  "mt5, relu": (
    "MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "relu", "num_decoder_layers": 2}
  ),
  "mt5, labels": ("MT5ForSequenceClassification", {**T5, **LABELS}),
  "mt5, tags": ("MT5ForTokenClassification", {**T5, "num_labels": 5}),
  "mt5, spans": ("MT5ForQuestionAnswering", {**T5, "decoder_start_token_id": 0}),
  "mt5, encoder": ("MT5EncoderModel", T5),
  "umt5, scaled": ("UMT5ForConditionalGeneration", {**T5, "num_decoder_layers": 1}),
  "umt5, labels": ("UMT5ForSequenceClassification", {**T5, **LABELS}),
  "umt5, tags": ("UMT5ForTokenClassification", {**T5, "num_labels": 5}),
  "umt5, spans": ("UMT5ForQuestionAnswering", {**T5, "decoder_start_token_id": 0}),
  "umt5, encoder": ("UMT5EncoderModel", T5),
  "longt5, gated, radius 64": (
    "LongT5ForConditionalGeneration",
    {**T5, "local_radius": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
  ),
  "longt5, radius 519": ("LongT5ForConditionalGeneration", {**T5, "local_radius": 519}),
  "longt5, encoder": ("LongT5EncoderModel", {**T5, "local_radius": 12}),
  "bart, labels": ("BartForSequenceClassification", {**BART, "num_labels": 3, "eos_token_id": 4}),
  "bart, scaled": ("BartForConditionalGeneration", {**BART, "scale_embedding": True}),
  "bart, relu": (
    "BartForConditionalGeneration",
    {**BART, "activation_function": "relu", "decoder_layers": 1},
  ),
  "bart, spans": ("BartForQuestionAnswering", BART),
  "bart, body": ("BartModel", BART),
  "marian, gelu": (
    "MarianMTModel",
    {**BART, "d_model": 36, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1},
  ),
  "mbart, relu": (
    "MBartForConditionalGeneration",
    {**BART, "activation_function": "relu", "decoder_layers": 2},
  ),
  "pegasus, gelu": ("PegasusForConditionalGeneration", BART),
  "m2m_100, unscaled": (
    "M2M100ForConditionalGeneration",
    {**BART, "scale_embedding": False, "activation_function": "gelu", "d_model": 36},
  ),
}  # fmt: skip
