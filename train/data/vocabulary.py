"""The tokenizer of a run: read from a path, taken from the workdir, or trained on the corpus."""

import hashlib
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from absl import logging

from model.errors import InputError
from model.tokenizer import Tokenizer
from model.vocabulary import KINDS, build_tokenizer, parse_spec
from train.data.cache import Cache
from train.data.sources import Source, TextSource

_FORMAT = 1  # Of the cache; another one is never read.
_ENOUGH = 1 << 28  # Characters that a vocabulary is trained on at most.
_NOTE = "trained_as"  # Field of tokenizer_config.json: the spec it was built from.


def choose_tokenizer(
  spec: str, sources: list[Source], cache: Cache, workdir: Path | None, *, write: bool,
  extra: tuple[str, ...] = (), chat_template: str | None = None,
) -> Tokenizer:  # fmt: skip
  """The tokenizer that `data.tokenizer` names.

  Args:
    sources: the corpus that it is trained on where the spec asks for that.
    workdir: its `tokenizer/` is used where it is there, and made where it is not.
    write: whether this process makes it.
    extra: special tokens that one which is built gets besides its own.
    chat_template: file of a chat template that takes the place of its own; "none": without one.

  Raises:
    InputError: for a spec that is none, a corpus without text, or a workdir with another one.
  """
  kept = None if workdir is None else workdir / "tokenizer"
  note = " ".join((spec, *extra))
  if kept is not None and kept.is_dir():
    tokenizer = Tokenizer.load(kept)
    _check_note(tokenizer.config.get(_NOTE, note), note, kept)
    return tokenizer
  parsed = parse_spec(spec)
  if parsed is None:
    if not Path(spec).expanduser().exists():
      raise InputError(
        f"data.tokenizer={spec!r} is neither a file or folder nor one of "
        f"{', '.join(k if k in ('bytes', 'char') else f'{k}:N' for k in KINDS)}."
      )
    tokenizer = Tokenizer.load(spec)
    tokenizer.config.pop(_NOTE, None)  # Of the run that it came from; this one names a path.
  else:
    tokenizer = _build(spec, *parsed, sources, cache, extra)
    tokenizer.config[_NOTE] = note
  if chat_template is not None:
    tokenizer.config.pop("chat_template", None)
  if chat_template not in (None, "none"):
    tokenizer.config["chat_template"] = _template(chat_template)
  if kept is not None and write:
    _save(tokenizer, kept)
  return tokenizer


def _template(path: str) -> str:
  try:
    return Path(path).expanduser().read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
      f"data.chat_template={path!r} is not a file with a Jinja template, nor 'none': {error}"
    ) from None


def _check_note(kept: str, wanted: str, folder: Path) -> None:
  if kept == wanted:
    return
  (spec, *extra), (wanted_spec, *wanted_extra) = kept.split(" "), wanted.split(" ")
  if spec != wanted_spec:
    raise InputError(
      f"{folder} was built as {spec!r}, data.tokenizer={wanted_spec!r} asks for another: use a new "
      "workdir."
    )
  different = sorted({*extra} ^ {*wanted_extra}) or wanted_extra
  raise InputError(
    f"{folder} was built for another objective, whose special tokens differ in {different[0]!r}: "
    "use a new workdir."
  )


class Texts:
  """The documents of sources, a limited number of characters of each."""

  def __init__(self, sources: list[TextSource], limit: float):
    self._sources, self._limit = sources, limit

  def __iter__(self) -> Iterator[str]:
    for source in self._sources:
      left = self._limit
      for text in source.documents():
        if len(text) > left:
          logging.warning(
            "The vocabulary is trained on the first %d characters of %s.", self._limit, source.name
          )
          yield text[: int(left)]
          break
        left -= len(text)
        yield text


def _build(
  spec: str, kind: str, size: int | None, sources: list[Source], cache: Cache,
  extra: tuple[str, ...],
) -> Tokenizer:  # fmt: skip
  if kind == "bytes":
    return build_tokenizer(kind, size, (), extra)
  texts = [s for s in sources if isinstance(s, TextSource)]
  if len(texts) < len(sources):
    arrays = next(s for s in sources if not isinstance(s, TextSource))
    raise InputError(
      f"data.tokenizer={spec!r} is trained on text and {arrays.name!r} holds token ids: set "
      "data.tokenizer to the path of the tokenizer that made them, or to 'bytes'."
    )
  limit = float("inf") if kind == "char" else _ENOUGH // len(texts)
  decides = "\n".join([str(_FORMAT), " ".join((spec, *extra)), *(s.fingerprint for s in texts)])
  key = "tokenizer-" + hashlib.sha256(decides.encode()).hexdigest()[:32]
  entry = cache.entry(
    key, lambda folder: _train(kind, size, Texts(texts, limit), extra).save(folder)
  )
  return Tokenizer.load(entry.path)


def _train(kind: str, size: int | None, texts: Iterable[str], extra: tuple[str, ...]) -> Tokenizer:
  start = time.perf_counter()
  tokenizer = build_tokenizer(kind, size, texts, extra)
  logging.info(
    "Built a %s tokenizer of %d entries in %.1f s.",
    kind, tokenizer.vocab_size, time.perf_counter() - start,
  )  # fmt: skip
  return tokenizer


def _save(tokenizer: Tokenizer, folder: Path) -> None:
  """Writes the folder whole or not at all."""
  new = folder.with_name(f"tokenizer.new-{secrets.token_hex(4)}")
  try:
    tokenizer.save(new)
    if not folder.exists():
      new.rename(folder)
  finally:
    shutil.rmtree(new, ignore_errors=True)
