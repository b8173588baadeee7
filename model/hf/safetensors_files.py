"""safetensors files: read from a memory map, written as a stream, split over several with an index.

The library reads no float8 through NumPy and holds all tensors of a file in memory to write it.
Format: github.com/huggingface/safetensors, "Format".
"""

import json
import math
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from model.errors import InputError
from model.json_files import read_json

DTYPES = {
  "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # Bytes; the library's own limit.
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def open_folder(folder: Path) -> dict[str, np.ndarray]:
  """The tensors of a folder by name, each an array on a memory map: nothing is read yet.

  Raises:
    InputError: if the folder holds none, a file is damaged, or the index does not fit its files.
  """
  if (folder / INDEX).is_file():
    return open_indexed(folder, INDEX, open_file)
  path = folder / SINGLE
  if not path.is_file():
    raise InputError(
      f"folder {str(folder)!r} holds no tensors: expected {SINGLE} or {INDEX}, or else "
      "pytorch_model.bin or its index."
    )
  return open_file(path)


def forget(array: np.ndarray) -> None:
  """Lets the system take back what was read of a mapped file: its pages are not the process's."""
  mapped = getattr(array, "_mmap", None)
  if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
    mapped.madvise(mmap.MADV_DONTNEED)


def open_file(path: Path) -> dict[str, np.ndarray]:
  """The tensors of a file by name, as `open_folder`."""
  size = path.stat().st_size
  if size < 8:
    raise InputError(f"{path} is damaged: it has {size} bytes, too few for a header.")
  data = np.memmap(path, np.uint8, mode="r")
  length = int(data[:8].view("<u8")[0])
  if length > min(_LONGEST_HEADER, size - 8):
    raise InputError(f"{path} is damaged: its header of {length} bytes is longer than the file.")
  try:
    header = json.loads(bytes(data[8 : 8 + length]))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
  except (ValueError, AttributeError, RecursionError):
    raise InputError(f"{path} is damaged: its header is not a JSON object.") from None
  body = data[8 + length :]
  arrays, spans = {}, []
  for name, entry in entries.items():
    dtype, shape, begin, end = _entry(path, name, entry, len(body))
    arrays[name] = body[begin:end].view(dtype).reshape(shape)
    spans.append((begin, end, name))
  at = 0
  for begin, end, name in sorted(spans):
    if begin != at:
      raise InputError(f"{path} is damaged: {name} begins at byte {begin}, expected {at}.")
    at = end
  if at != len(body):
    raise InputError(f"{path} is damaged: {len(body)} bytes of tensors, its header tells of {at}.")
  return arrays


def _entry(path: Path, name: str, entry: Any, limit: int) -> tuple[np.dtype, list[int], int, int]:
  try:
    kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
      raise ValueError
  except (TypeError, KeyError, ValueError):
    raise InputError(f"{path} is damaged: its header says of {name} what is no tensor.") from None
  if not isinstance(kind, str) or kind not in DTYPES:
    raise InputError(f"{path}: {name} has dtype {kind!r}, expected one of {', '.join(DTYPES)}.")
  dtype, bytes_ = DTYPES[kind], math.prod(shape) * DTYPES[kind].itemsize
  if end - begin != bytes_ or end > limit:
    raise InputError(
      f"{path} is damaged or cut off: {name} {kind}{shape} needs {bytes_} bytes and lies at "
      f"{begin}:{end} of {limit}."
    )
  return dtype, shape, begin, end


def open_indexed(
  folder: Path, index_name: str, open_one: Callable[[Path], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
  """The tensors of the files that an index names, each opened by `open_one`.

  Raises:
    InputError: if it is damaged, names files that are none of the folder's, or does not fit them.
  """
  path, end = folder / index_name, Path(index_name).suffixes[-3]
  try:
    index = read_json(path)["weight_map"]
    names = sorted(set(index.values()))
  except (KeyError, TypeError, AttributeError):
    raise InputError(f"{path} is damaged: it has no weight_map of files.") from None
  arrays = {}
  for name in names:
    if not isinstance(name, str) or not re.fullmatch(rf"[\w.-]+\{end}", name):
      raise InputError(f"{path} names {name!r}, which is no file of this folder.")
    if not (folder / name).is_file():
      raise InputError(f"{folder / name} is missing: {index_name} names it.")
    arrays[name] = open_one(folder / name)
  wrong = sorted(n for n, file in index.items() if n not in arrays[file])
  unnamed = sorted(n for file, found in arrays.items() for n in found if index.get(n) != file)
  if wrong or unnamed:
    raise InputError(
      f"{path} does not fit its files: {len(wrong)} tensors are not where it says "
      f"{wrong[:3]}, and it does not know {len(unnamed)} {unnamed[:3]}."
    )
  return {name: arrays[file][name] for name, file in index.items()}


def write_folder(
  folder: Path, shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
  tensors: Iterable[tuple[str, np.ndarray]], *, largest: int = 5_000_000_000,
) -> None:  # fmt: skip
  """Writes one file, or several with an index.

  Args:
    shapes: dtype and shape of each tensor, in the order in which `tensors` gives them.
    tensors: the tensors, of which one at a time is held.
    largest: bytes of tensors in a file, unless a single tensor is larger.
  """
  groups, size = [[]], 0
  bytes_of = {n: math.prod(shape) * dtype.itemsize for n, (dtype, shape) in shapes.items()}
  for name in shapes:
    if groups[-1] and size + bytes_of[name] > largest:
      groups.append([])
      size = 0
    groups[-1].append(name)
    size += bytes_of[name]
  n, index, stream = len(groups), {}, iter(tensors)
  for i, names in enumerate(groups):
    file = SINGLE if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"
    _write_file(folder / file, {name: shapes[name] for name in names}, stream)
    index |= dict.fromkeys(names, file)
  if n > 1:
    whole = {"metadata": {"total_size": sum(bytes_of.values())}, "weight_map": index}
    (folder / INDEX).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a file of tensors that are all at hand."""
  shapes = {name: (array.dtype, array.shape) for name, array in tensors.items()}
  _write_file(path, shapes, iter(tensors.items()))


def _write_file(
  path: Path, shapes: dict[str, tuple[np.dtype, tuple[int, ...]]],
  stream: Iterator[tuple[str, np.ndarray]],
) -> None:  # fmt: skip
  header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
  at = 0
  for name, (dtype, shape) in shapes.items():
    end = at + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
    at = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # So that tensors are aligned.
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name, (dtype, shape) in shapes.items():
      given, array = next(stream)
      if (given, array.dtype, array.shape) != (name, dtype, tuple(shape)):
        raise ValueError(f"{given} {array.dtype}{array.shape} was given as {name} {dtype}{shape}.")
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
      del array  # It may be all that keeps a large parameter, and the next one is made now.
