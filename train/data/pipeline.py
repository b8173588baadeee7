"""Data: a config to batches. Batch s is a function of (seed, s) and of nothing else."""

import dataclasses
import hashlib
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from model.errors import InputError
from model.tokenizer import Tokenizer
from train.config import Config
from train.data.arrays import Corpus, read_arrays, split_validation
from train.data.cache import Cache
from train.data.encode import read_examples
from train.data.examples import ExampleSource, open_training, open_validation
from train.data.fit import Fitted
from train.data.labels import label_order, with_order
from train.data.mix import Mixture, mix
from train.data.pack import Rows
from train.data.roles import is_task
from train.data.sources import Source, TokenSource, open_source, parse_mixture
from train.data.tokenize import tokenize
from train.data.vocabulary import choose_tokenizer
from train.group import ALONE, Group
from train.objectives import bare, extra_tokens, make_objective
from train.objectives.objective import (
  Batch,
  Objective,
  Pieces,
  Side,
  TaskObjective,
  empty_batch,
)

_FORMAT = 2  # Of rows: a run goes on only with the rows that it began with.
_FINER = 4


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run learns from.

  A batch is a dict of arrays (rows, …), of those rows that this process builds, in ascending order:
  see `Objective.sides`. Counts are of the whole corpus, over all processes. A piece's tokens are
  counted without those that the one before it ends with: for causal language models they are the
  targets.
  """

  tokenizer: Tokenizer
  fingerprint: dict[str, Any]  # Plain values: what must be the same for a run to go on.
  rows_per_epoch: int
  tokens_per_epoch: int
  validation_tokens: int
  truncated_tokens: int  # That data.truncate leaves out, in training.
  truncated_documents: int
  dropped_documents: int  # That are too long and were left out, in training.
  num_validation_batches: int
  labels: tuple[str, ...] | None  # Of a corpus that has them, in their order.
  _parts: list[tuple[Corpus, Rows]] = dataclasses.field(repr=False)
  _validation: list[tuple[Corpus, Rows]] = dataclasses.field(repr=False)
  _mixture: Mixture = dataclasses.field(repr=False)
  _config: Config = dataclasses.field(repr=False)
  _objective: Objective = dataclasses.field(repr=False)
  _rows: np.ndarray = dataclasses.field(repr=False)  # int64: which of a batch are built here.

  @property
  def sides(self) -> Mapping[str, Side]:
    """What a batch consists of: see `Objective.sides`."""
    return self._objective.sides

  def batch(self, step: int, rows: np.ndarray | None = None) -> Batch:
    """Rows of the batch of `step`, counted from 0: those that are named, or this process'."""
    source, row = self._mixture.place(self._numbers(step, rows))
    batch = empty_batch(self._objective.sides, len(row))
    for i, (corpus, held) in enumerate(self._parts):
      here = np.flatnonzero(source == i)
      if len(here):
        self._fill(batch, corpus, held, here, row[here])
    return batch

  def batches(self, start: int = 0) -> Iterator[Batch]:
    """Batches of the steps from `start` on, without end, built ahead by threads."""
    import grain  # Not on every machine that runs the train step alone.

    workers = self._config.data.workers
    ahead = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    return iter(grain.MapDataset.range(start, sys.maxsize).map(self.batch).to_iter_dataset(ahead))

  def validation_batches(self, rows: np.ndarray | None = None) -> Iterator[Batch]:
    """Every target of the validation corpus once; empty rows fill the last batch.

    `eval_batches` of the config ends them early. Of each batch come the rows that are named, or
    this process'.
    """
    ends = np.cumsum([len(rows) for _, rows in self._validation])
    for i in range(self.num_validation_batches):
      wanted = self._numbers(i, rows)
      batch = empty_batch(self._objective.sides, len(wanted))
      for (corpus, held), end in zip(self._validation, ends, strict=True):
        here = np.flatnonzero((wanted >= end - len(held)) & (wanted < end))
        if len(here):
          self._fill(batch, corpus, held, here, wanted[here] - (end - len(held)))
      yield batch

  def _fill(
    self, batch: Batch, corpus: Corpus, rows: Rows, places: np.ndarray, wanted: np.ndarray
  ) -> None:
    """Writes the rows `wanted` of one part into the places of a batch."""
    cuts = rows.cuts(wanted)
    starts = corpus.starts[cuts.document] + cuts.begin
    pieces = Pieces(
      corpus, places[cuts.which], cuts.document, starts, cuts.length, cuts.salt,
      lambda i: rows.chance(cuts, i),
    )  # fmt: skip
    self._objective.fill(batch, pieces)

  def first(self) -> Batch:
    """One row that a person can be shown: of the validation corpus, or of the first batch."""
    one = np.zeros(1, np.int64)
    return next(iter(self.validation_batches(one)), None) or self.batch(0, one)

  def _numbers(self, step: int, rows: np.ndarray | None) -> np.ndarray:
    """Numbers of rows of a batch, counted on over all batches."""
    return step * self._config.batch_size + (self._rows if rows is None else rows)


