"""Sentiment of sentences of film reviews, from scratch: an encoder of 1.2M parameters.

    python -m train --config=configs/sst2.py --workdir=runs/sst2 \
        --config.data.source=train.tsv --config.data.validation_source=dev.tsv

where the files are those of SST-2: a sentence and 0 or 1 a line, a tab between, no header. With
--config.init_from=WORKDIR of a masked language model, --config.data.tokenizer=WORKDIR/tokenizer and
its `model` settings it is fine-tuned instead. About three minutes on two cores; metrics.jsonl has
`validation_accuracy`.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=400,
    batch_size=32,
    seq_len=128,
    log_every=10,
    eval_every=40,
    checkpoint_every=200,
    model=ModelConfig(
      shape="encoder", num_layers=2, d_model=128, d_ff=512, num_heads=4, max_positions=128,
      positions="sinusoidal", scale_embeddings=True, init_embed_std=128**-0.5, norm="layer",
      activation="gelu", gated=False, pooling="mean", dropout=0.3, attention_dropout=0.3,
      mlp_dropout=0.3,
    ),
    objective=ObjectiveConfig(name="classification"),
    data=DataConfig(
      source="train.tsv", validation_source="dev.tsv", text="0", label="1",
      tokenizer="wordpiece:6000",
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=40, weight_decay=0.1),
  )  # fmt: skip
