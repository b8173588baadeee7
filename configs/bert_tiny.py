"""A BERT of 1.4M parameters on the sources of Python's standard library.

python -m train --config=configs/bert_tiny.py --workdir=runs/bert_tiny
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=700,
    batch_size=16,
    seq_len=128,
    eval_every=350,
    eval_batches=40,
    model=ModelConfig(
      shape="encoder", num_layers=4, d_model=128, d_ff=512, num_heads=4, max_positions=128,
      positions="learned", norm="layer", norm_eps=1e-12, norm_placement="post", embed_norm=True,
      final_norm=False, activation="gelu", gated=False, attention_bias=True,
      attention_out_bias=True, mlp_bias=True, head_dense=True, head_norm=True, logit_bias=True,
      init_residual_scale=False,
    ),
    objective=ObjectiveConfig(name="masked_lm", mask_unit="word"),
    data=DataConfig(source="python_stdlib", tokenizer="wordpiece:4096"),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=70, weight_decay=0.01),
  )  # fmt: skip
