"""Where text comes from: the standard library's sources, files, TFDS, and mixtures of them."""

import dataclasses
import hashlib
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import logging

from model.errors import InputError
from train.config import DataConfig
from train.data import tables

ARRAYS = (".npy", ".bin")
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class TextSource:
  """Documents of text. Reading `documents()` again gives the same ones in the same order."""

  name: str  # As the config has it.
  fingerprint: str  # SHA-256, in hex, of what decides the documents.
  documents: Callable[[], Iterator[str]]
  size: int | None = None  # Bytes of all documents, where that is known beforehand.


@dataclasses.dataclass(frozen=True)
class TokenSource:
  """Files of token ids."""

  name: str
  fingerprint: str
  files: tuple[Path, ...]


Source = TextSource | TokenSource


def parse_mixture(spec: str) -> list[tuple[float, str]]:
  """`0.7*A,0.3*B` -> [(0.7, "A"), (0.3, "B")]; a source by itself has weight 1.

  Raises:
    InputError: if only some parts have a weight, or one is not positive.
  """
  parts = [p.strip() for p in re.split(r",(?![^\[\]]*\])", spec)]
  found = [re.fullmatch(r"([0-9.]+(?:e-?[0-9]+)?)\s*\*\s*(\S.*)", part) for part in parts]
  if not any(found):
    return [(1.0, spec)]
  mixture = []
  for part, match in zip(parts, found, strict=True):
    try:
      weight = float(match[1]) if match else 0.0
    except ValueError:
      weight = 0.0
    if match is None or weight <= 0:
      raise InputError(
        f"data.source={spec!r}: {part!r} has no positive weight. Write a mixture as 0.7*A,0.3*B."
      )
    mixture.append((weight, match[2]))
  return mixture


def open_source(spec: str, config: DataConfig) -> Source:
  """The source that one part of `data.source` names.

  Raises:
    InputError: if it does not exist, is empty, or is not of the kind that its name promises.
  """
  if spec == "python_stdlib":
    return _standard_library(config)
  if spec.startswith("tfds:"):
    from train.data.tfds import open_tfds  # Imports a large library.

    return open_tfds(spec, config)
  files = find_files(spec)
  kinds = {kind_of(f) for f in files}
  if kinds <= set(ARRAYS):
    return TokenSource(spec, fingerprint(["tokens"], files), tuple(files))
  if kinds & set(ARRAYS):
    raise InputError(f"data.source={spec!r} mixes token arrays with text: give them one by one.")
  options = sorted(kinds)
  options += [config.documents] if "text" in kinds else []
  options += [config.text] if kinds != {"text"} else []
  plain = kinds == {"text"} and not any(f.suffix == tables.PACKED for f in files)
  return TextSource(
    spec,
    fingerprint(options, files),
    lambda: (d for f in files for d in _documents(f, config)),
    sum(f.stat().st_size for f in files) if plain else None,
  )


def find_files(spec: str) -> list[Path]:
  """Files that a path or glob names, sorted.

  Raises:
    InputError: if there are none.
  """
  if not spec.strip():
    raise InputError("data.source is empty: give a file, a glob, python_stdlib or tfds:NAME.")
  path = Path(spec).expanduser()
  if path.is_file():
    return [path]
  if path.is_dir():
    raise InputError(f"{spec!r} is a folder: name its files, for example {spec.rstrip('/')}/*.txt.")
  if not re.search(r"[*?\[]", spec):
    raise InputError(f"{spec!r} does not exist: give a file, a glob, python_stdlib or tfds:NAME.")
  root = Path(path.anchor)
  files = sorted(f for f in root.glob(str(path.relative_to(root))) if f.is_file())
  if not files:
    raise InputError(f"no file matches {spec!r}.")
  return files


def digest(path: Path) -> str:
  """SHA-256, in hex, of a file."""
  with path.open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def kind_of(path: Path) -> str:
  """The suffix of a table or token array, packed or not; `text` for anything else.

  Raises:
    InputError: for a packed token array.
  """
  suffix = tables.suffix_of(path)
  if suffix in ARRAYS and path.suffix == tables.PACKED:
    raise InputError(f"{path} is packed: token arrays are mapped into memory, unpack it first.")
  return suffix if suffix in (*ARRAYS, *tables.SUFFIXES) else "text"


def fingerprint(options: Sequence[str], files: Sequence[Path]) -> str:
  """SHA-256, in hex, of options and of the contents of files."""
  lines = [*options, *(digest(f) for f in files)]
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _documents(path: Path, config: DataConfig) -> Iterator[str]:
  if kind_of(path) in tables.SUFFIXES:
    return tables.read_column(path, config.text)
  if config.documents == "file":
    return iter([_text(path)])
  return _paragraphs(path) if config.documents == "paragraph" else _lines(path)


def _text(path: Path) -> str:
  if path.suffix == tables.PACKED:
    with tables.open_text(path) as f:
      return f.read()
  try:
    return path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise InputError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded.") from None


def _lines(path: Path) -> Iterator[str]:
  with tables.open_text(path) as f:
    for line in f:
      if line.strip():
        yield line.rstrip("\r\n")


def _paragraphs(path: Path) -> Iterator[str]:
  """Text between lines that are blank, without its last line end."""
  lines: list[str] = []
  with tables.open_text(path) as f:
    for line in f:
      if line.strip():
        lines.append(line)
      elif lines:
        yield "".join(lines).rstrip("\r\n")
        lines = []
  if lines:
    yield "".join(lines).rstrip("\r\n")


def _standard_library(config: DataConfig) -> TextSource:
  root = Path(sysconfig.get_path("stdlib"))
  found = (f for f in root.rglob("*.py") if not _LEFT_OUT & set(f.relative_to(root).parts))
  files: list[tuple[str, Path]] = sorted((f.relative_to(root).as_posix(), f) for f in found)
  sizes = []
  kept: list[Path] = []
  lines = [platform.python_version()]
  lines += [config.documents] if config.documents != "file" else []
  for name, path in files:
    data = path.read_bytes()
    try:
      data.decode("utf-8")
    except UnicodeDecodeError:
      logging.warning("python_stdlib: %s is not UTF-8 text and is left out.", name)
      continue
    kept.append(path)
    sizes.append(len(data))
    lines.append(f"{name} {hashlib.sha256(data).hexdigest()}")
  if not kept:
    raise InputError(
      f"python_stdlib: {root} holds no source files: install Python's standard library in full."
    )
  if len(kept) < len(files):
    logging.warning("python_stdlib: %d of %d files left out.", len(files) - len(kept), len(files))
  decides = hashlib.sha256("\n".join(lines).encode()).hexdigest()
  return TextSource(
    "python_stdlib", decides, lambda: (d for f in kept for d in _documents(f, config)), sum(sizes)
  )
