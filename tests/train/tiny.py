"""Tiny models and random batches that the tests of training share."""

import dataclasses

import numpy as np
import pytest

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig

VOCAB = 61
ROTARY = ModelConfig(
  vocab_size=VOCAB, vocab_multiple=8, num_layers=3, d_model=16, d_ff=32, num_heads=4,
  num_kv_heads=2, head_dim=8, max_positions=32, layer_pattern=("local", "global"), window=3,
)  # fmt: skip
MODELS = {
  "rotary_gqa_windows": ROTARY,
  "learned_layer_norm": dataclasses.replace(
    ROTARY, positions="learned", norm="layer", gated=False, activation="gelu_tanh",
    layer_pattern=("global",), window=None, mlp_bias=True, attention_bias=True,
    attention_softcap=5.0, attention_sinks=True, tie_embeddings=False, qk_norm="each",
  ),
  "alibi_post_norm": dataclasses.replace(
    ROTARY, positions="alibi", norm_placement="post", alibi_scaled=True, alibi_rounded=True,
  ),
  "t5_bias_sandwich_qk_norm": dataclasses.replace(
    ROTARY, positions="t5_bias", norm_placement="sandwich", qk_norm="head", relative_buckets=8,
    relative_bias_per_layer=True,
  ),
  "shared_layers_narrow_tables_two_positions": dataclasses.replace(
    ROTARY, num_layers=4, layer_sets=2, layer_pattern=("global",), window=None, d_embed=8,
    positions="learned", relative_bias=True, relative_buckets=8, embed_norm=True, head_dense=True,
  ),
  "experts": dataclasses.replace(
    ROTARY, layer_pattern=("global", "global+experts"), window=None, num_experts=4,
    balance_loss=0.0, router_z_loss=0.0, shared_experts=1, shared_gate=True, router_bias=True,
    gate_limit=0.5, gate_offset=1.0, embed_scale=3.0, residual_scale=0.5, rope_scaling="longrope",
    rope_original_positions=1, rope_short_factors=(1.0,) * 4, rope_long_factors=(1.0, 2.0, 3.0, 4),
  ),
  "latent_grouped_experts": dataclasses.replace(
    ROTARY, num_kv_heads=None, kv_latent_dim=10, q_latent_dim=6, rope_head_dim=4, v_head_dim=6,
    rope_interleaved=True, attention_bias=True, layer_prefix=("global",),
    layer_pattern=("local+experts",), num_experts=8, shared_experts=1, router_scores="sigmoid",
    router_choice_bias=True, router_scale=2.5, router_groups=4, router_groups_kept=2,
    router_group_best=2,
    balance_loss=0.0, router_z_loss=0.0,
  ),
}  # fmt: skip


# Those whose programs take longest to compile.
LONGER = ("experts", "latent_grouped_experts", "shared_layers_narrow_tables_two_positions")


def marked(*slow: str) -> list:
  """Names of MODELS for a test's cases, of which some run on request."""
  mark = lambda name: pytest.param(name, marks=pytest.mark.slow) if name in slow else name
  return [mark(name) for name in MODELS]


SHAPES = {  # (model, objective, lengths) of those that read text with an encoder.
  "encoder": (
    ModelConfig(
      shape="encoder", vocab_multiple=8, num_layers=2, d_model=16, d_ff=32, num_heads=4,
      max_positions=32, positions="learned", norm="layer", norm_placement="post", embed_norm=True,
      final_norm=False, activation="gelu", gated=False, token_types=2, mlp_bias=True,
      attention_bias=True, attention_out_bias=True, head_dense=True, head_norm=True,
      logit_bias=True, d_embed=8, layer_sets=1, relative_bias=True,
    ),
    ObjectiveConfig(name="masked_lm", pairs="sentence_order"),
    dict(seq_len=24),
  ),
  "encoder_decoder": (
    ModelConfig(
      shape="encoder_decoder", vocab_multiple=8, num_layers=2, d_model=16, d_ff=32, num_heads=4,
      num_kv_heads=2, max_positions=None, positions="t5_bias", norm="rms", relative_buckets=8,
      relative_max_distance=20,
    ),
    ObjectiveConfig(name="span_corruption"),
    dict(seq_len=24, target_len=16),
  ),
}  # fmt: skip


def shape_config(shape: str, text: str, cache_dir: str, **changes) -> Config:
  """A run of an encoder or an encoder–decoder on a text file; `changes` are the model's too."""
  model, objective, lengths = SHAPES[shape]
  inner = {f.name for f in dataclasses.fields(ModelConfig)}
  own = {name: changes.pop(name) for name in list(changes) if name in inner}
  data = DataConfig(source=text, tokenizer="bytes", documents="line", validation_fraction=0.1)
  return config(
    dataclasses.replace(model, **own), objective=objective, data=data, cache_dir=cache_dir,
    **(lengths | changes),
  )  # fmt: skip


def config(model: ModelConfig = ROTARY, **changes) -> Config:
  optimizer = changes.pop("optimizer", OptimizerConfig(warmup_steps=1, learning_rate=0.01))
  return Config(
    **{**dict(steps=50, batch_size=8, seq_len=16), **changes}, model=model, optimizer=optimizer
  )


def documents(seed: int, lengths: list[int]) -> list[np.ndarray]:
  rng = np.random.default_rng(seed)
  return [rng.integers(0, VOCAB, n + 1).astype(np.int32) for n in lengths]


def row(docs: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
  """One row that holds `docs` behind each other, written without the code under test."""
  out = dict(
    tokens=np.zeros(length, np.int32), targets=np.zeros(length, np.int32),
    weights=np.zeros(length, np.float32), segments=np.zeros(length, np.int32),
    positions=np.full(length, -1, np.int32),
  )  # fmt: skip
  at = 0
  for number, doc in enumerate(docs, start=1):
    n = len(doc) - 1
    out["tokens"][at : at + n], out["targets"][at : at + n] = doc[:-1], doc[1:]
    out["weights"][at : at + n], out["segments"][at : at + n] = 1, number
    out["positions"][at : at + n] = np.arange(n)
    at += n
  return out


def batch_of(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {name: np.stack([r[name] for r in rows]) for name in rows[0]}


def random_batch(seed: int, rows: int = 8, length: int = 16) -> dict[str, np.ndarray]:
  """Rows of two documents each and some padding."""
  rng = np.random.default_rng(seed)
  pairs = [sorted(rng.integers(2, length, 2)) for _ in range(rows)]
  return batch_of([row(documents(seed * 97 + i, [int(a), max(1, int(b - a))]), length)
                   for i, (a, b) in enumerate(pairs)])  # fmt: skip
