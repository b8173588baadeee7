"""Fields of config.json that many families share: rotary positions, windows, activations."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.errors import InputError

ACTIVATIONS = {
  "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu_squared",
  "silu": "silu", "swish": "silu", "tanh": "tanh",
}  # fmt: skip

# By type of scaling: (their parameter, ours, what is assumed without it; None: it is needed).
_ORIGINAL = ("original_max_position_embeddings", "rope_original_positions")
_SCALINGS: dict[str, dict[str, tuple[str, Any]]] = {
  "linear": {"factor": ("rope_factor", None)},
  "dynamic": {"factor": ("rope_factor", None)},
  "yarn": {
    "factor": ("rope_factor", None), "beta_fast": ("rope_beta_fast", 32.0),
    "beta_slow": ("rope_beta_slow", 1.0), "attention_factor": ("rope_attention_factor", ...),
  },
  "llama3": {
    "factor": ("rope_factor", None), "low_freq_factor": ("rope_low_freq_factor", None),
    "high_freq_factor": ("rope_high_freq_factor", None),
  },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Base and scaling of rotary positions: `rope_theta` and `rope_scaling` of published folders, or
  `rope_parameters` of Transformers 5. Written in the first form, which both read.

  Attributes:
    partial: whether a share of each head may rotate.
    share: what rotates where config.json does not tell.
    called: names that a family has of its own for base and share, and that decide.
  """

  theta: float = 10_000.0
  partial: bool = False
  share: float = 1.0
  called: tuple[str, str] = ("rope_theta", "partial_rotary_factor")

  @property
  def names(self) -> tuple[str, ...]:
    more = ("partial_rotary_factor", *self.called) if self.partial else ()
    return tuple(dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters", *more)))

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    kinds = {given.pop(name) for name in ("rope_type", "type") if name in given} or {"default"}
    kind, theta = kinds.pop(), given.pop("rope_theta", self._told(values, 0))
    ours: dict[str, Any] = {"rope_theta": float(self.theta if theta is None else theta)}
    if self.partial:
      share = given.pop("partial_rotary_factor", self._told(values, 1))
      ours["rope_fraction"] = self.share if share is None else share
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
        ours[field] = float(default if value is None else value)
    if kind != "linear":
      length = given.pop(_ORIGINAL[0], None)
      ours[_ORIGINAL[1]] = values["max_position_embeddings"] if length is None else length
    _no_more(kind, given)
    return ours

  def _told(self, values: Mapping[str, Any], which: int) -> float | None:
    names = dict.fromkeys((self.called[which], Rotary.called[which]))
    told = {name: values[name] for name in names if values.get(name) is not None}
    if len(set(told.values())) > 1:
      raise InputError(f"config.json: {told} differ, and mean the same.")
    return next(iter(told.values()), None)

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    share = {self.called[1]: cfg.rope_fraction} if self.partial else {}
    base = {self.called[0]: cfg.rope_theta}
    if cfg.rope_scaling == "none":
      return {**base, "rope_scaling": None, **share}
    fields = {name: getattr(cfg, ours) for name, (ours, _) in _SCALINGS[cfg.rope_scaling].items()}
    scaling = {"rope_type": cfg.rope_scaling, **{k: v for k, v in fields.items() if v is not None}}
    if cfg.rope_scaling != "linear":
      scaling[_ORIGINAL[0]] = cfg.rope_original_positions
    return {**base, "rope_scaling": scaling, **share}


@dataclasses.dataclass(frozen=True)
class TwoRotaries:
  """Rotary positions of their own for local layers: two fields of published folders, or
  `rope_parameters` by type of layer.
  """

  theta: tuple[str, float]  # Of global layers: the field, and what is assumed without it.
  local_theta: tuple[str, float]

  @property
  def names(self) -> tuple[str, ...]:
    return (self.theta[0], self.local_theta[0], "rope_scaling", "rope_parameters")

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    given = values.get("rope_parameters") or {}
    whole = given.get("full_attention") or values.get("rope_scaling") or {}
    local = dict(given.get("sliding_attention") or {})
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
    return {
      self.theta[0]: whole["rope_theta"], self.local_theta[0]: cfg.rope_local_theta,
      "rope_scaling": whole["rope_scaling"],
    }  # fmt: skip


def _no_more(kind: str, given: dict[str, Any]) -> None:
  if given:
    raise InputError(
      f"config.json: {sorted(given)} of rotary positions of type {kind!r} are not known."
    )


@dataclasses.dataclass(frozen=True)
class Windows:
  """Which layers see a window of tokens only.

  Attributes:
    always: all do where there is a window (Mistral); otherwise `use_sliding_window` and
      `layer_types`, or else `max_window_layers`, tell (Qwen).
  """

  always: bool
  default: int | None = 4096
  suffix: str = ""  # Of the words of all layers.

  @property
  def names(self) -> tuple[str, ...]:
    more = () if self.always else ("use_sliding_window", "max_window_layers", "layer_types")
    return ("sliding_window", *more)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    window = values.get("sliding_window", self.default)
    if self.always:
      word = "global" if window is None else "local"
      kind = {} if window is None else {"window": window}
      return {**kind, "layer_pattern": (word + self.suffix,)}
    if not values.get("use_sliding_window"):
      return {}
    n, first = values["num_hidden_layers"], values.get("max_window_layers", 28)
    usual = ["full_attention" if i < first else "sliding_attention" for i in range(n)]
    return layer_pattern(values.get("layer_types") or usual, window)

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    if self.always:
      return {"sliding_window": cfg.window}
    return {
      "use_sliding_window": cfg.window is not None, "sliding_window": cfg.window,
      "layer_types": _layer_types(cfg),
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LayerTypes:
  """Windows by type of layer; where config.json has no list, every n-th layer sees all.

  Attributes:
    window: the field, and what is assumed without it.
    every: the field that holds n, and what is assumed without it.
    first: the place of the first layer that sees all.
    unnormed: the first layer's attention takes the residual stream as it is.
  """

  window: tuple[str, int]
  every: tuple[str, int]
  first: int
  unnormed: bool = False

  @property
  def names(self) -> tuple[str, ...]:
    return (self.window[0], self.every[0], f"_{self.every[0]}", "layer_types")

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    every, n = values.get(*self.every), values["num_hidden_layers"]
    usual = ["full_attention" if i % every == self.first % every else "sliding_attention"
             for i in range(n)]  # fmt: skip
    ours = layer_pattern(values.get("layer_types") or usual, values.get(*self.window))
    if self.unnormed:
      first, *others = ours["layer_pattern"]
      ours["layer_prefix"] = (f"{first}+unnormed", *others)
    return ours

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return {self.window[0]: cfg.window or self.window[1], "layer_types": _layer_types(cfg)}


def _layer_types(cfg: ModelConfig) -> list[str]:
  windows = [kind.window for kind in cfg.layers(cfg.stacks[0])]
  return ["full_attention" if window is None else "sliding_attention" for window in windows]


@dataclasses.dataclass(frozen=True)
class QueryScalar:
  """`query_pre_attn_scalar`: scores are divided by its root (Gemma)."""

  names = ("query_pre_attn_scalar",)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_scale": values.get("query_pre_attn_scalar", 256) ** -0.5}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    scale = cfg.head_width**-0.5 if cfg.attention_scale is None else cfg.attention_scale
    scalar = round(scale**-2, 6)
    return {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar}


def layer_pattern(types: list[str], window: int | None) -> dict[str, Any]:
  """ModelConfig fields of layers by type: the shortest pattern that repeats.

  Raises:
    InputError: for an unknown type.
  """
  words = {"full_attention": "global", "sliding_attention": "local"}
  unknown = sorted(set(types) - set(words))
  if unknown:
    raise InputError(f"config.json: layers of type {unknown[0]!r} are not known.")
  layers = [words[kind] for kind in types]
  length = next(
    n for n in range(1, len(layers) + 1) if layers == (layers[:n] * len(layers))[: len(layers)]
  )
  pattern = tuple(layers[:length])
  return {"layer_pattern": pattern, **({"window": window} if "local" in pattern else {})}
