"""Decoders: Llama and its relatives."""

import re
from collections.abc import Mapping
from typing import Any

from model.hf.engine import Row, linear, norm, under
from model.hf.family import Always, Class, Family, Field, Fields, Same
from model.hf.fields import (
  ACTIVATIONS,
  Divisor,
  HeadWidth,
  LayerTypes,
  QueryScalar,
  Unturned,
  Windows,
)
from model.hf.rotary_fields import Longest, Rotary, TwoRotaries

HEADS, HEAD_BIAS, OUT = "(n h) d -> d n h", "(n h) -> n h", "d (n h) -> n h d"
UP, DOWN = "f d -> d f", "d f -> f d"
WORDS = Row("lm_head.weight", "head.proj.w", "v d -> d v")
TIED = Field("tie_word_embeddings", "tie_embeddings", True)


def labels(theirs: str) -> tuple[Row, ...]:
  """What tells labels."""
  return linear(theirs, "head.proj", "l d -> d l", "l -> l")


# Tensor of theirs, parameter of ours, theirs -> ours. A row whose parameter a model lacks is none.
LLAMA_ROWS = (
  Row("model.embed_tokens.weight", "embed.table", "v d -> v d"),
  *under(
    "model.layers.{i}", "decoder.layers",
    *norm("input_layernorm", "attn_norm"),
    *linear("self_attn.q_proj", "attn.q_proj", HEADS, HEAD_BIAS),
    *linear("self_attn.k_proj", "attn.k_proj", HEADS, HEAD_BIAS),
    *linear("self_attn.v_proj", "attn.v_proj", HEADS, HEAD_BIAS),
    *linear("self_attn.o_proj", "attn.o_proj", OUT, "d -> d"),
    Row("self_attn.q_norm.weight", "attn.q_norm.scale", "h -> h"),
    Row("self_attn.k_norm.weight", "attn.k_norm.scale", "h -> h"),
    *norm("post_attention_layernorm", "mlp_norm"),
    *linear("mlp.gate_proj", "mlp.gate_proj", UP, "f -> f"),
    *linear("mlp.up_proj", "mlp.up_proj", UP, "f -> f"),
    *linear("mlp.down_proj", "mlp.down_proj", DOWN, "d -> d"),
  ),
  *norm("model.norm", "decoder.final_norm"),
)  # fmt: skip
LLAMA = dict(shape="decoder", positions="rotary", norm="rms", gated=True)
LLAMA_FIELDS = (
  Field("vocab_size", "vocab_size"), Field("hidden_size", "d_model"),
  Field("intermediate_size", "d_ff"), Field("num_hidden_layers", "num_layers"),
  Field("num_attention_heads", "num_heads"), Longest(), Field("rms_norm_eps", "norm_eps", 1e-6),
  Field("hidden_act", "activation", "silu", ACTIVATIONS),
  Field("tie_word_embeddings", "tie_embeddings", False),
  Field("attention_dropout", "attention_dropout", 0.0), Rotary(),
)  # fmt: skip
# Norms on both sides of attention and MLP.
SANDWICH_ROWS = (
  *(row for row in LLAMA_ROWS if "post_attention" not in row.theirs),
  *under(
    "model.layers.{i}", "decoder.layers",
    *norm("post_attention_layernorm", "attn_post_norm"),
    *norm("pre_feedforward_layernorm", "mlp_norm"),
    *norm("post_feedforward_layernorm", "mlp_post_norm"),
  ),
)  # fmt: skip
OUTPUT_ROWS = (  # OLMo 2: norms behind attention and MLP only, and of all queries or keys as one.
  *(row for row in LLAMA_ROWS if not re.search("layernorm|[qk]_norm", row.theirs)),
  *under(
    "model.layers.{i}", "decoder.layers",
    Row("self_attn.q_norm.weight", "attn.q_norm.scale", "(n h) -> n h"),
    Row("self_attn.k_norm.weight", "attn.k_norm.scale", "(n h) -> n h"),
    *norm("post_attention_layernorm", "attn_post_norm"),
    *norm("post_feedforward_layernorm", "mlp_post_norm"),
  ),
)  # fmt: skip
FUSED_ROWS = (  # Phi-3.
  *(row for row in LLAMA_ROWS if not re.search("(q|k|v|gate|up)_proj", row.theirs)),
  *under(
    "model.layers.{i}", "decoder.layers",
    Row("self_attn.qkv_proj.weight", "attn.{q,k,v}_proj.w", HEADS, joined=True),
    Row("mlp.gate_up_proj.weight", "mlp.{gate,up}_proj.w", UP, joined=True),
  ),
)  # fmt: skip
BUFFERS = r".*rotary_emb\.inv_freq"


LANGUAGE = Class(dict(head="language"), (WORDS,))
TEXTS = Class(dict(head="sequence", head_bias=False), labels("score"))
TOKENS = Class(dict(head="token"), labels("score"))
BODY = Class(dict(head="embedding"), base=True)


def classes(name: str) -> dict[str, Class]:
  """The classes of a decoder that is made as Llama's are."""
  return {
    f"{name}ForCausalLM": LANGUAGE, f"{name}ForSequenceClassification": TEXTS,
    f"{name}ForTokenClassification": TOKENS, f"{name}Model": BODY,
  }  # fmt: skip


def answering(name: str, prefix: str = "transformer.") -> dict[str, Class]:
  """The same, and one that answers questions, whose body has a name of its own in some families."""
  spans = Class(dict(head="span"), labels("qa_outputs"), prefix=prefix)
  return {**classes(name), f"{name}ForQuestionAnswering": spans}


