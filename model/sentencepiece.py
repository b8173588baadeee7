"""SentencePiece models as `tokenizers` tokenizers that give the same ids."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from model.errors import InputError
from model.tokenizer_kinds import Kind, check_reads
from model.tokenizer_vocabularies import set_ends, texts_of

_UNIGRAM, _BPE = 1, 2  # ModelType of sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6  # SentencePiece.Type.
_SPACE = "▁"
_UNSPELLABLE = "\U0010ffff\ufdd1"  # Noncharacters, before pieces that no text is cut into.


def convert(
  data: bytes, *, name: str, config: Mapping[str, Any], kind: Kind
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
  """Returns the tokenizer and the roles of its special tokens.

  Args:
    data: content of the .model file.
    name: what an error calls it.
    config: fields of tokenizer_config.json; `add_bos_token` and `add_eos_token` begin and end each
      text, where the model declares such tokens.
    kind: Transformers' class, whose own ways of cutting text are followed; of no name:
      SentencePiece's.

  Raises:
    InputError: if it is no such file, or of a kind that cannot be converted.
  """
  check_reads(kind, name, kind.pieces)
  proto = _parse(data, name)
  trainer = proto.trainer_spec
  # Nine digits name a float32 and survive JSON; more are not always read back as they were.
  pieces = [(p.piece, float(f"{p.score:.9g}")) for p in proto.pieces]
  if trainer.treat_whitespace_as_suffix:
    raise InputError(f"{name}: models that put whitespace after words are not supported.")
  if trainer.model_type == _UNIGRAM:
    model = models.Unigram(pieces, _unknown(proto), byte_fallback=trainer.byte_fallback)
  elif trainer.model_type == _BPE:
    vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
    model = models.BPE(vocabulary, _merges(proto), unk_token=pieces[_unknown(proto)][0],
                       fuse_unk=True, byte_fallback=trainer.byte_fallback)  # fmt: skip
  else:
    raise InputError(f"{name}: only unigram and BPE models of SentencePiece can be read.")
  backend = tokenizers.Tokenizer(model)
  _CUTS.get(kind.name, _own_cuts)(backend, proto, config)
  backend.add_special_tokens(_added(proto, (_UNKNOWN, _CONTROL), special=True))
  backend.add_tokens(_added(proto, (_USER,), special=False))
  known = {
    role: token for role, token in kind.roles.items() if backend.token_to_id(token) is not None
  }
  roles = _roles(proto) | known | texts_of(config)
  set_ends(backend, config, kind, roles)
  return backend, roles


def _own_cuts(backend: tokenizers.Tokenizer, proto: Any, config: Mapping[str, Any]) -> None:
  """As SentencePiece itself does it."""
  backend.normalizer = _normalizer(proto.normalizer_spec)
  if not any(_SPACE in p.piece[1:] for p in proto.pieces):
    backend.pre_tokenizer = pre_tokenizers.Split(_SPACE, "merged_with_next")  # pyright: ignore
  backend.decoder = _decoder(proto.normalizer_spec)


def _llama_cuts(backend: tokenizers.Tokenizer, proto: Any, config: Mapping[str, Any]) -> None:
  """A space before the first word only, unless `legacy` asks for one behind special tokens too."""
  prefix = config.get("add_prefix_space", True) is not False
  scheme = "always" if config.get("legacy", False) else "first"
  backend.pre_tokenizer = pre_tokenizers.Metaspace(
    replacement=_SPACE, prepend_scheme=scheme if prefix else "never", split=False
  )
  steps: list[decoders.Decoder] = [
    decoders.Replace(_SPACE, " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
  ]
  backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])


def _gemma_cuts(backend: tokenizers.Tokenizer, proto: Any, config: Mapping[str, Any]) -> None:
  """Spaces are kept as they are, and none is put before a text."""
  backend.normalizer = normalizers.Replace(" ", _SPACE)
  backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # pyright: ignore
  backend.decoder = decoders.Sequence(
    [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  )


def _t5_cuts(backend: tokenizers.Tokenizer, proto: Any, config: Mapping[str, Any]) -> None:
  """Whitespace parts words, and is nothing else."""
  spec = proto.normalizer_spec
  if spec.precompiled_charsmap:
    backend.normalizer = normalizers.Precompiled(spec.precompiled_charsmap)
  words = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
  backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
  backend.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")


_CUTS = {"Llama": _llama_cuts, "Gemma": _gemma_cuts, "T5": _t5_cuts}


def convert_marian(
  data: bytes, vocabulary: Mapping[str, Any], *, name: str, config: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
  """The tokenizer of a Marian folder: the source's pieces, with ids of a vocabulary that has the
  target's too; those are decoded, and no text is cut into them.

  Args:
    data: content of source.spm.
    vocabulary: vocab.json.
    name, config: as in `convert`.

  Raises:
    InputError: if one of them is not what Marian writes.
  """
  proto = _parse(data, name)
  roles = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | texts_of(config)
  special = {roles[role] for role in ("eos_token", "unk_token", "pad_token")}
  numbered = {i: token for token, i in vocabulary.items()}
  tokens = [numbered.get(i, "") for i in range(len(vocabulary))]
  if "" in tokens or not special <= set(vocabulary):
    raise InputError(f"{name}: vocab.json must number {', '.join(special)} and others from 0.")
  if config.get("separate_vocabs") or proto.trainer_spec.model_type != _UNIGRAM:
    raise InputError(f"{name}: only one vocabulary of unigram models is supported for Marian.")
  scores = {p.piece: float(f"{p.score:.9g}") for p in proto.pieces if p.type in (_NORMAL, _USER)}
  shown = lambda token: token if token in scores or token in special else _UNSPELLABLE + token
  pieces = [(shown(token), scores.get(token, 0.0)) for token in tokens]
  backend = tokenizers.Tokenizer(models.Unigram(pieces, vocabulary[roles["unk_token"]]))
  _own_cuts(backend, proto, config)
  shows = decoders.Replace(_UNSPELLABLE, "")
  backend.decoder = decoders.Sequence([shows, _decoder(proto.normalizer_spec)])
  backend.add_special_tokens([AddedToken(token, special=True) for token in special])
  end = (roles["eos_token"], vocabulary[roles["eos_token"]])
  backend.post_processor = processors.TemplateProcessing(
    single=f"$A {end[0]}", pair=f"$A $B:0 {end[0]}", special_tokens=[end]
  )
  return backend, roles


def _parse(data: bytes, name: str) -> Any:
  from google.protobuf.message import DecodeError
  from sentencepiece import sentencepiece_model_pb2

  try:
    proto = sentencepiece_model_pb2.ModelProto.FromString(data)  # pyright: ignore
  except DecodeError:
    proto = None
  if proto is None or not proto.pieces:
    raise InputError(f"{name} is not a SentencePiece model, or it is damaged.")
  return proto


def _unknown(proto) -> int:
  return next(i for i, p in enumerate(proto.pieces) if p.type == _UNKNOWN)


def _added(proto, types: tuple[int, ...], *, special: bool) -> list[AddedToken]:
  texts = [p.piece for p in proto.pieces if p.type in types]
  return [AddedToken(t, special=special, normalized=False) for t in texts]


def _roles(proto) -> dict[str, str]:
  spec = proto.trainer_spec
  ids = {"pad": spec.pad_id, "bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id}
  return {f"{r}_token": proto.pieces[i].piece for r, i in ids.items() if 0 <= i < len(proto.pieces)}


def _normalizer(spec) -> normalizers.Normalizer:
  steps: list[normalizers.Normalizer] = []
  if spec.precompiled_charsmap:
    steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    trailing = f"[ {_SPACE}]" if spec.escape_whitespaces else " "
    steps.append(normalizers.Replace(Regex(rf"\A +|{trailing}+\z"), ""))
    steps.append(normalizers.Replace(Regex(" {2,}"), " "))
  if spec.add_dummy_prefix:
    steps.append(normalizers.Prepend(_SPACE))
  if spec.escape_whitespaces:
    steps.append(normalizers.Replace(" ", _SPACE))
  return normalizers.Sequence(steps)


def _decoder(spec) -> decoders.Decoder:
  steps: list[decoders.Decoder] = [
    decoders.Replace(_SPACE, " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
  ]
  if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
    steps.append(decoders.Strip(" ", 1 << 30 if spec.remove_extra_whitespaces else 1, 0))
  return decoders.Sequence(steps)


def _merges(proto) -> list[tuple[str, str]]:
  """Pairs in the order in which SentencePiece joins them: by the score of what they become."""
  ids = {p.piece: i for i, p in enumerate(proto.pieces) if p.type in (_NORMAL, _USER)}
  found = []
  for piece, i in ids.items():
    for cut in range(1, len(piece)):
      left, right = piece[:cut], piece[cut:]
      if left in ids and right in ids:
        found.append((-proto.pieces[i].score, ids[left], ids[right], left, right))
  return [pair[3:] for pair in sorted(found)]
