"""Fused attention kernels of others: cuDNN's on NVIDIA GPUs, splash attention on TPUs."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from model.sharding import mesh_axes, mesh_parts

_BLOCKS = (512, 384, 256, 128)  # Of splash attention, in tokens; the first that divides.


def cudnn_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Bool[Array, "B 1 T S"],
  *,
  scale: float,
  causal: bool,
) -> Float[Array, "B T N H"]:
  """cuDNN flash attention under any mask; rows that see nothing give zeros.

  Args:
    q, k, v: bfloat16 or float16.
    mask: what each query sees, all of it.
    scale: multiplies the scores.
    causal: no query sees a key of a later index, so that such blocks may be skipped.
  """
  y = jax.nn.dot_product_attention(
    q, k, v, mask=mask, scale=scale, is_causal=causal, implementation="cudnn"
  )
  return jnp.where(jnp.any(mask, axis=-1)[:, 0, :, None, None], y, 0)


def splash_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  seg: Int[Array, "B T"],
  *,
  causal: bool,
  window: int | None,
  scale: float,
  softcap: float | None,
  sinks: Float[Array, "N"] | None = None,
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """Splash attention of JAX's Pallas kernels; T is a multiple of 128.

  On a mesh the batch and the heads are split as the table of axes says, as far as they divide; each
  device runs the kernel on its part.

  Args:
    q, k, v: bfloat16 or float32.
    seg: segments from 1, in each of which tokens lie in order; 0 is padding and gives zeros.
    causal, window: see `attention_mask`.
    scale: multiplies the scores.
    softcap: bounds the scaled scores.
    sinks: a score per head that joins the denominator of the softmax.
    interpret: run the kernel's program step by step on any device, for tests.
  """
  part = functools.partial(
    _splash_on_one_device, causal=causal, window=window, softcap=softcap, interpret=interpret
  )
  q = q * jnp.asarray(scale, q.dtype)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    y = part(q, k, v, seg, sinks)
  else:
    y = _splash_on_mesh(part, q, k, v, seg, sinks, mesh)
  return jnp.where((seg > 0)[:, :, None, None], y, 0)


def _splash_on_one_device(q, k, v, seg, sinks, *, causal: bool, window, softcap, interpret: bool):
  # Pallas' TPU part is large to import and not needed elsewhere.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  T, N = q.shape[1], q.shape[2]
  block = next(size for size in _BLOCKS if T % size == 0)
  if window is None:
    mask = splash.CausalMask((T, T)) if causal else splash.FullMask((T, T))
  else:
    span = (window - 1, 0) if causal else (window // 2, window // 2)
    mask = splash.LocalMask((T, T), span, 0)
  blocks = splash.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
    block_q_dq=block, block_kv_dq=block,
  )  # fmt: skip
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * N), block_sizes=blocks, attn_logits_soft_cap=softcap,
    head_shards=1, q_seq_shards=1, interpret=interpret,
  )  # fmt: skip
  row = lambda q, k, v, seg: kernel(q, k, v, splash.SegmentIds(seg, seg), sinks)
  heads_first = lambda x: jnp.swapaxes(x, 1, 2)
  return heads_first(jax.vmap(row)(heads_first(q), heads_first(k), heads_first(v), seg))


def _splash_on_mesh(part, q, k, v, seg, sinks, mesh):
  """`part` on each device's rows and heads; devices that share a key/value head hold copies."""
  batch = mesh_axes("batch", mesh) if q.shape[0] % mesh_parts("batch", mesh) == 0 else None
  N, K, parts = q.shape[2], k.shape[2], mesh.shape.get("tensor", 1)
  heads = "tensor" if N % parts == 0 and (K % parts == 0 or parts % K == 0) else None
  if heads and K % parts:
    k, v = jnp.repeat(k, parts // K, axis=2), jnp.repeat(v, parts // K, axis=2)
  whole = P(batch, None, heads, None)
  sink_place = None if sinks is None else P(heads)
  run = jax.shard_map(
    part, in_specs=(whole, whole, whole, P(batch, None), sink_place), out_specs=whole,
    check_vma=False,
  )  # fmt: skip
  return run(q, k, v, seg, sinks)
