"""What is computed: modules, and the forms that their parameters take."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from model.loading import Model, load, save

__all__ = ["Model", "load", "save"]


def __getattr__(name: str):
  # A configuration file imports model.config; it should not wait for Orbax.
  if name in __all__:
    from model import loading

    return getattr(loading, name)
  raise AttributeError(f"module 'model' has no attribute {name!r}")
