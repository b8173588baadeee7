"""Tiny random models of Transformers and adapters of torch PEFT for them."""

import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCAB = 61


def bases() -> dict[str, Any]:
  """Constructors of models by name: the three shapes, and fused queries, keys and values."""
  t = transformers
  small = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
  return {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(
      **small, intermediate_size=24, num_key_value_heads=2, max_position_embeddings=32)),
    "tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(
      **small, intermediate_size=24, max_position_embeddings=32, tie_word_embeddings=True)),
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(
      **small, intermediate_size=24, max_position_embeddings=32)),
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(
      vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
      decoder_start_token_id=0)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(
      vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(
      **small, intermediate_size=24, num_key_value_heads=2, max_position_embeddings=32,
      pad_token_id=0)),
  }  # fmt: skip


# What PEFT adapts of each.
TARGETS = {
  "llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
  "bert": ["query", "value", "attention.output.dense", "intermediate.dense"],
  "t5": ["q", "v", "o", "wi", "wo"],
  "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
  "phi3": ["qkv_proj", "o_proj", "gate_up_proj"],
}
READS = {"llama": ["down_proj"], "bert": [], "t5": ["wo"], "gpt2": ["mlp.c_proj"], "phi3": []}
TASK = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM", "phi3": "CAUSAL_LM"}


def base(name: str, folder, seed: int = 0):
  """A random model, saved in `folder`."""
  torch.manual_seed(seed)
  made = bases()[name]().eval()
  for p in made.parameters():
    if p.ndim > 1 and p.std() < 0.05:  # So that what is adapted is not lost beside the residual.
      p.data *= 8
  made.save_pretrained(folder)
  return made


def config(name: str, kind: str, **changes) -> Any:
  """PEFT's config of a kind of adapter for a model."""
  fused = name == "gpt2"
  common = dict(task_type=TASK.get(name), target_modules=TARGETS[name], fan_in_fan_out=fused)
  if kind == "ia3":
    return peft.IA3Config(**{**common, "feedforward_modules": READS[name], **changes})
  kinds = {
    "lora": {}, "rslora": dict(use_rslora=True), "dora": dict(use_dora=True),
    "pissa": dict(init_lora_weights="pissa", use_rslora=True),
    "olora": dict(init_lora_weights="olora", use_dora=True),
    "patterns": dict(rank_pattern={TARGETS[name][1]: 3}, alpha_pattern={TARGETS[name][0]: 7}),
  }  # fmt: skip
  return peft.LoraConfig(**{**common, "r": 4, "lora_alpha": 6, **kinds[kind], **changes})


def adapted(model, settings, seed: int = 1):
  """The model with an adapter that does something everywhere."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    made = peft.get_peft_model(model, settings).eval()
  generator = torch.Generator().manual_seed(seed)
  for name, p in made.named_parameters():
    if any(part in name for part in ("lora_", "ia3_", "modules_to_save")):
      p.data += 0.3 * torch.randn(p.shape, generator=generator)
  return made


def logits(model, name: str) -> np.ndarray:
  """Of two rows of tokens."""
  rows = torch.tensor(tokens())
  more = dict(decoder_input_ids=rows[:, :5]) if name == "t5" else {}
  with torch.no_grad():
    return model(input_ids=rows, **more).logits.numpy()


def tokens() -> np.ndarray:
  return np.random.default_rng(0).integers(1, VOCAB, (2, 9))


def ours(m, name: str) -> np.ndarray:
  """What our model says of the same tokens."""
  more = dict(decoder_tokens=tokens()[:, :5]) if name == "t5" else {}
  return np.asarray(m(tokens(), **more))
