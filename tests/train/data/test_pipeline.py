"""Batches: functions of the seed and the step, whoever builds them, that lose no token."""

import dataclasses
import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from model.errors import InputError
from model.tokenizer import Tokenizer
from model.vocabulary import build_tokenizer
from train.config import Config, DataConfig
from train.data.pipeline import Data, load_data

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def corpus(tmp_path) -> Path:
  """60 documents, from nothing to several rows long, each written in letters of its own."""
  rng = np.random.default_rng(0)
  for i in range(60):
    letters = rng.integers(0, 26, rng.integers(0, 90) if i % 9 else 400) + ord("a")
    (tmp_path / f"{i:02}.txt").write_bytes(bytes(letters.astype(np.uint8)))
  return tmp_path


def _config(corpus: Path, **fields) -> Config:
  names = {f.name for f in dataclasses.fields(DataConfig)}
  data = {k: v for k, v in fields.items() if k in names}
  rest = {k: v for k, v in fields.items() if k not in names}
  data = {"source": str(corpus / "*.txt"), "tokenizer": "bytes", "validation_fraction": 0.2} | data
  defaults = dict(batch_size=4, seq_len=48, seed=1, cache_dir=str(corpus / "cache"))
  return Config(**(defaults | rest), data=DataConfig(**data))


def _equal(a, b) -> bool:
  return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def _epoch(data: Data, epoch: int) -> list[dict[str, np.ndarray]]:
  """The rows of an epoch, one by one, of data with batch_size=1."""
  n = data.rows_per_epoch
  return [data.batch(step) for step in range(epoch * n, (epoch + 1) * n)]


def _pairs(batches) -> Counter:
  """How often each (token, next token, …) is predicted: whole segments, so that order counts."""
  found = Counter()
  for batch in batches:
    for row in range(len(batch["tokens"])):
      for segment in range(1, batch["segments"][row].max() + 1):
        here = batch["segments"][row] == segment
        assert (batch["weights"][row][here] == 1).all()
        assert (batch["positions"][row][here] == np.arange(here.sum())).all()
        tokens, targets = batch["tokens"][row][here], batch["targets"][row][here]
        assert (tokens[1:] == targets[:-1]).all()
        found.update(zip(tokens.tolist(), targets.tolist(), strict=True))
      empty = batch["segments"][row] == 0
      assert (batch["weights"][row][empty] == 0).all()
      assert (batch["positions"][row][empty] == -1).all()
      assert not (np.diff(np.where(empty, 10**6, batch["segments"][row])) < 0).any()
  return found


def _expected(texts) -> Counter:
  ids = [[257, *text, 258] for text in texts]
  return Counter(pair for one in ids for pair in itertools.pairwise(one))


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_and_the_validation_set_hold_each_pair_of_the_corpus_once(corpus, packing):
  texts = [t for f in sorted(corpus.glob("*.txt")) if (t := f.read_bytes())]
  data = load_data(_config(corpus, batch_size=1, packing=packing))
  epochs = [_pairs(_epoch(data, epoch)) for epoch in range(2)]
  assert epochs[0] == epochs[1]
  assert epochs[0].total() == data.tokens_per_epoch
  validation = _pairs(data.validation_batches())
  assert validation.total() == data.validation_tokens
  assert epochs[0] + validation == _expected(texts)
  cut = next(i for i in range(len(texts)) if validation == _expected(texts[i:]))
  sizes = np.cumsum([len(t) + 2 for t in texts])
  assert abs(sizes[cut - 1] - 0.8 * sizes[-1]) == abs(sizes - 0.8 * sizes[-1]).min()
  assert not _equal(data.batch(0), data.batch(data.rows_per_epoch))


def test_batches_can_start_at_any_step_and_do_not_depend_on_workers(corpus):
  one, four = (load_data(_config(corpus, workers=n)) for n in (1, 4))
  wanted = [one.batch(step) for step in range(60)]  # Several epochs.
  assert 2 * one.rows_per_epoch < 60 * 4
  for data, start in itertools.product((one, four), (0, 1, 17)):
    got = list(itertools.islice(data.batches(start), 60 - start))
    assert all(_equal(a, b) for a, b in zip(got, wanted[start:], strict=True))
  assert not _equal(load_data(_config(corpus, seed=2)).batch(0), wanted[0])


