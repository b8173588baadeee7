"""Builds tokenizers: bytes, characters, and vocabularies trained on text."""

import io
import itertools
from collections.abc import Iterable, Iterator

import tokenizers
from absl import logging
from tokenizers import (
  Regex,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from model.errors import InputError, nearest
from model.tokenizer import Tokenizer

TRAINED = ("bpe", "unigram", "wordpiece")
KINDS = ("bytes", "char", *TRAINED)
_LINE = 4096  # Characters of one training sentence of a unigram vocabulary.
_BPE_SPECIAL = ("<pad>", "<bos>", "<eos>")
_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def parse_spec(spec: str) -> tuple[str, int | None] | None:
  """`(kind, vocabulary size)` of `bytes`, `char` or `bpe:N` …; None if it is a path.

  Raises:
    InputError: for a kind without its number, or a number that is none.
  """
  kind, colon, size = spec.partition(":")
  if kind not in KINDS:
    return None
  if (kind in TRAINED) != bool(colon):
    wanted = f"{kind}:N, N entries" if kind in TRAINED else f"{kind} without a number"
    raise InputError(f"data.tokenizer={spec!r}: write {wanted}.")
  if colon and not (size.isascii() and size.isdigit()):
    raise InputError(f"data.tokenizer={spec!r}: {size!r} is not a whole number of entries.")
  return kind, int(size) if colon else None


def build_tokenizer(
  kind: str, size: int | None, texts: Iterable[str], extra: tuple[str, ...] = ()
) -> Tokenizer:
  """Builds a tokenizer; the same texts give the same one on every machine.

  Args:
    kind: one of KINDS. `bytes` has the byte values as its first ids and reads no text; `char` has
      the characters of `texts` in order of code point and nothing else; `bpe` works on bytes;
      `unigram` is like T5's, `wordpiece` like BERT's.
    size: entries of a trained vocabulary, special tokens included; a small corpus gives fewer.
    texts: what it is trained on; it is read more than once.
    extra: further special tokens; those that the kind does not have come last, in this order.

  Raises:
    InputError: for an unknown kind, no text, or a size too small for the alphabet.
  """
  if kind == "bytes":
    return _with_special(_bytes(), extra)
  if not any(texts):
    raise InputError("there is no text to train a tokenizer on: the corpus is empty.")
  if kind == "char":
    return _with_special(_char(texts), extra)
  if kind not in TRAINED:
    raise InputError(
      f"tokenizer kind {kind!r} is not known: use one of {', '.join(KINDS)}.{nearest(kind, KINDS)}"
    )
  if size is None or size < 1:
    raise InputError(f"a {kind} tokenizer needs a vocabulary size of at least 1, not {size}.")
  own = _BERT_SPECIAL if kind == "wordpiece" else _BPE_SPECIAL
  more = len(set(extra).difference(own))
  build = {"bpe": _bpe, "unigram": _unigram, "wordpiece": _wordpiece}[kind]
  tokenizer = _with_special(build(size, more, texts), extra, takes_space=True)
  if tokenizer.vocab_size < size:
    logging.warning(
      "The corpus is too small for %d %s entries: the vocabulary has %d.",
      size, kind, tokenizer.vocab_size,
    )  # fmt: skip
  return tokenizer


def _with_special(
  tokenizer: Tokenizer, extra: tuple[str, ...], *, takes_space: bool = False
) -> Tokenizer:
  """The tokenizer with further special tokens at the end of its vocabulary.

  Args:
    takes_space: a special token in a text takes the space before it, which belongs to the words
      that it stands for.
  """
  missing = [token for token in extra if tokenizer.backend.token_to_id(token) is None]
  added = (tokenizers.AddedToken(t, lstrip=takes_space, special=True) for t in missing)
  tokenizer.backend.add_special_tokens(list(added))
  mask = {"mask_token": "<mask>"} if "<mask>" in missing else {}
  return Tokenizer(tokenizer.backend, tokenizer.config | mask)


def _bytes() -> Tokenizer:
  # The byte-level alphabet shows bytes as printable characters; any of them encodes to itself.
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(byte_characters())}, []))
  backend.pre_tokenizer = byte_level
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(["<pad>", "<bos>", "<eos>", "<mask>"])
  _set_template(backend, "<bos> $A <eos>", "<bos> $A <eos> <bos>:1 $B:1 <eos>:1")
  names = {r: f"<{r}>" for r in ("pad", "bos", "eos", "mask")}
  return Tokenizer(backend, {f"{r}_token": name for r, name in names.items()})


