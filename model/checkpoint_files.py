"""A checkpoint's folder on disk: Orbax writes and reads it, fingerprints verify it."""

import contextlib
import errno
import functools
import gc
import inspect
import json
import logging as python_logging
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils

from model.checkpoint_record import Damaged, Leaf, Record, check_tree, named_leaves
from model.checkpoint_record import read_record as _read_json
from model.errors import InputError
from model.fingerprint import fingerprints

_UNFINISHED = ".orbax-checkpoint-tmp"
_DISK_FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
_ROOM = 1024  # Bytes that what process 0 says is filled up to a multiple of.
_OVERHEAD_BYTES = 2**16  # Orbax's own files; they grow a little with the number of leaves.
_OVERHEAD_BYTES_PER_LEAF = 2**10


def absolute(path: epath.PathLike) -> epath.Path:
  """A path as Orbax takes it, from a user's."""
  path = epath.Path(path).expanduser()
  return path if path.is_absolute() else path.absolute()


def numbered(folder: epath.Path) -> dict[int, epath.Path]:
  """Folders named like steps, complete or not, newest first."""
  if not folder.is_dir():
    return {}
  found = {int(p.name): p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()}
  return dict(sorted(found.items(), reverse=True))


def read_record(folder: epath.Path) -> Record:
  """Reads what a step's folder says of itself.

  Raises:
    Damaged: when the folder is not a whole checkpoint of the step that its name says.
    InputError: when a newer version of this program wrote it.
  """
  record = _read_json(folder)
  if str(record.step) != folder.name:
    raise Damaged(f"its record is that of step {record.step}")
  if not (folder / "state").is_dir() and any(leaf.size for leaf in record.leaves.values()):
    raise Damaged("its arrays (state/) are missing")
  return record


def new_writer() -> ocp.AsyncCheckpointer:
  """Writes one checkpoint at a time in the background, with a set of files for each process."""
  # Replicas share the writing where they are on several hosts; on one, cutting them up only
  # costs compilations.
  arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
  registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
  state = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
  return ocp.AsyncCheckpointer(
    ocp.CompositeCheckpointHandler(state=state, record=ocp.JsonCheckpointHandler())
  )


def start_write(writer: ocp.AsyncCheckpointer, folder: epath.Path, record: Record, state: Any):
  """Copies `state` to the host and starts writing; returns when `state` may be overwritten."""
  arrays = {tuple(map(str, path)): x for path, x in named_leaves(state).values() if x.size}
  items: dict[str, Any] = {"record": ocp.args.JsonSave(record.to_json())}
  if arrays:  # Orbax saves no empty arrays and no empty trees; the record describes them.
    items["state"] = ocp.args.PyTreeSave(unflatten_dict(arrays))
  writer.save(folder, args=ocp.args.Composite(**items))


def read_state(
  folder: epath.Path, record: Record, abstract: Any, *, cast: bool,
  leave_out: tuple[str, ...] | None = (),
) -> Any:  # fmt: skip
  """Reads the top-level parts of a state that `abstract` has, and verifies every array read.

  Args:
    folder: of one step.
    record: what `read_record` gave for it.
    abstract: pytree of `jax.ShapeDtypeStruct`s; `sharding` says where each array goes (None:
      the first local device).
    cast: whether floating arrays may be saved in another dtype than `abstract` has.
    leave_out: names inside of a part that are passed over, whether they are there or not; None:
      all that `abstract` does not name.

  Returns:
    Arrays in the structure of `abstract`.

  Raises:
    Damaged: when the files cannot be read, or hold other values than were saved.
    InputError: when names, shapes or dtypes differ from `abstract`.
  """
  wanted = named_leaves(abstract)
  parts = {path[0] for path, _ in wanted.values()}
  if leave_out is None:
    read = lambda name, path: name in wanted
  else:
    read = lambda name, path: len(path) < 2 or path[1] not in leave_out
  saved = {
    n: leaf for n, leaf in record.leaves.items() if leaf.path[0] in parts and read(n, leaf.path)
  }
  _check_parts(folder, record, parts)
  check_tree(str(folder), saved, wanted, cast=cast)
  _check_x64(folder, saved)
  leaves = [saved[name] for name in wanted]
  places = [_place(want) for _, want in wanted.values()]
  with _without_tracebacks():
    arrays, problem = _try_read(folder, leaves, places)
  if not all_processes(arrays is not None):
    raise Damaged(f"its arrays cannot be read ({problem or 'on another process'})")
  for leaf, got in zip(leaves, fingerprints(arrays or []), strict=True):
    if got != leaf.fingerprint:
      raise Damaged(f"{'.'.join(map(str, leaf.path))} differs from its checksum")
  dtypes = [want.dtype for _, want in wanted.values()]
  typed = [x.astype(dtype) for x, dtype in zip(arrays or [], dtypes, strict=True)]
  return jax.tree.unflatten(jax.tree.structure(abstract), typed)


def remove(folder: epath.Path) -> None:
  """Deletes a step's folder; it stops counting as a step before anything in it goes."""
  doomed = folder.parent / f"{folder.name}{_UNFINISHED}-removed"
  if doomed.exists():
    doomed.rmtree()
  folder.rename(doomed)
  doomed.rmtree()


def remove_unfinished(folder: epath.Path) -> None:
  """Deletes what saves left that did not end. No save may be going on."""
  for path in folder.iterdir() if folder.is_dir() else ():
    if _UNFINISHED in path.name:
      path.rmtree()


