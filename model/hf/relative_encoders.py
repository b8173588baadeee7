"""Encoders with relative positions: MPNet, ModernBERT, NomicBERT."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from model.config import ModelConfig
from model.errors import InputError
from model.hf.decoders import DOWN, OUT, TIED, UP, labels
from model.hf.encoders import (
  BEHIND_PADDING,
  BERT,
  BERT_TWINS,
  BODY,
  MASKED,
  OWN_GELU,
  POOLED,
  SENTENCE,
  SPANS,
  TOKENS,
  Activations,
  bert_fields,
  bert_layers,
  dense,
  embeddings,
  words,
)
from model.hf.engine import Row, linear, norm, under
from model.hf.family import Always, Class, Family, Field, Fields, Same
from model.hf.fields import ACTIVATIONS, LayerTypes
from model.hf.rotary_fields import Rotary, TwoRotaries

# Before all heads of ModernBERT lies what is before its masked-LM head.
TRANSFORMED = dict(head_dense=True, head_norm=True)
MODERN_HEAD = (*dense("head.dense"), *norm("head.norm", "head.norm"))


@dataclasses.dataclass(frozen=True)
class _Pooling:
  """`classifier_pooling`: what of a text a classifier reads."""

  names = ("classifier_pooling",)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    known = {"cls": "first", "mean": "mean"}
    return Field(self.names[0], "pooling", "cls", known).read(values)

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    how = cfg.pooling_of(cfg.text_stack)
    if how == "last":
      raise InputError("model.pooling='last' has no classifier_pooling.")
    return {self.names[0]: "mean" if how == "mean" else "cls"}


@dataclasses.dataclass(frozen=True)
class _Renamed:
  """A field that folders of Nomic's own code have under an older name."""

  field: Fields
  older: str

  @property
  def names(self) -> tuple[str, ...]:
    return (*self.field.names, self.older)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    return self.field.read({self.field.names[0]: values.get(self.older), **values})

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return self.field.write(cfg)


@dataclasses.dataclass(frozen=True)
class _NomicChoices:
  """Choices that Nomic's own code leaves open, of which Transformers knows these ones only."""

  known: ClassVar[dict[str, Any]] = {
    "activation_function": "swiglu", "causal": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
    "parallel_block": False, "parallel_block_tied_norm": False, "prenorm": False,
    "qkv_proj_bias": False, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None, "rotary_scaling_factor": None, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "use_rms_norm": False,
  }  # fmt: skip
  names = tuple(known)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in self.known.items():
      Always(name, value).read(values)
    return {}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return {}


