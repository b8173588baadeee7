"""T5 v1.1 base (GEGLU, embeddings not tied; arXiv:2002.05202): 247,577,856 parameters.

    python -m train --config=configs/t5_1_1_base.py --workdir=runs/t5_1_1_base

reads the sources of Python's standard library and trains its own vocabulary: a check that the whole
machine works. On a TPU VM, with a prepared C4 and a folder that holds T5's vocabulary,

    python -m train --config=configs/t5_1_1_base.py --workdir=/mnt/BUCKET/t5_1_1_base \
        --config.data.source=tfds:c4/en:3.1.0 --config.data.tokenizer=FOLDER \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

T5's batch, lengths and number of steps: 512 tokens in, 114 out, 34B tokens (no result published
yet).
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=524_288,
    batch_size=128,
    seq_len=512,
    target_len=114,
    log_every=10,
    eval_every=10_000,
    checkpoint_every=10_000,
    model=ModelConfig(
      shape="encoder_decoder", vocab_size=32_128,
      num_layers=12, d_model=768, d_ff=2048, num_heads=12,
      head_dim=64, max_positions=None, positions="t5_bias", attention_scale=1.0, norm="rms",
      norm_eps=1e-6, init_embed_std=1.0, gated=True, activation="gelu_tanh", tie_embeddings=False,
    ),
    objective=ObjectiveConfig(name="span_corruption"),
    data=DataConfig(source="python_stdlib", tokenizer="unigram:32128"),
    optimizer=OptimizerConfig(
      name="adafactor", learning_rate=1e-2, schedule="inverse_sqrt", warmup_steps=10_000,
      weight_decay=0.0,
    ),
  )  # fmt: skip