def needed_bytes(record: Record) -> int:
  """Bytes that a checkpoint takes on disk."""
  arrays = sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in record.leaves.values())
  return arrays + _OVERHEAD_BYTES + _OVERHEAD_BYTES_PER_LEAF * len(record.leaves)


def free_bytes(folder: epath.Path) -> int | None:
  """Free space where `folder` lies; None when it cannot be known (object stores)."""
  return None if "://" in str(folder) else shutil.disk_usage(folder).free


def fits(folder: epath.Path, record: Record) -> bool:
  """Whether there is space for a checkpoint, as this process sees it."""
  free = free_bytes(folder)
  return free is None or free >= needed_bytes(record)


def said_by_first(ask: Callable[[], Any]) -> Any:
  """What process 0 answers, a plain value, on all processes: disks may show them other things."""
  if jax.process_count() == 1:
    return ask()
  text = json.dumps(ask()).encode() if jax.process_index() == 0 else b""
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  room = np.zeros(-(-size // _ROOM) * _ROOM, np.uint8)  # Few sizes: each is a program.
  room[: len(text)] = np.frombuffer(text, np.uint8)
  return json.loads(multihost_utils.broadcast_one_to_all(room).tobytes()[:size])


def all_processes(ok: bool) -> bool:
  """Whether it is so on all processes."""
  if jax.process_count() == 1:
    return ok
  return bool(multihost_utils.process_allgather(np.array(ok)).all())


def is_disk_full(error: BaseException | None) -> bool:
  """Whether an exception, or one that caused it, says that the disk or quota is full."""
  while error is not None:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or _DISK_FULL.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
  """Logs a warning to stderr, the same one only once."""
  logging.warning("%s", message)


def _try_read(folder: epath.Path, leaves: list[Leaf], places: list) -> tuple[list | None, str]:
  """The arrays, or None and why the files cannot be read."""
  try:
    return _read_arrays(folder, leaves, places), ""
  except (jax.errors.JaxRuntimeError, MemoryError, PermissionError):
    raise  # Says nothing about the files: most often memory ran out.
  except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files.
    problem = _innermost(error)
  time.sleep(0.1)  # Reads of other arrays that are going on end within it, unheard.
  gc.collect()
  return None, problem


def _read_arrays(folder: epath.Path, leaves: list[Leaf], places: list) -> list[jax.Array]:
  present = [(leaf, place) for leaf, place in zip(leaves, places, strict=True) if leaf.size]
  like: dict[tuple, Any] = {}
  how: dict[tuple, Any] = {}
  for leaf, place in present:
    path, dtype = tuple(map(str, leaf.path)), jnp.dtype(leaf.dtype)
    like[path] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place)
    how[path] = ocp.ArrayRestoreArgs(sharding=place, global_shape=leaf.shape, dtype=dtype)
  got: Any = {}
  if present:
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    args = ocp.args.PyTreeRestore(
      unflatten_dict(like), restore_args=unflatten_dict(how), partial_restore=True
    )
    got = reader.restore(folder / "state", args=args)
  named = {name: x for name, (_, x) in named_leaves(got).items()}
  arrays = []
  for leaf, place in zip(leaves, places, strict=True):
    name = ".".join(map(str, leaf.path))
    if leaf.size == 0:
      arrays.append(jnp.zeros(leaf.shape, jnp.dtype(leaf.dtype), device=place))
      continue
    x = named.get(name)
    if not isinstance(x, jax.Array) or (x.shape, str(x.dtype)) != (leaf.shape, leaf.dtype):
      raise Damaged(f"{name} is missing or of another shape")
    arrays.append(x)
  return arrays


@contextlib.contextmanager
def _without_tracebacks():
  """Keeps reads that are going on when another one fails from printing tracebacks."""

  def drop(record: python_logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()

  def hook(unraisable: Any) -> None:
    late = "Event loop is closed" in str(unraisable.exc_value)
    if not late and not inspect.iscoroutine(unraisable.object):
      previous(unraisable)

  log, previous = python_logging.getLogger("asyncio"), sys.unraisablehook
  log.addFilter(drop)
  sys.unraisablehook = hook
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", message=".* was never awaited")
      yield
  finally:
    sys.unraisablehook = previous
    log.removeFilter(drop)


def _innermost(error: BaseException) -> str:
  while error.__cause__ is not None:
    error = error.__cause__
  text = " ".join(str(error).split()).split(" [", 1)[0]
  return text[:300] or type(error).__name__


def _place(want: Any) -> jax.sharding.Sharding:
  here = getattr(want, "sharding", None)
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if here is None else here


def _check_parts(folder: epath.Path, record: Record, parts: set) -> None:
  have = {leaf.path[0] for leaf in record.leaves.values()}
  if absent := sorted(map(str, parts - have)):
    raise InputError(
      f"{folder} holds no {' and no '.join(absent)}, only {', '.join(sorted(map(str, have)))}."
    )


def _check_x64(folder: epath.Path, saved: dict[str, Leaf]) -> None:
  if jax.config.read("jax_enable_x64"):
    return
  wide = [name for name, leaf in saved.items() if leaf.dtype in ("float64", "int64", "uint64")]
  if wide:
    raise InputError(
      f"{folder} holds 64-bit arrays ({', '.join(wide)}), which JAX would narrow: set "
      "JAX_ENABLE_X64=1."
    )
