"""Tiny random models of Transformers, and ours with the same weights: BERT, T5, BART."""

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from model.heads import init_params
from model.trained import Model

VOCAB = 96
BIASED = dict(gated=False, mlp_bias=True, attention_bias=True, attention_out_bias=True)
POST = dict(
  norm="layer", norm_placement="post", final_norm=False, embed_norm=True, activation="gelu"
)
BASE = ModelConfig(
  vocab_size=VOCAB, vocab_multiple=32, num_layers=2, d_model=32, d_ff=48, num_heads=4, head_dim=8,
  max_positions=64,
)  # fmt: skip
BERT = dict(shape="encoder", positions="learned", token_types=2, norm_eps=1e-12, **BIASED, **POST)
T5 = dict(
  shape="encoder_decoder", positions="t5_bias", norm="rms", norm_eps=1e-6, attention_scale=1.0,
  activation="relu", gated=False, logit_scale=32**-0.5, max_positions=None, decoder_start_id=0,
  num_decoder_layers=3,
)  # fmt: skip
BART = dict(
  shape="encoder_decoder", positions="learned", position_offset=2, decoder_start_id=2,
  num_decoder_layers=3, **BIASED, **POST,
)  # fmt: skip


def _linear(theirs: str, ours: str, pattern: str, bias: str | None) -> list[tuple[str, str, str]]:
  rows = [(f"{theirs}.weight", f"{ours}.w", pattern)]
  return rows + ([(f"{theirs}.bias", f"{ours}.b", bias)] if bias else [])


def _norm(theirs: str, ours: str) -> list[tuple[str, str, str]]:
  return [(f"{theirs}.{t}", f"{ours}.{o}", "d -> d") for t, o in (("weight", "scale"),
                                                                  ("bias", "bias"))]  # fmt: skip


def _attention(theirs: str, ours: str, names: tuple[str, ...], *, biased: bool):
  into = ("(n h) d -> d n h", "(n h) -> n h" if biased else None)
  rows = []
  for name, proj in zip(names, ("q_proj", "k_proj", "v_proj"), strict=False):
    rows += _linear(f"{theirs}.{name}", f"{ours}.{proj}", *into)
  out = names[3] if "." in names[3] else f"{theirs}.{names[3]}"
  return rows + _linear(out, f"{ours}.o_proj", "d (n h) -> n h d", "d -> d" if biased else None)


def _bert_rows() -> list[tuple[str, str, str]]:
  at, our = "bert.encoder.layer.{i}", "encoder.layers"
  names = ("query", "key", "value", f"{at}.attention.output.dense")
  return [
    ("bert.embeddings.word_embeddings.weight", "embed.table", "v d -> v d"),
    ("bert.embeddings.position_embeddings.weight", "encoder.position_embed.table", "p d -> p d"),
    ("bert.embeddings.token_type_embeddings.weight", "encoder.type_embed.table", "p d -> p d"),
    *_norm("bert.embeddings.LayerNorm", "encoder.embed_norm"),
    *_attention(f"{at}.attention.self", f"{our}.attn", names, biased=True),
    *_norm(f"{at}.attention.output.LayerNorm", f"{our}.attn_post_norm"),
    *_linear(f"{at}.intermediate.dense", f"{our}.mlp.up_proj", "f d -> d f", "f -> f"),
    *_linear(f"{at}.output.dense", f"{our}.mlp.down_proj", "d f -> f d", "d -> d"),
    *_norm(f"{at}.output.LayerNorm", f"{our}.mlp_post_norm"),
  ]


def _bart_rows() -> list[tuple[str, str, str]]:
  rows = [("model.shared.weight", "embed.table", "v d -> v d")]
  names = ("q_proj", "k_proj", "v_proj", "out_proj")
  for stack in ("encoder", "decoder"):
    at, our = f"model.{stack}.layers.{{i}}", f"{stack}.layers"
    rows += [
      (f"model.{stack}.embed_positions.weight", f"{stack}.position_embed.table", "p d -> p d"),
      *_norm(f"model.{stack}.layernorm_embedding", f"{stack}.embed_norm"),
      *_attention(f"{at}.self_attn", f"{our}.attn", names, biased=True),
      *_norm(f"{at}.self_attn_layer_norm", f"{our}.attn_post_norm"),
      *_linear(f"{at}.fc1", f"{our}.mlp.up_proj", "f d -> d f", "f -> f"),
      *_linear(f"{at}.fc2", f"{our}.mlp.down_proj", "d f -> f d", "d -> d"),
      *_norm(f"{at}.final_layer_norm", f"{our}.mlp_post_norm"),
    ]
  at = "model.decoder.layers.{i}.encoder_attn"
  rows += _attention(at, "decoder.layers.cross_attn", names, biased=True)
  return rows + _norm(f"{at}_layer_norm", "decoder.layers.cross_attn_post_norm")


