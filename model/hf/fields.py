"""Fields of config.json that many families share: rotary positions, windows, activations."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from model.config import ModelConfig
from model.errors import InputError
from model.hf.family import Fields

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
    given = dict(values.get("rope_parameters") or values.get("rope_scaling") or self.assumed)
    kinds = {given.pop(name) for name in ("rope_type", "type") if name in given} or {"default"}
    kind, theta = kinds.pop(), given.pop("rope_theta", self._told(values, 0))
    kind = self.renamed.get(kind, kind)
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
    scaling: dict[str, Any] = {"rope_type": cfg.rope_scaling}
    for name, (ours, default) in _SCALINGS[cfg.rope_scaling].items():
      value = getattr(cfg, ours)
      if value is not None and value != default:
        scaling[name] = list(value) if isinstance(value, tuple) else value
    if cfg.rope_scaling not in ("linear", "dynamic"):
      scaling[_ORIGINAL[0]] = cfg.rope_original_positions
    return {**theirs, "rope_scaling": scaling}


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
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if "dynamic" in (scaling.get("rope_type"), scaling.get("type")):
      longest = int(longest * scaling.get("factor", 1))
    return {"max_positions": longest}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    dynamic = cfg.rope_scaling == "dynamic"
    return {
      "max_position_embeddings": cfg.rope_original_positions if dynamic else cfg.max_positions
    }


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


_SWITCH = ("use_sliding_window", "max_window_layers")


@dataclasses.dataclass(frozen=True)
class Windows:
  """Which layers see a window of tokens only.

  Attributes:
    always: all do where there is a window (Mistral); otherwise `layer_types`, or else
      `max_window_layers`, tell (Qwen).
    default: the window that is assumed without one.
    switch: there is a window only if `use_sliding_window` says so, as always with types.
    local: whether a layer sees a window, from its number and `max_window_layers`.
  """

  always: bool
  default: int | None = 4096
  switch: bool = False
  local: Callable[[int, int], bool] = lambda i, first: i >= first

  @property
  def names(self) -> tuple[str, ...]:
    types = () if self.always else ("layer_types",)
    return ("sliding_window", *(_SWITCH if self._switched else ()), *types)

  @property
  def _switched(self) -> bool:
    return self.switch or not self.always

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    window = values.get("sliding_window", self.default)
    if self._switched and not values.get("use_sliding_window"):
      window = None
    if self.always or window is None:
      kind = {} if window is None else {"window": window}
      return {**kind, "layer_pattern": ("global" if window is None else "local",)}
    n, first = values["num_hidden_layers"], values.get("max_window_layers", 28)
    usual = ["sliding_attention" if self.local(i, first) else "full_attention" for i in range(n)]
    return layer_pattern(values.get("layer_types") or usual, window)

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    switch = {_SWITCH[0]: cfg.window is not None} if self._switched else {}
    types = {} if self.always else {"layer_types": _layer_types(cfg)}
    return {"sliding_window": cfg.window, **switch, **types}


@dataclasses.dataclass(frozen=True)
class Experts:
  """Which layers have experts, beside what `windows` tells of layers.

  Attributes:
    sparse: not all: every `decoder_sparse_step`-th, but for `mlp_only_layers`.
  """

  windows: Fields
  sparse: bool = False

  @property
  def names(self) -> tuple[str, ...]:
    return (*self.windows.names, *(("decoder_sparse_step", "mlp_only_layers") * self.sparse))

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    n, step, dense = values["num_hidden_layers"], 1, []
    if self.sparse:
      step, dense = values.get("decoder_sparse_step") or 1, values.get("mlp_only_layers") or ()
    where = [i not in dense and (i + 1) % step == 0 for i in range(n)]
    return _marked(self.windows.read(values), "experts", where)

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    dense = [i for i, kind in enumerate(cfg.layers("decoder")) if not kind.experts]
    sparse = {"decoder_sparse_step": 1, "mlp_only_layers": dense} if self.sparse else {}
    return {**self.windows.write(cfg), **sparse}


@dataclasses.dataclass(frozen=True)
class Unturned:
  """Which layers have no rotary positions, beside what `windows` tells of layers (SmolLM3)."""

  windows: Fields

  @property
  def names(self) -> tuple[str, ...]:
    return (*self.windows.names, "no_rope_layers", "no_rope_layer_interval")

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    n, every = values["num_hidden_layers"], values.get("no_rope_layer_interval", 4)
    turned = values.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(n)]
    usual = ["full_attention" if turns else "sliding_attention" for turns in turned[:n]]
    types = values.get("layer_types") or usual
    ours = self.windows.read({**values, "layer_types": types})
    return _marked(ours, "nope", [not turns for turns in turned[:n]])

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    turned = [int(kind.rotary) for kind in cfg.layers("decoder")]
    return {**self.windows.write(cfg), "no_rope_layers": turned}


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
class HeadWidth:
  """`head_dim`, the width of heads where it is not what `hidden_size` makes it; never null."""

  names = ("head_dim",)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"head_dim": values.get("head_dim")}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    return {"head_dim": cfg.head_width}


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


@dataclasses.dataclass(frozen=True)
class Divisor:
  """A field by which is divided, where we multiply."""

  theirs: str
  ours: str
  default: float = 1.0

  @property
  def names(self) -> tuple[str, ...]:
    return (self.theirs,)

  def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
    return {self.ours: 1 / values.get(self.theirs, self.default)}

  def write(self, cfg: ModelConfig) -> dict[str, Any]:
    scale = getattr(cfg, self.ours)
    if scale is None:
      return {self.theirs: self.default}
    near = round(1 / scale, 6)
    return {self.theirs: near if near and 1 / near == scale else 1 / scale}


def layer_pattern(types: list[str], window: int | None) -> dict[str, Any]:
  """ModelConfig fields of layers by type: the shortest pattern that repeats.

  Raises:
    InputError: for an unknown type.
  """
  words = {"full_attention": "global", "sliding_attention": "local"}
  unknown = sorted(set(types) - set(words))
  if unknown:
    raise InputError(f"config.json: layers of type {unknown[0]!r} are not known.")
  pattern = _shortest([words[kind] for kind in types])
  return {"layer_pattern": pattern, **({"window": window} if "local" in pattern else {})}


def _shortest(layers: list[str]) -> tuple[str, ...]:
  """The shortest pattern whose repeats begin with these words."""
  n = len(layers)
  return tuple(next(layers[:m] for m in range(1, n + 1) if layers == (layers[:m] * n)[:n]))


def _marked(ours: dict[str, Any], mark: str, where: list[bool]) -> dict[str, Any]:
  """`ours` with a mark on the words of some of its layers."""
  words = (ours["layer_pattern"] * len(where))[: len(where)]
  marked = [f"{word}+{mark}" if here else word for word, here in zip(words, where, strict=True)]
  return {**ours, "layer_pattern": _shortest(marked)}
