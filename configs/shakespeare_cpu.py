"""Characters of Shakespeare on a laptop: nanoGPT's setting for CPU, 0.8M parameters.

    python -m train --config=configs/shakespeare_cpu.py --workdir=runs/shakespeare_cpu \
        --config.data.source=input.txt

where input.txt is the tiny Shakespeare corpus (1,115,394 characters). nanoGPT's README gives a
validation loss of 1.88 nats per character, estimated on 20 batches; ours is over the whole of the
last 10 %. The learning rate is three times nanoGPT's, which is cautious for a model of this size:
with 1e-3 the same 2,000 steps end at 1.90. Minutes on two cores.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=2000,
    batch_size=12,
    seq_len=64,
    log_every=10,
    eval_every=250,
    checkpoint_every=500,
    model=ModelConfig(
      num_layers=4, d_model=128, d_ff=512, num_heads=4, max_positions=64, positions="learned",
      norm="layer", norm_bias=False, activation="gelu", gated=False, vocab_multiple=1,
    ),
    data=DataConfig(source="input.txt", tokenizer="char", validation_fraction=0.1),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100, b2=0.99, weight_decay=0.1),
  )  # fmt: skip
