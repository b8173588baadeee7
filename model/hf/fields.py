"""Fields of config.json that many families share: activations, windows, experts, scales."""

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
    scalar = round(cfg.score_scale**-2, 6)
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
