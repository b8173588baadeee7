"""Encoders with positions in a table: BERT, RoBERTa, ELECTRA, ALBERT, DistilBERT."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.hf.decoders import DOWN, HEAD_BIAS, HEADS, OUT, TIED, UP, labels
from model.hf.engine import Row, linear, norm, under
from model.hf.family import Always, Class, Family, Field, Fields
from model.hf.fields import ACTIVATIONS

BERT = dict(
  shape="encoder", positions="learned", norm="layer", norm_placement="post", gated=False,
  embed_norm=True, final_norm=False, mlp_bias=True, attention_bias=True, attention_out_bias=True,
)  # fmt: skip
MASKED = dict(head="masked_lm", head_dense=True, head_norm=True, logit_bias=True)
SENTENCE = dict(head="sequence", head_dense=True, head_activation="tanh")
POOLED = dict(head="embedding", head_dense=True, head_activation="tanh")
# Without a dense layer, whose activation `Activations` would else be.
TOKENS = dict(head="token", head_activation="gelu")
SPANS = dict(head="span", head_activation="gelu")
BODY = dict(head="embedding", head_activation="gelu")
ABSOLUTE = Always("position_embedding_type", "absolute")


@dataclasses.dataclass(frozen=True)
class Activations:
  """The activation of MLPs, which is also that of the layer before a head that sets no other."""

  theirs: str
  default: str

  @property
  def names(self) -> tuple[str, ...]:
    return (self.theirs,)

  @property
  def _field(self) -> Field:
    return Field(self.theirs, "activation", self.default, ACTIVATIONS)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    both = self._field.read(values)
    return {**both, "head_activation": both["activation"]}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return self._field.write(cfg)


@dataclasses.dataclass(frozen=True)
class _NarrowTables:
  """`embedding_size`: a projection follows where it is not the width of the layers (ELECTRA)."""

  names = ("embedding_size",)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    width = values.get("embedding_size", 128)
    return {} if width == values.get("hidden_size", 256) else {"d_embed": width}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return {"embedding_size": cfg.embed_width}


def dense(theirs: str) -> tuple[Row, ...]:
  """The layer before a head."""
  return linear(theirs, "head.dense", "e d -> d e", "e -> e")


def words(theirs: str, layer: str = "dense", normed: str = "LayerNorm") -> tuple[Row, ...]:
  """A masked-LM head; of an untied one the decoder has a bias of its own."""
  tied, untied = (lambda cfg: cfg.tie_embeddings), (lambda cfg: not cfg.tie_embeddings)
  return (
    *dense(f"{theirs}.{layer}"), *norm(f"{theirs}.{normed}", "head.norm"),
    Row(f"{theirs}.bias", "head.bias", "v -> v", when=tied),
    Row(f"{theirs}.decoder.bias", "head.bias", "v -> v", when=untied),
    Row(f"{theirs}.decoder.weight", "head.proj.w", "v d -> d v"),
  )  # fmt: skip


def pair(pooler: str, classifier: str) -> tuple[Row, ...]:
  """What tells whether two texts follow each other."""
  return (*linear(pooler, "pair.dense", "e d -> d e", "e -> e"),
          *linear(classifier, "pair.proj", "l d -> d l", "l -> l"))  # fmt: skip


def paired(
  name: str, said: tuple[Row, ...], pooler: str, following: str
) -> dict[str, Class]:  # fmt: skip
  """Classes of a family that learned from pairs of texts too.

  Args:
    said: rows of the masked-LM head.
    pooler: the layer behind the first hidden state, with the family's prefix.
    following: what tells whether two texts follow each other.
  """
  unread, unfollowed = (rf"{re.escape(theirs)}\.\w+" for theirs in (pooler, following))
  return {
    f"{name}ForMaskedLM": Class(MASKED, said, surplus=f"{unread}|{unfollowed}"),
    f"{name}ForPreTraining": Class(
      {**MASKED, "pair_head": True}, (*said, *pair(pooler, following))
    ),
    f"{name}ForSequenceClassification": Class(SENTENCE, (*dense(pooler), *labels("classifier"))),
    f"{name}ForTokenClassification": Class(TOKENS, labels("classifier"), surplus=unread),
    f"{name}ForQuestionAnswering": Class(SPANS, labels("qa_outputs"), surplus=unread),
    f"{name}Model": Class(POOLED, dense(pooler.partition(".")[2]), base=True),
  }


def embeddings(theirs: str, normed: str = "LayerNorm") -> tuple[Row, ...]:
  """Tables of tokens, positions and token types, and their norm."""
  return (
    Row(f"{theirs}.word_embeddings.weight", "embed.table", "v d -> v d"),
    *under(
      theirs, "encoder",
      Row("position_embeddings.weight", "position_embed.table", "p d -> p d"),
      Row("token_type_embeddings.weight", "type_embed.table", "t d -> t d"),
      *norm(normed, "embed_norm"),
    ),
  )  # fmt: skip


def bert_layers(
  theirs: str, q: str, k: str, v: str, out: str, attention_norm: str
) -> tuple[Row, ...]:
  """Layers whose MLP is called as BERT's is."""
  return under(
    f"{theirs}.encoder.layer.{{i}}", "encoder.layers",
    *linear(q, "attn.q_proj", HEADS, HEAD_BIAS), *linear(k, "attn.k_proj", HEADS, HEAD_BIAS),
    *linear(v, "attn.v_proj", HEADS, HEAD_BIAS), *linear(out, "attn.o_proj", OUT, "d -> d"),
    *norm(attention_norm, "attn_post_norm"),
    *linear("intermediate.dense", "mlp.up_proj", UP, "f -> f"),
    *linear("output.dense", "mlp.down_proj", DOWN, "d -> d"),
    *norm("output.LayerNorm", "mlp_post_norm"),
  )  # fmt: skip


