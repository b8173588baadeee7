"""Encoders with disentangled attention: DeBERTa-v2 and v3."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.errors import InputError
from model.hf.decoders import DOWN, HEAD_BIAS, HEADS, OUT, UP, labels
from model.hf.encoders import BERT, BERT_WORDS, MASKED, dense
from model.hf.engine import Row, linear, norm, under
from model.hf.family import Always, Class, Family, Field
from model.hf.fields import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class Disentangled:
  """What attention knows of positions."""

  names = ("relative_attention", "position_biased_input", "pos_att_type", "position_buckets",
           "max_relative_positions", "share_att_key", "norm_rel_ebd")  # fmt: skip

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    for name, assumed, wanted in ((self.names[0], False, True), (self.names[1], True, False)):
      if values.get(name, assumed) is not wanted:
        raise InputError(
          f"config.json: {name}={values.get(name, assumed)} is not supported, only {wanted}."
        )
    terms = values.get("pos_att_type") or []
    terms = terms.split("|") if isinstance(terms, str) else terms
    longest = values.get("max_relative_positions") or -1
    longest = longest if longest > 0 else values.get("max_position_embeddings", 512)
    buckets = values.get("position_buckets") or -1
    if buckets >= longest:
      raise InputError(
        f"config.json: position_buckets={buckets} is not supported, only less than the largest "
        f"distance, {longest}, or -1."
      )
    norm = (values.get("norm_rel_ebd") or "none").strip().lower()
    if norm not in ("none", "layer_norm"):
      raise InputError(
        f"config.json: norm_rel_ebd={norm!r} is not known, expected none or layer_norm."
      )
    return {
      "positions": "disentangled", "relative_max_distance": longest,
      "relative_buckets": 2 * (buckets if buckets > 0 else longest),
      "relative_scores": tuple(sorted(term.strip().lower() for term in terms)),
      "relative_own_proj": not values.get("share_att_key", False),
      "relative_norm": norm == "layer_norm",
    }  # fmt: skip

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    side = cfg.relative_buckets // 2
    disentangled = cfg.positions == "disentangled"
    return {
      "relative_attention": disentangled, "position_biased_input": not disentangled,
      "max_relative_positions": cfg.relative_max_distance,
      "pos_att_type": list(cfg.relative_scores),
      "position_buckets": side if side < cfg.relative_max_distance else -1,
      "share_att_key": not cfg.relative_own_proj,
      "norm_rel_ebd": "layer_norm" if cfg.relative_norm else "none",
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HeadWidth:
  """`attention_head_size`, where there is one."""

  names = ("attention_head_size",)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    width = values.get(self.names[0])
    return {} if width is None else {"head_dim": width}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return {self.names[0]: cfg.head_width}


@dataclasses.dataclass(frozen=True)
class HeadActivation:
  """Of the layer before scores: the pooler's, or that of all MLPs."""

  names = ("pooler_hidden_act",)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    kind = (values.get("architectures") or ["DebertaV2ForMaskedLM"])[0]
    of = {"DebertaV2ForMaskedLM": "hidden_act", "DebertaV2ForSequenceClassification": self.names[0]}
    if kind not in of:
      return {}
    return Field(of[kind], "head_activation", "gelu", ACTIVATIONS).read(values)

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return Field(self.names[0], "head_activation", "gelu", ACTIVATIONS).write(cfg)


@dataclasses.dataclass(frozen=True)
class ConvBeside:
  """A convolution beside the first layer."""

  names = ("conv_kernel_size", "conv_act")

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    width = values.get(self.names[0], 0)
    if not width:
      return {}
    act = Field(self.names[1], "conv_activation", "tanh", ACTIVATIONS).read(values)
    return {"conv_width": width, **act, "layer_prefix": ("global+conv",)}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    if cfg.conv_width is None:
      return {}
    act = Field(self.names[1], "conv_activation", "tanh", ACTIVATIONS).write(cfg)
    return {self.names[0]: cfg.conv_width, **act}


def _width(values: Mapping[str, Any]) -> int:
  return values.get("hidden_size", 1536)


