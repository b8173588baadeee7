"""Fields of config.json on rotary positions: base, share, scaling, the longest text."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.errors import InputError

# By type of scaling: (their parameter, ours, what is assumed without it; None: it is needed).
_ORIGINAL = ("original_max_position_embeddings", "rope_original_positions")
_SCALINGS: dict[str, dict[str, tuple[str, Any]]] = {
  "linear": {"factor": ("rope_factor", None)},
  "dynamic": {"factor": ("rope_factor", None)},
  "yarn": {
    "factor": ("rope_factor", None), "beta_fast": ("rope_beta_fast", 32.0),
    "beta_slow": ("rope_beta_slow", 1.0), "attention_factor": ("rope_attention_factor", ...),
    "truncate": ("rope_truncate", True),
  },
  "llama3": {
    "factor": ("rope_factor", None), "low_freq_factor": ("rope_low_freq_factor", None),
    "high_freq_factor": ("rope_high_freq_factor", None),
  },
  "longrope": {
    "factor": ("rope_factor", ...), "attention_factor": ("rope_attention_factor", ...),
    "short_factor": ("rope_short_factors", None), "long_factor": ("rope_long_factors", None),
  },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Base and scaling of rotary positions: `rope_theta` and `rope_scaling` of published folders, or
  `rope_parameters` of Transformers 5. Written in the first form, which both read.

  Attributes:
    theta: what is assumed without one.
    partial: whether a share of each head may rotate.
    share: what rotates where config.json does not tell.
    called: names that a family has of its own for base and share, and that decide.
    original: the length before scaling is a field beside them, which counts first, and this is what
      is assumed without it; None: it has no such field.
    assumed: the scaling where config.json has none.
    renamed: other names of types of scaling.
  """

  theta: float = 10_000.0
  partial: bool = False
  share: float = 1.0
  called: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
  original: int | None = None
  assumed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def names(self) -> tuple[str, ...]:
    more = ("partial_rotary_factor", *self.called) if self.partial else ()
    length = () if self.original is None else _ORIGINAL[:1]
    names = ("rope_theta", "rope_scaling", "rope_parameters", *more, *length)
    return tuple(dict.fromkeys(names))

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    given = scaling(values) or dict(self.assumed)
    kinds = {given.pop(name) for name in ("rope_type", "type") if name in given} or {"default"}
    kind, theta = kinds.pop(), given.pop("rope_theta", self._told(values, 0))
    kind = self.renamed.get(kind, kind)
    ours: dict[str, Any] = {"rope_theta": float(self.theta if theta is None else theta)}
    if self.partial:
      share = given.pop("partial_rotary_factor", self._told(values, 1))
      ours["rope_fraction"] = self.share if share is None else share
    _check_unread(values, ours)
    if kind == "default":
      _no_more(kind, given)
      return ours
    if kinds or kind not in _SCALINGS:
      raise InputError(
        f"config.json: rotary positions of type {kind!r} are not known, expected one of default, "
        f"{', '.join(_SCALINGS)}."
      )
    ours["rope_scaling"] = kind
    for name, (field, default) in _SCALINGS[kind].items():
      value = given.pop(name, None)
      if value is None and default is None:
        raise InputError(f"config.json: rotary positions of type {kind!r} need {name!r}.")
      if value is not None or default is not ...:
        ours[field] = _plain(default if value is None else value)
    if kind != "linear":
      ours[_ORIGINAL[1]] = self._original(kind, given, values)
    if kind == "longrope" and "rope_factor" not in ours:
      longest = values.get("max_position_embeddings") or ours[_ORIGINAL[1]]
      ours["rope_factor"] = max(longest / ours[_ORIGINAL[1]], 1.0)
    _no_more(kind, given)
    return ours

  def _told(self, values: Mapping[str, Any], which: int) -> float | None:
    names = dict.fromkeys((self.called[which], Rotary.called[which]))
    told = {name: values[name] for name in names if values.get(name) is not None}
    if len(set(told.values())) > 1:
      raise InputError(f"config.json: {told} differ, and mean the same.")
    return next(iter(told.values()), None)

  def _original(self, kind: str, given: dict[str, Any], values: Mapping[str, Any]) -> int:
    """The length before scaling, taken out of `given`."""
    length, longest = given.pop(_ORIGINAL[0], None), values.get("max_position_embeddings")
    if kind == "dynamic" and length not in (None, longest):
      raise InputError(
        f"config.json: dynamic scaling begins behind max_position_embeddings={longest}, "
        f"{_ORIGINAL[0]}={length} has no effect on it: leave it out."
      )
    if self.original is not None:
      length = values.get(_ORIGINAL[0]) or self.original
    length = longest if length is None else length
    if length is None:
      raise InputError(f"config.json: rotary positions of type {kind!r} need {_ORIGINAL[0]!r}.")
    return length

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    theirs: dict[str, Any] = {self.called[0]: cfg.rope_theta, "rope_scaling": None}
    if self.partial:
      theirs[self.called[1]] = cfg.rope_fraction
    if self.original is not None:
      theirs[_ORIGINAL[0]] = cfg.rope_original_positions or self.original
    if cfg.rope_scaling == "none":
      return theirs | ({"rope_scaling": {"rope_type": "default"}} if self.assumed else {})
    told: dict[str, Any] = {"rope_type": cfg.rope_scaling}
    for name, (ours, default) in _SCALINGS[cfg.rope_scaling].items():
      value = getattr(cfg, ours)
      if value is not None and value != default:
        told[name] = list(value) if isinstance(value, tuple) else value
    if cfg.rope_scaling not in ("linear", "dynamic"):
      told[_ORIGINAL[0]] = cfg.rope_original_positions
    return {**theirs, "rope_scaling": told}


