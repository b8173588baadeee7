"""GGUF files: metadata, and tensors that are decoded one at a time.

The `gguf` package decodes quantized blocks. Its reader believes the counts and offsets of a file,
so files are read here, where each of them is bounded by the size of the file.
Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

import dataclasses
import itertools
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from model.errors import InputError

# ggml's numbers of kinds of tensors.
_FLOATS = {
  0: np.dtype(np.float32), 1: np.dtype(np.float16), 30: np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
_BLOCKS = {
  2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
  13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS",
}  # fmt: skip
_KNOWN = ("F32", "F16", "BF16", *_BLOCKS.values())
_STRING, _ARRAY = 8, 9  # Kinds of metadata that have no size of their own.
_NUMBERS = {
  0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
  11: "<i8", 12: "<f8",
}  # fmt: skip
_LEAST_PAIR, _LEAST_TENSOR = 13, 24  # Bytes that a pair of metadata, and a tensor's entry, take.
_MOST_AXES = 4
_PART = 1 << 20  # Elements that are decoded at a time.

Change = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file, which `np.asarray` decodes.

  Attributes:
    data: bytes of its rows on the memory map, or floats.
    kind: ggml's number of what its blocks are; None: `data` are floats.
    change: what is done to the decoded array.
  """

  data: np.ndarray
  kind: int | None
  shape: tuple[int, ...]
  dtype: np.dtype
  change: Change | None = None

  @property
  def _mmap(self) -> Any:
    """The map, as arrays on maps have it."""
    return getattr(self.data, "_mmap", None)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    array = self.data if self.kind is None else _decoded(self.data, self.kind)
    array = array.reshape(self.shape)
    return (array if self.change is None else self.change(array)).astype(
      self.dtype if dtype is None else dtype, copy=bool(copy)
    )


@dataclasses.dataclass(frozen=True)
class File:
  """What a file holds: metadata by key, with arrays of numbers on the memory map, and tensors."""

  path: Path
  metadata: dict[str, Any]
  tensors: dict[str, Tensor]

  def one(self, key: str, default: Any) -> Any:
    """A text, a number, or true or false.

    Raises:
      InputError: if it is an array.
    """
    value = self.metadata.get(key, default)
    if isinstance(value, np.ndarray | list):
      raise InputError(f"{self.path}: {key} is an array of {len(value)}, expected one value.")
    return value


def open_file(path: Path) -> File:
  """Reads metadata; of tensors nothing is read yet.

  Raises:
    InputError: if it is no GGUF file, one of several, damaged, or has tensors of an unknown kind.
  """
  if not path.is_file():
    raise InputError(f"{path} does not exist, or is no file.")
  if path.stat().st_size < 24:
    raise InputError(f"{path} is no GGUF file: it has {path.stat().st_size} bytes.")
  reader = _Reader(path, np.memmap(path, np.uint8, mode="r"))
  if reader.take(4, "the magic") != b"GGUF":
    raise InputError(f"{path} is no GGUF file: it does not begin with GGUF.")
  version = reader.number("<u4", "the version")
  if version not in (2, 3):
    raise InputError(
      f"{path} is GGUF version {version}, only 2 and 3 in little-endian order can be read."
    )
  n_tensors, n_pairs = reader.number("<u8", "a count"), reader.number("<u8", "a count")
  if n_tensors * _LEAST_TENSOR + n_pairs * _LEAST_PAIR > reader.left:
    raise reader.damaged(f"{n_tensors} tensors and {n_pairs} pairs of metadata have no room in it")
  metadata: dict[str, Any] = {}
  for _ in range(n_pairs):
    key = reader.string("a key")
    if key in metadata:
      raise reader.damaged(f"the key {key!r} is there twice")
    metadata[key] = reader.value(key)
  file = File(path, metadata, reader.tensors(n_tensors, metadata))
  if (count := file.one("split.count", 1)) not in (0, 1):
    raise InputError(
      f"{path} is one of {count} files of a model: join them with llama.cpp's gguf-split --merge."
    )
  return file


