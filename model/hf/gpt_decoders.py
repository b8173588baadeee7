"""Decoders that came before Llama: GPT-2, GPT-Neo, GPT-J, GPT-NeoX, OPT."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.errors import InputError
from model.hf.decoders import BUFFERS, DOWN, HEAD_BIAS, HEADS, OUT, TIED, UP, labels
from model.hf.engine import Row, linear, norm, under
from model.hf.family import Always, Class, Family, Field, Same
from model.hf.fields import ACTIVATIONS, layer_pattern
from model.hf.rotary_fields import Longest, Rotary

GPT = dict(shape="decoder", norm="layer", gated=False, mlp_bias=True)
BIASED = dict(attention_bias=True, attention_out_bias=True)
INTERLEAVED = "(n c h) d -> c d n h", "(n c h) -> c n h"  # Of q, k and v, head by head.
# What GPT-2 told of heads that nobody has, and of training.
SUMMARY = ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
           "summary_first_dropout", "classifier_dropout")  # fmt: skip
MASKS = r"(transformer\.)?h\.\d+\.attn\.(attention\.)?(masked_)?bias"


def classes(
  name: str, *, language: str = "ForCausalLM", words: str = "lm_head", biased: bool = False,
  tokens: str | None = "classifier", spans: bool = True,
) -> dict[str, Class]:  # fmt: skip
  """The classes of a family.

  Args:
    language: name of the class that scores words, behind the family's.
    words, tokens: what scores words, and what labels tokens; None: there is no such class.
    biased: whether scores of words have a bias.
    spans: whether there is a class that finds answers.
  """
  head = (Row(f"{words}.weight", "head.proj.w", "v d -> d v"),
          Row(f"{words}.bias", "head.bias", "v -> v"))  # fmt: skip
  found = {
    f"{name}{language}": Class(dict(head="language", logit_bias=biased), head),
    f"{name}ForSequenceClassification": Class(
      dict(head="sequence", head_bias=False), labels("score")
    ),
    f"{name}Model": Class(dict(head="embedding"), base=True),
  }
  if tokens is not None:
    found[f"{name}ForTokenClassification"] = Class(dict(head="token"), labels(tokens))
  if spans:
    found[f"{name}ForQuestionAnswering"] = Class(dict(head="span"), labels("qa_outputs"))
  return found


@dataclasses.dataclass(frozen=True)
class RotaryDim:
  """`rotary_dim`: elements of a head that turn, of a base that is always the same (GPT-J)."""

  names = ("rotary_dim",)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    turned = values.get("rotary_dim", 64)
    width = values.get("n_embd", 4096) // max(values.get("n_head", 16), 1)
    if not isinstance(turned, int) or not 0 < turned <= width:
      raise InputError(f"config.json: rotary_dim={turned!r} must be 1 to {width}, a head's width.")
    share = turned / width
    return {"rope_fraction": share if int(share * width) == turned else math.nextafter(share, 1)}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return {"rotary_dim": int(cfg.rope_fraction * cfg.head_width)}


@dataclasses.dataclass(frozen=True)
class AttentionTypes:
  """`attention_types`: runs of layers that repeat, `[[[kind, …], times], …]` (GPT-Neo)."""

  names = ("attention_types", "attention_layers", "window_size")

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    runs = values.get("attention_types") or [[["global", "local"], 12]]
    try:
      layers = [kind for kinds, times in runs for kind in kinds * times]
    except (TypeError, ValueError):
      raise InputError(
        f"config.json: attention_types={runs!r} must be [[[kind, …], times], …]."
      ) from None
    listed = values.get("attention_layers") or layers
    if listed != layers or len(layers) != values.get("num_layers", 24):
      raise InputError(
        f"config.json: attention_types={runs} name {len(layers)} layers, which num_layers or "
        "attention_layers contradict."
      )
    kinds = {"global": "full_attention", "local": "sliding_attention"}
    types = [str(kinds.get(kind, kind)) for kind in layers]
    return layer_pattern(types, values.get("window_size", 256))

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    windows = [kind.window for kind in cfg.layers("decoder")]
    kinds = ["global" if window is None else "local" for window in windows]
    return {"attention_types": [[kinds, 1]], "window_size": cfg.window or 256}


FAMILIES = (
  Family(
    "gpt2", {**GPT, **BIASED, "positions": "learned"},
    (
      Field("vocab_size", "vocab_size", 50_257), Field("n_embd", "d_model", 768),
      Field("n_layer", "num_layers", 12), Field("n_head", "num_heads", 12),
      Field("n_inner", "d_ff", lambda v: 4 * v.get("n_embd", 768)),
      Field("n_positions", "max_positions", 1024),
      Field("activation_function", "activation", "gelu_new", ACTIVATIONS),
      Field("layer_norm_epsilon", "norm_eps", 1e-5),
      TIED, Always("scale_attn_weights", True),
      Always("scale_attn_by_inverse_layer_idx", False),
      Same(("resid_pdrop", "embd_pdrop"), "dropout", 0.1),
      Field("attn_pdrop", "attention_dropout", 0.1),
    ),
    (
      Row("transformer.wte.weight", "embed.table", "v d -> v d"),
      Row("transformer.wpe.weight", "decoder.position_embed.table", "p d -> p d"),
      *under(
        "transformer.h.{i}", "decoder.layers",
        *norm("ln_1", "attn_norm"),
        *linear("attn.c_attn", "attn.{q,k,v}_proj", "d (c n h) -> c d n h", "(c n h) -> c n h"),
        *linear("attn.c_proj", "attn.o_proj", "(n h) d -> n h d", "d -> d"),
        *norm("ln_2", "mlp_norm"),
        *linear("mlp.c_fc", "mlp.up_proj", "d f -> d f", "f -> f"),
        *linear("mlp.c_proj", "mlp.down_proj", "f d -> f d", "d -> d"),
      ),
      *norm("transformer.ln_f", "decoder.final_norm"),
    ),
    classes("GPT2", language="LMHeadModel"), "transformer.",
    unread=("n_ctx", "reorder_and_upcast_attn", "hidden_dropout", *SUMMARY),
    surplus=MASKS, repeated=("lm_head.weight",),
  ),
  Family(
    "gpt_neo",
    {**GPT, "positions": "learned", "attention_scale": 1.0, "attention_out_bias": True},
    (
      Field("vocab_size", "vocab_size", 50_257), Field("hidden_size", "d_model", 2048),
      Field("num_layers", "num_layers", 24), Field("num_heads", "num_heads", 16),
      Field("intermediate_size", "d_ff", lambda v: 4 * v.get("hidden_size", 2048)),
      Field("max_position_embeddings", "max_positions", 2048),
      Field("activation_function", "activation", "gelu_new", ACTIVATIONS),
      Field("layer_norm_epsilon", "norm_eps", 1e-5), TIED, AttentionTypes(),
      Same(("resid_dropout", "embed_dropout"), "dropout", 0.0),
      Field("attention_dropout", "attention_dropout", 0.0),
    ),
    (
      Row("transformer.wte.weight", "embed.table", "v d -> v d"),
      Row("transformer.wpe.weight", "decoder.position_embed.table", "p d -> p d"),
      *under(
        "transformer.h.{i}", "decoder.layers",
        *norm("ln_1", "attn_norm"),
        *(Row(f"attn.attention.{x}_proj.weight", f"attn.{x}_proj.w", HEADS) for x in "qkv"),
        *linear("attn.attention.out_proj", "attn.o_proj", OUT, "d -> d"),
        *norm("ln_2", "mlp_norm"),
        *linear("mlp.c_fc", "mlp.up_proj", UP, "f -> f"),
        *linear("mlp.c_proj", "mlp.down_proj", DOWN, "d -> d"),
      ),
      *norm("transformer.ln_f", "decoder.final_norm"),
    ),
    classes("GPTNeo"), "transformer.",
    unread=SUMMARY, surplus=MASKS, repeated=("lm_head.weight",),
  ),
  Family(
    "gptj", {**GPT, "positions": "rotary", "rope_interleaved": True, "residual": "parallel"},
    (
      Field("vocab_size", "vocab_size", 50_400), Field("n_embd", "d_model", 4096),
      Field("n_layer", "num_layers", 28), Field("n_head", "num_heads", 16),
      Field("n_inner", "d_ff", lambda v: 4 * v.get("n_embd", 4096)),
      Field("n_positions", "max_positions", 2048), RotaryDim(), Always("rotary", True),
      Field("activation_function", "activation", "gelu_new", ACTIVATIONS),
      Field("layer_norm_epsilon", "norm_eps", 1e-5),
      Field("tie_word_embeddings", "tie_embeddings", False), Always("scale_attn_weights", True),
      Same(("resid_pdrop", "embd_pdrop"), "dropout", 0.0),
      Field("attn_pdrop", "attention_dropout", 0.0),
    ),
    (
      Row("transformer.wte.weight", "embed.table", "v d -> v d"),
      *under(
        "transformer.h.{i}", "decoder.layers",
        *norm("ln_1", "attn_norm"),
        *(Row(f"attn.{x}_proj.weight", f"attn.{x}_proj.w", HEADS) for x in "qkv"),
        Row("attn.out_proj.weight", "attn.o_proj.w", OUT),
        *linear("mlp.fc_in", "mlp.up_proj", UP, "f -> f"),
        *linear("mlp.fc_out", "mlp.down_proj", DOWN, "d -> d"),
      ),
      *norm("transformer.ln_f", "decoder.final_norm"),
    ),
    classes("GPTJ", biased=True, tokens=None), "transformer.",
    unread=SUMMARY, surplus=MASKS, repeated=("lm_head.weight",),
  ),
  Family(
    "gpt_neox", {**GPT, "positions": "rotary"},
    (
      Field("vocab_size", "vocab_size", 50_432), Field("hidden_size", "d_model", 6144),
      Field("num_hidden_layers", "num_layers", 44), Field("num_attention_heads", "num_heads", 64),
      Field("intermediate_size", "d_ff", 24_576),
      Longest(2048),
      Field("hidden_act", "activation", "gelu", ACTIVATIONS),
      Field("layer_norm_eps", "norm_eps", 1e-5),
      Field("tie_word_embeddings", "tie_embeddings", False),
      Field("attention_bias", "attention_bias", True),
      Field("attention_bias", "attention_out_bias", True),
      Field("use_parallel_residual", "residual", True,
            {True: "parallel_two_norms", False: "serial"}),
      Rotary(partial=True, share=0.25, called=("rotary_emb_base", "rotary_pct")),
      Field("hidden_dropout", "dropout", 0.0), Field("attention_dropout", "attention_dropout", 0.0),
    ),
    (
      Row("gpt_neox.embed_in.weight", "embed.table", "v d -> v d"),
      *under(
        "gpt_neox.layers.{i}", "decoder.layers",
        *norm("input_layernorm", "attn_norm"),
        *linear("attention.query_key_value", "attn.{q,k,v}_proj", *INTERLEAVED),
        *linear("attention.dense", "attn.o_proj", OUT, "d -> d"),
        *norm("post_attention_layernorm", "mlp_norm"),
        *linear("mlp.dense_h_to_4h", "mlp.up_proj", UP, "f -> f"),
        *linear("mlp.dense_4h_to_h", "mlp.down_proj", DOWN, "d -> d"),
      ),
      *norm("gpt_neox.final_layer_norm", "decoder.final_norm"),
    ),
    classes("GPTNeoX", words="embed_out"), "gpt_neox.",
    unread=("classifier_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    surplus=rf"(gpt_neox\.)?layers\.\d+\.attention\.(masked_)?bias|{BUFFERS}",
    renamed=((r"^lm_head\.", "embed_out."),), repeated=("embed_out.weight",),
  ),
  Family(
    "opt", {**GPT, "positions": "learned", "position_offset": 2},
    (
      Field("vocab_size", "vocab_size", 50_272), Field("hidden_size", "d_model", 768),
      Field("word_embed_proj_dim", "d_model", lambda v: v.get("hidden_size", 768)),
      Field("num_hidden_layers", "num_layers", 12), Field("num_attention_heads", "num_heads", 12),
      Field("ffn_dim", "d_ff", 3072), Field("max_position_embeddings", "max_positions", 2048),
      Field("activation_function", "activation", "relu", ACTIVATIONS),
      Field("do_layer_norm_before", "norm_placement", True, {True: "pre", False: "post"}),
      Field("do_layer_norm_before", "final_norm", True),
      Always("_remove_final_layer_norm", False), Always("layer_norm_elementwise_affine", True),
      Field("enable_bias", "attention_bias", True), Field("enable_bias", "mlp_bias", True),
      Field("enable_bias", "attention_out_bias", True), TIED,
      Field("dropout", "dropout", 0.1), Field("attention_dropout", "attention_dropout", 0.0),
    ),
    (
      Row("model.decoder.embed_tokens.weight", "embed.table", "v d -> v d"),
      Row("model.decoder.embed_positions.weight", "decoder.position_embed.table", "p d -> p d"),
      *under(
        "model.decoder.layers.{i}", "decoder.layers",
        *norm("self_attn_layer_norm", "attn_norm"), *norm("self_attn_layer_norm", "attn_post_norm"),
        *linear("self_attn.q_proj", "attn.q_proj", HEADS, HEAD_BIAS),
        *linear("self_attn.k_proj", "attn.k_proj", HEADS, HEAD_BIAS),
        *linear("self_attn.v_proj", "attn.v_proj", HEADS, HEAD_BIAS),
        *linear("self_attn.out_proj", "attn.o_proj", OUT, "d -> d"),
        *norm("final_layer_norm", "mlp_norm"), *norm("final_layer_norm", "mlp_post_norm"),
        *linear("fc1", "mlp.up_proj", UP, "f -> f"),
        *linear("fc2", "mlp.down_proj", DOWN, "d -> d"),
      ),
      *norm("model.decoder.final_layer_norm", "decoder.final_norm"),
    ),
    classes("OPT", tokens=None), "model.",
    unread=("layerdrop", "activation_dropout", "init_std"),
    surplus=r"(model\.)?decoder\.version", repeated=("lm_head.weight",),
  ),
)  # fmt: skip
