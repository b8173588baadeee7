"""GPT-2 small: 124,439,808 parameters with GPT-2's vocabulary of 50,257.

    python -m train --config=configs/gpt_small.py --workdir=runs/gpt_small

reads the sources of Python's standard library and trains its own tokenizer: a check that the whole
machine works. On a TPU VM, with a prepared C4 and a folder that holds GPT-2's vocabulary,

    python -m train --config=configs/gpt_small.py --workdir=/mnt/BUCKET/gpt_small \
        --config.data.source=tfds:c4/en:3.1.0 --config.data.tokenizer=gpt2_bpe \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

0.5M tokens a step, 10.5B tokens in 20,000 steps: 7.8e18 model FLOPs (no result published yet).
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=20_000,
    batch_size=512,
    seq_len=1024,
    accumulation=1,
    log_every=10,
    eval_every=1000,
    checkpoint_every=1000,
    model=ModelConfig(
      vocab_size=50_257, num_layers=12, d_model=768, d_ff=3072, num_heads=12, max_positions=1024,
      positions="learned", norm="layer", activation="gelu_tanh", gated=False, mlp_bias=True,
      attention_bias=True, attention_out_bias=True, remat="dots",
    ),
    data=DataConfig(source="python_stdlib", tokenizer="bpe:50257"),
    optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=700),
  )  # fmt: skip
