"""Sources: each document as it is written, and each mistake named with its file."""

import gzip
import json
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from model.errors import InputError
from tests.train.objectives import tasks
from train.config import DOCUMENTS, DataConfig
from train.data.arrays import Corpus, read_arrays, split_validation
from train.data.cache import Cache
from train.data.pipeline import load_data
from train.data.sources import TokenSource, open_source, parse_mixture

TEXTS = ["one\r\ntwo", 'a "quoted", thing', "日本語", "last"]


def _read(spec, **fields) -> list[str]:
  return list(open_source(str(spec), DataConfig(**fields)).documents())


def test_a_text_file_is_one_document_or_paragraphs_or_lines(tmp_path):
  text = "\ufefffirst line \r\nsecond\n\n \n  third: é\nfourth\n\n\n"
  (tmp_path / "b.txt").write_text(text, newline="")
  (tmp_path / "a.md").write_text("alone", newline="")
  assert _read(tmp_path / "b.txt") == [text[1:]]
  assert _read(tmp_path / "*.*") == ["alone", text[1:]]
  assert _read(tmp_path / "b.txt", documents="line") == [
    "first line ", "second", "  third: é", "fourth",
  ]  # fmt: skip
  assert _read(tmp_path / "b.txt", documents="paragraph") == [
    "first line \r\nsecond", "  third: é\nfourth",
  ]  # fmt: skip


def test_every_kind_of_table_gives_the_same_column(tmp_path):
  (tmp_path / "t.jsonl").write_text(
    "".join(json.dumps({"n": i, "text": t}) + "\n" for i, t in enumerate(TEXTS))
  )
  quoted = "".join(f'{i},"{t.replace(chr(34), chr(34) * 2)}"\r\n' for i, t in enumerate(TEXTS))
  (tmp_path / "t.csv").write_text("n,text\r\n" + quoted, newline="")
  (tmp_path / "bare.csv").write_text(quoted, newline="")
  parquet.write_table(
    pyarrow.table({"n": list(range(4)), "text": TEXTS}), tmp_path / "t.parquet", row_group_size=3
  )
  for name in ("t.jsonl", "t.csv", "t.parquet"):
    assert _read(tmp_path / name) == TEXTS, name
  assert _read(tmp_path / "bare.csv", text="1") == TEXTS
  (tmp_path / "t.tsv").write_text('text\tn\n"half a quote\t1\nplain"\t2\n')
  assert _read(tmp_path / "t.tsv") == ['"half a quote', 'plain"']


def test_the_standard_library_is_read_without_packages_and_tests(tmp_path, monkeypatch):
  files = {
    "b.py": b"b = 1\n", "a/z.py": b"z = 2\n", "site-packages/x.py": b"no", "test/t.py": b"no",
    "lib2to3/tests/data.py": b"no", "idlelib/idle_test/t.py": b"no", "odd.py": b"\xff\xfe",
    "empty.py": b"", "__pycache__/c.py": b"no",
  }  # fmt: skip
  for name, data in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(data)
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
  source = open_source("python_stdlib", DataConfig())
  assert list(source.documents()) == ["z = 2\n", "b = 1\n", ""]
  (tmp_path / "b.py").write_bytes(b"b = 1\n\nc = 1\nd = 1\n")
  assert _read("python_stdlib", documents="paragraph") == ["z = 2", "b = 1", "c = 1\nd = 1"]
  assert _read("python_stdlib", documents="line") == ["z = 2", "b = 1", "c = 1", "d = 1"]
  prints = {open_source("python_stdlib", DataConfig(documents=d)).fingerprint for d in DOCUMENTS}
  assert len(prints) == 3
  (tmp_path / "b.py").write_bytes(b"b = 2\n")
  assert open_source("python_stdlib", DataConfig()).fingerprint != source.fingerprint


def test_fingerprints_follow_content_and_options_not_names(tmp_path):
  (tmp_path / "a.txt").write_text("same")
  (tmp_path / "b.txt").write_text("same")
  of = lambda name, **fields: open_source(str(tmp_path / name), DataConfig(**fields)).fingerprint
  assert of("a.txt") == of("b.txt")
  assert of("a.txt") != of("a.txt", documents="line")
  (tmp_path / "b.txt").write_text("other")
  assert of("a.txt") != of("b.txt")


