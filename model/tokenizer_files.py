"""Tokenizers as files have them: Hugging Face's, SentencePiece's, GPT-2's."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from model.errors import InputError

# Names by which a bare tokenizer.json shows what a special token is for.
_USUAL_NAMES = {
  "pad": ("<pad>", "[PAD]", "<|pad|>"),
  "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>"),
  "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
  "mask": ("<mask>", "[MASK]"),
  "unk": ("<unk>", "[UNK]"),
  "cls": ("[CLS]",),
  "sep": ("[SEP]",),
}
_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))

Read = tuple[tokenizers.Tokenizer, dict[str, Any]]  # What maps text to ids, and its config.


def read_tokenizer(path: Path) -> Read:
  """(backend, fields of tokenizer_config.json) of what lies at `path`: see `Tokenizer.load`.

  Raises:
    InputError: if nothing is there, or it is damaged.
  """
  if not path.exists():
    raise InputError(
      f"tokenizer {str(path)!r} does not exist: give a folder, a tokenizer.json or a .model file."
    )
  if path.is_file() and path.suffix == ".gguf":
    from model.hf.gguf_tokenizer import read_tokenizer as read_gguf  # Rarely needed.

    return read_gguf(path)
  if path.is_file():
    return _from_model_file(path, {}) if path.suffix == ".model" else _from_json(path, {})
  config = _read_json(path / "special_tokens_map.json") | _read_json(path / "tokenizer_config.json")
  if (path / "tokenizer.json").is_file():
    return _from_json(path / "tokenizer.json", config)
  for vocabulary, merges in _GPT2_FILES:
    if (path / vocabulary).is_file() and (path / merges).is_file():
      return _from_gpt2(path / vocabulary, path / merges, config)
  found = sorted(path.glob("*.model"))
  if len(found) == 1:
    return _from_model_file(found[0], config)
  raise InputError(
    f"folder {str(path)!r} holds no tokenizer: expected tokenizer.json, one SentencePiece .model "
    "file, or vocab.json and merges.txt."
  )


def _read_json(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise InputError(f"{path} is not JSON: {error}") from None
  if not isinstance(values, dict):
    raise InputError(f"{path} must hold a JSON object.")
  return values


def _from_json(path: Path, config: dict[str, Any]) -> Read:
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # The library raises nothing more precise.
    raise InputError(f"{path} is not a tokenizer of Hugging Face tokenizers: {error}") from None
  return backend, _usual_roles(backend) | config


def _usual_roles(backend: tokenizers.Tokenizer) -> dict[str, Any]:
  special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
  found = {r: [n for n in names if n in special] for r, names in _USUAL_NAMES.items()}
  return {f"{role}_token": names[0] for role, names in found.items() if names}


def _from_model_file(path: Path, config: dict[str, Any]) -> Read:
  from model.sentencepiece import convert  # Rarely needed.

  backend, roles = convert(
    path.read_bytes(),
    name=str(path),
    add_bos=config.get("add_bos_token", True),
    add_eos=config.get("add_eos_token", True),
  )
  # Sentinels of T5's published models are not in the file: the class adds them, the last one first.
  sentinels = 100 if str(config.get("tokenizer_class")).startswith("T5Tokenizer") else 0
  number = config.get("extra_ids", sentinels)
  backend.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(number))])
  return backend, roles | config


def _from_gpt2(vocabulary: Path, merges: Path, config: dict[str, Any]) -> Read:
  lines = merges.read_text(encoding="utf-8").splitlines()
  lines = [line for line in lines if line and not line.startswith("#version")]
  if any(line.count(" ") != 1 for line in lines):
    raise InputError(f"{merges} is damaged: each line must hold two tokens.")
  pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
  try:
    backend = tokenizers.Tokenizer(models.BPE(_read_json(vocabulary), pairs))
  except Exception as error:  # The library raises nothing more precise.
    raise InputError(f"{vocabulary} and {merges} do not fit together: {error}") from None
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=bool(config.get("add_prefix_space", False))
  )
  backend.decoder = decoders.ByteLevel()
  end = "<|endoftext|>"
  roles = {}
  if backend.token_to_id(end) is not None:
    backend.add_special_tokens([end])
    roles = {"bos_token": end, "eos_token": end}
  return backend, roles | config
