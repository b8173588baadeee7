"""MXFP4, as GPT-OSS is published: four-bit floats in blocks that share an exponent, as bfloat16.

Format: OCP Microscaling Formats 1.0. Nothing is lost: bfloat16 holds all of these numbers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from model.errors import InputError
from model.hf.safetensors_files import forget

_SIZES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate((_SIZES, -_SIZES))  # By the four bits: a sign, two of exponent, one more.
_BIAS = 127  # Of exponents.


@dataclasses.dataclass(frozen=True)
class Packed:
  """The same matrix of every expert, decoded whenever an array is made of it.

  Attributes:
    blocks: uint8 (experts, outputs, blocks, bytes), two numbers a byte, the lower bits first.
    scales: uint8 (experts, outputs, blocks).
  """

  blocks: np.ndarray
  scales: np.ndarray
  dtype = np.dtype(ml_dtypes.bfloat16)

  @property
  def shape(self) -> tuple[int, ...]:
    """(experts, inputs, outputs)."""
    experts, outputs, blocks, size = self.blocks.shape
    return experts, blocks * size * 2, outputs

  @property
  def ndim(self) -> int:
    return 3

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    out = np.empty(self.shape, self.dtype)
    for expert, blocks, scales in zip(out, self.blocks, self.scales, strict=True):
      pairs = np.stack((blocks & 15, blocks >> 4), axis=-1)
      values = _VALUES[pairs.reshape(*scales.shape, -1)]
      exponents = scales.astype(np.int32)[..., None] - _BIAS
      expert[...] = np.ldexp(values, exponents).reshape(len(blocks), -1).T
    forget(self.blocks)
    forget(self.scales)
    return out if dtype is None else out.astype(dtype)


def unpacked(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The tensors of a folder with one for each pair of blocks and scales.

  Raises:
    InputError: for blocks and scales that do not fit each other.
  """
  out: dict[str, Any] = {}
  for name, array in tensors.items():
    whole = name.removesuffix("_blocks").removesuffix("_scales")
    if whole == name:
      out[name] = array
      continue
    pair = [tensors.get(f"{whole}_{part}") for part in ("blocks", "scales")]
    shapes = [None if one is None else one.shape for one in pair]
    fit = None not in shapes and len(shapes[0] or ()) == 4 and (shapes[0] or ())[:3] == shapes[1]
    if not fit or any(one is None or one.dtype != np.uint8 for one in pair):
      raise InputError(
        f"{whole} in MXFP4 needs bytes of (experts, outputs, blocks, bytes) as {whole}_blocks and "
        f"of (experts, outputs, blocks) as {whole}_scales, and they have shapes {shapes}."
      )
    out[whole] = Packed(*pair)  # pyright: ignore[reportArgumentType]
  return out
