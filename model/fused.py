"""Fused attention kernels of others: cuDNN's on NVIDIA GPUs, splash attention on TPUs."""

import functools
import math
from typing import Any

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
# Keys of a block of its backward pass, which holds the gradient of queries once for each block.
_BLOCK_BACK = 1024


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
  mesh, parts, T = jax.sharding.get_abstract_mesh(), seq_parts(), q.shape[1]
  heads, k, v = split_heads(mesh, q, k, v)
  held = q.shape[2] // (math.prod(mesh.shape[axis] for axis in heads) if heads else 1)
  alike = not causal and window is None  # All see all: every device's part of the mask is the same.
  kernel = _splash_kernel(
    (T // parts if alike else T, T), held, 1 if alike else parts, balanced=balanced,
    causal=causal, window=window, softcap=softcap, interpret=interpret,
  )  # fmt: skip
  run: Any = functools.partial(_splash_on_one_device, balanced=balanced)
  if not mesh.empty and mesh.size > 1:
    batch, split = batch_axes(mesh, q.shape[0]), SEQ if parts > 1 else None
    tokens, place = P(batch, split, heads, None), P(None, None if alike else split)
    tables = kernel.manual_sharding_spec(NamedSharding(mesh, place))
    run = jax.shard_map(
      functools.partial(run, split=parts > 1), out_specs=tokens, check_vma=False,
      in_specs=(tables, tokens, tokens, tokens, P(batch, split), P(heads)),
      axis_names=free_axes(mesh),
    )  # fmt: skip
  y = run(kernel, q * jnp.asarray(scale, q.dtype), k, v, seg, sinks)
  return jnp.where((seg > 0)[:, :, None, None], y, 0)


def _splash_kernel(
  shape: tuple[int, int], heads: int, parts: int, *, balanced: int, causal: bool,
  window: int | None, softcap: float | None, interpret: bool,
):  # fmt: skip
  """Splash attention of `shape` queries and keys; each of `parts` devices has its queries."""
  # Pallas' TPU part is large to import and not needed elsewhere.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  T, S = shape
  chunk = T // parts // (2 if balanced > 1 else 1)
  block_q = next((size for size in _BLOCKS if chunk % size == 0), _BLOCKS[-1])
  block_kv = next(size for size in _BLOCKS if S % size == 0)
  mask: Any
  block_back = next(size for size in (_BLOCK_BACK, *_BLOCKS) if S % size == 0)
  if window is None:
    mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
  else:
    mask = splash.LocalMask(shape, (window - 1, 0) if causal else (window // 2, window // 2), 0)
  if balanced > 1:
    mask.q_sequence = np.asarray(balanced_index(T, balanced), np.int32)
  blocks = splash.BlockSizes(
    block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_back,
    use_fused_bwd_kernel=True,  # One kernel computes the scores again, not two.
  )  # fmt: skip
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads), block_sizes=blocks, attn_logits_soft_cap=softcap,
    head_shards=1, q_seq_shards=parts, interpret=interpret,
  )  # fmt: skip


def _splash_on_one_device(
  kernel, q, k, v, seg, sinks, *, balanced: int, split: bool = False
) -> Array:
  # Pallas' TPU part is large to import and not needed elsewhere.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  keys = (k, v, seg)
  if split:  # The kernel masks by index: queries as they are dealt, keys in the order of the row.
    whole = lambda x: jax.lax.all_gather(x, SEQ, axis=1, tiled=True)
    keys = tuple(in_row_order(whole(x), balanced) for x in keys)
  k, v, kv_seg = keys
  heads_first = lambda x: jnp.swapaxes(x, 1, 2)
  row: Any = lambda q, k, v, q_seg, kv_seg: kernel(q, k, v, splash.SegmentIds(q_seg, kv_seg), sinks)
  return heads_first(jax.vmap(row)(*map(heads_first, (q, k, v)), seg, kv_seg))
