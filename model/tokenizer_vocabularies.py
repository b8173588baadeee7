"""Vocabularies of words (BERT's vocab.txt) and of bytes with merges (GPT-2's) as tokenizers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from model.errors import InputError
from model.tokenizer_kinds import BERT, GPT2, Kind, check_reads

# Pieces that Qwen's merges stay in: contractions, words, single digits, signs, line ends, spaces.
_QWEN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def from_words(
  path: Path, config: Mapping[str, Any], kind: Kind
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
  """(tokenizer, its special tokens) of a vocab.txt: one token a line, `##` inside of words.

  Raises:
    InputError: for a class that is not BERT's, or tokens that are not in the file.
  """
  check_reads(kind, str(path), kind.words)
  if config.get("do_basic_tokenize") is False or config.get("never_split"):
    raise InputError(f"{path}: do_basic_tokenize=false and never_split are not supported.")
  roles = _bert_like(kind).roles | texts_of(config)
  lines = read_text(path).split("\n")
  tokens = [line.rstrip() for line in (lines if lines[-1] else lines[:-1])]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  _check_known(path, vocabulary, {r: roles[f"{r}_token"] for r in ("unk", "cls", "sep")})
  model = models.WordPiece(vocabulary, unk_token=roles["unk_token"])  # pyright: ignore
  backend = tokenizers.Tokenizer(model)
  backend.normalizer = normalizers.BertNormalizer(
    clean_text=True,
    handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    strip_accents=config.get("strip_accents"),
    lowercase=config.get("do_lower_case", True),
  )
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece()
  _set_pair(backend, _bert_like(kind), roles)
  return backend, roles


def _bert_like(kind: Kind) -> Kind:
  """A vocab.txt of no named class is BERT's."""
  return kind if kind.name else BERT


def from_merges(
  vocabulary: Mapping[str, Any], merges: Path, config: Mapping[str, Any], kind: Kind
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
  """(tokenizer, its special tokens) of bytes and the pairs that are merged, in order.

  Raises:
    InputError: if the files are damaged or do not fit together, or for another class.
  """
  check_reads(kind, str(merges), kind.merges)
  lines = read_text(merges).split("\n")
  lines = [line.rstrip("\r") for line in lines if line and not line.startswith("#version")]
  if any(line.count(" ") != 1 for line in lines):
    raise InputError(f"{merges} is damaged: each line must hold two tokens.")
  pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
  try:
    backend = tokenizers.Tokenizer(models.BPE(dict(vocabulary), pairs))
  except Exception as error:  # The library raises nothing more precise.
    raise InputError(f"the vocabulary and {merges} do not fit together: {error}") from None
  space = bool(config.get("add_prefix_space", False))
  if kind.name == "Qwen2":
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(Regex(_QWEN), "isolated"),  # pyright: ignore
      pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
    ])  # fmt: skip
  else:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
  backend.decoder = decoders.ByteLevel()
  own = kind if kind.name else GPT2
  named = texts_of(config)
  roles = {r: t for r, t in own.roles.items() if t in vocabulary} | named
  if own.pair == "roberta":
    known = {r: (own.roles | named)[f"{r}_token"] for r in ("cls", "sep")}
    _check_known(merges, vocabulary, known)
    backend.post_processor = processors.RobertaProcessing(
      (known["sep"], vocabulary[known["sep"]]), (known["cls"], vocabulary[known["cls"]]),
      config.get("trim_offsets", True), space,
    )  # fmt: skip
  else:
    set_ends(backend, config, own, roles)
  return backend, roles


def read_text(path: Path) -> str:
  """A file's text.

  Raises:
    InputError: if it is none.
  """
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise InputError(f"{path} is not UTF-8 text: {error}.") from None


def texts_of(config: Mapping[str, Any]) -> dict[str, str]:
  """Special tokens that a config names."""
  of = lambda value: value.get("content") if isinstance(value, dict) else value
  found = {key: of(value) for key, value in config.items() if key.endswith("_token")}
  return {key: value for key, value in found.items() if isinstance(value, str)}


def _check_known(path: Path, vocabulary: Mapping[str, Any], special: Mapping[str, str]) -> None:
  for role, token in special.items():
    if token not in vocabulary:
      raise InputError(
        f"{path} has no {token!r}, the {role}_token: name the right one in tokenizer_config.json."
      )


def set_ends(
  backend: tokenizers.Tokenizer, config: Mapping[str, Any], kind: Kind, roles: Mapping[str, str]
) -> None:
  """Puts the beginning and the end of a text around each, where the config or the class asks."""
  wanted = {"bos": config.get("add_bos_token", kind.add_bos),
            "eos": config.get("add_eos_token", kind.add_eos)}  # fmt: skip
  bos, eos = (roles.get(f"{role}_token") if asked else None for role, asked in wanted.items())
  ends = [t for t in (bos, eos) if t is not None]
  backend.add_special_tokens([t for t in ends if backend.token_to_id(t) is None])
  if ends:
    two = 1 if kind.typed else 0
    second = [bos and f"{bos}:{two}", f"$B:{two}", eos and f"{eos}:{two}"]
    backend.post_processor = processors.TemplateProcessing(
      single=" ".join(filter(None, (bos, "$A", eos))),
      pair=" ".join(filter(None, (bos, "$A", eos, *second))),
      special_tokens=[(t, backend.token_to_id(t)) for t in dict.fromkeys(ends)],
    )


def _set_pair(backend: tokenizers.Tokenizer, kind: Kind, roles: Mapping[str, str]) -> None:
  cls, sep = (
    (roles[name], backend.token_to_id(roles[name])) for name in ("cls_token", "sep_token")
  )
  if kind.pair == "roberta":
    backend.post_processor = processors.RobertaProcessing(sep, cls, True, False)  # pyright: ignore
  else:
    backend.post_processor = processors.TemplateProcessing(
      single=f"{cls[0]} $A {sep[0]}",
      pair=f"{cls[0]} $A {sep[0]} $B:1 {sep[0]}:1",
      special_tokens=[cls, sep],
    )
