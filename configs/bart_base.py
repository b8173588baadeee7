"""BART base (arXiv:1910.13461): 139,420,416 parameters.

    python -m train --config=configs/bart_base.py --workdir=runs/bart_base

reads the sources of Python's standard library and trains its own vocabulary: a check that the whole
machine works. BART's vocabulary (50,265) is taken with --config.data.tokenizer=FOLDER. Text
infilling of 30 % of the tokens and sentence permutation (no result published yet).
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=500_000,
    batch_size=256,
    seq_len=512,
    target_len=512,
    log_every=10,
    eval_every=10_000,
    checkpoint_every=10_000,
    model=ModelConfig(
      shape="encoder_decoder", vocab_size=50_265, num_layers=6, d_model=768, d_ff=3072,
      num_heads=12, max_positions=1024, positions="learned", position_offset=2, embed_norm=True,
      norm="layer", norm_placement="post", final_norm=False, gated=False, activation="gelu",
      mlp_bias=True, attention_bias=True, attention_out_bias=True, init_residual_scale=False,
      dropout=0.1, attention_dropout=0.1, mlp_dropout=0.1,
    ),
    objective=ObjectiveConfig(name="denoising"),
    data=DataConfig(source="python_stdlib", tokenizer="bpe:50265"),
    optimizer=OptimizerConfig(
      learning_rate=4e-4, schedule="linear", final_fraction=0.0, warmup_steps=10_000,
      weight_decay=0.01, b2=0.999, eps=1e-6,
    ),
  )  # fmt: skip
