"""Data sets that TensorFlow Datasets has prepared as ArrayRecord, read without TensorFlow."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

from model.errors import InputError, nearest
from train.config import DataConfig
from train.data.sources import TextSource
from train.data.tables import Row, Wanted

_SPEC = re.compile(r"tfds:([^/:\[\]]+)(?:/([^:\[\]]+))?(?::([0-9.]+))?(?:\[(.+)\])?")
_VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+")
_EXAMPLES = 1024  # Read at a time.
_WHOLE, _END = 1 << 30, 1 << 16  # Bytes of a set that is hashed whole; else of each file's ends.


def open_tfds(spec: str, config: DataConfig) -> TextSource:
  """The documents of `tfds:NAME/CONFIG:VERSION[SPLIT]`, in the order of its files.

  Without CONFIG the only one is meant, without VERSION the newest, without SPLIT `train`; SPLIT may
  be a slice such as `train[:10%]`. `data.text` names the feature that holds the text.

  Raises:
    InputError: if it is not there, in a format that needs TensorFlow, or has no such text.
  """
  found = _open(spec, config, {"data.text": config.text}, ())
  from tensorflow_datasets.core import features

  if not isinstance(found.features[config.text], features.Text):
    raise InputError(f"{spec!r}: the feature {config.text!r} is not text.")
  documents = lambda: _documents(spec, found.examples, config.text)
  return TextSource(spec, found.fingerprint, documents)


def open_tfds_rows(
  spec: str, config: DataConfig, wanted: Wanted, optional: Collection[str]
) -> tuple[str, Callable[[], Iterator[Row]]]:
  """(fingerprint, rows) of a data set; features are columns: see `open_tfds`, `tables.read_rows`.

  Classes are given by their names.
  """
  found = _open(spec, config, wanted, optional)
  return found.fingerprint, lambda: _rows(spec, found, wanted)


@dataclasses.dataclass(frozen=True)
class _Found:
  features: Any
  examples: Any
  fingerprint: str


def _open(spec: str, config: DataConfig, wanted: Wanted, optional: Collection[str]) -> _Found:
  match = _SPEC.fullmatch(spec)
  if match is None:
    raise InputError(f"{spec!r}: write tfds:NAME/CONFIG:VERSION[SPLIT].")
  name, variant, version, split = match.groups()
  # Else the library asks a metadata server that only Google's cloud has, and waits.
  os.environ.setdefault("NO_GCE_CHECK", "true")
  import tensorflow_datasets as tfds
  from etils import epath
  from tensorflow_datasets.core import constants, read_only_builder

  root = epath.Path(config.data_dir or constants.DATA_DIR).expanduser()
  folder = _find(spec, root, name, variant, version)
  builder: Any = read_only_builder.builder_from_directory(folder)
  if builder.info.file_format.value != "array_record":
    raise InputError(
      f"{spec!r} in {folder} was prepared as {builder.info.file_format.value}, which only "
      "TensorFlow reads: prepare it again with file_format='array_record'."
    )
  features = builder.info.features
  for field, column in wanted.items():
    if column not in features and field not in optional:
      raise InputError(
        f"{spec!r} has no feature {column!r}: set {field} to one of {', '.join(features)}."
        f"{nearest(column, features)}"
      )
  read = [column for column in wanted.values() if column in features]
  skipped = {n: tfds.decode.SkipDecoding() for n in features if n not in read}
  try:
    examples = builder.as_data_source(split=split or "train", decoders=skipped or None)
  except ValueError as error:
    raise InputError(f"{spec!r}: {error}") from None
  decides = [split or "train", *read, *_content(folder)]
  return _Found(features, examples, hashlib.sha256("\n".join(decides).encode()).hexdigest())


def _rows(spec: str, found: _Found, wanted: Wanted) -> Iterator[Row]:
  features = {c: found.features[c] for c in wanted.values() if c in found.features}
  for start in range(0, len(found.examples), _EXAMPLES):
    stop = min(start + _EXAMPLES, len(found.examples))
    for i, example in enumerate(found.examples.__getitems__(range(start, stop)), start):
      place = f"{spec!r}: example {i}"
      values = (_plain(example.get(c), features.get(c), place) for c in wanted.values())
      yield i, tuple(values)


def _plain(value: Any, feature: Any, place: str) -> Any:
  """What JSON would hold in the place of a decoded feature."""
  if isinstance(value, dict):
    return {k: _plain(v, getattr(feature, "feature", feature)[k], place) for k, v in value.items()}
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError as error:
      raise InputError(f"{place} is not UTF-8 text: {error}.") from None
  if isinstance(value, np.ndarray | list) and np.ndim(value):
    return [_plain(v, getattr(feature, "feature", None), place) for v in value]
  value = value.item() if isinstance(value, np.generic | np.ndarray) else value
  if value is not None and hasattr(feature, "int2str"):
    if value < 0:
      raise InputError(f"{place} has no label ({value}): use a split whose examples have one.")
    return feature.int2str(value)
  return value


def _documents(spec: str, examples: Any, feature: str) -> Iterator[str]:
  for start in range(0, len(examples), _EXAMPLES):
    stop = min(start + _EXAMPLES, len(examples))
    for i, example in enumerate(examples.__getitems__(range(start, stop)), start):
      try:
        yield example[feature].decode("utf-8")
      except UnicodeDecodeError as error:
        raise InputError(f"{spec!r}: example {i} is not UTF-8 text: {error}.") from None


def _find(spec: str, root: Any, name: str, variant: str | None, version: str | None) -> Any:
  folder = root / name
  if variant is None and folder.is_dir() and not _versions(folder):
    variants = sorted(f.name for f in folder.iterdir() if f.is_dir() and _versions(f))
    if len(variants) > 1:
      raise InputError(f"{spec!r} has several configs: name one of {', '.join(variants)}.")
    variant = variants[0] if variants else None
  folder = folder / variant if variant else folder
  versions = _versions(folder) if folder.is_dir() else []
  if not versions or version not in (None, *versions):
    found = f" It has {folder.name} in versions {', '.join(versions)}." if versions else ""
    raise InputError(
      f"{spec!r} is not prepared in {root}.{found} Set data.data_dir to the folder that holds it, "
      "or prepare it with TFDS and file_format='array_record'."
    )
  return folder / (version or versions[-1])


def _versions(folder: Any) -> list[str]:
  """Names of the prepared versions in a folder, oldest first."""
  found = [f.name for f in folder.iterdir() if _VERSION.fullmatch(f.name)]
  prepared = [v for v in found if (folder / v / "dataset_info.json").exists()]
  return sorted(prepared, key=lambda v: tuple(map(int, v.split("."))))


def _content(folder: Any) -> list[str]:
  """What identifies the prepared files: of a large set, descriptions, sizes and ends of files."""
  files = sorted(folder.iterdir(), key=lambda f: f.name)
  sizes = [f.stat().length for f in files]
  return [_line(f, size, whole=sum(sizes) <= _WHOLE) for f, size in zip(files, sizes, strict=True)]


def _line(file: Any, size: int, *, whole: bool) -> str:
  with file.open("rb") as f:
    if whole or size <= 2 * _END:
      digest = hashlib.file_digest(f, "sha256")
    else:
      digest = hashlib.sha256(f.read(_END))
      f.seek(size - _END)
      digest.update(f.read())
  return f"{file.name} {size} {digest.hexdigest()}"
