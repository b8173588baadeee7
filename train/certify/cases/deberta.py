"""Encoders with disentangled attention."""

DEBERTA = dict(
  vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
  max_position_embeddings=640, relative_attention=True, position_biased_input=False,
  pos_att_type=["p2c", "c2p"],
)  # fmt: skip
V3 = {**DEBERTA, "position_buckets": 32, "max_relative_positions": 200, "share_att_key": True,
      "norm_rel_ebd": "layer_norm"}  # fmt: skip
CASES = {
  "deberta-v2": ("DebertaV2ForMaskedLM", V3),
  "deberta-v2, a vector for each distance, projections of their own, token types": (
    "DebertaV2ForMaskedLM",
    {**DEBERTA, "type_vocab_size": 2, "hidden_act": "relu"},
  ),
  "deberta-v2, a convolution": (
    "DebertaV2ForMaskedLM",
    {**V3, "conv_kernel_size": 3, "conv_act": "gelu", "attention_head_size": 8},
  ),
  "deberta-v2, c2p": (
    "DebertaV2ForMaskedLM", {**V3, "pos_att_type": "c2p", "max_relative_positions": -1},
  ),
  "deberta-v2, p2c": (
    "DebertaV2ForMaskedLM", {**V3, "pos_att_type": ["p2c"], "share_att_key": False},
  ),
  "deberta-v2, labels": (
    "DebertaV2ForSequenceClassification", {**V3, "num_labels": 3, "pooler_hidden_act": "tanh"},
  ),
  "deberta-v2, spans": ("DebertaV2ForQuestionAnswering", V3),
  "deberta-v2, tokens": ("DebertaV2ForTokenClassification", {**V3, "num_labels": 5}),
  "deberta-v2, body": ("DebertaV2Model", V3),
}  # fmt: skip