def scaling(values: Mapping[str, Any]) -> dict[str, Any]:
  """What a config.json says of rotary positions: Transformers reads `rope_scaling`, and
  `rope_parameters` where that is not there or empty.
  """
  return dict(_object(values, "rope_scaling") or _object(values, "rope_parameters"))


def _object(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  found = values.get(name) or {}
  if not isinstance(found, Mapping):
    raise InputError(f"config.json: {name}={found!r} must be an object.")
  return found


def _check_unread(values: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
  """That no base or share of `rope_parameters` is lost where `rope_scaling` counts before it."""
  first, other = _object(values, "rope_scaling"), _object(values, "rope_parameters")
  shares = {"rope_theta": ours["rope_theta"], "partial_rotary_factor": ours.get("rope_fraction", 1)}
  for name, value in shares.items() if first else ():
    told = other.get(name)
    if told is not None and told != first.get(name, value):
      raise InputError(
        f"config.json: rope_parameters has {name}={told!r}, and with rope_scaling, which counts "
        f"before it, it is {first.get(name, value)!r}: leave one of the two out."
      )


def _plain(value: Any) -> bool | float | tuple[float, ...]:
  if isinstance(value, bool):
    return value
  return tuple(map(float, value)) if isinstance(value, list) else float(value)


@dataclasses.dataclass(frozen=True)
class Longest:
  """`max_position_embeddings`: the longest text, or with dynamic scaling the longest without it.

  Attributes:
    default: what is assumed without it; None: it is needed.
  """

  default: int | None = None

  @property
  def names(self) -> tuple[str, ...]:
    return ("max_position_embeddings",)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    longest = values.get("max_position_embeddings", self.default)
    if longest is None:
      raise InputError("config.json has no max_position_embeddings.")
    given = scaling(values)
    if "dynamic" in (given.get("rope_type"), given.get("type")):
      longest = int(longest * given.get("factor", 1))
    return {"max_positions": longest}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    dynamic = cfg.rope_scaling == "dynamic"
    return {
      "max_position_embeddings": cfg.rope_original_positions if dynamic else cfg.max_positions
    }


@dataclasses.dataclass(frozen=True)
class TwoRotaries:
  """Rotary positions of their own for local layers: two fields of published folders, or
  `rope_parameters` by type of layer. What `rope_scaling` says counts before what they say.
  """

  theta: tuple[str, float]  # Of global layers: the field, and what is assumed without it.
  local_theta: tuple[str, float]
  both: bool = False  # `rope_scaling` is of local layers too (ModernBERT).

  @property
  def names(self) -> tuple[str, ...]:
    return (self.theta[0], self.local_theta[0], "rope_scaling", "rope_parameters")

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    given, scaled = _object(values, "rope_parameters"), _object(values, "rope_scaling")
    whole = {**_object(given, "full_attention"), **scaled}
    local = {**_object(given, "sliding_attention"), **(scaled if self.both else {})}
    if set(given) - {"full_attention", "sliding_attention"}:
      raise InputError(f"config.json: rope_parameters={given} are not by type of layer.")
    if {local.pop(name, "default") for name in ("rope_type", "type")} != {"default"}:
      raise InputError("config.json: rotary positions of local layers can have no scaling.")
    base = values.get(*self.local_theta)
    ours = {"rope_local_theta": float(local.pop("rope_theta", base))}
    _no_more("default", local)
    first = {"rope_theta": values.get(*self.theta), **whole}
    positions = values.get("max_position_embeddings")
    return ours | Rotary().read({"rope_parameters": first, "max_position_embeddings": positions})

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    if cfg.rope_local_theta is None:
      raise InputError(f"model.rope_local_theta is not set: it has no {self.local_theta[0]}.")
    whole = Rotary().write(cfg)
    if self.both and whole["rope_scaling"] is not None:
      return {"rope_parameters": {
        "full_attention": {"rope_theta": cfg.rope_theta, **whole["rope_scaling"]},
        "sliding_attention": {"rope_theta": cfg.rope_local_theta, "rope_type": "default"},
      }}  # fmt: skip
    return {
      self.theta[0]: whole["rope_theta"], self.local_theta[0]: cfg.rope_local_theta,
      "rope_scaling": whole["rope_scaling"],
    }  # fmt: skip


def _no_more(kind: str, given: dict[str, Any]) -> None:
  if given:
    raise InputError(
      f"config.json: {sorted(given)} of rotary positions of type {kind!r} are not known."
    )
