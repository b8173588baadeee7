"""Models in GGUF files, as config.json and tensors that the tables of families read.

llama.cpp's converter renames tensors, turns pairs of a rotary dimension next to each other (Llama),
and adds one to the scales of norms (Gemma): all of this is undone here.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from model.errors import InputError
from model.hf.gguf_files import Change, File, Tensor, open_file

REQUIRED: Any = object()
_TOKENIZER = "tokenizer.ggml.model"
_TABLE, _FREQUENCIES = "token_embd.weight", "rope_freqs.weight"
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
  "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}  # fmt: skip
_SANDWICH = {
  "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
# Said of training, or by tools, and nothing that is computed.
_UNREAD = ("rope.scaling.finetuned", "tensor_data_layout")
_ONLY = {
  "attention.causal": True, "expert_count": 0, "expert_used_count": 0,
  "use_parallel_residual": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What the converter makes of a family.

  Attributes:
    family: its `model_type`.
    turned: pairs of a rotary dimension lie next to each other in queries and keys.
    offset: one is added to the scales of norms.
    biases: fields of config.json, and the tensor that shows them.
    sandwich: norms on both sides.
    local: (window, every n-th layer sees all) where the file does not say it; None: no windows.
    caps: soft caps of scores and of logits where the file does not say them.
    wide: number of layers of the one model whose scores are scaled by its width over its heads.
  """

  family: str
  turned: bool = False
  offset: bool = False
  biases: tuple[tuple[str, str], ...] = ()
  sandwich: bool = False
  local: tuple[int, int] | None = None
  caps: tuple[float | None, float | None] | None = None
  wide: int | None = None


_BIASES = (("attention_bias", "blk.0.attn_q.bias"),)
ARCHITECTURES = {
  "llama": Architecture(
    "llama", turned=True, biases=(*_BIASES, ("mlp_bias", "blk.0.ffn_gate.bias"))
  ),
  "qwen2": Architecture("qwen2"),
  "qwen3": Architecture("qwen3", biases=_BIASES),
  "gemma": Architecture("gemma", offset=True, biases=_BIASES),
  "gemma2": Architecture(
    "gemma2", offset=True, biases=_BIASES, sandwich=True, local=(4096, 2), caps=(50.0, 30.0),
    wide=46,
  ),
  "gemma3": Architecture(
    "gemma3_text", offset=True, biases=_BIASES, sandwich=True, local=(4096, 6), caps=(None, None),
    wide=62,
  ),
}  # fmt: skip


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any], bool]:
  """(config.json, tensors under Hugging Face's names, whether there is a tokenizer).

  Raises:
    InputError: if the file is damaged, or is of an architecture, or holds a key or a tensor, that
      is not known here.
  """
  file = open_file(path)
  kind, name = file.one("general.type", "model"), file.one("general.architecture", None)
  if kind != "model":
    raise InputError(f"{path} is no model: its general.type is {kind!r}.")
  if name not in ARCHITECTURES:
    raise InputError(
      f"{path} is of the architecture {name!r}, expected one of {', '.join(ARCHITECTURES)}."
    )
  one, keys = ARCHITECTURES[name], _Keys(file, name)
  values = _config(file, one, keys)
  keys.check_all_read()
  has = file.one(_TOKENIZER, "none") not in ("none", "no_vocab")
  return values, _tensors(file, one, values), has


class _Keys:
  """Metadata of an architecture; which of them were read is remembered."""

  def __init__(self, file: File, architecture: str):
    self._file, self._prefix, self._read = file, f"{architecture}.", set()

  def get(self, name: str, default: Any = REQUIRED) -> Any:
    self._read.add(self._prefix + name)
    value = self._file.one(self._prefix + name, default)
    if value is REQUIRED:
      raise InputError(f"{self._file.path} has no {self._prefix}{name}.")
    return value

  def array(self, name: str) -> np.ndarray | None:
    """Numbers, if it is an array of them."""
    value = self._file.metadata.get(self._prefix + name)
    if not isinstance(value, np.ndarray):
      return None
    self._read.add(self._prefix + name)
    return value

  def whole(self, name: str, default: Any = REQUIRED) -> Any:
    """A whole number from 1, or what is assumed without it."""
    value = self.get(name, default)
    if value is not default and (type(value) is not int or value < 1):
      raise self.wrong(name, value, "a whole number from 1")
    return value

  def real(self, name: str, default: Any = REQUIRED) -> Any:
    """A positive number, or what is assumed without it."""
    value = self.get(name, default)
    if value is not default and not (
      type(value) in (int, float) and value > 0 and math.isfinite(value)
    ):
      raise self.wrong(name, value, "a positive number")
    return value

  def wrong(self, name: str, value: Any, expected: str) -> InputError:
    return InputError(f"{self._file.path}: {self._prefix}{name} is {value!r}, expected {expected}.")

  def check_all_read(self) -> None:
    for name, value in _ONLY.items():
      if self.get(name, value) != value:
        raise self.wrong(name, self.get(name), repr(value))
    known = self._read | {self._prefix + name for name in _UNREAD}
    named = [k for k in self._file.metadata if k.startswith(self._prefix) and k not in known]
    if named:
      raise InputError(
        f"{self._file.path}: {', '.join(named)} are not known here and may change what is computed."
      )


