"""A T5 of 1.2M parameters on the sources of Python's standard library.

    python -m train --config=configs/t5_tiny.py --workdir=runs/t5_tiny

learns to write the spans that are missing in a text: 128 tokens in, 29 out, which 140 tokens of a
file fill exactly. Expect a validation loss of 4.58 nats a target token (Python 3.11; the first step
has a loss of 7.67), after 3.6 minutes of CPU time: under 3 minutes where two cores are free.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=600,
    batch_size=16,
    seq_len=128,
    target_len=29,
    eval_every=200,
    model=ModelConfig(
      shape="encoder_decoder", num_layers=2, d_model=128, d_ff=384, num_heads=4,
      max_positions=None, positions="t5_bias", norm="rms", norm_eps=1e-6, gated=True,
      activation="gelu_tanh",
    ),
    objective=ObjectiveConfig(name="span_corruption"),
    data=DataConfig(source="python_stdlib", tokenizer="bpe:2048"),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
  )  # fmt: skip
