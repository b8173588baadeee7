"""What every model is made of: parameters declared once, Linear, norms, embeddings, the MLP."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model import quant
from model.config import ModelConfig
from model.quant import Quantized
from model.quant_rows import FEW_ROWS, matrix_first
from model.sharding import constrain, platform

# Of token types: the gradient of a gather would add all tokens to few rows, one after the other. As
# in BERT's own code, they are chosen by a product.
_FEW_VECTORS = 16

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class ParamInfo:
  """What a parameter is.

  `axes` are the logical names of all its axes, `layers` first when it is stacked. A `matrix` maps
  its first `inputs` axes (after `layers` and `expert`) to the others; an `embedding` is a table of
  vectors; a `vector` is a bias, a scale or the like.
  """

  axes: tuple[str | None, ...]
  role: str
  inputs: int

  def count(self, shape: tuple[int, ...], vocab: int) -> int:
    """Elements of the parameter, with a vocabulary of `vocab` in place of the padded one."""
    pairs = zip(self.axes, shape, strict=True)
    return math.prod(vocab if axis == "vocab" else size for axis, size in pairs)


def param(
  cfg: ModelConfig,
  rngs: nnx.Rngs,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  *,
  role: str = "matrix",
  inputs: int = 1,
  init: Initializer | None = None,
  least: Any = None,
) -> nnx.Param:
  """Declares a parameter: shape, logical axes, role and initializer (None: normal, `init_std`).

  It has the config's dtype for parameters, or `least` where that is wider.
  """
  init = jax.nn.initializers.normal(cfg.init_std) if init is None else init
  dtype = cfg.param_dtype if least is None else jnp.promote_types(cfg.param_dtype, least)
  value = init(rngs.params(), shape, jnp.float32).astype(dtype)
  return nnx.Param(value, axes=axes, role=role, inputs=inputs)


def param_info(module: nnx.Module) -> dict:
  """The ParamInfo of each parameter of `module` (which may be abstract), as a nested dict."""

  def info(p: nnx.Param) -> ParamInfo:
    meta = p.get_metadata()
    stacked = ("layers",) * (len(p.shape) - len(meta["axes"]))
    return ParamInfo(stacked + tuple(meta["axes"]), meta["role"], meta["inputs"])

  is_param = lambda p: isinstance(p, nnx.Param)
  state = nnx.state(module, nnx.Param)
  return nnx.to_pure_dict(jax.tree.map(info, state, is_leaf=is_param))


def residual_init(cfg: ModelConfig) -> Initializer:
  """Of the projections back into the residual stream (GPT-2, section 2.3)."""
  scale = (2 * cfg.num_layers) ** -0.5 if cfg.init_residual_scale else 1.0
  return jax.nn.initializers.normal(cfg.init_std * scale)


class Linear(nnx.Module):
  """A weight matrix with any number of input and output axes, in the compute dtype.

  The first `inputs` axes of `shape` are contracted with the last ones of what it is called with.
  While it is `turned` (see `turn`), its weights have these axes last. What it is called with is
  rounded first as a dynamic format of the kind `rounds` does, while a model is trained for one. An
  `adapter` (model.peft) changes what it computes.
  """

  adapter: Any

  def __init__(
    self,
    cfg: ModelConfig,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    rngs: nnx.Rngs,
    inputs: int = 1,
    bias: bool = False,
    init: Initializer | None = None,
  ):
    self.inputs, self.dtype, self.turned = inputs, cfg.compute_dtype, False
    self.rounds: str | None = None
    self.w = param(cfg, rngs, shape, axes, inputs=inputs, init=init)
    if bias:
      zeros = jax.nn.initializers.zeros
      self.b = param(cfg, rngs, shape[inputs:], axes[inputs:], role="vector", init=zeros)

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return self.adapter.linear(self, x) if hasattr(self, "adapter") else self.plain(x)

  def plain(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """What it computes without an adapter."""
    x, w = x.astype(self.dtype), self.w.get_value()
    x = x if self.rounds is None else quant.rounded(x, self.inputs, self.rounds)
    if isinstance(w, Quantized):
      y = quant.product(x, w)
    elif self.turned:
      w = w.astype(self.dtype)
      rows, outputs = x.shape[: x.ndim - self.inputs], w.shape[: w.ndim - self.inputs]
      flat = (math.prod(outputs), -1)
      y = scores(w.reshape(flat), x.reshape(*rows, -1)).reshape(*rows, *outputs)
    else:
      # An einsum would contract axes in alphabetical order, which turns the weights at every call.
      y = jnp.tensordot(x, w.astype(self.dtype), self.inputs)
    return y + self.b[...].astype(self.dtype) if hasattr(self, "b") else y

  def beside(self, x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """x, and the weights to multiply it by: in the compute dtype, with the axes of `shape`, turned
    or not.
    """
    x, stored = quant.beside(x, self.w.get_value())
    w = self._shaped(stored)
    return x, self.adapter.matrix(w) if hasattr(self, "adapter") else w

  def plain_matrix(self) -> Float[Array, "..."]:
    """The weights without an adapter, dequantized: in the compute dtype, with the axes of `shape`,
    turned or not.
    """
    return self._shaped(self.w.get_value())

  def _shaped(self, stored: Any) -> Float[Array, "..."]:
    w = quant.dense(stored, self.dtype)
    if not self.turned or isinstance(stored, Quantized):
      return w
    last = tuple(range(w.ndim - self.inputs, w.ndim))
    return jnp.moveaxis(w, last, tuple(range(self.inputs)))


def turn(module: Any, params: dict) -> dict:
  """Turns all Linear below `module`, whose parameters are `params`; returns the new parameters."""
  if isinstance(module, Linear):
    module.turned = True
    weights = params["w"]
    if isinstance(weights, Quantized):  # Lies that way from the beginning.
      return params
    order = (*range(module.inputs, weights.ndim), *range(module.inputs))
    return params | {"w": jnp.transpose(weights, order)}
  below = dict(enumerate(module)) if isinstance(module, nnx.List) else vars(module)
  return {k: turn(below[k], v) if isinstance(v, dict) else v for k, v in params.items()}


def scores(
  table: Float[Array, "V D"], x: Float[Array, "... D"], dtype: Any = None
) -> Float[Array, "... V"]:
  """x · tableᵀ, accumulated and returned in `dtype` (None: as they are)."""
  if math.prod(x.shape[:-1]) <= FEW_ROWS and platform() == "cpu":
    return matrix_first(table, x, dtype)
  return jnp.einsum("...D,VD->...V", x, table, preferred_element_type=dtype)


class Norm(nnx.Module):
  """Layer norm (Ba et al., arXiv:1607.06450) or RMS norm (Zhang & Sennrich, arXiv:1910.07467).

  Statistics are taken over the last `over` axes of `shape` (None: all), at least in float32; the
  result has x's dtype. A layer norm has a bias where the config and `bias` say so.
  """

  def __init__(
    self, cfg: ModelConfig, *, rngs: nnx.Rngs, shape: tuple[int, ...] | None = None,
    axes: tuple[str, ...] = ("embed",), over: int | None = None, bias: bool = True,
    eps: float | None = None,
  ):  # fmt: skip
    self.kind, self.offset = cfg.norm, float(cfg.norm_offset)
    self.eps = cfg.norm_eps if eps is None else eps
    shape = (cfg.d_model,) if shape is None else shape
    self.dims = tuple(range(-(over or len(shape)), 0))
    start = jax.nn.initializers.constant(1.0 - self.offset)
    self.scale = param(cfg, rngs, shape, axes, role="vector", init=start)
    if cfg.norm == "layer" and cfg.norm_bias and bias:
      zeros = jax.nn.initializers.zeros
      self.bias = param(cfg, rngs, shape, axes, role="vector", init=zeros)

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if self.kind == "layer":
      wide -= wide.mean(self.dims, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.square(wide).mean(self.dims, keepdims=True) + self.eps)
    wide *= self.scale[...].astype(wide.dtype) + self.offset
    if hasattr(self, "bias"):
      wide += self.bias[...].astype(wide.dtype)
    return wide.astype(x.dtype)


class Embed(nnx.Module):
  """A table of `rows` vectors; `attend` scores vectors against all of them (tied embeddings)."""

  adapter: Any

  def __init__(self, cfg: ModelConfig, rows: int, row_axis: str | None, *, rngs: nnx.Rngs):
    self.dtype, self.row_axis = cfg.compute_dtype, row_axis
    shape, axes = (rows, cfg.embed_width), (row_axis, "embed")
    std = cfg.init_std if cfg.init_embed_std is None else cfg.init_embed_std
    init = jax.nn.initializers.normal(std)
    self.table = param(cfg, rngs, shape, axes, role="embedding", init=init)

  def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    ids = constrain(ids, ("rows", "seq"))
    x = constrain(self._looked_up(ids), ("rows", "seq", None))
    return x + self.adapter.embedded(ids, x.dtype, self.row_axis) if hasattr(self, "adapter") else x

  def _looked_up(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    table = self.table.get_value()
    if isinstance(table, Quantized):
      return quant.rows(table, ids, self.dtype, axis=self.row_axis)
    table = constrain(table.astype(self.dtype), (self.row_axis, None))
    if len(table) > _FEW_VECTORS:
      return table[ids]
    chosen = jax.nn.one_hot(ids, len(table), dtype=table.dtype)
    return jnp.matmul(chosen, table, precision="highest")

  def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Scores in at least float32; an adapter changes only the vectors that are looked up."""
    wide = jnp.promote_types(self.dtype, jnp.float32)
    table, x = self.table.get_value(), x.astype(self.dtype)
    if isinstance(table, Quantized):
      return quant.product(x, table, wide)
    return scores(table.astype(self.dtype), x, wide)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
  """The function of ModelConfig.activation. `gelu` is exact, `gelu_tanh` GPT-2's approximation."""
  return {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
  }[name]


