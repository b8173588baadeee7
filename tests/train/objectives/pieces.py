"""Documents to batches and back, for the tests of objectives that teach a decoder to write."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.vocabulary import build_tokenizer
from train.config import Config, DataConfig, ObjectiveConfig
from train.data.arrays import Corpus
from train.data.pipeline import make_rows
from train.objectives import extra_tokens, make_objective
from train.objectives.objective import Objective, Pieces, empty_batch

MODEL = ModelConfig(
  shape="encoder_decoder", num_layers=2, d_model=16, d_ff=32, num_heads=2, max_positions=None,
  positions="t5_bias", norm="rms", vocab_multiple=8, relative_buckets=8, relative_max_distance=20,
)  # fmt: skip
KINDS = (  # Every objective here with every shape that it trains.
  ("span_corruption", "encoder_decoder"), ("prefix_lm", "encoder_decoder"),
  ("prefix_lm", "decoder"), ("denoising", "encoder_decoder"), ("ul2", "encoder_decoder"),
  ("ul2", "decoder"),
)  # fmt: skip


def config(name: str, shape: str, seq_len: int = 48, target_len: int = 40, **settings) -> Config:
  """A config; settings of DataConfig and Config go where they belong, others to the objective."""
  own = {f.name for f in dataclasses.fields(Config)}
  data = {f.name for f in dataclasses.fields(DataConfig)}
  take = lambda names: {k: v for k, v in settings.items() if k in names}
  objective = {k: v for k, v in settings.items() if k not in own | data}
  return Config(
    **dict(batch_size=4, seq_len=seq_len) | take(own),
    target_len=target_len if shape == "encoder_decoder" else None,
    model=dataclasses.replace(MODEL, shape=shape),
    objective=ObjectiveConfig(name=name, **objective),
    data=DataConfig(**dict(tokenizer="bytes") | take(data)),
  )


def tokenizer_of(one: Config) -> Tokenizer:
  return build_tokenizer("bytes", None, (), extra_tokens(one))


def corpus_of(documents: Sequence[Sequence[int]]) -> Corpus:
  lengths = np.array([len(d) for d in documents], np.int64)
  tokens = np.concatenate([np.array(d, np.int64) for d in documents])
  return Corpus(tokens, np.cumsum(lengths) - lengths, lengths)


@dataclasses.dataclass(frozen=True)
class Made:
  """One piece: where it comes from, and its arrays, read from a batch."""

  document: int
  begin: int
  length: int
  arrays: dict[str, np.ndarray]


def make(objective: Objective, corpus: Corpus, seed: int | None, epoch: int = 0) -> Iterator[Made]:
  """All pieces of an epoch as they lie in its rows; what is not there is checked to be empty."""
  rows = make_rows(objective, corpus, True, seed)
  wanted = np.arange(len(rows)) + epoch * len(rows)
  cuts = rows.cuts(wanted)
  batch = empty_batch(objective.sides, len(rows))
  objective.fill(batch, Pieces(
    corpus, cuts.which, cuts.document, corpus.starts[cuts.document] + cuts.begin, cuts.length,
    cuts.salt, lambda i: rows.chance(cuts, i),
  ))  # fmt: skip
  first = np.flatnonzero(np.diff(cuts.which, prepend=-1))
  number = np.arange(len(cuts.which)) - np.repeat(first, np.diff(first, append=len(cuts.which)))
  for i, row in enumerate(cuts.which):
    arrays = {k: v[row] for k, v in batch.items()}
    of_piece = segment(arrays, number[i] + 1)
    yield Made(int(cuts.document[i]), int(cuts.begin[i]), int(cuts.length[i]), of_piece)
  for side in ("", "decoder_"):
    if f"{side}segments" in batch:
      assert (batch[f"{side}segments"].max(1) == np.bincount(cuts.which)).all()
      assert ((batch[f"{side}positions"] < 0) == (batch[f"{side}segments"] == 0)).all()


def segment(row: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
  """The fields of one segment of a row."""
  found = {}
  for name, array in row.items():
    side = "decoder_" if name.startswith("decoder_") else ""
    found[name] = array[row[f"{side}segments"] == number]
  return found


def parts_of(objective, piece: Made) -> tuple[list[int], list[int]]:
  """(what is read, what is written), without the template's special tokens; those are checked."""
  arrays = piece.arrays
  if "decoder_tokens" not in arrays:
    whole = [*arrays["tokens"].tolist(), int(arrays["targets"][-1])]
    assert whole[1:] == arrays["targets"].tolist()
    prefix = int(arrays["prefix"].sum())
    assert arrays["prefix"].tolist() == [i < prefix for i in range(len(whole) - 1)]
    assert arrays["weights"].tolist() == [float(i >= prefix - 1) for i in range(len(whole) - 1)]
    read, written = whole[:prefix], whole[prefix:]
    if objective.config.name == "prefix_lm":
      return read, written
    begin, end = list(objective.ends.begin), list(objective.ends.end)
    assert read[: len(begin)] == begin and written[-len(end) :] == end
    return read[len(begin) :], written[: -len(end)]
  begin, end = list(objective.ends.begin), list(objective.ends.end)
  read, written = arrays["tokens"].tolist(), arrays["decoder_targets"].tolist()
  assert arrays["decoder_tokens"].tolist() == [objective.ends.start, *written[:-1]]
  assert (arrays["decoder_weights"] == 1).all()
  assert read[: len(begin)] == begin and read[-len(end) :] == end == written[-len(end) :]
  if objective.config.name == "denoising":
    assert written[: len(begin)] == begin
    written = written[len(begin) :]
  return read[len(begin) : -len(end)], written[: -len(end)]


def refilled(read: list[int], written: list[int], sentinels: tuple[int, ...]) -> list[int]:
  """The text of which spans were taken out: sentinels must come in order and match."""
  found, out, order = {}, [], []
  for token in written:
    if token in sentinels:
      order.append(token)
      found[token] = []
    else:
      found[order[-1]].append(token)
  assert order == list(sentinels[: len(order)]) == [t for t in read if t in sentinels]
  assert all(found.values())  # No span is empty.
  for token in read:
    out.extend(found.get(token, [token]))
  return out


def objective_of(one: Config) -> tuple[Objective, Tokenizer]:
  tokenizer = tokenizer_of(one)
  return make_objective(one, tokenizer), tokenizer
