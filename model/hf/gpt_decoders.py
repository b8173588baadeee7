"""Decoders that came before Llama: GPT-2."""

from model.hf.decoders import TIED, WORDS, labels
from model.hf.engine import Row, linear, norm, under
from model.hf.family import Always, Class, Family, Field, Same
from model.hf.fields import ACTIVATIONS

FAMILIES = (
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
