"""Llama 3 70B: 70,553,706,496 parameters (Grattafiori et al., arXiv:2407.21783, table 3).

    python -m train --config=configs/llama3_70b.py --workdir=/mnt/BUCKET/llama3_70b \
        --config.data.source=tfds:c4/en:3.1.0 --config.data.tokenizer=TOKENIZER_FOLDER

where the folder holds a tokenizer of at most 128,256 entries. On v5p:8x8x8, 4M tokens a step, one
sequence a device: parameters and moments, 847 GB, are shared by all devices. On v6e:16x16 add
--config.accumulation=2 --config.objective.loss_parts=8. What these need and take is in
docs/scale.md. Not trained by us yet.
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
      vocab_size=128_256, num_layers=80, d_model=8192, d_ff=28_672, num_heads=64, num_kv_heads=8,
      max_positions=8192, rope_theta=500_000.0, tie_embeddings=False, remat="full",
    ),
    data=DataConfig(source="python_stdlib", tokenizer="bpe:128256"),
    optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=8000),
    mesh=MeshConfig(data=1, fsdp=None),
  )  # fmt: skip
