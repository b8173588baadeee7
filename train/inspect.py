"""Prints one batch as a person reads it: python -m train.inspect --config=configs/gpt_tiny.py."""

import os
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import flags

from model.errors import InputError
from model.tokenizer import Tokenizer
from train.data.pipeline import Batch, load_data
from train.flags import config_flag, run
from train.init_from import with_its_model, with_its_tokenizer
from train.objectives.objective import Side
from train.objectives.to_decoder import DECODER
from train.resolve import check_base, check_fit

_CONFIG = config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Whose tokenizer to use; none: the config's own.")
_STEP = flags.DEFINE_integer("step", 0, "Step whose batch is shown, from 0.", lower_bound=0)
_ROWS = flags.DEFINE_integer("rows", None, "Rows to show; none: all.", lower_bound=1)
_TOKENS = flags.DEFINE_integer(
  "tokens", 6, "Tokens to list at the start and end of each segment.", lower_bound=1
)
_WIDTH = 96  # Characters of a line of text.
_IDS = ("tokens", "targets")  # Fields that hold token ids.


def main(argv: list[str]) -> None:
  """Prints the batch to stdout.

  Raises:
    InputError: as `load_data`.
  """
  if len(argv) > 1:
    raise InputError(f"{argv[1]!r} is not a flag of train.inspect.")
  workdir = Path(_WORKDIR.value).expanduser() if _WORKDIR.value else None
  if workdir is not None and not (workdir / "tokenizer").is_dir():
    raise InputError(f"--workdir={_WORKDIR.value} holds no tokenizer: leave it out.")
  config = with_its_model(_CONFIG.value, workdir)
  check_fit(config)
  check_base(config)
  data = load_data(with_its_tokenizer(config, workdir), workdir=workdir)
  batch = data.batch(_STEP.value)
  before = _CONFIG.value.peft.before_texts
  text = describe(batch, data.sides, data.tokenizer, _ROWS.value, _TOKENS.value, before)
  try:
    print(text, flush=True)
  except BrokenPipeError:  # The reader has seen enough; Python must not flush into it at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe(
  batch: Batch, sides: Mapping[str, Side], tokenizer: Tokenizer, rows: int | None, tokens: int,
  before: int = 0,
) -> str:  # fmt: skip
  """The batch as text.

  Args:
    batch: arrays of the fields of `sides`.
    rows: how many rows to show; None: all.
    tokens: how many tokens to list at each end of a segment, or of a side without segments.
    before: virtual tokens before each text that the first stack reads, which are counted only.
  """
  B = len(next(iter(batch.values())))
  lines = [_summary(batch, name, side, B) for name, side in sides.items()]
  for row in range(min(B, rows or B)):
    own = {k: v[row] for k, v in batch.items()}
    lines += ["", f"row {row}"]
    for name, side in sides.items():
      fields = {f: own[name + f] for f in _fields(side)}
      if side.read:
        virtual = 0 if name == DECODER else before
        lines += _read_side(fields, name, side, tokenizer, tokens, virtual)
      else:
        lines += _listed_side(fields, name, side, tokenizer, tokens)
  if rows is not None and rows < B:
    lines += ["", f"{B - rows} more rows: --rows={B} shows them"]
  return "\n".join(lines)


def _fields(side: Side) -> list[str]:
  return [*(("segments", "positions") if side.read else ()), *side.fields]


def _summary(batch: Batch, name: str, side: Side, rows: int) -> str:
  weights = batch.get(f"{name}weights")
  counted = "" if weights is None else f"; targets weigh {weights.sum():g}"
  if not side.read:
    return f"{_title(name)}{rows} rows of {side.length} places{counted}"
  segments = batch[f"{name}segments"]
  held = int((segments > 0).sum())
  return (
    f"{_title(name)}{rows} rows of {side.length} places: {held} tokens "
    f"({held / segments.size:.1%} full) in {int(segments.max(1).sum())} segments{counted}"
  )


def _title(name: str) -> str:
  return f"{name.rstrip('_')}: " if name else ""


def _read_side(
  own: dict[str, np.ndarray], name: str, side: Side, tokenizer: Tokenizer, tokens: int,
  virtual: int,
) -> list[str]:  # fmt: skip
  """The segments of a row: what each says, and a table of its tokens but the virtual ones."""
  lines = []
  for segment in range(1, int(own["segments"].max()) + 1):
    columns = np.flatnonzero((own["segments"] == segment) & (own["positions"] >= virtual))
    behind = f" behind {virtual} virtual ones" if virtual else ""
    lines.append(
      f"  {_title(name)}segment {segment}: {len(columns)} tokens in columns {columns[0]} to "
      f"{columns[-1]}{behind}"
    )
    text = tokenizer.backend.decode(own["tokens"][columns].tolist(), skip_special_tokens=False)
    for line in text.splitlines():
      parts = textwrap.wrap(line, _WIDTH, drop_whitespace=False, replace_whitespace=False)
      lines += [f"    | {part}" for part in parts or [""]]
    lines += _table(own, columns, ["positions", *side.fields], tokenizer, tokens)
  empty = int((own["segments"] == 0).sum())
  return [*lines, f"  {_title(name)}padding: {empty} columns"] if empty else lines


def _listed_side(
  own: dict[str, np.ndarray], name: str, side: Side, tokenizer: Tokenizer, tokens: int
) -> list[str]:
  """A table of the places of a row that weigh something."""
  places = np.flatnonzero(own["weights"]) if "weights" in own else np.arange(side.length)
  table = _table(own, places, list(side.fields), tokenizer, tokens)
  return [f"  {_title(name)}{len(places)} of {side.length} places", *(table if len(places) else [])]


def _table(
  own: dict[str, np.ndarray], columns: np.ndarray, fields: list[str], tokenizer: Tokenizer,
  tokens: int,
) -> list[str]:  # fmt: skip
  """A line for each column, the middle ones left out where there are many."""
  titles, left = ["column"], [False]
  for field in fields:
    one = field.removesuffix("s")
    titles += [f"{one} id", one] if field in _IDS else [one]
    left += [False, True] if field in _IDS else [False]
  shown = [*columns[:tokens], None, *columns[-tokens:]] if len(columns) > 2 * tokens else columns
  table = [titles]
  for c in shown:
    cells = [] if c is None else [str(c)]
    for field in fields if c is not None else ():
      value = own[field][c]
      cells += [str(value), _shown(tokenizer, int(value))] if field in _IDS else [_number(value)]
    table.append(cells or ["…"] * len(titles))
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  pad = lambda i, cell: cell.ljust(widths[i]) if left[i] else cell.rjust(widths[i])
  lines = ["  ".join(pad(i, cell) for i, cell in enumerate(line)).rstrip() for line in table]
  return [f"    {line}" for line in lines]


def _number(value: np.ndarray) -> str:
  return f"{value:g}" if np.ndim(value) == 0 else " ".join(f"{v:g}" for v in value)


def _shown(tokenizer: Tokenizer, token: int) -> str:
  text = tokenizer.backend.decode([token], skip_special_tokens=False)
  if not text or "\ufffd" in text:  # Part of a character.
    text = tokenizer.backend.id_to_token(token) or ""
  return repr(text)


if __name__ == "__main__":
  run(main)