def _bert_rows(name: str) -> tuple[Row, ...]:
  own = "attention.self"
  return (
    *embeddings(f"{name}.embeddings"),
    *bert_layers(name, f"{own}.query", f"{own}.key", f"{own}.value", "attention.output.dense",
             "attention.output.LayerNorm"),
  )  # fmt: skip


def bert_fields(
  activation: Fields, *more: Fields, sizes: tuple[int, ...] = (768, 12, 12, 3072)
) -> tuple[Fields, ...]:
  """Fields that all have but DistilBERT; `sizes` are assumed without them."""
  D, L, N, F = sizes
  return (
    Field("vocab_size", "vocab_size"), Field("hidden_size", "d_model", D),
    Field("num_hidden_layers", "num_layers", L), Field("num_attention_heads", "num_heads", N),
    Field("intermediate_size", "d_ff", F), activation, Field("layer_norm_eps", "norm_eps", 1e-12),
    Field("hidden_dropout_prob", "dropout", 0.1),
    Field("attention_probs_dropout_prob", "attention_dropout", 0.1), TIED, ABSOLUTE, *more,
  )  # fmt: skip


GELU = Activations("hidden_act", "gelu")
OWN_GELU = Field("hidden_act", "activation", "gelu", ACTIVATIONS)  # The head has another.
TYPES = Field("type_vocab_size", "token_types", 2)
POSITIONS = Field("max_position_embeddings", "max_positions", 512)
PADDING = Always("pad_token_id", 1)  # Where positions begin behind its id.
BEHIND_PADDING = Field("max_position_embeddings", "max_positions", 512, minus=2)
BERT_WORDS = words("cls.predictions", "transform.dense", "transform.LayerNorm")
BERT_TWINS = {"cls.predictions.decoder.bias": "cls.predictions.bias"}


def _roberta(model_type: str, name: str) -> Family:
  """RoBERTa under one of its names; positions begin behind the id of padding, 1."""
  unused = r"roberta\.pooler\.dense\.\w+"
  return Family(
    model_type, {**BERT, "position_offset": 2},
    bert_fields(OWN_GELU, TYPES, BEHIND_PADDING, PADDING), _bert_rows("roberta"),
    {
      f"{name}ForMaskedLM": Class(MASKED, words("lm_head", normed="layer_norm"), surplus=unused),
      f"{name}ForSequenceClassification": Class(
        SENTENCE, (*dense("classifier.dense"), *labels("classifier.out_proj")), surplus=unused
      ),
      f"{name}ForTokenClassification": Class(TOKENS, labels("classifier"), surplus=unused),
      f"{name}ForQuestionAnswering": Class(SPANS, labels("qa_outputs"), surplus=unused),
      f"{name}Model": Class(POOLED, dense("pooler.dense"), base=True),
    },
    "roberta.", pad=1, unread=("classifier_dropout", "output_past"),
    surplus=r"(roberta\.)?embeddings\.position_ids", repeated=("lm_head.decoder.weight",),
    twins={"lm_head.decoder.bias": "lm_head.bias"},
  )  # fmt: skip