@pytest.mark.parametrize("source", ["{0}/*.txt", "0.6*{0}/0*.txt,0.4*{0}/1*.txt"])
def test_hosts_build_their_parts_of_the_same_batches(corpus, source):
  config = _config(corpus, batch_size=8, source=source.format(corpus))
  alone = load_data(config)
  held = [np.array(rows) for rows in ([0, 5], [1, 2, 3], [4], [6, 7])]
  order = np.argsort(np.concatenate(held))
  hosts = [load_data(config, rows=rows) for rows in held]
  join = lambda parts: {k: np.concatenate([p[k] for p in parts])[order] for k in parts[0]}
  for step in (0, 5, 30):
    assert _equal(join([h.batch(step) for h in hosts]), alone.batch(step))
  for parts in zip(
    alone.validation_batches(), *(h.validation_batches() for h in hosts), strict=True
  ):
    assert _equal(join(parts[1:]), parts[0])
    assert parts[0]["tokens"].shape == (8, 48)
  assert all(h.fingerprint == alone.fingerprint for h in hosts)


def test_a_mixture_keeps_its_weights_and_repeats_each_part_whole(corpus):
  first, second = corpus / "0*.txt", corpus / "1*.txt"
  data = load_data(_config(corpus, batch_size=1, source=f"0.25*{first},0.75*{second}"))
  alone = [load_data(_config(corpus, batch_size=1, source=str(s))) for s in (first, second)]
  rows = [[b["tokens"].tobytes() for b in (d.batch(s) for s in range(300))] for d in alone]
  taken = [0, 0]
  for step in range(400):
    tokens = data.batch(step)["tokens"].tobytes()
    which = 0 if tokens == rows[0][taken[0]] else 1
    assert tokens == rows[which][taken[which]]
    taken[which] += 1
    assert abs(taken[0] - 0.25 * (step + 1)) <= 1
  assert taken == [100, 300]


def test_truncation_is_on_request_and_counted(corpus):
  cut = load_data(_config(corpus, truncate=True))
  whole = load_data(_config(corpus))
  assert whole.truncated_tokens == whole.truncated_documents == 0
  assert cut.truncated_tokens == whole.tokens_per_epoch - cut.tokens_per_epoch > 0
  assert 0 < cut.truncated_documents < 60
  assert cut.validation_tokens == whole.validation_tokens


def test_validation_of_its_own_takes_nothing_from_training(corpus):
  data = load_data(_config(corpus, source=f"{corpus}/0*.txt", validation_source=f"{corpus}/1*.txt"))
  none = load_data(_config(corpus, source=f"{corpus}/0*.txt", validation_fraction=0.0))
  assert data.tokens_per_epoch == none.tokens_per_epoch
  assert data.validation_tokens > 0
  assert none.num_validation_batches == 0 and list(none.validation_batches()) == []
  few = load_data(_config(corpus, eval_batches=1))
  assert len(list(few.validation_batches())) == few.num_validation_batches == 1


def test_tinyshakespeare_trains_on_1003854_characters(tmp_path):
  file = SHARED / "tinyshakespeare" / "input.txt"
  if not file.is_file():
    pytest.skip(f"{file} is not there")
  data = load_data(
    _config(tmp_path, source=str(file), tokenizer="char", validation_fraction=0.1, seq_len=256)
  )
  assert data.tokenizer.vocab_size == 65
  assert data.tokens_per_epoch == 1_003_854 - 1  # The last character has no next one.
  assert data.validation_tokens == 111_540 - 1
  begin = data.tokenizer.decode(next(iter(data.validation_batches()))["tokens"][0])
  assert file.read_text()[1_003_854:].startswith(begin)


