"""Values beside annotations of types: what a person or a file gives for a field."""

import types
import typing
from typing import Any


def is_of(value: Any, kind: Any) -> bool:
  """Whether a value is of an annotated type. A whole number is a float too, a bool is no number."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is types.UnionType:
    return any(is_of(value, k) for k in args)
  if origin is tuple and not isinstance(value, tuple):
    return False
  if origin is tuple:
    kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
    return len(value) == len(kinds) and all(map(is_of, value, kinds))
  if kind in (int, float):
    return isinstance(value, int | kind) and not isinstance(value, bool)
  return isinstance(value, kind)
