"""Sentiment of sentences of film reviews: a pretrained encoder learns it by LoRA.

    python -m train --config=configs/lora_bert_sst2.py --workdir=runs/sentiment \
        --config.init_from=MODEL --config.data.source=train.tsv \
        --config.data.validation_source=dev.tsv

where MODEL is the folder of a BERT, RoBERTa, DeBERTa or another encoder, whose shape and tokenizer
are taken, and the files are those of SST-2: a sentence and 0 or 1 a line, a tab between, no header.
Trained are adapters of rank 8 and a new head that reads the mean of a sentence's states: 1.5 % of
all-MiniLM-L6-v2. `python -m infer --checkpoint=runs/sentiment --task=classify --prompt=TEXT` tells.

No result is published yet.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig, PeftConfig


def get_config() -> Config:
  return Config(
    steps=300,
    batch_size=8,  # Rows, of about five sentences each.
    seq_len=128,
    log_every=10,
    eval_every=50,
    checkpoint_every=100,
    model=ModelConfig(pooling="mean"),
    objective=ObjectiveConfig(name="classification"),
    data=DataConfig(source="train.tsv", validation_source="dev.tsv", text="0", label="1"),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=30, weight_decay=0.0, b2=0.999),
    peft=PeftConfig(method="lora", rank=8, alpha=16.0, also=("head",)),
  )  # fmt: skip
