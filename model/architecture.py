"""What two configs have in common if the same parameters mean the same in both."""

from typing import Any

from model.config import LayerKind, ModelConfig

EXECUTION_FIELDS = ("dtype", "scan_layers", "remat", "attention_kernel", "context_attention",
                    "expert_kernel", "dropout", "attention_dropout", "mlp_dropout", "balance_loss",
                    "router_z_loss", "init_std", "init_embed_std", "init_residual_scale",
                    "param_dtype")  # fmt: skip
HEAD_FIELDS = ("head", "head_dense", "head_activation", "head_norm", "head_dense_bias", "head_bias",
               "pair_head", "num_labels", "problem", "pooling", "normalize", "logit_scale",
               "logit_softcap", "logit_bias", "tie_embeddings")  # fmt: skip
LABELLED = ("sequence", "token")  # Heads that tell labels.


def architecture(cfg: ModelConfig) -> dict[str, Any]:
  """Plain values that decide the function and its parameters, with no default left open: two
  checkpoints that differ here differ. What starts a decoder and pads a vocabulary is left out.
  """
  layers = {stack: [_words(kind) for kind in cfg.layers(stack)] for stack in cfg.stacks}
  resolved = {
    "head": cfg.head_kind, "head_dim": cfg.head_width, "num_kv_heads": cfg.kv_heads,
    "vocab_size": cfg.vocab_size, "num_decoder_layers": len(cfg.layers(cfg.stacks[-1])),
    "pooling": cfg.pooling_of(cfg.text_stack), "layer_pattern": layers,
    "num_labels": None if cfg.head_kind not in LABELLED else
                  1 if cfg.problem == "regression" else cfg.num_labels,
  }  # fmt: skip
  left_out = (*EXECUTION_FIELDS, "layer_prefix", "decoder_pattern", "vocab_multiple",
              "decoder_start_id")  # fmt: skip
  return {k: v for k, v in (cfg.to_dict() | resolved).items() if k not in left_out}


def _words(kind: LayerKind) -> str:
  """A layer, in the words of `layer_pattern` and the length of its window."""
  own = "global" if kind.window is None else f"local {kind.window}"
  more = {"experts": kind.experts, "still": not kind.rotary, "unnormed": not kind.normed,
          "conv": kind.conv}  # fmt: skip
  return "+".join([own, *(word for word, there in more.items() if there)])