def llama(
  model_type: str, heads: str | Mapping[str, Class], *fields: Fields, rows=LLAMA_ROWS, unread=(),
  stacked: Mapping[str, tuple[str, ...]] | None = None, renamed=(), **settings,
) -> Family:  # fmt: skip
  """A relative of Llama's: its fields replace Llama's of the same names.

  Args:
    heads: its classes, or the name of those that are as Llama's.
  """
  own = {*unread, *(name for one in fields for name in one.names)}
  others = tuple(one for one in LLAMA_FIELDS if not own & set(one.names))
  heads = classes(heads) if isinstance(heads, str) else heads
  return Family(
    model_type, {**LLAMA, **settings}, (*others, *fields), rows, heads, "model.",
    unread=unread, surplus=BUFFERS, repeated=("lm_head.weight",), stacked=stacked or {},
    renamed=renamed,
  )  # fmt: skip


def kv_heads(default: int | None) -> Field:
  return Field("num_key_value_heads", "num_kv_heads", default)


GEMMA: dict[str, Any] = dict(norm_offset=True, scale_embeddings=True)
CAPS = (Field("attn_logit_softcapping", "attention_softcap", None),
        Field("final_logit_softcapping", "logit_softcap", None))  # fmt: skip
GEMMA_ACTIVATION = Field("hidden_activation", "activation", "gelu_pytorch_tanh", ACTIVATIONS)
WIDE = Field("head_dim", "head_dim", 256)
BOTH_WAYS = Always("use_bidirectional_attention", False)


HEAD_DIM = HeadWidth()
MLP_BIAS = Field("mlp_bias", "mlp_bias", False)
BIASES = (Field("attention_bias", "attention_bias", False),
          Field("attention_bias", "attention_out_bias", False))  # fmt: skip
FAMILIES = (
  llama("llama", answering("Llama"), kv_heads(None), HEAD_DIM, *BIASES, MLP_BIAS,
        Always("rope_interleaved", False),
        unread=("pretraining_tp", "is_llama_config", "transformers.js_config")),
  llama("mistral", answering("Mistral", "model."), kv_heads(8), HEAD_DIM, Windows(always=True)),
  llama("qwen2", answering("Qwen2"), kv_heads(32), HEAD_DIM, Windows(always=False),
        Always("use_mrope", False), attention_bias=True),
  llama("qwen3", answering("Qwen3"), kv_heads(32), Field("head_dim", "head_dim", 128), *BIASES,
        Windows(always=False), qk_norm="head"),
  llama("phi3", "Phi3", kv_heads(None), HEAD_DIM,
        Rotary(partial=True, original=4096, renamed={"su": "longrope", "yarn": "longrope"}),
        Windows(always=True, default=None), Field("rms_norm_eps", "norm_eps", 1e-5),
        Same(("resid_pdrop", "embd_pdrop"), "dropout", 0.0), Always("attention_bias", False),
        Always("mlp_bias", False), Always("lm_head_bias", False),
        unread=("full_attn_mod", "interpolate_factor"), rows=FUSED_ROWS),
  llama("olmo2", {"Olmo2ForCausalLM": LANGUAGE, "Olmo2ForSequenceClassification": TEXTS,
                  "Olmo2Model": BODY},
        kv_heads(None), HEAD_DIM, Field("rms_norm_eps", "norm_eps", 1e-5), *BIASES,
        rows=OUTPUT_ROWS, norm_placement="output", qk_norm="full"),
  llama("smollm3", answering("SmolLM3"), kv_heads(4), HEAD_DIM, TIED, *BIASES, MLP_BIAS,
        Rotary(theta=2e6), Unturned(Windows(always=False, default=None)),
        unread=("pretraining_tp",)),
  llama("granite", {"GraniteForCausalLM": LANGUAGE, "GraniteModel": BODY}, kv_heads(None), HEAD_DIM,
        *BIASES, MLP_BIAS, Field("embedding_multiplier", "embed_scale", 1.0),
        Field("residual_multiplier", "residual_scale", 1.0),
        Field("attention_multiplier", "attention_scale", 1.0),
        Divisor("logits_scaling", "logit_scale")),
  llama("gemma", "Gemma", kv_heads(16), WIDE, TIED, *BIASES, BOTH_WAYS,
        Field("hidden_act", "activation", "gelu_pytorch_tanh", ACTIVATIONS),
        unread=("hidden_activation",), **GEMMA),
  llama("gemma2", "Gemma2", kv_heads(4), WIDE, TIED, *BIASES, BOTH_WAYS, *CAPS, QueryScalar(),
        GEMMA_ACTIVATION, LayerTypes(("sliding_window", 4096), ("sliding_window_pattern", 2), 1),
        rows=SANDWICH_ROWS, unread=("hidden_act", "cache_implementation"),
        norm_placement="sandwich", **GEMMA),
  llama("gemma3_text", {"Gemma3ForCausalLM": LANGUAGE, "Gemma3TextModel": BODY,
                        "Gemma3TextForSequenceClassification": TEXTS},
        kv_heads(4), WIDE, TIED, *BIASES, BOTH_WAYS, QueryScalar(), GEMMA_ACTIVATION,
        Always("attn_logit_softcapping", None), CAPS[1],  # Theirs reads the second only.
        LayerTypes(("sliding_window", 4096), ("sliding_window_pattern", 6), 5),
        TwoRotaries(("rope_theta", 1e6), ("rope_local_base_freq", 1e4)), rows=SANDWICH_ROWS,
        unread=("hidden_act", "cache_implementation"), norm_placement="sandwich", qk_norm="head",
        **GEMMA),
)  # fmt: skip
