"""Block, and the Decoder made of it: stacks of equal layers that are scanned, or unrolled."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model import positions
from model.attention import Attention, Where, relative_bias
from model.cache import KVCache
from model.config import LayerKind, ModelConfig
from model.layers import MLP, Embed, Norm, dropout, param
from model.moe import Experts
from model.sharding import constrain

Aux = dict[str, Array]


class Block(nnx.Module):
  """Attention and an MLP (or experts) around a residual stream.

  `norm_placement`: pre  x + f(norm(x));  post  norm(x + f(x));  sandwich  x + norm(f(norm(x)));
  output  x + norm(f(x)).  `residual`: parallel adds attention and MLP of the same normed input.
  """

  def __init__(self, cfg: ModelConfig, kind: LayerKind, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.attn = Attention(cfg, kind, rngs=rngs)
    self.mlp = Experts(cfg, rngs=rngs) if kind.experts else MLP(cfg, rngs=rngs)
    before, after = cfg.norm_placement in ("pre", "sandwich"), cfg.norm_placement != "pre"
    if before:
      self.attn_norm = Norm(cfg, rngs=rngs)
    if before and cfg.residual != "parallel":
      self.mlp_norm = Norm(cfg, rngs=rngs)
    if after:
      self.attn_post_norm, self.mlp_post_norm = Norm(cfg, rngs=rngs), Norm(cfg, rngs=rngs)

  def __call__(
    self, x: Float[Array, "B T D"], where: Where, *,
    cache: KVCache | None = None, key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None, Aux]:  # fmt: skip
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    x = constrain(x, ("batch", "seq", None))
    normed = self._norm("attn_norm", x)
    y, cache = self.attn(normed, where, cache=cache, key=keys[0])
    if self.cfg.residual == "serial":
      x = self._add(x, y, "attn_post_norm", keys[1])
      y, aux = self._mlp(self._norm("mlp_norm", x), where)
      return self._add(x, y, "mlp_post_norm", keys[2]), cache, aux
    both = normed if self.cfg.residual == "parallel" else self._norm("mlp_norm", x)
    z, aux = self._mlp(both, where)
    x = self._add(x, y, "attn_post_norm", keys[1])
    return self._add(x, z, "mlp_post_norm", keys[2]), cache, aux

  def _norm(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return getattr(self, name)(x) if hasattr(self, name) else x

  def _mlp(self, x: Float[Array, "B T D"], where: Where) -> tuple[Float[Array, "B T D"], Aux]:
    if isinstance(self.mlp, Experts):
      return self.mlp(x, where.pos >= 0)
    return self.mlp(x), {}

  def _add(self, x: Array, y: Array, norm: str, key: jax.Array | None) -> Float[Array, "B T D"]:
    if self.cfg.norm_placement == "post":
      return self._norm(norm, x + dropout(y, self.cfg.dropout, key))
    return x + dropout(self._norm(norm, y), self.cfg.dropout, key)


class Decoder(nnx.Module):
  """Embeddings, blocks and the last norm.

  `layers` holds one stack of blocks for each place of the layer pattern (`ModelConfig.groups`),
  parameters with a leading layer axis; or, with `stacked=False`, one block for each layer, which is
  faster to decode with.
  """

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, stacked: bool = True):
    self.cfg, self.stacked = cfg, stacked
    self.embed = Embed(cfg, cfg.padded_vocab, "vocab", rngs=rngs)
    if cfg.positions == "learned":
      self.position_embed = Embed(cfg, cfg.max_positions or 0, "position", rngs=rngs)
    if cfg.positions == "t5_bias":
      shape, axes = (cfg.relative_buckets, cfg.num_heads), (None, "heads")
      self.relative_bias = param(cfg, rngs, shape, axes, role="embedding")
    if cfg.embed_norm:
      self.embed_norm = Norm(cfg, rngs=rngs)
    if stacked:
      stacks = [_stack(cfg, kind, n, rngs) for pattern, n in cfg.groups() for kind in pattern]
    else:
      stacks = [Block(cfg, kind, rngs=rngs) for kind in cfg.layers()]
    self.layers = nnx.List(stacks)
    if cfg.final_norm:
      self.final_norm = Norm(cfg, rngs=rngs)

  def __call__(
    self, tokens: Int[Array, "B T"], pos: Int[Array, "B T"], seg: Int[Array, "B T"] | None = None,
    *, cache: tuple[KVCache, ...] | None = None, key: jax.Array | None = None,
    ordered: bool = False,
  ) -> tuple[Float[Array, "B T D"], tuple[KVCache, ...] | None, Aux]:  # fmt: skip
    """Returns (last hidden states, the cache after these tokens, sums that router losses need)."""
    where = self._where(pos, seg, cached=cache is not None, ordered=ordered)
    x = self._embed(tokens, pos)
    if key is not None:
      x = dropout(x, self.cfg.dropout, jax.random.fold_in(key, self.cfg.num_layers))
    run = self._run_stacked if self.stacked else self._run_unstacked
    x, cache, aux = run(x, where, cache, key)
    return (self.final_norm(x) if self.cfg.final_norm else x), cache, aux

  def _embed(self, tokens: Int[Array, "B T"], pos: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    cfg = self.cfg
    x = constrain(self.embed(tokens), ("batch", "seq", None))
    if cfg.scale_embeddings:
      x *= jnp.asarray(cfg.d_model**0.5, x.dtype)
    if cfg.positions == "learned":
      x += constrain(self.position_embed(jnp.maximum(pos, 0)), ("batch", "seq", None))
    if cfg.positions == "sinusoidal":
      x += positions.sinusoidal(pos, cfg.d_model).astype(x.dtype)
    return self.embed_norm(x) if cfg.embed_norm else x

  def _where(self, pos: Array, seg: Array | None, *, cached: bool, ordered: bool) -> Where:
    cfg, angles, local = self.cfg, None, None
    if cfg.positions == "rotary":
      angles = positions.rotary_angles(pos, cfg, local=False, seg=seg)
      if cfg.rope_local_theta is not None:
        local = positions.rotary_angles(pos, cfg, local=True, seg=seg)
    table = self.relative_bias[...] if cfg.positions == "t5_bias" else None
    bias = None if cached else relative_bias(cfg, table, pos, pos)
    return Where(pos, seg, angles, local, bias, table, ordered=ordered)

  def _run_stacked(self, x, where, caches, key):
    """Scans over the repeats of each group, with the places of its pattern unrolled inside."""
    first, start, out, auxes = 0, 0, [], []
    for pattern, repeats in self.cfg.groups():
      places = slice(first, first + len(pattern))
      stacks = tuple(self.layers)[places]
      slots = (None,) * len(pattern) if caches is None else caches[places]
      index = start + jnp.arange(repeats) * len(pattern)
      body = functools.partial(_one_repeat, cfg=self.cfg, where=where, key=key)
      scan = jax.lax.scan if self.cfg.scan_layers else _unrolled
      x, (slots, aux) = scan(body, x, (stacks, slots, index))
      out.extend(slots)
      auxes.extend(a for a in aux if a)
      first, start = first + len(pattern), start + repeats * len(pattern)
    return x, (None if caches is None else tuple(out)), _concatenate(auxes)

  def _run_unstacked(self, x, where, caches, key):
    out, auxes = [], []
    for i, block in enumerate(self.layers):
      cache = None if caches is None else caches[i]
      x, cache, aux = block(x, where, cache=cache, key=_fold(key, i))
      out.append(cache)
      auxes.extend([jax.tree.map(lambda a: a[None], aux)] if aux else [])
    return x, (None if caches is None else tuple(out)), _concatenate(auxes)


def _stack(cfg: ModelConfig, kind: LayerKind, repeats: int, rngs: nnx.Rngs) -> Block:
  keys = jax.random.split(rngs.params(), repeats)
  return jax.vmap(lambda key: Block(cfg, kind, rngs=nnx.Rngs(key)))(keys)


def _one_repeat(x, layers, *, cfg: ModelConfig, where: Where, key: jax.Array | None):
  stacks, caches, index = layers
  out = []
  for place, (block, cache) in enumerate(zip(stacks, caches, strict=True)):
    run = _remat(cfg, lambda block, x, where, cache, key: block(x, where, cache=cache, key=key))
    x, cache, aux = run(block, x, where, cache, _fold(key, index + place))
    out.append((cache, aux))
  return x, tuple(zip(*out, strict=True))


def _unrolled(body, x, layers):
  """jax.lax.scan's contract as a Python loop."""
  outs = []
  for i in range(len(layers[-1])):
    x, out = body(x, jax.tree.map(lambda a: a[i], layers))  # noqa: B023
    outs.append(out)
  return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def _remat(cfg: ModelConfig, block: Any):
  """Which activations of a block are kept for the backward pass (`ModelConfig.remat`).

  full: only its input. dots: results of matrix products without batch axes. offload: as dots, in
  host memory. attention: all but what lies inside attention, which sees to that itself.
  """
  policies = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
  }
  return jax.checkpoint(block, policy=policies[cfg.remat]) if cfg.remat in policies else block


def _fold(key: jax.Array | None, index) -> jax.Array | None:
  return None if key is None else jax.random.fold_in(key, index)


def _concatenate(auxes: list[Aux]) -> Aux:
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *auxes) if auxes else {}
