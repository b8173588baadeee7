"""SmolLM2-135M-Instruct learns to follow instructions of yours, by LoRA: 134,515,008 parameters, of
which adapters of rank 16 are trained.

    python -m train --config=configs/sft_smollm2.py --workdir=runs/sft \
        --config.init_from=MODEL --config.data.source=instructions.jsonl

where MODEL is the checkpoint's folder or .gguf file, and the rows of the source hold `messages`,
`prompt` and `completion`, or `instruction`, `input` and `output`. Answers alone are learned, in the
model's own chat template. The workdir holds the adapter:

    python -m infer --checkpoint=runs/sft --chat --prompt="Name three colours."

No result is published yet.
"""

from model.config import ModelConfig
from train.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig, PeftConfig


def get_config() -> Config:
  return Config(
    steps=100,
    batch_size=4,
    seq_len=512,
    log_every=5,
    eval_every=25,
    checkpoint_every=50,
    model=ModelConfig(
      vocab_size=49_152, num_layers=30, d_model=576, d_ff=1536, num_heads=9, num_kv_heads=3,
      head_dim=64, max_positions=8192, rope_theta=100_000.0, remat="full",
    ),
    objective=ObjectiveConfig(name="sft", too_long="drop", loss_parts=8),
    data=DataConfig(source="instructions.jsonl", validation_fraction=0.1),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=5, weight_decay=0.0, b2=0.999),
    peft=PeftConfig(method="lora", rank=16, alpha=32.0),
  )  # fmt: skip
