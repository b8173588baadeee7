"""Encoder–decoders: T5, BART, Marian."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.errors import InputError
from model.hf.decoders import DOWN, HEAD_BIAS, HEADS, OUT, TIED, UP, WORDS, labels
from model.hf.encoders import SENTENCE, dense
from model.hf.engine import Row, linear, norm, under
from model.hf.family import Always, Class, Family, Field, Fields, Same
from model.hf.fields import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class _T5Output:
  """Tied tables and the scale of what is scored against them: published folders have no
  `scale_decoder_outputs`, and scale where the tables are tied.
  """

  names = ("tie_word_embeddings", "scale_decoder_outputs")

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    tied = values.get("tie_word_embeddings", True)
    scaled = values.get("scale_decoder_outputs", tied)
    scale = {"logit_scale": values.get("d_model", 512) ** -0.5} if scaled else {}
    return {"tie_embeddings": tied, **scale}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return {
      "tie_word_embeddings": cfg.tie_embeddings,
      "scale_decoder_outputs": cfg.logit_scale is not None,
    }


@dataclasses.dataclass(frozen=True)
class _T5MLP:
  """`relu`, `gated-gelu` …: T5 v1.1's gelu is the approximate one."""

  names = ("feed_forward_proj",)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    given = values.get("feed_forward_proj", "relu")
    gate, _, name = given.rpartition("-")
    name = "gelu_new" if given == "gated-gelu" else name
    if gate not in ("", "gated") or name not in ACTIVATIONS:
      raise InputError(f"config.json: feed_forward_proj={given!r} is not known.")
    return {"gated": gate == "gated", "activation": ACTIVATIONS[name]}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    if cfg.gated and cfg.activation == "gelu_tanh":
      return {"feed_forward_proj": "gated-gelu"}
    name = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == cfg.activation)
    return {"feed_forward_proj": f"gated-{name}" if cfg.gated else name}


def _t5_attention(theirs: str, ours: str) -> tuple[Row, ...]:
  letters = tuple(Row(f"{theirs}.{c}.weight", f"{ours}.{c}_proj.w", HEADS) for c in "qkv")
  return (*letters, Row(f"{theirs}.o.weight", f"{ours}.o_proj.w", OUT))


def _t5_stack(name: str) -> tuple[Row, ...]:
  mlp = 2 if name == "decoder" else 1
  own, cross = "layer.0.SelfAttention", "layer.1.EncDecAttention"
  bias = f"{own}.relative_attention_bias"
  gated, plain = (lambda cfg: cfg.gated), (lambda cfg: not cfg.gated)
  return (
    Row(f"{name}.block.0.{bias}.weight", f"{name}.relative_bias", "b n -> b n"),
    *under(
      f"{name}.block.{{i}}", f"{name}.layers",
      *norm("layer.0.layer_norm", "attn_norm"), *_t5_attention(own, "attn"),
      *(norm("layer.1.layer_norm", "cross_attn_norm") if mlp == 2 else ()),
      *(_t5_attention(cross, "cross_attn") if mlp == 2 else ()),
      *norm(f"layer.{mlp}.layer_norm", "mlp_norm"),
      Row(f"layer.{mlp}.DenseReluDense.wi.weight", "mlp.up_proj.w", UP, when=plain),
      Row(f"layer.{mlp}.DenseReluDense.wi_0.weight", "mlp.gate_proj.w", UP),
      Row(f"layer.{mlp}.DenseReluDense.wi_1.weight", "mlp.up_proj.w", UP, when=gated),
      Row(f"layer.{mlp}.DenseReluDense.wo.weight", "mlp.down_proj.w", DOWN),
    ),
    *norm(f"{name}.final_layer_norm", f"{name}.final_norm"),
  )  # fmt: skip


def _bart_stack(name: str) -> tuple[Row, ...]:
  def attention(theirs: str, ours: str) -> tuple[Row, ...]:
    return (
      *linear(f"{theirs}.q_proj", f"{ours}.q_proj", HEADS, HEAD_BIAS),
      *linear(f"{theirs}.k_proj", f"{ours}.k_proj", HEADS, HEAD_BIAS),
      *linear(f"{theirs}.v_proj", f"{ours}.v_proj", HEADS, HEAD_BIAS),
      *linear(f"{theirs}.out_proj", f"{ours}.o_proj", OUT, "d -> d"),
      *norm(f"{theirs}_layer_norm", f"{ours}_post_norm"),
    )

  return (
    Row(f"model.{name}.embed_positions.weight", f"{name}.position_embed.table", "p d -> p d"),
    *norm(f"model.{name}.layernorm_embedding", f"{name}.embed_norm"),
    *under(
      f"model.{name}.layers.{{i}}", f"{name}.layers",
      *attention("self_attn", "attn"), *attention("encoder_attn", "cross_attn"),
      *linear("fc1", "mlp.up_proj", UP, "f -> f"), *linear("fc2", "mlp.down_proj", DOWN, "d -> d"),
      *norm("final_layer_norm", "mlp_post_norm"),
    ),
  )  # fmt: skip


