"""Encoders: BERT, RoBERTa, DistilBERT, ModernBERT."""

from model.hf.decoders import DOWN, HEAD_BIAS, HEADS, OUT, TIED, UP, labels
from model.hf.engine import Row, linear, norm, under
from model.hf.family import Always, Class, Family, Field, Same
from model.hf.fields import ACTIVATIONS, LayerTypes, TwoRotaries

BERT = dict(
  shape="encoder", positions="learned", norm="layer", norm_placement="post", gated=False,
  embed_norm=True, final_norm=False, mlp_bias=True, attention_bias=True, attention_out_bias=True,
)  # fmt: skip
MASKED = dict(head="masked_lm", head_dense=True, head_norm=True, logit_bias=True)
SENTENCE = dict(head="sequence", head_dense=True, head_activation="tanh")
POOLED = dict(head="embedding", head_dense=True, head_activation="tanh")
ABSOLUTE = Always("position_embedding_type", "absolute")


def dense(theirs: str) -> tuple[Row, ...]:
  """The layer before a head."""
  return linear(theirs, "head.dense", "e d -> d e", "e -> e")


def _bert_rows(name: str) -> tuple[Row, ...]:
  return (
    Row(f"{name}.embeddings.word_embeddings.weight", "embed.table", "v d -> v d"),
    *under(
      f"{name}.embeddings", "encoder",
      Row("position_embeddings.weight", "position_embed.table", "p d -> p d"),
      Row("token_type_embeddings.weight", "type_embed.table", "t d -> t d"),
      *norm("LayerNorm", "embed_norm"),
    ),
    *under(
      f"{name}.encoder.layer.{{i}}", "encoder.layers",
      *linear("attention.self.query", "attn.q_proj", HEADS, HEAD_BIAS),
      *linear("attention.self.key", "attn.k_proj", HEADS, HEAD_BIAS),
      *linear("attention.self.value", "attn.v_proj", HEADS, HEAD_BIAS),
      *linear("attention.output.dense", "attn.o_proj", OUT, "d -> d"),
      *norm("attention.output.LayerNorm", "attn_post_norm"),
      *linear("intermediate.dense", "mlp.up_proj", UP, "f -> f"),
      *linear("output.dense", "mlp.down_proj", DOWN, "d -> d"),
      *norm("output.LayerNorm", "mlp_post_norm"),
    ),
  )  # fmt: skip


def _bert_fields(types: int, *positions: Field) -> tuple:
  return (
    Field("vocab_size", "vocab_size"), Field("hidden_size", "d_model", 768),
    Field("num_hidden_layers", "num_layers", 12), Field("num_attention_heads", "num_heads", 12),
    Field("intermediate_size", "d_ff", 3072),
    Field("hidden_act", "activation", "gelu", ACTIVATIONS),
    Field("type_vocab_size", "token_types", types), Field("layer_norm_eps", "norm_eps", 1e-12),
    Field("hidden_dropout_prob", "dropout", 0.1),
    Field("attention_probs_dropout_prob", "attention_dropout", 0.1), TIED, ABSOLUTE, *positions,
  )  # fmt: skip


