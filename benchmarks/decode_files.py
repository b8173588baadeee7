"""The same weights in the files that each engine of `benchmarks.decode` reads.

All come from one Hugging Face folder in float32, or for SmolLM2 from its GGUF file: llama.cpp's
GGUF files, whose fewer bits its own tool makes, and CTranslate2's folders, made by its converter.
GPT-2 gets random weights and a vocabulary of made-up words, which only that converter looks at.
"""

import ctypes
import dataclasses
import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
import tokenizers.models

import model
from configs import gpt_small
from model.heads import init_params
from model.hf.safetensors_files import open_folder

GGUF_TYPES = {"float32": 0, "8 bits": 7, "4 bits": 2}  # LLAMA_FTYPE: ALL_F32, MOSTLY_Q8_0, _Q4_0.
CT2_TYPES = {"float32": "float32", "8 bits": "int8"}
_GPT2_NORMS = {"ln_1": "attn_norm", "ln_2": "ffn_norm"}
_GPT2_MATRICES = {
  "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up",
  "mlp.c_proj": "ffn_down",
}  # fmt: skip


def installed(*packages: str) -> bool:
  """Whether peers can be imported."""
  return all(importlib.util.find_spec(package) is not None for package in packages)


def prepare(folder: Path, smollm2: Path | None) -> None:
  """Writes those files of a shape that are not there: hf/, BITS.gguf, ct2 BITS/.

  Args:
    smollm2: the GGUF file that the weights are in; None: GPT-2 of random weights.
  """
  folder.mkdir(parents=True, exist_ok=True)
  source = folder / "hf"
  _once(source, _random_gpt2 if smollm2 is None else lambda path: _smollm2(smollm2, path))
  if installed("llama_cpp"):
    whole = folder / "float32.gguf"
    if smollm2 is None:
      _once(whole, lambda path: _gpt2_gguf(source, path))
    else:
      _once(whole, lambda path: _requantized(smollm2, path, "float32"))
    for bits in list(GGUF_TYPES)[1:]:
      _once(folder / f"{bits}.gguf", lambda path: _requantized(whole, path, bits))  # noqa: B023
  if installed("ctranslate2", "transformers", "torch"):
    for bits in CT2_TYPES:
      _once(folder / f"ct2 {bits}", lambda path: _ct2(source, path, bits))  # noqa: B023


def _once(path: Path, write: Callable[[Path], None]) -> None:
  """Writes a file or folder unless it is there: under another name until it is whole."""
  if not path.exists():
    print(f"writing {path}", flush=True)
    part = path.with_name(f"part {path.name}")
    write(part)
    part.rename(path)


def _random_gpt2(path: Path) -> None:
  cfg = gpt_small.get_config().model
  cfg = dataclasses.replace(cfg, remat="none", param_dtype="float32")
  params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
  model.save(model.Model(cfg, params), path, format="hf", family="gpt2")
  words = tokenizers.models.WordLevel({f"w{i}": i for i in range(cfg.real_vocab)}, unk_token="w0")
  tokenizers.Tokenizer(words).save(str(path / "tokenizer.json"))
  last = f"w{cfg.real_vocab - 1}"
  told = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "bos_token": last,
          "eos_token": last}  # fmt: skip
  (path / "tokenizer_config.json").write_text(json.dumps(told))


def _smollm2(gguf: Path, path: Path) -> None:
  model.save(model.load(gguf), path, format="hf")


def _gpt2_gguf(folder: Path, path: Path) -> None:
  """Without a vocabulary: tokens go in and come out as numbers."""
  import gguf

  config = json.loads((folder / "config.json").read_text())
  writer = gguf.GGUFWriter(path, "gpt2")
  writer.add_context_length(config["n_positions"])
  writer.add_embedding_length(config["n_embd"])
  writer.add_feed_forward_length(4 * config["n_embd"])
  writer.add_block_count(config["n_layer"])
  writer.add_head_count(config["n_head"])
  writer.add_layer_norm_eps(config["layer_norm_epsilon"])
  writer.add_vocab_size(config["vocab_size"])
  writer.add_tokenizer_model("none")
  for name, tensor in _gpt2_tensors(folder, config["n_layer"]):
    writer.add_tensor(name, np.ascontiguousarray(tensor))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _gpt2_tensors(folder: Path, layers: int):
  """(GGUF's name, tensor) of each: matrices of Hugging Face's GPT-2 have their inputs first."""
  theirs = {name.removeprefix("transformer."): a for name, a in open_folder(folder).items()}
  yield "token_embd.weight", theirs["wte.weight"]
  yield "position_embd.weight", theirs["wpe.weight"]
  for part in ("weight", "bias"):
    yield f"output_norm.{part}", theirs[f"ln_f.{part}"]
    for i in range(layers):
      for name, ours in (_GPT2_NORMS | _GPT2_MATRICES).items():
        tensor = theirs[f"h.{i}.{name}.{part}"]
        turned = part == "weight" and name in _GPT2_MATRICES
        yield f"blk.{i}.{ours}.{part}", tensor.T if turned else tensor


def _requantized(source: Path, path: Path, bits: str) -> None:
  import llama_cpp  # pyright: ignore[reportMissingImports]

  settings: Any = llama_cpp.llama_model_quantize_default_params()
  settings.ftype, settings.allow_requantize = GGUF_TYPES[bits], True
  settings.nthread = os.cpu_count() or 1
  quiet_llama()
  refer: Any = ctypes.byref(settings)
  if llama_cpp.llama_model_quantize(bytes(source), bytes(path), refer):
    raise RuntimeError(f"llama.cpp could not write {path} from {source}")


def quiet_llama() -> None:
  """Keeps llama.cpp from telling all that it does."""
  import llama_cpp  # pyright: ignore[reportMissingImports]

  llama_cpp.llama_log_set(_silent(), ctypes.c_void_p(0))


@functools.cache
def _silent():
  """A callback that lives as long as the process."""
  import llama_cpp  # pyright: ignore[reportMissingImports]

  return llama_cpp.llama_log_callback(lambda level, text, data: None)


def _ct2(folder: Path, path: Path, bits: str) -> None:
  from ctranslate2.converters import TransformersConverter  # pyright: ignore[reportMissingImports]

  TransformersConverter(str(folder)).convert(str(path), quantization=CT2_TYPES[bits])
