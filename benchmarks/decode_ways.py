"""The engines that `benchmarks.decode` compares, each with one call that continues rows of tokens.

Greedy; no token ends a text; all cores. Caches are float32 where weights are, and otherwise as each
engine has them unless it is told something else.
"""

import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import infer
import model
from benchmarks.decode_files import quiet_llama
from model.config import ModelConfig
from model.heads import abstract, init_params
from model.trained import Model

Generate = Callable[[np.ndarray, int], list[list[int]]]  # (tokens (B, T), how many new) -> these.
Way = tuple[Generate, float]  # The call, and bytes of the weights that a step reads.
# llama.cpp and CTranslate2 round activations to eight bits as well, as our int8_dynamic does.
TRIUNE = {"float32": None, "8 bits": "int8", "8 bits dynamic": "int8_dynamic", "4 bits": "int4"}


def triune(folder: Path, bits: str) -> Way:
  """infer.generate."""
  m = model.load(folder / "hf", quantize=TRIUNE[bits])
  return _ours(m.config, m.params)


def _ours(cfg: ModelConfig, params: dict) -> Way:
  m = Model(cfg, params)  # Without a tokenizer, so that no token ends a text.

  def generate(prompts: np.ndarray, new: int) -> list[list[int]]:
    return [c.tokens for c in infer.generate(m, prompts.tolist(), max_new_tokens=new)]

  return generate, weight_bytes(params)


def weight_bytes(params: dict) -> float:
  """Of all that a step reads: a table of which only some vectors are looked up does not count."""
  leaves = [
    (jax.tree_util.keystr(path), a) for path, a in jax.tree_util.tree_leaves_with_path(params)
  ]
  untied = any("['head']" in path for path, _ in leaves)
  looked_up = ("position_embed", *(["['embed']"] if untied else []))
  counts = lambda path: not any(name in path for name in looked_up)
  return float(sum(a.size * a.dtype.itemsize for path, a in leaves if counts(path)))


def random_triune(shape: dict, bits: str) -> Way:
  """infer.generate of random weights in bfloat16, or of these in fewer bits."""
  from model.layers import param_info
  from model.quant_tree import quantize_params

  cfg = ModelConfig(**shape, dtype="bfloat16", param_dtype="bfloat16", remat="none")
  params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
  if TRIUNE.get(bits):
    params = quantize_params(params, param_info(abstract(cfg)), TRIUNE[bits])
  return _ours(cfg, params)


def transformers(folder: Path, cache: str) -> Way:
  """AutoModelForCausalLM.generate in float32, its default cache or a static one."""
  import torch
  import transformers as library

  found = library.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
  return _theirs(found, cache)


def random_transformers(shape: dict, cache: str) -> Way:
  """The same of random weights in bfloat16 on a GPU."""
  import torch
  import transformers as library

  config = library.LlamaConfig(
    vocab_size=shape["vocab_size"], hidden_size=shape["d_model"], intermediate_size=shape["d_ff"],
    num_hidden_layers=shape["num_layers"], num_attention_heads=shape["num_heads"],
    num_key_value_heads=shape["num_kv_heads"], tie_word_embeddings=shape["tie_embeddings"],
    dtype=torch.bfloat16,
  )  # fmt: skip
  with torch.device("cuda"):
    found = library.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
  return _theirs(found, cache)


def _theirs(found, cache: str) -> Way:
  import torch

  static = dict(cache_implementation="static") if cache == "static cache" else {}

  def generate(prompts: np.ndarray, new: int) -> list[list[int]]:
    tokens = torch.tensor(prompts, device=found.device)
    with torch.no_grad():
      out = found.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False,
        eos_token_id=None, pad_token_id=0, **static,
      )  # fmt: skip
    return out[:, tokens.shape[1] :].tolist()

  read = [p for name, p in found.named_parameters() if "wpe" not in name]
  if found.get_output_embeddings().weight is not found.get_input_embeddings().weight:
    read = [p for p in read if p is not found.get_input_embeddings().weight]
  return generate, float(sum(p.numel() * p.element_size() for p in read))


