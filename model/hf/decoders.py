"""Decoders: Llama and its relatives, GPT-2."""

import re

from model.hf.engine import Row, linear, norm, under
from model.hf.family import Always, Class, Family, Field, Fields, Same
from model.hf.fields import ACTIVATIONS, LayerTypes, QueryScalar, Rotary, TwoRotaries, Windows

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
  Field("num_attention_heads", "num_heads"), Field("max_position_embeddings", "max_positions"),
  Field("rms_norm_eps", "norm_eps", 1e-6), Field("hidden_act", "activation", "silu", ACTIVATIONS),
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
FUSED_ROWS = (  # Phi-3.
  *(row for row in LLAMA_ROWS if not re.search("(q|k|v|gate|up)_proj", row.theirs)),
  *under(
    "model.layers.{i}", "decoder.layers",
    Row("self_attn.qkv_proj.weight", "attn.{q,k,v}_proj.w", HEADS, joined=True),
    Row("mlp.gate_up_proj.weight", "mlp.{gate,up}_proj.w", UP, joined=True),
  ),
)  # fmt: skip
EXPERT_ROWS = (  # Mixtral.
  *(row for row in LLAMA_ROWS if ".mlp." not in row.theirs),
  *under(
    "model.layers.{i}.block_sparse_moe", "decoder.layers.mlp",
    Row("gate.weight", "router.w", "e d -> d e"),
    Row("experts.{e}.w1.weight", "gate_proj.w", UP),
    Row("experts.{e}.w3.weight", "up_proj.w", UP),
    Row("experts.{e}.w2.weight", "down_proj.w", DOWN),
  ),
)  # fmt: skip
BUFFERS = r".*rotary_emb\.inv_freq"


def classes(name: str) -> dict[str, Class]:
  """The classes of a decoder that is made as Llama's are."""
  return {
    f"{name}ForCausalLM": Class(dict(head="language"), (WORDS,)),
    f"{name}ForSequenceClassification": Class(
      dict(head="sequence", head_bias=False), labels("score")
    ),
    f"{name}ForTokenClassification": Class(dict(head="token"), labels("score")),
    f"{name}Model": Class(dict(head="embedding"), base=True),
  }


def _llama(model_type: str, name: str, *fields: Fields, rows=LLAMA_ROWS, unread=(), **settings):
  """A relative of Llama's: its fields replace Llama's of the same names."""
  own = {*unread, *(name for one in fields for name in one.names)}
  others = tuple(one for one in LLAMA_FIELDS if not own & set(one.names))
  return Family(
    model_type, {**LLAMA, **settings}, (*others, *fields), rows, classes(name), "model.",
    unread=unread, surplus=BUFFERS, repeated=("lm_head.weight",),
  )  # fmt: skip


def _kv_heads(default: int | None) -> Field:
  return Field("num_key_value_heads", "num_kv_heads", default)


GEMMA = dict(norm_offset=True, scale_embeddings=True)
CAPS = (Field("attn_logit_softcapping", "attention_softcap", None),
        Field("final_logit_softcapping", "logit_softcap", None))  # fmt: skip
GEMMA_ACTIVATION = Field("hidden_activation", "activation", "gelu_pytorch_tanh", ACTIVATIONS)
WIDE = Field("head_dim", "head_dim", 256)
BOTH_WAYS = Always("use_bidirectional_attention", False)


BIASES = (Field("attention_bias", "attention_bias", False),
          Field("attention_bias", "attention_out_bias", False))  # fmt: skip
FAMILIES = (
  _llama("llama", "Llama", _kv_heads(None),
         Field("head_dim", "head_dim", None), *BIASES, Field("mlp_bias", "mlp_bias", False),
         Always("pretraining_tp", 1)),
  _llama("mistral", "Mistral", _kv_heads(8),
         Field("head_dim", "head_dim", None), Windows(always=True)),
  _llama("qwen2", "Qwen2", _kv_heads(32), Windows(always=False), attention_bias=True),
  _llama("qwen3", "Qwen3", _kv_heads(32), Field("head_dim", "head_dim", 128), *BIASES,
         Windows(always=False), qk_norm="head"),
  _llama("phi3", "Phi3", _kv_heads(None), Rotary(partial=True), Windows(always=True, default=None),
         Field("rms_norm_eps", "norm_eps", 1e-5),
         Same(("resid_pdrop", "embd_pdrop"), "dropout", 0.0), rows=FUSED_ROWS,
         unread=("original_max_position_embeddings", "attention_bias")),
  _llama("mixtral", "Mixtral", _kv_heads(8), Field("head_dim", "head_dim", None),
         Windows(always=True, default=None, suffix="+experts"),
         Field("rms_norm_eps", "norm_eps", 1e-5), Field("num_local_experts", "num_experts", 8),
         Field("num_experts_per_tok", "experts_per_token", 2),
         Field("router_aux_loss_coef", "balance_loss", 0.001), rows=EXPERT_ROWS,
         unread=("output_router_logits", "router_jitter_noise")),
  _llama("gemma", "Gemma", _kv_heads(16), WIDE, TIED, *BIASES, BOTH_WAYS,
         Field("hidden_act", "activation", "gelu_pytorch_tanh", ACTIVATIONS),
         unread=("hidden_activation",), **GEMMA),
  _llama("gemma2", "Gemma2", _kv_heads(4), WIDE, TIED, *BIASES, BOTH_WAYS, *CAPS, QueryScalar(),
         GEMMA_ACTIVATION, LayerTypes(("sliding_window", 4096), ("sliding_window_pattern", 2), 1),
         rows=SANDWICH_ROWS, unread=("hidden_act", "cache_implementation"),
         norm_placement="sandwich", **GEMMA),
  _llama("gemma3_text", "Gemma3", _kv_heads(4), WIDE, TIED, *BIASES, BOTH_WAYS, *CAPS,
         QueryScalar(), GEMMA_ACTIVATION,
         LayerTypes(("sliding_window", 4096), ("sliding_window_pattern", 6), 5),
         TwoRotaries(("rope_theta", 1e6), ("rope_local_base_freq", 1e4)), rows=SANDWICH_ROWS,
         unread=("hidden_act", "cache_implementation"), norm_placement="sandwich", qk_norm="head",
         **GEMMA),
  Family(
    "gpt2",
    dict(shape="decoder", positions="learned", norm="layer", gated=False, mlp_bias=True,
         attention_bias=True, attention_out_bias=True),
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
    {
      "GPT2LMHeadModel": Class(dict(head="language"), (WORDS,)),
      "GPT2ForSequenceClassification": Class(
        dict(head="sequence", head_bias=False), labels("score")
      ),
      "GPT2ForTokenClassification": Class(dict(head="token"), labels("classifier")),
      "GPT2Model": Class(dict(head="embedding"), base=True),
    },
    "transformer.",
    unread=("n_ctx", "summary_type", "summary_use_proj", "summary_activation",
            "summary_proj_to_labels", "summary_first_dropout", "reorder_and_upcast_attn",
            "classifier_dropout", "hidden_dropout"),
    surplus=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", repeated=("lm_head.weight",),
  ),
)  # fmt: skip