def _config(file: File, one: Architecture, keys: _Keys) -> dict[str, Any]:
  """Fields of config.json, each number bounded by the tensors of the file."""
  layers, d = keys.whole("block_count"), keys.whole("embedding_length")
  heads = keys.whole("attention.head_count")
  kv_heads = keys.whole("attention.head_count_kv", heads)
  width = keys.whole("attention.key_length", max(d // heads, 1))
  for name in ("attention.value_length", "rope.dimension_count"):
    if keys.whole(name, width) != width:
      raise keys.wrong(name, keys.get(name), f"the width of a head, {width}")
  inner, vocab = keys.whole("feed_forward_length"), _shape(file, _TABLE)[0]
  vocab = keys.whole("vocab_size", vocab)
  tokens = file.metadata.get("tokenizer.ggml.tokens", [])
  if isinstance(tokens, list) and len(tokens) > vocab:
    raise InputError(f"{file.path} has {len(tokens)} tokens, and {_TABLE} has {vocab} rows.")
  if layers > len(file.tensors):
    raise InputError(f"{file.path} has {len(file.tensors)} tensors, too few for {layers} layers.")
  told = {
    _TABLE: (vocab, d), "blk.0.attn_q.weight": (heads * width, d),
    "blk.0.attn_k.weight": (kv_heads * width, d), "blk.0.ffn_up.weight": (inner, d),
  }  # fmt: skip
  for name, shape in told.items():
    if _shape(file, name) != shape:
      raise InputError(
        f"{file.path}: {name} has the shape {list(_shape(file, name))}, and its metadata make it "
        f"{list(shape)}."
      )
  values = {
    "model_type": one.family, "vocab_size": vocab, "hidden_size": d, "num_hidden_layers": layers,
    "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": inner,
    "max_position_embeddings": keys.whole("context_length"),
    "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
    "rope_theta": keys.real("rope.freq_base", 10_000.0), "rope_scaling": _scaling(keys),
    "tie_word_embeddings": "output.weight" not in file.tensors,
  }  # fmt: skip
  if one.family != "qwen2" or width * heads != d:
    values["head_dim"] = width
  values |= {field: tensor in file.tensors for field, tensor in one.biases}
  values |= _windows(one, keys, layers) if one.local else {}
  if one.caps:
    scores, logits = one.caps
    values |= {
      "attn_logit_softcapping": keys.real("attn_logit_softcapping", scores),
      "final_logit_softcapping": keys.real("final_logit_softcapping", logits),
      "query_pre_attn_scalar": d // heads if layers == one.wide else width,
    }
    if (scale := keys.real("attention.scale", None)) is not None:
      values["query_pre_attn_scalar"] = round(scale**-2, 6)
  _scale_frequencies(file, values)
  return values


def _shape(file: File, name: str) -> tuple[int, ...]:
  if name not in file.tensors:
    raise InputError(f"{file.path} has no tensor {name}.")
  return file.tensors[name].shape


def _windows(one: Architecture, keys: _Keys, layers: int) -> dict[str, Any]:
  window, every = one.local or (None, None)
  name = "attention.sliding_window_pattern"
  pattern = keys.array(name)
  if pattern is not None:
    if len(pattern) != layers:
      raise keys.wrong(name, f"an array of {len(pattern)}", f"one of {layers}")
    types = [bool(local) for local in pattern]
  else:
    every = keys.whole(name, every)
    types = [i % every != every - 1 for i in range(layers)]
  values: dict[str, Any] = {
    "sliding_window": keys.whole("attention.sliding_window", window),
    "layer_types": ["sliding_attention" if local else "full_attention" for local in types],
  }
  if one.family == "gemma3_text":
    values["rope_local_base_freq"] = keys.real("rope.freq_base_swa", 10_000.0)
  return values


def _scaling(keys: _Keys) -> dict[str, Any] | None:
  """`rope_scaling` of config.json."""
  kind = keys.get("rope.scaling.type", "linear")
  factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 1.0))
  if kind not in ("none", "linear", "yarn"):
    raise keys.wrong("rope.scaling.type", kind, "one of none, linear, yarn")
  more = {
    "original_max_position_embeddings": keys.whole("rope.scaling.original_context_length", None),
    "beta_fast": keys.real("rope.scaling.yarn_beta_fast", None),
    "beta_slow": keys.real("rope.scaling.yarn_beta_slow", None),
  }
  for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
    if keys.get(f"rope.scaling.{name}", 1.0) != 1.0:
      raise keys.wrong(f"rope.scaling.{name}", keys.get(f"rope.scaling.{name}"), "1.0")
  if kind == "none" or (kind == "linear" and factor == 1.0):
    return None
  given = {k: v for k, v in more.items() if v is not None and kind == "yarn"}
  return {"rope_type": kind, "factor": float(factor), **given}