def _t5_rows() -> list[tuple[str, str, str]]:
  rows = [("shared.weight", "embed.table", "v d -> v d")]
  names = ("q", "k", "v", "o")
  for stack in ("encoder", "decoder"):
    at, our, last = f"{stack}.block.{{i}}.layer", f"{stack}.layers", 2 if stack == "decoder" else 1
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rows += [
      (bias, f"{stack}.relative_bias", "b n -> b n"),
      *_attention(f"{at}.0.SelfAttention", f"{our}.attn", names, biased=False),
      (f"{at}.0.layer_norm.weight", f"{our}.attn_norm.scale", "d -> d"),
      (f"{at}.{last}.layer_norm.weight", f"{our}.mlp_norm.scale", "d -> d"),
      (f"{at}.{last}.DenseReluDense.wi.weight", f"{our}.mlp.up_proj.w", "f d -> d f"),
      (f"{at}.{last}.DenseReluDense.wo.weight", f"{our}.mlp.down_proj.w", "d f -> f d"),
      (f"{stack}.final_layer_norm.weight", f"{stack}.final_norm.scale", "d -> d"),
    ]
  at, our = "decoder.block.{i}.layer.1", "decoder.layers"
  rows += _attention(f"{at}.EncDecAttention", f"{our}.cross_attn", names, biased=False)
  return [*rows, (f"{at}.layer_norm.weight", f"{our}.cross_attn_norm.scale", "d -> d")]


_MASKED = [
  *_linear("cls.predictions.transform.dense", "head.dense", "f d -> d f", "f -> f"),
  *_norm("cls.predictions.transform.LayerNorm", "head.norm"),
  ("cls.predictions.bias", "head.bias", "v -> v"),
]
_POOLER = _linear("bert.pooler.dense", "head.dense", "f d -> d f", "f -> f")
_LABELS = _linear("classifier", "head.proj", "c d -> d c", "c -> c")
_BERT_SIZES = dict(
  vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
  intermediate_size=48, max_position_embeddings=64,
)  # fmt: skip
# Name in Transformers -> rows of weights, its config, changes of ours.
FAMILIES = {
  "T5ForConditionalGeneration": (
    _t5_rows,
    dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3,
         num_heads=4, decoder_start_token_id=0),
    T5,
  ),
  "BartForConditionalGeneration": (
    _bart_rows,
    dict(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=48,
         decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
         max_position_embeddings=64, decoder_start_token_id=2, forced_eos_token_id=None),
    BART,
  ),
  "BertForMaskedLM": (
    lambda: _bert_rows() + _MASKED, _BERT_SIZES,
    BERT | dict(head_dense=True, head_norm=True, logit_bias=True),
  ),
  "BertForSequenceClassification": (
    lambda: _bert_rows() + _POOLER + _LABELS,
    _BERT_SIZES | dict(num_labels=3),
    BERT | dict(head="sequence", head_dense=True, head_activation="tanh", num_labels=3),
  ),
  "BertForTokenClassification": (
    lambda: _bert_rows() + _LABELS, _BERT_SIZES | dict(num_labels=5),
    BERT | dict(head="token", num_labels=5),
  ),
  "BertForQuestionAnswering": (
    lambda: _bert_rows() + _linear("qa_outputs", "head.proj", "c d -> d c", "c -> c"), _BERT_SIZES,
    BERT | dict(head="span"),
  ),
}  # fmt: skip


def theirs_and_ours(name: str, *, std: float = 0.6):
  """A random model of Transformers and ours with the same weights, without a tokenizer."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  rows, sizes, changes = FAMILIES[name]
  kind = getattr(transformers, name)
  torch.manual_seed(0)
  theirs = kind(kind.config_class(**sizes)).eval()
  for path, p in theirs.named_parameters():  # Norms too: a scale of one would hide a mistake.
    scale = p.ndim == 1 and path.endswith("weight")
    torch.nn.init.normal_(p, mean=float(scale), std=std if p.ndim > 1 else 0.1)
  cfg = dataclasses.replace(BASE, **changes)
  return theirs, Model(cfg, _converted(cfg, rows(), theirs.state_dict()))


def _converted(cfg: ModelConfig, rows, tensors) -> dict:
  params = jax.tree.map(np.array, init_params(cfg, jax.random.key(0)))
  for theirs, ours, pattern in rows:
    layers = cfg.depth(ours.split(".")[0]) if "{i}" in theirs else 0
    axes = {"n": cfg.num_heads} if "(n h)" in pattern else {}
    put = lambda i, name=theirs, to=pattern, axes=axes: einops.rearrange(
      tensors[name.format(i=i)].numpy(), to, **axes
    )
    value = np.stack([put(i) for i in range(layers)]) if layers else put(0)
    at = params
    *path, last = ours.replace(".layers", ".layers.0").split(".")
    for part in path:
      at = at[int(part) if part == "0" else part]
    if "v" in pattern:  # The vocabulary is padded.
      at[last][: len(value)] = value
    elif at[last].shape == value.shape:
      at[last] = value
    else:
      raise ValueError(f"{ours} has shape {at[last].shape}, {theirs} {value.shape}")
  return jax.tree.map(jnp.asarray, params)
