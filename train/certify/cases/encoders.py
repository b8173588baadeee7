"""Encoders."""

BERT = dict(
  vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
  max_position_embeddings=640,
)  # fmt: skip
DISTILBERT = dict(vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=48,
                  max_position_embeddings=640)  # fmt: skip
CASES = {
  "bert": ("BertForMaskedLM", BERT),
  "bert, pairs": ("BertForPreTraining", BERT),
  "bert, labels": ("BertForSequenceClassification", {**BERT, "num_labels": 3}),
  "bert, spans": ("BertForQuestionAnswering", BERT),
  "bert, tokens": ("BertForTokenClassification", {**BERT, "num_labels": 5}),
  "bert, body": ("BertModel", BERT),
  "roberta": ("RobertaForMaskedLM", {**BERT, "max_position_embeddings": 642}),
  "roberta, labels": (
    "RobertaForSequenceClassification",
    {**BERT, "max_position_embeddings": 642, "type_vocab_size": 1, "num_labels": 3},
  ),
  "distilbert": ("DistilBertForMaskedLM", DISTILBERT),
  "distilbert, labels": (
    "DistilBertForSequenceClassification", {**DISTILBERT, "num_labels": 3},
  ),
  "modernbert": (
    "ModernBertForMaskedLM",
    {**BERT, "num_hidden_layers": 8, "local_attention": 16, "pad_token_id": 0},
  ),
}  # fmt: skip