class _Reader:
  """Reads what lies one after the other; nothing reaches beyond the end of the file."""

  def __init__(self, path: Path, data: np.ndarray):
    self._path, self._data, self._at = path, data, 0
    self._bytes: Any = memoryview(data)  # pyright: ignore

  @property
  def left(self) -> int:
    return len(self._data) - self._at

  def damaged(self, what: str) -> InputError:
    return InputError(f"{self._path} is damaged or cut off: {what}.")

  def take(self, size: int, what: str) -> memoryview:
    if size > self.left:
      raise self.damaged(f"{what} needs {size} bytes at byte {self._at}, and {self.left} are left")
    self._at += size
    return self._bytes[self._at - size : self._at]

  def number(self, kind: str, what: str) -> Any:
    found = np.frombuffer(self.take(np.dtype(kind).itemsize, what), kind)[0]
    # The shortest decimals that name a float32: 1e-05 and not 9.999999747378752e-06.
    return float(str(found)) if kind == "<f4" else found.item()

  def string(self, what: str) -> str:
    (size,) = struct.unpack("<Q", self.take(8, what))
    try:
      return str(self.take(size, what), "utf-8")
    except UnicodeDecodeError:
      raise self.damaged(f"{what} is no UTF-8") from None

  def value(self, key: str) -> Any:
    kind = self.number("<u4", key)
    if kind in _NUMBERS:
      return self.number(_NUMBERS[kind], key)
    if kind == _STRING:
      return self.string(key)
    if kind != _ARRAY:
      raise self.damaged(f"{key} is of the unknown kind {kind}")
    kind, count = self.number("<u4", key), self.number("<u8", key)
    if kind == _STRING:
      if count * 8 > self.left:
        raise self.damaged(f"{key} has {count} texts, more than there is room for")
      return [self.string(key) for _ in range(count)]
    if kind not in _NUMBERS:
      raise self.damaged(f"{key} is an array of the unknown kind {kind}")
    dtype = np.dtype(_NUMBERS[kind])
    return np.frombuffer(self.take(count * dtype.itemsize, key), dtype)

  def tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, Tensor]:
    entries = {}
    for _ in range(count):
      name = self.string("a name of a tensor")
      if name in entries:
        raise self.damaged(f"the tensor {name!r} is there twice")
      axes = self.number("<u4", name)
      if axes > _MOST_AXES:
        raise self.damaged(f"{name} has {axes} axes, and {_MOST_AXES} is the most")
      shape = tuple(self.number("<u8", name) for _ in range(axes))[::-1]
      entries[name] = (shape, self.number("<u4", name), self.number("<u8", name))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
      raise self.damaged(f"general.alignment={alignment!r} is no power of two")
    start = -(-self._at // alignment) * alignment
    found, spans = {}, []
    for name, (shape, kind, offset) in entries.items():
      begin, size = start + offset, self._size(name, shape, kind)
      if offset % alignment or begin + size > len(self._data):
        raise self.damaged(
          f"{name} {list(shape)} needs {size} bytes at byte {begin} of {len(self._data)}"
        )
      found[name] = self._tensor(shape, kind, self._data[begin : begin + size])
      spans.append((begin, begin + size, name))
    spans.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
      if begin < end:
        raise self.damaged(f"{first} and {second} share bytes")
    return found

  def _size(self, name: str, shape: tuple[int, ...], kind: int) -> int:
    if not shape or 0 in shape:
      raise self.damaged(f"{name} has the shape {list(shape)}")
    if kind in _FLOATS:
      return math.prod(shape) * _FLOATS[kind].itemsize
    if kind not in _BLOCKS:
      raise InputError(
        f"{self._path}: {name} is of ggml's kind {_name(kind)}, expected one of "
        f"{', '.join(_KNOWN)}: convert it with llama.cpp's llama-quantize."
      )
    length, size = _block(kind)
    if shape[-1] % length:
      raise self.damaged(
        f"{name} {list(shape)} has rows that are no multiple of {_BLOCKS[kind]}'s {length}"
      )
    return math.prod(shape) // length * size

  def _tensor(self, shape: tuple[int, ...], kind: int, data: np.ndarray) -> Tensor:
    if kind in _FLOATS:
      return Tensor(data.view(_FLOATS[kind]), None, shape, _FLOATS[kind])
    return Tensor(data, kind, shape, np.dtype(np.float32))


def _name(kind: int) -> str:
  from gguf import GGMLQuantizationType

  return next((one.name for one in GGMLQuantizationType if one == kind), str(kind))


def _block(kind: int) -> tuple[int, int]:
  """(elements, bytes) of a block."""
  from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

  return GGML_QUANT_SIZES[GGMLQuantizationType[_BLOCKS[kind]]]


def _decoded(data: np.ndarray, kind: int) -> np.ndarray:
  """Blocks as float32, in parts: beside the result little memory is held."""
  from gguf import GGMLQuantizationType, dequantize

  length, size = _block(kind)
  blocks = data.reshape(-1, size)
  out, step = np.empty((len(blocks), length), np.float32), _PART // length
  wanted = GGMLQuantizationType[_BLOCKS[kind]]
  for i in range(0, len(blocks), step):
    part = blocks[i : i + step].reshape(1, -1)  # As one row, for it takes sixteen rows at a time.
    out[i : i + step] = dequantize(part, wanted).reshape(-1, length)
  return out
