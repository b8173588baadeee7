"""Reading checkpoints by PATH: a workdir, a step inside it, or `WORKDIR@best`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax.traverse_util import unflatten_dict

from model import checkpoint_files as files
from model.checkpoint_record import Damaged, Record
from model.errors import InputError

BEST = "@best"


class Restored(NamedTuple):
  """What was read: arrays in the structure asked for, the meta saved with them, the step."""

  state: Any
  meta: dict[str, Any]
  step: int


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
      pass_over(folder, damage)
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
  return Restored(unflatten_dict(leaves), record.meta, step)


def restore_params(
  path: epath.PathLike, abstract: dict, *, cast: bool = False,
  leave_out: tuple[str, ...] | None = (),
) -> Restored:  # fmt: skip
  """Reads some top-level parts of the state saved at PATH, and nothing of the others.

  Args:
    path: as `resolve` takes it. Of a workdir the newest undamaged step is read.
    abstract: `{"params": …, "frozen": …}` or `{"ema": …}`: nested dicts of
      `jax.ShapeDtypeStruct`s, with the shardings in which the arrays are to be.
    cast: convert floating arrays to the dtypes in `abstract`; otherwise these must be equal.
    leave_out: names of what may lie in these parts beside `abstract` and is not read; None: all.

  Raises:
    InputError: when there is no such checkpoint, when it is damaged, or when it holds other
      arrays than `abstract`, listing all.
  """
  found = _candidates(path)[1]
  while True:
    try:
      return restore_newest(found, abstract, cast=cast, passed={}, leave_out=leave_out)
    except InputError:  # A run that is going on may have replaced what was being read.
      before, found = found, _candidates(path)[1]
      if before.keys() == found.keys():
        raise


def restore_newest(
  candidates: dict[int, epath.Path], abstract: Any, *, cast: bool, passed: dict[int, str],
  leave_out: tuple[str, ...] | None = (),
) -> Restored:  # fmt: skip
  """Reads the first of `candidates` that is undamaged.

  Args:
    candidates: folders by step, in the order to try.
    abstract, cast, leave_out: as `checkpoint_files.read_state` takes them.
    passed: is filled with the steps passed over and what is wrong with each.

  Raises:
    InputError: when none is undamaged, or one holds other arrays than `abstract`.
  """
  for step, folder in candidates.items():
    try:
      record = _record_for_all(folder)
      state = files.read_state(folder, record, abstract, cast=cast, leave_out=leave_out)
    except Damaged as damage:
      passed[step] = str(damage)
      if len(candidates) > 1 and folder.exists():
        pass_over(folder, damage)
    else:
      return Restored(state, record.meta, step)
  reasons = "; ".join(f"{candidates[step]}: {why}" for step, why in passed.items())
  raise InputError(f"no undamaged checkpoint is left: {reasons}. Restore a copy, or start afresh.")


def _record_for_all(folder: epath.Path) -> Record:
  """`files.read_record`, damaged for all processes where it is for one."""
  record, damage = None, Damaged("it is damaged as another process sees it")
  try:
    record = files.read_record(folder)
  except Damaged as error:
    damage = error
  if not files.all_processes(record is not None) or record is None:
    raise damage
  return record


def _candidates(path: epath.PathLike) -> tuple[epath.Path, dict[int, epath.Path]]:
  """The workdir and the steps that PATH may mean, in the order to try."""
  folder = files.absolute(path)
  best = not folder.exists() and str(path).endswith(BEST)
  if best:
    folder = files.absolute(str(path).removesuffix(BEST))
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
      pass_over(step_folder, damage)
  step = best_of(records)
  if step is None:
    raise InputError(f"{path}: no checkpoint was saved with a validation loss; leave out {BEST}.")
  return folder, {step: found[step]}


def best_of(records: dict[int, Record]) -> int | None:
  """The step with the lowest validation loss, the earliest of equals; None if none has one."""
  losses = {s: r.validation_loss for s, r in records.items() if r.validation_loss is not None}
  return min(losses, key=lambda s: (losses[s], s)) if losses else None


def pass_over(folder: epath.Path, why: object) -> None:
  """Names a damaged checkpoint on stderr, once, on process 0."""
  if jax.process_index() == 0:
    files.warn_once(f"checkpoint {folder} is damaged and passed over: {why}.")
