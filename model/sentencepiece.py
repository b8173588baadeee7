"""SentencePiece models as `tokenizers` tokenizers that give the same ids."""

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from model.errors import InputError

_UNIGRAM, _BPE = 1, 2  # ModelType of sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6  # SentencePiece.Type.
_SPACE = "▁"


def convert(
  data: bytes, *, name: str, add_bos: bool, add_eos: bool
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
  """Returns the tokenizer and the roles of its special tokens.

  Args:
    data: content of the .model file.
    name: what an error calls it.
    add_bos, add_eos: begin and end each text, where the model declares such tokens.

  Raises:
    InputError: if it is no such file, or of a kind that cannot be converted.
  """
  proto = _parse(data, name)
  trainer, spec = proto.trainer_spec, proto.normalizer_spec
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
  backend.normalizer = _normalizer(spec)
  if not any(_SPACE in piece[1:] for piece, _ in pieces):
    backend.pre_tokenizer = pre_tokenizers.Split(_SPACE, "merged_with_next")  # pyright: ignore
  backend.decoder = _decoder(spec)
  backend.add_special_tokens(_added(proto, (_UNKNOWN, _CONTROL), special=True))
  backend.add_tokens(_added(proto, (_USER,), special=False))
  roles = _roles(proto)
  ends = [r if r in roles and wanted else None
          for r, wanted in (("bos_token", add_bos), ("eos_token", add_eos))]  # fmt: skip
  set_template(backend, *(roles[r] if r else None for r in ends))
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


def set_template(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
  """Puts special tokens before and after each text."""
  ends = [t for t in (bos, eos) if t is not None]
  if ends:
    backend.post_processor = processors.TemplateProcessing(
      single=" ".join(filter(None, (bos, "$A", eos))),
      pair=" ".join(filter(None, (bos, "$A", eos, bos and f"{bos}:1", "$B:1", eos and f"{eos}:1"))),
      special_tokens=[(t, backend.token_to_id(t)) for t in dict.fromkeys(ends)],
    )


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
