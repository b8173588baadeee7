"""GGUF files as llama.cpp's converter writes them, of small models and tokenizers."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

TYPES = gguf.GGMLQuantizationType
ARCHITECTURES = {
  "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
  "gemma3_text": "gemma3",
}  # fmt: skip


def write(path: Path, theirs, metadata: dict[str, Any] | None = None, kind: str = "F32") -> Path:
  """A model of Transformers'.

  Args:
    metadata: more of it, and other values; None as a value: none.
    kind: of matrices.
  """
  cfg = theirs.config
  name = ARCHITECTURES[cfg.model_type]
  values = _metadata(name, cfg) | (metadata or {})
  arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
  names = gguf.get_tensor_name_map(arch, cfg.num_hidden_layers)
  tensors = {}
  for key, tensor in theirs.state_dict().items():
    array = tensor.float().numpy()
    if name == "llama" and "q_proj" in key:
      array = turned(array, cfg.num_attention_heads)
    if name == "llama" and "k_proj" in key:
      array = turned(array, cfg.num_key_value_heads)
    if name.startswith("gemma") and key.endswith("norm.weight"):
      array = array + 1
    if key != "lm_head.weight" or not cfg.tie_word_embeddings:
      tensors[names.get_name(key, (".weight", ".bias"))] = array
  if (factors := frequencies(cfg)) is not None and name == "llama":
    tensors["rope_freqs.weight"] = factors
  kinds = {key: kind if array.ndim > 1 else "F32" for key, array in tensors.items()}
  return write_file(path, {k: v for k, v in values.items() if v is not None}, tensors, kinds)


def turned(array: np.ndarray, heads: int) -> np.ndarray:
  """Halves of each head to pairs."""
  return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def frequencies(cfg) -> np.ndarray | None:
  """What Llama 3's scaling divides each frequency by."""
  rope = getattr(cfg, "rope_parameters", None) or {}
  if rope.get("rope_type") != "llama3":
    return None
  waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
  original, low, high = (
    rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
  )
  share = np.clip((original / waves - low) / (high - low), 0, 1)
  return (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)


def _metadata(name: str, cfg) -> dict[str, Any]:
  rope = cfg.rope_parameters
  rope = rope.get("full_attention", rope)
  values = {
    "general.architecture": name, "general.type": "model", "general.name": "Tiny",
    "context_length": cfg.max_position_embeddings, "embedding_length": cfg.hidden_size,
    "block_count": cfg.num_hidden_layers, "feed_forward_length": cfg.intermediate_size,
    "attention.head_count": cfg.num_attention_heads,
    "attention.head_count_kv": cfg.num_key_value_heads,
    "attention.layer_norm_rms_epsilon": cfg.rms_norm_eps, "rope.freq_base": rope["rope_theta"],
  }  # fmt: skip
  if name != "qwen2":
    values |= dict.fromkeys(("attention.key_length", "attention.value_length"), cfg.head_dim)
  if name == "llama":
    values |= {"vocab_size": cfg.vocab_size, "rope.dimension_count": cfg.head_dim}
  if name in ("gemma2", "gemma3"):
    values |= {"attention.sliding_window": cfg.sliding_window}
  if name == "gemma2":
    values |= {"attn_logit_softcapping": cfg.attn_logit_softcapping,
               "final_logit_softcapping": cfg.final_logit_softcapping}  # fmt: skip
  if rope["rope_type"] in ("linear", "yarn"):
    values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
  if rope["rope_type"] == "yarn":
    original = rope["original_max_position_embeddings"]
    values["rope.scaling.original_context_length"] = original
  return {k if k.startswith("general.") else f"{name}.{k}": v for k, v in values.items()}


def write_file(
  path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray], kinds: dict[str, str]
) -> Path:
  """Any metadata and tensors. Of a kind that the package does not make, bytes are given."""
  writer = gguf.GGUFWriter(path, metadata["general.architecture"])
  for key, value in metadata.items():
    if key != "general.architecture":
      _add(writer, key, value)
  for name, array in tensors.items():
    kind = TYPES[kinds[name]]
    data = array if array.dtype == np.uint8 else gguf.quantize(array, kind)
    raw = None if kind in (TYPES.F32, TYPES.F16) else kind
    writer.add_tensor(name, data, raw_dtype=raw)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
  if isinstance(value, bool):
    writer.add_bool(key, value)
  elif isinstance(value, int):
    writer.add_uint32(key, value)
  elif isinstance(value, float):
    writer.add_float32(key, value)
  elif isinstance(value, str):
    writer.add_string(key, value)
  else:
    writer.add_array(key, value)
