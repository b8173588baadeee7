"""The settings of generation: declared once, checked once, each impossible value named."""

import dataclasses
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from model.errors import InputError, nearest

DEFAULT_NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What `infer.generate` takes, with Transformers' meaning where it has the same thing."""

  max_new_tokens: int | None = None  # None: 64, or as many as the model has positions for.
  min_new_tokens: int = 0  # No end token, stop token or stop string counts before.
  stop: Sequence[str | int] | str | int = ()  # Strings or token ids that end a sequence.
  temperature: float = 0.0  # 0 is greedy.
  top_k: int | None = None  # Draw from the k most probable tokens.
  top_p: float | None = None  # Draw from the most probable tokens that sum to p.
  min_p: float | None = None  # Draw from tokens at least p times as probable as the best.
  seed: int | Sequence[int] = 0  # One for every prompt, or one each.
  logprobs: int | None = None  # Also report this many of the most probable tokens.

  def __post_init__(self):
    _whole("min_new_tokens", self.min_new_tokens, least=0)
    if self.max_new_tokens is not None:
      _whole("max_new_tokens", self.max_new_tokens, least=1)
    if self.min_new_tokens > self.most_new_tokens():
      raise InputError(
        f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.most_new_tokens()}."
      )
    _number("temperature", self.temperature, "at least 0 (0 is greedy)", lambda t: t >= 0)
    if self.top_k is not None:
      _whole("top_k", self.top_k, least=1)
    if self.top_p is not None:
      _number("top_p", self.top_p, "above 0 and at most 1 (leave it out for no limit)",
              lambda p: 0 < p <= 1)  # fmt: skip
    if self.min_p is not None:
      _number("min_p", self.min_p, "between 0 and 1", lambda p: 0 <= p <= 1)
    if self.logprobs is not None:
      _whole("logprobs", self.logprobs, least=1)
    for seed in self._seeds():
      if not _is_whole(seed) or not 0 <= seed < 2**64:
        raise InputError(f"seed={seed!r} must be a whole number from 0 to 2**64 - 1.")
    for stop in self._stops():
      if isinstance(stop, str) and not stop:
        raise InputError("stop='' is an empty string, which is everywhere: leave it out.")
      if not isinstance(stop, str):
        _whole("stop", stop, least=0)

  def most_new_tokens(self) -> int:
    """`max_new_tokens`, the default resolved; a model may have room for fewer."""
    return DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

  def _stops(self) -> list[str | int]:
    return [self.stop] if isinstance(self.stop, str | int) else _items("stop", self.stop)

  def _seeds(self) -> list[int]:
    return [self.seed] if isinstance(self.seed, int) else _items("seed", self.seed)

  def stop_strings(self) -> tuple[str, ...]:
    """The stop strings among `stop`."""
    return tuple(s for s in self._stops() if isinstance(s, str))

  def stop_ids(self) -> tuple[int, ...]:
    """The token ids among `stop`."""
    return tuple(int(s) for s in self._stops() if not isinstance(s, str))

  def seeds(self, prompts: int) -> list[int]:
    """The seed of each prompt.

    Raises:
      InputError: if `seed` is a list of another length.
    """
    seeds = [int(s) for s in self._seeds()]
    if isinstance(self.seed, Integral):
      return seeds * prompts
    if len(seeds) != prompts:
      raise InputError(
        f"seed has {len(seeds)} values for {prompts} prompts: give one number, or one per prompt."
      )
    return seeds


def settings_of(values: dict[str, Any]) -> Settings:
  """The settings of keyword arguments.

  Raises:
    InputError: for an unknown name, with the nearest ones, or an impossible value.
  """
  known = [f.name for f in dataclasses.fields(Settings)]
  for name in values:
    if name not in known:
      raise InputError(
        f"unknown setting {name!r} of generate.{nearest(name, known)} Known: {', '.join(known)}."
      )
  return Settings(**values)


def _is_whole(value: Any) -> bool:
  return isinstance(value, Integral) and not isinstance(value, bool)


def _whole(name: str, value: Any, *, least: int) -> None:
  if not _is_whole(value) or not least <= value < 2**31:
    raise InputError(f"{name}={value!r} must be a whole number of at least {least}.")


def _number(name: str, value: Any, wanted: str, allowed) -> None:
  number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
  if not number or not allowed(value):
    raise InputError(f"{name}={value!r} must be a number {wanted}.")


def _items(name: str, value: Any) -> list:
  if isinstance(value, Integral):  # NumPy's.
    return [value]
  if isinstance(value, str | bytes | dict) or not hasattr(value, "__iter__"):
    raise InputError(f"{name}={value!r} must be one value or a list of them.")
  return list(value)
