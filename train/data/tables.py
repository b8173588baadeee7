"""Columns of tables: JSON lines, CSV, TSV and Parquet."""

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from model.errors import InputError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
LIST = ".json"  # A list of objects; of objectives on tables only, to others it is text.
PACKED = ".gz"

# Columns by the field of the config that names each: {"data.text": "sentence"}.
Wanted = Mapping[str, str]
# (number of the line or row, from 1; values in the order of what was wanted).
Row = tuple[int, tuple[Any, ...]]


def suffix_of(path: Path) -> str:
  """The suffix that tells what a file holds: that before `.gz`, where there is one."""
  return Path(path.stem).suffix if path.suffix == PACKED else path.suffix


def unit_of(path: Path) -> str:
  """What the numbers of `read_rows` count."""
  return "row" if suffix_of(path) in (".parquet", LIST) else "line"


def read_column(path: Path, column: str) -> Iterator[str]:
  """Values of `column`, row by row; see `read_rows`.

  Raises:
    InputError: naming the file and the line where the column is missing or holds no text.
  """
  for number, (value,) in read_rows(path, {"data.text": column}):
    if not isinstance(value, str):
      place = f"{path}, {unit_of(path)} {number}"
      raise InputError(f"{place}: column {column!r} holds {type(value).__name__}, not text.")
    yield value


def read_rows(path: Path, wanted: Wanted, optional: Collection[str] = ()) -> Iterator[Row]:
  """Rows of a table.

  Args:
    wanted: field or column names; numbers are places of columns, from 0, of a CSV or TSV file
      without a header. TSV has no quoting: a quotation mark is itself.
    optional: keys of `wanted` whose column may be missing; its values are None then.

  Raises:
    InputError: naming the file and the line where a column is missing.
  """
  if suffix_of(path) == ".jsonl":
    return _jsonl(path, wanted, optional)
  if suffix_of(path) == LIST:
    return _list(path, wanted, optional)
  if suffix_of(path) == ".parquet":
    return _parquet(path, wanted, optional)
  return _csv(path, wanted, optional)


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
  """Opens UTF-8 text, packed or not, with line ends as they are.

  Raises:
    InputError: for what cannot be unpacked or decoded.
  """
  unpacked = gzip.open if path.suffix == PACKED else Path.open
  with unpacked(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as f:  # pyright: ignore
    try:
      yield f
    except UnicodeDecodeError as error:
      raise InputError(f"{path} is not UTF-8 text: {error}.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise InputError(f"{path} is not a gzip file, or it is damaged: {error}.") from None


def _jsonl(path: Path, wanted: Wanted, optional: Collection[str]) -> Iterator[Row]:
  with open_text(path) as f:
    for number, line in enumerate(f, 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except ValueError as error:
        raise InputError(f"{path}, line {number} is not JSON: {error}.") from None
      known = row if isinstance(row, dict) else {}
      _check(f"{path}, line {number}", wanted, known, optional)
      yield number, tuple(known.get(column) for column in wanted.values())


def _list(path: Path, wanted: Wanted, optional: Collection[str]) -> Iterator[Row]:
  with open_text(path) as f:
    try:
      rows = json.load(f)
    except ValueError as error:
      raise InputError(f"{path} is not JSON: {error}.") from None
  if not isinstance(rows, list):
    raise InputError(f"{path} holds a {type(rows).__name__}: a list of objects is needed.")
  for number, row in enumerate(rows, 1):
    known = row if isinstance(row, dict) else {}
    _check(f"{path}, row {number}", wanted, known, optional)
    yield number, tuple(known.get(column) for column in wanted.values())


def _csv(path: Path, wanted: Wanted, optional: Collection[str]) -> Iterator[Row]:
  csv.field_size_limit(1 << 30)
  tabs = suffix_of(path) == ".tsv"
  with open_text(path) as f:
    rows = csv.reader(
      f, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    )
    try:
      places = _places(path, rows, wanted, optional)
      for row in rows:
        if not row:
          continue
        for field, place in places.items():
          if place is not None and place >= len(row):
            raise InputError(
              f"{path}, line {rows.line_num} has {len(row)} columns: {field}={wanted[field]!r} is "
              "missing."
            )
        yield rows.line_num, tuple(None if p is None else row[p] for p in places.values())
    except csv.Error as error:
      raise InputError(f"{path}, line {rows.line_num}: {error}.") from None


def _places(
  path: Path, rows: Iterator[list[str]], wanted: Wanted, optional: Collection[str]
) -> dict[str, int | None]:
  """The place of each column, by field; None where an optional one is missing."""
  needed = {field: column for field, column in wanted.items() if field not in optional}
  numbered = [column.isdigit() for column in needed.values()]
  if all(numbered):
    return {f: int(c) if c.isdigit() else None for f, c in wanted.items()}
  if any(numbered):
    names = ", ".join(f"{field}={column!r}" for field, column in needed.items())
    raise InputError(f"{names}: name all columns, or number all where {path} has no header.")
  header = next(rows, [])
  _check(str(path), wanted, header, optional)
  return {f: header.index(c) if c in header else None for f, c in wanted.items()}


def _parquet(path: Path, wanted: Wanted, optional: Collection[str]) -> Iterator[Row]:
  import pyarrow
  from pyarrow import parquet

  try:
    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    _check(str(path), wanted, names, optional)
    columns = [column for column in dict.fromkeys(wanted.values()) if column in names]
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=columns):
      values = {name: batch.column(name).to_pylist() for name in columns}
      for i in range(batch.num_rows):
        number += 1
        yield number, tuple(values[c][i] if c in values else None for c in wanted.values())
  except pyarrow.ArrowException as error:
    raise InputError(f"{path} is not a Parquet file, or it is damaged: {error}") from None


def _check(place: str, wanted: Wanted, known: Collection[str], optional: Collection[str]) -> None:
  for field, column in wanted.items():
    if column not in known and field not in optional:
      raise InputError(
        f"{place} has no column {column!r}: set {field} to one of those it has "
        f"({', '.join(known) or 'none'})."
      )
