"""Ring attention: keys and values travel from device to device, and no device holds all of them.

Sources: Liu et al., arXiv:2310.01889; blocks in the balanced order, as in Brandon et al.,
arXiv:2311.09431; sums over blocks as in FlashAttention-2, arXiv:2307.08691.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from model.context import SEQ, batch_axes, free_axes, split_heads
from model.mask import attention_mask

_BLOCK = 512  # Tokens whose scores with as many others are held at once.


@dataclasses.dataclass(frozen=True)
class _Rule:
  """What decides scores and who sees whom, the same on every device."""

  causal: bool
  window: int | None
  scale: float
  softcap: float | None
  parts: int


def ring_attention(
  q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K Hv"], *,
  q_pos: Int[Array, "B T"], kv_pos: Int[Array, "B S"], q_seg: Int[Array, "B T"] | None,
  kv_seg: Int[Array, "B S"] | None, causal: bool, window: int | None, scale: float,
  softcap: float | None, sinks: Float[Array, "N"] | None,
) -> Float[Array, "B T N Hv"]:  # fmt: skip
  """`attend` where the mesh in use splits queries and keys along their length.

  Each device keeps its queries. Keys and values, with their positions and segments, go round the
  axis `seq`, and so do their gradients in the backward pass, which computes scores once more. Of
  queries and keys that do not see each other nothing is computed. A device holds scores of one
  block of queries and keys at a time. `seq` divides T and S; batch and heads are split as well, as
  far as the mesh divides them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  heads, k, v = split_heads(mesh, q, k, v)
  batch = batch_axes(mesh, q.shape[0])
  rule = _Rule(causal, window, scale, softcap, mesh.shape[SEQ])
  tokens, ints = P(batch, SEQ, heads, None), P(batch, SEQ)
  run = jax.shard_map(
    functools.partial(_on_one_device, rule),
    in_specs=(tokens, tokens, tokens, ints, ints, ints, ints, P(heads)), out_specs=tokens,
    axis_names=free_axes(mesh), check_vma=False,
  )  # fmt: skip
  real = lambda pos: jnp.where(pos >= 0, 1, 0)
  if q_seg is None or kv_seg is None:
    q_seg, kv_seg = real(q_pos), real(kv_pos)
  return run(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks)


def _on_one_device(rule: _Rule, q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks) -> Array:
  y, total = _ring(rule, q, k, v, (q_pos, q_seg), (kv_pos, kv_seg))
  if sinks is not None:  # See `attend`: they shrink what a softmax without them gives.
    y = y * jax.nn.sigmoid(total - sinks.astype(total.dtype))[..., None]
  return y.astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(rule: _Rule, q, k, v, q_where, kv_where):
  """(outputs, log-sum-exp of scores, at least in float32) of a device's queries."""
  return _forward(rule, q, k, v, q_where, kv_where)[0]


def _forward(rule: _Rule, q, k, v, q_where, kv_where):
  exact = jnp.promote_types(q.dtype, jnp.float32)
  B, T, N, _ = q.shape
  K = k.shape[2]
  queries = (_blocks(_grouped(q, K)), *map(_blocks, q_where))
  n, _, t = queries[0].shape[:3]
  least = jnp.full((n, B, K, N // K, t), jnp.finfo(exact).min)
  sums = (least, jnp.zeros_like(least), jnp.zeros((*least.shape, v.shape[-1]), exact))

  def seen(sums, visitors):
    (k, v), where = visitors
    keys = tuple(map(_blocks, (k, v, *where)))
    return jax.lax.scan(functools.partial(_gathered, rule, queries), sums, keys)[0]

  top, whole, y = _round(rule, seen, sums, ((k, v), kv_where))
  some = jnp.where(whole > 0, whole, 1)
  home = lambda a: _joined(jnp.moveaxis(a, 4, 2)).reshape(B, T, N, *a.shape[5:])
  y, total = home(y / some[..., None]).astype(q.dtype), home(top + jnp.log(some))
  return (y, total), (q, k, v, q_where, kv_where, y, total)


def _round(rule: _Rule, seen, sums, visitors):
  """`seen(sums, visitors)` with the visitors of every device, of which each passes its own on."""

  def step(carry, _):
    sums, visitors = carry
    following = _passed_on(visitors, rule.parts)  # Sent while these are being seen.
    return (seen(sums, visitors), following), None

  (sums, visitors), _ = jax.lax.scan(step, (sums, visitors), length=rule.parts - 1)
  return seen(sums, visitors)


def _passed_on(tree, parts: int):
  ring = [(i, (i + 1) % parts) for i in range(parts)]
  return jax.tree.map(lambda a: jax.lax.ppermute(a, SEQ, ring), tree)


def _gathered(rule: _Rule, queries, sums, keys):
  """Sums over one more block of keys, for every block of queries; as the body of a scan."""
  k, v, *kv_where = keys

  def one(block):
    (q, *q_where), sums = block
    mask = _mask(rule, q_where, kv_where)

    def add(top, whole, y):
      scores = jnp.where(mask, _scores(rule, q, k), jnp.finfo(top.dtype).min)
      new = jnp.maximum(top, scores.max(axis=-1))
      powers = jnp.where(mask, jnp.exp(scores - new[..., None]), 0)
      before = jnp.exp(top - new)
      said = jnp.einsum(
        "BKGTS,BSKH->BKGTH", powers.astype(v.dtype), v, preferred_element_type=y.dtype
      )
      return new, whole * before + powers.sum(axis=-1), y * before[..., None] + said

    return jax.lax.cond(jnp.any(mask), add, lambda *sums: sums, *sums)

  return jax.lax.map(one, (queries, sums)), None


def _backward(rule: _Rule, kept, changes):
  """Gradients of queries, keys and values: those of keys travel with the keys."""
  q, k, v, q_where, kv_where, y, total = kept
  dy, dtotal = changes
  exact, K = total.dtype, k.shape[2]
  # What each query's scores have in common: d score = p · (d p - offset).
  offset = jnp.sum(dy.astype(exact) * y, axis=-1) - dtotal
  queries = (
    *(_blocks(_grouped(a, K)) for a in (q, dy, total, offset)), *map(_blocks, q_where)
  )  # fmt: skip
  dq = jnp.zeros(queries[0].shape, exact)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, exact), (k, v))

  def seen(dq, visitors):
    (k, v), where, own = visitors
    keys = tuple(map(_blocks, (k, v, *where, *own)))
    dq, own = jax.lax.scan(functools.partial(_returned, rule, queries), dq, keys)
    return dq, tuple(map(_joined, own))

  def step(carry, _):
    dq, (keys, where, own) = carry
    following = _passed_on((keys, where), rule.parts)
    dq, own = seen(dq, (keys, where, own))
    return (dq, (*following, _passed_on(own, rule.parts))), None

  (dq, visitors), _ = jax.lax.scan(step, (dq, ((k, v), kv_where, zeros)), length=rule.parts - 1)
  dq, own = seen(dq, visitors)
  dk, dv = _passed_on(own, rule.parts)  # The last step of the round: home.
  dq = _joined(dq).reshape(q.shape)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_ring.defvjp(_forward, _backward)


