"""Attention: one module for every head layout, position scheme, window, cache and context."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from model import positions
from model.attend import attend
from model.cache import KVCache
from model.config import LayerKind, ModelConfig
from model.disentangled import Relative, RelativeProjections, disentangled
from model.errors import InputError
from model.latent import LatentKeysValues, LatentQueries
from model.layers import Linear, Norm, param, residual_init
from model.peft.virtual import Prefix
from model.sharding import constrain, constrain_tokens

Angles = tuple[Float[Array, "B T R"], Float[Array, "B T R"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What an encoder has read: its last hidden states, and where they are."""

  x: Float[Array, "B S D"]
  pos: Int[Array, "B S"]
  seg: Int[Array, "B S"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
  """Where the tokens of a pass are, and what every layer derives from it once.

  `angles` and `local_angles` are rotary; `bias` is the relative bias of a pass without a cache;
  `table` holds what computes it against a cache's positions; `relative` is what disentangled
  attention knows of positions. `bidirectional` marks the tokens of prefixes. `length` is that of
  each row's text, where a pass reads a part of it. `ordered` promises, statically, that tokens lie
  in row order with positions rising by one in each segment: those of `balanced` > 1 devices did
  before they were dealt out (`model.context.balanced_parts`).
  """

  pos: Int[Array, "B T"]
  seg: Int[Array, "B T"] | None
  angles: Angles | None = None
  local_angles: Angles | None = None
  bias: Float[Array, "B N T T"] | None = None
  table: Float[Array, "buckets N"] | None = None
  bidirectional: Bool[Array, "B T"] | None = None
  length: Int[Array, "B"] | None = None
  context: Context | None = None
  relative: Relative | None = None
  ordered: bool = dataclasses.field(default=False, metadata={"static": True})
  balanced: int = dataclasses.field(default=1, metadata={"static": True})


def relative_table(cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Param:
  """T5's biases by bucket and head."""
  shape, axes = (cfg.relative_buckets, cfg.num_heads), (None, "heads")
  return param(cfg, rngs, shape, axes, role="embedding")


def relative_bias(
  cfg: ModelConfig, table: Array | None, q_pos: Int[Array, "B T"], kv_pos: Int[Array, "B S"],
  *, causal: bool,
) -> Float[Array, "B N T S"] | None:  # fmt: skip
  """What T5's buckets or ALiBi add to the scores; None for the other position schemes."""
  place = lambda bias: constrain(bias, ("batch", "heads", "seq", None))
  q_pos = constrain(q_pos, ("batch", "seq"))
  if cfg.positions == "alibi":
    scale = cfg.score_scale if cfg.alibi_scaled else 1.0
    rounded = cfg.alibi_rounded
    return place(positions.alibi_bias(q_pos, kv_pos, cfg.num_heads, scale=scale, rounded=rounded))
  if not cfg.bucketed or table is None:
    return None
  buckets = positions.relative_bias_buckets(
    q_pos, kv_pos, bidirectional=not causal,
    num_buckets=cfg.relative_buckets, max_distance=cfg.relative_max_distance,
  )  # fmt: skip
  return place(jnp.moveaxis(table[buckets], -1, 1))


class Attention(nnx.Module):
  """MHA, GQA, MQA, latent, windowed, bidirectional, cached and cross-attention.

  Head counts choose MHA, GQA or MQA, latents what queries, keys and values are made of; positions,
  segments, causality and the layer's window choose the mask; a cache makes it incremental. `cross`
  attends to an encoder's tokens, all of those of the query's segment: there positions, windows and
  relative biases say nothing. An `adapter` may be a prefix of keys and values (model.peft.virtual),
  which a cache has among its tokens.
  """

  adapter: Any  # Of model.peft: a prefix, or what is added around all of it.

  def __init__(self, cfg: ModelConfig, kind: LayerKind, *, rngs: nnx.Rngs, cross: bool = False):
    D, N, K = cfg.d_model, cfg.num_heads, cfg.kv_heads
    H, V = cfg.head_width, cfg.value_width
    self.cfg, self.kind, self.cross = cfg, kind, cross
    # A cache's keys turn when they are read: their angles hang on how long the text is by then.
    self.late = kind.rotary and cfg.rope_scaling == "longrope" and not cross
    self.latent = cfg.kv_latent_dim is not None
    self.floats = self.late or self.latent  # Work on kept keys before queries meet them.
    bias = cfg.attention_bias and not self.latent
    into = functools.partial(Linear, cfg, rngs=rngs, bias=bias)
    kv_axes = ("embed", "kv_heads", "head_dim")
    # A scale of its own, such as T5's 1, is made good by the queries: scores begin as usual.
    spread = 1.0 if cfg.attention_scale is None else H**-0.5 / cfg.attention_scale
    init = jax.nn.initializers.normal(cfg.init_std * spread)
    if cfg.q_latent_dim is not None:
      self.q_proj = LatentQueries(cfg, cfg.q_latent_dim, init=init, rngs=rngs)
    else:
      self.q_proj = into((D, N, H), ("embed", "heads", "head_dim"), init=init)
    if cfg.kv_latent_dim is not None:
      self.kv_proj = LatentKeysValues(cfg, cfg.kv_latent_dim, cfg.rotated_width, rngs=rngs)
    else:
      self.k_proj = into((D, K, H), kv_axes)
      self.v_proj = into((D, K, V), kv_axes)
    self.o_proj = Linear(
      cfg, (N, V, D), ("heads", "head_dim", "embed"), rngs=rngs, inputs=2,
      bias=cfg.attention_out_bias, init=residual_init(cfg),
    )  # fmt: skip
    if cfg.qk_norm != "none":
      shared, each = cfg.qk_norm == "head", cfg.qk_norm == "each"
      norm = lambda heads, axis: Norm(
        cfg, rngs=rngs, shape=(H,) if shared else (heads, H),
        axes=("head_dim",) if shared else (axis, "head_dim"),
        over=1 if each else None, bias=not each,
      )  # fmt: skip
      self.q_norm, self.k_norm = norm(N, "heads"), norm(K, "kv_heads")
    if cfg.relative_bias_per_layer and not cross:
      self.relative_bias = relative_table(cfg, rngs)
    if cfg.positions == "disentangled":
      self.relative = RelativeProjections(cfg, rngs=rngs)
    if cfg.attention_sinks:
      zeros = jax.nn.initializers.zeros
      self.sinks = param(cfg, rngs, (N,), ("heads",), role="vector", init=zeros)

  def __call__(
    self, x: Float[Array, "B T D"], where: Where, *,
    cache: KVCache | None = None, key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:  # fmt: skip
    """Of cross-attention the cache is read only: see `keys_values` for what fills it."""
    cfg, causal = self.cfg, self.kind.causal and not self.cross
    q = self._turned(self.q_proj(x), where, "q_norm")
    k, v, kv_pos, kv_seg, cache = self._seen(x, where, cache)
    if cache is None:  # Made where their tokens are, before they are gathered.
      k, v = (constrain(heads, ("batch", "seq", "kv_heads", None)) for heads in (k, v))
    prefixed = self.prefix is not None and cache is None
    if self.prefix is not None and prefixed:
      k, v, kv_pos, kv_seg = self.prefix.before(k, v, kv_pos, kv_seg)
    scales = None
    if cache is not None and cache.k_scale is not None and not self.floats:
      scales = cache.k_scale, cache.v_scale
    absorbed = self.latent and cache is not None and self.kv_proj.absorbs(x.shape[1])
    if absorbed:
      q, v = self.kv_proj.absorbed(q), k
    elif self.latent and cache is not None:
      k, v = self.kv_proj.expanded(k)
    bias, prefix = where.bias, where.bidirectional
    if self.cross:
      bias = prefix = None
    elif prefix is not None and prefixed:
      prefix = jnp.pad(prefix, ((0, 0), (self.prefix_tokens, 0)))
    elif cache is not None and prefix is not None:  # Marked by place, so that slots need no flags.
      last = jnp.max(jnp.where(prefix, where.pos, -1), axis=1, keepdims=True)
      prefix = kv_pos <= last
    own = hasattr(self, "relative_bias")
    if own or (cache is not None and not self.cross):
      table = self.relative_bias[...] if own else where.table
      bias = relative_bias(cfg, table, where.pos, kv_pos, causal=causal)
    run = functools.partial(
      attend, causal=causal, window=None if self.cross else self.kind.window,
      scale=cfg.score_scale, softcap=cfg.attention_softcap,
      ordered=where.ordered and cache is None and not self.cross and not prefixed,
      balanced=1 if self.cross else where.balanced,
      kernel=cfg.attention_kernel if cache is None else "auto", dropout=cfg.attention_dropout,
      ring=cfg.context_attention == "ring" and cache is None and not prefixed,
    )  # fmt: skip
    if where.relative is not None:
      drops = None if key is None else jax.random.fold_in(key, 1)
      heads = self.relative(where.relative, self.q_proj, self.k_proj, drops)
      run = functools.partial(disentangled, run, heads, cfg.score_scale)
    if cfg.remat == "attention":
      run = jax.checkpoint(run)
    y = run(
      constrain(q, ("batch", "seq", "heads", None)), k.astype(q.dtype), v.astype(q.dtype),
      q_pos=where.pos, kv_pos=kv_pos, q_seg=where.seg, kv_seg=kv_seg, bias=bias, key=key,
      bidirectional=prefix, scales=scales,
      sinks=self.sinks[...] if cfg.attention_sinks else None,
    )  # fmt: skip
    y = self.kv_proj.values(y) if absorbed else y
    return self.o_proj(constrain(y, ("batch", "seq", "heads", None))), cache

  def keys_values(
    self, x: Float[Array, "B S D"], where: Where | Context, *, kept: bool = False
  ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Keys and values of the tokens `x`: what is attended to, and (`kept`) what a cache keeps."""
    if not self.latent:
      return self._turned(self.k_proj(x), where, "k_norm"), self.v_proj(x)
    latents = self._turned(self.kv_proj.latents(x), where, "k_norm")
    return (latents, latents[..., :0]) if kept else self.kv_proj.expanded(latents)

  def _seen(self, x: Array, where: Where, cache: KVCache | None):
    """(keys, values, their positions, their segments, the cache after this)."""
    if cache is None and not self.cross:
      return *self.keys_values(x, where), where.pos, where.seg, None
    if cache is None:
      context = where.context
      if context is None:
        raise InputError("cross-attention needs what the encoder has read: give its tokens.")
      return *self.keys_values(constrain_tokens(context.x), context), context.pos, context.seg, None
    if not self.cross:
      unturned = dataclasses.replace(where, angles=None, local_angles=None)
      written = self.keys_values(x, unturned if self.late else where, kept=True)
      cache = cache.update(*written, where.pos)
    keys, values = cache.keys_values(x.dtype) if self.floats else (cache.k, cache.v)
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    if self.late:
      local = self.kind.window is not None
      angles = positions.rotary_angles(cache.pos, self.cfg, local=local, length=where.length)
      turned = positions.apply_rotary(keys, angles, interleaved=self.cfg.rope_interleaved)
      if self.prefix_tokens:
        own = (cache.pos < self.prefix_tokens)[..., None, None]
        turned = jnp.where(own, keys, turned)
      keys = turned
    return keys, values, cache.pos, None, cache

  @property
  def prefix(self) -> Prefix | None:
    """The keys and values that stand before each text."""
    adapter = getattr(self, "adapter", None)
    return adapter if isinstance(adapter, Prefix) else None

  @property
  def prefix_tokens(self) -> int:
    """How many they are."""
    return 0 if self.prefix is None else self.prefix.tokens

  def _turned(self, heads: Array, where: Where | Context, norm: str) -> Float[Array, "B T N H"]:
    """Queries or keys after their norm and, in self-attention, rotation."""
    if self.cfg.qk_norm != "none":
      heads = getattr(self, norm)(heads)
    if self.cross or isinstance(where, Context) or not self.kind.rotary:
      return heads
    local = self.kind.window is not None and where.local_angles is not None
    angles = where.local_angles if local else where.angles
    if angles is None:
      return heads
    still = 0 if self.cfg.rope_head_dim is None else heads.shape[-1] - self.cfg.rope_head_dim
    turned = positions.apply_rotary(
      heads[..., still:], angles, interleaved=self.cfg.rope_interleaved
    )
    return jnp.concatenate((heads[..., :still], turned), axis=-1) if still else turned
