"""A GPT of 1M parameters on the sources of Python's standard library.

python -m train --config=configs/gpt_tiny.py --workdir=runs/tiny
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=300,
    batch_size=8,
    seq_len=128,
    model=ModelConfig(num_layers=4, d_model=128, d_ff=512, num_heads=4, max_positions=256),
    data=DataConfig(source="python_stdlib", tokenizer="bpe:2048"),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
  )