FAMILIES = (
  Family(
    "deberta-v2", BERT,
    (
      Field("vocab_size", "vocab_size", 128_100), Field("hidden_size", "d_model", 1536),
      Field("embedding_size", "d_model", _width), Field("pooler_hidden_size", "d_model", _width),
      Field("num_hidden_layers", "num_layers", 24), Field("num_attention_heads", "num_heads", 24),
      Field("intermediate_size", "d_ff", 6144), HeadWidth(),
      Field("hidden_act", "activation", "gelu", ACTIVATIONS), HeadActivation(),
      Field("type_vocab_size", "token_types", 0), Field("layer_norm_eps", "norm_eps", 1e-7),
      Field("max_position_embeddings", "max_positions", 512), Disentangled(),
      Field("hidden_dropout_prob", "dropout", 0.1),
      Field("attention_probs_dropout_prob", "attention_dropout", 0.1),
      Always("tie_word_embeddings", True), ConvBeside(), Always("conv_groups", 1),
    ),
    (
      Row("deberta.embeddings.word_embeddings.weight", "embed.table", "v d -> v d"),
      *under(
        "deberta.embeddings", "encoder",
        Row("token_type_embeddings.weight", "type_embed.table", "t d -> t d"),
        *norm("LayerNorm", "embed_norm"),
      ),
      Row("deberta.encoder.rel_embeddings.weight", "encoder.relative.embed.table", "r d -> r d"),
      *norm("deberta.encoder.LayerNorm", "encoder.relative.norm"),
      *linear("deberta.encoder.conv.conv", "encoder.layers.conv.proj", "e d k -> k d e", "e -> e"),
      *norm("deberta.encoder.conv.LayerNorm", "encoder.layers.conv.norm"),
      *under(
        "deberta.encoder.layer.{i}", "encoder.layers",
        *linear("attention.self.query_proj", "attn.q_proj", HEADS, HEAD_BIAS),
        *linear("attention.self.key_proj", "attn.k_proj", HEADS, HEAD_BIAS),
        *linear("attention.self.value_proj", "attn.v_proj", HEADS, HEAD_BIAS),
        *linear("attention.self.pos_query_proj", "attn.relative.q_proj", HEADS, HEAD_BIAS),
        *linear("attention.self.pos_key_proj", "attn.relative.k_proj", HEADS, HEAD_BIAS),
        *linear("attention.output.dense", "attn.o_proj", OUT, "d -> d"),
        *norm("attention.output.LayerNorm", "attn_post_norm"),
        *linear("intermediate.dense", "mlp.up_proj", UP, "f -> f"),
        *linear("output.dense", "mlp.down_proj", DOWN, "d -> d"),
        *norm("output.LayerNorm", "mlp_post_norm"),
      ),
    ),
    {
      "DebertaV2ForMaskedLM": Class(MASKED, BERT_WORDS, surplus=r"mask_predictions\..*"),
      "DebertaV2ForSequenceClassification": Class(
        dict(head="sequence", head_dense=True), (*dense("pooler.dense"), *labels("classifier"))
      ),
      "DebertaV2ForTokenClassification": Class(dict(head="token"), labels("classifier")),
      "DebertaV2ForQuestionAnswering": Class(dict(head="span"), labels("qa_outputs")),
      "DebertaV2Model": Class(dict(head="embedding"), base=True),
    },
    "deberta.", pad=0,
    # `legacy` says under which names the same masked-LM head lies: both are read.
    unread=("legacy", "pooler_dropout", "cls_dropout", "padding_idx",
            "summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout"),
    surplus=r"(deberta\.)?embeddings\.position_(ids|embeddings\.weight)",
    repeated=("cls.predictions.decoder.weight",),
    renamed=((r"gamma$", "weight"), (r"beta$", "bias"),
             (r"cls\.predictions\.decoder\.bias$", "cls.predictions.bias"),
             (r"^lm_predictions\.lm_head\.bias$", "cls.predictions.bias"),
             (r"^lm_predictions\.lm_head\.", "cls.predictions.transform.")),
  ),
)  # fmt: skip