def test_the_workdir_keeps_the_tokenizer_and_a_resumed_run_uses_it(corpus, tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  config = _config(corpus, tokenizer="bpe:300")
  first = load_data(config, workdir=workdir)
  assert Tokenizer.load(workdir / "tokenizer").fingerprint == first.tokenizer.fingerprint
  moved = dataclasses.replace(config, cache_dir=str(tmp_path / "another"))
  again = load_data(moved, workdir=workdir)
  assert again.fingerprint == first.fingerprint
  assert _equal(again.batch(3), first.batch(3))
  with pytest.raises(InputError, match="built as 'bpe:300'"):
    load_data(_config(corpus, tokenizer="bpe:301"), workdir=workdir)
  path = load_data(_config(corpus, tokenizer=str(workdir / "tokenizer")))
  assert path.fingerprint["tokenizer"] == first.fingerprint["tokenizer"]


def test_fingerprints_tell_corpora_apart(corpus):
  before = load_data(_config(corpus)).fingerprint
  (corpus / "05.txt").write_text("something else")
  after = load_data(_config(corpus)).fingerprint
  assert {k for k in before if before[k] != after[k]} == {"corpus"}


def test_token_arrays_train_with_a_tokenizer_that_fits(corpus):
  np.save(corpus / "ids.npy", np.arange(250))
  data = load_data(_config(corpus, source=str(corpus / "ids.npy"), batch_size=1))
  assert _pairs(_epoch(data, 0)) == Counter(itertools.pairwise(range(200)))
  with pytest.raises(InputError, match="trained on text"):
    load_data(_config(corpus, source=str(corpus / "ids.npy"), tokenizer="bpe:300"))


def test_wrong_input_is_one_named_error(corpus):
  (corpus / "empty.md").write_text("")
  (corpus / "tiny.md").write_text("a")
  (corpus / "other.md").write_text("Ü" * 50)
  cases = [
    (dict(source=f"{corpus}/empty.md"), "empty.md' holds no text"),
    (dict(source=f"{corpus}/empty.md", tokenizer="char"), "corpus is empty"),
    (dict(source=f"{corpus}/tiny.md", tokenizer="char"), "too small"),
    (dict(source=f"{corpus}/none.md"), "does not exist"),
    (dict(tokenizer="nothing/here"), "neither a file or folder nor one of bytes"),
    (dict(tokenizer="bpe"), "bpe:N"),
    (dict(tokenizer="char", validation_source=f"{corpus}/other.md"), "no character 'Ü'"),
  ]
  for fields, words in cases:
    with pytest.raises(InputError, match=words):
      load_data(_config(corpus, **fields))


def test_the_commands_train_a_tokenizer_and_show_a_batch(corpus, tmp_path):
  run = lambda *args: subprocess.run(
    [sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True, check=False,
    env=os.environ | {"HOME": str(tmp_path)},
  )  # fmt: skip
  target = tmp_path / "tokenizer"
  done = run("train.tokenizer", "--input=~/0*.txt", f"--input={corpus}/1*.txt", "--kind=bpe",
             "--vocab_size=280", "--target=~/tokenizer")  # fmt: skip
  assert (done.returncode, done.stdout) == (0, f"bpe tokenizer of 280 entries in {target}\n")
  assert Tokenizer.load(target).vocab_size == 280
  wrong = run(
    "train.tokenizer", f"--input={corpus}/none", "--vocab_size=280", f"--target={target}2"
  )
  assert wrong.returncode == 2
  assert wrong.stderr.splitlines()[-1].startswith("error: ")
  file = tmp_path / "config.py"
  file.write_text(
    "from train.config import Config, DataConfig\n\n\ndef get_config() -> Config:\n"
    f"  return Config(batch_size=2, seq_len=48, cache_dir={str(corpus / 'cache')!r},\n"
    f"    data=DataConfig(source={str(corpus / '*.txt')!r}, tokenizer='bytes'))\n"
  )
  build_tokenizer("bytes", None, []).save(tmp_path / "run" / "tokenizer")
  shown = run("train.inspect", f"--config={file}", "--workdir=~/run", "--step=3", "--tokens=2")
  assert shown.returncode == 0, shown.stderr
  batch = load_data(_config(corpus, batch_size=2, seed=0, validation_fraction=0.05)).batch(3)
  assert f"2 rows of 48 places: {(batch['segments'] > 0).sum()} tokens" in shown.stdout
  first = batch["segments"][0] == 1
  text = "".join(chr(t) if t < 256 else "" for t in batch["tokens"][0][first])
  assert text in shown.stdout
  assert shown.stdout.count("segment ") == batch["segments"].max(1).sum()