def llama_cpp(folder: Path, bits: str) -> Way:
  """llama.cpp through its own calls: rows of a batch are sequences that are decoded together."""
  import gguf
  import llama_cpp as library  # pyright: ignore[reportMissingImports]

  quiet_llama()
  library.llama_backend_init()
  path = folder / f"{bits}.gguf"
  settings = library.llama_model_default_params()
  settings.use_mmap = False  # Memory of its own, in huge pages, as the others have.
  loaded = library.llama_model_load_from_file(bytes(path), settings)
  if not loaded:
    raise RuntimeError(f"llama.cpp could not read {path}")
  contexts = {}

  def generate(prompts: np.ndarray, new: int) -> list[list[int]]:
    rows, length = prompts.shape
    key = (rows, length, new)
    if key not in contexts:
      for old in contexts.values():
        old.free()
      contexts.clear()
      contexts[key] = _LlamaContext(library, loaded, rows, length + new, whole=bits == "float32")
    return contexts[key].generate(prompts, new)

  tensors = gguf.GGUFReader(path).tensors
  return generate, float(sum(int(t.n_bytes) for t in tensors if "position" not in t.name))


class _LlamaContext:
  """The cache of so many sequences, and a batch to fill."""

  def __init__(self, library, loaded, rows: int, length: int, *, whole: bool):
    self._library, settings = library, library.llama_context_default_params()
    cores = os.cpu_count() or 1
    settings.n_ctx = -(-length // 256) * 256 * rows
    settings.n_batch = settings.n_ctx
    settings.n_seq_max = rows
    settings.n_threads = settings.n_threads_batch = cores
    if whole:
      settings.type_k = settings.type_v = library.GGML_TYPE_F32
    self._context = library.llama_init_from_model(loaded, settings)
    if not self._context:
      raise RuntimeError("llama.cpp could not make a context")
    self._batch = library.llama_batch_init(settings.n_batch, 0, 1)
    self._vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(loaded))
    self._rows = rows

  def free(self) -> None:
    """Gives its memory back."""
    self._library.llama_batch_free(self._batch)
    self._library.llama_free(self._context)

  def generate(self, prompts: np.ndarray, new: int) -> list[list[int]]:
    memory = self._library.llama_get_memory(self._context)
    self._library.llama_memory_clear(memory, True)
    tokens = self._step(prompts, 0)
    out = [tokens]
    for place in range(prompts.shape[1], prompts.shape[1] + new - 1):
      tokens = self._step(tokens[:, None], place)
      out.append(tokens)
    return np.stack(out, axis=1).tolist()

  def _step(self, tokens: np.ndarray, start: int) -> np.ndarray:
    """Reads (B, T) tokens from place `start`; returns the most probable next of each row."""
    rows, length = tokens.shape
    batch, last = self._batch, []
    batch.n_tokens = rows * length
    for row in range(rows):
      for i in range(length):
        at = row * length + i
        batch.token[at], batch.pos[at] = int(tokens[row, i]), start + i
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
        batch.logits[at] = i == length - 1
      last.append(row * length + length - 1)
    if self._library.llama_decode(self._context, batch):
      raise RuntimeError("llama.cpp could not decode")
    return np.array([self._best(at) for at in last], np.int32)

  def _best(self, at: int) -> int:
    logits = self._library.llama_get_logits_ith(self._context, at)
    return int(np.argmax(np.ctypeslib.as_array(logits, (self._vocab,))))


def ctranslate2(folder: Path, bits: str) -> Way:
  """CTranslate2's Generator. It knows tokens as words."""
  import ctranslate2 as library  # pyright: ignore[reportMissingImports]
  import tokenizers

  path = folder / f"ct2 {bits}"
  loaded = library.Generator(
    str(path), compute_type="float32" if bits == "float32" else "int8",
    intra_threads=os.cpu_count() or 1, inter_threads=1,
  )  # fmt: skip
  words = tokenizers.Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))

  def generate(prompts: np.ndarray, new: int) -> list[list[int]]:
    start = [[words.id_to_token(int(t)) for t in row] for row in prompts]
    out = loaded.generate_batch(
      start, max_length=new, min_length=new, beam_size=1, sampling_topk=1,
      include_prompt_in_result=False, max_batch_size=len(start),
    )  # fmt: skip
    return [one.sequences_ids[0] for one in out]

  return generate, float((path / "model.bin").stat().st_size)
