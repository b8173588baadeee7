"""UL2's mixture of denoisers (arXiv:2205.05131) on the shape of T5 v1.1 base.

    python -m train --config=configs/ul2_base.py --workdir=runs/ul2_base

reads the sources of Python's standard library and trains its own vocabulary: a check that the whole
machine works. On a TPU VM, with a prepared C4 and a folder that holds T5's vocabulary,

    python -m train --config=configs/ul2_base.py --workdir=/mnt/BUCKET/ul2_base \
        --config.data.source=tfds:c4/en:3.1.0 --config.data.tokenizer=FOLDER \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

UL2's seven denoisers, 512 tokens in and 512 out (no result published yet). 247,577,856 parameters:
2·V·D for the two tables, 12 encoder layers of 4·D² + 3·D·F + 2·D, 12 decoder layers of 8·D² + 3·D·F
+ 3·D, two last norms of D and two tables of 32 buckets for 12 heads.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=524_288,
    batch_size=128,
    seq_len=512,
    target_len=512,
    log_every=10,
    eval_every=10_000,
    checkpoint_every=10_000,
    model=ModelConfig(
      shape="encoder_decoder", vocab_size=32_128,
      num_layers=12, d_model=768, d_ff=2048, num_heads=12,
      head_dim=64, max_positions=None, positions="t5_bias", attention_scale=1.0, norm="rms",
      norm_eps=1e-6, init_embed_std=1.0, gated=True, activation="gelu_tanh", tie_embeddings=False,
    ),
    objective=ObjectiveConfig(name="ul2"),
    data=DataConfig(source="python_stdlib", tokenizer="unigram:32128"),
    optimizer=OptimizerConfig(
      name="adafactor", learning_rate=1e-2, schedule="inverse_sqrt", warmup_steps=10_000,
      weight_decay=0.0,
    ),
  )  # fmt: skip
