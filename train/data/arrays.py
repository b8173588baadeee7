"""Corpora as arrays of token ids: what tokenizing gives, and what token files hold."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Integer

from model.errors import InputError
from train.data.cache import Cache, Entry
from train.data.sources import TokenSource

_BLOCK = 1 << 24  # Ids checked at a time.


# Columns of token ids, beside the text itself.
TOKEN_COLUMNS = ("text_pair", "target", "negative")


@dataclasses.dataclass(frozen=True)
class Column:
  """Further values of each document: token ids, labels, places; as many as there are.

  Those of document d are `values[starts[d] : starts[d] + lengths[d]]`.
  """

  values: np.ndarray  # Often mapped from a file.
  starts: Int64[np.ndarray, "d"]
  lengths: Int64[np.ndarray, "d"]
  names: tuple[str, ...] = ()  # What the values are the places of: labels, files.

  def of(self, document: int) -> np.ndarray:
    """The values of a document."""
    start = self.starts[document]
    return self.values[start : start + self.lengths[document]]

  def take(self, which: Any) -> "Column":
    """The documents that an index into an array selects."""
    return dataclasses.replace(self, starts=self.starts[which], lengths=self.lengths[which])


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents as token ids; document d is `tokens[starts[d] : starts[d] + lengths[d]]`.

  Where documents are examples of a task, the tokens are those of its text, and `columns` holds what
  else belongs to each, by the name of the field of `data` that asks for it.
  """

  tokens: Integer[np.ndarray, "n"]  # Often mapped from a file.
  starts: Int64[np.ndarray, "d"]
  lengths: Int64[np.ndarray, "d"]
  entry: Entry | None = None  # What keeps a mapped file in the cache.
  columns: Mapping[str, Column] = dataclasses.field(default_factory=dict)

  def limited(self, most: int) -> "Corpus":
    """The first `most` tokens of each document."""
    return dataclasses.replace(self, lengths=np.minimum(self.lengths, most))

  def without(self, prefix: Sequence[int], suffix: Sequence[int]) -> "Corpus":
    """Documents without these tokens at their ends, where they have them."""
    begin = self._has(prefix, self.starts) * len(prefix)
    left = self.lengths - begin
    end = self._has(suffix, self.starts + self.lengths - len(suffix)) * (left >= len(suffix))
    return dataclasses.replace(self, starts=self.starts + begin, lengths=left - end * len(suffix))

  def _has(self, ids: Sequence[int], places: Int64[np.ndarray, "d"]) -> Bool[np.ndarray, "d"]:
    """Whether documents hold `ids` at `places`."""
    found = self.lengths >= len(ids)
    for i, token in enumerate(ids):
      found = found & (self.tokens[np.where(found, places + i, 0)] == token)
    return found

  def take(self, which: Any) -> "Corpus":
    """The documents that an index into an array selects."""
    columns = {name: column.take(which) for name, column in self.columns.items()}
    return dataclasses.replace(
      self, starts=self.starts[which], lengths=self.lengths[which], columns=columns
    )

  def text(self, document: int) -> Integer[np.ndarray, "n"]:
    """Token ids of a document."""
    start = self.starts[document]
    return np.asarray(self.tokens[start : start + self.lengths[document]])

  @property
  def sizes(self) -> Int64[np.ndarray, "d"]:
    """Tokens of each document, in all columns."""
    further = [self.columns[name].lengths for name in TOKEN_COLUMNS if name in self.columns]
    return sum(further, start=self.lengths)


def read_arrays(source: TokenSource, vocab_size: int, cache: Cache) -> Corpus:
  """Token files as they are: ids get no special tokens.

  A one-dimensional array is one document, each row of a two-dimensional one is a document. A .bin
  file holds 16-bit unsigned ids, low byte first, as nanoGPT writes them, and is one document.

  Raises:
    InputError: for another form, an empty file, or an id that the vocabulary does not have.
  """
  arrays = [_open(path, vocab_size) for path in source.files]
  shapes = [a.shape if a.ndim == 2 else (1, a.shape[0]) for a in arrays]
  lengths = np.concatenate([np.full(rows, size, np.int64) for rows, size in shapes])
  starts = np.cumsum(lengths) - lengths
  if len(arrays) == 1:
    return Corpus(arrays[0].reshape(-1), starts, lengths)
  dtype = np.result_type(*arrays)

  def join(folder: Path) -> None:
    with (folder / "tokens.bin").open("wb") as f:
      for array in arrays:
        array.astype(dtype).tofile(f)

  key = "arrays-" + hashlib.sha256(source.fingerprint.encode()).hexdigest()[:32]
  entry = cache.entry(key, join)
  tokens = np.memmap(entry.path / "tokens.bin", dtype=dtype, mode="r")
  return Corpus(tokens, starts, lengths, entry)


def split_validation(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus | None]:
  """Cuts off the last `fraction` of the tokens: (training, validation).

  One document is cut inside, several at the boundary nearest to the cut.

  Raises:
    InputError: if there is one example of a task alone, which cannot be cut.
  """
  if not fraction:
    return corpus, None
  starts, lengths = corpus.starts, corpus.lengths
  if corpus.columns and len(lengths) == 1:
    raise InputError(
      "the data holds one example, and data.validation_fraction cuts off some of several: set it "
      "to 0, or name a data.validation_source."
    )
  cut = int(lengths.sum() * (1 - fraction))
  part = lambda s, n: dataclasses.replace(corpus, starts=s, lengths=n)
  if len(lengths) == 1:
    first = np.array([cut])
    return part(starts, first), part(starts + cut, lengths - first)
  ends = np.cumsum(lengths)
  d = int(np.clip(np.argmin(np.abs(ends - cut)) + 1, 1, len(lengths) - 1))
  return corpus.take(slice(d)), corpus.take(slice(d, None))


def _open(path: Path, vocab_size: int) -> np.ndarray:
  if path.suffix == ".npy":
    try:
      array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
      raise InputError(f"{path} is not a NumPy array: {error}") from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
      raise InputError(
        f"{path} holds {array.ndim}-dimensional {array.dtype}: token ids are whole numbers in one "
        "dimension, or two with a document in each row."
      )
  else:
    if path.stat().st_size % 2:
      raise InputError(f"{path} has an odd number of bytes: a .bin file holds 16-bit ids.")
    array = np.memmap(path, "<u2", mode="r") if path.stat().st_size else np.zeros(0, np.uint16)
  if not array.size:
    raise InputError(f"{path} holds no tokens: the corpus is empty.")
  rows = max(1, _BLOCK // max(1, array[0].size))
  for start in range(0, len(array), rows):
    block = array[start : start + rows]
    if block.min() < 0 or block.max() >= vocab_size:
      wrong = block.min() if block.min() < 0 else block.max()
      raise InputError(
        f"{path} holds the id {wrong}, the vocabulary has {vocab_size}: set data.tokenizer to the "
        "tokenizer that made the file."
      )
  return array
