"""Adapters of torch PEFT that begin at something: what it takes off the base when it reads them.

PiSSA begins at the largest singular values of a matrix (Meng et al., arXiv:2404.02948), OLoRA at
the first columns of its QR decomposition (Büyükakyüz, arXiv:2406.01775). No file says what they
began as: whoever reads one computes it from the base again.
"""

from typing import Any

import numpy as np

from model.errors import InputError
from model.peft.tensors import Part, TheirModule, cut
from model.quant import Quantized

_FROM_BASE = ("pissa", "olora")
# With these an update begins at nothing, or the file holds all of it.
_PLAIN = (None, True, False, "true", "false", "gaussian", "orthogonal", "eva", "mica")


def check_init(config: dict[str, Any], path: Any) -> None:
  """Raises an InputError if an adapter changed its base in a way that its file does not tell."""
  kind = _kind(config)
  turned = kind == "olora" and bool(config.get("fan_in_fan_out"))
  if kind in (*_PLAIN, *_FROM_BASE) and not turned:
    return
  raise InputError(
    f"{path}: init_lora_weights={kind!r} changes the base before training"
    f"{' (with fan_in_fan_out)' if turned else ''}, and the file does not tell how: let PEFT's "
    "save_pretrained write an ordinary LoRA, with path_initial_model_for_weight_conversion."
  )


def with_start(
  ours: list[Part], config: dict[str, Any], module: TheirModule, leaves: Any, scale: float
) -> list[Part]:
  """The part at each place, with what A and B began as where that counts.

  Args:
    leaves: parameters of the base, flat.

  Raises:
    InputError: for a base whose matrices are quantized: they are not those that were taken apart.
  """
  kind, weight = _kind(config), leaves[module.places[0].path]
  if kind not in _FROM_BASE or module.places[0].path[-1] == "table":  # Tables begin at nothing.
    return ours
  if isinstance(weight, Quantized):
    raise InputError(
      f"init_lora_weights={kind!r} takes {module.name} apart, and the base keeps it in "
      f"{weight.format.name}: load it without quantize=."
    )
  matrix = module.matrix([cut(leaves, place).astype(np.float32) for place in module.places])
  begun = module.to_ours(_first(str(kind), matrix, ours[0].rank, scale), scale)
  start = lambda part: {f"start_{name}": part.arrays[name] for name in ("a", "b")}
  return [Part(one.arrays | start(b), one.scale) for one, b in zip(ours, begun, strict=True)]


def _first(kind: str, matrix: np.ndarray, rank: int, scale: float) -> dict[str, np.ndarray]:
  """PEFT's A and B of a matrix (outputs, inputs)."""
  if kind == "olora":
    q, r = np.linalg.qr(matrix)
    return {"A": r[:rank], "B": q[:, :rank]}
  u, s, vh = np.linalg.svd(matrix, full_matrices=False)
  root = np.sqrt(s[:rank] / np.float32(scale))
  return {"A": root[:, None] * vh[:rank], "B": u[:, :rank] * root}


def _kind(config: dict[str, Any]) -> Any:
  kind = config.get("init_lora_weights")
  return kind.lower() if isinstance(kind, str) else kind