def _returned(rule: _Rule, queries, dq, keys):
  """Adds what every block of queries says about one block of keys; as the body of a scan."""
  k, v, kv_pos, kv_seg, dk, dv = keys

  def one(carry, block):
    (q, dy, total, offset, *q_where), dq = block
    mask = _mask(rule, q_where, (kv_pos, kv_seg))
    turned = lambda a: jnp.moveaxis(a, 1, 3)[..., None]  # As scores lie: (B, K, G, T, 1).

    def add(dk, dv, dq):
      exact = dq.dtype
      product = functools.partial(jnp.einsum, preferred_element_type=exact)
      scores = _scores(rule, q, k)
      powers = jnp.where(mask, jnp.exp(scores - turned(total)), 0)
      change = product("BTKGH,BSKH->BKGTS", dy.astype(v.dtype), v) - turned(offset)
      change *= powers
      if rule.softcap is not None:
        change *= 1 - jnp.square(scores / rule.softcap)
      change = (change * jnp.asarray(rule.scale, exact)).astype(q.dtype)
      dv += product("BKGTS,BTKGH->BSKH", powers.astype(v.dtype), dy.astype(v.dtype))
      dk += product("BKGTS,BTKGH->BSKH", change, q)
      return dk, dv, dq + product("BKGTS,BSKH->BTKGH", change, k)

    *carry, dq = jax.lax.cond(jnp.any(mask), add, lambda *sums: sums, *carry, dq)
    return tuple(carry), dq

  own, dq = jax.lax.scan(one, (dk, dv), (queries, dq))
  return dq, own


def _mask(rule: _Rule, q_where, kv_where):
  """(B, 1, 1, T, S): who sees whom, of one block of queries and one of keys."""
  (q_pos, q_seg), (kv_pos, kv_seg) = q_where, kv_where
  mask = attention_mask(q_pos, kv_pos, q_seg, kv_seg, causal=rule.causal, window=rule.window)
  return mask[:, :, None]


def _scores(rule: _Rule, q: Float[Array, "B T K G H"], k: Float[Array, "B S K H"]) -> Array:
  exact = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=exact)
  scores *= jnp.asarray(rule.scale, exact)
  if rule.softcap is None:
    return scores
  return jnp.asarray(rule.softcap, exact) * jnp.tanh(scores / rule.softcap)


def _grouped(x: Array, K: int) -> Array:
  """(B, T, N, …) -> (B, T, K, N / K, …)."""
  return x.reshape(*x.shape[:2], K, x.shape[2] // K, *x.shape[3:])


def _blocks(x: Array) -> Array:
  """(B, T, …) -> (blocks, B, tokens of a block, …)."""
  size = _block_size(x.shape[1])
  return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _joined(x: Array) -> Array:
  """`_blocks` undone."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _block_size(length: int) -> int:
  """The longest block of at most `_BLOCK` tokens that divides both chunks of a device's tokens.

  A length whose divisors are all short is one block for each chunk.
  """
  half = length // 2 if length % 2 == 0 else length
  best = max(d for d in range(1, min(half, _BLOCK) + 1) if half % d == 0)
  return half if math.ceil(half / best) > 8 * math.ceil(half / _BLOCK) else best
