"""Llama 3.1 405B: 405,853,388,800 parameters (Grattafiori et al., arXiv:2407.21783, table 3).

    python -m train --config=configs/llama3_405b.py --workdir=/mnt/BUCKET/llama3_405b \
        --config.data.source=tfds:c4/en:3.1.0 --config.data.tokenizer=TOKENIZER_FOLDER

where the folder holds a tokenizer of at most 128,256 entries. On v5p:8x16x16, 16M tokens a step,
one sequence a device: parameters and moments, 4.9 TB, are shared by all devices. What it needs and
takes is in docs/scale.md. Not trained by us.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=100_000,
    batch_size=2048,
    seq_len=8192,
    log_every=10,
    eval_every=1000,
    checkpoint_every=1000,
    model=ModelConfig(
      vocab_size=128_256, num_layers=126, d_model=16_384, d_ff=53_248, num_heads=128,
      num_kv_heads=8, max_positions=8192, rope_theta=500_000.0, tie_embeddings=False, remat="full",
    ),
    data=DataConfig(source="python_stdlib", tokenizer="bpe:128256"),
    optimizer=OptimizerConfig(learning_rate=8e-5, warmup_steps=8000),
    mesh=MeshConfig(data=1, fsdp=None),
  )  # fmt: skip
