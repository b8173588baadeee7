"""The JSON record beside a checkpoint's arrays: what it holds, and whether it is undamaged."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from model.errors import InputError
from model.fingerprint import check_dtype, fingerprints

LAYOUT_VERSION = 2  # Of the parameters' names, shapes and meaning, and of this record.

Path = tuple[str | int, ...]  # Keys from the root of a state to a leaf; list indices are ints.


class Damaged(Exception):
  """A checkpoint that is not what was saved. The message says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Leaf:
  """What was saved of one array."""

  path: Path
  shape: tuple[int, ...]
  dtype: str
  fingerprint: str

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Record:
  """What one checkpoint says of itself; `leaves` by dotted name."""

  step: int
  meta: dict[str, Any]
  validation_loss: float | None
  leaves: dict[str, Leaf]

  @classmethod
  def of(cls, step: int, state: Any, meta: dict, validation_loss: float | None) -> "Record":
    """Describes `state`, a pytree of arrays; computes the fingerprints and waits for them.

    Raises:
      InputError: for a leaf that cannot be saved bit for bit.
    """
    arrays = named_leaves(state)
    for name, (_, x) in arrays.items():
      if not isinstance(x, jax.Array):
        raise TypeError(f"{name} is a {type(x).__name__}; a checkpoint holds jax.Arrays.")
      check_dtype(name, x.dtype)
    prints = fingerprints([x for _, x in arrays.values()])
    leaves = {
      name: Leaf(path, tuple(x.shape), str(x.dtype), print_)
      for (name, (path, x)), print_ in zip(arrays.items(), prints, strict=True)
    }
    loss = None if validation_loss is None else float(validation_loss)
    return cls(step, _plain(meta), loss if math.isfinite(loss or 0.0) else None, leaves)

  def to_json(self) -> dict[str, Any]:
    """Plain values with a checksum of all of them."""
    body = _plain({"layout_version": LAYOUT_VERSION, **dataclasses.asdict(self)})
    return {**body, "checksum": _checksum(body)}


def read_record(folder: epath.Path) -> Record:
  """Reads the record of one step's folder.

  Raises:
    Damaged: when it is missing, half-written or changed.
    InputError: when a newer version of this program wrote it.
  """
  file = folder / "record" / "metadata"
  if not folder.exists():
    raise Damaged("it is missing")
  try:
    body = json.loads(file.read_bytes())
    checksum = body.pop("checksum")
  except FileNotFoundError:
    missing = "its record is missing" if any(folder.iterdir()) else "it is empty"
    raise Damaged(f"{missing} (record/metadata)") from None
  except (ValueError, KeyError, AttributeError, TypeError):
    raise Damaged("its record (record/metadata) is not readable") from None
  if checksum != _checksum(body):
    raise Damaged("its record (record/metadata) differs from its checksum")
  version = body["layout_version"]
  if version > LAYOUT_VERSION:
    raise InputError(
      f"{folder} has layout version {version}; this program reads up to {LAYOUT_VERSION}: "
      "update the program, or use a checkpoint that it wrote."
    )
  leaves = {
    name: Leaf(tuple(x["path"]), tuple(x["shape"]), x["dtype"], x["fingerprint"])
    for name, x in body["leaves"].items()
  }
  return Record(body["step"], body["meta"], body["validation_loss"], leaves)


def named_leaves(tree: Any) -> dict[str, tuple[Path, Any]]:
  """`{dotted name: (path, leaf)}` of a pytree of dicts, dataclasses, tuples and lists."""
  named = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    path = tuple(_key(k) for k in keys)
    name = ".".join(map(str, path))
    if not path or name in named:
      raise ValueError(f"two leaves of the state would be saved as {name!r}: rename one.")
    named[name] = (path, leaf)
  return named


def check_tree(
  where: str, saved: dict[str, Leaf], wanted: dict[str, tuple[Path, Any]], *, cast: bool
) -> None:
  """Compares what is saved with what is wanted: names, shapes, dtypes.

  Args:
    where: the checkpoint, for the message.
    cast: whether another floating dtype will do.

  Raises:
    InputError: listing every leaf that is missing, surplus or of another shape or dtype.
  """
  missing = [n for n in wanted if n not in saved]
  surplus = [n for n in saved if n not in wanted]
  differs = []
  for name in (n for n in wanted if n in saved):
    have, want = saved[name], wanted[name][1]
    floats = all(jnp.issubdtype(d, jnp.floating) for d in (have.dtype, want.dtype))
    if have.shape != tuple(want.shape):
      differs.append(f"{name}: checkpoint {have.shape}, wanted {tuple(want.shape)}")
    elif have.dtype != str(want.dtype) and not (cast and floats):
      differs.append(f"{name}: checkpoint {have.dtype}, wanted {want.dtype}")
  problems = [
    f"{len(names)} {what}: {', '.join(names)}"
    for names, what in (
      (missing, "missing in the checkpoint"),
      (surplus, "only in the checkpoint"),
      (differs, "of another shape or dtype"),
    )
    if names
  ]
  if problems:
    raise InputError(
      f"{where} holds other arrays than this model and optimizer: {'; '.join(problems)}. "
      "Use the configuration that it was saved with, or another workdir."
    )


def check_config(saved: dict, current: dict, *, allowed: Iterable[str] = ()) -> None:
  """Compares a checkpoint's configuration with the current one; tuples equal lists.

  Args:
    saved, current: nested plain values.
    allowed: dotted names that may differ; a name stands for all below it.

  Raises:
    InputError: listing every field that differs.
  """
  free = tuple(allowed)
  old, new = _fields(_plain(saved)), _fields(_plain(current))
  differs = []
  for name in dict.fromkeys((*new, *old)):
    if any(name == a or name.startswith(a + ".") for a in free):
      continue
    have, want = (json.dumps(v[name]) if name in v else "not set" for v in (old, new))
    if have != want:
      differs.append(f"{name}: checkpoint {have}, config {want}")
  if differs:
    raise InputError(
      f"the checkpoint was saved with another configuration: {'; '.join(differs)}. Change the "
      "configuration back, or use another workdir."
    )


def _fields(tree: dict, prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    name = f"{prefix}{key}"
    if isinstance(value, dict) and value:
      flat |= _fields(value, name + ".")
    else:
      flat[name] = value
  return flat


def _key(entry: Any) -> str | int:
  for attribute in ("key", "idx", "name"):
    if hasattr(entry, attribute):
      key = getattr(entry, attribute)
      if isinstance(key, str | int):
        return key
  raise TypeError(f"{entry!r} in a state's tree is neither a name nor an index.")


def _plain(values: Any) -> Any:
  """What JSON gives back."""
  return json.loads(json.dumps(values))


def _checksum(body: dict) -> str:
  text = json.dumps(body, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()