def activated(
  cfg: ModelConfig, up: Float[Array, "..."], gate: Float[Array, "..."] | None
) -> Float[Array, "..."]:
  """What the last matrix of an MLP or of an expert reads, from what the ones before it give."""
  act = activation(cfg.activation)
  if gate is None:
    return act(up)
  if cfg.gate_limit is not None:
    gate, up = jnp.minimum(gate, cfg.gate_limit), jnp.clip(up, -cfg.gate_limit, cfg.gate_limit)
  return act(gate) * (up + cfg.gate_offset if cfg.gate_offset else up)


class MLP(nnx.Module):
  """Two matrices, or three with a gate (SwiGLU, GeGLU: Shazeer, arXiv:2002.05202)."""

  adapter: Any  # Of model.peft: what is added around all of it.

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, width: int | None = None):
    D, F = cfg.d_model, cfg.d_ff if width is None else width
    into = ((D, F), ("embed", "mlp"))
    back = ((F, D), ("mlp", "embed"))
    self.cfg = cfg
    if cfg.gated:
      self.gate_proj = Linear(cfg, *into, rngs=rngs, bias=cfg.mlp_bias)
    self.up_proj = Linear(cfg, *into, rngs=rngs, bias=cfg.mlp_bias)
    self.down_proj = Linear(cfg, *back, rngs=rngs, bias=cfg.mlp_bias, init=residual_init(cfg))

  def __call__(
    self, x: Float[Array, "B T D"], key: jax.Array | None = None
  ) -> Float[Array, "B T D"]:
    gate = self.gate_proj(x) if hasattr(self, "gate_proj") else None
    hidden = activated(self.cfg, self.up_proj(x), gate)
    hidden = dropout(constrain(hidden, ("batch", "seq", "mlp")), self.cfg.mlp_dropout, key)
    return self.down_proj(hidden)


def noisy(
  x: Float[Array, "B T D"], seg: Int[Array, "B T"], alpha: float, key: jax.Array
) -> Float[Array, "B T D"]:
  """Embeddings with even noise of up to alpha / √(L·D) in each element, L tokens in a text.

  Source: NEFTune (Jain et al., arXiv:2310.05914, algorithm 1).

  Args:
    seg: the text that each token is of, from 1; 0 is nothing.
  """
  length = jax.vmap(lambda row: jnp.bincount(row, length=row.size + 1)[row])(seg)
  most = alpha * jax.lax.rsqrt(length.astype(x.dtype) * x.shape[-1])
  return x + most[..., None] * jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes elements with probability `rate` and scales the others; identity without a key."""
  if rate == 0.0 or key is None:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
