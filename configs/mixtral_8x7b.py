"""Mixtral 8x7B: 46,702,792,704 parameters, 12.9B of them at work on a token (arXiv:2401.04088).

    python -m train --config=configs/mixtral_8x7b.py --workdir=/mnt/BUCKET/mixtral_8x7b \
        --config.data.source=tfds:c4/en:3.1.0 --config.data.tokenizer=TOKENIZER_FOLDER

where the folder holds a tokenizer of at most 32,000 entries. On v5p:4x4x4, 2M tokens a step: an
expert of each layer on each of 8 devices, tokens travel to theirs; parameters and moments, 560 GB,
are shared by all. What it needs and takes is in docs/scale.md. Not trained by us yet.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=100_000,
    batch_size=512,
    accumulation=2,
    seq_len=4096,
    log_every=10,
    eval_every=1000,
    checkpoint_every=1000,
    model=ModelConfig(
      vocab_size=32_000, num_layers=32, d_model=4096, d_ff=14_336, num_heads=32, num_kv_heads=8,
      max_positions=32_768, rope_theta=1e6, tie_embeddings=False, remat="full",
      layer_pattern=("global+experts",), num_experts=8, experts_per_token=2,
    ),
    data=DataConfig(source="python_stdlib", tokenizer="bpe:32000"),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    mesh=MeshConfig(data=1, fsdp=None, expert=8),
  )  # fmt: skip
