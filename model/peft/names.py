"""Names of modules and parameters as a person writes them, and patterns over them."""

import fnmatch
from collections.abc import Iterable, Sequence

from model.config import ModelConfig
from model.errors import InputError, nearest

Path = tuple[str | int, ...]
KEY = "adapter"  # In the path of a parameter: it is one of an adapter.


class Names:
  """Dotted names of what lies at a path, with the numbers of layers in their stacks.

  A path in the nested dict of parameters counts stacks of equal layers instead
  (`decoder.layers.0.attn` may be layers 0, 2, 4 …).
  """

  def __init__(self, cfg: ModelConfig):
    self._layers: dict[tuple[str, int], list[int]] = {}
    for stack in cfg.stacks:
      first, number = 0, 0
      for pattern, n in cfg.groups(stack):
        for _ in range(n // cfg.layer_uses(stack)):
          for place in range(len(pattern)):
            self._layers.setdefault((stack, first + place), []).append(number)
            number += 1
        first += len(pattern)

  def of(self, path: Path) -> list[str]:
    """A name for each layer that is stacked at `path`, in their order; one where none are."""
    layers = self.layers(path)
    if layers is None:
      return [".".join(map(str, path))]
    return [".".join(map(str, (*path[:2], i, *path[3:]))) for i in layers]

  def layers(self, path: Path) -> list[int] | None:
    """The numbers of the layers that are stacked at `path`; None: none are."""
    if len(path) < 3 or path[1] != "layers":
      return None
    return self._layers.get((str(path[0]), int(path[2])))


def matches(pattern: str, name: str) -> bool:
  """Whether a pattern is all of a name, its end, its beginning, or whole words inside it."""
  forms = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
  return any(fnmatch.fnmatchcase(name, form) for form in forms)


def any_matches(patterns: Iterable[str], name: str) -> bool:
  """Whether one of them does."""
  return any(matches(pattern, name) for pattern in patterns)


def check_used(field: str, patterns: Sequence[str], names: Sequence[str]) -> None:
  """Raises an InputError for a pattern that matches none of `names`."""
  for pattern in patterns:
    if not any(matches(pattern, name) for name in names):
      words = {part for name in names for part in name.split(".") if not part.isdecimal()}
      examples = ", ".join(names[:3])
      raise InputError(
        f"peft.{field} has {pattern!r}, which matches nothing in this model."
        f"{nearest(pattern.split('.')[-1], words)} Names are as in {examples}."
      )
