"""One column of text of a table: JSON lines, CSV, TSV and Parquet."""

import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from model.errors import InputError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


def read_column(path: Path, column: str) -> Iterator[str]:
  """Values of `column`, row by row.

  Args:
    column: a field or column name; a number is the place of a column, from 0, of a CSV or TSV file
      without a header. TSV has no quoting: a quotation mark is itself.

  Raises:
    InputError: naming the file and the line where the column is missing or holds no text.
  """
  if path.suffix == ".jsonl":
    return _jsonl(path, column)
  if path.suffix == ".parquet":
    return _parquet(path, column)
  return _csv(path, column)


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
  """Opens UTF-8 text with line ends as they are; what cannot be decoded is a user's error."""
  with path.open(encoding="utf-8-sig", newline="") as f:
    try:
      yield f
    except UnicodeDecodeError as error:
      raise InputError(f"{path} is not UTF-8 text: {error}.") from None


def _jsonl(path: Path, column: str) -> Iterator[str]:
  with open_text(path) as f:
    for number, line in enumerate(f, 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except ValueError as error:
        raise InputError(f"{path}, line {number} is not JSON: {error}.") from None
      if not isinstance(row, dict) or column not in row:
        known = ", ".join(row) if isinstance(row, dict) else "no object"
        raise InputError(_missing(f"{path}, line {number}", column, known))
      yield _checked(row[column], f"{path}, line {number}", column)


def _csv(path: Path, column: str) -> Iterator[str]:
  csv.field_size_limit(1 << 30)
  tabs = path.suffix == ".tsv"
  with open_text(path) as f:
    rows = csv.reader(
      f, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    )
    try:
      if column.isdigit():
        index, header = int(column), None
      else:
        header = next(rows, [])
        if column not in header:
          raise InputError(_missing(str(path), column, ", ".join(header)))
        index = header.index(column)
      for row in rows:
        if len(row) <= index and row:
          raise InputError(
            f"{path}, line {rows.line_num} has {len(row)} columns: data.text={column!r} is missing."
          )
        if row:
          yield row[index]
    except csv.Error as error:
      raise InputError(f"{path}, line {rows.line_num}: {error}.") from None


def _parquet(path: Path, column: str) -> Iterator[str]:
  import pyarrow
  from pyarrow import parquet

  try:
    file = parquet.ParquetFile(path)
    if column not in file.schema_arrow.names:
      raise InputError(_missing(str(path), column, ", ".join(file.schema_arrow.names)))
    row = 0
    for batch in file.iter_batches(batch_size=1024, columns=[column]):
      for value in batch.column(0).to_pylist():
        row += 1
        yield _checked(value, f"{path}, row {row}", column)
  except pyarrow.ArrowException as error:
    raise InputError(f"{path} is not a Parquet file, or it is damaged: {error}") from None


def _missing(place: str, column: str, known: str) -> str:
  return f"{place} has no column {column!r}: set data.text to one of those it has ({known})."


def _checked(value: object, place: str, column: str) -> str:
  if not isinstance(value, str):
    raise InputError(f"{place}: column {column!r} holds {type(value).__name__}, not text.")
  return value
