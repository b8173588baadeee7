"""pytorch_model.bin: tensors that torch.save wrote, read without torch.

A pickle may name any function to be called. Here it may name those that make tensors, which are our
own: anything else is refused. Format: torch/serialization.py, zip files (torch 1.6 and later).
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from model.errors import InputError

_STORAGES = {
  "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
  "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}  # fmt: skip
_LARGEST_PICKLE = 100_000_000  # Bytes: it holds names and shapes, no tensors.


def open_torch_file(path: Path) -> dict[str, np.ndarray]:
  """The tensors of a state dict by name, each an array on a memory map.

  Raises:
    InputError: if the file is damaged, or its pickle names anything but tensors.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      entries = {info.filename: info for info in archive.infolist()}
      pickled = next((n for n in entries if n.endswith("/data.pkl")), None)
      if pickled is None or entries[pickled].file_size > _LARGEST_PICKLE:
        raise InputError(f"{path} is no state dict of torch: it has no pickle of tensors.")
      packed = [n for n, e in entries.items() if e.compress_type != zipfile.ZIP_STORED]
      if packed:
        raise InputError(
          f"{path} is refused: {packed[0]} is compressed, and torch stores as it is."
        )
      text, folder = archive.read(pickled), pickled.removesuffix("data.pkl")
  except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
    raise InputError(f"{path} is no file of torch 1.6 or later, or is cut off: {error}.") from None
  data = np.memmap(path, np.uint8, mode="r")

  def storage(kind: np.dtype, key: str, count: int) -> np.ndarray:
    entry = entries.get(f"{folder}data/{key}")
    if entry is None or count * kind.itemsize > entry.file_size:
      raise InputError(f"{path} is damaged: storage {key!r} is missing or too short.")
    # The local header: 30 bytes, then a name and an extra field of its own length.
    head = data[entry.header_offset : entry.header_offset + 30]
    begin = entry.header_offset + 30 + int(head[26:28].view("<u2")[0])
    begin += int(head[28:30].view("<u2")[0])
    if begin + entry.file_size > len(data):
      raise InputError(f"{path} is cut off: storage {key!r} ends behind the file.")
    return data[begin : begin + count * kind.itemsize].view(kind)

  try:
    found = _Unpickler(io.BytesIO(text), storage).load()
  except InputError as error:
    raise InputError(f"{path}: {error}") from None
  except Exception as error:  # A damaged pickle can raise anything.
    raise InputError(f"{path} is damaged: {type(error).__name__}: {error}.") from None
  state = found.get("state_dict", found) if isinstance(found, dict) else None
  tensors = dict(state) if isinstance(state, dict) else {}
  named = (isinstance(n, str) and isinstance(a, np.ndarray) for n, a in tensors.items())
  if not tensors or not all(named):
    raise InputError(f"{path} is no state dict of torch: a mapping from names to tensors.")
  return tensors


class _Unpickler(pickle.Unpickler):
  """Knows tensors and their containers only."""

  def __init__(self, file: io.BytesIO, storage):
    super().__init__(file)
    self._storage = storage

  def find_class(self, module: str, name: str) -> Any:
    if module == "torch" and name in _STORAGES:
      return np.dtype(_STORAGES[name])
    known = {
      ("collections", "OrderedDict"): OrderedDict,
      ("torch._utils", "_rebuild_tensor_v2"): _tensor,
      ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    }
    if (module, name) not in known:
      raise InputError(f"its pickle names {module}.{name}, which is no tensor: refused.")
    return known[module, name]

  def persistent_load(self, pid: Any) -> np.ndarray:
    _, kind, key, _, count = pid
    return self._storage(kind, key, count)


def _tensor(storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_: Any) -> np.ndarray:
  """A view of a storage; torch counts strides in elements."""
  last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
  if min((offset, *shape, *stride)) < 0 or (math.prod(shape) and last >= len(storage)):
    raise InputError(f"a tensor of shape {shape} reaches beyond its storage.")
  strides = [s * storage.itemsize for s in stride]
  return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)
