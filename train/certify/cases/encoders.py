"""Encoders."""

BERT = dict(
  vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
  max_position_embeddings=640,
)  # fmt: skip
ROBERTA = {**BERT, "max_position_embeddings": 642}
DISTILBERT = dict(vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=48,
                  max_position_embeddings=640)  # fmt: skip
NARROW = {**BERT, "embedding_size": 24}
ALBERT = {**NARROW, "num_hidden_layers": 3}
MODERN = {**BERT, "num_hidden_layers": 8, "local_attention": 16, "pad_token_id": 0}
SEVERAL = dict(num_labels=3, problem_type="multi_label_classification")
CASES = {
  "bert": ("BertForMaskedLM", BERT),
  "bert, pairs": ("BertForPreTraining", BERT),
  "bert, labels": ("BertForSequenceClassification", {**BERT, "num_labels": 3}),
  "bert, a number": (
    "BertForSequenceClassification",
    {**BERT, "num_labels": 1, "problem_type": "regression", "type_vocab_size": 1},
  ),
  "bert, spans": ("BertForQuestionAnswering", {**BERT, "type_vocab_size": 1}),
  "bert, tokens": ("BertForTokenClassification", {**BERT, "num_labels": 5, "hidden_act": "silu"}),
  "bert, body": ("BertModel", {**BERT, "hidden_act": "gelu_new"}),
  "bert, relu before the head too": ("BertForMaskedLM", {**BERT, "hidden_act": "relu"}),
  "roberta": ("RobertaForMaskedLM", {**ROBERTA, "hidden_act": "gelu_new"}),
  "roberta, labels": (
    "RobertaForSequenceClassification", {**ROBERTA, "type_vocab_size": 1, **SEVERAL},
  ),
  "roberta, tokens": ("RobertaForTokenClassification", {**ROBERTA, "num_labels": 5}),
  "roberta, spans": ("RobertaForQuestionAnswering", ROBERTA),
  "roberta, body": ("RobertaModel", ROBERTA),
  "xlm-roberta": ("XLMRobertaForMaskedLM", {**ROBERTA, "type_vocab_size": 1}),
  "xlm-roberta, labels": ("XLMRobertaForSequenceClassification", {**ROBERTA, "num_labels": 3}),
  "xlm-roberta, tokens": ("XLMRobertaForTokenClassification", {**ROBERTA, "num_labels": 5}),
  "xlm-roberta, spans": ("XLMRobertaForQuestionAnswering", ROBERTA),
  "xlm-roberta, body": ("XLMRobertaModel", ROBERTA),
  "camembert": ("CamembertForMaskedLM", ROBERTA),
  "camembert, labels": ("CamembertForSequenceClassification", {**ROBERTA, "num_labels": 3}),
  "electra": ("ElectraForPreTraining", NARROW),
  "electra, generator": ("ElectraForMaskedLM", {**NARROW, "hidden_act": "relu"}),
  "electra, untied generator, wide tables": (
    "ElectraForMaskedLM", {**BERT, "embedding_size": 32, "tie_word_embeddings": False},
  ),
  "electra, relu before the head too": (
    "ElectraForPreTraining", {**BERT, "embedding_size": 32, "hidden_act": "relu"},
  ),
  "electra, labels": ("ElectraForSequenceClassification", {**NARROW, **SEVERAL}),
  "electra, tokens": ("ElectraForTokenClassification", {**NARROW, "num_labels": 5}),
  "electra, spans": ("ElectraForQuestionAnswering", NARROW),
  "electra, body": ("ElectraModel", NARROW),
  "albert": ("AlbertForPreTraining", ALBERT),
  "albert, words, two sets of layers": (
    "AlbertForMaskedLM",
    {**NARROW, "num_hidden_layers": 4, "num_hidden_groups": 2, "hidden_act": "gelu"},
  ),
  "albert, wide tables, a set for each layer": (
    "AlbertForMaskedLM", {**ALBERT, "embedding_size": 32, "num_hidden_groups": 3},
  ),
  "albert, labels": ("AlbertForSequenceClassification", {**ALBERT, "num_labels": 3}),
  "albert, tokens": ("AlbertForTokenClassification", {**ALBERT, "num_labels": 5}),
  "albert, spans": ("AlbertForQuestionAnswering", ALBERT),
  "albert, body": ("AlbertModel", ALBERT),
  "mpnet": ("MPNetForMaskedLM", ROBERTA),
  "mpnet, labels": ("MPNetForSequenceClassification", {**ROBERTA, "num_labels": 3}),
  "mpnet, tokens": (
    "MPNetForTokenClassification", {**ROBERTA, "num_labels": 5, "hidden_act": "relu"},
  ),
  "mpnet, spans": ("MPNetForQuestionAnswering", ROBERTA),
  "mpnet, body": ("MPNetModel", ROBERTA),
  "distilbert": ("DistilBertForMaskedLM", DISTILBERT),
  "distilbert, labels": (
    "DistilBertForSequenceClassification", {**DISTILBERT, "num_labels": 3},
  ),
  "distilbert, tokens": ("DistilBertForTokenClassification", {**DISTILBERT, "num_labels": 5}),
  "distilbert, spans": ("DistilBertForQuestionAnswering", {**DISTILBERT, "activation": "relu"}),
  "distilbert, body": ("DistilBertModel", DISTILBERT),
  "distilbert, untied, relu before the head too": (
    "DistilBertForMaskedLM", {**DISTILBERT, "activation": "relu", "tie_word_embeddings": False},
  ),
  "modernbert": ("ModernBertForMaskedLM", MODERN),
  "modernbert, biases": (
    "ModernBertForMaskedLM",
    {**MODERN, "norm_bias": True, "mlp_bias": True, "attention_bias": True, "decoder_bias": False,
     "classifier_bias": True, "classifier_activation": "relu", "hidden_activation": "silu"},
  ),
  "modernbert, untied": ("ModernBertForMaskedLM", {**MODERN, "tie_word_embeddings": False}),
  "modernbert, labels": (
    "ModernBertForSequenceClassification", {**MODERN, "classifier_pooling": "mean", **SEVERAL},
  ),
  "modernbert, labels by the first token": (
    "ModernBertForSequenceClassification",
    {**MODERN, "classifier_bias": True, "classifier_activation": "silu", "num_labels": 3},
  ),
  "modernbert, tokens": ("ModernBertForTokenClassification", {**MODERN, "num_labels": 5}),
  "modernbert, spans": (
    "ModernBertForQuestionAnswering", {**MODERN, "global_attn_every_n_layers": 2},
  ),
  "modernbert, body": (
    "ModernBertModel", {**MODERN, "classifier_pooling": "mean", "classifier_bias": True},
  ),
  "nomic_bert": ("NomicBertForMaskedLM", BERT),
  "nomic_bert, labels": ("NomicBertForSequenceClassification", {**BERT, "num_labels": 3}),
  "nomic_bert, tokens": ("NomicBertForTokenClassification", {**BERT, "num_labels": 5}),
  "nomic_bert, body, wide heads": (
    "NomicBertModel",
    {**BERT, "head_dim": 16, "hidden_act": "gelu",
     "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
  ),
}  # fmt: skip
