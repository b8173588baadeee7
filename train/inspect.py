"""Prints one batch as a person reads it: python -m train.inspect --config=configs/gpt_tiny.py."""

import os
import sys
import textwrap
from pathlib import Path

import numpy as np
from absl import flags

from model.errors import InputError
from model.tokenizer import Tokenizer
from train.data.pipeline import Batch, load_data
from train.flags import config_flag, run

_CONFIG = config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Whose tokenizer to use; none: the config's own.")
_STEP = flags.DEFINE_integer("step", 0, "Step whose batch is shown, from 0.", lower_bound=0)
_ROWS = flags.DEFINE_integer("rows", None, "Rows to show; none: all.", lower_bound=1)
_TOKENS = flags.DEFINE_integer(
  "tokens", 6, "Tokens to list at the start and end of each segment.", lower_bound=1
)
_WIDTH = 96  # Characters of a line of text.
_TITLES = ("column", "position", "id", "token", "target id", "target", "weight")
_TEXTS = (3, 5)  # Of the titles: set to the left, numbers to the right.


def main(argv: list[str]) -> None:
  """Prints the batch to stdout.

  Raises:
    InputError: as `load_data`.
  """
  if len(argv) > 1:
    raise InputError(f"{argv[1]!r} is not a flag of train.inspect.")
  if _WORKDIR.value and not (Path(_WORKDIR.value) / "tokenizer").is_dir():
    raise InputError(f"--workdir={_WORKDIR.value} holds no tokenizer: leave it out.")
  workdir = Path(_WORKDIR.value) if _WORKDIR.value else None
  data = load_data(_CONFIG.value, workdir=workdir)
  text = describe(data.batch(_STEP.value), data.tokenizer, _ROWS.value, _TOKENS.value)
  try:
    print(text, flush=True)
  except BrokenPipeError:  # The reader has seen enough; Python must not flush into it at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe(batch: Batch, tokenizer: Tokenizer, rows: int | None, tokens: int) -> str:
  """The batch as text.

  Args:
    batch: arrays (B, T): see `causal_lm.empty_rows`.
    rows: how many rows to show; None: all.
    tokens: how many tokens to list at each end of a segment.
  """
  B, T = batch["tokens"].shape
  held, counted = int((batch["segments"] > 0).sum()), float(batch["weights"].sum())
  lines = [
    f"{B} rows of {T} places: {held} tokens ({held / (B * T):.1%} full) in "
    f"{int(batch['segments'].max(1).sum())} segments; targets weigh {counted:g}"
  ]
  for row in range(min(B, rows or B)):
    lines += ["", f"row {row}", *_row({k: v[row] for k, v in batch.items()}, tokenizer, tokens)]
  if rows is not None and rows < B:
    lines += ["", f"{B - rows} more rows: --rows={B} shows them"]
  return "\n".join(lines)


def _row(row: dict[str, np.ndarray], tokenizer: Tokenizer, tokens: int) -> list[str]:
  lines = []
  for segment in range(1, int(row["segments"].max()) + 1):
    columns = np.flatnonzero(row["segments"] == segment)
    lines.append(
      f"  segment {segment}: {len(columns)} tokens in columns {columns[0]} to {columns[-1]}"
    )
    text = tokenizer.backend.decode(row["tokens"][columns].tolist(), skip_special_tokens=False)
    for line in text.splitlines():
      parts = textwrap.wrap(line, _WIDTH, drop_whitespace=False, replace_whitespace=False)
      lines += [f"    | {part}" for part in parts or [""]]
    lines += [f"    {line}" for line in _table(row, columns, tokenizer, tokens)]
  empty = int((row["segments"] == 0).sum())
  return [*lines, f"  padding: {empty} columns"] if empty else lines


def _table(
  row: dict[str, np.ndarray], columns: np.ndarray, tokenizer: Tokenizer, tokens: int
) -> list[str]:
  shown = [*columns[:tokens], None, *columns[-tokens:]] if len(columns) > 2 * tokens else columns
  table: list[tuple[str, ...]] = [_TITLES]
  for c in shown:
    if c is None:
      table.append(("…",) * len(_TITLES))
      continue
    token, target = int(row["tokens"][c]), int(row["targets"][c])
    table.append((
      str(c), str(row["positions"][c]), str(token), _shown(tokenizer, token), str(target),
      _shown(tokenizer, target), f"{row['weights'][c]:g}",
    ))  # fmt: skip
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  pad = lambda i, cell: cell.ljust(widths[i]) if i in _TEXTS else cell.rjust(widths[i])
  return ["  ".join(pad(i, cell) for i, cell in enumerate(line)).rstrip() for line in table]


def _shown(tokenizer: Tokenizer, token: int) -> str:
  text = tokenizer.backend.decode([token], skip_special_tokens=False)
  if not text or "\ufffd" in text:  # Part of a character.
    text = tokenizer.backend.id_to_token(token) or ""
  return repr(text)


if __name__ == "__main__":
  run(main)