FAMILIES = (
  Family(
    "bert", BERT, bert_fields(GELU, TYPES, POSITIONS), _bert_rows("bert"),
    paired("Bert", BERT_WORDS, "bert.pooler.dense", "cls.seq_relationship"),
    "bert.",
    unread=("classifier_dropout", "pooler_fc_size", "pooler_num_attention_heads", "directionality",
            "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
    surplus=r"(bert\.)?embeddings\.position_ids",
    repeated=("cls.predictions.decoder.weight",), twins=BERT_TWINS,
    renamed=((r"gamma$", "weight"), (r"beta$", "bias")),
  ),
  _roberta("roberta", "Roberta"),
  _roberta("xlm-roberta", "XLMRoberta"),
  _roberta("camembert", "Camembert"),
  Family(
    "electra", BERT,
    bert_fields(GELU, TYPES, POSITIONS, _NarrowTables(), sizes=(256, 12, 4, 1024)),
    (
      *_bert_rows("electra"),
      *linear("electra.embeddings_project", "encoder.embed_proj", "d e -> e d", "d -> d"),
    ),
    {
      "ElectraForPreTraining": Class(
        dict(head="replaced_token", head_dense=True),
        (*dense("discriminator_predictions.dense"),
         *labels("discriminator_predictions.dense_prediction")),
      ),
      "ElectraForMaskedLM": Class(
        {**MASKED, "head_activation": "gelu"},
        (*dense("generator_predictions.dense"),
         *norm("generator_predictions.LayerNorm", "head.norm"),
         Row("generator_lm_head.bias", "head.bias", "v -> v"),
         Row("generator_lm_head.weight", "head.proj.w", "v d -> d v")),
      ),
      "ElectraForSequenceClassification": Class(
        {**SENTENCE, "head_activation": "gelu"},
        (*dense("classifier.dense"), *labels("classifier.out_proj")),
      ),
      "ElectraForTokenClassification": Class(TOKENS, labels("classifier")),
      "ElectraForQuestionAnswering": Class(SPANS, labels("qa_outputs")),
      "ElectraModel": Class(BODY, base=True),
    },
    "electra.", surplus=r"(electra\.)?embeddings\.position_ids",
    unread=("classifier_dropout", "summary_type", "summary_use_proj", "summary_activation",
            "summary_last_dropout"),  # Those of multiple choice.
    repeated=("generator_lm_head.weight",),
  ),
  Family(
    "albert", BERT,
    bert_fields(
      Activations("hidden_act", "gelu_new"), TYPES, POSITIONS,
      Field("embedding_size", "d_embed", 128), Field("num_hidden_groups", "layer_sets", 1),
      Always("inner_group_num", 1), sizes=(4096, 12, 64, 16_384),
    ),
    (
      *embeddings("albert.embeddings"),
      *linear("albert.encoder.embedding_hidden_mapping_in", "encoder.embed_proj", "d e -> e d",
              "d -> d"),
      *under(
        "albert.encoder.albert_layer_groups.{i}.albert_layers.0", "encoder.layers",
        *linear("attention.query", "attn.q_proj", HEADS, HEAD_BIAS),
        *linear("attention.key", "attn.k_proj", HEADS, HEAD_BIAS),
        *linear("attention.value", "attn.v_proj", HEADS, HEAD_BIAS),
        *linear("attention.dense", "attn.o_proj", OUT, "d -> d"),
        *norm("attention.LayerNorm", "attn_post_norm"),
        *linear("ffn", "mlp.up_proj", UP, "f -> f"),
        *linear("ffn_output", "mlp.down_proj", DOWN, "d -> d"),
        *norm("full_layer_layer_norm", "mlp_post_norm"),
      ),
    ),
    paired("Albert", words("predictions"), "albert.pooler", "sop_classifier.classifier"),
    "albert.", surplus=r"(albert\.)?embeddings\.position_ids",
    unread=("classifier_dropout_prob", "down_scale_factor", "gap_size", "net_structure_type",
            "num_memory_blocks"),  # Of Google's code; Transformers computes without them.
    repeated=("predictions.decoder.weight",),
    twins={"predictions.decoder.bias": "predictions.bias"},
  ),
  Family(
    "distilbert", {**BERT, "norm_eps": 1e-12},
    (
      Field("vocab_size", "vocab_size", 30_522), Field("dim", "d_model", 768),
      Field("n_layers", "num_layers", 6), Field("n_heads", "num_heads", 12),
      Field("hidden_dim", "d_ff", 3072), Activations("activation", "gelu"),
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
      "DistilBertForTokenClassification": Class(TOKENS, labels("classifier")),
      "DistilBertForQuestionAnswering": Class(SPANS, labels("qa_outputs")),
      "DistilBertModel": Class(BODY, base=True),
    },
    "distilbert.",
    unread=("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout", "tie_weights_"),
    surplus=r"(distilbert\.)?embeddings\.position_ids", repeated=("vocab_projector.weight",),
  ),
)  # fmt: skip