def test_token_arrays_are_read_as_they_are(tmp_path):
  ids = np.arange(1, 31, dtype=np.int64)
  np.save(tmp_path / "one.npy", ids)
  np.save(tmp_path / "rows.npy", ids.reshape(3, 10).astype(np.uint16))
  ids.astype("<u2").tofile(tmp_path / "n.bin")
  cache = Cache(tmp_path / "cache", 1e9)
  read = lambda name: read_arrays(open_source(str(tmp_path / name), DataConfig()), 31, cache)
  assert isinstance(open_source(str(tmp_path / "n.bin"), DataConfig()), TokenSource)
  for name, documents in (("one.npy", 1), ("n.bin", 1), ("rows.npy", 3), ("*.npy", 4)):
    corpus = read(name)
    assert len(corpus.lengths) == documents
    assert (np.asarray(corpus.tokens) == np.tile(ids, 2 if "*" in name else 1)).all()
    assert corpus.lengths.sum() == len(corpus.tokens)
  with pytest.raises(InputError, match=r"n.bin holds the id 30, the vocabulary has 30"):
    read_arrays(open_source(str(tmp_path / "n.bin"), DataConfig()), 30, cache)


def test_validation_is_the_end_of_the_tokens_at_the_nearest_boundary():
  split = lambda lengths, fraction: [
    part.lengths.tolist()
    for part in split_validation(
      Corpus(np.zeros(0), np.cumsum(lengths) - lengths, np.array(lengths)), fraction
    )
  ]
  assert split([1_115_394], 0.1) == [[1_003_854], [111_540]]
  assert split([10, 10, 10, 10], 0.3) == [[10, 10, 10], [10]]
  assert split([10, 1, 80, 9], 0.5) == [[10, 1], [80, 9]]
  assert split([90, 10], 0.9) == [[90], [10]]
  assert split([10, 90], 0.01) == [[10], [90]]


