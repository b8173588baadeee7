"""Checkpoints of a workdir: saved asynchronously, verified when read, on any mesh.

`<workdir>/checkpoints/STEP/` is written by Orbax: `state` holds the arrays, nested by name, and
`record` the JSON beside them (`checkpoint_record`). A step gets its number only when it is whole.
`<workdir>/checkpoints/best.json` names the best step by validation loss. Orbax is known only
here and in `checkpoint_files`.
"""

import contextlib
import json
import logging
import threading
from typing import Any

import jax
from absl import logging as absl_logging
from etils import epath

from model import checkpoint_files as files
from model.checkpoint_read import (
  Restored,
  best_of,
  describe,
  pass_over,
  resolve,
  restore_newest,
  restore_params,
)
from model.checkpoint_record import LAYOUT_VERSION, Damaged, Record, check_config
from model.errors import InputError

__all__ = ["LAYOUT_VERSION", "Checkpoints", "Restored", "check_config", "describe", "resolve",
           "restore_params"]  # fmt: skip


_SAME, _FULL, _NEW = "the same is there", "the disk is full", "to be saved"


class Checkpoints:
  """The checkpoints of one run: the newest `keep` and the best by validation loss.

  Only the process that trains makes one: it deletes what is no longer kept. Others read with
  `describe` and `restore_params`.
  """

  def __init__(self, workdir: epath.PathLike, *, keep: int):
    if keep < 1:
      raise InputError(f"keep_checkpoints={keep} must be at least 1.")
    self._folder = files.absolute(workdir) / "checkpoints"
    self._keep = keep
    self._writer = files.new_writer()
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None
    self._saving: Record | None = None
    self._damaged: set[int] = set()

  def save(
    self,
    step: int,
    state: Any,
    meta: dict[str, Any],
    *,
    validation_loss: float | None = None,
    blocking: bool = False,
  ) -> None:
    """Saves in the background; `state` may be donated as soon as this returns.

    Waits for the save before this one. A step that is there already is replaced, unless it
    holds the same.

    Args:
      step: optimizer updates done.
      state: pytree (dicts, dataclasses, tuples) of arrays, sharded in any way.
      meta: plain values for JSON: configuration, tokenizer, data state.
      validation_loss: of this step's parameters, in nats; None or non-finite: never the best.
      blocking: return only when all is on disk.

    Raises:
      InputError: for a full disk, now or in the save before this one, or a leaf that cannot be
        saved. Earlier checkpoints are intact.
    """
    self.wait()
    record = Record.of(step, state, meta, validation_loss)
    target = self._folder / str(step)
    found = files.said_by_first(lambda: self._prepare(step, target, record))
    if found == _SAME:
      return
    if found == _FULL:
      raise self._disk_full(record)
    self._saving = record
    absl_logging.get_absl_logger().addFilter(_own_report)
    try:
      files.start_write(self._writer, target, record, state)
    except OSError as error:
      self._error = error
    else:
      self._thread = threading.Thread(target=self._finish, name="checkpoint")
      self._thread.start()
    if blocking or self._error is not None:
      self.wait()

  def wait(self) -> None:
    """Returns when the last save is on disk.

    Raises:
      InputError: when it failed because the disk was full; any other failure as it was raised.
    """
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    record, error = self._saving, self._error
    self._saving = self._error = None
    absl_logging.get_absl_logger().removeFilter(_own_report)
    if error is not None and record is not None:
      if not files.is_disk_full(error):
        raise error
      message = self._disk_full(record)
      if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # Writes may be ending; the next save cleans up too.
          files.remove_unfinished(self._folder)
      raise message from error

  def close(self) -> None:
    """Waits for the last save and ends the background work."""
    try:
      self.wait()
    finally:
      self._writer.close()

  def steps(self) -> list[int]:
    """Whole checkpoints, oldest first."""
    return sorted(self._records())

  def best_step(self) -> int | None:
    """The step with the lowest validation loss among those on disk."""
    return best_of(self._records())

  def restore_latest(self, abstract: Any) -> Restored | None:
    """Reads the newest checkpoint that is undamaged, naming each one passed over on stderr.

    Args:
      abstract: `jax.ShapeDtypeStruct`s in the structure of a state, with shardings of any mesh.

    Returns:
      None when nothing was ever saved here.

    Raises:
      InputError: when the arrays differ from `abstract`, listing all; when there are
        checkpoints but none can be read.
    """
    self.wait()
    listed = files.said_by_first(lambda: sorted(files.numbered(self._folder), reverse=True))
    found = {step: self._folder / str(step) for step in listed}
    if not files.said_by_first(lambda: any(any(p.iterdir()) for p in found.values())):
      for folder in found.values():
        pass_over(folder, "it is empty")
      return None
    passed: dict[int, str] = {}
    try:
      return restore_newest(found, abstract, cast=False, passed=passed)
    finally:
      self._damaged |= passed.keys()

  def _prepare(self, step: int, target: epath.Path, record: Record) -> str:
    """Makes room for a save, on process 0: whether it is needed, and fits."""
    if step not in self._damaged and self._record(target) == record:
      return _SAME
    self._folder.mkdir(parents=True, exist_ok=True)
    files.remove_unfinished(self._folder)
    if not files.fits(self._folder, record):
      return _FULL
    if target.exists():
      files.remove(target)
    return _NEW

  def _finish(self) -> None:
    try:
      self._writer.wait_until_finished()
      self._damaged.discard(self._saving.step if self._saving else -1)
      if jax.process_index() == 0:
        self._settle()
    except BaseException as error:  # Raised by `wait` in the caller's thread.
      self._error = error

  def _settle(self) -> None:
    records = self._records()
    best = best_of(records)
    if best is not None:
      text = json.dumps({"step": best, "validation_loss": records[best].validation_loss})
      new = self._folder / "best.json.new"
      new.write_text(text + "\n")
      new.replace(self._folder / "best.json")
    for step in sorted(records)[: -self._keep]:
      if step != best:
        files.remove(self._folder / str(step))

  def _records(self) -> dict[int, Record]:
    found = {s: self._record(p) for s, p in files.numbered(self._folder).items()}
    return {s: r for s, r in found.items() if r is not None and s not in self._damaged}

  def _record(self, folder: epath.Path) -> Record | None:
    try:
      return files.read_record(folder)
    except Damaged:
      return None

  def _disk_full(self, record: Record) -> InputError:
    free, need = files.free_bytes(self._folder), files.needed_bytes(record)
    return InputError(
      f"step {record.step} could not be saved in {self._folder}: the disk has "
      f"{_size(free or 0)} free and the checkpoint needs {_size(need)}. Free some space and run "
      "the command again; earlier checkpoints are intact."
    )


def _own_report(record: logging.LogRecord) -> bool:
  # `wait` raises what goes wrong in the background; Orbax's tracebacks would come before it.
  return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _size(count: int) -> str:
  value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
  while value >= 1024 and len(units) > 1:
    value, units = value / 1024, units[1:]
  return f"{value:.1f} {units[0]}"