def load_data(
  config: Config, *, workdir: Path | None = None, rows: np.ndarray | None = None,
  group: Group = ALONE,
) -> Data:  # fmt: skip
  """Reads, tokenizes and splits what `config.data` names.

  Args:
    workdir: where the tokenizer is kept, and taken from when it is there; None: nowhere.
    rows: which rows of each batch this process builds, int64, ascending; None: all.
    group: the processes of the run; process 0 alone writes into `workdir`.

  Raises:
    InputError: for a source or tokenizer that does not exist, is damaged, empty or does not fit.
  """
  cache = Cache(Path(config.cache_dir) / "data", config.cache_gib * 2**30)
  mixture = parse_mixture(config.data.source)
  task = is_task(config)
  sources = open_training(config) if task else _text_sources(config.data.source, config)
  held_out = (
    open_validation(config) if task else _text_sources(config.data.validation_source, config)
  )
  texts = [s.texts() if isinstance(s, ExampleSource) else s for s in sources]
  with group.turn("the tokenizer"):
    tokenizer = choose_tokenizer(
      config.data.tokenizer, texts, cache, workdir, write=group.index == 0,
      extra=extra_tokens(config), chat_template=config.data.chat_template,
    )  # fmt: skip
  group.at("reading the data", patient=True)
  read = lambda source: _read(source, tokenizer, cache)
  training = [read(source) for source in sources]
  validation = [read(source) for source in held_out]
  if not held_out:
    split = [split_validation(corpus, config.data.validation_fraction) for corpus in training]
    training = [corpus for corpus, _ in split]
    validation = [corpus for _, corpus in split if corpus is not None]
  labels = config.data.labels
  if task and any(
    corpus.columns["label"].names for corpus in training if "label" in corpus.columns
  ):
    labels = label_order(training) if labels is None else labels
    training, validation = (
      [with_order(c, labels) for c in part] for part in (training, validation)
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, labels=labels))
  return _assemble(
    config, tokenizer, training, validation, [weight for weight, _ in mixture],
    _fingerprint(tokenizer, sources, held_out),
    np.arange(config.batch_size, dtype=np.int64) if rows is None else rows,
  )  # fmt: skip