def test_mixtures_are_parsed_with_weights_slices_and_globs():
  assert parse_mixture("0.7*a.txt, 0.3*tfds:b[train[:10%]]") == [
    (0.7, "a.txt"), (0.3, "tfds:b[train[:10%]]"),
  ]  # fmt: skip
  assert parse_mixture("a,b*.txt") == [(1.0, "a,b*.txt")]
  for wrong in ("0.7*a,b", "0*a,1*b", "1.2.3*a,1*b"):
    with pytest.raises(InputError, match="no positive weight"):
      parse_mixture(wrong)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
  """Two TFDS data sets: one as ArrayRecord, and a copy that claims another format."""
  import os

  os.environ["NO_GCE_CHECK"] = "true"
  import tensorflow_datasets as tfds

  class Poems(tfds.core.GeneratorBasedBuilder):
    __module__ = "poems"  # In a package, TFDS would import importlib_resources, unasked for.
    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en"), tfds.core.BuilderConfig(name="fr")]  # noqa: RUF012

    def _info(self):
      mood = tfds.features.ClassLabel(names=["sad", "glad"])
      features = {"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int64), "mood": mood}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(40), "validation": self._generate_examples(5)}

    def _generate_examples(self, count):
      for i in range(count):
        mood = -1 if count == 5 else i % 2  # -1: nobody has said.
        yield i, {"text": f"{self.builder_config.name} poème {i}", "n": i, "mood": mood}

  root = tmp_path_factory.mktemp("tfds")
  for name in ("en", "fr"):
    builder = Poems(data_dir=str(root), config=name, file_format="array_record")
    builder.download_and_prepare()
  info = root / "poems" / "fr" / "1.2.0" / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  return root


def test_tfds_is_read_without_tensorflow(prepared):
  read = lambda spec: _read(spec, data_dir=str(prepared))
  every = read("tfds:poems/en:1.2.0")
  assert sorted(every) == sorted(f"en poème {i}" for i in range(40))
  assert read("tfds:poems/en[train[10%:20%]]") == every[4:8]
  assert len(read("tfds:poems/en[validation]")) == 5
  assert "tensorflow" not in sys.modules
  of = lambda spec: open_source(spec, DataConfig(data_dir=str(prepared))).fingerprint
  assert of("tfds:poems/en:1.2.0") == of("tfds:poems/en[train]") != of("tfds:poems/en[validation]")


def test_tfds_features_are_the_columns_of_a_task(prepared, tmp_path):
  where = dict(data_dir=str(prepared), label="mood", batch_size=40, packing=False, steps=2)
  task = lambda split: tasks.config(
    tmp_path, "classification", source=f"tfds:poems/en[{split}]", **where
  )  # fmt: skip
  data = load_data(task("train"))
  assert data.labels == ("glad", "sad")
  batch = data.batch(0)
  for tokens, label in zip(batch["tokens"], batch["text_labels"][:, 0], strict=True):
    number = int(data.tokenizer.decode(tokens.tolist()).rstrip("\0").split()[-1])
    assert data.labels[label] == ("sad", "glad")[number % 2]
  with pytest.raises(InputError, match="has no label \\(-1\\)"):
    load_data(task("validation"))


def test_wrong_tfds_specs_are_named(prepared):
  cases = {
    "tfds:poems": "several configs: name one of en, fr",
    "tfds:poems/en:1.0.0": "in versions 1.2.0",
    "tfds:nothing": "not prepared in",
    "tfds:poems/en[foo]": "Unknown split",
    "tfds:poems/fr": "prepared as tfrecord",
    "tfds:a b[": "write tfds:NAME",
  }
  for spec, words in cases.items():
    with pytest.raises(InputError, match=words):
      open_source(spec, DataConfig(data_dir=str(prepared)))
  for column, words in (("txt", "Did you mean 'text'"), ("n", "is not text")):
    with pytest.raises(InputError, match=words):
      open_source("tfds:poems/en", DataConfig(data_dir=str(prepared), text=column))


def test_wrong_files_are_named_with_the_place(tmp_path):
  write = lambda name, data: (tmp_path / name).write_bytes(data)
  write("bad.txt", b"good\n\xff\xfe")
  write("zip.txt", gzip.compress(b"text"))
  write("bad.jsonl", b'{"text": "a"}\n{"text": ')
  write("none.jsonl", b'{"text": "a"}\n{"body": "b"}')
  write("number.jsonl", b'{"text": 3}')
  write("none.csv", b"a,b\n1,2\n")
  write("short.tsv", b"a\tb\nc\n")
  write("bad.parquet", b"PAR1 no")
  write("odd.bin", b"123")
  write("empty.bin", b"")
  write("bad.npy", b"no")
  np.save(tmp_path / "float.npy", np.zeros(3))
  np.save(tmp_path / "negative.npy", np.array([3, -1]))
  cases = [
    ("nothing.txt", {}, "does not exist"),
    ("*.nothing", {}, "no file matches"),
    ("", {}, "is a folder"),
    ("bad.txt", {}, "bad.txt is not UTF-8 text: byte 5"),
    ("bad.txt", {"documents": "line"}, "bad.txt is not UTF-8"),
    ("zip.txt", {}, "zip.txt is not UTF-8"),
    ("bad.jsonl", {}, "bad.jsonl, line 2 is not JSON"),
    ("none.jsonl", {}, r"none.jsonl, line 2 has no column 'text'.*\(body\)"),
    ("number.jsonl", {}, "line 1: column 'text' holds int"),
    ("none.csv", {}, r"none.csv has no column 'text'.*\(a, b\)"),
    ("short.tsv", {"text": "1"}, "short.tsv, line 2 has 1 columns"),
    ("bad.parquet", {}, "bad.parquet is not a Parquet file"),
    ("odd.bin", {}, "odd.bin has an odd number"),
    ("empty.bin", {}, "empty.bin holds no tokens"),
    ("bad.npy", {}, "bad.npy is not a NumPy array"),
    ("float.npy", {}, "float.npy holds 1-dimensional float64"),
    ("negative.npy", {}, "negative.npy holds the id -1"),
    ("*.[nt][px][yt]", {}, "mixes token arrays with text"),
  ]
  cache = Cache(tmp_path / "cache", 1e9)
  for name, fields, words in cases:
    with pytest.raises(InputError, match=words):
      source = open_source(str(tmp_path / name), DataConfig(**fields))
      if isinstance(source, TokenSource):
        read_arrays(source, 50, cache)
      else:
        list(source.documents())
