"""BERT large (arXiv:1810.04805): 335,174,458 parameters with its masked-LM head.

    python -m train --config=configs/bert_large.py --workdir=runs/bert_large

reads the sources of Python's standard library and trains its own vocabulary: a check that the whole
machine works. On a TPU VM, with a prepared Wikipedia and a folder that holds BERT's vocabulary,

    python -m train --config=configs/bert_large.py --workdir=/mnt/BUCKET/bert_large \
        --config.data.source=tfds:wikipedia/20230601.en:1.0.0 --config.data.tokenizer=FOLDER \
        --config.data.data_dir=gs://BUCKET/tensorflow_datasets

BERT's batch and length, a million steps: 131B tokens (no result published yet). Next-sentence
prediction, which later work left out, comes with --config.objective.pairs=next_sentence.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig


def get_config() -> Config:
  return Config(
    steps=1_000_000,
    batch_size=256,
    seq_len=512,
    log_every=10,
    eval_every=10_000,
    checkpoint_every=10_000,
    model=ModelConfig(
      shape="encoder", vocab_size=30_522, num_layers=24, d_model=1024, d_ff=4096, num_heads=16,
      max_positions=512, positions="learned", token_types=2, embed_norm=True, norm="layer",
      norm_eps=1e-12, norm_placement="post", final_norm=False, gated=False, activation="gelu",
      mlp_bias=True, attention_bias=True, attention_out_bias=True, head_dense=True, head_norm=True,
      logit_bias=True, init_residual_scale=False, dropout=0.1, attention_dropout=0.1,
      remat="dots",
    ),
    objective=ObjectiveConfig(name="masked_lm"),
    data=DataConfig(source="python_stdlib", tokenizer="wordpiece:30522"),
    optimizer=OptimizerConfig(
      learning_rate=1e-4, schedule="linear", final_fraction=0.0, warmup_steps=10_000,
      weight_decay=0.01, b2=0.999, eps=1e-6,
    ),
  )  # fmt: skip