def _bart_fields(*more: Fields) -> tuple[Fields, ...]:
  return (
    Field("vocab_size", "vocab_size"), Field("d_model", "d_model", 1024),
    Field("encoder_layers", "num_layers", 12), Field("decoder_layers", "num_decoder_layers", 12),
    Field("encoder_attention_heads", "num_heads", 16),
    Field("decoder_attention_heads", "num_heads", 16), Field("encoder_ffn_dim", "d_ff", 4096),
    Field("decoder_ffn_dim", "d_ff", 4096),
    Field("max_position_embeddings", "max_positions", 1024),
    Field("activation_function", "activation", "gelu", ACTIVATIONS),
    Field("scale_embedding", "scale_embeddings", False), Field("dropout", "dropout", 0.1),
    Field("attention_dropout", "attention_dropout", 0.0),
    Field("activation_dropout", "mlp_dropout", 0.0),
    TIED, Always("add_final_layer_norm", False),
    Always("normalize_before", False), Always("add_bias_logits", False), *more,
  )  # fmt: skip


BART = dict(shape="encoder_decoder", norm="layer", norm_placement="post", final_norm=False,
            gated=False, mlp_bias=True, attention_bias=True, attention_out_bias=True)  # fmt: skip
BART_ROWS = (
  Row("model.shared.weight", "embed.table", "v d -> v d"),
  *_bart_stack("encoder"),
  *_bart_stack("decoder"),
)
BART_UNREAD = ("encoder_layerdrop", "decoder_layerdrop", "init_std", "classifier_dropout",
               "classif_dropout", "num_hidden_layers", "gradient_checkpointing")  # fmt: skip
BART_REPEATED = (
  "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight",
)  # fmt: skip
FAMILIES = (
  Family(
    "t5",
    dict(shape="encoder_decoder", positions="t5_bias", norm="rms", attention_scale=1.0,
         max_positions=None),
    (
      Field("vocab_size", "vocab_size", 32_128), Field("d_model", "d_model", 512),
      Field("d_kv", "head_dim", 64), Field("d_ff", "d_ff", 2048),
      Field("num_heads", "num_heads", 8), Field("num_layers", "num_layers", 6),
      Field("num_decoder_layers", "num_decoder_layers", lambda v: v.get("num_layers", 6)),
      Field("relative_attention_num_buckets", "relative_buckets", 32),
      Field("relative_attention_max_distance", "relative_max_distance", 128),
      Field("layer_norm_epsilon", "norm_eps", 1e-6), _T5Output(), _T5MLP(),
      Field("decoder_start_token_id", "decoder_start_id", lambda v: v.get("pad_token_id", 0)),
      Same(("dropout_rate",), "dropout", 0.1), Same(("dropout_rate",), "attention_dropout", 0.1),
      Same(("dropout_rate",), "mlp_dropout", 0.1),
    ),
    (Row("shared.weight", "embed.table", "v d -> v d"), *_t5_stack("encoder"),
     *_t5_stack("decoder")),
    {"T5ForConditionalGeneration": Class(dict(head="language"), (WORDS,))},
    "", pad=0,
    unread=("initializer_factor", "n_positions", "is_gated_act", "dense_act_fn",
            "output_past", "classifier_dropout"),
    surplus=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    repeated=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
  ),
  Family(
    "bart", {**BART, "positions": "learned", "position_offset": 2, "embed_norm": True},
    _bart_fields(
      Field("decoder_start_token_id", "decoder_start_id", 2), Always("normalize_embedding", True),
      Always("static_position_embeddings", False), Always("extra_pos_embeddings", 2),
    ),
    BART_ROWS,
    {
      "BartForConditionalGeneration": Class(dict(head="language"), (WORDS,)),
      "BartForSequenceClassification": Class(
        SENTENCE, (*dense("classification_head.dense"), *labels("classification_head.out_proj"))
      ),
    },
    "model.", pad=1, unread=BART_UNREAD, repeated=BART_REPEATED,
    zeros={"final_logits_bias": lambda cfg: (1, cfg.real_vocab)},
  ),
  Family(
    "marian", {**BART, "positions": "sinusoidal"},
    _bart_fields(
      Field("decoder_start_token_id", "decoder_start_id"), Always("normalize_embedding", False),
      Always("static_position_embeddings", True),
      Always("share_encoder_decoder_embeddings", True),
      Field("decoder_vocab_size", "vocab_size", lambda v: v.get("vocab_size")),
    ),
    BART_ROWS,
    {"MarianMTModel": Class(
      dict(head="language", logit_bias=True),
      (WORDS, Row("final_logits_bias", "head.bias", "1 v -> v")),
    )},
    "model.", unread=(*BART_UNREAD, "bad_words_ids", "extra_pos_embeddings"),
    repeated=BART_REPEATED, surplus=r"model\.(en|de)coder\.embed_positions\.weight",
  ),
)  # fmt: skip
