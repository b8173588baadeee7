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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging as absl_logging
from etils import epath

from model import checkpoint_files as files
from model.checkpoint_record import LAYOUT_VERSION, Damaged, Record, check_config, nested
from model.errors import InputError

__all__ = ["LAYOUT_VERSION", "Checkpoints", "Restored", "check_config", "describe", "resolve",
           "restore_params"]  # fmt: skip

BEST = "@best"


class Restored(NamedTuple):
  """What was read: arrays in the structure asked for, the meta saved with them, the step."""

  state: Any
  meta: dict[str, Any]
  step: int


class Checkpoints:
  """The checkpoints of one run: the newest `keep` and the best by validation loss.

  Only the process that trains makes one: it deletes what is no longer kept. Others read with
  `describe` and `restore_params`.
  """

  def __init__(self, workdir: epath.PathLike, *, keep: int):
    if keep < 1:
      raise InputError(f"keep_checkpoints={keep} must be at least 1.")
    self._folder = epath.Path(workdir) / "checkpoints"
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
    if step not in self._damaged and self._record(target) == record:
      return
    if jax.process_index() == 0:
      self._folder.mkdir(parents=True, exist_ok=True)
      files.remove_unfinished(self._folder)
    free = files.free_bytes(self._folder)
    if free is not None and free < files.needed_bytes(record):
      raise self._disk_full(record)
    if jax.process_index() == 0 and target.exists():
      files.remove(target)
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
    return _best(self._records())

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
    found = files.numbered(self._folder)
    if not any(any(p.iterdir()) for p in found.values()):
      for folder in found.values():
        _pass_over(folder, "it is empty")
      return None
    passed: dict[int, str] = {}
    try:
      return _restore(found, abstract, cast=False, passed=passed)
    finally:
      self._damaged |= passed.keys()

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
    best = _best(records)
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


def resolve(path: epath.PathLike) -> tuple[epath.Path, int]:
  """The workdir and step that a PATH means: a workdir, a step in it, or `WORKDIR@best`.

  A workdir means its newest whole step; whether its arrays are undamaged is seen when read.

  Raises:
    InputError: when there is no such checkpoint.
  """
  workdir, candidates = _candidates(path)
  for step, folder in candidates.items():
    try:
      files.read_record(folder)
    except Damaged as damage:
      _pass_over(folder, damage)
    else:
      return workdir, step
  steps = ", ".join(map(str, candidates))
  raise InputError(f"{path}: no checkpoint is whole, of step {steps}. Restore a copy of one.")


def describe(path: epath.PathLike) -> Restored:
  """What the checkpoint at PATH holds, without reading arrays.

  Returns:
    `state` as nested dicts of `jax.ShapeDtypeStruct`, meta and step.

  Raises:
    InputError: when there is no such checkpoint.
  """
  workdir, step = resolve(path)
  record = files.read_record(workdir / "checkpoints" / str(step))
  leaves = {
    leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
    for leaf in record.leaves.values()
  }
  return Restored(nested(leaves), record.meta, step)


def restore_params(path: epath.PathLike, abstract: dict, *, cast: bool = False) -> Restored:
  """Reads some top-level parts of the state saved at PATH, and nothing of the others.

  Args:
    path: as `resolve` takes it. Of a workdir the newest undamaged step is read.
    abstract: `{"params": …, "frozen": …}` or `{"ema": …}`: nested dicts of
      `jax.ShapeDtypeStruct`s, with the shardings in which the arrays are to be.
    cast: convert floating arrays to the dtypes in `abstract`; otherwise these must be equal.

  Raises:
    InputError: when there is no such checkpoint, when it is damaged, or when it holds other
      arrays than `abstract`, listing all.
  """
  found = _candidates(path)[1]
  while True:
    try:
      return _restore(found, abstract, cast=cast, passed={})
    except InputError:  # A run that is going on may have replaced what was being read.
      before, found = found, _candidates(path)[1]
      if before.keys() == found.keys():
        raise


def _restore(
  candidates: dict[int, epath.Path], abstract: Any, *, cast: bool, passed: dict[int, str]
) -> Restored:
  for step, folder in candidates.items():
    try:
      record = files.read_record(folder)
      state = files.read_state(folder, record, abstract, cast=cast)
    except Damaged as damage:
      passed[step] = str(damage)
      if len(candidates) > 1 and folder.exists():
        _pass_over(folder, damage)
    else:
      return Restored(state, record.meta, step)
  reasons = "; ".join(f"{candidates[step]}: {why}" for step, why in passed.items())
  raise InputError(f"no undamaged checkpoint is left: {reasons}. Restore a copy, or start afresh.")


def _candidates(path: epath.PathLike) -> tuple[epath.Path, dict[int, epath.Path]]:
  """The workdir and the steps that PATH may mean, in the order to try."""
  folder = epath.Path(path).expanduser()
  best = not folder.exists() and str(path).endswith(BEST)
  if best:
    folder = epath.Path(str(path).removesuffix(BEST)).expanduser()
  if not folder.exists():
    raise InputError(f"checkpoint {path} does not exist.")
  if folder.name.isdecimal() and folder.parent.name == "checkpoints":
    if best:
      raise InputError(f"{path}: {BEST} goes after a workdir, not after a step in it.")
    return folder.parent.parent, {int(folder.name): folder}
  found = files.numbered(folder / "checkpoints")
  if not found:
    raise InputError(
      f"{folder} has no checkpoints: a workdir with checkpoints/STEP, or one such step, is needed."
    )
  if not best:
    return folder, found
  records = {}
  for step, step_folder in found.items():
    try:
      records[step] = files.read_record(step_folder)
    except Damaged as damage:
      _pass_over(step_folder, damage)
  step = _best(records)
  if step is None:
    raise InputError(f"{path}: no checkpoint was saved with a validation loss; leave out {BEST}.")
  return folder, {step: found[step]}


def _best(records: dict[int, Record]) -> int | None:
  losses = {s: r.validation_loss for s, r in records.items() if r.validation_loss is not None}
  return min(losses, key=lambda s: (losses[s], s)) if losses else None


def _pass_over(folder: epath.Path, why: object) -> None:
  files.warn_once(f"checkpoint {folder} is damaged and passed over: {why}.")


def _own_report(record: logging.LogRecord) -> bool:
  # `wait` raises what goes wrong in the background; Orbax's tracebacks would come before it.
  return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _size(count: int) -> str:
  value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
  while value >= 1024 and len(units) > 1:
    value, units = value / 1024, units[1:]
  return f"{value:.1f} {units[0]}"
