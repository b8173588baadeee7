"""Parameters of adapters."""

from typing import Any

from flax import nnx


def adapter_param(
  value: Any, axes: tuple[str | None, ...], *, role: str = "matrix", inputs: int = 1
) -> nnx.LoRAParam:
  """A parameter that an adapter trains; see model.layers.param."""
  return nnx.LoRAParam(value, axes=axes, role=role, inputs=inputs)


def fixed_param(value: Any, axes: tuple[str | None, ...]) -> nnx.Param:
  """A number of an adapter that stays as it is."""
  return nnx.Param(value, axes=axes, role="vector", inputs=1)
