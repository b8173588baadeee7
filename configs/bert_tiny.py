"""A BERT of 1.3M parameters on the sources of Python's standard library.

python -m train --config=configs/bert_tiny.py --workdir=runs/bert_tiny

Rotary positions, norms in front and 30 % of masks (arXiv:2202.08005): so it learns to look around
within few steps.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=1000,
    batch_size=8,
    seq_len=128,
    eval_every=500,
    eval_batches=40,
    model=ModelConfig(
      shape="encoder", num_layers=4, d_model=128, d_ff=512, num_heads=4, max_positions=256,
      norm="layer", activation="gelu", gated=False, head_dense=True, head_norm=True,
      logit_bias=True,
    ),
    objective=ObjectiveConfig(name="masked_lm", mask_rate=0.3),
    data=DataConfig(source="python_stdlib", tokenizer="wordpiece:4096"),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
  )  # fmt: skip
