"""Fused attention kernels of others: cuDNN's on NVIDIA GPUs, splash attention on TPUs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from model.context import (
  SEQ,
  balanced_index,
  batch_axes,
  free_axes,
  in_row_order,
  seq_parts,
  split_heads,
)

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
  balanced: int = 1,
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """Splash attention of JAX's Pallas kernels; T is a multiple of 128.

  On a mesh the batch, the heads and the queries are split as the table of axes says, as far as they
  divide; each device runs the kernel on its part, with all keys.

  Args:
    q, k, v: bfloat16 or float32.
    seg: segments from 1, in each of which tokens lie in order; 0 is padding and gives zeros.
    causal, window: see `attention_mask`.
    scale: multiplies the scores.
    softcap: bounds the scaled scores.
    sinks: a score per head that joins the denominator of the softmax.
    balanced: see `attend`.
    interpret: run the kernel's program step by step on any device, for tests.
  """
  mesh = jax.sharding.get_abstract_mesh()
  parts = seq_parts()
  heads, k, v = split_heads(mesh, q, k, v)
  held = q.shape[2] // (math.prod(mesh.shape[axis] for axis in heads) if heads else 1)
  kernel = _splash_kernel(
    q.shape[1], held, parts, balanced=balanced, causal=causal, window=window, softcap=softcap,
    interpret=interpret,
  )  # fmt: skip
  q = q * jnp.asarray(scale, q.dtype)
  # The kernel masks by index: its keys lie in the order of the row, its queries as they are dealt.
  k, v, kv_seg = (in_row_order(x, balanced) for x in (k, v, seg))
  run = _splash_on_one_device
  if not mesh.empty and mesh.size > 1:
    batch, split = batch_axes(mesh, q.shape[0]), SEQ if parts > 1 else None
    queries, keys = P(batch, split, heads, None), P(batch, None, heads, None)
    # The place of a kernel's tables on a mesh takes a mesh of devices; only its shape is read.
    place = NamedSharding(mesh, P(None, split))
    run = jax.shard_map(
      run, out_specs=queries, axis_names=free_axes(mesh), check_vma=False,
      in_specs=(
        kernel.manual_sharding_spec(place), queries, keys, keys, P(batch, split), P(batch, None),
        P(heads),
      ),
    )  # fmt: skip
  return jnp.where((seg > 0)[:, :, None, None], run(kernel, q, k, v, seg, kv_seg, sinks), 0)


def _splash_kernel(
  T: int, N: int, parts: int, *, balanced: int, causal: bool, window, softcap, interpret: bool
):
  """Splash attention of T tokens, of whose queries each of `parts` devices has its share."""
  # Pallas' TPU part is large to import and not needed elsewhere.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  share = T // parts // (2 if balanced > 1 else 1)
  block_q = next((size for size in _BLOCKS if share % size == 0), _BLOCKS[-1])
  block = next(size for size in _BLOCKS if T % size == 0)
  if window is None:
    mask = splash.CausalMask((T, T)) if causal else splash.FullMask((T, T))
  else:
    span = (window - 1, 0) if causal else (window // 2, window // 2)
    mask = splash.LocalMask((T, T), span, 0)
  if balanced > 1:
    mask.q_sequence = np.asarray(balanced_index(T, balanced), np.int32)
  blocks = splash.BlockSizes(
    block_q=block_q, block_kv=block, block_q_dkv=block_q, block_kv_dkv=block,
    block_q_dq=block_q, block_kv_dq=block,
  )  # fmt: skip
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * N), block_sizes=blocks, attn_logits_soft_cap=softcap,
    head_shards=1, q_seq_shards=parts, interpret=interpret,
  )  # fmt: skip


def _splash_on_one_device(kernel, q, k, v, q_seg, kv_seg, sinks):
  # Pallas' TPU part is large to import and not needed elsewhere.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  row = lambda q, k, v, q_seg, kv_seg: kernel(q, k, v, splash.SegmentIds(q_seg, kv_seg), sinks)
  heads_first = lambda x: jnp.swapaxes(x, 1, 2)
  y = jax.vmap(row)(heads_first(q), heads_first(k), heads_first(v), q_seg, kv_seg)
  return heads_first(y)
