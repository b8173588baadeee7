"""T5 and its relatives: T5 v1.1, Flan, UL2 (all of them `t5`), mT5, umT5, local LongT5."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from model.config import ModelConfig
from model.errors import InputError
from model.hf.decoders import DOWN, HEADS, OUT, TIED, UP, WORDS, labels
from model.hf.encoders import SENTENCE, dense
from model.hf.engine import Row, norm, under
from model.hf.family import Always, Class, Family, Field, Fields, Same
from model.hf.fields import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class _Output:
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
class _MLP:
  """`relu`, `gated-silu` …, where `gated-gelu` is the approximate one; `dense_act_fn` and
  `is_gated_act`, where they are given, decide.
  """

  default: str
  names = ("feed_forward_proj", "dense_act_fn", "is_gated_act")

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    given = values.get("feed_forward_proj", self.default)
    gate, _, name = given.rpartition("-")
    name = values.get("dense_act_fn") or ("gelu_new" if given == "gated-gelu" else name)
    if gate not in ("", "gated") or name not in ACTIVATIONS:
      raise InputError(f"config.json: feed_forward_proj={given!r} ({name}) is not known.")
    return {"gated": values.get("is_gated_act", gate == "gated"), "activation": ACTIVATIONS[name]}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    name = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == cfg.activation)
    short = "gelu" if cfg.gated and name == "gelu_new" else name
    return {
      "feed_forward_proj": f"gated-{short}" if cfg.gated else name,
      "dense_act_fn": name, "is_gated_act": cfg.gated,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Radius:
  """A token sees as many tokens on either side."""

  names = ("local_radius",)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"window": 2 * values.get("local_radius", 127) + 1}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    if cfg.window is None or cfg.window % 2 == 0:
      raise InputError(f"model.window={cfg.window} has no local_radius: it must be odd.")
    return {"local_radius": cfg.window // 2}


def _attention(theirs: str, ours: str) -> tuple[Row, ...]:
  letters = tuple(Row(f"{theirs}.{c}.weight", f"{ours}.{c}_proj.w", HEADS) for c in "qkv")
  return (*letters, Row(f"{theirs}.o.weight", f"{ours}.o_proj.w", OUT))


def _stack(name: str, attention: str) -> tuple[Row, ...]:
  mlp = 2 if name == "decoder" else 1
  own, cross = f"layer.0.{attention}", "layer.1.EncDecAttention"
  bias = f"{own}.relative_attention_bias.weight"
  gated, plain = (lambda cfg: cfg.gated), (lambda cfg: not cfg.gated)
  return (
    Row(f"{name}.block.0.{bias}", f"{name}.relative_bias", "b n -> b n"),
    *under(
      f"{name}.block.{{i}}", f"{name}.layers",
      *norm("layer.0.layer_norm", "attn_norm"), *_attention(own, "attn"),
      Row(bias, "attn.relative_bias", "b n -> b n"),
      *(norm("layer.1.layer_norm", "cross_attn_norm") if mlp == 2 else ()),
      *(_attention(cross, "cross_attn") if mlp == 2 else ()),
      *norm(f"layer.{mlp}.layer_norm", "mlp_norm"),
      Row(f"layer.{mlp}.DenseReluDense.wi.weight", "mlp.up_proj.w", UP, when=plain),
      Row(f"layer.{mlp}.DenseReluDense.wi_0.weight", "mlp.gate_proj.w", UP),
      Row(f"layer.{mlp}.DenseReluDense.wi_1.weight", "mlp.up_proj.w", UP, when=gated),
      Row(f"layer.{mlp}.DenseReluDense.wo.weight", "mlp.down_proj.w", DOWN),
    ),
    *norm(f"{name}.final_layer_norm", f"{name}.final_norm"),
  )  # fmt: skip


def _tied(tensors: Mapping[str, np.ndarray]) -> bool:
  """config.json says it of some folders, and the opposite of others."""
  words = tensors.get("lm_head.weight")
  return words is None or np.array_equal(words, tensors.get("shared.weight", words))


def _classes(name: str, *, labelled: bool) -> dict[str, Class]:
  alone = dict(shape="encoder", num_decoder_layers=None, decoder_pattern=(), decoder_start_id=None,
               logit_scale=None)  # fmt: skip
  unscaled = dict(logit_scale=None)
  classes = {
    f"{name}ForConditionalGeneration": Class(
      dict(head="language"), (WORDS,), told={"tie_embeddings": _tied}
    ),
    f"{name}EncoderModel": Class({**alone, "head": "embedding"}, surplus=r"decoder\..*"),
    f"{name}Model": Class({**unscaled, "head": "embedding"}),
  }
  return classes if not labelled else classes | {
    f"{name}ForSequenceClassification": Class(
      {**unscaled, **SENTENCE},
      (*dense("classification_head.dense"), *labels("classification_head.out_proj")),
      prefix="transformer.",
    ),
    f"{name}ForTokenClassification": Class(
      {**alone, "head": "token"}, labels("classifier"), prefix="transformer."
    ),
    f"{name}ForQuestionAnswering": Class({**unscaled, "head": "span"}, labels("qa_outputs")),
  }  # fmt: skip


def _fields(
  mlp: str, d_ff: int, layers: int, heads: int, vocabulary: int, *more: Fields
) -> tuple[Fields, ...]:
  return (
    Field("vocab_size", "vocab_size", vocabulary), Field("d_model", "d_model", 512),
    Field("d_kv", "head_dim", 64), Field("d_ff", "d_ff", d_ff),
    Field("num_heads", "num_heads", heads), Field("num_layers", "num_layers", layers),
    Field("num_decoder_layers", "num_decoder_layers", lambda v: v.get("num_layers", layers)),
    Field("relative_attention_num_buckets", "relative_buckets", 32),
    Field("relative_attention_max_distance", "relative_max_distance", 128),
    Field("layer_norm_epsilon", "norm_eps", 1e-6), _MLP(mlp),
    Field("decoder_start_token_id", "decoder_start_id", lambda v: v.get("pad_token_id", 0)),
    Same(("dropout_rate",), "dropout", 0.1), Same(("dropout_rate",), "attention_dropout", 0.1),
    Same(("dropout_rate",), "mlp_dropout", 0.1), *more,
  )  # fmt: skip


def _family(
  model_type: str, name: str, fields: tuple[Fields, ...], *, encoder: str = "SelfAttention",
  labelled: bool = True, unread: tuple[str, ...] = (), **settings: Any,
) -> Family:  # fmt: skip
  whole = dict(shape="encoder_decoder", positions="t5_bias", norm="rms", attention_scale=1.0,
               max_positions=None)  # fmt: skip
  first = Row("shared.weight", "embed.table", "v d -> v d")
  return Family(
    model_type, {**whole, **settings}, fields,
    (first, *_stack("encoder", encoder), *_stack("decoder", "SelfAttention")),
    _classes(name, labelled=labelled), "", pad=0,
    unread=("initializer_factor", "n_positions", "output_past", "classifier_dropout", *unread),
    surplus=r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias"
            r"\.weight",
    repeated=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
  )  # fmt: skip


FAMILIES = (
  _family("t5", "T5", _fields("relu", 2048, 6, 8, 32_128, _Output())),
  # What mT5 scores is not scaled, whether it is tied or not.
  _family("mt5", "MT5", _fields("gated-gelu", 1024, 8, 6, 250_112, TIED)),
  _family(
    "umt5", "UMT5", _fields("gated-gelu", 1024, 8, 6, 250_112, _Output()),
    unread=("scalable_attention",), relative_bias_per_layer=True,
  ),
  _family(
    "longt5", "LongT5",
    _fields("relu", 2048, 6, 8, 32_128, _Output(), _Radius(),
            Always("encoder_attention_type", "local")),
    encoder="LocalSelfAttention", labelled=False, unread=("global_block_size",),
    layer_pattern=("local",), decoder_pattern=("global",),
  ),
)  # fmt: skip
