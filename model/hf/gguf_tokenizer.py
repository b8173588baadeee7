"""Tokenizers in GGUF files: byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`)."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from model.errors import InputError
from model.hf.gguf_files import File, open_file
from model.sentencepiece import convert
from model.tokenizer_kinds import UNNAMED
from model.tokenizer_vocabularies import set_ends

_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6  # Of tokenizer.ggml.token_type.
_ROLES = {
  "bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator",
  "cls": "cls", "mask": "mask",
}  # fmt: skip
_READ = ("model", "pre", "tokens", "scores", "token_type", "merges", "add_bos_token",
         "add_eos_token", "add_sep_token", "add_space_prefix",
         "remove_extra_whitespaces")  # fmt: skip
_UNREAD, _IDS = ("token_type_count",), ("_token_id", "_token_ids")
_KINDS = ("gpt2", "llama")
# Where words end: the published patterns of Llama 3 and of Qwen 2, which differ in how many digits
# stand together, and of Mistral NeMo.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Words:
  """What the name of a pre-tokenizer stands for.

  Attributes:
    pattern: of words; None: GPT-2's.
    digits: each digit stands alone.
    whole: a word that is a token is one, whatever the merges say.
    begins: a text begins with its special token where the file does not say so.
    composed: texts are brought to NFC, as the published tokenizer does.
  """

  pattern: str | None = None
  digits: bool = False
  whole: bool = False
  begins: bool = False
  composed: bool = False

  def steps(self) -> list[Any]:
    """Pre-tokenizers of the library."""
    pieces = [pre_tokenizers.Digits(True)] if self.digits else []
    if self.pattern is not None:
      pieces.append(pre_tokenizers.Split(Regex(self.pattern), "isolated"))  # pyright: ignore
    plain = self.pattern is None
    return [*pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=plain)]


_PRE = {
  **dict.fromkeys(("default", "gpt-2"), Words()),
  **dict.fromkeys(("smollm", "starcoder", "refact", "minerva-7b"), Words(digits=True)),
  **dict.fromkeys(
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"),
    Words(_WORDS % "{1,3}", whole=True, begins=True),
  ),
  "smaug-bpe": Words(_WORDS % "{1,3}"),
  "qwen2": Words(_WORDS % "", composed=True),
  **dict.fromkeys(("deepseek-r1-qwen", "megrez"), Words(_WORDS % "")),
  "tekken": Words(_TEKKEN, whole=True, begins=True),
}


def read_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
  """(backend, fields of tokenizer_config.json) of what a file's metadata describe.

  Raises:
    InputError: if the file is damaged, or its tokenizer is of a kind that is not known here.
  """
  file = open_file(path)
  kind = file.one("tokenizer.ggml.model", None)
  if kind not in _KINDS:
    raise InputError(
      f"{path}: tokenizer.ggml.model={kind!r} is not known, expected one of {', '.join(_KINDS)}."
    )
  _check_keys(file)
  read = _Vocabulary(file)
  backend, config = _byte_level(read) if kind == "gpt2" else _sentencepiece(read)
  config |= {f"{role}_token": read.tokens[i] for role, i in read.roles.items()}
  if isinstance(template := file.one("tokenizer.chat_template", None), str):
    config["chat_template"] = template
  return backend, config


def _check_keys(file: File) -> None:
  prefix = "tokenizer.ggml."
  names = [k.removeprefix(prefix) for k in file.metadata if k.startswith(prefix)]
  unknown = [n for n in names if n not in (*_READ, *_UNREAD) and not n.endswith(_IDS)]
  if unknown:
    raise InputError(f"{file.path}: {prefix}{unknown[0]} is not known here and may change the ids.")


class _Vocabulary:
  """Metadata of a tokenizer, checked.

  Attributes:
    tokens: texts by id.
    types: of each.
    roles: ids of special tokens by what they are for.
  """

  def __init__(self, file: File):
    self.path, self._file = file.path, file
    self.tokens = self.texts("tokens")
    if not self.tokens:
      raise InputError(f"{self.path} has no tokenizer.ggml.tokens.")
    if len(set(self.tokens)) < len(self.tokens):
      raise InputError(f"{self.path} is damaged: tokenizer.ggml.tokens holds a token twice.")
    self.types = self.numbers("token_type", _NORMAL).astype(np.int64)
    found = {role: self.one(f"{name}_token_id", None) for role, name in _ROLES.items()}
    self.roles = {role: i for role, i in found.items() if i is not None}
    for role, i in self.roles.items():
      if type(i) is not int or not 0 <= i < len(self.tokens):
        raise InputError(
          f"{self.path}: the id of {role}, {i!r}, is none of the {len(self.tokens)} tokens."
        )

  def one(self, name: str, default: Any) -> Any:
    return self._file.one(f"tokenizer.ggml.{name}", default)

  def flag(self, name: str, default: bool) -> bool:
    value = self.one(name, default)
    if type(value) is not bool:
      raise InputError(f"{self.path}: tokenizer.ggml.{name} is {value!r}, expected true or false.")
    return value

  def texts(self, name: str) -> list[str]:
    value = self._file.metadata.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(value, list):
      raise InputError(f"{self.path} is damaged: tokenizer.ggml.{name} is no array of texts.")
    return value

  def numbers(self, name: str, default: int) -> np.ndarray:
    """One for each token."""
    n = len(self.tokens)
    value = self._file.metadata.get(f"tokenizer.ggml.{name}", np.full(n, default))
    if not isinstance(value, np.ndarray) or len(value) != n:
      raise InputError(f"{self.path} is damaged: tokenizer.ggml.{name} is not {n} numbers.")
    return value

  def of(self, kind: int) -> list[str]:
    """Tokens of a type."""
    return [self.tokens[i] for i in np.flatnonzero(self.types == kind)]


def _byte_level(read: _Vocabulary) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
  pre = read.one("pre", "default")
  if pre not in _PRE:
    raise InputError(
      f"{read.path}: tokenizer.ggml.pre={pre!r} is not known, expected one of {', '.join(_PRE)}."
    )
  words, merges = _PRE[pre], [tuple(pair.split(" ")) for pair in read.texts("merges")]
  if not merges or any(len(pair) != 2 for pair in merges):
    raise InputError(f"{read.path} is damaged: tokenizer.ggml.merges are not pairs of tokens.")
  known: Any = {token: i for i, token in enumerate(read.tokens)}
  try:
    backend = tokenizers.Tokenizer(models.BPE(known, merges, ignore_merges=words.whole))  # pyright: ignore
  except Exception as error:  # The library raises nothing more precise.
    raise InputError(f"{read.path} is damaged: its merges do not fit: {error}") from None
  if words.composed:
    backend.normalizer = normalizers.NFC()  # pyright: ignore
  backend.pre_tokenizer = pre_tokenizers.Sequence(words.steps())  # pyright: ignore
  backend.decoder = decoders.ByteLevel()
  special = dict.fromkeys([*read.of(_CONTROL), *(read.tokens[i] for i in read.roles.values())])
  backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
  users = [t for t in read.of(_USER) if t not in special]
  backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in users])
  bos, eos = _ends(read, begins=words.begins)
  roles = {role: t for role, t in (("bos_token", bos), ("eos_token", eos)) if t is not None}
  set_ends(backend, {}, UNNAMED, roles)
  return backend, {}


def _ends(read: _Vocabulary, *, begins: bool) -> tuple[str | None, str | None]:
  """Special tokens before and after each text."""
  wanted = {"bos": read.flag("add_bos_token", begins), "eos": read.flag("add_eos_token", False)}
  if read.flag("add_sep_token", False):
    raise InputError(f"{read.path}: tokenizer.ggml.add_sep_token is not supported.")
  for role, add in wanted.items():
    if add and role not in read.roles:
      raise InputError(f"{read.path} adds {role} to texts and has no id for it.")
  bos, eos = (read.tokens[read.roles[role]] if add else None for role, add in wanted.items())
  return bos, eos


def _sentencepiece(read: _Vocabulary) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
  """Written as the file of SentencePiece that it was, which is then read as all are."""
  from sentencepiece import sentencepiece_model_pb2

  types = read.types
  if not np.any(types == _UNKNOWN):
    if "unk" not in read.roles:
      raise InputError(f"{read.path} has no token for what is unknown.")
    types[read.roles["unk"]] = _UNKNOWN
  scores, runs = _scores(read), [not t.strip(" ") for t in read.tokens]
  # A run of spaces is spelled with spaces here, and with their sign there. Joined first, it needs
  # not be looked for in texts.
  types = np.where((types == _USER) & runs, _NORMAL, types)
  spelled = [t.replace(" ", "▁") if run else t for t, run in zip(read.tokens, runs, strict=True)]
  proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore
  for token, score, kind in zip(spelled, scores, types.tolist(), strict=True):
    if not token or not 1 <= kind <= _BYTE:
      raise InputError(f"{read.path} is damaged: the token {token!r} has the type {kind}.")
    proto.pieces.add(piece=token, score=score, type=kind)
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  trainer.model_type, trainer.byte_fallback = 2, bool(np.any(types == _BYTE))
  trainer.unk_id, trainer.bos_id = (read.roles.get(role, -1) for role in ("unk", "bos"))
  trainer.eos_id, trainer.pad_id = (read.roles.get(role, -1) for role in ("eos", "pad"))
  normalizer.add_dummy_prefix = read.flag("add_space_prefix", True)
  normalizer.remove_extra_whitespaces = read.flag("remove_extra_whitespaces", False)
  normalizer.escape_whitespaces = True
  bos, eos = _ends(read, begins="bos" in read.roles)
  data = proto.SerializeToString()
  config = {"add_bos_token": bos is not None, "add_eos_token": eos is not None}
  return convert(data, name=str(read.path), config=config, kind=UNNAMED)


def _scores(read: _Vocabulary) -> list[float]:
  """Scores; what is a token of its own before all else is joined first, in the order of ids."""
  scores = read.numbers("scores", 0).astype(np.float32)
  users = np.flatnonzero(read.types == _USER)
  if not np.all(np.isfinite(scores)):
    raise InputError(f"{read.path} is damaged: tokenizer.ggml.scores are not finite.")
  scores[users] = max(float(scores.max()), 0.0) + 1.0 - np.arange(len(users)) / max(len(users), 1)
  return scores.tolist()
