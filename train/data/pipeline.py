"""Data: a config to batches. Batch s is a function of (seed, s) and of nothing else."""

import dataclasses
import hashlib
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from model.errors import InputError
from model.tokenizer import Tokenizer
from train.config import Config
from train.data.arrays import Corpus, read_arrays, split_validation
from train.data.cache import Cache
from train.data.mix import Mixture, mix
from train.data.pack import Rows
from train.data.sources import Source, TokenSource, open_source, parse_mixture
from train.data.tokenize import tokenize
from train.data.vocabulary import choose_tokenizer
from train.objectives.causal_lm import empty_rows, fill_rows, predictions

_FORMAT = 1  # Of rows: a run goes on only with the rows that it began with.

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run learns from.

  A batch is a dict of arrays (rows of this process, seq_len): see `causal_lm.empty_rows`. Counts
  are of the whole corpus, over all processes.
  """

  tokenizer: Tokenizer
  fingerprint: dict[str, Any]  # Plain values: what must be the same for a run to go on.
  rows_per_epoch: int
  tokens_per_epoch: int  # Targets.
  validation_tokens: int  # Targets.
  truncated_tokens: int  # Targets that data.truncate leaves out, in training.
  truncated_documents: int
  num_validation_batches: int
  _parts: list[tuple[Corpus, Rows]] = dataclasses.field(repr=False)
  _validation: list[tuple[Corpus, Rows]] = dataclasses.field(repr=False)
  _mixture: Mixture = dataclasses.field(repr=False)
  _config: Config = dataclasses.field(repr=False)
  _process: tuple[int, int] = dataclasses.field(repr=False)

  def batch(self, step: int) -> Batch:
    """This process' rows of the batch of `step`, counted from 0."""
    source, row = self._mixture.place(self._slice(step))
    batch = empty_rows(len(row), self._config.seq_len)
    for i, (corpus, rows) in enumerate(self._parts):
      here = np.flatnonzero(source == i)
      if len(here):
        which, starts, lengths = rows.segments(row[here])
        fill_rows(batch, corpus.tokens, here[which], starts, lengths)
    return batch

  def batches(self, start: int = 0) -> Iterator[Batch]:
    """Batches of the steps from `start` on, without end, built ahead by threads."""
    import grain  # Not on every machine that runs the train step alone.

    workers = self._config.data.workers
    ahead = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    return iter(grain.MapDataset.range(start, sys.maxsize).map(self.batch).to_iter_dataset(ahead))

  def validation_batches(self) -> Iterator[Batch]:
    """Every target of the validation corpus once; empty rows fill the last batch.

    `eval_batches` of the config ends them early.
    """
    ends = np.cumsum([len(rows) for _, rows in self._validation])
    for i in range(self.num_validation_batches):
      wanted = self._slice(i)
      batch = empty_rows(len(wanted), self._config.seq_len)
      for (corpus, rows), end in zip(self._validation, ends, strict=True):
        here = np.flatnonzero((wanted >= end - len(rows)) & (wanted < end))
        if len(here):
          which, starts, lengths = rows.segments(wanted[here] - (end - len(rows)))
          fill_rows(batch, corpus.tokens, here[which], starts, lengths)
      yield batch

  def _slice(self, step: int) -> np.ndarray:
    """Numbers of this process' rows of a batch."""
    index, count = self._process
    size = self._config.batch_size // count
    return step * self._config.batch_size + index * size + np.arange(size, dtype=np.int64)


