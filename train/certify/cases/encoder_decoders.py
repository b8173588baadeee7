"""Encoder–decoders."""

T5 = dict(vocab_size=97, d_model=32, d_kv=12, d_ff=48, num_layers=2, num_decoder_layers=3,
          num_heads=4)  # fmt: skip
BART = dict(
  vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
  decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=640,
)  # fmt: skip
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
  "bart, labels": ("BartForSequenceClassification", {**BART, "num_labels": 3, "eos_token_id": 4}),
  "bart, scaled": ("BartForConditionalGeneration", {**BART, "scale_embedding": True}),
}  # fmt: skip