BERT_WORDS = (
  *dense("cls.predictions.transform.dense"),
  *norm("cls.predictions.transform.LayerNorm", "head.norm"),
  Row("cls.predictions.bias", "head.bias", "v -> v"),
  Row("cls.predictions.decoder.weight", "head.proj.w", "v d -> d v"),
)
FAMILIES = (
  Family(
    "bert", BERT, _bert_fields(2, Field("max_position_embeddings", "max_positions", 512)),
    _bert_rows("bert"),
    {
      "BertForMaskedLM": Class(
        MASKED, BERT_WORDS, surplus=r"bert\.pooler\.dense\.\w+|cls\.seq_relationship\.\w+"
      ),
      "BertForPreTraining": Class(
        {**MASKED, "pair_head": True},
        (*BERT_WORDS, *linear("bert.pooler.dense", "pair.dense", "e d -> d e", "e -> e"),
         *linear("cls.seq_relationship", "pair.proj", "l d -> d l", "l -> l")),
      ),
      "BertForSequenceClassification": Class(
        SENTENCE, (*dense("bert.pooler.dense"), *labels("classifier"))
      ),
      "BertForTokenClassification": Class(dict(head="token"), labels("classifier")),
      "BertForQuestionAnswering": Class(dict(head="span"), labels("qa_outputs")),
      "BertModel": Class(POOLED, dense("pooler.dense"), base=True),
    },
    "bert.",
    unread=("classifier_dropout", "pooler_fc_size", "pooler_num_attention_heads", "directionality",
            "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
    surplus=r"(bert\.)?embeddings\.position_ids",
    repeated=("cls.predictions.decoder.weight",),
    renamed=((r"gamma$", "weight"), (r"beta$", "bias"),
             (r"cls\.predictions\.decoder\.bias$", "cls.predictions.bias")),
  ),
  Family(
    "roberta", {**BERT, "position_offset": 2},  # Positions begin behind the id of padding, 1.
    _bert_fields(2, Field("max_position_embeddings", "max_positions", 512, minus=2)),
    _bert_rows("roberta"),
    {
      "RobertaForMaskedLM": Class(
        MASKED,
        (*dense("lm_head.dense"), *norm("lm_head.layer_norm", "head.norm"),
         Row("lm_head.bias", "head.bias", "v -> v"),
         Row("lm_head.decoder.weight", "head.proj.w", "v d -> d v")),
        surplus=r"roberta\.pooler\.dense\.\w+",
      ),
      "RobertaForSequenceClassification": Class(
        SENTENCE, (*dense("classifier.dense"), *labels("classifier.out_proj")),
        surplus=r"roberta\.pooler\.dense\.\w+",
      ),
      "RobertaForTokenClassification": Class(dict(head="token"), labels("classifier")),
      "RobertaForQuestionAnswering": Class(dict(head="span"), labels("qa_outputs")),
      "RobertaModel": Class(POOLED, dense("pooler.dense"), base=True),
    },
    "roberta.", pad=1, unread=("classifier_dropout",),
    surplus=r"(roberta\.)?embeddings\.position_ids", repeated=("lm_head.decoder.weight",),
    renamed=((r"lm_head\.decoder\.bias$", "lm_head.bias"),),
  ),
  Family(
    "distilbert", {**BERT, "norm_eps": 1e-12},
    (
      Field("vocab_size", "vocab_size", 30_522), Field("dim", "d_model", 768),
      Field("n_layers", "num_layers", 6), Field("n_heads", "num_heads", 12),
      Field("hidden_dim", "d_ff", 3072), Field("activation", "activation", "gelu", ACTIVATIONS),
      Field("max_position_embeddings", "max_positions", 512),
      Field("dropout", "dropout", 0.1), Field("attention_dropout", "attention_dropout", 0.1), TIED,
    ),
    (
      Row("distilbert.embeddings.word_embeddings.weight", "embed.table", "v d -> v d"),
      *under(
        "distilbert.embeddings", "encoder",
        Row("position_embeddings.weight", "position_embed.table", "p d -> p d"),
        *norm("LayerNorm", "embed_norm"),
      ),
      *under(
        "distilbert.transformer.layer.{i}", "encoder.layers",
        *linear("attention.q_lin", "attn.q_proj", HEADS, HEAD_BIAS),
        *linear("attention.k_lin", "attn.k_proj", HEADS, HEAD_BIAS),
        *linear("attention.v_lin", "attn.v_proj", HEADS, HEAD_BIAS),
        *linear("attention.out_lin", "attn.o_proj", OUT, "d -> d"),
        *norm("sa_layer_norm", "attn_post_norm"),
        *linear("ffn.lin1", "mlp.up_proj", UP, "f -> f"),
        *linear("ffn.lin2", "mlp.down_proj", DOWN, "d -> d"),
        *norm("output_layer_norm", "mlp_post_norm"),
      ),
    ),
    {
      "DistilBertForMaskedLM": Class(
        MASKED,
        (*dense("vocab_transform"), *norm("vocab_layer_norm", "head.norm"),
         Row("vocab_projector.bias", "head.bias", "v -> v"),
         Row("vocab_projector.weight", "head.proj.w", "v d -> d v")),
      ),
      "DistilBertForSequenceClassification": Class(
        {**SENTENCE, "head_activation": "relu"}, (*dense("pre_classifier"), *labels("classifier"))
      ),
      "DistilBertForTokenClassification": Class(dict(head="token"), labels("classifier")),
      "DistilBertForQuestionAnswering": Class(dict(head="span"), labels("qa_outputs")),
      "DistilBertModel": Class(dict(head="embedding"), base=True),
    },
    "distilbert.",
    unread=("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout", "tie_weights_"),
    surplus=r"(distilbert\.)?embeddings\.position_ids", repeated=("vocab_projector.weight",),
  ),
  Family(
    "modernbert", dict(shape="encoder", positions="rotary", norm="layer", gated=True,
                       embed_norm=True),
    (
      Field("vocab_size", "vocab_size", 50_368), Field("hidden_size", "d_model", 768),
      Field("num_hidden_layers", "num_layers", 22), Field("num_attention_heads", "num_heads", 12),
      Field("intermediate_size", "d_ff", 1152), Field("norm_eps", "norm_eps", 1e-5),
      Field("hidden_activation", "activation", "gelu", ACTIVATIONS),
      Field("max_position_embeddings", "max_positions", 8192),
      Field("norm_bias", "norm_bias", False), Field("mlp_bias", "mlp_bias", False),
      Field("attention_bias", "attention_bias", False),
      Field("attention_bias", "attention_out_bias", False),
      Field("attention_dropout", "attention_dropout", 0.0),
      Field("mlp_dropout", "mlp_dropout", 0.0), Same(("embedding_dropout",), "dropout", 0.0), TIED,
      LayerTypes(("local_attention", 128), ("global_attn_every_n_layers", 3), 0, unnormed=True),
      TwoRotaries(("global_rope_theta", 160_000.0), ("local_rope_theta", 10_000.0)),
    ),
    (
      Row("model.embeddings.tok_embeddings.weight", "embed.table", "v d -> v d"),
      *norm("model.embeddings.norm", "encoder.embed_norm"),
      *under(
        "model.layers.{i}", "encoder.layers",
        *norm("attn_norm", "attn_norm"),
        *linear("attn.Wqkv", "attn.{q,k,v}_proj", "(c n h) d -> c d n h", "(c n h) -> c n h"),
        *linear("attn.Wo", "attn.o_proj", OUT, "d -> d"),
        *norm("mlp_norm", "mlp_norm"),
        *linear("mlp.Wi", "mlp.{gate,up}_proj", "(c f) d -> c d f", "(c f) -> c f"),
        *linear("mlp.Wo", "mlp.down_proj", DOWN, "d -> d"),
      ),
      *norm("model.final_norm", "encoder.final_norm"),
    ),
    {
      "ModernBertForMaskedLM": Class(
        {**MASKED, "head_bias": False},
        (*dense("head.dense"), *norm("head.norm", "head.norm"),
         Row("decoder.bias", "head.bias", "v -> v"),
         Row("decoder.weight", "head.proj.w", "v d -> d v")),
      ),
      "ModernBertModel": Class(dict(head="embedding"), base=True),
    },
    "model.",
    unread=("initializer_cutoff_factor", "classifier_pooling", "classifier_dropout",
            "classifier_activation", "classifier_bias", "decoder_bias", "sparse_prediction",
            "deterministic_flash_attn", "sparse_pred_ignore_index", "reference_compile",
            "repad_logits_with_grad", "layer_norm_eps", "position_embedding_type"),
    repeated=("decoder.weight",),
  ),
)  # fmt: skip