def load_data(
  config: Config, *, workdir: Path | None = None, process_index: int = 0, process_count: int = 1
) -> Data:
  """Reads, tokenizes and splits what `config.data` names.

  Args:
    workdir: where the tokenizer is kept, and taken from when it is there; None: nowhere.
    process_index, process_count: which part of each batch this process builds.

  Raises:
    InputError: for a source or tokenizer that does not exist, is damaged, empty or does not fit.
  """
  if config.batch_size % process_count:
    raise InputError(
      f"batch_size={config.batch_size} is not a multiple of the {process_count} processes: each "
      "must build the same number of rows."
    )
  cache = Cache(Path(config.cache_dir) / "data", config.cache_gib * 2**30)
  mixture = parse_mixture(config.data.source)
  sources = [open_source(spec, config.data) for _, spec in mixture]
  held_out = _validation_sources(config)
  tokenizer = choose_tokenizer(
    config.data.tokenizer, sources, cache, workdir, write=process_index == 0
  )
  read = lambda source: _read(source, tokenizer, cache)
  training = [read(source) for source in sources]
  validation = [read(source) for source in held_out]
  if not held_out:
    split = [split_validation(corpus, config.data.validation_fraction) for corpus in training]
    training = [corpus for corpus, _ in split]
    validation = [corpus for _, corpus in split if corpus is not None]
  return _assemble(
    config, tokenizer, training, validation, [weight for weight, _ in mixture],
    _fingerprint(tokenizer, sources, held_out), (process_index, process_count),
  )  # fmt: skip


def _assemble(
  config: Config, tokenizer: Tokenizer, training: list[Corpus], validation: list[Corpus],
  weights: list[float], fingerprint: dict[str, Any], process: tuple[int, int],
) -> Data:  # fmt: skip
  limit = config.seq_len if config.data.truncate else sys.maxsize
  pairs = [predictions(corpus.lengths) for corpus in training]
  kept = [np.minimum(n, limit) for n in pairs]
  held_out = [predictions(corpus.lengths) for corpus in validation]
  _check_enough(config, training, kept, held_out)
  make = lambda corpus, n, seed: Rows(
    corpus.starts, n, seq_len=config.seq_len, packing=config.data.packing, seed=seed
  )
  parts = [(c, make(c, n, config.seed)) for c, n in zip(training, kept, strict=True)]
  validation_parts = [(c, make(c, n, None)) for c, n in zip(validation, held_out, strict=True)]
  batches = -(-sum(len(rows) for _, rows in validation_parts) // config.batch_size)
  return Data(
    tokenizer=tokenizer,
    fingerprint=fingerprint,
    rows_per_epoch=sum(len(rows) for _, rows in parts),
    tokens_per_epoch=sum(int(n.sum()) for n in kept),
    validation_tokens=sum(int(n.sum()) for n in held_out),
    truncated_tokens=sum(int((n - k).sum()) for n, k in zip(pairs, kept, strict=True)),
    truncated_documents=sum(int((n > k).sum()) for n, k in zip(pairs, kept, strict=True)),
    num_validation_batches=batches
    if config.eval_batches is None
    else min(batches, config.eval_batches),
    _parts=parts,
    _validation=validation_parts,
    _mixture=mix(weights),
    _config=config,
    _process=process,
  )


def _check_enough(
  config: Config, training: list[Corpus], kept: list[np.ndarray], held_out: list[np.ndarray]
) -> None:
  own = config.data.validation_source
  after = "" if own else " after the validation part is taken off"
  for name, found in ((config.data.source, kept), (own or config.data.source, held_out)):
    if not all(predicted.sum() for predicted in found):
      raise InputError(
        f"{name!r} is too small: each of its parts must hold two tokens in a row{after}."
      )
  single = sum(int((corpus.lengths == 1).sum()) for corpus in training)
  if single:
    logging.warning("%d documents of a single token hold nothing to predict.", single)


def _validation_sources(config: Config) -> list[Source]:
  if config.data.validation_source is None:
    return []
  return [
    open_source(spec, config.data) for _, spec in parse_mixture(config.data.validation_source)
  ]


def _read(source: Source, tokenizer: Tokenizer, cache: Cache) -> Corpus:
  if isinstance(source, TokenSource):
    return read_arrays(source, tokenizer.vocab_size, cache)
  return tokenize(source, tokenizer, cache)


def _fingerprint(
  tokenizer: Tokenizer, sources: list[Source], held_out: list[Source]
) -> dict[str, Any]:
  join = lambda found: hashlib.sha256("\n".join(s.fingerprint for s in found).encode()).hexdigest()
  fingerprint = {
    "format": _FORMAT,
    "corpus": join(sources),
    "validation": join(held_out) if held_out else None,
    "tokenizer": tokenizer.fingerprint,
  }
  if any(s.name == "python_stdlib" for s in (*sources, *held_out)):
    fingerprint["python"] = platform.python_version()
  return fingerprint
