"""Llama 3 8B: 8,030,261,248 parameters (Grattafiori et al., arXiv:2407.21783, table 3).

    python -m train --config=configs/llama3_8b.py --workdir=/mnt/BUCKET/llama3_8b \
        --config.data.source=tfds:c4/en:3.1.0 --config.data.tokenizer=TOKENIZER_FOLDER

where the folder holds a tokenizer of at most 128,256 entries. 4M tokens a step; parameters and
moments take 96 GB in float32, shared by the devices of the fsdp axis. Not trained by us yet.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=100_000,
    batch_size=512,
    seq_len=8192,
    log_every=10,
    eval_every=1000,
    checkpoint_every=1000,
    model=ModelConfig(
      vocab_size=128_256, num_layers=32, d_model=4096, d_ff=14_336, num_heads=32, num_kv_heads=8,
      max_positions=8192, rope_theta=500_000.0, tie_embeddings=False, remat="full",
    ),
    data=DataConfig(source="python_stdlib", tokenizer="bpe:128256"),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=8000),
    mesh=MeshConfig(data=1, fsdp=None),
  )  # fmt: skip
