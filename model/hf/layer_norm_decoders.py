"""Decoders that kept layer norms: Phi, StableLM, BLOOM, Falcon."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.errors import InputError
from model.hf import decoders
from model.hf.decoders import BUFFERS, DOWN, HEAD_BIAS, HEADS, LLAMA_ROWS, OUT, TIED, UP, kv_heads
from model.hf.engine import Row, linear, norm, under
from model.hf.family import Always, Family, Field, Same
from model.hf.fields import ACTIVATIONS
from model.hf.gpt_decoders import BIASED, GPT, INTERLEAVED, classes
from model.hf.rotary_fields import Longest, Rotary

UNTIED = Field("tie_word_embeddings", "tie_embeddings", False)
WIDTH = Field("hidden_size", "d_model", 64, older="n_embed")  # Of BLOOM.


@dataclasses.dataclass(frozen=True)
class FourTimes:
  """An MLP that is four times as wide as the model, whatever config.json says (BLOOM)."""

  names = ()

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"d_ff": 4 * WIDTH.read(values)["d_model"]}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class FalconLayers:
  """Which heads share keys and values, and what is added to what; `new_decoder_architecture` (40B)
  decides which of the other fields are read.
  """

  names = ("new_decoder_architecture", "multi_query", "parallel_attn", "num_ln_in_parallel_attn",
           "num_kv_heads")  # fmt: skip

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    new, parallel = values.get("new_decoder_architecture", False), values.get("parallel_attn", True)
    norms, given = values.get("num_ln_in_parallel_attn"), values.get("num_kv_heads")
    norms = (2 if new else 1) if norms is None else norms
    heads = values.get("num_attention_heads", 71)
    kv = 1 if values.get("multi_query", True) and not new else given or heads
    sound = parallel and norms in (1, 2) if new else not parallel or norms == 1
    if not sound:
      raise InputError(
        f"config.json: new_decoder_architecture={new} with parallel_attn={parallel} and "
        f"num_ln_in_parallel_attn={norms} is no Falcon."
      )
    if kv not in (1, heads) and not new:
      raise InputError(f"config.json: num_kv_heads={kv} needs new_decoder_architecture.")
    kind = ("parallel", "parallel_two_norms")[norms - 1] if parallel else "serial"
    return {"residual": kind, "num_kv_heads": kv}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    two = cfg.residual == "parallel_two_norms"
    new = two or cfg.kv_heads not in (1, cfg.num_heads)
    return {
      "new_decoder_architecture": new, "multi_query": cfg.kv_heads == 1 and not new,
      "parallel_attn": cfg.residual != "serial", "num_kv_heads": cfg.kv_heads,
      "num_ln_in_parallel_attn": (2 if two else 1) if new else None,
    }  # fmt: skip


def _norm_of(two: bool, theirs: str, ours: str) -> tuple[Row, ...]:
  """A norm of Falcons whose attention and MLP have two norms, or have not."""
  when = lambda cfg: (cfg.residual == "parallel_two_norms") == two
  return tuple(dataclasses.replace(row, when=when) for row in norm(theirs, ours))


def _grouped(theirs: str, ours: str) -> tuple[Row, ...]:
  """Queries, the key and the value that they share, group by group."""
  rows = linear(theirs, ours, HEADS, HEAD_BIAS)
  heads = lambda cfg: cfg.kv_heads
  return tuple(dataclasses.replace(row, joined=True, parts=heads) for row in rows)


FALCON_WIDTH = Field("hidden_size", "d_model", 4544, older="n_embed")
FALCON_BIASES = ("attention_bias", "attention_out_bias", "mlp_bias")


FAMILIES = (
  Family(
    "phi", {**GPT, **BIASED, "positions": "rotary", "residual": "parallel"},
    (
      Field("vocab_size", "vocab_size", 51_200), Field("hidden_size", "d_model", 2048),
      Field("intermediate_size", "d_ff", 8192), Field("num_hidden_layers", "num_layers", 24),
      Field("num_attention_heads", "num_heads", 32), kv_heads(None),
      Longest(2048),
      Field("hidden_act", "activation", "gelu_new", ACTIVATIONS),
      Field("layer_norm_eps", "norm_eps", 1e-5), UNTIED,
      Field("qk_layernorm", "qk_norm", False, {False: "none", True: "head"}),
      Rotary(partial=True, share=0.5), Same(("resid_pdrop", "embd_pdrop"), "dropout", 0.0),
      Field("attention_dropout", "attention_dropout", 0.0),
    ),
    (
      Row("model.embed_tokens.weight", "embed.table", "v d -> v d"),
      *under(
        "model.layers.{i}", "decoder.layers",
        *norm("input_layernorm", "attn_norm"),
        *linear("self_attn.q_proj", "attn.q_proj", HEADS, HEAD_BIAS),
        *linear("self_attn.k_proj", "attn.k_proj", HEADS, HEAD_BIAS),
        *linear("self_attn.v_proj", "attn.v_proj", HEADS, HEAD_BIAS),
        *linear("self_attn.dense", "attn.o_proj", OUT, "d -> d"),
        *norm("self_attn.q_layernorm", "attn.q_norm"),
        *norm("self_attn.k_layernorm", "attn.k_norm"),
        *linear("mlp.fc1", "mlp.up_proj", UP, "f -> f"),
        *linear("mlp.fc2", "mlp.down_proj", DOWN, "d -> d"),
      ),
      *norm("model.final_layernorm", "decoder.final_norm"),
    ),
    classes("Phi", biased=True, tokens="score", spans=False), "model.",
    surplus=BUFFERS, repeated=("lm_head.weight",),
  ),
  Family(
    "stablelm", dict(shape="decoder", positions="rotary", norm="layer", gated=True),
    (
      Field("vocab_size", "vocab_size", 50_304), Field("hidden_size", "d_model", 2560),
      Field("intermediate_size", "d_ff", 6912), Field("num_hidden_layers", "num_layers", 32),
      Field("num_attention_heads", "num_heads", 32), kv_heads(32),
      Longest(4096),
      Field("hidden_act", "activation", "silu", ACTIVATIONS),
      Field("layer_norm_eps", "norm_eps", 1e-5), UNTIED,
      Field("use_qkv_bias", "attention_bias", False),
      Field("qk_layernorm", "qk_norm", False, {False: "none", True: "each"}),
      Field("use_parallel_residual", "residual", False, {False: "serial", True: "parallel"}),
      Rotary(partial=True, share=0.25), Field("hidden_dropout", "dropout", 0.0),
      Field("attention_dropout", "attention_dropout", 0.0),
    ),
    (
      *(row for row in LLAMA_ROWS if "_norm." not in row.theirs),
      *under(
        "model.layers.{i}.self_attn", "decoder.layers.attn",
        Row("q_layernorm.norms.{e}.weight", "q_norm.scale", "h -> h"),
        Row("k_layernorm.norms.{e}.weight", "k_norm.scale", "h -> h"),
      ),
    ),
    decoders.classes("StableLm"), "model.", surplus=BUFFERS, repeated=("lm_head.weight",),
  ),
  Family(
    "bloom",
    {**GPT, **BIASED, "positions": "alibi", "max_positions": None, "embed_norm": True,
     "activation": "gelu_tanh"},
    (
      Field("vocab_size", "vocab_size", 250_880), WIDTH, FourTimes(),
      Field("n_layer", "num_layers", 2, older="num_hidden_layers"),
      Field("n_head", "num_heads", 8, older="num_attention_heads"),
      Field("layer_norm_epsilon", "norm_eps", 1e-5), TIED,
      Always("apply_residual_connection_post_layernorm", False), Always("slow_but_exact", False),
      Field("hidden_dropout", "dropout", 0.0), Field("attention_dropout", "attention_dropout", 0.0),
    ),
    (
      Row("transformer.word_embeddings.weight", "embed.table", "v d -> v d"),
      *norm("transformer.word_embeddings_layernorm", "decoder.embed_norm"),
      *under(
        "transformer.h.{i}", "decoder.layers",
        *norm("input_layernorm", "attn_norm"),
        *linear("self_attention.query_key_value", "attn.{q,k,v}_proj", *INTERLEAVED),
        *linear("self_attention.dense", "attn.o_proj", OUT, "d -> d"),
        *norm("post_attention_layernorm", "mlp_norm"),
        *linear("mlp.dense_h_to_4h", "mlp.up_proj", UP, "f -> f"),
        *linear("mlp.dense_4h_to_h", "mlp.down_proj", DOWN, "d -> d"),
      ),
      *norm("transformer.ln_f", "decoder.final_norm"),
    ),
    classes("Bloom"), "transformer.",
    unread=("n_inner", "pretraining_tp", "seq_length", "offset_alibi", "skip_bias_add",
            "skip_bias_add_qkv", "attention_softmax_in_fp32", "bias_dropout_fusion",
            "masked_softmax_fusion", "classifier_dropout"),
    repeated=("lm_head.weight",),
  ),
  Family(
    "falcon", GPT,
    (
      Field("vocab_size", "vocab_size", 65_024), FALCON_WIDTH,
      Field("num_hidden_layers", "num_layers", 32), Field("num_attention_heads", "num_heads", 71),
      Field("ffn_hidden_size", "d_ff", lambda v: 4 * FALCON_WIDTH.read(v)["d_model"]),
      FalconLayers(), Longest(2048),
      Field("activation", "activation", "gelu", ACTIVATIONS),
      Field("layer_norm_epsilon", "norm_eps", 1e-5), TIED,
      Field("alibi", "positions", False, {False: "rotary", True: "alibi"}),
      Field("alibi", "alibi_scaled", False), Field("alibi", "alibi_rounded", False),
      *(Field("bias", name, False) for name in FALCON_BIASES), Rotary(),
      Always("apply_residual_connection_post_layernorm", False),
      Field("hidden_dropout", "dropout", 0.0), Field("attention_dropout", "attention_dropout", 0.0),
    ),
    (
      Row("transformer.word_embeddings.weight", "embed.table", "v d -> v d"),
      *under(
        "transformer.h.{i}", "decoder.layers",
        *_norm_of(False, "input_layernorm", "attn_norm"), *_norm_of(True, "ln_attn", "attn_norm"),
        *_norm_of(False, "post_attention_layernorm", "mlp_norm"),
        *_norm_of(True, "ln_mlp", "mlp_norm"),
        *_grouped("self_attention.query_key_value", "attn.{q,k,v}_proj"),
        *linear("self_attention.dense", "attn.o_proj", OUT, "d -> d"),
        *linear("mlp.dense_h_to_4h", "mlp.up_proj", UP, "f -> f"),
        *linear("mlp.dense_4h_to_h", "mlp.down_proj", DOWN, "d -> d"),
      ),
      *norm("transformer.ln_f", "decoder.final_norm"),
    ),
    classes("Falcon"), "transformer.",
    unread=("ff_factor", "classifier_dropout"), surplus=BUFFERS, repeated=("lm_head.weight",),
  ),
)  # fmt: skip
