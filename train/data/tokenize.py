"""Text to token ids, once: the result is kept in the cache."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from model.errors import InputError
from model.tokenizer import Tokenizer
from train.data.arrays import Corpus
from train.data.cache import Cache
from train.data.sources import TextSource

_FORMAT = 1  # Of the cache; another one is never read.
_CHARACTERS, _DOCUMENTS = 1 << 21, 4096  # Encoded at a time, at least one document.


def tokenize(source: TextSource, tokenizer: Tokenizer, cache: Cache) -> Corpus:
  """The documents of `source` as token ids, from the cache where they have been encoded before.

  Raises:
    InputError: if there is no text, or the tokenizer cannot encode it.
  """
  decides = f"{_FORMAT} {source.fingerprint} {tokenizer.fingerprint}"
  key = "tokens-" + hashlib.sha256(decides.encode()).hexdigest()[:32]
  entry = cache.entry(key, lambda folder: _write(folder, source, tokenizer))
  meta = json.loads((entry.path / "meta.json").read_text())
  lengths = np.load(entry.path / "lengths.npy")
  tokens = np.memmap(entry.path / "tokens.bin", dtype=meta["dtype"], mode="r")
  return Corpus(tokens, np.cumsum(lengths) - lengths, lengths, entry)


def _write(folder: Path, source: TextSource, tokenizer: Tokenizer) -> None:
  dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
  lengths: list[int] = []
  start = time.perf_counter()
  bar = tqdm(
    desc=f"Tokenizing {source.name}", total=source.size, unit="B", unit_scale=True, delay=1.0,
    disable=None, leave=False,
  )  # fmt: skip
  with (folder / "tokens.bin").open("wb") as f, bar:
    for texts in _batches(source.documents()):
      for ids in tokenizer.encode_documents(texts):
        f.write(ids.astype(dtype).tobytes())
        lengths.append(len(ids))
      bar.update(sum(len(text.encode()) for text in texts))
  if not sum(lengths):
    raise InputError(f"{source.name!r} holds no text: the corpus is empty.")
  np.save(folder / "lengths.npy", np.array(lengths, np.int64))
  (folder / "meta.json").write_text(json.dumps({"dtype": np.dtype(dtype).name}))
  logging.info(
    "Tokenized %s: %d documents, %d tokens in %.1f s.",
    source.name, len(lengths), sum(lengths), time.perf_counter() - start,
  )  # fmt: skip


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
  """Documents that hold something, some at a time."""
  texts, size = [], 0
  for text in documents:
    if text:
      texts.append(text)
      size += len(text)
    if size >= _CHARACTERS or len(texts) >= _DOCUMENTS:
      yield texts
      texts, size = [], 0
  if texts:
    yield texts
