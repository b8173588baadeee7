"""What is computed: modules, and the forms that their parameters take."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from model.loading import load
  from model.saving import save
  from model.trained import Model

__all__ = ["Model", "load", "save"]

_MODULES = {"Model": "model.trained", "load": "model.loading", "save": "model.saving"}


def __getattr__(name: str):
  # A configuration file imports model.config; it should not wait for Orbax.
  if name in _MODULES:
    return getattr(importlib.import_module(_MODULES[name]), name)
  raise AttributeError(f"module 'model' has no attribute {name!r}")
