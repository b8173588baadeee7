"""Translation of image captions from English to German, from scratch: an encoder–decoder of 2.4M
parameters.

    python -m train --config=configs/multi30k.py --workdir=runs/multi30k \
        --config.data.source=train.en.gz --config.data.target=train.de.gz \
        --config.data.validation_source=val.en.gz --config.data.validation_target=val.de.gz

where the files are those of Multi30k (29,000 and 1,014 pairs of lines). A row holds about seven
pairs; 1,500 steps are six epochs, about 20 minutes on two cores. `loss` is nats a token of the
target, without the label smoothing that is learned with.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=1500,
    batch_size=16,
    seq_len=128,
    target_len=128,
    log_every=10,
    eval_every=250,
    checkpoint_every=500,
    model=ModelConfig(
      shape="encoder_decoder", num_layers=3, d_model=128, d_ff=512, num_heads=4, max_positions=256,
      norm="layer", activation="relu", gated=False, dropout=0.1,
    ),
    objective=ObjectiveConfig(name="seq2seq", label_smoothing=0.1),
    data=DataConfig(
      source="train.en.gz", target="train.de.gz", validation_source="val.en.gz",
      validation_target="val.de.gz", tokenizer="bpe:8000",
    ),
    optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=200, b2=0.98, weight_decay=0.01),
  )  # fmt: skip
