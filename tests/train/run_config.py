"""A run of seconds on a text that the test writes.

python -m train --config=tests/train/run_config.py --workdir=DIR --config.data.source=FILE
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=30,
    batch_size=8,
    seq_len=32,
    eval_every=10,
    checkpoint_every=3,
    keep_checkpoints=2,
    ema_decay=0.9,
    model=ModelConfig(
      num_layers=2, d_model=32, d_ff=64, num_heads=4, max_positions=64, vocab_multiple=8,
      dropout=0.1,
    ),
    data=DataConfig(tokenizer="bytes", documents="line", validation_fraction=0.1),
    optimizer=OptimizerConfig(warmup_steps=2, learning_rate=3e-3),
  )  # fmt: skip
