"""BART and its relatives: mBART, Marian, Pegasus, M2M100 and NLLB."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from model.hf.decoders import DOWN, HEAD_BIAS, HEADS, OUT, TIED, UP, WORDS, labels
from model.hf.encoders import PADDING, SENTENCE, dense
from model.hf.engine import Row, linear, norm, under
from model.hf.family import Always, Class, Family, Field, Fields
from model.hf.fields import ACTIVATIONS


def _stack(name: str) -> tuple[Row, ...]:
  """Layers that norm before or after: of each two rows of a norm, a model has one."""

  def attention(theirs: str, ours: str) -> tuple[Row, ...]:
    return (
      *linear(f"{theirs}.q_proj", f"{ours}.q_proj", HEADS, HEAD_BIAS),
      *linear(f"{theirs}.k_proj", f"{ours}.k_proj", HEADS, HEAD_BIAS),
      *linear(f"{theirs}.v_proj", f"{ours}.v_proj", HEADS, HEAD_BIAS),
      *linear(f"{theirs}.out_proj", f"{ours}.o_proj", OUT, "d -> d"),
      *norm(f"{theirs}_layer_norm", f"{ours}_norm"),
      *norm(f"{theirs}_layer_norm", f"{ours}_post_norm"),
    )

  return (
    Row(f"model.{name}.embed_positions.weight", f"{name}.position_embed.table", "p d -> p d"),
    *norm(f"model.{name}.layernorm_embedding", f"{name}.embed_norm"),
    *under(
      f"model.{name}.layers.{{i}}", f"{name}.layers",
      *attention("self_attn", "attn"), *attention("encoder_attn", "cross_attn"),
      *linear("fc1", "mlp.up_proj", UP, "f -> f"), *linear("fc2", "mlp.down_proj", DOWN, "d -> d"),
      *norm("final_layer_norm", "mlp_norm"), *norm("final_layer_norm", "mlp_post_norm"),
    ),
    *norm(f"model.{name}.layer_norm", f"{name}.final_norm"),
  )  # fmt: skip


def _fields(start: int | None, act: str, *more: Fields, before: bool) -> tuple[Fields, ...]:
  return (
    Field("vocab_size", "vocab_size"), Field("d_model", "d_model", 1024),
    Field("encoder_layers", "num_layers", 12), Field("decoder_layers", "num_decoder_layers", 12),
    Field("encoder_attention_heads", "num_heads", 16),
    Field("decoder_attention_heads", "num_heads", 16), Field("encoder_ffn_dim", "d_ff", 4096),
    Field("decoder_ffn_dim", "d_ff", 4096),
    Field("max_position_embeddings", "max_positions", 1024),
    Field("activation_function", "activation", act, ACTIVATIONS),
    Field("dropout", "dropout", 0.1), Field("activation_dropout", "mlp_dropout", 0.0),
    Field("decoder_start_token_id", "decoder_start_id", start), TIED,
    Always("add_final_layer_norm", before), Always("normalize_before", before),
    Always("add_bias_logits", False), Always("tie_encoder_decoder", False), *more,
  )  # fmt: skip


def _biased(tensors: Mapping[str, np.ndarray]) -> bool:
  return bool(np.any(tensors.get(_BIAS, 0)))


_BIAS = "final_logits_bias"
_BIAS_ROW = Row(_BIAS, "head.bias", "1 v -> v")
_LEARNED = (Always("static_position_embeddings", False), Always("extra_pos_embeddings", 2))
_STATIC = Always("static_position_embeddings", True)
_UNSCALED, _SCALED = (Field("scale_embedding", "scale_embeddings", d) for d in (False, True))
_CERTAIN = Field("attention_dropout", "attention_dropout", 0.0)
AFTER = dict(shape="encoder_decoder", norm="layer", norm_placement="post", final_norm=False,
             gated=False, mlp_bias=True, attention_bias=True, attention_out_bias=True)  # fmt: skip
BEFORE = {**AFTER, "norm_placement": "pre", "final_norm": True}
LEARNED = dict(positions="learned", position_offset=2, embed_norm=True)
GENERATES = Class(
  dict(head="language"), (WORDS, _BIAS_ROW), told={"logit_bias": _biased},
  zeros={_BIAS: lambda cfg: (1, cfg.real_vocab)},
)  # fmt: skip
EMBEDS = Class(dict(head="embedding"), base=True, surplus=_BIAS)


def _family(
  model_type: str, settings: Mapping[str, Any], fields: tuple[Fields, ...],
  classes: Mapping[str, Class], pad: int | None, *unread: str,
) -> Family:  # fmt: skip
  return Family(
    model_type, settings, fields,
    (Row("model.shared.weight", "embed.table", "v d -> v d"), *_stack("encoder"),
     *_stack("decoder")),
    classes, "model.", pad=pad,
    unread=("encoder_layerdrop", "decoder_layerdrop", "init_std", "classifier_dropout",
            "classif_dropout", "num_hidden_layers", "_num_labels", "output_past", "save_step",
            "force_bos_token_to_be_generated", *unread),
    surplus=r"(model\.)?(en|de)coder\.version" if settings["positions"] == "learned" else
            r"(model\.)?(en|de)coder\.(embed_positions\.weights?|version)",
    repeated=("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight",
              "lm_head.weight"),
  )  # fmt: skip


FAMILIES = (
  _family(
    "bart", {**AFTER, **LEARNED},
    _fields(2, "gelu", _UNSCALED, _CERTAIN, Always("normalize_embedding", True), *_LEARNED,
            before=False),
    {
      "BartForConditionalGeneration": GENERATES,
      "BartForSequenceClassification": Class(
        SENTENCE, (*dense("classification_head.dense"), *labels("classification_head.out_proj")),
        surplus=_BIAS,
      ),
      "BartForQuestionAnswering": Class(dict(head="span"), labels("qa_outputs"), surplus=_BIAS),
      "BartModel": EMBEDS,
    }, 1,
  ),
  _family(
    "marian", {**AFTER, "positions": "sinusoidal"},
    _fields(None, "gelu", _UNSCALED, _CERTAIN, Always("normalize_embedding", False), _STATIC,
            Always("share_encoder_decoder_embeddings", True),
            Field("decoder_vocab_size", "vocab_size", lambda v: v.get("vocab_size")),
            before=False),
    {
      "MarianMTModel": Class(dict(head="language", logit_bias=True), (WORDS, _BIAS_ROW)),
      "MarianModel": EMBEDS,
    },
    None, "bad_words_ids", "extra_pos_embeddings",
  ),
  _family(
    "mbart", {**BEFORE, **LEARNED},
    _fields(None, "gelu", _UNSCALED, _CERTAIN, Always("normalize_embedding", True), *_LEARNED,
            before=True),
    {"MBartForConditionalGeneration": GENERATES, "MBartModel": EMBEDS}, 1,
  ),
  _family(
    "pegasus", {**BEFORE, "positions": "sinusoidal"},
    _fields(0, "gelu", _UNSCALED, _CERTAIN, Always("normalize_embedding", False), _STATIC,
            before=True),
    {"PegasusForConditionalGeneration": GENERATES, "PegasusModel": EMBEDS},
    0, "extra_pos_embeddings",
  ),
  _family(  # NLLB is published as this, too.
    "m2m_100",
    {**BEFORE, "positions": "sinusoidal", "position_offset": 2, "sinusoid_inclusive": True},
    _fields(2, "relu", _SCALED, Field("attention_dropout", "attention_dropout", 0.1),
            PADDING, before=True),
    {
      "M2M100ForConditionalGeneration": Class(dict(head="language"), (WORDS,)),
      "M2M100Model": EMBEDS,
    }, 1,
  ),
)  # fmt: skip