def byte_characters() -> list[str]:
  """The character that stands for each byte, by byte (GPT-2's table)."""
  shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
  hidden = itertools.count(256)
  return [chr(b) if b in shown else chr(next(hidden)) for b in range(256)]


def _char(texts: Iterable[str]) -> Tokenizer:
  characters = sorted(set().union(*texts))
  backend = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}))  # pyright: ignore
  backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore
  backend.decoder = decoders.Fuse()
  return Tokenizer(backend, {})


def _bpe(size: int, extra: int, texts: Iterable[str]) -> Tokenizer:
  """`extra` of the `size` entries are left to others, here and below."""
  special = len(_BPE_SPECIAL) + extra
  if size < 256 + special:
    raise InputError(
      f"bpe:{size} is too small: 256 bytes and {special} special tokens need {256 + special}."
    )
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size - extra,
    special_tokens=list(_BPE_SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  _set_template(backend, "<bos> $A <eos>", "<bos> $A <eos> <bos>:1 $B:1 <eos>:1")
  return Tokenizer(backend, {f"{r}_token": f"<{r}>" for r in ("pad", "bos", "eos")})


def _unigram(size: int, extra: int, texts: Iterable[str]) -> Tokenizer:
  """Trained by SentencePiece: the other library's trainer depends on the order of a hash table."""
  import sentencepiece

  from model.sentencepiece import convert
  from model.tokenizer_kinds import UNNAMED

  if size <= extra:
    raise InputError(f"unigram:{size} is too small: {extra} special tokens must fit beside text.")
  target = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
      sentence_iterator=_sentences(texts), model_writer=target, model_type="unigram",
      vocab_size=size - extra, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
      max_sentence_length=8 * _LINE, num_threads=4, minloglevel=2,
    )  # fmt: skip
  except (RuntimeError, OSError) as error:
    reason = str(error).split("]")[-1].strip() or str(error)
    raise InputError(f"unigram:{size} cannot be trained on this corpus: {reason}") from None
  backend, roles = convert(target.getvalue(), name="the model", config={}, kind=UNNAMED)
  return Tokenizer(backend, roles)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
  for text in texts:
    for line in text.splitlines():
      for start in range(0, len(line), _LINE):
        yield line[start : start + _LINE]


def _wordpiece(size: int, extra: int, texts: Iterable[str]) -> Tokenizer:
  """Trained as BPE is, with the alphabet given: else ids would depend on a hash table's order."""
  backend = tokenizers.Tokenizer(models.WordPiece(unk_token=_BERT_SPECIAL[1]))  # pyright: ignore
  backend.normalizer = normalizers.BertNormalizer()
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  characters = set().union(*(backend.normalizer.normalize_str(text) for text in texts))
  alphabet = sorted(c for c in characters if not c.isspace())
  forms = [*alphabet, *(f"##{c}" for c in alphabet)]
  special = len(_BERT_SPECIAL) + extra
  if size < special + len(forms):
    raise InputError(
      f"wordpiece:{size} is too small: {special} special tokens and the corpus' {len(alphabet)} "
      f"characters, each at the start and inside of words, need {special + len(forms)}."
    )
  trainer = trainers.WordPieceTrainer(
    vocab_size=size - extra, special_tokens=[*_BERT_SPECIAL, *forms], show_progress=False
  )
  backend.train_from_iterator(texts, trainer)
  return _bert(backend.get_vocab(with_added_tokens=False))


def _bert(vocabulary: dict[str, int]) -> Tokenizer:
  unknown = _BERT_SPECIAL[1]
  backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))  # pyright: ignore
  backend.normalizer = normalizers.BertNormalizer()
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece()
  backend.add_special_tokens(list(_BERT_SPECIAL))
  _set_template(backend, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
  roles = {t.strip("[]").lower(): t for t in _BERT_SPECIAL}
  return Tokenizer(backend, {f"{role}_token": token for role, token in roles.items()})


def _set_template(backend: tokenizers.Tokenizer, single: str, pair: str) -> None:
  names = dict.fromkeys(w.split(":")[0] for w in f"{single} {pair}".split() if w[0] != "$")
  backend.post_processor = processors.TemplateProcessing(
    single=single, pair=pair, special_tokens=[(n, backend.token_to_id(n)) for n in names]
  )
