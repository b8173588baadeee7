"""T5Gemma: an encoder and a decoder with the layers of Gemma 2."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.errors import InputError
from model.hf.decoders import DOWN, HEAD_BIAS, HEADS, OUT, TIED, UP, labels
from model.hf.engine import Row, linear, norm, under
from model.hf.family import COMMON, Always, Class, Family, Field, Fields, Same
from model.hf.fields import ACTIVATIONS, QueryScalar, layer_pattern
from model.hf.rotary_fields import Rotary

_WINDOW = 4096  # Where none is given; also written where no layer has one.


@dataclasses.dataclass(frozen=True)
class _Windows:
  """Layers by type. An encoder's token sees as many on either side as a decoder's sees in all."""

  stack: str
  names = ("sliding_window", "layer_types")

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    n, window = values["num_hidden_layers"], values.get("sliding_window", _WINDOW)
    usual = ["full_attention" if i % 2 else "sliding_attention" for i in range(n)]
    pattern = layer_pattern(values.get("layer_types") or usual, window)["layer_pattern"]
    local = "local" in pattern
    if self.stack == "encoder":
      return {"layer_pattern": pattern, **({"window": 2 * window + 1} if local else {})}
    return {"decoder_pattern": pattern, **({"decoder_window": window} if local else {})}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    windows = [kind.window for kind in cfg.layers(self.stack)]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    window = next((window for window in windows if window), None)
    if window and self.stack == "encoder":
      window //= 2
    return {"sliding_window": window or _WINDOW, "layer_types": kinds}


@dataclasses.dataclass(frozen=True)
class _Side:
  """The fields of one stack, which lie in an object of their own."""

  stack: str
  fields: tuple[Fields, ...]

  @property
  def names(self) -> tuple[str, ...]:
    return (self.stack,)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    inner, ours = values.get(self.stack), {}
    if not isinstance(inner, Mapping):
      raise InputError(f"config.json has no object {self.stack}, which describes that stack.")
    known = {*COMMON, *_UNREAD, *(name for fields in self.fields for name in fields.names)}
    for name in inner:
      if name not in known:
        raise InputError(f"config.json: field {name!r} of {self.stack} is not known here.")
    for fields in self.fields:
      ours |= fields.read(inner)
    return ours

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    inner = {k: v for fields in self.fields for k, v in fields.write(cfg).items()}
    return {self.stack: {"model_type": "t5_gemma_module", **inner}}


def _cap(theirs: str, ours: str, usual: float) -> Field:
  """Null is none."""
  return Field(theirs, ours, lambda values: None if theirs in values else usual)


def _side(stack: str, layers: str) -> _Side:
  return _Side(stack, (
    Field("vocab_size", "vocab_size", 256_000), Field("hidden_size", "d_model", 2304),
    Field("intermediate_size", "d_ff", 9216), Field("num_hidden_layers", layers, 26),
    Field("num_attention_heads", "num_heads", 8), Field("num_key_value_heads", "num_kv_heads", 4),
    Field("head_dim", "head_dim", 256), Field("max_position_embeddings", "max_positions", 8192),
    Field("hidden_activation", "activation", "gelu_pytorch_tanh", ACTIVATIONS),
    Field("rms_norm_eps", "norm_eps", 1e-6), Field("attention_bias", "attention_bias", False),
    Field("attention_bias", "attention_out_bias", False),
    _cap("attn_logit_softcapping", "attention_softcap", 50.0), QueryScalar(), Rotary(),
    _cap("final_logit_softcapping", "logit_softcap", 30.0), _Windows(stack),
    Always("is_decoder", stack == "decoder"),
  ))  # fmt: skip


def _stack(name: str) -> tuple[Row, ...]:
  def attention(theirs: str, ours: str) -> tuple[Row, ...]:
    return (
      *linear(f"{theirs}.q_proj", f"{ours}.q_proj", HEADS, HEAD_BIAS),
      *linear(f"{theirs}.k_proj", f"{ours}.k_proj", HEADS, HEAD_BIAS),
      *linear(f"{theirs}.v_proj", f"{ours}.v_proj", HEADS, HEAD_BIAS),
      *linear(f"{theirs}.o_proj", f"{ours}.o_proj", OUT, "d -> d"),
      *norm(f"pre_{theirs}_layernorm", f"{ours}_norm"),
      *norm(f"post_{theirs}_layernorm", f"{ours}_post_norm"),
    )

  return (
    *under(
      f"model.{name}.layers.{{i}}", f"{name}.layers",
      *attention("self_attn", "attn"), *attention("cross_attn", "cross_attn"),
      *norm("pre_feedforward_layernorm", "mlp_norm"),
      *norm("post_feedforward_layernorm", "mlp_post_norm"),
      *linear("mlp.gate_proj", "mlp.gate_proj", UP, "f -> f"),
      *linear("mlp.up_proj", "mlp.up_proj", UP, "f -> f"),
      *linear("mlp.down_proj", "mlp.down_proj", DOWN, "d -> d"),
    ),
    *norm(f"model.{name}.norm", f"{name}.final_norm"),
  )  # fmt: skip


_UNREAD = ("dropout_rate", "attention_dropout", "tie_word_embeddings", "cache_implementation",
           "classifier_dropout_rate")  # fmt: skip
_WORDS = Row("lm_head.out_proj.weight", "head.proj.w", "v d -> d v")
_NO_CAP = dict(logit_softcap=None)  # Of labels.
FAMILIES = (
  Family(
    "t5gemma",
    dict(shape="encoder_decoder", positions="rotary", norm="rms", norm_offset=True,
         norm_placement="sandwich", gated=True, scale_embeddings=True, decoder_embed=True),
    (
      _side("encoder", "num_layers"), _side("decoder", "num_decoder_layers"), TIED,
      Field("vocab_size", "vocab_size", lambda v: v["decoder"].get("vocab_size", 256_000)),
      Field("decoder_start_token_id", "decoder_start_id",
            lambda v: v["decoder"].get("bos_token_id", 2)),
      Same(("dropout_rate",), "dropout", 0.0), Same(("dropout_rate",), "mlp_dropout", 0.0),
      Field("attention_dropout", "attention_dropout", 0.0), Always("is_encoder_decoder", True),
    ),
    (
      Row("model.encoder.embed_tokens.weight", "embed.table", "v d -> v d"),
      Row("model.decoder.embed_tokens.weight", "decoder_embed.table", "v d -> v d"),
      *_stack("encoder"), *_stack("decoder"),
    ),
    {
      "T5GemmaForConditionalGeneration": Class(dict(head="language"), (_WORDS,)),
      "T5GemmaForSequenceClassification": Class(
        {**_NO_CAP, "head": "sequence"}, labels("score.out_proj")
      ),
      "T5GemmaForTokenClassification": Class(
        {**_NO_CAP, "head": "token"}, labels("score.out_proj")
      ),
      "T5GemmaModel": Class({**_NO_CAP, "head": "embedding"}, base=True),
    },
    "model.", pad=0, unread=("classifier_dropout_rate",), repeated=("lm_head.out_proj.weight",),
  ),
)  # fmt: skip
