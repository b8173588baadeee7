"""Characters of Shakespeare on one GPU: nanoGPT's setting, 10.7M parameters.

    python -m train --config=configs/shakespeare.py --workdir=runs/shakespeare \
        --config.data.source=input.txt

where input.txt is the tiny Shakespeare corpus (1,115,394 characters). nanoGPT's README gives a best
validation loss of 1.4697 nats per character; this gives 1.458 at step 1,750 on an H100 (the best
checkpoint, `runs/shakespeare@best`). 82M training characters: minutes on a GPU, hours on two cores.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=5000,
    batch_size=64,
    seq_len=256,
    log_every=10,
    eval_every=250,
    checkpoint_every=250,
    model=ModelConfig(
      num_layers=6, d_model=384, d_ff=1536, num_heads=6, max_positions=256, positions="learned",
      norm="layer", norm_bias=False, activation="gelu", gated=False, vocab_multiple=1,
      dropout=0.2, attention_dropout=0.2,
    ),
    data=DataConfig(source="input.txt", tokenizer="char", validation_fraction=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, b2=0.99, weight_decay=0.1),
  )  # fmt: skip
