"""Quantization-aware training: a model learns what it is when its matrices have few bits.

A step rounds all matrices just as `model.load(workdir, quantize=format)` will, takes the loss and
its gradient there, and changes the float matrices by that gradient: rounding is passed straight
through (Bengio et al., arXiv:1308.3432; Jacob et al., arXiv:1712.05877, section 3). Formats that
round activations do so here too. Checkpoints hold the float matrices.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from model.quant import Format, Quantized
from model.quant_tree import format_of, quantize_leaf
from model.trained import TRAINED_BESIDE


@dataclasses.dataclass(frozen=True)
class Rounding:
  """What a format does to the parameters of a model, by their paths."""

  format: Format
  info: dict  # ParamInfo of each parameter.

  def __call__(self, params: dict) -> dict:
    """The values that quantized parameters stand for, in the dtype and place of each."""
    infos: Any = flatten_dict(self.info)

    def one(path: tuple, w: jax.Array) -> jax.Array:
      if path[0] in TRAINED_BESIDE:
        return w
      made = quantize_leaf(w, infos[path], self.format, _name(path))
      return made.dequantize(w.dtype) if isinstance(made, Quantized) else w

    leaves: Any = flatten_dict(params)
    return unflatten_dict({path: one(path, w) for path, w in leaves.items()})

  def mark(self, net: nnx.Module, shapes: dict) -> None:
    """Lets each layer whose activations the format rounds do so.

    Raises:
      InputError: if a group that was asked for does not divide the inputs of a matrix.
    """
    infos: Any = flatten_dict(self.info)
    leaves: Any = flatten_dict(shapes)
    for path, leaf in leaves.items():
      own = format_of(infos[path], leaf.shape, self.format, _name(path))
      if own is not None and own.dynamic and path[0] not in TRAINED_BESIDE:
        _module(net, path).rounds = own.kind


def _module(net: Any, path: tuple) -> Any:
  """The module that has the parameter at `path`."""
  for part in path[:-1]:
    net = net[part] if isinstance(part, int) else getattr(net, part)
  return net


def _name(path: tuple) -> str:
  return ".".join(map(str, path))
