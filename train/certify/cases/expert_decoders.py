"""Decoders with mixtures of experts."""

from train.certify.cases.decoders import LLAMA

CASES = {
  "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}),
}  # fmt: skip