def _scale_frequencies(file: File, values: dict[str, Any]) -> None:
  """Llama 3's scaling, of which a file holds what each frequency is divided by.

  Between two wave lengths, original / high and original / low, the inverse of the divisor is linear
  in the frequency; beyond them the divisor is 1, and `factor`. With low = 1 that is all there is.
  """
  if _FREQUENCIES not in file.tensors:
    return
  found = np.asarray(file.tensors[_FREQUENCIES], np.float64).reshape(-1)
  n, width = len(found), values.get("head_dim", 0)
  factor = round(float(found.max()), 4)
  if n and np.all(found == 1.0):
    return
  turns = values["rope_theta"] ** -(np.arange(n) / max(n, 1)) / (2 * math.pi)  # In one position.
  between = (found > 1.0) & (found < factor * (1 - 1e-6))
  if 2 * n == width and factor > 1 and between.sum() > 1 and values["rope_scaling"] is None:
    share = (1 / found[between] - 1 / factor) / (1 - 1 / factor)
    slope, level = map(float, np.polyfit(turns[between], share, 1))
    if level < 0 < slope:
      original, high = round(-slope / level), round(1 - 1 / level, 3)
      share = np.clip((original * turns - 1) / max(high - 1, 1e-9), 0, 1)
      if np.allclose(1 / ((1 - share) / factor + share), found, rtol=1e-4):
        values["rope_scaling"] = {
          "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
          "high_freq_factor": high, "original_max_position_embeddings": original,
        }  # fmt: skip
        return
  raise InputError(f"{file.path}: {_FREQUENCIES} is not Llama 3's scaling, which alone is known.")


def _tensors(file: File, one: Architecture, values: dict[str, Any]) -> dict[str, Any]:
  """Under Hugging Face's names, as it has them."""
  heads = {"attn_q": values["num_attention_heads"], "attn_k": values["num_key_value_heads"]}
  names = _LAYER | (_SANDWICH if one.sandwich else {})
  known = {name: tensor for name, tensor in file.tensors.items() if name != _FREQUENCIES}
  quantized = any(tensor.kind is not None for tensor in known.values())
  wide = [tensor.dtype for tensor in known.values() if len(tensor.shape) > 1]
  out, unknown = {}, []
  for name, tensor in known.items():
    if quantized:  # All are float32 then: what was decoded is not rounded again.
      tensor = dataclasses.replace(tensor, dtype=np.dtype(np.float32))
    elif len(tensor.shape) < 2 and wide:  # The format has vectors in float32, whatever they were.
      own = functools.reduce(jnp.promote_types, wide)
      tensor = dataclasses.replace(tensor, dtype=own)
    match = re.fullmatch(r"(?:blk\.(\d{1,9})\.)?(\w+)\.(weight|bias)", name)
    theirs = match and (_TOP if match[1] is None else names).get(match[2])
    if match is None or theirs is None:
      unknown.append(name)
      continue
    layer = "" if match[1] is None else f"model.layers.{int(match[1])}."
    if one.turned and match[2] in heads:
      tensor = dataclasses.replace(tensor, change=_halves(heads[match[2]]))
    if one.offset and name.endswith("norm.weight"):
      tensor = _less_one(tensor)
    out[f"{layer}{theirs}.{match[3]}"] = tensor
  if unknown:
    raise InputError(
      f"{file.path}: {len(unknown)} tensors are not known of {one.family}, as {unknown[:3]}."
    )
  return out


def _halves(heads: int) -> Change:
  """Pairs of a rotary dimension, next to each other in each head, to the head's two halves."""
  return lambda a: a.reshape(heads, -1, 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)


def _less_one(tensor: Tensor) -> Tensor:
  return dataclasses.replace(tensor, change=lambda a: a.astype(np.float32) - np.float32(1))
