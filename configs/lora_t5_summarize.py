"""An encoder–decoder learns to summarize by LoRA.

    python -m train --config=configs/lora_t5_summarize.py --workdir=runs/summaries \
        --config.init_from=MODEL --config.data.source=articles.jsonl

where MODEL is the folder of a T5, mT5, BART or another encoder–decoder, whose shape and tokenizer
are taken, and each line of the source has a `document` and its `summary` (other names:
--config.data.text, --config.data.target; .json lists, .csv, .tsv and .parquet are read too).
Documents of more than 512 tokens are cut there, and so are summaries of more than 128; both are
counted in metrics.jsonl. A twentieth of the pairs is held out.

    python -m infer --checkpoint=runs/summaries --prompt="$(cat article.txt)"

Of T5 base (222,903,552 parameters) adapters of rank 16 are 3 % (all matrices of attention and
MLPs). 500 steps of 8 rows see about 4,000 documents; hours on a CPU, minutes on a GPU.
"""

from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig, PeftConfig


def get_config() -> Config:
  return Config(
    steps=500,
    batch_size=8,
    seq_len=512,
    target_len=128,
    log_every=10,
    eval_every=100,
    checkpoint_every=100,
    objective=ObjectiveConfig(name="seq2seq"),
    data=DataConfig(source="articles.jsonl", text="document", target="summary", truncate=True),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, weight_decay=0.0, b2=0.999),
    peft=PeftConfig(method="lora", rank=16, alpha=32.0),
  )  # fmt: skip
