"""Tokenizers as folders have them: which files they are read from, and their written form."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, normalizers

from model.errors import InputError
from model.json_files import read_object
from model.tokenizer_kinds import Kind, kind_of
from model.tokenizer_vocabularies import from_merges, from_words, read_text, texts_of

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
_ORDER = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # In which new special tokens get ids.
_MERGES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_WORDS, _MARIAN = "vocab.txt", "source.spm"
_SWITCHES = ("do_lower_case", "tokenize_chinese_chars", "trim_offsets")
_CHOICES = ("strip_accents", "add_prefix_space", "add_bos_token", "add_eos_token", "legacy",
            "do_basic_tokenize", "separate_vocabs")  # fmt: skip
_MORE = ("extra_special_tokens", "additional_special_tokens")
_TEMPLATE, _TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# Fields that say where a tokenizer was or how to run code of its own, or that tokenizer.json says.
_NOT_KEPT = ("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "auto_map",
             "name_or_path", "added_tokens_decoder", "tokenizer_class")  # fmt: skip

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
    if path.suffix == ".model":
      return _from_model_file(path, {}, kind_of({}, {}))
    return _from_json(path)
  config = _config(path)
  kind = kind_of(config, read_object(path / "config.json"))
  backend, roles = _from_folder(path, config, kind)
  return backend, roles | _added(backend, config, roles, name=str(path))


def holds_tokenizer(folder: Path) -> bool:
  """Whether a folder has files that `read_tokenizer` reads."""
  files = ["tokenizer.json", _WORDS, *(vocabulary for vocabulary, _ in _MERGES)]
  return any((folder / name).is_file() for name in files) or len(list(folder.glob("*.model"))) == 1


def _from_folder(folder: Path, config: dict[str, Any], kind: Kind) -> Read:
  file = folder / "tokenizer.json"
  if file.is_file():
    backend, roles = _from_json(file)
    known = {
      role: name for role, name in kind.roles.items() if backend.token_to_id(name) is not None
    }
    _follow(backend, config, kind)
    return backend, known | ({} if texts_of(config) else roles)
  for vocabulary, merges in _MERGES:
    if (folder / vocabulary).is_file() and (folder / merges).is_file():
      return from_merges(read_object(folder / vocabulary), folder / merges, config, kind)
  if (folder / _MARIAN).is_file() and (folder / "vocab.json").is_file():
    from model.sentencepiece import convert_marian

    file, vocabulary = folder / _MARIAN, read_object(folder / "vocab.json")
    return convert_marian(file.read_bytes(), vocabulary, name=str(file), config=config)
  if (folder / _WORDS).is_file():
    return from_words(folder / _WORDS, config, kind)
  found = sorted(folder.glob("*.model"))
  if len(found) == 1:
    return _from_model_file(found[0], config, kind)
  raise InputError(
    f"folder {str(folder)!r} holds no tokenizer: expected tokenizer.json, one SentencePiece .model "
    "file, vocab.txt, or vocab.json and merges.txt."
  )


def _config(folder: Path) -> dict[str, Any]:
  """tokenizer_config.json with what older and newer folders keep in files beside it."""
  config = read_object(folder / "tokenizer_config.json")
  _check_types(config, folder / "tokenizer_config.json")
  if "added_tokens_decoder" not in config:
    more = read_object(folder / "special_tokens_map.json")
    _check_types(more, folder / "special_tokens_map.json")
    config |= more
    special = {content for value in config.values() for content in _contents(value)}
    config["added_tokens_decoder"] = {
      str(i): {"content": text, "special": text in special, "normalized": text not in special}
      for text, i in read_object(folder / "added_tokens.json").items()
    }
  templates = {path.stem: path for path in sorted((folder / _TEMPLATES).glob("*.jinja"))}
  if (folder / _TEMPLATE).is_file():
    templates["default"] = folder / _TEMPLATE
  if templates:
    read = {name: read_text(path) for name, path in templates.items()}
    named = [{"name": name, "template": text} for name, text in read.items()]
    config["chat_template"] = read["default"] if list(read) == ["default"] else named
  return config


def _check_types(config: Mapping[str, Any], path: Path) -> None:
  """Raises an InputError for a field of a tokenizer's config that holds no value of its kind."""
  wanted: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(_SWITCHES, ("true or false", bool)),
    **dict.fromkeys(_CHOICES, ("true, false or null", bool | None)),
    **dict.fromkeys(_MORE, ("a list or an object", list | dict | None)),
    "extra_ids": ("a whole number", int),
  }
  for name, (words, kind) in wanted.items():
    if name in config and not isinstance(config[name], kind):
      raise InputError(f"{path}: {name}={config[name]!r} must be {words}.")


