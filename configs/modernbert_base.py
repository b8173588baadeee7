"""ModernBERT base (arXiv:2412.13663): 149,655,232 parameters with its masked-LM head.

    python -m train --config=configs/modernbert_base.py --workdir=runs/modernbert_base

reads the sources of Python's standard library and trains its own vocabulary: a check that the whole
machine works. Rotary positions, every third layer global, the others windows of 128 tokens;
documents are packed, so that nothing is computed for padding. ModernBERT's vocabulary (50,368) is
taken with --config.data.tokenizer=FOLDER. 1,024 positions as in its first phase, 30 % of the tokens
masked (no result published yet).
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=500_000,
    batch_size=512,
    seq_len=1024,
    log_every=10,
    eval_every=5000,
    checkpoint_every=5000,
    model=ModelConfig(
      shape="encoder", vocab_size=50_368, num_layers=22, d_model=768, d_ff=1152, num_heads=12,
      max_positions=8192, layer_prefix=("global+unnormed", "local", "local"),
      layer_pattern=("global", "local", "local"), window=128, positions="rotary",
      rope_theta=160_000.0, rope_local_theta=10_000.0, embed_norm=True, norm="layer",
      norm_bias=False, activation="gelu", head_dense=True, head_norm=True, head_dense_bias=False,
      logit_bias=True,
    ),
    objective=ObjectiveConfig(name="masked_lm", mask_rate=0.3),
    data=DataConfig(source="python_stdlib", tokenizer="wordpiece:30522"),
    optimizer=OptimizerConfig(
      learning_rate=8e-4, schedule="wsd", warmup_steps=3000, weight_decay=1e-5, b2=0.98, eps=1e-6
    ),
  )  # fmt: skip
