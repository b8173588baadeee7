"""Fused attention kernels of others: cuDNN's on NVIDIA GPUs, splash attention on TPUs."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

_BLOCKS = (512, 384, 256, 128)  # Of splash attention, in tokens; measured ones for TPUs by others.


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
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """Splash attention of JAX's Pallas kernels; T is a multiple of 128.

  On a mesh the batch is split over `data` and `fsdp` and the heads over `tensor`, as far as they
  divide; each device runs the kernel on its part.

  Args:
    q, k, v: bfloat16 or float32.
    seg: segments from 1, in each of which tokens lie in order; 0 is padding and gives zeros.
    causal, window: see `attention_mask`.
    scale: multiplies the scores.
    softcap: bounds the scaled scores.
    interpret: run the kernel's program step by step on any device, for tests.
  """
  part = _on_one_device(causal, window, softcap, interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1:
    k, v, part = _sharded(part, q, k, v, mesh)
  y = part((q * jnp.asarray(scale, q.dtype)), k, v, seg)
  return jnp.where((seg > 0)[:, :, None, None], y, 0)


def _on_one_device(causal: bool, window: int | None, softcap: float | None, interpret: bool):
  # Pallas' TPU part is large to import and not needed elsewhere.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  def part(q, k, v, seg):
    T, N = q.shape[1], q.shape[2]
    block = next(b for b in _BLOCKS if T % b == 0)
    if causal:
      span = None if window is None else (window - 1, 0)
      one = splash.CausalMask((T, T)) if span is None else splash.LocalMask((T, T), span, 0)
    else:
      span = None if window is None else (window // 2, window // 2)
      one = splash.FullMask((T, T)) if span is None else splash.LocalMask((T, T), span, 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    kernel = splash.make_splash_mha(
      splash.splash_attention_mask.MultiHeadMask([one] * N),
      block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
      attn_logits_soft_cap=softcap, head_shards=1, q_seq_shards=1, interpret=interpret,
    )  # fmt: skip
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    run = lambda q, k, v, seg: kernel(q, k, v, splash.SegmentIds(seg, seg))
    return heads_first(jax.vmap(run)(heads_first(q), heads_first(k), heads_first(v), seg))

  return part


def _sharded(part, q: Array, k: Array, v: Array, mesh):
  """`part` on each device's rows and heads; keys and values repeated where devices share them."""
  rows = tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)
  count = 1
  for axis in rows:
    count *= mesh.shape[axis]
  batch = rows if q.shape[0] % count == 0 else None
  N, K, parts = q.shape[2], k.shape[2], mesh.shape.get("tensor", 1)
  heads = "tensor" if parts > 1 and N % parts == 0 else None
  if heads and K % parts:
    if parts % K == 0:
      k, v = jnp.repeat(k, parts // K, axis=2), jnp.repeat(v, parts // K, axis=2)
    else:
      heads = None
  whole = P(batch, None, heads, None)
  run = jax.shard_map(
    part, in_specs=(whole, whole, whole, P(batch, None)), out_specs=whole, check_vma=False
  )
  return k, v, run
