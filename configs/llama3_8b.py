"""Llama 3 8B: 8,030,261,248 parameters (Grattafiori et al., arXiv:2407.21783, table 3).

    python -m train --config=configs/llama3_8b.py --workdir=/mnt/BUCKET/llama3_8b \
        --config.data.source=tfds:c4/en:3.1.0 --config.data.tokenizer=TOKENIZER_FOLDER

where the folder holds a tokenizer of at most 128,256 entries. On v5e:16x16, 2M tokens a step, one
sequence a device: each row of the torus holds the parameters and moments, 96 GB, once, and gathers
them over its ring. Elsewhere:

    v6e:8x8             --config.mesh.data=1 --config.mesh.fsdp=None --config.accumulation=4
    4 slices of v5e     --config.mesh.slices=4 --config.batch_size=1024

What these need and take is in docs/scale.md. Not trained by us yet.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=200_000,
    batch_size=256,
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
    mesh=MeshConfig(fsdp=16),
  )  # fmt: skip
