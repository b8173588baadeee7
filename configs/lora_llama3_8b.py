"""Llama 3 8B Instruct tuned to your conversations by LoRA: 8,030,261,248 parameters in bfloat16, of
which adapters of rank 16 are trained, 41,943,040 parameters in float32.

    python -m train --config=configs/lora_llama3_8b.py --workdir=runs/lora \
        --config.init_from=MODEL --config.data.source=conversations.jsonl

where MODEL is the checkpoint's folder or .gguf file (Llama 3.1 needs the settings of its rotary
positions besides), and the rows of the source hold `messages`, `prompt` and `completion`, or
`instruction`, `input` and `output`. The workdir holds the adapter:

    python -m infer --checkpoint=runs/lora --chat --prompt="Name three colours."

For one device of 24 GB or more; on eight, of which each holds an eighth of the base,
--config.mesh.data=1 --config.mesh.fsdp=8 --config.accumulation=1. configs/qlora_llama3_8b.py takes
8 GiB. What it takes, without the checkpoint:

    python -m launch.preflight --config=configs/lora_llama3_8b.py --topology=v6e:1x1

18.4 GiB by its compiler's account, of which the base is 15.0. Not trained by us yet.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig, PeftConfig


def get_config() -> Config:
  return Config(
    steps=500,
    batch_size=8,
    accumulation=8,
    seq_len=2048,
    log_every=10,
    eval_every=100,
    checkpoint_every=100,
    model=ModelConfig(
      vocab_size=128_256, num_layers=32, d_model=4096, d_ff=14_336, num_heads=32, num_kv_heads=8,
      max_positions=8192, rope_theta=500_000.0, tie_embeddings=False, remat="full",
      param_dtype="bfloat16",
    ),
    objective=ObjectiveConfig(name="sft", too_long="drop", loss_parts=8),
    data=DataConfig(source="conversations.jsonl"),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=15, weight_decay=0.0, b2=0.999),
    peft=PeftConfig(method="lora", rank=16, alpha=32.0),
  )  # fmt: skip