NOMIC_FIELDS: tuple[Fields, ...] = (
  Field("vocab_size", "vocab_size", 30_528), Field("type_vocab_size", "token_types", 2), TIED,
  Field("hidden_size", "d_model", 768, older="n_embd"),
  Field("num_hidden_layers", "num_layers", 12, older="n_layer"),
  Field("num_attention_heads", "num_heads", 12, older="n_head"),
  Field("intermediate_size", "d_ff", 3072, older="n_inner"),
  Field("max_position_embeddings", "max_positions", 2048, older="n_positions"),
  Field("layer_norm_eps", "norm_eps", 1e-12, older="layer_norm_epsilon"),
  Field("hidden_dropout_prob", "dropout", 0.0, older="resid_pdrop"),
  Field("attention_probs_dropout_prob", "attention_dropout", 0.0, older="attn_pdrop"),
  Field("head_dim", "head_dim", None), Activations("hidden_act", "silu"),
  _Renamed(Rotary(1000.0), "rotary_emb_base"), _NomicChoices(),
)  # fmt: skip
MPNET_POOLER = r"mpnet\.pooler\.dense\.\w+"
FAMILIES = (
  Family(
    "mpnet", {**BERT, "position_offset": 2, "relative_bias": True},
    # Theirs computes with 32 buckets, whatever the size of the table.
    bert_fields(OWN_GELU, BEHIND_PADDING, Always("relative_attention_num_buckets", 32)),
    (
      *embeddings("mpnet.embeddings"),
      Row("mpnet.encoder.relative_attention_bias.weight", "encoder.relative_bias", "b n -> b n"),
      *bert_layers("mpnet", "attention.attn.q", "attention.attn.k", "attention.attn.v",
                   "attention.attn.o", "attention.LayerNorm"),
    ),
    {
      "MPNetForMaskedLM": Class(
        MASKED, words("lm_head", normed="layer_norm"), surplus=MPNET_POOLER
      ),
      "MPNetForSequenceClassification": Class(
        SENTENCE, (*dense("classifier.dense"), *labels("classifier.out_proj")),
        surplus=MPNET_POOLER,
      ),
      "MPNetForTokenClassification": Class(
        TOKENS, labels("classifier"), surplus=MPNET_POOLER
      ),
      "MPNetForQuestionAnswering": Class(
        SPANS, labels("qa_outputs"), surplus=MPNET_POOLER
      ),
      "MPNetModel": Class(POOLED, dense("pooler.dense"), base=True),
    },
    "mpnet.", pad=1, surplus=r"(mpnet\.)?embeddings\.position_ids",
    repeated=("lm_head.decoder.weight",), twins={"lm_head.decoder.bias": "lm_head.bias"},
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
      Field("classifier_bias", "head_dense_bias", False), Field("decoder_bias", "logit_bias", True),
      Field("classifier_activation", "head_activation", "gelu", ACTIVATIONS), _Pooling(),
      Field("attention_dropout", "attention_dropout", 0.0),
      Field("mlp_dropout", "mlp_dropout", 0.0), Same(("embedding_dropout",), "dropout", 0.0), TIED,
      LayerTypes(("local_attention", 128), ("global_attn_every_n_layers", 3), 0, unnormed=True),
      TwoRotaries(("global_rope_theta", 160_000.0), ("local_rope_theta", 10_000.0), both=True),
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
        dict(head="masked_lm", **TRANSFORMED, pooling=None),
        (*MODERN_HEAD, Row("decoder.bias", "head.bias", "v -> v"),
         Row("decoder.weight", "head.proj.w", "v d -> d v")),
      ),
      "ModernBertForSequenceClassification": Class(
        dict(head="sequence", **TRANSFORMED, logit_bias=False),
        (*MODERN_HEAD, *labels("classifier")),
      ),
      "ModernBertForTokenClassification": Class(
        dict(head="token", **TRANSFORMED, logit_bias=False, pooling=None),
        (*MODERN_HEAD, *labels("classifier")),
      ),
      "ModernBertForQuestionAnswering": Class(
        dict(head="span", **TRANSFORMED, logit_bias=False, pooling=None),
        (*MODERN_HEAD, *labels("classifier")),
      ),
      "ModernBertModel": Class(
        {**BODY, "head_dense_bias": True, "logit_bias": False, "pooling": None}, base=True
      ),
    },
    "model.",
    unread=("initializer_cutoff_factor", "classifier_dropout", "sparse_prediction",
            "deterministic_flash_attn", "sparse_pred_ignore_index", "reference_compile",
            "repad_logits_with_grad", "layer_norm_eps", "position_embedding_type"),
    repeated=("decoder.weight",),
  ),
  Family(
    "nomic_bert", dict(shape="encoder", positions="rotary", norm="layer", norm_placement="post",
                       gated=True, embed_norm=True, final_norm=False),
    NOMIC_FIELDS,
    (
      *under(
        "nomic_bert", "encoder",
        Row("embeddings.token_type_embeddings.weight", "type_embed.table", "t d -> t d"),
        *norm("emb_ln", "embed_norm"),
      ),
      Row("nomic_bert.embeddings.word_embeddings.weight", "embed.table", "v d -> v d"),
      *under(
        "nomic_bert.encoder.layers.{i}", "encoder.layers",
        Row("attn.Wqkv.weight", "attn.{q,k,v}_proj.w", "(c n h) d -> c d n h"),
        Row("attn.out_proj.weight", "attn.o_proj.w", OUT),
        *norm("norm1", "attn_post_norm"),
        Row("mlp.fc11.weight", "mlp.up_proj.w", UP), Row("mlp.fc12.weight", "mlp.gate_proj.w", UP),
        Row("mlp.fc2.weight", "mlp.down_proj.w", DOWN),
        *norm("norm2", "mlp_post_norm"),
      ),
    ),
    {
      "NomicBertModel": Class(BODY, base=True),
      "NomicBertForMaskedLM": Class(
        MASKED, words("cls.predictions", "transform.dense", "transform.layer_norm")
      ),
      "NomicBertForSequenceClassification": Class(
        SENTENCE, (*dense("nomic_bert.pooler.dense"), *labels("classifier"))
      ),
      "NomicBertForTokenClassification": Class(TOKENS, labels("classifier")),
    },
    "nomic_bert.", pad=0,
    unread=("classifier_dropout", "embd_pdrop", "pad_vocab_size_multiple", "max_trained_positions",
            "dense_seq_output", "fused_bias_fc", "fused_dropout_add_ln", "use_flash_attn",
            "use_xentropy", "reorder_and_upcast_attn", "summary_type", "summary_use_proj",
            "summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
    repeated=("cls.predictions.decoder.weight",), twins=BERT_TWINS,
  ),
)  # fmt: skip