def _assemble(
  config: Config, tokenizer: Tokenizer, training: list[Corpus], validation: list[Corpus],
  weights: list[float], fingerprint: dict[str, Any], rows: np.ndarray,
) -> Data:  # fmt: skip
  objective = make_objective(config, tokenizer)
  if bare(config):  # Pieces get the template's special tokens when they are made.
    training = [corpus.without(*tokenizer.affixes) for corpus in training]
    validation = [corpus.without(*tokenizer.affixes) for corpus in validation]
  steps = lambda corpus: np.maximum(corpus.sizes - objective.overlap, 0)
  fitted = [_fitted(objective, corpus, cut=config.data.truncate) for corpus in training]
  kept = [one.corpus for one in fitted]
  if isinstance(objective, TaskObjective):
    validation = [_fitted(objective, c, cut=config.data.truncate).corpus for c in validation]
  _check_enough(config, objective, kept, validation)
  parts = [(c, make_rows(objective, c, config.data.packing, config.seed)) for c in kept]
  validation_parts = [(c, make_rows(objective, c, config.data.packing, None)) for c in validation]
  batches = -(-sum(len(rows) for _, rows in validation_parts) // config.batch_size)
  return Data(
    tokenizer=tokenizer,
    fingerprint=fingerprint,
    rows_per_epoch=sum(len(rows) for _, rows in parts),
    tokens_per_epoch=sum(int(steps(c).sum()) for c in kept),
    validation_tokens=sum(int(steps(c).sum()) for c in validation),
    truncated_tokens=sum(one.truncated_tokens for one in fitted),
    truncated_documents=sum(one.truncated_documents for one in fitted),
    dropped_documents=sum(one.dropped_documents for one in fitted),
    num_validation_batches=batches
    if config.eval_batches is None
    else min(batches, config.eval_batches),
    labels=config.data.labels,
    _parts=parts,
    _validation=validation_parts,
    _mixture=mix(weights),
    _config=config,
    _objective=objective,
    _rows=rows,
  )


def _fitted(objective: Objective, corpus: Corpus, *, cut: bool) -> Fitted:
  """Documents as rows have room for them, and what was cut off."""
  if isinstance(objective, TaskObjective):
    return objective.fit(corpus)
  if not cut or objective.whole is None:
    return Fitted(corpus)
  kept = corpus.limited(objective.whole)
  less = corpus.lengths - kept.lengths
  return Fitted(kept, int(less.sum()), int((less > 0).sum()))


def make_rows(objective: Objective, corpus: Corpus, packing: bool, seed: int | None) -> Rows:
  """The rows of a corpus: pieces take the room that they need on the side where it is scarcest."""
  lengths = {name: side.length for name, side in objective.sides.items()}
  # Finer than the places of a side, where sides differ and shares of a row must be compared.
  capacity = max(lengths.values()) * (1 if len(set(lengths.values())) == 1 else _FINER)

  def room(documents: np.ndarray, size: np.ndarray, salts: np.ndarray) -> np.ndarray:
    taken = objective.room(corpus, documents, size, salts)
    shares = [-(-taken[name] * capacity // length) for name, length in lengths.items()]
    return np.maximum(np.max(shares, axis=0), 1)

  return Rows(
    corpus.starts, corpus.lengths, whole=objective.whole, overlap=objective.overlap, room=room,
    capacity=capacity, packing=packing, moves=objective.moves, seed=seed,
  )  # fmt: skip


def _check_enough(
  config: Config, objective: Objective, training: list[Corpus], held_out: list[Corpus]
) -> None:
  own = config.data.validation_source
  after = "" if own else " after the validation part is taken off"
  for name, found in ((config.data.source, training), (own or config.data.source, held_out)):
    if not all((corpus.lengths > objective.overlap).any() for corpus in found):
      wanted = "two tokens in a row" if objective.overlap else "a document"
      raise InputError(f"{name!r} is too small: each of its parts must hold {wanted}{after}.")
  single = sum(int((corpus.lengths <= objective.overlap).sum()) for corpus in training)
  if single:
    logging.warning("%d documents of a single token hold nothing to predict.", single)


def _text_sources(spec: str | None, config: Config) -> list[Source]:
  return [] if spec is None else [open_source(part, config.data) for _, part in parse_mixture(spec)]


def _read(source: Source | ExampleSource, tokenizer: Tokenizer, cache: Cache) -> Corpus:
  if isinstance(source, ExampleSource):
    return read_examples(source, tokenizer, cache)
  if isinstance(source, TokenSource):
    return read_arrays(source, tokenizer.vocab_size, cache)
  return tokenize(source, tokenizer, cache)


def _fingerprint(
  tokenizer: Tokenizer, sources: Sequence[Source | ExampleSource],
  held_out: Sequence[Source | ExampleSource],
) -> dict[str, Any]:  # fmt: skip
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
