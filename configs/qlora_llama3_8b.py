"""Llama 3 8B Instruct tuned to your conversations by QLoRA within 8 GiB of device memory: of
8,030,261,248 parameters in nf4, adapters of rank 16 are trained, 41,943,040 parameters.

    python -m train --config=configs/qlora_llama3_8b.py --workdir=runs/qlora \
        --config.init_from=MODEL --config.data.source=conversations.jsonl

where MODEL is the checkpoint's folder or .gguf file (Llama 3.1 needs the settings of its rotary
positions besides), and the rows of the source hold `messages`, `prompt` and `completion`, or
`instruction`, `input` and `output`. The base is read straight into four bits, a matrix of a layer
at a time. The workdir holds the adapter:

    python -m infer --checkpoint=runs/qlora --chat --prompt="Name three colours."

What it takes, without the checkpoint:

    python -m launch.preflight --config=configs/qlora_llama3_8b.py --topology=v5e:1x1

6.5 GiB on a TPU v5e by its compiler's account, 8.0 GiB on a CPU in float32 (--topology=cpu:1), of
which the base is 4.3; a step of 2,048 tokens takes 0.8 s on the TPU at best. Not trained by us yet.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig, PeftConfig


def get_config() -> Config:
  return Config(
    steps=1000,
    batch_size=1,
    seq_len=2048,
    log_every=10,
    eval_every=250,
    checkpoint_every=250,
    model=ModelConfig(
      vocab_size=128_256, num_layers=32, d_model=4096, d_ff=14_336, num_heads=32, num_kv_heads=8,
      max_positions=8192, rope_theta=500_000.0, tie_embeddings=False, remat="full",
    ),
    objective=ObjectiveConfig(name="sft", too_long="drop", loss_parts=8),
    data=DataConfig(source="conversations.jsonl"),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=30, weight_decay=0.0, b2=0.999),
    peft=PeftConfig(method="lora", rank=16, alpha=32.0, base_format="nf4"),
  )  # fmt: skip