def _from_json(path: Path) -> Read:
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # The library raises nothing more precise.
    raise InputError(f"{path} is not a tokenizer of Hugging Face tokenizers: {error}") from None
  special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
  found = {r: [n for n in names if n in special] for r, names in _USUAL_NAMES.items()}
  return backend, {f"{role}_token": names[0] for role, names in found.items() if names}


def _follow(backend: tokenizers.Tokenizer, config: Mapping[str, Any], kind: Kind) -> None:
  """Sets what tokenizer_config.json says of BERT's normalizer: it wins over tokenizer.json."""
  now = backend.normalizer
  if kind.words and isinstance(now, normalizers.BertNormalizer):
    backend.normalizer = normalizers.BertNormalizer(
      clean_text=now.clean_text,
      handle_chinese_chars=config.get("tokenize_chinese_chars", now.handle_chinese_chars),
      strip_accents=config.get("strip_accents", now.strip_accents),
      lowercase=config.get("do_lower_case", now.lowercase),
    )


def _from_model_file(path: Path, config: dict[str, Any], kind: Kind) -> Read:
  from model.sentencepiece import convert  # Rarely needed.

  backend, roles = convert(path.read_bytes(), name=str(path), config=config, kind=kind)
  # Sentinels of T5's published models are not in the file: the class adds them, the last one first.
  number = config.get("extra_ids", kind.sentinels)
  backend.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(number))])
  return backend, roles


def _added(
  backend: tokenizers.Tokenizer, config: dict[str, Any], roles: dict[str, Any], *, name: str
) -> dict[str, Any]:
  """The config, whose added tokens and special tokens the backend knows from here on.

  Raises:
    InputError: if a token gets another id than the folder says.
  """
  try:
    numbered = {
      int(i): AddedToken(**{k: v for k, v in token.items() if k != "__type"})
      for i, token in config.get("added_tokens_decoder", {}).items()
    }
  except (TypeError, ValueError, AttributeError) as error:
    raise InputError(f"{name}: added_tokens_decoder is damaged: {error}.") from None
  backend.add_tokens([token for _, token in sorted(numbered.items())])
  for i, token in numbered.items():
    if backend.token_to_id(token.content) != i:
      raise InputError(
        f"{name}: added token {token.content!r} has id {i}, and behind the vocabulary it would get "
        f"{backend.token_to_id(token.content)}: the files do not belong together."
      )
  named = roles | {k: v for k, v in config.items() if k.endswith("_token") and _contents(v)}
  more = [config.get(key) or [] for key in _MORE]
  values = [named.get(f"{role}_token") for role in _ORDER]
  values += [v for some in more for v in (some.values() if isinstance(some, dict) else some)]
  known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
  for value in values:
    for content in _contents(value):
      flags = {k: value[k] for k in ("lstrip", "rstrip", "single_word", "normalized")
               if isinstance(value, dict) and k in value}  # fmt: skip
      if not all(isinstance(flag, bool) for flag in flags.values()):
        raise InputError(f"{name}: {flags} of special token {content!r} must be true or false.")
      if content not in known or flags:
        backend.add_special_tokens([AddedToken(content, special=True, **flags)])
        known.add(content)
  texts = {key: next(iter(_contents(value))) for key, value in named.items()}
  return config | texts


def _contents(value: Any) -> list[str]:
  """Texts of special tokens: of one by itself, as an object, or of a list of them."""
  if isinstance(value, list):
    return [content for one in value for content in _contents(one)]
  value = value.get("content") if isinstance(value, dict) else value
  return [value] if isinstance(value, str) else []


def write_tokenizer(
  backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str],
  directory: Path, token_types: bool | None,
) -> None:  # fmt: skip
  """Writes tokenizer.json and tokenizer_config.json: see `Tokenizer.save`.

  The class that is named takes tokenizer.json as it is; others would build it anew.
  """
  directory.mkdir(parents=True, exist_ok=True)
  backend.save(str(directory / "tokenizer.json"))
  values = {"clean_up_tokenization_spaces": False, "model_max_length": int(1e30)}
  values |= {key: value for key, value in config.items() if key not in _NOT_KEPT}
  values |= {f"{role}_token": token for role, token in special.items()}
  for key in _MORE:
    if isinstance(values.get(key), list):
      values[key] = _contents(values[key])
  if token_types is not None:
    inputs = ["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"]
    values["model_input_names"] = inputs
  values["tokenizer_class"] = "PreTrainedTokenizerFast"
  text = json.dumps(values, indent=2, ensure_ascii=False)
  (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
